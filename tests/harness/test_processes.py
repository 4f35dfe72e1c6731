"""Several processes against one: the same masks, gradients, weights and files.

Two processes are started once; they run `everything` below, which leaves its results in files. MLO_MAE_KILLS sets how
many runs lose a process."""

import contextlib
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

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is a script as well
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers import (
    DEFAULT,
    arguments,
    checkpoint_of,
    copied,
    hypergradient_problem,
    relative_error,
    same,
    some_iterations,
    weights,
    write_sides,
)

import mlo_mae
from harness import UserError, cli, processes, run
from harness.processes import leave
from harness.run import read_metrics

CASES = {
    "learned": {},
    "random": {"masking": "random"},
    "head norm over the batch, parts, embeddings": {
        **{"head_norm": "batch", "head_steps": 2, "accumulate": 3, "masking_input": "embeddings"},
    },
    "all steps, parts": {"unroll": "full", "accumulate": 2},
    "shared T, drawn masks": {"masking_network": "shared", "mask_choice": "odds"},
    "tokens, ridge": DEFAULT | {"mask_batches": 2},
    "tokens, ridge, drawn masks, parts": DEFAULT | {"mask_batches": 2, "mask_choice": "odds", "accumulate": 3},
    "tokens, ridge, all steps": DEFAULT | {"unroll": "full"},
    "past T's part": DEFAULT | {"mask_batches": 2, "mask_until": 0.1, "mask_restart": True},
    "activations again": DEFAULT | {"mask_batches": 2, "checkpoint_activations": True},
}
BUCKETS = {torch.float32: processes.BUCKET, torch.float64: 500}  # a gradient at once; in parts, beside the backward pass
FLAGS = ["--epochs", 10, "--checkpoint-minutes", 0, "--mask-start", 0.2]  # 15 updates, T from the 3rd on
PARTS = [*FLAGS, "--mask-until", 0.6, "--mask-wait", 0.07]  # and to the 10th, having waited once

# -------------------------------------------------------------------------------------- what each process runs


def numbers():
    found = {}
    for dtype, processes.BUCKET in BUCKETS.items():
        found |= {(name, dtype): some_iterations(dtype, **case) for name, case in CASES.items()}
    processes.BUCKET = BUCKETS[torch.float32]
    return found


def next_port():
    """The processes meet at another port each time, so that none meets the ruins of the time before."""
    if "PORTS" in os.environ:
        os.environ["MASTER_PORT"], _, os.environ["PORTS"] = os.environ["PORTS"].partition(",")


def command(*argv):
    """Exit status, stdout and stderr of the program run in this process."""
    out, err = io.StringIO(), io.StringIO()
    next_port()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = mlo_mae.main([str(argument) for argument in argv])
    except SystemExit as exit:
        status = exit.code
    end_together()
    return status, out.getvalue(), err.getvalue()


