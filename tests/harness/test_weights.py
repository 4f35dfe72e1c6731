"""Weights in and out: what of a file fits a network, safetensors, files by torch.save; and files not to be trusted.

The files are written here, small, with the names that the public ones have. MLO_MAE_FUZZ sets how many mutations are tried.
"""

import argparse
import io
import json
import math
import os
import pathlib
import pickle
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from helpers import WRAPPED, mutated, public, public_shapes, safetensors_bytes, timm, torch_bytes

import mlo_mae
from harness import UserError
from harness.weights import (
    fit,
    is_decoder,
    read_safetensors,
    read_weights,
    resize_positions,
    starting_weights,
    write_safetensors,
)

FUZZ = int(os.environ.get("MLO_MAE_FUZZ", 150))


def shapes(width=16, depth=2, patch_size=4, grid=4, decoder_width=8, decoder_depth=1, channels=3):
    """Names and shapes of a small autoencoder."""
    encoder, decoder = public_shapes(width, depth, patch_size, grid**2, decoder_width, decoder_depth, channels)
    return encoder | decoder


def network(seed=0, **sizes):
    """Its weights, none of them special."""
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in shapes(**sizes).items()}


# ----------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", WRAPPED)
def test_every_kind_of_file_gives_its_weights_by_their_names(tmp_path, kind):
    weight = network()
    (tmp_path / "weights").write_bytes(WRAPPED[kind](weight))
    taken, line = fit(read_weights(tmp_path / "weights").weights, shapes())
    assert equal(taken, weight)
    assert line.startswith("30 of 30 encoder weights used; 20 of 20 decoder weights used")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.pth does not exist; give a run"):
        read_weights(tmp_path / "absent.pth")


# ----------------------------------------------------------------------------------------------------- fitting


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"decoder_width": 12}, "mask_token is [1, 1, 8], here [1, 1, 12]"),
        ({"decoder_depth": 2}, "decoder_blocks.1.norm1.weight is missing"),
    ],
)
def test_a_decoder_of_another_shape_is_left_out(changes, words):
    weight = network()
    taken, line = fit(weight, shapes(**changes))
    assert equal(taken, {name: tensor for name, tensor in weight.items() if not is_decoder(name)})
    assert f"the decoder starts fresh: {words}" in line


def test_a_deeper_decoder_is_another_one():
    taken, line = fit(network(decoder_depth=2), shapes())  # though its first block would fit
    assert not any(map(is_decoder, taken))
    assert "the decoder starts fresh: decoder_blocks.1.norm1.weight has no place here" in line


