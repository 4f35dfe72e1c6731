"""Whole runs as a user meets them: what they leave, interrupted and resumed ones, and bad input.

MLO_MAE_KILLS sets how many runs are killed and resumed."""

import contextlib
import dataclasses
import errno
import importlib.util
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    DAMAGED,
    SCRIPT,
    Explosive,
    arguments,
    bare,
    checkpoint_of,
    copied,
    finished_run,
    refused,
    same,
    stopped,
    weights,
    write_npz,
    write_sides,
)

import mlo_mae
from experiments import open_run
from harness import UserError, cli
from harness import run as run_module
from harness.cli import flag
from harness.files import read_rows
from harness.readers import blaming
from harness.run import (
    Run,
    add_run_flags,
    difference,
    read_masks,
    read_metrics,
    read_settings,
    refuse_taken,
    settings_of,
)
from harness.schedule import schedule
from harness.signals import Interrupted
from harness.vectors import unflatten
from mlo_mae import Config, build, main

pytestmark = pytest.mark.usefixtures("bare_runs")

# -------------------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_its_files_and_ends_with_json(whole_run):
    out, summary, stderr = whole_run
    pictures = {"masks.png", "curves.png", "masks-over-training.png"}
    files = {"config.json", "metrics.jsonl", "masks.jsonl", "checkpoint.pt", "probe.json", "lock"}
    assert {path.name for path in out.iterdir()} == files | pictures
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(2, 31, 2))  # ceil(20 epochs * 48 images / (16 * 2))
    losses = {"level1_loss", "level2_loss", "level3_loss", "reconstruction_error", "hypergradient_norm"}
    for name in losses | {"p_mean", "p_std", "p_entropy", "mask_overlap", "images_per_second"}:
        assert all(math.isfinite(row[name]) for row in rows), name
    assert all(0 <= row["mask_churn"] <= 1 for row in rows[1:])
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and 0 < seconds[0] < seconds[-1] < 300
    cfg = Config(**json.loads((out / "config.json").read_text()))
    for row in rows:  # what the step used that was made last
        done, steps = row["iteration"] * cfg.level1_steps - 1, 30 * cfg.level1_steps
        assert row["learning_rate"] == pytest.approx(cfg.lr * schedule(done, steps, cfg.warmup * steps))
        look = row["iteration"] - 1  # T learns throughout
        assert row["mask_learning_rate"] == pytest.approx(cfg.mask_lr * schedule(look, 30, cfg.warmup * 30))
    assert all(0 < row["waiting_share"] < 1 for row in rows)
    assert rows[-1]["reconstruction_error"] < rows[0]["reconstruction_error"]
    assert summary["command"] == "pretrain" and summary["probe"] == json.loads((out / "probe.json").read_text())
    assert summary["updates"] == 30 and summary.items() >= rows[-1].items()
    assert "L1=" in stderr and "L2=" in stderr and "L3=" in stderr and "img/s=" in stderr
    assert json.loads((out / "config.json").read_text())["epochs"] == 20


