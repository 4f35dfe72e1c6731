"""finetune.py: recipes, the classifier, the loop, whole fine-tunings, resuming, public encoders, bad input."""

import contextlib
import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SCRIPT, TINY, as_flags, bare, copied, refused, timm, write_colours

import data
import mlo_mae
from experiments import finetune
from experiments.finetune import RECIPES, Recipe
from harness import UserError, augmentation
from harness.checkpoints import read_saved
from harness.memory import held_for_backward
from harness.randomness import DISTORT, numpy_generator
from harness.vectors import unflatten
from harness.weights import read_weights, write_safetensors
from mlo_mae import build, main

SIZES = {name: getattr(TINY, name) for name in ("patch_size", "width", "depth", "heads")} | {"device": "cpu"}
EVERYTHING = {
    **{"epochs": 3, "batch_size": 12, "warmup_epochs": 0.5, "drop_path": 0.3, "label_smoothing": 0.1, "mixup": 0.8},
    **{"cutmix": 1.0, "randaugment": 9.0, "erasing": 0.5, "lr": 2e-2},
}


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("data") / "colours.npz")


@pytest.fixture
def given(npz):
    """Networks, theta and Splits, as `finetune` takes them."""
    splits = data.load(npz, "data")
    net, (theta, _, _) = build(dataclasses.replace(TINY, checkpoint_minutes=0), 16, 3, 6)
    return net, theta, splits


