"""The pictures of a run again: masks.png, masks-over-training.png and curves.png.

    python mlo_mae.py show RUN

A run of SemMAE (baselines.py), which has a parts.pt, shows its parts in place of p.
"""

import sys
from pathlib import Path

from experiments.baselines import draw_parts
from harness import cli
from mlo_mae import draw_run, open_run


def show(run: Path, device: str = "auto", **machine) -> list[Path]:
    """Draw the pictures of the run in this folder into it; returns their paths.

    machine: settings of the run that are others on this machine, such as data_dir. Raises UserError."""
    if (run / "parts.pt").exists():
        return draw_parts(run, device, **machine)
    return draw_run(*open_run(run, device, **machine), run)


def run_command(argv: list[str] | None) -> dict:
    """Run `show` with these flags; returns what its last line reports."""
    parser = cli.Parser(prog="mlo_mae.py show", description=__doc__.splitlines()[0])
    cli.add_run(parser)
    flags = vars(parser.parse_args(argv))
    run = flags.pop("run")
    return {"verb": "show", "run": str(run), "pictures": list(map(str, show(run, **flags)))}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