def test_the_line_names_what_was_used_and_what_was_not():
    weight, expected = network(), shapes()
    taken, line = fit(weight, expected)
    assert list(taken) == list(expected) and equal(taken, weight)
    assert line == "30 of 30 encoder weights used; 20 of 20 decoder weights used"

    finetuned = {name: t for name, t in weight.items() if not name.startswith(("norm.", "decoder", "mask"))}
    more = {name: torch.ones(16) for name in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")}
    taken, line = fit(finetuned | more, expected)
    assert equal(taken, finetuned) and "norm.weight" not in taken
    assert line == (
        "28 of 30 encoder weights used; the decoder starts fresh: the file has none; "
        "fresh: norm.weight, norm.bias; unused: fc_norm (2), head (2)"
    )
    encoder = {name: shape for name, shape in expected.items() if not name.startswith(("decoder", "mask"))}
    taken, line = fit(weight, encoder)  # fine-tuning expects no decoder
    assert equal(taken, {name: weight[name] for name in encoder})
    assert "the decoder" not in line
    assert line.endswith(
        "unused: mask_token, decoder_pos_embed, decoder_embed (2), decoder_blocks (12), decoder_norm (2), decoder_pred (2)"
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patch_size": 8}, "--patch-size 8, not --patch-size 4: give --patch-size 8"),
        ({"width": 32}, "--width 32, not --width 16: give --width 32, and the --heads"),
        ({"depth": 3}, "give --depth 3"),
        ({"depth": 1}, "give --depth 1"),
        ({"width": 32, "depth": 1, "patch_size": 8}, "give --patch-size 8 --width 32 --depth 1"),
        ({"channels": 1}, "images of 1 channels, and the data's have 3"),
    ],
)
def test_an_encoder_of_other_sizes_names_the_flags_to_change(changes, words):
    with pytest.raises(UserError) as raised:
        fit(network(**changes), shapes())
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.pop("blocks.1.attn.qkv.bias"), "blocks.1.attn.qkv.bias is missing"),
        (lambda w: w.pop("norm.weight"), "norm.weight is missing"),
        (lambda w: w.pop("cls_token"), "no ViT with square patches and a class token"),
        (lambda w: w.pop("pos_embed"), "pos_embed is missing"),
        (lambda w: w.pop("patch_embed.proj.weight"), "no ViT"),
        (lambda w: w.update({"blocks.0.ls1.gamma": torch.ones(16)}), "blocks.0.ls1.gamma has no place here"),
        (lambda w: w.update({"norm_pre.weight": torch.ones(16)}), "norm_pre.weight has no place here"),
        (
            lambda w: w.update({"dist_token": torch.ones(1, 1, 16), "pos_embed": torch.ones(1, 18, 16)}),
            "pos_embed is [1, 18, 16]",
        ),
        (lambda w: w.update({"pos_embed": torch.ones(1, 0, 16)}), "pos_embed is [1, 0, 16], here [1, 17, 16]"),
        (
            lambda w: w.update({"blocks.0.mlp.fc1.weight": torch.ones(48, 16)}),
            "blocks.0.mlp.fc1.weight is [48, 16], here [64, 16]",
        ),
        (lambda w: w["blocks.0.norm1.bias"].fill_(float("nan")), "blocks.0.norm1.bias holds values that are not finite"),
        (
            lambda w: w.update({"norm.bias": torch.ones(16, dtype=torch.int64)}),
            "norm.bias is not of floating-point numbers but torch.int64",
        ),
        (lambda w: w.update({"register_tokens": torch.ones(1, 4, 16)}), "register_tokens has no place here"),
        (lambda w: w.update({"norm.bias": torch.eye(4).to_sparse()}), "floating-point numbers but of a type unknown"),
        (lambda w: w.update({"norm.bias": torch.ones(16, device="meta")}), "norm.bias is not of floating-point numbers"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.ones(16, 3, 4, 4).bool()}), "no ViT with square patches"),
        (
            lambda w: w.update({"pos_embed": torch.ones(1).expand(1, 10**12, 16)}),
            "pos_embed claims more numbers than the file",
        ),
    ],
)
def test_another_architecture_is_refused(change, words):
    weight = network()
    change(weight)
    with pytest.raises(UserError) as raised:
        fit(weight, shapes())
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
    weight = network()
    taken, line = fit(weight, shapes())
    assert torch.equal(taken["pos_embed"], weight["pos_embed"]) and "interpolated" not in line
    taken, line = fit(weight | {"pos_embed": weight["pos_embed"][:, 1:]}, shapes())  # CLS has none
    assert torch.equal(taken["pos_embed"][:, 1:], weight["pos_embed"][:, 1:]) and not taken["pos_embed"][:, 0].any()
    assert "interpolated" not in line


def test_larger_images_take_both_tables():
    expected, weight = shapes(grid=8), network()
    taken, line = fit(weight, expected)
    tables = ["pos_embed", "decoder_pos_embed"]
    assert [name for name in taken if not torch.equal(taken[name], weight[name])] == tables
    assert all(torch.equal(taken[name], resize_positions(weight[name], expected[name])) for name in tables)
    assert taken["decoder_pos_embed"].shape == (1, 65, 8)
    assert "positions interpolated from 4x4 to 8x8" in line


