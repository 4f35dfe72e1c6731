"""A trained network for images of one's own: features, weights of patches, reconstructions.

    python mlo_mae.py encode RUN IMAGES... --out features.npz              # image files, folders of them, .npz files
    python mlo_mae.py encode FILE.pth photos/ --heads 12 --out FILE.npz    # public weights

In Python, `mlo_mae.load(RUN)` is the same: see `load` and `Model`. The data that the network was trained on are not needed.
"""

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import mlo_mae
from data import IMAGENET_MEAN, IMAGENET_STD
from experiments import read_run, reconstructed
from experiments.show import picture_rows
from harness import UserError, cli, counted, printable
from harness.checkpoints import fitting
from harness.files import check_free, write_whole
from harness.pictures import as_images, grid
from harness.readers import account, blaming, list_any, npz_pictures, picture, say_levels
from harness.vectors import unflatten
from harness.weights import ANCHOR, has_cls_row, is_decoder, read_weights, starting_weights
from kernels import gather_patches

Pictures = np.ndarray | Tensor | Image.Image | Sequence[Image.Image]
AT_A_TIME = 256  # images
DRAWN = 12  # images in the picture


@dataclass(frozen=True, repr=False)
class Model:
    """A trained network. Images are any of

    - numpy arrays [N, H, W, C] uint8 (of one channel [N, H, W] too),
    - torch tensors [N, C, H, W], uint8, or floats from 0 to 1,
    - a PIL image, or a list of them: one of the network's own size is taken as it is; of others the middle is, 7/8 of their
      shorter side, as folders are validated.

    Arrays and tensors must have the network's size; whatever else is wrong raises UserError too. Results are on the CPU."""

    net: mlo_mae.Networks
    state: mlo_mae.State
    image_size: int  # pixels of a side
    mean: Sequence[float]  # of each channel's pixels, from 0 to 1
    std: Sequence[float]
    decodes: bool = True  # whether there is a decoder
    raw: bool = False  # whether it predicts pixels, not normalised patches

    def __repr__(self) -> str:
        cfg = self.net.cfg
        has = ["encoder", *["decoder"] * self.decodes, *["T"] * self.sees]
        size = f"images of {self.image_size} pixels and {counted(len(self.mean), 'channel')}, patches of {cfg.patch_size}"
        return f"Model({', '.join(has)}: width {cfg.width}, depth {cfg.depth}, {size})"

    @property
    def encoder(self) -> mlo_mae.Encoder:
        """A module of your own with the encoder's weights: `inputs(images)` -> tokens [N, 1+patches, D], CLS first."""
        cfg, params = self.net.cfg, self.state.theta.params
        encoder = mlo_mae.Encoder(self.image_size, cfg.patch_size, len(self.mean), cfg.width, cfg.depth, cfg.heads)
        encoder.load_state_dict(unflatten(self.net.encoder, params[: self.net.encoder_size]))
        return encoder.to(params.device)

    def inputs(self, images: Pictures) -> Tensor:
        """What the networks read, on their device: normalised pixels [N, C, H, W] float32."""
        return self.normalised(checked(images, self.image_size, len(self.mean)))

    def normalised(self, found: Tensor) -> Tensor:
        """The same, of what has been `checked`."""
        pixels = found.float() / 255 if found.dtype == torch.uint8 else found.detach().float()
        pixels = pixels.to(self.state.theta.params.device)
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    @torch.no_grad()
    def in_batches(self, function: Callable[[Tensor], Tensor], images: Pictures) -> Tensor:
        """function(inputs) [N, ...] on the CPU, of so many images at a time that they fit."""
        parts = checked(images, self.image_size, len(self.mean)).split(AT_A_TIME)
        return torch.cat([function(self.normalised(some)).float().cpu() for some in parts])

    def features(self, images: Pictures, pooling: str = "") -> Tensor:
        """Features [N, D]: the mean of the patches' tokens ("mean") or the CLS token ("cls"); by default what level 2 of the
        run reads, and of public weights the mean."""
        if pooling not in ("", "mean", "cls"):
            raise UserError(f"pooling {pooling!r}: choose mean or cls")
        params = self.state.theta.params[: self.net.encoder_size]
        return self.in_batches(lambda some: mlo_mae.encode(self.net, params, some, pooling), images)

    def weights(self, images: Pictures) -> Tensor:
        """p [N, H/patch, W/patch], from 0 to 1: how much each patch counts, as T has learned it."""
        if not self.sees:
            raise UserError("there is no T that has learned; give a run of --masking learned whose T has, after --mask-start")
        psi, eyes = self.state.psi.params, mlo_mae.eyes_of(self.net, self.state)
        p = self.in_batches(lambda some: mlo_mae.masking_probability(self.net, psi, some, eyes), images)
        return square(p)

    def reconstruct(self, images: Pictures, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Pixels [N, H, W, C] from 0 to 1 whose hidden patches are the decoder's, with each true patch's own mean and
        contrast, which it does not know; and which were hidden [N, H/patch, W/patch] bool, as the run chooses, by `seed`."""
        if not self.decodes:
            raise UserError("there is no decoder; give a run, or an autoencoder's weights and their decoder_heads")
        if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
            raise UserError(f"seed {seed!r}: give a whole number, 0 or more")

        numbers = itertools.count()

        def work(some: Tensor) -> Tensor:
            _, keep, restore, mask = self.draw(some, seed, next(numbers))
            made = reconstructed(self.net, self.state.theta.params, some, keep, restore, self.raw)
            whole = torch.where(mask[..., None] > 0, made, gather_patches(some, None, self.net.cfg.patch_size))
            return torch.cat([mask[..., None], whole], dim=2)

        hidden, patches = self.in_batches(work, images).tensor_split([1], dim=2)
        pixels = as_images(patches, self.net.cfg.patch_size, self.mean, self.std)
        return torch.from_numpy(pixels), square(hidden[..., 0] > 0)

    @property
    def sees(self) -> bool:
        """Whether there is a T that has learned."""
        cfg = self.net.cfg
        return cfg.masking == "learned" and (self.state.psi.t > 0 or bool(cfg.masking_from))

    def draw(self, inputs: Tensor, seed: int, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `mlo_mae.draw_masks` returns for these inputs, the batch of this number. Raises UserError where the run hides
        by parts of images."""
        eyes, keys = mlo_mae.eyes_of(self.net, self.state), (seed, mlo_mae.MASKS, number)
        progress = float(self.sees or self.state.waited > 0)  # a T that the run has not come to does not weigh yet
        return mlo_mae.draw_masks(self.net, self.state.psi.params, inputs, eyes, *keys, progress=progress)


def square(rows: Tensor) -> Tensor:
    """[N, patches] as [N, H/patch, W/patch]."""
    return rows.unflatten(1, (math.isqrt(rows.shape[1]), -1))


def load(
    path: str | Path,
    device: str = "auto",
    heads: int = 0,
    decoder_heads: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    raw_pixels: bool = False,
) -> Model:
    """A trained network: of a run's folder, or of public weights, .pth or .safetensors, as timm or facebookresearch/mae name
    them.

    For public weights: heads of the encoder and decoder, where the file does not say them; mean and std of each channel's
    pixels from 0 to 1 (None: as the file says, else ImageNet's); raw_pixels: its decoder was taught pixels, not normalised
    patches, as MAE's mae_visualize files were. Nothing in a file is executed. Raises UserError."""
    path, device = Path(path), cli.choose_device(str(device))
    if path.is_dir():
        if heads or decoder_heads or mean is not None or std is not None or raw_pixels:
            raise UserError(f"{path} is a run, which knows its heads, mean, std and decoder; leave them out")
        net, state, facts = read_run(path, device)
        with fitting(path / "checkpoint.pt"):
            mean, std = of_pixels(facts["mean"], facts["std"], facts["channels"])
        if (path / "parts.pt").exists():
            net.score = hidden_by_parts
        return Model(net, state, facts["image_size"], mean, std)
    return replace(public(path, device, {"heads": heads, "decoder_heads": decoder_heads}, mean, std), raw=raw_pixels)


def of_pixels(mean: Sequence[float], std: Sequence[float], channels: int) -> tuple[list[float], list[float]]:
    """Both as lists, if they can be those of pixels from 0 to 1. Raises UserError where they cannot, and others."""
    mean, std = ([float(value) for value in values] for values in (mean, std))
    if not len(mean) == len(std) == channels or not all(0 <= x <= 1 for x in mean) or not all(1e-6 <= x <= 1 for x in std):
        found = f"mean {mean} and std {std}"
        raise UserError(f"{found[:200]} are not those of {counted(channels, 'channel')} of pixels from 0 to 1; give others")
    return mean, std


def hidden_by_parts(*_) -> Tensor:
    """`Networks.score` of a run of SemMAE here. Raises UserError."""
    raise UserError("the run hides patches by parts that it has learned of its images; see its pictures, by `show`")


def public(path: Path, device: torch.device, given: dict[str, int], mean: Sequence | None, std: Sequence | None) -> Model:
    """`load`, of a file."""
    found, sizes = read_weights(path), {}
    with blaming(path, "give another file"):
        shapes = {name: tuple(tensor.shape) for name, tensor in found.weights.items()}
        if found.run:
            raise UserError(f"it is the {found.run} of a run, which knows more; give the folder that it is in")
        width, channels, patch, _ = shapes[ANCHOR]
        rows = shapes["pos_embed"][1]
        size = math.isqrt(rows - (has_cls_row(rows) or 0)) * patch
        for name, count in given.items():
            stated = found.heads.get(name, 0)
            if stated and count and stated != count:
                raise UserError(f"it says that it has {stated} {name}, not {count}")
            sizes[name] = stated or count
        if not sizes["heads"]:
            raise UserError("it does not say how many heads its encoder has; give heads (ViT-B 12, ViT-L 16)")
        if "norm.weight" not in shapes and "fc_norm.weight" in shapes:
            raise UserError("it has no norm of tokens but that of a classifier; give weights from before that was trained")
        decodes = any(map(is_decoder, shapes)) and sizes["decoder_heads"] > 0
        sizes |= {"patch_size": patch, "width": width, "depth": blocks(shapes, "blocks")}
        if decodes:
            sizes |= {"decoder_width": shapes["decoder_embed.weight"][0], "decoder_depth": blocks(shapes, "decoder_blocks")}
        else:
            sizes |= {"decoder_width": 4, "decoder_depth": 1, "decoder_heads": 1}
        if (mean is None) != (std is None):
            raise UserError("mean and std go together; give both, or none")
        if mean is None and not found.pixels:
            print(printable(f"{path} does not say its pixels' mean and deviation: ImageNet's taken"), file=sys.stderr)
        stated = (mean, std) if mean is not None else found.pixels or (IMAGENET_MEAN, IMAGENET_STD)
        mean, std = of_pixels(*stated, channels)
        cfg = mlo_mae.Config(**sizes, masking="random", masking_width=1)
        mlo_mae.check(cfg)
        net, (theta, phi, psi) = mlo_mae.build(cfg, size, channels, 2)
    modules = [net.encoder, net.decoder] if decodes else [net.encoder]
    part = theta if decodes else theta[: net.encoder_size]
    taken = starting_weights(path, modules, part, {name: sizes[name] for name in given})
    decodes = decodes and not torch.equal(taken[net.encoder_size :], part[net.encoder_size :])  # else a fresh one
    levels = (mlo_mae.fresh_level(vector, device) for vector in (torch.cat([taken, theta[len(taken) :]]), phi, psi))
    return Model(net, mlo_mae.State(0, *levels), size, mean, std, decodes)


def blocks(names: dict, part: str) -> int:
    """How many blocks of this name there are among a network's weights."""
    return len({name.split(".")[1] for name in names if name.startswith(f"{part}.")})


# ------------------------------------------------------------------------------------------------- images of one's own


def checked(images: Pictures, size: int, channels: int) -> Tensor:
    """What `Model` takes as a tensor [N, C, size, size] of its kind: uint8, or floats from 0 to 1. Raises UserError."""
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, (list, tuple)) and images and all(isinstance(image, Image.Image) for image in images):
        decoded = []
        for number, image in enumerate(images):
            with blaming(f"image {number}", "leave it out, or give another in its place"):
                decoded.append(picture(image, size, channels))
        return torch.from_numpy(np.stack(decoded)).movedim(3, 1)
    if isinstance(images, np.ndarray):
        given, images = list(images.shape), images[..., None] if images.ndim == 3 and channels == 1 else images
        if images.dtype != np.uint8:
            values = f" from {images.min():g} to {images.max():g}" if images.dtype.kind in "fiu" and images.size else ""
            raise UserError(f"arrays are expected in uint8, from 0 to 255; these are {images.dtype}{values}")
        if images.ndim != 4 or images.shape[1:] != (size, size, channels):
            raise UserError(f"arrays are expected as {expected(['N', size, size, channels])}; these are {expected(given)}")
        images = torch.from_numpy(images.copy()).movedim(3, 1)
    if not isinstance(images, Tensor):
        raise UserError(f"images are expected as an array, a tensor or PIL images; these are {type(images).__name__}")
    shape = list(images.shape)
    if images.ndim != 4 or shape[1:] != [channels, size, size]:
        raise UserError(f"tensors are expected as {expected(['N', channels, size, size])}; these are {expected(shape)}")
    if not len(images):
        raise UserError("there are no images")
    wanted = "tensors are expected in uint8, or in floats from 0 to 1 before they are normalised"
    try:
        low, high = (float(value) for value in images.detach().aminmax())
    except RuntimeError:  # of types, layouts and devices that hold no plain numbers
        raise UserError(f"{wanted}; these are {images.layout} {images.dtype} on {images.device}") from None
    if images.dtype == torch.uint8:
        if high == 1:  # black is black either way
            raise UserError(f"pixels in uint8 are expected from 0 to 255; the highest of these is {high:g}")
    elif not images.is_floating_point() or not (low >= 0 and high <= 1):
        raise UserError(f"{wanted}; these are {images.dtype}, from {low:g} to {high:g}")
    return images


