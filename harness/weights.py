"""Weights from elsewhere, and for elsewhere: the names of timm's VisionTransformer and of facebookresearch/mae.

    found = read_weights("mae_pretrain_vit_base.pth")       # or .safetensors, or a run's checkpoint.pt
    taken, line = fit(found.weights, {"pos_embed": (1, 65, 768), ...})        # what a network of these shapes can take

A file is never trusted and nothing in it is executed: whatever is wrong ends in a `UserError`.
"""

import contextlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import UserError, printable
from harness.checkpoints import load, of_newest, reason_of
from harness.cli import flag_name
from harness.vectors import named, ordinary

ANCHOR = "patch_embed.proj.weight"  # a ViT has it; what stands before it, in names and dicts, is a wrapper's affair
FIRST = "best.model.", "model.", "state_dict."  # of several ViTs in a file, the one that is meant, where it stands so
DEEPEST = 5  # dicts within dicts that are looked into
STANDARD = {(768, 12, 12): "vit_base_patch16_224", (1024, 24, 16): "vit_large_patch16_224"}  # timm's: width, depth, heads
FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16  # what weights are made of
HARMLESS = (  # classes whose objects stand beside weights and are not needed
    "argparse.Namespace",
    *(f"{at}.{kind}Path" for at in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows", "PurePosix", "PureWindows")),
    *(f"numpy.{at}.multiarray.{name}" for at in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
)
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
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
Shape = tuple[int, ...]


class Found(NamedTuple):
    """A network's weights in a file, and what the file says of them."""

    weights: dict[str, Tensor]  # by timm's names, on the CPU; those of types that are not known here are on "meta"
    others: list[str]  # names of what stands beside them and is another network's
    heads: dict[str, int]  # "heads", "decoder_heads", where the file says them: they leave no trace in the weights' shapes
    choice: str  # which of the file's networks it is, in words; "" where there is one
    pixels: tuple[list[float], list[float]] | None  # mean and deviation of its images' channels, where the file says them
    run: str = ""  # of a run's own checkpoint: what it calls itself


# ----------------------------------------------------------------------------------------------------- reading


def read_weights(path: str | Path) -> Found:
    """The ViT in a .safetensors file or in what torch.save wrote (.pth, .pt, .bin, .tar; both of its formats), told apart by
    their first bytes, wherever in the file it is: see `find`. Raises UserError for a file that is absent, damaged, hostile
    or holds no ViT, or several of which none is first choice."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise UserError("it is no file; give a .pth or .safetensors")
        with open(path, "rb") as file:
            first = file.read(9)
        if first[8:] == b"{":
            return find(*read_safetensors(path))
        content = load(path, HARMLESS)
        if not isinstance(content, dict):
            raise UserError(f"it holds a {type(content).__name__}, not weights by name")
        return find(content, content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a run, or a .pth or .safetensors file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # json, zipfile and torch raise many kinds for a damaged file
        advice = "give a .safetensors, or a .pth by torch.save(model.state_dict(), FILE)"
        raise UserError(f"{path} cannot be read ({reason_of(error)}); {advice}") from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the metadata of a safetensors file: the header's length (8 bytes, little-endian), a JSON header
    {name: {dtype, shape, data_offsets}}, and the tensors' bytes one after the other (github.com/huggingface/safetensors)."""
    tensors, end, size = {}, 0, os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, size - 8):
            raise UserError(f"its header claims {length} bytes of {size}")
        header = json.loads(file.read(length).decode(), object_pairs_hook=unique)
        metadata = header.pop("__metadata__", None)
        for name, entry in header.items():
            check_entry(name, entry, size)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            if start != end or stop > size - 8 - length:
                raise UserError(f"{name} overlaps another tensor, leaves a gap, or lies outside the file")
            raw, end, dtype = bytearray(file.read(stop - start)), stop, DTYPES.get(entry["dtype"])
            if dtype is None:
                tensors[name] = torch.empty(entry["shape"], dtype=torch.uint8, device="meta")
                continue
            tensor = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            tensors[name] = tensor.reshape(entry["shape"])
    if end != size - 8 - length:
        raise UserError(f"{size - 8 - length - end} bytes after its last tensor belong to none")
    return tensors, metadata if isinstance(metadata, dict) else {}


def check_entry(name: str, entry: object, size: int) -> None:
    """Raise UserError where a safetensors header says of a tensor what cannot be in a file of `size` bytes."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{name}: its header has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise UserError(f"{name} has the impossible dtype {dtype}")
    if not whole_numbers(shape, MAX_DIMS, MAX_DIM):
        raise UserError(f"{name} has the impossible shape {shape}")
    if not whole_numbers(offsets, 2, size) or len(offsets) != 2:
        raise UserError(f"{name} has the impossible place {offsets}")
    if dtype in DTYPES and offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize or offsets[1] < offsets[0]:
        raise UserError(f"{name}: {dtype} of shape {shape} does not take the bytes {offsets[0]} to {offsets[1]}")


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object as a dict. Raises UserError where a key comes twice."""
    if len(result := dict(pairs)) != len(pairs):
        raise UserError("its header names something twice")
    return result


def whole_numbers(value: object, length: int, limit: int) -> bool:
    """Whether this is a list of at most `length` integers from 0 to `limit`."""
    return isinstance(value, list) and len(value) <= length and all(type(n) is int and 0 <= n <= limit for n in value)


def find(content: dict, facts: dict) -> Found:
    """The ViT among {name: tensor, or a dict of the same kind}, told by its patch embedding: under whatever keys
    ({"model_state_dict": {...}}) and whatever prefix of names (`module.backbone.`). facts: what the file says of it.

    Raises UserError where there is none, or where there are several of which none is first choice."""
    places, names, seen, dicts = {}, [], {id(content)}, [("", 0, content)]
    for where, depth, inner in dicts:  # which grows, by each dict once: a hostile one may hold itself
        own = {name: value for name, value in inner.items() if isinstance(name, str)}
        tensors = {name: value.detach() for name, value in own.items() if isinstance(value, Tensor)}
        names += tensors
        for name in tensors:
            if name == ANCHOR or name.endswith("." + ANCHOR):
                prefix = name.removesuffix(ANCHOR)
                places[where + prefix] = prefix, tensors
        for key, value in inner.items():
            if isinstance(value, dict) and id(value) not in seen and depth < DEEPEST:
                seen.add(id(value))
                dicts.append((f"{where}{str(key)[:80]}.", depth + 1, value))
    if not places:
        raise UserError(f"it holds no ViT: none of {', '.join(names[:3])} ... is {ANCHOR}" if names else "it holds no weights")
    starts = [[place for place in places if place.startswith(first)] for first in ("", *FIRST)]
    chosen = next((some[0] for some in starts if len(some) == 1), None)
    several = ", ".join([place.rstrip(".") or "the top level" for place in places if place != chosen][:5])
    if chosen is None:
        raise UserError(f"it holds several encoders ({several}); save the one that you want into a file of its own")
    prefix, tensors = places[chosen]
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    beside = [name for name in tensors if not name.startswith(prefix)]
    decoder = {name: tensors[name] for name in beside if is_decoder(name) and name not in weights}
    choice = f"of {chosen.rstrip('.') or 'the top level'}, not of {several}" if several else ""
    others, form = [name for name in beside if name not in decoder], facts.get("format")
    own = form if isinstance(form, str) and form.startswith("mlo-mae checkpoint") else ""
    return Found(weights | decoder, others, stated_heads(facts), choice, stated_pixels(facts), own)


def stated_pixels(facts: dict) -> tuple[list[float], list[float]] | None:
    """The mean and deviation of pixels from 0 to 1 that an export states, each as a list or as its JSON, or that a checkpoint
    of a fine-tuning knows of its data."""
    found, of_data = [], facts.get("data")
    for name in ("mean", "std"):
        value = facts.get(name, of_data.get(name) if isinstance(of_data, dict) else None)
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value) if isinstance(value, str) else value
        if not isinstance(value, list) or not value or not all(type(x) is float and 0 <= x < math.inf for x in value):
            return None
        found.append(value)
    return tuple(found) if len(found[0]) == len(found[1]) and all(found[1]) else None


