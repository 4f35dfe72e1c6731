"""The grid of methods x seeds: its statistics against known values, its rules, and that finished cells stay."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlo_mae
from experiments import results

SIZES = {"patch_size": 8, "width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_heads": 2, "masking_width": 8}
TINY = (
    SIZES | {"images": 240, "epochs": 1, "mask_start": 0.0, "level1_steps": 2, "log_every": 1},
    {"epochs": 2, "warmup_epochs": 0.0},
)


@pytest.fixture
def tiny(monkeypatch):
    """The default grid, at sizes that take seconds."""
    monkeypatch.setitem(results.DATA, "shapes", TINY)
    kind, changes = results.METHODS["SemMAE"]
    monkeypatch.setitem(results.METHODS, "SemMAE", (kind, changes | {"parts_steps": 2}))


@pytest.mark.parametrize("freedom, value", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622)])  # any table of Student's t
def test_t_quantiles(freedom, value):
    assert results.t_quantile(freedom) == pytest.approx(value, rel=2e-4)


def test_spread_and_paired_difference():
    assert results.spread([0.1, 0.2, 0.3]) == "20.0 ± 10.0" and results.spread([0.25]) == "25.0"
    ours, theirs = [0.50, 0.60, 0.70], [0.48, 0.59, 0.67]  # gaps 2, 1, 3: mean 2, deviation 1
    assert results.difference(ours, theirs) == f"+2.0 ± {4.3027 / np.sqrt(3):.1f} (3:0)"
    assert results.difference([0.7, 0.5, 0.1 + 0.2], [0.6, 0.6, 0.3]).endswith(" (1:1)")  # 0.1 + 0.2 is no better than 0.3
    assert results.difference([0.5], [0.6]) == "-10.0"


def cell(out, method, rule, seed, **numbers):
    folder = results.folder_of(out, method, rule, seed)
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps({"epochs": 1, "seconds": 1.0} | numbers))


def test_the_table_pairs_seeds_and_leaves_out_what_is_not_finished(tmp_path):
    for seed, (ours, mae) in enumerate([(0.5, 0.4), (0.9, 0.7)]):
        cell(tmp_path, "MLO-MAE", "steps", seed, probe=ours, finetune=ours)
        cell(tmp_path, "MAE", "steps", seed, probe=mae, finetune=mae)
    cell(tmp_path, "no pretraining", "steps", 0, finetune=0.3)  # seed 1 is missing
    lines, rows = results.table(results.MAIN, range(2), tmp_path)
    assert [(row["rule"], row["method"]) for row in rows] == [("steps", "MLO-MAE"), ("steps", "MAE")]
    assert "+15.0 ± 63.5 (2:0)" in lines[2]  # gaps 10 and 20: deviation 7.07, times 12.7 / sqrt(2)
    assert "70.0 ± 28.3" in lines[2]


def test_methods_differ_in_their_settings_alone(tmp_path):
    """Everything that a cell's run depends on, against the command lines that would make it."""
    found = {name: results.settings("shapes", name, 3, tmp_path, "there")[0] for name in results.METHODS}
    plain = mlo_mae.Config(epochs=8, seed=3, data_dir="there")
    assert found["MLO-MAE"] == found["no pretraining"] == plain and found["MAE"].masking == "random"
    assert found["SemMAE"].parts_from == str(tmp_path / "MAE-steps-3") and found["SemMAE"].uniformity == 0
    assert (found["U-MAE"].uniformity, found["U-MAE"].masking, found["SemMAE"].masking) == (0.01, "random", "random")
    changed = {
        name: {key for key, value in vars(cfg).items() if vars(plain).get(key, value) != value} for name, cfg in found.items()
    }
    assert [changed[name] for name in results.METHODS if name.startswith("MLO-MAE, ")] == [
        {"mask_noise"},
        {"hypergradient"},
        {"update_jacobian"},
        {"mask_lr"},
    ]
    scratch = {name: results.settings("shapes", name, 3, tmp_path, "there")[1].from_scratch for name in results.METHODS}
    assert [name for name in scratch if scratch[name]] == ["no pretraining"]


