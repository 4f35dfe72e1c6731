"""The networks, masks and losses against their equations written out, and the loop that puts them together."""

import contextlib
import dataclasses
import itertools
import json
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DEFAULT, TINY, arguments, as_recorded, noise_batches, other_sight, refused
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import kernels
import mlo_mae
from harness import UserError, graphs
from harness.probe import mask_statistics
from harness.randomness import DROPOUT, MASKS, draw_dropout, torch_generator
from harness.schedule import schedule
from harness.vectors import inverse_fan_in, unflatten, weight_decays
from mlo_mae import CIFAR, IMAGENET, PRESETS, Config, build, call

# ------------------------------------------------------------------------------------------------- the networks


def mae_by_hand(weight, images, kept, size, heads, decoder_heads):
    """MAE's equations (arXiv 2111.06377) written image by image, patch by patch, head by head, in float64.

    kept: for each image, its visible patches. Returns the error of each patch [B, L], 0 where visible."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight[name + ".weight"]
            + weight[name + ".bias"]
        )

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
        corners = [(r, c) for r in range(0, image.shape[1], size) for c in range(0, image.shape[2], size)]
        cut = [image[:, r : r + size, c : c + size] for r, c in corners]
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
    cfg = Config(
        **{"patch_size": 4, "width": 24, "depth": 2, "heads": 3},
        **{"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2},
        **{"mask_ratio": 0.75, "masking_network": "mlp", "mask_choice": "highest"},
    )
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
    tokens = call(net.encoder, params, images, everything)
    assert torch.allclose(call(net.encoder, params, images), tokens, atol=1e-6)
    pooled = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
    for own in pooled:
        net.cfg = dataclasses.replace(net.cfg, pooling=own)
        for asked in ("", *pooled):
            assert torch.allclose(mlo_mae.encode(net, params, images, asked), pooled[asked or own], atol=1e-6)


@pytest.mark.parametrize(
    "preset, image_size, encoder_millions, decoder_millions, first_of_t",
    [
        (CIFAR, 32, 85.3, 25.8, 3072),
        (IMAGENET, 224, 85.8, 26.1, 150528),
        (PRESETS["imagenet-large"], 224, 303.3, 26.3, 150528),
    ],
    ids=["cifar", "imagenet", "imagenet-large"],
)
def test_preset_sizes_and_public_names(preset, image_size, encoder_millions, decoder_millions, first_of_t, monkeypatch):
    monkeypatch.setattr(mlo_mae, "parameters_to_vector", lambda parameters: torch.zeros(1))  # no storage: meta tensors
    with torch.device("meta"):
        net, _ = build(dataclasses.replace(Config(), **preset), image_size, 3, 100)
    count = {part: sum(p.numel() for p in getattr(net, part).parameters()) / 1e6 for part in ("encoder", "decoder")}
    assert count["encoder"] == pytest.approx(encoder_millions, abs=0.06)
    assert count["decoder"] == pytest.approx(decoder_millions, abs=0.06)
    assert net.masking.fc1.weight.shape == (512, first_of_t)
    # The names of timm's VisionTransformer (without its classifier) and of facebookresearch/mae's decoder.
    modules = "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"
    a_block = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    encoder = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    encoder |= {f"blocks.{n}.{name}" for n in range(preset["depth"]) for name in a_block}
    decoder = {"mask_token", "decoder_pos_embed"}
    decoder |= {f"decoder_{module}.{kind}" for module in ("embed", "norm", "pred") for kind in ("weight", "bias")}
    decoder |= {f"decoder_blocks.{n}.{name}" for n in range(preset["decoder_depth"]) for name in a_block}
    assert {name for name, _ in net.encoder.named_parameters()} == encoder
    assert {name for name, _ in net.decoder.named_parameters()} == decoder
    width, patch = preset["width"], preset["patch_size"]
    assert net.encoder.patch_embed.proj.weight.shape == (width, 3, patch, patch)
    assert net.encoder.blocks[0].attn.qkv.weight.shape == (3 * width, width)
    assert net.encoder.pos_embed.shape == (1, 1 + (image_size // patch) ** 2, width)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_configuration_that_runs(preset):
    cfg = Config(**{"preset": preset} | PRESETS[preset])
    mlo_mae.check(cfg)
    published = {"mask_choice": "highest", "mask_start": 0, "mask_until": 1, "mask_restart": False, "masking_network": "mlp"}
    published |= {"mask_ratio": 0.75}
    published |= {"level2": "steps", "pooling": "cls", "mask_batches": 1, "head_norm": "layer", "head_steps": 1}
    assert preset == "shapes" or dataclasses.asdict(cfg).items() >= published.items()


def test_presets_hold_the_rates_that_they_are_meant_to():
    names = "lr", "head_lr", "mask_lr", "weight_decay", "warmup"
    cifar, imagenet = (1e-4, 1e-3, 0.05, 0.01, 0.0), (1.5e-4, 5e-4, 0.05, 0.05, 0.0)
    expected = {"shapes": (4e-3, 1e-2, 2.0, 0.05, 0.05), "cifar10": cifar, "cifar100": cifar}
    expected |= {"imagenet": imagenet, "imagenet-large": imagenet}
    cfgs = {preset: Config(**{"preset": preset} | PRESETS[preset]) for preset in PRESETS}
    assert {preset: tuple(getattr(cfg, name) for name in names) for preset, cfg in cfgs.items()} == expected
    assert (Config.ridge, Config.mask_ratio, Config.mask_start, Config.mask_until, Config.mask_wait) == (
        0.3,
        0.5,
        0.2,
        0.3,
        0.1,
    )


def test_positions_are_sin_cos_of_column_then_row():
    table = mlo_mae.sincos_positions(8, 3)[0]
    assert torch.equal(table[0], torch.zeros(8))
    for row in range(3):
        for column in range(3):
            angles = [[place / 10000 ** (k / 2) for k in (0, 1)] for place in (column, row)]
            expected = [wave(angle) for two in angles for wave in (math.sin, math.cos) for angle in two]
            assert torch.allclose(table[1 + 3 * row + column], torch.tensor(expected), atol=1e-6)


# ----------------------------------------------------------------------------------------------------- masks


def test_random_masks_are_uniform_and_p_is_one():
    net, (theta, _, psi) = build(Config(masking="random", mask_ratio=0.75), 32, 3, 8)
    prob, keep, restore, mask = mlo_mae.draw_masks(net, psi, torch.zeros(2000, 3, 32, 32), None, 0, 1)
    assert torch.equal(prob, torch.ones(2000, 64)) and torch.equal(mask.sum(1), torch.full((2000,), 48.0))
    assert (mask.mean(0) - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 2000)
    again = mlo_mae.draw_masks(net, psi, torch.zeros(2000, 3, 32, 32), None, 0, 1)[3]
    other = mlo_mae.draw_masks(net, psi, torch.zeros(2000, 3, 32, 32), None, 0, 2)[3]
    assert torch.equal(mask, again) and not torch.equal(mask, other)


@pytest.mark.parametrize("choice", ["random", "odds"])
def test_before_its_start_t_is_not_asked(choice):
    """Learned masks are then those of --masking random, draw by draw."""
    images, masks = torch.randn(50, 3, 32, 32), {}
    for masking in ("learned", "random"):
        net, (theta, _, psi) = build(Config(masking=masking, mask_start=0.5, mask_until=1.0, mask_choice=choice), 32, 3, 8)
        psi, eyes = torch.ones_like(psi).cumsum(0).sin(), theta[: net.encoder_size]  # T has preferences
        for progress in (0.0, 0.49, 0.5, 1.0):
            prob, _, _, masks[masking, progress] = mlo_mae.draw_masks(net, psi, images, eyes, 0, 1, progress=progress)
            assert prob.eq(1).all() == (masking == "random" or progress < 0.5)
    for progress in (0.0, 0.49, 0.5, 1.0):
        same = torch.equal(masks["learned", progress], masks["random", progress])
        assert same == (progress < 0.5 or choice == "random")


def test_masks_that_are_drawn_at_random_do_not_depend_on_t():
    """p then weighs, and does not choose."""
    net, (theta, _, psi) = build(Config(mask_start=0.0), 32, 3, 8)
    images, eyes = torch.randn(20, 3, 32, 32), theta[: net.encoder_size]
    probs, choices = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        prob, *choice = mlo_mae.draw_masks(net, psi + torch.randn(len(psi)), images, eyes, 0, 1)
        probs.append(prob)
        choices.append(choice)
    assert all(torch.equal(*pair) for choice in choices[1:] for pair in zip(choices[0], choice))
    assert (probs[0] - probs[1]).abs().mean() > 0.05


@pytest.mark.parametrize("masking_from", ["", "a run"])
@pytest.mark.parametrize("learns", [False, True])
def test_when_t_weighs_and_when_it_learns(masking_from, learns):
    cfg = Config(mask_start=0.25, mask_until=0.5, masking_from=masking_from, masking_learns=learns)
    for progress in (0.0, 0.2499, 0.25, 0.4999, 0.5, 1.0):
        assert mlo_mae.weighed_by(cfg, progress) == (progress >= 0.25 or masking_from != "")
        number = math.floor(10000 * progress)
        assert mlo_mae.learns_at(cfg, number, 10000, 0) == (0.25 <= progress < 0.5 and (learns or not masking_from))
        plain = dataclasses.replace(cfg, masking="random")
        assert not mlo_mae.weighed_by(plain, progress) and not mlo_mae.learns_at(plain, number, 10000, 0)
    assert mlo_mae.learns_at(Config(mask_start=0.0, mask_until=1.0), 999, 1000, 0)


def test_a_t_on_tokens_has_no_hidden_units_that_could_make_a_model_too_large():
    sizes = {"image_size": 3584, "patch_size": 64, "masking_network": "tokens"}
    mlo_mae.check_size(Config(**sizes), 3584, 3)
    with pytest.raises(UserError, match="too large; lower --width, --depth or --masking-width"):
        mlo_mae.check_size(Config(**sizes | {"masking_network": "mlp"}), 3584, 3)
    with pytest.raises(UserError, match="too large"):
        mlo_mae.check_size(Config(**sizes | {"patch_size": 1792, "width": 1024}), 3584, 3)


@pytest.mark.parametrize("total", [1, 2, 7, 10, 100, 1130])
@pytest.mark.parametrize("until", [0.07, 0.25, 0.3, 0.57, 0.9, 1.0])
def test_the_learning_rate_follows_a_part_of_the_run(total, until):
    plain = Config(masking="random", mask_start=0.95, mask_until=until)  # whose T would have learned late, had it one
    restart = math.ceil(round(until * total, 6))
    begun = [0] * restart + [restart] * (total - restart)
    assert [mlo_mae.began(plain, n, total, 0) for n in range(total)] == begun
    cfg = Config(mask_start=0.0, mask_until=until)
    assert [mlo_mae.began(cfg, n, total, 0) for n in range(total)] == begun
    for other in ({"masking": "random"}, {"masking_from": "a run"}):  # all methods have the same schedule
        assert [mlo_mae.began(dataclasses.replace(cfg, **other), n, total, 0) for n in range(total)] == begun
    whole = dataclasses.replace(cfg, mask_restart=False)
    assert not any(mlo_mae.began(whole, n, total, 0) for n in range(total))
    for some, starts in ((cfg, begun), (whole, [0] * total)):  # each to the end of the run
        steps = [(cfg.level1_steps * (n - first), cfg.level1_steps * (total - first)) for n, first in enumerate(starts)]
        expected = [cfg.lr * schedule(done, length, cfg.warmup * length) for done, length in steps]
        assert [mlo_mae.level1_rate(some, n, 0, total, 0) for n in range(total)] == pytest.approx(expected)


def test_t_learns_in_the_window_that_its_learning_rate_follows():
    for total in range(1, 121):
        for start in (0.0, 0.07, 0.1, 0.2, 0.29, 0.3, 0.57):
            for until in (0.075, 0.1, 0.3, 0.57, 0.58, 0.7, 0.9, 1.0):
                cfg = Config(mask_start=start, mask_until=until)
                first, end = mlo_mae.window(cfg, total)
                found = [n for n in range(total) if mlo_mae.learns_at(cfg, n, total, 0)]
                assert found == list(range(first, end)), (total, start, until)
                assert end > first or first == total, (total, start, until)  # a short run too gives T a look
                assert [mlo_mae.weighed_by(cfg, n / total) for n in range(total)] == [n >= first for n in range(total)]


def test_the_t_of_tokens_is_one_linear_layer_on_each_token_by_itself():
    net, (theta, _, psi) = build(Config(width=16, heads=2, depth=3, masking_blocks=2), 32, 3, 8)
    assert psi.shape == (16,) and not psi.any()
    torch.manual_seed(0)
    images, eyes = torch.randn(5, 3, 32, 32).double(), (theta + 0.1 * torch.randn(len(theta))).double()[: net.encoder_size]
    start = mlo_mae.masking_probability(net, psi.double(), images, eyes)
    assert torch.allclose(start, torch.full((5, 64), 1 / (1 + math.exp(2))).double(), atol=1e-12)  # without a preference
    weight = torch.randn(16).double()
    tokens = call(net.encoder.patch_embed, eyes[16 + 65 * 16 :][: 16 * 49], mlo_mae.gather_patches(images, None, 4))
    named = unflatten(net.encoder, eyes)
    assert torch.equal(named["patch_embed.proj.bias"], eyes[16 + 65 * 16 :][: 16 * 49][-16:])
    x = torch.cat([named["cls_token"].expand(5, -1, -1), tokens], dim=1) + named["pos_embed"]
    for number in range(2):  # of three blocks, and no last norm
        own = {name.removeprefix(f"blocks.{number}."): part for name, part in named.items() if f"blocks.{number}." in name}
        x = torch.func.functional_call(net.encoder.blocks[number], own, (x,))
    x = x[:, 1:]
    x = (x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    logits = x @ weight
    found = mlo_mae.masking_probability(net, weight, images, eyes)
    assert torch.allclose(found, (logits - logits.mean(1, keepdim=True) - 2).sigmoid(), atol=1e-12)
    alone = torch.cat([mlo_mae.masking_probability(net, weight, image[None], eyes) for image in images])
    assert torch.allclose(found, alone, atol=1e-12)  # whatever images are beside it
    net.cfg = dataclasses.replace(net.cfg, masking_blocks=9)  # more than there are: all of them
    every = mlo_mae.masking_probability(net, weight, images, eyes)
    net.cfg = dataclasses.replace(net.cfg, masking_blocks=3)
    assert torch.equal(every, mlo_mae.masking_probability(net, weight, images, eyes)) and not torch.allclose(every, found)


def test_what_t_reads_is_constant():
    net, (theta, _, psi) = build(Config(width=16, heads=2, depth=1), 32, 3, 8)
    eyes, psi = theta[: net.encoder_size].requires_grad_(), torch.randn(16).requires_grad_()
    prob = mlo_mae.masking_probability(net, psi, torch.randn(2, 3, 32, 32), eyes)
    assert torch.autograd.grad(prob.square().sum(), (psi, eyes), allow_unused=True)[1] is None


@pytest.mark.parametrize("image_size, patch", [(16, 4), (32, 8), (24, 4), (16, 2)])
def test_the_t_of_another_run_sees_images_as_it_knows_them(image_size, patch):
    """Normalised, and of the size, as in its run; its logits come back on this run's patches."""
    sight = other_sight(masking_blocks=2)
    assert not any(parameter.is_cuda or parameter.device.type != "meta" for parameter in sight.encoder.parameters())
    cfg = dataclasses.replace(TINY, patch_size=patch, masking_blocks=0, **DEFAULT)
    net, (_, _, psi) = build(cfg, image_size, 3, 5, sight)
    theirs, (theta, _, _) = build(Config(width=24, depth=3, heads=3, patch_size=4, masking_blocks=2), 24, 3, 5)
    assert psi.shape == (24,) and net.patches == (image_size // patch) ** 2
    torch.manual_seed(0)
    eyes, psi = theta[: theirs.encoder_size] + 0.1 * torch.randn(theirs.encoder_size), torch.randn(24)
    bright = torch.rand(4, 3, 6, 6)  # in [0, 1], smooth
    pixels = F.interpolate(bright, (image_size, image_size), mode="bilinear")
    found = mlo_mae.masking_probability(net, psi, (pixels - 0.5) / 0.25, eyes)
    mean, std = (torch.tensor(three)[:, None, None] for three in ([0.3, 0.4, 0.6], [0.2, 0.3, 0.15]))
    there = (pixels - mean) / std
    if image_size != 24:
        there = F.interpolate(there, (24, 24), mode="bicubic", antialias=True)
    logits = mlo_mae.masking_probability(theirs, psi, there, eyes).logit().unflatten(1, (1, 6, 6))
    if image_size != 6 * patch:
        logits = F.interpolate(logits, [image_size // patch] * 2, mode="bilinear", antialias=True)
    logits = logits.flatten(1)
    assert torch.allclose(found, (logits - logits.mean(1, keepdim=True) - 2).sigmoid(), atol=1e-5)
    assert found.std() > 0.02


@pytest.mark.parametrize("masking_input", ["pixels", "embeddings"])
def test_the_shared_t_starts_without_a_preference(masking_input):
    cfg = Config(masking_network="shared", masking_input=masking_input, masking_width=6, width=16, patch_size=4)
    net, (theta, _, psi) = build(cfg, 32, 3, 8)
    prob = mlo_mae.masking_probability(net, psi, torch.randn(5, 3, 32, 32), theta[: net.encoder_size])
    assert torch.equal(prob, torch.full((5, 64), 0.5))
    window = (3, 12, 12) if masking_input == "pixels" else (16, 3, 3)  # three by three patches
    assert net.masking.window.weight.shape == (6, *window)


def test_ts_of_pixels_are_their_equations_written_out():
    """Of images that are standardised each by itself: two layers on all of them, or on a patch and those around it."""
    random = torch.Generator().manual_seed(0)
    images = 3 + 2 * torch.randn(2, 3, 8, 8, generator=random)
    flat = images.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    mlp, shared = mlo_mae.MaskingNetwork(192, 6, 4), mlo_mae.SharedMaskingNetwork(3, 4, 5)
    for parameter in (*mlp.parameters(), *shared.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=random)
    hidden = (flat @ mlp.fc1.weight.T + mlp.fc1.bias).clamp_min(0)
    logits = hidden @ mlp.fc2.weight.T + mlp.fc2.bias
    assert torch.allclose(mlp(images), 1 / (1 + (-logits).exp()), atol=1e-6) and (hidden == 0).any()
    around = F.pad(flat.view_as(images), (4, 4, 4, 4))
    windows = [around[:, :, top : top + 12, left : left + 12] for top in (0, 4) for left in (0, 4)]
    features = torch.stack([torch.einsum("bcpq,dcpq->bd", window, shared.window.weight) for window in windows], 1)
    features = features + shared.window.bias  # [B, 4, D]
    features = features * 0.5 * (1 + torch.erf(features / math.sqrt(2)))
    logits = features @ shared.fc.weight.flatten()
    logits = logits - logits.mean(1, keepdim=True)
    assert torch.allclose(shared(images), 1 / (1 + (-logits).exp()), atol=1e-5) and logits.std() > 0.1


def test_t_is_in_float32_beside_an_encoder_in_bfloat16(monkeypatch):
    net, state, _ = fresh_state(**DEFAULT)
    tokens, psi = torch.randn(6, 16, 4, 4), torch.randn(len(state.psi.params))
    monkeypatch.setattr(mlo_mae, "masking_input", lambda *how: tokens)
    low = dataclasses.replace(net, cfg=dataclasses.replace(net.cfg, precision="bf16"))
    plain, found = (mlo_mae.masking_probability(some, psi, None, None) for some in (net, low))
    assert torch.equal(found, plain) and found.dtype == torch.float32 and found.std() > 0.01


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


@pytest.mark.parametrize("hidden", [1, 2])
def test_masks_are_drawn_by_their_odds_without_replacement(monkeypatch, hidden):
    net, _ = build(Config(patch_size=8, mask_ratio=hidden / 4, mask_choice="odds", mask_start=0.0), 16, 3, 8)
    logits = torch.tensor([2.0, -1.0, 0.5, -0.5])
    monkeypatch.setattr(mlo_mae, "masking_probability", lambda _net, _psi, x, _params: logits.sigmoid().expand(len(x), -1))
    images = torch.zeros(40_000, 3, 16, 16)
    prob, _, _, mask = mlo_mae.draw_masks(net, None, images, None, 0, 1)
    assert torch.equal(prob[7], logits.sigmoid())  # the noise has no part in L1's weights
    odds = logits.exp().tolist()
    total = sum(odds)
    if hidden == 1:
        expected = {(i,): odds[i] / total for i in range(4)}
    else:  # one first and the other of the rest, or the reverse
        pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
        expected = {(i, j): odds[i] * odds[j] / total * sum(1 / (total - odds[k]) for k in (i, j)) for i, j in pairs}
    assert sum(expected.values()) == pytest.approx(1)
    for patches, share in expected.items():
        found = mask[:, list(patches)].all(1).double().mean().item()
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / len(images)), patches
    assert torch.equal(mask, mlo_mae.draw_masks(net, None, images, None, 0, 1)[3])
    assert not torch.equal(mask, mlo_mae.draw_masks(net, None, images, None, 0, 2)[3])


def test_as_published_the_highest_p_are_hidden(monkeypatch):
    cfg = Config(patch_size=8, mask_ratio=0.5, masking_network="mlp", mask_choice="highest", mask_start=0.0)
    net, _ = build(cfg, 16, 3, 8)
    prob = torch.tensor([[0.1, 0.9, 0.5, 0.6], [0.51, 0.5, 0.49, 0.52]])
    monkeypatch.setattr(mlo_mae, "masking_probability", lambda *arguments: prob)
    mask = mlo_mae.draw_masks(net, None, torch.zeros(2, 3, 16, 16), None, 0, 1)[3]
    assert mask.tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]]


