"""Files that nobody vouches for, read into arrays: images, folders of images, CIFAR's archives and .npz files.

Nothing in a file is executed, no size that a file claims is believed before it is checked, and whatever is wrong with a
file ends in a `UserError` that names it and says what to do. `data.py` makes splits and batches of these arrays.
"""

import hashlib
import io
import math
import os
import pickletools
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import unicodedata
import urllib.request
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError, features
from tqdm import tqdm

from harness import UserError, counted, printable
from harness.files import replace
from harness.processes import after_parent, heed_parent_alone, rank
from harness.randomness import numpy_generator
from harness.signals import SIGNALS

MAX_FILE = 2**28  # bytes of one CIFAR file (the largest has 155 MB)
MAX_RESIDENT = 2**35  # bytes of images kept in memory
MAX_CLASSES = 100_000
Key = tuple[int, ...]  # of a random generator
Parts = dict[str, tuple[np.ndarray, ...]]  # of each split: images [N, C, H, W] uint8, labels, and what else it has


QUIET = {"lock": threading.Lock(), "inside": 0, "filters": None}  # filters: as they were, while some are inside


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings meanwhile, in any thread: PIL has some about odd metadata and palettes, and about bombs, which are refused
    here. The filters are the process's: the first who enters saves them, the last who leaves puts them back."""
    with QUIET["lock"]:
        if not QUIET["inside"]:
            QUIET["filters"] = warnings.catch_warnings()
            QUIET["filters"].__enter__()
            warnings.simplefilter("ignore")
        QUIET["inside"] += 1
    try:
        yield
    finally:
        with QUIET["lock"]:
            QUIET["inside"] -= 1
            if not QUIET["inside"]:
                QUIET["filters"].__exit__(None, None, None)


@contextmanager
def blaming(path: str | Path, remedy: str) -> Iterator[None]:
    """Turn whatever goes wrong with this file into a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}; {remedy}") from None
    except Exception as error:  # damaged files raise what they like: ValueError, KeyError, zlib.error, MemoryError...
        raise UserError(f"{path}: {in_words(error)}; {remedy}") from None


def in_words(error: Exception, problem: str = "cannot be used") -> str:
    """What was found in a file whose reading ended so; the exception's own name only where there are no words."""
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        return f"it has no {error.args[0]!r}"
    name = "" if type(error) is ValueError and str(error) else f"{type(error).__name__}: "
    return f"{problem} ({name}{str(error)[:200]})"


def read_file(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most so many. Raises OSError, ValueError."""
    if not path.is_file():  # a pipe would block
        raise OSError("no such file")
    with open(path, "rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"more than {most} bytes")
    return raw


@cache
def say(line: str) -> None:
    """One line about the data on stderr: from the first process alone, and once however often the data is loaded."""
    if rank() == 0:
        print(printable(line), file=sys.stderr)


def check_room(size: int, name: str) -> None:
    """Raise UserError where so many bytes of images are too many to keep in memory."""
    if size > MAX_RESIDENT:
        raise UserError(f"--data {name}: {size} bytes of images are too many to keep in memory; use a smaller --image-size")


# ------------------------------------------------------------------------------------------------------ image files

FORMATS = {"JPEG": ".jpg .jpeg .jpe .jfif", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif"}
FORMATS |= {"PPM": ".ppm .pgm .pbm .pnm", "TIFF": ".tif .tiff"}
FORMATS |= {"AVIF": ".avif"} if "avif" in features.get_supported_modules() else {}
SUFFIXES = tuple(" ".join(FORMATS.values()).split())


def crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """(left, top, width, height) of a random crop as MAE's RandomResizedCrop: 20 to 100 % of the area, 3/4 to 4/3 in ratio."""
    for _ in range(10):
        area, ratio = width * height * rng.uniform(0.2, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, width - w + 1), rng.integers(0, height - h + 1), w, h
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)  # a very long image: its middle
    return (width - w) / 2, (height - h) / 2, w, h


TURNS = {  # EXIF's orientation: what makes such an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def opened(
    file: str | Path | BinaryIO | Image.Image, formats: Iterable[str] = FORMATS
) -> tuple[Image.Image, Image.Transpose | None, tuple[int, int]]:
    """An image as it is stored, what makes it upright, and the width and height that it has then. A JPEG is not decoded yet.

    Raises whatever PIL raises where it cannot, and ValueError for decompression bombs."""
    with quiet():
        try:
            image = file.copy() if isinstance(file, Image.Image) else Image.open(file, formats=list(formats))
        except UnidentifiedImageError:  # whose words show an object
            raise ValueError(f"it does not begin as a whole {' or '.join(formats)} does") from None
        width, height = image.size
        if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"{width} x {height} pixels are too many")
        if image.format in ("PNG", "TIFF"):
            image.load()  # a PNG may say it behind its pixels; of a TIFF, PIL turns them itself
        try:
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        except Exception:  # metadata that cannot be read says nothing; PIL raises what it likes
            turn = None
    quarter = turn in [TURNS[number] for number in (5, 6, 7, 8)]
    return image, turn, image.size[::-1] if quarter else image.size


