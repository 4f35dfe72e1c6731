"""Linear probe of a run: how well a linear classifier does on its encoder's frozen features.

    python mlo_mae.py probe RUN
    python mlo_mae.py probe RUN --recipe mae --pooling mean     # MAE's own recipe; mean of the patches' tokens

The training split fits several probes, the validation split chooses one, and the test split is read once.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch

import mlo_mae
from data import Splits
from experiments import features, open_run
from harness import cli
from harness.files import write_whole
from harness.probe import PROBES, linear_probe

RECIPE_HELP = (
    "lbfgs: up to 100 iterations, weight decay chosen on validation; mae: MAE's, by SGD, learning rate chosen on validation "
    "(default lbfgs)"
)


def probe(
    net: mlo_mae.Networks, state: mlo_mae.State, splits: Splits, recipe: str = "lbfgs", pooling: str = ""
) -> dict[str, float]:
    """The accuracies (shares) that `harness.probe.linear_probe` returns, of the features of this state's encoder."""
    found = [features(net, state.theta.params, split, pooling) for split in (*splits.labelled, splits.test)]
    how, device, precision = (len(splits.class_names), recipe), state.theta.params.device, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # also after a run in bfloat16
    try:
        if device.type == "cuda":
            with contextlib.suppress(torch.OutOfMemoryError):  # then the CPU fits them, in far more time
                return linear_probe(*(tuple(some.to(device) for some in pair) for pair in found), *how)
        return linear_probe(*found, *how)
    finally:
        torch.set_float32_matmul_precision(precision)


def after_training(net: mlo_mae.Networks, state: mlo_mae.State, splits: Splits, out: Path) -> dict[str, float]:
    """What `mlo_mae.pretrain` ends with: `probe`, which also goes into the run's folder."""
    found = probe(net, state, splits)
    write_whole(out / "probe.json", json.dumps(found).encode())
    return found


def run_command(argv: list[str] | None) -> dict:
    """Run `probe` with these flags; returns what its last line reports."""
    parser = cli.Parser(prog="mlo_mae.py probe", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--data", default=argparse.SUPPRESS, help="the same data, where it lies now")
    parser.add_argument("--data-dir", default=argparse.SUPPRESS, help="where CIFAR lies now")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--recipe", choices=list(PROBES), default="lbfgs", help=RECIPE_HELP)
    pooling = "mean of the patches' tokens, or CLS token (default: the run's)"
    parser.add_argument("--pooling", choices=["mean", "cls"], default="", help=pooling)
    flags = vars(parser.parse_args(argv))
    how = {name: flags.pop(name) for name in ("recipe", "pooling")}
    net, state, splits = open_run(**flags)
    how["pooling"] = how["pooling"] or net.cfg.pooling
    return {"command": "probe", "run": str(flags["run"]), **how, **probe(net, state, splits, **how)}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
