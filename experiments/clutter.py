"""The objects of `shapes` on photographs: a data set with real backgrounds whose objects are known.

    python mlo_mae.py clutter FILE.npz --data-dir DIR     # DIR: where CIFAR-100 is, or is downloaded to
    python mlo_mae.py pretrain --data FILE.npz

6,000 training and 2,000 test images of 32 pixels, in the layout of harness/readers.py with `train_objects` and
`test_objects`. Training photographs are behind training images, test photographs behind test images, each behind one; their
labels are not used. With seed 0 the objects are the very ones of `shapes`.
"""

import sys
from pathlib import Path

import numpy as np

from data import OBJECT_AREA, shapes
from harness import UserError, cli
from harness.files import check_free, write_whole
from harness.randomness import DRAW, numpy_generator
from harness.readers import Parts, read_cifar

COUNTS = {"train": 6000, "test": 2000}  # images, as data.shapes draws them


def on_photographs(pools: dict[str, np.ndarray], seed: int) -> Parts:
    """{"train": (images, labels, objects), "test": ...} as `data.shapes` has them, before photographs chosen at random from
    pools {"train": [N, 3, 32, 32] uint8, "test": ...}. Raises UserError where those are too few."""
    chosen = []
    for number, (part, count) in enumerate(COUNTS.items()):
        pool = pools[part]
        if len(pool) < count:
            raise UserError(f"{len(pool)} photographs for {part} are too few: {count} are needed, each for one image")
        chosen.append(pool[numpy_generator(DRAW, 2 + number, seed).permutation(len(pool))[:count]])
    photographs = np.concatenate(chosen)

    def background(rng: np.random.Generator, numbers: np.ndarray, size: int) -> np.ndarray:
        return photographs[numbers].astype(np.float32) / 255

    return shapes(photographs.shape[-1], background, OBJECT_AREA, seed=seed)


def arrays_of(parts: Parts) -> dict[str, np.ndarray]:
    """The arrays of a .npz that harness/readers.py reads as these parts."""
    arrays = {}
    for part, (images, labels, objects) in parts.items():
        arrays |= {f"{part}_images": images.transpose(0, 2, 3, 1), f"{part}_labels": labels, f"{part}_objects": objects}
    return arrays


def write(path: Path, data_dir: str, seed: int) -> None:
    """Write the .npz. Raises UserError."""
    pools = {part: images for part, (images, _) in read_cifar("cifar100", Path(data_dir))[0].items()}
    arrays = arrays_of(on_photographs(pools, seed))
    write_whole(path, lambda file: np.savez(file, **arrays))


def run_command(argv: list[str] | None) -> dict:
    """Run `clutter` with these flags; returns what its last line reports."""
    parser = cli.Parser(prog="mlo_mae.py clutter", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.npz", help="file to write")
    parser.add_argument("--data-dir", default="data", help="where cifar100 lies, or is downloaded to (default data)")
    parser.add_argument("--seed", type=int, default=0, help="of photographs and objects (default 0)")
    flags = parser.parse_args(argv)
    check_free(flags.file)
    write(flags.file, flags.data_dir, flags.seed)
    return {"command": "clutter", "file": str(flags.file), "seed": flags.seed, **COUNTS}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
