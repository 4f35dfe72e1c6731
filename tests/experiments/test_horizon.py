"""horizon: that its T knows the objects, that its derivative is the one it names, and what it prints."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import reduce

import mlo_mae
from data import load
from experiments import horizon
from harness.schedule import schedule

SIZES = {"patch_size": 8, "width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_heads": 2}
TINY = replace(horizon.CONFIG, **SIZES, images=240, batch_size=8, labelled_batch_size=16, head_steps=2)


@pytest.fixture
def training(monkeypatch, drawn_once):
    monkeypatch.setattr(horizon, "CONFIG", TINY)
    return horizon.begin(0, 6, 40)


def test_its_masking_network_is_told_the_objects_as_they_lie_in_the_moved_images(training):
    """An object's pixels, painted into the images before these are cropped and flipped, are where T has it that they are."""
    masked, plain = training.masked, load("shapes", "", limit=240, seed=0).train
    assert torch.equal(masked.images, plain.images) and torch.equal(masked.labels > 0, plain.objects)
    painted = plain.objects[:, None].expand(-1, 3, -1, -1) * torch.tensor(255, dtype=torch.uint8)
    masked.images = painted
    _, steps = horizon.go_on(training, "background", 4)
    known = training.net.masking.objects
    for step in steps:
        share = reduce(step.images, "b c (h p) (w q) -> b (h w)", "mean", p=8, q=8)
        share = (share + (masked.mean / masked.std).mean()) / (255 / masked.std).mean()  # black is 0, white 1
        assert 0.1 < share.mean() < 0.4 and torch.allclose(known[step.images] * step.covered, share, atol=1e-4)
        assert 0.8 < step.covered.mean() < 0.93  # of a side, 4 / 9 * 5 pixels of 32 lie beside the image on average
        prob = mlo_mae.weights_of(training.net, torch.tensor([0.2, 1.0]), step)
        assert torch.allclose(prob, step.covered - 0.8 * share, atol=1e-4)


@pytest.mark.parametrize("ahead, made", [(2, 2), (1, TINY.mask_batches)])
def test_the_derivative_is_that_of_the_steps_it_names(training, ahead, made):
    """Through two steps; through one, over the latest batches."""
    look = 3
    theta, steps = horizon.go_on(training, "all alike", made, order=1 + look)
    known = training.net.masking.objects
    objects = np.mean([(known[step.images] * step.covered).mean() for step in steps])
    rest = np.mean([step.covered.mean() for step in steps]) - objects
    if ahead == 1:
        steps, each = [mlo_mae.joined(steps)], steps
        known[steps[0].images] = torch.cat([known[step.images] for step in each])
        assert made == 4 and len(steps[0].images) == 4 * TINY.batch_size
    found, others = (horizon.derivatives(training, ahead, number) for number in (look, look + 1))
    assert list(found) == list(horizon.QUESTIONS) == ["closed form, mean token", "ten head steps, CLS token"]
    for question, net in training.asked.items():
        labelled, head = horizon.labelled(training, question, 100 + look), training.heads[question]
        of_a, of_b = mlo_mae.unrolled(net, theta, torch.ones(2), head, labelled, steps).hypergradient
        expected = (of_a / objects - of_b / rest) / ahead
        assert found[question] == pytest.approx(float(expected), rel=1e-3)
        assert others[question] != pytest.approx(float(expected), rel=1e-3)


def test_the_questions_differ_in_their_heads_alone(training):
    (new, old), default = training.asked.values(), mlo_mae.Config()
    assert (new.cfg.level2, new.cfg.pooling) == ("ridge", "mean") == (default.level2, default.pooling)
    assert (old.cfg.level2, old.cfg.pooling) == ("steps", "cls") and default.head_steps == 10
    assert replace(new.cfg, level2="steps", pooling="cls") == old.cfg and new.masking is old.masking
    solved, stepped = training.heads.values()
    assert (solved.t, stepped.t) == (0, horizon.HEAD_LOOKS * TINY.head_steps)
    assert stepped.params.isfinite().all() and stepped.params.any()


def test_ways_part_only_by_their_weights(training):
    ways = "all alike", "all alike", "objects"
    (alike, made), (again, _), (objects, others) = (horizon.go_on(training, way, 3) for way in ways)
    assert torch.equal(alike.params, again.params) and not torch.equal(alike.params, objects.params)
    assert all(torch.equal(a.images, b.images) and torch.equal(a.mask, b.mask) for a, b in zip(made, others))
    assert (objects.params - alike.params).abs().max() > 1e-4
    stream = training.splits.train.stream(TINY.batch_size, TINY.seed)
    whole = [next(stream).images for _ in range(9)]  # the way goes on where the six steps before it ended
    assert all(torch.equal(step.images, images) for step, images in zip(made, whole[6:]))
    assert len(made) == 3 and made[0].rates.lr == pytest.approx(TINY.lr * schedule(6, 40, TINY.warmup * 40))


def test_the_table(training, monkeypatch, capsys):
    monkeypatch.setattr(horizon, "LOOKS", {1: 2, 3: 1, 4: 0})
    assert mlo_mae.main(["horizon", "--seeds", "2", "--after", "4", "--of", "20"]) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    assert printed[0] == "`python mlo_mae.py horizon --seeds 2 --after 4 --of 20`"
    rows = json.loads(last)["rows"]
    assert [row["steps_ahead"] for row in rows] == [1, 3, 4]
    assert [[len(row["derivatives"][question]) for question in horizon.QUESTIONS] for row in rows] == [[4, 4], [2, 2], [0, 0]]
    assert np.array(rows[0]["loss3"]).shape == (2, 3) and np.isfinite(rows[0]["loss3"]).all()
    line = next(line for line in printed if line.startswith("| 3 |"))
    assert f"{np.mean([losses[0] - losses[1] for losses in rows[1]['loss3']]):+.3f}" in line and "(2 looks)" in line
    first, second = rows[1]["derivatives"]["closed form, mean token"]
    assert f"t {(first + second) / abs(first - second):+.1f} (2 looks)" in line


def test_l3_is_of_validation_images_by_the_best_probe(training):
    params, splits = training.theta.params, training.splits
    fit, judge = (horizon.features(training.net, params, split, "mean") for split in (splits.train, splits.val))
    probes = horizon.lbfgs_probes(*fit, len(splits.class_names)).values()
    losses = [torch.nn.functional.cross_entropy(probe(judge[0]), judge[1]).item() for probe in probes]
    assert horizon.fitted_loss3(training) == pytest.approx(min(losses)) and max(losses) > min(losses)


def test_a_way_is_the_same_whether_it_is_looked_at_on_the_way_or_not(training, monkeypatch):
    monkeypatch.setattr(horizon, "begin", lambda *arguments: training)
    monkeypatch.setattr(horizon, "fitted_loss3", lambda there: float(there.theta.params.double().sum()))
    monkeypatch.setattr(horizon, "LOOKS", {1: 0, 3: 0})
    losses, _ = horizon.measure(0, training.number, 40)[3]
    for way in horizon.WEIGHTED:
        theta, _ = horizon.go_on(training, way, 3, order=1)
        assert losses[way] == float(theta.params.double().sum())


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--after", "9", "--of", "9"], ["--steps", "3"]])
def test_what_cannot_run_ends_in_one_line(arguments, capsys):
    assert horizon.main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and arguments[0] in errors[0]