def from_bytes(images: np.ndarray) -> Tensor:
    """Images [N, H, W, C] uint8 that are known to go from 0 to 255, as pixels [N, C, H, W] from 0 to 1."""
    return torch.from_numpy(images).movedim(3, 1).float() / 255


def expected(shape: list) -> str:
    return f"[{', '.join(map(str, shape))}]"


def chunks(paths: Sequence[Path], size: int, channels: int, bar: tqdm) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names, and images [n, size, size, channels] uint8, of all images in these files and folders, in order, a few at a time;
    the bar counts them. Raises UserError."""

    def decoded(file: Path) -> np.ndarray:
        with blaming(file, "leave it out, or give an image in its place"):
            return picture(file, size, channels)

    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        for packed, group in itertools.groupby(paths, lambda path: path.suffix.lower() == ".npz" and not path.is_dir()):
            if packed:
                for path in group:
                    yield from packed_chunks(path, size, channels, bar)
            else:
                files = [file for path in group for file in listed(path, bar)]
                bar.total += len(files)
                for start in range(0, len(files), AT_A_TIME):
                    some = files[start : start + AT_A_TIME]
                    yield list(map(str, some)), np.stack(list(pool.map(decoded, some)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error, or a signal, nothing is waited for


def packed_chunks(path: Path, size: int, channels: int, bar: tqdm) -> Iterator[tuple[list[str], np.ndarray]]:
    """`chunks` of an .npz."""
    for array, images in npz_pictures(path):
        with blaming(f"{path}: {array}", "give another file"):
            images = checked(images, size, channels).movedim(1, 3).numpy()  # all of it, before any is encoded
        bar.total += len(images)
        for start in range(0, len(images), AT_A_TIME):
            some = images[start : start + AT_A_TIME]
            yield [f"{path}:{array}[{start + n}]" for n in range(len(some))], some


def listed(path: Path, bar: tqdm) -> list[Path]:
    """The images of a folder, of which what is odd is said above the bar; or the file alone. Raises UserError."""
    if not path.is_dir():
        return [path]
    names, left_out = list_any(str(path))
    if not len(names):
        raise UserError(f"there are no images in {path} ({account(left_out)})")
    if left_out:
        bar.write(printable(f"{path}: {account(left_out)}"), file=sys.stderr)
    try:
        say_levels(path, names)
    except UserError as error:  # black images may be meant
        bar.write(f"data {error}", file=sys.stderr)
    return [path / os.fsdecode(name) for name in names]


def encode(model: Model, paths: Sequence[Path], out: Path, pooling: str = "", masks: Path | None = None) -> dict:
    """Write `out`, an .npz of "features" [N, D] float32 and "names" [N], and of the first images the picture `masks`: what
    the command reports. Raises UserError, where a file is there already too."""
    for file in filter(None, (out, masks)):
        check_free(file)
    if masks and masks.resolve() == out.resolve():
        raise UserError(f"--out and --masks are both {out}; name two files")
    if masks and model.net.score:
        hidden_by_parts()
    if masks and not model.decodes:
        raise UserError("there is no decoder, so no reconstruction to draw; leave --masks out, or give --decoder-heads")
    names, features, first, pooling = [], [], [], pooling or model.net.cfg.pooling
    with tqdm(unit="image", desc="encode", total=0) as bar:
        for some, images in chunks(paths, model.image_size, len(model.mean), bar):
            features.append(model.features(from_bytes(images), pooling).numpy())
            names += some
            bar.update(len(some))
            first = [*first, *images][:DRAWN]
    features = np.concatenate(features)
    rows = shown_rows(model, np.stack(first)) if masks else []
    write_whole(out, lambda file: np.savez(file, features=features, names=np.array(names)))
    found = {"images": len(names), "width": features.shape[1], "pooling": pooling, "file": str(out)}
    if masks:
        grid(masks, *rows, columns=[printable(Path(name).name) for name in names[: len(first)]])
        found |= {"picture": str(masks), "images in it": len(first)}
    return found


def shown_rows(model: Model, images: np.ndarray) -> tuple[list, str]:
    """Rows of a picture of these images, and what it says below them: as `show` has them of a run's."""
    inputs, pixels = model.inputs(from_bytes(images)), (model.mean, model.std)
    with torch.no_grad():
        return picture_rows(model.net, model.state.theta.params, inputs, model.draw(inputs, 0, 0), *pixels, raw=model.raw)


