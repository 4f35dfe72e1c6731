"""Data sets for MLO-MAE: loading, splitting, augmentation, downloads.

    splits = load("cifar100", "data")                      # or "shapes", "cifar10", a .npz file, a folder of JPEGs
    for images, labels in splits.train.stream(128, seed=0):    # [128, 3, 32, 32] float32, [128] int64
        ...

Levels 1 and 2 read `splits.train`, level 3 reads `splits.val`, and `splits.test` is for the end. Small images stay on the
device as uint8 (`Images`); folders of JPEGs are decoded by worker processes (`Folder`). Both offer the same methods.
`load_dense` reads images whose labels are masks or boxes, for transfer.py.

Randomness has no state: batch b of a stream is a function of (split, batch size, seed, b) alone. So a run that resumes at
batch b sees the batches that it would have seen, on any device and with any number of workers.

Files are never trusted: whatever is wrong with one ends in a `DataError`, whose text is one line.
"""

import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickletools
import shutil
import signal
import tarfile
import tempfile
import threading
import urllib.request
import warnings
import zipfile
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # as the paper's code, for CIFAR-10 and -100
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_FILE = 2**28  # bytes of one CIFAR file (the largest has 155 MB)
MAX_JSON = 2**30  # bytes of a file of boxes (COCO's largest has 470 MB)
MAX_RESIDENT = 2**35  # bytes of images kept in memory
MAX_SIZE = 4096  # pixels of an image's side
MAX_CLASSES = 100_000
ORDER, AUGMENT, SPLIT, LIMIT, DRAW = range(5)  # what a random number is for: keeps the streams of one seed apart


class DataError(Exception):
    """Data that cannot be used. The message is one printable line: what is wrong, with which file, and what to do."""

    def __init__(self, message):
        super().__init__("".join(c if c.isprintable() else "?" for c in message[:600]))  # file names may hold anything


class Batch(NamedTuple):
    images: torch.Tensor  # [B, C, H, W] float32, normalised by the data's mean and std
    labels: torch.Tensor  # [B] int64


@dataclass
class Splits:
    """What `load` returns. Pixels in [0, 1] minus `mean`, over `std`, are what a `Batch` holds."""

    train: "Images | Folder"
    val: "Images | Folder"
    test: "Images | Folder"
    class_names: list[str]
    channels: int
    image_size: int  # pixels; images are square
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]


def generator(*key):
    """A numpy generator that is a function of the integers in `key`, and independent for every other key."""
    return np.random.default_rng([k % 2**64 for k in key])


@contextmanager
def blaming(path, remedy):
    """Turns whatever goes wrong with this file into a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror or error}; {remedy}") from None
    except Exception as error:  # damaged files raise what they like: ValueError, KeyError, zlib.error, MemoryError...
        raise DataError(f"{path}: damaged ({type(error).__name__}: {str(error)[:200]}); {remedy}") from None


def index_batches(count, batch_size, seed, start):
    """Endlessly (b, indices [B] int64) from batch `start` on: one permutation of `count` after another, cut into batches."""
    epoch, position = divmod(start * batch_size, count)
    rest = generator(seed, ORDER, epoch).permutation(count)[position:]
    for b in itertools.count(start):
        while len(rest) < batch_size:
            epoch += 1
            rest = np.concatenate([rest, generator(seed, ORDER, epoch).permutation(count)])
        yield b, rest[:batch_size]
        rest = rest[batch_size:]


# ---------------------------------------------------------------------------------------------------- resident images


def moved(pixels, top, left, flip, border=0):
    """[B, C, H, W]: the windows at `top` and `left` [B] of pixels with size/8 of `border` around, mirrored where `flip` [B]."""
    pad, height, width = pixels.shape[-1] // 8, *pixels.shape[-2:]
    windows = F.pad(pixels, (pad, pad, pad, pad), value=border).unfold(2, height, 1).unfold(3, width, 1)
    windows = windows[torch.arange(len(pixels), device=pixels.device), :, top, left]  # [B, C, H, W]
    return torch.where(flip[:, None, None, None], windows.flip(3), windows)


class Images:
    """A split whose images lie on the device as uint8.

    images [N, C, H, W] uint8, labels [N] int64, objects [N, H, W] bool (the pixels of the object) or None.
    """

    label_dtype = torch.int64

    def __init__(self, images, labels, mean, std, objects=None, device="cpu"):
        self.images = torch.as_tensor(images).contiguous().to(device)
        self.labels = torch.as_tensor(labels, dtype=self.label_dtype).to(device)
        self.objects = None if objects is None else torch.as_tensor(objects).to(device)
        self.mean = 255 * torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None]  # [C, 1, 1]
        self.std = 255 * torch.tensor(std, dtype=torch.float32, device=device)[:, None, None]

    def __len__(self):
        return len(self.labels)

    def pick(self, indices):
        """The images of these indices ([B] int64), as they are: a Batch."""
        indices = torch.as_tensor(indices).to(self.labels.device)
        return Batch((self.images[indices] - self.mean).div_(self.std), self.labels[indices])

    def ordered(self, batch_size):
        """Every image once, in order, as it is: Batches, of which the last may be smaller."""
        return (self.pick(indices) for indices in torch.arange(len(self)).split(batch_size))

    def stream(self, batch_size, seed, start=0, augment=True, part=slice(None)):
        """Endless shuffled Batches from batch number `start` on, cropped and flipped at random if `augment`; of each, the
        images that the slice `part` names."""
        for b, indices in index_batches(len(self), batch_size, seed, start):
            yield self.augmented(indices, generator(seed, AUGMENT, b), part) if augment else self.pick(indices[part])

    def augmented(self, indices, rng, part=slice(None)):
        """A Batch of these images after a random crop (from size/8 pixels of black around) and a random horizontal flip; of
        it, the images that the slice `part` names."""
        pad = self.images.shape[-1] // 8
        draws = [rng.integers(0, high, len(indices)) for high in (2 * pad + 1, 2 * pad + 1, 2)]
        drawn = np.stack([indices, *draws])[:, part]
        i, top, left, flip = torch.from_numpy(drawn).to(self.labels.device)  # each [B]; one transfer
        crops = moved(self.images.index_select(0, i), top, left, flip.bool())
        return Batch((crops - self.mean).div_(self.std), self.moved_labels(self.labels[i], top, left, flip.bool()))

    def moved_labels(self, labels, top, left, flip):
        """The labels of images that were moved so."""
        return labels


# --------------------------------------------------------------------------------------------------- folders of files

FORMATS = {"JPEG": ".jpg .jpeg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "PPM": ".ppm .pgm"}
SUFFIXES = tuple(" ".join(FORMATS.values()).split())


def crop_box(width, height, rng):
    """(left, top, width, height) of a random crop, 20 to 100 % of the area, 3/4 to 4/3 in ratio, as MAE's RandomResizedCrop."""
    for _ in range(10):
        area, ratio = width * height * rng.uniform(0.2, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, width - w + 1), rng.integers(0, height - h + 1), w, h
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)  # a very long image: its middle
    return (width - w) / 2, (height - h) / 2, w, h