def test_a_score_of_a_baseline_hides_the_highest_and_p_is_one():
    net, (_, _, psi) = build(Config(patch_size=8, mask_ratio=0.5, mask_start=0.0), 16, 3, 8)
    scores, seen = torch.tensor([[0.1, 0.9, 0.5, 0.6], [0.51, 0.5, 0.49, 0.52]]), []

    def score(images, known, generator, progress):
        seen.append((images, torch.rand(3, generator=generator), progress))
        return scores

    net.score = score
    images = torch.zeros(2, 3, 16, 16)
    for key in (1, 1, 2):
        prob, _, _, mask = mlo_mae.draw_masks(net, psi, images, None, 0, key, progress=0.3)
        assert mask.tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]] and prob.eq(1).all()
    assert all(given is images and progress == 0.3 for given, _, progress in seen)
    draws = [draw for _, draw, _ in seen]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])  # a function of the keys


@pytest.mark.parametrize("masking_input", ["pixels", "embeddings"])
@pytest.mark.parametrize("image_size, patch", [(32, 4), (96, 8)])
def test_first_masks_are_neither_saturated_nor_the_same(masking_input, image_size, patch):
    cfg = Config(masking_network="mlp", masking_input=masking_input, mask_choice="highest", patch_size=patch)
    net, params = build(cfg, image_size, 3, 8)
    state = mlo_mae.State(0, *(mlo_mae.fresh_level(vector, "cpu") for vector in params))
    torch.manual_seed(0)
    images = F.interpolate(torch.randn(64, 3, 6, 6), size=image_size, mode="bilinear")  # smooth, as photographs are
    prob, _, _, mask = mlo_mae.masks_now(net, state, images, progress=1.0)
    statistics = mask_statistics(prob, mask, None, None, patch)
    assert 0.3 < statistics["p_mean"] < 0.7 and 0.05 < statistics["p_std"] < 0.3
    assert statistics["p_entropy"] > 0.7
    assert statistics["mask_overlap"] < 0.93


