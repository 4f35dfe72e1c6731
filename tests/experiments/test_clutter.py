"""clutter.py: objects that are known, on photographs that are given."""

import json

import numpy as np
import pytest
from helpers import consume, refused

import data
from experiments import clutter
from mlo_mae import main

pytestmark = pytest.mark.usefixtures("drawn_once")


@pytest.fixture
def photographs(monkeypatch):
    """In place of CIFAR-100: grey ones, the first byte of each its number; of test, brighter ones."""
    pools = {}
    for part, count, low in (("train", 6100, 60), ("test", 2050, 160)):
        pools[part] = (
            np.full((count, 3, 32, 32), low, np.uint8) + (np.arange(count) % 80).astype(np.uint8)[:, None, None, None]
        )
    parts = {part: (images, np.zeros(len(images), np.int64)) for part, images in pools.items()}
    monkeypatch.setattr(clutter, "read_cifar", lambda name, folder: (parts, []))
    return parts


def written(path, capsys, *flags):
    assert main(["clutter", str(path), "--data-dir", "nowhere", *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_objects_of_shapes_are_on_photographs(photographs, tmp_path, capsys):
    path = tmp_path / "clutter.npz"
    assert written(path, capsys) == {"command": "clutter", "file": str(path), "seed": 0, "train": 6000, "test": 2000}
    assert [file.name for file in tmp_path.iterdir()] == ["clutter.npz"]
    drawn, found = data.shapes(32, *data.DRAWN["shapes"]), np.load(path)
    for part, low in (("train", 60), ("test", 160)):
        images, labels, objects = (found[f"{part}_{what}"] for what in ("images", "labels", "objects"))
        assert np.array_equal(labels, drawn[part][1]) and np.array_equal(objects, drawn[part][2]) and objects.dtype == bool
        same = np.abs(images.transpose(0, 3, 1, 2).astype(int) - drawn[part][0]).max(1)[objects]
        assert np.median(same) < 40  # the same colours and stripes, but for grain and edges
        behind = np.array([np.median(image[~where]) for image, where in zip(images, objects)])
        assert low - 1 <= behind.min() < low + 5 and low + 75 < behind.max() <= low + 80  # photographs of its own part
        assert behind.std() > 20 and abs(np.corrcoef(behind, labels)[0, 1]) < 0.05
    splits = consume(data.load(path, "."))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (4800, 1200, 2000) and len(splits.class_names) == 8
    assert splits.watched(256)[1].float().mean() == pytest.approx(0.25, abs=0.01)


def test_a_seed_draws_others_and_the_same_again(photographs):
    pools = {part: images for part, (images, _) in photographs.items()}
    first, again, other = (clutter.on_photographs(pools, seed)["test"] for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other))


def test_each_photograph_is_behind_one_image(photographs, monkeypatch):
    taken = []
    monkeypatch.setattr(clutter, "shapes", lambda size, background, area, seed: taken.append(background))
    numbered = np.zeros((6100, 3, 32, 32), np.uint8)
    numbered[:, 0, 0, 0], numbered[:, 1, 0, 0] = np.arange(6100) % 256, np.arange(6100) // 256
    clutter.on_photographs({"train": numbered, "test": numbered}, 0)
    pixels = (255 * taken[0](None, np.arange(8000), 32)[:, :2, 0, 0]).round()
    numbers = pixels[:, 0] + 256 * pixels[:, 1]
    assert len(set(numbers[:6000])) == 6000 and len(set(numbers[6000:])) == 2000
    assert len(set(numbers[:6000]) - set(range(6000))) > 50  # chosen from all


def test_what_cannot_be_made_ends_in_one_line(photographs, tmp_path, capsys):
    (tmp_path / "there.npz").write_bytes(b"mine")
    refused(["clutter", tmp_path / "there.npz"], capsys, tmp_path / "there.npz", "exists already")
    assert (tmp_path / "there.npz").read_bytes() == b"mine"
    refused(["clutter", tmp_path / "nothing" / "a.npz"], capsys, tmp_path / "nothing", "is no folder", "make it")
    refused(["clutter"], capsys, "FILE.npz")
    refused(["clutter", tmp_path / "a.npz", "--seed", "x"], capsys, "--seed")
    photographs["test"] = tuple(array[:1999] for array in photographs["test"])
    refused(["clutter", tmp_path / "a.npz"], capsys, "1999 photographs for test are too few", "2000")
    assert [file.name for file in tmp_path.iterdir()] == ["there.npz"]
