"""Ctrl-C (SIGINT), SIGTERM, and SIGHUP (a terminal that is closed): they end a command, ask a loop to stop, or wait until a
file is whole."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # on Windows nothing sends the second
if hasattr(signal, "SIGHUP") and (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN or "RANK" in os.environ):
    SIGNALS += (signal.SIGHUP,)  # not under nohup, but that torchrun passes on, and kills what does not end
Handler = Callable[[int, FrameType | None], None]


class Interrupted(KeyboardInterrupt):
    """A signal of this number has come; `message` is what to say about it, if anything."""

    def __init__(self, number: int, message: str = "interrupted; what was written before is whole"):
        super().__init__(number, message)
        self.number, self.message = number, message


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Call `handler` for the signals that come within. In a thread, which cannot have them, this does nothing."""
    has_them = threading.current_thread() is threading.main_thread()
    former = {number: signal.signal(number, handler) for number in SIGNALS if has_them}
    try:
        yield
    finally:
        for number, function in former.items():
            signal.signal(number, function)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A signal that comes within raises Interrupted, also where what it meets makes an exception of its own of that (a
    library's compiled code does, in the midst of a call back into Python) or drops it (where an object is disposed of)."""
    came, former = [], sys.unraisablehook

    def handler(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise Interrupted(number)

    def dropped(found: Any) -> None:
        if not isinstance(found.exc_value, Interrupted):
            former(found)
        else:  # again, when that is over
            threading.Timer(0.01, send, [found.exc_value.number]).start()

    try:
        with handled(handler):
            sys.unraisablehook = dropped
            yield
    except Exception:
        if came:
            raise Interrupted(came[0]) from None
        raise
    finally:
        sys.unraisablehook = former


def send(number: int) -> None:
    """Have the main thread meet this signal, at once where it sleeps (on Windows: when it wakes)."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)


def ignore(number: int, frame: FrameType | None) -> None:
    """A Handler that does nothing."""


def end_at_once(program: str) -> None:
    """From here on a signal ends this process, after one line (of several processes: of the first), wherever no other Handler
    is in its place. For programs, before they import what takes seconds."""

    def handler(number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):
                os.write(2, f"{program}: interrupted\n".encode())  # print may be in the midst of its own line
        os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, handler)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """A signal that comes within has its effect at the end."""
    came = []
    try:
        with handled(lambda number, frame: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that the first signal fills, so that the iteration under way ends; a second one interrupts. What comes within
    a second of the first is the same again: a terminal and torchrun both send it."""
    received, since = [], 0.0

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if not received:
            since = time.monotonic()
            received.append(number)
        elif not since:  # the first has ended what was done at once: see `Run.at_once`
            since = time.monotonic()
        elif time.monotonic() - since > 1:
            raise Interrupted(number)

    with handled(handler):
        yield received
