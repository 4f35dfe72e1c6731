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
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import (
    DRAWN,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_SIZE,
    Device,
    Images,
    Splits,
    digest_of,
    load,
    moved,
    moving,
    report,
    split_parts,
)
from harness import UserError, counted
from harness.readers import (
    MAX_CLASSES,
    MAX_RESIDENT,
    SUFFIXES,
    Parts,
    account,
    blaming,
    check_room,
    decode,
    opened,
    portable,
    read_file,
    say,
    say_levels,
    why_left_out,
)

IGNORED = 255  # in a mask: no class, neither taught nor counted
MAX_JSON = 2**30  # bytes of a file of boxes (COCO's largest has 470 MB)
LISTED = "it is listed: put a readable image there, or list it no longer"
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
    with blaming(path, LISTED), open(path, "rb") as file:
        return decode(file, size, None, whole=True)


def upright_size(path: Path) -> tuple[tuple[int, int], str]:
    """Width and height of an image file as `squashed` sees it, and words for it. Raises what `opened` does."""
    image, turn, (width, height) = opened(path)
    image.close()
    return (width, height), f"{width} x {height}{' once turned as its EXIF says' * (turn is not None)}"


def check_size(path: Path, stated: tuple[float, float], source: str) -> None:
    """Raise UserError where an image has not the width and height that `source` states of it, nor their ratio: then its
    boxes are of another frame."""
    with blaming(path, LISTED):
        (width, height), found = upright_size(path)
    # The sides of an image that was scaled are rounded, each by less than a pixel
    if not abs(width * stated[1] - height * stated[0]) <= max(width + height, sum(stated)):
        claim = f"{source} says that it has {stated[0]:g} x {stated[1]:g} pixels, but it has {found}"
        raise UserError(f"{path}: {claim}; correct its width and height there, and see that its boxes fit")


def read_mask(book: dict[int, tuple[list[int], Path]], paths: tuple[Path, Path], size: int) -> np.ndarray:
    """The file of a mask, and that of its image -> [size, size] uint8, the nearest pixels, upright.

    book: {value: (its colour, in which file)} of palettes seen so far, to which this mask's are added.
    Raises UserError where the first is no mask, or not that image's, or where its palette gives a value another colour."""
    path, image_path = paths
    with blaming(path, "write it again: a PNG of its image's size, grey or with a palette, whose values are classes"):
        mask, turn, mask_size = opened(path, ["PNG"])
        image_size, found = upright_size(image_path)
        if mask.mode not in ("L", "P", "1"):
            raise ValueError(f"its mode is {mask.mode}")
        if mask_size != image_size:
            raise ValueError(f"{mask_size[0]} x {mask_size[1]} pixels, but {image_path} has {found}")
        palette = mask.getpalette() or []
        for value in np.unique(mask).tolist() if palette else ():
            colour = palette[3 * value : 3 * value + 3]
            known, first = book.setdefault(value, (colour, path)) if colour != [value] * 3 else (colour, path)
            if colour != known:
                both = f"its palette has the colour {colour} for the value {value}, that of {first} has {known}"
                raise UserError(f"{path}: {both}; values are classes: write all masks with one palette, or in grey")
        with open(path, "rb") as file:
            bits = file.read(25)[24]  # of a value: PIL spreads grey of fewer than 8 over 0 to 255
        if mask.mode == "L" and bits < 8:
            mask = mask.point([value * (2**bits - 1) // 255 for value in range(256)])
        mask = mask if turn is None else mask.transpose(turn)
        return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST), np.uint8)


def read_all(
    reader: Callable[[Any, int], np.ndarray], files: Sequence, size: int, shape: tuple[int, ...], what: str
) -> np.ndarray:
    """reader(file, size) of each, [N, *shape] uint8, by as many threads as there are cores. Raises UserError."""
    check_room(len(files) * math.prod(shape), what)
    result = np.empty((len(files), *shape), np.uint8)
    pool = ThreadPoolExecutor()
    try:
        found = pool.map(reader, files, itertools.repeat(size))
        for row, pixels in enumerate(tqdm(found, desc=f"reading {what}", total=len(files))):
            result[row] = pixels
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error, or a signal, nothing is waited for
    return result


