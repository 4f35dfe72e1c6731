"""What every table of measurements has: the machine that they were made on, its rows, and a file under benchmarks/."""

import contextlib
import platform
import re
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def machine(device: torch.device) -> dict[str, str | int | None]:
    """{name: text or number}: all that a time depends on beside the program. None: this machine has or tells no such thing."""
    cpu, kind = platform.processor() or platform.machine(), None
    with contextlib.suppress(OSError, TypeError):
        text = Path("/proc/cpuinfo").read_text()
        cpu = re.search(r"model name\s*: (.*)", text)[1]
        kind = "/".join(re.search(rf"{name}\s*: (\d+)", text)[1] for name in ("family", "model"))  # a name may cover several
    triton = sys.modules.get("triton")
    return {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "cpu": cpu,
        "family/model": kind,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
    }


def table(rows: list[list[str]]) -> str:
    """Rows of text, the first one the titles, as markdown that is aligned for reading as it is."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (rows[0], rule, *rows[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def saved_path(verb: str, device: torch.device, suffix: str) -> Path:
    """benchmarks/<verb>-<machine>.<suffix>; makes the folder."""
    facts = machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or f"{facts['cpu']} {facts['threads']} threads").lower()).strip("-")
    BENCHMARKS.mkdir(exist_ok=True)
    return BENCHMARKS / f"{verb}-{name}.{suffix}"
