"""Several processes and several parts of a batch against one: the same masks, gradients, weights and files.

Two processes are started once; they run `everything` below, which leaves its results in files. MLO_MAE_KILLS sets how
many runs lose a process."""

import dataclasses
import functools
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file is a script as well

import torch

import data
import mlo_mae
from mlo_mae import Config, State, build, fresh_level, inverse_fan_in, level_decays, outer_iteration
from test_mlo_mae import weights

TINY = Config(patch_size=4, width=16, depth=2, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2, masking_width=12,
              head_norm="layer", dropout=0.3, batch_size=12, labelled_batch_size=8, warmup=0.0, masking_network="mlp",
              mask_noise=0.0, mask_start=0.0, level1_steps=2, head_steps=1)  # fmt: skip
CASES = {
    "learned": {},
    "random": dict(masking="random"),
    "head norm over the batch, parts, embeddings": dict(head_norm="batch", head_steps=2, accumulate=3, masking_input="embeddings"),
    "all steps, parts": dict(unroll="full", accumulate=2),
    "shared T, drawn masks": dict(masking_network="shared", mask_noise=1.0),
}
ITERATIONS = 2
FLAGS = ["--image-size", "16", "--patch-size", "4", "--width", "16", "--depth", "1", "--heads", "2", "--decoder-width", "8",
         "--decoder-depth", "1", "--decoder-heads", "2", "--masking-width", "8", "--batch-size", "16", "--epochs", "10",
         "--labelled-batch-size", "8", "--log-every", "2", "--device", "cpu", "--checkpoint-minutes", "0",
         "--mask-start", "0.2", "--level1-steps", "2", "--head-steps", "1"]  # fmt: skip


@functools.cache
def train(dtype, **settings):
    """T's first gradient (a tenth of it), and all parameters and moments after a few outer iterations from moments as training leaves them."""
    cfg = dataclasses.replace(TINY, **settings)
    net, params = build(cfg, 16, 3, 5)
    random = torch.Generator().manual_seed(0)

    def warm(vector, t):
        m = 1e-2 * torch.randn(len(vector), generator=random, dtype=torch.float64)
        v = m.square() * (1 + torch.randn(len(vector), generator=random, dtype=torch.float64).square())
        return fresh_level(vector, "cpu")._replace(params=vector.to(dtype), m=m.to(dtype), v=v.to(dtype), t=t)

    state = State(0, *(warm(vector, t) for vector, t in zip(params, (7, 4, 3))))
    state.psi = state.psi._replace(m=torch.zeros_like(state.psi.m))  # so that after one step it is T's gradient
    images = torch.randint(0, 256, (60, 3, 16, 16), generator=random, dtype=torch.uint8)
    split = data.Images(images, torch.arange(60) % 5, (0.5,) * 3, (0.25,) * 3)

    def stream(size, seed):
        for batch in split.stream(size, seed, part=mlo_mae.share(size)):
            yield data.Batch(batch.images.to(dtype), batch.labels)

    batches = [stream(size, seed) for seed, size in enumerate((cfg.batch_size, *2 * [cfg.labelled_batch_size]))]
    decay = [vector.to(dtype) for vector in level_decays(net)]
    rows, gradient = [], None
    for _ in range(ITERATIONS):
        state, losses = outer_iteration(net, state, batches, 10, decay, inverse_fan_in(net.masking).to(dtype))
        gradient = state.psi.m if gradient is None else gradient
        rows.append(mlo_mae.average(torch.stack([value.to(dtype) for value in losses.values()])))
    found = {"T's gradient": gradient, "losses": torch.stack(rows)}
    for name in ("theta", "head", "psi"):
        found |= {f"{name} {part}": getattr(getattr(state, name), part) for part in ("params", "m", "v")}
    return found


def numbers():
    return {(name, dtype): train(dtype, **case) for name, case in CASES.items() for dtype in (torch.float32, torch.float64)}


def next_port():
    """The processes meet at another port each time, so that none meets the ruins of the time before."""
    if "PORTS" in os.environ:
        os.environ["MASTER_PORT"], _, os.environ["PORTS"] = os.environ["PORTS"].partition(",")


def command(*arguments):
    """Exit status, stdout and stderr of the program run in this process."""
    out, err = io.StringIO(), io.StringIO()
    next_port()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = mlo_mae.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    end_together()
    return status, out.getvalue(), err.getvalue()


