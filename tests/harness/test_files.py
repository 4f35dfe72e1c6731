"""Files that are whole or not there at all."""

import json
import os
import sys

import pytest
import torch

from harness import UserError, files
from harness.files import append_line, drop_rows_after, read_rows, write_whole


@pytest.mark.parametrize("content", [b"new", lambda file: file.write(b"new")], ids=["bytes", "function"])
def test_what_is_written_is_there_whole_and_alone(tmp_path, content):
    write_whole(tmp_path / "file", content, tmp_path / "before")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new"}
    write_whole(tmp_path / "file", b"newer", tmp_path / "before")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"newer", "before": b"new"}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_whole(tmp_path / "file", b"old")

    def half(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(UserError, match="disk full"):
        write_whole(tmp_path / "file", half)
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_cannot_be_put_in_place_leaves_the_old_one_there(tmp_path, monkeypatch):
    """The one before it has gone to its second place by then."""
    write_whole(tmp_path / "file", b"old")
    real = os.replace

    def replace(source, target):
        if str(source).endswith(".partial"):
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="what was there before is intact"):
        write_whole(tmp_path / "file", b"new", tmp_path / "before")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


@pytest.mark.parametrize("system, failures, written", [("win32", 2, True), ("win32", 1000, False), ("linux", 1, False)])
def test_a_file_that_is_being_read_is_waited_for_on_windows(tmp_path, monkeypatch, system, failures, written):
    """There it can be replaced only once nobody has it open."""
    real, tries = os.replace, []

    def replace(source, target):
        tries.append(target)
        if len(tries) <= failures:
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        real(source, target)

    write_whole(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(files, "PATIENCE", 0.5)
    if written:
        write_whole(tmp_path / "file", b"new")
    else:
        with pytest.raises(UserError, match="used by another process"):
            write_whole(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new" if written else b"old"}
    assert (len(tries) > 1) == (system == "win32")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    """Whatever it is interrupted by, and before the old file has gone to its second place."""
    write_whole(tmp_path / "file", b"old")

    def interrupted(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", interrupted, tmp_path / "before")
    assert (tmp_path / "file").read_bytes() == b"old" and not (tmp_path / "before").exists()


def test_a_tensor_without_room_is_a_full_disk(tmp_path):
    """torch.save raises RuntimeError there; the line says what the system said."""

    class Full:
        def write(self, content):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

    with pytest.raises(UserError, match=r"file cannot be written \(No space left on device\).*--resume"):
        write_whole(tmp_path / "file", lambda file: torch.save(torch.zeros(5), Full()))
    assert not list(tmp_path.iterdir())


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [{"iteration": n, "loss": n / 3, "name": "\u2028 é\n"} for n in range(3)]
    for row in rows:
        append_line(tmp_path / "rows.jsonl", row)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"iteration": 3, "lo')  # a crash cut it short
    assert read_rows(tmp_path / "rows.jsonl") == rows
    append_line(tmp_path / "rows.jsonl", rows[0])  # takes its place
    assert read_rows(tmp_path / "rows.jsonl") == [*rows, rows[0]]
    (tmp_path / "torn.jsonl").write_text('{"it')
    append_line(tmp_path / "torn.jsonl", rows[1])
    assert read_rows(tmp_path / "torn.jsonl") == [rows[1]]
    (tmp_path / "empty.jsonl").write_text("")
    assert read_rows(tmp_path / "empty.jsonl") == []
    with pytest.raises(UserError, match="rows.jsonl cannot be written"):
        append_line(tmp_path / "nothing" / "rows.jsonl", {})


def test_rows_after_an_iteration_are_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    drop_rows_after(path, 5)
    assert not path.exists()
    path.write_text("".join(json.dumps({"iteration": n}) + "\n" for n in (2, 4, 6)) + '{"iteration": 8')
    drop_rows_after(path, 4)
    assert read_rows(path) == [{"iteration": 2}, {"iteration": 4}] and path.read_text().endswith("}\n")
    drop_rows_after(path, 0)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "content",
    [b"{nonsense}\n", b"[1]\n", b"3\n", b"\xff\xfe\n", b"{}\n{\n{}\n", b"[" * 100_000 + b"\n", b"1" * 5000 + b"\n"],
    ids=["nonsense", "list", "number", "no text", "in the middle", "nested", "digits"],
)
def test_damaged_rows_are_refused_and_left_as_they_are(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="rows.jsonl is absent or damaged"):
        read_rows(path)
    with pytest.raises(UserError, match="rows.jsonl is damaged; move it away and resume again"):
        drop_rows_after(path, 5)
    assert path.read_bytes() == content
    path.unlink()
    with pytest.raises(UserError, match="rows.jsonl is absent or damaged"):
        read_rows(path)


@pytest.mark.parametrize("row", [{}, {"iteration": "2"}, {"iteration": None}])
def test_rows_without_an_iteration_are_refused(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="rows.jsonl is damaged; move it away"):
        drop_rows_after(tmp_path / "rows.jsonl", 5)


@pytest.mark.skipif(os.name == "nt" or not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_line_on_a_full_disk_is_a_user_error(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"rows.jsonl cannot be written \(No space left on device\)"):
        append_line(tmp_path / "rows.jsonl", {"iteration": 1})