# -------------------------------------------------------------------------------------------------- steps and loop


@pytest.mark.parametrize(
    "network, layers, biases",
    [("mlp", ("fc1", "fc2"), ("fc1", "fc2")), ("shared", ("window", "fc"), ("window",)), ("tokens", ("fc",), ())],
)
def test_one_step_moves_a_unit_of_t_by_mask_lr_at_most(network, layers, biases):
    net, (_, _, psi) = build(Config(masking_network=network), 32, 3, 8)
    scale = inverse_fan_in(net.masking)
    after = mlo_mae.adamw(mlo_mae.fresh_level(psi, "cpu"), torch.randn(len(psi)), mlo_mae.Rates(0.02 * scale, 0 * psi))
    moved = unflatten(net.masking, after.params - psi)
    for name in layers:  # inputs of size 1
        assert moved[name + ".weight"].abs().flatten(1).sum(1).max() == pytest.approx(0.02, rel=1e-3)
    for name in biases:
        assert moved[name + ".bias"].abs().max() == pytest.approx(0.02, rel=1e-3)


def test_gradients_do_not_depend_on_how_threads_are_scheduled():
    cfg = Config(masking="random")
    net, (theta, _, _) = build(cfg, 32, 3, 8)
    images, rates = torch.randn(cfg.batch_size, 3, 32, 32), mlo_mae.Rates(1e-3, torch.zeros(len(theta)))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = [mlo_mae.level1_step(net, mlo_mae.fresh_level(theta, "cpu"), None, images, rates, 0)[1] for _ in range(12)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(step.gradient, found[0].gradient) for step in found)


