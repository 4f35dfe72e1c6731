"""harness/readers.py: each published layout is read, and whatever is wrong with a file ends in one line.

The files are written here, small, in each real format. MLO_MAE_FUZZ sets how many mutations of each format are tried.
"""

import errno
import hashlib
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    FUZZ,
    consume,
    data_refused,
    equal,
    memory_is_bounded,
    mutated,
    oriented,
    picture,
    said,
    turned_photo,
    write_folder,
    write_npz,
)
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

import data
from harness import UserError, readers
from harness.randomness import numpy_generator

LAYOUTS = [(name, layout) for name, layouts in readers.CIFAR.items() for layout in layouts]
pytestmark = pytest.mark.usefixtures("no_hang")


# ----------------------------------------------------------------------------------------------------- writers of files


def python2_pickle(value):
    """As Python 2 wrote CIFAR's files: protocol 2, strings of bytes (which Python 3 cannot write)."""
    match value:
        case dict():
            return b"}q\x01(" + b"".join(python2_pickle(item) for pair in value.items() for item in pair) + b"u"
        case list():
            return b"]q\x02(" + b"".join(map(python2_pickle, value)) + b"e"
        case int():
            return b"K" + bytes([value]) if value < 256 else b"J" + value.to_bytes(4, "little")
        case str():
            return python2_pickle(value.encode())
        case bytes():
            return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + len(value).to_bytes(4, "little")) + value
        case np.ndarray():
            return (
                b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87R(K\x01"
                + b"".join(map(python2_pickle, value.shape))
                + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
                b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + python2_pickle(value.tobytes()) + b"tb"
            )


def dump(value, protocol):
    return b"\x80\x02" + python2_pickle(value) + b"." if protocol == "python 2" else pickle.dumps(value, protocol=protocol)


def write_cifar(folder, layout, per_file=6, protocol="python 2", seed=0):
    """Files in CIFAR's formats; image k of the training pool has k in its first byte."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate((*layout.train, layout.test)):
        pixels = rng.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        pixels[:, 0] = np.arange(per_file) + number * per_file
        labels = [int(k) for k in (np.arange(per_file) + number) % layout.classes]
        if isinstance(layout.labels, int):
            heads = np.full((per_file, layout.before), 7, np.uint8)
            heads[:, layout.labels] = labels
            (folder / file).write_bytes(np.concatenate([heads, pixels], 1).tobytes())
        else:
            content = {"batch_label": "a batch", layout.labels: labels, "data": pixels, "filenames": ["x.png"] * per_file}
            (folder / file).write_bytes(dump(content, protocol))
    names = [f"class {i}" if layout.names else f"class_{i}" for i in range(layout.classes)]
    raw = dump({"num_vis": 3072, layout.names: names}, protocol) if layout.names else "\n".join(names).encode()
    (folder / layout.meta).write_bytes(raw)
    return folder


class Runs:
    """Pickles to a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


# ---------------------------------------------------------------------------------------------------------------- CIFAR


@pytest.mark.parametrize("name, layout", LAYOUTS)
@pytest.mark.parametrize("protocol", ["python 2", 2, 4, 5])
def test_cifar_layouts(tmp_path, name, layout, protocol):
    write_cifar(tmp_path / layout.folder, layout, protocol=protocol)
    splits = consume(data.load(name, tmp_path))
    pool = 6 * len(layout.train)
    ids = torch.cat([splits.train.images, splits.val.images])[:, 0, 0, 0]
    assert sorted(ids.tolist()) == list(range(pool)) and len(splits.val) == round(0.2 * pool) and len(splits.test) == 6
    labels = torch.cat([splits.train.labels, splits.val.labels])
    assert torch.equal(labels, ids % 6 + ids // 6)  # image and label stay together
    assert splits.class_names[3] in ("class 3", "class_3") and splits.mean == data.CIFAR_MEAN
    (tmp_path / layout.folder / layout.meta).unlink()
    assert data.load(name, tmp_path / layout.folder).class_names[3] == "3"  # the folder itself will do
    assert data.load(name, tmp_path, image_size=48).test.images.shape == (6, 3, 48, 48)


@pytest.mark.slow
def test_real_cifar100():
    """Where it is: MLO_MAE_DATA, else the project's data/."""
    folder = Path(os.environ.get("MLO_MAE_DATA", Path(data.__file__).parent / "data"))
    if not (folder / "cifar-100-python").is_dir():
        pytest.skip("no CIFAR-100 here")
    splits = data.load("cifar100", folder)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (40000, 10000, 10000)
    assert (splits.test.labels.bincount() == 100).all() and splits.class_names[:2] == ["apple", "aquarium_fish"]
    pixels = splits.train.images[:2000].float() / 255
    assert abs(pixels.mean() - 0.478) < 0.02 and pixels.std() > 0.2
    coarse = data.load("cifar100-coarse", folder)
    assert torch.equal(coarse.test.images, splits.test.images) and (coarse.test.labels.bincount() == 500).all()
    both = 100 * coarse.test.labels + splits.test.labels
    assert len(both.unique()) == 100 and coarse.class_names[:2] == ["aquatic_mammals", "fish"]


@pytest.mark.parametrize("name, layout", LAYOUTS)
def test_cifar_bad_files(tmp_path, name, layout):
    def broken(file, raw):
        folder = write_cifar(tmp_path / layout.folder, layout)
        (folder / file).unlink() if raw is None else (folder / file).write_bytes(raw)
        return folder / file

    whole = (write_cifar(tmp_path / layout.folder, layout) / layout.test).read_bytes()
    for raw in (b"", whole[:-1], whole[:700], b"\x00" * 17):
        data_refused(broken(layout.test, raw), "in its place", name=name, data_dir=tmp_path)
    data_refused(broken(layout.test, np.random.default_rng(0).bytes(4000)), name=name, data_dir=tmp_path)
    data_refused(broken(layout.train[0], None), "no such file", name=name, data_dir=tmp_path)
    if not isinstance(layout.labels, int):
        good = pickle.loads(whole, encoding="latin-1")
        for change in (
            {"data": good["data"][:, :-1]},
            {"data": good["data"].astype(np.int32)},
            {"data": 3},
            {"data": None},
            {"data": good["data"][:3]},
            {"data": np.asfortranarray(good["data"])},
            {"data": good["data"][:0]},
            {layout.labels: [0.5] * 6},
            {layout.labels: [-1] * 6},
            {layout.labels: [100] * 6},
            {layout.labels: [2**40] * 6},
            {layout.labels: 5},
            {layout.labels: [True] * 6},
        ):
            data_refused(broken(layout.test, pickle.dumps(good | change, protocol=2)), name=name, data_dir=tmp_path)
    elif name == "cifar10":
        data_refused("largest 10", broken(layout.test, bytes([10]) + whole[1:]), name=name, data_dir=tmp_path)
    data_refused(broken(layout.meta, b"\x80\x02]q\x01."), "put the one from", name=name, data_dir=tmp_path)
    broken(layout.meta, None)
    consume(data.load(name, tmp_path))


def test_larger_files_are_refused(tmp_path, monkeypatch):
    write_cifar(tmp_path / "cifar-100-binary", readers.CIFAR["cifar100"][1])
    monkeypatch.setattr(readers, "MAX_FILE", 10_000)
    data_refused("more than 10000 bytes", name="cifar100", data_dir=tmp_path)


def test_malicious_pickles_do_not_run(tmp_path):
    layout, canary = readers.CIFAR["cifar100"][0], tmp_path / "canary"
    folder = write_cifar(tmp_path / layout.folder, layout)
    good = pickle.loads((folder / "test").read_bytes(), encoding="latin-1")
    command = f"echo > {canary}"
    attacks = [
        pickle.dumps(value, protocol=protocol)
        for protocol in (0, 2, 4)
        for value in (
            Runs(os.system, command),
            good | {"x": Runs(os.system, command)},
            good | {"data": Runs(open, str(canary), "w")},
            good | {"data": Runs(eval, f"open({str(canary)!r}, 'w')")},
            good | {"x": Runs(getattr, "x", "y")},
            good | {"data": Runs(np.load, str(canary))},
            good | {"x": Runs(np.ones, 10**12)},
        )
    ]
    attacks += [
        b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.",
        b"(S'" + command.encode() + b"'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'" + command.encode() + b"'\no.",
    ]
    for raw in attacks:
        (folder / "test").write_bytes(raw)
        message = data_refused(folder / "test", "refused", name="cifar100", data_dir=tmp_path)
        assert "asks" in message and not canary.exists()
    write_cifar(folder, layout)
    (folder / "meta").write_bytes(attacks[0])
    data_refused(folder / "meta", "refused", name="cifar100", data_dir=tmp_path)
    pickle.loads(attacks[0])
    assert canary.exists()  # the attacks are real


ENCODE = b"\x80\x02c_codecs\nencode\nq\x00X" + (2**20).to_bytes(4, "little") + b"a" * 2**20 + b"q\x01"


def test_pickles_cannot_exhaust_memory_or_time(tmp_path):
    layout = readers.CIFAR["cifar100"][0]
    folder = write_cifar(tmp_path / layout.folder, layout)
    nest = b"\x80\x02)" + b"q\x01h\x01\x86" * 80  # a tuple of 2^80 leaves
    shape = pickle.dumps(10**9, protocol=2)[2:-1]
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    for raw in (
        b"\x80\x04r\xff\xff\xff\xffN.",  # memo number 2^32 - 1
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0fx.",  # bytes of 10^18
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x0fx.",
        b"\x80\x04\x95" + b"\xff" * 7 + b"\x0f.",
        b"\x80\x02}" + nest[2:] + b"Ns.",
        nest + b".",
        b"\x80\x02)" + b"\x85" * 200_000 + b".",
        b"\x80\x02" + array + shape + b"\x85U\x01b\x87R.",
        b"\x80\x02]q\x01h\x01h\x01ee.",
        ENCODE + b"h\x00h\x01\x85R" * 5_000 + b".",  # a fresh MiB each, of one that the file has once
        b"\x80\x02B" + (2**20).to_bytes(4, "little") + b"a" * 2**20 + b"q\x01" + b"}h\x01Ns" * 5_000 + b".",
    ):
        (folder / "test").write_bytes(raw)
        data_refused(folder / "test", name="cifar100", data_dir=tmp_path)
    (folder / "test").write_bytes(b"\x80\x02" + b"}" * 510_000 + b".")
    data_refused("too many opcodes", name="cifar100", data_dir=tmp_path)
    memory_is_bounded()


# ------------------------------------------------------------------------------------------------------------- archives


def make_archive(tmp_path, monkeypatch, name="cifar100", extra=(), drop=(), layout=None):
    """An archive of small files in place of the published one: its path and layout. `extra`: (TarInfo, bytes)."""
    layout = layout or readers.CIFAR[name][0]
    source = write_cifar(tmp_path / "source" / layout.folder, layout)
    archive = tmp_path / "archives" / layout.archive
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for info, raw in extra:
            tar.addfile(info, io.BytesIO(raw))
        for file in layout.files:
            if file not in drop:
                tar.add(source / file, f"{layout.folder}/{file}")
    return archive, trust(archive, layout, name, monkeypatch)


def trust(archive, layout, name, monkeypatch):
    layout = layout._replace(md5=hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setitem(readers.CIFAR, name, [layout])
    monkeypatch.setattr(readers, "URL", archive.parent.as_uri() + "/")
    return layout


def test_download_and_unpack(tmp_path, monkeypatch, capfd):
    archive, layout = make_archive(tmp_path, monkeypatch)
    consume(data.load("cifar100", tmp_path / "new" / "data"))
    assert layout.archive in capfd.readouterr().err  # the progress bar
    assert sorted(p.name for p in (tmp_path / "new" / "data").iterdir()) == sorted([layout.archive, layout.folder])
    monkeypatch.setattr(readers, "URL", "http://127.0.0.1:9/")
    consume(data.load("cifar100", tmp_path / "new" / "data"))  # unpacked: nothing is fetched
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / layout.archive).write_bytes(archive.read_bytes())
    consume(data.load("cifar100", tmp_path / "local"))  # from the archive alone


def test_an_archive_serves_coarse_and_fine_labels(tmp_path, monkeypatch):
    fine, coarse = readers.CIFAR["cifar100"][1], readers.CIFAR["cifar100-coarse"][1]
    names = "\n".join(f"kind_{i}" for i in range(20)).encode()
    entry = tarfile.TarInfo(f"{fine.folder}/{coarse.meta}")
    entry.size = len(names)
    make_archive(tmp_path, monkeypatch, layout=fine, extra=[(entry, names)])
    assert data.load("cifar100", tmp_path / "archives").class_names[3] == "class_3"
    splits = data.load("cifar100-coarse", tmp_path / "archives")  # from what was unpacked for the other
    assert splits.class_names[3] == "kind_3" and splits.test.labels.tolist() == [7] * 6  # as write_cifar has it


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "URL", "http://127.0.0.1:9/")
    message = data_refused("could not download", tmp_path / "cifar-10-python.tar.gz", name="cifar10", data_dir=tmp_path)
    assert "http://127.0.0.1:9/cifar-10-python.tar.gz" in message and not list(tmp_path.iterdir())


def test_wrong_checksums(tmp_path, monkeypatch):
    archive, layout = make_archive(tmp_path, monkeypatch)
    monkeypatch.setitem(readers.CIFAR, "cifar100", [layout._replace(md5="0" * 32)])
    message = data_refused("md5", layout.md5, "0" * 32, name="cifar100", data_dir=tmp_path / "new")  # downloaded
    assert "could not download" in message and not list((tmp_path / "new").iterdir())
    message = data_refused("md5", archive, "move it away", name="cifar100", data_dir=archive.parent)  # found
    assert [p.name for p in archive.parent.iterdir()] == [layout.archive]


def test_archives_write_nothing_but_what_is_expected(tmp_path, monkeypatch):
    def entry(name, kind=tarfile.REGTYPE, link="", raw=b"evil"):
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, len(raw) if kind == tarfile.REGTYPE else 0
        return info, raw

    evil = [
        entry("../evil"),
        entry(str(tmp_path / "evil")),
        entry("cifar-100-python/../../evil"),
        entry("cifar-100-python/evil"),
        entry("cifar-100-python/test", tarfile.SYMTYPE, "/etc/passwd"),
        entry("cifar-100-python", tarfile.SYMTYPE, ".."),
        entry("cifar-100-python/meta", tarfile.LNKTYPE, "../evil"),
        entry("cifar-100-python/train", tarfile.FIFOTYPE),
    ]
    _, layout = make_archive(tmp_path, monkeypatch, extra=evil)
    consume(data.load("cifar100", tmp_path / "new"))
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path / "new" / layout.folder).is_symlink()
    assert all(p.is_file() and not p.is_symlink() for p in (tmp_path / "new" / layout.folder).iterdir())
    make_archive(tmp_path, monkeypatch, extra=evil, drop=["test"])
    data_refused("no such file", name="cifar100", data_dir=tmp_path / "other")