def in_colour(image: Image.Image) -> Image.Image:
    """An image as RGB: white is behind what is transparent, whose own colour nobody sees. Where all is, that means nothing."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][1] > 0:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode(
    file: str | Path | BinaryIO,
    size: int,
    rng: np.random.Generator | None,
    whole: bool = False,
    flip: bool = True,
    crop: bool = True,
) -> np.ndarray:
    """One image file -> [3, size, size] uint8: with `rng`, and where `crop` and `flip` say so, cropped and flipped at random;
    else the middle 224/256 of it.

    It is upright, as its EXIF says. With `whole`, all of it, squashed into the square. Raises whatever PIL raises where it
    cannot, and ValueError for decompression bombs.
    """
    return pixels_of(*opened(file), size, rng, whole, flip, crop)


def pixels_of(
    image: Image.Image,
    turn: Image.Transpose | None,
    upright: tuple[int, int],
    size: int,
    rng: np.random.Generator | None,
    whole: bool,
    flip: bool = True,
    crop: bool = True,
) -> np.ndarray:
    """`decode`, of what `opened` returns."""
    width, height = upright
    with quiet():
        w = h = min(width, height) * 224 / 256
        left, top = (width - w) / 2, (height - h) / 2
        if whole:
            left, top, w, h = 0, 0, width, height
        elif rng:
            box = crop_box(width, height, rng)
            left, top, w, h = box if crop else (left, top, w, h)
        # JPEGs decode at 1/2, 1/4 or 1/8 for less work: the smallest that still gives the crop `size` pixels
        wanted = max(1, int(width * size / w)), max(1, int(height * size / h))
        image.draft(None, wanted if image.size == (width, height) else wanted[::-1])
        if image.mode.startswith("I"):  # 16-bit grey
            values, clear = np.asarray(image), image.info.get("transparency")
            image = Image.fromarray((values // 256).clip(0, 255).astype(np.uint8))
            if isinstance(clear, int):
                image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        image = in_colour(image)
        if turn is not None:
            image = image.transpose(turn)
        x, y = image.width / width, image.height / height  # what draft made of the size
        box = left * x, top * y, min((left + w) * x, image.width), min((top + h) * y, image.height)
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    if rng and rng.random() < 0.5 and flip:
        pixels = pixels[:, ::-1]
    return pixels.transpose(2, 0, 1)


def picture(source: Path | Image.Image, size: int, channels: int) -> np.ndarray:
    """An image file, or an image of PIL's, as [size, size, channels] uint8: whole where it has this very size, else its middle
    as `decode` cuts it. Raises what `decode` raises."""
    image, turn, upright = opened(source)
    pixels = pixels_of(image, turn, upright, size, None, whole=upright == (size, size)).transpose(1, 2, 0)
    if pixels.max() <= BLACK and image.mode[0] in "IF" and (values := np.asarray(image)).max() > 0:
        most = 255 if image.mode == "F" else 65535
        found = f"its values, from {values.min():g} to {values.max():g}, are read as from 0 to {most}, and so are black"
        raise UserError(f"{found}; scale them, to 0 to 255 in 8 bits")
    return pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


# --------------------------------------------------------------------------------------- folders, and their decoding


HOUSEKEEPING = {"__macosx", "__pycache__", "@eadir", "@recycle", "@tmp", "#recycle", "$recycle.bin", "lost+found"}
HOUSEKEEPING |= {"system volume information"}


def portable(path: str) -> str:
    """A path as it reads on every system: with / between folders, and an accent and its letter in one character, which
    macOS may write as two."""
    return unicodedata.normalize("NFC", path.replace(os.sep, "/"))


def is_housekeeping(folder: str) -> bool:
    """Whether a folder of this name is what systems and editors keep for themselves, copies of images included."""
    return folder[0] == "." or folder.lower() in HOUSEKEEPING


def why_left_out(name: str) -> str:
    """Why a file of this name is no image of a data set, as `account` says it; "" where it is one."""
    suffix = os.path.splitext(name)[1].lower()
    if name[0] == ".":
        return "with a dot in front"
    return "" if suffix in SUFFIXES else f"*{suffix}" if suffix else "without a suffix"


def account(left_out: Counter[str]) -> str:
    """How many files were left out, and why, in words; the most frequent reasons first."""
    reasons, count = (+left_out).most_common(), left_out.total()
    words = [f"{number} {reason}" for reason, number in reasons[:8]]
    if reasons[8:]:
        words.append(f"{sum(number for _, number in reasons[8:])} for other reasons")
    return f"{counted(count, 'file')} left out: {', '.join(words)}" if count else "no files left out"


def list_images(
    root: str, part: str, class_names: list[str] | None = None
) -> tuple[list[str], np.ndarray, np.ndarray, Counter[str]]:
    """The images in root/part/<class>/ at any depth, in an order that every system gives: class names (`portable`), paths
    relative to root [N] bytes, labels [N] int64; and how many files were left out, for each reason.

    Folders of housekeeping are left out. Links to folders inside a class are not followed (they may go round in circles).
    Raises UserError where there are no images, fewer than two classes, or a class beside `class_names`, if those are given.
    """
    here, left_out = os.path.join(root, part), Counter()
    with blaming(here, "make it readable"):
        names, paths, labels = [], [], []
        for entry in entries(here):
            if not entry.is_dir():
                left_out[why_left_out(entry.name) or "beside the class folders"] += 1
            elif is_housekeeping(entry.name):
                left_out[f"in {entry.name}/"] += files_in(entry)
            else:
                names.append(entry.name)
        if class_names is None and not 2 <= len(names) <= MAX_CLASSES:
            found = counted(len(names), "class folder")
            found += f"; images are expected in {part}/<class>/, for 2 to {MAX_CLASSES} classes"
            raise UserError(f"{here}: {found} ({account(left_out)})")
        kinds = list(map(portable, names))
        if twice := [name for name, count in Counter(kinds).items() if count > 1]:
            raise UserError(f"{here}: two folders have the name {twice[0]}, written in two ways; put their images into one")
        class_names = class_names or kinds
        label_of = {name: label for label, name in enumerate(class_names)}
        if strange := [name for name in kinds if name not in label_of]:
            found = f"{len(strange)} of {len(names)} folders have names that train/ does not have ({first_of(strange)})"
            expected = f"images are expected in {part}/<class>/, by train/'s names ({first_of(class_names)})"
            raise UserError(f"{here}: {found}; {expected}")
        for name, kind in zip(names, kinds):
            found, more = images_within(root, os.path.join(part, name))
            if not found:
                empty = f"a class folder without images ({' '.join(SUFFIXES)}; {account(more)})"
                raise UserError(f"{os.path.join(here, name)}: {empty}; add some, or move the folder out of {part}/")
            paths += found
            labels += [label_of[kind]] * len(found)
            left_out += more
    if not paths:
        raise UserError(f"{here}: no class folders; images are expected in {part}/<class>/ ({account(left_out)})")
    return class_names, np.array(paths), np.array(labels, np.int64), left_out


def list_any(root: str) -> tuple[np.ndarray, Counter[str]]:
    """The images in a folder at any depth, as paths relative to it [N] bytes, by name; and how many files were left out, for
    each reason, as `list_images` leaves them out. Raises UserError where it cannot be read."""
    with blaming(root, "make it readable"):
        found, left_out = images_within(root, "")
    return np.array(sorted(found, key=lambda path: (portable(os.fsdecode(path)), path))), +left_out


def images_within(root: str, folder: str) -> tuple[list[bytes], Counter[str]]:
    """The images in root/folder at any depth, as paths relative to root, in an order that every system gives; and how many
    files were left out, for each reason. Folders of housekeeping are left out, and links to folders, which may go round in
    circles. Raises OSError."""
    paths, left_out, todo = [], Counter(), [folder]
    while todo:
        folder = todo.pop()
        for entry in entries(os.path.join(root, folder)):
            if entry.is_dir(follow_symlinks=False):
                if is_housekeeping(entry.name):
                    left_out[f"in {entry.name}/"] += files_in(entry)
                else:
                    todo.append(os.path.join(folder, entry.name))
            elif entry.is_symlink() and os.path.isdir(entry.path):
                left_out["that are links to folders"] += 1
            elif reason := why_left_out(entry.name):
                left_out[reason] += 1
            elif entry.is_file():
                paths.append(os.fsencode(os.path.join(folder, entry.name)))
            else:
                left_out["that are pipes or broken links"] += 1
    return paths, left_out


def entries(folder: str) -> list[os.DirEntry]:
    """What is in a folder, in an order that every system gives. Raises OSError."""
    return sorted(os.scandir(folder), key=lambda entry: (portable(entry.name), entry.name))


def files_in(folder: os.DirEntry) -> int:
    """How many files there are in a folder of housekeeping."""
    return sum(len(files) for *_, files in os.walk(folder.path))


def first_of(names: list[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


LOOKED_AT = 64  # images whose values are looked at
FEW_LEVELS = 64  # of 256: so few are worth a line
BLACK = 2  # levels, which nobody can tell apart


def say_levels(root: str | Path, paths: Iterable[bytes], looks: int = LOOKED_AT) -> None:
    """Say in a line where images have few of the 256 levels that `decode` makes of them: a file tells what its values could
    be, not what they are. So many of the PNGs and TIFFs are looked at; paths are relative to root.

    Raises UserError where all images are such files, and what is left of them, all of them, is black."""
    paths = list(paths)
    told = [path for path in paths if path.lower().endswith((b".png", b".tif", b".tiff"))]
    numbers = np.linspace(0, len(told) - 1, min(looks, len(told))).astype(int)
    found = {True: [], False: []}  # of more than 8 bits a value, or not: levels, highest and lowest value, white, and path
    for path in (os.fsdecode(told[number]) for number in numbers):
        with warnings.catch_warnings(), suppress(Exception):  # what cannot be decoded is told where it is needed
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(os.path.join(root, path), formats=list(FORMATS)) as image:
                deep = image.mode[0] in "IF" or ";16" in str(image.tile)
                white = 65535 if deep and image.mode != "F" else 255
                if not deep and max(found[False], default=(0,))[0] > FEW_LEVELS:
                    continue  # a bright one is enough, as most are
                if image.mode[0] in "IF":
                    pixels = np.asarray(image).astype(np.float64)
                    low, high = pixels.min(), pixels.max()
                else:
                    pixels = np.asarray(in_colour(image))
                    low, high = int(pixels.min()), int(pixels.max())
                    low, high = (256 * low, 256 * high + 255) if deep else (low, high)  # of 16 bits PIL keeps the higher 8
            found[deep].append((int(np.clip(high, 0, white) * 256 // (white + 1)) + 1, high, low, white, path))
    for deep, some in found.items():
        levels, high, low, white, path = max(some, default=(256, 0, 0, 0, ""))
        low = min((each[2] for each in some), default=0)
        outside = low < 0 or high > white
        if levels <= FEW_LEVELS or outside:
            kind = f"{counted(len(some), 'image')}{' of more than 8 bits' * deep}, as {path},"
            about = f"{root}: {kind} with values from {low:g} to {high:g}, and {white} is taken for white"
            left = f"at most {levels} of 256 levels are left{', and what lies outside is cut off' if outside else ''}"
            mend = f"write them again with values from 0 to {white}"
            if levels <= BLACK and len(some) == len(numbers) and len(told) == len(paths):
                if len(numbers) < len(told):  # most of them may be black, and the rest as they should be
                    return say_levels(root, paths, len(told))
                raise UserError(f"{about}: {left}; {mend}")
            say(f"data {about}: {left}; if that is wrong, {mend}")


class Files(NamedTuple):
    """All that a worker process needs to know. A list of millions of paths is one array, cheap to share and to send."""

    root: str
    size: int  # pixels of a side
    skip_corrupt: bool  # use the next image in place of one that cannot be decoded
    paths: dict[str, np.ndarray]  # of each split: [N] bytes, relative to root
    labels: dict[str, np.ndarray]  # of each split: [N] int64
    flip: bool = True  # whether a random key mirrors
    crop: bool = True  # whether it cuts a piece out

    def batch(self, split: str, indices: np.ndarray, keys: list[Key] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """images [B, 3, size, size] uint8, labels [B] int64; each cropped and flipped by its random key, unless keys is None.

        Raises UserError for an image that cannot be decoded."""
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        labels = torch.empty(len(indices), dtype=torch.int64)
        for j, i in enumerate(indices):
            labels[j] = self.read(split, int(i), keys[j] if keys else None, images[j].numpy())
        return images, labels

    def read(self, split: str, first: int, key: Key | None, out: np.ndarray) -> int:
        """Decode image `first` into out, or if that cannot be decoded and is to be skipped, the next that can; its label."""
        count = len(self.labels[split])
        for i in ((first + k) % count for k in range(count)):
            path = os.path.join(self.root, os.fsdecode(self.paths[split][i]))
            with blaming(path, "it was there when the folder was listed: restore it, or start again"):
                file = open(path, "rb")
            try:
                with file:
                    out[:] = decode(file, self.size, numpy_generator(*key) if key else None, flip=self.flip, crop=self.crop)
                return self.labels[split][i]
            except MemoryError:
                raise
            except Exception as error:
                if not self.skip_corrupt or getattr(error, "errno", None):  # the disk's fault, not the file's
                    reason = in_words(error, "not a readable image")
                    remedy = (
                        "put a readable one there, or start a run with --skip-corrupt, which uses the next image in its place"
                    )
                    raise UserError(f"{path}: {reason}; {remedy}") from None
        raise UserError(f"{self.root}: none of the {count} images of the {split} split can be decoded")


PIECE = 64  # images that a worker decodes at a time


class Decoder:
    """Decodes batches of Files: here, or where there are workers, in that many processes, and ahead of need by two PIECEs for
    each of them, or by a batch, which may be more: a piece that waits takes memory and an open file."""

    def __init__(self, files: Files, workers: int = 0):
        self.files, self.ahead = files, 2 * workers
        processes = min(workers, 61) if sys.platform == "win32" else workers  # Windows waits for no more
        self.executor = ProcessPoolExecutor(processes, initializer=start_worker, initargs=(files,)) if workers else None

    def decoded(
        self, split: str, requests: Iterable[tuple[np.ndarray, list[Key] | None]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`Files.batch` of each (indices [B], random keys or None), in order. Raises UserError as that does, and where a
        worker dies."""
        if not self.executor:
            yield from (self.files.batch(split, indices, keys) for indices, keys in requests)
            return
        made = []
        for images, labels, is_last in self.pieces(split, requests):
            made.append((images, torch.from_numpy(labels)))
            if is_last:
                yield made[0] if len(made) == 1 else tuple(map(torch.cat, zip(*made)))
                made = []

    def pieces(
        self, split: str, requests: Iterable[tuple[np.ndarray, list[Key] | None]]
    ) -> Iterator[tuple[torch.Tensor, np.ndarray, bool]]:
        """What workers make of each piece of the requests, in order, and whether its batch ends with it."""
        pending = deque()
        try:
            for indices, keys in requests:
                ahead = max(self.ahead, math.ceil(len(indices) / PIECE))
                for start in range(0, max(1, len(indices)), PIECE):
                    piece, end = slice(start, start + PIECE), start + PIECE >= len(indices)
                    pending.append((self.executor.submit(work, split, indices[piece], keys and keys[piece]), end))
                    if len(pending) > ahead:
                        future, end = pending.popleft()
                        yield *future.result(), end
            while pending:
                future, end = pending.popleft()
                yield *future.result(), end
        except UserError as error:
            raise UserError(str(error)) from None  # without the worker's traceback
        except (RuntimeError, OSError) as error:  # BrokenProcessPool is a RuntimeError
            problem = f"a process that decodes images died or ran out of memory ({error})"
            remedy = "close other programs, make more room in /dev/shm, or start a run with fewer --workers (0: none)"
            raise UserError(f"{self.files.root}: {problem}; {remedy}") from None
        finally:
            for future, _ in pending:
                future.cancel()