def test_positions_equal_timms():
    resample = timm().layers.resample_abs_pos_embed
    table = torch.randn(1, 1 + 14 * 14, 8)
    for new in (7, 8, 24):
        torch.testing.assert_close(resize_positions(table, (1, 1 + new * new, 8)), resample(table, [new, new]))


# ------------------------------------------------------------------------------------------------- safetensors

VARIED = {
    "a": torch.arange(3, dtype=torch.int8),
    "b.weight": torch.randn(2, 3, 4),
    "half": torch.randn(5).half(),
    "brain": torch.randn(3, 3).bfloat16(),
    "long": torch.tensor(7),
    "none": torch.zeros(0, 4),
    "turned": torch.randn(4, 6).T,
    "double": torch.randn(2).double(),
    "byte": torch.ones(3, dtype=torch.uint8),
    "short": torch.ones(2, dtype=torch.int16),
    "int": torch.ones(2, dtype=torch.int32),
    "bool": torch.tensor([True, False]),
    "complex": torch.ones(2, dtype=torch.complex64),
    "unsigned": torch.ones(3, dtype=torch.uint16),
    "unsigned int": torch.ones(3, dtype=torch.uint32),
    "unsigned long": torch.ones(3, dtype=torch.uint64),
}


def equal(first, second):
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def test_safetensors_round_trip(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(VARIED))
    assert equal(read_safetensors(tmp_path / "a.safetensors")[0], VARIED)


def test_safetensors_as_the_package_has_them(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    (tmp_path / "ours").write_bytes(safetensors_bytes(VARIED))
    assert equal(package.load_file(tmp_path / "ours"), VARIED)
    package.save_file({name: tensor.contiguous() for name, tensor in VARIED.items()}, tmp_path / "theirs", metadata={"a": "b"})
    assert equal(read_safetensors(tmp_path / "theirs")[0], VARIED)


def header(text, body=b""):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content, words",
    [
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
        (header({"a": entry(dtype="F33")}, bytes(8)), "it holds no ViT: none of a ... is patch_embed.proj.weight"),
        (header({"a": entry(offsets=(8, 0), dtype="F33")}, bytes(8)), "does not take the bytes"),
        (header({"a": entry([2**31] * 8, dtype="F33")}, bytes(8)), "cannot be read"),
        (header({"a": entry(dtype=["F32"])}, bytes(8)), "impossible dtype"),
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
        (header({"\x1b[31m\n": entry(dtype=0)}, bytes(8)), "impossible dtype"),
    ],
)
def test_hostile_safetensors_end_in_one_line(tmp_path, content, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
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


def zipped(records):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return target.getvalue()


def at(*prefixes):
    """As much of a ViT as tells one, under each prefix."""
    return {f"{prefix}.patch_embed.proj.weight": torch.ones(2) for prefix in prefixes}


def holding_itself():
    content = {"epoch": 3}
    content["content"] = content
    return content


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "it is empty"),
        (b"version https://git-lfs", "it begins with b'vers'"),
        (b"PK\x03\x04", "cut off or damaged"),
        (torch_bytes({"model": network()})[:-2000], "cut off or damaged"),
        (torch_bytes([torch.ones(2)]), "a list, not weights by name"),
        (torch_bytes({"epoch": 3}), "holds no weights"),
        (torch_bytes({3: torch.ones(2)}), "holds no weights"),
        (torch_bytes({"net": {"conv1.weight": torch.ones(2)}}), "no ViT: none of conv1.weight ... is patch_embed.proj.weight"),
        (torch_bytes({"a": torch.eye(3).to_sparse()}), "no ViT"),
        (resized(torch_bytes({"a": torch.ones(200)}), b"K\xc8\x85", b"J\x00\x00\x00\x01\x85"), "cannot be read"),
        (torch_bytes({"a": torch.ones(200)}, zipped=False).replace(b"K\xc8\x85", b"J\x00\x00\x00\x01\x85"), "cannot be read"),
        (deflated(torch_bytes({"a": torch.zeros(10**5)})), "its records claim more bytes"),
        (zipped({"a.npy": b"1"}), "no data.pkl"),
        (pickle.dumps({"a": 1}, protocol=4), "cannot be read (Unsupported operand 149)"),
        (torch_bytes(holding_itself()), "holds no weights"),
        (
            torch_bytes({"k" * 10**5: {"a" * 10**5 + ".patch_embed.proj.weight": torch.ones(2)}} | at("b", "c")),
            "several encoders",
        ),
        (torch_bytes(at("student.module.backbone", "teacher.backbone")), "(student.module.backbone, teacher.backbone); save"),
        (
            torch_bytes({"student": at("module.backbone"), "teacher": at("backbone")}),
            "(student.module.backbone, teacher.backbone)",
        ),
        (torch_bytes({"state_dict": at("encoder_q", "encoder_k")}), "(state_dict.encoder_q, state_dict.encoder_k)"),
        (torch_bytes({"net": at("m"), "ema": {"shadow": network()}}), "(net.m, ema.shadow)"),
    ],
)
def test_hostile_torch_files_end_in_one_line(tmp_path, content, words):
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_weights(path)
    assert words in str(raised.value) and str(raised.value).isprintable()


