"""The pictures of a run again: masks.png, curves.png and, where T has chosen masks, masks-over-training.png.

    python mlo_mae.py show RUN

Reconstructions are of normalised patches: they are shown with the mean and contrast of each true patch, which the decoder
does not know. A run of SemMAE (baselines.py), which has a parts.pt, shows its parts in place of p.
"""

import argparse
import sys
from pathlib import Path

import torch

import mlo_mae
from data import Splits
from experiments import open_run
from experiments.baselines import part_ids, read_parts, semantic_masks
from harness import cli
from harness.pictures import PARTS, PIXELS, PROBABILITY, as_images, curves, grid
from harness.run import read_masks, read_metrics
from harness.vectors import call
from kernels import gather_patches


@torch.no_grad()
def draw_run(net: mlo_mae.Networks, state: mlo_mae.State, splits: Splits, out: Path) -> list[Path]:
    """Write all pictures of the run in the folder `out` into it; returns their paths. Raises UserError.

    The decoder predicts normalised patches; they are un-normalised here with each true patch's own mean and deviation."""
    images, size = splits.watched(mlo_mae.SHOWN)[0], net.cfg.patch_size
    parts = read_parts(net.cfg, splits, out / "parts.pt", images.device) if (out / "parts.pt").exists() else None
    if parts:
        net.score = semantic_masks(net, parts)
    progress = state.iteration / mlo_mae.mask_updates(net.cfg, splits)
    prob, keep, restore, mask = mlo_mae.masks_now(net, state, images, progress)
    encoder_params, decoder_params = state.theta.params.tensor_split([net.encoder_size])
    with mlo_mae.autocast(net, images.device):
        pred = call(net.decoder, decoder_params, call(net.encoder, encoder_params, images, keep), restore).float()
    target, hidden = gather_patches(images, None, size), mask[..., None]  # [B, L, p*p*C], [B, L, 1]
    pred = pred * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)

    def shown(patches):
        return as_images(patches, size, splits.mean, splits.std)

    original = ("image", shown(target), PIXELS)
    chosen_by = []  # nothing, where every patch counts alike
    if parts:
        chosen_by = [("part", part_ids(net, parts, images) / parts.learner.parts, PARTS)]
    elif not (prob == 1).all():
        relative = prob / prob.max().clamp_min(1e-9)  # AdamW makes level 1 blind to a common factor of p
        lit = original[1] * as_images(relative[..., None].expand_as(target), size, [0.0], [1.0])
        chosen_by = [("weight p", prob, PROBABILITY), ("image lit by p", lit, PIXELS)]
    rows = [
        original,
        *chosen_by,
        ("visible", shown(target * (1 - hidden)), PIXELS),  # hidden patches in the data set's mean colour
        ("reconstruction", shown(pred), PIXELS),
        ("with visible", shown(target * (1 - hidden) + pred * hidden), PIXELS),
    ]
    grid(out / "masks.png", rows)
    curves(out / "curves.png", read_metrics(out / "metrics.jsonl"))
    written = [out / "masks.png", out / "curves.png"]
    if (out / "masks.jsonl").exists():  # p at points of the run, from T's first on
        p, epochs = read_masks(out / "masks.jsonl", (len(images), net.patches))
        rows = [(f"p, epoch {epoch:.1f}", values, PROBABILITY) for epoch, values in zip(epochs, p)]
        written.append(out / "masks-over-training.png")
        grid(written[-1], [original, *rows])
    return written


after_training = draw_run  # what `mlo_mae.pretrain` ends with


def run_command(argv: list[str] | None) -> dict:
    """Run `show` with these flags; returns what its last line reports."""
    parser = cli.Parser(prog="mlo_mae.py show", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--data", default=argparse.SUPPRESS, help="the same data, where it lies now")
    parser.add_argument("--data-dir", default=argparse.SUPPRESS, help="where CIFAR lies now")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    flags = vars(parser.parse_args(argv))
    run = flags["run"]
    return {"verb": "show", "run": str(run), "pictures": list(map(str, draw_run(*open_run(**flags), run)))}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
