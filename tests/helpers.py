"""What several test files share: data sets, files of weights, damaged copies of files, packages that may not be there."""

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import data
import mlo_mae
from harness import UserError, cli
from harness.checkpoints import read_saved
from harness.processes import average, share
from harness.randomness import draw_dropout
from harness.vectors import inverse_fan_in, unflatten, weight_decays
from harness.weights import write_safetensors

FUZZ = int(os.environ.get("MLO_MAE_FUZZ", 150))  # damaged files of each kind to try

# -------------------------------------------------------------------------------------------------------- data sets


def write_npz(
    path: Path,
    n: int = 12,
    size: int = 8,
    colour: bool = True,
    parts: tuple[str, ...] = ("train", "val", "test"),
    save: Callable = np.savez,
    **changes: np.ndarray | None,
) -> Path:
    """A file as MedMNIST has them, of noise in three classes; `changes` replace arrays, or leave them out (None)."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part in parts:
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, size, size, 3) if colour else (n, size, size), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % 3)[:, None].astype(np.uint8)
    arrays.update(changes)
    save(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def picture(width: int = 40, height: int = 30, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth image."""
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 255 / width, y * 255 / height, 128 + 100 * np.sin(6 * x / width + 6 * y / height + seed)], -1)
    return Image.fromarray(base.clip(0, 255).astype(np.uint8)).convert(mode)


def write_colours(path: Path) -> Path:
    """An .npz of 120 + 30 images of six classes: a square whose colour is the class, which no crop or flip changes."""
    random, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 120), ("test", 30)):
        labels = np.arange(count) % 6
        images = random.integers(0, 100, (count, 16, 16, 3))
        colours = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)])
        images[:, 4:12, 4:12] += 150 * colours[labels][:, None, None]
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels}
    np.savez(path, **arrays)
    return path


def write_folder(
    root: Path,
    parts: tuple[tuple[str, int], ...] = (("train", 5), ("val", 3)),
    classes: tuple[str, ...] = ("cat", "dog"),
    suffix: str = ".jpg",
    size: tuple[int, int] = (40, 30),
) -> Path:
    """Pictures in root/<part>/<class>/, so many of each."""
    for part, count in parts:
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                picture(*size, seed=10 * label + k).save(root / part / name / f"{k}{suffix}")
    return root


def write_masked(
    root: Path, masks: str = "masks", train: str = "train", val: str = "val", values: tuple[int, ...] = (3, 7, 200)
) -> Path:
    """Noise in root/images/<split>/ and masks of these values in root/<masks>/<split>/."""
    random = np.random.default_rng(0)
    for split, count in ((train, 6), (val, 3)):
        for i in range(count):
            size = (20 + i, 30)
            for top, array in (("images", random.integers(0, 255, (*size, 3))), (masks, random.choice(values, size))):
                folder = root / top / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(folder / f"{i}{'.png' if top == masks else '.jpg'}")
    return root


