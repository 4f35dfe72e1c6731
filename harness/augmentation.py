"""Augmentation on the device, for images [B, C, H, W] and soft targets [B, classes]: mixup, cutmix, erasing, RandAugment.

Crop and flip are the data's own (`stream` in data.py). What a numpy generator draws here does not depend on the device."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.memory import uploaded


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """[B] -> [B, classes]: 1 - smoothing for the label, and smoothing spread over all classes (arXiv 1512.00567)."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mixup(images: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """`share` of each image and target, and 1 - share of the one opposite in the batch (arXiv 1710.09412)."""
    return share * images + (1 - share) * images.flip(0), share * targets + (1 - share) * targets.flip(0)


def cutmix(images: Tensor, targets: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A rectangle of about 1 - share of each image, centred anywhere, comes from the one opposite in the batch; targets
    follow the share of pixels that did come, since the border cuts off some rectangles (arXiv 1905.04899)."""

    def interval(size):
        half, centre = int(size * math.sqrt(1 - share)) // 2, int(rng.integers(size))
        return slice(max(centre - half, 0), min(centre + half, size))

    rows, columns = map(interval, images.shape[2:])
    mixed = images.clone()
    mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
    kept = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / images[0, 0].numel()
    return mixed, kept * targets + (1 - kept) * targets.flip(0)


