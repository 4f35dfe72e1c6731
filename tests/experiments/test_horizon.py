"""horizon: that its T knows the objects, that its derivative is the one it names, and what it prints."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import reduce

import mlo_mae
from experiments import horizon
from harness.schedule import schedule
from harness.vectors import call

SIZES = {"patch_size": 8, "width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_heads": 2}
TINY = replace(horizon.CONFIG, **SIZES, images=240, batch_size=8, labelled_batch_size=16, head_steps=2)


@pytest.fixture
def training(monkeypatch, drawn_once):
    monkeypatch.setattr(horizon, "CONFIG", TINY)
    return horizon.begin(0, 6, 40)


def test_its_masking_network_knows_the_objects(training):
    images = next(iter(training.splits.val.ordered(48))).images
    found = horizon.ObjectWeights(4)
    with torch.no_grad():
        found.logits.copy_(torch.tensor([50.0, -50.0]))
    share = reduce(training.splits.val.objects[:48].float(), "b (h p) (w q) -> b (h w)", "mean", p=4, q=4)
    clear = (share == 0) | (share > 0.2)  # at the edges it may differ
    assert 0.2 < share.mean() < 0.5
    assert ((found(images) > 0.5) == (share > 0))[clear].double().mean() > 0.98


def test_the_derivative_is_that_of_the_steps_it_names(training):
    ahead, look = 2, 3
    theta, steps = horizon.go_on(training, "all alike", ahead, order=1 + look)
    labelled = horizon.labelled(training, 100 + look)
    of_a, of_b = mlo_mae.unrolled(training.net, theta, torch.zeros(2), training.head, labelled, steps).hypergradient
    objects = np.mean([call(training.net.masking, torch.tensor([50.0, -50.0]), step.images).mean() for step in steps])
    expected = (of_a / objects - of_b / (1 - objects)) / ahead
    assert horizon.derivative(training, ahead, look) == pytest.approx(float(expected), rel=1e-3)
    assert horizon.derivative(training, ahead, look + 1) != pytest.approx(float(expected), rel=1e-3)


def test_ways_part_only_by_their_weights(training):
    ways = "all alike", "all alike", "objects"
    (alike, made), (again, _), (objects, others) = (horizon.go_on(training, way, 3) for way in ways)
    assert torch.equal(alike.params, again.params) and not torch.equal(alike.params, objects.params)
    assert all(torch.equal(a.images, b.images) and torch.equal(a.mask, b.mask) for a, b in zip(made, others))
    stream = training.splits.train.stream(TINY.batch_size, TINY.seed)
    whole = [next(stream).images for _ in range(9)]  # the way goes on where the six steps before it ended
    assert all(torch.equal(step.images, images) for step, images in zip(made, whole[6:]))
    assert len(made) == 3 and made[0].rates.lr == pytest.approx(TINY.lr * schedule(6, 40, TINY.warmup * 40))


def test_the_table(training, monkeypatch, capsys):
    monkeypatch.setattr(horizon, "LOOKS", {1: 2, 3: 1})
    assert mlo_mae.main(["horizon", "--seeds", "2", "--after", "4", "--of", "20"]) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    assert printed[0] == "`python mlo_mae.py horizon --seeds 2 --after 4 --of 20`"
    rows = json.loads(last)["rows"]
    assert [row["steps_ahead"] for row in rows] == [1, 3] and [len(row["derivatives"]) for row in rows] == [4, 2]
    assert np.array(rows[0]["loss3"]).shape == (2, 3) and np.isfinite(rows[0]["loss3"]).all()
    line = next(line for line in printed if line.startswith("| 3 |"))
    assert f"{np.mean([losses[0] - losses[1] for losses in rows[1]['loss3']]):+.3f}" in line and "(2 looks)" in line


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--after", "9", "--of", "9"], ["--steps", "3"]])
def test_what_cannot_run_ends_in_one_line(arguments, capsys):
    assert horizon.main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and arguments[0] in errors[0]
