"""The command line: flags from dataclasses, settings that are checked, one line at the end, of JSON or of what to mend."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import json
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import torch

from harness import UserError, counted, first_line, printable
from harness.memory import keep_freed
from harness.processes import end_children, first_to_fail, join, rank, started, world
from harness.signals import Interrupted, handled, ignore, interruptible
from kernels.backend import current


def flag(default: Any, meaning: str, *, least=None, most=None, above=None, below=None, group: str = "") -> Any:
    """A dataclass field that is also a command-line flag; the bounds are what `check` holds its value to. group: the heading
    under which --help lists this flag and those after it."""
    bounds = {"at least": least, "at most": most, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"help": meaning, "bounds": bounds, "group": group})


WITHIN = {
    "at least": lambda value, bound: value >= bound,
    "at most": lambda value, bound: value <= bound,
    "above": lambda value, bound: value > bound,
    "below": lambda value, bound: value < bound,
}


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def given_as(name: str, value: object) -> str:
    """How a command line gives this value of a setting."""
    if isinstance(value, bool):
        return flag_name(name if value else f"no_{name}")
    return f"{flag_name(name)} {value}"


def check(settings: Any) -> None:
    """Raise UserError where a field of this dataclass has another type than its own, a number that is not finite or out of
    its bounds, or none of its choices; it names the flag to change."""
    for field in dataclasses.fields(settings):
        value, kind, name = getattr(settings, field.name), field.type, flag_name(field.name)
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise UserError(f"{name} {value!r}: choose from {', '.join(map(str, get_args(kind)))}")
        elif type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{name} {str(value)[:80]}: must be of type {kind.__name__}")
        elif kind in (int, float):
            bounds = {word: bound for word, bound in field.metadata["bounds"].items() if bound is not None}
            finite = kind is int or abs(value) <= sys.float_info.max  # a file may hold integers beyond it
            if not finite or not all(WITHIN[word](value, bound) for word, bound in bounds.items()):
                wanted = ([] if finite else ["finite"]) + [f"{word} {bound}" for word, bound in bounds.items()]
                raise UserError(f"{name} {str(value)[:80]}: must be {' and '.join(wanted)}")


asked = set()  # of "--json" and "--dry-run": what the command line under way asks of all that report


class Ask(argparse.Action):
    """A flag that is not the program's own affair: it is noted in `asked`."""

    def __call__(self, parser, namespace, values, option_string=None):
        asked.add(self.const)


def add_ask(parser: argparse.ArgumentParser, name: str, meaning: str) -> None:
    """A flag of the kind `Ask`."""
    absent = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument(name, action=Ask, const=name, nargs=0, help=meaning, **absent)


def did_you_mean(word: str, known: Iterable[str], alike: float = 0.6) -> str:
    """A question about the nearest of the known words, if one is near enough (0: any, 1: the same)."""
    near = difflib.get_close_matches(word, known, 1, alike)
    return f"did you mean {near[0]}? " if near else ""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its usage and leaving."""

    def __init__(self, *given, **named):
        super().__init__(*given, **{"allow_abbrev": False} | named)  # `value_in` knows whole names alone
        add_ask(self, "--json", "end with a line of JSON on a terminal too")

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        meant = did_you_mean(unknown[1], self._option_string_actions, 0.5) if unknown else ""
        raise UserError(f"{message}; {meant}see {self.prog} --help")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """The flag that makes `announce` the end of a command."""
    add_ask(parser, "--dry-run", "say what will run, and stop before anything is written")


class DryRun(Exception):
    """What was asked for has been said."""


def announce(plan: dict[str, str]) -> None:
    """Say what a command is going to do, {of what: a line}, on stderr. Raises DryRun where that is all that is asked for."""
    for name, line in plan.items() if rank() == 0 else ():
        print(f"{name}: {printable(line)}", file=sys.stderr)
    if "--dry-run" in asked:
        raise DryRun


ENDED = "none: it has ended already"


def duration(seconds: float) -> str:
    """So many seconds in words, to about two digits."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * length:
            count = seconds / length
            return f"{count:.0f} {unit}s" if count >= 9.5 else f"{count:.1f} {unit}s"
    return counted(max(1, round(seconds)), "second")


