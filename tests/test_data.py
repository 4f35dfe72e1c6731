"""data.py: what the splits hold, that batches are functions of their number, and that bad files end in one line.

The files are written here, small, in each real format. MLO_MAE_FUZZ sets how many mutations of each format are tried.
"""

import faulthandler
import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data

FUZZ = int(os.environ.get("MLO_MAE_FUZZ", 150))
LAYOUTS = [(name, layout) for name, layouts in data.CIFAR.items() for layout in layouts]


@pytest.fixture(autouse=True)
def no_hang():
    """A test that hangs, even where Python cannot interrupt it, ends the tests."""
    faulthandler.dump_traceback_later(120 + FUZZ, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


# --------------------------------------------------------------------------------------------------- writers of files


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
            return (b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87R(K\x01"
                    + b"".join(map(python2_pickle, value.shape)) + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
                    b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + python2_pickle(value.tobytes()) + b"tb")


def dump(value, protocol):
    return b"\x80\x02" + python2_pickle(value) + b"." if protocol == "python 2" else pickle.dumps(value, protocol=protocol)


def write_cifar(folder, layout, per_file=6, protocol="python 2", seed=0):
    """Files in CIFAR's formats; image k of the training pool has k in its first byte."""
    rng = np.random.default_rng(seed)
    classes = 100 if "100" in layout.folder else 10
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate((*layout.train, layout.test)):
        pixels = rng.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        pixels[:, 0] = np.arange(per_file) + number * per_file
        labels = [int(k) for k in (np.arange(per_file) + number) % classes]
        if isinstance(layout.labels, int):
            heads = np.array([[0] * (layout.labels - 1) + [label] for label in labels], np.uint8)
            (folder / file).write_bytes(np.concatenate([heads, pixels], 1).tobytes())
        else:
            content = {"batch_label": "a batch", layout.labels: labels, "data": pixels, "filenames": ["x.png"] * per_file}
            (folder / file).write_bytes(dump(content, protocol))
    names = [f"class {i}" if layout.names else f"class_{i}" for i in range(classes)]
    raw = dump({"num_vis": 3072, layout.names: names}, protocol) if layout.names else "\n".join(names).encode()
    (folder / layout.meta).write_bytes(raw)
    return folder


def write_npz(path, n=12, size=8, colour=True, parts=("train", "val", "test"), save=np.savez, **changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for part in parts:
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, size, size, 3) if colour else (n, size, size), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % 3)[:, None].astype(np.uint8)
    arrays.update(changes)
    save(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def picture(width=40, height=30, seed=0, mode="RGB"):
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 255 / width, y * 255 / height, 128 + 100 * np.sin(6 * x / width + 6 * y / height + seed)], -1)
    return Image.fromarray(base.clip(0, 255).astype(np.uint8)).convert(mode)


def write_folder(root, parts=(("train", 5), ("val", 3)), classes=("cat", "dog"), suffix=".jpg", size=(40, 30)):
    for part, count in parts:
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                picture(*size, seed=10 * label + k).save(root / part / name / f"{k}{suffix}")
    return root


def consume(splits):
    """Everything that a run would do with the splits; asserts that they are what `load` promises."""
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


def refused(*words, name, data_dir="nowhere", use=True, **options):
    """Loading and reading it raises DataError, in one line, with these words in it."""
    with pytest.raises(data.DataError) as caught:
        splits = data.load(name, data_dir, **options)
        consume(splits) if use else None
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 600, message
    for word in words:
        assert str(word) in message, message
    return message


def equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def take(stream, count):
    return [batch for batch, _ in zip(stream, range(count))]


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def shapes():
    return data.load("shapes", "nowhere")


