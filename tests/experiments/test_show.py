"""show.py: which pictures a run gets, what they show, and damaged files that they are drawn from."""

import json

import numpy as np
import pytest
import torch
from helpers import copied, refused

import mlo_mae
from experiments import open_run, show
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
    """The rows of every grid that is drawn, by the name of its file; nothing is written."""
    drawn = {}
    monkeypatch.setattr(show, "grid", lambda path, rows: drawn.update({path.name: rows}))
    monkeypatch.setattr(show, "curves", lambda path, rows: None)
    return drawn


def test_the_rows_are_what_they_say(whole_run, grids):
    net, state, splits = open_run(whole_run[0], "cpu")
    show.draw_run(net, state, splits, whole_run[0])
    titles, values, _ = zip(*grids["masks.png"])
    assert titles == ("image", "weight p", "image lit by p", "visible", "reconstruction", "with visible")
    original, p, lit, visible, reconstruction, both = map(np.asarray, values)
    assert original.shape == visible.shape == reconstruction.shape == both.shape == (8, 16, 16, 3) and p.shape == (8, 16)

    batch = splits.watched(8)[0]
    assert np.allclose(original, (batch * splits.val.std / 255 + splits.val.mean / 255).permute(0, 2, 3, 1), atol=1e-5)
    prob, _, _, mask = mlo_mae.masks_now(net, state, batch, 1.0)
    hidden = mask.unflatten(1, (4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2).bool().numpy()  # [8, 16, 16]
    assert np.array_equal(p, prob) and hidden.sum() == 8 * 256 * 0.75
    weight = (prob / prob.max()).unflatten(1, (4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()  # [8, 16, 16]
    assert np.allclose(lit, original * weight[..., None], atol=1e-6) and lit.std() > 0
    assert np.array_equal(visible[~hidden], original[~hidden]) and np.array_equal(both[~hidden], original[~hidden])
    assert np.array_equal(both[hidden], reconstruction[hidden])
    assert np.allclose(visible[hidden], splits.mean, atol=1e-6)  # the data set's mean colour

    cut = [torch.as_tensor(x).permute(0, 3, 1, 2) for x in (original, reconstruction)]
    patches, drawn = (gather_patches(x.contiguous(), None, 4).numpy() for x in cut)
    gap = abs(drawn.mean(2) - patches.mean(2))  # the decoder draws each patch about the mean that it has
    assert gap[mask.bool().numpy()].mean() < 0.1

    titles, values, _ = zip(*grids["masks-over-training.png"])
    recorded = [json.loads(line) for line in (whole_run[0] / "masks.jsonl").read_text().splitlines()]
    assert titles == ("image", *(f"p, epoch {row['epoch']:.1f}" for row in recorded)) and len(titles) == 11
    assert all(np.array_equal(found, row["p"]) for found, row in zip(values[1:], recorded))


def test_before_t_takes_over_masks_are_drawn_at_random(whole_run, grids):
    net, state, splits = open_run(whole_run[0], "cpu")
    net.cfg = mlo_mae.dataclasses.replace(net.cfg, mask_start=0.5)
    for iteration, learned in ((14, False), (15, True)):  # of 30
        show.draw_run(net, state._replace(iteration=iteration), splits, whole_run[0])
        titles = [title for title, *_ in grids["masks.png"]]
        assert ("weight p" in titles) == ("image lit by p" in titles) == learned  # p = 1 would show nothing
        assert len(titles) == (6 if learned else 4)


@pytest.mark.parametrize("name", ["metrics.jsonl", "masks.jsonl"])
@pytest.mark.parametrize("content", [b"{nonsense}\n", b"[1]\n", b"{}\n", b'{"epoch": 1, "p": [[1]], "p_mean": "high"}\n'])
def test_damaged_text_files_are_refused(whole_run, tmp_path, capsys, monkeypatch, name, content):
    monkeypatch.setattr(show, "grid", lambda path, rows: None)  # of which masks.png comes before these files are read
    run = copied(whole_run[0], tmp_path / "run")
    (run / name).write_bytes(content)
    refused(["show", run], capsys, name)
    assert (run / name).read_bytes() == content


def test_absent_runs_are_named(tmp_path, capsys):
    refused(["show", tmp_path / "nothing"], capsys, tmp_path / "nothing")
    refused(["show"], capsys, "RUN")