def end_together():
    """Process 0, where the processes meet (torchrun has a place of its own for that), is the last to leave."""
    if os.environ.get("RANK") == "1":
        leave()
        Path(f"left-{os.environ['MASTER_PORT']}").touch()
    elif "RANK" in os.environ:
        deadline = time.monotonic() + 60
        while not Path(f"left-{os.environ['MASTER_PORT']}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    leave()


def stop_in_the_middle(number, iteration=4):
    """SIGTERM to process 1 alone, after the processes have agreed that no checkpoint is due at this iteration."""
    real = run.agree
    agreed = []

    def interrupted(*flags):
        found = real(*flags)
        agreed.append(1)
        if len(agreed) == iteration and number == 1:
            signal.raise_signal(signal.SIGTERM)
        return found

    run.agree = interrupted
    yield
    run.agree = real


def everything(folder):
    """What each of the two processes runs."""
    npz, number = folder / "sides.npz", int(os.environ["RANK"])
    cli.command("show").after_training = lambda *arguments: []  # slow, and no matter of several processes
    next_port()
    processes.join()
    torch.save(numbers(), folder / f"numbers-{number}.pt")
    end_together()
    outcomes = {"whole": command(*arguments(npz, folder / "whole", *FLAGS))}
    outcomes["indivisible"] = command(*arguments(npz, folder / "odd", *FLAGS, "--batch-size", 15))
    outcomes["indivisible labelled"] = command(*arguments(npz, folder / "odd", *FLAGS, "--labelled-batch-size", 7))
    outcomes["form"] = command("pretrain", "--hypergradient", "unrolled", "--out", folder / "form")
    outcomes["flag"] = command("pretrain", "--widht", 3)
    outcomes["probe"] = command("probe", folder / "whole")
    stopping = stop_in_the_middle(number)
    next(stopping)
    outcomes["stopped"] = command(*arguments(npz, folder / "cut", *FLAGS, "--checkpoint-minutes", 60))
    next(stopping, None)
    outcomes["resumed"] = command("pretrain", "--out", folder / "cut", "--resume")
    mine = npz if number == 0 else folder / "absent.npz"
    outcomes["one fails"] = command(*arguments(mine, folder / "fails", *FLAGS))
    mine = write_sides(folder / f"sides-{number}.npz", (("train", 60 + number), ("test", 20)))
    outcomes["other data"] = command(*arguments(mine, folder / "other", *FLAGS))
    outcomes["other settings"] = command(*arguments(npz, folder / "settings", *FLAGS, "--lr", 1e-3 * (1 + number)))
    (folder / f"runs-{number}.json").write_text(json.dumps(outcomes))


def in_three_parts(folder):
    """Runs that go past T's part, by each of the two processes; process 1 alone cannot see folders that are deleted."""
    npz, number = folder / "sides.npz", int(os.environ["RANK"])
    for name in ("probe", "show"):
        cli.command(name).after_training = lambda *arguments: []
    first = ["--init", folder / "given", "--seed", 5]
    given = ["--masking-from", folder / "taken"]
    outcomes = {"parts": command(*arguments(npz, folder / "parts", *PARTS))}
    outcomes["first"] = command(*arguments(npz, folder / "first", *PARTS, *first))
    for name, flags, iteration in (("early", PARTS, 5), ("kept", PARTS, 11), ("T", [*FLAGS, *given], 11)):
        stopping = stop_in_the_middle(number, iteration)
        next(stopping)
        outcomes[f"{name} stopped"] = command(*arguments(npz, folder / name, *flags, "--checkpoint-minutes", 60))
        next(stopping, None)
        if name == "T" and number == 0:
            (folder / "taken").rename(folder / "gone")
        outcomes[f"{name} resumed"] = command("pretrain", "--out", folder / name, "--resume")
        (folder / f"parts-{number}.json").write_text(json.dumps(outcomes))


def killed(argv):
    """The program, of which the process number DYING_RANK dies in its first life at update DYING_AT."""
    real, dying_rank, dying_at = mlo_mae.outer_iteration, os.environ["DYING_RANK"], int(os.environ["DYING_AT"])

    def dying(net, state, *rest):
        if state.iteration == dying_at and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (dying_rank, "0"):
            Path(os.environ["DYING_MARK"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(net, state, *rest)

    mlo_mae.outer_iteration = dying
    cli.command("show").after_training = lambda *arguments: []
    processes.end(mlo_mae.main(argv))


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        killed(sys.argv[2:])
    else:
        {"everything": everything, "parts": in_three_parts}[sys.argv[1]](Path(sys.argv[2]))


# --------------------------------------------------------------------------------------------------- two processes


def free_ports(count):
    """Below those that systems hand out by themselves: another program's socket must not come by one before its turn."""
    ports, numbers = [], random.SystemRandom()
    while len(ports) < count:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := numbers.randrange(10_000, 30_000)))
            ports += [str(port)] * (str(port) not in ports)
    return ports


def two_processes(work, folder, seconds):
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PORTS": ",".join(free_ports(12))}
    started, argv = [], [sys.executable, __file__, work, folder]
    try:
        for number in ("0", "1"):
            env = common | {"RANK": number, "LOCAL_RANK": number}
            started.append(subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True, cwd=folder))
        for process in started:
            errors = process.communicate(timeout=seconds)[1]
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_sides(folder / "sides.npz")
    two_processes("everything", folder, 300)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder):
    """{name: the two processes' (status, stdout, stderr)}"""
    both = [json.loads((folder / f"runs-{number}.json").read_text()) for number in range(2)]
    return {name: [each[name] for each in both] for name in both[0]}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_computes(folder, case, dtype):
    judge = some_iterations(dtype, **CASES[case])
    first, second = (torch.load(folder / f"numbers-{number}.pt")[case, dtype] for number in range(2))
    assert (case == "random") != bool(judge["T's gradient"].norm() > 1e-9)  # a zero would agree with anything
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    for name in judge:
        assert torch.equal(first[name], second[name]), name  # the processes do not drift apart
        # In float32 one process alone is off by more than that in T's gradient; two must not be off by more.
        exact = some_iterations(torch.float64, **CASES[case])[name]
        rounding = relative_error(judge[name], exact) if dtype == torch.float32 else 0
        assert relative_error(first[name], judge[name]) < max(bound, 2 * rounding), name