@pytest.mark.parametrize("count, batch_size", [(10, 4), (10, 10), (3, 8), (1, 5), (7, 1)])
def test_index_batches_are_epochs_cut_into_batches(count, batch_size):
    batches = [indices for _, (_, indices) in zip(range(6), data.index_batches(count, batch_size, 5, 0))]
    assert all(len(indices) == batch_size for indices in batches)
    joined = np.concatenate(batches)
    for epoch in range(len(joined) // count):
        assert sorted(joined[epoch * count:(epoch + 1) * count]) == list(range(count))  # no repeats, none left out
    for start in range(6):
        b, indices = next(data.index_batches(count, batch_size, 5, start))
        assert b == start and (indices == batches[start]).all()


def test_index_batches_differ_between_epochs_and_seeds():
    def first_two(seed):
        return [tuple(indices) for _, (_, indices) in zip(range(2), data.index_batches(20, 20, seed, 0))]

    assert len({*first_two(0), *first_two(1), *first_two(-1), *first_two(2**63)}) == 8


@pytest.mark.parametrize("augment", [True, False])
def test_images_stream_resumes_at_any_batch(shapes, augment):
    batches = take(shapes.val.stream(100, seed=3, augment=augment), 26)
    for start in (1, 11, 12, 25):
        assert equal(next(shapes.val.stream(100, seed=3, start=start, augment=augment)), batches[start])
    assert not equal(batches[0], next(shapes.val.stream(100, seed=4, augment=augment)))


def test_augmentation_is_crop_and_flip(shapes):
    split = shapes.train
    batch = next(split.stream(16, seed=1))
    _, indices = next(data.index_batches(len(split), 16, 1, 0))
    assert torch.equal(batch.labels, split.labels[indices])
    seen = set()
    for image, original in zip(batch.images, split.images[indices]):
        padded = torch.nn.functional.pad(original, (4, 4, 4, 4))
        pixels = (image * split.std + split.mean).round().byte()
        found = [(top, left, flip) for top in range(9) for left in range(9) for flip in (0, 1)
                 if torch.equal((padded[:, top:top + 32, left:left + 32].flip(2) if flip
                                 else padded[:, top:top + 32, left:left + 32]), pixels)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 10 and len({flip for _, _, flip in seen}) == 2


def test_every_crop_is_drawn(shapes):
    one = data.Images(shapes.train.images[:1], shapes.train.labels[:1], shapes.mean, shapes.std)
    batch = next(one.stream(2000, seed=0))
    assert len(torch.unique(batch.images.flatten(1), dim=0)) == 9 * 9 * 2
    first, second = take(one.stream(8, seed=0), 2)
    assert not equal(first, second)  # each batch draws its own


def test_ordered_is_in_order_and_as_it_is(shapes):
    images = torch.cat([batch.images for batch in shapes.val.ordered(33)])
    mean, std = (torch.tensor(value)[:, None, None] for value in (shapes.mean, shapes.std))
    assert torch.allclose(images * std + mean, shapes.val.images / 255, atol=1e-6)
    assert torch.equal(torch.cat([batch.labels for batch in shapes.val.ordered(33)]), shapes.val.labels)
    assert equal(shapes.val.pick([5, 2]), data.Batch(images[[5, 2]], shapes.val.labels[[5, 2]]))


# ------------------------------------------------------------------------------------------------------------- shapes


def test_shapes(shapes):
    full = consume(shapes)
    assert (len(full.train), len(full.val), len(full.test)) == (4800, 1200, 2000) and len(full.class_names) == 8
    assert full.train.images.shape[1:] == (3, 32, 32) and full.train.objects.shape == (4800, 32, 32)
    assert (full.test.labels.bincount() == 250).all()
    share = full.test.objects.float().mean((1, 2))
    assert 0.2 < share.min() and share.max() < 0.41  # large tips are cut off at the border
    pixels = full.train.images.float() / 255
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(full.mean), atol=1e-4)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor(full.std), atol=1e-4)
    spread = full.train.images.float().std(1)  # [N, H, W]: of the channels, 0 for grey
    objects = full.train.objects
    assert (spread[objects] > 15).float().mean() > 0.9 and (spread[~objects] < 15).float().mean() > 0.9
    inside = (full.train.images * objects[:, None]).sum((2, 3)) / objects.sum((1, 2))[:, None]
    by_class = torch.stack([inside[full.train.labels == k].mean(0) for k in range(8)])
    assert (by_class - by_class.mean(0)).abs().max() < 12  # but its colour does not tell the class
    other = data.load("shapes", "nowhere", seed=1)  # another hold-out of the same pictures
    assert torch.equal(full.test.images, other.test.images) and not torch.equal(full.train.labels, other.train.labels)
    assert data.load("shapes", "nowhere", image_size=16, limit=100).train.images.shape == (80, 3, 16, 16)


def test_limit_and_hold_out(tmp_path):
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    images = np.zeros((100, 8, 8), np.uint8)
    images[:, 0, 0] = np.arange(100)
    write_npz(tmp_path / "a.npz", colour=False, parts=("train", "test"), train_images=images, train_labels=labels)
    ids = lambda split: set(split.images[:, 0, 0, 0].tolist())  # noqa: E731
    whole = consume(data.load(tmp_path / "a.npz", "."))
    assert (len(whole.train), len(whole.val)) == (80, 20) and not ids(whole.train) & ids(whole.val)
    some = data.load(tmp_path / "a.npz", ".", limit=45, val_fraction=0.4)
    assert (len(some.train), len(some.val), len(some.test)) == (27, 18, 12) and not ids(some.train) & ids(some.val)
    assert torch.cat([some.train.labels, some.val.labels]).bincount().tolist() == [18, 17, 10]
    again, other = (data.load(tmp_path / "a.npz", ".", limit=45, val_fraction=0.4, seed=seed) for seed in (0, 1))
    assert ids(again.train) == ids(some.train) != ids(other.train)
    refused("101", "100 images", name=tmp_path / "a.npz", limit=101)
    refused("held out", name=tmp_path / "a.npz", limit=1)
    for options in ({"val_fraction": 0}, {"val_fraction": 1.0}, {"limit": -1}, {"image_size": -1}, {"workers": -1}):
        refused("--", name=tmp_path / "a.npz", **options)
    refused("shapes, cifar10", name="no such thing")
    refused("too many", name="shapes", image_size=4000)