def test_masks_are_recorded_over_training(whole_run):
    out = whole_run[0]
    rows = [json.loads(line) for line in (out / "masks.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(3, 31, 3)) and rows[-1]["epoch"] == 20  # ten times
    net, state, splits = open_run(out, "cpu")
    images = splits.watched(8)[0]
    p = mlo_mae.masking_probability(net, state.psi.params, images, state.theta.params[: net.encoder_size])
    assert p.shape == torch.tensor(rows[-1]["p"]).shape and torch.allclose(p, torch.tensor(rows[-1]["p"]), atol=6e-4)
    assert not torch.allclose(torch.tensor(rows[0]["p"]), torch.tensor(rows[-1]["p"]), atol=1e-2)
    values, epochs = read_masks(out / "masks.jsonl", (8, 16))
    assert np.array_equal(values[-1], rows[-1]["p"]) and epochs == [row["epoch"] for row in rows]


@pytest.mark.slow
def test_same_seed_same_weights_other_seed_others(whole_run, sides, tmp_path):
    assert main(arguments(sides, tmp_path / "same", "--epochs", 20, "--resume")) == 0  # which finds nothing, and starts it
    assert same(weights(whole_run[0]), weights(tmp_path / "same"))
    assert main(arguments(sides, tmp_path / "other", "--epochs", 20, "--seed", 1)) == 0
    assert not same(weights(whole_run[0]), weights(tmp_path / "other"))


def test_every_form_of_the_hypergradient_runs_and_agrees(sides, tmp_path):
    forms = {name: ["--hypergradient", name] for name in mlo_mae.HYPERGRADIENTS}
    forms |= {"full": ["--unroll", "full", "--mask-batches", 1], "one batch": ["--mask-batches", 1]}
    steps = ["--level2", "steps", "--pooling", "cls", "--head-steps", 2]
    forms |= {"steps": steps, "steps, full": [*steps, "--unroll", "full", "--mask-batches", 1]}
    forms |= {"embeddings": ["--masking-network", "shared", "--masking-input", "embeddings", "--mask-choice", "odds"]}
    forms |= {"published": ["--masking-network", "mlp", "--mask-choice", "highest", *steps, "--head-norm", "layer"]}
    for name, flags in forms.items():
        assert main(arguments(sides, tmp_path / name, "--epochs", 1, "--log-every", 1, *flags)) == 0
    last = {name: read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in forms}
    assert last["unrolled"]["level3_loss"] == pytest.approx(last["exact"]["level3_loss"], rel=1e-4)
    assert last["unrolled"]["hypergradient_norm"] == pytest.approx(last["exact"]["hypergradient_norm"], rel=0.02)


def test_random_masking_is_plain_mae(sides, tmp_path):
    assert main(arguments(sides, tmp_path / "mae", "--epochs", 2, "--masking", "random", "--log-every", 1, "--no-crop")) == 0
    rows = read_metrics(tmp_path / "mae" / "metrics.jsonl")
    assert all(row["level1_loss"] == row["reconstruction_error"] and "level3_loss" not in row for row in rows)
    assert not (tmp_path / "mae" / "masks.jsonl").exists()  # nor a picture of masks over training, which would be of no T
    content = checkpoint_of(tmp_path / "mae")
    assert content["moments"]["masking"]["t"] == 0 and content["moments"]["model"]["t"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, choice, level2", [("tokens", "random", "ridge"), ("shared", "odds", "steps"), ("mlp", "highest", "steps")]
)
def test_masks_are_random_before_their_start_and_resuming_knows(sides, tmp_path, monkeypatch, network, choice, level2):
    """30 updates, T from the 15th on; stopped before and after, a resumed run ends with the same weights."""
    flags = ["--epochs", 20, "--mask-start", 0.5, "--masking-network", network, "--mask-choice", choice, "--level2", level2]
    flags += ["--no-crop"]  # crops have a part beside the images, which does not count in L1
    assert main(arguments(sides, tmp_path / "whole", *flags)) == 0
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    for row in rows:
        learned = row["iteration"] >= 16
        assert ("level2_loss" in row, "level3_loss" in row, "hypergradient_norm" in row) == (learned,) * 3
        assert (row["p_mean"] == 1) == (not learned)
        assert learned or row["level1_loss"] == row["reconstruction_error"]
    assert checkpoint_of(tmp_path / "whole")["moments"]["masking"]["t"] == 15

    early, late = (stopped(sides, tmp_path / name, monkeypatch, lines, *flags) for name, lines in (("early", 5), ("late", 10)))
    assert 10 <= early["iteration"] < 15 < late["iteration"] < 30
    net, (_, phi, psi) = build(Config(**early["config"]), 16, 3, 2)
    for part, module, start in (("head", net.head, phi), ("masking", net.masking, psi)):
        assert same(early[part], unflatten(module, start)) and early["moments"][part]["t"] == 0
        assert not same(late[part], unflatten(module, start)) and late["moments"][part]["t"] == late["iteration"] - 15
    for name in ("early", "late"):
        assert main(["pretrain", "--out", str(tmp_path / name), "--resume"]) == 0
        assert same(weights(tmp_path / name), weights(tmp_path / "whole"))


PARTS = ["--epochs", 20, "--mask-start", 0.2, "--mask-until", 0.5]  # T learns from update 6 of 30 to 15


@pytest.fixture(scope="module")
def in_parts(sides, tmp_path_factory):
    """A run that T learns in the middle of."""
    return finished_run(sides, tmp_path_factory.mktemp("parts") / "whole", *PARTS)


def test_a_run_has_three_parts(sides, tmp_path):
    run = finished_run(sides, tmp_path / "whole", *PARTS, "--no-crop")  # what crops have beside images does not count in L1
    content, rows = checkpoint_of(run), read_metrics(run / "metrics.jsonl")
    for row in rows:  # each of two updates
        begun, learning = row["iteration"] > 6, 6 < row["iteration"] <= 16  # T's last, 15, is in the line of 16
        assert ("level3_loss" in row) == ("level3_chance" in row) == learning
        assert (row["p_mean"] == 1) == (row["iteration"] < 6)
        assert (row["level1_loss"] == row["reconstruction_error"]) == (not begun)
    assert {part: moments["t"] for part, moments in content["moments"].items()} == {"model": 60, "head": 9, "masking": 9}
    assert content["iteration"] == 30 and content["eyes"]["weights"].keys() < content["model"].keys()
    assert not torch.equal(content["eyes"]["weights"]["cls_token"], content["model"]["cls_token"])
    masks = [json.loads(line) for line in (run / "masks.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in masks] == list(range(7, 16)) and masks[0]["p"] != masks[-1]["p"]
    net, state, splits = open_run(run, "cpu")
    assert same(unflatten(net.encoder, state.eyes), content["eyes"]["weights"])
    p = mlo_mae.masking_probability(net, state.psi.params, splits.watched(8)[0], mlo_mae.eyes_of(net, state))
    assert torch.allclose(p, torch.tensor(masks[-1]["p"]), atol=6e-4)


def test_a_signal_ends_the_maps_of_p_at_once(in_parts, sides, tmp_path, monkeypatch):
    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it goes on")

    with monkeypatch.context() as patch:
        patch.setattr(mlo_mae, "weight_maps", interrupted)
        assert main(arguments(sides, tmp_path / "cut", *PARTS, "--checkpoint-minutes", 60)) == 143
    assert checkpoint_of(tmp_path / "cut")["iteration"] == 15  # after which T stays as it is
    assert main(["pretrain", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert same(weights(tmp_path / "cut"), weights(in_parts))


@pytest.mark.parametrize("lines", [7, *(pytest.param(lines, marks=pytest.mark.slow) for lines in (1, 3, 5, 8, 12))])
def test_a_run_is_the_same_in_whichever_part_it_was_stopped(in_parts, sides, tmp_path, monkeypatch, lines):
    """Seven lines: at the very update after which T stays as it is."""
    content = stopped(sides, tmp_path / "cut", monkeypatch, lines, *PARTS, "--checkpoint-minutes", 60)
    assert content["iteration"] == 2 * lines + 1 and ("weights" in content["eyes"]) == (lines > 7)
    assert main(["pretrain", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    ours, theirs = checkpoint_of(tmp_path / "cut"), checkpoint_of(in_parts)
    assert same(weights(tmp_path / "cut"), weights(in_parts)) and same(ours["eyes"]["weights"], theirs["eyes"]["weights"])
    for part, moments in theirs["moments"].items():
        found = ours["moments"][part]
        assert torch.equal(found["m"], moments["m"]) and torch.equal(found["v"], moments["v"]) and found["t"] == moments["t"]
    assert read_rows(tmp_path / "cut" / "masks.jsonl") == read_rows(in_parts / "masks.jsonl")


@pytest.mark.parametrize("lines", [5, 8, pytest.param(11, marks=pytest.mark.slow)])
def test_a_run_whose_t_waits_goes_on_as_it_would_have(sides, tmp_path, monkeypatch, lines):
    """Five lines: while T learns, having waited; eight: in what waiting has added to its part; eleven: after that."""
    flags = [*PARTS, "--mask-wait", 0.2, "--checkpoint-minutes", 60]
    whole = finished_run(sides, tmp_path / "whole", *flags)
    content, rows = checkpoint_of(whole), read_metrics(whole / "metrics.jsonl")
    waited = content["waited"]
    assert 0 < waited <= 6 and content["moments"]["masking"]["t"] == 9  # the steps of T are made later, not left out
    assert content["moments"]["head"]["t"] == 9 + waited
    for row in rows:
        assert ("level3_loss" in row) == (6 < row["iteration"] < 17 + waited)
    assert rows[-1]["waited"] == waited and "waited" not in rows[0]
    masks = [row["iteration"] for row in read_rows(whole / "masks.jsonl")]
    assert len(masks) == 9 and masks[-1] == 15 + waited
    cut = stopped(sides, tmp_path / "cut", monkeypatch, lines, *flags)
    assert cut["iteration"] == 2 * lines + 1 and 0 < cut["waited"] and ("weights" in cut["eyes"]) == (lines == 11)
    assert lines != 8 or 15 < cut["iteration"] < 15 + cut["waited"]
    assert main(["pretrain", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert same(weights(tmp_path / "cut"), weights(whole)) and checkpoint_of(tmp_path / "cut")["waited"] == waited
    assert read_rows(tmp_path / "cut" / "masks.jsonl") == read_rows(whole / "masks.jsonl")


def test_a_run_whose_t_never_learns_is_whole_and_says_so(sides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mlo_mae, "chance_loss", lambda *given: 0.0)
    run = tmp_path / "run"
    assert main(arguments(sides, run, *PARTS, "--masking-network", "tokens", "--mask-wait", 1)) == 0
    assert "a head no better than chance in all of its 24 looks, and never learned" in capsys.readouterr().err
    assert cli.command("show").draw_run(*open_run(run, "cpu"), run) == [run / "masks.png", run / "curves.png"]
    content = checkpoint_of(run)
    assert content["waited"] == 24 and not any(tensor.any() for tensor in content["masking"].values())
    refused(arguments(sides, tmp_path / "given", "--masking-from", run), capsys, "its T has not learned")
    model, images = mlo_mae.load(run, "cpu"), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(UserError, match="no T that has learned"):
        model.weights(images)
    assert model.reconstruct(images)[1].any()


@dataclasses.dataclass(frozen=True)
class Settings:
    preset: str = flag("small", "")
    data: str = flag("shapes", "")
    masking: str = flag("learned", "")
    seed: int = flag(0, "")


@pytest.mark.parametrize(
    "given, name",
    [
        ([], "small-learned-0"),
        (["--masking", "random", "--seed", "3"], "small-random-3"),
        (["--data", "shapes"], "small-learned-0"),
        (["--preset", "large"], "large-learned-0"),
        (["--preset", "large", "--data", "c100"], "large-learned-0"),
        (["--preset", "large", "--data", "shapes"], "shapes-learned-0"),
        (["--data", "c100"], "c100-learned-0"),
        (["--data", "far/away/clutter.npz"], "clutter-learned-0"),
        (["--data", "far/away/birds/"], "birds-learned-0"),
        (["--data", os.path.join("far", "..")], f"{Path.cwd().name}-learned-0"),
        (["--data", os.path.abspath(os.sep)], "small-learned-0"),
    ],
    ids=str,
)
def test_a_run_is_named_after_its_preset_or_its_own_data(monkeypatch, given, name):
    parser = cli.Parser()
    add_run_flags(parser, Settings, "<masking>")
    presets = {"small": {}, "large": {"data": "c100"}}
    assert settings_of(vars(parser.parse_args(given)), Settings, presets, "<masking>")[1] == Path("runs") / name
    flags = vars(parser.parse_args([*given, "--out", "there"]))
    assert settings_of(flags, Settings, presets, "<masking>")[1:] == (Path("there"), False)
    again = vars(parser.parse_args([*given, "--resume"]))
    if "data" in again:  # perhaps of a run that is elsewhere, under the data's former name
        with pytest.raises(UserError, match=r"there is no runs.*; with --data, say with --out which run is to go on"):
            settings_of(dict(again), Settings, presets, "method")
    monkeypatch.setattr(Path, "exists", lambda path: True)
    cfg, out, resume = settings_of(again, Settings, presets, "method")
    assert resume and out.name == name.replace(cfg.masking, "method")


# ------------------------------------------------------------------------------------------ interrupt and resume


def wait_for_line(out, process, lines=2):
    """Until the run has written some metrics, so that a signal finds it at work."""
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= lines):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", [*range(int(os.environ.get("MLO_MAE_KILLS", 2))), None])
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupted_and_resumed_runs_end_with_the_same_weights(whole_run, sides, tmp_path, attempt):
    """Killed at a random moment that follows from `attempt`; interrupted where that is None."""
    chance, number = random.Random(attempt or 0), signal.SIGINT if attempt is None else signal.SIGKILL
    argv = arguments(sides, tmp_path / "cut", "--epochs", 20, "--checkpoint-minutes", 0)
    process = subprocess.Popen([sys.executable, SCRIPT, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_line(tmp_path / "cut", process, chance.randint(1, 13))
    time.sleep(chance.uniform(0, 0.1))
    process.send_signal(number)
    _, stderr = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130 and "; continue with --out " in stderr and " --resume" in stderr
    assert not (tmp_path / "cut" / "probe.json").exists()
    assert main(["pretrain", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert same(weights(whole_run[0]), weights(tmp_path / "cut"))
    rows = read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(2, 31, 2))


@pytest.mark.parametrize("lines", [7, pytest.param(1, marks=pytest.mark.slow), pytest.param(14, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_weights(whole_run, sides, tmp_path, monkeypatch, lines):
    """The signal comes after the iteration has decided that no checkpoint is due: the stop is saved all the same."""
    content = stopped(sides, tmp_path / "cut", monkeypatch, lines, "--epochs", 20, "--checkpoint-minutes", 60)
    assert 2 * lines <= content["iteration"] <= 2 * lines + 1
    assert main(["pretrain", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    ours, theirs = checkpoint_of(tmp_path / "cut"), checkpoint_of(whole_run[0])
    assert same(weights(tmp_path / "cut"), weights(whole_run[0]))
    for part, moments in theirs["moments"].items():
        found = ours["moments"][part]
        assert torch.equal(found["m"], moments["m"]) and torch.equal(found["v"], moments["v"]) and found["t"] == moments["t"]
    cut, whole = (read_rows(run / "masks.jsonl") for run in (tmp_path / "cut", whole_run[0]))
    assert cut == whole
    cut, whole = (read_metrics(run / "metrics.jsonl") for run in (tmp_path / "cut", whole_run[0]))
    assert [row["iteration"] for row in cut] == [row["iteration"] for row in whole]
    for row, expected in zip(cut, whole):  # a line holds means since the one before it, or since the run was resumed
        if not content["iteration"] < row["iteration"] <= content["iteration"] + 2:
            assert [row[f"level{n}_loss"] for n in (1, 2, 3)] == [expected[f"level{n}_loss"] for n in (1, 2, 3)]


def test_a_finished_run_is_resumed_without_another_step(whole_run, tmp_path):
    run = copied(whole_run[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main(["pretrain", "--out", str(run), "--resume"]) == 0
    after = {path.name: path.read_bytes() for path in run.iterdir()}
    assert after == before


@pytest.mark.slow
def test_what_the_machine_decides_may_change_when_a_run_is_resumed(whole_run, sides, tmp_path, monkeypatch):
    stopped(sides, tmp_path / "cut", monkeypatch, 5, "--epochs", 20)
    flags = ["--checkpoint-minutes", "1", "--data-dir", "elsewhere", "--accumulate", "2", "--workers", "0"]
    assert main(["pretrain", "--out", str(tmp_path / "cut"), "--resume", *flags]) == 0
    ours, theirs = weights(tmp_path / "cut"), weights(whole_run[0])
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)  # parts sum in another order
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["checkpoint_minutes"], config["data_dir"], config["accumulate"]) == (1, "elsewhere", 2)


# ------------------------------------------------------------------------------------------------- a run's parts


def settings(**changes):
    return {"config": {"width": 16, "device": "cpu"} | changes, "data": {"size": 3}}


def run_in(out, resume=False, minutes=0.0, **changes):
    return Run(out, settings(**changes), resume, "a format", {"device"}, minutes)


def test_a_line_holds_means_and_checkpoints_come_after_minutes(tmp_path, monkeypatch):
    now, saved = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run, cfg = run_in(tmp_path / "run", minutes=5.0), types.SimpleNamespace(log_every=2, batch_size=4, level1_steps=3)
    run.save = lambda content: (saved.append(content["n"]), setattr(run, "saved", now[0]))
    with run.at_work(100, 0, ""):
        for n, loss in enumerate((1.0, 3.0, 5.0, 7.0), 1):
            now[0] += 149
            run.after(n, {"level1_loss": torch.tensor(loss)}, cfg, lambda means, n=n: {"epoch": n}, lambda n=n: {"n": n})
        assert saved == [3]  # after 447 seconds
        for seconds, due in ((150, False), (2, True), (299, False), (2, True)):  # 149 have passed since
            now[0] += seconds
            assert run.is_due(5) == due
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["level1_loss"] for row in rows] == [2.0, 6.0] and [row["seconds"] for row in rows] == [298.0, 596.0]
    assert [row["images_per_second"] for row in rows] == pytest.approx([2 * 4 * 3 / 298] * 2)

    torch.save({"format": "a format"} | settings(), tmp_path / "run" / "checkpoint.pt")
    run = run_in(tmp_path / "run", resume=True)
    with run.at_work(100, 4, ""):
        for n in (5, 6):
            now[0] += 10
            run.after(n, {"level1_loss": torch.tensor(1.0)}, cfg, lambda means: {"epoch": n}, dict)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["seconds"] == 596.0 + 20.0


def checkpoint_in(out, **changes):
    out.mkdir()
    torch.save({"format": "a format"} | settings() | changes, out / "checkpoint.pt")


CHANGED = {  # and what is then said of them
    "more images": (lambda images, labels: (np.tile(images, (2, 1, 1, 1)), np.tile(labels, 2)), "number of images: {"),
    "other labels": (lambda images, labels: (images, 1 - labels), "or labels differ"),
    "one other pixel": (
        lambda images, labels: (images ^ (np.arange(images.size).reshape(images.shape) == 5), labels),
        "images (of a folder: the names of its files)",
    ),
    "one label more": (
        lambda images, labels: (images, labels + (np.arange(len(labels)) < 6)),
        "class names: 2 (0, 1) there, 3 (0, 1, 2) here",
    ),
}


@pytest.fixture(scope="module")
def data_and_run(tmp_path_factory):
    """A file of images, and a finished run on it that was fine-tuned."""
    folder = tmp_path_factory.mktemp("own")
    data_file = write_sides(folder / "sides.npz")
    run = finished_run(data_file, folder / "run")
    assert main(["finetune", str(run), "--epochs", "2"]) == 0
    return data_file, run


def test_a_run_goes_on_with_a_copy_of_its_data(data_and_run, tmp_path, capsys):
    """Elsewhere, and of another day."""
    data_file, run = data_and_run
    os.utime(data_file, (1, 1))
    moved = data_file.rename(tmp_path / "moved.npz")
    refused(["probe", run], capsys, data_file, "--data")
    with bare():
        for command in (
            ["probe", run],
            ["show", run],
            ["finetune", run, "--resume", "--epochs", 2],
            arguments(moved, run, "--resume"),
        ):
            assert main([*map(str, command), "--data", str(moved)]) == 0, command
        moved.rename(data_file)
        assert main(arguments(data_file, run, "--resume")) == 0


@pytest.mark.parametrize("change", CHANGED)
def test_a_run_does_not_go_on_with_other_data(data_and_run, capsys, change):
    """What differs is named, and nothing is written."""
    (data_file, run), (changed, words) = data_and_run, CHANGED[change]
    whole = data_file.read_bytes()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    arrays = dict(np.load(data_file))
    images, labels = changed(arrays["train_images"], arrays["train_labels"])
    np.savez(data_file, **arrays | {"train_images": images.astype(np.uint8), "train_labels": labels})
    refused(arguments(data_file, run, "--resume"), capsys, run, "started with other data: ", words, "another --out")
    for command in (["probe", run], ["show", run], ["finetune", run, "--resume"]):
        refused(command, capsys, data_file, f"not the data that {run} was trained on: ", words)
    data_file.write_bytes(whole)
    assert before == {path: path.read_bytes() for path in before}


def test_the_class_that_differs_among_many_is_told():
    theirs = [str(number) for number in range(1000)]
    theirs, ours = {"class_names": theirs, "mean": 1}, {"class_names": [*theirs[:-1], "other"], "mean": 2}
    assert difference(theirs, ours, {"mean"}) == "class names, number 999: 999 there, other here"
    assert difference(theirs, ours, {"class_names", "mean"}) == ""


def test_last_digits_of_the_mean_do_not_keep_a_run_from_going_on(sides, tmp_path):
    """They may differ by machine."""
    with bare():
        assert main(arguments(sides, tmp_path / "run")) == 0
        assert main(["finetune", str(tmp_path / "run"), "--epochs", "2"]) == 0
        for path in (tmp_path / "run" / "checkpoint.pt", tmp_path / "run" / "finetune-short-0" / "checkpoint.pt"):
            content = torch.load(path, weights_only=True)
            content["data"]["mean"] = [math.nextafter(value, 1) for value in content["data"]["mean"]]
            torch.save(content, path)
        assert main(arguments(sides, tmp_path / "run", "--resume")) == 0
        assert main(["finetune", str(tmp_path / "run"), "--epochs", "2", "--resume"]) == 0


def test_epochs_that_make_no_whole_mask_updates_are_said(sides, tmp_path, capsys):
    """48 images are trained on."""
    with bare():
        for batch, steps, words in ((24, 2, ""), (32, 2, "data are seen 1.3 times, not 1: a mask update takes 64 images (")):
            flags = ["--masking", "random", "--epochs", 1, "--batch-size", batch, "--level1-steps", steps]
            assert main(arguments(sides, tmp_path / str(batch), *flags)) == 0
            told = capsys.readouterr().err
            assert words in told and ("data are seen" in told) == bool(words)


def test_patches_of_one_value_are_refused_where_they_are_reconstructed(tmp_path, capsys):
    """Their pixels would be divided by a deviation of 0. Fine-tuning reconstructs nothing."""
    grey = write_npz(tmp_path / "grey.npz", n=30, colour=False)
    refused(arguments(grey, tmp_path / "run", "--patch-size", 1), capsys, "a patch of one value", "--patch-size 2 or more")
    assert not (tmp_path / "run").exists()
    tiny = ["--patch-size", "1", "--width", "8", "--depth", "1", "--heads", "2", "--epochs", "2"]
    assert main(["finetune", "--from-scratch", "--data", str(grey), "--out", str(tmp_path / "tuned"), *tiny]) == 0


def test_looking_at_a_folder_writes_nothing(tmp_path):
    run = run_in(tmp_path / "run")
    assert run.checkpoint is None and not (tmp_path / "run").exists()
    run.beside["more"] = lambda file: file.write(b"beside")
    with run.at_work(3, 0, "label"):
        files = {path.name for path in (tmp_path / "run").iterdir()}
        assert files == {"config.json", "more", "lock"} and (tmp_path / "run" / "more").read_bytes() == b"beside"
    with pytest.raises(UserError, match="exists already; continue it with --resume, or choose another --out"):
        run_in(tmp_path / "run")
    assert run_in(tmp_path / "run", resume=True).checkpoint is None  # it was stopped before its first


@pytest.mark.parametrize(
    "config, data, words",
    [
        ({"width": 32}, {"size": 3}, "--width 32, not 16; resume it with its own flags or choose another --out"),
        ({"width": False}, {"size": 3}, "started with --no-width, not 16;"),
        ({"width": 16}, {"size": 4}, "started with other data: size: 4 there, 3 here"),
        ({"height": 16}, {"size": 3}, "another version or another command"),
        ({}, {"size": 3}, "another version or another command"),
        (None, {"size": 3}, "another version or another command"),
        ({"width": 16}, None, "another version or another command"),
        ({"width": torch.ones(3)}, {"size": 3}, "checkpoint.pt is damaged or of another version (RuntimeError"),
        ({"width": 16}, {"size": [torch.ones(3)]}, "started with other data: size: [tensor"),
        ({"width": 16, "device": "cuda"}, {"size": 3}, None),
    ],
    ids=str,
)
def test_a_run_of_other_settings_is_not_resumed(tmp_path, config, data, words):
    config = config if not config else {"device": "cpu"} | config
    checkpoint_in(tmp_path / "run", config=config, data=data)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    if words is None:
        assert run_in(tmp_path / "run", resume=True).checkpoint["config"] == config
    else:
        with pytest.raises(UserError) as caught:
            run_in(tmp_path / "run", resume=True)
        assert str(tmp_path / "run") in str(caught.value) and words in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == {"checkpoint.pt": before}


def test_files_beside_stay_when_a_run_is_resumed(tmp_path):
    checkpoint_in(tmp_path / "run")
    (tmp_path / "run" / "more").write_bytes(b"as it was learned")
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps({"iteration": n}) + "\n" for n in (2, 4, 6)))
    run = run_in(tmp_path / "run", resume=True, device="cuda")
    run.beside["more"] = b"learned again"
    with run.at_work(9, 4, "label"):
        assert (tmp_path / "run" / "more").read_bytes() == b"as it was learned"
        assert json.loads((tmp_path / "run" / "config.json").read_text())["device"] == "cuda"
        assert [row["iteration"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [2, 4]


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    run = run_in(tmp_path / "run")
    with run.at_work(3, 0, "label"):
        run.save({"model": {"weight": torch.ones(2)}})
        before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
        with pytest.raises(UserError, match="a weight is not finite; .*checkpoint.pt is left as it was: lower the learning"):
            run.save({"moments": {"model": {"m": torch.tensor([0, math.nan])}}})
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
        run.save({"model": {"weight": torch.zeros(2)}})
        assert (tmp_path / "run" / "checkpoint.previous.pt").read_bytes() == before


@pytest.mark.parametrize("total", [1, 3, 10, 30, 1234])
def test_a_run_has_ten_tenths_and_the_last_ends_it(tmp_path, total):
    run = run_in(tmp_path / "run")
    with run.at_work(total, 0, "label"):
        tenths = [done for done in range(-5, total + 5) if run.is_tenth(done, total)]
    assert len(tenths) == min(total, 10) and tenths[-1] == total


def test_a_loop_that_was_stopped_at_its_end_is_done(tmp_path, capsys):
    run = run_in(tmp_path / "run")
    with run.at_work(3, 0, "label"):
        run.stop = signal.SIGTERM
    run.leave_if_stopped(3, "update")
    capsys.readouterr()
    with pytest.raises(Interrupted) as stop:
        run.leave_if_stopped(2, "update")
    assert (stop.value.number, stop.value.message) == (15, f"stopped at update 2 of 3; continue with --out {run.out} --resume")


def test_a_signal_ends_long_work_at_once_and_what_was_made_is_saved(tmp_path):
    run = run_in(tmp_path / "run")
    run.content = lambda: {"weight": torch.ones(2)}
    with run.at_work(3, 0, "label"):
        with run.at_once():
            pass
        with run.at_once():
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it goes on")
        pytest.fail("the loop goes on")
    assert (tmp_path / "run/checkpoint.pt").exists()
    with pytest.raises(Interrupted, match="stopped at update 3 of 3"):  # all iterations are made, and not all that follows
        run.leave_if_stopped(3, "update")


def test_a_signal_in_long_work_is_no_fault_of_the_file_that_it_meets(tmp_path):
    run = run_in(tmp_path / "run")
    with run.at_work(3, 0, "label"):
        with run.at_once(), blaming("dog.jpg", "put a readable one there"):
            signal.raise_signal(signal.SIGTERM)
        pytest.fail("the loop goes on")
    assert run.stop == signal.SIGTERM


def test_long_work_does_not_begin_after_a_signal(tmp_path):
    run = run_in(tmp_path / "run")
    with run.at_work(3, 0, "label"):
        signal.raise_signal(signal.SIGINT)
        with run.at_once():
            pytest.fail("it begins")
    assert run.stop == signal.SIGINT and not (tmp_path / "run/checkpoint.pt").exists()  # there was nothing to save yet


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="as Linux closes a terminal")
def test_a_closed_terminal_saves(sides, tmp_path):
    """What the run then says, nobody can read."""
    to_take = pytest.importorskip("termios").TIOCSCTTY
    ours, its = os.openpty()
    flags = arguments(sides, tmp_path / "run", "--epochs", 2000, "--checkpoint-minutes", 60)

    def in_a_terminal():
        run_module.fcntl.ioctl(0, to_take, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

    how = {"start_new_session": True, "preexec_fn": in_a_terminal}
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, flags)], stdin=its, stdout=its, stderr=its, **how)
    os.close(its)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    os.close(ours)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert 0 < checkpoint_of(tmp_path / "run")["iteration"] < 3000


def test_time_spent_on_waiting_for_data_is_counted(tmp_path):
    def slow():
        for number in itertools.count():
            time.sleep(0.02)
            yield number

    run = run_in(tmp_path / "run")
    stream = run.timed(slow())
    assert [next(stream) for _ in range(3)] == [0, 1, 2] and 0.06 <= run.waiting < 1


@pytest.mark.parametrize("resume", [False, True])
def test_what_another_process_has_written_meanwhile_is_left_alone(tmp_path, resume):
    """Between looking at the folder and locking it lies the reading of the data, which may take minutes."""
    late = run_in(tmp_path / "run", resume=resume)
    with run_in(tmp_path / "run", resume=resume).at_work(1, 0, ""):
        (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="has written to .*run meanwhile"), late.at_work(1, 0, ""):
        pass
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.skipif(os.name == "nt", reason="locks are POSIX's")
@pytest.mark.parametrize(
    "number, goes_on", [(errno.ENOSYS, True), (errno.ENOLCK, True), (errno.ENOTSUP, True), (errno.EIO, False)]
)
def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, capsys, monkeypatch, number, goes_on):
    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_module.fcntl, "lockf", fail)
    run = run_in(tmp_path / "run")
    with pytest.raises(OSError) if not goes_on else contextlib.nullcontext(), run.at_work(1, 0, ""):
        assert goes_on
    assert (f"no locks where {tmp_path / 'run'} is" in capsys.readouterr().err) == goes_on


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "masks.jsonl"])
@pytest.mark.parametrize("content", [b"{nonsense}\n", b"[1]\n"])
def test_damaged_text_files_are_refused(whole_run, tmp_path, capsys, name, content):
    run = copied(whole_run[0], tmp_path / "run")
    (run / name).write_bytes(content)
    refused(["pretrain", "--resume", "--out", run], capsys, name)
    assert (run / name).read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"loss": 1}\n',
        b'{"epoch": 1e400}\n',
        *(b'{"epoch": 1, "loss": %s}\n' % odd for odd in (b'"low"', b"NaN", b"null", b"[1]", b"1" + 400 * b"0")),
    ],
    ids=str,
)
def test_metrics_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="metrics.jsonl is absent, empty or damaged"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"epoch": 1},
        {"p": [[0] * 4] * 2},
        {"epoch": 1, "p": [[0] * 4]},
        {"epoch": 1, "p": "high"},
        {"epoch": [], "p": [[0] * 4] * 2},
    ],
    ids=str,
)
def test_masks_that_are_none_are_refused(tmp_path, row):
    good = {"epoch": 1, "p": [[0.5] * 4] * 2}
    path = tmp_path / "masks.jsonl"
    path.write_text(json.dumps(good) + "\n")
    assert read_masks(path, (2, 4))[0].tolist() == [good["p"]]
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match="masks.jsonl is damaged"):
        read_masks(path, (2, 4))
    path.write_text((json.dumps(good) + "\n") * 11)
    with pytest.raises(UserError, match="masks.jsonl is damaged"):
        read_masks(path, (2, 4))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s | {"more": 1}, "settings that differ: more"),
        (lambda s: {k: v for k, v in s.items() if k != "width"}, "settings that differ: width"),
        (lambda s: s | {"width": "64"}, "--width 64: must be of type int"),
        (lambda s: [s], "settings that differ: all of them"),
        (lambda s: 3, "settings that differ: all of them"),
    ],
)
def test_settings_that_are_not_a_runs_are_refused(whole_run, tmp_path, change, words):
    settings = json.loads((whole_run[0] / "config.json").read_text())
    assert read_settings(whole_run[0] / "config.json", Config) == settings
    (tmp_path / "config.json").write_text(json.dumps(change(settings)))
    with pytest.raises(UserError) as caught:
        read_settings(tmp_path / "config.json", Config)
    assert "config.json is damaged or of another version" in str(caught.value) and words in str(caught.value)


