"""Weights that a run starts from (--init): public files, other runs; and that the names are the public ones."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    WRAPPED,
    arguments,
    bare,
    public,
    public_shapes,
    refused,
    safetensors_bytes,
    same,
    stopped,
    timm,
    torch_bytes,
    weights,
)

import mlo_mae
from experiments import show
from harness import UserError
from harness.vectors import call, named
from harness.weights import starting_weights
from kernels import gather_patches, select_patches
from mlo_mae import Config, build, main

TINY = {"patch_size": 4, "width": 16, "depth": 2, "heads": 2, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}


def network(image_size=16, channels=3, seed=0, **changes):
    """Networks, and theta with no special values."""
    net, (theta, _, _) = build(Config(**TINY | {"seed": seed} | changes), image_size, channels, 2)
    return net, theta + 0.1 * torch.randn(len(theta), generator=torch.Generator().manual_seed(seed))


def by_name(net, theta):
    return named([net.encoder, net.decoder], theta)


def started(net, theta, path):
    """theta as a run's --init makes it."""
    heads = {"heads": net.cfg.heads, "decoder_heads": net.cfg.decoder_heads}
    return starting_weights(path, [net.encoder, net.decoder], theta, heads)


# ------------------------------------------------------------------------------------------------- public names


def test_names_and_shapes_are_the_public_ones():
    encoder, decoder = public_shapes(768, 12, 16, 196, 512, 8)
    assert len(encoder) == 150 and sum(map(np.prod, encoder.values())) == 86_567_656 - 1000 * 769  # timm's, less its head
    with torch.device("meta"):
        ours = mlo_mae.Encoder(224, 16, 3, 768, 12, 12), mlo_mae.Decoder(224, 16, 3, 768, 512, 8, 16)
    for module, names in zip(ours, (encoder, decoder)):
        assert {name: tuple(p.shape) for name, p in module.named_parameters()} == names


def test_the_patch_embedding_is_a_convolution():
    net, theta = network()
    weight, images = by_name(net, theta), torch.randn(2, 3, 16, 16)
    convolved = F.conv2d(images, weight["patch_embed.proj.weight"], weight["patch_embed.proj.bias"], stride=4)
    own = {name.removeprefix("patch_embed."): value for name, value in weight.items() if name.startswith("patch_embed")}
    embedded = torch.func.functional_call(net.encoder.patch_embed, own, gather_patches(images, None, 4))
    torch.testing.assert_close(embedded, convolved.flatten(2).transpose(1, 2))


# ------------------------------------------------------------------------------------------------ public weights


def test_a_run_whose_checkpoint_is_damaged_gives_the_one_before(tmp_path, capsys):
    net, theta = network()
    torch.save(by_name(net, theta), tmp_path / "checkpoint.previous.pt")
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    assert torch.equal(started(net, torch.zeros_like(theta), tmp_path), theta)
    assert f"going on from {tmp_path / 'checkpoint.previous.pt'}" in capsys.readouterr().err
    (tmp_path / "checkpoint.previous.pt").write_bytes(b"damaged, too")
    with pytest.raises(UserError, match="checkpoint.pt"):
        started(net, theta, tmp_path)


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_public_autoencoder_reconstructs_as_where_it_was_written(tmp_path, capsys, kind):
    net, theta = network()
    path = tmp_path / "weights"
    path.write_bytes(WRAPPED[kind](by_name(net, theta)))
    other, fresh = network(seed=5)
    loaded = started(other, fresh, path)
    assert torch.equal(loaded, theta) and not torch.equal(fresh, theta)
    assert "30 of 30 encoder weights used; 20 of 20 decoder weights used" in capsys.readouterr().err
    images = torch.randn(3, 3, 16, 16)
    batch = mlo_mae.Step(None, None, None, images, *select_patches(torch.rand(3, 16), net.visible))
    errors = [mlo_mae.patch_errors(net, *vector.tensor_split([net.encoder_size]), batch) for vector in (theta, loaded, fresh)]
    assert torch.equal(errors[0], errors[1]) and not torch.allclose(errors[0], errors[2])


def test_half_precision_becomes_the_networks_own(tmp_path, capsys):
    net, theta = network()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        half = {name: tensor.to(dtype) for name, tensor in by_name(net, theta).items()}
        (tmp_path / "half").write_bytes(safetensors_bytes(half))
        loaded = started(net, torch.zeros_like(theta), tmp_path / "half")
        assert loaded.dtype == torch.float32 and torch.equal(loaded, theta.to(dtype).float())


