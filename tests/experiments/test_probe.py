"""probe.py: the command on whole runs; harness/probe.py, which fits the probes, has tests of its own."""

import json

import pytest
import torch
from helpers import SMALL, copied, refused

from experiments import features, open_run
from experiments import probe as program
from harness.vectors import call
from mlo_mae import Config, build, main


def report_of(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_probe_repeats_and_beats_chance(whole_run, capsys):
    out, summary, _ = whole_run
    assert main(["probe", str(out), "--device", "cpu"]) == 0
    again = report_of(capsys)
    assert again == {"command": "probe", "run": str(out), "recipe": "lbfgs", "pooling": "mean", **summary["probe"]}
    assert again["test_accuracy"] >= 0.8  # two classes that differ in brightness left and right; by chance 1 time in 170
    assert summary["probe"] == json.loads((out / "probe.json").read_text())


@pytest.mark.parametrize("recipe, chosen", [("lbfgs", "weight_decay"), ("mae", "learning_rate")])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_probe_recipes(whole_run, capsys, recipe, chosen, pooling):
    out = whole_run[0]
    before = (out / "probe.json").read_bytes()
    assert main(["probe", str(out), "--recipe", recipe, "--pooling", pooling, "--device", "cpu"]) == 0
    result = report_of(capsys)
    assert result.keys() == {"command", "run", "recipe", "pooling", "test_accuracy", "val_accuracy", chosen}
    assert (result["recipe"], result["pooling"]) == (recipe, pooling) and result["val_accuracy"] > 1.5 / 2
    assert (out / "probe.json").read_bytes() == before  # which is the finished run's own


def test_probes_are_fitted_in_full_precision_and_what_was_set_is_put_back(whole_run, monkeypatch):
    """A run in bfloat16 leaves products of float32 at less."""
    seen, before = [], torch.get_float32_matmul_precision()
    monkeypatch.setattr(program, "linear_probe", lambda *how: seen.append(torch.get_float32_matmul_precision()) or {})
    torch.set_float32_matmul_precision("high")
    try:
        program.probe(*open_run(whole_run[0], "cpu"))
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


class Split:
    """Images in their order, without a data set."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def ordered(self, batch_size):
        yield from (Split(*pair) for pair in zip(self.images.split(batch_size), self.labels.split(batch_size)))


def test_features_are_those_of_whole_images_in_order():
    sizes = {name: value for name, value in SMALL.items() if "size" in name or "depth" in name or "width" in name}
    net, (theta, _, _) = build(Config(**sizes | {"heads": 2}), 16, 3, 2)
    images, labels, params = torch.randn(300, 3, 16, 16), torch.arange(300), theta[: net.encoder_size]
    tokens = call(net.encoder, params, images)
    for pooling, expected in (("cls", tokens[:, 0]), ("mean", tokens[:, 1:].sum(1) / 16)):
        found, order = features(net, theta, Split(images, labels), pooling)
        assert torch.allclose(found, expected, atol=1e-6) and torch.equal(order, labels) and not found.requires_grad


def test_what_cannot_be_probed_ends_in_one_line(whole_run, tmp_path, capsys):
    refused(["probe", whole_run[0], "--recipe", "adam"], capsys, "--recipe", "lbfgs")
    refused(["probe", whole_run[0], "--pooling", "max"], capsys, "--pooling", "mean")
    refused(["probe", whole_run[0], "--device", "abacus"], capsys, "abacus", "cpu")
    refused(["probe"], capsys, "RUN")
    refused(["probe", tmp_path / "nothing"], capsys, tmp_path / "nothing")


def test_data_that_are_others_now_are_refused(whole_run, sides, tmp_path, capsys):
    run = copied(whole_run[0], tmp_path / "run")
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    content["data"]["class_names"] = ["left", "right"]
    torch.save(content, run / "checkpoint.pt")
    refused(["probe", run], capsys, "is not the data that", run)


def test_a_run_may_be_read_elsewhere(whole_run, tmp_path):
    """Settings of the machine may be others; the settings of experiments of their own are left aside."""
    run = copied(whole_run[0], tmp_path / "run")
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    content["config"] |= {"parts": 7, "hypergradient": "finite-difference"}
    torch.save(content, run / "checkpoint.pt")
    net, state, _ = open_run(run, "cpu", data_dir="elsewhere", workers=0)
    assert net.cfg.data_dir == "elsewhere" and state.iteration == 30 and net.cfg.width == SMALL["width"]