@pytest.fixture(scope="session")
def run(npz, tmp_path_factory):
    """A pretrained run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    decoder = {name: getattr(TINY, name) for name in ("decoder_width", "decoder_depth", "decoder_heads", "masking_width")}
    sizes = SIZES | decoder | {"batch_size": 16, "labelled_batch_size": 8, "epochs": 1, "checkpoint_minutes": 0}
    sizes |= {"mask_start": 0}
    with bare():
        assert main(["pretrain", "--data", str(npz), "--out", str(out), *as_flags(sizes)]) == 0
    return out


# ------------------------------------------------------------------------------------------- recipes and schedule


def test_recipes_hold_the_published_values():
    base, large, cifar = (Recipe(**RECIPES[name]) for name in ("mae", "mae-large", "cifar"))
    for recipe in (Recipe(), base, large, cifar):
        finetune.check(recipe)
    assert base.lr == 5e-4 * base.batch_size / 256 and large.lr == 1e-3 * large.batch_size / 256
    assert (base.epochs, base.layer_decay, base.drop_path) == (100, 0.65, 0.1)
    assert (large.epochs, large.layer_decay, large.drop_path) == (50, 0.75, 0.2)
    assert (base.mixup, base.cutmix, base.erasing, base.label_smoothing, base.pooling) == (0.8, 1.0, 0.25, 0.1, "mean")
    assert (cifar.lr, cifar.weight_decay, cifar.layer_decay, cifar.pooling, cifar.mixup) == (1e-4, 5e-5, 1.0, "cls", 0)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end():
    recipe = Recipe(epochs=10, warmup_epochs=2.0, lr=0.5, min_lr=0.1)
    rates = [finetune.learning_rate(recipe, step, 20) for step in range(200)]
    assert rates[0] == pytest.approx(0.1 + 0.4 / 40) and rates[39] == rates[40] == 0.5
    assert rates[120] == pytest.approx(0.3) and rates[199] == pytest.approx(0.1, abs=1e-3)
    assert finetune.learning_rate(recipe, 200, 20) == pytest.approx(0.1, abs=1e-12)


def test_layers_learn_at_decaying_rates_and_only_weights_decay(given):
    net, theta, splits = given
    recipe = Recipe(layer_decay=0.5, weight_decay=0.3)
    model = finetune.start(net, theta, splits, recipe)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = finetune.layer_groups(model, recipe)
    found = {names[id(p)]: (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    for name, (scale, decay) in found.items():
        layer = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "fc_norm": 3, "head": 3}.get(name.split(".")[0])
        layer = 1 + int(name.split(".")[1]) if layer is None else layer
        assert scale == 0.5 ** (2 + 1 - layer), name
        weights = ("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight", "head.weight")
        assert decay == (0.3 if name.endswith(weights) else 0.0), name


def test_a_step_uses_each_groups_rate(given):
    """AdamW's first step moves an element by its rate, so the layers' movements show their rates."""
    net, theta, splits = given
    recipe = Recipe(epochs=1, batch_size=96, warmup_epochs=0.0, layer_decay=0.5, weight_decay=0.0, lr=1e-2)
    before = finetune.start(net, theta, splits, recipe).state_dict()
    models = []
    task = finetune.CLASSIFY._replace(evaluate=lambda model, split: models.append(model) or {"top1": 0.5, "loss": 1.0})
    finetune.finetune(net, theta, splits, recipe, task=task)
    scales = {"head.bias": 1, "blocks.1.mlp.fc2.bias": 0.5, "blocks.0.mlp.fc2.bias": 0.25, "pos_embed": 0.125}
    for name, scale in scales.items():
        moved = (models[0].state_dict()[name] - before[name]).abs()
        assert moved.max().item() == pytest.approx(1e-2 * scale, rel=1e-2), name


def test_every_step_has_the_rate_of_its_place_in_the_run(given, monkeypatch):
    net, theta, splits = given
    recipe = Recipe(epochs=2, batch_size=24, warmup_epochs=0.5, layer_decay=0.5, lr=1e-2)
    seen, real = [], torch.optim.AdamW.step

    def step(optimizer, *rest):
        seen.append([(group["lr"], group["scale"], group["betas"]) for group in optimizer.param_groups])
        return real(optimizer, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    finetune.finetune(net, theta, splits, recipe)
    assert len(seen) == 2 * 4
    for number, groups in enumerate(seen):
        for lr, scale, betas in groups:
            assert lr == pytest.approx(scale * finetune.learning_rate(recipe, number, 4)) and betas == (0.9, 0.999)


# ----------------------------------------------------------------------------------------------------- classifier


def test_the_start_is_the_pretrained_encoder_or_fresh_weights_of_the_seed(given):
    net, theta, splits = given
    images = splits.val.pick(torch.arange(4)).images
    other = theta + 0.1 * torch.randn(len(theta), generator=torch.Generator().manual_seed(1))
    pretrained = finetune.start(net, other, splits, Recipe(pooling="cls"))
    named = unflatten(net.encoder, other[: net.encoder_size])
    assert all(torch.equal(pretrained.state_dict()[name], tensor) for name, tensor in named.items())
    assert pretrained.state_dict().keys() - named.keys() == {"head.weight", "head.bias"}
    mean = finetune.start(net, other, splits, Recipe(pooling="mean")).state_dict()
    added, gone = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}, {"norm.weight", "norm.bias"}
    assert mean.keys() == (named.keys() | added) - gone
    assert torch.equal(mean["fc_norm.weight"], torch.ones(16))
    assert torch.equal(mean["blocks.1.norm2.weight"], named["blocks.1.norm2.weight"])

    scratch = finetune.start(net, other, splits, Recipe(pooling="cls", from_scratch=True, seed=3))
    _, (fresh, _, _) = build(dataclasses.replace(TINY, seed=3), 16, 3, 6)
    fresh = unflatten(net.encoder, fresh[: net.encoder_size])
    assert all(torch.equal(scratch.state_dict()[name], tensor) for name, tensor in fresh.items())
    assert not torch.equal(scratch(images), pretrained(images))


def test_the_head_reads_the_cls_token_or_the_mean_of_the_patches(given):
    net, theta, splits = given
    images = splits.val.pick(torch.arange(4)).images
    params = theta[: net.encoder_size] + 0.1 * torch.randn(net.encoder_size, generator=torch.Generator().manual_seed(1))
    cls = finetune.start(net, params, splits, Recipe(pooling="cls"))
    expected = F.linear(mlo_mae.encode(net, params, images), cls.head.weight, cls.head.bias)
    assert torch.allclose(cls(images), expected, atol=1e-6)

    mean = finetune.start(net, params, splits, Recipe(pooling="mean"))
    torch.nn.init.normal_(mean.fc_norm.weight)
    torch.nn.init.normal_(mean.head.weight)
    tokens = []
    mean.blocks[-1].register_forward_hook(lambda block, inputs, output: tokens.append(output))
    logits = mean(images)
    pooled = tokens[0][:, 1:].sum(1) / 16
    centred = pooled - pooled.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * mean.fc_norm.weight + mean.fc_norm.bias
    assert torch.allclose(logits, normed @ mean.head.weight.T + mean.head.bias, atol=1e-5)


def test_drop_path_keeps_expectations_and_rises_with_depth():
    factors = finetune.drop_path(0.4, 5, 4000, 0, 1)
    assert factors.shape == (5, 2, 4000, 1, 1)
    for block in range(5):
        rate = 0.1 * block
        values = factors[block].unique().tolist()
        assert values == pytest.approx([1.0] if block == 0 else [0.0, 1 / (1 - rate)])
        share = (factors[block] == 0).double().mean().item()
        assert abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / 8000) + 1e-12
        assert factors[block].mean().item() == pytest.approx(1, abs=0.06)
    assert not torch.equal(factors[4, 0], factors[4, 1])  # the two branches fall out independently
    assert torch.equal(finetune.drop_path(0.0, 3, 2, 0, 1), torch.ones(3, 2, 2, 1, 1))


def test_factors_scale_the_branches_and_ones_change_nothing(given):
    net, theta, splits = given
    encoder = finetune.start(net, theta, splits, Recipe(pooling="cls"))
    images = splits.val.pick(torch.arange(3)).images
    assert torch.equal(encoder(images, torch.ones(2, 2, 3, 1, 1)), encoder(images))

    block, x = encoder.blocks[0], torch.randn(3, 5, 16)
    scale = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.5]])[:, :, None, None]
    middle = x + scale[0] * block.attn(block.norm1(x))
    assert torch.allclose(block(x, scale), middle + scale[1] * block.mlp(block.norm2(middle)), atol=1e-6)
    assert torch.equal(block(x, torch.zeros(2, 3, 1, 1)), x)

    passed = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda block, inputs, output: passed.append(inputs[1]))
    factors = torch.rand(2, 2, 3, 1, 1)
    encoder(images, factors)
    assert torch.equal(torch.stack(passed), factors)


# --------------------------------------------------------------------------------------------------- augmentation


def test_augmentation_is_a_function_of_seed_and_step(given):
    split = given[2].train
    batch, recipe = split.pick(torch.arange(24)), Recipe(**EVERYTHING)
    images, targets = finetune.augment(batch, recipe, split, 6, 5)
    again, again_targets = finetune.augment(batch, recipe, split, 6, 5)
    assert torch.equal(images, again) and torch.equal(targets, again_targets)
    assert torch.allclose(targets.sum(1), torch.ones(24))
    assert not torch.equal(images, finetune.augment(batch, recipe, split, 6, 6)[0])
    other = dataclasses.replace(recipe, seed=1)
    assert not torch.equal(images, finetune.augment(batch, other, split, 6, 5)[0])
    plain = finetune.augment(batch, Recipe(), split, 6, 5)
    assert torch.equal(plain[0], batch.images) and torch.equal(plain[1], F.one_hot(batch.labels, 6).float())


@pytest.mark.parametrize("setting", [{"label_smoothing": 0.1}, {"randaugment": 9.0}, {"erasing": 1.0}], ids=str)
def test_each_part_of_the_augmentation_is_the_function_of_that_name(given, setting):
    split = given[2].train
    batch, recipe = split.pick(torch.arange(24)), Recipe(**setting)
    rng, images, smoothing = numpy_generator(recipe.seed, DISTORT, 5), batch.images, setting.get("label_smoothing", 0.0)
    if "randaugment" in setting:
        images = augmentation.rand_augment(images, 9.0, split.mean, split.std, rng)
    if "erasing" in setting:
        images = augmentation.erase(images, 1.0, rng)
    found, targets = finetune.augment(batch, recipe, split, 6, 5)
    assert torch.equal(found, images) and torch.equal(targets, augmentation.soft_targets(batch.labels, 6, smoothing))
    assert torch.equal(found, batch.images) == (smoothing > 0)


def test_drop_path_and_augmentation_reach_the_loss(given):
    net, theta, splits = given
    batch, recipe = splits.train.pick(torch.arange(24)), Recipe()
    model = finetune.start(net, theta, splits, recipe)
    torch.nn.init.normal_(model.head.weight)
    kept, left_out = torch.ones(2, 2, 24, 1, 1), torch.zeros(2, 2, 24, 1, 1)

    def loss(scales, recipe):
        return finetune.classification_loss(model, batch, scales, recipe, splits, 0).item()

    assert loss(kept, recipe) == pytest.approx(loss(None, recipe), abs=1e-6)
    assert abs(loss(left_out, recipe) - loss(kept, recipe)) > 1e-3
    assert abs(loss(kept, Recipe(label_smoothing=0.5)) - loss(kept, recipe)) > 1e-3


def test_mixup_and_cutmix_take_turns(given, monkeypatch):
    split = given[2].train
    batch, calls = split.pick(torch.arange(4)), []
    for name in ("mixup", "cutmix"):
        monkeypatch.setattr(finetune, name, lambda *arguments, name=name: calls.append((name, arguments[2])) or arguments[:2])
    for step in range(400):
        finetune.augment(batch, Recipe(mixup=0.8, cutmix=1.0), split, 6, step)
    shares = {name: [share for called, share in calls if called == name] for name in ("mixup", "cutmix")}
    assert len(calls) == 400 and 150 < len(shares["mixup"]) < 250
    for name, alpha in (("mixup", 0.8), ("cutmix", 1.0)):  # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1))
        assert np.mean(shares[name]) == pytest.approx(0.5, abs=0.1)
        assert np.var(shares[name]) == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.025)


# ---------------------------------------------------------------------------------------------- whole fine-tunings


def test_top1_and_top5_count_the_right_answers():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0, -1], [5, 4, 3, 2, 1, 0, -1], [5, 4, 3, 2, 1, 0, -1], [0, 0, 0, 0, 0, 1, 0]])

    class Split:
        def ordered(self, batch_size):
            yield data.Batch(logits[:3], torch.tensor([0, 4, 6]))
            yield data.Batch(logits[3:], torch.tensor([5]))

    loss = F.cross_entropy(logits, torch.tensor([0, 4, 6, 5])).item()
    assert finetune.evaluate(lambda images: images, Split()) == {"top1": 0.5, "top5": 0.75, "loss": pytest.approx(loss)}
    five = Split()
    five.ordered = lambda batch_size: [data.Batch(logits[:1], torch.tensor([0]))]
    assert finetune.evaluate(lambda images: F.pad(images, (0, -2)), five).keys() == {"top1", "loss"}  # 5 classes


def test_in_memory_it_learns_and_touches_no_file(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net, theta, splits = given
    recipe = Recipe(epochs=12, batch_size=12, lr=1e-2, layer_decay=1.0)
    losses = []

    def watched(*arguments):
        losses.append(finetune.classification_loss(*arguments))
        return losses[-1]

    result = finetune.finetune(net, theta, splits, recipe, task=finetune.CLASSIFY._replace(loss=watched))
    losses = [loss.item() for loss in losses]
    assert len(losses) == 12 * (96 // 12) and losses[0] == pytest.approx(math.log(6), rel=0.02)
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8])
    assert (result["train_labels"], result["val_labels"], result["epochs"]) == (96, 24, 12)
    assert 0 <= result["test_top1"] <= result["test_top5"] <= 1 and 1 <= result["epoch"] <= 12
    assert not list(tmp_path.iterdir())


def test_a_batch_in_parts_gives_the_same_result(given, monkeypatch):
    """Drop path is drawn for the whole batch, whatever the parts."""
    net, theta, splits = given
    seen, asked, losses, forward = {}, [], {}, finetune.Encoder.forward

    def watched(model, batch, *rest):
        loss = finetune.classification_loss(model, batch, *rest)
        losses.setdefault(model.accumulate, []).append(loss)
        return loss

    def encoded(model, images, **how):
        if torch.is_grad_enabled():
            seen.setdefault(model.accumulate, set()).add(len(images))
        return forward(model, images, **how)

    monkeypatch.setattr(finetune.Encoder, "forward", encoded)
    monkeypatch.setattr(finetune, "foresee", lambda function, images, *rest: asked.append(images))
    for parts in (1, 3):
        recipe = Recipe(epochs=2, batch_size=12, lr=1e-2, drop_path=0.5, mixup=0.8, accumulate=parts)
        finetune.finetune(net, theta, splits, recipe, task=finetune.CLASSIFY._replace(loss=watched))
    assert asked == [12, 4] and seen == {1: {12}, 3: {4}}
    plain, in_parts = (torch.stack(losses[parts]).detach() for parts in (1, 3))
    assert len(plain) == 16 and plain.std() > 0.05 and torch.allclose(plain, in_parts, rtol=1e-4)


def test_a_batch_in_parts_takes_less_memory(given):
    net, theta, splits = given
    images, held = torch.randn(24, 3, *[splits.image_size] * 2), {}
    for parts in (1, 4):
        model = finetune.start(net, theta, splits, Recipe(accumulate=parts))
        held[parts] = held_for_backward(lambda model=model: model(images))
    assert held[4] < held[1] / 4


def test_the_test_split_is_read_once_and_has_no_say(given):
    """With poisoned test labels the same epoch is chosen, with the same validation accuracy."""
    net, theta, splits = given
    recipe, reads = Recipe(epochs=4, batch_size=24, lr=5e-3), []
    honest = finetune.finetune(net, theta, splits, recipe)

    class Watched(data.Images):
        def ordered(self, batch_size):
            reads.append("test")
            return super().ordered(batch_size)

        def stream(self, *arguments, **options):
            raise AssertionError("trained on the test split")

    test = splits.test
    poisoned = Watched(test.images, (test.labels + 1) % 6, splits.mean, splits.std)
    result = finetune.finetune(net, theta, dataclasses.replace(splits, test=poisoned), recipe)
    assert reads == ["test"]
    for name in ("epoch", "val_top1"):
        assert result[name] == honest[name]
    assert result["test_top1"] != honest["test_top1"]


def test_the_weights_of_the_best_validation_epoch_are_tested(given):
    net, theta, splits = given
    shares, losses = [0.2, 0.7, 0.7, 0.7, 0.4], [9.0, 3.0, 2.0, 2.0, 1.0]  # of equal shares the lowest loss decides
    scores, seen, tested = iter(zip(shares, losses)), [], []

    class NotTrained(data.Images):
        def stream(self, *arguments, **options):
            raise AssertionError("trained on the validation split")

    class NotRead(data.Images):
        def ordered(self, *arguments):
            raise AssertionError("evaluated on the training split")

    train, val = (
        kind(split.images, split.labels, splits.mean, splits.std)
        for kind, split in ((NotRead, splits.train), (NotTrained, splits.val))
    )
    splits = dataclasses.replace(splits, train=train, val=val)

    def scored(model, split):
        assert split is splits.test or split is splits.val
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        (tested if split is splits.test else seen).append(weights)
        return dict(zip(("top1", "loss"), (0.1, 5.0) if split is splits.test else next(scores)))

    task = finetune.CLASSIFY._replace(evaluate=scored)
    result = finetune.finetune(net, theta, splits, Recipe(epochs=5, batch_size=48), task=task)
    assert (result["epoch"], result["val_top1"], result["test_top1"], len(seen), len(tested)) == (3, 0.7, 0.1, 5, 1)
    assert result["tied_epochs"] == 3
    assert all(torch.equal(tensor, seen[2][name]) for name, tensor in tested[0].items())
    assert not torch.equal(tested[0]["head.weight"], seen[1]["head.weight"])


def command(run, out, *more, **recipe):
    return ["finetune", str(run), "--device", "cpu", "--out", str(out), *as_flags(EVERYTHING | recipe), *more]


def outcome(out):
    """All that a fine-tuning leaves, but for its duration."""
    content = read_saved(out / "checkpoint.pt", finetune.FORMAT)
    result = json.loads((out / "result.json").read_text())
    assert result.pop("seconds") >= 0 and content.pop("seconds") >= 0
    return content, result, (out / "metrics.jsonl").read_text(), (out / "config.json").read_text()


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="session")
def tuned(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "out"
    assert main(command(run, out)) == 0
    return out


class Crash(Exception):
    pass


@pytest.mark.parametrize("how, step", [("crash", 11), ("stop", 5), ("stop", 15), ("crash", 3), ("evaluation", 7)])
def test_interrupted_and_resumed_ends_bit_for_bit_the_same(run, tuned, tmp_path, monkeypatch, how, step):
    """8 steps an epoch: within an epoch, in an epoch's last step, and in the evaluation after it, which ends at once."""
    real, out = finetune.augment, tmp_path / "cut"

    def interrupted(*arguments):
        if arguments[-1] == step:
            if how == "crash":
                raise Crash
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    def ended(*arguments):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the evaluation goes on")

    with monkeypatch.context() as patch, pytest.raises(Crash) if how == "crash" else contextlib.nullcontext():
        if how == "evaluation":
            patch.setattr(data.Images, "ordered", ended)
        else:
            patch.setattr(finetune, "augment", interrupted)
        assert main(command(run, out)) == 128 + signal.SIGTERM
    assert not (out / "result.json").exists()
    if how != "crash":
        assert read_saved(out / "checkpoint.pt", finetune.FORMAT)["step"] == step + 1
    assert main(command(run, out, "--resume")) == 0
    assert all(map(equal, outcome(out), outcome(tuned)))