def coco_content(count: int = 4, **changes: object) -> dict:
    """What COCO's files of boxes hold, for so many images; `changes` replace parts of it."""
    images = [{"id": 10 + i, "file_name": f"{i}.jpg", "width": 40, "height": 20} for i in range(count)]
    annotations = [
        {"image_id": 10 + i // 2, "category_id": 5 + 4 * (i % 2), "bbox": [4 * i, 2, 8, 10], "iscrowd": 0}
        for i in range(2 * count - 1)
    ]
    crowd = {"image_id": 10, "category_id": 9, "bbox": [0, 0, 40, 20], "iscrowd": 1}
    categories = [{"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}]
    return {"images": images, "annotations": [*annotations, crowd], "categories": categories} | changes


def write_coco(root: Path, **changes: object) -> Path:
    """A folder as COCO's, with `changes` in what it says about the images for training."""
    (root / "annotations").mkdir(parents=True)
    for name in ("train2017", "val2017"):
        (root / name).mkdir()
        content = coco_content(**(changes if name == "train2017" else {}))
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
        for i in range(4):
            Image.new("RGB", (40, 20), (40 * i, 0, 0)).save(root / name / f"{i}.jpg")
    return root


def oriented(orientation: int) -> Image.Exif:
    """Metadata of a photo that is to be turned so."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def turned_photo(upright: Image.Image, orientation: int) -> Image.Image:
    """What a camera stores, so that `upright` is seen once it is turned as this orientation says."""
    row, column = {  # where the stored row 0 and column 0 are seen: EXIF's definition
        **{1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left")},
        **{5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")},
    }[orientation]
    pixels = np.asarray(upright)
    pixels = pixels[::-1] if "bottom" in (row, column) else pixels
    pixels = pixels[:, ::-1] if "right" in (row, column) else pixels
    return Image.fromarray(np.ascontiguousarray(pixels if orientation < 5 else pixels.swapaxes(0, 1)))


def consume(splits: data.Splits) -> data.Splits:
    """Everything that a run would do with the splits; asserts that they are what `data.load` promises."""
    for split in (splits.train, splits.val, splits.test):
        assert len(split) >= 1 and split.labels.dtype == torch.int64 and split.labels.shape == (len(split),)
        assert 0 <= split.labels.min() and split.labels.max() < len(splits.class_names)
        batches = [next(split.stream(3, seed=0)), *split.ordered(64)]
        assert sum(len(batch.labels) for batch in batches[1:]) == len(split)
        for images, labels in batches:
            assert images.shape[1:] == (splits.channels, splits.image_size, splits.image_size)
            assert images.dtype == torch.float32 and images.isfinite().all() and labels.dtype == torch.int64
    assert len(splits.mean) == len(splits.std) == splits.channels and min(splits.std) > 0
    return splits


def data_refused(*words: object, name: str | Path, data_dir: str | Path = "nowhere", **options: object) -> str:
    """Loading and reading it raises UserError, in one line, with these words in it; the line."""
    with pytest.raises(UserError) as caught:
        consume(data.load(name, data_dir, **options))
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 600, message
    for word in words:
        assert str(word) in message, message
    return message


def said(capsys: pytest.CaptureFixture) -> list[str]:
    """The lines about data on stderr since this was last asked."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("data ")]


def equal(a: data.Batch, b: data.Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def take(stream: Iterator[data.Batch], count: int) -> list[data.Batch]:
    return [batch for batch, _ in zip(stream, range(count))]


def memory_is_bounded() -> None:
    """Asserts that this process has not had more than 3 GiB in this test, where the system tells."""
    if sys.platform == "linux":
        import resource

        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 * 2**20  # KiB


# ------------------------------------------------------------------------------------------------------ whole runs

SCRIPT = Path(mlo_mae.__file__)
SMALL = {  # flags of a run that takes a second, and in which T learns throughout
    **{"image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "masking_blocks": 1},
    **{"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2, "masking_width": 8},
    **{"batch_size": 16, "labelled_batch_size": 8, "level1_steps": 2, "mask_batches": 2, "head_steps": 1},
    **{"mask_ratio": 0.75, "mask_start": 0, "mask_until": 1, "mask_wait": 0, "mask_lr": 1, "log_every": 2, "device": "cpu"},
}


TINY = mlo_mae.Config(  # for the method without a run, with a head that makes steps
    **{"patch_size": 4, "width": 16, "depth": 2, "heads": 2, "masking_blocks": 1},
    **{"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2, "masking_width": 12},
    **{"batch_size": 12, "labelled_batch_size": 8, "level1_steps": 2, "head_steps": 1},
    **{"head_norm": "layer", "dropout": 0.3, "mask_start": 0.0, "mask_until": 1.0, "mask_wait": 0.0, "mask_lr": 1.0},
    **{"lr": 2e-3, "mask_ratio": 0.75, "mask_restart": False},
    **{"masking_network": "shared", "mask_choice": "odds"},
    **{"level2": "steps", "pooling": "cls", "mask_batches": 1},  # levels 2 and 3, and (9), as published
)
# The method as it is by default, where `changes` of TINY are asked for.
DEFAULT = {name: getattr(mlo_mae.Config(), name) for name in ("masking_network", "mask_choice", "level2", "pooling")}


def noise_batches(cfg: mlo_mae.Config, dtype: torch.dtype = torch.float32, seed: int = 0) -> mlo_mae.Streams:
    """Batches of levels 1, 2 and 3, [B, 3, 16, 16] and five classes, of which each process has its share."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (60, 3, 16, 16), generator=random, dtype=torch.uint8)
    split = data.Images(images, torch.arange(60) % 5, (0.5,) * 3, (0.25,) * 3)

    def stream(size, seed):
        for batch in split.stream(size, seed, part=share(size)):
            yield data.Batch(batch.images.to(dtype), batch.labels)

    sizes = (cfg.batch_size, *2 * [cfg.labelled_batch_size])
    return mlo_mae.Streams(*(stream(size, seed) for seed, size in enumerate(sizes)))


@functools.cache
def some_iterations(dtype: torch.dtype, **changes: object) -> dict[str, Tensor]:
    """All parameters and moments after two of ten outer iterations from moments as training leaves them, the losses, T's
    first gradient (a tenth of it), and the encoder that T reads, if it is kept. `changes` are of TINY."""
    settings = {"warmup": 0.0, "masking_network": "mlp", "mask_choice": "highest"} | changes
    cfg = dataclasses.replace(TINY, **settings)
    net, params = mlo_mae.build(cfg, 16, 3, 5)
    random = torch.Generator().manual_seed(0)

    def warm(vector, t):
        mu = 1e-2 * torch.randn(len(vector), generator=random, dtype=torch.float64)
        nu = mu.square() * (1 + torch.randn(len(vector), generator=random, dtype=torch.float64).square())
        return mlo_mae.Level(vector.to(dtype), mu.to(dtype), nu.to(dtype), t)

    theta, head, psi = (warm(vector, t) for vector, t in zip(params, (7, 4, 3)))
    if cfg.masking_network == "tokens":  # its weights start at 0, and all p are equal then
        psi = psi._replace(params=0.3 * torch.randn(len(psi.params), generator=random, dtype=torch.float64).to(dtype))
    psi = psi._replace(mu=torch.zeros_like(psi.mu))  # so that after one step it is T's gradient
    state, streams, rows, gradient = mlo_mae.State(0, theta, head, psi), noise_batches(cfg, dtype), [], None
    decay = [weight_decays(modules, cfg.weight_decay).to(dtype) for modules in mlo_mae.modules_of(net).values()]
    for _ in range(2):
        rate = inverse_fan_in(net.masking).to(dtype)
        state = mlo_mae.with_kept_eyes(net, state, 10)
        state, losses = mlo_mae.outer_iteration(net, state, streams, 10, decay, rate)
        gradient = state.psi.mu if gradient is None else gradient
        rows.append(average(torch.stack([value.to(dtype) for value in losses.values()])))
    levels = {"theta": state.theta, "head": state.head, "psi": state.psi}
    moved = {f"{name} {part}": getattr(level, part) for name, level in levels.items() for part in ("params", "mu", "nu")}
    kept = {} if state.eyes is None else {"eyes": state.eyes}
    return {"T's gradient": gradient, "losses": torch.cat(rows)} | moved | kept


def other_sight(channels: int = 3, **changes: object) -> mlo_mae.Sight:
    """How a T of images of 24 pixels, of other colours, and of another encoder sees normalised images of 16 pixels."""
    facts = {"image_size": 24, "patch_size": 4, "width": 24, "depth": 3, "heads": 3, "masking_blocks": 2, "channels": channels}
    facts |= {"mean": [0.3, 0.4, 0.6][:channels], "std": [0.2, 0.3, 0.15][:channels]} | changes
    here = {"channels": channels, "mean": [0.5] * channels, "std": [0.25] * channels}
    content = {"eyes": {"facts": facts}, "config": {"masking": "learned", "masking_network": "tokens"}}
    return mlo_mae.sight_of(content, here, torch.device("cpu"))


def hypergradient_problem(
    warm: bool = True,
    count: int = 1,
    seed: int = 0,
    join: bool = False,
    eyes: str = "",
    crops: bool = False,
    **changes: object,
) -> tuple:
    """Networks, and the arguments of a hypergradient function after them, in float64, of a tiny run in which `count`
    level-1 steps were really made; `changes` are of TINY.

    join: the last step with the batches of all. eyes: what T reads, "" (the encoder as it is), "kept" (another one of its
    size), or "other" (one of another run). crops: images cover a part of some patches, and nothing of others."""
    cfg = dataclasses.replace(TINY, **{"batch_size": 6, "dropout": 0.5} | changes)
    net, params = mlo_mae.build(cfg, 16, 3, 5, other_sight() if eyes == "other" else None)
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def level(vector, t):
        # Moments as training leaves them: a mean of past gradients, and their mean square at least as large.
        mu = 1e-2 * normal(len(vector)) if warm else torch.zeros(len(vector), dtype=torch.float64)
        nu = mu.square() * (1 + normal(len(vector)).square()) if warm else torch.zeros_like(mu)
        moved = vector.double() + 0.2 * normal(len(vector))  # biases and CLS as after training: not zero, not tiny
        return mlo_mae.Level(moved, mu, nu, t if warm else 0)

    theta, head, psi = (level(vector, t) for vector, t in zip(params, (7, 4, 3)))
    kept = None
    if eyes:
        read = net.sight.encoder if net.sight else net.encoder
        kept = 0.2 * normal(sum(parameter.numel() for parameter in read.parameters()))
    decay = [weight_decays(modules, cfg.weight_decay).double() for modules in mlo_mae.modules_of(net).values()]
    steps = []
    for number in range(count):
        images, rates = normal(cfg.batch_size, 3, 16, 16), mlo_mae.Rates(1e-2, decay[0])
        covered = (1.5 * torch.rand(cfg.batch_size, 16, generator=random) - 0.25).clamp(0, 1).double() if crops else None
        theta, step, _, _ = mlo_mae.level1_step(net, theta, psi.params, images, rates, 0, number, eyes=kept, covered=covered)
        steps.append(step)
    pairs = [(normal(cfg.batch_size, 3, 16, 16), torch.arange(cfg.batch_size) % 5) for _ in (2, 3)]
    dropout = draw_dropout(cfg.dropout, (cfg.head_steps, cfg.batch_size, cfg.width), seed, 1).double()
    labelled = mlo_mae.Labelled(*pairs[0], *pairs[1], dropout, mlo_mae.Rates(3e-2, decay[1]))
    return net, (theta, psi.params, head, labelled, [mlo_mae.joined(steps)] if join else steps)


def error_of_form(form: Callable[..., mlo_mae.Result], **settings: object) -> float:
    """Relative error of a form of the hypergradient in a `hypergradient_problem`, by the judge."""
    net, problem = hypergradient_problem(**settings)
    found, judge = form(net, *problem), mlo_mae.unrolled(net, *problem)
    assert judge.hypergradient.norm() > 1e-9  # a zero would agree with anything
    assert all(piece.any() for piece in unflatten(net.masking, judge.hypergradient).values())  # in any layer of T
    assert relative_error(found.head.params, judge.head.params) < 1e-13
    # A system of equations is solved, which costs digits where images have almost the same features.
    assert relative_error(found.level3_loss, judge.level3_loss) < (1e-13 if net.cfg.level2 == "steps" else 1e-11)
    return relative_error(found.hypergradient, judge.hypergradient)


def relative_error(found: Tensor, judge: Tensor) -> float:
    return float((found.double() - judge.double()).norm() / judge.double().norm().clamp_min(1e-30))


def write_sides(path: Path, parts: tuple[tuple[str, int], ...] = (("train", 60), ("test", 20))) -> Path:
    """An .npz of 16x16 images of two classes, bright on the left or on the right."""
    random, arrays = np.random.default_rng(0), {}
    for part, count in parts:
        labels = random.integers(0, 2, count)
        images = random.integers(0, 120, (count, 16, 16, 3))
        images[labels == 0, :, :8] += 100
        images[labels == 1, :, 8:] += 100
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels}
    np.savez(path, **arrays)
    return path


def as_flags(settings: dict[str, object]) -> list[str]:
    """Settings as words of a command line."""
    return [str(word) for name, value in settings.items() for word in (cli.flag_name(name), value)]


def arguments(source: str | Path, out: Path, *more: object) -> list[str]:
    """The command line of a small run on this data; `more` are flags that follow SMALL's, and so take their place."""
    return ["pretrain", "--data", str(source), "--out", str(out), *as_flags(SMALL), *map(str, more)]


def checkpoint_of(run: Path) -> dict:
    return read_saved(run / "checkpoint.pt", mlo_mae.FORMAT)


def weights(run: Path) -> dict[tuple[str, str], Tensor]:
    """All parameters in a run's checkpoint."""
    content = checkpoint_of(run)
    return {(part, name): tensor for part in ("model", "head", "masking") for name, tensor in content[part].items()}


def same(first: dict[object, Tensor], second: dict[object, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refused(argv: list[object], capsys: pytest.CaptureFixture, *words: object) -> str:
    """The command ends with status 2 and one line on stderr, beside the progress bar and what was found, that holds
    `words`; that line."""
    capsys.readouterr()
    status = mlo_mae.main([str(argument) for argument in argv])
    printed = capsys.readouterr().err.splitlines()
    plan = "^(data|model|method|machine|time|files):? "
    beside = re.compile(f"(update|step)/s|s/(update|step)|{plan}")  # the bar, what was found and what is going to be
    lines = [line for line in printed if line and ("mlo_mae:" in line or not beside.search(line))]
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("mlo_mae: "), lines
    for word in words:
        assert str(word) in lines[0], lines[0]
    return lines[0]


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """Runs in this process end without probe and pictures, which take longer than a small run does."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("probe", "show"):
            patch.setattr(cli.command(name), "after_training", lambda *arguments: [])
        yield


def finished_run(source: str | Path, out: Path, *more: object) -> Path:
    """The folder of a small run on this data, made in this process; `more` as `arguments` takes it."""
    with bare():
        assert mlo_mae.main(arguments(source, out, *more)) == 0
    return out


def stopped(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, lines: int, *more: object) -> dict:
    """A run that a signal stops after this many lines of metrics; returns its checkpoint."""
    real, calls = mlo_mae.mask_statistics, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == lines:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mlo_mae, "mask_statistics", interrupted)
        assert mlo_mae.main(arguments(source, out, *more)) == 130
    return checkpoint_of(out)


def copied(source: Path, target: Path) -> Path:
    """A copy of a run's folder, which a test may damage."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


# ------------------------------------------------------------------------------------------------- public weights

Shapes = dict[str, tuple[int, ...]]


def public_shapes(
    width: int, depth: int, patch: int, patches: int, decoder_width: int, decoder_depth: int, channels: int = 3
) -> tuple[Shapes, Shapes]:
    """Names and shapes as timm 1.0.31's vit_base_patch16_224 (without its head) and facebookresearch/mae's models_mae.py
    have them, recorded as a rule: an encoder's and a decoder's."""

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def linear(name, outputs, inputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def block(name, width):
        attention = linear(f"{name}.attn.qkv", 3 * width, width) | linear(f"{name}.attn.proj", width, width)
        mlp = linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)
        return norm(f"{name}.norm1", width) | attention | norm(f"{name}.norm2", width) | mlp

    encoder = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + patches, width)}
    encoder |= {"patch_embed.proj.weight": (width, channels, patch, patch), "patch_embed.proj.bias": (width,)}
    for number in range(depth):
        encoder |= block(f"blocks.{number}", width)
    decoder = {"mask_token": (1, 1, decoder_width), "decoder_pos_embed": (1, 1 + patches, decoder_width)}
    decoder |= linear("decoder_embed", decoder_width, width)
    for number in range(decoder_depth):
        decoder |= block(f"decoder_blocks.{number}", decoder_width)
    decoder |= norm("decoder_norm", decoder_width) | linear("decoder_pred", patch * patch * channels, decoder_width)
    return encoder | norm("norm", width), decoder


def safetensors_bytes(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    write_safetensors(tensors, buffer, {})
    return buffer.getvalue()


def torch_bytes(content: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def public(tensors: dict[str, Tensor]) -> dict:
    """What facebookresearch/mae's training saves."""
    arguments = argparse.Namespace(model="mae_vit_base_patch16", blr=1.5e-4, batch_size=64, world_size=8, resume="")
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    scaler = {"scale": 65536.0, "_growth_tracker": 3}
    model = collections.OrderedDict(tensors)
    return {"model": model, "optimizer": optimizer.state_dict(), "epoch": 7, "scaler": scaler, "args": arguments}


def backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"net.backbone.{name}": tensor for name, tensor in tensors.items()} | {"neck.weight": torch.ones(2)}


WRAPPED = {  # kinds of files that hold weights by their public names: {name: tensor} -> the file's bytes
    "public .pth": lambda tensors: torch_bytes(public(tensors)),
    "legacy .pth": lambda tensors: torch_bytes(public(tensors), zipped=False),
    "state_dict of a wrapper": lambda tensors: torch_bytes({"state_dict": {f"module.{n}": t for n, t in tensors.items()}}),
    "encoder in a larger model": lambda tensors: torch_bytes(backbone(tensors)),
    "parameters": lambda tensors: torch_bytes({"model_ema": {n: torch.nn.Parameter(t) for n, t in tensors.items()}}),
    "safetensors": safetensors_bytes,
}


# --------------------------------------------------------------------------------------------------------- damage


class Explosive:
    """Where unpickling executes what it is told to, a folder "exploded" appears."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


DAMAGED = {  # kinds of damage to a whole file: its bytes -> others
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[: (at := len(content) // 2)] + bytes([content[at] ^ 1]) + content[at + 1 :],
    "empty": lambda content: b"",
    "text": lambda content: b"not a checkpoint",
    "pickle": lambda content: pickle.dumps(Explosive()),
}


def mutated(raw: bytes, rng: np.random.Generator) -> bytes:
    """A damaged copy: bytes changed, cut off, moved, doubled or put in; more often near either end, where headers are."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        near = min(len(raw), 160)
        at = int(rng.choice([rng.integers(0, near + 1), len(raw) - rng.integers(0, near + 1), rng.integers(0, len(raw) + 1)]))
        length = int(2 ** rng.uniform(0, 8))
        other = int(rng.integers(0, len(raw) + 1))
        match rng.integers(0, 8):
            case 0 | 1:
                for k in range(at, min(at + rng.integers(1, 5), len(raw))):
                    raw[k] = rng.choice([0, 1, 0x2E, 0x7F, 0x80, 0xFF, raw[k] ^ (1 << rng.integers(0, 8)), *rng.bytes(1)])
            case 2:
                del raw[at:]
            case 3:
                del raw[at : at + length]
            case 4:
                raw[at : at + length] = raw[other : other + length]
            case 5:
                raw[at:at] = raw[other : other + length]
            case 6:
                raw[at:at] = rng.bytes(length)
            case 7:
                raw[at : at + 4] = int(rng.choice([0, 2**31 - 1, 2**31, 2**32 - 1])).to_bytes(4, "little")
    return bytes(raw)


# ------------------------------------------------------------------------------------------------------- packages


def timm():
    """The package, or a skipped test."""
    try:
        return pytest.importorskip("timm")
    except Exception as error:  # a torchvision that was built for another torch, which timm imports
        pytest.skip(f"timm cannot be imported: {error}")


def as_recorded(function):
    """A stand-in for `harness.graphs.recorded` on a CPU, as strict: a replay makes the operators that function() made, without
    Python, on what is in the memory of the tensors that it saw, and puts its results where the first were."""
    function()
    made = make_fx(lambda: function())()
    results = [result.clone() for result in made()]

    def replay():
        for place, result in zip(results, made()):
            place.copy_(result)

    return replay, results


# ---------------------------------------------------------------------------------------------------------- figures


def laid_out(figure) -> dict[str, object]:
    """{what: extent in pixels} of a figure as it is drawn: its axes with all that stands around them, and what lies beside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    found = {f"axes {number}": axis.bbox.frozen() for number, axis in enumerate(figure.axes)}
    for number, axis in enumerate(figure.axes):
        if axis.get_legend():
            found[f"legend of {number}"] = axis.get_legend().get_window_extent()
        named = {"x": axis.xaxis.label, "y": axis.yaxis.label, "title": axis.title, "left title": axis._left_title}
        found |= {f"{name} of {number}": text.get_window_extent() for name, text in named.items() if text.get_text()}
    for part in (figure, *figure.subfigs):
        found |= {f"legend {number} of {id(part)}": legend.get_window_extent() for number, legend in enumerate(part.legends)}
    return found | {"caption": figure._supxlabel.get_window_extent()}


def nothing_overlaps(figure) -> None:
    """Nothing lies over another thing, and nothing is cut off."""
    found, whole = laid_out(figure), figure.bbox
    for name, box in found.items():
        assert -1 <= box.x0 < box.x1 <= whole.x1 + 1 and -1 <= box.y0 < box.y1 <= whole.y1 + 1, f"{name} is cut off"
        for other, its in found.items():
            apart = box.x1 <= its.x0 + 1 or its.x1 <= box.x0 + 1 or box.y1 <= its.y0 + 1 or its.y1 <= box.y0 + 1
            assert name == other or apart, f"{name} lies over {other}"
