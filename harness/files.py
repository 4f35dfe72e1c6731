"""Files that are whole or not there at all."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from harness import UserError
from harness.signals import postponed

PATIENCE = 10.0  # seconds that `replace` tries for


def replace(source: Path, target: Path) -> None:
    """`os.replace`, tried again and again on Windows, where it fails while another program (one that reads the run, a virus
    scanner) has either file open."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > until:
                raise
        time.sleep(0.1)


def write_whole(path: Path, content: bytes | Callable[[BinaryIO], object], previous: Path | None = None) -> None:
    """Write bytes, or what a function writes to an open file: to a temporary name, to disk, then in place at once.

    What was in place before goes to `previous`, if given. A signal has its effect when this has ended. Raises UserError
    where it cannot be written; `path` is then as it was."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with postponed():
            with open(temporary, "wb") as file:
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside = previous is not None and path.exists()
            if aside:
                replace(path, previous)
            try:
                replace(temporary, path)
            except OSError:
                if aside:
                    replace(previous, path)
                raise
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise unwritable(path, error) from None


def check_free(path: Path, flag: str = "") -> None:
    """Raise UserError where a new file could not be written here, or would take the place of another; `flag` names it."""
    if path.exists():
        raise UserError(f"{path} exists already; move it away, or name another{flag and f' with {flag}'}")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder; make it, or name another file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent} cannot be written to; name a file elsewhere")


def append_line(path: Path, row: dict) -> None:
    """Add a row, as a line of JSON, to a file, in place of a last line that a crash cut short. Raises UserError where it
    cannot be written."""
    try:
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(row).encode() + b"\n")
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: Exception) -> UserError:
    """The UserError for a full disk or a folder without permission to write."""
    cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises RuntimeError for OSError
    reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
    remedy = "mend that and try again (a run: with --resume)"
    return UserError(f"{path} cannot be written ({reason}); what was there before is intact: {remedy}")


def read_rows(path: Path) -> list[dict]:
    """The lines of a file of JSON objects, without a last one that a crash cut short.

    Raises UserError where the file is absent or damaged."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        lines = lines if not lines or lines[-1].endswith("\n") else lines[:-1]
        rows = [json.loads(line) for line in lines]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError
        return rows
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is absent or damaged; move it away") from None


def drop_rows_after(path: Path, iteration: int) -> None:
    """Drop the rows after `iteration`, which a resumed run writes again. Raises UserError where the file is damaged."""
    if not path.exists():
        return
    try:
        kept = [row for row in read_rows(path) if row["iteration"] <= iteration]
    except (UserError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; move it away and resume again: the run starts a new one") from None
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
