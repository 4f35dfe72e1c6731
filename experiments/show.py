"""The pictures of a run again: masks.png, curves.png and, where T has chosen masks, masks-over-training.png.

    python mlo_mae.py show RUN
    python mlo_mae.py show RUN RUN ... --out FILE    # curves of several runs on the same data, one panel a measure

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

import data
import mlo_mae
from data import Splits
from experiments import config_of, open_run, reconstructed
from experiments.baselines import part_ids, read_parts, semantic_masks
from harness import UserError, cli
from harness.checkpoints import fitting, newest
from harness.cli import flag_name
from harness.files import check_free
from harness.pictures import HIDDEN, PARTS, PIXELS, as_images, curves, grid, overlaid, scale_of
from harness.run import difference, read_masks, read_metrics
from kernels import gather_patches

LABELS_UNIT = {"ridge": "squared error of labels", "steps": "cross-entropy, nats"}  # by --level2


def picture_rows(
    net: mlo_mae.Networks,
    theta: Tensor,
    images: Tensor,
    drawn: tuple[Tensor, Tensor, Tensor, Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    parts: Tensor | None = None,
    raw: bool = False,
) -> tuple[list[tuple[str, np.ndarray | Tensor, dict]], str]:
    """Rows for `grid`, and what it says below them: images [B, C, H, W], what T or `parts` [B, L] (from 0 to 1) say of their
    patches, what the encoder sees, and what the decoder makes of the rest. drawn: what `mlo_mae.draw_masks` returns; raw: as
    in `reconstructed`."""
    size, (prob, keep, restore, mask) = net.cfg.patch_size, drawn
    pred = reconstructed(net, theta, images, keep, restore, raw)
    target, hidden = gather_patches(images, None, size), mask[..., None]  # [B, L, p*p*C], [B, L, 1]
    original, predicted = (as_images(patches, size, mean, std) for patches in (target, pred))
    covered = as_images(hidden.expand_as(target), size, [0.0], [1.0])  # 1 where hidden

    chosen_by, text, lent = [], "All patches count alike.", "" if raw else ", with each true patch's mean and contrast"
    if parts is not None:
        chosen_by, text = [("part", parts, PARTS)], "One colour, one part of the image: patches are hidden part by part."
    elif (prob != prob[:, :1]).any():
        scale = scale_of(prob)
        over = overlaid(original, prob.cpu().numpy(), scale)
        chosen_by = [("p, weight of\neach patch", prob, scale), ("p over\nthe image", over, scale)]
        text = "Bright patches count more. If T works, they lie on objects."
    return [
        ("image", original, PIXELS),
        *chosen_by,
        ("encoder sees\n(grey: hidden)", original * (1 - covered) + HIDDEN * covered, PIXELS),
        ("decoder fills\nhidden patches", original * (1 - covered) + predicted * covered, PIXELS),
    ], f"{text} Visible patches are shown as they are; hidden ones as reconstructed{lent}."


@torch.no_grad()
def draw_run(net: mlo_mae.Networks, state: mlo_mae.State, splits: Splits, out: Path) -> list[Path]:
    """Write all pictures of the run in the folder `out` into it; returns their paths. Raises UserError."""
    images = splits.watched(mlo_mae.SHOWN)[0]
    parts = read_parts(net.cfg, splits, out / "parts.pt", images.device) if (out / "parts.pt").exists() else None
    if parts:
        net.score = semantic_masks(net, parts)
    drawn = mlo_mae.masks_now(net, state, images, state.iteration / mlo_mae.mask_updates(net.cfg, splits))
    numbers = part_ids(net, parts, images) / parts.learner.parts if parts else None
    rows, text = picture_rows(net, state.theta.params, images, drawn, splits.mean, splits.std, numbers)
    grid(out / "masks.png", rows, text)
    curves(out / "curves.png", {out.name: read_metrics(out / "metrics.jsonl")}, LABELS_UNIT[net.cfg.level2])
    written = [out / "masks.png", out / "curves.png"]
    p, epochs = [], []  # p at points of the run, from T's first on
    if (out / "masks.jsonl").exists():
        p, epochs = read_masks(out / "masks.jsonl", (len(images), net.patches))
    if epochs:
        scale, written = scale_of(p), [*written, out / "masks-over-training.png"]
        film = [(f"epoch {epoch:.1f}", overlaid(rows[0][1], values, scale), scale) for epoch, values in zip(epochs, p)]
        text = "p over the images, from when T begins to learn (left) to when it has. If T works, objects light up."
        grid(written[-1], [rows[0], *film], text, film=True)
    return written


def compare(runs: Sequence[Path], out: Path) -> None:
    """Write the curves of several runs on the same data over each other. Raises UserError."""
    places, configs, facts = [run.resolve() for run in runs], [], []
    for number, run in enumerate(runs):
        if places[number] in places[:number]:
            raise UserError(f"{run} is given twice; name each run once")
        content = newest(run, mlo_mae.FORMAT)
        with fitting(run / "checkpoint.pt"):
            configs.append(config_of(content))
            facts.append({"name of the data": Path(configs[-1].data).name} | content["data"])
            same_split = configs[-1].seed == configs[0].seed  # of which there is a digest
            free = data.COMPUTED | {"name of the data" if same_split else "digest"}
            what = difference(facts[0], facts[-1], free)
        if what:
            raise UserError(f"{run} is not on the data of {runs[0]} ({what}); give runs on the same data")
    names = [place.name for place in places]
    names = names if len(set(names)) == len(names) else list(map(str, runs))
    levels = {cfg.level2 for cfg in configs}
    unit = LABELS_UNIT[configs[0].level2] if len(levels) == 1 else "squared error, or cross-entropy"
    curves(out, {name: read_metrics(run / "metrics.jsonl") for name, run in zip(names, runs)}, unit)


after_training = draw_run  # what `mlo_mae.pretrain` ends with


def run_command(argv: list[str] | None) -> dict:
    """Run `show` with these flags; returns what its last line reports."""
    parser = cli.Parser(prog="mlo_mae.py show", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of the run; of several, with --out")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the curves of several runs, over each other")
    parser.add_argument("--data", default=argparse.SUPPRESS, help="the same data, where it lies now")
    parser.add_argument("--data-dir", default=argparse.SUPPRESS, help="where CIFAR lies now")
    parser.add_argument("--device", default=argparse.SUPPRESS, help="auto, cpu, cuda, mps (default auto)")
    flags = vars(parser.parse_args(argv))
    runs, out = flags.pop("runs"), flags.pop("out")
    if len(runs) == 1:
        if out:
            raise UserError("--out is for the curves of several runs; the pictures of one lie in its folder")
        return {
            "command": "show",
            "run": str(runs[0]),
            "pictures": list(map(str, draw_run(*open_run(*runs, **flags, classes=False), *runs))),
        }
    if flags:
        raise UserError(f"{flag_name(next(iter(flags)))} is for the pictures of one run; several are read as they lie")
    if not out:
        raise UserError("the curves of several runs make one picture; name its file with --out")
    check_free(out)
    compare(runs, out)
    return {"command": "show", "runs": list(map(str, runs)), "pictures": [str(out)]}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
