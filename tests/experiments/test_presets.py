"""The presets side by side, what a run says before it begins, and that saying it changes nothing."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from helpers import SCRIPT, SMALL, arguments, checkpoint_of, same, weights

import data
import mlo_mae
from experiments import presets
from harness import cli

NAMES = ["data", "model", "method", "machine", "time", "files"]


def announced(printed: str) -> dict[str, str]:
    """{of what: line} of what was said on stderr."""
    lines = [re.match(rf"({'|'.join(NAMES)})(?:: | )(.*)", line) for line in printed.splitlines()]
    return dict(line.groups() for line in lines if line)


def test_presets_side_by_side(capsys):
    """A cell for each value, by the flag's name, and none that all presets share with the fields."""
    assert presets.main([]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in (line[2:-2].split(" | ") for line in printed[:-2])
    }
    names = rows.pop("flag")
    assert names == list(mlo_mae.PRESETS) == json.loads(printed[-1])["presets"]
    rows.pop(next(iter(rows)))  # the rule
    defaults = dataclasses.asdict(mlo_mae.Config())
    known = {cli.flag_name(name): name for name in defaults}
    assert rows.keys() == {cli.flag_name(name) for preset in mlo_mae.PRESETS.values() for name in preset}
    for flag, values in rows.items():
        name = known[flag]
        assert values == [str((defaults | mlo_mae.PRESETS[preset])[name]) for preset in names]