@pytest.mark.parametrize("write", [torch_bytes, lambda content: torch_bytes(content, zipped=False), pickle.dumps])
def test_nothing_in_a_file_is_executed(tmp_path, write):
    mark, path = tmp_path / "executed", tmp_path / "bad.pth"
    path.write_bytes(write({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(harm=Harmful(mark))}))
    with pytest.raises(UserError), warnings.catch_warnings(record=True) as warned:
        read_weights(path)
    assert not mark.exists() and not warned


def test_a_flipped_bit_among_the_weights_is_seen(tmp_path):
    raw = bytearray(torch_bytes({"a": torch.ones(1000)}))
    raw[len(raw) // 2] ^= 1
    (tmp_path / "bad.pth").write_bytes(raw)
    with pytest.raises(UserError, match="cut off or damaged .Bad CRC-32"):
        read_weights(tmp_path / "bad.pth")


# ----------------------------------------------------------------------------------------- what a file may hold beside


@pytest.mark.parametrize("zip_or_pickle", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        lambda w: {"epoch": 3, "model_state_dict": w},
        lambda w: {"net": w, "acc": 83.5},
        lambda w: {"state": {"student": {f"module.encoder.{name}": tensor for name, tensor in w.items()}}},
        lambda w: {"net": w, "also net": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        lambda w: {"model": {"conv1.weight": torch.ones(3)}, "vit": w},
        lambda w: {"model": w, "model_ema": network(5)},
        lambda w: {"state_dict": w, "teacher": network(5)},
        lambda w: {f"model.{name}": tensor for name, tensor in w.items()} | at("model_ema"),
    ],
)
def test_weights_are_found_wherever_they_are(tmp_path, content, zip_or_pickle):
    weight = network()
    (tmp_path / "weights").write_bytes(torch_bytes(content(weight), zip_or_pickle))
    taken, _ = fit(read_weights(tmp_path / "weights").weights, shapes())
    assert equal(taken, weight)


def test_what_is_chosen_of_several_is_said(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(torch_bytes({"model": network(1), "model_ema": network(2)}))
    assert read_weights(path).choice == "of model, not of model_ema"
    path.write_bytes(torch_bytes({"model": network(1), "best": {"epoch": 3, "model": network(2)}}))  # as finetune saves
    assert read_weights(path).choice == "of best.model, not of model" and equal(read_weights(path).weights, network(2))
    path.write_bytes(torch_bytes(network(1)))
    assert read_weights(path).choice == ""


def test_what_stands_beside_an_encoder_is_not_taken_for_it(tmp_path):
    weight = {name: tensor for name, tensor in network().items() if not is_decoder(name)}
    beside = {"norm.weight": torch.zeros(16), "neck.weight": torch.ones(2), "neck.bias": torch.ones(2)}
    (tmp_path / "weights").write_bytes(safetensors_bytes({f"m.{name}": tensor for name, tensor in weight.items()} | beside))
    found = read_weights(tmp_path / "weights")
    taken, line = fit(found.weights, shapes(), found.others)
    assert equal(taken, weight) and line.endswith("; unused: norm, neck (2)")


HELD = {
    "a path": argparse.Namespace(output=pathlib.PurePosixPath("out"), data=pathlib.PureWindowsPath("in")),
    "a real path": [pathlib.Path("out")],
    "a number": np.float64(83.5),
    "an array": {"classes": np.arange(3), "names": np.array(["a", "b"])},
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("zip_or_pickle", [True, False])
def test_harmless_objects_may_stand_beside(tmp_path, held, zip_or_pickle):
    (tmp_path / "weights").write_bytes(torch_bytes({"model": network(), "held": HELD[held]}, zip_or_pickle))
    assert equal(read_weights(tmp_path / "weights").weights, network())


class Settings:
    """Of a program that is not here."""


@pytest.mark.parametrize("zip_or_pickle", [True, False])
@pytest.mark.parametrize(
    "content, name",
    [
        (lambda: {"model": network(), "settings": Settings()}, f"{__name__}.Settings"),
        (lambda: {"model": network(), "args": argparse.Namespace(settings=Settings())}, f"{__name__}.Settings"),
        (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda: {"model": network(), "harm": Harmful("x")}, f"{os.name}.mkdir"),
        (lambda: {"model": network(), "harm": np.random.default_rng(0)}, "numpy.random"),
    ],
)
def test_an_object_of_another_class_is_named(tmp_path, content, name, zip_or_pickle):
    path = tmp_path / "weights"
    path.write_bytes(torch_bytes(content(), zip_or_pickle))
    with pytest.raises(UserError) as raised:
        read_weights(path)
    line = str(raised.value)
    assert line.startswith(f"{path}: it holds an object of {name}") and line.endswith("torch.save(model.state_dict(), FILE)")
    assert "damaged" not in line and "?" not in line


def test_a_file_without_checksums_is_used(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        raw = torch_bytes({"model": network()})
    finally:
        torch.serialization.set_crc32_options(True)
    (tmp_path / "weights").write_bytes(raw)
    assert not any(record.CRC for record in zipfile.ZipFile(tmp_path / "weights").infolist())
    assert equal(read_weights(tmp_path / "weights").weights, network())


UNNEEDED = {
    "bool": torch.ones(4, dtype=torch.bool),
    "complex": torch.ones(4, dtype=torch.complex64),
    "unsigned": torch.ones(1, dtype=torch.uint16),
}


@pytest.mark.parametrize("kind", UNNEEDED)
@pytest.mark.parametrize("write", [torch_bytes, safetensors_bytes])
def test_a_tensor_that_is_not_needed_may_be_of_any_type(tmp_path, kind, write):
    path = tmp_path / "weights"
    path.write_bytes(write(network() | {"attn_mask": UNNEEDED[kind]}))
    taken, line = fit(read_weights(path).weights, shapes())
    assert equal(taken, network()) and line.endswith("unused: attn_mask")
    path.write_bytes(write(network() | {"norm.bias": UNNEEDED[kind]}))
    with pytest.raises(UserError, match=f"norm.bias is not of floating-point numbers but {UNNEEDED[kind].dtype}"):
        fit(read_weights(path).weights, shapes())


@pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), torch.ones(3, device="meta"), torch.ones(1).expand(10**12)])
def test_nor_need_it_be_an_ordinary_one(tmp_path, odd):
    (tmp_path / "weights").write_bytes(torch_bytes(network() | {"odd": odd}))
    taken, line = fit(read_weights(tmp_path / "weights").weights, shapes())
    assert equal(taken, network()) and line.endswith("unused: odd")


def test_a_type_that_is_not_known_is_kept_out(tmp_path):
    raw, path = safetensors_bytes(network() | {"mask_token": torch.ones(1, 1, 8), "scales": torch.ones(4)}), tmp_path / "file"
    length = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + length])
    content["scales"]["dtype"] = "F8_E8M0"
    path.write_bytes(header(content, raw[8 + length :]))
    taken, line = fit(read_weights(path).weights, shapes())
    assert equal(taken, network() | {"mask_token": torch.ones(1, 1, 8)}) and line.endswith("unused: scales")
    content["norm.bias"]["dtype"] = "F4"
    path.write_bytes(header(content, raw[8 + length :]))
    with pytest.raises(UserError, match="norm.bias is not of floating-point numbers but of a type unknown here"):
        fit(read_weights(path).weights, shapes())