# ------------------------------------------------------------------------------------------------------- command line


def run_command(argv: list[str] | None) -> dict:
    """Run `encode` with these flags; returns what its last line reports."""
    parser = cli.Parser(prog="mlo_mae.py encode", description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="RUN", help="folder of a run, or public weights: a .pth or .safetensors")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="image files, folders of them, .npz files")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help='gets "features" and "names"')
    parser.add_argument("--masks", type=Path, metavar="FILE.png", help=f"picture of the first {DRAWN} images, p and masks")
    parser.add_argument("--pooling", choices=["mean", "cls"], default="", help="default: the run's; of public weights mean")
    parser.add_argument("--heads", type=int, default=0, help="of public weights that do not say them")
    parser.add_argument("--decoder-heads", type=int, default=0, help="of public weights that do not say them")
    for name in ("mean", "std"):
        parser.add_argument(f"--{name}", type=float, nargs="+", help="of public weights that do not say it: pixels', 0 to 1")
    parser.add_argument("--raw-pixels", action="store_true", help="of public decoders that predict pixels (mae_visualize_*)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    flags = vars(parser.parse_args(argv))
    source, images, device = flags.pop("source"), flags.pop("images"), flags.pop("device")
    for path in images:
        if not path.is_file() and not path.is_dir():  # a pipe would block
            found = "is no file" if path.exists() else "does not exist"
            raise UserError(f"{path} {found}; give image files, folders of them, or .npz files")
    model = load(source, device, *(flags.pop(name) for name in ("heads", "decoder_heads", "mean", "std", "raw_pixels")))
    return {"command": "encode", "run": source} | encode(model, images, **flags)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