def test_places_that_cannot_be_used(tmp_path, monkeypatch):
    make_archive(tmp_path, monkeypatch)
    (tmp_path / "file").write_bytes(b"")
    data_refused(tmp_path / "file", name="cifar100", data_dir=tmp_path / "file")
    layout = readers.CIFAR["cifar100"][0]
    (write_cifar(tmp_path / layout.folder, layout) / "test").unlink()
    (tmp_path / layout.folder / "test").mkdir()
    data_refused(tmp_path / layout.folder / "test", "no such file", name="cifar100", data_dir=tmp_path)

    def forbidden(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    write_cifar(tmp_path / "readable" / layout.folder, layout)
    write_npz(tmp_path / "a.npz")
    write_folder(tmp_path / "folder")
    with monkeypatch.context() as patch:  # tests may run as root, whom no permission stops
        patch.setattr(readers, "open", forbidden, raising=False)
        data_refused("Permission denied", layout.folder, name="cifar100", data_dir=tmp_path / "readable")
        data_refused("Permission denied", "folder", name=tmp_path / "folder", skip_corrupt=True)
        patch.setattr(zipfile, "ZipFile", forbidden)
        data_refused("Permission denied", "a.npz", name=tmp_path / "a.npz")
        patch.setattr(os, "scandir", forbidden)
        data_refused("Permission denied", "train", name=tmp_path / "folder")
        patch.setattr(readers.tempfile, "mkdtemp", lambda **_: forbidden(tmp_path))
        data_refused("Permission denied", name="cifar100", data_dir=tmp_path / "archives")


# ----------------------------------------------------------------------------------------------------------- .npz files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("colour", [True, False])
def test_npz(tmp_path, save, colour):
    path = write_npz(tmp_path / "a.npz", save=save, colour=colour)
    splits = consume(data.load(path, "."))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (12, 12, 12)  # its own val
    assert splits.channels == (3 if colour else 1) and splits.image_size == 8 and splits.class_names == ["0", "1", "2"]
    raw = np.load(path)["train_images"].reshape(12, 8, 8, splits.channels)
    assert (splits.train.images.numpy() == raw.transpose(0, 3, 1, 2)).all()
    assert np.allclose(splits.mean, raw.mean((0, 1, 2)) / 255) and np.allclose(splits.std, raw.std((0, 1, 2)) / 255)
    assert consume(data.load(path, ".", image_size=12)).train.images.shape[-1] == 12


@pytest.mark.parametrize("dtype", [bool, np.uint8])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_with_objects(tmp_path, dtype, order):
    where = np.random.default_rng(0).random((12, 8, 8)) < 0.3
    given = {f"{part}_objects": (where ^ (part == "val")).astype(dtype, order=order) for part in ("train", "val", "test")}
    splits = consume(data.load(write_npz(tmp_path / "a.npz", **given), "."))
    for part, expected in (("train", where), ("val", ~where), ("test", where)):
        objects = getattr(splits, part).objects
        assert objects.dtype == torch.bool and np.array_equal(objects, expected)
    two = ("train", "test")
    path = write_npz(tmp_path / "a.npz", parts=two, **{f"{part}_objects": where.astype(dtype) for part in two})
    splits = data.load(path, ".", limit=9, val_fraction=0.3)  # val is held out of train, with its objects
    for split in (splits.train, splits.val):
        for image, objects in zip(split.images, split.objects):
            number = np.flatnonzero((np.load(path)["train_images"] == image.permute(1, 2, 0).numpy()).all((1, 2, 3)))
            assert np.array_equal(objects, where[number[0]])
    assert data.load(write_npz(tmp_path / "a.npz"), ".").train.objects is None


def test_npz_refusals(tmp_path):
    canary, images = tmp_path / "canary", np.zeros((12, 8, 8), np.uint8)
    masks = {f"{part}_objects": images for part in ("train", "val", "test")}
    objects = np.empty(12, object)
    objects[:] = Runs(os.system, f"echo > {canary}")
    for words, changes in (
        (["no train_images, but test_images, test_labels, train_labels, ...; name its"], {"train_images": None}),
        (["no test_labels"], {"test_labels": None}),
        (["no val_images"], {"val_images": None}),
        (["no train_images"], {"train_images": None, "train_labels": None}),
        (["train_labels", "Python objects"], {"train_labels": objects}),
        (["train_images", "Python objects"], {"train_images": objects}),
        (["float32, from 0 to 0.5", "uint8"], {"train_images": np.linspace(0, 0.5, 768, dtype=np.float32).reshape(12, 8, 8)}),
        (["uint16, from 0 to 0", "uint8"], {"train_images": images.astype(np.uint16)}),
        (["int16", "uint8"], {"val_images": images.astype(np.int16)}),
        (["square"], {"train_images": images[:, :7]}),
        (["square"], {"train_images": np.zeros((12, 8, 8, 4), np.uint8)}),
        (["square"], {"train_images": np.zeros((12, 8, 8, 8), np.uint8)}),
        (["square"], {"train_images": images[:, 0]}),
        (["test_images", "alike"], {"test_images": np.zeros((12, 9, 9, 3), np.uint8)}),
        (["test_images", "alike"], {"test_images": images}),
        (["several", "argmax"], {"train_labels": np.zeros((12, 14), int)}),
        (["float64"], {"train_labels": np.zeros(12)}),
        (["12 images", "[11]"], {"train_labels": np.arange(11)}),
        (["-1"], {"train_labels": -np.ones(12, int)}),
        (["1 class (1000000)"], {"train_labels": np.arange(12) * 0 + 10**6}),
        (["18446744073709551615"], {"train_labels": np.full(12, 2**64 - 1, np.uint64)}),
        (["val_labels has class 0 (4 images)", "(1, 2, 3, ...)"], {"train_labels": np.arange(12) + 1}),
        (["1 class (0)"], {"train_labels": np.zeros(12, int)}),
        (["val_labels has class 3 (3 images)", "(0, 1, 2)"], {"val_labels": np.arange(12) % 4}),
        (["test_labels has class 1 (4 images)", "(0, 2)"], {"train_labels": np.arange(12) % 2 * 2, "val_labels": [0, 2] * 6}),
        (["shape"], {"train_images": images[:0]}),
        (["objects of train, but images of train, val, test"], {"train_objects": images}),
        (["objects of train, test, but"], {"train_objects": images, "test_objects": images}),
        (["val_objects are float64", "bool"], masks | {"val_objects": images.astype(float)}),
        (["val_objects", "Python objects"], masks | {"val_objects": objects}),
        (["test_objects are [12, 8, 8, 1]", "[12, 8, 8]"], masks | {"test_objects": images[..., None]}),
        (["test_objects are [11, 8, 8]", "[12, 8, 8]"], masks | {"test_objects": images[1:]}),
        (["train_objects are [12, 8, 7]"], masks | {"train_objects": images[..., 1:] > 0}),
        (["train_objects has the value 255"], masks | {"train_objects": images + np.uint8(255)}),
        (["train_objects has the value 2"], masks | {"train_objects": (images + np.uint8(2)).view(bool)}),
    ):
        data_refused(tmp_path / "a.npz", *words, name=write_npz(tmp_path / "a.npz", **changes))
    assert not canary.exists()
    good = write_npz(tmp_path / "a.npz").read_bytes()
    noise, empty = np.random.default_rng(0).bytes(1000), b"PK\x05\x06" + bytes(18)
    for raw in (b"", b"x", good[:100], good[:-30], good[100:], noise, empty):
        (tmp_path / "b.npz").write_bytes(raw)
        line = data_refused(tmp_path / "b.npz", name=tmp_path / "b.npz")
        assert raw == empty or raw == good[100:] or "it is no whole .npz file; write one with np.savez (train_images" in line
        assert raw != empty or "it has no train_images, but nothing; name its arrays" in line


def npy(shape, dtype="|u1", body=b""):
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + body


def test_npz_sizes_are_checked_before_allocation(tmp_path):
    bomb = npy((2**12, 256, 256), body=bytes(2**28))
    for raw in (
        npy((10**9, 28, 28)),
        npy((10**3, 28, 28), body=b"x"),
        npy((10**6, 10**6, 10**6), body=b"x"),
        npy((-4, -8, 8), body=bytes(256)),
        npy((2**62, 4)),
        npy((True, 8, 8), body=bytes(64)),
        npy((), body=b"x"),
        npy((3, 8, 8), "|V999999999"),
        npy((3, 8, 8), "O"),
        npy("(" * 50 + ")" * 50),
        npy(("-" * 60) + "1"),
        npy((4, 8, 8), "|u1")[:9],
        bomb,
    ):
        write_npz(tmp_path / "a.npz", train_images=None)
        with zipfile.ZipFile(tmp_path / "a.npz", "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train_images.npy", raw)
        message = data_refused(tmp_path / "a.npz", name=tmp_path / "a.npz")
        assert "MemoryError" not in message and "reading array data" not in message  # what numpy says after allocating
    assert "100 times" in message
    memory_is_bounded()


# --------------------------------------------------------------------------------------------------------------- images


def test_draft_gives_the_same_picture(tmp_path, monkeypatch):
    picture(1600, 1200).save(tmp_path / "a.jpg", quality=95)
    fast = [readers.decode(tmp_path / "a.jpg", 64, rng) for rng in (None, *(numpy_generator(k) for k in range(8)))]
    monkeypatch.setattr(Image.Image, "draft", lambda *_: None)
    monkeypatch.setattr(JpegImageFile, "draft", lambda *_: None)
    full = [readers.decode(tmp_path / "a.jpg", 64, rng) for rng in (None, *(numpy_generator(k) for k in range(8)))]
    for a, b in zip(fast, full):
        assert np.abs(a.astype(int) - b.astype(int)).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright(tmp_path, orientation):
    """Whole, in the middle, and in crops; where a JPEG is decoded at a part of its size, and where it is not."""
    upright = picture(1600, 1000)
    upright.save(tmp_path / "a.jpg", quality=95)
    turned_photo(upright, orientation).save(tmp_path / "b.jpg", quality=95, exif=oriented(orientation))
    for size in (64, 400):
        for key, whole in ((None, True), (None, False), *((k, False) for k in range(4))):
            rngs = (None, None) if key is None else (numpy_generator(key), numpy_generator(key))
            a, b = (readers.decode(tmp_path / name, size, rng, whole) for name, rng in zip(("a.jpg", "b.jpg"), rngs))
            assert np.abs(a.astype(int) - b.astype(int)).mean() < 2


def test_a_folder_of_turned_photos(tmp_path):
    root = write_folder(tmp_path)
    before = next(data.load(root, ".", image_size=16).test.ordered(6)).images
    for path in (root / "val").rglob("*.jpg"):
        with Image.open(path) as image:
            turned_photo(image, 6).save(path, "png", exif=oriented(6))
    after = next(data.load(root, ".", image_size=16).test.ordered(6)).images
    assert torch.equal(before, after) and not torch.equal(before, before.transpose(2, 3))


def test_metadata_that_says_nothing(tmp_path, recwarn):
    """Orientations that there are not, and metadata that cannot be read: the pixels are taken as they are."""
    picture(40, 30).save(tmp_path / "a.png")
    wanted = readers.decode(tmp_path / "a.png", 16, None)
    whole = oriented(6).tobytes()
    for exif in (oriented(0).tobytes(), oriented(9).tobytes(), b"Exif\0\0nonsense", b"Exif\0\0", whole[:12]):
        picture(40, 30).save(tmp_path / "b.png", exif=exif)
        assert np.array_equal(readers.decode(tmp_path / "b.png", 16, None), wanted)
    picture(40, 30).save(tmp_path / "c.png", exif=whole)
    assert not np.array_equal(readers.decode(tmp_path / "c.png", 16, None), wanted)
    assert not recwarn.list


def test_faults_are_told_in_words():
    for error, words in (
        (KeyError("labels"), "a: it has no 'labels'; mend it"),
        (ValueError("12 pixels"), "a: cannot be used (12 pixels); mend it"),
        (IndexError("list"), "a: cannot be used (IndexError: list); mend it"),
        (ValueError(), "a: cannot be used (ValueError: ); mend it"),
    ):
        with pytest.raises(UserError) as caught, readers.blaming("a", "mend it"):
            raise error
        assert str(caught.value) == words


def test_crop_box():
    rng, areas, ratios = np.random.default_rng(0), [], []
    for _ in range(2000):
        left, top, w, h = readers.crop_box(500, 375, rng)
        assert 0 <= left <= 500 - w and 0 <= top <= 375 - h
        areas.append(w * h / (500 * 375))
        ratios.append(w / h)
    assert 0.19 < min(areas) < 0.21 and max(areas) > 0.95 and 0.74 < min(ratios) < 0.76 and 1.32 < max(ratios) < 1.35
    for width, height in ((1, 1), (1, 1000), (1000, 1), (2, 3)):
        left, top, w, h = readers.crop_box(width, height, rng)
        assert 0 <= left and 0 <= top and 0 < w <= width - left and 0 < h <= height - top


def test_odd_images(tmp_path):
    root = write_folder(tmp_path)
    for k, mode in enumerate(("L", "CMYK")):
        picture(mode=mode).save(root / "train" / "cat" / f"mode{k}.jpg")
    for k, mode in enumerate(("L", "P", "RGBA", "LA", "1")):
        picture(mode=mode).save(root / "train" / "cat" / f"mode{k}.png")
    grey = (np.arange(40 * 30).reshape(30, 40) * 54).astype(np.uint16)
    Image.fromarray(grey).save(root / "val" / "cat" / "00.png")
    (root / "val" / "cat" / "01.pgm").write_bytes(b"P5 40 30 65535\n" + grey.astype(">u2").tobytes())
    for k, size in enumerate(((1, 1), (1, 300), (300, 1), (7, 5))):
        picture(*size).save(root / "train" / "dog" / f"size{k}.png")
    splits = consume(data.load(root, ".", image_size=16))
    for image in next(splits.test.ordered(2)).images:  # 16 bits are scaled, not cut off
        mean = (image * splits.test.std / 255 + splits.test.mean / 255).mean()
        assert abs(mean - grey.mean() / 65535) < 0.05


SEEN = np.zeros((16, 16), bool)
SEEN[4:12, 4:12] = True


def transparent(rng, kind):
    """Red in the middle, as SEEN has it, and around it what nobody sees."""
    pixels = np.where(SEEN[..., None], np.array([200, 0, 0], np.uint8), rng.integers(0, 256, (16, 16, 3), np.uint8))
    if kind == "RGBA":
        return Image.fromarray(np.dstack([pixels, 255 * SEEN.astype(np.uint8)]))
    if kind == "LA":
        return Image.fromarray(np.dstack([pixels[..., 0], 255 * SEEN.astype(np.uint8)]))
    image = Image.fromarray(np.where(SEEN, 1, 0).astype(np.uint8)).convert("P")
    image.putpalette([*rng.integers(0, 256, 3), 200, 0, 0] + [0, 0, 0] * 254)
    return image


@pytest.mark.parametrize(
    "kind, suffix, how",
    [
        ("RGBA", ".png", {}),
        ("RGBA", ".webp", {"lossless": True, "exact": True}),
        ("RGBA", ".tif", {}),
        ("LA", ".png", {}),
        ("P", ".png", {"transparency": 0}),
        ("P", ".png", {"transparency": b"\0"}),
        ("P", ".gif", {"transparency": 0}),
    ],
)
def test_what_is_transparent_is_white(tmp_path, kind, suffix, how):
    for seed in range(2):
        transparent(np.random.default_rng(seed), kind).save(tmp_path / f"{seed}{suffix}", **how)
    first, second = (readers.decode(tmp_path / f"{seed}{suffix}", 16, None, whole=True) for seed in range(2))
    assert np.array_equal(first, second) and (first[:, ~SEEN] == 255).all()
    assert (first[:, SEEN].T == ([200] * 3 if kind == "LA" else [200, 0, 0])).all()


def test_half_transparent_is_half_white_and_wholly_transparent_means_nothing(tmp_path):
    for name, alpha in (("half", 128), ("none", 0)):
        Image.new("RGBA", (8, 8), (200, 0, 0, alpha)).save(tmp_path / f"{name}.png")
    half, none = (readers.decode(tmp_path / f"{name}.png", 8, None)[:, 0, 0].tolist() for name in ("half", "none"))
    assert half == pytest.approx([227, 127, 127], abs=1) and none == [200, 0, 0]


def test_drawings_in_black_on_nothing_are_seen(tmp_path, capsys):
    """Their colour is black throughout: what they show is in what is transparent."""
    root = write_folder(tmp_path, (("train", 5), ("val", 3)), suffix=".png")
    for path in root.rglob("*.png"):
        black = Image.fromarray(np.dstack([np.zeros((16, 16, 3), np.uint8), 255 * SEEN.astype(np.uint8)]))
        black.save(path)
    consume(data.load(root, ".", image_size=16))
    assert len(said(capsys)) == 1  # of counts alone, none of levels


def ramp(top, dtype=np.uint16):
    """[16, 16] from 0 to `top`."""
    return np.linspace(0, top, 256).reshape(16, 16).astype(dtype)


@pytest.mark.parametrize(
    "suffix, pixels, words",
    [
        (
            ".png",
            ramp(4095),
            ["2 images of more than 8 bits, as train/", "0 to 4095, and 65535", "at most 16 of 256 levels are"],
        ),
        (".tif", ramp(4095), ["from 0 to 4095", "at most 16 of 256"]),
        (".tiff", ramp(9, np.float32), ["from 0 to 9, and 255 is taken for white", "at most 10 of 256 levels are left;"]),
        (".tif", ramp(300, np.float32), ["from 0 to 300, and 255", "what lies outside is cut off"]),
        (".tif", ramp(10**6, np.int32), ["from 0 to 1e+06, and 65535", "what lies outside is cut off"]),
        (".png", ramp(65535), []),
        (".tif", ramp(255, np.float32), []),
        (".png", ramp(9, np.uint8), ["2 images, as train/", "from 0 to 9, and 255", "at most 10 of 256 levels"]),
        (".png", ramp(1, bool), []),  # 1 is white
    ],
)
def test_a_line_says_where_few_levels_are_left(tmp_path, capsys, suffix, pixels, words):
    """The file says what its values could be, not what they are."""
    for name in ("train/cat/0", "train/dog/0", "val/cat/0", "val/dog/0"):
        path = (tmp_path / name).with_suffix(suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    splits = data.load(tmp_path, ".", image_size=16, val_fraction=0.5)
    lines = said(capsys)
    assert len(lines) == 1 + 2 * bool(words) and "train 1 image of 1 class" in lines[-1]  # of train/ and val/
    assert all(word in lines[0] for word in words), lines[0]
    if words and "at most" in words[-1]:
        dark = splits.test.pick(np.arange(2)).images * splits.test.std + splits.test.mean
        assert dark.max() < 16  # as the line says


def test_what_is_transparent_in_16_bits_is_white_too(tmp_path):
    values = np.array([[0, 20000], [40000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=0)
    with open(tmp_path / "a.png", "rb") as file:
        pixels = readers.decode(file, 2, None, whole=True)
    assert pixels[0].tolist() == [[255, 20000 // 256], [40000 // 256, 255]]


@pytest.mark.parametrize(
    "suffix, pixels, words",
    [
        (".png", ramp(255), "from 0 to 255, and 65535 is taken for white: at most 1 of 256 levels are left; write them again"),
        (".tiff", ramp(1, np.float32), "from 0 to 1, and 255 is taken for white: at most 2 of 256 levels"),
        (
            ".tif",
            2 * ramp(1, np.float32) - 1,
            "from -1 to 1, and 255 is taken for white: at most 2 of 256 levels are left, and",
        ),
        (".png", ramp(1, np.uint8), "from 0 to 1, and 255 is taken for white: at most 2 of 256 levels"),
    ],
)
def test_images_of_which_black_is_left_are_refused(tmp_path, capsys, suffix, pixels, words):
    """But where there are others beside them, that is said."""
    root = write_folder(tmp_path, (("train", 2), ("val", 1)), suffix=".jpg")
    for path in root.rglob("*.jpg"):
        Image.fromarray(pixels).save(path.with_suffix(suffix))
    data.load(root, ".", image_size=16)
    assert words.split(";")[0] in said(capsys)[0]
    for path in root.rglob("*.jpg"):
        path.unlink()
    data_refused(root, f"4 images{' of more than 8 bits' * (pixels.dtype != np.uint8)}, as train/", words, name=root)


def test_images_of_which_most_are_black_are_not_refused(tmp_path, capsys):
    """All are looked at before that."""
    root = write_folder(tmp_path, (("train", 40), ("val", 1)), suffix=".png")
    files = sorted((root / "train").rglob("*.png"))
    assert len(files) > readers.LOOKED_AT
    for file in files:
        Image.fromarray(ramp(255, np.uint8) if file == files[1] else ramp(1, np.uint8)).save(file)
    readers.say_levels(root, [str(file.relative_to(root)).encode() for file in files])
    assert not said(capsys)
    Image.fromarray(ramp(1, np.uint8)).save(files[1])
    data_refused(root, f"{len(files)} images, as", "at most 2 of 256 levels", name=root)


def png16(pixels):
    """A PNG of 16 bits a colour, which PIL does not write: pixels [H, W, C] uint16, C of 2 (grey and alpha), 3 or 4."""
    height, width, channels = pixels.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">2I5B", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = [struct.pack(">I", len(raw)) + name + raw + struct.pack(">I", zlib.crc32(name + raw)) for name, raw in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bits_a_colour_too(tmp_path, capsys, channels):
    pixels = np.stack([ramp(4095)] * channels, axis=-1)
    pixels[..., 3:] = 65535  # alpha
    pixels[..., 1:2] = 65535 if channels == 2 else pixels[..., 1:2]
    (tmp_path / "0.png").write_bytes(png16(pixels))
    (tmp_path / "broken.png").write_bytes(png16(pixels)[:70])
    readers.say_levels(tmp_path, [b"0.png", b"broken.png", b"absent.png", b"0.jpg"])
    (line,) = said(capsys)
    assert "1 image of" in line and "at most 16 of 256 levels" in line


def test_a_line_says_where_few_levels_are_left_in_an_npz(tmp_path, capsys):
    for top, words in ((1, "_images go up to 1, and 255 is taken for white: at most 2 of 256 levels"), (64, None)):
        images = np.linspace(0, top, 12 * 64).round().astype(np.uint8).reshape(12, 8, 8, 1).repeat(3, 3)
        for part in ("train", "val"):
            consume(data.load(write_npz(tmp_path / f"{part}{top}.npz", **{f"{part}_images": images}), "."))
            lines = said(capsys)
            assert len(lines) == 1 + bool(words) and (not words or f"{part}{words}" in lines[0])


def test_a_turned_tiff_is_upright(tmp_path):
    """Once, whether PIL turns it or the reader does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(40, 30)
    upright.save(tmp_path / "upright.tif")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.tif", exif=exif)
    assert np.array_equal(*(readers.decode(tmp_path / f"{name}.tif", 16, None) for name in ("upright", "turned")))


def test_undecodable_images(tmp_path, monkeypatch):
    root = write_folder(tmp_path)
    good = (root / "train" / "cat" / "0.jpg").read_bytes()
    bomb = bytearray(io_png())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    for raw in (b"", b"not an image", good[:200], good[len(good) // 2 :], bytes(bomb), b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        (root / "val" / "cat" / "1.jpg").write_bytes(raw)
        for workers in (0, 1):
            if workers == 0 or raw == b"":
                line = data_refused(
                    root / "val" / "cat" / "1.jpg", "--skip-corrupt", name=root, image_size=16, workers=workers
                )
                assert "_io." not in line and "UnidentifiedImageError" not in line
                known = raw in (good[len(good) // 2 :], b"", b"not an image")
                assert not known or "not a readable image (it does not begin as a whole JPEG or PNG or" in line
        splits = consume(data.load(root, ".", image_size=16, skip_corrupt=True))
        batch = next(splits.test.ordered(6))
        assert torch.equal(batch.images[1], batch.images[2]) and not torch.equal(batch.images[0], batch.images[1])
    for path in (root / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    data_refused("none of the 6 images", name=root, image_size=16, skip_corrupt=True)


def test_warnings_are_put_back_by_the_last_who_wanted_none(recwarn):
    """In whatever order they leave: threads decode beside each other."""
    first, second, before = readers.quiet(), readers.quiet(), list(warnings.filters)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    warnings.warn("not heard", stacklevel=1)
    assert not recwarn.list
    second.__exit__(None, None, None)
    assert warnings.filters == before
    warnings.warn("heard", stacklevel=1)
    assert len(recwarn.list) == 1


def test_the_last_of_many_images_is_found_as_fast_as_the_first(tmp_path):
    picture().save(tmp_path / "1.png")
    count = 10_000_000
    paths, labels = (np.broadcast_to(np.array(value), count) for value in (b"1.png", 3))
    files, out = readers.Files(str(tmp_path), 16, True, {"val": paths}, {"val": labels}), np.empty((3, 16, 16), np.uint8)
    began = time.monotonic()
    assert [files.read("val", count - 1, None, out) for _ in range(20)] == [3] * 20
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("skip", [False, True])
def test_want_of_memory_and_a_disk_that_fails_are_no_corrupt_images(tmp_path, monkeypatch, skip):
    """What is skipped must not depend on the machine's load."""
    splits, real = data.load(write_folder(tmp_path), ".", image_size=16, skip_corrupt=skip), readers.decode

    def failing(error):
        def decode(file, *rest, **how):
            if file.name.endswith("1.jpg"):
                raise error
            return real(file, *rest, **how)

        monkeypatch.setattr(readers, "decode", decode)
        return list(splits.test.ordered(6))

    with pytest.raises(MemoryError):
        failing(MemoryError())
    with pytest.raises(UserError, match="1.jpg: .*Input/output error"):
        failing(OSError(errno.EIO, "Input/output error"))
    if skip:
        assert failing(OSError("broken data stream"))
    else:
        with pytest.raises(UserError, match="broken data stream.*--skip-corrupt"):
            failing(OSError("broken data stream"))
    monkeypatch.setattr(torch, "empty", failing_allocation)
    with pytest.raises(RuntimeError, match="can't allocate"):
        list(splits.test.ordered(6))


def failing_allocation(*sizes, **how):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def io_png():
    buffer = io.BytesIO()
    picture().save(buffer, "png")
    return buffer.getvalue()


def test_decompression_bombs_are_undecodable(tmp_path, monkeypatch, recwarn):
    root = write_folder(tmp_path)
    picture(80, 30).save(root / "val" / "dog" / "2.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # PIL itself only warns up to twice as many
    data_refused("too many", root / "val" / "dog" / "2.jpg", name=root, image_size=16)
    batch = next(data.load(root, ".", image_size=16, skip_corrupt=True).test.ordered(6))
    assert torch.equal(batch.images[5], batch.images[0])  # the next,
    assert batch.labels[5] == 0 == batch.labels[0]  # with its label
    assert not recwarn.list


# -------------------------------------------------------------------------------------------------------------- folders


def test_folder_finds_images_at_any_depth(tmp_path):
    root = write_folder(tmp_path)
    (root / "train" / "cat" / "deep" / "deeper").mkdir(parents=True)
    picture().save(root / "train" / "cat" / "deep" / "deeper" / "x.JPEG")
    for stray in ("train/notes.txt", "train/cat/notes.txt", "train/cat/._0.jpg"):
        (root / stray).write_bytes(b"stray")
    (root / "train" / ".hidden").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "train" / "cat" / "pipe.jpg")  # opening it would wait for ever
        os.symlink("..", root / "train" / "cat" / "loop")
        os.symlink(root / "train" / "dog" / "0.jpg", root / "train" / "cat" / "link.jpg")
    splits = consume(data.load(root, ".", image_size=16))
    assert len(splits.train) + len(splits.val) == 11 + hasattr(os, "mkfifo")


def test_what_is_left_out_is_counted(tmp_path, capsys):
    root = write_folder(tmp_path)
    images = [path.relative_to(root) for path in sorted(root.rglob("*.jpg"))]
    copy = (root / images[0]).read_bytes()
    for kept in ("cat/.ipynb_checkpoints/0-checkpoint.jpg", "cat/@eaDir/0.jpg/THUMB.jpg", "dog/deep/__MACOSX/x/1.jpg"):
        (root / "train" / kept).parent.mkdir(parents=True)
        (root / "train" / kept).write_bytes(copy)
    for part in ("train/.hidden", "train/@eaDir", "val/__MACOSX"):  # where class folders are
        (root / part).mkdir()
        (root / part / "0.jpg").write_bytes(copy)
    for name in ("train/cat/._0.jpg", "train/.DS_Store", "train/cat/a.heic", "val/dog/b.HEIC", "train/0001", "train/0.jpg"):
        (root / name).write_bytes(copy)
    class_names, paths, labels, left_out = readers.list_images(str(root), "train")
    assert [os.fsdecode(path) for path in paths] == [str(path) for path in images if path.parts[0] == "train"]
    assert class_names == ["cat", "dog"] and labels.tolist() == [0] * 5 + [1] * 5
    assert left_out == {
        **{"in .ipynb_checkpoints/": 1, "in @eaDir/": 2, "in __MACOSX/": 1, "in .hidden/": 1, "with a dot in front": 2},
        **{"*.heic": 1, "without a suffix": 1, "beside the class folders": 1},
    }
    data.load(root, ".", image_size=16)
    (line,) = said(capsys)
    counts, _, reasons = line.partition("; 12 files left out: ")
    assert counts.endswith("test 6 images of 2 classes") and set(reasons.split(", ")) == {
        *{"1 in .ipynb_checkpoints/", "2 in @eaDir/", "2 in __MACOSX/", "1 in .hidden/", "2 with a dot in front"},
        *{"2 *.heic", "1 without a suffix", "1 beside the class folders"},
    }
    many = readers.account(Counter({f"*.{i}": 20 - i for i in range(20)}))
    assert many.startswith("210 files left out: 20 *.0, 19 *.1,") and many.endswith("13 *.7, 78 for other reasons")


def test_a_val_without_class_folders(tmp_path):
    """Says what was found and what is expected, and does not advise to throw anything away."""
    root = write_folder(tmp_path, (("train", 2),))
    (root / "val" / "images").mkdir(parents=True)
    (root / "val" / "val_annotations.txt").write_text("0.jpg cat")
    picture().save(root / "val" / "images" / "0.jpg")
    found = "1 of 1 folders have names that train/ does not have (images)"
    message = data_refused(root / "val", found, "val/<class>/", "(cat, dog)", name=root)
    (root / "val" / "images" / "0.jpg").rename(root / "val" / "0.jpg")
    (root / "val" / "images").rmdir()
    message += data_refused("no class folders", "val/<class>/", "1 *.txt", "1 beside the class folders", name=root)
    (root / "val" / "cat").mkdir()
    (root / "val" / "cat" / "0.heic").write_bytes(b"")
    message += data_refused(root / "val" / "cat", "without images", "1 file left out: 1 *.heic", name=root)
    assert not any(word in message for word in ("remove", "delete"))


def test_bad_folders(tmp_path):
    def changed(change):
        root = write_folder(tmp_path / str(len(list(tmp_path.iterdir()))))
        change(root)
        return root

    def emptied(path):
        for file in path.iterdir():
            file.unlink()

    (tmp_path / "empty").mkdir()
    data_refused("train/<class>", name=tmp_path / "empty")
    (tmp_path / "empty" / "train").mkdir()
    (tmp_path / "empty" / "val").mkdir()
    data_refused("0 class folders", name=tmp_path / "empty")
    data_refused("train/<class>", name=changed(lambda root: (root / "train").rename(root / "training")))
    data_refused("train/<class>", name=changed(lambda root: (root / "val").rename(root / "valid")))
    data_refused("without images", "dog", name=changed(lambda root: emptied(root / "train" / "dog")))
    data_refused("without images", "dog", name=changed(lambda root: emptied(root / "val" / "dog")))
    data_refused("1 class folder;", name=changed(lambda root: (root / "train" / "dog").rename(root / "dog")))
    renamed = changed(lambda root: (root / "val" / "dog").rename(root / "val" / "bird"))
    data_refused("bird", "train/ does not have", name=renamed)
    data_refused("--images 11", name=changed(lambda root: None), limit=11)
    if sys.platform != "win32":
        for one, other in (("val", "train"), ("test", "val")):
            both = changed(lambda root: (shutil.rmtree(root / one, True), os.symlink(root / other, root / one)))  # noqa: B023
            data_refused("two of train/, val/ and test/ are one folder", name=both)
    if sys.platform == "linux":
        data_refused(name=changed(lambda root: os.symlink("loop", root / "train" / "loop")))
        data_refused("loop.jpg", name=changed(lambda root: os.symlink("loop.jpg", root / "train" / "dog" / "loop.jpg")))
        odd = os.fsdecode(b"\xff\n\x1b[31m")
        data_refused("does not have", name=changed(lambda root: (root / "val" / "dog").rename(root / "val" / odd)))
    root = changed(lambda root: None)
    splits = data.load(root, ".", image_size=16)
    (root / "val" / "cat" / "0.jpg").unlink()  # data that disappears under the run
    with pytest.raises(UserError, match="restore it"):
        list(splits.test.ordered(4))


# ----------------------------------------------------------------------------------------------------- worker processes


def test_folder_works_where_processes_are_spawned(tmp_path):
    root = write_folder(tmp_path)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        splits = data.load(root, ".", image_size=16, workers=1)
        assert equal(next(splits.train.stream(4, seed=0)), next(data.load(root, ".", image_size=16).train.stream(4, seed=0)))
        (root / "val" / "cat" / "0.jpg").write_bytes(b"")
        with pytest.raises(UserError, match="skip-corrupt") as caught:
            list(splits.test.ordered(4))
        assert caught.value.__suppress_context__ and caught.value.__cause__ is None
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_workers_decode_a_batch_in_pieces_and_only_so_far_ahead(tmp_path, monkeypatch):
    """Whatever its size: a stream of large batches must not fill the memory with those to come."""
    root = write_folder(tmp_path)
    splits, plain = (data.load(root, ".", image_size=16, workers=workers) for workers in (2, 0))
    decoder, sizes = splits.train.decoder, []
    real = decoder.executor.submit
    monkeypatch.setattr(decoder.executor, "submit", lambda *how: sizes.append(len(how[2])) or real(*how))
    monkeypatch.setattr(readers, "PIECE", 3)
    assert equal(next(splits.train.stream(19, seed=0)), next(plain.train.stream(19, seed=0)))
    assert sum(sizes) == 2 * 19  # a batch of seven pieces, and the next one
    sizes.clear()
    stream, expected = splits.train.stream(7, seed=0), plain.train.stream(7, seed=0)
    assert equal(next(stream), next(expected)) and sizes == [3, 3, 1] * 2 + [3]  # a batch, and 4 pieces for 2 workers
    for _ in range(5):
        assert equal(next(stream), next(expected)) and len(sizes) % 3 == 1
    assert [len(batch.images) for batch in splits.test.ordered(4)] == [4, 2]
    assert all(map(equal, splits.test.ordered(4), plain.test.ordered(4)))
    (root / "val" / "dog" / "1.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="1.jpg.*skip-corrupt"):
        list(splits.test.ordered(4))


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal")
def test_a_worker_that_dies_is_an_error(tmp_path):
    children = set(multiprocessing.active_children())
    splits = data.load(write_folder(tmp_path), ".", image_size=16, workers=2)
    stream = splits.train.stream(4, seed=0)
    next(stream)
    os.kill((set(multiprocessing.active_children()) - children).pop().pid, signal.SIGKILL)
    with pytest.raises(UserError, match="died"):
        for _ in range(10_000):
            next(stream)
    with pytest.raises(UserError, match="died"):
        next(splits.train.stream(4, seed=0))


def status_of(pid, name):
    """A line of what Linux tells of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(f"{name}:"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_go_on_where_a_whole_job_is_asked_to_end(tmp_path):
    """As timeout, systemd and Slurm do: the run's last update may want batches. Where the run itself asks, they end."""
    before = set(multiprocessing.active_children())
    stream = data.load(write_folder(tmp_path), ".", image_size=16, workers=2).train.stream(4, seed=0)
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    deadline, blocked = time.monotonic() + 30, 1 << (signal.SIGTERM - 1)  # a worker that is only starting does not know yet
    while not all(int(status_of(worker.pid, "SigBlk"), 16) & blocked for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    subprocess.run(["kill", *(str(worker.pid) for worker in workers)], check=True)  # from another process
    for _ in range(20):
        next(stream)
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
    for worker in workers:  # whom the pool's own thread may have waited for
        assert multiprocessing.connection.wait([worker.sentinel], 10)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_do_not_outlive_a_killed_run(tmp_path):
    script = (
        "import data, multiprocessing, sys, time\n"
        "if __name__ == '__main__':\n"
        "    stream = data.load(sys.argv[1], '.', image_size=16, workers=2).train.stream(4, seed=0)\n"
        "    next(stream)\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "run.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)}
    command = [sys.executable, tmp_path / "run.py", write_folder(tmp_path / "a")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    pids = run.stdout.readline().split()
    run.kill()
    run.wait()
    run.stdout.close()

    def alive(pid):
        try:
            return ") Z " not in Path(f"/proc/{int(pid)}/stat").read_text()  # a zombie is not
        except FileNotFoundError:
            return False

    end = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(alive, pids))


# ----------------------------------------------------------------------------------------------------------------- fuzz


def fuzz_cifar(name, layout):
    def prepare(tmp_path, monkeypatch):
        folder = write_cifar(tmp_path / layout.folder, layout, per_file=3)
        return [folder / file for file in layout.files], {"name": name, "data_dir": tmp_path}, None

    return prepare


def fuzz_archive(tmp_path, monkeypatch):
    archive, layout = make_archive(tmp_path, monkeypatch)

    def before():
        for path in archive.parent.iterdir():
            if path.is_dir():
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
        trust(archive, layout, "cifar100", monkeypatch)

    return [archive], {"name": "cifar100", "data_dir": archive.parent}, before


def fuzz_npz(save):
    def prepare(tmp_path, monkeypatch):
        masks = {f"{part}_objects": np.eye(8, dtype=bool)[None].repeat(12, 0) for part in ("train", "val", "test")}
        path = write_npz(tmp_path / "a.npz", save=save, **masks)
        return [path], {"name": path, "data_dir": "."}, None

    return prepare


def fuzz_npy(tmp_path, monkeypatch):
    """The arrays inside the .npz are damaged, the zip around them is whole."""
    masks = {f"{part}_objects": np.zeros((12, 8, 8), bool) for part in ("train", "val", "test")}
    write_npz(tmp_path / "whole.npz", **masks)
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
        archive.extractall(tmp_path)

    def before():
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for path in tmp_path.glob("*.npy"):
                archive.write(path, path.name)

    before()
    return sorted(tmp_path.glob("*.npy")), {"name": tmp_path / "a.npz", "data_dir": "."}, before


def fuzz_folder(suffix, mode="RGB"):
    def prepare(tmp_path, monkeypatch):
        root = write_folder(tmp_path / "a", (("train", 5), ("val", 1)), suffix=suffix)
        if mode != "RGB":
            picture(mode=mode).save(root / "train" / "cat" / f"0{suffix}", **({"transparency": 0} if mode == "P" else {}))
        return [root / "train" / "cat" / f"0{suffix}"], {"name": root, "data_dir": ".", "image_size": 16}, None

    return prepare


FORMATS = (
    {layout.folder: fuzz_cifar(name, layout) for name, layout in LAYOUTS if name != "cifar100-coarse"}
    | {"archive": fuzz_archive, "npz": fuzz_npz(np.savez), "npz deflated": fuzz_npz(np.savez_compressed), "npy": fuzz_npy}
    | {suffix: fuzz_folder(suffix) for suffix in (".jpg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif")}
    | {f"{suffix} {mode}": fuzz_folder(suffix, mode) for suffix, mode in ((".png", "P"), (".png", "RGBA"), (".tif", "RGBA"))}
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_fuzz(tmp_path, monkeypatch, kind):
    """A damaged file loads to valid splits or raises a UserError of one line: nothing else, and soon, and in little memory."""
    paths, arguments, before = FORMATS[kind](tmp_path, monkeypatch)
    whole = {path: path.read_bytes() for path in paths}
    accepted, slowest = 0, 0.0
    for number in range(FUZZ):
        rng = np.random.default_rng([number, *kind.encode()])
        path = paths[rng.integers(0, len(paths))]
        path.write_bytes(mutated(whole[path], rng))
        if before:
            before()
        start, extra = time.monotonic(), {"skip_corrupt": bool(number % 2)} if kind[0] == "." else {}
        try:
            consume(data.load(**arguments, **extra))
            accepted += 1
        except UserError as error:
            assert str(error).isprintable() and not extra.get("skip_corrupt")
        except BaseException:
            print(f"{kind} number {number}")
            raise
        slowest = max(slowest, time.monotonic() - start)
        path.write_bytes(whole[path])
    if before:
        before()
    consume(data.load(**arguments))  # it was the damage
    print(f"fuzz {kind}: {FUZZ} files, {accepted} accepted, {FUZZ - accepted} refused, 0 other, slowest {slowest:.2f} s")
    assert slowest < 20
    memory_is_bounded()