def stated_heads(facts: dict) -> dict[str, int]:
    """The numbers of heads that a file states: a run's checkpoint in its settings, an export in the "call" that builds it."""
    config, call = facts.get("config"), facts.get("call")
    if isinstance(config, dict):
        return {name: config[name] for name in ("heads", "decoder_heads") if type(config.get(name)) is int}
    if not isinstance(call, str):
        return {}
    stated = {}
    for (_, _, heads), name in STANDARD.items():
        if name in call:
            stated["heads"] = heads
    for part, pattern in (("heads", r"\bnum_heads=(\d{1,6})\b"), ("decoder_heads", r"\bdecoder_num_heads=(\d{1,6})\b")):
        if number := re.search(pattern, call):
            stated[part] = int(number[1])
    return stated


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


def fit(
    weights: dict[str, Tensor], expected: dict[str, Shape], others: Iterable[str] = (), heads: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], str]:
    """What a network whose parameters have the names and shapes `expected` can take from `weights`, {name: tensor}; and a
    line for people: how much was used, what is fresh, what was left over, the names `others` among it.

    heads: the encoder's, as the file states them and as this network has them; None where the file does not.
    The encoder must be there whole, but for its last norm where the file has pooled features normalised instead
    (timm's `fc_norm`). A decoder is taken whole or not at all. Position tables [1, 1+L, D] are interpolated where their
    grid differs. What is not taken may be of any type. Raises UserError for an encoder that is another one, and names the
    flags that would fit."""
    encoder = {name: shape for name, shape in expected.items() if not is_decoder(name)}
    decoder = {name: shape for name, shape in expected.items() if is_decoder(name)}
    check_sizes(weights, encoder, heads)
    optional = {"norm.weight", "norm.bias"} if "fc_norm.weight" in weights else set()
    problem = mismatch(weights, {name: shape for name, shape in encoder.items() if name in weights or name not in optional})
    if problem:
        raise UserError(f"these weights are not this network's: {problem}")

    problem = mismatch(weights, decoder) if any(map(is_decoder, weights)) else "the file has none"
    taken, grids = {}, set()
    for name, shape in expected.items():
        if name not in weights or problem and is_decoder(name):
            continue
        taken[name] = tensor = weights[name]
        if tensor.numel() > max(math.prod(shape), tensor.untyped_storage().nbytes()):  # one may be repeated without end
            raise UserError(f"{name} claims more numbers than the file has")
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds values that are not finite numbers; give weights without")
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
    if counts := Counter(name.split(".")[0] for name in [*(name for name in weights if name not in taken), *others]):
        parts.append("unused: " + ", ".join(f"{part} ({count})" if count > 1 else part for part, count in counts.items()))
    return taken, "; ".join(parts)


