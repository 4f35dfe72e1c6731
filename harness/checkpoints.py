"""Checkpoints: written whole, read without executing anything, and refused in one line where they are not what they seem."""

import contextlib
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from harness import UserError, first_line, printable
from harness.vectors import flatten, named, ordinary

Content = TypeVar("Content")
Level = tuple[Tensor, Tensor, Tensor, int]  # parameters, first and second moments (vectors of one length), steps made
FOREIGN = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")  # how torch's unpickler names what it does not make


class Inert:
    """What stands in for an object of a file that nobody reads: takes all that the object is made of, and does nothing."""

    def __init__(self, *parts):
        pass

    def __setstate__(self, state):
        pass


def load(path: Path, harmless: Iterable[str] = ()) -> object:
    """What `torch.save` wrote, tensors on the CPU. Nothing in the file is executed: an object of a class in `harmless` (such
    as "pathlib.PosixPath") comes back as an `Inert`.

    Raises UserError, without the path, for a file that is cut off, damaged, by another program, or that holds an object of
    another class, which it names; and others, of many kinds, for whatever else is wrong."""
    with open(path, "rb") as file:
        first = file.read(4)
    if first == b"PK\x03\x04":
        check_records(path)
    elif first[:1] != b"\x80":  # where older pickles begin
        found = f"it begins with {first!r}, as nothing by torch.save does" if first else "it is empty"
        raise UserError(f"{found}; give another file")
    stand_ins = [(Inert, name) for name in harmless]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old or odd pickles: what matters here ends in an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (found := FOREIGN.search(str(error))):
            raise
        advice = "save the weights alone where it was written: torch.save(model.state_dict(), FILE)"
        raise UserError(f"it holds an object of {found[1]}, and to make one could run code; {advice}") from None


def check_records(path: Path) -> None:
    """Raise UserError where a zip file has no end or is not torch.save's, or where its records claim more bytes than it has,
    or fail their checksums. A checksum of 0 is none: torch can be told to write files without."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if sum(record.file_size for record in records) > os.path.getsize(path):
                raise UserError("its records claim more bytes than the file has, as torch.save never writes; use another copy")
            if not any(record.filename.endswith("/data.pkl") for record in records):
                raise UserError("it is a zip file, but none by torch.save: it has no data.pkl; give another file")
            for record in records:
                with archive.open(record) as file:
                    while record.CRC and file.read(2**20):
                        pass
    except zipfile.BadZipFile as error:  # the last read compares the sums
        raise UserError(f"it begins as a zip file, but is cut off or damaged ({error}); use another copy") from None


def reason_of(error: Exception) -> str:
    """What another program says went wrong, in one printable line, without its advice."""
    text = str(error).split("WeightsUnpickler error:")[-1].strip()
    return printable((text.splitlines() or [""])[0] or type(error).__name__, 300)


def read_saved(path: Path, *formats: str) -> dict:
    """What `torch.save` wrote with one of these as its "format", tensors on the CPU; nothing in the file is executed.

    Raises UserError for a file that is absent, damaged (every record's CRC is checked), or of another format."""
    wanted = " or ".join(formats)
    try:
        content = load(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a folder that has it") from None
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        raise UserError(
            f"{path} cannot be read ({reason_of(error)}): it is damaged, or no file of the kind '{wanted}'"
        ) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found in formats:
        return content
    if isinstance(found, str) and found.rpartition(" ")[0] in [name.rpartition(" ")[0] for name in formats]:
        about = f"it is '{printable(found, 100)}', and this version of the program reads '{wanted}'"
        raise UserError(f"{path} is of another version: {about}; make it again, or use that version")
    raise UserError(f"{path} is no file of the kind '{wanted}'")


def newest(out: Path, *formats: str) -> dict:
    """The content of a run's newest checkpoint that is whole, of one of these formats. Raises UserError."""
    return newest_and_path(out, *formats)[0]


def newest_and_path(out: Path, *formats: str) -> tuple[dict, Path]:
    """`newest`, and its file."""

    def place(content: dict) -> str:
        return f", mask update {content['iteration']}" if "iteration" in content else f", step {content.get('step')}"

    return of_newest(out, lambda path: read_saved(path, *formats), place)


def of_newest(
    out: Path, read: Callable[[Path], Content], place: Callable[[Content], str] = lambda found: ""
) -> tuple[Content, Path]:
    """What `read` makes of a run's checkpoint or, where that is absent or damaged, of the one before it, saying so, and its
    `place`, on stderr; and the file. Raises UserError, about the former, where neither can be read."""
    path, previous = out / "checkpoint.pt", out / "checkpoint.previous.pt"
    try:
        return read(path), path
    except UserError as error:
        try:
            found = read(previous)
        except UserError:
            also = f" ({previous.name} cannot be read either)" if previous.exists() else ""
            raise UserError(f"{error}{also}") from None
        print(f"mlo_mae: {error}; going on from {previous}{place(found)}", file=sys.stderr)
        return found, previous


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Around whatever takes things out of a file's content: what is absent there, of another kind, or does not fit
    together becomes a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} does not fit: {error}") from None
    except Exception as error:  # a file can hold anything, and so make anything fail
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} is damaged or of another version ({reason}); use a copy, or start again") from None


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
