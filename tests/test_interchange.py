"""interchange.py, and what mlo_mae.py builds on it: public weights in, `--init`, `export`; and files not to be trusted.

The files are written here, small, with the names that the public ones have. MLO_MAE_FUZZ sets how many mutations are tried.
"""

import argparse
import collections
import io
import json
import math
import os
import pickle
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_data import mutated
from test_mlo_mae import arguments, npz, refused, weights  # noqa: F401 (npz is a fixture)

import mlo_mae
from interchange import WeightsError, fit, read_weights, resize_positions, write_safetensors
from mlo_mae import Config, build, call, main, starting_weights

FUZZ = int(os.environ.get("MLO_MAE_FUZZ", 150))
TINY = dict(patch_size=4, width=16, depth=2, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2)


def network(image_size=16, channels=3, seed=0, **changes):
    """Networks, and theta with no special values."""
    net, (theta, _, _) = build(Config(**TINY | {"seed": seed} | changes), image_size, channels, 2)
    return net, theta + 0.1 * torch.randn(len(theta), generator=torch.Generator().manual_seed(seed))


def named(net, theta):
    encoder, decoder = theta.tensor_split([net.encoder_size])
    return mlo_mae.unflatten(net.encoder, encoder) | mlo_mae.unflatten(net.decoder, decoder)


def shapes(net):
    return {name: tuple(p.shape) for part in (net.encoder, net.decoder) for name, p in part.named_parameters()}


def safetensors(tensors):
    buffer = io.BytesIO()
    write_safetensors(tensors, buffer, {})
    return buffer.getvalue()


def torch_bytes(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def public(tensors):
    """What facebookresearch/mae's training saves."""
    arguments = argparse.Namespace(model="mae_vit_base_patch16", blr=1.5e-4, batch_size=64, world_size=8, resume="")
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    return {"model": collections.OrderedDict(tensors), "optimizer": optimizer.state_dict(), "epoch": 7,
            "scaler": {"scale": 65536.0, "_growth_tracker": 3}, "args": arguments}  # fmt: skip


# ------------------------------------------------------------------------------------------------- public names


def public_shapes(width, depth, patch, patches, decoder_width, decoder_depth):
    """Names and shapes as timm 1.0.31's vit_base_patch16_224 (without its head) and facebookresearch/mae's models_mae.py
    have them, recorded as a rule."""

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def linear(name, outputs, inputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def block(name, width):
        return (norm(f"{name}.norm1", width) | linear(f"{name}.attn.qkv", 3 * width, width)
                | linear(f"{name}.attn.proj", width, width) | norm(f"{name}.norm2", width)
                | linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width))  # fmt: skip

    encoder = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + patches, width),
               "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}  # fmt: skip
    for number in range(depth):
        encoder |= block(f"blocks.{number}", width)
    decoder = {"mask_token": (1, 1, decoder_width), "decoder_pos_embed": (1, 1 + patches, decoder_width)}
    decoder |= linear("decoder_embed", decoder_width, width)
    for number in range(decoder_depth):
        decoder |= block(f"decoder_blocks.{number}", decoder_width)
    decoder |= norm("decoder_norm", decoder_width) | linear("decoder_pred", patch * patch * 3, decoder_width)
    return encoder | norm("norm", width), decoder


def test_names_and_shapes_are_the_public_ones():
    encoder, decoder = public_shapes(768, 12, 16, 196, 512, 8)
    assert len(encoder) == 150 and sum(map(np.prod, encoder.values())) == 86_567_656 - 1000 * 769  # timm's, less its head
    with torch.device("meta"):
        ours = mlo_mae.Encoder(224, 16, 3, 768, 12, 12), mlo_mae.Decoder(224, 16, 3, 768, 512, 8, 16)
    for module, names in zip(ours, (encoder, decoder)):
        assert {name: tuple(p.shape) for name, p in module.named_parameters()} == names


