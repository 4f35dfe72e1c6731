"""Lesions in tissue, drawn here: a small data set of medical images' kind, in MedMNIST's layout, whose lesions are known.

    python mlo_mae.py tissue FILE.npz
    python mlo_mae.py pretrain --data FILE.npz

6,000 training and 2,000 test images of 28 pixels, as MedMNIST has them. Nuclei lie in stained tissue whose hue, brightness and
density differ from image to image. In each image a lesion of irregular outline covers about 12 to 20 % of the area, and the
class is its texture alone: grain, rings, streaks or blotches, as dark and as varied as the tissue around. They are no
patients' images, and say nothing of how well anything does on those.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from experiments.clutter import COUNTS, arrays_of
from harness import cli
from harness.files import check_free, write_whole
from harness.randomness import DRAW, numpy_generator
from harness.readers import Parts

SIZE = 28  # pixels
LESIONS = ["grain", "rings", "streaks", "blotches"]
LESION_AREA = (0.12, 0.2)  # least and most share of an image
AT_A_TIME = 500  # images


def smooth(rng: np.random.Generator, count: int, cells: int) -> np.ndarray:
    """Noise with so many bumps along a side, [N, SIZE, SIZE], of mean 0 and deviation 1 in each image."""
    coarse = torch.from_numpy(rng.standard_normal((count, 1, cells, cells), dtype=np.float32))
    fine = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=True)[:, 0].numpy()
    fine -= fine.mean((1, 2), keepdims=True)
    return fine / fine.std((1, 2), keepdims=True)


def lesion(rng: np.random.Generator, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Textures of classes [N], [N, SIZE, SIZE] from 0 to 1, and signed distances to the lesions' outlines (below 0: inside;
    in pixels, about)."""
    count = len(labels)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    area = rng.uniform(*LESION_AREA, (count, 1, 1)) * SIZE**2
    radius = np.sqrt(area / np.pi)
    cx, cy = rng.uniform(1.2 * radius, SIZE - 1.2 * radius, (2, count, 1, 1))
    distance, angle = np.hypot(x - cx, y - cy), np.arctan2(y - cy, x - cx)
    waves = [(k, *rng.uniform(size=(2, count, 1, 1))) for k in (2, 3, 5)]
    bumps = sum((0.25 * size / k) * np.cos(k * angle + 2 * np.pi * phase) for k, size, phase in waves)
    turn, phase, period = rng.uniform(size=(3, count, 1, 1))
    period = 3.5 + period  # pixels
    along = np.cos(np.pi * turn) * x + np.sin(np.pi * turn) * y
    kinds = {
        "grain": 0.5 + 0.35 * rng.standard_normal((count, SIZE, SIZE)),
        "rings": 0.5 + 0.5 * np.cos(2 * np.pi * (distance / period + phase)),
        "streaks": 0.5 + 0.5 * np.cos(2 * np.pi * (along / period + phase)),
        "blotches": 0.5 + 0.5 * np.tanh(2 * smooth(rng, count, 9)),
    }
    texture = np.choose(labels[:, None, None], [kinds[name] for name in LESIONS])
    return texture.clip(0, 1), distance - radius * (1 + bumps)


def nuclei(rng: np.random.Generator, count: int) -> np.ndarray:
    """How much of each pixel nuclei cover, [N, SIZE, SIZE] from 0 to 1: 10 to 60 discs of 0.7 to 1.7 pixels."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    most = 60
    cover, density = np.zeros((count, SIZE, SIZE), np.float32), rng.integers(10, most + 1, count)
    for number in range(most):
        cx, cy, radius = rng.uniform(size=(3, count, 1, 1))
        disc = np.clip(0.5 + 0.7 + radius - np.hypot(x - SIZE * cx, y - SIZE * cy), 0, 1)
        cover = np.maximum(cover, disc * (number < density)[:, None, None])
    return cover


def moments(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of [N, SIZE, SIZE] in each image, by these weights, [N, 1, 1] each."""
    share = weights / weights.sum((1, 2), keepdims=True)
    mean = (share * values).sum((1, 2), keepdims=True)
    return mean, np.sqrt((share * (values - mean) ** 2).sum((1, 2), keepdims=True))


def draw(rng: np.random.Generator, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 3, SIZE, SIZE] uint8 of classes [N], and where their lesions are [N, SIZE, SIZE] bool."""
    count = len(labels)
    texture, outside = lesion(rng, labels)
    inside = np.clip(0.5 - outside, 0, 1)
    dark = 0.75 * nuclei(rng, count) + 0.12 * smooth(rng, count, 4)
    # as dark as this tissue, and as varied, so that neither tells where the lesion is
    (mean, spread), (own, its_spread) = moments(dark, 1 - inside), moments(texture, inside)
    dark = dark + inside * (mean + spread * (texture - own) / its_spread - dark)
    stroma = np.array([0.92, 0.72, 0.82]) + 0.06 * rng.standard_normal((count, 3))
    stain = np.array([0.38, 0.22, 0.52]) + 0.06 * rng.standard_normal((count, 3))
    stroma, stain = stroma[:, :, None, None], stain[:, :, None, None]
    pixels = stroma + dark[:, None] * (stain - stroma) + 0.02 * rng.standard_normal((count, 3, SIZE, SIZE))
    return (255 * pixels.clip(0, 1)).round().astype(np.uint8), outside < 0


def tissue(seed: int = 0) -> Parts:
    """{"train": (images, labels, lesions), "test": ...}, as `draw` has them; classes are balanced."""
    total = sum(COUNTS.values())
    labels = numpy_generator(DRAW, 4, seed).permuted(np.arange(total).reshape(-1, len(LESIONS)) % len(LESIONS), axis=1).ravel()
    starts = range(0, total, AT_A_TIME)
    some = [draw(numpy_generator(DRAW, 5, start, seed), labels[start : start + AT_A_TIME]) for start in starts]
    images, where = map(np.concatenate, zip(*some))
    ends = np.cumsum([0, *COUNTS.values()])
    return {part: (images[a:b], labels[a:b], where[a:b]) for part, a, b in zip(COUNTS, ends, ends[1:])}


def write(path: Path, seed: int = 0) -> None:
    """Write the .npz. Raises UserError."""
    write_whole(path, lambda file: np.savez_compressed(file, **arrays_of(tissue(seed))))


def run_command(argv: list[str] | None) -> dict:
    """Run `tissue` with these flags; returns what its last line reports."""
    parser = cli.Parser(prog="mlo_mae.py tissue", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.npz", help="file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the images (default 0)")
    flags = parser.parse_args(argv)
    check_free(flags.file)
    write(flags.file, flags.seed)
    return {"command": "tissue", "file": str(flags.file), "seed": flags.seed, **COUNTS}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