# -------------------------------------------------------------------------------------------------------------- CIFAR


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


def test_real_cifar100():
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "cifar-100-python").is_dir():
        pytest.skip("no CIFAR-100 here")
    splits = data.load("cifar100", folder)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (40000, 10000, 10000)
    assert (splits.test.labels.bincount() == 100).all() and splits.class_names[:2] == ["apple", "aquarium_fish"]
    pixels = splits.train.images[:2000].float() / 255
    assert abs(pixels.mean() - 0.478) < 0.02 and pixels.std() > 0.2


@pytest.mark.parametrize("name, layout", LAYOUTS)
def test_cifar_bad_files(tmp_path, name, layout):
    def broken(file, raw):
        folder = write_cifar(tmp_path / layout.folder, layout)
        (folder / file).unlink() if raw is None else (folder / file).write_bytes(raw)
        return folder / file

    whole = (write_cifar(tmp_path / layout.folder, layout) / layout.test).read_bytes()
    for raw in (b"", whole[:-1], whole[:700], b"\x00" * 17):
        refused(broken(layout.test, raw), "in its place", name=name, data_dir=tmp_path)
    refused(broken(layout.test, np.random.default_rng(0).bytes(4000)), name=name, data_dir=tmp_path)
    refused(broken(layout.train[0], None), "no such file", name=name, data_dir=tmp_path)
    if not isinstance(layout.labels, int):
        good = pickle.loads(whole, encoding="latin-1")
        for change in ({"data": good["data"][:, :-1]}, {"data": good["data"].astype(np.int32)}, {"data": 3}, {"data": None},
                       {"data": good["data"][:3]}, {"data": np.asfortranarray(good["data"])}, {"data": good["data"][:0]},
                       {layout.labels: [0.5] * 6}, {layout.labels: [-1] * 6}, {layout.labels: [100] * 6},
                       {layout.labels: [2**40] * 6}, {layout.labels: 5}, {layout.labels: [True] * 6}):
            refused(broken(layout.test, pickle.dumps(good | change, protocol=2)), name=name, data_dir=tmp_path)
    elif name == "cifar10":
        refused("largest 10", broken(layout.test, bytes([10]) + whole[1:]), name=name, data_dir=tmp_path)
    refused(broken(layout.meta, b"\x80\x02]q\x01."), "delete", name=name, data_dir=tmp_path)
    broken(layout.meta, None)
    consume(data.load(name, tmp_path))


def test_larger_files_are_refused(tmp_path, monkeypatch):
    write_cifar(tmp_path / "cifar-100-binary", data.CIFAR["cifar100"][1])
    monkeypatch.setattr(data, "MAX_FILE", 10_000)
    refused("more than 10000 bytes", name="cifar100", data_dir=tmp_path)