def test_the_patch_embedding_is_a_convolution():
    net, theta = network()
    weight, images = named(net, theta), torch.randn(2, 3, 16, 16)
    convolved = F.conv2d(images, weight["patch_embed.proj.weight"], weight["patch_embed.proj.bias"], stride=4)
    embedded = torch.func.functional_call(net.encoder.patch_embed, {name.removeprefix("patch_embed."): value for name, value in
                                          weight.items() if name.startswith("patch_embed")},
                                          mlo_mae.gather_patches(images, None, 4))  # fmt: skip
    torch.testing.assert_close(embedded, convolved.flatten(2).transpose(1, 2))


# ----------------------------------------------------------------------------------------------------- reading

WRAPPED = {
    "public .pth": lambda tensors: torch_bytes(public(tensors)),
    "legacy .pth": lambda tensors: torch_bytes(public(tensors), zipped=False),
    "state_dict of a wrapper": lambda tensors: torch_bytes({"state_dict": {f"module.{n}": t for n, t in tensors.items()}}),
    "encoder in a larger model": lambda tensors: torch_bytes(
        {f"net.backbone.{n}": t for n, t in tensors.items()} | {"neck.weight": torch.ones(2)}),
    "parameters": lambda tensors: torch_bytes({"model_ema": {n: torch.nn.Parameter(t) for n, t in tensors.items()}}),
    "safetensors": safetensors,
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_public_autoencoder_reconstructs_as_where_it_was_written(tmp_path, capsys, kind):
    net, theta = network()
    path = tmp_path / "weights"
    path.write_bytes(WRAPPED[kind](named(net, theta)))
    other, fresh = network(seed=5)
    loaded = starting_weights(other, fresh, path)
    assert torch.equal(loaded, theta) and not torch.equal(fresh, theta)
    assert "30 of 30 encoder weights used; 20 of 20 decoder weights used" in capsys.readouterr().err
    images = torch.randn(3, 3, 16, 16)
    batch = mlo_mae.Step(None, None, None, images, *mlo_mae.select_patches(torch.rand(3, 16), net.visible))
    errors = [mlo_mae.patch_errors(net, *vector.tensor_split([net.encoder_size]), batch) for vector in (theta, loaded, fresh)]
    assert torch.equal(errors[0], errors[1]) and not torch.allclose(errors[0], errors[2])


def test_half_precision_becomes_the_networks_own(tmp_path, capsys):
    net, theta = network()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        (tmp_path / "half").write_bytes(safetensors({name: tensor.to(dtype) for name, tensor in named(net, theta).items()}))
        loaded = starting_weights(net, torch.zeros_like(theta), tmp_path / "half")
        assert loaded.dtype == torch.float32 and torch.equal(loaded, theta.to(dtype).float())


def test_a_decoder_of_another_shape_starts_fresh(tmp_path, capsys):
    net, theta = network()
    (tmp_path / "mae.pth").write_bytes(torch_bytes(public(named(net, theta))))
    for changes, words in (({"decoder_width": 12}, "mask_token is [1, 1, 8], here [1, 1, 12]"),
                           ({"decoder_depth": 2}, "decoder_blocks.1.norm1.weight is missing")):  # fmt: skip
        other, fresh = network(seed=1, **changes)
        loaded = starting_weights(other, fresh, tmp_path / "mae.pth")
        assert torch.equal(loaded[: net.encoder_size], theta[: net.encoder_size])
        assert torch.equal(loaded[net.encoder_size :], fresh[net.encoder_size :])
        assert f"the decoder starts fresh: {words}" in capsys.readouterr().err
    other, _ = network(decoder_depth=2)  # its first block alone is another decoder, too
    deeper = {name: torch.zeros(shape) for name, shape in shapes(other).items()}
    _, report = fit(deeper, shapes(net))
    assert "the decoder starts fresh: decoder_blocks.1.norm1.weight has no place here" in report.line


def test_the_report_names_what_was_used_and_what_was_not():
    net, theta = network()
    expected, weight = shapes(net), named(net, theta)
    taken, report = fit(weight, expected)
    assert report.used == list(expected) and not (report.interpolated or report.missing or report.unused)

    finetuned = {name: t for name, t in weight.items() if not name.startswith(("norm.", "decoder", "mask"))}
    finetuned |= {name: torch.ones(16) for name in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")}
    taken, report = fit(finetuned, expected)
    assert set(report.missing) == set(expected) - set(taken) and "norm.weight" in report.missing
    assert report.unused == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert report.line == ("28 of 30 encoder weights used; the decoder starts fresh: the file has none; "
                           "fresh: norm.weight, norm.bias; unused: fc_norm (2), head (2)")  # fmt: skip
    encoder = {name: shape for name, shape in expected.items() if not name.startswith(("decoder", "mask"))}
    taken, report = fit(weight, encoder)  # fine-tuning expects no decoder
    assert set(taken) == set(encoder) and set(report.unused) == set(expected) - set(encoder)
    assert "the decoder" not in report.line and "unused: mask_token, decoder_pos_embed, decoder_embed (2)" in report.line


@pytest.mark.parametrize("changes, words", [
    (dict(patch_size=8), "--patch-size 8, not --patch-size 4: give --patch-size 8"),
    (dict(width=32), "--width 32, not --width 16: give --width 32, and the --heads"),
    (dict(depth=3), "give --depth 3"),
    (dict(depth=1), "give --depth 1"),
    (dict(width=32, depth=1, patch_size=8), "give --patch-size 8 --width 32 --depth 1"),
    (dict(channels=1), "images of 1 channels, and the data's have 3"),
])  # fmt: skip
def test_an_encoder_of_other_sizes_names_the_flags_to_change(changes, words):
    other, theta = network(**changes)
    with pytest.raises(WeightsError) as raised:
        fit(named(other, theta), shapes(network()[0]))
    assert words in str(raised.value)


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop("blocks.1.attn.qkv.bias"), "blocks.1.attn.qkv.bias is missing"),
    (lambda w: w.pop("norm.weight"), "norm.weight is missing"),
    (lambda w: w.pop("cls_token"), "no ViT with square patches and a class token"),
    (lambda w: w.pop("pos_embed"), "pos_embed is missing"),
    (lambda w: w.pop("patch_embed.proj.weight"), "no ViT"),
    (lambda w: w.update({"blocks.0.ls1.gamma": torch.ones(16)}), "blocks.0.ls1.gamma has no place here"),
    (lambda w: w.update({"norm_pre.weight": torch.ones(16)}), "norm_pre.weight has no place here"),
    (lambda w: w.update({"dist_token": torch.ones(1, 1, 16), "pos_embed": torch.ones(1, 18, 16)}), "pos_embed is [1, 18, 16]"),
    (lambda w: w.update({"pos_embed": torch.ones(1, 0, 16)}), "pos_embed is [1, 0, 16], here [1, 17, 16]"),
    (lambda w: w.update({"blocks.0.mlp.fc1.weight": torch.ones(48, 16)}), "blocks.0.mlp.fc1.weight is [48, 16], here [64, 16]"),
    (lambda w: w["blocks.0.norm1.bias"].fill_(float("nan")), "blocks.0.norm1.bias holds values that are not finite"),
    (lambda w: w.update({"norm.bias": torch.ones(16, dtype=torch.int64)}), "norm.bias holds values that are not finite"),
])  # fmt: skip
def test_another_architecture_is_refused(change, words):
    net, theta = network()
    weight = {name: tensor.clone() for name, tensor in named(net, theta).items()}
    change(weight)
    with pytest.raises(WeightsError) as raised:
        fit(weight, shapes(net))
    assert words in str(raised.value)


