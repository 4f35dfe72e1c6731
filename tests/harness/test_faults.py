"""What can go wrong around a run: full disks, damaged files, a second process, data that vanishes, machines that lack things.

MLO_MAE_FUZZ sets how many damaged files of each kind are tried."""

import copy
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import DAMAGED, FUZZ, SCRIPT, arguments, checkpoint_of, copied, finished_run, refused, same, weights
from PIL import Image

import mlo_mae
from mlo_mae import main

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX")
pytestmark = pytest.mark.usefixtures("bare_runs")


@pytest.fixture(scope="module")
def finished(sides, tmp_path_factory):
    """A short finished run with two checkpoints, the earlier at update 8 of 9."""
    return finished_run(sides, tmp_path_factory.mktemp("faults") / "run", "--epochs", 6, "--checkpoint-minutes", 0)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that a test may damage."""
    return copied(finished, tmp_path / "run")


def in_a_process(program, **options):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=SCRIPT.parent, **options)


# ---------------------------------------------------------------------------------------------- checkpoints and disks


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "absent"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished, run, capsys, damage):
    path, previous = run / "checkpoint.pt", run / "checkpoint.previous.pt"
    content, whole = path.read_bytes(), previous.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes(DAMAGED[damage](content))
    assert main(["pretrain", "--out", str(run), "--resume"]) == 0
    assert previous.read_bytes() == whole  # not what was damaged, in its place
    err = capsys.readouterr().err
    assert f"going on from {run / 'checkpoint.previous.pt'}, mask update 8" in err and "8/9" in err
    assert same(weights(run), weights(finished))


def test_both_checkpoints_damaged_is_one_line(run, capsys):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (run / name).write_bytes((run / name).read_bytes()[:1000])
    refused(["pretrain", "--out", run, "--resume"], capsys, "checkpoint.previous.pt", "damaged")


@POSIX
@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_and_the_run_resumable(finished, tmp_path, sides):
    """No file may grow beyond 20,000 bytes, which a checkpoint does."""
    full = in_a_process(f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import mlo_mae
sys.exit(mlo_mae.main({arguments(sides, tmp_path / "full", "--epochs", 6, "--checkpoint-minutes", 0)!r}))""")
    assert full.returncode == 2 and "Traceback" not in full.stderr
    line = full.stderr.splitlines()[-1]
    assert line.startswith("mlo_mae: ") and "checkpoint.pt" in line and "File too large" in line
    assert not list((tmp_path / "full").glob("*.partial"))  # it would fill the disk further
    assert main(["pretrain", "--out", str(tmp_path / "full"), "--resume"]) == 0
    assert same(weights(tmp_path / "full"), weights(finished))


def test_no_room_for_a_checkpoint_leaves_what_was_there(run, capsys, monkeypatch):
    """The disk is full at the 2nd checkpoint of a resumed run: what was written before stays whole."""
    (run / "checkpoint.pt").unlink()
    before = (run / "checkpoint.previous.pt").read_bytes()

    def no_room(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_room)
        assert main(["pretrain", "--out", str(run), "--resume"]) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert (run / "checkpoint.previous.pt").read_bytes() == before and not (run / "checkpoint.pt").exists()


@POSIX
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(run, capsys):
    run.chmod(0o500)
    refused(["pretrain", "--out", run, "--resume"], capsys, run)
    run.chmod(0o700)


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_has_died(run, capsys):
    holding = f"""
import dataclasses, json, pathlib, time, mlo_mae
from harness.run import Run, read_settings
out = pathlib.Path({str(run)!r})
config = read_settings(out / "config.json", mlo_mae.Config)
with Run(out, {{"config": config}}, True, mlo_mae.FORMAT, set()).at_work(9, 9, "held"):
    print("held", flush=True)
    time.sleep(120)"""
    holder = subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True, cwd=SCRIPT.parent)
    try:
        assert holder.stdout.readline() == "held\n"
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        refused(["pretrain", "--out", run, "--resume"], capsys, "another process", run)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    finally:
        holder.kill()
        holder.wait()
    assert main(["pretrain", "--out", str(run), "--resume"]) == 0