# -------------------------------------------------------------------------------------------------- numbers of heads


def started(path, heads=2, decoder_heads=2, width=16):
    """What starting_weights makes of a file, for an autoencoder of these heads."""
    with torch.device("meta"):
        modules = [mlo_mae.Encoder(16, 4, 3, width, 2, heads), mlo_mae.Decoder(16, 4, 3, width, 8, 1, decoder_heads)]
    fresh = torch.zeros(sum(p.numel() for module in modules for p in module.parameters()))
    return starting_weights(path, modules, fresh, {"heads": heads, "decoder_heads": decoder_heads})


CALLS = {
    "timm.models.VisionTransformer(img_size=16, depth=2, num_heads=4, num_classes=2)": {"heads": 4},
    "MaskedAutoencoderViT(num_heads=4, decoder_embed_dim=8, decoder_num_heads=8)": {"heads": 4, "decoder_heads": 8},
    "timm.create_model('vit_base_patch16_224', num_classes=2)": {"heads": 12},
    "timm.create_model('vit_large_patch16_224', num_classes=2)": {"heads": 16},
    "another(decoder_num_heads=2)": {"decoder_heads": 2},
    "num_heads=" + "9" * 5000: {},
}


@pytest.mark.parametrize("call", CALLS)
def test_the_heads_that_a_file_states_are_read(tmp_path, call):
    (tmp_path / "pth").write_bytes(torch_bytes({"model": network(), "call": call}))
    with open(tmp_path / "safetensors", "wb") as file:
        write_safetensors(network(), file, {"call": call})
    for kind in ("pth", "safetensors"):
        assert read_weights(tmp_path / kind).heads == CALLS[call]