# --------------------------------------------------------------------------------------------------- positions


def bicubic_by_hand(table, size):
    """Keys' cubic (a = -1/2), stretched where the table shrinks, normalised at the edges: [G, G] -> [size, size]."""
    ratio = len(table) / size
    stretch = max(ratio, 1.0)
    place = (np.arange(size) + 0.5) * ratio - 0.5
    x = np.abs(place[:, None] - np.arange(len(table))) / stretch  # [size, G]
    cubic = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    cubic /= cubic.sum(1, keepdims=True)
    return cubic @ table @ cubic.T


@pytest.mark.parametrize("old, new", [(4, 8), (8, 4), (14, 8), (7, 10)])
def test_positions_of_another_grid_are_interpolated(old, new):
    random = np.random.default_rng(0)
    column, row = np.meshgrid(np.arange(old), np.arange(old))
    tables = [np.full((old, old), 0.75), 2.0 * row - 3.0 * column, random.standard_normal((old, old))]
    table = torch.tensor(np.stack(tables, -1)).reshape(1, old * old, 3)
    cls = torch.tensor([[[5.0, 6.0, 7.0]]], dtype=torch.float64)
    resized = resize_positions(torch.cat([cls, table], 1), (1, 1 + new * new, 3))
    assert resized.shape == (1, 1 + new * new, 3) and torch.equal(resized[:, :1], cls)
    constant, linear, other = resized[0, 1:].reshape(new, new, 3).numpy().transpose(2, 0, 1)
    np.testing.assert_allclose(constant, 0.75, rtol=1e-12)
    if new > old:  # away from the edges a cubic keeps straight lines, at the places of the patches' centres
        centre = (np.arange(new) + 0.5) * old / new - 0.5
        inside = slice(math.ceil(2 * new / old), -math.ceil(2 * new / old))
        np.testing.assert_allclose(linear[inside, inside], (2.0 * centre[:, None] - 3.0 * centre)[inside, inside], atol=1e-12)
    np.testing.assert_allclose(other, bicubic_by_hand(tables[2], new), atol=1e-12)
    without = resize_positions(table, (1, 1 + new * new, 3))
    assert torch.equal(without[:, 1:], resized[:, 1:]) and not without[:, 0].any()


