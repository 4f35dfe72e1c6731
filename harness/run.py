"""A run's folder: what is there to continue, and, while the loop is at work, the lock, files, signals and progress."""

import argparse
import contextlib
import dataclasses
import errno
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from harness import UserError
from harness.checkpoints import fitting, newest_and_path
from harness.cli import add_dry_run, add_flags, check, flag_name, given_as, named_path
from harness.files import append_line, drop_rows_after, read_rows, write_whole
from harness.processes import agree, average, exchange_seconds, rank, world
from harness.readers import first_of
from harness.signals import Interrupted, handled, stop_signals

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


class Stopped(BaseException):  # which no `except Exception` on the way takes for a fault of a file
    """A signal has ended what is done `at_once`."""


CLAIMED = set()  # folders whose lock this process holds: Windows refuses it a second one
SNAPSHOTS = 10  # times in a run at which p is recorded


class Run:
    """The folder `out` of one run. Making this object looks at the folder and writes nothing; `at_work` writes. Without a
    folder (None) nothing is ever written, and signals do what they do.

    settings: {part: {name: value}}, what the run's result depends on; a checkpoint holds the same.
    machine: names of settings that may change when a run is resumed, since its result does not depend on them.
    checkpoint: what there is to continue, or None; of several processes the first alone has it.
    beside: {file name: bytes, or function of an open file} that the folder gets when the run begins.
    tensorboard: whether lines of metrics go into TensorBoard's event files too.

    Raises UserError where a run is there already, or `resume` finds one of other settings."""

    def __init__(
        self,
        out: Path | None,
        settings: dict[str, dict],
        resume: bool,
        form: str,
        machine: set[str],
        minutes: float = 0.0,
        tensorboard: bool = False,
    ):
        self.out, self.minutes, self.writer = out, minutes, out is not None and rank() == 0
        self.checkpoint, self.stop, self.received, self.waiting = None, 0, [], 0.0
        self.whole = None  # the path of the newest whole checkpoint
        self.content, self.cut = None, False  # what makes a checkpoint's content; whether a signal has ended work `at_once`
        self.beside = {"config.json": json.dumps(settings["config"], indent=2).encode()}
        self.tensorboard, self.board = tensorboard and self.writer, None
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs the package of that name: pip install tensorboard, or leave the flag out")
        if not self.writer:
            return
        self.seen = state_of(out)
        if not resume:
            refuse_taken(out)
        elif any((out / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt")):
            self.checkpoint, self.whole = newest_and_path(out, form)
            for part, values in settings.items():
                self.compare(part, values, machine)

    def compare(self, part: str, values: dict, machine: set[str]) -> None:
        """Raise UserError where the checkpoint, if there is one, was made with other `values` of its part `part`; those named
        in `machine` may differ."""
        if self.checkpoint is None:
            return
        found = self.checkpoint.get(part)
        if not isinstance(found, dict) or found.keys() != values.keys():
            raise UserError(
                f"{self.out} was written by another version or another command; resume it with that, or start again"
            )
        with fitting(self.out / "checkpoint.pt"):  # where values stand, a file can hold tensors, whose comparison fails
            shown = difference(found, values, machine, flags=part != "data")
        if shown:
            shown, own = (f"other data: {shown}", "data") if part == "data" else (shown, "flags")
            raise UserError(f"{self.out} was started with {shown}; resume it with its own {own} or choose another --out")

    @contextlib.contextmanager
    def at_work(self, total: int, done: int, label: str, unit: str = "update") -> Iterator["Run"]:
        """Lock the folder, write what belongs beside, and show progress from `done` of `total`; SIGNALS ask the
        loop to stop. Raises UserError where another process is at work there."""
        if self.writer:
            self.out.mkdir(parents=True, exist_ok=True)  # not before all that the user may have to mend
            self._claim()
            if state_of(self.out) != self.seen:
                mend = "go on with it by --resume, or choose another --out"
                raise UserError(f"another process has written to {self.out} meanwhile; {mend}")
            for name, content in self.beside.items():
                if self.checkpoint is None or name == "config.json":
                    write_whole(self.out / name, content)
            for name in ("metrics.jsonl", "masks.jsonl"):
                drop_rows_after(self.out / name, done)
        rows = read_rows(self.out / "metrics.jsonl") if self.writer and (self.out / "metrics.jsonl").exists() else []
        known = (row["seconds"] for row in rows if type(row.get("seconds")) is float and math.isfinite(row["seconds"]))
        self.began = time.monotonic() - max(known, default=0.0)  # what is written again is not counted
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out, purge_step=done + 1)  # lines that are written again replace those before
        exchange_seconds()  # counts from here
        self.total, self.losses, self.window = total, [], []  # losses still on the device, and those read since the last line
        self.looked = self.saved = self.logged = time.monotonic()
        self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, mininterval=1, disable=rank() > 0)
        with self.bar, stop_signals() if self.out else contextlib.nullcontext([]) as self.received:
            try:
                yield self
            except Stopped:
                self.cut = True
                if self.writer and self.content:
                    self.save(self.content())
            finally:
                if self.board:
                    self.board.close()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `at_work`: around long work between iterations, which a signal ends at once (in one of several processes,
        in all, at its end). That ends the loop too; what the last iteration has left is saved."""

        def cut(number, frame):
            self.received.append(number)
            raise Stopped

        try:
            with handled(cut) if self.out else contextlib.nullcontext():
                if self.received:
                    raise Stopped
                yield
        except Stopped:
            pass
        (self.stop,) = agree(self.received[0] if self.received else 0)
        if self.stop:
            raise Stopped

    def _claim(self) -> None:
        """Keep the folder to this process as long as it lives: the lock ends with it, however it ends."""
        if not fcntl and self.out.resolve() in CLAIMED:
            return
        self.lock = os.open(self.out / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB) if fcntl else msvcrt.locking(self.lock, msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another process is at work in {self.out}; wait until it ends, or choose another --out") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP):
                raise
            print(f"no locks where {self.out} is: nothing keeps a second process from writing there", file=sys.stderr)
        CLAIMED.add(self.out.resolve())

    def timed(self, stream: Iterator) -> Iterator:
        """The items of a stream; the seconds that the loop waits for them count as waiting."""
        while True:
            began = time.monotonic()
            item = next(stream)
            self.waiting += time.monotonic() - began
            yield item

    def after(
        self, iteration: int, losses: dict[str, Tensor], cfg, metrics: Callable[[dict], dict], content: Callable[[], dict]
    ):
        """What follows each iteration of pretraining: progress; every `cfg.log_every` a line of metrics; a checkpoint when
        it is due. Sets `stop` once a signal has come.

        losses: scalars on the device; metrics(means): what else a line holds, besides these means of losses since the last;
        content(): the checkpoint's.
        Raises UserError at a loss that is not finite."""
        self.content = content
        self.losses.append(losses)
        self.bar.update()
        now, last = time.monotonic(), iteration == self.total
        due = now - self.saved >= 60 * self.minutes or last
        look, due, self.stop = agree(now - self.looked > 1, due, self.received[0] if self.received else 0)
        line = iteration % cfg.log_every == 0 or last
        if not (due or line or look or self.stop):
            return  # reading a loss waits for the device
        self.window += self._read(iteration, cfg.level1_steps)  # waits for the device
        self.losses, now = [], time.monotonic()
        self.looked = now
        elapsed = max(now - self.logged, 1e-9)
        speed, newest_row = len(self.window) * cfg.batch_size * cfg.level1_steps / elapsed, self.window[-1]
        shown = {f"L{n}": f"{newest_row[f'level{n}_loss']:.3f}" for n in (1, 2, 3) if f"level{n}_loss" in newest_row}
        self.bar.set_postfix(shown | {"img/s": f"{speed:.0f}"})
        if line:
            names = dict.fromkeys(name for row in self.window for name in row)  # of T's looks too, where the newest is none
            means = {name: float(np.mean([row[name] for row in self.window if name in row])) for name in names}
            pace = {"seconds": now - self.began, "images_per_second": speed, "waiting_share": self.waiting / elapsed}
            if world() > 1:
                pace["exchange_share"] = exchange_seconds() / elapsed
            if self.writer:
                row = metrics(means) | means | pace
                append_line(self.out / "metrics.jsonl", {"iteration": iteration} | row)
                if self.board:
                    for name, value in row.items():
                        self.board.add_scalar(name, value, iteration)
                    self.board.flush()
            self.window, self.logged, self.waiting = [], time.monotonic(), 0.0
        if due or self.stop:
            if self.writer:
                self.save(content())
            self.saved = time.monotonic()

    def is_due(self, iteration: int) -> bool:
        """Whether one process's loop of its own (fine-tuning's) has to `save` after this iteration: after some minutes, at
        the end, and once a signal has come, which sets `stop`. The minutes then start again."""
        self.stop, now = self.received[0] if self.received else 0, time.monotonic()
        due = self.writer and (self.stop > 0 or iteration == self.total or now - self.saved >= 60 * self.minutes)
        self.saved = now if due else self.saved
        return due

    def is_tenth(self, done: int, count: int) -> bool:
        """Whether `done` of `count` iterations end a tenth of them: then `record_masks` may follow, which read_masks reads."""
        return 0 < done <= count and done * SNAPSHOTS // count > (done - 1) * SNAPSHOTS // count

    def record_masks(self, iteration: int, epoch: float, p: Tensor) -> None:
        """Add p [images, N] to masks.jsonl, for the picture of masks over training."""
        if self.writer:
            rows = [[round(x, 3) for x in row] for row in p.tolist()]
            append_line(self.out / "masks.jsonl", {"iteration": iteration, "epoch": epoch, "p": rows})

    def save(self, content: dict) -> None:
        """Write a checkpoint, whole or not at all, and keep the whole one before it. Raises UserError where a value is not
        finite, and leaves everything as it is."""
        if not all(leaf.isfinite().all() for leaf in tree_leaves(content) if isinstance(leaf, Tensor)):
            raise UserError(
                f"a weight is not finite; {self.out / 'checkpoint.pt'} is left as it was: lower the learning rates"
            )
        path, previous = self.out / "checkpoint.pt", self.out / "checkpoint.previous.pt"
        write_whole(path, lambda file: torch.save(content, file), previous if self.whole == path else None)
        self.whole = path

    def _read(self, iteration: int, steps: int) -> list[dict[str, float]]:
        """The losses still on the device as floats, means over processes, in one transfer."""
        values = iter(average(torch.stack([value for row in self.losses for value in row.values()])).tolist())
        rows = [{name: next(values) for name in row} for row in self.losses]
        for number, row in enumerate(rows):
            for name, value in row.items():
                if not math.isfinite(value):
                    update, path = iteration - len(rows) + number + 1, self.out / "checkpoint.pt"
                    kept = f"{path} holds the last good state" if path.exists() else "there was no checkpoint yet"
                    raise UserError(
                        f"{name} is {value} at mask update {update} (level-1 step {update * steps}); {kept}; "
                        "a lower --lr, --head-lr or --mask-lr may help"
                    )
        return rows

    def leave_if_stopped(self, iteration: int, what: str) -> None:
        """Raise Interrupted where a signal has stopped the loop before its end."""
        if self.stop and (iteration < self.total or self.cut):
            said = f"stopped at {what} {iteration} of {self.total}; continue with --out {self.out} --resume"
            raise Interrupted(self.stop, said if self.writer else "")


def difference(theirs: dict, ours: dict, free: set[str], flags: bool = False) -> str:
    """How a run's facts, which come from a file, and ours differ: of the data (`Splits.facts`), or settings that `flags` give.
    The first that differs in words, or ""; those named in `free` may differ. Raises what comparing may: see `fitting`."""
    name = next((name for name, value in ours.items() if name not in free and theirs.get(name) != value), "")
    if not name:
        return ""
    theirs, ours = theirs.get(name), ours[name]
    if flags:
        return f"{given_as(name, theirs)}, not {given_as(name, ours).removeprefix(f'{flag_name(name)} ')}"
    if name == "digest":
        return "images (of a folder: the names of its files) or labels differ"
    name = name.replace("_", " ")
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):  # there may be a thousand
        number = next(i for i, (one, other) in enumerate(zip(theirs, ours)) if one != other)
        name, theirs, ours = f"{name}, number {number}", theirs[number], ours[number]
    elif isinstance(ours, list):
        theirs, ours = (f"{len(some)} ({first_of(list(map(str, some)))})" for some in (theirs, ours))
    return f"{name}: {theirs} there, {ours} here"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, {name: number}. Raises UserError where it is absent, empty or damaged."""
    try:
        rows = read_rows(path)
        if not rows or any("epoch" not in row or not all(map(math.isfinite, row.values())) for row in rows):
            raise ValueError
        return rows
    except (UserError, ValueError, TypeError, OverflowError):
        raise UserError(f"{path} is absent, empty or damaged, so there are no curves to draw") from None