def test_registers_of_which_there_are_none_are_no_matter(tmp_path):
    torch.save({"model": network() | {"register_tokens": torch.ones(1, 0, 16)}}, tmp_path / "file")
    assert read_weights(tmp_path / "file").weights.keys() >= network().keys()


def test_the_pixels_that_a_fine_tunings_checkpoint_knows_are_read(tmp_path):
    known = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    torch.save({"model": network(), "data": known | {"channels": 3}}, tmp_path / "file")
    assert read_weights(tmp_path / "file").pixels == (known["mean"], known["std"])
    for data in ({"mean": [0.1]}, 3, None, {}):
        torch.save({"model": network(), "data": data}, tmp_path / "file")
        assert read_weights(tmp_path / "file").pixels is None


@pytest.mark.parametrize("facts", [{"call": 7}, {"call": None}, {"config": {"heads": "2"}}, {"config": 3}, {}])
def test_facts_of_another_kind_state_no_heads(tmp_path, facts):
    (tmp_path / "file").write_bytes(torch_bytes({"model": network()} | facts))
    assert read_weights(tmp_path / "file").heads == {}
    for metadata in (facts, [], 3, None):
        raw = safetensors_bytes(network())
        content = json.loads(raw[8 : 8 + (length := int.from_bytes(raw[:8], "little"))]) | {"__metadata__": metadata}
        (tmp_path / "file").write_bytes(header(content, raw[8 + length :]))
        assert read_weights(tmp_path / "file").heads == {}