def decode(file, size, rng, whole=False):
    """One image file -> [3, size, size] uint8: cropped and flipped at random with `rng`, else the middle 224/256 of it.

    With `whole`, all of it, squashed into the square. Raises whatever PIL raises where it cannot, and ValueError for
    decompression bombs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns about odd metadata, and about bombs, which are refused here
        image = Image.open(file, formats=list(FORMATS))
        width, height = image.size
        if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"{width} x {height} pixels are too many")
        w = h = min(width, height) * 224 / 256
        left, top = (width - w) / 2, (height - h) / 2
        if whole:
            left, top, w, h = 0, 0, width, height
        elif rng:
            left, top, w, h = crop_box(width, height, rng)
        # JPEGs decode at 1/2, 1/4 or 1/8 for less work: the smallest that still gives the crop `size` pixels
        image.draft(None, (max(1, int(width * size / w)), max(1, int(height * size / h))))
        if image.mode.startswith("I"):  # 16-bit grey
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        if image.mode != "RGB":
            image = image.convert("RGB")
        x, y = image.width / width, image.height / height  # what draft made of the size
        box = left * x, top * y, min((left + w) * x, image.width), min((top + h) * y, image.height)
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return (pixels[:, ::-1] if rng and rng.random() < 0.5 else pixels).transpose(2, 0, 1)


class Files(NamedTuple):
    """All that a worker process needs to know. A list of millions of paths is one array, cheap to share and to send."""

    root: str
    size: int
    skip_corrupt: bool
    paths: dict  # of each split: [N] bytes, relative to root
    labels: dict  # of each split: [N] int64

    def batch(self, split, indices, keys):
        """images [B, 3, size, size] uint8, labels [B] int64; each cropped and flipped by its random key, unless keys is None."""
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        labels = torch.empty(len(indices), dtype=torch.int64)
        for j, i in enumerate(indices):
            labels[j] = self.read(split, int(i), keys and keys[j], images[j].numpy())
        return images, labels

    def read(self, split, i, key, out):
        """Decodes image i into out, or if it cannot be decoded and that is to be skipped, the next that can; its label."""
        count = len(self.labels[split])
        for i in itertools.islice(itertools.cycle(range(count)), i, i + count):
            path = os.path.join(self.root, os.fsdecode(self.paths[split][i]))
            with blaming(path, "it was there when the folder was listed: restore it, or start again"):
                file = open(path, "rb")
            try:
                with file:
                    out[:] = decode(file, self.size, generator(*key) if key else None)
                return self.labels[split][i]
            except Exception as error:
                if not self.skip_corrupt:
                    raise DataError(f"{path}: not a readable image ({type(error).__name__}: {str(error)[:200]}); delete it, "
                                    "or pass --skip-corrupt to use the next image in its place") from None
        raise DataError(f"{self.root}: none of the {count} images of the {split} split can be decoded")


files_here = None  # in a worker process: its Files


def start_worker(files):
    global files_here
    files_here = files
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def outlive_nobody():  # a main process that is killed cannot stop its workers
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=outlive_nobody, daemon=True).start()


def work(split, indices, keys):
    return files_here.batch(split, indices, keys)


class Folder:
    """A split whose images are files, decoded when asked for, in worker processes that the splits share.

    labels [N] int64 on the CPU. Iterating raises DataError, naming the file, for an image that cannot be decoded.
    """

    def __init__(self, files, split, executor, workers, device):
        self.files, self.split, self.executor, self.ahead, self.device = files, split, executor, 2 * workers, device
        self.labels = torch.from_numpy(files.labels[split])
        self.mean = 255 * torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]  # [3, 1, 1]
        self.std = 255 * torch.tensor(IMAGENET_STD, device=device)[:, None, None]

    def __len__(self):
        return len(self.labels)

    def ordered(self, batch_size):
        """Every image once, in order, not augmented: Batches, of which the last may be smaller."""
        return self.batches((indices.numpy(), None) for indices in torch.arange(len(self)).split(batch_size))

    def stream(self, batch_size, seed, start=0, augment=True, part=slice(None)):
        """Endless shuffled Batches from batch number `start` on, cropped, resized and flipped at random if `augment`; of
        each, the images that the slice `part` names."""
        places = range(batch_size)[part]
        return self.batches((indices[part], [(seed, AUGMENT, b, j) for j in places] if augment else None)
                            for b, indices in index_batches(len(self), batch_size, seed, start))

    def batches(self, requests):
        """A Batch for each (indices, random keys or None), in order."""
        for images, labels in self.decoded(requests):
            if torch.device(self.device).type == "cuda":
                images, labels = images.pin_memory(), labels.pin_memory()
            images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
            yield Batch((images - self.mean).div_(self.std), labels)

    def decoded(self, requests):
        """images [B, 3, H, W] uint8 and labels [B] for each request, decoded ahead of need where there are workers."""
        pending = deque()
        try:
            for indices, keys in requests:
                if not self.executor:
                    yield self.files.batch(self.split, indices, keys)
                    continue
                pending.append(self.executor.submit(work, self.split, indices, keys))
                if len(pending) > self.ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except DataError as error:
            raise DataError(str(error)) from None  # without the worker's traceback
        except (RuntimeError, OSError) as error:  # BrokenProcessPool is a RuntimeError
            raise DataError(f"{self.files.root}: a process that decodes images died or ran out of memory ({error}); "
                            "start again with fewer --workers, or --workers 0, or more room in /dev/shm") from None
        finally:
            for future in pending:
                future.cancel()


def list_images(root, part, class_names=None):
    """The images in root/part/<class>/ at any depth: class names, paths relative to root, labels. Links to folders inside a
    class are not followed (they may go round in circles)."""
    def entries(folder):
        return sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)

    with blaming(os.path.join(root, part), "make it readable"):
        names = [entry.name for entry in entries(part) if entry.is_dir() and entry.name[0] != "."]
        if class_names is None and not 2 <= len(names) <= MAX_CLASSES:
            raise DataError(f"{os.path.join(root, part)}: {len(names)} class folders; images are expected in {part}/<class>/, "
                            f"for 2 to {MAX_CLASSES} classes")
        class_names = class_names or names
        label_of = {name: label for label, name in enumerate(class_names)}
        paths, labels = [], []
        for name in names:
            before, todo = len(paths), [os.path.join(part, name)]
            if name not in label_of:
                raise DataError(f"{os.path.join(root, part, name)}: a class that train/ does not have; remove it")
            while todo:
                folder = todo.pop()
                for entry in entries(folder):
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(os.path.join(folder, entry.name))
                    elif entry.name.lower().endswith(SUFFIXES) and entry.name[0] != "." and entry.is_file():
                        paths.append(os.fsencode(os.path.join(folder, entry.name)))
            if len(paths) == before:
                raise DataError(f"{os.path.join(root, part, name)}: a class without images ({' '.join(SUFFIXES)}); "
                                "add some, or remove the folder")
            labels += [label_of[name]] * (len(paths) - before)
    if not paths:
        raise DataError(f"{os.path.join(root, part)}: no images; they are expected in {part}/<class>/")
    return class_names, np.array(paths), np.array(labels, np.int64)


def folder_splits(root, size, limit, val_fraction, seed, skip_corrupt, workers, device):
    """train/, val/ and test/ as they are; without test/, val/ is the test split and val is held out of train/."""
    has = {part: os.path.isdir(os.path.join(root, part)) for part in ("train", "val", "test")}
    if not has["train"] or not (has["val"] or has["test"]):
        raise DataError(f"{root}: expected train/<class>/*.jpg and val/<class>/*.jpg (or test/) in it")
    class_names, paths, labels = list_images(root, "train")
    kept = choose(labels, limit, seed, "train/")
    listed = {"test": list_images(root, "test" if has["test"] else "val", class_names)[1:]}
    if has["test"] and has["val"]:
        listed["val"] = list_images(root, "val", class_names)[1:]
    else:
        kept, held = hold_out(kept, val_fraction, seed)
        listed["val"] = paths[held], labels[held]
    listed["train"] = paths[kept], labels[kept]
    paths, labels = ({split: pair[i] for split, pair in listed.items()} for i in (0, 1))
    files = Files(os.fspath(root), size, skip_corrupt, paths, labels)
    executor = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(files,)) if workers else None
    splits = (Folder(files, split, executor, workers, device) for split in ("train", "val", "test"))
    return Splits(*splits, class_names, 3, size, IMAGENET_MEAN, IMAGENET_STD)


# ------------------------------------------------------------------------------------------------- shapes, drawn here

SHAPES = ["disc", "ring", "square", "triangle", "cross", "star", "bars", "crescent"]


@cache
def extent(shape):
    """Area that a shape of size 1 covers, and its furthest point's distance from the centre: measured on a fine grid."""
    grid = (np.mgrid[:512, :512] - 255.5) / 180
    inside = outline(shape, *grid) < 0
    return inside.sum() / 180**2, np.hypot(*grid)[inside].max()