def test_resuming_what_is_finished_repeats_its_result(run, tuned, capsys):
    before = outcome(tuned)
    assert main(command(run, tuned, "--resume")) == 0
    assert all(map(equal, outcome(tuned), before))
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed.pop("seconds") >= 0
    assert printed == {"command": "finetune", "run": str(tuned), **before[1]}


def test_files_of_a_fine_tuning(run, tuned):
    saved = {"checkpoint.pt", "checkpoint.previous.pt"}
    assert {path.name for path in tuned.iterdir()} == {"config.json", "metrics.jsonl", "result.json", "lock"} | saved
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["iteration"]) for row in rows] == [(1, 8), (2, 16), (3, 24)]
    result = json.loads((tuned / "result.json").read_text())
    assert result["val_top1"] == max(row["val_top1"] for row in rows)
    assert {"test_top1", "test_top5", "val_top1", "epoch", "seconds", "recipe", "train_labels", "val_labels"} <= result.keys()
    assert json.loads((tuned / "config.json").read_text())["recipe"]["mixup"] == 0.8
    chosen = read_saved(tuned / "checkpoint.pt", finetune.FORMAT)["best"]
    assert chosen["epoch"] == result["epoch"] and "fc_norm.weight" in chosen["model"]


def test_from_scratch_starts_elsewhere(run, tuned, tmp_path):
    assert main(command(run, tmp_path / "scratch", "--from-scratch")) == 0
    (_, scratch, scratch_metrics, _), (_, pretrained, metrics, _) = outcome(tmp_path / "scratch"), outcome(tuned)
    assert scratch["from_scratch"] and not pretrained["from_scratch"]
    assert scratch_metrics != metrics


