"""The pictures of a run again: masks.png, curves.png and, where T has chosen masks, masks-over-training.png.

    python mlo_mae.py show RUN

Reconstructions are of normalised patches: they are shown with the mean and contrast of each true patch, which the decoder
does not know. A run of SemMAE (baselines.py), which has a parts.pt, shows its parts in place of p.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import mlo_mae
from data import Splits
from experiments import open_run, reconstructed
from experiments.baselines import part_ids, read_parts, semantic_masks
from harness import cli
from harness.pictures import PARTS, PIXELS, PROBABILITY, as_images, curves, grid
from harness.run import read_masks, read_metrics
from kernels import gather_patches


def picture_rows(
    net: mlo_mae.Networks,
    theta: Tensor,
    images: Tensor,
    drawn: tuple[Tensor, Tensor, Tensor, Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    parts: Tensor | None = None,
) -> list[tuple[str, np.ndarray | Tensor, dict]]:
    """Rows for `grid`: images [B, C, H, W], what T or `parts` [B, L] (from 0 to 1) say of their patches, what the encoder
    sees, and what the decoder makes of it. drawn: what `mlo_mae.draw_masks` returns."""
    size, (prob, keep, restore, mask) = net.cfg.patch_size, drawn
    pred = reconstructed(net, theta, images, keep, restore)
    target, hidden = gather_patches(images, None, size), mask[..., None]  # [B, L, p*p*C], [B, L, 1]

    def shown(patches):
        return as_images(patches, size, mean, std)

    original = ("image", shown(target), PIXELS)
    chosen_by = []  # nothing, where every patch counts alike
    if parts is not None:
        chosen_by = [("part", parts, PARTS)]
    elif not (prob == 1).all():
        relative = prob / prob.max().clamp_min(1e-9)  # AdamW makes level 1 blind to a common factor of p
        lit = original[1] * as_images(relative[..., None].expand_as(target), size, [0.0], [1.0])
        chosen_by = [("weight p", prob, PROBABILITY), ("image lit by p", lit, PIXELS)]
    return [
        original,
        *chosen_by,
        ("visible", shown(target * (1 - hidden)), PIXELS),  # hidden patches in the data set's mean colour
        ("reconstruction", shown(pred), PIXELS),
        ("with visible", shown(target * (1 - hidden) + pred * hidden), PIXELS),
    ]


@torch.no_grad()
def draw_run(net: mlo_mae.Networks, state: mlo_mae.State, splits: Splits, out: Path) -> list[Path]:
    """Write all pictures of the run in the folder `out` into it; returns their paths. Raises UserError."""
    images = splits.watched(mlo_mae.SHOWN)[0]
    parts = read_parts(net.cfg, splits, out / "parts.pt", images.device) if (out / "parts.pt").exists() else None
    if parts:
        net.score = semantic_masks(net, parts)
    drawn = mlo_mae.masks_now(net, state, images, state.iteration / mlo_mae.mask_updates(net.cfg, splits))
    numbers = part_ids(net, parts, images) / parts.learner.parts if parts else None
    rows = picture_rows(net, state.theta.params, images, drawn, splits.mean, splits.std, numbers)
    grid(out / "masks.png", rows)
    curves(out / "curves.png", read_metrics(out / "metrics.jsonl"))
    written = [out / "masks.png", out / "curves.png"]
    if (out / "masks.jsonl").exists():  # p at points of the run, from T's first on
        p, epochs = read_masks(out / "masks.jsonl", (len(images), net.patches))
        over_training = [(f"p, epoch {epoch:.1f}", values, PROBABILITY) for epoch, values in zip(epochs, p)]
        written.append(out / "masks-over-training.png")
        grid(written[-1], [rows[0], *over_training])
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
    return {"verb": "show", "run": str(run), "pictures": list(map(str, draw_run(*open_run(**flags, classes=False), run)))}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
