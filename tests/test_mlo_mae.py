"""The models against their equations, and the program as a user meets it: whole runs, resuming, bad input.

MLO_MAE_KILLS sets how many runs are killed and resumed."""

import dataclasses
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mlo_mae
from mlo_mae import CIFAR, IMAGENET, Config, build, call, main, unflatten

SCRIPT = Path(mlo_mae.__file__)
FLAGS = ["--image-size", "16", "--patch-size", "4", "--width", "16", "--depth", "1", "--heads", "2",
         "--decoder-width", "8", "--decoder-depth", "1", "--decoder-heads", "2", "--masking-width", "8",
         "--batch-size", "16", "--labelled-batch-size", "8", "--mask-start", "0", "--log-every", "2", "--device", "cpu",
         "--level1-steps", "2", "--head-steps", "1"]  # fmt: skip


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    """60 + 20 images of two classes, bright on the left or on the right."""
    random = np.random.default_rng(0)

    def draw(count):
        labels = random.integers(0, 2, count)
        images = random.integers(0, 120, (count, 16, 16, 3))
        images[labels == 0, :, :8] += 100
        images[labels == 1, :, 8:] += 100
        return images.astype(np.uint8), labels

    path = tmp_path_factory.mktemp("data") / "sides.npz"
    (train, train_labels), (test, test_labels) = draw(60), draw(20)
    np.savez(path, train_images=train, train_labels=train_labels, test_images=test, test_labels=test_labels)
    return path


def arguments(npz, out, *more):
    return ["pretrain", "--data", str(npz), "--out", str(out), *FLAGS, *map(str, more)]