def test_how_images_are_moved_is_a_fine_tunings_own_affair(run, tmp_path, monkeypatch, capsys):
    """Of a run's settings it alone may be other; it is recorded, and a fine-tuning goes on with it alone."""
    moved = []
    augmented = data.Images.augmented
    monkeypatch.setattr(
        data.Images, "augmented", lambda split, *rest: moved.append((split.flip, split.crop)) or augmented(split, *rest)
    )
    short = {"epochs": 2, "warmup_epochs": 0}
    assert main(command(run, tmp_path / "out", "--no-flip", **short)) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["config"]
    assert set(moved) == {(False, True)} and (config["flip"], config["crop"]) == (False, True)
    assert main(command(run, tmp_path / "out", "--no-flip", "--resume", **short)) == 0
    refused(command(run, tmp_path / "out", "--resume", **short), capsys, "started with --no-flip, not --flip")
    other = command(run, tmp_path / "out", "--no-flip", "--no-crop", "--resume", **short)
    refused(other, capsys, "started with --crop, not --no-crop")


def test_bf16_trains_with_float32_weights(given):
    net, theta, splits = given
    result = finetune.finetune(net, theta, splits, Recipe(epochs=2, batch_size=24, precision="bf16"))
    assert 0 <= result["val_top1"] <= 1
    model = finetune.start(net, theta, splits, Recipe(precision="bf16"))
    images = splits.val.pick(torch.arange(3)).images
    apart = model.tokens(images, None) - finetune.start(net, theta, splits, Recipe()).tokens(images, None)
    assert 1e-4 < apart.abs().max() < 0.1
    logits = model(images)
    assert logits.dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())