def masked_folder(root: Path, size: int, ignored: int | None) -> tuple[Parts, list[str], Counter[str]]:
    """{"train": (images, masks, names), "test", and "val" where there are three}, class names, of images/<split>/*.jpg and
    masks/<split>/*.png of the same names (as ADE20K has them: annotations/); and how many files were left out, for each
    reason.

    Values of the masks are classes, but for IGNORED and `ignored`; None: all are. Says on stderr how much is IGNORED.
    Raises UserError."""

    def folder_of(tops: tuple[str, ...], names: tuple[str, ...]) -> Path | None:
        return next((root / top / name for top in tops for name in names if (root / top / name).is_dir()), None)

    parts, book, left_out = {}, {}, Counter()
    for part, names in SPLIT_NAMES.items():
        image_folder, mask_folder = folder_of(("images",), names), folder_of(("masks", "annotations"), names)
        if image_folder is None or mask_folder is None:
            continue
        with blaming(image_folder, "make it readable"):
            there = sorted(image_folder.iterdir(), key=lambda path: (portable(path.name), path.name))
        images = [path for path in there if not why_left_out(path.name)]
        left_out.update(filter(None, (why_left_out(path.name) for path in there)))
        masks = [mask_folder / f"{path.stem}.png" for path in images]
        left_out["masks without an image"] += len(set(mask_folder.glob("*.png")) - set(masks))
        if not images:
            raise UserError(f"{image_folder}: no images ({' '.join(SUFFIXES)}) in it; {account(left_out)}")
        parts[part] = (
            read_all(squashed, images, size, (3, size, size), f"{root}, {part}"),
            read_all(partial(read_mask, book), list(zip(masks, images)), size, (size, size), f"masks, {part}"),
            np.array(masks, str),
        )
        say_levels(image_folder, [os.fsencode(path.name) for path in images])
    parts = with_test(root, parts, "images/train/*.jpg and masks/train/*.png, and the same in val/ or test/")
    return *number_classes(root, parts, ignored), left_out


def number_classes(root: Path, parts: Parts, ignored: int | None) -> tuple[Parts, list[str]]:
    """The values of the masks, {part: (images, masks, files of the masks)}, as classes 0, 1, 2... or IGNORED, and the values
    as names. Raises UserError."""
    none = set() if ignored is None else {IGNORED, ignored}  # values that are no class
    values = [value for value in np.unique(parts["train"][1]).tolist() if value not in none]
    pixels = sum(masks.size for _, masks, _ in parts.values())
    share = sum(np.count_nonzero(masks == IGNORED) for _, masks, _ in parts.values()) / pixels * (IGNORED in none)
    note = f"{100 * share:.3g} % of the masks' pixels have the value {IGNORED}, which is ignored; --ignore none keeps it"
    if not 2 <= len(values) <= IGNORED:
        found = f"{root}: its masks for training show {counted(len(values), 'class', 'classes')}; 2 to {IGNORED} are needed"
        raise UserError(f"{found}; {note}" if share else found)
    known = np.isin(np.arange(256), [*values, *none])
    classes = np.full(256, IGNORED, np.uint8)  # of each value
    classes[values] = np.arange(len(values))
    for _, masks, files in parts.values():
        if not known[masks].all():
            row = (~known[masks]).any((1, 2)).argmax()
            strange = ", ".join(map(str, np.unique(masks[row][~known[masks[row]]])))
            raise UserError(
                f"{files[row]}: the value {strange}, which no mask for training has; correct it, or let --ignore name it"
            )
    if share:
        say(f"data {root}: {note}")
    names = {part: np.array([portable(os.path.basename(file)) for file in files]) for part, (_, _, files) in parts.items()}
    parts = {part: (images, classes[masks], names[part]) for part, (images, masks, _) in parts.items()}
    return parts, [str(value) for value in values]


def with_test(root: Path, parts: Parts, expected: str) -> Parts:
    """The parts, in which val is the test split where there is none. Raises UserError where there is no train, or nothing
    beside it."""
    if "train" not in parts or len(parts) < 2:
        raise UserError(f"{root}: expected {expected}")
    return parts if "test" in parts else {"train": parts["train"], "test": parts["val"]}


# ------------------------------------------------------------------------------------------------------------- boxes


