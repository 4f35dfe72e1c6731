"""Images without classes: a folder of files is enough for MAE, and for a T of another run."""

import json
import os

import numpy as np
import pytest
import torch
from helpers import arguments, bare
from PIL import Image

import data
import mlo_mae
from experiments import open_run
from harness import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 20 pictures, half of them in a folder within, and of what is none."""
    folder, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    os.makedirs(folder / "inner")
    for number in range(20):
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((6, 6, 1), np.uint8))
        Image.fromarray(pixels).save(folder / ("inner" if number % 2 else "") / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    os.makedirs(folder / "@eaDir")
    Image.fromarray(pixels).save(folder / "@eaDir" / "thumbnail.png")
    return folder


def test_splits_of_a_folder_without_classes(photos, capsys):
    data.say.cache_clear()
    splits = data.load(photos, image_size=24, val_fraction=0.25, classes=False)
    assert (len(splits.train), len(splits.val), len(splits.test), splits.class_names) == (15, 5, 0, [])
    said = capsys.readouterr().err
    expected = "train 15 images, val 5 images, test 0 images, no classes; 2 files left out: 1 in @eaDir/, 1 *.txt"
    assert said == f"data {photos}: {expected}\n"
    paths = [os.fsdecode(path) for part in ("train", "val") for path in splits.train.decoder.files.paths[part]]
    names = {f"{n}.png" if n % 2 == 0 else os.path.join("inner", f"{n}.png") for n in range(20)}
    assert set(paths) == names and len(paths) == 20
    batch = next(splits.train.stream(8, 0))
    assert batch.images.shape == (8, 3, 24, 24) and batch.labels.tolist() == [0] * 8
    again = data.load(photos, image_size=24, val_fraction=0.25, classes=False)
    assert again.digest == splits.digest and splits.watched(3)[0].shape == (3, 3, 24, 24)


def test_a_folder_with_classes_has_them_whether_asked_for_or_not(photos, tmp_path):
    for part in ("train", "val"):
        for kind in ("a", "b"):
            os.makedirs(tmp_path / part / kind)
            for number in range(4):
                Image.new("RGB", (8, 8), (20 * number, 9, 99)).save(tmp_path / part / kind / f"{number}.png")
    assert data.load(tmp_path, image_size=8, classes=False).class_names == ["a", "b"]


def test_classes_that_are_asked_for_and_absent_are_one_line(photos, tmp_path):
    words = "expected train/<class>/.*found 20 images; put about four of five of each class under train/.*--masking random"
    with pytest.raises(UserError, match=words):
        data.load(photos)
    os.makedirs(tmp_path / "empty")
    for classes, words in ((True, "and found 0 images"), (False, r"empty: no images \(no files left out\)")):
        with pytest.raises(UserError, match=words):
            data.load(tmp_path / "empty", classes=classes)


@pytest.fixture(scope="module")
def unlabelled(photos, whole_run, tmp_path_factory):
    """Runs on them: of MAE, and with the T of another run."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("mae", ["--masking", "random"]), ("weighed", ["--masking-from", whole_run[0]])):
        words = ["--image-size", 16, "--epochs", 3, "--level1-steps", 1, "--batch-size", 8, "--log-every", 1]
        assert mlo_mae.main(arguments(photos, folder / name, *words, *more)) == 0
    return folder


def test_runs(unlabelled, photos, capsys):
    for name in ("mae", "weighed"):
        rows = [json.loads(line) for line in (unlabelled / name / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 6 and all(row["level1_loss"] > 0 and "level3_loss" not in row for row in rows)
        assert (rows[-1]["p_std"] > 0) == (name == "weighed")
        net, state, splits = open_run(unlabelled / name, "cpu", classes=False)
        assert splits.class_names == [] and state.theta.t == 6 and (unlabelled / name / "masks.png").exists()
        assert not (unlabelled / name / "probe.json").exists()


def test_a_run_goes_on_to_the_same_result(unlabelled, photos, tmp_path, monkeypatch):
    words = [
        "--image-size",
        16,
        "--epochs",
        3,
        "--level1-steps",
        1,
        "--batch-size",
        8,
        "--masking",
        "random",
        "--log-every",
        1,
    ]
    saved = []

    def cut(run, content):
        real(run, content)
        saved.append(run.stop)
        run.stop = 2

    with bare(), pytest.MonkeyPatch.context() as patch:
        real = mlo_mae.Run.save
        patch.setattr(mlo_mae.Run, "save", cut)
        assert mlo_mae.main(arguments(photos, tmp_path / "run", *words, "--checkpoint-minutes", 0)) == 130
    assert mlo_mae.main(["pretrain", "--resume", "--out", str(tmp_path / "run")]) == 0
    ours, whole = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (tmp_path / "run", unlabelled / "mae"))
    assert all(torch.equal(x, whole["model"][name]) for name, x in ours["model"].items())


@pytest.mark.parametrize(
    "words, expected",
    [
        (["probe", "RUN"], "has no classes"),
        (["finetune", "RUN", "--epochs", "1"], "has no classes"),
        (["finetune", "--from-scratch", "--data", "PHOTOS"], "found 20 images"),
        (["pretrain", "--data", "PHOTOS", "--out", "new"], "pretrain without classes by --masking random"),
        (["pretrain", "--data", "PHOTOS", "--out", "new", "--masking-from", "T", "--masking-learns"], "found 20 images"),
    ],
)
def test_what_needs_labels_says_so(unlabelled, photos, whole_run, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": unlabelled / "mae", "PHOTOS": photos, "T": whole_run[0]}
    assert mlo_mae.main([str(places.get(word, word)) for word in words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mlo_mae: ")]
    assert len(lines) == 1 and expected in lines[0] and not os.path.exists("new")


def test_such_a_run_is_shown_encoded_and_exported(unlabelled, photos, tmp_path, capsys):
    run = str(unlabelled / "weighed")
    assert mlo_mae.main(["show", run]) == 0
    assert mlo_mae.main(["encode", run, str(photos), "--out", str(tmp_path / "out.npz")]) == 0
    with np.load(tmp_path / "out.npz") as found:
        assert len(found["names"]) == 20
    assert mlo_mae.main(["export", run, "--to", "timm", "--file", str(tmp_path / "a.safetensors")]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "num_classes=0" in report["call"] and report["head"] == "none: its data have no classes"
    assert mlo_mae.load(run, "cpu").weights(Image.new("RGB", (16, 16), "red")).shape == (1, 4, 4)
