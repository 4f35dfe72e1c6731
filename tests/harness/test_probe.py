"""Linear probes against torch's own modules, and statistics of masks that are known."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from data import index_batches
from harness import probe as probe_module
from harness.probe import PROBES, area_under_roc, lbfgs_probes, linear_probe, mask_statistics, sgd_probes
from harness.schedule import schedule

# ------------------------------------------------------------------------------------------------------- probes


def clouds(count, seed, spread=1.0):
    """Features [N, 5] around one centre for each of three classes, and labels [N]."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = 3 * torch.eye(3, 5)
    return centres[labels] + spread * torch.randn(count, 5, generator=random), labels


def test_the_sgd_probe_is_batch_norm_and_a_linear_layer():
    """All rates learn in one pass; each must end as torch's own modules and SGD end at that rate alone."""
    torch.manual_seed(0)
    train, labels, new = 3 + 2 * torch.randn(40, 5), torch.randint(3, (40,)), 3 + 2 * torch.randn(9, 5)
    probes = sgd_probes(train, labels, 3, epochs=4, warmup=1, batch_size=16)
    for rate in (3e-3, 0.1, 1.0):
        norm, linear = torch.nn.BatchNorm1d(5, affine=False, eps=1e-6), torch.nn.Linear(5, 3)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        solver = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9)
        for step, (_, indices) in zip(range(10), index_batches(40, 16, 0, 0)):
            solver.param_groups[0]["lr"] = rate * schedule(step, 10, 2.5)
            solver.zero_grad()
            F.cross_entropy(linear(norm(train[indices])), labels[indices]).backward()
            solver.step()
        expected = linear(norm.eval()(new))
        assert torch.allclose(probes[rate](new), expected, rtol=1e-4, atol=1e-6), rate


@pytest.mark.parametrize("block", [2**16, 40])
def test_the_lbfgs_probe_is_at_a_minimum_of_its_objective(block, monkeypatch):
    """Of standardised features: there the gradient of loss and weight decay is 0, and only there (it is convex). The same
    where not all rows are looked at at once."""
    monkeypatch.setattr(probe_module, "BLOCK", block)
    train, labels = clouds(90, seed=0, spread=2.0)
    standardised = (train - train.mean(0)) / train.std(0)
    for decay, probe in lbfgs_probes(train, labels, 3).items():
        logits = probe(train)
        inputs = torch.cat([torch.ones(90, 1), standardised], 1)
        weight = torch.linalg.lstsq(inputs, logits).solution.requires_grad_()  # logits are linear: these are their weights
        assert torch.allclose(inputs @ weight, logits, atol=1e-4)
        loss = F.cross_entropy(inputs @ weight, labels) + 0.5 * decay * weight[1:].square().sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient.abs().max() < 1e-3, decay


@pytest.mark.parametrize("recipe", PROBES)
def test_probes_are_fitted_where_the_features_are(recipe):
    """All that is made without a device would be without values here."""
    train = clouds(30, 0)
    with torch.device("meta"):
        probes = PROBES[recipe][1](*train, 3)
        assert all(probe(train[0]).device.type == "cpu" for probe in probes.values())


@pytest.mark.parametrize("recipe, chosen", [("lbfgs", "weight_decay"), ("mae", "learning_rate")])
def test_a_probe_tells_classes_apart_and_says_what_it_chose(recipe, chosen):
    train, val, test = clouds(90, 0), clouds(60, 1), clouds(60, 2)
    found = linear_probe(train, val, test, 3, recipe)
    assert found.keys() == {"test_accuracy", "val_accuracy", chosen}
    assert found["test_accuracy"] > 0.9 and found["val_accuracy"] > 0.9
    assert found == linear_probe(train, val, test, 3, recipe)


@pytest.mark.parametrize("recipe", PROBES)
def test_validation_chooses_and_the_test_split_does_not(recipe):
    train, val, test = clouds(30, 0, 3.0), clouds(90, 1, 3.0), clouds(90, 2, 3.0)
    differ_in, fit = PROBES[recipe]
    shares = {
        value: [(probe(x).argmax(1) == y).double().mean().item() for x, y in (val, test)]
        for value, probe in fit(*train, 3).items()
    }
    best = max(shares, key=lambda value: shares[value][0])
    found = linear_probe(train, val, test, 3, recipe)
    assert (found[differ_in], found["val_accuracy"], found["test_accuracy"]) == (best, *shares[best])
    assert found | {"test_accuracy": 0} == linear_probe(train, val, (test[0], test[1] + 3), 3, recipe)  # no such class


