"""data.py: what the splits hold, and that batches are functions of their number, whatever reads or draws them."""

import itertools
import multiprocessing
import os
import sys
import unicodedata

import numpy as np
import pytest
import torch
from helpers import consume, data_refused, equal, picture, said, take, write_folder, write_npz
from PIL import Image

import data
from harness import UserError
from harness.dense import load_dense

pytestmark = pytest.mark.usefixtures("no_hang", "drawn_once")


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def shapes():
    return data.load("shapes", "nowhere")


@pytest.mark.parametrize("count, batch_size", [(10, 4), (10, 10), (3, 8), (1, 5), (7, 1)])
def test_index_batches_are_epochs_cut_into_batches(count, batch_size):
    batches = [indices for _, (_, indices) in zip(range(6), data.index_batches(count, batch_size, 5, 0))]
    assert all(len(indices) == batch_size for indices in batches)
    joined = np.concatenate(batches)
    for epoch in range(len(joined) // count):
        assert sorted(joined[epoch * count : (epoch + 1) * count]) == list(range(count))  # no repeats, none left out
    for start in range(6):
        b, indices = next(data.index_batches(count, batch_size, 5, start))
        assert b == start and (indices == batches[start]).all()


def test_index_batches_differ_between_epochs_and_seeds():
    def first_two(seed):
        return [tuple(indices) for _, (_, indices) in zip(range(2), data.index_batches(20, 20, seed, 0))]

    assert len({*first_two(0), *first_two(1), *first_two(-1), *first_two(2**63)}) == 8


def test_images_stream_resumes_at_any_batch(shapes):
    batches = take(shapes.val.stream(100, seed=3), 26)
    for start in (1, 11, 12, 25):
        assert equal(next(shapes.val.stream(100, seed=3, start=start)), batches[start])
    assert not equal(batches[0], next(shapes.val.stream(100, seed=4)))


def test_augmentation_is_crop_and_flip(shapes):
    split = shapes.train
    batch = next(split.stream(16, seed=1))
    _, indices = next(data.index_batches(len(split), 16, 1, 0))
    assert torch.equal(batch.labels, split.labels[indices])
    seen = set()
    for image, original in zip(batch.images, split.images[indices]):
        padded = torch.nn.functional.pad(original, (4, 4, 4, 4))
        pixels = (image * split.std + split.mean).round().byte()
        found = [
            (top, left, bool(flipped))
            for top, left, flipped in itertools.product(range(9), range(9), ([], [2]))
            if torch.equal(padded[:, top : top + 32, left : left + 32].flip(flipped), pixels)
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 10 and len({flip for _, _, flip in seen}) == 2


@pytest.mark.parametrize("kind", ["images", "maps", "folder", "masks", "boxes", "file of masks"])
def test_images_are_mirrored_and_cropped_only_where_asked(tmp_path, kind):
    """An arrow's head is on its right; with neither, a stream shows images as they are."""
    arrow = np.zeros((16, 16, 3), np.uint8)
    arrow[6:10, 3:13], arrow[4:12, 9:11] = 120, 250
    count, seen = 40, {}
    objects = np.broadcast_to(arrow[..., 0] > 0, (count, 16, 16))
    if kind in ("folder", "file of masks"):
        tops = ("train/a", "train/b", "val/a", "val/b") if kind == "folder" else ("images/train", "images/val")
        for top in tops:
            (tmp_path / top).mkdir(parents=True)
            for number in range(count // 2):
                Image.fromarray(arrow).save(tmp_path / top / f"{number}.png")
                if kind != "folder":
                    (tmp_path / top.replace("images", "masks")).mkdir(parents=True, exist_ok=True)
                    mask = Image.fromarray((arrow[..., 0] > 0).astype(np.uint8))
                    mask.save(tmp_path / top.replace("images", "masks") / f"{number}.png")
        path = tmp_path
    else:
        path = tmp_path / "arrows.npz"
        arrays = {"images": np.broadcast_to(arrow, (count, 16, 16, 3)), "labels": np.arange(count) % 2, "objects": objects}
        np.savez(path, **{f"{part}_{name}": array for part in ("train", "test") for name, array in arrays.items()})
    for flip, crop in itertools.product([True, False], repeat=2):
        how = {"image_size": 16, "flip": flip, "crop": crop}
        dense = {"masks": "masks", "boxes": "boxes", "file of masks": "masks"}.get(kind)
        split = (load_dense(path, dense, **how) if dense else data.load(path, "", **how)).train
        split = split.accompanied(split.images[:, 0].float()) if kind == "maps" else split
        images = torch.cat([batch.images for batch in take(split.stream(10, 0), 8)])
        plain = next(split.ordered(1)).images[0]
        mirrored = sum(torch.equal(image, plain.flip(2)) for image in images)
        seen[flip, crop] = len({image.numpy().tobytes() for image in images}), mirrored
        if not crop:
            assert all(torch.equal(image, plain) or torch.equal(image, plain.flip(2)) for image in images)
    assert seen[False, False] == (1, 0)
    assert seen[True, False][0] == 2 and 20 < seen[True, False][1] < 60
    assert seen[False, True][1] == 0 and 5 < seen[False, True][0] < seen[True, True][0]


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


# ------------------------------------------------------------------------------------------------------ what load gives


def test_shapes(shapes):
    full = consume(shapes)
    assert (len(full.train), len(full.val), len(full.test)) == (4800, 1200, 2000) and len(full.class_names) == 8
    assert full.train.images.shape[1:] == (3, 32, 32) and full.train.objects.shape == (4800, 32, 32)
    assert (full.test.labels.bincount() == 250).all()
    share = full.test.objects.float().mean((1, 2))
    assert 0.18 < share.min() and share.max() < 0.31 and abs(share.mean() - 0.25) < 0.005  # tips may be cut off
    pixels = full.train.images.float() / 255
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(full.mean), atol=1e-4)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor(full.std), atol=1e-4)
    for where in (full.train.objects, ~full.train.objects):  # no colour tells the class
        colour = (full.train.images * where[:, None]).sum((2, 3)) / where.sum((1, 2))[:, None]
        by_class = torch.stack([colour[full.train.labels == k].mean(0) for k in range(8)])
        assert (by_class - by_class.mean(0)).abs().max() < 12
    other = data.load("shapes", "nowhere", seed=1)  # another hold-out of the same pictures
    assert torch.equal(full.test.images, other.test.images) and not torch.equal(full.train.labels, other.train.labels)
    assert data.load("shapes", "nowhere", image_size=16, limit=100).train.images.shape == (80, 3, 16, 16)


def test_leaves_are_regions_of_muted_colours():
    leaves = data.dead_leaves(np.random.default_rng(0), np.arange(200), 32)
    assert leaves.shape == (200, 3, 32, 32) and ((leaves < 0) | (leaves > 1)).mean() < 0.04  # which shading does
    across = np.abs(np.diff(leaves, axis=3)).max(1)  # [N, 32, 31]
    assert 0.6 < (across < 0.06).mean() < 0.9  # most neighbours are of one leaf, and edges are many
    assert np.abs(leaves.mean((0, 2, 3)) - 0.5).max() < 0.03 and leaves.std((0, 2, 3)).min() > 0.12
    assert leaves.std(1).mean() < 0.13  # of a pixel's three channels: objects have twice that
    large = data.dead_leaves(np.random.default_rng(0), np.arange(200), 64)[:, :, ::2, ::2]
    assert np.corrcoef(leaves.ravel(), large.ravel())[0, 1] > 0.8  # the same scenes, in more pixels
    again = data.dead_leaves(np.random.default_rng(0), np.arange(7, 207), 32)
    assert np.array_equal(leaves, again)


def test_shapes_on_stripes_are_as_they_were():
    """Results that were measured on them stay comparable: some pixels, as they were when these were all there was."""
    full = consume(data.load("shapes-stripes", "nowhere"))
    assert (len(full.train), len(full.val), len(full.test)) == (4800, 1200, 2000) and full.class_names == data.SHAPES
    share = full.test.objects.float().mean((1, 2))
    assert 0.2 < share.min() and share.max() < 0.41  # large tips are cut off at the border
    spread = full.train.images.float().std(1)  # [N, H, W]: of the channels, 0 for grey
    objects = full.train.objects
    assert (spread[objects] > 15).float().mean() > 0.9 and (spread[~objects] < 15).float().mean() > 0.9
    parts = data.shapes(32, *data.DRAWN["shapes-stripes"])
    images, labels, objects = (np.concatenate(arrays) for arrays in zip(parts["train"], parts["test"]))
    assert labels[:10].tolist() == [1, 2, 0, 7, 4, 5, 3, 6, 1, 4] and objects.sum() == 2653348
    assert (
        np.abs(images[7990, 1, 16, ::4].astype(int) - [211, 72, 143, 205, 207, 173, 139, 102]).max() <= 1
    )  # sines differ in their last bit
    assert abs(images.mean() - 103.9105) < 1e-3


def test_shapes_are_as_they_were():
    """The tables are measured on them."""
    parts = data.shapes(32, *data.DRAWN["shapes"])
    images, labels, objects = (np.concatenate(arrays) for arrays in zip(parts["train"], parts["test"]))
    assert labels[:10].tolist() == [1, 2, 0, 7, 4, 5, 3, 6, 1, 4] and abs(int(objects.sum()) - 2044398) < 20
    for found, expected in (  # functions differ in their last bit between machines
        (images[7990, 1, 16, ::4], [135, 54, 149, 173, 105, 71, 150, 114]),
        (images[7990, 0, ::4, 5], [176, 138, 242, 87, 160, 182, 132, 157]),
        (images[11, 2, 3, ::4], [216, 255, 75, 102, 117, 50, 55, 62]),
    ):
        assert np.abs(found.astype(int) - expected).max() <= 1
    assert abs(images.mean() - 115.8334) < 1e-3


def test_shapes_anywhere_are_those_of_shapes_moved():
    """And no place tells where an object is."""
    plain, moved = (data.shapes(32, *data.DRAWN[name]) for name in ("shapes", "shapes-anywhere"))
    for (images, labels, objects), (images2, labels2, objects2) in zip(plain.values(), moved.values()):
        assert np.array_equal(labels, labels2) and np.array_equal(np.sort(images[:9], None), np.sort(images2[:9], None))
        offsets = set()
        for number in range(9):
            (found,) = (
                (down, right)
                for down, right in itertools.product(range(32), repeat=2)
                if np.array_equal(np.roll(images[number], (down, right), (1, 2)), images2[number])
            )
            assert np.array_equal(np.roll(objects[number], found, (0, 1)), objects2[number])
            offsets.add(found)
        assert len(offsets) == 9
    share = np.concatenate([objects for _, _, objects in moved.values()]).mean(0)
    assert share.std() / share.mean() < 0.03 and plain["train"][2].mean(0).std() / share.mean() > 0.3


def test_backgrounds_differ_and_objects_do_not():
    """What is drawn before the background does not depend on it; another seed draws others."""
    numbers = []

    def grey(level):
        def background(rng, some, size):
            numbers.append(some)
            return np.full((len(some), 1, size, size), level, np.float32)

        return background

    flat = [data.shapes(32, grey(level), data.OBJECT_AREA)["test"] for level in (0.2, 0.8)]
    assert np.array_equal(np.concatenate(numbers[:32]), np.arange(8000)) and len(numbers) == 64
    leaves = data.shapes(32, *data.DRAWN["shapes"])["test"]
    for _, labels, objects in flat:
        assert np.array_equal(labels, leaves[1]) and np.array_equal(objects, leaves[2])
    inside = flat[0][2][:, None].repeat(3, 1)
    gap = np.abs(flat[0][0].astype(int) - flat[1][0])
    assert np.median(gap[inside]) == 0 and np.median(gap[~inside]) > 140
    other = data.shapes(32, grey(0.2), data.OBJECT_AREA, seed=1)["test"]
    assert not np.array_equal(other[1], leaves[1]) and (np.bincount(other[1]) == 250).all()
    behind = ~(other[2] | leaves[2])[:, None].repeat(3, 1)
    assert (other[0] == flat[0][0])[behind].mean() < 0.1  # not even the grain is the same


# ----------------------------------------------------------------------------------------------------- maps of images


@pytest.mark.parametrize("part", [slice(None), slice(3, 6)])
def test_maps_are_cropped_and_flipped_as_their_images(part):
    """A map that is the image itself, four pixels to a cell, comes out of a stream as the image does."""
    cells = torch.randint(0, 256, (20, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = cells.repeat_interleave(4, 2).repeat_interleave(4, 3)
    split = data.Images(pixels, np.arange(20) % 3, (0.4,), (0.2,))
    maps = split.accompanied(cells[:, 0].float())
    assert len(maps) == len(split) and maps.images.shape == cells.shape  # kept as small as they came
    assert torch.equal(torch.cat([batch.images for batch in maps.ordered(7)]), pixels.float())
    moved = 0
    for ours, theirs, _ in zip(maps.stream(6, 5, start=2, part=part), split.stream(6, 5, start=2, part=part), range(4)):
        assert torch.allclose(ours.images, theirs.images * split.std + split.mean, atol=1e-3)
        moved += (ours.images == 0).all(2).any().item()  # a row of what is around
    assert moved
    assert (split.accompanied(torch.full((20, 2, 2), 0.3)).images - 0.3).abs().max() < 2e-4


def test_the_order_of_images_is_as_it_was():
    """Whoever changes it changes every result."""
    expected = [9, 18, 3, 7, 1, 16, 19, 13, 11, 2, 4, 17, 10, 12, 6, 15, 0, 5, 14, 8]
    (number, found), (_, then) = itertools.islice(data.index_batches(20, 15, 5, 0), 2)
    assert number == 0 and found.tolist() == expected[:15] and then[:5].tolist() == expected[15:]


# -------------------------------------------------------------------------------------------------------------- watched


def test_watched_images_go_over_the_classes_in_turn():
    labels = np.repeat([0, 1, 2, 3], [50, 50, 50, 5])  # sorted, as in a folder
    pixels = np.arange(155, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(8, 2).repeat(8, 3)
    objects = np.arange(155)[:, None, None] % 2 * np.ones((1, 8, 8)) > 0
    split = data.Images(pixels, labels, (0.0,) * 3, (1 / 255,) * 3, objects)
    splits = data.Splits(split, split, split, list("abcd"), 3, 8, split.mean, split.std)
    images, found = splits.watched(20)
    ids = images[:, 0, 0, 0].round().long()
    assert found.shape == (20, 8, 8) and torch.equal(found, split.objects[ids]) and torch.equal(images, split.pick(ids).images)
    assert all(sorted(labels[ids[k : k + 4]]) == [0, 1, 2, 3] for k in range(0, 20, 4))
    assert len(set(ids.tolist())) == 20 and len({tuple(labels[ids[k : k + 4]]) for k in range(0, 20, 4)}) > 1
    assert not torch.equal(ids[:4].sort().values, torch.tensor([0, 50, 100, 150]))  # at random within each
    assert torch.equal(splits.watched(8)[0], images[:8]) and torch.equal(splits.watched(20)[0], images)
    more = splits.watched(500)[0][:, 0, 0, 0].round().long()
    assert sorted(more.tolist()) == list(range(155)) and labels[more[:20]].tolist().count(3) == 5
    assert set(labels[more[20:]]) == {0, 1, 2}


def test_watched_shapes_are_of_all_classes_whatever_the_seed(shapes):
    for seed in (0, 1):
        splits = data.load("shapes", "nowhere", seed=seed)
        images, objects = splits.watched(8)
        found = (splits.val.pick(np.arange(1200)).images[None] == images[:, None]).flatten(2).all(2).nonzero()[:, 1]
        assert sorted(splits.val.labels[found].tolist()) == list(range(8))
        assert torch.equal(objects, splits.val.objects[found])


def test_of_a_folder_only_what_is_watched_is_decoded(tmp_path, monkeypatch):
    root = write_folder(tmp_path, (("train", 2), ("val", 10), ("test", 1)), classes=tuple("abcd"))
    for workers in (0, 1):
        splits = data.load(root, ".", image_size=16, workers=workers)
        images, objects = splits.watched(8)
        assert images.shape == (8, 3, 16, 16) and objects is None
        whole = torch.cat([batch.images for batch in splits.val.ordered(64)])
        found = (whole[None] == images[:, None]).flatten(2).all(2).nonzero()[:, 1]
        assert splits.val.labels[found].bincount().tolist() == [2, 2, 2, 2]
    decoded, real = [], splits.val.decoder.files.__class__.read
    monkeypatch.setattr(type(splits.val.decoder.files), "read", lambda *args: decoded.append(args[2]) or real(*args))
    assert torch.equal(data.load(root, ".", image_size=16).watched(8)[0], images) and sorted(decoded) == sorted(found.tolist())


# ----------------------------------------------------------------------------------------------- what load makes of files


def test_limit_and_hold_out(tmp_path):
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    images = np.zeros((100, 8, 8), np.uint8)
    images[:, 0, 0] = np.arange(100)
    write_npz(tmp_path / "a.npz", colour=False, parts=("train", "test"), train_images=images, train_labels=labels)
    ids = lambda split: set(split.images[:, 0, 0, 0].tolist())  # noqa: E731
    whole = consume(data.load(tmp_path / "a.npz", "."))
    assert (len(whole.train), len(whole.val)) == (80, 20) and not ids(whole.train) & ids(whole.val)
    assert sorted(ids(whole.val))[:9] == [14, 16, 17, 27, 34, 45, 46, 53, 56]  # as it was when tables were measured
    some = data.load(tmp_path / "a.npz", ".", limit=45, val_fraction=0.4)
    assert (len(some.train), len(some.val), len(some.test)) == (27, 18, 12) and not ids(some.train) & ids(some.val)
    assert torch.cat([some.train.labels, some.val.labels]).bincount().tolist() == [18, 17, 10]
    again, other = (data.load(tmp_path / "a.npz", ".", limit=45, val_fraction=0.4, seed=seed) for seed in (0, 1))
    assert ids(again.train) == ids(some.train) != ids(other.train)
    data_refused("101", "100 images", name=tmp_path / "a.npz", limit=101)
    data_refused("held out", name=tmp_path / "a.npz", limit=1)
    for options in ({"val_fraction": 0}, {"val_fraction": 1.0}, {"limit": -1}, {"image_size": -1}, {"workers": -1}):
        data_refused("--", name=tmp_path / "a.npz", **options)
    data_refused("shapes, shapes-anywhere, shapes-stripes, cifar10", name="no such thing")
    data_refused("too many", name="shapes", image_size=4000)


def test_objects_are_resized_with_their_images(tmp_path):
    """And follow them into the splits: here the object is where the image is bright."""
    bright = np.random.default_rng(0).random((24, 2, 2)).repeat(8, 1).repeat(8, 2) > 0.5  # [N, 16, 16], in quarters
    arrays = {f"{part}_images": (255 * bright).astype(np.uint8) for part in ("train", "test")}
    arrays |= {f"{part}_objects": bright for part in ("train", "test")}
    labels = {f"{part}_labels": np.arange(24) % 3 for part in ("train", "test")}
    path = write_npz(tmp_path / "a.npz", parts=(), **arrays, **labels)
    for size in (0, 8, 10, 24):
        splits = consume(data.load(path, ".", image_size=size))
        for split in (splits.train, splits.val, splits.test):
            assert split.objects.shape[1:] == split.images.shape[2:] and split.objects.dtype == torch.bool
            if size != 10:
                assert torch.equal(split.objects, split.images[:, 0] > 127)
    assert data.resized(np.eye(4, dtype=bool)[None], 2).sum() == 0  # half covered is not covered


def test_npz_constant_channel(tmp_path):
    images = np.full((12, 8, 8, 3), 7, np.uint8)
    consume(data.load(write_npz(tmp_path / "a.npz", train_images=images), "."))


def test_what_was_found_is_said_once_and_by_the_first_process(tmp_path, capsys, monkeypatch):
    folder, npz = write_folder(tmp_path / "a"), write_npz(tmp_path / "a.npz", parts=("train", "test"))
    for _ in range(2):
        splits = [data.load(folder, ".", image_size=16), data.load(npz, "."), data.load("shapes", ".", image_size=8, limit=50)]
    kept = [f"{split} {len(getattr(splits[0], split))}" for split in ("train", "val", "test")]
    assert kept == ["train 8", "val 2", "test 6"]
    expected = [f"data {folder}: train 8 images of 2 classes, val 2 images of CLASSES, test 6 images of 2 classes"]
    expected += [f"data {npz}: train 10 images of 3 classes, val 2 images of CLASSES, test 12 images of 3 classes"]
    expected += ["data shapes: train 40 images of 8 classes, val 10 images of CLASSES, test 2000 images of 8 classes"]
    for i, some in enumerate(splits):
        expected[i] = expected[i].replace("CLASSES", f"{len(some.val.labels.unique())} classes")
    expected[0] += "; no files left out"
    assert said(capsys) == expected
    monkeypatch.setattr("harness.readers.rank", lambda: 1)
    data.load(folder, ".", image_size=16, limit=6)
    assert not said(capsys)


def test_classes_of_an_npz_are_the_numbers_that_occur(tmp_path, capsys):
    """And not all numbers up to the largest."""
    for values in ([0, 255], [1, 2, 3, 4], [7, 10**6, 2**63 - 1]):
        labels = np.array(values)[np.arange(12) % len(values)]
        few = {
            "test_labels": labels[labels != values[0]],
            "test_images": np.ones((12, 8, 8, 3), np.uint8)[labels != values[0]],
        }
        splits = consume(data.load(write_npz(tmp_path / "a.npz", train_labels=labels, val_labels=labels, **few), "."))
        assert splits.class_names == [str(value) for value in values]
        assert np.array_equal(np.array(values)[splits.train.labels], labels)
        assert np.array_equal(np.array(values)[splits.test.labels], few["test_labels"])  # one of them does not occur there
        assert f"test {len(few['test_labels'])} images of {len(values) - 1} class" in said(capsys)[-1]


# -------------------------------------------------------------------------------------------------------------- folders


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


def listed_folder(root, sizes):
    """A folder of empty files, so many of each class, some of them one folder deeper; val/ has one of each."""
    for label, size in enumerate(sizes):
        for part, count in (("train", size), ("val", 1)):
            (root / part / f"c{label}" / "more").mkdir(parents=True)
            for k in range(count):
                (root / part / f"c{label}" / ("more" * (k % 3 == 0)) / f"{k}.jpg").touch()
    return root


def sides(root, **options):
    """The names of the images that train, and of those that are held out."""
    files = data.load(root, ".", **options).train.decoder.files
    return tuple({name.decode().replace("\\", "/") for name in files.paths[split]} for split in ("train", "val"))


@pytest.mark.parametrize("sizes, most", [((60, 60), 1), ((61, 12, 5), 2)])
def test_an_image_that_goes_or_comes_changes_the_side_of_about_one_other(tmp_path, sizes, most):
    root = listed_folder(tmp_path, sizes)
    options = {"seed": 2, "val_fraction": 0.25}
    train, val = sides(root, **options)
    for name in [*sorted(train)[::5], *sorted(val)[::5]]:
        (root / name).unlink()
        others, held = sides(root, **options)
        assert others | held == (train | val) - {name} and len(train & held | val & others) <= most
        (root / name).touch()
    (root / "train" / "c0" / "another.jpg").touch()
    others, held = sides(root, **options)
    assert len(train & held | val & others) <= most


def test_some_images_of_a_folder_stay_chosen_when_one_goes(tmp_path):
    root = listed_folder(tmp_path, (30, 30))
    train, val = sides(root, limit=40)
    for name in [*sorted(train)[::5], *sorted(val)[::3]]:
        (root / name).unlink()
        others, held = sides(root, limit=40)
        assert len((others | held) - (train | val)) == 1 and len(train & held | val & others) <= 2
        (root / name).touch()


def test_a_share_of_each_class_is_held_out_by_names_alone(tmp_path):
    """Wherever the folder lies, whatever the system lists first, whatever the Python: some names, as they were."""
    train, val = sides(listed_folder(tmp_path / "a", (60, 20, 10)))
    assert [sum(f"/c{label}/" in name for name in val) for label in range(3)] == [12, 4, 2]
    kept = ["c1/7.jpg", "c1/more/0.jpg", "c1/more/18.jpg", "c1/more/6.jpg", "c2/more/0.jpg", "c2/more/6.jpg"]
    assert [name.removeprefix("train/") for name in sorted(val)[-6:]] == kept
    assert sides(listed_folder(tmp_path / "b" / "c", (60, 20, 10))) == (train, val)
    assert sides(tmp_path / "a", seed=1)[1] != val
    (tmp_path / "a" / "train" / "c0").rename(tmp_path / "a" / "train" / "c9")  # the class's name does not count
    (tmp_path / "a" / "val" / "c0").rename(tmp_path / "a" / "val" / "c9")
    assert sides(tmp_path / "a")[1] == {name.replace("c0", "c9") for name in val}


@pytest.mark.skipif(sys.platform == "darwin", reason="to macOS these are one name")
def test_names_with_accents_are_the_same_however_a_system_writes_them(tmp_path):
    """A folder that macOS has copied is the same data: split, order, classes and digest."""
    found = {}
    for form in ("NFC", "NFD"):
        for part, name in itertools.product(("train", "val"), ("é", "ez", "f")):
            folder = tmp_path / form / part / unicodedata.normalize(form, name)
            folder.mkdir(parents=True)
            for k in range(20):
                (folder / unicodedata.normalize(form, f"{'éez'[k % 3]}ü{k}.jpg")).touch()
        splits = data.load(tmp_path / form, ".", limit=40)
        paths = {part: list(map(os.fsdecode, names)) for part, names in splits.train.decoder.files.paths.items()}
        assert all((tmp_path / form / path).exists() for path in sum(paths.values(), []))
        paths = {part: [unicodedata.normalize("NFC", name) for name in names] for part, names in paths.items()}
        found[form] = splits.facts(), paths
    assert found["NFC"] == found["NFD"] and found["NFC"][0]["class_names"] == ["ez", "f", "é"]
    (tmp_path / "NFC" / "train" / "e\u0301").mkdir()
    with pytest.raises(UserError, match="two folders have the name é, written in two ways"):
        data.load(tmp_path / "NFC", ".")


@pytest.mark.parametrize(
    "suffix", [".jpg", ".jpe", ".jfif", ".JPEG", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"]
)
def test_folder_formats_and_evaluation_crop(tmp_path, suffix):
    root = write_folder(tmp_path, (("train", 2), ("val", 1)), suffix=suffix, size=(300, 200))
    images = next(data.load(root, ".", image_size=28).test.ordered(2)).images
    with Image.open(root / "val" / "cat" / f"0{suffix}") as whole:
        expected = whole.convert("RGB").resize((48, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(expected.crop((10, 2, 38, 30)))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    assert (images[0] * std + mean - expected).abs().mean() < 0.02


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
    assert 0 < len(set(multiprocessing.active_children()) - set(others)) <= 2  # the splits share them


def test_shares_of_a_stream_make_up_its_batches(tmp_path):
    folder = data.load(write_folder(tmp_path, (("train", 10), ("val", 1))), ".", image_size=16).train
    noise = np.random.default_rng(0).integers(0, 256, (30, 3, 16, 16), dtype=np.uint8)
    resident = data.Images(noise, np.arange(30) % 3, (0.5,) * 3, (0.2,) * 3)
    for split in (folder, resident):
        whole = split.stream(6, 1, start=3)
        shares = [split.stream(6, 1, start=3, part=slice(a, a + 2)) for a in (0, 2, 4)]
        for _ in range(3):
            batch, parts = next(whole), [next(share) for share in shares]
            assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
            assert torch.equal(batch.labels, torch.cat([part.labels for part in parts]))


def test_a_sample_takes_classes_in_turn_and_is_always_the_same():
    labels = np.repeat(np.arange(4), 50)  # as folders have them: class by class
    chosen = data.sample(labels, 8)
    assert sorted(labels[chosen[:4]]) == sorted(labels[chosen[4:]]) == [0, 1, 2, 3]
    assert np.array_equal(data.sample(labels, 20)[:8], chosen) and len(set(data.sample(labels, 999))) == 200
    assert not np.array_equal(chosen % 50, np.zeros(8))  # not the first of each class
