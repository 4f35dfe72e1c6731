"""Data sets for MLO-MAE: splits, batches, augmentation, and the built-in images.

    splits = load("cifar100", "data")                      # or "shapes", "cifar10", a .npz file, a folder of JPEGs
    for images, labels in splits.train.stream(128, seed=0):    # [128, 3, 32, 32] float32, [128] int64
        ...

Levels 1 and 2 read `splits.train`, level 3 reads `splits.val`, and `splits.test` is for the end. Small images stay on the
device as uint8 (`Images`); folders of JPEGs are decoded by worker processes (`Folder`). Both offer the same methods.
harness/readers.py reads the files; harness/dense.py has images whose labels are masks or boxes.

Randomness has no state: batch b of a stream is a function of (split, batch size, seed, b) alone. So a run that resumes at
batch b sees the batches that it would have seen, on any device and with any number of workers.
"""

import copy
import hashlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness import UserError, counted
from harness.memory import uploaded
from harness.randomness import AUGMENT, DRAW, LIMIT, ORDER, SPLIT, WATCHED, numpy_generator
from harness.readers import (
    CIFAR,
    Decoder,
    Files,
    Key,
    Parts,
    account,
    check_room,
    list_any,
    list_images,
    portable,
    read_cifar,
    read_npz,
    say,
    say_levels,
)

COMPUTED = {"mean", "std"}  # facts about data whose last digits may differ by machine
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # as the paper's code, for CIFAR-10 and -100
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_SIZE = 4096  # pixels of an image's side
Array = np.ndarray | Tensor
Colour = tuple[float, ...]  # a number for each channel
Device = str | torch.device
Background = Callable[[np.random.Generator, np.ndarray, int], np.ndarray]  # (rng, numbers of images [N], pixels of a side)


class Batch(NamedTuple):
    """Some images and their labels."""

    images: Tensor  # [B, C, H, W] float32, normalised by the data's mean and std
    labels: Tensor  # [B] int64


