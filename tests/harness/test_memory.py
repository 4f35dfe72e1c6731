"""Whether a batch can fit; a batch in parts, and activations made again: the same results from less memory."""

import dataclasses
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, relative_error, some_iterations
from torch import nn

import mlo_mae
from experiments import finetune
from harness import UserError, measure, memory
from harness.memory import in_parts, through

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("count", [1, 2, 5, 12, 30])  # 5 does not divide 12; 30 is more than there are
def test_parts_give_the_values_and_gradients_of_the_whole(count):
    torch.manual_seed(0)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x, scale = torch.randn(12, 4, dtype=torch.float64, requires_grad=True), torch.rand(12, dtype=torch.float64)
    calls = []

    def function(x, scale):
        calls.append(len(x))
        y = (x @ weight).tanh()
        return y * scale[:, None], y.square().sum(1)

    def gradients(results):
        return torch.autograd.grad(results[0].pow(3).sum() + (results[1] * torch.arange(12)).sum(), (weight, x))

    whole = function(x, scale)
    expected = gradients(whole)
    calls.clear()
    found = in_parts(function, count, x, scale)
    assert all(map(torch.equal, found, whole)) and sum(calls) == 12 and max(calls) == -(-12 // count)
    assert all(map(torch.allclose, gradients(found), expected))
    with torch.no_grad():
        assert all(map(torch.equal, in_parts(function, count, x, scale), whole))


def blocks_and_input():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, scale=None):
            y = self.fc(x).tanh()
            return x + (y if scale is None else scale[0] * y + scale[1])

    return nn.ModuleList(Block() for _ in range(3)).double(), torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("scaled", [False, True])