def weights(run):
    content = mlo_mae.read_checkpoint(Path(run) / "checkpoint.pt")
    return {(part, name): tensor for part in ("model", "head", "masking") for name, tensor in content[part].items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refused(argv, capsys, *words):
    """The command ends with status 2 and one line on stderr, beside the progress bar, that holds `words`; returns it."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in argv])
    except SystemExit as exit:  # argparse
        status = exit.code
    printed = capsys.readouterr().err.splitlines()
    lines = [line for line in printed if line and ("mlo_mae:" in line or not re.search("(update|step)/s|s/(update|step)", line))]
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("mlo_mae: "), lines
    for word in words:
        assert str(word) in lines[0], lines[0]
    return lines[0]


# ------------------------------------------------------------------------------------------------- the models


def mae_by_hand(weight, images, kept, size, heads, decoder_heads):
    """MAE's equations (arXiv 2111.06377) written image by image, patch by patch, head by head, in float64.

    kept: for each image, its visible patches. Returns the error of each patch [B, L], 0 where visible."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight[name + ".weight"] + weight[
            name + ".bias"
        ]

    def linear(x, name):
        return x @ weight[name + ".weight"].T + weight[name + ".bias"]

    def block(x, name, heads):  # x [N, D]
        q, k, v = linear(norm(x, name + ".norm1"), name + ".attn.qkv").chunk(3, dim=-1)
        width = x.shape[1] // heads
        mixed = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = q[:, part] @ k[:, part].T / math.sqrt(width)
            mixed.append(scores.exp() / scores.exp().sum(1, keepdim=True) @ v[:, part])
        x = x + linear(torch.cat(mixed, dim=1), name + ".attn.proj")
        hidden = linear(norm(x, name + ".norm2"), name + ".mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return x + linear(hidden, name + ".mlp.fc2")

    depth = 1 + max(int(name.split(".")[1]) for name in weight if name.startswith("blocks."))
    decoder_depth = 1 + max(int(name.split(".")[1]) for name in weight if name.startswith("decoder_blocks."))
    errors = torch.zeros(len(images), (images.shape[2] // size) ** 2, dtype=images.dtype)
    for i, image in enumerate(images):
        cut = [image[:, r : r + size, c : c + size] for r in range(0, image.shape[1], size)
               for c in range(0, image.shape[2], size)]  # fmt: skip
        tokens = [weight["cls_token"][0, 0] + weight["pos_embed"][0, 0]]
        for j in kept[i]:
            convolved = torch.einsum("cpq,dcpq->d", cut[j], weight["patch_embed.proj.weight"])
            tokens.append(convolved + weight["patch_embed.proj.bias"] + weight["pos_embed"][0, 1 + j])
        x = torch.stack(tokens)
        for number in range(depth):
            x = block(x, f"blocks.{number}", heads)
        x = linear(norm(x, "norm"), "decoder_embed")
        full = [x[0]] + [weight["mask_token"][0, 0]] * len(cut)
        for place, j in enumerate(kept[i]):
            full[1 + j] = x[1 + place]
        x = torch.stack(full) + weight["decoder_pos_embed"][0]
        for number in range(decoder_depth):
            x = block(x, f"decoder_blocks.{number}", decoder_heads)
        pred = linear(norm(x, "decoder_norm"), "decoder_pred")[1:]
        for j, patch in enumerate(cut):
            if j in kept[i]:
                continue
            pixels = patch.permute(1, 2, 0).flatten()  # row, column, channel
            mean = pixels.mean()
            var = (pixels - mean).square().sum() / (len(pixels) - 1)
            errors[i, j] = (pred[j] - (pixels - mean) / (var + 1e-6).sqrt()).square().mean()
    return errors


def test_forward_equals_the_published_equations():
    cfg = Config(patch_size=4, width=24, depth=2, heads=3, decoder_width=16, decoder_depth=2, decoder_heads=2,
                 masking_network="mlp", mask_noise=0.0)  # fmt: skip
    net, (theta, _, psi) = build(cfg, 20, 3, 7)
    torch.manual_seed(1)
    theta = theta.double() + 0.3 * torch.randn(len(theta), dtype=torch.float64)  # nothing is zero or special
    images = torch.randn(3, 3, 20, 20, dtype=torch.float64)
    prob, keep, restore, mask = mlo_mae.draw_masks(net, psi.double(), images, theta[: net.encoder_size], 0)
    step = mlo_mae.Step(None, None, None, images, keep, restore, mask)
    errors = mlo_mae.patch_errors(net, theta[: net.encoder_size], theta[net.encoder_size :], step)

    named = unflatten(net.encoder, theta[: net.encoder_size]) | unflatten(net.decoder, theta[net.encoder_size :])
    visible = [[j for j in range(25) if mask[i, j] == 0] for i in range(3)]
    expected = mae_by_hand(named, images, visible, 4, 3, 2)
    assert net.visible == 6 and all(len(ids) == 6 for ids in visible)  # int(25 * (1 - 0.75))
    assert torch.allclose(errors, expected, rtol=1e-10, atol=1e-12)
    loss = mlo_mae.level1_loss(prob, mask, errors)
    by_hand = sum(prob[i, j] * expected[i, j] for i in range(3) for j in range(25) if j not in visible[i]) / (3 * 19)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12)
    for i in range(3):  # the hidden patches are those of highest p
        assert prob[i][mask[i] == 1].min() >= prob[i][mask[i] == 0].max()


def test_whole_images_give_the_features_of_all_patches_in_order():
    net, (theta, _, _) = build(Config(width=16, depth=1, heads=2, decoder_width=8, decoder_heads=2), 16, 3, 2)
    images, params = torch.randn(2, 3, 16, 16), theta[: net.encoder_size]
    everything = torch.arange(16).expand(2, -1)
    assert torch.allclose(call(net.encoder, params, images), call(net.encoder, params, images, everything), atol=1e-6)


@pytest.mark.parametrize(
    "preset, image_size, encoder_millions, decoder_millions, first_of_t",
    [(CIFAR, 32, 85.3, 25.8, 3072), (IMAGENET, 224, 85.8, 26.1, 150528),
     (mlo_mae.PRESETS["imagenet-large"], 224, 303.3, 26.3, 150528)],
)  # fmt: skip
def test_preset_sizes_and_public_names(preset, image_size, encoder_millions, decoder_millions, first_of_t, monkeypatch):
    monkeypatch.setattr(mlo_mae, "parameters_to_vector", lambda parameters: torch.zeros(1))  # no storage: meta tensors
    with torch.device("meta"):
        net, _ = build(dataclasses.replace(Config(), **preset), image_size, 3, 100)
    count = {part: sum(p.numel() for p in getattr(net, part).parameters()) / 1e6 for part in ("encoder", "decoder")}
    assert count["encoder"] == pytest.approx(encoder_millions, abs=0.06)
    assert count["decoder"] == pytest.approx(decoder_millions, abs=0.06)
    assert net.masking.fc1.weight.shape == (512, first_of_t)
    # The names of timm's VisionTransformer (without its classifier) and of facebookresearch/mae's decoder.
    a_block = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
               "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]  # fmt: skip
    encoder = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    encoder |= {f"blocks.{n}.{name}" for n in range(preset["depth"]) for name in a_block}
    decoder = {"mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_embed.bias", "decoder_norm.weight",
               "decoder_norm.bias", "decoder_pred.weight", "decoder_pred.bias"}  # fmt: skip
    decoder |= {f"decoder_blocks.{n}.{name}" for n in range(preset["decoder_depth"]) for name in a_block}
    assert {name for name, _ in net.encoder.named_parameters()} == encoder
    assert {name for name, _ in net.decoder.named_parameters()} == decoder
    width, patch = preset["width"], preset["patch_size"]
    assert net.encoder.patch_embed.proj.weight.shape == (width, 3, patch, patch)
    assert net.encoder.blocks[0].attn.qkv.weight.shape == (3 * width, width)
    assert net.encoder.pos_embed.shape == (1, 1 + (image_size // patch) ** 2, width)


def test_positions_are_sin_cos_of_column_then_row():
    table = mlo_mae.sincos_positions(8, 3)[0]
    assert torch.equal(table[0], torch.zeros(8))
    for row in range(3):
        for column in range(3):
            expected = [wave(place / 10000 ** (k / 2)) for place in (column, row) for wave in (math.sin, math.cos) for k in (0, 1)]
            assert torch.allclose(table[1 + 3 * row + column], torch.tensor(expected), atol=1e-6)


def test_random_masks_are_uniform_and_p_is_one():
    net, (theta, _, psi) = build(Config(masking="random"), 32, 3, 8)
    prob, keep, restore, mask = mlo_mae.draw_masks(net, psi, torch.zeros(2000, 3, 32, 32), None, 0, 1)
    assert torch.equal(prob, torch.ones(2000, 64)) and torch.equal(mask.sum(1), torch.full((2000,), 48.0))
    assert (mask.mean(0) - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 2000)
    again = mlo_mae.draw_masks(net, psi, torch.zeros(2000, 3, 32, 32), None, 0, 1)[3]
    other = mlo_mae.draw_masks(net, psi, torch.zeros(2000, 3, 32, 32), None, 0, 2)[3]
    assert torch.equal(mask, again) and not torch.equal(mask, other)


def test_before_its_start_t_is_not_asked():
    """Learned masks are then those of --masking random, draw by draw."""
    images, masks = torch.randn(50, 3, 32, 32), {}
    for masking in ("learned", "random"):
        net, (_, _, psi) = build(Config(masking=masking, mask_start=0.5), 32, 3, 8)
        psi = torch.ones_like(psi).cumsum(0).sin()  # T has preferences
        for progress in (0.0, 0.49, 0.5, 1.0):
            prob, _, _, masks[masking, progress] = mlo_mae.draw_masks(net, psi, images, None, 0, 1, progress=progress)
            assert prob.eq(1).all() == (masking == "random" or progress < 0.5)
    for progress in (0.0, 0.49, 0.5, 1.0):
        assert torch.equal(masks["learned", progress], masks["random", progress]) == (progress < 0.5)


@pytest.mark.parametrize("masking_input", ["pixels", "embeddings"])
def test_the_shared_t_starts_without_a_preference(masking_input):
    cfg = Config(masking_network="shared", masking_input=masking_input, masking_width=6, width=16, patch_size=4)
    net, (theta, _, psi) = build(cfg, 32, 3, 8)
    prob = mlo_mae.masking_probability(net, psi, torch.randn(5, 3, 32, 32), theta[: net.encoder_size])
    assert torch.equal(prob, torch.full((5, 64), 0.5))
    window = (3, 12, 12) if masking_input == "pixels" else (16, 3, 3)  # three by three patches
    assert net.masking.window.weight.shape == (6, *window)


def test_the_shared_t_sees_a_patch_and_its_neighbours_wherever_they_lie():
    net, (_, _, psi) = build(Config(masking_network="shared", masking_input="pixels", patch_size=4), 32, 3, 8)
    torch.manual_seed(0)
    psi, images = psi.double() + 0.1 * torch.randn(len(psi)), torch.randn(2, 3, 32, 32).double()

    def logits(images):  # [B, 8, 8], less their mean, which the borders change: here the one of patch (6, 6) is 0
        found = mlo_mae.masking_probability(net, psi, images, None).logit()
        assert found.mean(1).abs().max() < 1e-9 and found.std() > 0.1
        return found.unflatten(1, (8, 8)) - found[:, 54, None, None]

    right = logits(images.roll(4, 3))  # patches move by one; standardising the image does not see that
    expected = logits(images)[:, 1:-1, 1:-2] - logits(images)[:, 6:7, 5:6]
    assert torch.allclose(right[:, 1:-1, 2:-1], expected, atol=1e-9)

    turned = images.clone()
    turned[:, :, 8:12, 12:16] = images[:, :, 8:12, 12:16].flip(2)  # patch (2, 3), its pixels in another order
    moved = (logits(turned) - logits(images)).abs() > 1e-9
    near = torch.zeros(8, 8, dtype=torch.bool)
    near[1:4, 2:5] = True
    assert torch.equal(moved, near.expand(2, -1, -1))


@pytest.mark.parametrize("noise", [1.0, 2.5])
@pytest.mark.parametrize("hidden", [1, 2])
def test_noisy_masks_are_drawn_by_their_odds_without_replacement(monkeypatch, noise, hidden):
    net, _ = build(Config(patch_size=8, mask_ratio=hidden / 4, mask_noise=noise, mask_start=0.0), 16, 3, 8)
    logits = torch.tensor([2.0, -1.0, 0.5, -0.5])
    monkeypatch.setattr(mlo_mae, "masking_probability", lambda net, psi, images, params: logits.sigmoid().expand(len(images), -1))
    images = torch.zeros(40_000, 3, 16, 16)
    prob, _, _, mask = mlo_mae.draw_masks(net, None, images, None, 0, 1)
    assert torch.equal(prob[7], logits.sigmoid())  # the noise has no part in L1's weights
    odds = (logits / noise).exp().tolist()
    if hidden == 1:
        expected = {(i,): odds[i] / sum(odds) for i in range(4)}
    else:  # one first and the other of the rest, or the reverse
        expected = {(i, j): odds[i] * odds[j] / sum(odds) * (1 / (sum(odds) - odds[i]) + 1 / (sum(odds) - odds[j]))
                    for i in range(4) for j in range(i + 1, 4)}  # fmt: skip
    assert sum(expected.values()) == pytest.approx(1)
    for patches, share in expected.items():
        found = mask[:, list(patches)].all(1).double().mean().item()
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / len(images)), patches
    assert torch.equal(mask, mlo_mae.draw_masks(net, None, images, None, 0, 1)[3])
    assert not torch.equal(mask, mlo_mae.draw_masks(net, None, images, None, 0, 2)[3])


def test_without_noise_the_highest_p_are_hidden(monkeypatch):
    net, _ = build(Config(patch_size=8, mask_ratio=0.5, masking_network="mlp", mask_noise=0.0, mask_start=0.0), 16, 3, 8)
    prob = torch.tensor([[0.1, 0.9, 0.5, 0.6], [0.51, 0.5, 0.49, 0.52]])
    monkeypatch.setattr(mlo_mae, "masking_probability", lambda *arguments: prob)
    mask = mlo_mae.draw_masks(net, None, torch.zeros(2, 3, 16, 16), None, 0, 1)[3]
    assert mask.tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]]


@pytest.mark.parametrize("masking_input", ["pixels", "embeddings"])
@pytest.mark.parametrize("image_size, patch", [(32, 4), (96, 8)])
def test_first_masks_are_neither_saturated_nor_the_same(masking_input, image_size, patch):
    cfg = Config(masking_network="mlp", masking_input=masking_input, mask_noise=0.0, patch_size=patch)
    net, (theta, _, psi) = build(cfg, image_size, 3, 8)
    torch.manual_seed(0)
    images = F.interpolate(torch.randn(64, 3, 6, 6), size=image_size, mode="bilinear")  # smooth, as photographs are
    statistics, _ = mlo_mae.mask_statistics(net, mlo_mae.State(0, *(mlo_mae.fresh_level(v, "cpu") for v in (theta, theta[:1], psi))), images, None, None)
    assert 0.3 < statistics["p_mean"] < 0.7 and 0.05 < statistics["p_std"] < 0.3
    assert statistics["p_entropy"] > 0.7
    assert statistics["mask_overlap"] < 0.93


def test_no_decay_on_biases_norms_tokens_and_positions():
    net, _ = build(Config(weight_decay=0.3), 32, 3, 8)
    decay = unflatten(net.encoder, mlo_mae.decay_of(net.cfg, net.encoder))
    for name, value in decay.items():
        decayed = name.endswith(("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight"))
        assert torch.equal(value, torch.full_like(value, 0.3 if decayed else 0.0)), name


@pytest.mark.parametrize("network, layers, biases", [("mlp", ("fc1", "fc2"), ("fc1", "fc2")), ("shared", ("window", "fc"), ("window",))])
def test_one_step_moves_a_unit_of_t_by_mask_lr_at_most(network, layers, biases):
    net, (_, _, psi) = build(Config(masking_network=network), 32, 3, 8)
    scale = mlo_mae.inverse_fan_in(net.masking)
    after = mlo_mae.adamw(mlo_mae.fresh_level(psi, "cpu"), torch.randn(len(psi)), mlo_mae.Rates(0.02 * scale, 0 * psi))
    moved = unflatten(net.masking, after.params - psi)
    for name in layers:  # inputs of size 1
        assert moved[name + ".weight"].abs().flatten(1).sum(1).max() == pytest.approx(0.02, rel=1e-3)
    for name in biases:
        assert moved[name + ".bias"].abs().max() == pytest.approx(0.02, rel=1e-3)


def test_schedule_rises_then_falls_to_zero():
    rates = [mlo_mae.schedule(step, 1000, 100) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99] == 1.0 and rates[100] == 1.0
    assert rates[550] == pytest.approx(0.5) and rates[-1] < 1e-5
    assert all(a >= b for a, b in zip(rates[100:], rates[101:]))
    assert mlo_mae.schedule(0, 10, 0) == 1.0


def test_mask_statistics_of_known_masks(monkeypatch):
    net, (theta, head, psi) = build(Config(patch_size=8), 16, 3, 8)  # 4 patches, 3 hidden
    state = mlo_mae.State(0, *(mlo_mae.fresh_level(v, "cpu") for v in (theta, head, psi)))
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1.0]])
    prob = torch.tensor([[0.5, 0.5, 0.5, 0.5], [1.0, 0, 1, 1]])
    monkeypatch.setattr(mlo_mae, "draw_masks", lambda *arguments, **named: (prob, None, None, mask))
    objects = torch.zeros(2, 16, 16, dtype=torch.bool)
    objects[0, :8, :8] = True  # all visible
    objects[1, 8:, 8:12] = True  # all hidden
    previous = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 1.0]])
    found, _ = mlo_mae.mask_statistics(net, state, torch.zeros(2, 3, 16, 16), objects, previous)
    assert found["p_entropy"] == pytest.approx(0.5)
    assert found["mask_churn"] == pytest.approx(1 / 6)
    assert found["mask_overlap"] == pytest.approx(2 / 3)
    assert found["object_hidden"] == pytest.approx(32 / 96 / 0.75)