@pytest.mark.slow
def test_a_grid_of_tiny_runs_and_its_rules(tiny, tmp_path, monkeypatch, capsys):
    arguments = ["--seeds", "1", "--workers", "1", "--out", str(tmp_path / "grid")]
    assert results.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"`python mlo_mae.py results {' '.join(arguments)}`"
    report = json.loads(printed[-1])
    rows = {(row["rule"], row["method"]): row for row in report["rows"]}
    timed = {("time", method) for method in ["MLO-MAE", *results.TIMED]}
    assert set(rows) == {("steps", method) for method in results.MAIN} | timed
    ours, mae, longer = rows["steps", "MLO-MAE"], rows["steps", "MAE"], rows["time", "MAE"]
    assert longer["epochs"] == [max(1, round(mae["epochs"][0] * ours["seconds"][0] / mae["seconds"][0]))]
    scratch, tuned = rows["steps", "no pretraining"], rows["time", "no pretraining"]
    more = scratch["finetune_epochs"][0] * ours["seconds"][0] / scratch["finetune_seconds"][0]
    assert tuned["finetune_epochs"] == [scratch["finetune_epochs"][0] + round(more)] and tuned["epochs"] == [0]
    config = json.loads((tmp_path / "grid/SemMAE-steps-0/config.json").read_text())
    assert config["parts_from"] == str(tmp_path / "grid/MAE-steps-0")
    assert (tmp_path / "grid/SemMAE-steps-0/parts.pt").exists()
    assert (tmp_path / "grid/results.png").stat().st_size > 10_000

    def forbidden(*arguments):
        raise AssertionError("a finished cell ran again")

    monkeypatch.setattr(results, "run_cell", forbidden)  # cannot even be sent to a worker
    assert results.main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == report["rows"]


@pytest.mark.slow
def test_dense_tasks_on_the_encoders_of_a_grid(tiny, tmp_path, monkeypatch, capsys):
    for task, dense in results.DENSE.items():
        monkeypatch.setitem(results.DENSE, task, dense._replace(recipe={"epochs": 1, "warmup_epochs": 0.0}))
    out, methods = tmp_path / "grid", ["MLO-MAE", "MAE", "no pretraining"]
    assert results.main(["--seeds", "1", "--workers", "1", "--out", str(out), "--dense", "--methods", *methods]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = {row["method"]: row for row in json.loads(printed[-1])["rows"]}
    assert list(rows) == methods and not (out / "MAE-time-0").exists()
    for method, row in rows.items():
        folder = results.folder_of(out, method, "steps", 0)
        for task, measure in (("segment", "test_miou"), ("detect", "test_ap")):
            result = json.loads((folder / task / "result.json").read_text())
            assert row[task] == [result[measure]] and result["train_labels"] == 192
            config = json.loads((folder / task / "config.json").read_text())
            assert config["recipe"]["from_scratch"] == (method == "no pretraining") and config["config"]["width"] == 8
    (line,) = (line for line in printed if line.startswith("| MLO-MAE"))
    assert line.split(" | ")[2] == results.difference(rows["MLO-MAE"]["segment"], rows["MAE"]["segment"])


@pytest.mark.slow
@pytest.mark.parametrize("command", [[mlo_mae.__file__, "results"], ["-m", "experiments.results"]], ids=["verb", "module"])
def test_cells_run_however_the_program_was_started(command, tmp_path):
    """All cells are finished but one, whose run is damaged: the one line that says so comes from the cell's process."""
    for method in ("MLO-MAE", "MAE"):
        cell(tmp_path, method, "steps", 0, probe=0.5, finetune=0.5, finetune_seconds=1.0)
    longer = results.folder_of(tmp_path, "MAE", "time", 0)
    longer.mkdir()
    (longer / "checkpoint.pt").write_bytes(b"no checkpoint")
    arguments = ["--seeds", "1", "--methods", "MLO-MAE", "MAE", "--out", str(tmp_path)]
    root = Path(mlo_mae.__file__).parent
    found = subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, cwd=root)
    (line,) = found.stderr.splitlines()
    assert found.returncode == 2 and line.startswith(f"mlo_mae: {longer / 'checkpoint.pt'} cannot be read"), line


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--methods", "MAE"], "--methods needs MLO-MAE"),
        (["--seeds", "0"], "must be at least 1"),
        (["--table", "--out", "nowhere"], "run without --table"),
        (["--table", "--out", "nowhere", "--dense"], "run without --table"),
        (["--dense", "--data", "cifar100"], "--dense needs images"),
    ],
)
def test_what_cannot_run_ends_in_one_line(arguments, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert results.main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and part in errors[0] and not list(tmp_path.iterdir())
