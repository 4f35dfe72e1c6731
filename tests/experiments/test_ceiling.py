"""ceiling: that saliency is a gradient's, that weights follow the images that move, and what it prints."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from helpers import write_folder
from torch import nn

import data
import mlo_mae
from experiments import ceiling, finetune
from mlo_mae import Config

TINY = Config(
    patch_size=8,
    width=8,
    depth=1,
    heads=2,
    decoder_width=8,
    decoder_depth=1,
    decoder_heads=2,
    images=160,
    batch_size=16,
    level1_steps=2,
    epochs=1,
    masking_from="saliency",
)


def test_saliency_of_a_linear_classifier_is_its_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4, bias=False)).requires_grad_(False)
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    split = data.Images(pixels, torch.tensor([0, 3, 1, 1, 2]), (127.0,) * 3, (64.0,) * 3)
    weights = model[1].weight.view(4, 3, 8, 8)
    of_class = weights - weights.mean(0)
    both = of_class.square().mean(1) + of_class.flip(3).square().mean(1)  # [4, 8, 8]
    expected = both.unflatten(2, (2, 4)).unflatten(1, (2, 4)).mean((2, 4)).sqrt()
    assert torch.allclose(ceiling.saliency(model, split, 4), expected[split.labels], rtol=1e-5)


def test_weights_have_the_mean_and_spread_of_a_ts_logits():
    p = ceiling.weights_of(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    logits = p.logit().flatten(1)
    assert torch.allclose(logits.mean(1), torch.full((3,), -2.0), atol=1e-4)
    assert torch.allclose(logits.std(1), torch.ones(3), atol=1e-4)
    assert torch.allclose(ceiling.weights_of(torch.full((1, 4, 4), 0.3)), torch.tensor(-2.0).sigmoid())  # nothing to tell


def test_weights_that_are_alike_make_a_run_of_mae(drawn_once, tmp_path):
    tiny = replace(TINY, crop=False, device="cpu")  # around a crop weights are 0
    splits = mlo_mae.load_data(tiny, torch.device("cpu"))
    _, state = ceiling.pretrained(tiny, splits, torch.ones(len(splits.train), 4, 4))
    assert state.iteration == mlo_mae.mask_updates(tiny, splits) and state.psi.t == 0
    _, there, _ = mlo_mae.train(replace(tiny, masking="random", masking_from=""), tmp_path / "run")
    assert torch.allclose(there.theta.params, state.theta.params, atol=1e-6)


def test_weights_move_with_their_images(drawn_once, monkeypatch):
    splits, steps, real = mlo_mae.load_data(TINY, torch.device("cpu")), [], mlo_mae.level1_step
    monkeypatch.setattr(mlo_mae, "level1_step", lambda *a, **k: steps.append((a[3], k["known"])) or real(*a, **k))
    marked = torch.zeros(len(splits.train), 4, 4)
    marked[:, 1:3, :2] = 1
    painted = splits.train.images.clone().zero_()
    painted[:, :, 8:24, :16] = 255
    splits.train.images = painted
    ceiling.pretrained(TINY, splits, marked)
    assert len(steps) == 2 * mlo_mae.mask_updates(TINY, splits)
    for images, known in steps:
        bright = images.mean(1).unflatten(2, (4, 8)).unflatten(1, (4, 8)).mean((2, 4)).flatten(1)  # [B, N]
        share = (bright - bright.min()) / (bright.max() - bright.min())
        assert torch.allclose(share, known, atol=0.02) and 0 < share.mean() < 0.5


@pytest.mark.usefixtures("quick_probes")
def test_the_command_prints_a_table(sides, capsys):
    flags = ["--data", str(sides), "--epochs", "1", "--seeds", "2", "--classifier-epochs", "2", "--device", "cpu"]
    assert mlo_mae.main(["ceiling", *flags]) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert [row["weights"] for row in rows] == ["all alike", "saliency"] and [len(row["cells"]) for row in rows] == [
        2,
        2,
    ]
    assert all(0 <= cell[name] <= 1 for row in rows for cell in row["cells"] for name in ("probe", "probe_cls"))
    assert rows[0]["cells"] != rows[1]["cells"] and any(line.startswith("| saliency |") for line in printed)


def test_ctrl_c_in_the_classifiers_training_offers_no_resuming(drawn_once, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "augment", lambda *arguments: signal.raise_signal(signal.SIGINT))
    assert mlo_mae.main(["ceiling", "--images", "160", "--epochs", "1", "--device", "cpu"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "mlo_mae: interrupted; what was written before is whole"


def test_a_folder_is_refused(tmp_path, capsys):
    write_folder(tmp_path, (("train", 4), ("val", 2)))
    assert ceiling.main(["--data", str(tmp_path), "--device", "cpu"]) == 2
    assert "a folder's images are not kept in memory" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--epochs", "0"], ["--classifier-epochs", "1"]])
def test_bad_flags_end_in_a_line(flags, capsys):
    assert ceiling.main(flags) == 2
    assert flags[0] in capsys.readouterr().err
