"""tissue.py: lesions whose texture is the class, and that nothing but their texture tells."""

import json

import numpy as np
import pytest
from helpers import refused

import data
from experiments import tissue
from mlo_mae import main


@pytest.fixture(scope="module")
def some():
    """Images [N, 3, 28, 28], labels and lesions."""
    labels = np.arange(400) % len(tissue.LESIONS)
    return *tissue.draw(np.random.default_rng(0), labels), labels


def test_tissue_is_as_it_was():
    """A table is measured on it."""
    images, lesions = tissue.draw(np.random.default_rng(0), np.arange(64) % 4)
    assert lesions.sum() == 8028 and images.mean() == pytest.approx(191.0152, abs=1e-2)
    assert np.abs(images[5].ravel()[::400].astype(int) - [204, 149, 109, 125, 190, 209]).max() <= 1


def test_lesions_are_of_the_size_that_is_said_and_inside(some):
    images, lesions, _ = some
    assert images.shape == (400, 3, 28, 28) and images.dtype == np.uint8 and lesions.dtype == bool
    share = lesions.mean((1, 2))
    assert 0.1 < share.min() and share.max() < 0.22 and share.mean() == pytest.approx(0.16, abs=0.01)


def test_a_lesion_is_as_bright_and_as_varied_as_what_is_around_it(some):
    """Of every class: neither tells where it is nor what it is."""
    images, lesions, labels = some
    grey = images.mean(1)
    gaps = np.array([image[inside].mean() - image[~inside].mean() for image, inside in zip(grey, lesions)])
    assert all(abs(gaps[labels == kind].mean()) < 3 and gaps[labels == kind].std() < 5 for kind in range(4))  # of 255
    ratios = np.array([image[inside].std() / image[~inside].std() for image, inside in zip(grey, lesions)])
    by_class = [ratios[labels == kind].mean() for kind in range(4)]
    assert 0.9 < min(by_class) and max(by_class) < 1.1, by_class


def test_the_texture_tells_the_class(some):
    """Grain changes from pixel to pixel, blotches hardly, rings and streaks in between; streaks have one direction."""
    images, lesions, labels = some
    grey = images.mean(1)
    down, across = np.diff(grey, axis=1)[:, :, 1:], np.diff(grey, axis=2)[:, 1:]
    inside = lesions[:, 1:, 1:]
    slope = np.array(
        [
            np.hypot(a[i], b[i]).mean() / image[where].std()
            for a, b, i, image, where in zip(down, across, inside, grey, lesions)
        ]
    )
    grain, rings, streaks, blotches = (slope[labels == kind].mean() for kind in range(4))
    assert grain > 1.2 * max(rings, streaks) and min(rings, streaks) > 1.2 * blotches
    tensor = [
        np.array([[(a[i] ** 2).mean(), (a[i] * b[i]).mean()], [(a[i] * b[i]).mean(), (b[i] ** 2).mean()]])
        for a, b, i in zip(down, across, inside)
    ]
    one_way = np.array([np.ptp(np.linalg.eigvalsh(each)) / np.trace(each) for each in tensor])
    assert one_way[labels == 2].mean() > 2 * one_way[labels == 1].mean()


def test_a_file_is_read_as_data_and_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tissue, "COUNTS", {"train": 200, "test": 40})
    path = tmp_path / "tissue.npz"
    assert main(["tissue", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"command": "tissue", "file": str(path), "seed": 0, "train": 200, "test": 40}
    splits = data.load(path)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (160, 40, 40) and splits.image_size == 28
    assert np.bincount(splits.test.labels).tolist() == [10] * 4 and splits.watched(4)[1].any()
    before = path.read_bytes()
    refused(["tissue", path], capsys, "exists already")
    assert path.read_bytes() == before
    first, again, other = (tissue.tissue(seed)["test"] for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again)) and not np.array_equal(first[0], other[0])
