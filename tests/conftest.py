"""Make the project's modules importable however pytest is started, and runs repeatable: one thread, here and in
subprocesses (tiny tensors gain nothing from more)."""

import concurrent.futures
import contextlib
import faulthandler
import functools
import io
import json
import os
import pickle
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch  # after the number of threads is set
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on the CPU; read when they are first imported

from helpers import arguments, bare, write_sides

import data
import mlo_mae
from harness import cli, probe

try:
    import triton.language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    INTERPRETER = triton.language, InterpreterBuilder, TensorHandle
except Exception:  # absent, or at odds with the numpy beside it, which shows in many ways; on a GPU nothing here needs it
    INTERPRETER = None


@pytest.fixture(autouse=True)
def same_draws():
    """Each test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_memory():
    """What `memory_is_bounded` tells is of each test alone, not of those before it in this process (where Linux lets it)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the most memory so far is what there is now


@pytest.fixture(autouse=True)
def unannounced(request, monkeypatch):
    """Runs within a test do not say, by trial, what they are going to be; tests/experiments/test_presets.py is of that."""
    if request.module.__name__.rpartition(".")[2] != "test_presets":
        monkeypatch.setattr(cli.command("presets"), "announce", lambda *given: None)
        monkeypatch.setattr(cli.command("finetune"), "plan", lambda *given: {})


@pytest.fixture
def no_hang():
    """A test that hangs, even where Python cannot interrupt it, ends the tests."""
    faulthandler.dump_traceback_later(120 + int(os.environ.get("MLO_MAE_FUZZ", 150)), exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def drawn_once():
    """Drawing 8,000 shapes takes two seconds or three; from here on, each kind and size of them is drawn once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "shapes", functools.cache(data.shapes))
        yield


@pytest.fixture(scope="session")
def sides(tmp_path_factory):
    """An .npz of images of two classes."""
    return write_sides(tmp_path_factory.mktemp("data") / "sides.npz")


@pytest.fixture(scope="session")
def whole_run(sides, tmp_path_factory):
    """A finished run: its folder, what it printed last, and its stderr."""
    folder, stdout, stderr = tmp_path_factory.mktemp("runs") / "whole", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = mlo_mae.main(arguments(sides, folder, "--epochs", 20))
    assert status == 0, stderr.getvalue()
    return folder, json.loads(stdout.getvalue().splitlines()[-1]), stderr.getvalue()


@pytest.fixture
def bare_runs():
    """The test's own runs end without probe and pictures."""
    with bare():
        yield


@pytest.fixture
def cells_here(monkeypatch, drawn_once):
    """The cells of a grid run in this process, one after another, and draw no pictures: both take seconds each."""

    class Here:
        def submit(self, *call):
            work, *arguments = pickle.loads(pickle.dumps(call))  # as another process would get them
            done = concurrent.futures.Future()
            done.set_result(work(*arguments))
            return done

        def shutdown(self):
            pass

    monkeypatch.setattr(cli.command("results"), "cell_process", Here)
    monkeypatch.setattr(cli.command("show"), "draw_run", lambda *given: [])


@pytest.fixture
def quick_probes(monkeypatch):
    """Probes are fitted by least squares, at once, in place of L-BFGS."""

    def fit(train, labels, classes):
        def features(inputs):
            return F.pad(inputs, (1, 0), value=1.0)

        weight = torch.linalg.lstsq(features(train), F.one_hot(labels, classes).float(), driver="gelsd").solution
        return {0.0: lambda inputs: features(inputs) @ weight}

    monkeypatch.setitem(probe.PROBES, "lbfgs", ("weight_decay", fit))


@pytest.fixture
def bfloat16_as_on_a_chip(monkeypatch):
    """Triton's interpreter keeps bfloat16 as bits in integers, multiplies those, and cuts float32 off where chips round."""
    if INTERPRETER is None:
        return
    tl, InterpreterBuilder, TensorHandle = INTERPRETER

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast(self, x, dtype):
        if dtype.scalar != tl.bfloat16:
            return former_cast(self, wide(x), dtype)
        rounded = torch.from_numpy(np.array(x.data, np.float32)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), dtype.scalar)

    former_cast, former_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: former_dot(self, wide(a), wide(b), *rest))


@pytest.fixture
def dots_in_one_order(monkeypatch):
    """Chips add the products of a dot in the order of the inner dimension; numpy's order depends on shapes and strides, so
    that a score may differ in its last bits between forward and backward."""
    if INTERPRETER is None:
        return
    tl, InterpreterBuilder, TensorHandle = INTERPRETER

    def dot(self, a, b, total, *_):
        total = total.data.copy()
        for column, row in zip(a.data.T, b.data):
            total += column[:, None] * row
        return TensorHandle(total, tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
