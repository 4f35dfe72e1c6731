"""Measuring: the machine, the time and memory of calls, and the pages and lines of JSON that hold what was found.

Times are in seconds and memory in bytes. Before and after a timed call the device is idle; calls that are compared are made
in turn, so that a disturbance of the machine falls on all of them alike.
"""

import argparse
import contextlib
import functools
import gc
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import kernels
from harness import cli
from harness.files import append_line, write_whole

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
Call = Callable[[], Any]  # what is timed

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory on a CPU, is chatty


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


def show_page(argv: list[str], facts: dict[str, Any], table: list[str], notes: list[str], save: str = "") -> None:
    """Print what a command of `mlo_mae.py` has found: its command line (argv begins with the command), the machine and other
    facts, {name: value}, of which None is left out, the lines of a table, and notes. With a name, also write
    benchmarks/<save>.md."""
    heading = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    text = "\n".join([f"`python mlo_mae.py {shlex.join(argv)}`", "", heading, "", *table, "", *notes])
    print(text)
    if save:
        write_whole(BENCHMARKS / f"{save}.md", (text + "\n").encode())


# ------------------------------------------------------------------------------------------------- time and memory


def seconds(call: Call, device: torch.device) -> float:
    """Wall time of one call, in seconds, with the device idle at both ends."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device is idle."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def interleaved(fresh: Callable[[], dict[Any, Call]], repeats: int, device: torch.device) -> dict[Any, list[float]]:
    """{name: [seconds]} of the calls {name: function} that `fresh` returns, made in turn. `fresh` is called before each
    round, outside the timing, to draw new inputs."""
    times = {}
    for repeat in range(repeats):
        calls = fresh()
        for name in list(calls)[:: -1 if repeat % 2 else 1]:
            times.setdefault(name, []).append(seconds(calls[name], device))
    return times


def quartiles(values: list[float]) -> dict[str, float]:
    """{"seconds": median, "seconds_q1", "seconds_q3"}."""
    median, q1, q3 = np.quantile(values, (0.5, 0.25, 0.75)).tolist()
    return {"seconds": median, "seconds_q1": q1, "seconds_q3": q3}


def peak_memory(call: Call, device: torch.device) -> tuple[Any, int]:
    """(what the call returns, the most bytes that it held at once beyond those in use before it)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return result, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    held = peak = 0
    for event in record.profiler.kineto_results.events():  # allocations (+) and releases (-), in order
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return result, peak


