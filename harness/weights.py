"""Weights from elsewhere, and for elsewhere: the names of timm's VisionTransformer and of facebookresearch/mae.

    weights = read_weights("mae_pretrain_vit_base.pth")       # or .safetensors, or a run's checkpoint.pt
    taken, line = fit(weights, {"pos_embed": (1, 65, 768), ...})        # what a network of these shapes can take

A file is never trusted and nothing in it is executed: whatever is wrong ends in a `UserError`.
"""

import argparse
import json
import math
import os
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import UserError, printable
from harness.checkpoints import check_records
from harness.vectors import named

CONTAINERS = "model", "state_dict", "model_ema"  # where training programs keep a network's weights, first choice first
ANCHOR = "patch_embed.proj.weight"  # a ViT has it; what stands before it in a file's name is a wrapper's prefix
MAX_HEADER = 100_000_000  # bytes of a safetensors header, the limit of the format's own package
MAX_DIMS, MAX_DIM = 8, 2**31  # of a tensor
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
Shape = tuple[int, ...]


# ----------------------------------------------------------------------------------------------------- reading


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """{name: tensor on the CPU} of a .safetensors file or of what torch.save wrote (.pth, .pt, .bin, .tar; both of its
    formats), told apart by their first bytes. Taken out of containers such as {"model": ...}, and without the prefix
    (`module.`) of a wrapper. Raises UserError for a file that is absent, damaged, hostile or holds no weights."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            first = file.read(9)
        tensors = read_safetensors(path) if first[8:] == b"{" else read_torch(path)
        return without_prefix(tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a run, or a .pth or .safetensors file") from None
    except Exception as error:  # json, zipfile and torch raise many kinds for a damaged file
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"{path} cannot be read ({printable(reason, 300)}); it is damaged, or no file of weights") from None


def read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by torch.save. Beside plain data only argparse.Namespace is let in, which facebookresearch/mae
    stores with its weights; it is a class without behaviour."""
    size = os.path.getsize(path)
    if zipfile.is_zipfile(path):
        check_records(path)
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old or odd pickles: what matters here ends in an error
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise UserError(f"it holds a {type(content).__name__}, not weights by name")
    content = next((content[key] for key in CONTAINERS if isinstance(content.get(key), dict)), content)
    tensors = {name: value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        plain = type(value) is Tensor and value.layout == torch.strided and not value.is_quantized
        if not isinstance(name, str) or not plain or value.device.type != "cpu":
            raise UserError(f"{name!r} is not an ordinary tensor")
    if any(value.nbytes > size for value in tensors.values()):  # one element may be repeated without end, by stride 0
        raise UserError("a tensor claims more bytes than the file has")
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: the header's length (8 bytes, little-endian), a JSON header
    {name: {dtype, shape, data_offsets}}, and the tensors' bytes one after the other (github.com/huggingface/safetensors)."""
    tensors, end, size = {}, 0, os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, size - 8):
            raise UserError(f"its header claims {length} bytes of {size}")
        header = json.loads(file.read(length).decode(), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            check_entry(name, entry, size)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            if start != end or stop > size - 8 - length:
                raise UserError(f"{name} overlaps another tensor, leaves a gap, or lies outside the file")
            raw, end, dtype = bytearray(file.read(stop - start)), stop, DTYPES[entry["dtype"]]
            tensor = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            tensors[name] = tensor.reshape(entry["shape"])
    if end != size - 8 - length:
        raise UserError(f"{size - 8 - length - end} bytes after its last tensor belong to none")
    return tensors


def check_entry(name: str, entry: object, size: int) -> None:
    """Raise UserError where a safetensors header says of a tensor what cannot be in a file of `size` bytes."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{name}: its header has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{name} has dtype {dtype}; known are {', '.join(DTYPES)}")
    if not whole_numbers(shape, MAX_DIMS, MAX_DIM):
        raise UserError(f"{name} has the impossible shape {shape}")
    if not whole_numbers(offsets, 2, size) or len(offsets) != 2:
        raise UserError(f"{name} has the impossible place {offsets}")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise UserError(f"{name}: {dtype} of shape {shape} does not take the bytes {offsets[0]} to {offsets[1]}")


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object as a dict. Raises UserError where a key comes twice."""
    if len(result := dict(pairs)) != len(pairs):
        raise UserError("its header names something twice")
    return result


def whole_numbers(value: object, length: int, limit: int) -> bool:
    """Whether this is a list of at most `length` integers from 0 to `limit`."""
    return isinstance(value, list) and len(value) <= length and all(type(n) is int and 0 <= n <= limit for n in value)


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as timm has them. Raises UserError for several ViTs in one file, and for no weights at all."""
    if not tensors:
        raise UserError("it holds no weights")
    prefixes = [name.removesuffix(ANCHOR) for name in tensors if name == ANCHOR or name.endswith("." + ANCHOR)]
    if len(prefixes) > 1:
        raise UserError(f"it holds several encoders ({', '.join(prefixes)}); save the one that you want alone")
    prefix = prefixes[0] if prefixes else ""
    result = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(result) != len(tensors):
        raise UserError(f"it has some names both with and without {prefix}")
    return result


# ----------------------------------------------------------------------------------------------------- writing


def write_safetensors(tensors: dict[str, Tensor], file: BinaryIO, metadata: dict[str, str]) -> None:
    """Write {name: tensor on the CPU}, and what the header says beside, to an open binary file."""
    names, end = {dtype: name for name, dtype in DTYPES.items()}, 0
    header = {"__metadata__": {"format": "pt"} | metadata}
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


# ----------------------------------------------------------------------------------------------------- fitting


def is_decoder(name: str) -> bool:
    """Whether a weight of a masked autoencoder is one of its decoder's."""
    return name.startswith(("decoder_", "mask_token"))


def fit(weights: dict[str, Tensor], expected: dict[str, Shape]) -> tuple[dict[str, Tensor], str]:
    """What a network whose parameters have the names and shapes `expected` can take from `weights`, {name: tensor}; and a
    line for people: how much was used, what is fresh, what was left over.

    The encoder must be there whole, but for its last norm where the file has pooled features normalised instead
    (timm's `fc_norm`). A decoder is taken whole or not at all. Position tables [1, 1+L, D] are interpolated where their
    grid differs. Raises UserError for an encoder that is another one, and names the flags that would fit."""
    encoder = {name: shape for name, shape in expected.items() if not is_decoder(name)}
    decoder = {name: shape for name, shape in expected.items() if is_decoder(name)}
    check_sizes(weights, encoder)
    optional = {"norm.weight", "norm.bias"} if "fc_norm.weight" in weights else set()
    problem = mismatch(weights, {name: shape for name, shape in encoder.items() if name in weights or name not in optional})
    if problem:
        raise UserError(f"these weights are of another architecture: {problem}")

    problem = mismatch(weights, decoder) if any(map(is_decoder, weights)) else "the file has none"
    taken, grids = {}, set()
    for name, shape in expected.items():
        if name not in weights or problem and is_decoder(name):
            continue
        taken[name] = tensor = weights[name]
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{name} holds values that are not finite numbers; fetch the file again")
        if tuple(tensor.shape) != shape:
            taken[name] = resize_positions(tensor, shape)
            old, new = math.isqrt(tensor.shape[1]), math.isqrt(shape[1])
            grids |= {f"{old}x{old} to {new}x{new}"} if old != new else set()

    parts = [f"{sum(name in taken for name in encoder)} of {len(encoder)} encoder weights used"]
    if decoder:
        whole = f"{len(decoder)} of {len(decoder)} decoder weights used"
        parts.append(f"the decoder starts fresh: {problem}" if problem else whole)
    if grids:
        parts.append(f"positions interpolated from {', '.join(sorted(grids))}")
    if fresh := [name for name in encoder if name not in taken]:
        parts.append(f"fresh: {', '.join(fresh)}")
    if counts := Counter(name.split(".")[0] for name in weights if name not in taken):
        parts.append("unused: " + ", ".join(f"{part} ({count})" if count > 1 else part for part, count in counts.items()))
    return taken, printable("; ".join(parts))


def check_sizes(weights: dict[str, Tensor], encoder: dict[str, Shape]) -> None:
    """Raise UserError where patch size, width or depth differ, naming all flags at once, or channels do."""

    def sizes(names, shape):
        blocks = {name.split(".")[1] for name in names if name.startswith("blocks.")}
        return {"--patch-size": shape[2], "--width": shape[0], "--depth": len(blocks)}

    found, here = tuple(weights[ANCHOR].shape) if ANCHOR in weights else (), encoder[ANCHOR]
    if len(found) != 4 or found[2] != found[3] or "cls_token" not in weights:
        raise UserError("these weights hold no ViT with square patches and a class token")
    if (theirs := sizes(weights, found)) != (ours := sizes(encoder, here)):
        wrong = [flag for flag in ours if theirs[flag] != ours[flag]]
        flags, now = (" ".join(f"{flag} {values[flag]}" for flag in wrong) for values in (theirs, ours))
        heads = ", and the --heads they were trained with" if "--width" in wrong else ""
        raise UserError(f"these weights fit {flags}, not {now}: give {flags}{heads}")
    if found[1] != here[1]:
        raise UserError(f"these weights are for images of {found[1]} channels, and the data's have {here[1]}")


def mismatch(weights: dict[str, Tensor], expected: dict[str, Shape]) -> str:
    """The first reason why `weights` cannot fill all of `expected`, in words, or "". A weight that the file has in addition
    inside one of the expected parts (such as a block's layer scale) would be missed by whoever trained it: a reason too."""
    for name, shape in expected.items():
        if name not in weights:
            return f"{name} is missing"
        found = tuple(weights[name].shape)
        if found != shape and not (name.endswith("pos_embed") and resizable(found, shape)):
            return f"{name} is {list(found)}, here {list(shape)}"
    parts = {name.split(".")[0] for name in expected} | {"norm_pre", "reg_token", "dist_token"}
    return next((f"{name} has no place here" for name in weights if name.split(".")[0] in parts and name not in expected), "")


# ------------------------------------------------------------------------------------------------- positions


def has_cls_row(rows: int) -> int | None:
    """1 where a position table of so many rows has one for CLS before its square grid, 0 where all are the grid's; None
    where neither fits."""
    return next((cls for cls in (1, 0) if rows > cls and math.isqrt(rows - cls) ** 2 == rows - cls), None)


def resizable(found: Shape, shape: Shape) -> bool:
    """Whether `resize_positions` makes a table of shape `shape` of one of shape `found`."""
    return len(found) == 3 and found[0] == 1 and found[2] == shape[2] and has_cls_row(found[1]) is not None


def resize_positions(table: Tensor, shape: Shape) -> Tensor:
    """A position table [1, 1+G*G, D], or [1, G*G, D] of a network that gives CLS none, as [1, 1+g*g, D]: bicubic with
    antialiasing as timm does it, CLS kept (zeros where it has none)."""
    cls = has_cls_row(table.shape[1])
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    first = table[:, :1] if cls else torch.zeros_like(table[:, :1])
    grid, wanted = math.isqrt(table.shape[1] - cls), math.isqrt(shape[1] - 1)
    if grid == wanted:
        return torch.cat([first, table[:, cls:]], dim=1)
    square = table[:, cls:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # [1, D, G, G]
    resized = F.interpolate(square, (wanted, wanted), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1)  # [1, 1+g*g, D]


# --------------------------------------------------------------------------------------------- a network's first weights


def starting_weights(path: str | Path, modules: list[nn.Module], params: Tensor, heads: dict[str, int]) -> Tensor:
    """The vector `params` of these modules (encoder, or encoder and decoder) with the weights found in `path` in their
    places: a run's folder, or a public .pth or .safetensors. The encoder must be there whole; a decoder that is absent or
    of another shape keeps its values.

    heads: {"heads", "decoder_heads": of these modules}, which a run records, since they leave no trace in the weights'
    shapes. Says what was used, one line on stderr. Raises UserError."""
    path, fresh = Path(path), named(modules, params)
    weights = read_weights(path / "checkpoint.pt" if path.is_dir() else path)
    taken, line = fit(weights, {name: tuple(tensor.shape) for name, tensor in fresh.items()})
    if path.is_dir():
        try:
            settings = json.loads((path / "config.json").read_text())
            theirs = {name: settings[name] for name in heads if name == "heads" or "decoder_pred.weight" in taken}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path / 'config.json'} is absent or damaged ({error}); give checkpoint.pt itself") from None
        for name, number in theirs.items():
            if number != heads[name]:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{path} was trained with {flag} {number}, not {heads[name]}; give that flag")
    print(f"{path}: {line}", file=sys.stderr)
    return torch.cat([taken.get(name, tensor).to(tensor).reshape(-1) for name, tensor in fresh.items()])