def coco_folder(root: Path, size: int) -> tuple[Parts, list[str], Counter[str]]:
    """{"train": (images, boxes, names), "test", and "val" where there are three}, class names, of
    annotations/instances_<name>.json and the images in <name>/, where <name> begins with train, val or test (as COCO has
    them); and how many files were left out, for each reason.

    A category is its name: the ids of each file are its own. Crowds are left out. Raises UserError."""
    parts, names, left_out = {}, [], Counter()
    for part in SPLIT_NAMES:
        files = sorted((root / "annotations").glob(f"instances_{part}*.json"))
        if not files:
            continue
        if len(files) > 1:
            raise UserError(f"{root / 'annotations'}: {files[0].name} and {files[1].name}; leave one of them")
        with blaming(files[0], "make it a file of boxes as COCO has them"):
            content = json.loads(read_file(files[0], MAX_JSON))
            if not isinstance(content, dict):
                raise UserError("it holds no object with images, annotations and categories, as COCO's files do; give it one")
            names = names or list(coco_names(content).values())
            images, sizes, labels = coco_boxes(content, names, size, files[0])
        folder = root / files[0].stem.removeprefix("instances_")

        def checked(image: tuple[Path, tuple[float, float]], size: int, source: str = files[0].name) -> np.ndarray:
            check_size(*image, source)
            return squashed(image[0], size)

        listed = [(folder / name, stated) for name, stated in zip(images, sizes)]
        parts[part] = read_all(checked, listed, size, (3, size, size), f"{root}, {part}"), labels, np.array(images)
        tops = {Path(image).parts[0] for image in images}
        left_out[f"that {files[0].name} does not list"] = sum(name not in tops for name in os.listdir(folder))
        say_levels(folder, map(os.fsencode, images))
    parts = with_test(
        root, parts, "annotations/instances_train*.json, instances_val*.json and the images in train*/ and val*/"
    )
    return parts, names, left_out


def coco_names(content: dict) -> dict[int | str, str]:
    """{id: name} of the categories, by their ids. Raises UserError and others where there are none, or any twice."""
    named = sorted((category["id"], str(category["name"])) for category in content["categories"])
    if not 1 <= len(named) <= MAX_CLASSES:
        raise UserError(f"it lists {counted(len(named), 'category', 'categories')}; 1 to {MAX_CLASSES} are needed")
    for what, values in zip(("id", "name"), zip(*named)):
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise UserError(f"two of its categories have the {what} {twice[0]!r}; give each its own")
    return dict(named)


def coco_boxes(
    content: dict, names: list[str], size: int, source: Path
) -> tuple[list[str], list[tuple[float, float]], np.ndarray]:
    """File names of the images, the widths and heights that are stated of them, and their boxes [N, M, 5] float32 as
    `Boxed` has them, in pixels of images of this size.

    names: of the classes, in order; source: the file. Boxes are cut off at their image's border, and left out where nothing
    stays; a line on stderr counts them. Raises UserError and others for what is damaged, does not fit together, or leads
    out of the folder."""
    categories, images = coco_names(content), {image["id"]: image for image in content["images"]}
    if len(images) < len(content["images"]):
        raise UserError(
            f"it lists {counted(len(content['images']), 'image')} with {counted(len(images), 'id')}; give each its own"
        )
    sizes = {key: coco_size(image) for key, image in images.items()}
    label_of = {name: label for label, name in enumerate(names)}
    boxes, strange, largest, cut, outside = {key: [] for key in images}, set(), 0.0, [], []
    for number, annotation in enumerate(content["annotations"], 1):
        if annotation.get("iscrowd"):
            continue
        which = f"annotation {annotation.get('id', f'number {number}')}"
        for key, known, kind in (("image_id", images, "image"), ("category_id", categories, "category")):
            if key not in annotation:
                raise UserError(f"{which} has no {key}; add it, or leave the annotation out")
            if annotation[key] not in known:
                problem = f"{which} is of {kind} {annotation[key]!r}, which the file does not list"
                raise UserError(f"{problem}; list it, or leave the annotation out")
        x, y, w, h = finite(annotation.get("bbox"), 4) or (0, 0, -1, -1)
        if w < 0 or h < 0:
            problem = f"{which} has the bbox {annotation.get('bbox')}"
            raise UserError(f"{problem}; it must be left, top, width and height in pixels")
        width, height = sizes[annotation["image_id"]]
        largest = max(largest, x, y, w, h)
        corners = [size * x / width, size * y / height, size * (x + w) / width, size * (y + h) / height]
        name = categories[annotation["category_id"]]
        left, top, right, bottom = within = np.clip(corners, 0, size)
        if name not in label_of:
            strange.add(name)
        elif w > 0 and h > 0 and (left == right or top == bottom):
            outside.append(which)
        else:
            boxes[annotation["image_id"]].append([*within, label_of[name]])
            if np.abs(within - corners).max() > size / max(width, height):  # annotators round: by more than a pixel
                cut.append(which)
    if strange:
        problem = f"it has boxes of {', '.join(sorted(strange)[:9])}, categories that train's file does not have"
        raise UserError(f"{problem} ({', '.join(names[:9])}); name them as there, or leave these boxes out")
    most = max(map(len, boxes.values()), default=0)
    unit = "a bbox is left, top, width and height in pixels of the width and height that are stated"
    if most and largest < 2:  # shares of the image are rounded too, and may be above 1 by a little
        raise UserError(f"no number in its boxes is above {largest:g}; {unit}")
    if outside and not most:
        raise UserError(f"all its boxes are outside of their images, as {outside[0]}; {unit}")
    if not images or not most or most * len(images) > MAX_RESIDENT // 20:
        raise UserError(f"it has {counted(len(images), 'image')}, and up to {counted(most, 'box', 'boxes')} in one")
    if found := cut + outside:
        shares = f"{len(cut)} partly, cut off at the border; {len(outside)} wholly, left out"
        say(f"data {source}: {counted(len(found), 'box', 'boxes')} outside of the image, as {found[0]}: {shares}; {unit}")
    labels = np.full((len(images), most, 5), -1, np.float32)
    for row, found in zip(labels, boxes.values()):
        row[: len(found)] = np.reshape(found, (-1, 5))
    files = [str(image["file_name"]) for image in images.values()]
    for name in files:
        if Path(name).anchor or ".." in Path(name).parts:  # a drive or a root, by itself too
            raise UserError(f"its image {name} would lie out of its folder; give file_name relative to that")
    return files, list(sizes.values()), labels