def fresh_state(**settings):
    """Networks and state at the start of a tiny run, and the arguments of `outer_iteration` that follow."""
    cfg = dataclasses.replace(TINY, **settings)
    net, params = build(cfg, 16, 3, 5)
    state = mlo_mae.State(0, *(mlo_mae.fresh_level(vector, "cpu") for vector in params))
    decay = [weight_decays(modules, cfg.weight_decay) for modules in mlo_mae.modules_of(net).values()]
    return net, state, (noise_batches(cfg), 4, decay, inverse_fan_in(net.masking))


def run_through(net, state, rest, total=8):
    """States before the first iteration and after each of `total`, with what `train` does in between, and their losses."""
    streams, _, *constant = rest
    states, rows = [state], []
    for _ in range(total):
        state = mlo_mae.with_kept_eyes(net, state, total)
        state, losses = mlo_mae.outer_iteration(net, state, streams, total, *constant)
        states.append(state)
        rows.append(losses)
    return states, rows


def level1_rates(monkeypatch):
    """The learning rate of each level-1 step that is made from here on, as it is made."""
    rates, real = [], mlo_mae.level1_step

    def watched(net, theta, psi, images, rate, *keys, **how):
        rates.append(rate.lr)
        return real(net, theta, psi, images, rate, *keys, **how)

    monkeypatch.setattr(mlo_mae, "level1_step", watched)
    return rates


def test_every_step_draws_masks_of_its_own(monkeypatch):
    keys, real = [], mlo_mae.level1_step

    def watched(net, theta, psi, images, rates, *key, **how):
        keys.append(key)
        return real(net, theta, psi, images, rates, *key, **how)

    monkeypatch.setattr(mlo_mae, "level1_step", watched)
    net, state, rest = fresh_state(**DEFAULT | THREE_PARTS)
    run_through(net, state, rest)
    assert keys == [(net.cfg.seed, MASKS, n) for n in range(8 * net.cfg.level1_steps)]


THREE_PARTS = {"mask_start": 0.25, "mask_until": 0.5, "mask_batches": 2, "warmup": 0.25}  # of 8 iterations: 2, 2, 4


@pytest.mark.parametrize("network", ["tokens", "shared", "mlp"])
def test_from_its_end_on_t_and_what_it_reads_stay_as_they_are(network):
    settings = DEFAULT | THREE_PARTS | {"masking_network": network, "masking_input": "embeddings", "mask_restart": True}
    net, state, rest = fresh_state(**settings)
    states, rows = run_through(net, state, rest)
    assert [state.psi.t for state in states] == [0, 0, 0, 1, 2, 2, 2, 2, 2] == [state.head.t for state in states]
    assert [state.theta.t for state in states] == list(range(0, 17, 2))
    assert [state.eyes is None for state in states] == [True] * 5 + [False] * 4
    labelled = ["level3_loss" in row for row in rows]
    assert labelled == [False] * 2 + [True] * 2 + [False] * 4
    images, before = torch.randn(4, 3, 16, 16), states[4]
    kept = mlo_mae.eyes_of(net, before)
    assert torch.equal(kept, before.theta.params[: net.encoder_size])
    p = mlo_mae.masking_probability(net, before.psi.params, images, kept)
    assert p.std(1).min() > 1e-5  # T has learned something
    for state in states[5:]:
        assert torch.equal(state.eyes, kept) and all(map(torch.equal, state.psi[:3], before.psi[:3]))
        assert all(map(torch.equal, state.head[:3], before.head[:3]))
        assert torch.equal(mlo_mae.masking_probability(net, state.psi.params, images, mlo_mae.eyes_of(net, state)), p)
        assert not torch.equal(state.theta.params[: net.encoder_size], kept)  # E goes on