@pytest.mark.slow
def test_a_whole_run_on_two_processes(folder, outcomes, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.command("show"), "after_training", lambda *arguments: [])
    (status, out, err), (other_status, other_out, other_err) = outcomes["whole"]
    assert status == other_status == 0 and other_out == "" and "update" not in other_err
    assert err.count("data ") == 1 and "data " not in other_err
    summary = json.loads(out.splitlines()[-1])
    assert summary["processes"] == 2 and "img/s" in err
    alone, _, _ = command(*arguments(folder / "sides.npz", tmp_path / "alone", *FLAGS))
    assert alone == 0
    rows, expected = (read_metrics(run / "metrics.jsonl") for run in (folder / "whole", tmp_path / "alone"))
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys() | {"exchange_share"} and 0 < row["exchange_share"] < 1
        for name in other.keys() & {"level1_loss", "reconstruction_error", "level2_loss", "level3_loss"}:
            assert row[name] == pytest.approx(other[name], rel=1e-4)
    files, expected = ({path.name for path in run.iterdir()} for run in (folder / "whole", tmp_path / "alone"))
    assert files == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words",
    [
        ("indivisible", "multiple of 2 (processes"),
        ("indivisible labelled", "the second of 2 (processes"),
        ("form", "one process"),
        ("flag", "--widht"),
        ("probe", "without torchrun"),
        ("one fails", "absent.npz"),
        ("other data", "the same --data"),
        ("other settings", "give all of them the same flags"),
    ],
)
def test_an_error_of_several_processes_is_one_line(outcomes, name, words):
    (first, _, first_err), (second, _, second_err) = outcomes[name]
    assert first == second == 2
    lines = [line for line in (first_err + second_err).splitlines() if line and not line.startswith("data ")]
    assert len(lines) == 1 and lines[0].startswith("mlo_mae: ") and words in lines[0], lines


