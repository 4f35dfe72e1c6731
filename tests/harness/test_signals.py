import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
from helpers import SCRIPT

from harness.files import write_whole
from harness.signals import SIGNALS, Interrupted, interruptible, postponed, stop_signals


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def test_a_second_signal_interrupts_but_not_within_a_second(monkeypatch):
    before, now = handlers(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with stop_signals() as received:
        signal.raise_signal(signal.SIGTERM)
        now[0] += 0.9
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGTERM]
        now[0] += 0.2
        with pytest.raises(Interrupted) as second:
            signal.raise_signal(signal.SIGINT)
        assert second.value.number == signal.SIGINT and received == [signal.SIGTERM]
    assert handlers() == before


def test_nor_within_a_second_of_one_that_something_else_has_met(monkeypatch):
    """As `Run.at_once` does: it fills the list itself."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with stop_signals() as received:
        received.append(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        now[0] += 0.9
        signal.raise_signal(signal.SIGTERM)
        now[0] += 0.2
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_until_a_file_is_whole(tmp_path, number):
    """Be it written or put in place; the one before it too."""
    write_whole(tmp_path / "file", b"old")

    def content(file):
        file.write(b"n")
        signal.raise_signal(number)
        file.write(b"ew")

    before = handlers()
    with pytest.raises(Interrupted) as stop, interruptible():
        write_whole(tmp_path / "file", content, tmp_path / "before")
    assert stop.value.number == number and handlers() == before
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new", "before": b"old"}


def test_a_signal_is_not_lost_where_writing_fails():
    with pytest.raises(Interrupted), interruptible(), postponed():
        signal.raise_signal(signal.SIGINT)
        raise OSError


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_told_where_a_library_makes_an_error_of_it(number):
    """As matplotlib's renderer does."""
    with pytest.raises(Interrupted) as stop, interruptible():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ValueError("Invalid affine transformation matrix") from None
    assert stop.value.number == number
    with pytest.raises(ValueError, match="another"), interruptible():
        raise ValueError("another")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_not_lost_where_an_object_is_disposed_of(capsys, number):
    """Python drops what is raised there, and says so."""
    before = sys.unraisablehook
    with pytest.raises(Interrupted) as stop, interruptible():
        kept = threading.Event()
        watching = weakref.ref(kept, lambda _: signal.raise_signal(number))
        del kept
        time.sleep(10)
    assert stop.value.number == number and watching() is None and sys.unraisablehook == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals are POSIX's")
@pytest.mark.parametrize("ignored, variables, heeded", [(False, {}, True), (True, {}, False), (True, {"RANK": "1"}, True)])
def test_a_closed_terminal_is_heeded_but_under_nohup(ignored, variables, heeded):
    """There too, where torchrun passes it on."""
    question = "import signal; from harness.signals import SIGNALS; print(signal.SIGHUP in SIGNALS)"
    env = {name: value for name, value in os.environ.items() if name != "RANK"} | variables
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)  # which a new process has too
    try:
        words = [sys.executable, "-c", question]
        found = subprocess.run(words, env=env, capture_output=True, text=True, cwd=SCRIPT.parent, restore_signals=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found.stdout == f"{heeded}\n", found.stderr


def test_a_thread_leaves_signals_alone(tmp_path):
    before, found = handlers(), []
    thread = threading.Thread(target=lambda: found.append(write_whole(tmp_path / "file", b"")))
    thread.start()
    thread.join()
    assert found == [None] and handlers() == before


def test_an_interruption_goes_from_process_to_process():
    found = pickle.loads(pickle.dumps(Interrupted(15, "words")))
    assert (found.number, found.message) == (15, "words") and isinstance(found, KeyboardInterrupt)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("program", ["mlo_mae", "bench"])
def test_a_signal_while_a_program_imports_ends_it_in_a_line(tmp_path, program, number):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    words = [sys.executable, SCRIPT.parent / f"{program}.py", "show"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(tmp_path)}, **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        assert process.communicate(timeout=20) == ("", f"{program}: interrupted\n")
    assert process.returncode == 128 + number