def test_positions_of_the_same_grid_are_left_alone():
    net, theta = network()
    weight = named(net, theta)
    taken, report = fit(weight, shapes(net))
    assert torch.equal(taken["pos_embed"], weight["pos_embed"]) and not report.interpolated
    taken, report = fit(weight | {"pos_embed": weight["pos_embed"][:, 1:]}, shapes(net))  # CLS has none
    assert torch.equal(taken["pos_embed"][:, 1:], weight["pos_embed"][:, 1:]) and not taken["pos_embed"][:, 0].any()
    assert not report.interpolated and "interpolated" not in report.line


def test_larger_images_take_both_tables():
    net, theta = network(image_size=32)
    taken, report = fit(named(*network()), shapes(net))
    assert report.interpolated == ["pos_embed", "decoder_pos_embed"]
    assert taken["decoder_pos_embed"].shape == (1, 65, 8)
    assert "positions interpolated from 4x4 to 8x8" in report.line


def timm():
    try:
        return pytest.importorskip("timm")
    except Exception as error:  # a torchvision that was built for another torch, which timm imports
        pytest.skip(f"timm cannot be imported: {error}")


def test_positions_equal_timms():
    resample = timm().layers.resample_abs_pos_embed
    table = torch.randn(1, 1 + 14 * 14, 8)
    for new in (7, 8, 24):
        torch.testing.assert_close(resize_positions(table, (1, 1 + new * new, 8)), resample(table, [new, new]))


def test_features_equal_timms(tmp_path, capsys):
    vit = timm().models.VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5).eval()
    torch.save(vit.state_dict(), tmp_path / "timm.pth")
    net, theta = network()
    theta = starting_weights(net, theta, tmp_path / "timm.pth")
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        ours, theirs = call(net.encoder, theta[: net.encoder_size], images), vit.forward_features(images)
    assert (ours - theirs).abs().max() < 1e-5


