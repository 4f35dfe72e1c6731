"""harness/augmentation.py: each piece against its formula, distortions against Pillow's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import write_colours
from PIL import Image, ImageEnhance, ImageOps

import data
from harness import augmentation
from harness.augmentation import DISTORTIONS, cutmix, erase, mixup, rand_augment, soft_targets


def test_smoothed_labels_give_torchs_smoothed_cross_entropy():
    logits, labels = torch.randn(7, 5), torch.randint(5, (7,))
    targets = soft_targets(labels, 5, 0.3)
    assert torch.allclose(F.cross_entropy(logits, targets), F.cross_entropy(logits, labels, label_smoothing=0.3))
    assert torch.equal(soft_targets(labels, 5, 0.0), F.one_hot(labels, 5).float())


def test_mixup_blends_opposite_images_and_targets():
    images, targets = torch.randn(5, 3, 4, 4), torch.rand(5, 6)
    mixed, mixed_targets = mixup(images, targets, 0.3)
    for i in range(5):
        assert torch.allclose(mixed[i], 0.3 * images[i] + 0.7 * images[4 - i])
        assert torch.allclose(mixed_targets[i], 0.3 * targets[i] + 0.7 * targets[4 - i])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_cutmix_labels_by_the_pixels_that_came(share):
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 20, 30).contiguous()  # every pixel tells its image
    targets, areas = torch.eye(4), []
    for seed in range(40):
        mixed, mixed_targets = cutmix(images, targets, share, np.random.default_rng(seed))
        for i in range(4):
            own = (mixed[i] == i).double().mean().item()
            assert ((mixed[i] == i) | (mixed[i] == 3 - i)).all()
            assert mixed_targets[i].tolist() == pytest.approx([{i: own, 3 - i: 1 - own}.get(j, 0) for j in range(4)])
        rows, columns = (mixed[0, 0] != 0).any(1).sum().item(), (mixed[0, 0] != 0).any(0).sum().item()
        assert (mixed[0, 0] != 0).sum() == rows * columns  # a rectangle
        assert rows <= 20 * math.sqrt(1 - share) and columns <= 30 * math.sqrt(1 - share)
        areas.append((rows, columns))
    half = [2 * (int(size * math.sqrt(1 - share)) // 2) for size in (20, 30)]
    assert max(rows for rows, _ in areas) == half[0] and max(columns for _, columns in areas) == half[1]


def test_erasing_covers_a_rectangle_of_the_stated_size_with_noise():
    images = torch.full((2000, 2, 20, 24), 100.0)
    erased = erase(images, 0.25, np.random.default_rng(0))
    assert torch.equal(images, torch.full_like(images, 100))  # the argument is left alone
    changed = erased != 100
    hit = changed.any(1).flatten(1).any(1)
    assert abs(hit.double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2000)
    sizes = []
    for image in changed[hit]:
        assert torch.equal(image[0], image[1])
        rows, columns = image[0].any(1).sum().item(), image[0].any(0).sum().item()
        assert image[0].sum() == rows * columns and rows < 20 and columns < 24
        sizes.append((rows, columns))
    rows, columns = np.array(sizes).T
    # Sides are rounded to whole pixels, hence the half.
    assert ((rows + 0.5) * (columns + 0.5) >= 0.02 * 480).all() and ((rows - 0.5) * (columns - 0.5) <= 480 / 3).all()
    assert ((rows + 0.5) / (columns - 0.5) >= 0.3).all() and ((rows - 0.5) / (columns + 0.5) <= 1 / 0.3).all()
    noise = erased[changed]
    assert abs(noise.mean().item()) < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)
    assert len({*map(tuple, sizes)}) > 50


def pillow(distortion, image, s):
    """The same distortion by Pillow, whose arguments timm's RandAugment computes from the strength like this."""
    factor, level = max(0.1, 1 + 0.9 * s), abs(s)

    def affine(*coefficients):
        return image.transform(image.size, Image.AFFINE, coefficients, resample=Image.BILINEAR, fillcolor=(128,) * 3)

    size = image.size[0]
    return {
        "auto-contrast": lambda: ImageOps.autocontrast(image),
        "equalise": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "rotate": lambda: image.rotate(-30 * s, resample=Image.BILINEAR, fillcolor=(128,) * 3),
        "posterise": lambda: ImageOps.posterize(image, 4 - int(4 * level)),
        "solarise": lambda: ImageOps.solarize(image, 256 - int(256 * level)),
        "solarise-add": lambda: image.point([min(255, i + int(110 * level)) if i < 128 else i for i in range(256)] * 3),
        "colour": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "shear-x": lambda: affine(1, 0.3 * s, 0, 0, 1, 0),
        "shear-y": lambda: affine(1, 0, 0, 0.3 * s, 1, 0),
        "translate-x": lambda: affine(1, 0, 0.45 * s * size, 0, 1, 0),
        "translate-y": lambda: affine(1, 0, 0, 0, 1, 0.45 * s * size),
    }[distortion]()