@pytest.mark.parametrize("choice, tolerance", [("random", 3e-4), ("odds", 1e-6)])
def test_a_t_that_stays_looks_at_each_whole_image_once(choice, tolerance):
    """Where p chooses the masks, two that are near 1 must not become one."""
    net, state, _ = fresh_state(**DEFAULT | {"mask_choice": choice})
    psi = torch.randn(len(state.psi.params), generator=torch.Generator().manual_seed(1))
    state = state._replace(psi=state.psi._replace(params=psi), eyes=state.theta.params[: net.encoder_size] + 0.1)
    pixels = torch.randint(0, 256, (300, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = data.Images(pixels, torch.arange(300) % 5, (0.5,) * 3, (0.25,) * 3)
    maps = mlo_mae.weight_maps(net, state, images)
    p = mlo_mae.masking_probability(net, psi, images.pick(torch.arange(300)).images, state.eyes)
    assert p.std(1).min() > 0.01 and maps.images.shape == (300, 1, 4, 4)
    (found,) = next(zip(maps.ordered(300)))
    assert (F.avg_pool2d(found.images, 4).flatten(1) - p).abs().max() < tolerance


@pytest.mark.parametrize("masking, progress", [("random", 1.0), ("learned", 0.1), ("learned", 0.9)])
def test_what_a_crop_has_beside_its_image_does_not_count(masking, progress):
    net, state, rest = fresh_state(**DEFAULT | {"masking": masking, "mask_start": 0.5})
    white = data.Images(torch.full((12, 3, 16, 16), 255, dtype=torch.uint8), torch.arange(12), (0.0,) * 3, (1.0,) * 3)
    batch = next(white.stream(12, 3))  # what is beside them is black
    covered = next(mlo_mae.moved_weights(mlo_mae.coverage(white).stream(12, 3), 4))
    assert torch.equal(covered, F.avg_pool2d(batch.images[:, 0], 4).flatten(1)) and 0 < covered.mean() < 1
    images, how = torch.randn(12, 3, 16, 16), {"progress": progress, "covered": covered}
    _, step, loss, _ = mlo_mae.level1_step(
        net, state.theta, state.psi.params, images, mlo_mae.Rates(0.0, rest[2][0]), 0, **how
    )
    p = mlo_mae.masking_probability(net, state.psi.params, images, mlo_mae.eyes_of(net, state)) if progress > 0.5 else 1.0
    p = 1.0 if masking == "random" else p
    errors = mlo_mae.patch_errors(net, *state.theta.params.tensor_split([net.encoder_size]), step)
    assert loss.item() == pytest.approx(mlo_mae.level1_loss(p * covered, step.mask, errors).item(), rel=1e-5)


def test_a_run_counts_nothing_beside_its_images(tmp_path, monkeypatch):
    """From the first step to the last: MAE, while T learns, and with maps of p."""
    kinds, real = [], mlo_mae.level1_step

    def watching(net, theta, psi, images, *given, **how):
        black = images.amin()  # which no image has, so that it lies beside them
        covered = F.avg_pool2d((images > black + 1e-3).all(1).float(), 8).flatten(1)
        assert 0 < covered.mean() < 1
        if "covered" in how:
            assert torch.equal(how["covered"], covered)
        else:
            assert torch.equal(how["known"] > 0, covered > 0) and (how["known"] <= covered).all()
        kinds.append("covered" in how)
        return real(net, theta, psi, images, *given, **how)

    monkeypatch.setattr(mlo_mae, "level1_step", watching)
    pixels = np.random.default_rng(0).integers(100, 256, (400, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(400) % 4
    np.savez(
        tmp_path / "grey.npz",
        train_images=pixels[:320],
        train_labels=labels[:320],
        test_images=pixels[320:],
        test_labels=labels[320:],
    )
    small = {"data": str(tmp_path / "grey.npz"), "patch_size": 8, "width": 8, "depth": 1, "heads": 2, "decoder_width": 8}
    steps = {
        "epochs": 2,
        "level1_steps": 2,
        "mask_batches": 2,
        "labelled_batch_size": 32,
        "mask_start": 0.2,
        "mask_until": 0.6,
    }
    cfg = Config(**small, **steps, decoder_heads=2, mask_wait=0)
    mlo_mae.train(cfg, None)
    assert kinds[0] and not kinds[-1] and kinds == sorted(kinds, reverse=True)
    kinds.clear()
    mlo_mae.train(dataclasses.replace(cfg, masking="random"), None)
    assert kinds and all(kinds)


def test_weights_that_are_known_weigh_in_place_of_t():
    net, state, rest = fresh_state(**DEFAULT)
    state = state._replace(psi=state.psi._replace(params=torch.full_like(state.psi.params, float("nan"))))  # T is not asked
    images, rates = torch.randn(12, 3, 16, 16), mlo_mae.Rates(1e-2, rest[2][0])
    known = torch.rand(12, 16)
    prob, keep, restore, mask = mlo_mae.draw_masks(net, state.psi.params, images, state.theta.params, 0, 1, known=known)
    assert torch.equal(prob, known)
    _, step, loss, _ = mlo_mae.level1_step(net, state.theta, state.psi.params, images, rates, 0, 1, known=known)
    assert torch.equal(step.mask, mask)  # drawn as ever
    split = state.theta.params.tensor_split([net.encoder_size])
    errors = mlo_mae.patch_errors(net, *split, step)
    assert loss.item() == pytest.approx(mlo_mae.level1_loss(known, mask, errors).item(), rel=1e-5)
    net.cfg = dataclasses.replace(net.cfg, mask_choice="odds")
    sure = torch.zeros(12, 16)
    sure[:, :12] = 1.0
    hidden = mlo_mae.draw_masks(net, state.psi.params, images, state.theta.params, 0, 1, known=sure)[3]
    assert torch.equal(hidden, sure)  # three quarters are hidden: those
    net.cfg, known = dataclasses.replace(net.cfg, mask_until=0.5), iter([known] * 2)
    again, _ = mlo_mae.outer_iteration(net, state._replace(iteration=3), rest[0]._replace(known=known), 4, *rest[2:])
    assert next(known, None) is None and again.theta.params.isfinite().all()


def test_what_t_reads_is_kept_once_at_the_end_of_its_part_or_later():
    net, state, _ = fresh_state(**DEFAULT | THREE_PARTS)
    for iteration in (0, 2, 3):
        assert mlo_mae.with_kept_eyes(net, state._replace(iteration=iteration), 8).eyes is None
    for iteration in (4, 5, 7):  # later than the first chance: a run that was resumed
        kept = mlo_mae.with_kept_eyes(net, state._replace(iteration=iteration), 8)
        assert torch.equal(kept.eyes, state.theta.params[: net.encoder_size]) and kept.iteration == iteration
        assert kept.theta is state.theta and kept.psi is state.psi and kept.head is state.head
        moved = kept._replace(theta=mlo_mae.fresh_level(state.theta.params + 1, "cpu"))
        assert mlo_mae.with_kept_eyes(net, moved, 8) is moved
    net.cfg = dataclasses.replace(net.cfg, masking="random")
    assert mlo_mae.with_kept_eyes(net, state._replace(iteration=7), 8).eyes is None


@pytest.mark.parametrize("form", ["exact", "first-order", "unrolled"])
def test_t_waits_for_a_head_better_than_chance_and_no_longer_than_asked(monkeypatch, form):
    """Chances are made up. Of five looks three put off T's part, of two steps; the last is not judged, and moves T."""
    settings = DEFAULT | THREE_PARTS | {"mask_wait": 0.375, "hypergradient": form, "mask_restart": True}
    settings |= {"mask_batches": 1} if form == "unrolled" else {}
    net, state, rest = fresh_state(**settings)
    chances, told, rates = iter([0.0, 9.0, 0.0, 0.0]), [], level1_rates(monkeypatch)

    def chance(cfg, labels):
        told.append(labels.tolist())
        return next(chances)

    monkeypatch.setattr(mlo_mae, "chance_loss", chance)
    states, rows = run_through(net, state, rest)
    assert [state.waited for state in states] == [0, 0, 0, 1, 1, 2, 3, 3, 3]
    assert [state.psi.t for state in states] == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert [state.head.t for state in states] == [0, 0, 0, 1, 2, 3, 4, 5, 5]  # it is solved at every look
    assert ["level3_loss" in row for row in rows] == [2 <= n < 7 for n in range(8)]
    assert ["hypergradient_norm" in row for row in rows] == [n in (3, 6) for n in range(8)]
    assert [state.eyes is None for state in states] == [True] * 8 + [False]
    for number in (2, 4, 5):  # T did not move, nor did its moments
        assert states[number + 1].psi is states[number].psi
    third = noise_batches(net.cfg).level3  # each look has labelled images of its own, and their own shares
    assert told == [next(third).labels.tolist() for _ in range(4)]  # the fifth is not judged
    lr, steps = TINY.lr, net.cfg.level1_steps  # the learning rate starts again where T's part really ends
    whole = [lr * schedule(n, 8 * steps, 0.25 * 8 * steps) for n in range(7 * steps)]
    assert rates == pytest.approx(whole + [lr * schedule(n, steps, 0.25 * steps) for n in range(steps)])


def test_a_t_that_has_waited_is_moved_as_far_as_one_that_has_not(monkeypatch):
    net, state, rest = fresh_state(**DEFAULT | THREE_PARTS | {"mask_wait": 0.5})
    monkeypatch.setattr(mlo_mae, "chance_loss", lambda cfg, labels: 99.0)
    relative = []
    monkeypatch.setattr(mlo_mae, "schedule", lambda *given: relative.append(given) or schedule(*given))
    run_through(net, state, rest)
    prompt = [given[:2] for given in relative if given[1] <= 4]  # T's part is of two steps: of the head, of T, in turn
    relative.clear()
    net, state, rest = fresh_state(**DEFAULT | THREE_PARTS | {"mask_wait": 0.5})
    chances = iter([0, 0, 99, 99])
    monkeypatch.setattr(mlo_mae, "chance_loss", lambda cfg, labels: next(chances))
    run_through(net, state, rest)
    late = [given[:2] for given in relative if given[1] <= 4]
    assert prompt[::2] == prompt[1::2] == [(0, 2), (1, 2)]
    assert late[1::2] == [(0, 2)] * 3 + [(1, 2)] and late[::2] == [(0, 2), (1, 3), (2, 4), (3, 4)]  # the head goes on


@pytest.mark.parametrize("others", [True, False])
def test_whether_t_waits_is_what_the_processes_agree_on(monkeypatch, others):
    """Not what each has found: near chance, two sums of the same numbers may differ."""
    net, state, rest = fresh_state(**DEFAULT | THREE_PARTS | {"mask_wait": 0.5})
    monkeypatch.setattr(mlo_mae, "chance_loss", lambda cfg, labels: 99.0 if others else 0.0)
    monkeypatch.setattr(mlo_mae, "agree", lambda *found: [others])
    states, _ = run_through(net, state, rest, total=4)
    assert [state.waited for state in states] == ([0, 0, 1, 2, 2] if others else [0] * 5)


@pytest.mark.parametrize("settings, watched_steps", [({"mask_batches": 2}, 1), ({"mask_batches": 1, "unroll": "full"}, 4)])
def test_the_theta_of_steps_that_are_differentiated_is_there_when_t_is_told(monkeypatch, settings, watched_steps):
    """The steps before them are made in place, and all where T does not learn; the state that came in is whole."""
    settings |= {"level1_steps": 4, "mask_start": 0.5, "mask_wait": 0.0}
    net, state, rest = fresh_state(**DEFAULT | settings)
    seen, real = [], mlo_mae.stepped

    def watched(level, gradient, rates, in_place=False):
        seen.append(in_place)
        return real(level, gradient, rates, in_place)

    def looked_at(net, theta, psi, head, labelled, steps):
        assert len(steps) == watched_steps
        for step, following in zip(steps, [*(step.theta for step in steps[1:]), theta]):
            after = mlo_mae.adamw(step.theta, step.gradient, step.rates)
            assert torch.allclose(after.params, following.params, rtol=1e-6, atol=1e-7)
        return mlo_mae.exact(net, theta, psi, head, labelled, steps)

    monkeypatch.setattr(mlo_mae, "stepped", watched)
    before = [x.clone() for x in state.theta[:3]]
    mlo_mae.outer_iteration(net, state, *rest, looked_at)
    assert all(map(torch.equal, before, state.theta[:3])) and seen == [True] * 4
    seen.clear()
    mlo_mae.outer_iteration(net, state._replace(iteration=2), *rest, looked_at)
    assert all(map(torch.equal, before, state.theta[:3]))
    assert seen == [True] * (4 - watched_steps) + [False] * watched_steps


def test_the_data_are_those_of_the_flags(monkeypatch):
    asked = {}
    monkeypatch.setattr(data, "load", lambda name, folder, **how: asked.update(how, name=name, folder=folder))
    own = {"image_size": 24, "val_fraction": 0.3, "seed": 5, "skip_corrupt": True, "workers": 3, "flip": False, "crop": False}
    cfg = Config(data="x", data_dir="there", images=7, masking="random", **own)
    mlo_mae.load_data(cfg, torch.device("cpu"))
    assert asked == own | {"name": "x", "folder": "there", "limit": 7, "classes": False, "device": torch.device("cpu")}


def test_first_weights_are_maes():
    """Xavier's for all layers, the embedding's as one of its patches; tokens of deviation 0.02."""
    net, (theta, *_) = build(Config(), 32, 3, 8)
    found = [
        unflatten(module, part) for module, part in zip((net.encoder, net.decoder), theta.tensor_split([net.encoder_size]))
    ]
    names = [name for part in found for name in part]
    assert len(names) > 60 and sum(name.endswith("token") for name in names) == 2
    for name, weight in ((name, weight) for part in found for name, weight in part.items()):
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        elif name.endswith("token"):
            assert 0.01 < weight.std() < 0.03, name
        elif name.endswith("weight"):
            flat = weight.flatten(1)
            bound = math.sqrt(6 / sum(flat.shape))
            assert 0.95 * bound < flat.abs().max() <= bound * (1 + 1e-6), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="steps are recorded on a GPU")
@pytest.mark.parametrize(
    "changes, launched",
    [({}, 1), ({"graphs": "off"}, 0), ({"accumulate": 2}, 0), ({"checkpoint_activations": True}, 0)],
    ids=str,
)
def test_steps_are_recorded_where_asked(sides, monkeypatch, changes, launched):
    made = []
    monkeypatch.setattr(mlo_mae, "in_one_launch", lambda *given: made.append(given) or None)
    mlo_mae.train(dataclasses.replace(TINY, data=str(sides), epochs=1, device="cuda", **changes), None)
    assert len(made) == launched


def test_automatic_precision_is_bfloat16_on_a_gpu_that_has_it(monkeypatch):
    cpu, gpu, products = torch.device("cpu"), torch.device("cuda"), []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", products.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)  # put back in the end
    for name, device, able, expected in (
        ("auto", cpu, True, "fp32"),
        ("auto", gpu, True, "bf16"),
        ("auto", gpu, False, "fp32"),
        ("bf16", cpu, False, "bf16"),
        ("bf16", gpu, True, "bf16"),
        ("fp32", gpu, True, "fp32"),
    ):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, able=able: able or emulated)
        assert mlo_mae.with_precision(Config(precision=name), device) == Config(precision=expected)
        assert device == cpu or torch.backends.cudnn.allow_tf32 == (expected == "bf16")
    assert products == ["high", "highest", "high", "highest"]  # TF32 beside bfloat16 alone
    assert {name: Config(**PRESETS[name]).precision for name in PRESETS} == {"shapes": "fp32"} | dict.fromkeys(
        ("cifar10", "cifar100", "imagenet", "imagenet-large"), "auto"
    )


@pytest.mark.usefixtures("bare_runs")
def test_a_runs_settings_have_the_precision_that_it_had(sides, tmp_path):
    """So that it cannot be continued in another."""
    words = arguments(sides, tmp_path / "run", "--precision", "auto", "--epochs", 2)
    assert mlo_mae.main(words) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["precision"] == "fp32"


def in_launches(settings, record, device="cpu", total=8):
    """States and losses of a run whose steps are recorded, and of one whose steps are not."""
    runs = []
    for recorded in (True, False):
        net, state, (streams, _, decay, mask_rate) = fresh_state(**settings)
        decay, mask_rate = [vector.to(device) for vector in decay], mask_rate.to(device)
        state = state._replace(**{name: mlo_mae.fresh_level(getattr(state, name).params, device) for name in LEVELS})
        levels = ((data.Batch(*(tensor.to(device) for tensor in batch)) for batch in stream) for stream in streams[:3])
        if recorded:
            net.replay = mlo_mae.in_one_launch(net, decay[0], **record)
        runs.append(run_through(net, state, (mlo_mae.Streams(*levels), 4, decay, mask_rate), total))
    return runs


LEVELS = ("theta", "head", "psi")
RECORDED = [{}, {"mask_choice": "odds"}, {"masking": "random"}, {"level1_steps": 1}, {"unroll": "full", "mask_batches": 1}]


def same_run(runs, rtol):
    (states, rows), (judges, expected) = runs
    for state, judge in zip(states, judges):  # all of them, so that none was written over since
        for level, truth in zip(state[1:4], judge[1:4]):
            assert level.t == truth.t
            assert all(torch.allclose(x, y, rtol=rtol, atol=rtol / 10) for x, y in zip(level[:3], truth[:3]))
        assert (state.eyes is None) == (judge.eyes is None)
        assert state.eyes is None or torch.allclose(state.eyes, judge.eyes, rtol=rtol, atol=rtol / 10)
    for row, truth in zip(rows, expected):
        assert row.keys() == truth.keys() and all(torch.allclose(row[name], truth[name], rtol=rtol) for name in row)


@pytest.mark.parametrize("settings", RECORDED, ids=str)
def test_steps_in_one_launch_are_the_same_run(settings, monkeypatch):
    """To the bit, where learning rates are float32 as they are: they, and counts of steps, change from step to step. Three
    parts of a run, in one of which T waits and moves in turn."""
    monkeypatch.setattr(mlo_mae, "schedule", lambda step, *others: 2.0 ** -(step % 5))
    chances, learned = itertools.cycle([0.0, 99.0]), settings.get("masking") != "random"
    monkeypatch.setattr(mlo_mae, "chance_loss", lambda cfg, labels: next(chances))
    settings = DEFAULT | THREE_PARTS | {"level1_steps": 3, "mask_wait": 0.5, "lr": 2.0**-9} | settings
    for record in (as_recorded, lambda function: None):  # the latter: nothing would be gained
        runs = in_launches(settings, {"record": record})
        same_run(runs, 0)
        assert all((states[-1].psi.t, states[-1].waited) == (2 * learned, 2 * learned) for states, _ in runs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU")
@pytest.mark.parametrize("settings", RECORDED, ids=str)
def test_a_gpus_steps_in_one_launch_are_the_same_run(settings, capsys, monkeypatch):
    monkeypatch.setattr(graphs, "GAIN", math.inf)  # recorded, even where little is gained
    monkeypatch.setattr(mlo_mae, "schedule", lambda step, *others: 2.0 ** -(step % 5))  # rates that float32 holds
    chances = itertools.cycle([0.0, 99.0])
    monkeypatch.setattr(mlo_mae, "chance_loss", lambda cfg, labels: next(chances))
    settings, made = DEFAULT | THREE_PARTS | {"level1_steps": 3, "mask_wait": 0.5, "lr": 2.0**-9} | settings, []
    record = {"record": lambda function: made.append(graphs.recorded(function)) or made[-1]}
    same_run(in_launches(settings, record, "cuda"), 1e-2)
    assert len(made) == 1 and made[0] and capsys.readouterr().err == ""


def test_what_a_step_goes_by_is_recorded_anew():
    """A baseline's term comes after a trial of a step; with and without kernels are measured in turn."""
    net, state, (streams, _, decay, _) = fresh_state(**DEFAULT | {"masking": "random"})
    images, rates, made, losses = next(streams.level1).images, mlo_mae.Rates(1e-3, decay[0]), [], []
    recording = mlo_mae.in_one_launch(net, decay[0], record=lambda f: made.append(1) or as_recorded(f))

    def term(features):
        return features.square().mean()

    for net.penalty, backend in ((None, "auto"), (term, "auto"), (term, "reference"), (None, "reference")):
        with kernels.use(backend):
            for net.replay in (recording, None, recording):
                step = mlo_mae.copied(state.theta), state.psi.params, images, rates, 0
                losses.append(mlo_mae.level1_step(net, *step, in_place=True)[2].item())
        assert losses[-3] == losses[-1] == pytest.approx(losses[-2], rel=1e-6)
    assert len(made) == 4 and losses[3] > losses[0] + 0.1


class OnOneDevice(TorchDispatchMode):
    """Fails where an operator sees, makes or asks for something off the device "meta", where nothing has a value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        absent = function is torch.ops.aten._fused_adamw_.tensor_lr  # on "meta"; in place
        result = None if absent else function(*args, **(kwargs or {}))
        found = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.is_meta for tensor in found), function
        return result


def test_a_step_in_one_launch_waits_for_nothing_and_uploads_nothing(monkeypatch):
    """Which a CUDA graph must not: with tensors that have no value, whatever looks at one fails."""
    monkeypatch.setattr(mlo_mae, "autocast", lambda *given: contextlib.nullcontext())  # there is none for such tensors
    net, state, (streams, _, decay, _) = fresh_state(**DEFAULT)
    how, seen = {"record": lambda function: (function, function())}, []
    images, rates = next(streams.level1).images, mlo_mae.Rates(1e-3, decay[0])
    net.replay = lambda step, prob: seen.append((step, prob)) or (step.theta, None, None, None)
    mlo_mae.level1_step(net, state.theta, state.psi.params, images, rates, 0, in_place=True)
    ((step, prob),) = seen
    mlo_mae.level1_update(net, step._replace(theta=mlo_mae.copied(step.theta)), prob, in_place=True)  # looks up the decays
    step = step._replace(**{name: getattr(step, name).to("meta") for name in ("images", "keep", "restore", "mask")})
    step = step._replace(theta=mlo_mae.Level(*(vector.to("meta") for vector in state.theta[:3]), 0))
    prob = prob.to("meta")
    with OnOneDevice():
        theta, gradient, loss, error = mlo_mae.in_one_launch(net, decay[0], **how)(step, prob)
    assert theta.t == 1 and gradient is None and loss.is_meta and error.shape == ()


def test_a_look_that_does_not_move_t_costs_no_backward_pass(monkeypatch):
    net, state, rest = fresh_state(**DEFAULT | THREE_PARTS | {"mask_wait": 0.5})  # of 4 iterations T's part is the second
    chances, passes = iter([0.0, 99.0]), []
    monkeypatch.setattr(mlo_mae, "chance_loss", lambda cfg, labels: next(chances))
    autograd, forward = torch.autograd.grad, mlo_mae.directional_errors
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **more: passes.append("back") or autograd(*given, **more))
    monkeypatch.setattr(mlo_mae, "directional_errors", lambda *given: passes.append("jvp") or forward(*given))
    counts = []
    for _ in range(4):
        passes.clear()
        state, _ = mlo_mae.outer_iteration(net, state, *rest)
        counts.append((passes.count("back"), passes.count("jvp")))
    steps = net.cfg.level1_steps
    assert counts == [(steps, 0), (steps, 0), (steps + 3, 1), (steps, 0)]  # the third's: through E, AdamW and T


@pytest.mark.parametrize("labels", [[0, 0, 0, 2, 2, 4], [1, 1, 1], list(range(7)), [0, 5]])
def test_chance_is_what_the_classes_shares_alone_give(labels):
    """The least loss over constant outputs, found by descent."""
    labels = torch.tensor(labels)
    for level2, loss in (("ridge", lambda z: (z - F.one_hot(labels, 8)).square().sum(1).mean()), ("steps", None)):
        scores = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([scores], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def closure():
            optimizer.zero_grad()
            value = loss(scores) if loss else F.cross_entropy(scores.expand(len(labels), -1), labels)
            value.backward()
            return value

        optimizer.step(closure)
        chance = mlo_mae.chance_loss(Config(level2=level2), labels)
        assert chance == pytest.approx(closure().item(), abs=1e-4)


@pytest.mark.usefixtures("drawn_once")
def test_a_run_draws_each_level_from_a_stream_of_its_own_and_at_its_own_rates(monkeypatch):
    """The numbers of the streams are part of every result, and so are the decays, which a run looks up itself."""
    small = {"patch_size": 8, "width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_heads": 2, "masking_blocks": 1}
    cfg = Config(
        **small, images=200, epochs=1, batch_size=20, labelled_batch_size=32, level1_steps=2, mask_start=0, device="cpu"
    )
    seen, (step, labelled, update) = {3: [], 4: [], 5: []}, (mlo_mae.level1_step, mlo_mae.labelled_of, mlo_mae.adamw)
    decays = {"level 1": [], "head": [], "T": []}

    def level1_step(net, theta, psi, images, rates, *rest, **how):
        seen[3].append(images)
        decays["level 1"].append(rates.decay)
        return step(net, theta, psi, images, rates, *rest, **how)

    def labelled_of(cfg, level2, level3, rates, *rest):
        seen[4].append(level2.images)
        seen[5].append(level3.images)
        decays["head"].append(rates.decay)
        return labelled(cfg, level2, level3, rates, *rest)

    def adamw(level, gradient, rates, *rest):
        if len(level.params) == cfg.width:
            decays["T"].append(rates)
        return update(level, gradient, rates, *rest)

    for name, spy in (("level1_step", level1_step), ("labelled_of", labelled_of), ("adamw", adamw)):
        monkeypatch.setattr(mlo_mae, name, spy)
    net, _, splits = mlo_mae.train(cfg, None)
    for purpose, split, size in zip(seen, (splits.train, splits.train, splits.val), (20, 32, 32)):
        stream = split.stream(size, torch_generator(cfg.seed, purpose).initial_seed())
        assert len(seen[purpose]) >= 2 and all(torch.equal(images, next(stream).images) for images in seen[purpose])
    expected = {"level 1": [net.encoder, net.decoder], "head": [net.head]}
    for name, modules in expected.items():
        assert all(torch.equal(decay, weight_decays(modules, 0.05)) for decay in decays[name]) and decays[name]
    for rates in decays["T"]:  # (8) has E's own beside it
        assert torch.equal(rates.decay, weight_decays([net.masking], 0.05)) and rates.lr.max() <= cfg.mask_lr / cfg.width
    assert decays["T"] and max(rates.lr.max() for rates in decays["T"]) > 0.5 * cfg.mask_lr / cfg.width


@pytest.mark.parametrize("network", ["tokens", "shared", "mlp"])
def test_rates_of_are_those_of_each_levels_own_parameters(network):
    net, params = build(dataclasses.replace(TINY, weight_decay=0.3, masking_network=network), 16, 3, 5)
    decay, mask_rate = mlo_mae.rates_of(net, torch.device("cpu"))
    modules = [net.encoder, net.decoder], [net.head], [net.masking]
    for vector, found, some in zip(params, decay, modules):
        assert torch.equal(found, weight_decays(list(some), 0.3)) and len(found) == len(vector)
        assert found.max() == torch.tensor(0.3)
    assert torch.equal(mask_rate, inverse_fan_in(net.masking)) and mask_rate.min() < 0.1


def test_level_1s_learning_rate_starts_again_where_asked(monkeypatch):
    """As in a run of the remaining iterations, warm-up and all."""
    rates = level1_rates(monkeypatch)
    run_through(*fresh_state(**DEFAULT | THREE_PARTS | {"mask_restart": True}))
    lr, steps = TINY.lr, 8
    whole = [lr * schedule(n, 2 * steps, 0.25 * 2 * steps) for n in range(2 * steps)]
    anew = [lr * schedule(n, steps, 0.25 * steps) for n in range(steps)]
    assert rates == pytest.approx(whole[:steps] + anew) and rates[-1] < 0.1 * lr
    rates.clear()
    run_through(*fresh_state(**DEFAULT | THREE_PARTS | {"mask_restart": False}))
    assert rates == pytest.approx(whole)


def test_ts_learning_rate_has_its_own_part_of_the_run():
    net, state, rest = fresh_state(**DEFAULT | THREE_PARTS | {"mask_until": 1.0, "warmup": 0.0, "weight_decay": 0.0})
    states, _ = run_through(net, state, rest)
    for number in range(2, 8):
        level, before = states[number + 1].psi, states[number].psi
        move = mlo_mae.adamw(before, (level.mu - 0.9 * before.mu) / 0.1, mlo_mae.Rates(1.0, 0 * level.mu, 1e-18))
        wanted = (move.params - before.params) * TINY.mask_lr * inverse_fan_in(net.masking) * schedule(number - 2, 6, 0.0)
        assert torch.allclose(level.params - before.params, wanted, rtol=1e-2, atol=1e-5)


def test_the_head_and_t_have_rates_decay_and_dropout_of_their_own():
    net, state, rest = fresh_state(warmup=0.25, head_lr=0.03, weight_decay=10.0)
    cfg, state, asked = net.cfg, state._replace(iteration=2), []

    def form(*given):
        asked.append(given[4])
        return mlo_mae.exact(*given)

    after, _ = mlo_mae.outer_iteration(net, state, *rest, hypergradient=form)
    ((labelled,), share), (_, _, decay, mask_rate) = (asked, schedule(2, 4, 1)), rest
    assert labelled.rates.lr == pytest.approx(0.03 * share) and torch.equal(labelled.rates.decay, decay[1]) and decay[1].any()
    shape = cfg.head_steps, cfg.labelled_batch_size, cfg.width
    assert torch.equal(labelled.dropout, draw_dropout(cfg.dropout, shape, cfg.seed, DROPOUT, 2)) and cfg.dropout > 0
    rates = mlo_mae.Rates(cfg.mask_lr * share * mask_rate, decay[2], 1e-18)
    expected = mlo_mae.adamw(state.psi, after.psi.mu / 0.1, rates).params
    assert torch.allclose(after.psi.params, expected, rtol=1e-4, atol=1e-6) and decay[2].any()


def test_ts_step_does_not_depend_on_the_scale_of_the_hypergradient():
    """Which follows the levels below it: AdamW's eps stays out of the way."""
    net, state, rest = fresh_state(warmup=0.0)

    def scaled(*given):
        found = mlo_mae.exact(*given)
        return found._replace(hypergradient=1e-6 * found.hypergradient)

    moves = [
        mlo_mae.outer_iteration(net, state, noise_batches(net.cfg), *rest[1:], hypergradient=form)[0].psi.params
        - state.psi.params
        for form in (mlo_mae.exact, scaled)
    ]
    assert moves[0].abs().max() > 1e-3 and torch.allclose(*moves, rtol=1e-2, atol=1e-5)


def test_a_solved_head_is_that_of_the_batch_that_level_2_saw_last():
    net, state, rest = fresh_state(**DEFAULT)
    state = state._replace(head=state.head._replace(params=torch.randn(len(state.head.params))))  # of which nothing is left
    after, losses = mlo_mae.outer_iteration(net, state, *rest)
    level2 = next(noise_batches(net.cfg).level2)
    features = mlo_mae.encode(net, after.theta.params[: net.encoder_size], level2.images)
    expected = mlo_mae.solved_head(net, features, level2.labels)
    assert torch.allclose(after.head.params, expected, atol=1e-6) and after.head.t == 1
    assert not after.head.mu.any() and not after.head.nu.any()
    loss = mlo_mae.head_loss(net, expected, features, level2.labels)
    assert losses["level2_loss"].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_t_is_moved_by_the_latest_batches(batches):
    net, state, rest = fresh_state(**DEFAULT | {"mask_batches": batches, "level1_steps": 3})
    asked, drawn = [], noise_batches(net.cfg).level1

    def form(net, theta, psi, head, labelled, steps):
        asked.extend(steps)
        return mlo_mae.exact(net, theta, psi, head, labelled, steps)

    mlo_mae.outer_iteration(net, state, *rest, hypergradient=form)
    (step,) = asked
    images = [next(drawn).images for _ in range(3)]
    assert torch.equal(step.images, torch.cat(images[-batches:])) and step.theta.t == 2
    assert len(step.mask) == len(step.keep) == len(step.restore) == 12 * batches


def test_an_outer_iteration_steps_each_level_as_often_as_asked():
    net, state, rest = fresh_state(level1_steps=3, head_steps=2, mask_start=0.5)
    for iteration in range(4):
        before, (state, losses) = state, mlo_mae.outer_iteration(net, state, *rest)
        assert state.iteration == iteration + 1 and state.theta.t == 3 * (iteration + 1)
        if iteration < 2:  # T and the head wait for the second half
            assert losses.keys() == {"level1_loss", "reconstruction_error"} and losses["level1_loss"] > 0
            assert state.head is before.head and state.psi is before.psi
        else:
            names = {"level1_loss", "reconstruction_error", "level2_loss", "level3_loss", "hypergradient_norm"}
            assert losses.keys() == names and all(value > 0 for value in losses.values())
            assert (state.head.t, state.psi.t) == (2 * (iteration - 1), iteration - 1)
            assert not torch.equal(state.psi.params, before.psi.params)


def test_another_form_of_the_hypergradient_takes_the_place_of_the_configurations():
    """It is asked with what `exact` is asked with, and its answer is followed."""
    net, state, rest = fresh_state(warmup=0.0)
    streams, asked, answers = noise_batches(net.cfg), [], []
    given = [next(streams.level2), next(streams.level3)]

    def form(net, theta, psi, head, labelled, steps):
        asked.append((theta, psi, head, labelled, steps))
        found = mlo_mae.exact(net, theta, psi, head, labelled, steps)
        answers.append(-found.hypergradient)
        return found._replace(hypergradient=answers[-1])

    other, losses = mlo_mae.outer_iteration(net, state, *rest, hypergradient=form)
    ((theta, psi, head, labelled, steps),) = asked
    assert theta is other.theta and psi is state.psi.params and head is state.head
    assert [step.theta.t for step in steps] == [net.cfg.level1_steps - 1]  # --unroll last
    for found, wanted in zip(labelled[:4], (given[0].images, given[0].labels, given[1].images, given[1].labels)):
        assert torch.equal(found, wanted)
    own, same_losses = mlo_mae.outer_iteration(net, state, noise_batches(net.cfg), *rest[1:])
    assert losses == same_losses and torch.equal(own.head.params, other.head.params)
    assert torch.equal(own.psi.mu, -other.psi.mu) and own.psi.mu.any()
    (answer,) = answers
    assert torch.allclose(other.psi.mu, 0.1 * answer) and (other.psi.params - psi) @ answer < 0  # down, not up


def test_a_penalty_is_added_to_level_1_and_not_to_the_error():
    net, state, rest = fresh_state(masking="random", level1_steps=1)
    plain, without = mlo_mae.outer_iteration(net, state, *rest)
    net.penalty = lambda features: 0.5 + features.square().mean()
    moved, found = mlo_mae.outer_iteration(net, state, noise_batches(net.cfg), *rest[1:])
    assert found["level1_loss"] > without["level1_loss"] + 0.5
    assert found["reconstruction_error"] == without["reconstruction_error"] == without["level1_loss"]
    assert not torch.equal(moved.theta.mu, plain.theta.mu)


@pytest.mark.parametrize("moved", [0, 3])
@pytest.mark.parametrize(
    "level2, loss, said", [("ridge", 0.57, True), ("ridge", 0.55, False), ("steps", 0.96, True), ("steps", 0.94, False)]
)
def test_a_t_that_had_a_head_no_better_than_chance_is_said(monkeypatch, tmp_path, capsys, level2, loss, said, moved):
    """What the classes' shares alone give. A later line, of a T that stays as it is, has no L3."""
    labels = torch.tensor([0] * 6 + [1] * 2 + [3] * 2)  # 1 - 0.44, and their entropy 0.950
    cfg, said = Config(level2=level2), said or not moved  # a batch's own chance, by which T waits, may be lower
    splits = types.SimpleNamespace(
        class_names="abcd", train=range(1000), labelled=(None, types.SimpleNamespace(labels=labels))
    )
    state = types.SimpleNamespace(psi=types.SimpleNamespace(t=moved), waited=5)
    monkeypatch.setattr(mlo_mae, "train", lambda *arguments, announce: (None, state, splits))
    monkeypatch.setattr(mlo_mae, "read_metrics", lambda path: [{"level3_loss": 9.0}, {"level3_loss": loss}, {"epoch": 1}])
    quiet = types.SimpleNamespace(after_training=lambda *arguments: [], announce=None)
    monkeypatch.setattr(mlo_mae.cli, "command", lambda name: quiet)
    assert mlo_mae.reported_run(cfg, tmp_path)["epoch"] == 1
    told = capsys.readouterr().err
    assert told.count("\n") == said and said == ("no better than chance" in told and "--labelled-batch-size" in told)
    learned, never = "T learned from" in told, "all of its 5 looks, and never learned" in told
    assert (learned, never) == (said and moved > 0, said and moved == 0)


def test_one_training_image_is_too_few(tmp_path, capsys):
    """Which the probe at the end would find out, after all."""
    images, labels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8), np.arange(2)
    np.savez(tmp_path / "two.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    flags = ["--data", tmp_path / "two.npz", "--val-fraction", 0.5, "--out", tmp_path / "run"]
    refused(["pretrain", *flags], capsys, "one training image", "use more images")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patch_size": 5}, ["16 pixels", "patches of 5"]),
        ({"mask_ratio": 0.999}, ["--mask-ratio 0.999", "16 patches"]),
        ({"width": 4096, "depth": 1000, "heads": 1}, ["too large", "--width"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_allocated(changes, words):
    with pytest.raises(UserError) as caught:
        build(dataclasses.replace(TINY, **changes), 16, 3, 5)
    assert all(word in str(caught.value) for word in words), caught.value