@pytest.mark.slow
def test_a_stop_that_reaches_one_process_stops_both(folder, outcomes):
    (first, _, first_err), (second, _, second_err) = outcomes["stopped"]
    assert first == second == 143 and "stopped at update 5 of 15" in first_err and "stopped" not in second_err
    assert [outcome[0] for outcome in outcomes["resumed"]] == [0, 0]
    assert same(weights(folder / "cut"), weights(folder / "whole"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folder and the outcomes of `in_three_parts`, and of the same runs by one process: "parts" and "given"."""
    folder = tmp_path_factory.mktemp("parts")
    write_sides(folder / "sides.npz")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("probe", "show"):
            patch.setattr(cli.command(name), "after_training", lambda *arguments: [])
        assert command(*arguments(folder / "sides.npz", folder / "given", *PARTS))[0] == 0
        copied(folder / "given", folder / "taken")
        first = ["--init", folder / "given", "--seed", 5]
        assert command(*arguments(folder / "sides.npz", folder / "first alone", *PARTS, *first))[0] == 0
        given = ["--masking-from", folder / "taken"]
        assert command(*arguments(folder / "sides.npz", folder / "T alone", *FLAGS, *given))[0] == 0
    two_processes("parts", folder, 300)
    both = [json.loads((folder / f"parts-{number}.json").read_text()) for number in range(2)]
    return folder, {name: [each[name] for each in both] for name in both[0]}


@pytest.mark.slow
@pytest.mark.parametrize("name, alone", [("parts", "given"), ("first", "first alone")])
def test_two_processes_go_past_ts_part_as_one(parts, name, alone):
    folder, outcomes = parts
    statuses = [outcome[0] for outcome in outcomes[name]]
    assert statuses == [0, 0]
    rows, expected = (read_metrics(folder / run / "metrics.jsonl") for run in (name, alone))
    for row, other in zip(rows, expected, strict=True):
        for loss in other.keys() & {"level1_loss", "reconstruction_error", "level2_loss", "level3_loss"}:
            assert row[loss] == pytest.approx(other[loss], rel=1e-3)
    ours, theirs = (checkpoint_of(folder / run) for run in (name, alone))
    assert ours["waited"] == theirs["waited"] == 1
    assert ours["moments"]["masking"]["t"] == theirs["moments"]["masking"]["t"] > 0
    ours, theirs = ours["eyes"]["weights"], theirs["eyes"]["weights"]
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-3) for key in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["early", "kept", "T"])
def test_two_processes_resume_what_t_reads(parts, name):
    """ "early": before T's part ends. "kept": after it. "T": of another run, whose folder is gone by then."""
    folder, outcomes = parts
    assert [outcome[0] for outcome in outcomes[f"{name} stopped"]] == [143, 143]
    assert [outcome[0] for outcome in outcomes[f"{name} resumed"]] == [0, 0], outcomes[f"{name} resumed"]
    ours, theirs = (weights(folder / run) for run in (name, "T alone" if name == "T" else "parts"))
    assert same(ours, theirs) if name != "T" else all(torch.allclose(ours[key], theirs[key], atol=1e-3) for key in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(int(os.environ.get("MLO_MAE_KILLS", 1))))
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_process_is_started_again_and_the_weights_are_the_same(folder, tmp_path, attempt):
    """Process 1 at update 5, and others at random."""
    chance = random.Random(attempt)
    place = {"DYING_RANK": "1", "DYING_AT": "5"}
    if attempt:
        place = {"DYING_RANK": str(chance.randrange(2)), "DYING_AT": str(chance.randrange(15))}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    torchrun += ["--monitor-interval=0.1", "--master-addr=127.0.0.1", f"--master-port={free_ports(1)[0]}"]
    argv = [*torchrun, __file__, "killed", *arguments(folder / "sides.npz", tmp_path / "run", "--resume", *FLAGS)]
    env = os.environ | place | {"DYING_MARK": str(tmp_path / "killed")}
    finished = subprocess.run(argv, capture_output=True, text=True, timeout=300, env=env)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "killed").exists()
    assert "Signal 9" in finished.stderr or "exitcode: -9" in finished.stderr
    assert same(weights(tmp_path / "run"), weights(folder / "whole"))


# ---------------------------------------------------------------------------------------------------- one process


def test_one_process_says_nothing_and_has_everything(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(processes, "exchanging", 0.0)  # by other tests
    processes.join()
    assert (processes.world(), processes.rank(), processes.share(7)) == (1, 0, slice(0, 7))
    tensor, tree = torch.ones(3), (3, (torch.ones(2), 4))
    assert processes.summed(tensor) is tensor and processes.average(tensor) is tensor and processes.gather(tensor) is tensor
    assert processes.agree(3, 0) == [3, 0] and processes.first_before_others(lambda: 5) == 5 and processes.first_to_fail()
    same_tree = processes.as_first(tree)
    assert same_tree[0] == 3 and same_tree[1][0] is tree[1][0] and same_tree[1][1] == 4
    assert processes.exchange_seconds() == 0 == processes.exchange_seconds()
    assert processes.alike({"some": [3]})


def test_what_is_done_alone_has_all_cores(monkeypatch):
    """Of several processes; one that is alone from the start keeps what it was given."""
    before = torch.get_num_threads()
    with processes.all_cores():
        assert torch.get_num_threads() == before
    monkeypatch.setattr(processes, "started", lambda: 2)
    with processes.all_cores():
        assert torch.get_num_threads() == (len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count())
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("world, count", [(1, 5), (2, 8), (3, 8), (4, 12)])
def test_shares_cover_a_batch(monkeypatch, world, count):
    monkeypatch.setattr(processes, "world", lambda: world)
    taken = []
    for rank in range(world):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        taken += range(count)[processes.share(count)]
    assert taken == list(range(count))


def test_an_exchange_that_fails_is_one_line():
    with pytest.raises(UserError, match=r"the exchange with another process failed \(peer is gone\); continue with --resume"):
        with processes.exchange():
            raise RuntimeError("peer is gone\nand more")
    with pytest.raises(UserError, match=r"failed \(RuntimeError\)"), processes.exchange():
        raise RuntimeError
    with pytest.raises(torch.OutOfMemoryError), processes.exchange():
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "flags, gpus, nccl, backend", [([], 1, True, "nccl"), ([], 1, False, "gloo"), (["--device", "cpu"], 1, True, "gloo")]
)
def test_the_backend_is_that_of_the_device(monkeypatch, flags, gpus, nccl, backend):
    asked = []
    monkeypatch.setattr(processes, "started", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(dist, "rendezvous", lambda how: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: asked.append(backend))
    for name, value in {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "started", lambda: 2)

    def pretrain(argv):
        assert argv == flags

    if flags or not gpus:
        assert cli.dispatch(flags, pretrain) == 0
    else:  # process 1 of a machine of one GPU
        assert cli.dispatch(flags, pretrain) == 2
    assert len(asked) == 1 and ("nccl" in asked[0]) == (backend == "nccl")


class Exchange:
    """An all_reduce of two processes, under way: what is sent at its beginning is there after `wait`. The other process
    always has three times what this one has."""

    def __init__(self, tensor, events):
        self.tensor, self.sent, self.events = tensor, tensor.clone(), events

    def wait(self):
        self.tensor.copy_(4 * self.sent)
        self.events.append("waited")


@pytest.fixture
def events(monkeypatch):
    """As the first of two processes; a list of the exchanges that are begun, (begin, end), and waited for, and of what else a
    test puts there."""
    events = []

    def all_reduce(tensor, async_op=False):
        begin = tensor.storage_offset()
        events.append((begin, begin + len(tensor)))
        begun = Exchange(tensor, events)
        return begun if async_op else begun.wait()

    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 0}.items():
        monkeypatch.setattr(processes.dist, name, lambda value=value: value)
    monkeypatch.setattr(processes.dist, "all_reduce", all_reduce)
    processes.exchange_seconds()
    return events


SIZES = [(3,), (5, 1), (1,), (7,), (1, 2), (4, 10), (2, 3)]  # places 0, 3, 8, 9, 16, 18, 58 to 64


def layers(events, order):
    """A loss of layers in this order, each of one leaf, that say when the backward pass has come through them; the leaves."""
    random = torch.Generator().manual_seed(0)
    leaves = [torch.randn(size, generator=random, dtype=torch.float64).requires_grad_() for size in SIZES]
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for n in order:
        x.register_hook(lambda gradient, n=n: events.append(f"through {n}"))
        x = torch.tanh(x + (leaves[n].cos() * (1 + leaves[n].detach())).sum())
    return x.sum(), leaves


@pytest.mark.parametrize("order", [range(7), range(6, -1, -1), (2, 5, 0, 1, 6, 4, 3)], ids=str)
@pytest.mark.parametrize(
    "bucket, sent",
    [
        (1, [(58, 64), (18, 58), (16, 18), (9, 16), (8, 9), (3, 8), (0, 3)]),
        (8, [(18, 64), (9, 18), (0, 9)]),
        (10, [(18, 64), (8, 18), (0, 8)]),  # the last is smaller
        (63, [(0, 64)]),
        (64, [(0, 64)]),
    ],
)
def test_a_gradient_is_averaged_in_any_buckets(monkeypatch, events, bucket, sent, order):
    monkeypatch.setattr(processes, "BUCKET", bucket)
    loss, leaves = layers(events, order)
    expected = torch.cat([2 * gradient.flatten() for gradient in torch.autograd.grad(loss, leaves, retain_graph=True)])
    events.clear()
    assert torch.equal(processes.averaged_gradient(loss, leaves), expected)
    assert [event for event in events if isinstance(event, tuple)] == sent  # whatever order the backward pass has


def test_a_gradient_is_exchanged_beside_the_backward_pass(monkeypatch, events):
    monkeypatch.setattr(processes, "BUCKET", 10)
    processes.averaged_gradient(*layers(events, range(7)))
    through = [event for event in events if str(event).startswith("through")]
    assert through == [f"through {n}" for n in range(6, 0, -1)]
    assert events.index((18, 64)) < events.index("through 4") and events.index((8, 18)) < events.index("through 1")
    assert events[-4:] == [(0, 8), "waited", "waited", "waited"]
    events.clear()
    processes.averaged_gradient(*layers(events, range(6, -1, -1)))
    assert events.index("through 5") < events.index((18, 64))  # what is there first waits for its turn


def test_a_step_of_level_1_is_exchanged_beside_its_backward_pass(monkeypatch, events):
    net, (theta, psi, *_, steps) = hypergradient_problem()
    real = torch.autograd.grad

    def watched(*arguments, **how):
        events.append("begin")
        found = real(*arguments, **how)
        events.append("end")
        return found

    monkeypatch.setattr(torch.autograd, "grad", watched)
    for bucket, exchanges in ((len(theta.params), 1), (len(theta.params) // 4, 4)):
        monkeypatch.setattr(processes, "BUCKET", bucket)
        for in_place in (False, True):
            events.clear()
            _, step, _, _ = mlo_mae.level1_step(net, theta, psi, steps[0].images, steps[0].rates, 0, 0, in_place=in_place)
            made = step.gradient is step.theta is None if in_place else step.gradient.shape == theta.params.shape
            assert made
            kinds = ["sent" if isinstance(event, tuple) else event for event in events]
            beside = ["begin", *["sent"] * exchanges, "end", *["waited"] * exchanges]
            assert kinds == (["begin", "end", "sent", "waited"] if exchanges == 1 else beside)


def test_seconds_of_an_exchange_are_those_that_hold_up(monkeypatch, events):
    monkeypatch.setattr(processes, "BUCKET", 10)
    real = Exchange.wait
    monkeypatch.setattr(Exchange, "wait", lambda self: time.sleep(0.02) or real(self))
    loss, leaves = layers(events, range(7))
    leaves[0].register_hook(lambda gradient: time.sleep(1))
    processes.averaged_gradient(loss, leaves)
    assert 3 * 0.02 <= processes.exchange_seconds() < 1


@pytest.mark.parametrize("place", ["all_reduce", "wait"])
def test_an_exchange_that_fails_beside_the_backward_pass_is_one_line(monkeypatch, events, place):
    monkeypatch.setattr(processes, "BUCKET", 10)

    def failing(*arguments, **how):
        raise RuntimeError("peer is gone\nand more")

    monkeypatch.setattr(*((Exchange, "wait") if place == "wait" else (processes.dist, "all_reduce")), failing)
    with pytest.raises(
        UserError, match=r"^the exchange with another process failed \(peer is gone\); continue with --resume$"
    ):
        processes.averaged_gradient(*layers(events, range(7)))


def test_a_leaf_without_a_gradient_is_no_hang(monkeypatch, events):
    monkeypatch.setattr(processes, "BUCKET", 10)
    with pytest.raises(RuntimeError, match="not have been used"):
        processes.averaged_gradient(*layers(events, [0, 1, 2, 4, 5, 6]))