def described(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else str(device)


def value_in(argv: list[str], flag: str) -> str | None:
    """The value that a command line gives this flag, before the rest of it is looked at; None: none."""
    pairs = [pair for word, after in zip(argv, [*argv[1:], ""]) for pair in (word.split("=", 1), [word, after])]
    return next((pair[1] for pair in reversed(pairs) if pair[0] == flag and len(pair) == 2), None)


def device_in(argv: list[str]) -> str | None:
    """The device that a command line gives, or that of the run that it resumes; None: none."""
    given, out = value_in(argv, "--device"), value_in(argv, "--out")
    if given or not out or "--resume" not in argv:
        return given
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):  # what is wrong with it is told later
        return json.loads((Path(out) / "config.json").read_text()).get("device")


def named_path(text: str) -> Path:
    """A path, for argparse; not an empty one, which would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a folder, or leave the flag out")
    return Path(text)


def add_flags(
    parser: argparse._ActionsContainer,
    fields: Iterable[dataclasses.Field],
    defaults: dict[str, Any] | None = None,
    grouped: bool = False,
) -> None:
    """A flag for each of these dataclass fields; one that the user leaves out is absent from the arguments. defaults: values
    that --help names in place of the fields' own. grouped: --help lists them under their headings."""
    place = parser
    for field in fields:
        if grouped and field.metadata["group"]:
            place = parser.add_argument_group(field.metadata["group"])
        default = (defaults or {}).get(field.name, field.default)
        shown = (
            "none" if default == "" else {True: "on", False: "off"}.get(default, default) if field.type is bool else default
        )
        options = {"help": f"{field.metadata['help']} (default {shown})", "default": argparse.SUPPRESS}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.type) is Literal:
            options["choices"] = get_args(field.type)
        else:
            options |= {"type": field.type, "metavar": field.type.__name__}
        place.add_argument(flag_name(field.name), **options)


NO_MEMORY = "can't allocate memory", "not enough memory", "out of memory"  # in a plain RuntimeError: of a CPU, or of mps
MORE_MEMORY = "close other programs, or use a machine with more memory"
# of programs that pretrain
LESS_MEMORY = (
    "raise --accumulate (the same result), lower --batch-size or --labelled-batch-size, or give a larger --patch-size or a "
    "smaller --image-size"
)


# Of the last line of metrics, what only its readers ask for: `in_lines` leaves it out.
DETAILS = {"processes", "iteration", "epoch", "p_mean", "p_std", "p_entropy", "mask_churn", "mask_overlap", "learning_rate"}
DETAILS |= {"mask_learning_rate", "level1_loss", "images_per_second", "waiting_share", "exchange_share", "command"}
# What numbers mean that do not speak for themselves.
MEANINGS = {"object_auc": "chance: 0.5", "object_weight": "all alike: 1", "object_hidden": "by chance: 1"}
MEANINGS |= {"level3_chance": "L3 of a head that sees nothing"}


LONGEST = 10_000  # characters of a report's line


def in_lines(summary: dict, before: str = "") -> str:
    """A report for people: a line for each number and text but DETAILS, numbers to four digits; shares whose names say so in
    percent."""
    lines = []
    for word, value in summary.items():
        if word in DETAILS:
            continue
        name = f"{before}{word.replace('_', ' ')}"
        if name == "seconds":
            lines.append(f"{'time':<28}{duration(value)}")
        elif isinstance(value, dict):
            lines.append(in_lines(value, f"{name}: "))
        elif isinstance(value, list) and not any(isinstance(x, (dict, list)) for x in value):
            lines.append(f"{name:<28}{printable(', '.join(map(str, value)), LONGEST)}")
        elif isinstance(value, float):
            percent = re.search(r"accuracy|top\d|share$|miou", name)
            meaning = f"   ({MEANINGS[word]})" if word in MEANINGS else ""
            lines.append(f"{name:<28}{f'{100 * value:.1f} %' if percent else f'{value:.4g}'}{meaning}")
        elif not isinstance(value, list):
            lines.append(f"{name:<28}{printable(str(value), LONGEST)}")
    return "\n".join(lines)