# -------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="session")
def run(npz, tmp_path_factory):
    """A finished run, and what it printed last."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finished = subprocess.run([sys.executable, SCRIPT, *arguments(npz, out, "--epochs", 20)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return out, json.loads(finished.stdout.splitlines()[-1]), finished.stderr


def test_a_run_leaves_its_files_and_ends_with_json(run):
    out, summary, stderr = run
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "masks.jsonl", "checkpoint.pt", "probe.json", "masks.png", "curves.png",
        "masks-over-training.png", "lock"}  # fmt: skip
    for name in ("masks.png", "curves.png", "masks-over-training.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(2, 31, 2))  # ceil(20 epochs * 48 images / (16 * 2))
    for name in ("level1_loss", "level2_loss", "level3_loss", "reconstruction_error", "p_mean", "p_std", "p_entropy",
                 "mask_overlap", "images_per_second", "hypergradient_norm"):  # fmt: skip
        assert all(math.isfinite(row[name]) for row in rows), name
    assert all(0 <= row["mask_churn"] <= 1 for row in rows[1:])
    assert all(0 < row["waiting_share"] < 1 for row in rows)
    assert rows[-1]["reconstruction_error"] < rows[0]["reconstruction_error"]
    assert summary["verb"] == "pretrain" and summary["probe"] == json.loads((out / "probe.json").read_text())
    assert "L1=" in stderr and "L2=" in stderr and "L3=" in stderr and "img/s=" in stderr
    assert json.loads((out / "config.json").read_text())["epochs"] == 20


def test_probe_repeats_and_beats_chance(run, capsys):
    out, summary, _ = run
    assert main(["probe", str(out), "--device", "cpu"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again == {"verb": "probe", "run": str(out), "recipe": "lbfgs", "pooling": "cls", **summary["probe"]}
    assert again["test_accuracy"] > 0.8  # two classes that differ in brightness left and right


def test_show_draws_the_pictures_again(run, capsys):
    out, _, _ = run
    before = (out / "masks.png").read_bytes()
    (out / "masks.png").unlink()
    assert main(["show", str(out), "--device", "cpu"]) == 0
    assert (out / "masks.png").read_bytes() == before
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"]
    assert sorted(shown) == sorted(map(str, out.glob("*.png"))) and len(shown) == 3


def test_masks_are_recorded_over_training(run):
    out, _, _ = run
    rows = [json.loads(line) for line in (out / "masks.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(3, 31, 3)) and rows[-1]["epoch"] == 20  # ten times
    net, state, splits = mlo_mae.open_run(out, "cpu")
    images = next(iter(splits.val.ordered(len(splits.val)))).images[:8]
    p = mlo_mae.masking_probability(net, state.psi.params, images, state.theta.params[: net.encoder_size])
    assert p.shape == torch.tensor(rows[-1]["p"]).shape and torch.allclose(p, torch.tensor(rows[-1]["p"]), atol=6e-4)
    assert not torch.allclose(torch.tensor(rows[0]["p"]), torch.tensor(rows[-1]["p"]), atol=1e-2)


def test_same_seed_same_weights_other_seed_others(run, npz, tmp_path):
    out, _, _ = run
    assert main(arguments(npz, tmp_path / "same", "--epochs", 20)) == 0
    assert same(weights(out), weights(tmp_path / "same"))
    assert main(arguments(npz, tmp_path / "other", "--epochs", 20, "--seed", 1)) == 0
    assert not same(weights(out), weights(tmp_path / "other"))


def test_every_form_of_the_hypergradient_runs_and_agrees(npz, tmp_path):
    forms = {
        "exact": [], "unrolled": [], "finite-difference": [], "first-order": [],
        "full": ["--unroll", "full", "--head-steps", 2], "embeddings": ["--masking-input", "embeddings"],
    }  # fmt: skip
    for name, flags in forms.items():
        form = ["--hypergradient", name] if name in mlo_mae.HYPERGRADIENTS else []
        assert main(arguments(npz, tmp_path / name, "--epochs", 1, "--log-every", 1, *form, *flags)) == 0
    first = {name: json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in forms}
    assert first["unrolled"]["level3_loss"] == pytest.approx(first["exact"]["level3_loss"], rel=1e-4)
    assert first["unrolled"]["hypergradient_norm"] == pytest.approx(first["exact"]["hypergradient_norm"], rel=0.02)


def test_random_masking_is_plain_mae(npz, tmp_path):
    assert main(arguments(npz, tmp_path / "mae", "--epochs", 2, "--masking", "random", "--log-every", 1)) == 0
    rows = mlo_mae.read_metrics(tmp_path / "mae" / "metrics.jsonl")
    assert all(row["level1_loss"] == row["reconstruction_error"] and "level3_loss" not in row for row in rows)
    content = mlo_mae.read_checkpoint(tmp_path / "mae" / "checkpoint.pt")
    assert content["moments"]["masking"]["t"] == 0 and content["moments"]["model"]["t"] == 6


def stopped(npz, out, monkeypatch, lines, *more):
    """A run that a signal stops after this many lines of metrics; returns its checkpoint."""
    real, calls = mlo_mae.mask_statistics, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == lines:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(mlo_mae, "mask_statistics", interrupted)
        main(arguments(npz, out, *more))
    return mlo_mae.read_checkpoint(out / "checkpoint.pt")


@pytest.mark.parametrize("network", [("shared", "1"), ("mlp", "0")])
def test_masks_are_random_before_their_start_and_resuming_knows(npz, tmp_path, monkeypatch, network):
    """30 updates, T from the 15th on; stopped before and after, a resumed run ends with the same weights."""
    flags = ["--epochs", 20, "--mask-start", 0.5, "--masking-network", network[0], "--mask-noise", network[1]]
    assert main(arguments(npz, tmp_path / "whole", *flags)) == 0
    rows = mlo_mae.read_metrics(tmp_path / "whole" / "metrics.jsonl")
    for row in rows:
        learned = row["iteration"] >= 16
        assert ("level2_loss" in row, "level3_loss" in row, "hypergradient_norm" in row) == (learned,) * 3
        assert (row["p_mean"] == 1) == (not learned)
        assert learned or row["level1_loss"] == row["reconstruction_error"]
    assert mlo_mae.read_checkpoint(tmp_path / "whole" / "checkpoint.pt")["moments"]["masking"]["t"] == 15

    early, late = (stopped(npz, tmp_path / name, monkeypatch, lines, *flags) for name, lines in (("early", 5), ("late", 10)))
    assert 10 <= early["iteration"] < 15 < late["iteration"] < 30
    net, (_, phi, psi) = build(Config(**early["config"]), 16, 3, 2)
    for part, module, start in (("head", net.head, phi), ("masking", net.masking, psi)):
        assert same(early[part], unflatten(module, start)) and early["moments"][part]["t"] == 0
        assert not same(late[part], unflatten(module, start)) and late["moments"][part]["t"] == late["iteration"] - 15
    for name in ("early", "late"):
        assert main(["pretrain", "--out", str(tmp_path / name), "--resume"]) == 0
        assert same(weights(tmp_path / name), weights(tmp_path / "whole"))


def test_curves_hold_losses_from_their_first_row_on(tmp_path, monkeypatch):
    early = {"epoch": 1, "iteration": 1, "level1_loss": 0.9, "reconstruction_error": 0.9, "p_mean": 1.0}
    rows = [early, early | {"epoch": 2}, early | {"epoch": 3, "level2_loss": 0.7, "level3_loss": 0.8}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures, real = [], mlo_mae.save_figure
    monkeypatch.setattr(mlo_mae, "save_figure", lambda figure, path: figures.append(figure) or real(figure, path))
    mlo_mae.draw_curves(tmp_path)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figures[0].axes[0].lines}
    assert lines["level1_loss"] == ([1, 2, 3], [0.9] * 3) and lines["level2_loss"] == ([3], [0.7])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------ interrupt and resume


def start(npz, out, *more):
    return subprocess.Popen([sys.executable, SCRIPT, *arguments(npz, out, "--epochs", 20, "--checkpoint-minutes", 0, *more)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait_for_line(out, process, lines=2):
    """Until the run has written some metrics, so that a signal finds it at work."""
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= lines):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)


@pytest.mark.parametrize("attempt", [*range(int(os.environ.get("MLO_MAE_KILLS", 2))), None])
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupted_and_resumed_runs_end_with_the_same_weights(run, npz, tmp_path, attempt):
    """Killed at a random moment that follows from `attempt`; interrupted where that is None."""
    chance, number = random.Random(attempt or 0), signal.SIGINT if attempt is None else signal.SIGKILL
    process = start(npz, tmp_path / "cut")
    wait_for_line(tmp_path / "cut", process, chance.randint(1, 13))
    time.sleep(chance.uniform(0, 0.1))
    process.send_signal(number)
    _, stderr = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130 and "continue with --resume" in stderr
    assert not (tmp_path / "cut" / "probe.json").exists()
    assert main(["pretrain", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert same(weights(run[0]), weights(tmp_path / "cut"))
    rows = mlo_mae.read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(2, 31, 2))


def test_a_stop_is_saved_whenever_it_comes(npz, tmp_path, monkeypatch):
    """Here the signal comes after the iteration has decided that no checkpoint is due."""
    real = mlo_mae.mask_statistics

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(mlo_mae, "mask_statistics", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(arguments(npz, tmp_path / "cut", "--epochs", 20))
    assert stop.value.code == 130
    assert mlo_mae.read_checkpoint(tmp_path / "cut" / "checkpoint.pt")["iteration"] >= 2


def test_gradients_do_not_depend_on_how_threads_are_scheduled():
    cfg = Config(masking="random")
    net, (theta, _, _) = build(cfg, 32, 3, 8)
    images = torch.randn(cfg.batch_size, 3, 32, 32)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = [mlo_mae.level1_step(net, mlo_mae.fresh_level(theta, "cpu"), None, images, mlo_mae.Rates(1e-3, torch.zeros(())), 0)[1]
                 for _ in range(12)]  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(step.gradient, found[0].gradient) for step in found)


def test_resume_before_the_first_checkpoint_starts_the_run(run, npz, tmp_path):
    assert main(arguments(npz, tmp_path / "new", "--epochs", 20, "--resume")) == 0
    assert same(weights(run[0]), weights(tmp_path / "new"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    mlo_mae.write_whole(tmp_path / "file", b"old")

    def half(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(mlo_mae.RunError, match="disk full"):
        mlo_mae.write_whole(tmp_path / "file", half)
    assert (tmp_path / "file").read_bytes() == b"old"


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--patch-size", "5"], ["16 pixels", "patches of 5"]),
        (["--width", "18", "--heads", "4"], ["--width 18", "4 heads"]),
        (["--width", "6", "--heads", "2"], ["--width 6", "multiple of 4"]),
        (["--mask-ratio", "1.5"], ["--mask-ratio"]),
        (["--mask-ratio", "0.999"], ["--mask-ratio 0.999", "16 patches"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--lr", "nan"], ["--lr"]),
        (["--masking", "semantic?"], ["--masking"]),
        (["--preset", "cifar1000"], ["--preset", "cifar100"]),
        (["--learning-rate", "1"], ["--learning-rate"]),
        (["--device", "abacus"], ["abacus", "cpu"]),
        (["--redraw-dropout"], ["finite-difference"]),
        (["--masking-network", "shared", "--mask-noise", "0"], ["--masking-network shared", "--mask-noise above 0"]),
        (["--mask-start", "1"], ["--mask-start", "below 1"]),
        (["--mask-noise", "-1"], ["--mask-noise", "negative"]),
        (["--hypergradient", "finite-difference", "--unroll", "full"], ["--unroll last"]),
        (["--data", "no/such.npz"], ["no/such.npz"]),
        (["--images", "100000"], ["100000"]),
    ],
)
def test_bad_flags_end_in_one_line(npz, tmp_path, capsys, flags, words):
    refused(arguments(npz, tmp_path / "bad", *flags), capsys, *words)
    assert not (tmp_path / "bad").exists()  # so the mended command finds nothing in its way


@pytest.mark.parametrize("name, argv", [("config.json", ["pretrain", "--resume", "--out"]),
                                        ("metrics.jsonl", ["pretrain", "--resume", "--out"]), ("metrics.jsonl", ["show"]),
                                        ("masks.jsonl", ["pretrain", "--resume", "--out"]), ("masks.jsonl", ["show"])])  # fmt: skip
@pytest.mark.parametrize("content", [b"{nonsense}\n", b"[1]\n"])
def test_damaged_text_files_are_refused(run, tmp_path, capsys, name, argv, content):
    for path in run[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(content)
    refused([*argv, tmp_path], capsys, name)
    assert (tmp_path / name).read_bytes() == content


def test_a_run_is_never_overwritten(run, npz, capsys):
    out, _, _ = run
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused(arguments(npz, out), capsys, out, "--resume", "--out")
    refused(arguments(npz, out, "--epochs", 21, "--resume"), capsys, "--epochs 20", "21")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


class Explosive:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def damage(content, kind):
    if kind == "truncated":
        return content[: len(content) // 2]
    if kind == "flipped":  # one bit in the middle of the weights
        return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    if kind == "empty":
        return b""
    return {"text": b"not a checkpoint", "pickle": pickle.dumps(Explosive())}[kind]


@pytest.mark.parametrize("kind", ["truncated", "flipped", "empty", "text", "pickle"])
def test_damaged_checkpoints_are_refused(run, npz, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for name in ("config.json", "metrics.jsonl", "checkpoint.pt"):
        (tmp_path / "run" / name).write_bytes((run[0] / name).read_bytes())
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes(), kind))
    before = path.read_bytes()
    for argv in (["probe", "run"], ["show", "run"], ["pretrain", "--out", "run", "--resume"]):
        refused(argv, capsys, "checkpoint.pt")
    assert path.read_bytes() == before and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], Explosive()], ids=["dict", "list", "malicious"])
def test_foreign_checkpoints_are_refused(tmp_path, capsys, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    refused(["probe", "run"], capsys, "checkpoint.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_of_other_sizes_is_refused(run, npz, tmp_path, capsys):
    content = torch.load(run[0] / "checkpoint.pt", weights_only=True)
    content["model"]["cls_token"] = torch.zeros(1, 1, 24)
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    refused(["probe", tmp_path / "run"], capsys, "cls_token", "(1, 1, 24)", "(1, 1, 16)")


def test_absent_runs_are_named(tmp_path, capsys):
    refused(["probe", tmp_path / "nothing"], capsys, tmp_path / "nothing")
    refused(["show", tmp_path / "nothing"], capsys, tmp_path / "nothing")


@pytest.mark.parametrize(
    "flags, words",
    [(["--lr", 1e30], ["level1_loss is nan", "mask update 1 ("]), (["--head-lr", 1e38], ["level3_loss is nan", "--head-lr"])],
)
def test_a_loss_that_is_not_finite_stops_the_run(npz, tmp_path, capsys, flags, words):
    refused(arguments(npz, tmp_path / "nan", "--epochs", 20, "--checkpoint-minutes", 0, *flags), capsys, *words)
    assert not (tmp_path / "nan" / "checkpoint.pt").exists()


def test_a_loss_that_turns_bad_late_leaves_the_last_good_checkpoint(npz, tmp_path, capsys, monkeypatch):
    real, out = mlo_mae.outer_iteration, tmp_path / "late"

    def failing(net, state, *rest):
        state, losses = real(net, state, *rest)
        return state, losses | ({"level2_loss": torch.tensor(math.inf)} if state.iteration == 5 else {})

    monkeypatch.setattr(mlo_mae, "outer_iteration", failing)
    line = refused(arguments(npz, out, "--epochs", 20, "--checkpoint-minutes", 0), capsys, "level2_loss is inf")
    assert "mask update 5 (level-1 step 10)" in line and str(out / "checkpoint.pt") in line
    assert mlo_mae.read_checkpoint(out / "checkpoint.pt")["iteration"] == 4


def test_an_unwritable_folder_is_named(npz, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    refused(arguments(npz, tmp_path / "file" / "run"), capsys, tmp_path / "file")


def test_npz_with_pickled_objects_executes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("bad.npz", train_images=np.array([Explosive()], dtype=object), train_labels=np.zeros(1))
    refused(arguments("bad.npz", tmp_path / "bad"), capsys, "bad.npz")
    assert not (tmp_path / "exploded").exists()