class Runs:
    """Pickles to a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_malicious_pickles_do_not_run(tmp_path):
    layout, canary = data.CIFAR["cifar100"][0], tmp_path / "canary"
    folder = write_cifar(tmp_path / layout.folder, layout)
    good = pickle.loads((folder / "test").read_bytes(), encoding="latin-1")
    command = f"echo > {canary}"
    attacks = [pickle.dumps(value, protocol=protocol) for protocol in (0, 2, 4) for value in (
        Runs(os.system, command), good | {"x": Runs(os.system, command)}, good | {"data": Runs(open, str(canary), "w")},
        good | {"data": Runs(eval, f"open({str(canary)!r}, 'w')")}, good | {"x": Runs(getattr, "x", "y")},
        good | {"data": Runs(np.load, str(canary))}, good | {"x": Runs(np.ones, 10**12)})]
    attacks += [b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.", b"(S'" + command.encode() + b"'\niposix\nsystem\n.",
                b"(cposix\nsystem\nS'" + command.encode() + b"'\no."]
    for raw in attacks:
        (folder / "test").write_bytes(raw)
        message = refused(folder / "test", "refused", name="cifar100", data_dir=tmp_path)
        assert "asks" in message and not canary.exists()
    write_cifar(folder, layout)
    (folder / "meta").write_bytes(attacks[0])
    refused(folder / "meta", "refused", name="cifar100", data_dir=tmp_path)
    pickle.loads(attacks[0])
    assert canary.exists()  # the attacks are real


def test_pickles_cannot_exhaust_memory_or_time(tmp_path):
    layout = data.CIFAR["cifar100"][0]
    folder = write_cifar(tmp_path / layout.folder, layout)
    nest = b"\x80\x02)" + b"q\x01h\x01\x86" * 80  # a tuple of 2^80 leaves
    shape = pickle.dumps(10**9, protocol=2)[2:-1]
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    for raw in (b"\x80\x04r\xff\xff\xff\xffN.", b"\x80\x02Nr\xff\xff\xff\xff.",  # memo number 2^32 - 1
                b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f" + b"x.", b"\x80\x05\x96" + b"\xff" * 7 + b"\x0fx.",  # bytes of 10^18
                b"\x80\x04\x95" + b"\xff" * 7 + b"\x0f.", b"\x80\x02}" + nest[2:] + b"Ns.", nest + b".",
                b"\x80\x02)" + b"\x85" * 200_000 + b".",
                b"\x80\x02" + array + shape + b"\x85U\x01b\x87R.", b"\x80\x02]q\x01h\x01h\x01ee."):
        (folder / "test").write_bytes(raw)
        refused(folder / "test", name="cifar100", data_dir=tmp_path)
    (folder / "test").write_bytes(b"\x80\x02" + b"}" * 510_000 + b".")
    refused("too many opcodes", name="cifar100", data_dir=tmp_path)
    memory_is_bounded()


def memory_is_bounded():
    if sys.platform == "linux":
        import resource

        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 * 2**20  # KiB


# ----------------------------------------------------------------------------------------------------------- archives


def make_archive(tmp_path, monkeypatch, name="cifar100", extra=(), drop=(), layout=None):
    """An archive of small files in place of the published one: its path and layout. `extra`: (TarInfo, bytes)."""
    layout = layout or data.CIFAR[name][0]
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
    monkeypatch.setitem(data.CIFAR, name, [layout])
    monkeypatch.setattr(data, "URL", archive.parent.as_uri() + "/")
    return layout


def test_download_and_unpack(tmp_path, monkeypatch, capfd):
    archive, layout = make_archive(tmp_path, monkeypatch)
    consume(data.load("cifar100", tmp_path / "new" / "data"))
    assert layout.archive in capfd.readouterr().err  # the progress bar
    assert sorted(p.name for p in (tmp_path / "new" / "data").iterdir()) == sorted([layout.archive, layout.folder])
    monkeypatch.setattr(data, "URL", "http://127.0.0.1:9/")
    consume(data.load("cifar100", tmp_path / "new" / "data"))  # unpacked: nothing is fetched
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / layout.archive).write_bytes(archive.read_bytes())
    consume(data.load("cifar100", tmp_path / "local"))  # from the archive alone


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "URL", "http://127.0.0.1:9/")
    message = refused("could not download", tmp_path / "cifar-10-python.tar.gz", name="cifar10", data_dir=tmp_path)
    assert "http://127.0.0.1:9/cifar-10-python.tar.gz" in message and not list(tmp_path.iterdir())


def test_wrong_checksums(tmp_path, monkeypatch):
    archive, layout = make_archive(tmp_path, monkeypatch)
    monkeypatch.setitem(data.CIFAR, "cifar100", [layout._replace(md5="0" * 32)])
    message = refused("md5", layout.md5, "0" * 32, name="cifar100", data_dir=tmp_path / "new")  # downloaded
    assert "could not download" in message and not list((tmp_path / "new").iterdir())
    message = refused("md5", archive, "delete", name="cifar100", data_dir=archive.parent)  # found
    assert [p.name for p in archive.parent.iterdir()] == [layout.archive]


def test_archives_write_nothing_but_what_is_expected(tmp_path, monkeypatch):
    def entry(name, kind=tarfile.REGTYPE, link="", raw=b"evil"):
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, len(raw) if kind == tarfile.REGTYPE else 0
        return info, raw

    evil = [entry("../evil"), entry(str(tmp_path / "evil")), entry("cifar-100-python/../../evil"),
            entry("cifar-100-python/evil"), entry("cifar-100-python/test", tarfile.SYMTYPE, "/etc/passwd"),
            entry("cifar-100-python", tarfile.SYMTYPE, ".."),
            entry("cifar-100-python/meta", tarfile.LNKTYPE, "../evil"), entry("cifar-100-python/train", tarfile.FIFOTYPE)]
    _, layout = make_archive(tmp_path, monkeypatch, extra=evil)
    consume(data.load("cifar100", tmp_path / "new"))
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path / "new" / layout.folder).is_symlink()
    assert all(p.is_file() and not p.is_symlink() for p in (tmp_path / "new" / layout.folder).iterdir())
    make_archive(tmp_path, monkeypatch, extra=evil, drop=["test"])
    refused("no such file", name="cifar100", data_dir=tmp_path / "other")


def test_places_that_cannot_be_used(tmp_path, monkeypatch):
    make_archive(tmp_path, monkeypatch)
    (tmp_path / "file").write_bytes(b"")
    refused(tmp_path / "file", name="cifar100", data_dir=tmp_path / "file")
    layout = data.CIFAR["cifar100"][0]
    (write_cifar(tmp_path / layout.folder, layout) / "test").unlink()
    (tmp_path / layout.folder / "test").mkdir()
    refused(tmp_path / layout.folder / "test", "no such file", name="cifar100", data_dir=tmp_path)

    def forbidden(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    write_cifar(tmp_path / "readable" / layout.folder, layout)
    write_npz(tmp_path / "a.npz")
    write_folder(tmp_path / "folder")
    with monkeypatch.context() as patch:  # tests may run as root, whom no permission stops
        patch.setattr(data, "open", forbidden, raising=False)
        refused("Permission denied", layout.folder, name="cifar100", data_dir=tmp_path / "readable")
        refused("Permission denied", "folder", name=tmp_path / "folder", skip_corrupt=True)
        patch.setattr(zipfile, "ZipFile", forbidden)
        refused("Permission denied", "a.npz", name=tmp_path / "a.npz")
        patch.setattr(os, "scandir", forbidden)
        refused("Permission denied", "train", name=tmp_path / "folder")
        patch.setattr(data.tempfile, "mkdtemp", lambda **_: forbidden(tmp_path))
        refused("Permission denied", name="cifar100", data_dir=tmp_path / "archives")


# ---------------------------------------------------------------------------------------------------------------- npz


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


def test_npz_constant_channel(tmp_path):
    images = np.full((12, 8, 8, 3), 7, np.uint8)
    consume(data.load(write_npz(tmp_path / "a.npz", train_images=images), "."))


def test_npz_refusals(tmp_path):
    canary, images = tmp_path / "canary", np.zeros((12, 8, 8), np.uint8)
    objects = np.empty(12, object)
    objects[:] = Runs(os.system, f"echo > {canary}")
    for words, changes in (
            (["no train_images"], {"train_images": None}), (["no test_labels"], {"test_labels": None}),
            (["no val_images"], {"val_images": None}), (["no train_images"], {"train_images": None, "train_labels": None}),
            (["train_labels", "Python objects"], {"train_labels": objects}),
            (["train_images", "Python objects"], {"train_images": objects}),
            (["float32", "uint8"], {"train_images": images.astype(np.float32)}),
            (["int16", "uint8"], {"val_images": images.astype(np.int16)}),
            (["square"], {"train_images": images[:, :7]}), (["square"], {"train_images": np.zeros((12, 8, 8, 4), np.uint8)}),
            (["square"], {"train_images": np.zeros((12, 8, 8, 8), np.uint8)}), (["square"], {"train_images": images[:, 0]}),
            (["test_images", "alike"], {"test_images": np.zeros((12, 9, 9, 3), np.uint8)}),
            (["test_images", "alike"], {"test_images": images}),
            (["several"], {"train_labels": np.zeros((12, 14), int)}), (["float64"], {"train_labels": np.zeros(12)}),
            (["12 images", "[11]"], {"train_labels": np.arange(11)}), (["-1"], {"train_labels": -np.ones(12, int)}),
            (["1000000"], {"train_labels": np.arange(12) * 0 + 10**6}), (["18446744073709551615"], {
                "train_labels": np.full(12, 2**64 - 1, np.uint64)}),
            (["up to 12"], {"train_labels": np.arange(12) + 1}), (["up to 0"], {"train_labels": np.zeros(12, int)}),
            (["val_labels has class 3"], {"val_labels": np.arange(12) % 4}), (["shape"], {"train_images": images[:0]})):
        refused(tmp_path / "a.npz", *words, name=write_npz(tmp_path / "a.npz", **changes))
    assert not canary.exists()
    good = write_npz(tmp_path / "a.npz").read_bytes()
    for raw in (b"", b"x", good[:100], good[:-30], good[100:], np.random.default_rng(0).bytes(1000), b"PK\x05\x06" + bytes(18)):
        (tmp_path / "b.npz").write_bytes(raw)
        refused(tmp_path / "b.npz", name=tmp_path / "b.npz")


def npy(shape, dtype="|u1", body=b""):
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + body


def test_npz_sizes_are_checked_before_allocation(tmp_path):
    bomb = npy((2**12, 256, 256), body=bytes(2**28))
    for raw in (npy((10**9, 28, 28)), npy((10**6, 10**6, 10**6), body=b"x"), npy((-4, -8, 8), body=bytes(256)), npy((2**62, 4)),
                npy((True, 8, 8), body=bytes(64)), npy((), body=b"x"), npy((3, 8, 8), "|V999999999"), npy((3, 8, 8), "O"),
                npy("(" * 50 + ")" * 50), npy(("-" * 60) + "1"), npy((4, 8, 8), "|u1")[:9], bomb):
        write_npz(tmp_path / "a.npz", train_images=None)
        with zipfile.ZipFile(tmp_path / "a.npz", "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train_images.npy", raw)
        message = refused(tmp_path / "a.npz", name=tmp_path / "a.npz")
    assert "100 times" in message
    memory_is_bounded()


# ------------------------------------------------------------------------------------------------------------ folders


def test_folder(tmp_path):
    splits = consume(data.load(write_folder(tmp_path / "a"), ".", image_size=16))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (8, 2, 6)  # val/ is the test set
    assert splits.class_names == ["cat", "dog"] and splits.channels == 3 and splits.mean == data.IMAGENET_MEAN
    three = (("train", 5), ("val", 3), ("test", 4))
    splits = consume(data.load(write_folder(tmp_path / "b", three), ".", image_size=16, limit=4))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (4, 6, 8)
    assert splits.train.labels.bincount().tolist() == [2, 2]
    splits = data.load(write_folder(tmp_path / "c", (("train", 5), ("test", 4))), ".")
    assert (len(splits.train), len(splits.val), len(splits.test), splits.image_size) == (8, 2, 8, 224)


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


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".ppm"])
def test_folder_formats_and_evaluation_crop(tmp_path, suffix):
    root = write_folder(tmp_path, (("train", 2), ("val", 1)), suffix=suffix, size=(300, 200))
    images = next(data.load(root, ".", image_size=28).test.ordered(2)).images
    with Image.open(root / "val" / "cat" / f"0{suffix}") as whole:
        expected = whole.convert("RGB").resize((48, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(expected.crop((10, 2, 38, 30)))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    assert (images[0] * std + mean - expected).abs().mean() < 0.02


def test_draft_gives_the_same_picture(tmp_path, monkeypatch):
    picture(1600, 1200).save(tmp_path / "a.jpg", quality=95)
    fast = [data.decode(tmp_path / "a.jpg", 64, rng) for rng in (None, *(data.generator(k) for k in range(8)))]
    monkeypatch.setattr(Image.Image, "draft", lambda *_: None)
    from PIL.JpegImagePlugin import JpegImageFile

    monkeypatch.setattr(JpegImageFile, "draft", lambda *_: None)
    full = [data.decode(tmp_path / "a.jpg", 64, rng) for rng in (None, *(data.generator(k) for k in range(8)))]
    for a, b in zip(fast, full):
        assert np.abs(a.astype(int) - b.astype(int)).mean() < 2


def test_every_image_of_every_batch_is_cropped_for_itself(tmp_path):
    root = write_folder(tmp_path, (("train", 3), ("val", 1)))
    for path in (root / "train").rglob("*.jpg"):
        picture().save(path)
    batches = take(data.load(root, ".", image_size=16).train.stream(8, seed=0), 3)
    assert len(torch.unique(torch.cat([batch.images for batch in batches]).flatten(1), dim=0)) == 24


def test_folder_labels_belong_to_the_images(tmp_path):
    root = write_folder(tmp_path, (("train", 6), ("val", 3)))
    for path in root.rglob("dog/*.jpg"):
        Image.new("RGB", (20, 20)).save(path)
    (root / "val" / "cat" / "2.jpg").write_bytes(b"")  # the next is a dog
    splits = data.load(root, ".", image_size=16, skip_corrupt=True)
    for split in (splits.train, splits.val, splits.test):
        for images, labels in (*split.ordered(4), *take(split.stream(4, seed=0), 3)):
            assert torch.equal(images.std((1, 2, 3)) < 0.3, labels == 1)
    assert torch.cat([labels for _, labels in splits.test.ordered(4)]).tolist() == [0, 0, 1, 1, 1, 1]
    assert splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_crop_box():
    rng, areas, ratios = np.random.default_rng(0), [], []
    for _ in range(2000):
        left, top, w, h = data.crop_box(500, 375, rng)
        assert 0 <= left <= 500 - w and 0 <= top <= 375 - h
        areas.append(w * h / (500 * 375))
        ratios.append(w / h)
    assert 0.19 < min(areas) < 0.21 and max(areas) > 0.95 and 0.74 < min(ratios) < 0.76 and 1.32 < max(ratios) < 1.35
    for width, height in ((1, 1), (1, 1000), (1000, 1), (2, 3)):
        left, top, w, h = data.crop_box(width, height, rng)
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


def test_undecodable_images(tmp_path, monkeypatch):
    root = write_folder(tmp_path)
    good = (root / "train" / "cat" / "0.jpg").read_bytes()
    bomb = bytearray(io_png())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    for raw in (b"", b"not an image", good[:200], good[len(good) // 2:], bytes(bomb), b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        (root / "val" / "cat" / "1.jpg").write_bytes(raw)
        for workers in (0, 1):
            if workers == 0 or raw == b"":
                refused(root / "val" / "cat" / "1.jpg", "--skip-corrupt", name=root, image_size=16, workers=workers)
        splits = consume(data.load(root, ".", image_size=16, skip_corrupt=True))
        batch = next(splits.test.ordered(6))
        assert torch.equal(batch.images[1], batch.images[2]) and not torch.equal(batch.images[0], batch.images[1])
    for path in (root / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    refused("none of the 6 images", name=root, image_size=16, skip_corrupt=True)


def io_png():
    buffer = io.BytesIO()
    picture().save(buffer, "png")
    return buffer.getvalue()


def test_decompression_bombs_are_undecodable(tmp_path, monkeypatch, recwarn):
    root = write_folder(tmp_path)
    picture(80, 30).save(root / "val" / "dog" / "2.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # PIL itself only warns up to twice as many
    refused("too many", root / "val" / "dog" / "2.jpg", name=root, image_size=16)
    batch = next(data.load(root, ".", image_size=16, skip_corrupt=True).test.ordered(6))
    assert torch.equal(batch.images[5], batch.images[0]) and batch.labels[5] == 0 == batch.labels[0]  # the next, with its label
    assert not recwarn.list


def test_bad_folders(tmp_path):
    def changed(change):
        root = write_folder(tmp_path / str(len(list(tmp_path.iterdir()))))
        change(root)
        return root

    def emptied(path):
        for file in path.iterdir():
            file.unlink()

    (tmp_path / "empty").mkdir()
    refused("train/<class>", name=tmp_path / "empty")
    (tmp_path / "empty" / "train").mkdir()
    (tmp_path / "empty" / "val").mkdir()
    refused("0 class folders", name=tmp_path / "empty")
    refused("train/<class>", name=changed(lambda root: (root / "train").rename(root / "training")))
    refused("train/<class>", name=changed(lambda root: (root / "val").rename(root / "valid")))
    refused("without images", "dog", name=changed(lambda root: emptied(root / "train" / "dog")))
    refused("without images", "dog", name=changed(lambda root: emptied(root / "val" / "dog")))
    refused("1 class folders", name=changed(lambda root: (root / "train" / "dog").rename(root / "dog")))
    refused("bird", "train/ does not have", name=changed(lambda root: (root / "val" / "dog").rename(root / "val" / "bird")))
    refused("--images 11", name=changed(lambda root: None), limit=11)
    if sys.platform == "linux":
        refused(name=changed(lambda root: os.symlink("loop", root / "train" / "loop")))
        refused("loop.jpg", name=changed(lambda root: os.symlink("loop.jpg", root / "train" / "dog" / "loop.jpg")))
        odd = os.fsdecode(b"\xff\n\x1b[31m")
        refused("does not have", name=changed(lambda root: (root / "val" / "dog").rename(root / "val" / odd)))
    root = changed(lambda root: None)
    splits = data.load(root, ".", image_size=16)
    (root / "val" / "cat" / "0.jpg").unlink()  # data that disappears under the run
    with pytest.raises(data.DataError, match="restore it"):
        list(splits.test.ordered(4))


def test_folder_stream_is_the_same_with_any_number_of_workers(tmp_path):
    others = multiprocessing.active_children()  # of tests before, not yet collected
    root = write_folder(tmp_path, (("train", 8), ("val", 3)))
    (root / "train" / "dog" / "3.jpg").write_bytes(b"")
    one, two = (data.load(root, ".", image_size=16, workers=workers, skip_corrupt=True) for workers in (0, 2))
    for split in ("train", "val", "test"):
        a, b = getattr(one, split), getattr(two, split)
        batches = take(a.stream(5, seed=2), 6)
        assert all(equal(x, y) for x, y in zip(batches, b.stream(5, seed=2)))
        assert equal(batches[4], next(a.stream(5, seed=2, start=4))) and equal(batches[4], next(b.stream(5, seed=2, start=4)))
        assert all(equal(x, y) for x, y in zip(a.ordered(4), b.ordered(4), strict=True))
        assert not equal(batches[0], next(a.stream(5, seed=3)))
        assert not equal(batches[0], next(a.stream(5, seed=2, augment=False)))
    assert 0 < len(set(multiprocessing.active_children()) - set(others)) <= 2  # the splits share them


def test_folder_works_where_processes_are_spawned(tmp_path):
    root = write_folder(tmp_path)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        splits = data.load(root, ".", image_size=16, workers=1)
        assert equal(next(splits.train.stream(4, seed=0)), next(data.load(root, ".", image_size=16).train.stream(4, seed=0)))
        (root / "val" / "cat" / "0.jpg").write_bytes(b"")
        with pytest.raises(data.DataError, match="skip-corrupt") as caught:
            list(splits.test.ordered(4))
        assert caught.value.__suppress_context__ and caught.value.__cause__ is None
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal")
def test_a_worker_that_dies_is_an_error(tmp_path):
    children = set(multiprocessing.active_children())
    splits = data.load(write_folder(tmp_path), ".", image_size=16, workers=2)
    stream = splits.train.stream(4, seed=0)
    next(stream)
    os.kill((set(multiprocessing.active_children()) - children).pop().pid, signal.SIGKILL)
    with pytest.raises(data.DataError, match="died"):
        for _ in range(10_000):
            next(stream)
    with pytest.raises(data.DataError, match="died"):
        next(splits.train.stream(4, seed=0))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_do_not_outlive_a_killed_run(tmp_path):
    script = ("import data, multiprocessing, sys, time\n"
              "if __name__ == '__main__':\n"
              "    stream = data.load(sys.argv[1], '.', image_size=16, workers=2).train.stream(4, seed=0)\n"
              "    next(stream)\n"
              "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
              "    time.sleep(60)\n")
    (tmp_path / "run.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)}
    command = [sys.executable, tmp_path / "run.py", write_folder(tmp_path / "a")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    pids = run.stdout.readline().split()
    run.kill()
    run.communicate()

    def alive(pid):
        try:
            return ") Z " not in Path(f"/proc/{int(pid)}/stat").read_text()  # a zombie is not
        except FileNotFoundError:
            return False

    end = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(alive, pids))


# --------------------------------------------------------------------------------------------------------------- fuzz


def mutated(raw, rng):
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
                del raw[at:at + length]
            case 4:
                raw[at:at + length] = raw[other:other + length]
            case 5:
                raw[at:at] = raw[other:other + length]
            case 6:
                raw[at:at] = rng.bytes(length)
            case 7:
                raw[at:at + 4] = int(rng.choice([0, 2**31 - 1, 2**31, 2**32 - 1])).to_bytes(4, "little")
    return bytes(raw)


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
        path = write_npz(tmp_path / "a.npz", save=save)
        return [path], {"name": path, "data_dir": "."}, None
    return prepare


def fuzz_npy(tmp_path, monkeypatch):
    """The arrays inside the .npz are damaged, the zip around them is whole."""
    write_npz(tmp_path / "whole.npz")
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
        archive.extractall(tmp_path)

    def before():
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for path in tmp_path.glob("*.npy"):
                archive.write(path, path.name)

    before()
    return sorted(tmp_path.glob("*.npy")), {"name": tmp_path / "a.npz", "data_dir": "."}, before


def fuzz_folder(suffix):
    def prepare(tmp_path, monkeypatch):
        root = write_folder(tmp_path / "a", (("train", 2), ("val", 1)), suffix=suffix)
        return [root / "train" / "cat" / f"0{suffix}"], {"name": root, "data_dir": ".", "image_size": 16}, None
    return prepare


FORMATS = {layout.folder: fuzz_cifar(name, layout) for name, layout in LAYOUTS} | {
    "archive": fuzz_archive, "npz": fuzz_npz(np.savez), "npz deflated": fuzz_npz(np.savez_compressed), "npy": fuzz_npy} | {
    suffix: fuzz_folder(suffix) for suffix in (".jpg", ".png", ".webp", ".bmp", ".gif", ".ppm")}


@pytest.mark.parametrize("kind", FORMATS)
def test_fuzz(tmp_path, monkeypatch, kind):
    """A damaged file loads to valid splits or raises a DataError of one line. Nothing else, and soon, and in bounded memory."""
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
        except data.DataError as error:
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