files_here: Files  # in a worker process alone, which is told of them once


def start_worker(files: Files) -> None:
    """What a worker process does first."""
    global files_here
    files_here = files
    torch.set_num_threads(1)
    for number in {*SIGNALS} - {signal.SIGTERM}:  # a terminal's are the main process's business
        signal.signal(number, signal.SIG_IGN)
    heed_parent_alone()
    after_parent(lambda: os._exit(1))


def work(split: str, indices: np.ndarray, keys: list[Key] | None) -> tuple[torch.Tensor, np.ndarray]:
    """`Files.batch`, in a worker process: the images in shared memory, and the labels, which are too few for it."""
    images, labels = files_here.batch(split, indices, keys)
    return images, labels.numpy()


# ------------------------------------------------------------------------------------------------------------ pickles

ARRAY_PARTS = {"_codecs.encode", "numpy.ndarray", "numpy.dtype"} | {
    f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray._reconstruct", "numeric._frombuffer")
}


class Stub:
    """Stands for an object that unpickling would have built: its name, arguments and state. Nothing is run."""

    def __init__(self, name: str, args: tuple = ()):
        self.name, self.args, self.state = name, args, None


def as_text(value: object) -> object:
    """Bytes as str of code points 0 to 255; all else as it is."""
    return value.decode("latin-1") if isinstance(value, bytes) else value