def read_masks(path: Path, shape: tuple[int, int]) -> tuple[np.ndarray, list[float]]:
    """p [lines, *shape] and the epochs of the lines of masks.jsonl. Raises UserError where it is damaged."""
    try:
        rows = read_rows(path)
        if len(rows) > SNAPSHOTS:
            raise ValueError
        return np.array([row["p"] for row in rows], dtype=float).reshape(len(rows), *shape), [
            float(row["epoch"]) for row in rows
        ]
    except (UserError, ValueError, TypeError, KeyError, OverflowError):
        raise UserError(f"{path} is damaged, so the masks over training cannot be drawn; move it away") from None


def read_settings(path: Path, kind: type) -> dict:
    """The settings in a run's config.json, which are those of the dataclass `kind`. Raises UserError where they are not."""
    try:
        settings = json.loads(path.read_text())
        names = {field.name for field in dataclasses.fields(kind)}
        if not isinstance(settings, dict) or set(settings) != names:
            differ = names ^ set(settings) if isinstance(settings, dict) else {"all of them"}
            raise UserError(f"settings that differ: {', '.join(sorted(map(str, differ)))[:200]}")
        check(kind(**settings))
        return settings
    except (OSError, UserError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is damaged or of another version ({error}); give all flags, and another --out") from None


def add_run_flags(parser: argparse.ArgumentParser, kind: type, name: str, preset: dict | None = None) -> None:
    """A flag for each field of the dataclass `kind`, and those that say where its runs go; `name` as in `settings_of`. preset:
    {field: value} that --help names as defaults, in place of the fields' own."""
    add_flags(parser, dataclasses.fields(kind), preset, grouped=True)
    where = f"folder of the run (default runs/<preset>-{name}-<seed>; with --data, its name in place of the preset's)"
    parser.add_argument("--out", type=named_path, help=where)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, or start it")
    add_dry_run(parser)


def settings_of(flags: dict, kind: type, presets: dict[str, dict], name: str) -> tuple[Any, Path, bool]:
    """(settings of the dataclass `kind`, folder, whether to resume) of parsed flags: the preset's values, over them those of
    a run that is resumed, over them the flags'. `name` stands in the default folder's, and before it that of the preset,
    or of data that are not the preset's. Raises UserError."""
    out, resume = flags.pop("out"), flags.pop("resume")
    if resume and out and (out / "config.json").exists():
        flags = read_settings(out / "config.json", kind) | flags
    preset = flags.get("preset", kind.preset)
    cfg = kind(**{"preset": preset} | presets[preset] | flags)
    folder = Path("runs") / f"{first_name(cfg, presets)}-{name.replace('<masking>', cfg.masking)}-{cfg.seed}"
    if resume and not out and "data" in flags and not folder.exists():  # data that has moved would begin a run of its own
        raise UserError(f"there is no {folder}; with --data, say with --out which run is to go on, or where one is to begin")
    return cfg, out or folder, resume


def first_name(cfg: Any, presets: dict[str, dict]) -> str:
    """What the name of a default folder begins with: the preset, or the name of data that are not the preset's. (An
    experiment's own preset, which is not among these, is named after its data.)"""
    own = cfg.data == presets.get(cfg.preset, {}).get("data", type(cfg).data)
    return cfg.preset if own else Path(os.path.abspath(cfg.data)).stem or cfg.preset  # the root folder has no name


def state_of(out: Path) -> list[tuple[int, int] | None]:
    """What tells whether another process has written to a run's folder: of what a run adds to, time (ns) and size (bytes)."""
    found = []
    for name in ("checkpoint.pt", "metrics.jsonl"):
        try:
            facts = (out / name).stat()
            found.append((facts.st_mtime_ns, facts.st_size))
        except OSError:
            found.append(None)
    return found


def refuse_taken(out: Path) -> None:
    """Raise UserError where a new run would overwrite something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; continue it with --resume, or choose another --out")