def end_together():
    """Process 0, where the processes meet (torchrun has a place of its own for that), is the last to leave."""
    if os.environ.get("RANK") == "1":
        mlo_mae.leave()
        Path(f"left-{os.environ['MASTER_PORT']}").touch()
    elif "RANK" in os.environ:
        deadline = time.monotonic() + 60
        while not Path(f"left-{os.environ['MASTER_PORT']}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    mlo_mae.leave()


def stop_in_the_middle(number):
    """SIGTERM to process 1 alone, after it has decided that no checkpoint is due at iteration 4."""
    real, signalled = mlo_mae.mask_statistics, []

    def interrupted(net, state, *rest):
        if state.iteration == 4 and number == 1 and not signalled:
            signalled.append(signal.raise_signal(signal.SIGTERM))
        return real(net, state, *rest)

    mlo_mae.mask_statistics = interrupted
    yield
    mlo_mae.mask_statistics = real


def everything(folder):
    """What each of the two processes runs."""
    npz, number = folder / "sides.npz", int(os.environ["RANK"])
    mlo_mae.draw_run = lambda *arguments: None  # slow, and no matter of several processes
    next_port()
    mlo_mae.join()
    torch.save(numbers(), folder / f"numbers-{number}.pt")
    end_together()
    runs = {"whole": command("pretrain", "--data", npz, "--out", folder / "whole", *FLAGS)}
    runs["indivisible"] = command("pretrain", "--data", npz, "--out", folder / "odd", *FLAGS, "--batch-size", 15)
    runs["form"] = command("pretrain", "--hypergradient", "unrolled", "--out", folder / "form")
    runs["flag"] = command("pretrain", "--widht", 3)
    runs["probe"] = command("probe", folder / "whole")
    stopping = stop_in_the_middle(number)
    next(stopping)
    runs["stopped"] = command("pretrain", "--data", npz, "--out", folder / "cut", *FLAGS, "--checkpoint-minutes", 60)
    next(stopping, None)
    runs["resumed"] = command("pretrain", "--out", folder / "cut", "--resume")
    mine = npz if number == 0 else folder / "absent.npz"
    runs["one fails"] = command("pretrain", "--data", mine, "--out", folder / "fails", *FLAGS)
    (folder / f"runs-{number}.json").write_text(json.dumps(runs))


def killed(arguments):
    """The program, of which the process number DYING_RANK dies in its first life at update DYING_AT."""
    real, dying_rank, dying_at = mlo_mae.outer_iteration, os.environ["DYING_RANK"], int(os.environ["DYING_AT"])

    def dying(net, state, *rest):
        if state.iteration == dying_at and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (dying_rank, "0"):
            Path(os.environ["DYING_MARK"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(net, state, *rest)

    mlo_mae.outer_iteration = dying
    mlo_mae.draw_run = lambda *arguments: None
    mlo_mae.end(mlo_mae.main(arguments))


if __name__ == "__main__":
    killed(sys.argv[2:]) if sys.argv[1] == "killed" else everything(Path(sys.argv[1]))


# --------------------------------------------------------------------------------------------------- two processes


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    random = np.random.default_rng(0)
    arrays = {f"{part}_{what}": random.integers(0, high, (count, *shape)).astype(np.uint8)
              for part, count in (("train", 60), ("test", 20))
              for what, high, shape in (("images", 256, (16, 16, 3)), ("labels", 2, ()))}  # fmt: skip
    np.savez(folder / "sides.npz", **arrays)
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PORTS": ",".join(free_ports(10))}
    processes = [
        subprocess.Popen([sys.executable, __file__, folder], env=common | {"RANK": str(number), "LOCAL_RANK": str(number)},
                         stderr=subprocess.PIPE, text=True, cwd=folder)
        for number in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            errors = process.communicate(timeout=300)[1]
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """{name: the two processes' (status, stdout, stderr)}"""
    both = [json.loads((folder / f"runs-{number}.json").read_text()) for number in range(2)]
    return {name: [outcomes[name] for outcomes in both] for name in both[0]}


def relative_error(found, judge):
    return float((found.double() - judge.double()).norm() / judge.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_computes(folder, case, dtype):
    judge = train(dtype, **CASES[case])
    first, second = (torch.load(folder / f"numbers-{number}.pt")[case, dtype] for number in range(2))
    assert (case == "random") != bool(judge["T's gradient"].norm() > 1e-9)  # a zero would agree with anything
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    for name in judge:
        assert torch.equal(first[name], second[name]), name  # the processes do not drift apart
        # In float32 one process alone is off by more than that in T's gradient; two must not be off by more.
        rounding = relative_error(judge[name], train(torch.float64, **CASES[case])[name]) if dtype == torch.float32 else 0
        assert relative_error(first[name], judge[name]) < max(bound, 2 * rounding), name


def test_a_whole_run_on_two_processes(folder, runs, tmp_path):
    (status, out, err), (other_status, other_out, other_err) = runs["whole"]
    assert status == other_status == 0 and other_out == "" and "update" not in other_err
    summary = json.loads(out.splitlines()[-1])
    assert summary["processes"] == 2 and "img/s" in err
    alone, _, _ = command("pretrain", "--data", folder / "sides.npz", "--out", tmp_path / "alone", *FLAGS)
    assert alone == 0
    rows, expected = (mlo_mae.read_metrics(run / "metrics.jsonl") for run in (folder / "whole", tmp_path / "alone"))
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys() | {"exchange_share"} and 0 < row["exchange_share"] < 1
        for name in other.keys() & {"level1_loss", "reconstruction_error", "level2_loss", "level3_loss"}:
            assert row[name] == pytest.approx(other[name], rel=1e-4)
    files, expected = ({path.name for path in run.iterdir()} for run in (folder / "whole", tmp_path / "alone"))
    assert files == {name for name in expected if not name.endswith(".png")}  # not drawn there


@pytest.mark.parametrize("name, words", [
    ("indivisible", "multiple of 2 (processes"), ("form", "one process"), ("flag", "--widht"), ("probe", "without torchrun"),
    ("one fails", "absent.npz"),
])  # fmt: skip
def test_an_error_of_several_processes_is_one_line(runs, name, words):
    (first, _, first_err), (second, _, second_err) = runs[name]
    assert first == second == 2
    lines = [line for line in (first_err + second_err).splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("mlo_mae: ") and words in lines[0], lines


def test_a_stop_that_reaches_one_process_stops_both(folder, runs):
    (first, _, first_err), (second, _, second_err) = runs["stopped"]
    assert first == second == 143 and "stopped at update 5 of 15" in first_err and "stopped" not in second_err
    assert [outcome[0] for outcome in runs["resumed"]] == [0, 0]
    ours, theirs = weights(folder / "cut"), weights(folder / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("attempt", range(int(os.environ.get("MLO_MAE_KILLS", 1))))
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_process_is_started_again_and_the_weights_are_the_same(folder, tmp_path, attempt):
    """Process 1 at update 5, and others at random."""
    chance = random.Random(attempt)
    place = {"DYING_RANK": "1", "DYING_AT": "5"}
    if attempt:
        place = {"DYING_RANK": str(chance.randrange(2)), "DYING_AT": str(chance.randrange(15))}
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1", "--monitor-interval=0.1",
           "--master-addr=127.0.0.1", f"--master-port={free_ports(1)[0]}"]  # fmt: skip
    flags = ["pretrain", "--data", folder / "sides.npz", "--out", tmp_path / "run", "--resume", *FLAGS]
    finished = subprocess.run([*run, __file__, "killed", *flags], capture_output=True, text=True, timeout=300,
                              env=os.environ | place | {"DYING_MARK": str(tmp_path / "killed")})  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "killed").exists()
    assert "Signal 9" in finished.stderr or "exitcode: -9" in finished.stderr
    ours, theirs = weights(tmp_path / "run"), weights(folder / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -------------------------------------------------------------------------------------------------- parts of a batch


@pytest.mark.parametrize("less_memory", [dict(accumulate=2), dict(accumulate=12), dict(checkpoint_activations=True)])
@pytest.mark.parametrize("settings", [{}, dict(head_norm="batch", head_steps=2), dict(unroll="full")])
def test_the_result_does_not_depend_on_what_is_held(settings, less_memory):
    if settings.get("unroll") and "accumulate" not in less_memory:
        pytest.skip("refused")
    judge, found = train(torch.float64, **settings), train(torch.float64, **settings, **less_memory)
    assert max(relative_error(found[name], judge[name]) for name in judge) < 1e-12


def test_parts_bound_what_is_held_at_once(monkeypatch):
    sizes = []
    real = mlo_mae.call

    def watched(module, params, inputs, *rest):
        if isinstance(module, mlo_mae.Encoder):
            sizes.append(len(inputs))
        return real(module, params, inputs, *rest)

    monkeypatch.setattr(mlo_mae, "call", watched)
    train(torch.float32, unroll="full", accumulate=4)
    assert max(sizes) == 4  # 12 / 4 images of level 1, 2 * 8 / 4 of levels 2 and 3
    held = []
    for settings in ({}, dict(accumulate=4), dict(checkpoint_activations=True)):
        held.append(0)

        def pack(tensor):
            held[-1] = held[-1] + tensor.numel()
            return tensor

        net, (theta, _, _) = build(dataclasses.replace(TINY, **settings), 16, 3, 5)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mlo_mae.encode_in_parts(net, theta[: net.encoder_size].requires_grad_(), torch.zeros(16, 3, 16, 16))
    assert held[1] < held[0] / 4 and held[2] < held[0] / 2


def test_baselines_that_need_the_whole_batch_say_so(monkeypatch):
    whole = dataclasses.replace(TINY, masking="random", uniformity=0.01)
    semantic = dataclasses.replace(TINY, masking="semantic", parts_from="run")
    mlo_mae.check(whole)
    mlo_mae.check(semantic)
    with pytest.raises(mlo_mae.RunError, match="--uniformity .* one process and --accumulate 1"):
        mlo_mae.check(dataclasses.replace(whole, accumulate=2))
    monkeypatch.setattr(mlo_mae, "world", lambda: 2)
    for cfg, words in ((whole, "--uniformity"), (semantic, "--masking semantic goes with one process")):
        with pytest.raises(mlo_mae.RunError, match=words):
            mlo_mae.check(cfg)