def unpickle(raw: bytes) -> object:
    """The value of a pickle that holds dicts, lists, tuples, strings, small numbers and arrays (as Stubs). Runs nothing.

    It reads the opcodes itself (protocols 2 to 5): an unpickler can be made to allocate without bound even if its `find_class`
    is replaced. Python 2's strings become str of code points 0 to 255; so do the keys of dicts. Raises UserError for a pickle
    that asks for anything to be run or built but arrays, and other exceptions for a damaged one.
    """
    stack, marks, memo, room = [], [], {}, len(raw)

    def pop_to_mark() -> list:
        items = stack[marks[-1] :]
        del stack[marks.pop() :]
        return items

    for number, (opcode, value, _) in enumerate(pickletools.genops(raw)):
        if number > 500_000:  # CIFAR-100 has 200,000
            raise ValueError("too many opcodes")
        match opcode.name:
            case "BININT" | "BININT1" | "BININT2" | "SHORT_BINSTRING" | "BINSTRING" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(value)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8" | "NONE":
                stack.append(value)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if value is None else value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
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
                if not all(isinstance(key, str | bytes) and len(key) < 1000 for key in items[::2]):
                    raise ValueError("a key that is no short string")  # nested tuples can take for ever to hash
                keys = [as_text(key) for key in items[::2]]
                dict.update(stack[-1], zip(keys, items[1::2], strict=True))
            case "GLOBAL" | "STACK_GLOBAL":
                name = value.replace(" ", ".") if value else str.join(".", [stack.pop(), stack.pop()][::-1])
                if name not in ARRAY_PARTS:
                    raise UserError(f"refused: the file asks to run {name}; fetch the data from its source")
                stack.append(Stub(name))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                encoded = function.name == "_codecs.encode"  # how Python 3 writes bytes in protocol 2
                room -= len(args[0]) if encoded else 0
                if room < 0:
                    raise ValueError("more bytes than the file has")
                stack.append(args[0].encode("latin-1") if encoded else Stub(function.name, args))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case "STOP":
                return stack.pop()
            case other if other not in ("PROTO", "FRAME"):
                remedy = "fetch the data from its source"
                raise UserError(f"refused: the file asks for {other}, which arrays do not need; {remedy}")