# ----------------------------------------------------------------------------------------- the program, end to end


@pytest.fixture(scope="module")
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlo_mae, "draw_images", lambda *arguments: None)
        patch.setattr(mlo_mae, "draw_curves", lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def run(npz, tmp_path_factory, no_pictures):  # noqa: F811
    out = tmp_path_factory.mktemp("interchange") / "run"
    assert main(arguments(npz, out, "--epochs", 2)) == 0
    return out


@pytest.mark.parametrize("kind", ["run", "timm", "mae"])
def test_pretraining_continues_from(run, npz, tmp_path, capsys, kind):  # noqa: F811
    """At learning rate 0 a run ends where it started: at the weights that --init names."""
    start = run
    if kind != "run":
        start = tmp_path / "exported"
        assert main(["export", str(run), "--to", kind, "--file", str(start)]) == 0
    capsys.readouterr()
    out = tmp_path / "next"
    flags = ["--epochs", 2, "--lr", 0, "--seed", 9, "--init", start]
    assert main(arguments(npz, out, *flags)) == 0
    assert f"{start}: 18 of 18 encoder weights used" in capsys.readouterr().err
    before, after = weights(run), weights(out)
    for part, name in before:
        if part == "model" and not (kind == "timm" and name.startswith(("decoder", "mask"))):
            assert torch.equal(before[part, name], after[part, name]), name
    assert kind != "timm" or not torch.equal(before["model", "mask_token"], after["model", "mask_token"])
    if kind != "run":
        start.unlink()  # a resumed run has its own weights, and does not read these again
        assert main(arguments(npz, out, *flags, "--resume")) == 0
        assert all(torch.equal(value, after[key]) for key, value in weights(out).items())


def test_continued_pretraining_at_another_size(run, npz, tmp_path, capsys):  # noqa: F811
    assert main(arguments(npz, tmp_path / "next", "--epochs", 1, "--init", run, "--image-size", 32)) == 0
    assert "positions interpolated from 4x4 to 8x8" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--width", "32"], ["give --width 16"]),
    (["--heads", "4"], ["--heads 2", "give that flag"]),
    (["--decoder-heads", "4"], ["--decoder-heads 2", "give that flag"]),
    (["--patch-size", "8"], ["give --patch-size 4"]),
])  # fmt: skip
def test_init_that_cannot_fit_ends_in_one_line(run, npz, tmp_path, capsys, flags, words):  # noqa: F811
    refused(arguments(npz, tmp_path / "next", "--init", run, *flags), capsys, *words)
    assert not (tmp_path / "next").exists()