def test_a_run_is_never_overwritten(whole_run, sides, capsys):
    out = whole_run[0]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused(arguments(sides, out), capsys, out, "--resume", "--out")
    refused(arguments(sides, out, "--epochs", 21, "--resume"), capsys, "--epochs 20", "21")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_folder_is_free_where_it_is_absent_or_empty(tmp_path):
    refuse_taken(tmp_path / "nothing")
    refuse_taken(tmp_path)
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="exists already"):
            refuse_taken(taken)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_checkpoints_are_refused(whole_run, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for name in ("config.json", "metrics.jsonl", "checkpoint.pt"):
        (tmp_path / "run" / name).write_bytes((whole_run[0] / name).read_bytes())
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(DAMAGED[kind](path.read_bytes()))
    before = path.read_bytes()
    for argv in (["probe", "run"], ["show", "run"], ["pretrain", "--out", "run", "--resume"]):
        refused(argv, capsys, "checkpoint.pt")
    assert path.read_bytes() == before and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], Explosive()], ids=["dict", "list", "malicious"])
def test_foreign_checkpoints_are_refused(tmp_path, capsys, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    refused(["probe", "run"], capsys, "checkpoint.pt")
    assert not (tmp_path / "exploded").exists()


def test_checkpoints_of_the_version_before_are_refused(whole_run, tmp_path, capsys):
    run = copied(whole_run[0], tmp_path / "run")
    name, version = mlo_mae.FORMAT.rsplit(" ", 1)
    torch.save(checkpoint_of(run) | {"format": f"{name} {int(version) - 1}"}, run / "checkpoint.pt")
    for argv in (["probe", run], ["pretrain", "--out", run, "--resume"]):
        refused(argv, capsys, f"checkpoint.pt is of another version: it is '{name} ", f"reads '{mlo_mae.FORMAT}'; make it")


def test_a_checkpoint_of_other_sizes_is_refused(whole_run, tmp_path, capsys):
    content = torch.load(whole_run[0] / "checkpoint.pt", weights_only=True)
    content["model"]["cls_token"] = torch.zeros(1, 1, 24)
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    refused(["probe", tmp_path / "run"], capsys, "cls_token", "(1, 1, 24)", "(1, 1, 16)")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lr", 1e30], ["level1_loss is nan", "mask update 1 ("]),
        (["--level2", "steps", "--head-lr", 1e38], ["level3_loss is nan", "--head-lr"]),
    ],
    ids=["lr", "head-lr"],
)
def test_a_loss_that_is_not_finite_stops_the_run(sides, tmp_path, capsys, flags, words):
    refused(arguments(sides, tmp_path / "nan", "--epochs", 20, "--checkpoint-minutes", 0, *flags), capsys, *words)
    assert not (tmp_path / "nan" / "checkpoint.pt").exists()