def test_a_decoder_of_another_shape_starts_fresh(tmp_path, capsys):
    net, theta = network()
    (tmp_path / "mae.pth").write_bytes(torch_bytes(public(by_name(net, theta))))
    for changes, words in (
        ({"decoder_width": 12}, "mask_token is [1, 1, 8], here [1, 1, 12]"),
        ({"decoder_depth": 2}, "decoder_blocks.1.norm1.weight is missing"),
    ):
        other, fresh = network(seed=1, **changes)
        loaded = started(other, fresh, tmp_path / "mae.pth")
        assert torch.equal(loaded[: net.encoder_size], theta[: net.encoder_size])
        assert torch.equal(loaded[net.encoder_size :], fresh[net.encoder_size :])
        assert f"the decoder starts fresh: {words}" in capsys.readouterr().err


def test_features_equal_timms(tmp_path, capsys):
    vit = timm().models.VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5).eval()
    torch.save(vit.state_dict(), tmp_path / "timm.pth")
    net, theta = network()
    theta = started(net, theta, tmp_path / "timm.pth")
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        ours, theirs = call(net.encoder, theta[: net.encoder_size], images), vit.forward_features(images)
    assert (ours - theirs).abs().max() < 1e-5


# ----------------------------------------------------------------------------------------- the program, end to end


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(show, "after_training", lambda *arguments: [])


@pytest.fixture
def run(whole_run):
    return whole_run[0]


@pytest.mark.parametrize("kind", ["run", "timm", "mae"])
def test_pretraining_continues_from(run, sides, tmp_path, capsys, no_pictures, kind):
    """At learning rate 0 a run ends where it started: at the weights that --init names."""
    start = run
    if kind != "run":
        start = tmp_path / "exported"
        assert main(["export", str(run), "--to", kind, "--file", str(start)]) == 0
        refused(arguments(sides, tmp_path / "other", "--init", start, "--heads", 4), capsys, start, "give --heads 2")
    capsys.readouterr()
    out = tmp_path / "next"
    flags = ["--epochs", 2, "--lr", 0, "--seed", 9, "--init", start]
    assert main(arguments(sides, out, *flags)) == 0
    assert f"{start}: 18 of 18 encoder weights used" in capsys.readouterr().err
    before, after = weights(run), weights(out)
    for part, name in before:
        if part == "model" and not (kind == "timm" and name.startswith(("decoder", "mask"))):
            assert torch.equal(before[part, name], after[part, name]), name
    assert kind != "timm" or not torch.equal(before["model", "mask_token"], after["model", "mask_token"])
    if kind != "run":
        start.unlink()  # a resumed run has its own weights, and does not read these again
        assert main(arguments(sides, out, *flags, "--resume")) == 0
        assert all(torch.equal(value, after[key]) for key, value in weights(out).items())


@pytest.mark.parametrize("lines", [3, 6])  # T learns from update 6 of 30 to 9; stopped where it does, and after
def test_a_run_of_three_parts_from_those_weights_resumes(run, sides, tmp_path, no_pictures, monkeypatch, lines):
    flags = ["--epochs", 20, "--mask-start", 0.2, "--mask-until", 0.3, "--seed", 9, "--init", run]
    with bare():
        assert main(arguments(sides, tmp_path / "whole", *flags)) == 0
        stopped(sides, tmp_path / "cut", monkeypatch, lines, *flags)
        assert main(["pretrain", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_continued_pretraining_at_another_size(run, sides, tmp_path, capsys, no_pictures):
    assert main(arguments(sides, tmp_path / "next", "--epochs", 1, "--init", run, "--image-size", 32)) == 0
    assert "positions interpolated from 4x4 to 8x8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--width", "32"], ["give --width 16"]),
        (["--heads", "4"], ["give --heads 2"]),
        (["--decoder-heads", "4"], ["give --decoder-heads 2"]),
        (["--patch-size", "8"], ["give --patch-size 4"]),
    ],
)
def test_init_that_cannot_fit_ends_in_one_line(run, sides, tmp_path, capsys, flags, words):
    refused(arguments(sides, tmp_path / "next", "--init", run, *flags), capsys, *words)
    assert not (tmp_path / "next").exists()


def test_init_files_that_cannot_be_used(run, sides, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("not weights")
    for path in (tmp_path / "absent.pth", tmp_path / "empty", tmp_path / "text.pth", sides):
        refused(arguments(sides, tmp_path / "next", "--init", path), capsys, path)
    assert not (tmp_path / "next").exists()


def test_a_checkpoint_alone_states_its_heads(run, sides, tmp_path, capsys):
    (tmp_path / "alone.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    for path in (tmp_path / "alone.pt", run / "checkpoint.pt"):
        refused(arguments(sides, tmp_path / "next", "--init", path, "--heads", 4), capsys, path, "give --heads 2")
    assert not (tmp_path / "next").exists()
