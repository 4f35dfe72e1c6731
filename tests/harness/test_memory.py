"""A batch in parts, and activations made again: the same results from less memory."""

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
    assert max(sizes) == 4  # 12 / 4 images of level 1, 2 * 8 / 4 of levels 2 and 3
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