def test_other_heads_than_the_files_end_in_one_line(tmp_path, capsys):
    path = tmp_path / "weights"
    path.write_bytes(torch_bytes({"model": network(), "config": {"heads": 2, "decoder_heads": 4}}))
    with pytest.raises(UserError, match=r"weights: these weights fit --heads 2, not --heads 4: give --heads 2$"):
        started(path, heads=4)
    with pytest.raises(UserError, match=r"fit --width 16 --heads 2, not --width 32 --heads 4: give --width 16 --heads 2$"):
        started(path, heads=4, width=32)
    with pytest.raises(
        UserError, match=r"weights: these weights fit --decoder-heads 4, not --decoder-heads 2: give --decoder"
    ):
        started(path)
    assert started(path, decoder_heads=4).any() and "heads unknown" not in capsys.readouterr().err


def test_heads_that_a_file_does_not_state_are_said_to_be_unknown(tmp_path, capsys):
    (tmp_path / "weights").write_bytes(safetensors_bytes(network()))
    started(tmp_path / "weights")
    assert "; heads unknown, the file does not say: --heads 2 --decoder-heads 2 taken" in capsys.readouterr().err
    encoder = {name: tensor for name, tensor in network().items() if not is_decoder(name)}
    (tmp_path / "weights").write_bytes(safetensors_bytes(encoder))
    started(tmp_path / "weights")
    assert "; heads unknown, the file does not say: --heads 2 taken" in capsys.readouterr().err


def test_a_file_of_another_network_is_named(tmp_path):
    (tmp_path / "weights").write_bytes(safetensors_bytes(network(depth=1)))
    with pytest.raises(UserError, match="weights: these weights fit --depth 1"):
        started(tmp_path / "weights")


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


def nested(content):
    """The weights under other keys and with a prefix, beside what training programs keep too."""
    weights = {f"module.backbone.{name}": tensor for name, tensor in content["model"].items()}
    beside = {"args": argparse.Namespace(output=pathlib.PurePosixPath("out")), "best": np.float64(0.5)}
    return {"epoch": 3, "state": {"model_state_dict": weights | {"head.bias": torch.ones(2)}}} | beside


FORMATS = {
    "zip": (torch_bytes, mutated),
    "nested zip": (lambda content: torch_bytes(nested(content)), mutated),
    "nested pickle": (lambda content: torch_bytes(nested(content)), inside("data.pkl")),
    "nested legacy": (lambda content: torch_bytes(nested(content), zipped=False), mutated),
    "prefixed safetensors header": (
        lambda content: safetensors_bytes(nested(content)["state"]["model_state_dict"]),
        in_header,
    ),
    "pickle": (torch_bytes, inside("data.pkl")),
    "legacy": (lambda content: torch_bytes(content, zipped=False), mutated),
    "safetensors": (lambda content: safetensors_bytes(content["model"]), mutated),
    "safetensors header": (lambda content: safetensors_bytes(content["model"]), in_header),
    "safetensors numbers": (lambda content: safetensors_bytes(content["model"]), numbers),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.slow
def test_fuzz(tmp_path, kind):
    """A damaged file gives tensors or a UserError of one line. Nothing else, and soon."""
    write, damage = FORMATS[kind]
    whole, path, expected = write(public(network(depth=1))), tmp_path / "file", shapes(depth=1)
    accepted, slowest = 0, 0.0
    for number in range(FUZZ):
        path.write_bytes(damage(whole, np.random.default_rng([number, *kind.encode()])))
        start = time.monotonic()
        try:
            fit(read_weights(path).weights, expected)
            accepted += 1
        except UserError as error:
            assert str(error).isprintable()
        except BaseException:
            print(f"{kind} number {number}")
            raise
        slowest = max(slowest, time.monotonic() - start)
    path.write_bytes(whole)
    fit(read_weights(path).weights, expected)  # it was the damage
    print(f"fuzz {kind}: {FUZZ} files, {accepted} accepted, {FUZZ - accepted} refused, 0 other, slowest {slowest:.2f} s")
    assert slowest < 20
