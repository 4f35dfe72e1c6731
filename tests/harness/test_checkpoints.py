"""Checkpoints: what goes in comes out, and what is not one is refused in one line without being executed."""

import copy
import io
import os
import pathlib
import zipfile

import pytest
import torch
from helpers import DAMAGED, Explosive
from torch import nn

from harness import UserError
from harness.checkpoints import Inert, fitting, load, newest, packed, read_saved, unpacked, whole_number

FORMAT = "a format 1"


def modules():
    return {
        "model": [nn.ModuleDict({"first": nn.Linear(3, 2)}), nn.ModuleDict({"second": nn.LayerNorm(4)})],
        "head": [nn.Linear(2, 5)],
    }


def levels():
    random = torch.Generator().manual_seed(0)
    return {
        part: (*(torch.randn(count, generator=random) for _ in range(3)), t)
        for part, count, t in (("model", 16, 7), ("head", 15, 2**47))
    }


def save(path, content=None, **changes):
    torch.save((content if content is not None else {"format": FORMAT} | packed(levels(), modules())) | changes, path)
    return path


def refused(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ levels in and out


def test_packed_and_unpacked_are_inverse(tmp_path):
    content = read_saved(save(tmp_path / "file"), FORMAT)
    assert list(content["model"]) == ["first.weight", "first.bias", "second.weight", "second.bias"]  # public names
    for found, expected in zip(unpacked(content, modules(), torch.device("cpu")), levels().values(), strict=True):
        assert all(map(torch.equal, found[:3], expected[:3])) and found[3] == expected[3]


def test_a_checkpoint_does_not_change_with_the_run_that_goes_on():
    running = levels()
    content = packed(running, modules())
    kept = copy.deepcopy(content)
    running["model"][0].zero_()
    assert torch.equal(content["model"]["first.weight"], kept["model"]["first.weight"])


@pytest.mark.parametrize(
    "where, value, words",
    [
        (("model", "first.weight"), torch.zeros(3, 2), "first.weight is (3, 2), expected (2, 3)"),
        (("model", "first.weight"), None, "ordinary"),
        (("head", "bias"), torch.full((5,), torch.inf), "not finite"),
        (("head", "more"), torch.zeros(1), "more is (1,), expected nothing"),
        (("moments", "head", "m"), torch.zeros(14), "moments of head do not fit its 15 weights"),
        (("moments", "head", "v"), torch.zeros(1).expand(15), None),  # a view is an ordinary tensor
        (("moments", "head", "v"), torch.zeros(15, dtype=torch.float64), "moments of head"),
        (("moments", "head", "v"), torch.zeros(15, device="meta"), "moments of head"),
        (("moments", "head", "v"), [0.0] * 15, "moments of head"),
        (("moments", "head", "t"), -1, "-1 stands where a count should"),
        (("moments", "head", "t"), 2**48, "stands where a count should"),
        (("moments", "head", "t"), True, "True stands where a count should"),
        (("moments", "head"), [], "damaged or of another version (TypeError"),
        (("moments",), None, "damaged or of another version (TypeError"),
        (("model",), {}, "first.weight is missing"),
        (("model",), [], "ordinary"),
    ],
    ids=str,
)
def test_levels_that_do_not_fit_are_refused(where, value, words):
    content = packed(levels(), modules())
    place = content
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value

    def work():
        with fitting("the file"):
            unpacked(content, modules(), torch.device("cpu"))

    if words is None:
        work()
    else:
        line = refused(work)
        assert line.startswith("the file ") and words in line


@pytest.mark.parametrize("part", ["model", "moments"])
def test_a_part_that_is_absent_is_refused(part):
    content = packed(levels(), modules())
    del content[part]
    with pytest.raises(UserError, match=f"the file is damaged or of another version .KeyError: '{part}'"), fitting("the file"):
        unpacked(content, modules(), torch.device("cpu"))


@pytest.mark.parametrize("value", [-1, 2**48, 1.0, True, None, "3", [3], torch.tensor(3), 10**4000])
def test_what_is_no_count_is_refused(value):
    assert "stands where a count should" in refused(whole_number, value)
    assert whole_number(0) == 0 and whole_number(2**48 - 1) == 2**48 - 1


def test_whatever_fails_while_a_file_is_taken_apart_is_one_line():
    for error in (
        KeyError("x"),
        TypeError(),
        RuntimeError("two\nlines\x1b[2J"),
        RecursionError("deep"),
        ZeroDivisionError("y" * 10**6),
    ):

        def work(error=error):
            with fitting("the file"):
                raise error

        line = refused(work)
        assert line.startswith(f"the file is damaged or of another version ({type(error).__name__}: ") and len(line) < 400
    with pytest.raises(KeyboardInterrupt), fitting("the file"):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="the file does not fit: a reason"), fitting("the file"):
        raise UserError("a reason")