def coco_size(image: dict) -> tuple[float, float]:
    """Width and height of an image as its file states them. Raises UserError."""
    width, height = image.get("width"), image.get("height")
    stated = finite((width, height), 2)
    if not stated or min(stated) <= 0:
        raise UserError(f"it gives image {image['id']!r} the width {width} and height {height}; give those in pixels")
    return tuple(stated)


def finite(values: object, count: int) -> list[float] | None:
    """So many finite numbers, or None where these are none."""
    try:
        found = list(map(float, values))
    except (TypeError, ValueError, OverflowError):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None


# -------------------------------------------------------------------------------------------------------------- load


def load_dense(
    name: str | Path,
    kind: Literal["masks", "boxes"],
    *,
    image_size: int = 0,
    limit: int = 0,
    val_fraction: float = 0.2,
    seed: int = 0,
    ignored: int | None = IGNORED,
    flip: bool = True,
    crop: bool = True,
    device: Device = "cpu",
) -> Splits:
    """As `data.load`, where images have masks or boxes for labels: Splits of Masked or Boxed.

    name     "shapes", "shapes-stripes", an .npz file with objects, or a folder: for masks as `masked_folder` reads it, for
             boxes as `coco_folder` does; its images are turned upright and squashed into squares. With val/ alone, that is the
             test split, and val is held out of train.
    ignored  value in a folder's masks that is no class, beside 255; None: all values are classes

    Raises UserError for data that is absent, damaged, hostile or does not fit together.
    """
    if not 0 <= image_size <= MAX_SIZE or limit < 0 or not 0 < val_fraction < 1 or ignored not in (None, *range(256)):
        sizes = f"--image-size {image_size} (0 to {MAX_SIZE}), --images {limit}, --val-fraction {val_fraction} (0 to 1)"
        raise UserError(f"{sizes} or --ignore {ignored} (0 to 255, or none) is out of range")
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
        return moving(
            Splits(*splits, names, plain.channels, plain.image_size, plain.mean, plain.std, plain.digest), flip, crop
        )
    if not os.path.isdir(name):
        raise UserError(f"--data {name}: neither shapes nor a folder of images with {kind}, nor an .npz file with objects")
    size, root = image_size or 224, Path(name)
    parts, names, left_out = masked_folder(root, size, ignored) if kind == "masks" else coco_folder(root, size)
    names_of_train = list(map(os.fsencode, parts["train"][2]))
    no_labels = np.zeros(len(names_of_train), np.int64)
    parts = split_parts(parts, no_labels, limit, val_fraction, seed, name, names_of_train)
    splits = (split_class(*parts[s][:2], IMAGENET_MEAN, IMAGENET_STD, device=device) for s in ("train", "val", "test"))
    digest = digest_of(array for split in ("train", "val", "test") for array in parts[split][1:])  # labels and names
    return report(name, moving(Splits(*splits, names, 3, size, IMAGENET_MEAN, IMAGENET_STD, digest), flip, crop), left_out)