# ------------------------------------------------------------------------------------------------------- lost data


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for number in range(count):
            path = tmp_path / "images" / part / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def test_data_that_vanishes_ends_in_one_line_and_the_run_resumes(folder, tmp_path, capsys, monkeypatch):
    flags = arguments(folder, tmp_path / "run", "--epochs", 3, "--checkpoint-minutes", 0)
    real = mlo_mae.outer_iteration

    def losing(net, state, *rest):
        if state.iteration == 1:
            (folder / "train").rename(folder / "elsewhere")
        return real(net, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(mlo_mae, "outer_iteration", losing)
        assert main(flags) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("mlo_mae: ") and "restore it" in line
    (folder / "elsewhere").rename(folder / "train")
    assert main([*flags, "--resume"]) == 0
    assert main(arguments(folder, tmp_path / "undisturbed", "--epochs", 3)) == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "undisturbed"))


@POSIX
def test_a_decoding_process_that_dies_ends_in_one_line_and_the_run_resumes(folder, tmp_path, capsys, monkeypatch):
    flags = arguments(folder, tmp_path / "run", "--epochs", 12, "--checkpoint-minutes", 0)
    real = mlo_mae.outer_iteration

    def killing(net, state, *rest):
        if state.iteration == 1:
            for child in multiprocessing.active_children():
                child.kill()
        return real(net, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(mlo_mae, "outer_iteration", killing)
        assert main([*flags, "--workers", "1"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("mlo_mae: ") and "decodes images died" in line and "fewer --workers" in line
    assert main([*flags, "--resume"]) == 0


# ------------------------------------------------------------------------------------------------- hostile folders


def mutated(content, rng):
    """Bytes of a text with some damage: flipped, overwritten, cut, repeated, or numbers blown up."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(0, max(len(content), 1))), rng.integers(0, 6)
        if kind == 0 and content:
            content[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            content[at : at + int(rng.integers(1, 20))] = rng.bytes(int(rng.integers(0, 20)))
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            content[at:at] = content[at : at + 200] * int(rng.integers(1, 5))
        elif kind == 4:
            digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
            if digits:
                i = digits[int(rng.integers(0, len(digits)))]
                content[i : i + 1] = (b"9" * 12, b"-1", b"NaN", b"1e400", b"null", b"true", b"[]")[rng.integers(0, 7)]
        else:
            content[at:at] = (b"[" * 5000, b"\xff\xfe", b"\0", b'"', b"{}", b"1" * 5000)[rng.integers(0, 6)]
    return bytes(content)


ODD = [
    *(None, -1, 10**9, 10**30, math.nan, 1e300, "", "x" * 1000, True, [], {}, [1, 2], 0, 1, 3.5, 65536, 7),
    *(torch.zeros(3), torch.zeros(0), torch.tensor(1 + 1j), torch.zeros(2, 2).to_sparse(), torch.full((7,), math.nan)),
    *(torch.zeros(1).expand(10**9), torch.zeros(3, device="meta")),
]


def tampered(content, rng):
    """A checkpoint's content with a value of the wrong kind or size somewhere; written as a whole file."""
    content = copy.deepcopy(content)
    place, key = content, None
    while True:
        key = list(place)[rng.integers(0, len(place))]
        if not isinstance(place[key], dict) or not place[key] or rng.random() < 0.1:
            break
        place = place[key]
    if rng.random() < 0.1:
        del place[key]
    else:
        place[key] = ODD[rng.integers(0, len(ODD))]
    return content


def outcome(argv, capsys):
    """'done' or 'refused', of which the latter with one line; anything else is an error."""
    capsys.readouterr()
    status = main([str(argument) for argument in argv])
    printed = capsys.readouterr()
    if status == 0:
        return "done"
    assert status == 2
    said = [line for line in printed.err.splitlines() if line.startswith("mlo_mae: ") and "going on from" not in line]
    assert len(said) == 1 and said[0].isprintable(), printed.err
    assert "Traceback" not in printed.err
    return "refused"


def memory():
    """The most memory that this process has held, in MiB; 0 where that is not to be had."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "masks.jsonl", "checkpoint.pt", "checkpoint.pt's content"])
def test_damaged_run_folders_never_end_in_a_traceback(finished, tmp_path, capsys, monkeypatch, name):
    """Resume, probe and show on damaged files. Pictures, the probe's fit and writing are stubs: this is about reading."""
    monkeypatch.setattr("harness.pictures.save_figure", lambda figure, path: None)
    monkeypatch.setattr("experiments.show.grid", lambda path, rows, text, film=False: None)
    monkeypatch.setattr("experiments.probe.linear_probe", lambda *arguments, **how: {})
    monkeypatch.setattr("harness.run.write_whole", lambda *arguments, **more: None)
    run, counts, slowest = copied(finished, tmp_path / "run"), {"done": 0, "refused": 0}, 0.0
    (run / "checkpoint.previous.pt").unlink()
    path = run / name.split("'")[0]
    whole, before = path.read_bytes(), memory()
    content = checkpoint_of(run)
    commands = {"config.json": ["resume"], "metrics.jsonl": ["resume", "show"], "masks.jsonl": ["resume", "show"]}
    commands = commands.get(name, ["resume", "probe", "show"])
    for number in range(FUZZ):
        rng = np.random.default_rng([number, *name.encode()])
        if "content" in name:
            torch.save(tampered(content, rng), path)
        else:
            path.write_bytes(mutated(whole, rng))
        command = commands[number % len(commands)]
        argv = ["pretrain", "--out", run, "--resume"] if command == "resume" else [command, run]
        start = time.monotonic()
        try:
            counts[outcome(argv, capsys)] += 1
        except BaseException:
            print(f"{name} number {number}: {command}")
            raise
        slowest = max(slowest, time.monotonic() - start)
    path.write_bytes(whole)
    assert outcome(["show", run], capsys) == "done"  # it was the damage
    print(f"fuzz {name}: {FUZZ} files, {counts}, slowest {slowest:.2f} s, memory +{memory() - before:.0f} MiB")
    assert counts["refused"] > FUZZ / 10 and slowest < 30 and memory() - before < 1000


@pytest.mark.parametrize(
    "setting, value",
    [
        *(("width", 10**9), ("depth", 10**9), ("width", 65536), ("masking_width", 10**9), ("batch_size", 10**12)),
        *(("width", "64"), ("width", 64.0), ("skip_corrupt", 1), ("seed", 2**70), ("workers", 10**9), ("lr", 10**400)),
        *(("precision", "fp8"), ("preset", "none"), ("lr", None), ("lr", math.nan)),
    ],
    ids=lambda value: str(value)[:12],
)
def test_absurd_settings_are_refused_before_anything_is_allocated(run, capsys, setting, value):
    settings = json.loads((run / "config.json").read_text()) | {setting: value, "heads": 1, "decoder_heads": 1}
    (run / "config.json").write_text(json.dumps(settings))
    (run / "checkpoint.pt").unlink()
    (run / "checkpoint.previous.pt").unlink()
    before = memory()
    refused(["pretrain", "--out", run, "--resume"], capsys)
    assert memory() - before < 100


# ------------------------------------------------------------------------------------------------------ other machines


@pytest.mark.slow
def test_without_triton_the_program_runs(sides, tmp_path):
    ended = in_a_process(f"""
import sys
sys.modules["triton"] = None  # importing it now fails
import mlo_mae
assert mlo_mae.kernels.backend.triton is None
sys.exit(mlo_mae.main({arguments(sides, tmp_path / "run", "--epochs", 1)!r}))""")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["updates"] == 2


@pytest.mark.slow
def test_decoding_processes_may_be_spawned(folder, tmp_path):
    """As on macOS and Windows: a decoding process imports the script anew, whose guard must hold."""
    ended = in_a_process(f"""
import multiprocessing, runpy, sys
multiprocessing.set_start_method("spawn")
sys.argv = [{str(SCRIPT)!r}, *{arguments(folder, tmp_path / "run", "--epochs", 1, "--workers", 1)!r}]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")""")
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 1 and "Traceback" not in ended.stderr