@dataclass
class Splits:
    """What `load` returns. Pixels in [0, 1] minus `mean`, over `std`, are what a `Batch` holds."""

    train: "Images | Folder"
    val: "Images | Folder"
    test: "Images | Folder"
    class_names: list[str]
    channels: int
    image_size: int  # pixels; images are square
    mean: Colour
    std: Colour
    digest: str = ""  # of what was read, see `digest_of`
    known: "tuple[Images, Images] | None" = None  # those of train and val whose labels are used; None: all

    @property
    def labelled(self) -> "tuple[Images | Folder, Images | Folder]":
        """What levels 2 and 3 see; probes fit the first, and choose by the second."""
        return self.known or (self.train, self.val)

    def facts(self) -> dict:
        """What a checkpoint says about the data."""
        names = ("image_size", "channels", "class_names")
        counts = {part: len(getattr(self, part)) for part in ("train", "val", "test")}
        about = {"number_of_images": counts, "digest": self.digest, "mean": list(self.mean), "std": list(self.std)}
        return {name: getattr(self, name) for name in names} | about

    def watched(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Validation images, [count, C, H, W] (all if there are fewer), and where their objects are, [count, H, W] bool on
        the CPU, if that is known. Classes take turns; the choice is the same at every evaluation and for every seed of a
        run, and what a smaller count gives comes first."""
        order = sample(self.val.labels.cpu().numpy(), count)
        objects = getattr(self.val, "objects", None)
        return self.val.pick(order).images, None if objects is None else objects[torch.from_numpy(order)].cpu()


def digest_of(arrays: Iterable[np.ndarray]) -> str:
    """A number, in hex, that tells these arrays from others. It is taken of what was read, since what is computed from that
    may differ by machine: of pixels in arrays, of files' names in folders, and of labels."""
    found = hashlib.blake2b(digest_size=8)
    for array in arrays:
        found.update(f"{array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def sample(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` images (all if there are fewer) of these labels [N], at random, of whose classes each has its turn.
    They are always the same, and what a smaller count gives comes first."""
    order = numpy_generator(0, WATCHED).permutation(len(labels))
    return order[np.argsort(turns(labels[order]), kind="stable")][:count]


def turns(labels: np.ndarray) -> np.ndarray:
    """How many of its class come before each of these labels [N], [N] int64."""
    by_class, counts = np.argsort(labels, kind="stable"), np.bincount(labels)
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def index_batches(count: int, batch_size: int, seed: int, start: int) -> Iterator[tuple[int, np.ndarray]]:
    """Endlessly (b, indices [B] int64) from batch `start` on: one permutation of `count` after another, cut into batches."""
    epoch, position = divmod(start * batch_size, count)
    rest = numpy_generator(seed, ORDER, epoch).permutation(count)[position:]
    for b in itertools.count(start):
        while len(rest) < batch_size:
            epoch += 1
            rest = np.concatenate([rest, numpy_generator(seed, ORDER, epoch).permutation(count)])
        yield b, rest[:batch_size]
        rest = rest[batch_size:]


def as_bytes(values: Colour, device: Device) -> Tensor:
    """A mean or deviation of pixels in [0, 1] as one of bytes, [C, 1, 1] float32."""
    return 255 * torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


# ---------------------------------------------------------------------------------------------------- resident images


def moved(pixels: Tensor, top: Tensor, left: Tensor, flip: Tensor, border: int = 0) -> Tensor:
    """[B, C, H, W]: windows at `top` and `left` [B] of pixels with size/8 of `border` around, mirrored where `flip` [B]."""
    pad, height, width = pixels.shape[-1] // 8, *pixels.shape[-2:]
    windows = F.pad(pixels, (pad, pad, pad, pad), value=border).unfold(2, height, 1).unfold(3, width, 1)
    windows = windows[torch.arange(len(pixels), device=pixels.device), :, top, left]  # [B, C, H, W]
    return torch.where(flip[:, None, None, None], windows.flip(3), windows)


class Images:
    """A split whose images lie on the device as uint8.

    images [N, C, H, W] uint8, labels [N] int64, objects [N, H, W] bool (the pixels of the object) or None; mean and std
    [C, 1, 1] float32 are those of bytes.
    """

    label_dtype = torch.int64
    flip = crop = True  # whether `augmented` mirrors and crops
    cell = 1  # pixels along a side that one kept value stands for

    def __init__(
        self, images: Array, labels: Array, mean: Colour, std: Colour, objects: Array | None = None, device: Device = "cpu"
    ):
        """Here mean and std are those of pixels in [0, 1]."""
        self.images = torch.as_tensor(images).contiguous().to(device)
        self.labels = torch.as_tensor(labels, dtype=self.label_dtype).to(device)
        self.objects = None if objects is None else torch.as_tensor(objects).to(device)
        self.mean, self.std = as_bytes(mean, device), as_bytes(std, device)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: Tensor) -> Tensor:
        """[B, C, H, W] of these indices ([B] int64, on the device), before they are normalised."""
        kept = self.images.index_select(0, indices)
        return kept if self.cell == 1 else kept.repeat_interleave(self.cell, 2).repeat_interleave(self.cell, 3)

    def pick(self, indices: Array) -> Batch:
        """The images of these indices ([B] int64), not augmented."""
        indices = torch.as_tensor(indices).to(self.labels.device)
        return Batch((self.pixels(indices) - self.mean).div_(self.std), self.labels[indices])

    def ordered(self, batch_size: int) -> Iterator[Batch]:
        """Every image once, in order, as it is; the last Batch may be smaller."""
        return (self.pick(indices) for indices in torch.arange(len(self)).split(batch_size))

    def stream(self, batch_size: int, seed: int, start: int = 0, part: slice = slice(None)) -> Iterator[Batch]:
        """Endless shuffled Batches from batch number `start` on, cropped and flipped at random; of each, the images that the
        slice `part` names."""
        for b, indices in index_batches(len(self), batch_size, seed, start):
            yield self.augmented(indices, numpy_generator(seed, AUGMENT, b), part)

    def augmented(self, indices: np.ndarray, rng: np.random.Generator, part: slice = slice(None)) -> Batch:
        """These images after a random crop (from size/8 pixels of black around) and a random horizontal flip, where `crop` and
        `flip` say so; of them, those that the slice `part` names."""
        pad = self.cell * self.images.shape[-1] // 8
        top, left, flip = (rng.integers(0, high, len(indices)) for high in (2 * pad + 1, 2 * pad + 1, 2))
        top, left = (top, left) if self.crop else (np.full_like(top, pad), np.full_like(left, pad))
        drawn = np.stack([indices, top, left, flip * self.flip])[:, part]
        i, top, left, flip = uploaded(torch.from_numpy(drawn), self.labels.device)  # each [B]; one transfer
        crops = moved(self.pixels(i), top, left, flip.bool())
        return Batch((crops - self.mean).div_(self.std), self.moved_labels(self.labels[i], top, left, flip.bool()))

    def part(self, indices: Array, labels: Array) -> "Images":
        """The images of these indices [n] as a split of its own, with these labels [n]."""
        split, indices = copy.copy(self), torch.as_tensor(indices).to(self.labels.device)
        split.images, split.objects = self.images[indices], None if self.objects is None else self.objects[indices]
        split.labels = torch.as_tensor(labels).to(self.labels)
        return split

    def accompanied(self, maps: Tensor, precision: torch.dtype = torch.float16) -> "Images":
        """Maps [N, h, w] (or several of each, [N, n, h, w]) of these images as a split whose streams move them as this split's
        move the images; around a map is 0. They are kept as small as they are, in this precision."""
        maps = maps.reshape(len(maps), -1, *maps.shape[-2:]).to(precision)
        split = Images(maps, self.labels, (0.0,), (1 / 255,), device=maps.device)
        split.cell, split.flip, split.crop = self.images.shape[-1] // maps.shape[-1], self.flip, self.crop
        return split

    def moved_labels(self, labels: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """The labels of images that were moved so, for labels that have places."""
        return labels


# --------------------------------------------------------------------------------------------------- folders of files


class Folder:
    """A split whose images are files, decoded when asked for.

    labels [N] int64 on the CPU; mean and std [3, 1, 1] float32 are those of bytes. Iterating raises UserError, naming the
    file, for an image that cannot be decoded.
    """

    def __init__(self, decoder: Decoder, split: str, device: Device):
        self.decoder, self.split, self.device = decoder, split, device
        self.labels = torch.from_numpy(decoder.files.labels[split])
        self.mean, self.std = as_bytes(IMAGENET_MEAN, device), as_bytes(IMAGENET_STD, device)

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, indices: np.ndarray) -> Batch:
        """The images of these indices ([B] int64), not augmented."""
        return next(self.batches([(indices, None)]))

    def ordered(self, batch_size: int) -> Iterator[Batch]:
        """Every image once, in order, not augmented; the last Batch may be smaller."""
        return self.batches((indices.numpy(), None) for indices in torch.arange(len(self)).split(batch_size))

    def stream(self, batch_size: int, seed: int, start: int = 0, part: slice = slice(None)) -> Iterator[Batch]:
        """Endless shuffled Batches from batch number `start` on, cropped, resized and flipped at random; of each, the images
        that the slice `part` names."""
        places = range(batch_size)[part]
        requests = index_batches(len(self), batch_size, seed, start)
        return self.batches((indices[part], [(seed, AUGMENT, b, j) for j in places]) for b, indices in requests)

    def batches(self, requests: Iterable[tuple[np.ndarray, list[Key] | None]]) -> Iterator[Batch]:
        """A Batch for each (indices, random keys or None), in order."""
        for images, labels in self.decoder.decoded(self.split, requests):
            images, labels = (uploaded(tensor, torch.device(self.device)) for tensor in (images, labels))
            yield Batch((images - self.mean).div_(self.std), labels)


# ------------------------------------------------------------------------------------------------- shapes, drawn here

SHAPES = ["disc", "ring", "square", "triangle", "cross", "star", "bars", "crescent"]


@cache
def extent(shape: str) -> tuple[float, float]:
    """Area that a shape of size 1 covers, and its furthest point's distance from the centre: measured on a fine grid."""
    grid = (np.mgrid[:512, :512] - 255.5) / 180
    inside = outline(shape, *grid) < 0
    return inside.sum() / 180**2, np.hypot(*grid)[inside].max()


def outline(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside, about true near the edge) to a shape of size about 1; u, v: coordinates, any shape."""
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    if shape == "disc":
        return r - 1
    if shape == "ring":
        return np.abs(r - 0.76) - 0.24
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 1
    if shape == "triangle":
        return np.max([np.cos(a) * u + np.sin(a) * v for a in 2 * np.pi / 3 * np.arange(3)], axis=0) - 0.5
    if shape == "cross":
        u, v = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(u - 1, v - 0.32), np.maximum(v - 1, u - 0.32))
    if shape == "star":  # five tips: fold the plane into one tenth, where the edge is one line from tip to notch
        fold = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        notch = 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
        normal = np.array([notch[1], 1 - notch[0]]) / np.hypot(notch[1], 1 - notch[0])
        return (r * np.cos(fold) - 1) * normal[0] + r * np.sin(fold) * normal[1]
    if shape == "bars":
        return np.maximum(np.abs(np.abs(u) - 0.68) - 0.32, np.abs(v) - 1)
    return np.maximum(r - 1, 0.8 - np.hypot(u - 0.5, v))  # crescent


def stripes(rng: np.random.Generator, kinds: np.ndarray, size: int) -> np.ndarray:
    """Stripes of eight kinds, [N] -> [N, size, size] in [0, 1]: 0, 30, 60 or 90 degrees, to either side, narrow or wide."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    angle = np.radians(30.0 * (kinds % 4)) * rng.choice([-1, 1], len(kinds))  # either side: a flipped picture keeps its class
    period = size / 32 * np.where(kinds < 4, 4.0, 7.5) * rng.uniform(0.92, 1.08, len(kinds))  # pixels
    rows = np.stack([np.cos(angle) / period, np.sin(angle) / period, rng.uniform(size=len(kinds))]).astype(np.float32)
    across, down, phase = rows[:, :, None, None]
    return 0.5 + 0.5 * np.sin(2 * np.pi * (across * x + down * y + phase))


def striped(rng: np.random.Generator, numbers: np.ndarray, size: int) -> np.ndarray:
    """A Background: stripes of a class drawn at random, which tell nothing, [N, 1, size, size] in [0, 0.9]."""
    return 0.9 * stripes(rng, rng.integers(0, len(SHAPES), len(numbers)), size)[:, None]


def dead_leaves(rng: np.random.Generator, numbers: np.ndarray, size: int) -> np.ndarray:
    """A Background: leaves that cover each other, [N, 3, size, size] about in [0, 1]. As in photographs, each region can be
    learned from what is around it, and none tells the class.

    48 discs and turned squares, of radii r that fall as r^-3 from 3 to 16 of 32 pixels; four muted colours an image, each
    leaf's a little its own, and shading across it."""
    shape = count, leaves = len(numbers), 48
    pixels = np.arange(size, dtype=np.float32) + 0.5
    share = rng.uniform(size=shape).astype(np.float32)
    radius = size / 32 * (3.0**-2 + share * (16.0**-2 - 3.0**-2)) ** -0.5
    cx, cy = rng.uniform(-0.1 * size, 1.1 * size, (2, *shape)).astype(np.float32)
    square, turn = rng.uniform(size=shape) < 0.5, rng.uniform(0, np.pi / 2, shape).astype(np.float32)
    palette = rng.uniform(size=(count, 4, 3)).astype(np.float32)
    palette = 0.6 * palette.mean(2, keepdims=True) + 0.4 * palette
    colour = palette[np.arange(count)[:, None], rng.integers(0, 4, shape)]  # [N, leaves, 3]
    colour = np.clip(colour + 0.08 * rng.standard_normal(colour.shape, dtype=np.float32), 0, 1)
    slope = 0.5 / size * rng.standard_normal((2, *shape)).astype(np.float32)

    front = np.zeros((count, size, size), np.uint8)  # the leaf that is seen in each pixel
    for leaf in range(leaves):  # from the back to the front
        cos, sin, r = (array[:, leaf, None] for array in (np.cos(turn), np.sin(turn), radius))
        dx, dy = pixels - cx[:, leaf, None], pixels - cy[:, leaf, None]  # [N, size]
        u, v = (cos * dx)[:, None] + (sin * dy)[:, :, None], (cos * dy)[:, :, None] - (sin * dx)[:, None]
        u, v = u * u, v * v
        inside = np.where(square[:, leaf, None, None], np.maximum(u, v), u + v) < (r * r)[..., None]
        np.copyto(front, leaf, where=inside)
    base = colour - (slope[0] * cx + slope[1] * cy)[..., None]  # a leaf has its colour at its centre
    planes = np.concatenate([base, slope.transpose(1, 2, 0)], axis=2)[np.arange(count)[:, None, None], front]
    shade = planes[..., 3] * pixels + planes[..., 4] * pixels[:, None]  # [N, size, size]
    return planes[..., :3].transpose(0, 3, 1, 2) + shade[:, None]


OBJECT_AREA = (0.2, 0.3)  # least and most share of an image that its object covers
DRAWN: dict[str, tuple] = {  # data sets that are drawn here: what `shapes` takes after the size
    "shapes": (dead_leaves, OBJECT_AREA),
    "shapes-anywhere": (dead_leaves, OBJECT_AREA, True),
    "shapes-stripes": (striped, (0.25, 0.4)),
}


def draw_shapes(
    rng: np.random.Generator,
    labels: np.ndarray,
    numbers: np.ndarray,
    size: int,
    background: Background,
    area: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of shapes: labels and numbers [N] -> images [N, 3, size, size] uint8, objects [N, size, size] bool.

    One coloured object that covers a share of the image in the range `area`, anywhere, turned by up to 25 degrees. Each
    class has an outline and a kind of stripes. background(rng, numbers, size) is behind it."""
    count, (least, most) = len(labels), area
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5
    distance = np.empty((count, size, size), np.float32)
    for label, shape in enumerate(SHAPES):
        mine = labels == label
        whole, reach = extent(shape)
        share, turn, cx, cy = rng.uniform(size=(4, mine.sum(), 1, 1)).astype(np.float32)
        scale, angle = size * np.sqrt((least + (most - least) * share) / whole), math.radians(25) * (2 * turn - 1)
        room = np.maximum(size / 2 - 0.9 * scale * reach, 0)  # the tips may touch the border
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        dx, dy = x - size / 2 - room * (2 * cx - 1), y - size / 2 - room * (2 * cy - 1)
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        distance[mine] = outline(shape, u, v) * scale  # in pixels
    cover = np.clip(0.5 - distance, 0, 1)[:, None]  # share of each pixel that the object covers, [N, 1, size, size]
    middle = rng.uniform(0.1, 1, count)
    colours = rng.permuted(np.stack([np.full(count, 0.1), middle, np.ones(count)], axis=1), axis=1)  # [N, 3], never grey
    body = (0.15 + 0.85 * stripes(rng, labels, size)[:, None]) * colours[:, :, None, None]
    behind = background(rng, numbers, size)
    grain = 0.03 * rng.standard_normal((count, 3, size, size), dtype=np.float32)
    pixels = behind + cover * (body - behind) + grain
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8), distance < 0


def shapes(size: int, background: Background, area: tuple[float, float], anywhere: bool = False, seed: int = 0) -> Parts:
    """6,000 training pictures, numbers 0 to 5,999, and 2,000 test pictures of shapes: {"train": (images, labels, objects),
    "test": ...} as `draw_shapes` has them. What is drawn before the background is the same for every background.

    Objects lie near the middle, since they are large. anywhere: each picture is moved by a random distance, and what leaves
    it on one side comes in on the other, so that no place tells where an object is."""
    in_turn = np.arange(8000, dtype=np.int64).reshape(1000, 8) % len(SHAPES)
    labels = numpy_generator(DRAW, 0, seed).permuted(in_turn, axis=1).ravel()  # balanced throughout
    some = zip(np.split(labels, 32), np.split(np.arange(8000), 32))
    drawn = [draw_shapes(numpy_generator(DRAW, 1, i, seed), *pair, size, background, area) for i, pair in enumerate(some)]
    images, objects = map(np.concatenate, zip(*drawn))
    if anywhere:
        moves = (numpy_generator(DRAW, 4, seed).uniform(size=(2, 8000)) * size).astype(int)
        down, right = ((move[:, None] + np.arange(size)) % size for move in moves)  # each [N, size]
        places = np.arange(8000)[:, None, None], down[:, :, None], right[:, None]
        images, objects = images.transpose(0, 2, 3, 1)[places].transpose(0, 3, 1, 2), objects[places]
    return {"train": (images[:6000], labels[:6000], objects[:6000]), "test": (images[6000:], labels[6000:], objects[6000:])}


# --------------------------------------------------------------------------------------------------------------- load


def drawn_order(count: int, names: Sequence[bytes] | None, seed: int, purpose: int) -> np.ndarray:
    """0 to count - 1 at random. Images that have names are ordered by their hashes: where one goes, the rest stay in order."""
    if names is None:
        return numpy_generator(seed, purpose).permutation(count)
    key = f"{seed} {purpose}".encode()
    return np.argsort([hashlib.blake2b(name, digest_size=8, key=key).digest() for name in names], kind="stable")


def choose(labels: np.ndarray, limit: int, seed: int, what: str, names: Sequence[bytes] | None = None) -> np.ndarray:
    """Indices of `limit` images at random (all if 0), as many of each class as can be; in order.

    Raises UserError where `what` has fewer."""
    if limit > len(labels):
        raise UserError(f"--images {limit}: {what} has only {counted(len(labels), 'image')}")
    if not limit:
        return np.arange(len(labels))
    order = drawn_order(len(labels), names, seed, LIMIT)
    return np.sort(order[np.lexsort((labels[order], turns(labels[order])))[:limit]])


def hold_out(
    labels: np.ndarray, fraction: float, seed: int, names: Sequence[bytes] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The indices of labels [N] in two parts, at random: all but `fraction` of them, and that fraction. Each in order.

    Of images with names, it is that fraction of each class, and where one is added or goes, about one other changes sides.
    Raises UserError where a part would be empty."""
    held, order = round(fraction * len(labels)), drawn_order(len(labels), names, seed, SPLIT)
    if not 0 < held < len(labels):
        raise UserError(f"{fraction} of {counted(len(labels), 'training image')} cannot be held out; use more images")
    if names is not None:  # by the place in its class, of 0 to 1
        labels = labels[order]
        order = order[np.argsort((turns(labels) + 0.5) / np.bincount(labels)[labels], kind="stable")]
    return np.sort(order[held:]), np.sort(order[:held])


def channel_statistics(images: np.ndarray) -> tuple[Colour, Colour]:
    """Mean and standard deviation of each channel of [N, C, H, W] uint8, of pixels in [0, 1]."""
    counts = np.zeros((images.shape[1], 256))
    for some in np.array_split(images, math.ceil(len(images) / 1024)):
        counts += [np.bincount(channel.ravel(), minlength=256) for channel in some.transpose(1, 0, 2, 3)]
    share, level = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = share @ level
    std = np.sqrt(np.maximum(share @ level**2 - mean**2, 1 / 255**2))  # a constant channel is not divided by zero
    return tuple(mean.tolist()), tuple(std.tolist())


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """[N, C, H, W] uint8 -> [N, C, size, size] uint8, bicubic; objects [N, H, W] bool -> [N, size, size] bool: the pixels of
    which the object covers more than half."""

    def resize(some: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(some).float()
        if some.dtype == bool:
            return (F.adaptive_avg_pool2d(pixels, size) > 0.5).numpy()
        return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).round().clamp(0, 255).byte().numpy()

    return np.concatenate([resize(some) for some in np.array_split(images, math.ceil(len(images) / 1024))])


def report(name: str, splits: Splits, left_out: Counter[str] | None = None) -> Splits:
    """Say in one line what was found: how many images of how many classes each split has and, of folders, which files were
    left out. Returns the splits."""
    found = {part: getattr(splits, part).labels for part in ("train", "val", "test")}
    if found["train"].ndim == 1:
        counts = [
            f"{part} {counted(len(labels), 'image')}"
            + (f" of {counted(len(labels.unique()), 'class', 'classes')}" if splits.class_names else "")
            for part, labels in found.items()
        ]
        counts += [] if splits.class_names else ["no classes"]
    else:  # masks and boxes
        counts = [f"{part} {counted(len(labels), 'image')}" for part, labels in found.items()]
        counts.append(counted(len(splits.class_names), "class", "classes"))
    say(f"data {name}: {', '.join(counts)}" + (f"; {account(left_out)}" if left_out is not None else ""))
    return splits


def load(
    name: str | Path,
    data_dir: str | Path = "data",
    *,
    image_size: int = 0,
    limit: int = 0,
    val_fraction: float = 0.2,
    seed: int = 0,
    skip_corrupt: bool = False,
    workers: int = 0,
    flip: bool = True,
    crop: bool = True,
    classes: bool = True,
    device: Device = "cpu",
) -> Splits:
    """The data set `name`, split; what was found is said in a line on stderr.

    name          "shapes" or "shapes-stripes" (drawn here), "cifar10", "cifar100", "cifar100-coarse" (its 20 classes), a
                  MedMNIST-style .npz, or a folder of train/<class>/*.jpg ...
    data_dir      where CIFAR is, or is downloaded to
    image_size    pixels to resize to; 0: as the data has them, 224 for folders
    limit         images of the training pool to use, at random and from all classes alike; 0: all
    val_fraction  share of that pool that is held out as `val` (see `hold_out`), unless the data has a `val` and a `test`
    seed          of `limit` and `val_fraction` (drawn images are the same for every seed)
    skip_corrupt  folders: use the next image in place of one that cannot be decoded
    workers       folders: processes that decode; 0: this one
    flip, crop    whether streams mirror images at random, and cut pieces out of them
    classes       whether a folder must have them; without, any folder of images will do: its labels are 0, it has no
                  `class_names`, and `test` is empty
    device        where resident images lie and batches arrive

    Raises UserError for data that is absent, damaged, hostile or does not fit together.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: must lie between 0 and 1")
    if not 0 <= image_size <= MAX_SIZE or limit < 0 or workers < 0:
        raise UserError(
            f"--image-size {image_size} (0 to {MAX_SIZE}), --images {limit} or --workers {workers} is out of range"
        )
    name = str(name)
    if name in DRAWN:
        check_room(8000 * 3 * (image_size or 32) ** 2, name)
        parts, class_names = shapes(image_size or 32, *DRAWN[name]), list(SHAPES)
    elif name in CIFAR:
        parts, class_names = read_cifar(name, Path(data_dir))
    elif os.path.isdir(name):
        files, class_names, left_out, digest = list_folder(
            name, image_size or 224, limit, val_fraction, seed, skip_corrupt, classes
        )
        decoder = Decoder(files._replace(flip=flip, crop=crop), workers)
        splits = (Folder(decoder, split, device) for split in ("train", "val", "test"))
        return report(name, Splits(*splits, class_names, 3, files.size, IMAGENET_MEAN, IMAGENET_STD, digest), left_out)
    elif os.path.isfile(name):
        parts, class_names = read_npz(Path(name))
    else:
        known = ", ".join([*DRAWN, *CIFAR])
        raise UserError(f"--data {name}: none of {known}, nor an existing .npz file or folder of images")

    channels, native_size = parts["train"][0].shape[1:3]
    size = image_size or native_size
    check_room(channels * size**2 * sum(len(part[0]) for part in parts.values()), name)
    parts = split_parts(parts, parts["train"][1], limit, val_fraction, seed, name)
    read, kind = (slice(1, 2), name) if name in DRAWN else (slice(None), "")
    arrays = (array for split in ("train", "val", "test") for array in parts[split][read])
    digest = digest_of([np.frombuffer(kind.encode(), np.uint8), *arrays])
    if size != native_size:
        parts = {
            split: (resized(images, size), labels, *(resized(some, size) for some in objects))
            for split, (images, labels, *objects) in parts.items()
        }
    mean, std = (CIFAR_MEAN, CIFAR_STD) if name in CIFAR else channel_statistics(parts["train"][0])
    splits = (Images(*parts[s][:2], mean, std, *parts[s][2:], device=device) for s in ("train", "val", "test"))
    return report(name, moving(Splits(*splits, class_names, channels, size, mean, std, digest), flip, crop))


def moving(splits: Splits, flip: bool, crop: bool) -> Splits:
    """These splits of resident images, whose streams mirror and crop them as asked for."""
    for split in (splits.train, splits.val, splits.test):
        split.flip, split.crop = flip, crop
    return splits


def split_parts(
    parts: Parts,
    labels: np.ndarray,
    limit: int,
    val_fraction: float,
    seed: int,
    what: str,
    names: Sequence[bytes] | None = None,
) -> Parts:
    """train, val and test: of train, whose images have these labels and perhaps names, `limit` images (all if 0), out of which
    val is held where there is none of its own. Raises UserError as `choose` and `hold_out` do."""
    kept = choose(labels, limit, seed, what, names)
    pool = {"train": kept} | {split: np.arange(len(part[0])) for split, part in parts.items() if split != "train"}
    if "val" not in parts:
        parts = parts | {"val": parts["train"]}
        kept_names = None if names is None else [names[i] for i in kept]
        pool["train"], pool["val"] = (kept[part] for part in hold_out(labels[kept], val_fraction, seed, kept_names))
    return {split: tuple(array[pool[split]] for array in part) for split, part in parts.items()}


def list_folder(
    root: str, size: int, limit: int, val_fraction: float, seed: int, skip_corrupt: bool, classes: bool
) -> tuple[Files, list[str], Counter[str], str]:
    """train/, val/ and test/ as they are, their class names, how many files were left out, for each reason, and the digest;
    without test/, val/ is the test split and val is held out of train/. Where there is none of these and classes are not asked
    for: all images in the folder, without class names."""
    has = {part: os.path.isdir(os.path.join(root, part)) for part in ("train", "val", "test")}
    if any(has.values()) or classes:
        if not has["train"] or not (has["val"] or has["test"]):
            found = counted(len(list_any(root)[0]), "image")
            about = f"{root}: expected train/<class>/*.jpg and val/<class>/*.jpg (or test/) in it, and found {found}"
            mend = "put about four of five of each class under train/, the rest under val/"
            raise UserError(f"{about}; {mend}, or pretrain without classes by --masking random or --masking-from RUN")
        if len({os.path.realpath(os.path.join(root, part)) for part in has if has[part]}) < sum(has.values()):
            raise UserError(f"{root}: two of train/, val/ and test/ are one folder; give each its own images")
        class_names, *pool, left_out = list_images(root, "train")
        listed = {"train": pool}
        own = ("test", "val") if has["test"] and has["val"] else ("test",)
        for part in own:
            _, *listed[part], more = list_images(root, part if has[part] else "val", class_names)
            left_out += more
    else:
        paths, left_out = list_any(root)
        if not len(paths):
            raise UserError(f"{root}: no images ({account(left_out)})")
        class_names, both = [], (("train", paths), ("test", paths[:0]))
        listed = {part: (some, np.zeros(len(some), np.int64)) for part, some in both}
    for part, (paths, part_labels) in listed.items():
        say_levels(root, paths)
        listed[part] = paths, part_labels, np.array([os.fsencode(portable(os.fsdecode(path))) for path in paths])
    _, labels, names = listed["train"]
    names = [path.split(b"/", 2)[2] for path in names] if class_names else names  # within their class folders
    listed = split_parts(listed, labels, limit, val_fraction, seed, "train/" if class_names else root, names)
    digest = digest_of(array for _, part_labels, names in listed.values() for array in (names, part_labels))
    paths, labels = ({split: part[i] for split, part in listed.items()} for i in (0, 1))
    return Files(root, size, skip_corrupt, paths, labels), class_names, left_out, digest
