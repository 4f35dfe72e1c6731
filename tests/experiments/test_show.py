"""show.py: which pictures a run gets, what they show, and damaged files that they are drawn from."""

import json

import numpy as np
import pytest
import torch
from helpers import arguments, bare, copied, refused, write_npz, write_sides

import mlo_mae
from experiments import open_run, reconstructed, show
from harness.pictures import HIDDEN, as_images, overlaid
from kernels import gather_patches
from mlo_mae import main


@pytest.mark.slow
def test_show_draws_the_pictures_again(whole_run, tmp_path, capsys):
    out = copied(whole_run[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}
    for name in before:
        (out / name).unlink()
    assert main(["show", str(out), "--device", "cpu"]) == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == before
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"]
    assert sorted(shown) == sorted(map(str, out.glob("*.png"))) and len(shown) == 3


@pytest.fixture
def grids(monkeypatch):
    """The rows of every grid that is drawn, what it says, and whether it is a film, by its file's name; nothing is written."""
    drawn = {}
    monkeypatch.setattr(show, "grid", lambda path, rows, text, film=False: drawn.update({path.name: (rows, text, film)}))
    monkeypatch.setattr(show, "curves", lambda *arguments: None)
    return drawn


def test_a_file_of_masks_without_a_line_makes_no_film(whole_run, tmp_path, grids):
    """As a run has it that is resumed from before T's first step."""
    out = copied(whole_run[0], tmp_path / "run")
    (out / "masks.jsonl").write_text("")
    written = show.draw_run(*open_run(out, "cpu"), out)
    assert written == [out / "masks.png", out / "curves.png"] and grids.keys() == {"masks.png"}


def test_the_rows_are_what_they_say(whole_run, grids):
    net, state, splits = open_run(whole_run[0], "cpu")
    show.draw_run(net, state, splits, whole_run[0])
    rows, text, film = grids["masks.png"]
    titles, values, styles = zip(*rows)
    assert [title.split("\n")[0] for title in titles] == ["image", "p, weight of", "p over", "encoder sees", "decoder fills"]
    assert text.startswith("Bright patches count more. If T works, they lie on objects.") and not film
    original, p, over, seen, filled = map(np.asarray, values)
    assert original.shape == over.shape == seen.shape == filled.shape == (8, 16, 16, 3) and p.shape == (8, 16)

    batch = splits.watched(8)[0]
    assert np.allclose(original, (batch * splits.val.std / 255 + splits.val.mean / 255).permute(0, 2, 3, 1), atol=1e-5)
    prob, keep, restore, mask = mlo_mae.masks_now(net, state, batch, 1.0)
    hidden = mask.unflatten(1, (4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2).bool().numpy()  # [8, 16, 16]
    assert np.array_equal(p, prob) and hidden.sum() == 8 * 256 * 0.75
    assert styles[1] == styles[2] and styles[1]["vmax"] == prob.max() and styles[1]["bar"] == "p"  # one colour bar
    assert np.array_equal(over, overlaid(original, prob.numpy(), styles[2])) and over.std() > 0
    assert np.array_equal(seen[~hidden], original[~hidden]) and (seen[hidden] == HIDDEN).all()
    assert np.array_equal(filled[~hidden], original[~hidden])
    pred = reconstructed(net, state.theta.params, batch, keep, restore)
    assert np.array_equal(filled[hidden], as_images(pred, 4, splits.mean, splits.std)[hidden])

    patches, drawn = (gather_patches(torch.as_tensor(x).permute(0, 3, 1, 2).contiguous(), None, 4) for x in (original, filled))
    gap = (drawn.mean(2) - patches.mean(2)).abs()  # the decoder draws each patch about the mean that it has
    assert 0 < gap[mask.bool()].mean() < 0.1

    rows, text, film = grids["masks-over-training.png"]
    titles, values, styles = zip(*rows)
    recorded = [json.loads(line) for line in (whole_run[0] / "masks.jsonl").read_text().splitlines()]
    assert titles == ("image", *(f"epoch {row['epoch']:.1f}" for row in recorded)) and len(titles) == 11
    highest = max(np.max(row["p"]) for row in recorded)
    for found, row, style in zip(values[1:], recorded, styles[1:]):
        assert style["vmax"] == highest and np.array_equal(found, overlaid(original, np.array(row["p"]), style))
    assert film and "objects light up" in text


def test_before_t_takes_over_masks_are_drawn_at_random(whole_run, grids):
    net, state, splits = open_run(whole_run[0], "cpu")
    net.cfg = mlo_mae.dataclasses.replace(net.cfg, mask_start=0.5)
    for iteration, learned in ((14, False), (15, True)):  # of 30
        show.draw_run(net, state._replace(iteration=iteration), splits, whole_run[0])
        rows, text, _ = grids["masks.png"]
        assert sum("bar" in style for *_, style in rows) == 2 * learned  # p = 1 would show nothing
        assert len(rows) == 3 + 2 * learned and ("All patches count alike" in text) == (not learned)


@pytest.mark.parametrize("name", ["metrics.jsonl", "masks.jsonl"])
@pytest.mark.parametrize("content", [b"{nonsense}\n", b"[1]\n", b"{}\n", b'{"epoch": 1, "p": [[1]], "p_mean": "high"}\n'])
def test_damaged_text_files_are_refused(whole_run, tmp_path, capsys, monkeypatch, name, content):
    monkeypatch.setattr(show, "grid", lambda *arguments, **more: None)  # of which masks.png comes before these files are read
    run = copied(whole_run[0], tmp_path / "run")
    (run / name).write_bytes(content)
    refused(["show", run], capsys, name)
    assert (run / name).read_bytes() == content


def test_absent_runs_are_named(tmp_path, capsys):
    refused(["show", tmp_path / "nothing"], capsys, tmp_path / "nothing")
    refused(["show"], capsys, "RUN")


# ------------------------------------------------------------------------------------------------------ several runs


@pytest.fixture
def drawn_curves(monkeypatch):
    """What `curves` is given; nothing is written."""
    given = []
    monkeypatch.setattr(show, "curves", lambda *arguments: given.append(arguments))
    return given


@pytest.fixture(scope="module")
def other_run(sides, tmp_path_factory):
    """MAE of another seed on the same data."""
    out = tmp_path_factory.mktemp("runs") / "other"
    with bare():
        assert main(arguments(sides, out, "--masking", "random", "--seed", 1, "--epochs", 2, "--level2", "steps")) == 0
    return out


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_several_runs_are_drawn_over_each_other(whole_run, other_run, tmp_path, capsys, drawn_curves):
    runs, out = [whole_run[0], other_run], tmp_path / "both.png"
    assert main(["show", *map(str, runs), "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"command": "show", "runs": list(map(str, runs)), "pictures": [str(out)]}
    ((path, found, unit),) = drawn_curves
    assert path == out and found == {"whole": metrics_of(runs[0]), "other": metrics_of(runs[1])} and len(found["other"]) > 1
    levels = {json.loads((run / "config.json").read_text())["level2"] for run in runs}
    assert levels == {"ridge", "steps"} and unit == "squared error, or cross-entropy"


def test_the_same_data_may_have_moved(sides, whole_run, tmp_path, drawn_curves):
    (tmp_path / "moved.npz").write_bytes(sides.read_bytes())
    with bare():
        assert main(arguments(tmp_path / "moved.npz", tmp_path / "run", "--masking", "random", "--epochs", 1)) == 0
    assert main(["show", str(whole_run[0]), str(tmp_path / "run"), "--out", str(tmp_path / "both.png")]) == 0
    assert len(drawn_curves) == 1


def test_runs_of_one_name_go_by_their_paths(whole_run, tmp_path, monkeypatch, drawn_curves):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        copied(whole_run[0], tmp_path / folder / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["show", "a/run", "b/run", "--out", "both.png"]) == 0
    monkeypatch.chdir(tmp_path / "a" / "run")
    assert main(["show", ".", str(whole_run[0]), "--out", "both.png"]) == 0
    assert [list(found) for _, found, _ in drawn_curves] == [["a/run", "b/run"], ["run", "whole"]]
    assert {unit for *_, unit in drawn_curves} == {"squared error of labels"}


def test_a_picture_of_several_runs_is_a_file_of_its_own(whole_run, other_run, tmp_path):
    before = {path: path.read_bytes() for run in (whole_run[0], other_run) for path in run.iterdir()}
    assert main(["show", str(whole_run[0]), str(other_run), "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert before == {path: path.read_bytes() for run in (whole_run[0], other_run) for path in run.iterdir()}


def test_runs_that_cannot_be_compared_end_in_one_line(sides, whole_run, other_run, tmp_path, capsys):
    run, out = whole_run[0], tmp_path / "both.png"
    twice = run / ".." / run.name
    refused(["show", run, other_run], capsys, "name its file with --out")
    refused(["show", run, "--out", out], capsys, "--out is for the curves of several runs")
    refused(["show", run, twice, "--out", out], capsys, f"{twice} is given twice")
    refused(["show", run, tmp_path / "nothing", "--out", out], capsys, tmp_path / "nothing", "does not exist")
    refused(["show", run, other_run, "--out", tmp_path / "no" / "both.png"], capsys, "no is no folder")
    for flag in ("--data", "--data-dir", "--device"):
        refused(["show", run, other_run, "--out", out, flag, "cpu"], capsys, f"{flag} is for the pictures of one run")
    arrays = dict(np.load(sides))
    arrays["train_images"][0] += 1
    np.savez(tmp_path / "altered.npz", **arrays)
    others = {  # name: (data, seed, what differs)
        "noise": (write_npz(tmp_path / "noise.npz", n=40, size=16), 1, "name of the data: sides.npz there, noise.npz here"),
        "few": (write_sides(tmp_path / "sides.npz", (("train", 40), ("test", 20))), 1, "number of images"),
        "altered": (tmp_path / "altered.npz", 0, "or labels differ"),
    }
    for name, (data, seed, what) in others.items():
        with bare():
            words = arguments(data, tmp_path / name, "--masking", "random", "--epochs", 1, "--seed", seed)
            assert main(words) == 0
        refused(["show", run, tmp_path / name, "--out", out], capsys, f"{name} is not on the data of {run}", what)
    damaged = copied(other_run, tmp_path / "damaged")
    for content in (None, b"", b"{nonsense}\n", b"[1]\n", b'{"epoch": 1}\n', b'{"epoch": 1, "p_mean": "high"}\n'):
        (damaged / "metrics.jsonl").write_bytes(content) if content is not None else (damaged / "metrics.jsonl").unlink()
        refused(["show", run, damaged, "--out", out], capsys, "metrics.jsonl", "damaged")
    (damaged / "checkpoint.pt").write_bytes(b"nonsense")
    (damaged / "checkpoint.previous.pt").unlink(missing_ok=True)
    refused(["show", run, damaged, "--out", out], capsys, damaged / "checkpoint.pt", "cannot be read")
    assert not out.exists()
    out.write_bytes(b"mine")
    refused(["show", run, other_run, "--out", out], capsys, "both.png exists already")
    assert out.read_bytes() == b"mine"