def test_init_files_that_cannot_be_used(run, npz, tmp_path, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("not weights")
    for path in (tmp_path / "absent.pth", tmp_path / "empty", tmp_path / "text.pth", npz):
        refused(arguments(npz, tmp_path / "next", "--init", path), capsys, path)
    assert not (tmp_path / "next").exists()


def test_export_to_timm(run, capsys):
    assert main(["export", str(run), "--to", "timm"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["file"] == str(run / "encoder-timm.safetensors") and len(report["mean"]) == len(report["std"]) == 3
    assert report["call"] == ("timm.models.VisionTransformer(img_size=16, patch_size=4, in_chans=3, embed_dim=16, depth=1, "
                              "num_heads=2, num_classes=2)")  # fmt: skip
    written, trained = read_weights(report["file"]), weights(run)
    expected, _ = public_shapes(16, 1, 4, 16, 8, 1)
    assert {name: tuple(t.shape) for name, t in written.items()} == expected | {"head.weight": (2, 16), "head.bias": (2,)}
    assert not written["head.weight"].any() and all(torch.equal(written[name], trained["model", name]) for name in expected)
    before = (run / "encoder-timm.safetensors").read_bytes()
    refused(["export", run, "--to", "timm"], capsys, "encoder-timm.safetensors exists already", "--file")
    assert (run / "encoder-timm.safetensors").read_bytes() == before


def test_timm_loads_the_export_by_the_call_that_is_printed(run, tmp_path, capsys):
    package = timm()
    assert main(["export", str(run), "--to", "timm", "--file", str(tmp_path / "vit")]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    vit = eval(report["call"], {"timm": package})
    vit.load_state_dict(read_weights(report["file"]), strict=True)


def test_export_to_mae(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", "mae", "--file", str(tmp_path / "mae.pth")]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["call"] == (
        "MaskedAutoencoderViT(img_size=16, patch_size=4, in_chans=3, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=8, "
        "decoder_depth=1, decoder_num_heads=2, norm_layer=partial(nn.LayerNorm, eps=1e-6), norm_pix_loss=True)")  # fmt: skip
    content = torch.load(tmp_path / "mae.pth", weights_only=True)
    encoder, decoder = public_shapes(16, 1, 4, 16, 8, 1)
    assert set(content) == {"model"} and {n: tuple(t.shape) for n, t in content["model"].items()} == encoder | decoder
    assert all(torch.equal(tensor, weights(run)["model", name]) for name, tensor in content["model"].items())
    refused(["export", run, "--to", "mae", "--file", tmp_path / "mae.pth"], capsys, "mae.pth exists already")


def test_standard_sizes_are_called_by_their_names(tmp_path, monkeypatch):
    cfg = Config(patch_size=16, width=768, depth=12, heads=12)
    facts = {"image_size": 224, "channels": 3, "class_names": ["a", "b"], "mean": [0.5] * 3, "std": [0.2] * 3}
    content = {"format": mlo_mae.FORMAT, "config": mlo_mae.dataclasses.asdict(cfg), "data": facts, "model": {"norm.bias": torch.ones(768)}}
    monkeypatch.setattr(mlo_mae, "read_checkpoint", lambda path, *kinds: content)
    assert mlo_mae.export(tmp_path, "timm")["call"] == "timm.create_model('vit_base_patch16_224', num_classes=2)"
    facts["image_size"] = 32
    assert "img_size=32, patch_size=16" in mlo_mae.export(tmp_path, "timm", tmp_path / "other")["call"]


# ------------------------------------------------------------------------------------------------- safetensors

VARIED = {"a": torch.arange(3, dtype=torch.int8), "b.weight": torch.randn(2, 3, 4), "half": torch.randn(5).half(),
          "brain": torch.randn(3, 3).bfloat16(), "long": torch.tensor(7), "none": torch.zeros(0, 4),
          "turned": torch.randn(4, 6).T, "double": torch.randn(2).double(), "byte": torch.ones(3, dtype=torch.uint8),
          "short": torch.ones(2, dtype=torch.int16), "int": torch.ones(2, dtype=torch.int32)}  # fmt: skip


def equal(first, second):
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items())  # fmt: skip


def test_safetensors_round_trip(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors(VARIED))
    assert equal(read_weights(tmp_path / "a.safetensors"), VARIED)


def test_safetensors_as_the_package_has_them(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    (tmp_path / "ours").write_bytes(safetensors(VARIED))
    assert equal(package.load_file(tmp_path / "ours"), VARIED)
    package.save_file({name: tensor.contiguous() for name, tensor in VARIED.items()}, tmp_path / "theirs", metadata={"a": "b"})
    assert equal(read_weights(tmp_path / "theirs"), VARIED)


def header(text, body=b""):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("content, words", [
    (header({"a": entry((10**6, 10**6), (0, 4 * 10**12))}, bytes(8)), "impossible place"),
    (header({"a": entry((10**6, 10**6))}, bytes(8)), "does not take the bytes"),
    (header({"a": entry((-2,))}, bytes(8)), "impossible shape"),
    (header({"a": entry((2.0,))}, bytes(8)), "impossible shape"),
    (header({"a": entry((True, 2))}, bytes(8)), "impossible shape"),
    (header({"a": entry([1] * 40 + [2])}, bytes(8)), "impossible shape"),
    (header({"a": entry([0, 10**30], (0, 0))}), "impossible shape"),
    (header({"a": entry() | {"shape": 2}}, bytes(8)), "impossible shape"),
    (header({"a": entry(offsets=(8, 0))}, bytes(8)), "does not take the bytes"),
    (header({"a": entry(offsets=(0, 8, 16))}, bytes(8)), "impossible place"),
    (header({"a": entry(offsets=(0,))}, bytes(8)), "impossible place"),
    (header({"a": entry(offsets=(8, 16))}, bytes(8)), "lies outside the file"),
    (header({"a": entry()}, bytes(4)), "lies outside the file"),
    (header({"a": entry(offsets=(8, 16))}, bytes(16)), "leaves a gap"),
    (header({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "overlaps"),
    (header({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    (header({"a": entry()}, bytes(12)), "4 bytes after its last tensor"),
    (header({"a": entry(dtype="F33")}, bytes(8)), "has dtype F33"),
    (header({"a": entry(dtype=["F32"])}, bytes(8)), "has dtype"),
    (header({"a": entry() | {"more": 1}}, bytes(8)), "other fields"),
    (header({"a": [1, 2]}, bytes(8)), "other fields"),
    (header(b'{"a":NaN}'), "other fields"),
    (header(b'{"a":1,"a":2}'), "twice"),
    (header(b'{"a":' + json.dumps(entry())[:-1].encode() + b',"dtype":"F32"}}', bytes(8)), "twice"),
    (header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "cannot be read (maximum recursion depth"),
    (header(b'{"a":' + b"9" * 10_000 + b"}"), "cannot be read"),
    (header(b'{"\xff":1}'), "cannot be read"),
    (header(b'{"a"'), "cannot be read"),
    (header({}), "holds no weights"),
    ((2**63).to_bytes(8, "little") + b"{}", "its header claims"),
    ((3).to_bytes(8, "little") + b"{}", "its header claims"),
    (header({"\x1b[31m\n": entry(dtype="no")}, bytes(8)), "has dtype"),
])  # fmt: skip
def test_hostile_safetensors_end_in_one_line(tmp_path, content, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as raised:
        read_weights(path)
    assert words in str(raised.value) and str(raised.value).isprintable() and str(path) in str(raised.value)


# --------------------------------------------------------------------------------------------- files by torch.save


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def resized(raw, old, new):
    """A zip file with `old` replaced by `new` in its pickle, otherwise whole."""
    source, target = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)
    assert old in b"".join(map(source.read, source.namelist()))
    return target.getvalue()


def deflated(raw):
    source, target = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    return target.getvalue()


@pytest.mark.parametrize("content, words", [
    (b"", "cannot be read"),
    (b"PK\x03\x04", "cannot be read"),
    (torch_bytes([torch.ones(2)]), "a list, not weights by name"),
    (torch_bytes({"epoch": 3}), "holds no weights"),
    (torch_bytes({3: torch.ones(2)}), "not an ordinary tensor"),
    (torch_bytes({"a": torch.eye(3).to_sparse()}), "not an ordinary tensor"),
    (torch_bytes({"a": torch.ones(3, device="meta")}), "not an ordinary tensor"),
    (torch_bytes({"a": torch.ones(1).expand(10**12)}), "a tensor claims more bytes"),
    (resized(torch_bytes({"a": torch.ones(200)}), b"K\xc8\x85", b"J\x00\x00\x00\x01\x85"), "cannot be read"),
    (torch_bytes({"a": torch.ones(200)}, zipped=False).replace(b"K\xc8\x85", b"J\x00\x00\x00\x01\x85"), "cannot be read"),
    (deflated(torch_bytes({"a": torch.zeros(10**5)})), "its records claim more bytes"),
    (torch_bytes({f"{prefix}.patch_embed.proj.weight": torch.ones(2) for prefix in "ab"}), "several encoders (a., b.)"),
    (torch_bytes(dict.fromkeys(["m.norm", "norm", "m.patch_embed.proj.weight"], torch.ones(1))), "with and without m."),
])  # fmt: skip
def test_hostile_torch_files_end_in_one_line(tmp_path, content, words):
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as raised:
        read_weights(path)
    assert words in str(raised.value) and str(raised.value).isprintable()


@pytest.mark.parametrize("write", [torch_bytes, lambda content: torch_bytes(content, zipped=False), pickle.dumps])
def test_nothing_in_a_file_is_executed(tmp_path, write):
    mark, path = tmp_path / "executed", tmp_path / "bad.pth"
    path.write_bytes(write({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(harm=Harmful(mark))}))
    with pytest.raises(WeightsError), warnings.catch_warnings(record=True) as warned:
        read_weights(path)
    assert not mark.exists() and not warned


def test_a_flipped_bit_among_the_weights_is_seen(tmp_path):
    raw = bytearray(torch_bytes({"a": torch.ones(1000)}))
    raw[len(raw) // 2] ^= 1
    (tmp_path / "bad.pth").write_bytes(raw)
    with pytest.raises(WeightsError, match="fails its checksum"):
        read_weights(tmp_path / "bad.pth")


# --------------------------------------------------------------------------------------------------------------- fuzz


def inside(part):
    """Damage done to one record, with the zip around it whole."""
    def damage(raw, rng):
        source, target = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
        with zipfile.ZipFile(target, "w") as archive:
            for name in source.namelist():
                archive.writestr(name, mutated(source.read(name), rng) if part in name else source.read(name))
        return target.getvalue()
    return damage


def in_header(raw, rng):
    """Damage done to the JSON, with the length before it right."""
    length = int.from_bytes(raw[:8], "little")
    return header(mutated(raw[8 : 8 + length], rng), raw[8 + length :])


def numbers(raw, rng):
    """Other digits in the JSON, which stays whole."""
    length = int.from_bytes(raw[:8], "little")
    text = bytearray(raw[8 : 8 + length])
    digits = [place for place, byte in enumerate(text) if chr(byte).isdigit()]
    for place in rng.choice(digits, 2):
        text[place] = ord(str(rng.integers(0, 10)))
    return header(bytes(text), raw[8 + length :])


FORMATS = {
    "zip": (torch_bytes, mutated), "pickle": (torch_bytes, inside("data.pkl")),
    "legacy": (lambda content: torch_bytes(content, zipped=False), mutated),
    "safetensors": (lambda content: safetensors(content["model"]), mutated),
    "safetensors header": (lambda content: safetensors(content["model"]), in_header),
    "safetensors numbers": (lambda content: safetensors(content["model"]), numbers),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_fuzz(tmp_path, kind):
    """A damaged file gives tensors or a WeightsError of one line. Nothing else, and soon."""
    write, damage = FORMATS[kind]
    net, theta = network(depth=1)
    whole, path, expected = write(public(named(net, theta))), tmp_path / "file", shapes(net)
    accepted, slowest = 0, 0.0
    for number in range(FUZZ):
        path.write_bytes(damage(whole, np.random.default_rng([number, *kind.encode()])))
        start = time.monotonic()
        try:
            fit(read_weights(path), expected)
            accepted += 1
        except WeightsError as error:
            assert str(error).isprintable()
        except BaseException:
            print(f"{kind} number {number}")
            raise
        slowest = max(slowest, time.monotonic() - start)
    path.write_bytes(whole)
    fit(read_weights(path), expected)  # it was the damage
    print(f"fuzz {kind}: {FUZZ} files, {accepted} accepted, {FUZZ - accepted} refused, 0 other, slowest {slowest:.2f} s")
    assert slowest < 20
