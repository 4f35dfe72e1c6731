"""Images whose labels are masks (the class of every pixel) or boxes around objects: splits as those of data.py.

    splits = load_dense("shapes", "boxes")                 # or a folder
    for images, boxes in splits.train.stream(64, seed=0):  # [64, 3, 32, 32] float32, [64, 1, 5] float32
        ...

As in harness/readers.py, whatever is wrong with a file ends in a `UserError` that names it and says what to do.
"""

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import DRAWN, IMAGENET_MEAN, IMAGENET_STD, MAX_SIZE, Device, Images, Splits, choose, load, moved, report, split_parts
from harness import UserError
from harness.readers import (
    FORMATS,
    MAX_CLASSES,
    MAX_RESIDENT,
    SUFFIXES,
    Parts,
    account,
    blaming,
    check_room,
    decode,
    read_file,
    say_levels,
    why_left_out,
)

IGNORED = 255  # in a mask: no class, neither taught nor counted
MAX_JSON = 2**30  # bytes of a file of boxes (COCO's largest has 470 MB)
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation"), "test": ("test", "testing")}


class Masked(Images):
    """Images whose labels are masks, [N, H, W] uint8: the class of each pixel, or IGNORED."""

    label_dtype = torch.uint8

    def moved_labels(self, labels: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """The masks of images that were moved so; what comes from outside the image is IGNORED."""
        return moved(labels[:, None], top, left, flip, IGNORED)[:, 0]


class Boxed(Images):
    """Images whose labels are boxes, [N, M, 5] float32: left, top, right, bottom (pixels), class. Class -1: no box."""

    label_dtype = torch.float32

    def moved_labels(self, labels: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """The boxes of images that were moved so, cut off at the border; one of which nothing is left has class -1."""
        size = self.images.shape[-1]
        shift = torch.stack([left, top], dim=1).repeat(1, 2)[:, None] - size // 8  # [B, 1, 4]
        corners = (labels[..., :4] - shift).clamp(0, size)
        mirrored = torch.stack([size - corners[..., 2], corners[..., 1], size - corners[..., 0], corners[..., 3]], dim=-1)
        corners = torch.where(flip[:, None, None], mirrored, corners)
        inside = ((corners[..., 2:] - corners[..., :2]) >= 1).all(-1)  # a pixel's breadth of it at least is left
        return torch.cat([corners, torch.where(inside, labels[..., 4], -1)[..., None]], dim=-1)


def tightest_boxes(objects: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The tightest box around each object: [N, H, W] bool and labels [N] -> [N, 1, 5]; class -1 where there is no object."""

    def ends(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [N, H] -> first that is true, and behind the last
        return lines.argmax(1), lines.shape[1] - lines[:, ::-1].argmax(1)

    (left, right), (top, bottom) = ends(objects.any(1)), ends(objects.any(2))
    labels = np.where(objects.any((1, 2)), labels, -1)
    return np.stack([left, top, right, bottom, labels], axis=1)[:, None]


# -------------------------------------------------------------------------------------------------- images and masks


def squashed(path: Path, size: int) -> np.ndarray:
    """An image file -> [3, size, size] uint8, all of it. Raises UserError."""
    with blaming(path, "it is listed: put a readable image there, or list it no longer"), open(path, "rb") as file:
        return decode(file, size, None, whole=True)


def read_mask(paths: tuple[Path, Path], size: int) -> np.ndarray:
    """The file of a mask, and that of its image -> [size, size] uint8, the nearest pixels.

    Raises UserError where the first is no mask, or not that image's."""
    path, image_path = paths
    with blaming(path, "write it again: a PNG of its image's size, grey or with a palette, whose values are classes"):
        with Image.open(image_path, formats=list(FORMATS)) as image, Image.open(path, formats=["PNG"]) as mask:
            if mask.mode not in ("L", "P", "1"):
                raise ValueError(f"its mode is {mask.mode}")
            if mask.size != image.size:
                found, wanted = (f"{width} x {height}" for width, height in (mask.size, image.size))
                raise ValueError(f"{found} pixels, but {image_path} has {wanted}")
            return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST), np.uint8)


def read_all(
    reader: Callable[[Any, int], np.ndarray], files: Sequence, size: int, shape: tuple[int, ...], what: str
) -> np.ndarray:
    """reader(file, size) of each, [N, *shape] uint8, by as many threads as there are cores. Raises UserError."""
    check_room(len(files) * math.prod(shape), what)
    result = np.empty((len(files), *shape), np.uint8)
    with ThreadPoolExecutor() as pool:
        found = pool.map(reader, files, itertools.repeat(size))
        for row, pixels in enumerate(tqdm(found, desc=f"reading {what}", total=len(files))):
            result[row] = pixels
    return result


def masked_folder(root: Path, size: int, ignored: int) -> tuple[Parts, list[str], Counter[str]]:
    """{"train": (images, masks), "test", and "val" where there are three}, class names, of images/<split>/*.jpg and
    masks/<split>/*.png of the same names (as ADE20K has them: annotations/); and how many files were left out, for each
    reason.

    Values of the masks are classes, but for IGNORED and `ignored`. Raises UserError."""

    def folder_of(tops: tuple[str, ...], names: tuple[str, ...]) -> Path | None:
        return next((root / top / name for top in tops for name in names if (root / top / name).is_dir()), None)

    parts, left_out = {}, Counter()
    for part, names in SPLIT_NAMES.items():
        image_folder, mask_folder = folder_of(("images",), names), folder_of(("masks", "annotations"), names)
        if image_folder is None or mask_folder is None:
            continue
        with blaming(image_folder, "make it readable"):
            there = sorted(image_folder.iterdir())
        images = [path for path in there if not why_left_out(path.name)]
        left_out.update(filter(None, (why_left_out(path.name) for path in there)))
        masks = [mask_folder / f"{path.stem}.png" for path in images]
        left_out["masks without an image"] += len(set(mask_folder.glob("*.png")) - set(masks))
        if not images:
            raise UserError(f"{image_folder}: no images ({' '.join(SUFFIXES)}) in it; {account(left_out)}")
        parts[part] = (
            read_all(squashed, images, size, (3, size, size), f"{root}, {part}"),
            read_all(read_mask, list(zip(masks, images)), size, (size, size), f"masks, {part}"),
        )
        say_levels(image_folder, map(os.fsencode, images))
    parts = with_test(root, parts, "images/train/*.jpg and masks/train/*.png, and the same in val/ or test/")
    return *number_classes(root, parts, ignored), left_out


def number_classes(root: Path, parts: Parts, ignored: int) -> tuple[Parts, list[str]]:
    """The values of the masks as classes 0, 1, 2... or IGNORED, and the values as names. Raises UserError."""
    values = [value for value in np.unique(parts["train"][1]) if value not in (IGNORED, ignored)]
    if len(values) < 2:
        raise UserError(f"{root}: its masks for training show {len(values)} classes; at least 2 are needed")
    known = np.isin(np.arange(256), [*values, IGNORED, ignored])
    classes = np.full(256, IGNORED, np.uint8)  # of each value
    classes[values] = np.arange(len(values))
    for part, (_, masks) in parts.items():
        if not known[masks].all():
            problem = f"masks of {part} have the value {masks[~known[masks]][0]}, those of train do not"
            raise UserError(f"{root}: {problem}; remove it, or let --ignore name it")
    return {part: (images, classes[masks]) for part, (images, masks) in parts.items()}, [str(value) for value in values]


def with_test(root: Path, parts: Parts, expected: str) -> Parts:
    """The parts, in which val is the test split where there is none. Raises UserError where there is no train, or nothing
    beside it."""
    if "train" not in parts or len(parts) < 2:
        raise UserError(f"{root}: expected {expected}")
    return parts if "test" in parts else {"train": parts["train"], "test": parts["val"]}


# ------------------------------------------------------------------------------------------------------------- boxes


def coco_folder(root: Path, size: int) -> tuple[Parts, list[str], Counter[str]]:
    """{"train": (images, boxes), "test", and "val" where there are three}, class names, of annotations/instances_<name>.json
    and the images in <name>/, where <name> begins with train, val or test (as COCO has them); and how many files were left
    out, for each reason.

    Crowds are left out. Raises UserError."""
    parts, names, left_out = {}, {}, Counter()
    for part in SPLIT_NAMES:
        files = sorted((root / "annotations").glob(f"instances_{part}*.json"))
        if not files:
            continue
        if len(files) > 1:
            raise UserError(f"{root / 'annotations'}: {files[0].name} and {files[1].name}; leave one of them")
        with blaming(files[0], "fetch it again from its source"):
            content = json.loads(read_file(files[0], MAX_JSON))
            names = names or coco_names(content)
            images, labels = coco_boxes(content, {key: label for label, key in enumerate(names)}, size)
        folder = root / files[0].stem.removeprefix("instances_")
        parts[part] = (
            read_all(squashed, [folder / image for image in images], size, (3, size, size), f"{root}, {part}"),
            labels,
        )
        listed = {Path(image).parts[0] for image in images}
        left_out[f"that {files[0].name} does not list"] = sum(name not in listed for name in os.listdir(folder))
        say_levels(folder, map(os.fsencode, images))
    parts = with_test(
        root, parts, "annotations/instances_train*.json, instances_val*.json and the images in train*/ and val*/"
    )
    return parts, list(names.values()), left_out


def coco_names(content: dict) -> dict[int | str, str]:
    """{id: name} of the categories, by their ids. Raises ValueError and others where there are none, or ids twice."""
    named = sorted((category["id"], str(category["name"])) for category in content["categories"])
    if not 1 <= len(dict(named)) == len(named) <= MAX_CLASSES:
        raise ValueError(f"{len(named)} categories, {len(dict(named))} of them with ids of their own")
    return dict(named)


def coco_boxes(content: dict, classes: dict[int | str, int], size: int) -> tuple[list[str], np.ndarray]:
    """File names of the images, and their boxes [N, M, 5] float32 as `Boxed` has them, in pixels of images of this size.

    classes: {id of a category: class}. Raises ValueError and others for what is damaged, or leads out of the folder."""
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
    return names, labels


# -------------------------------------------------------------------------------------------------------------- load


def load_dense(
    name: str | Path,
    kind: Literal["masks", "boxes"],
    *,
    image_size: int = 0,
    limit: int = 0,
    val_fraction: float = 0.2,
    seed: int = 0,
    ignored: int = IGNORED,
    device: Device = "cpu",
) -> Splits:
    """As `data.load`, where images have masks or boxes for labels: Splits of Masked or Boxed.

    name     "shapes", "shapes-stripes", an .npz file with objects, or a folder: for masks as `masked_folder` reads it, for
             boxes as `coco_folder` does; its images are squashed into squares. With val/ alone, that is the test split, and
             val is held out of train.
    ignored  value in a folder's masks that is no class, beside 255

    Raises UserError for data that is absent, damaged, hostile or does not fit together.
    """
    if not 0 <= image_size <= MAX_SIZE or limit < 0 or not 0 < val_fraction < 1 or not 0 <= ignored < 256:
        sizes = f"--image-size {image_size} (0 to {MAX_SIZE}), --images {limit}"
        raise UserError(f"{sizes}, --val-fraction {val_fraction} (0 to 1) or --ignore {ignored} (0 to 255) is out of range")
    split_class, name = {"masks": Masked, "boxes": Boxed}[kind], str(name)
    if name in DRAWN or os.path.isfile(name):
        plain = load(name, "", image_size=image_size, limit=limit, val_fraction=val_fraction, seed=seed)
        splits, names = [], ["background", *plain.class_names] if kind == "masks" else plain.class_names
        if plain.train.objects is None:
            raise UserError(f"{name} does not say where its objects are: it needs train_objects and test_objects")
        if kind == "masks" and len(names) > IGNORED:
            raise UserError(f"{name} has {len(names)} classes with the background's; masks hold {IGNORED}")
        for split in (plain.train, plain.val, plain.test):
            objects, labels = split.objects.numpy(), split.labels.numpy()
            labels = objects * (1 + labels[:, None, None]) if kind == "masks" else tightest_boxes(objects, labels)
            splits.append(split_class(split.images, labels, plain.mean, plain.std, device=device))
        return Splits(*splits, names, plain.channels, plain.image_size, plain.mean, plain.std)
    if not os.path.isdir(name):
        raise UserError(f"--data {name}: neither shapes nor a folder of images with {kind}, nor an .npz file with objects")
    size, root = image_size or 224, Path(name)
    parts, names, left_out = masked_folder(root, size, ignored) if kind == "masks" else coco_folder(root, size)
    kept = choose(np.zeros(len(parts["train"][0]), np.int64), limit, seed, name)
    parts = split_parts(parts, kept, val_fraction, seed)
    splits = (split_class(*parts[s], IMAGENET_MEAN, IMAGENET_STD, device=device) for s in ("train", "val", "test"))
    return report(name, Splits(*splits, names, 3, size, IMAGENET_MEAN, IMAGENET_STD), left_out)