def check_sizes(weights: dict[str, Tensor], encoder: dict[str, Shape], heads: tuple[int, int] | None) -> None:
    """Raise UserError where patch size, width, depth or heads (the file's and here) differ, naming all flags at once, or
    channels do."""

    def sizes(names, shape):
        blocks = {name.split(".")[1] for name in names if name.startswith("blocks.")}
        return {"--patch-size": shape[2], "--width": shape[0], "--depth": len(blocks)}

    anchor, here = weights.get(ANCHOR), encoder[ANCHOR]
    found = tuple(anchor.shape) if ordinary(anchor, FLOATS) else ()
    if len(found) != 4 or found[2] != found[3] or "cls_token" not in weights:
        raise UserError("these weights hold no ViT with square patches and a class token")
    theirs, ours = sizes(weights, found), sizes(encoder, here)
    if heads:
        theirs["--heads"], ours["--heads"] = heads
    if theirs != ours:
        wrong = [flag for flag in ours if theirs[flag] != ours[flag]]
        flags, now = (" ".join(f"{flag} {values[flag]}" for flag in wrong) for values in (theirs, ours))
        unknown = ", and the --heads they were trained with" if "--width" in wrong and not heads else ""
        raise UserError(f"these weights fit {flags}, not {now}: give {flags}{unknown}")
    if found[1] != here[1]:
        raise UserError(f"these weights are for images of {found[1]} channels, and the data's have {here[1]}")


def mismatch(weights: dict[str, Tensor], expected: dict[str, Shape]) -> str:
    """The first reason why `weights` cannot fill all of `expected`, in words, or "". A weight that the file has in addition
    inside one of the expected parts (such as a block's layer scale) would be missed by whoever trained it: a reason too."""
    for name, shape in expected.items():
        if name not in weights:
            return f"{name} is missing"
        if not ordinary(weights[name], FLOATS):
            known = weights[name].dtype not in FLOATS and weights[name].device.type == "cpu"
            return f"{name} is not of floating-point numbers but {weights[name].dtype if known else 'of a type unknown here'}"
        found = tuple(weights[name].shape)
        if found != shape and not (name.endswith("pos_embed") and resizable(found, shape)):
            return f"{name} is {list(found)}, here {list(shape)}"
    parts = {name.split(".")[0] for name in expected} | {"norm_pre", "reg_token", "dist_token"}
    parts |= {name for name in ("register_tokens",) if name in weights and weights[name].numel()}  # some keep an empty one
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

    heads: {"heads", "decoder_heads": of these modules}, which must be those that the file states, if it does.
    Says what was used, one line on stderr. Raises UserError."""
    path, fresh = Path(path), named(modules, params)
    found = of_newest(path, read_weights)[0] if path.is_dir() else read_weights(path)
    both = (found.heads["heads"], heads["heads"]) if "heads" in found.heads else None
    try:
        taken, line = fit(found.weights, {name: tuple(tensor.shape) for name, tensor in fresh.items()}, found.others, both)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    unknown = []
    for name in heads if "decoder_pred.weight" in taken else ["heads"]:
        flag, theirs = flag_name(name), found.heads.get(name)
        if theirs is None:
            unknown.append(f"{flag} {heads[name]}")
        elif theirs != heads[name]:
            raise UserError(f"{path}: these weights fit {flag} {theirs}, not {flag} {heads[name]}: give {flag} {theirs}")
    parts = [line] + ([f"weights {found.choice}"] if found.choice else [])
    if unknown:
        parts.append(f"heads unknown, the file does not say: {' '.join(unknown)} taken, give those it was trained with")
    print(printable(f"{path}: {'; '.join(parts)}", 2000), file=sys.stderr)
    return torch.cat([taken.get(name, tensor).to(tensor).reshape(-1) for name, tensor in fresh.items()])