def operations(call: Call) -> int:
    """Floating-point operations of the matrix products of a call, on the plain operations that the counter knows."""
    with kernels.use("reference"), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class Operators(TorchDispatchMode):
    """Counts the operators that run within: those that compute or move values, not views and questions about tensors."""

    count = 0
    QUESTIONS = {"is_same_size", "_has_same_storage_numel", "detach", "alias", "lift_fresh", "_unsafe_view"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        self.count += not function.is_view and name not in self.QUESTIONS
        return function(*args, **(kwargs or {}))


def operators(call: Call) -> int:
    """How many of torch's operators a call runs on the plain operations: on a GPU each is a launch or more."""
    with kernels.use("reference"), Operators() as counter:
        call()
    return counter.count


def host_seconds(call: Call) -> float:
    """Seconds until a call has told a GPU all that there is to do, which may take it longer."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent


def product_rate(device: torch.device, *dtypes: torch.dtype) -> float:
    """Operations a second of a large matrix product on this machine, in the fastest of these dtypes."""
    side, calls = 8192 if device.type == "cuda" else 1024, {}
    for dtype in set(dtypes):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        calls[dtype] = lambda a=a, b=b: a @ b
    return 2 * side**3 / fastest(calls, device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes, counted once each."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)  # 1 GiB, 64 MiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest({"copy": lambda: target.copy_(source)}, device)


def fastest(calls: dict[Any, Call], device: torch.device) -> float:
    """The shortest time of any of these calls, in seconds, after a warm-up."""
    interleaved(lambda: calls, 2, device)
    return min(map(min, interleaved(lambda: calls, 5, device).values()))


def shown_cost(row: dict) -> tuple[str, str]:
    """Milliseconds as median [first quartile, third], and MiB, of a row of `quartiles` and "peak_bytes"."""
    median, q1, q3 = (f"{1e3 * row[name]:.4g}" for name in ("seconds", "seconds_q1", "seconds_q3"))
    return f"{median} [{q1}, {q3}]", f"{row['peak_bytes'] / 2**20:.1f}"


# --------------------------------------------------------------------- calls too short for the clock, in a row

CACHE = 2**28  # bytes, several times what any GPU's last cache holds


def in_a_row(make: Callable[..., Call], inputs: list[tuple], count: int, device: torch.device) -> Call:
    """A function that makes `count` calls: of make(*each) for each of the inputs, in turn. On a GPU they are one CUDA graph,
    whose replay takes the device's time alone: Python and launches, which other work hides in a program, do not count."""

    def run(calls):
        for number in range(count):
            calls[number % len(calls)]()

    if device.type != "cuda":
        return functools.partial(run, [make(*each) for each in inputs])
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a backward runs on the stream of its forward
        calls = [make(*each) for each in inputs]
        run(calls)
    with torch.cuda.stream(torch.cuda.current_stream()):  # which a capture that fails would not give back
        with torch.cuda.graph(graph, stream=stream):
            run(calls)

    def replay(held=calls):  # the graph reads and writes their tensors
        graph.replay()

    replay()  # the first one uploads the graph
    return replay


def repeats_of(call: Call, device: torch.device) -> int:
    """So many calls in a row, about 10 ms of them, that the clock does not matter."""
    return max(1, min(100, int(1e-2 / min(seconds(call, device) for _ in range(3)))))


def input_sets(draw: Callable[[], tuple], count: int, device: torch.device) -> list[tuple]:
    """Inputs for `count` calls to take in turn: as many draws as it takes that no cache of the device holds them."""
    inputs = [draw()]
    size = sum(x.nbytes for x in tree_leaves(inputs))
    more = 0 if device.type == "cpu" else min(count, CACHE // size) - 1
    return inputs + [draw() for _ in range(more)]


def copier(moved: float, device: torch.device) -> Callable[..., Call]:
    """For `in_a_row`: a plain copy that reads and writes so many bytes, whatever the inputs are."""

    def make(*_):
        source = torch.randn(max(1, int(moved) // 8), device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return make


# ---------------------------------------------------------------------------------------------------------- errors


def to_double(tree: Any) -> Any:
    """The tree with its tensors of floats in float64."""
    return tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree)


def relative_error(found: torch.Tensor, judge: torch.Tensor) -> float:
    """|found - judge| / |judge|, of a judge in float64."""
    return float((found.double() - judge).norm() / judge.norm())


def largest_error(result: Any, judge: Any) -> float:
    """Of the tensors that a call returned, the largest relative error against those of the judge; NaN where one is."""
    errors = [*map(relative_error, tree_leaves(result), map(torch.Tensor.double, tree_leaves(judge)))]
    return max(errors, key=lambda error: (math.isnan(error), error))


# --------------------------------------------------------------------------------------- pages, and lines of JSON


def table(rows: list[list[str]], widths: list[int] | None = None) -> str:
    """Rows of text, the first one the titles, as markdown that is aligned for reading as it is."""
    widths = widths or [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (rows[0], rule, *rows[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(titles: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """The lines of a table; `left` columns are aligned to the left."""
    rule = "---|" * left + "--:|" * (len(titles) - left)
    return [f"| {' | '.join(titles)} |", f"|{rule}", *(f"| {' | '.join(row)} |" for row in rows)]


def saved_path(name: str, device: torch.device, suffix: str) -> Path:
    """benchmarks/<name>-<machine>.<suffix>; makes the folder."""
    facts = machine(device)
    where = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or f"{facts['cpu']} {facts['threads']} threads").lower()).strip("-")
    BENCHMARKS.mkdir(exist_ok=True)
    return BENCHMARKS / f"{name}-{where}.{suffix}"


def finite(tree: Any) -> Any:
    """The tree with None for numbers that are not finite, which JSON has not."""
    return tree_map(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, tree)


class Page:
    """What a program that measures says, and its rows, each as soon as it is there: lines on the screen and, with a path, in
    a file that is whole after every one; rows in `rows` and, with `rows_path`, at the end of a file, as lines of JSON.

    wrong: what is further from the truth than it may be, a line each."""

    def __init__(self, heading: list[str], path: Path | None = None, rows_path: Path | None = None):
        self.lines, self.path, self.rows_path = heading, path, rows_path
        self.rows, self.wrong, self.widths = [], [], []

    def say(self, *lines: str) -> None:
        print("\n".join(lines), flush=True)
        self.lines += lines
        if self.path:
            write_whole(self.path, "\n".join([*self.lines, ""]).encode())

    def record(self, *rows: dict) -> None:
        self.rows += rows
        self.append(*rows)

    def append(self, *rows: dict) -> None:
        """Add lines to the file of rows that are no results."""
        for row in rows if self.rows_path else ():
            append_line(self.rows_path, finite(row))

    def start(self, titles: list[str], least: list[int]) -> None:
        """Begin a table whose rows come one by one, by `row`; its columns are as wide as the titles, and at least `least`."""
        self.widths = [max(len(title), width) for title, width in zip(titles, least)]
        self.say("", *table([titles], self.widths).splitlines())

    def row(self, cells: list[str]) -> None:
        self.say(table([cells], self.widths).splitlines()[0])


# ---------------------------------------------------------------------------------------- programs that measure

# flags that say what is measured; None: the usual
LIMITS = ("sizes", "methods", "preset", "precision", "kernels", "shapes", "dtypes", "batch_size")


def positive(text: str) -> int:
    """A positive whole number, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def add_flags(parser: argparse.ArgumentParser, verb: str, work: Callable[..., dict]) -> None:
    """The flags of every program that measures: `verb` names it in pages and reports; work(options, device, page) -> report
    is what it does."""
    parser.set_defaults(verb=verb, work=work)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs of each call (default 5)")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/, row by row")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="add each row, as it comes, to this file of lines of JSON")


def name_of(options: argparse.Namespace) -> str:
    """<verb>-<what it was limited to>: two runs that measure different things write different files."""
    limits = [value for name in LIMITS if (value := getattr(options, name, None)) is not None]
    parts = [options.verb, *(text for value in limits for text in (value if isinstance(value, list) else [str(value)]))]
    return "-".join(parts).replace("/", "")


def run(program: str, command: str, parse: Callable[[], argparse.Namespace]) -> int:
    """Say the machine, do the work of the options, see `add_flags`, and print its report, a line of JSON that begins with
    command and machine. Exit status 0; 1 where a result is wrong; 2 after one line for what the user can mend.

    program: the name before that line; command: what was typed; parse(): the options, or a UserError."""
    wrong = []

    def report():
        options = parse()
        device = cli.choose_device(options.device)
        device = torch.device("cpu") if device.type == "mps" else device  # no float64 there
        facts = machine(device)
        heading = " | ".join(f"{name} {value}" for name, value in facts.items() if value)
        print(heading, flush=True)
        path = saved_path(name_of(options), device, "md") if options.save else None
        page = Page([f"`{command}`", "", heading], path, options.rows)
        page.append({"command": command, "machine": facts})
        found = options.work(options, device, page)
        for line in page.wrong:
            page.say("", f"WRONG: {line}")
        wrong.extend(page.wrong)
        return finite({"command": options.verb, "machine": facts} | found)

    return cli.reported(program, report, "choose a smaller size") or int(bool(wrong))