def test_blocks_made_again_give_the_same_values_and_gradients(scaled):
    blocks, x = blocks_and_input()
    scales = torch.rand(3, 2, 2, 1, 1, dtype=torch.float64) if scaled else None
    expected = x
    for number, block in enumerate(blocks):
        expected = block(expected, scales[number] if scaled else None)
    leaves = [x, *blocks.parameters()]
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    held = []
    for recompute in (False, True):
        held.append(0)

        def pack(tensor):
            held[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = through(blocks, x, recompute, scales)
        assert torch.equal(found, expected)
        assert all(map(torch.allclose, torch.autograd.grad(found.square().sum(), leaves), gradients))
        with torch.no_grad():
            assert torch.equal(through(blocks, x, recompute, scales), expected)
    assert held[1] < held[0]


PARTS = [{"accumulate": 2}, {"accumulate": 12}]
AGAIN = {"checkpoint_activations": True}  # which --unroll full does not go with


@pytest.mark.parametrize(
    "settings, less_memory",
    [
        *(({}, less) for less in (*PARTS, AGAIN)),
        *(pytest.param({"head_norm": "batch", "head_steps": 2}, less, marks=pytest.mark.slow) for less in (*PARTS, AGAIN)),
        *(pytest.param({"unroll": "full"}, less, marks=pytest.mark.slow) for less in PARTS),
    ],
    ids=str,
)
def test_the_result_does_not_depend_on_what_is_held(settings, less_memory):
    judge, found = some_iterations(torch.float64, **settings), some_iterations(torch.float64, **settings, **less_memory)
    assert max(relative_error(found[name], judge[name]) for name in judge) < 1e-12


def test_parts_bound_what_is_held_at_once(monkeypatch):
    sizes, real = [], mlo_mae.call

    def watched(module, params, inputs, *rest):
        if isinstance(module, mlo_mae.Encoder):
            sizes.append(len(inputs))
        return real(module, params, inputs, *rest)

    monkeypatch.setattr(mlo_mae, "call", watched)
    some_iterations.__wrapped__(torch.float32, unroll="full", accumulate=4)
    assert set(sizes) == {3, 2}  # 12 / 4 images of level 1, 8 / 4 of level 2 and of level 3
    held = []
    for settings in ({}, {"accumulate": 4}, {"checkpoint_activations": True}):
        held.append(0)

        def pack(tensor):
            held[-1] += tensor.numel()
            return tensor

        net, (theta, _, _) = mlo_mae.build(dataclasses.replace(TINY, **settings), 16, 3, 5)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mlo_mae.encode(net, theta[: net.encoder_size].requires_grad_(), torch.zeros(16, 3, 16, 16))
    assert held[1] < held[0] / 4 and held[2] < held[0] / 2


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="of GNU's C library")
def test_memory_that_is_freed_on_a_cpu_is_used_again():
    """Its pages are cleared once, not each time; in a process of its own, since it cannot be undone."""
    code = """
import ctypes, resource
from harness import cli
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        block = libc.malloc(2**26)
        libc.memset(block, 1, 2**26)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
cli.choose_device("cpu")
faults()
print(first, faults())
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    before, after = map(int, output.split())
    assert after < before / 5, output


# ------------------------------------------------------------------------------------------------ whether a batch fits


def test_what_is_held_for_the_backward_pass_is_counted_once():
    x, weight = torch.zeros(3, 4, requires_grad=True), torch.zeros(4, 5, requires_grad=True)
    assert memory.held_for_backward(lambda: x @ weight) == 4 * (12 + 20)
    assert memory.held_for_backward(lambda: x.view(4, 3).mT @ weight + x @ weight) == 4 * (12 + 20)  # views share a storage
    assert memory.held_for_backward(lambda: (x @ weight).tanh()) == 4 * (12 + 20 + 15)
    assert memory.held_for_backward(lambda: x.detach() @ weight.detach()) == 0


@pytest.mark.parametrize("level", ["level1", "labelled"])
def test_what_a_batch_needs_is_foreseen_from_two_images(monkeypatch, level):
    """Not above what its pass takes at its peak, and not far below."""
    cfg = dataclasses.replace(TINY, width=32, depth=4, decoder_width=16)
    net, (theta, _, _) = mlo_mae.build(cfg, 16, 3, 5)
    images, params, told = torch.zeros(48, 3, 16, 16), theta.requires_grad_(), []

    def passed():
        if level == "labelled":
            out = mlo_mae.encode(net, params[: net.encoder_size], images)
        else:
            choice = mlo_mae.select_patches(torch.zeros(48, net.patches), net.visible)
            step = mlo_mae.Step(None, None, None, images, *choice)
            out = mlo_mae.patch_errors(net, params[: net.encoder_size], params[net.encoder_size :], step)
        return torch.autograd.grad(out.sum(), params)

    peak = measure.peak_memory(passed, torch.device("cpu"))[1]
    monkeypatch.setattr(mlo_mae, "foresee", lambda function, *rest: told.append(function))
    mlo_mae.foresee_memory(net, theta, (3, 16, 16))
    one, two = (memory.held_for_backward(lambda n=n: told[level == "labelled"](n)) for n in (1, 2))
    assert 0.7 * peak < one + 47 * (two - one) < peak


def test_the_images_of_a_step_are_those_of_one_part(monkeypatch):
    """Of one process; levels 2 and 3 hold both batches where they are whole; and T as it is needs no labelled images."""
    counts = []
    monkeypatch.setattr(mlo_mae, "foresee", lambda function, images, what, *rest: counts.append((what, images)))
    monkeypatch.setattr(mlo_mae, "world", lambda: 3)
    for settings in ({}, {"accumulate": 2}, {"masking": "random"}, {"masking_from": "elsewhere"}):
        cfg = dataclasses.replace(TINY, batch_size=24, labelled_batch_size=9, **settings)
        net, (theta, _, _) = mlo_mae.build(cfg, 16, 3, 5)
        mlo_mae.foresee_memory(net, theta, (3, 16, 16))
    whole, parts = [("level 1", 8), ("levels 2 and 3", 6)], [("level 1", 4), ("levels 2 and 3", 2)]
    assert counts == [*whole, *parts, ("level 1", 8), ("level 1", 8)]


KIB = {"MemTotal": 900, "MemAvailable": 300, "SwapFree": 100}


@pytest.mark.parametrize(
    "files, free",
    [
        ({}, 400 * 1024),
        ({"group/memory.max": "max", "group/memory.current": "7", "group/memory.stat": ""}, 400 * 1024),
        (
            {"group/memory.max": "5000", "group/memory.current": "4500", "group/memory.stat": "a 1\ninactive_file 300\n"},
            800,
        ),
        ({"group/memory.max": "5000", "group/memory.current": "6000", "group/memory.stat": "anon 1\n"}, 0),
        (
            {f"group/memory/memory.{name}": value for name, value in (("limit_in_bytes", "900"), ("usage_in_bytes", "400"))}
            | {"group/memory/memory.stat": "cache 1\ninactive_file 20\n"},
            520,
        ),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say")
def test_free_memory_is_what_machine_and_group_leave(monkeypatch, tmp_path, files, free):
    files = files | {"meminfo": "".join(f"{name}:   {value} kB\n" for name, value in KIB.items()) + "HugePages_Total:  0\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "PLACES", (tmp_path / "meminfo", memory.PLACES[1], tmp_path / "group"))
    assert memory.free_memory(torch.device("cpu")) == free
    monkeypatch.setattr(memory, "PLACES", (tmp_path / "absent", *memory.PLACES[1:]))
    assert memory.free_memory(torch.device("cpu")) == float("inf")


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_a_limit_of_the_shell_counts():
    code = """
import resource, torch
from harness.memory import free_memory
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, 2**36))
print(free_memory(torch.device("cpu")))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert 0.9 * 2**27 < float(output) <= 2**27


def test_a_batch_that_cannot_fit_is_refused_before_anything_is_written(drawn_once, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "free_memory", lambda device: 50_000_000)
    sizes = {"width": 64, "depth": 4, "images": 64, "device": "cpu"}
    mlo_mae.train(mlo_mae.Config(**sizes, epochs=1, labelled_batch_size=2, batch_size=8, level1_steps=1), tmp_path / "fits")
    with pytest.raises(UserError, match=r"^level 1: 2048 images at a time need \d\.\d GB, and 0\.1 are free; .*--batch-size"):
        mlo_mae.train(mlo_mae.Config(**sizes, batch_size=2048), tmp_path / "run")
    with pytest.raises(UserError, match=r"^levels 2 and 3: 512 images at a time .*--labelled-batch-size"):
        mlo_mae.train(mlo_mae.Config(**sizes), tmp_path / "run")
    arguments = ["--from-scratch", "--out", str(tmp_path / "tuned"), "--images", "64", "--batch-size", "1000"]
    with pytest.raises(UserError, match="^finetune: 1000 images at a time .*lower --batch-size"):
        finetune.run_command(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits"]