def test_the_default_folder_is_in_the_run_or_named_by_weights_or_data(tmp_path):
    shapes, own = mlo_mae.Config(), mlo_mae.Config(data=str(tmp_path / "mine.npz"))
    assert finetune.default_folder(tmp_path, "finetune-short-0", own) == tmp_path / "finetune-short-0"
    assert finetune.default_folder(Path("vit.pth"), "finetune-mae-0", own) == Path("runs/vit-finetune-mae-0")
    assert finetune.default_folder(None, "scratch-short-0", shapes) == Path("runs/shapes-scratch-short-0")
    assert finetune.default_folder(None, "scratch-short-0", own) == Path("runs/mine-scratch-short-0")
    cifar = mlo_mae.Config(**mlo_mae.PRESETS["cifar100"] | {"preset": "cifar100"})
    assert finetune.default_folder(None, "scratch-cifar-1", cifar) == Path("runs/cifar100-scratch-cifar-1")


@pytest.mark.slow
def test_the_command_line_end_to_end(tmp_path):
    """Without a run, on the built-in images, in a process of its own: one UserError class, the default folder."""
    sizes = SIZES | {"images": 160, "image_size": 16, "patch_size": 8, "depth": 1, "epochs": 1, "warmup_epochs": 0}
    argv = [sys.executable, SCRIPT, "finetune", "--from-scratch", *as_flags(sizes)]
    finished = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["run"] == str(Path("runs") / "shapes-scratch-short-0") and result["train_labels"] == 128
    assert (tmp_path / result["run"] / "result.json").exists()
    again = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    found, line = again.stderr.splitlines()
    assert again.returncode == 2 and found.startswith("data shapes: ") and line.startswith("mlo_mae: ") and "--resume" in line


