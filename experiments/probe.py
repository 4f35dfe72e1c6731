"""Linear probe of a run: how well a linear classifier does on its encoder's frozen features.

    python mlo_mae.py probe RUN
    python mlo_mae.py probe RUN --recipe mae --pooling mean     # MAE's own recipe; mean of the patches' tokens

The training split fits several probes, the validation split chooses one, and the test split is read once.
"""

import sys
from pathlib import Path

from harness import cli
from harness.probe import PROBES, linear_probe
from mlo_mae import features, open_run


def probe(run: Path, recipe: str = "lbfgs", pooling: str = "cls", device: str = "auto", **machine) -> dict[str, float]:
    """The accuracies (shares) of the run in this folder, as `harness.probe.linear_probe` returns them.

    machine: settings of the run that are others on this machine, such as data_dir. Raises UserError."""
    net, state, splits = open_run(run, device, **machine)
    found = [features(net, state.theta.params, split, pooling) for split in (splits.train, splits.val, splits.test)]
    return linear_probe(*found, len(splits.class_names), recipe)


def run_command(argv: list[str] | None) -> dict:
    """Run `probe` with these flags; returns what its last line reports."""
    parser = cli.Parser(prog="mlo_mae.py probe", description=__doc__.splitlines()[0])
    cli.add_run(parser)
    parser.add_argument(
        "--recipe",
        choices=list(PROBES),
        default="lbfgs",
        help="lbfgs: to convergence, weight decay chosen on validation; mae: MAE's, by SGD, learning rate chosen on "
        "validation (default lbfgs)",
    )
    parser.add_argument(
        "--pooling", choices=["cls", "mean"], default="cls", help="CLS token, or mean of the patches' tokens (default cls)"
    )
    flags = vars(parser.parse_args(argv))
    how = {name: flags[name] for name in ("recipe", "pooling")}
    return {"verb": "probe", "run": str(flags["run"]), **how, **probe(**flags)}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
