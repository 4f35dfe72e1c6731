"""Steps in one launch: with a stand-in for a CUDA graph that is as strict about memory and numbers, and, where there is a GPU,
with the real one."""

import math

import pytest
import torch
from helpers import as_recorded

from harness import graphs
from harness.graphs import recorded, replayed


def work(total, held, x, weight):
    """Changes the first two in place."""
    total += weight * x.sum()
    held.mul_(0.5).add_(x)
    return total + held.sum(), x * weight


def plain(total, held, x, weight):
    """The same, of copies."""
    total, held = total.clone(), held.clone()
    results = work(total, held, x, weight)
    return total, held, *results


def numbers(device="cpu", size=3):
    return tuple(torch.rand(shape, dtype=torch.float64).to(device) for shape in ((), (size,), (size,), ()))


def in_turn(call, device="cpu"):
    """Four calls: each of three with what the one before it returned and with new numbers, and one that begins again."""
    given, pairs = numbers(device), []
    for number in range(4):
        expected = plain(*given)
        total, held, *results = call(*given)
        assert all(map(torch.allclose, (total, held), expected))
        pairs.append((results, expected[2:]))
        new = numbers(device)
        given = (total, held, *new[2:]) if number < 2 else new
    for results, expected in pairs:  # no later call has written over them
        assert all(map(torch.allclose, results, expected))


def test_a_replay_is_a_call():
    in_turn(replayed(work, 2, record=as_recorded))


def test_a_replay_works_in_its_own_memory():
    call, given = replayed(work, 2, record=as_recorded), numbers()
    before = [x.clone() for x in given]
    first = call(*given)
    again = call(*given)
    assert all(map(torch.equal, given, before)) and all(map(torch.equal, first, again))
    after = call(*again[:2], *given[2:])
    assert after[0] is again[0] and not torch.equal(after[0], plain(*before)[0])  # in the same memory


def test_other_shapes_are_recorded_anew():
    counts = []
    call = replayed(work, 2, record=lambda function: counts.append(1) or as_recorded(function))
    for size in (3, 3, 1, 1, 4):
        given = numbers(size=size)
        assert all(map(torch.allclose, call(*given), plain(*given)))
    assert len(counts) == 3


def test_what_cannot_be_recorded_is_called_each_time(capsys):
    def record(function):
        function()  # it had begun
        raise RuntimeError("operation not permitted while it is recorded\nmore lines")

    in_turn(replayed(work, 2, record=record))
    said = "steps are not recorded, and take longer to start (operation not permitted while it is recorded); --graphs off\n"
    assert capsys.readouterr().err == said


def test_where_nothing_is_gained_nothing_is_recorded(capsys):
    counts = []
    call, given = replayed(work, 2, record=lambda function: counts.append(function())), numbers()
    in_turn(call)
    after = call(*given)
    assert after[0] is given[0] and after[1] is given[1] and len(counts) == 1  # in place, and asked once
    assert capsys.readouterr().err == ""


def test_other_facts_are_recorded_anew():
    facts, counts = [1.0], []
    call = replayed(lambda x: (x * facts[0],), 0, lambda: tuple(facts), lambda f: counts.append(1) or as_recorded(f))
    for facts[0] in (2.0, 2.0, 3.0, 2.0):
        assert call(torch.ones(3))[0].tolist() == [facts[0]] * 3
    assert len(counts) == 3


def test_the_stand_in_knows_no_python_as_a_graph_does():
    """What is not among the facts stays as it was recorded."""
    factor = [2.0]
    call = replayed(lambda x: (x * factor[0],), 0, record=as_recorded)
    call(torch.ones(3))
    factor[0] = 3.0
    assert call(torch.ones(3))[0].tolist() == [2.0] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU")
def test_a_gpus_graph_is_a_call(capsys, monkeypatch):
    monkeypatch.setattr(graphs, "GAIN", math.inf)  # else so small a work is not recorded
    made = []
    in_turn(replayed(work, 2, record=lambda function: made.append(recorded(function)) or made[-1]), "cuda")
    assert len(made) == 1 and made[0] and capsys.readouterr().err == ""