@pytest.mark.parametrize("distortion", DISTORTIONS)
def test_distortions_are_pillows(distortion):
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.integers(20, 200, (3, 3, 6, 6))).float()
    pixels = F.interpolate(coarse, size=40, mode="bilinear").round()  # smooth, as photographs are
    strengths = torch.tensor([-0.93, 0.31, 0.88])
    ours = DISTORTIONS[distortion](pixels, strengths[:, None, None, None]).clamp(0, 255)
    for image, s, found in zip(pixels, strengths.tolist(), ours):
        image = Image.fromarray(image.permute(1, 2, 0).byte().numpy())
        expected = torch.from_numpy(np.array(pillow(distortion, image, s))).permute(2, 0, 1).float()
        assert not torch.equal(expected, torch.from_numpy(np.array(image)).permute(2, 0, 1).float())
        # Pillow cuts blends to whole levels; it keeps border pixels unsmoothed and, in warped images, unmixed with grey.
        warped = distortion in ("rotate", "shear-x", "shear-y", "translate-x", "translate-y")
        blended = distortion in ("auto-contrast", "colour", "contrast", "brightness", "sharpness")
        inside = slice(1, -1) if distortion == "sharpness" else slice(None)
        far = (found - expected)[:, inside, inside].abs() > (2 if warped or blended else 0)
        assert far.double().mean() < (0.08 if warped else 1e-9)


def test_what_is_drawn_goes_to_the_device_in_few_transfers(monkeypatch):
    """Each would have it wait for the CPU."""
    sent, images, rng = [], torch.rand(60, 3, 16, 16), np.random.default_rng(0)
    monkeypatch.setattr(augmentation, "uploaded", lambda tensor, device: sent.append(len(tensor)) or tensor)
    mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    erase(images, 1.0, rng)
    rand_augment(images, 9.0, mean, std, rng)
    assert len(sent) == 1 + 2 * 2 and sent[1:] == [60] * 4
    sent.clear()
    assert torch.equal(erase(images, 0.0, rng), images) and not sent


def test_rand_augment_leaves_a_quarter_alone_and_repeats(tmp_path):
    split = data.load(write_colours(tmp_path / "colours.npz"), "data").train
    images = split.pick(torch.arange(96).repeat(20)).images
    first, again, other = (rand_augment(images, 9.0, split.mean, split.std, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    same = ((first - images).abs().flatten(1).amax(1) < 1e-4).double().mean().item()
    # Both left out: 1/4. Stretching does nothing to an image that has the whole range, nor two inversions: a few more.
    assert 0.25 - 5 * math.sqrt(0.25 * 0.75 / len(images)) < same < 0.36
    pixels = first * split.std + split.mean
    assert pixels.min() > -1e-2 and pixels.max() < 255.01