def test_help_has_the_presets_defaults(capsys):
    helped = {}
    for words in ([], ["--preset", "cifar100"], ["--preset=imagenet"]):
        with pytest.raises(SystemExit):
            mlo_mae.pretrain([*words, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        helped[" ".join(words)] = re.search(r"passes of level 1 over its training images \(default (\d+)\)", text)[1]
    assert helped == {"": "24", "--preset cifar100": "200", "--preset=imagenet": "50"}


def test_a_trial_reads_no_more_images_than_it_tries(sides, tmp_path, monkeypatch):
    """A stream's workers would read ahead, beside what is timed."""
    monkeypatch.setattr(data.Images, "stream", lambda *how, **more: pytest.fail("it begins a stream"))
    assert mlo_mae.main(arguments(sides, tmp_path / "run", "--epochs", 8, "--dry-run")) == 0


def test_a_dry_run_says_what_will_run_and_writes_nothing(sides, tmp_path, capsys):
    cli.command("presets")
    words = arguments(sides, tmp_path / "run", "--epochs", 8, "--dry-run")
    assert mlo_mae.main(words) == 0
    printed = capsys.readouterr()
    said = announced(printed.err)
    assert printed.out == "" and list(tmp_path.iterdir()) == []
    assert list(said) == (NAMES if "data" in said else NAMES[1:])  # what data there are is said once a process
    net, _ = mlo_mae.build(mlo_mae.Config(**SMALL), 16, 3, 2)
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (net.encoder, net.decoder, net.masking)]
    assert said["model"] == "encoder of {:,} weights (width 16, depth 1), decoder of {:,}, T (tokens) of {:,}".format(*sizes)
    method = (
        "12 x 2 steps of 16 images, 12 of 16 patches (4 x 4 pixels) hidden; T learns from mask update 1 to 12, by dL3/dT exact"
    )
    assert said["method"] == method
    assert said["machine"] == "cpu, 1 thread, fp32" and said["files"] == str(tmp_path / "run")
    assert re.fullmatch(r"about \d+ seconds?", said["time"])


@pytest.mark.parametrize(
    "more, words",
    [
        (["--masking", "random"], "; MAE: all patches count alike"),
        (["--masking-from", "RUN"], "weighed by the T of "),
        (["--unroll", "full", "--mask-batches", "1"], "T learns"),
        (["--hypergradient", "first-order"], "by dL3/dT first-order"),
        (["--level2", "steps", "--mask-start", "0.5"], "T learns from mask update 7 to 12"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_each_kind_of_run(sides, whole_run, tmp_path, capsys, more, words):
    more = [str(whole_run[0]) if word == "RUN" else word for word in more]
    assert mlo_mae.main(arguments(sides, tmp_path / "run", "--epochs", 8, "--dry-run", *more)) == 0
    said = announced(capsys.readouterr().err)
    assert words in said["method"] and said["time"].startswith("about ") and not (tmp_path / "run").exists()


def test_a_program_that_is_run_says_the_same(sides, tmp_path):
    """Its own Config is another class than the one that experiments import."""
    words = map(str, arguments(sides, tmp_path / "run", "--masking", "random", "--dry-run"))
    found = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, cwd=tmp_path)
    said = announced(found.stderr)
    assert found.returncode == 0 and said["method"].endswith("; MAE: all patches count alike")
    assert re.fullmatch(r"about \d+ seconds?", said["time"])


def test_a_baseline_says_what_it_is(sides, tmp_path, capsys):
    words = arguments(sides, tmp_path / "run", "--dry-run")[1:]
    assert mlo_mae.main(["baselines", "u-mae", *words]) == 0
    said = announced(capsys.readouterr().err)
    assert said["method"].endswith("; A run of MAE with a uniformity term.") and said["time"].endswith(
        "this command does besides"
    )


@pytest.mark.usefixtures("bare_runs")
def test_what_is_said_changes_nothing(sides, whole_run, tmp_path, monkeypatch):
    """With a trial as without: the same weights, and a run that is resumed says what is left."""
    spoken, real = [], presets.announce
    monkeypatch.setattr(presets, "announce", lambda *given: spoken.append(given[0]) or real(*given))
    assert mlo_mae.main(arguments(sides, tmp_path / "said", "--epochs", 20)) == 0
    monkeypatch.setattr(presets, "announce", lambda *given: None)
    assert mlo_mae.main(arguments(sides, tmp_path / "unsaid", "--epochs", 20)) == 0
    assert spoken == [tmp_path / "said"] and same(weights(tmp_path / "said"), weights(tmp_path / "unsaid"))
    assert checkpoint_of(tmp_path / "said")["moments"]["model"]["t"] == 60


def test_the_time_is_that_of_the_parts(monkeypatch, sides, tmp_path, capsys):
    """240 steps of a known length, and 30 looks, of a run whose T learns in a quarter of its 120 mask updates; a step that
    asks T is longer: each of that quarter, and in a folder all that follow."""
    made, timed, real = [], [], mlo_mae.level1_step

    def watched(net, theta, psi, images, rates, *rest, **how):
        made.append((rates.lr, how["progress"]))
        return real(net, theta, psi, images, rates, *rest, **how)

    def seconds(call, device):
        timed.append(call())
        return 0.4 if timed[-1] is None else 0.08 if made[-1][1] else 0.05  # a look has nothing to return

    monkeypatch.setattr(mlo_mae, "level1_step", watched)
    monkeypatch.setattr(presets, "seconds", seconds)
    words = ["--epochs", 80, "--mask-start", 0.25, "--mask-until", 0.5, "--dry-run"]
    assert mlo_mae.main(arguments(sides, tmp_path / "run", *words)) == 0
    assert announced(capsys.readouterr().err)["time"] == "about 26 seconds"
    assert made == [(0.0, 0.0)] * 4 + [(0.0, 1.0)] and len(timed) == 5
    monkeypatch.setattr(presets, "Images", type(None))  # as if they were in a folder
    assert mlo_mae.main(arguments(sides, tmp_path / "run", *words)) == 0
    assert announced(capsys.readouterr().err)["time"] == "about 29 seconds" and len(timed) == 10
    monkeypatch.setattr(presets, "SLOW", 0.04)
    assert mlo_mae.main(arguments(sides, tmp_path / "run", *words)) == 0
    assert announced(capsys.readouterr().err)["time"] == "at least 12 seconds" and len(timed) == 12


def test_fine_tuning_says_what_it_is_going_to_be(whole_run, tmp_path, capsys):
    words = ["finetune", str(whole_run[0]), "--out", str(tmp_path / "tuned"), "--epochs", "2", "--batch-size", "16"]
    assert mlo_mae.main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr()
    said = announced(printed.err)
    assert printed.out == "" and not os.path.exists(tmp_path / "tuned")
    assert said["method"] == "2 epochs, 6 steps of 16 images, peak learning rate 0.002"
    assert re.fullmatch(r"finetune: ([\d,]+) weights, \1 of them learn", said["model"]), said["model"]
    assert said["files"] == str(tmp_path / "tuned") and re.fullmatch(r"about \d+ seconds?", said["time"])
    assert mlo_mae.main(words) == 0
    printed = capsys.readouterr()
    assert announced(printed.err)["method"] == said["method"] and json.loads(printed.out)["command"] == "finetune"