def reported(program: str, work: Callable[[], dict | None], remedy: str = MORE_MEMORY) -> int:
    """Print what work() returns, unless None, as one line of JSON. Exit status 0, 2 after one line for what the user can
    mend, or 130 after one line at Ctrl-C (143 at SIGTERM, 129 at SIGHUP), when no process that this one has started is left;
    `remedy` is for want of memory, by flags that the program has."""
    status = 2
    asked.clear()
    with contextlib.suppress(AttributeError, ValueError):  # what stands for it in a notebook or a test
        sys.stdout.reconfigure(errors="backslashreplace")  # a character that a terminal lacks must not end a report
    try:
        with interruptible():
            summary = work()
            if summary is not None:
                for_people = sys.stdout.isatty() and "--json" not in asked
                print(in_lines(summary) if for_people else json.dumps(summary, separators=(",", ":")))
        return 0
    except DryRun:
        return 0
    except UserError as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(map(str(error).__contains__, NO_MEMORY)):
            raise
        found = first_line(error, 1000).split("DefaultCPUAllocator: ")[-1].rstrip(". ")
        message = f"out of memory{found and f' ({found})'}; {remedy}"
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    except KeyboardInterrupt as error:  # after the last checkpoint of a loop, or outside of loops
        stop = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        status, message = 128 + stop.number, stop.message
    with handled(ignore):
        if status > 2:
            threading.excepthook = lambda failure: None  # Python's pools fail loudly where their processes have ended
            end_children(0.5)
        if message and first_to_fail():
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"{program}: {printable(message)}", file=sys.stderr)
    return status


def choose_device(name: str) -> torch.device:
    """The device of --device; auto takes the best there is. On a CPU, with `keep_freed`.

    Raises UserError where the machine does not have it, or where the environment asks for kernels that there are not."""
    try:
        current()
    except ValueError as error:
        raise UserError(str(error)) from None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if counts[kind] and (kind != "mps" or world() == 1))
    try:
        device = torch.device(name)
        here = (device.index or 0) < counts.get(device.type, 0)
    except RuntimeError:  # no device's name
        here = False
    if not here:
        have = ", ".join(kind + f" (0 to {count - 1})" * (count > 1) for kind, count in counts.items() if count)
        raise UserError(f"--device {name} is not available here; this machine has: {have}")
    if world() > 1 and name not in ("cpu", "cuda"):
        raise UserError(f"--device {name} does not go with several processes; choose cpu or cuda (each its own GPU)")
    if device.type == "cpu":
        keep_freed()
    if device.type == "cuda" and device.index is not None:  # streams, graphs and Triton's kernels go to the current one
        torch.cuda.set_device(device)
    return device


# The programs in experiments/ are commands. They are found by their names: nothing imports what stands on it.
EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


def commands() -> list[str]:
    """The names of the programs in experiments/."""
    return sorted(path.stem for path in EXPERIMENTS.glob("[a-z]*.py"))


def described_commands() -> str:
    """A line for each of `commands`: what its file says first."""
    lines = [(name, (EXPERIMENTS / f"{name}.py").read_text("utf-8").splitlines()[0].strip('"')) for name in commands()]
    width = {"width": 100, "subsequent_indent": 15 * " "}
    return "\n".join(textwrap.fill(f"  {name:<12} {line}", **width) for name, line in lines)


def command(name: str) -> ModuleType:
    """The module of one of `commands`."""
    return importlib.import_module(f"experiments.{name}")


def dispatch(argv: list[str] | None, pretrain: Callable[[list[str]], dict | None]) -> int:
    """Run the command that argv (None: the process's own) begins with, or pretrain(flags): the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "pretrain"
    try:
        alone = started() == 1
    except UserError:  # `join` says it
        alone = False
    if alone and name in commands():
        return command(name).main(argv)

    def work():
        join(device_in(argv) != "cpu")  # first, so that what several processes have to say is said once
        if name in commands():
            raise UserError(f"{name} runs as one process; start it without torchrun")
        if name != "pretrain":
            meant = did_you_mean(name, ["pretrain", *commands()])
            raise UserError(f"{name} is no command; {meant}choose from pretrain, {', '.join(commands())}")
        return pretrain(argv)

    return reported("mlo_mae", work, LESS_MEMORY)