@pytest.mark.slow
def test_the_program_is_a_module_too(npz, tmp_path):
    flags = as_flags(SIZES | {"data": npz, "epochs": 1, "warmup_epochs": 0, "out": tmp_path / "out"})
    argv = [sys.executable, "-m", "experiments.finetune", "--from-scratch", *flags]
    finished = subprocess.run(argv, capture_output=True, text=True, cwd=SCRIPT.parent)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout.splitlines()[-1]) == {
        "command": "finetune",
        "run": str(tmp_path / "out"),
        **json.loads((tmp_path / "out" / "result.json").read_text()),
    }


# ------------------------------------------------------------------------------- public checkpoints, and export


@pytest.fixture
def public(given, tmp_path):
    """{name: tensor} of an encoder, and the .pth and .safetensors that hold it."""
    net, theta, _ = given
    params = theta[: net.encoder_size] + 0.1 * torch.randn(net.encoder_size, generator=torch.Generator().manual_seed(2))
    named = unflatten(net.encoder, params)
    torch.save({"model": {name: tensor.clone() for name, tensor in named.items()}}, tmp_path / "public.pth")
    with open(tmp_path / "public.safetensors", "wb") as file:
        write_safetensors(named, file, {})
    return named, tmp_path / "public.pth", tmp_path / "public.safetensors"