def test_of_probes_that_are_right_alike_the_loss_chooses(monkeypatch):
    sure = {"dull": partial(torch.mul, 0.1), "good": partial(torch.mul, 2.0), "far": partial(torch.mul, 0.5)}
    monkeypatch.setitem(PROBES, "three", ("scale", lambda *_: sure))
    right = torch.eye(3), torch.arange(3)
    assert linear_probe(right, right, right, 3, "three") == {"test_accuracy": 1, "val_accuracy": 1, "scale": "good"}
    mixed = torch.eye(3).roll(1, 0) * 0.9, torch.arange(3)  # all are wrong: the least sure loses least
    assert linear_probe(right, mixed, right, 3, "three")["scale"] == "dull"


# -------------------------------------------------------------------------------------------------------- masks


def test_mask_statistics_of_known_masks():
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1.0]])  # 4 patches, 3 hidden
    prob = torch.tensor([[0.5, 0.5, 0.5, 0.5], [1.0, 0, 1, 1]])
    objects = torch.zeros(2, 16, 16, dtype=torch.bool)
    objects[0, :8, :8] = True  # all visible
    objects[1, 8:, 8:12] = True  # all hidden
    previous = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 1.0]])
    found = mask_statistics(prob, mask, previous, objects, 8)
    assert found["p_mean"] == pytest.approx(5 / 8) and found["p_std"] == pytest.approx(prob.std().item())
    assert found["p_entropy"] == pytest.approx(0.5)
    assert found["mask_churn"] == pytest.approx(1 / 6)
    assert found["mask_overlap"] == pytest.approx(2 / 3)
    assert found["object_hidden"] == pytest.approx(32 / 96 / 0.75)
    inside, rest = (64 * 0.5 + 32 * 1.0) / 96, (192 * 0.5 + 128 * 1.0 + 32 * 1.0) / (192 + 224)
    assert found["object_weight"] == pytest.approx(inside / rest)
    assert found["object_auc"] == pytest.approx((0 + 3 / 2 + 1) / 7)  # p = 0.5, against 0.5 x 3, 1 x 3 and 0


def test_area_under_roc_is_the_share_of_pairs_in_order():
    random = torch.Generator().manual_seed(0)
    positive, negative = (torch.randint(0, 9, (n,), generator=random).double() for n in (40, 70))
    pairs = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative)
    assert area_under_roc(positive, negative) == pytest.approx(pairs.mean().item())
    assert area_under_roc(torch.ones(3), torch.zeros(2)) == 1 and area_under_roc(torch.zeros(3), torch.zeros(2)) == 0.5


def test_statistics_that_need_more_are_left_out():
    found = mask_statistics(torch.full((1, 4), 0.5), torch.tensor([[0, 1, 1, 1.0]]), None, None, 8)
    assert found.keys() == {"p_mean", "p_std", "p_entropy"} and found["p_entropy"] == 1
    assert all(type(value) is float for value in found.values())
    objects = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask, prob = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1.0]]), torch.rand(2, 4)
    none = mask_statistics(prob, mask, None, objects, 8)
    assert not {"object_hidden", "object_weight", "object_auc"} & none.keys()
    whole = mask_statistics(prob, mask, None, ~objects, 8)
    assert whole["object_hidden"] == pytest.approx(1) and not {"object_weight", "object_auc"} & whole.keys()
    objects[:, :3, :3] = True  # of which no patch is half full
    some = mask_statistics(prob, mask, None, objects, 8)
    assert {"object_hidden", "object_weight"} <= some.keys() and "object_auc" not in some
    objects[:, :8, :8] = True
    saturated = mask_statistics(objects[:, ::8, ::8].flatten(1).float(), mask, None, objects, 8)
    assert saturated["object_auc"] == 1 and 1 < saturated["object_weight"] < math.inf


def test_random_masks_overlap_by_the_mask_ratio_and_see_no_objects():
    torch.manual_seed(0)
    mask = torch.ones(400, 64).scatter(1, torch.rand(400, 64).argsort(1)[:, :16], 0.0)
    found = mask_statistics(torch.ones(400, 64), mask, mask.roll(1, 0), torch.rand(400, 32, 32) < 0.2, 4)
    assert found["mask_overlap"] == pytest.approx(0.75, abs=0.01) and found["mask_churn"] == pytest.approx(0.25, abs=0.01)
    assert found["object_hidden"] == pytest.approx(1, abs=0.02) and found["object_weight"] == pytest.approx(1)
    assert found["p_entropy"] == 0 and not any(math.isnan(value) for value in found.values())