def pickled_pixels(stub: Stub) -> np.ndarray:
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


# -------------------------------------------------------------------------------------------------------------- CIFAR


class Layout(NamedTuple):
    """One of the forms in which CIFAR is published at https://www.cs.toronto.edu/~kriz/cifar.html."""

    folder: str
    archive: str
    md5: str  # of the archive
    train: list[str]
    test: str
    meta: str  # file of class names
    names: str  # key of the class names in it, where it is a pickle
    labels: str | int  # key of the labels, where files are pickles; else which of the bytes before an image is its label
    classes: int
    before: int = 0  # bytes before an image, where files are records

    @property
    def files(self) -> list[str]:
        """All that its folder holds."""
        return [*self.train, self.test, self.meta]


URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {
    "cifar10": [
        Layout(
            folder="cifar-10-batches-py",
            archive="cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            train=[f"data_batch_{i}" for i in range(1, 6)],
            test="test_batch",
            meta="batches.meta",
            names="label_names",
            labels="labels",
            classes=10,
        ),
        Layout(
            folder="cifar-10-batches-bin",
            archive="cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            train=[f"data_batch_{i}.bin" for i in range(1, 6)],
            test="test_batch.bin",
            meta="batches.meta.txt",
            names="",
            labels=0,
            classes=10,
            before=1,
        ),
    ],
    "cifar100": [
        Layout(
            folder="cifar-100-python",
            archive="cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            train=["train"],
            test="test",
            meta="meta",
            names="fine_label_names",
            labels="fine_labels",
            classes=100,
        ),
        Layout(
            folder="cifar-100-binary",
            archive="cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            train=["train.bin"],
            test="test.bin",
            meta="fine_label_names.txt",
            names="",
            labels=1,
            classes=100,
            before=2,
        ),
    ],
}
COARSE = [  # the 20 classes that CIFAR-100's are of
    {"names": "coarse_label_names", "labels": "coarse_labels", "classes": 20},
    {"meta": "coarse_label_names.txt", "labels": 0, "classes": 20},
]
CIFAR["cifar100-coarse"] = [layout._replace(**changes) for layout, changes in zip(CIFAR["cifar100"], COARSE)]