@pytest.mark.parametrize("kind", [1, 2], ids=["pth", "safetensors"])
def test_a_public_encoder_is_fine_tuned(public, npz, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    named, file = public[0], public[kind]
    still = SIZES | {"data": npz, "epochs": 1, "warmup_epochs": 0, "batch_size": 48, "lr": 0}
    assert main(["finetune", str(file), *as_flags(still), "--pooling", "cls"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["run"] == str(Path("runs") / "public-finetune-short-0") and not result["from_scratch"]
    content = read_saved(Path(result["run"]) / "checkpoint.pt", finetune.FORMAT)
    assert content["config"]["init"] == str(file)
    assert content["model"].keys() - named.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(content["model"][name], tensor) for name, tensor in named.items())  # at a learning rate of 0
    assert f"{file}: {len(named)} of {len(named)} encoder weights used; heads unknown" in printed.err


def test_public_encoders_that_do_not_fit(public, npz, tmp_path, capsys):
    _, file, other = public
    begin = ["finetune", file, *as_flags(SIZES | {"data": npz}), "--out", tmp_path / "bad"]
    refused([*begin, "--depth", 3], capsys, "these weights fit --depth 2")
    refused([*begin, "--from-scratch"], capsys, "--from-scratch")
    refused(["finetune", tmp_path / "absent.pth", *begin[2:]], capsys, "absent.pth does not exist")
    refused(["finetune", npz, *begin[2:]], capsys, npz)
    assert not (tmp_path / "bad").exists()
    short = ["--epochs", 1, "--warmup-epochs", 0]
    assert main([str(word) for word in begin + short]) == 0
    assert main([str(word) for word in ("finetune", other, *begin[2:], *short, "--resume")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # after the line that says what was used
    assert f"started with --init {file}, not {other}" in last


@pytest.fixture(params=["mean", "cls"])
def exported(request, run, tuned, tmp_path, capsys):
    """A fine-tuning's folder and pooling, what its export reports, and the exported weights."""
    if request.param == "cls":
        tuned = tmp_path / "cls"
        assert main(command(run, tuned, "--pooling", "cls", epochs=1)) == 0
    assert main(["export", str(tuned), "--to", "timm", "--file", str(tmp_path / "vit")]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    return tuned, request.param, report, read_weights(tmp_path / "vit").weights


def test_export_holds_the_fine_tuned_head(exported):
    tuned, pooling, report, weights = exported
    assert equal(weights, read_saved(tuned / "checkpoint.pt", finetune.FORMAT)["best"]["model"])
    assert weights["head.weight"].shape == (6, 16) and weights["head.weight"].any()
    sizes = "img_size=16, patch_size=4, in_chans=3, embed_dim=16, depth=2, num_heads=2, num_classes=6"
    pooled = ", global_pool='avg'" if pooling == "mean" else ""
    assert report["call"] == f"timm.models.VisionTransformer({sizes}{pooled})"
    assert report["head"] == "the fine-tuned classifier"


def test_timm_classifies_as_the_fine_tuning_does(run, exported):
    _, pooling, report, weights = exported
    vit = eval(report["call"], {"timm": timm()})
    vit.load_state_dict(weights)  # strict
    net, theta, splits = finetune.encoder_and_data(run, Recipe(), {"device": "cpu"})
    model = finetune.start(net, theta, splits, Recipe(pooling=pooling))
    model.load_state_dict(weights)
    images = splits.test.pick(torch.arange(4)).images
    assert torch.allclose(model(images), vit.eval()(images), atol=1e-5)


@pytest.mark.parametrize("pooling, theirs", [("cls", "token"), ("mean", "avg")])
def test_a_fine_tuned_model_is_timms(given, pooling, theirs):
    vision_transformer = timm().models.vision_transformer
    net, theta, splits = given
    model = finetune.start(net, theta, splits, Recipe(pooling=pooling))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 6}
    other = vision_transformer.VisionTransformer(**sizes, global_pool=theirs, fc_norm=pooling == "mean")
    other.load_state_dict(model.state_dict())  # strict: every name and shape
    images = splits.val.pick(torch.arange(4)).images
    assert torch.allclose(model(images), other.eval()(images), atol=1e-5)


# ------------------------------------------------------------------------------------------------------ bad input


def test_bad_input_ends_in_one_line(run, npz, tmp_path, capsys):
    missing, bad = tmp_path / "nothing", ["--out", tmp_path / "bad", "--device", "cpu"]
    refused(["finetune", missing, *bad], capsys, missing)
    refused(["finetune", *bad], capsys, "--from-scratch")
    refused(["finetune", run, "--recipe", "mea", *bad], capsys, "--recipe", "mae-large")
    refused(["finetune", run, "--image-size", 32, *bad], capsys, "--image-size", run)
    refused(["finetune", "--from-scratch", "--data", npz, "--patch-size", 5, *bad], capsys, "16 pixels", "patches of 5")
    refused(["finetune", "--from-scratch", "--data", "no/such.npz", *bad], capsys, "no/such.npz")
    refused(["finetune", run, "--epochs", 5, "--warmup-epochs", 5, *bad], capsys, "--warmup-epochs")
    for name, value in (
        *(("lr", "nan"), ("lr", "inf"), ("epochs", 0), ("drop-path", 1), ("layer-decay", 2), ("erasing", -1)),
        *(("randaugment", 11), ("label-smoothing", 1.5), ("seed", -1), ("pooling", "max"), ("batch-size", 0)),
        *(
            ("epochs", 10**400),
            ("warmup-epochs", "nan"),
            ("min-lr", -1),
            ("weight-decay", -1),
            ("mixup", -1),
            ("cutmix", "inf"),
        ),
    ):
        value = str(value)[:30]
        refused(["finetune", run, f"--{name}", value, *bad], capsys, f"--{name}", value)
    assert not (tmp_path / "bad").exists()


def test_a_fine_tuning_is_never_overwritten_nor_resumed_as_another(run, tuned, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in tuned.iterdir()}
    refused(command(run, tuned), capsys, tuned, "--resume", "--out")
    refused(command(run, tuned, "--resume", lr=0.5), capsys, "started with --lr 0.02, not 0.5")
    refused(command(run, tuned, "--resume", "--from-scratch"), capsys, "started with --no-from-scratch, not --from-scratch")
    assert before == {path.name: path.read_bytes() for path in tuned.iterdir()}
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:-100])
    refused(command(run, cut, "--resume"), capsys, cut / "checkpoint.pt")
    (cut / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    refused(command(run, cut, "--resume"), capsys, cut / "checkpoint.pt", "fine-tuning")
    assert {path.name for path in cut.iterdir()} == {"checkpoint.pt"}


def test_a_loss_that_is_not_finite_stops_and_leaves_no_bad_checkpoint(run, tmp_path, capsys):
    refused(command(run, tmp_path / "nan", lr=1e30), capsys, "not finite by step 2", "--lr")
    path = tmp_path / "nan" / "checkpoint.pt"
    if path.exists():
        weights = read_saved(path, finetune.FORMAT)["model"]
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_weights_that_are_finite_and_too_large_for_a_pass_are_no_result(given):
    """After the last step no loss of training tells."""
    net, theta, splits = given
    with pytest.raises(UserError, match="not finite by step 1; lower --lr"):
        finetune.finetune(net, theta, splits, Recipe(epochs=1, batch_size=96, lr=1e12, warmup_epochs=0.0))


# ----------------------------------------------------------------------------------------------- damaged checkpoints

FIELDS = ["recipe", "config", "data", "step", "seconds", "best", "loss_sum", "model", "optimizer"]
EXPORTED = ["recipe", "config", "data", "best"]  # of them, what an export reads


def forged(tuned, folder, change):
    """A folder that holds a fine-tuning's checkpoint alone, after change(its content)."""
    content = torch.load(tuned / "checkpoint.pt", weights_only=True)
    change(content)
    folder.mkdir()
    torch.save(content, folder / "checkpoint.pt")
    return folder


@pytest.mark.parametrize("value", ["absent", 7, {}], ids=str)
@pytest.mark.parametrize("field", FIELDS)
def test_a_forged_checkpoint_ends_in_one_line(run, tuned, tmp_path, capsys, field, value):
    if field == "step" and value == 7 or field == "seconds" and value == 7:
        value = "seven"  # a number is what stands there

    def change(content):
        assert sorted(content) == sorted([*FIELDS, "format"])
        content |= {field: value}
        if value == "absent":
            del content[field]

    out = forged(tuned, tmp_path / "forged", change)
    before = (out / "checkpoint.pt").read_bytes()
    refused(command(run, out, "--resume"), capsys, str(out))
    if field in EXPORTED:
        refused(["export", out, "--to", "timm"], capsys, str(out))
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt"}
    assert (out / "checkpoint.pt").read_bytes() == before


def setter(*path_and_value):
    """A change of one place within nested dicts and lists."""

    def change(content):
        *path, name, value = path_and_value
        for part in path:
            content = content[part]
        content[name] = value

    return change


NOT_FINITE = torch.full((6, 16), math.nan)
FORGED = {  # a change, and words of what is said
    "no scale of a group": (lambda content: content["optimizer"]["param_groups"][0].pop("scale"), "its optimizer has other"),
    "betas": (setter("optimizer", "param_groups", 0, "betas", "high"), "its optimizer has other settings"),
    "a group less": (lambda content: content["optimizer"]["param_groups"].pop(), "is damaged"),
    "no moments": (lambda content: content["optimizer"]["state"].clear(), "is damaged"),
    "no first moment": (lambda content: content["optimizer"]["state"][0].pop("exp_avg"), "is damaged"),
    "a first moment of another shape": (setter("optimizer", "state", 0, "exp_avg", torch.zeros(7)), "is damaged"),
    "both of another shape": (
        setter("optimizer", "state", 0, {"exp_avg": torch.zeros(7), "exp_avg_sq": torch.zeros(7), "step": torch.ones(())}),
        "moments are not",
    ),
    "moments that are not finite": (
        lambda content: content["optimizer"]["state"][0]["exp_avg_sq"].fill_(math.inf),
        "moments are not those of the weights",
    ),
    "a count of another shape": (setter("optimizer", "state", 0, "step", torch.zeros(7)), "moments are not"),
    "a weight of another shape": (
        setter("model", "head.weight", torch.zeros(6, 17)),
        "head.weight is (6, 17), expected (6, 16)",
    ),
    "a weight that is not finite": (setter("model", "head.weight", NOT_FINITE), "a weight is not finite"),
    "no such weight": (setter("model", "tail.weight", torch.zeros(6)), "tail.weight is (6,), expected nothing"),
    "best weights of another kind": (
        setter("best", "model", "head.weight", torch.zeros(6, 16).half()),
        "not ordinary tensors",
    ),
    "a best epoch": (setter("best", "epoch", -1), "-1 stands where a count should"),
    "a best measure": (lambda content: content["best"].pop("val_top1"), "is damaged"),
    "a best loss": (lambda content: content["best"].pop("loss"), "is damaged"),
    "tied epochs": (setter("best", "tied", -1), "-1 stands where a count should"),
    "no best weights": (lambda content: content["best"].pop("model"), "step 24 of 24"),
    "a step too early": (setter("step", 3), "step 3 of 24"),
    "a step too late": (setter("step", 10**9), "step 1000000000 of 24"),
    "losses of another shape": (setter("loss_sum", torch.zeros(2)), "is damaged"),
    "other data": (setter("data", "image_size", 32), "other data: image size: 32 there, 16 here"),
}


@pytest.mark.parametrize("forge", FORGED)
def test_a_value_that_does_not_fit_ends_in_one_line(run, tuned, tmp_path, capsys, forge):
    change, words = FORGED[forge]
    out = forged(tuned, tmp_path / "forged", change)
    refused(command(run, out, "--resume"), capsys, out, words)
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt"}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, tuned, tmp_path, capsys):
    out = copied(tuned, tmp_path / "copy")
    whole = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(whole[:-100])
    assert main(command(run, out, "--resume")) == 0
    assert f"going on from {out / 'checkpoint.previous.pt'}, step 23" in capsys.readouterr().err
    assert all(map(equal, outcome(out), outcome(tuned)))


@pytest.mark.slow
def test_a_second_fine_tuning_of_a_folder_is_refused(run, tmp_path, capsys):
    out = tmp_path / "taken"
    program = (
        "import pathlib, sys; from harness.run import Run\n"
        f"with Run(pathlib.Path({str(out)!r}), {{'config': {{}}}}, True, '', set()).at_work(1, 0, ''):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", program], cwd=SCRIPT.parent, **pipes)
    assert holder.stdout.readline() == "held\n"
    refused(command(run, out, "--resume"), capsys, "another process is at work")
    holder.communicate("")
    assert main(command(run, out, "--resume")) == 0


def test_a_warmup_that_is_not_given_follows_the_epochs():
    for given, warmup in (({"epochs": 1}, 0.1), ({"epochs": 3}, 1.0), ({"epochs": 1, "warmup_epochs": 0.5}, 0.5)):
        recipe = finetune.suited(Recipe(**given), given)
        finetune.check(recipe)
        assert recipe.warmup_epochs == warmup
    with pytest.raises(UserError, match="--warmup-epochs 1.0 must be fewer than the 1 --epochs"):
        finetune.check(finetune.suited(Recipe(epochs=1, warmup_epochs=1.0), {"epochs": 1, "warmup_epochs": 1.0}))


def test_fresh_weights_learn_at_one_rate_in_all_layers():
    """Unless it is said otherwise: embeddings of fresh weights would hardly move."""
    for given, expected in (
        ({}, 0.75),
        ({"from_scratch": True}, 1.0),
        ({"from_scratch": True, "layer_decay": 0.5}, 0.5),
    ):
        assert finetune.suited(Recipe(**given), given).layer_decay == expected
