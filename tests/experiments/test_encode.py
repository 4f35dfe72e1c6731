"""Trained networks for images of one's own: what is taken, what is refused, and that numbers are those of the run."""

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import arguments, write_folder
from PIL import Image
from tqdm import tqdm

import mlo_mae
from experiments import encode as program
from experiments import open_run
from experiments.encode import Model, encode, main, shown_rows
from harness import UserError
from harness.pictures import as_images
from harness.readers import decode, list_any
from kernels import gather_patches

SIZE = 16  # pixels of `sides`


def some_images(count=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(whole_run):
    return mlo_mae.load(whole_run[0], "cpu")


def test_the_same_images_in_every_form(model):
    images = some_images()
    tensors = torch.from_numpy(images).movedim(3, 1)
    forms = [tensors, tensors / 255, (tensors / 255).double(), [Image.fromarray(image) for image in images]]
    expected = model.features(images)
    assert expected.shape == (5, model.net.cfg.width) and expected.dtype == torch.float32
    for form in forms:
        assert torch.equal(model.features(form), expected)
    assert torch.equal(model.features(Image.fromarray(images[2])), model.features(images[2:3]))
    assert torch.equal(model.features(images, "cls"), mlo_mae.encode(*encoder_of(model), model.inputs(images), "cls"))
    assert not torch.allclose(model.features(images, "cls"), expected)


def encoder_of(model):
    return model.net, model.state.theta.params[: model.net.encoder_size]


def test_features_and_weights_are_the_runs(model, whole_run):
    """Of the validation images, which the model is given as bytes, and the run reads by itself."""
    net, state, splits = open_run(str(whole_run[0]), "cpu")  # a str, as good as a Path
    images = splits.val.images.movedim(1, 3).numpy()
    batch = next(splits.val.ordered(len(splits.val)))
    assert torch.allclose(model.inputs(images), batch.images, atol=1e-5)
    expected = mlo_mae.encode(net, state.theta.params[: net.encoder_size], batch.images)
    assert torch.allclose(model.features(images), expected, atol=1e-5)
    p = mlo_mae.masking_probability(net, state.psi.params, batch.images, mlo_mae.eyes_of(net, state))
    grid = SIZE // net.cfg.patch_size
    assert model.weights(images).shape == (len(images), grid, grid) and p.std() > 0
    assert torch.allclose(model.weights(images).flatten(1), p, atol=1e-5)


def test_many_images_are_worked_through_in_batches(model, monkeypatch):
    images, sizes, real = some_images(9), [], mlo_mae.encode
    expected = model.features(images)
    monkeypatch.setattr("experiments.encode.AT_A_TIME", 4)
    monkeypatch.setattr(
        mlo_mae, "encode", lambda net, params, some, *rest: sizes.append(len(some)) or real(net, params, some, *rest)
    )
    normalised, real_inputs = [], Model.normalised
    monkeypatch.setattr(Model, "normalised", lambda *how: normalised.append(len(how[1])) or real_inputs(*how))
    assert torch.allclose(model.features(images), expected, atol=1e-6) and sizes == normalised == [4, 4, 1]


def test_files_are_decoded_several_at_once(model, tmp_path, monkeypatch):
    """Each waits for another."""
    both, real = threading.Barrier(2, timeout=20), program.picture
    root = write_folder(tmp_path / "files", (("train", 4),)) / "train"
    expected = [names for names, _ in program.chunks([root], SIZE, 3, tqdm(total=0, disable=True))]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(program, "picture", lambda *how: both.wait() is None or real(*how))
    (found,) = program.chunks([root], SIZE, 3, tqdm(total=0, disable=True))
    assert [found[0]] == expected and len(found[0]) == 8
    alone = [real(Path(name), SIZE, 3) for name in found[0]]
    assert np.array_equal(found[1], np.stack(alone))


def test_the_module_is_the_encoder(model):
    images = some_images()
    encoder = model.encoder
    tokens = encoder(model.inputs(images))
    assert torch.allclose(tokens[:, 1:].mean(1), model.features(images), atol=1e-6)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    with torch.no_grad():
        next(encoder.parameters()).add_(1)  # its weights are its own
    assert torch.allclose(model.encoder(model.inputs(images)), tokens)


def test_reconstructions(model):
    """Visible pixels are the images'; hidden patches have the true ones' mean and deviation, and the decoder's form."""
    images, size = some_images(), model.net.cfg.patch_size
    pixels, hidden = model.reconstruct(images, seed=3)
    assert pixels.shape == (5, SIZE, SIZE, 3) and pixels.min() >= 0 and pixels.max() <= 1
    grid = SIZE // size
    assert hidden.shape == (5, grid, grid) and hidden.dtype == torch.bool
    assert hidden.flatten(1).sum(1).tolist() == [model.net.patches - model.net.visible] * 5
    large = hidden.repeat_interleave(size, 1).repeat_interleave(size, 2)
    true = torch.from_numpy(images).float() / 255
    assert torch.allclose(pixels[~large], true[~large], atol=1e-6)
    assert not torch.allclose(pixels[large], true[large], atol=0.05)
    inside = (pixels > 0) & (pixels < 1)  # what lies outside is cut off
    made, given = (gather_patches(x.movedim(3, 1), None, size) for x in (pixels, true))
    whole = gather_patches(inside.float().movedim(3, 1), None, size).all(2)
    assert (whole & hidden.flatten(1)).any()
    spread = (made - given)[whole & hidden.flatten(1)].reshape(-1, size * size, 3)
    assert spread.abs().max() > 0.01
    again, other = (model.reconstruct(images, seed=seed)[1] for seed in (3, 4))
    assert torch.equal(again, hidden) and not torch.equal(other, hidden)


def test_masks_do_not_come_back_with_the_next_images(model, monkeypatch):
    monkeypatch.setattr("experiments.encode.AT_A_TIME", 2)
    hidden = model.reconstruct(some_images(5))[1]
    assert len({tuple(mask.flatten().tolist()) for mask in hidden}) == 5


def test_a_model_says_in_a_line_what_it_is(model):
    assert repr(model).startswith("Model(encoder, decoder, T: width ") and "\n" not in repr(model)


def test_a_patch_that_is_reconstructed_as_it_is_comes_back(model, monkeypatch):
    """The normalisation, there and back: a decoder that knows the truth gives it."""
    images = some_images()
    inputs = model.inputs(images)
    target = gather_patches(inputs, None, model.net.cfg.patch_size)
    truth = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    monkeypatch.setattr("experiments.call", lambda module, *rest: truth if module is model.net.decoder else rest[1])
    pixels, _ = model.reconstruct(images)
    assert torch.allclose(pixels, torch.from_numpy(images) / 255, atol=1e-5)


IMAGES, TENSORS = some_images(), torch.from_numpy(some_images()).movedim(3, 1)
REFUSED = [
    (IMAGES / 255, "arrays are expected in uint8, from 0 to 255; these are float64 from 0 to 1"),
    (IMAGES[:, :8], r"arrays are expected as \[N, 16, 16, 3\]; these are \[5, 8, 16, 3\]"),
    (IMAGES.transpose(0, 3, 1, 2), r"these are \[5, 3, 16, 16\]"),
    (IMAGES[0], r"these are \[16, 16, 3\]"),
    (IMAGES[..., :1], r"these are \[5, 16, 16, 1\]"),
    (IMAGES // 255, "uint8 are expected from 0 to 255; the highest of these is 1"),
    (IMAGES[:0], "there are no images"),
    (TENSORS.float(), "floats from 0 to 1 before they are normalised; these are torch.float32, from 0 to 255"),
    (TENSORS / 255 - 0.5, "these are torch.float32, from -0.5 to 0.5"),
    (TENSORS / 0.0, "these are torch.float32, from nan to nan"),
    (TENSORS.long(), "these are torch.int64, from 0 to 255"),
    (TENSORS[0], r"tensors are expected as \[N, 3, 16, 16\]; these are \[3, 16, 16\]"),
    ([IMAGES[0]], "these are list"),
    ([], "these are list"),
    ("image.png", "these are str"),
]


@pytest.mark.parametrize("images, words", REFUSED, ids=[words for _, words in REFUSED])
def test_what_might_be_read_wrongly_is_refused(model, images, words):
    for what in (model.features, model.weights, model.reconstruct):
        with pytest.raises(UserError, match=words):
            what(images)


def test_pictures_of_other_sizes_are_cut_as_folders_are(model, tmp_path):
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 80, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    expected = decode(tmp_path / "a.png", SIZE, None)
    with Image.open(tmp_path / "a.png") as image:
        before = image.copy()
        assert torch.equal(model.features(image), model.features(expected.transpose(1, 2, 0)[None]))
        assert np.array_equal(np.asarray(image), np.asarray(before))  # the caller's own stays


def test_a_photo_is_turned_upright(model, tmp_path):
    image = Image.fromarray(some_images(1)[0])
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(np.asarray(image), -1)
    with Image.open(tmp_path / "a.png") as turned:
        assert torch.equal(model.features(turned), model.features(upright[None]))
        assert not torch.allclose(model.features(turned), model.features(np.asarray(image)[None]), atol=1e-3)


# ------------------------------------------------------------------------------------------------- public weights


@pytest.fixture(scope="module")
def exports(whole_run, tmp_path_factory):
    """{kind: file} of the run's weights for others."""
    folder, files = tmp_path_factory.mktemp("exports"), {"timm": "a.safetensors", "mae": "b.pth"}
    for kind, name in files.items():
        assert mlo_mae.main(["export", str(whole_run[0]), "--to", kind, "--file", str(folder / name)]) == 0
    return {kind: folder / name for kind, name in files.items()}


def test_what_was_exported_comes_back(model, exports, capsys):
    """Sizes, heads, mean and deviation are the file's."""
    images = some_images()
    for kind, path in exports.items():
        other = mlo_mae.load(str(path), "cpu")
        assert torch.allclose(other.features(images), model.features(images), atol=1e-6)
        with pytest.raises(UserError, match="no T that has learned"):
            other.weights(images)
        assert other.decodes == (kind == "mae")
    pixels, hidden = other.reconstruct(images)
    assert pixels.shape == (5, SIZE, SIZE, 3) and hidden.any()
    with pytest.raises(UserError, match="there is no decoder"):
        mlo_mae.load(exports["timm"], "cpu").reconstruct(images)


def test_features_are_timms(exports):
    timm = pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    other = mlo_mae.load(exports["timm"], "cpu")
    cfg = other.net.cfg
    sizes = {"img_size": SIZE, "patch_size": cfg.patch_size, "embed_dim": cfg.width, "depth": cfg.depth}
    theirs = VisionTransformer(**sizes, num_heads=cfg.heads, num_classes=0).eval()
    theirs.load_state_dict(other.encoder.state_dict())
    images = some_images()
    with torch.no_grad():
        tokens = theirs.forward_features(other.inputs(images))
    assert torch.allclose(other.features(images, "cls"), tokens[:, 0], atol=1e-5), timm.__version__
    assert torch.allclose(other.features(images, "mean"), tokens[:, 1:].mean(1), atol=1e-5)


@pytest.fixture
def bare_weights(exports, tmp_path):
    """An encoder's weights and nothing else, as most files have them; with changes."""

    def write(**changes):
        weights = torch.load(exports["mae"], weights_only=True)["model"] | changes
        torch.save({name: x for name, x in weights.items() if x is not None}, tmp_path / "bare.pth")
        return tmp_path / "bare.pth"

    return write


def test_weights_that_do_not_say_their_heads(model, bare_weights, capsys):
    path, cfg = bare_weights(), model.net.cfg
    with pytest.raises(UserError, match="does not say how many heads its encoder has; give heads"):
        mlo_mae.load(path, "cpu")
    other = mlo_mae.load(path, "cpu", heads=cfg.heads, mean=model.mean, std=model.std)
    assert torch.allclose(other.features(some_images()), model.features(some_images()), atol=1e-6) and not other.decodes
    assert mlo_mae.load(path, "cpu", heads=cfg.heads, decoder_heads=cfg.decoder_heads).decodes
    capsys.readouterr()
    assert mlo_mae.load(path, "cpu", heads=cfg.heads).mean == pytest.approx([0.485, 0.456, 0.406])
    assert "does not say its pixels' mean and deviation: ImageNet's taken" in capsys.readouterr().err


def test_pixels_may_be_given_on_the_command_line(model, bare_weights, tmp_path):
    for name, image in zip("ab", some_images()):
        Image.fromarray(np.asarray(image)).save(tmp_path / f"{name}.png")
    images = [str(tmp_path / f"{name}.png") for name in "ab"]
    words = [str(bare_weights()), *images, "--heads", str(model.net.cfg.heads), "--out", str(tmp_path / "out.npz")]
    assert main([*words, "--mean", *map(str, model.mean), "--std", *map(str, model.std)]) == 0
    with np.load(tmp_path / "out.npz") as found:
        expected = mlo_mae.load(bare_weights(), "cpu", heads=model.net.cfg.heads, mean=model.mean, std=model.std)
        assert np.allclose(found["features"], expected.features(some_images()[:2]), atol=1e-5)


def test_a_decoder_that_is_not_the_files_is_none(model, bare_weights):
    """One that begins anew would show a reconstruction that means nothing."""
    heads = {"heads": model.net.cfg.heads, "decoder_heads": model.net.cfg.decoder_heads}
    assert mlo_mae.load(bare_weights(), "cpu", **heads).decodes
    odd = mlo_mae.load(bare_weights(decoder_norm_too=None, **{"decoder_blocks.0.norm3.weight": torch.ones(4)}), "cpu", **heads)
    assert not odd.decodes
    with pytest.raises(UserError, match="no decoder"):
        odd.reconstruct(some_images())


def test_a_decoder_of_pixels_gives_pixels(model, bare_weights):
    heads = {"heads": model.net.cfg.heads, "decoder_heads": model.net.cfg.decoder_heads, "mean": model.mean, "std": model.std}
    made, hidden = mlo_mae.load(bare_weights(), "cpu", raw_pixels=True, **heads).reconstruct(some_images(), 3)
    plain, _ = mlo_mae.load(bare_weights(), "cpu", **heads).reconstruct(some_images(), 3)
    inputs = model.inputs(some_images())
    _, keep, restore, mask = mlo_mae.load(bare_weights(), "cpu", **heads).draw(inputs, 3, 0)
    encoder_params, decoder_params = model.state.theta.params.tensor_split([model.net.encoder_size])
    tokens = mlo_mae.call(model.net.encoder, encoder_params, inputs, keep)
    patches = mlo_mae.call(model.net.decoder, decoder_params, tokens, restore)
    expected = as_images(patches.detach(), model.net.cfg.patch_size, model.mean, model.std)
    there = hidden.repeat_interleave(model.net.cfg.patch_size, 1).repeat_interleave(model.net.cfg.patch_size, 2)
    assert np.allclose(made[there].numpy(), expected[there.numpy()], atol=1e-5) and not torch.allclose(made, plain, atol=1e-2)
    assert torch.equal(made[~there], plain[~there])
    raw = mlo_mae.load(bare_weights(), "cpu", raw_pixels=True, **heads)
    rows, text = shown_rows(raw, some_images())  # in a picture, too
    assert np.allclose(rows[-1][1], raw.reconstruct(some_images())[0].numpy(), atol=1e-5)
    assert "mean and contrast" not in text and text.endswith("as reconstructed.")
    assert shown_rows(model, some_images())[1].endswith("as reconstructed, with each true patch's mean and contrast.")


def test_a_t_that_has_not_learned_does_not_choose(whole_run):
    """Before --mask-start p is 1 and chance hides, here as in the run."""
    late = mlo_mae.load(whole_run[0], "cpu")
    late.net.cfg = dataclasses.replace(late.net.cfg, mask_start=0.5)
    early = dataclasses.replace(late, state=late.state._replace(psi=late.state.psi._replace(t=0)))
    prob, _, _, mask = early.draw(early.inputs(some_images()), 0, 0)
    assert (prob == 1).all() and mask.any()
    assert not (late.draw(late.inputs(some_images()), 0, 0)[0] == 1).any()


def test_what_does_not_go_together_is_refused(whole_run, exports, bare_weights, tmp_path):
    width = mlo_mae.load(whole_run[0], "cpu").net.cfg.width
    for words, path, how in (
        ("knows its heads", whole_run[0], {"heads": 2}),
        ("nowhere does not exist", tmp_path / "nowhere", {}),
        ("it says that it has 2 heads, not 4", exports["timm"], {"heads": 4}),
        (f"--width {width} is not a multiple of its 5 heads", bare_weights(), {"heads": 5}),
        ("mean and std go together", bare_weights(), {"heads": 2, "mean": [0.5] * 3}),
        ("are not those of 3 channels", bare_weights(), {"heads": 2, "mean": [0.5], "std": [0.5]}),
        ("are not those of 3 channels", bare_weights(), {"heads": 2, "mean": [0.5] * 3, "std": [0.5, 0.5, 0]}),
        ("no norm of tokens but that of a classifier", "pooled", {"heads": 2}),
        ("no 'pos_embed'", "no positions", {"heads": 2}),
    ):
        if path == "pooled":
            path = bare_weights(**{"norm.weight": None, "norm.bias": None, "fc_norm.weight": torch.ones(width)})
        if path == "no positions":
            path = bare_weights(pos_embed=None)
        with pytest.raises(UserError, match=words):
            mlo_mae.load(path, "cpu", **how)


def test_a_run_without_a_t_has_no_weights(sides, tmp_path):
    assert mlo_mae.main(arguments(sides, tmp_path / "mae", "--masking", "random", "--epochs", 1)) == 0
    model = mlo_mae.load(tmp_path / "mae", "cpu")
    with pytest.raises(UserError, match="no T that has learned"):
        model.weights(some_images())
    assert model.reconstruct(some_images())[0].shape == (5, SIZE, SIZE, 3)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Three PNGs, two of them in a folder, and an .npz of five, in the working folder."""
    monkeypatch.chdir(tmp_path)
    images = some_images(8)
    os.makedirs("folder/inner")
    for name, image in zip(("one.png", "folder/b.png", "folder/inner/a.png"), images):
        Image.fromarray(image).save(name)
    (tmp_path / "folder/notes.txt").write_text("no image")
    Image.fromarray(images[0]).save("folder/.hidden.png")
    np.savez("some.npz", test_images=images[3:6], images=images[6:], labels=np.arange(2))
    return images


NAMES = ["one.png", "some.npz:images[0]", "some.npz:images[1]", *(f"some.npz:test_images[{n}]" for n in range(3))]
NAMES += [os.path.join("folder", "b.png"), os.path.join("folder", "inner", "a.png")]


@pytest.mark.parametrize("at_a_time", [256, 2])
def test_encode(whole_run, model, pictures, capsys, monkeypatch, at_a_time):
    monkeypatch.setattr("experiments.encode.AT_A_TIME", at_a_time)
    words = ["one.png", "some.npz", "folder", "--out", "out.npz", "--masks", "masks.png", "--device", "cpu"]
    assert main([str(whole_run[0]), *words]) == 0
    printed = capsys.readouterr()
    width = model.net.cfg.width
    assert json.loads(printed.out) == {
        "command": "encode",
        "run": str(whole_run[0]),
        "images": 8,
        "width": width,
        "pooling": model.net.cfg.pooling,
        "file": "out.npz",
        "picture": "masks.png",
        "images in it": 8,
    }
    assert "8/8" in printed.err
    with np.load("out.npz") as found:
        assert found["names"].tolist() == NAMES and found["features"].dtype == np.float32
        expected = model.features(pictures[[0, 6, 7, 3, 4, 5, 1, 2]]).numpy()
        assert np.allclose(found["features"], expected, atol=1e-6)
    with Image.open("masks.png") as picture:
        assert picture.width > 8 * 100
    before = os.path.getmtime("out.npz")
    assert main([str(whole_run[0]), *words]) == 2 and "out.npz exists already" in capsys.readouterr().err
    assert os.path.getmtime("out.npz") == before


@pytest.mark.parametrize(
    "paths, more, words",
    [
        (["absent.png"], [], "absent.png does not exist"),
        (["folder/notes.txt"], [], "notes.txt: cannot be used"),
        (["empty"], [], "there are no images in empty"),
        (["one.png", "large.npz"], [], "large.npz: images: arrays are expected as [N, 16, 16, 3]; these are [2, 20, 20, 3]"),
        (["labels.npz"], [], "labels.npz: it has labels, and no images"),
        (["broken.npz"], [], "broken.npz: it is no whole .npz file"),
        (["one.png"], ["--masks", "no/masks.png"], "no is no folder"),
        (["one.png"], ["--heads", "3"], "which knows its heads"),
    ],
)
def test_what_cannot_be_encoded_ends_in_one_line_and_writes_nothing(whole_run, pictures, capsys, paths, more, words):
    os.makedirs("empty")
    np.savez("large.npz", images=np.zeros((2, 20, 20, 3), np.uint8))
    np.savez("labels.npz", labels=np.arange(2))
    with open("broken.npz", "wb") as file:
        file.write(b"PK")
    assert main([str(whole_run[0]), *paths, "--out", "out.npz", *more]) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("mlo_mae: ")]
    assert words in line and not os.path.exists("out.npz")


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names of files are text there")
def test_names_may_be_anything(whole_run, pictures, capsys):
    """What is shown of them is on one line, and what is kept can be written."""
    with open("one.png", "rb") as file:
        content = file.read()
    os.makedirs("odd")
    for name in (b"two\nlines.png", b"\xff\xfe.png", "\u6f22.png".encode(), b"$x$.png"):
        with open(os.path.join(b"odd", name), "wb") as file:
            file.write(content)
    assert main([str(whole_run[0]), "odd", "--out", "odd.npz", "--masks", "odd.png", "--device", "cpu"]) == 0
    assert os.path.getsize("odd.png") > 1000 and "Glyph" not in capsys.readouterr().err
    with np.load("odd.npz") as found:
        assert len(set(found["names"].tolist())) == 4


def test_a_grey_network_takes_grey_and_colour(tmp_path, monkeypatch):
    """Colour files become grey; arrays are taken with and without their one channel."""
    rng = np.random.default_rng(0)
    part = {"images": rng.integers(0, 256, (24, SIZE, SIZE), dtype=np.uint8), "labels": np.arange(24) % 2}
    np.savez(tmp_path / "grey.npz", **{f"{split}_{name}": x for split in ("train", "test") for name, x in part.items()})
    words = arguments(tmp_path / "grey.npz", tmp_path / "run", "--masking", "random", "--epochs", 1)
    assert mlo_mae.main(words) == 0
    model, images = mlo_mae.load(tmp_path / "run", "cpu"), part["images"]
    assert isinstance(model, Model) and len(model.mean) == 1
    expected = model.features(images)
    assert torch.equal(model.features(images[..., None]), expected)
    assert torch.equal(model.features(torch.from_numpy(images)[:, None]), expected)
    assert torch.equal(model.features([Image.fromarray(image) for image in images]), expected)
    assert torch.equal(model.features([Image.fromarray(image).convert("RGB") for image in images]), expected)
    assert model.reconstruct(images)[0].shape == (24, SIZE, SIZE, 1)
    words = [str(tmp_path / "run"), str(tmp_path / "grey.npz"), "--device", "cpu", "--out", str(tmp_path / "out.npz")]
    assert main(words) == 0
    with np.load(tmp_path / "out.npz") as found:  # test_images and train_images, which are the same
        assert np.allclose(found["features"], torch.cat([expected, expected]).numpy(), atol=1e-6)


# ------------------------------------------------------------------------------------------- what a stranger has found


def test_black_images_are_images(model, tmp_path):
    """Black is black as 0 of 1 and as 0 of 255; and no image of a folder is refused for the company that it is in."""
    black = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    expected = model.features(torch.zeros(1, 3, SIZE, SIZE))
    for form in (black, torch.from_numpy(black).movedim(3, 1), Image.fromarray(black[0])):
        assert torch.equal(model.features(form), expected)
    (tmp_path / "photos").mkdir()
    Image.fromarray(black[0]).save(tmp_path / "photos" / "a.png")
    encode(model, [tmp_path / "photos"], tmp_path / "out.npz", masks=tmp_path / "out.png")
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(found["features"], expected.numpy())


@pytest.mark.parametrize(
    "image, words",
    [
        (
            Image.fromarray(np.linspace(0, 1, SIZE**2, dtype=np.float32).reshape(SIZE, SIZE)),
            "from 0 to 1, are read as from 0 to 255",
        ),
        (
            Image.fromarray(np.arange(SIZE**2, dtype=np.int32).reshape(SIZE, SIZE)),
            "from 0 to 255, are read as from 0 to 65535",
        ),
        (Image.new("RGB", (0, 0)), "image 1: cannot be used"),
        (Image.new("L", (20000, 20000)), "image 1: .*pixels are too many"),
    ],
    ids=["F", "I", "empty", "huge"],
)
def test_pictures_that_cannot_be_read_rightly_are_named(model, image, words):
    with pytest.raises(UserError, match=words):
        model.features([Image.new("RGB", (SIZE, SIZE), "red"), image])


@pytest.mark.parametrize("kind", [torch.complex64, torch.uint16, torch.float8_e4m3fn, "sparse", "meta"])
def test_tensors_that_are_no_plain_numbers_are_refused(model, kind):
    tensors = TENSORS / 255
    tensors = tensors.to_sparse() if kind == "sparse" else tensors.to(kind)
    with pytest.raises(UserError, match="in floats from 0 to 1 before they are normalised; these are torch"):
        model.features(tensors)


@pytest.mark.parametrize("seed", [-1, 1.5, None])
def test_seeds_are_whole_numbers(model, seed):
    with pytest.raises(UserError, match="give a whole number"):
        model.reconstruct(IMAGES, seed)


def test_a_runs_checkpoint_is_not_taken_for_public_weights(whole_run):
    """It would be, with the mean and deviation of ImageNet in place of its own."""
    with pytest.raises(UserError, match="checkpoint 6 of a run, which knows more; give the folder"):
        mlo_mae.load(whole_run[0] / "checkpoint.pt", "cpu")


def test_devices_and_arrays_are_taken_as_torch_and_numpy_give_them(whole_run):
    assert mlo_mae.load(whole_run[0], torch.device("cpu")).image_size == SIZE
    with pytest.raises(UserError, match="leave them out"):
        mlo_mae.load(whole_run[0], "cpu", mean=np.full(3, 0.5), std=np.full(3, 0.5))


@pytest.mark.parametrize(
    "name, value",
    [("mean", [float("nan")] * 3), ("mean", [127.0] * 3), ("mean", [0.5]), ("mean", "abc"), ("mean", None)]
    + [("std", [0.0] * 3), ("std", [-1.0] * 3), ("std", [1e-300] * 3), ("std", [float("nan")] * 3), ("std", [0.2])],
)
def test_pixels_of_a_damaged_run_are_refused(whole_run, tmp_path, name, value):
    content = torch.load(whole_run[0] / "checkpoint.pt", weights_only=True)
    content["data"][name] = value
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt (does not fit: mean .* are not those of 3 channels|is damaged)"):
        mlo_mae.load(tmp_path, "cpu")


def test_a_run_that_hides_by_parts_says_so(whole_run, tmp_path, capsys):
    """Here SemMAE's parts are not at hand: masks by chance would not be the run's."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes((whole_run[0] / "checkpoint.pt").read_bytes())
    (tmp_path / "run" / "parts.pt").write_bytes(b"")
    model = mlo_mae.load(tmp_path / "run", "cpu")
    assert model.features(IMAGES).shape[0] == 5
    with pytest.raises(UserError, match="hides patches by parts"):
        model.reconstruct(IMAGES)
    np.savez(tmp_path / "a.npz", images=IMAGES)
    words = [str(tmp_path / name) for name in ("run", "a.npz")]
    assert main([*words, "--out", str(tmp_path / "out.npz"), "--masks", str(tmp_path / "out.png")]) == 2
    assert "hides patches by parts" in capsys.readouterr().err and not (tmp_path / "out.npz").exists()


def test_one_file_is_not_both(model, tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES)
    with pytest.raises(UserError, match="name two files"):
        encode(model, [tmp_path / "a.npz"], tmp_path / "b.npz", masks=tmp_path / "." / "b.npz")
    assert not (tmp_path / "b.npz").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_are_refused_and_do_not_block(whole_run, tmp_path, capsys):
    for name in ("a.png", "a.npz"):
        os.mkfifo(tmp_path / name)
        assert main([str(whole_run[0]), str(tmp_path / name), "--out", str(tmp_path / "out.npz")]) == 2
        assert f"{name} is no file; give image files" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_weights_that_are_a_pipe_do_not_block(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    assert main([str(tmp_path / "pipe"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out.npz")]) == 2
    assert "is no file; give a .pth or .safetensors" in capsys.readouterr().err


def test_a_line_says_where_images_are_dark(whole_run, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.linspace(0, 4000, 1600).astype(np.uint16).reshape(40, 40)).save(tmp_path / "photos" / "a.png")
    assert main([str(whole_run[0]), str(tmp_path / "photos"), "--out", str(tmp_path / "out.npz")]) == 0
    assert "values from 0 to 4000, and 65535 is taken for white: at most 16 of 256 levels" in capsys.readouterr().err


def test_want_of_memory_is_not_blamed_on_an_image(whole_run, tmp_path, monkeypatch, capsys):
    def none(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(Model, "features", none)
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    assert main([str(whole_run[0]), str(tmp_path / "a.png"), "--out", str(tmp_path / "out.npz")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "memory" in error and "cannot be used" not in error


def test_what_a_folder_has_beside_images_is_said(whole_run, tmp_path, capsys):
    photos = tmp_path / "photos"
    (photos / "real").mkdir(parents=True)
    Image.fromarray(IMAGES[0]).save(photos / "real" / "a.png")
    (photos / "notes.txt").write_text("")
    (photos / "linked").symlink_to(photos / "real")
    assert main([str(whole_run[0]), str(photos), "--out", str(tmp_path / "out.npz")]) == 0
    said = capsys.readouterr().err
    assert "2 files left out: " in said and "1 *.txt" in said and "1 that are links to folders" in said


def test_folders_that_cannot_be_listed_are_not_passed_over(tmp_path, monkeypatch):
    os.makedirs(tmp_path / "inner")
    Image.fromarray(some_images(1)[0]).save(tmp_path / "a.png")
    real = os.scandir

    def scandir(folder):
        if str(folder).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(UserError, match="inner: Permission denied; make it readable"):
        list_any(str(tmp_path))