def outline(shape, u, v):
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


def stripes(rng, kinds, size):
    """Stripes of eight kinds, [N] -> [N, size, size] in [0, 1]: 0, 30, 60 or 90 degrees, to either side, narrow or wide."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    angle = np.radians(30.0 * (kinds % 4)) * rng.choice([-1, 1], len(kinds))  # either side: a flipped picture keeps its class
    period = size / 32 * np.where(kinds < 4, 4.0, 7.5) * rng.uniform(0.92, 1.08, len(kinds))  # pixels
    rows = np.stack([np.cos(angle) / period, np.sin(angle) / period, rng.uniform(size=len(kinds))]).astype(np.float32)
    across, down, phase = rows[:, :, None, None]
    return 0.5 + 0.5 * np.sin(2 * np.pi * (across * x + down * y + phase))


def draw(rng, labels, size):
    """Pictures of shapes, labels [N] -> images [N, 3, size, size] uint8, objects [N, size, size] bool.

    One coloured object of 25 to 40 % of the area, anywhere, turned by up to 25 degrees, on grey. Each class has an outline
    and a kind of stripes; the background's stripes are those of a class drawn at random, so they tell nothing.
    """
    count = len(labels)
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5
    distance = np.empty((count, size, size), np.float32)
    for label, shape in enumerate(SHAPES):
        mine = labels == label
        area, reach = extent(shape)
        share, turn, cx, cy = rng.uniform(size=(4, mine.sum(), 1, 1)).astype(np.float32)
        scale, angle = size * np.sqrt((0.25 + 0.15 * share) / area), math.radians(25) * (2 * turn - 1)
        room = np.maximum(size / 2 - 0.9 * scale * reach, 0)  # the tips may touch the border
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        dx, dy = x - size / 2 - room * (2 * cx - 1), y - size / 2 - room * (2 * cy - 1)
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        distance[mine] = outline(shape, u, v) * scale  # in pixels
    cover = np.clip(0.5 - distance, 0, 1)[:, None]  # share of each pixel that the object covers, [N, 1, size, size]
    middle = rng.uniform(0.1, 1, count)
    colours = rng.permuted(np.stack([np.full(count, 0.1), middle, np.ones(count)], axis=1), axis=1)  # [N, 3], never grey
    body = (0.15 + 0.85 * stripes(rng, labels, size)[:, None]) * colours[:, :, None, None]
    background = 0.9 * stripes(rng, rng.integers(0, len(SHAPES), count), size)[:, None]
    grain = 0.03 * rng.standard_normal((count, 3, size, size), dtype=np.float32)
    pixels = background + cover * (body - background) + grain
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8), distance < 0


def shapes(size):
    """6,000 training and 2,000 test pictures, the same for every run: {"train": (images, labels, objects), "test": ...}."""
    labels = generator(DRAW, 0).permuted(np.arange(8000).reshape(1000, 8) % len(SHAPES), axis=1).ravel()  # balanced throughout
    parts = [draw(generator(DRAW, 1, part), some, size) for part, some in enumerate(np.split(labels, 32))]
    images, objects = map(np.concatenate, zip(*parts))
    return {"train": (images[:6000], labels[:6000], objects[:6000]), "test": (images[6000:], labels[6000:], objects[6000:])}


# ------------------------------------------------------------------------------------------------------------- CIFAR


class Layout(NamedTuple):
    """One of the forms in which CIFAR is published at https://www.cs.toronto.edu/~kriz/cifar.html."""

    folder: str
    archive: str
    md5: str  # of the archive
    train: list
    test: str
    meta: str  # file of class names
    names: str  # key of the class names in it, where it is a pickle
    labels: str | int  # key of the labels; or how many bytes of label stand before each image, of which the last counts

    @property
    def files(self):
        return [*self.train, self.test, self.meta]


URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {
    "cifar10": [
        Layout("cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a",
               [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta", "label_names", "labels"),
        Layout("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530",
               [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", "batches.meta.txt", "", 1)],
    "cifar100": [
        Layout("cifar-100-python", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85",
               ["train"], "test", "meta", "fine_label_names", "fine_labels"),
        Layout("cifar-100-binary", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8",
               ["train.bin"], "test.bin", "fine_label_names.txt", "", 2)],
}
ARRAY_PARTS = {"_codecs.encode", "numpy.ndarray", "numpy.dtype"} | {
    f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray._reconstruct", "numeric._frombuffer")}


class Stub:
    """Stands for an object that unpickling would have built: its name, arguments and state. Nothing is run."""

    def __init__(self, name, args=()):
        self.name, self.args, self.state = name, args, None


def text(value):
    return value.decode("latin-1") if isinstance(value, bytes) else value


def unpickle(raw):
    """The value of a pickle that holds dicts, lists, tuples, strings, small numbers and arrays (as Stubs). Runs nothing.

    It reads the opcodes itself (protocols 2 to 5): an unpickler can be made to allocate without bound even if its `find_class`
    is replaced. Python 2's strings become str of code points 0 to 255; so do the keys of dicts. Raises DataError for a pickle
    that asks for anything to be run or built but arrays, and other exceptions for a damaged one.
    """
    stack, marks, memo = [], [], {}

    def pop_to_mark():
        items = stack[marks[-1]:]
        del stack[marks.pop():]
        return items

    for number, (opcode, value, _) in enumerate(pickletools.genops(raw)):
        if number > 500_000:  # CIFAR-100 has 200,000
            raise ValueError("too many opcodes")
        match opcode.name:
            case "BININT" | "BININT1" | "BININT2" | "SHORT_BINSTRING" | "BINSTRING" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(value)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8" | "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(opcode.name, value))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if value is None else value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[opcode.name])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                items = pop_to_mark() if opcode.name == "APPENDS" else [stack.pop()]
                list.extend(stack[-1], items)
            case "SETITEM" | "SETITEMS":
                items = pop_to_mark() if opcode.name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
                keys = [text(key) for key in items[::2]]
                if not all(isinstance(key, str) for key in keys):  # nested tuples can take for ever to hash
                    raise ValueError("a key that is not a string")
                dict.update(stack[-1], zip(keys, items[1::2], strict=True))
            case "GLOBAL" | "STACK_GLOBAL":
                name = value.replace(" ", ".") if value else str.join(".", [stack.pop(), stack.pop()][::-1])
                if name not in ARRAY_PARTS:
                    raise DataError(f"refused: the file asks to run {name}; delete it, and fetch the data from its source")
                stack.append(Stub(name))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                encoded = function.name == "_codecs.encode"  # how Python 3 writes bytes in protocol 2
                stack.append(args[0].encode("latin-1") if encoded else Stub(function.name, args))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case "STOP":
                return stack.pop()
            case other if other not in ("PROTO", "FRAME"):
                raise DataError(f"refused: the file asks for {other}, which arrays do not need; fetch the data from its source")


def pickled_pixels(stub):
    """[N, 3072] uint8 from the Stub of a numpy array. Raises ValueError and others where it is not that."""
    if stub.name.endswith("_frombuffer"):
        raw, dtype, shape, order = stub.args
    else:
        _, shape, dtype, order, raw = stub.state
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw
    pixels = np.frombuffer(raw, np.uint8)
    if dtype.args[0] not in ("u1", "|u1") or order not in (False, "C") or tuple(shape) != (len(pixels) // 3072, 3072):
        raise ValueError("the pixels are not [N, 3072] uint8")
    return pixels.reshape(-1, 3072)


def read_file(path, most):
    """The bytes of a regular file of at most so many. Raises OSError, ValueError."""
    if not path.is_file():  # a pipe would block
        raise OSError("no such file")
    with open(path, "rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"more than {most} bytes")
    return raw


def cifar_file(path, layout, classes):
    """images [N, 3, 32, 32] uint8, labels [N] int64 of one file, checked by structure. Raises DataError."""
    with blaming(path, f"put the one from {URL}{layout.archive} in its place"):
        raw = read_file(path, MAX_FILE)
        if isinstance(layout.labels, int):
            records = np.frombuffer(raw, np.uint8).reshape(-1, layout.labels + 3072)
            pixels, labels = records[:, layout.labels:], records[:, layout.labels - 1].astype(np.int64)
        else:
            content = unpickle(raw)
            pixels, labels = pickled_pixels(content["data"]), content[layout.labels]
            if not (isinstance(labels, list) and all(type(label) is int and 0 <= label < classes for label in labels)):
                raise ValueError(f"the labels are not numbers from 0 to {classes - 1}")
            labels = np.array(labels, np.int64)
        if len(labels) == 0 or len(labels) != len(pixels) or labels.max() >= classes:
            raise ValueError(f"{len(pixels)} images, {len(labels)} labels, the largest {labels.max(initial=-1)}")
        return pixels.reshape(-1, 3, 32, 32), labels


def cifar_names(path, layout, classes):
    """The class names; numbers where the file is absent."""
    with blaming(path, "delete it"):
        if not path.exists():
            return [str(i) for i in range(classes)]
        raw = read_file(path, MAX_FILE)
        names = [text(name) for name in unpickle(raw)[layout.names]] if layout.names else raw.decode("latin-1").split()
        if len(names) != classes or not all(isinstance(name, str) for name in names):
            raise ValueError(f"not {classes} names")
        return names


def cifar(name, data_dir):
    """{"train": (images [N, 3, 32, 32] uint8, labels [N] int64), "test": ...}, class names.

    From data_dir/<folder of one of the layouts>, or data_dir itself; else from an archive there, else from a download.
    """
    classes = 10 if name == "cifar10" else 100
    with blaming(data_dir, "make it a readable folder"):
        here = [(folder, layout) for layout in CIFAR[name] for folder in (data_dir / layout.folder, data_dir)
                if any((folder / file).is_file() for file in layout.files[:-1])]
        if not here:
            layout = next((layout for layout in CIFAR[name] if (data_dir / layout.archive).is_file()), CIFAR[name][0])
            if not (data_dir / layout.archive).is_file():
                download(URL + layout.archive, data_dir / layout.archive, layout.md5)
            unpack(data_dir / layout.archive, layout)
            here = [(data_dir / layout.folder, layout)]
    folder, layout = here[0]
    train = [cifar_file(folder / file, layout, classes) for file in layout.train]
    return ({"train": tuple(map(np.concatenate, zip(*train))), "test": cifar_file(folder / layout.test, layout, classes)},
            cifar_names(folder / layout.meta, layout, classes))


def download(url, path, md5):
    """Fetches a file of this md5: written under a temporary name, moved to `path` when it is whole and right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, digest = None, hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=30) as source, \
                tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".part-", delete=False) as target:
            part = target.name
            size = int(source.headers["Content-Length"] or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while (chunk := source.read(2**16)) and target.tell() < MAX_FILE:
                    target.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
        if digest.hexdigest() != md5:
            raise ValueError(f"md5 {digest.hexdigest()}, not {md5}")
        os.chmod(part, 0o644)  # temporary files are for their owner only
        os.replace(part, path)
    except Exception as error:  # no network, a full disk, a connection cut short, a page of a proxy
        raise DataError(f"could not download {url} ({getattr(error, 'reason', error)}); try again, or fetch it by other means "
                        f"and put it at {path}") from None
    finally:
        if part and os.path.exists(part):
            os.remove(part)


def unpack(archive, layout):
    """Unpacks the files that are expected, and no others, into archive's folder / layout.folder: all of them or none."""
    with blaming(archive, "delete it so that it is downloaded again"):
        raw = read_file(archive, MAX_FILE)
        md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if md5 != layout.md5:
            raise ValueError(f"md5 {md5}, not {layout.md5}")
    wanted, folder = {f"{layout.folder}/{file}": file for file in layout.files}, archive.parent / layout.folder
    with blaming(folder, f"make it writable with 200 MB to spare, or unpack {archive} by hand"):
        part = tempfile.mkdtemp(dir=archive.parent, prefix=layout.folder + ".part-")
        try:
            with tarfile.open(fileobj=io.BytesIO(raw), mode="r:gz") as tar:
                for member in tar:
                    if member.name in wanted and member.isfile() and member.size <= MAX_FILE:
                        with open(os.path.join(part, wanted[member.name]), "wb") as target:
                            shutil.copyfileobj(tar.extractfile(member), target)
            os.chmod(part, 0o755)
            if not (folder / layout.test).is_file():  # else another process was faster
                os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------- npz


def npz_array(archive, name):
    """One array of a .npz, its header checked against its size before anything is allocated. Raises DataError and others."""
    info = archive.getinfo(name + ".npy")
    with archive.open(info) as file:
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[np.lib.format.read_magic(file)](file)
        if dtype.hasobject:
            raise DataError(f"{name} holds Python objects, which only unpickling could read; save it as a plain array")
        if min(shape, default=1) < 1 or file.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError(f"{name} has shape {list(shape)} but {info.file_size} bytes")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.file_size > MAX_RESIDENT:
        raise DataError(f"{name} is too large ({info.file_size} bytes) or compressed in an unusual way; use np.savez")
    if info.file_size > max(2**26, 100 * min(info.compress_size, os.path.getsize(archive.filename))):
        raise DataError(f"{name} would unpack to {info.file_size} bytes, over 100 times its size, as images never do; if it is "
                        "meant, write the file with np.savez instead of np.savez_compressed")
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def npz(path):
    """{"train": (images [N, C, H, W] uint8, labels [N] int64), "val" where it is there, "test"}, class names."""
    with blaming(path, "make the file again (train_images, train_labels, val_..., test_... as MedMNIST has them)"):
        parts = {}
        with zipfile.ZipFile(path) as archive:
            there = set(archive.namelist())
            for part in ("train", "val", "test"):
                absent = [name for name in (f"{part}_images", f"{part}_labels") if name + ".npy" not in there]
                if part == "val" and len(absent) == 2:
                    continue
                if absent:
                    raise DataError(f"it has no {absent[0]}")
                parts[part] = npz_part(part, *(npz_array(archive, f"{part}_{what}") for what in ("images", "labels")))
        shape, classes = parts["train"][0].shape, int(parts["train"][1].max()) + 1
        if not 2 <= classes <= min(MAX_CLASSES, shape[0]):
            raise DataError(f"train_labels go up to {classes - 1} for {shape[0]} images; number the classes 0, 1, 2...")
        for part, (images, labels) in parts.items():
            if images.shape[1:] != shape[1:]:
                raise DataError(f"{part}_images are {list(images.shape[1:])}, train_images {list(shape[1:])}; "
                                "make them alike")
            if labels.max() >= classes:
                raise DataError(f"{part}_labels has class {labels.max()}, train_labels only 0 to {classes - 1}")
        return parts, [str(i) for i in range(classes)]


def npz_part(part, images, labels):
    """Checks [N, H, W] or [N, H, W, C] uint8 and [N] or [N, 1] integers; -> [N, C, H, W], [N] int64. Raises DataError."""
    if images.dtype != np.uint8:
        raise DataError(f"{part}_images are {images.dtype}; save them as uint8, 0 to 255")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.shape[1] != images.shape[2]:
        raise DataError(f"{part}_images are {list(images.shape)}; expected square ones, [N, H, H] grey or [N, H, H, 3] colour")
    if labels.dtype.kind not in "iu":
        raise DataError(f"{part}_labels are {labels.dtype}; save them as integers")
    if labels.ndim > 1 and labels.shape[1] > 1:
        raise DataError(f"{part}_labels are {list(labels.shape)}: several for an image, but the head here chooses one class")
    if labels.shape not in ((len(images),), (len(images), 1)):
        raise DataError(f"{part}: {len(images)} images, but labels {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise DataError(f"{part}_labels go from {labels.min()} to {labels.max()}; number the classes 0, 1, 2...")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.reshape(-1).astype(np.int64)


# -------------------------------------------------------------------------------------------------------------- load


def choose(labels, limit, seed, what):
    """Indices of `limit` images at random (all if 0), as many of each class as can be; in order."""
    if limit > len(labels):
        raise DataError(f"--images {limit}: {what} has only {len(labels)} images")
    if not limit:
        return np.arange(len(labels))
    order = generator(seed, LIMIT).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, at random within
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each within its class
    return np.sort(order[np.argsort(rank, kind="stable")[:limit]])


def hold_out(indices, fraction, seed):
    """Two parts of the indices, at random: all but `fraction` of them, and that fraction. Each in order."""
    order, held = generator(seed, SPLIT).permutation(indices), round(fraction * len(indices))
    if not 0 < held < len(indices):
        raise DataError(f"{fraction} of {len(indices)} training images cannot be held out; use more images")
    return np.sort(order[held:]), np.sort(order[:held])


def check_room(size, name):
    if size > MAX_RESIDENT:
        raise DataError(f"--data {name}: {size} bytes of images are too many to keep in memory; use a smaller --image-size")


def measure(images):
    """Mean and standard deviation of each channel of [N, C, H, W] uint8, of pixels in [0, 1], as tuples."""
    counts = np.zeros((images.shape[1], 256))
    for some in np.array_split(images, math.ceil(len(images) / 1024)):
        counts += [np.bincount(channel.ravel(), minlength=256) for channel in some.transpose(1, 0, 2, 3)]
    share, level = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = share @ level
    std = np.sqrt(np.maximum(share @ level**2 - mean**2, 1 / 255**2))  # a constant channel is not divided by zero
    return tuple(mean.tolist()), tuple(std.tolist())


def resized(images, size):
    """[N, C, H, W] uint8 -> [N, C, size, size] uint8, bicubic."""
    def resize(some):
        some = F.interpolate(torch.from_numpy(some).float(), (size, size), mode="bicubic", antialias=True)
        return some.round().clamp(0, 255).byte().numpy()

    return np.concatenate([resize(some) for some in np.array_split(images, math.ceil(len(images) / 1024))])


def load(name, data_dir, *, image_size=0, limit=0, val_fraction=0.2, seed=0, skip_corrupt=False, workers=0, device="cpu"):
    """The data set `name`, split, as Splits.

    name          "shapes" (drawn here), "cifar10", "cifar100", a MedMNIST-style .npz, or a folder of train/<class>/*.jpg ...
    data_dir      where CIFAR is, or is downloaded to
    image_size    pixels to resize to; 0: as the data has them, 224 for folders
    limit         images of the training pool to use, at random and from all classes alike; 0: all
    val_fraction  share of that pool that is held out as `val`, at random, unless the data has a `val` and a `test` of its own
    seed          of `limit` and `val_fraction` (`shapes` are the same for every seed)
    skip_corrupt  folders: use the next image in place of one that cannot be decoded
    workers       folders: processes that decode; 0: this one
    device        where resident images lie and batches arrive

    Raises DataError for data that is absent, damaged, hostile or does not fit together.
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"--val-fraction {val_fraction}: must lie between 0 and 1")
    if not 0 <= image_size <= MAX_SIZE or limit < 0 or workers < 0:
        raise DataError(f"--image-size {image_size} (0 to {MAX_SIZE}), --images {limit} or --workers {workers} is out of range")
    name, data_dir = str(name), Path(data_dir)
    if name == "shapes":
        check_room(8000 * 3 * (image_size or 32) ** 2, name)
        parts, class_names = shapes(image_size or 32), list(SHAPES)
    elif name in CIFAR:
        parts, class_names = cifar(name, data_dir)
    elif os.path.isdir(name):
        return folder_splits(name, image_size or 224, limit, val_fraction, seed, skip_corrupt, workers, device)
    elif os.path.isfile(name):
        parts, class_names = npz(Path(name))
    else:
        raise DataError(f"--data {name}: neither shapes, cifar10 nor cifar100, nor an existing .npz file or folder of images")

    images = parts["train"][0]
    size = image_size or images.shape[-1]
    check_room(images.shape[1] * size**2 * sum(len(part[0]) for part in parts.values()), name)
    kept = choose(parts["train"][1], limit, seed, name)
    chosen = {split: np.arange(len(part[1])) for split, part in parts.items()} | {"train": kept}
    if "val" not in parts:
        parts["val"] = parts["train"]
        chosen["train"], chosen["val"] = hold_out(kept, val_fraction, seed)
    parts = {split: [array[chosen[split]] for array in part] for split, part in parts.items()}
    if size != images.shape[-1]:
        parts = {split: [resized(images, size), *rest] for split, (images, *rest) in parts.items()}
    mean, std = (CIFAR_MEAN, CIFAR_STD) if name in CIFAR else measure(parts["train"][0])
    splits = (Images(parts[s][0], parts[s][1], mean, std, *parts[s][2:], device=device) for s in ("train", "val", "test"))
    return Splits(*splits, class_names, images.shape[1], size, mean, std)


# ------------------------------------------------------------------------------------- labels of pixels, and boxes

IGNORED = 255  # in a mask: no class, neither taught nor counted


class Masked(Images):
    """Images whose labels are masks, [N, H, W] uint8: the class of each pixel, or IGNORED."""

    label_dtype = torch.uint8

    def moved_labels(self, labels, top, left, flip):
        return moved(labels[:, None], top, left, flip, IGNORED)[:, 0]


class Boxed(Images):
    """Images whose labels are boxes, [N, M, 5] float32: left, top, right, bottom (pixels), class. Unused rows have class -1."""

    label_dtype = torch.float32

    def moved_labels(self, labels, top, left, flip):
        size = self.images.shape[-1]
        shift = torch.stack([left, top], dim=1).repeat(1, 2)[:, None] - size // 8  # [B, 1, 4]
        corners = (labels[..., :4] - shift).clamp(0, size)
        mirrored = torch.stack([size - corners[..., 2], corners[..., 1], size - corners[..., 0], corners[..., 3]], dim=-1)
        corners = torch.where(flip[:, None, None], mirrored, corners)
        inside = ((corners[..., 2:] - corners[..., :2]) >= 1).all(-1)  # a pixel's breadth of it at least is left
        return torch.cat([corners, torch.where(inside, labels[..., 4], -1)[..., None]], dim=-1)


def boxes_of(objects, labels):
    """The tightest box around each object: [N, H, W] bool and labels [N] -> [N, 1, 5]."""
    def ends(lines):  # [N, H] -> first and last that is true
        return lines.argmax(1), lines.shape[1] - lines[:, ::-1].argmax(1)

    (left, right), (top, bottom) = ends(objects.any(1)), ends(objects.any(2))
    return np.stack([left, top, right, bottom, labels], axis=1)[:, None]


def squashed(path, size):
    """An image file -> [3, size, size] uint8, all of it. Raises DataError."""
    with blaming(path, "it is listed: put a readable image there, or list it no longer"), open(path, "rb") as file:
        return decode(file, size, None, whole=True)


def decoded_all(decoder, files, size, shape, what):
    """decoder(file, size) of each, [N, *shape] uint8, by as many threads as there are cores."""
    check_room(len(files) * math.prod(shape), what)
    result = np.empty((len(files), *shape), np.uint8)
    with ThreadPoolExecutor() as pool:
        found = pool.map(decoder, files, itertools.repeat(size))
        for row, pixels in enumerate(tqdm(found, desc=f"reading {what}", total=len(files))):
            result[row] = pixels
    return result


def mask_file(paths, size):
    """The file of a mask, and that of its image -> [size, size] uint8, the nearest pixels. Raises DataError where the first
    is no mask, or not that image's."""
    path, image_path = paths
    with blaming(path, "write it again: a PNG of its image's size, grey or with a palette, whose values are classes"):
        with Image.open(image_path, formats=list(FORMATS)) as image, Image.open(path, formats=["PNG"]) as mask:
            if mask.mode not in ("L", "P", "1"):
                raise ValueError(f"its mode is {mask.mode}")
            if mask.size != image.size:
                raise ValueError(f"{mask.size[0]} x {mask.size[1]} pixels, but {image_path} has {image.size[0]} x {image.size[1]}")
            return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST), np.uint8)


SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation"), "test": ("test", "testing")}


def masked_folder(root, size, ignored):
    """{"train": (images, masks), "test", and "val" where there are three}, class names, of images/<split>/*.jpg and
    masks/<split>/*.png of the same names (as ADE20K has them: annotations/). Values of the masks are classes, but for
    IGNORED and `ignored`."""
    folders, parts = {"image": ("images",), "mask": ("masks", "annotations")}, {}
    for part, names in SPLIT_NAMES.items():
        found = {kind: next((root / top / name for top in tops for name in names if (root / top / name).is_dir()), None)
                 for kind, tops in folders.items()}  # fmt: skip
        if None in found.values():
            continue
        with blaming(found["image"], "make it readable"):
            there = sorted(found["image"].iterdir())
        images = [path for path in there if path.name.lower().endswith(SUFFIXES) and path.name[0] != "."]
        masks = [found["mask"] / f"{path.stem}.png" for path in images]
        if not images:
            raise DataError(f"{found['image']}: no images ({' '.join(SUFFIXES)}) in it")
        parts[part] = (decoded_all(squashed, images, size, (3, size, size), f"{root}, {part}"),
                       decoded_all(mask_file, list(zip(masks, images)), size, (size, size), f"masks, {part}"))  # fmt: skip
    settle_parts(root, parts, "images/train/*.jpg and masks/train/*.png, and the same in val/ or test/")
    values = [value for value in np.unique(parts["train"][1]) if value not in (IGNORED, ignored)]
    if len(values) < 2:
        raise DataError(f"{root}: its masks for training show {len(values)} classes; at least 2 are needed")
    known = np.isin(np.arange(256), [*values, IGNORED, ignored])
    classes = np.full(256, IGNORED, np.uint8)  # of each value
    classes[values] = np.arange(len(values))
    for part, (images, masks) in parts.items():
        if not known[masks].all():
            raise DataError(f"{root}: masks of {part} have the value {masks[~known[masks]][0]}, those of train do not; "
                            "remove it, or let --ignore name it")
        parts[part] = images, classes[masks]
    return parts, [str(value) for value in values]


def coco(root, size):
    """{"train": (images, boxes), "test", and "val" where there are three}, class names, of annotations/instances_<name>.json
    and the images in <name>/, where <name> begins with train, val or test (as COCO has them). Crowds are left out."""
    parts, class_names, classes = {}, None, {}
    for part in SPLIT_NAMES:
        files = sorted((root / "annotations").glob(f"instances_{part}*.json"))
        if not files:
            continue
        if len(files) > 1:
            raise DataError(f"{root / 'annotations'}: {files[0].name} and {files[1].name}; leave one of them")
        with blaming(files[0], "fetch it again from its source"):
            content = json.loads(read_file(files[0], MAX_JSON))
            if class_names is None:
                named = sorted((category["id"], str(category["name"])) for category in content["categories"])
                classes, class_names = {key: label for label, (key, _) in enumerate(named)}, [name for _, name in named]
                if not 1 <= len(classes) == len(named) <= MAX_CLASSES:
                    raise ValueError(f"{len(named)} categories, {len(classes)} of them with ids of their own")
            images = {image["id"]: image for image in content["images"]}
            boxes = {key: [] for key in images}
            for annotation in content["annotations"]:
                if annotation.get("iscrowd"):
                    continue
                x, y, w, h = map(float, annotation["bbox"])
                image = images[annotation["image_id"]]
                width, height = float(image["width"]), float(image["height"])
                corners = [size * x / width, size * y / height, size * (x + w) / width, size * (y + h) / height]
                if not (w >= 0 and h >= 0 and all(map(math.isfinite, corners))):
                    raise ValueError(f"a box {annotation['bbox']}")
                boxes[annotation["image_id"]].append([*np.clip(corners, 0, size), classes[annotation["category_id"]]])
            most = max(map(len, boxes.values()), default=0)
            if not images or not most or most * len(images) > MAX_RESIDENT // 20:
                raise ValueError(f"{len(images)} images, and up to {most} boxes in one")
            labels = np.full((len(images), most, 5), -1, np.float32)
            for row, found in zip(labels, boxes.values()):
                row[: len(found)] = np.reshape(found, (-1, 5))
            names = [str(image["file_name"]) for image in images.values()]
            if any(os.path.isabs(name) or ".." in Path(name).parts for name in names):
                raise ValueError("a file name that leads out of its folder")
        folder = root / files[0].stem.removeprefix("instances_")
        parts[part] = decoded_all(squashed, [folder / name for name in names], size, (3, size, size), f"{root}, {part}"), labels
    settle_parts(root, parts, "annotations/instances_train*.json, instances_val*.json and the images in train*/ and val*/")
    return parts, class_names


def settle_parts(root, parts, expected):
    """Without a test split, val becomes it. Raises DataError where there is no train, or nothing beside it."""
    if "train" not in parts or len(parts) < 2:
        raise DataError(f"{root}: expected {expected}")
    if "test" not in parts:
        parts["test"] = parts.pop("val")


def load_dense(name, kind, *, image_size=0, limit=0, val_fraction=0.2, seed=0, ignored=IGNORED, device="cpu"):
    """`load`, where images have masks (kind "masks") or boxes (kind "boxes") for labels: Splits of Masked or Boxed.

    name     "shapes", or a folder: for masks as `masked_folder` reads it, for boxes as `coco` does; its images are squashed
             into squares. With val/ alone, that is the test split, and val is held out of train.
    ignored  value in a folder's masks that is no class, beside 255

    Raises DataError for data that is absent, damaged, hostile or does not fit together.
    """
    if not 0 <= image_size <= MAX_SIZE or limit < 0 or not 0 < val_fraction < 1 or not 0 <= ignored < 256:
        raise DataError(f"--image-size {image_size} (0 to {MAX_SIZE}), --images {limit}, --val-fraction {val_fraction} (0 to 1) or "
                        f"--ignore {ignored} (0 to 255) is out of range")
    split_class, name = {"masks": Masked, "boxes": Boxed}[kind], str(name)
    if name == "shapes":
        plain = load(name, "", image_size=image_size, limit=limit, val_fraction=val_fraction, seed=seed)
        splits, names = [], ["background", *SHAPES] if kind == "masks" else list(SHAPES)
        for split in (plain.train, plain.val, plain.test):
            objects, labels = split.objects.numpy(), split.labels.numpy()
            labels = objects * (1 + labels[:, None, None]) if kind == "masks" else boxes_of(objects, labels)
            splits.append(split_class(split.images, labels, plain.mean, plain.std, device=device))
        return Splits(*splits, names, plain.channels, plain.image_size, plain.mean, plain.std)
    if not os.path.isdir(name):
        raise DataError(f"--data {name}: neither shapes nor a folder of images with {kind}")
    size, root = image_size or 224, Path(name)
    parts, names = masked_folder(root, size, ignored) if kind == "masks" else coco(root, size)
    kept = choose(np.zeros(len(parts["train"][0]), np.int64), limit, seed, name)
    chosen = {"train": kept, "test": slice(None), "val": slice(None)}
    if "val" not in parts:
        parts["val"], (chosen["train"], chosen["val"]) = parts["train"], hold_out(kept, val_fraction, seed)
    splits = (split_class(*(array[chosen[part]] for array in parts[part]), IMAGENET_MEAN, IMAGENET_STD, device=device)
              for part in ("train", "val", "test"))  # fmt: skip
    return Splits(*splits, names, 3, size, IMAGENET_MEAN, IMAGENET_STD)