# ------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "file", more=torch.ones(10_000))
    path.write_bytes(DAMAGED[kind](path.read_bytes()))
    line = refused(read_saved, path, FORMAT)
    known = {
        "truncated": "cut off or damaged",
        "flipped": "damaged (Bad CRC-32",
        "empty": "it is empty",
        "text": "begins with b'not '",
    }
    assert line.startswith(f"{path} cannot be read") and known.get(kind, "damaged, or no file of the kind") in line
    assert [found.name for found in tmp_path.iterdir()] == ["file"]  # nothing was executed


@pytest.mark.parametrize(
    "content",
    [{"model": {}}, {"format": "another"}, {"format": None}, [1, 2], "text", torch.zeros(2), {"format": [FORMAT]}],
    ids=str,
)
def test_a_file_of_another_format_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "file")
    assert f"is no file of the kind '{FORMAT}'" in refused(read_saved, tmp_path / "file", FORMAT)


@pytest.mark.parametrize("found", ["0", "0\x1b[31m", ""])
def test_a_file_of_another_version_is_to_be_made_again(tmp_path, found):
    """Both checkpoints of a run are: the line is about the newer."""
    kind = FORMAT.rpartition(" ")[0]
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        torch.save({"format": f"{kind} {found}"}, tmp_path / name)
    line = refused(newest, tmp_path, FORMAT)
    assert line.startswith(f"{tmp_path / 'checkpoint.pt'} is of another version: it is '{kind} ") and "make it again" in line
    assert line.isprintable()


def test_a_malicious_file_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (Explosive(), {"format": FORMAT, "model": Explosive()}):
        torch.save(content, tmp_path / "file")
        assert f"it holds an object of {os.name}.mkdir" in refused(read_saved, tmp_path / "file", FORMAT)
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_several_formats_may_be_asked_for(tmp_path):
    path = save(tmp_path / "file", {"format": "b"})
    assert read_saved(path, "a", "b") == {"format": "b"}
    assert "'a or c'" in refused(read_saved, path, "a", "c")
    assert "does not exist" in refused(read_saved, tmp_path / "nothing", "a")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """A compressed record, which torch never writes, can be a thousand times the file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    (tmp_path / "file").write_bytes(buffer.getvalue())
    assert "claim more bytes than the file has" in refused(read_saved, tmp_path / "file", FORMAT)


def test_a_file_without_checksums_is_whole(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save(tmp_path / "file")
    finally:
        torch.serialization.set_crc32_options(True)
    assert not any(record.CRC for record in zipfile.ZipFile(tmp_path / "file").infolist())
    assert torch.equal(read_saved(tmp_path / "file", FORMAT)["head"]["bias"], packed(levels(), modules())["head"]["bias"])


def test_an_object_that_is_let_in_is_not_made(tmp_path):
    path = save(tmp_path / "file", {"at": pathlib.PurePosixPath("a", "b"), "number": 3})
    assert "it holds an object of pathlib" in refused(load, path)
    content = load(path, ["pathlib.PurePosixPath", "pathlib._local.PurePosixPath"])
    assert type(content["at"]) is Inert and content["number"] == 3
    assert "it holds an object of pathlib" in refused(load, path)  # what was let in is not, afterwards


def test_a_zip_file_by_another_program_is_said_to_be_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("images.npy", b"1")
    assert "it is a zip file, but none by torch.save: it has no data.pkl" in refused(read_saved, tmp_path / "file", FORMAT)


# --------------------------------------------------------------------------------------------- the newest of two


def test_the_newest_whole_checkpoint_is_taken(tmp_path, capsys):
    path = save(tmp_path / "checkpoint.pt", iteration=8, more=torch.ones(10_000))
    assert newest(tmp_path, FORMAT)["iteration"] == 8
    path.write_bytes(DAMAGED["flipped"](path.read_bytes()))
    assert refused(newest, tmp_path, FORMAT).startswith(f"{path} cannot be read: it begins as a zip file")
    save(tmp_path / "checkpoint.previous.pt", iteration=4)
    capsys.readouterr()
    assert newest(tmp_path, FORMAT)["iteration"] == 4
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"going on from {tmp_path / 'checkpoint.previous.pt'}, mask update 4" in err
    path.unlink()
    assert newest(tmp_path, FORMAT)["iteration"] == 4
    (tmp_path / "checkpoint.previous.pt").write_bytes(b"")
    assert refused(newest, tmp_path, FORMAT).startswith(f"{path} does not exist")
