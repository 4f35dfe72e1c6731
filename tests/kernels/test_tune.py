"""kernels/tune.py in Triton's interpreter, or on a GPU: attention really is cut as a row says."""

import json
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import kernels
from kernels import tune
from kernels.race import Case

TIMES = {"seconds", "seconds_q1", "seconds_q3"}


def run(capsys, *argv, device="cpu"):
    """(exit status, the last line's object, all of stdout)."""
    status = tune.main([*argv, "--device", device, "--repeats", "1"])
    out = capsys.readouterr().out
    return status, json.loads(out.splitlines()[-1]), out


@pytest.mark.slow
@pytest.mark.skipif("triton" not in sys.modules, reason="triton is not installed here")
def test_tiles_are_cut_as_named_and_a_wrong_kernel_is_named(capsys, monkeypatch):
    attention, seen, factor = sys.modules["kernels.attention"], {}, 1
    launch = attention.launch

    def watched(kernel, *rest, **cut):
        direction = {True: "jvp", False: "forward", None: "backward"}[cut.get("TANGENT")]
        tiles = f"{cut['ROWS']} x {cut['KEYS']}, {cut['num_warps']} warps" + ", a row" * ("TOKEN" in cut)
        seen.setdefault(direction, set()).add(tiles)
        launch(kernel, *rest, **cut)

    def cases(geometry, batch, dtype, device):
        qkv, work = torch.randn(batch, 20, 3, 1, 16, device=device, dtype=dtype), dict.fromkeys(["forward", "backward", "jvp"])
        yield Case("attention", "short", (qkv,), 1, kernels.attention, attention.attention_reference, work)

    def wrong(function):
        return lambda *arguments: tree_map(lambda x: factor * x, function(*arguments))

    monkeypatch.setattr(attention, "launch", watched)
    for name in ("jvp_triton", "backward_triton"):
        monkeypatch.setattr(tune, name, wrong(getattr(tune, name)))
    forward = tune.forward_triton  # whose log-sum-exps a backward needs as they are
    monkeypatch.setattr(tune, "forward_triton", lambda *arguments: (factor * (found := forward(*arguments))[0], found[1]))
    monkeypatch.setattr(tune, "cases", cases)
    # The interpreter's bfloat16 is not a chip's.
    device, dtype = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    arguments = "--shapes", "cifar", "--batch-size", "1", "--dtypes", dtype
    status, report, out = run(capsys, *arguments, device=device)
    assert status == 0
    for direction in ("forward", "backward", "jvp"):
        tiles = [row["tiles"] for row in report["rows"] if row["direction"] == direction]
        assert set(tiles) == seen[direction] and len(set(tiles)) == len(tiles) > 2
    assert all(set(row) == {"shape", "dtype", "direction", "tiles"} | TIMES and row["seconds"] > 0 for row in report["rows"])
    for wrong_by in (1.01, float("nan")):
        factor = wrong_by
        status, report, out = run(capsys, *arguments, device=device)
        assert status == 1 and not report["rows"] and out.count(f"WRONG: {dtype} short") == 3


def test_tiles_need_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(kernels.backend, "DEVICES", {"cuda"})
    assert tune.main(["--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kernels.tune: ") and "need a GPU" in error and error.count("\n") == 1


@pytest.mark.skipif("triton" not in sys.modules, reason="triton is not installed here")
@pytest.mark.parametrize("direction", ["forward", "jvp", "backward"])
def test_a_short_rest_of_the_queries_may_have_a_whole_tile(direction):
    """Which gives the same, by another cut."""
    attention, device = sys.modules["kernels.attention"], "cuda" if torch.cuda.is_available() else "cpu"
    inputs = (torch.randn(1, 65, 3, 1, 16, device=device),)
    others = inputs if direction == "jvp" else torch.randn(1, 65, 16, device=device)
    chosen = attention.Tiles(64, 16, 4)
    parts = [attention._parts(inputs[0], tiles)[1]["REST"] for tiles in (chosen, chosen._replace(rest=False))]
    assert parts == [16, 0]
    one, two = (tune.launches(direction, tiles)(inputs, others)() for tiles in (chosen, chosen._replace(rest=False)))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(tree_leaves(one), tree_leaves(two)))


@pytest.mark.skipif("triton" not in sys.modules, reason="triton is not installed here")
def test_whole_tiles_for_a_short_rest_are_raced(monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.attention"], "architecture", lambda device: "cuda:90")
    for tokens, rests in ((257, 1), (256, 0), (65, 1), (64, 0)):
        qkv = torch.empty(1, tokens, 3, 12, 64, dtype=torch.bfloat16)
        assert sum(not tiles.rest for tiles in tune.tile_choices(qkv, "forward")) == rests
