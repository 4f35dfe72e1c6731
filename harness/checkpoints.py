"""Checkpoints: written whole, read without executing anything, and refused in one line where they are not what they seem."""

import contextlib
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from harness import UserError
from harness.vectors import flatten, named, ordinary

Level = tuple[Tensor, Tensor, Tensor, int]  # parameters, first and second moments (vectors of one length), steps made


def check_records(path: Path) -> None:
    """Raise UserError where a zip file's records claim more bytes than it has, or fail their checksums."""
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > os.path.getsize(path):
            raise UserError("its records claim more bytes than the file has")
        if damaged := archive.testzip():
            raise UserError(f"its record {damaged} fails its checksum; use another copy of the file")


def read_saved(path: Path, *formats: str) -> dict:
    """What `torch.save` wrote with one of these as its "format", tensors on the CPU; nothing in the file is executed.

    Raises UserError for a file that is absent, damaged (every record's CRC is checked), or of another format."""
    wanted = " or ".join(formats)
    try:
        check_records(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a folder that has it") from None
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}); it is damaged, or no file of the kind '{wanted}'") from None
    if not isinstance(content, dict) or content.get("format") not in formats:
        raise UserError(f"{path} is no file of the kind '{wanted}'")
    return content


def newest(out: Path, *formats: str) -> dict:
    """The content of a run's checkpoint or, where that is absent or damaged, of the one before it, saying so on stderr."""
    previous = out / "checkpoint.previous.pt"
    try:
        return read_saved(out / "checkpoint.pt", *formats)
    except UserError as error:
        if not previous.exists():
            raise
        content = read_saved(previous, *formats)
        place = f"mask update {content['iteration']}" if "iteration" in content else f"step {content.get('step')}"
        print(f"mlo_mae: {error}; going on from {previous}, {place}", file=sys.stderr)
        return content


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Around whatever takes things out of a file's content: what is absent there, of another kind, or does not fit
    together becomes a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} does not fit: {error}") from None
    except Exception as error:  # a file can hold anything, and so make anything fail
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"{path} is damaged or of another version ({type(error).__name__}: {reason}); use a copy, or start again"
        ) from None


def whole_number(value: object) -> int:
    """The value, if it is a count. Raises UserError where it is not."""
    if type(value) is not int or not 0 <= value < 2**48:
        raise UserError(f"{str(value)[:80]} stands where a count should")
    return value


def packed(levels: dict[str, Level], modules: dict[str, list[nn.Module]]) -> dict:
    """{part: {parameter name: tensor}} of the levels, and their "moments", as checkpoints hold them."""
    moments = {part: {"m": m.cpu(), "v": v.cpu(), "t": t} for part, (_, m, v, t) in levels.items()}
    content = {}
    for part, (params, *_) in levels.items():
        content[part] = {name: tensor.cpu().clone() for name, tensor in named(modules[part], params).items()}
    return content | {"moments": moments}


def unpacked(content: dict, modules: dict[str, list[nn.Module]], device: torch.device) -> list[Level]:
    """The opposite of `packed`. Raises UserError where something is not these modules', and others: see `fitting`."""
    levels = []
    for part, those in modules.items():
        params, moments = flatten(those, content[part]), content["moments"][part]
        if not all(ordinary(moments[name]) and moments[name].shape == params.shape for name in "mv"):
            raise UserError(f"the moments of {part} do not fit its {len(params)} weights")
        vectors = (vector.to(device) for vector in (params, moments["m"], moments["v"]))
        levels.append((*vectors, whole_number(moments["t"])))
    return levels