def test_a_loss_that_turns_bad_late_leaves_the_last_good_checkpoint(sides, tmp_path, capsys, monkeypatch):
    real, out = mlo_mae.outer_iteration, tmp_path / "late"

    def failing(net, state, *rest):
        state, losses = real(net, state, *rest)
        return state, losses | ({"level2_loss": torch.tensor(math.inf)} if state.iteration == 5 else {})

    monkeypatch.setattr(mlo_mae, "outer_iteration", failing)
    line = refused(arguments(sides, out, "--epochs", 20, "--checkpoint-minutes", 0), capsys, "level2_loss is inf")
    assert "mask update 5 (level-1 step 10)" in line and str(out / "checkpoint.pt") in line
    assert checkpoint_of(out)["iteration"] == 4


def test_an_unwritable_folder_is_named(sides, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    refused(arguments(sides, tmp_path / "file" / "run"), capsys, tmp_path / "file")


def test_npz_with_pickled_objects_executes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("bad.npz", train_images=np.array([Explosive()], dtype=object), train_labels=np.zeros(1))
    refused(arguments("bad.npz", tmp_path / "bad"), capsys, "bad.npz")
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------------------------------------------ TensorBoard


def finding(what):
    """Python's way to find a package, which finds `what` for that one."""
    real = importlib.util.find_spec
    return lambda name, *more: what if name == "tensorboard" else real(name, *more)


@pytest.mark.usefixtures("bare_runs")
def test_lines_for_tensorboard(sides, tmp_path, monkeypatch):
    """Each number of each line, by a stand-in for the package; a resumed run replaces what it writes again."""
    written, boards = {}, []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            boards.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written[step, name] = value

        def flush(self):
            boards.append("flushed")

        def close(self):
            boards.append("closed")

    monkeypatch.setattr("importlib.util.find_spec", finding("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    out = tmp_path / "run"
    content = stopped(sides, out, monkeypatch, 2, "--tensorboard", "--epochs", 4)
    at = content["iteration"]
    assert boards[0] == (out, 1) and boards[-1] == "closed" and 0 < at < 6
    assert main(["pretrain", "--out", str(out), "--resume"]) == 0
    assert (out, at + 1) in boards
    rows = read_metrics(out / "metrics.jsonl")
    expected = {(row["iteration"], name): value for row in rows for name, value in row.items() if name != "iteration"}
    assert written == expected and boards.count("flushed") >= len(rows)


@pytest.mark.usefixtures("bare_runs")
def test_tensorboard_reads_them(sides, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert main(arguments(sides, out, "--tensorboard", "--epochs", 4)) == 0
    events = EventAccumulator(str(out)).Reload()
    rows = read_metrics(out / "metrics.jsonl")
    for name in ("level1_loss", "learning_rate", "object_hidden"):
        found = [(event.step, event.value) for event in events.Scalars(name)] if name in rows[0] else []
        assert found == [(row["iteration"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]


def test_tensorboard_that_is_not_there_is_said(sides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", finding(None))
    refused(arguments(sides, tmp_path / "run", "--tensorboard"), capsys, "pip install tensorboard, or leave the flag out")
    assert not (tmp_path / "run").exists()