def read_cifar(name: str, data_dir: Path) -> tuple[Parts, list[str]]:
    """{"train": (images [N, 3, 32, 32] uint8, labels [N] int64), "test": ...}, class names.

    From data_dir/<folder of one of the layouts>, or data_dir itself; else from an archive there, else from a download.
    Raises UserError.
    """
    with blaming(data_dir, "make it a readable folder"):
        here = [
            (folder, layout)
            for layout in CIFAR[name]
            for folder in (data_dir / layout.folder, data_dir)
            if any((folder / file).is_file() for file in layout.files[:-1])
        ]
        if not here:
            layout = next((layout for layout in CIFAR[name] if (data_dir / layout.archive).is_file()), CIFAR[name][0])
            if not (data_dir / layout.archive).is_file():
                download(URL + layout.archive, data_dir / layout.archive, layout.md5)
            unpack(data_dir / layout.archive, layout)
            here = [(data_dir / layout.folder, layout)]
    folder, layout = here[0]
    train = [cifar_file(folder / file, layout) for file in layout.train]
    parts = {"train": tuple(map(np.concatenate, zip(*train))), "test": cifar_file(folder / layout.test, layout)}
    return parts, cifar_names(folder / layout.meta, layout)


def cifar_file(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """images [N, 3, 32, 32] uint8, labels [N] int64 of one file, checked by structure. Raises UserError."""
    with blaming(path, f"put the one from {URL}{layout.archive} in its place"):
        raw = read_file(path, MAX_FILE)
        if isinstance(layout.labels, int):
            records = np.frombuffer(raw, np.uint8).reshape(-1, layout.before + 3072)
            pixels, labels = records[:, layout.before :], records[:, layout.labels].astype(np.int64)
        else:
            content = unpickle(raw)
            pixels, labels = pickled_pixels(content["data"]), content[layout.labels]
            if not (isinstance(labels, list) and all(type(k) is int and 0 <= k < layout.classes for k in labels)):
                raise ValueError(f"the labels are not numbers from 0 to {layout.classes - 1}")
            labels = np.array(labels, np.int64)
        if len(labels) == 0 or len(labels) != len(pixels) or labels.max() >= layout.classes:
            raise ValueError(f"{len(pixels)} images, {len(labels)} labels, the largest {labels.max(initial=-1)}")
        return pixels.reshape(-1, 3, 32, 32), labels


def cifar_names(path: Path, layout: Layout) -> list[str]:
    """The class names; numbers where the file is absent. Raises UserError."""
    with blaming(path, f"put the one from {URL}{layout.archive} in its place"):
        if not path.exists():
            return [str(i) for i in range(layout.classes)]
        raw = read_file(path, MAX_FILE)
        names = [as_text(name) for name in unpickle(raw)[layout.names]] if layout.names else raw.decode("latin-1").split()
        if len(names) != layout.classes or not all(isinstance(name, str) for name in names):
            raise ValueError(f"not {layout.classes} names")
        return names


def download(url: str, path: Path, md5: str) -> None:
    """Fetch a file of this md5: written under a temporary name, moved to `path` when it is whole and right.

    Raises UserError where that fails, and OSError where the folder cannot be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, digest = None, hashlib.md5(usedforsecurity=False)
    try:
        with (
            urllib.request.urlopen(url, timeout=30) as source,
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".part-", delete=False) as target,
        ):
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
        replace(Path(part), path)
    except Exception as error:  # no network, a full disk, a connection cut short, a page of a proxy
        remedy = f"try again, or fetch it by other means and put it at {path}"
        raise UserError(f"could not download {url} ({getattr(error, 'reason', error)}); {remedy}") from None
    finally:
        if part and os.path.exists(part):
            os.remove(part)


def unpack(archive: Path, layout: Layout) -> None:
    """Unpack the files that are expected, of all layouts of this folder, and no others, into archive's folder /
    layout.folder: all of them or none.

    Raises UserError."""
    with blaming(archive, f"put the one from {URL}{layout.archive} in its place, or move it away so that it is downloaded"):
        raw = read_file(archive, MAX_FILE)
        md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if md5 != layout.md5:
            raise ValueError(f"md5 {md5}, not {layout.md5}")
    layouts = [each for some in CIFAR.values() for each in some if each.folder == layout.folder]
    wanted = {f"{layout.folder}/{file}": file for each in layouts for file in each.files}
    folder = archive.parent / layout.folder
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
                replace(Path(part), folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- .npz files


def read_npz(path: Path) -> tuple[Parts, list[str]]:
    """{"train": (images [N, C, H, W] uint8, labels [N] int64), "val" where it is there, "test"}, class names. Where the
    file says where objects are, each part has that as well, [N, H, W] bool. Classes are the numbers that occur in
    train_labels, in order; these numbers are their names.

    Raises UserError."""
    expected = "train_images, train_labels, val_..., test_... as MedMNIST has them"
    with blaming(path, f"make the file again ({expected})"):
        if not zipfile.is_zipfile(path):
            raise UserError(f"it is no whole .npz file; write one with np.savez ({expected}), or give a folder of images")
        parts = {}
        with zipfile.ZipFile(path) as archive:
            there = set(archive.namelist())
            for part in ("train", "val", "test"):
                absent = [name for name in (f"{part}_images", f"{part}_labels") if name + ".npy" not in there]
                if part == "val" and len(absent) == 2:
                    continue
                if absent:
                    others = first_of([printable(name.removesuffix(".npy"), 40) for name in sorted(there)]) or "nothing"
                    raise UserError(f"it has no {absent[0]}, but {others}; name its arrays {expected}")
                parts[part] = npz_part(part, *(npz_array(archive, f"{part}_{what}") for what in ("images", "labels")))
            known = [part for part in ("train", "val", "test") if f"{part}_objects.npy" in there]
            if known and known != list(parts):
                raise UserError(f"objects of {', '.join(known)}, but images of {', '.join(parts)}; give both, or no objects")
            for part in known:
                parts[part] += (npz_objects(part, npz_array(archive, f"{part}_objects"), parts[part][0]),)
        shape, values = parts["train"][0].shape, np.unique(parts["train"][1])
        if not 2 <= len(values) <= MAX_CLASSES:
            found = f"{len(values)} class{'es' * (len(values) > 1)} ({first_of(list(map(str, values)))})"
            raise UserError(f"train_labels show {found}; 2 to {MAX_CLASSES} are expected")
        for part, (images, labels, *objects) in parts.items():
            if images.shape[1:] != shape[1:]:
                raise UserError(f"{part}_images are {list(images.shape[1:])}, train_images {list(shape[1:])}; make them alike")
            if len(strange := np.setdiff1d(labels, values)):
                found, known = (first_of(list(map(str, some))) for some in (strange, values))
                count = np.isin(labels, strange).sum()
                problem = f"{part}_labels has class {found} ({count} images), which train_labels does not have ({known})"
                raise UserError(f"{problem}; number the classes alike, or leave these images out")
            parts[part] = images, np.searchsorted(values, labels), *objects
            if (highest := int(images.max())) < FEW_LEVELS:
                levels = f"and 255 is taken for white: at most {highest + 1} of 256 levels are left"
                say(f"data {path}: {part}_images go up to {highest}, {levels}; if that is wrong, scale them to 255")
        return parts, list(map(str, values))


def npz_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of a .npz, its header checked against its size before anything is allocated. Raises UserError and others."""
    info = archive.getinfo(name + ".npy")
    with archive.open(info) as file:
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(file)
        if version not in read_header:
            raise ValueError(f"{name} has a header of version {version}, which plain arrays do not need")
        shape, _, dtype = read_header[version](file)
        if dtype.hasobject:
            raise UserError(f"{name} holds Python objects, which only unpickling could read; save it as a plain array")
        if min(shape, default=1) < 1 or file.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError(f"{name} has shape {list(shape)} but {info.file_size} bytes")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.file_size > MAX_RESIDENT:
        raise UserError(f"{name} is too large ({info.file_size} bytes) or compressed in an unusual way; use np.savez")
    if info.file_size > max(2**26, 100 * min(info.compress_size, os.path.getsize(archive.filename))):
        bomb = f"{name} would unpack to {info.file_size} bytes, over 100 times its size, as images never do"
        raise UserError(f"{bomb}; if it is meant, write the file with np.savez instead of np.savez_compressed")
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def npz_pictures(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of each array of a .npz file whose name ends in "images". Raises UserError."""
    with blaming(path, "make the file again with np.savez(FILE, images=...)"):
        if not zipfile.is_zipfile(path):
            raise UserError("it is no whole .npz file; write one with np.savez(FILE, images=...)")
        with zipfile.ZipFile(path) as archive:
            there = [name.removesuffix(".npy") for name in sorted(archive.namelist())]
            if not (names := [name for name in there if name.endswith("images")]):
                raise UserError(f"it has {first_of([printable(name, 40) for name in there]) or 'nothing'}, and no images")
            for name in names:
                yield name, npz_array(archive, name)


def npz_part(part: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check [N, H, W] or [N, H, W, C] uint8 and [N] or [N, 1] integers; -> [N, C, H, W], [N] int64. Raises UserError."""
    if images.dtype != np.uint8:
        found = f", from {images.min():g} to {images.max():g}" if images.dtype.kind in "fiu" else ""
        raise UserError(f"{part}_images are {images.dtype}{found}; scale them to 0 to 255, and save them as uint8")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.shape[1] != images.shape[2]:
        raise UserError(f"{part}_images are {list(images.shape)}; expected square ones, [N, H, H] grey or [N, H, H, 3] colour")
    if labels.dtype.kind not in "iu":
        raise UserError(f"{part}_labels are {labels.dtype}; save them as integers")
    if labels.ndim > 1 and labels.shape[1] > 1:
        remedy = "give one class each (of one-hot rows, their argmax)"
        raise UserError(f"{part}_labels are {list(labels.shape)}: several for an image; {remedy}")
    if labels.shape not in ((len(images),), (len(images), 1)):
        raise UserError(f"{part}: {len(images)} images, but labels {list(labels.shape)}")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int64).max:
        raise UserError(f"{part}_labels go from {labels.min()} to {labels.max()}; number the classes 0, 1, 2...")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.reshape(-1).astype(np.int64)


def npz_objects(part: str, objects: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Check bool, or uint8 of 0 and 1, of the size of images [N, C, H, W]; -> [N, H, W] bool. Raises UserError."""
    if objects.dtype not in (np.bool_, np.uint8):
        raise UserError(f"{part}_objects are {objects.dtype}; save them as bool, or as uint8 of 0 and 1")
    expected = [len(images), *images.shape[2:]]
    if list(objects.shape) != expected:
        raise UserError(f"{part}_objects are {list(objects.shape)}; expected {expected}, a value for each pixel")
    values = objects.view(np.uint8)  # a damaged file may hold other bytes for bool
    if values.max() > 1:
        raise UserError(f"{part}_objects has the value {values.max()}; 1 is for an object's pixels, 0 for all others")
    return values == 1