def erase(images: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """In each image, with this probability, noise in a rectangle of 2 to 33 % of its area and a ratio of sides from 0.3
    to 1/0.3 (arXiv 1708.04896, settings of MAE's recipe)."""
    images, (channels, height, width) = images.clone(), images.shape[1:]
    places, noise = [], []
    for i in np.flatnonzero(rng.random(len(images)) < probability):
        for _ in range(10):  # some are too long to fit
            area, ratio = height * width * rng.uniform(0.02, 1 / 3), 0.3 ** rng.uniform(-1, 1)
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                places.append((i, slice(None), slice(top, top + h), slice(left, left + w)))
                noise.append(rng.standard_normal((channels, h, w), np.float32).ravel())
                break
    if places:  # in one transfer
        pieces = uploaded(torch.from_numpy(np.concatenate(noise)), images.device).split(list(map(len, noise)))
        for place, piece in zip(places, pieces):
            images[place] = piece.view(images[place].shape)
    return images


# ---------------------------------------------------------------------------------------------------- RandAugment
# From pixels [n, C, H, W] of 0 to 255 and strengths s [n, 1, 1, 1] of -1 to 1 to pixels.


def warp(pixels: Tensor, *matrix: float | Tensor) -> Tensor:
    """Pixels at the places that an affine map of each place gives (coordinates -1 to 1; 6 numbers or [n, 1, 1, 1]); grey
    where that is outside."""
    filled = [entry if isinstance(entry, Tensor) else pixels.new_full((), entry) for entry in matrix]
    matrix = [entry.expand(len(pixels), 1, 1, 1) for entry in filled]
    grid = F.affine_grid(torch.cat(matrix, dim=1).view(-1, 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - 128, grid, align_corners=False) + 128


def rotate(pixels: Tensor, s: Tensor) -> Tensor:
    """By up to 30 degrees."""
    angle = math.radians(30) * s
    return warp(pixels, angle.cos(), angle.sin(), 0, -angle.sin(), angle.cos(), 0)


def blend(pixels: Tensor, plain: Tensor, s: Tensor) -> Tensor:
    """From `plain` (factor 0.1) past the image itself (1) to its exaggeration (1.9)."""
    return torch.lerp(plain.expand_as(pixels), pixels, (1 + 0.9 * s).clamp_min(0.1))


def grey(pixels: Tensor) -> Tensor:
    """[n, 1, H, W], luminance of ITU-R 601."""
    weights = (0.299, 0.587, 0.114) if pixels.shape[1] == 3 else (1.0,)
    return sum(weight * channel for weight, channel in zip(weights, pixels.split(1, dim=1)))


def smooth(pixels: Tensor) -> Tensor:
    """The neighbours weigh 1 each, the pixel itself 5, of 13."""
    return (9 * F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False) + 4 * pixels) / 13


def stretch(pixels: Tensor) -> Tensor:
    """Each channel to the whole range."""
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    return torch.where(high > low, (pixels - low) * 255 / (high - low).clamp_min(1), pixels)


def equalise(pixels: Tensor) -> Tensor:
    """Each channel's histogram made flat: a level becomes the share of pixels below it, the brightest level left out."""
    levels = pixels.round().long().flatten(2)  # [n, C, H*W]
    counts = torch.zeros(*levels.shape[:2], 256, device=pixels.device).scatter_add_(2, levels, pixels.new_ones(levels.shape))
    step = (levels.shape[2] - counts.gather(2, levels.amax(2, keepdim=True))).div(255, rounding_mode="floor")
    below = (counts.cumsum(2) - counts + step.div(2, rounding_mode="floor")).div(step.clamp_min(1), rounding_mode="floor")
    return torch.where(step > 0, below.gather(2, levels), levels).view_as(pixels)


# With the strengths of timm's "inc1"; those without a direction go by |s|.
DISTORTIONS = {
    "auto-contrast": lambda x, s: stretch(x),
    "equalise": lambda x, s: equalise(x),
    "invert": lambda x, s: 255 - x,
    "rotate": rotate,
    "posterise": lambda x, s: x.round() - x.round() % 2 ** (4 + (4 * s.abs()).floor()),  # so many low bits go
    "solarise": lambda x, s: torch.where(x.round() >= 256 - (256 * s.abs()).floor(), 255 - x, x),
    "solarise-add": lambda x, s: torch.where(x.round() < 128, x + (110 * s.abs()).floor(), x),
    "colour": lambda x, s: blend(x, grey(x), s),
    "contrast": lambda x, s: blend(x, grey(x).mean((2, 3), keepdim=True), s),
    "brightness": lambda x, s: blend(x, torch.zeros_like(x), s),
    "sharpness": lambda x, s: blend(x, smooth(x), s),
    "shear-x": lambda x, s: warp(x, 1, 0.3 * s, 0.3 * s, 0, 1, 0),  # about the top left corner
    "shear-y": lambda x, s: warp(x, 1, 0, 0, 0.3 * s, 1, 0.3 * s),
    "translate-x": lambda x, s: warp(x, 1, 0, 0.9 * s, 0, 1, 0),  # 0.45 of the width of 2
    "translate-y": lambda x, s: warp(x, 1, 0, 0, 0, 1, 0.9 * s),
}


def rand_augment(images: Tensor, magnitude: float, mean: Tensor, std: Tensor, rng: np.random.Generator) -> Tensor:
    """Two distortions in a row for each image, each left out half of the time, of strength N(magnitude, 0.5) / 10 within
    0 to 1 (arXiv 1909.13719; timm's rand-m9-mstd0.5-inc1 for magnitude 9, but grey outside warped images, and bilinear).

    mean and std [C, 1, 1] are those of bytes, by which the images are normalised."""
    pixels = (images * std + mean).clamp_(0, 255)
    for _ in range(2):
        kinds = np.where(rng.random(len(images)) < 0.5, -1, rng.integers(len(DISTORTIONS), size=len(images)))
        strengths = rng.normal(magnitude, 0.5, len(images)).clip(0, 10) / 10 * rng.choice((-1, 1), len(images))
        order, counts = np.argsort(kinds, kind="stable"), np.bincount(kinds + 1, minlength=len(DISTORTIONS) + 1).tolist()
        drawn = torch.from_numpy(order), torch.from_numpy(strengths[order]).float()
        _, *by_kind = zip(*(uploaded(some, pixels.device).split(counts) for some in drawn))  # the first are left out
        for distort, (chosen, s) in zip(DISTORTIONS.values(), by_kind):
            if len(chosen):
                pixels[chosen] = distort(pixels[chosen], s[:, None, None, None]).clamp(0, 255)
    return (pixels - mean) / std
