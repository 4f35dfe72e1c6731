"""The grid of methods x seeds: its statistics against known values, its rules, and that finished cells stay."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch

import mlo_mae
from experiments import clutter, results
from experiments.results import Cell, Grid
from harness import UserError
from harness.cli import choose_device
from harness.measure import machine
from harness.signals import Interrupted

SIZES = {"patch_size": 8, "width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_heads": 2, "masking_width": 8}
TINY = SIZES | {
    "images": 240,
    "epochs": 1,
    "mask_start": 0.1,
    "mask_until": 0.6,
    "level1_steps": 2,
    "mask_batches": 2,
    "log_every": 1,
}
SHORT = {"epochs": 2, "warmup_epochs": 0.0}


@pytest.fixture
def tiny(monkeypatch):
    """The grid of shapes and clutter, at sizes that take seconds."""
    monkeypatch.setitem(results.DATA, "shapes", (TINY, SHORT))
    monkeypatch.setitem(results.DATA, "clutter", (TINY | {"data": "{clutter}"}, SHORT))
    semantic = results.METHODS["SemMAE"]
    monkeypatch.setitem(results.METHODS, "SemMAE", semantic._replace(changes={"parts_steps": 2}))


@pytest.fixture(scope="module")
def clutter_file(tmp_path_factory):
    """Objects on noise, in the layout of clutter's file, of 300 + 60 images."""
    path, rng = tmp_path_factory.mktemp("clutter") / "clutter.npz", np.random.default_rng(0)
    pools = {part: rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8) for part, count in clutter.COUNTS.items()}
    few = {
        part: tuple(array[:count] for array in arrays)
        for (part, arrays), count in zip(clutter.on_photographs(pools, 0).items(), (300, 60))
    }
    np.savez(path, **clutter.arrays_of(few))
    return path


def at(out, seeds=1, **settings):
    return Grid(out, "there", Path("file.npz"), seeds, **settings)


@pytest.mark.parametrize("freedom, value", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622)])  # any table of Student's t
def test_t_quantiles(freedom, value):
    assert results.t_quantile(freedom) == pytest.approx(value, rel=2e-4)


def test_spread_and_paired_difference():
    assert results.spread([0.1, 0.2, 0.3]) == "20.0 ± 10.0" and results.spread([0.25]) == "25.0"
    ours, theirs = [0.50, 0.60, 0.70], [0.48, 0.59, 0.67]  # gaps 2, 1, 3: mean 2, deviation 1
    assert results.difference(ours, theirs) == f"+2.0 ± {4.3027 / np.sqrt(3):.1f} (3:0)"
    assert results.difference([0.7, 0.5, 0.1 + 0.2], [0.6, 0.6, 0.3]).endswith(" (1:1)")  # 0.1 + 0.2 is no better than 0.3
    assert results.difference([0.5], [0.6]) == "-10.0"


def cell(out, method, rule, seed, data="shapes", **numbers):
    folder = results.folder_of(out, Cell(data, method, rule, seed))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cell.json").write_text(json.dumps({"epochs": 1, "seconds": 1.0} | numbers))


def test_the_table_pairs_seeds_and_leaves_out_what_is_not_finished(tmp_path):
    for seed, (ours, mae) in enumerate([(0.5, 0.4), (0.9, 0.7)]):
        cell(tmp_path, "MLO-MAE", "steps", seed, probe=ours, probe_cls=mae, finetune=ours, object_auc=ours, object_weight=3)
        cell(tmp_path, "MLO-MAE, T given", "steps", seed, probe=ours, probe_cls=mae, object_auc=ours, object_weight=3)
        cell(tmp_path, "MAE", "steps", seed, probe=mae, probe_cls=mae, finetune=mae, object_auc=0.5, object_weight=1)
    cell(tmp_path, "no pretraining", "steps", 0, finetune=0.3)  # seed 1 is missing
    lines, rows = results.table("shapes", results.MAIN, at(tmp_path, 2))
    assert [(row["rule"], row["method"]) for row in rows] == [("steps", name) for name in results.MAIN[:3]]
    # gaps 10 and 20: deviation 7.07, times 12.7 / sqrt(2)
    ours = "| equal steps | MLO-MAE | 1 | 1 | 70.0 ± 28.3 | +15.0 ± 63.5 (2:0) | 55.0 ± 21.2 | +0.0 ± 0.0 (0:0) "
    assert lines[2] == f"{ours}| 70.0 ± 28.3 | +15.0 ± 63.5 (2:0) |"
    given = lines[3].split(" | ")  # not fine-tuned yet, and its seconds are not all
    assert given[3:5] == ["1 + T", "70.0 ± 28.3"] and given[-2:] == ["", " |"]
    assert lines[4].split(" | ")[1:6] == ["MAE", "1", "1", "55.0 ± 21.2", ""]  # against itself: nothing
    assert lines[6:8] == ["| method | object_auc | object_weight |", "|---|--:|--:|"]
    assert lines[8:] == [f"| {name} | 0.70 ± 0.28 | 3.00 ± 0.00 |" for name in ("MLO-MAE", "MLO-MAE, T given")]
    assert rows[0]["probe"] == [0.5, 0.9] and "finetune" not in rows[1]


def test_a_table_says_on_which_machines_its_cells_were_made(tmp_path, monkeypatch, capsys):
    """Not on which one it is printed."""
    monkeypatch.setattr(results, "figure", lambda *given: False)  # these cells have no runs
    here = machine(choose_device("auto"))
    there = here | {"cpu": "Another", "torch": "2.99"}
    for method in ("MLO-MAE", "MAE"):
        cell(tmp_path, method, "steps", 0, probe=0.5, probe_cls=0.5, machine=there)
    words = ["--table", "--seeds", "1", "--first-seed", "0", "--methods", "MLO-MAE", "MAE", "--out", str(tmp_path)]

    def told():
        assert results.main(words) == 0
        heading, report = itemgetter(2, -1)(capsys.readouterr().out.splitlines())
        report = json.loads(report)
        assert all("machine" not in row and row["probe"] == [0.5] for row in report["rows"])
        return heading, report["machine"]

    heading, facts = told()
    assert "cpu Another, " in heading and "torch 2.99, " in heading and here["cpu"] not in heading
    assert facts["cpu"] == "Another" and facts["python"] == here["python"] and facts["threads"] == 1
    cell(tmp_path, "MAE", "steps", 0, probe=0.5, probe_cls=0.5)  # of before: it tells no machine
    heading, facts = told()
    assert f"cpu Another and {here['cpu']}, " in heading and facts["torch"] == f"2.99 and {here['torch']}"
    assert facts["python"] == here["python"]


def test_methods_differ_in_their_settings_alone(tmp_path):
    """Everything that a cell's run depends on, against the command lines that would make it."""
    both = {name: results.settings(Cell("shapes", name, "steps", 3), at(tmp_path, 4)) for name in results.METHODS}
    found = {name: cfg for name, (cfg, _) in both.items()}
    plain = mlo_mae.Config(**results.DATA["shapes"][0], seed=3, data_dir="there", checkpoint_minutes=0.25)
    assert found["MLO-MAE"] == found["no pretraining"] == plain and found["MAE"].masking == "random"
    for cfg in found.values():
        mlo_mae.check(cfg)
    assert found["SemMAE"].parts_from == str(tmp_path / "shapes/MAE-steps-3") and found["SemMAE"].uniformity == 0
    assert (found["U-MAE"].uniformity, found["U-MAE"].masking, found["SemMAE"].masking) == (0.01, "random", "random")
    for name, lender in (
        ("MLO-MAE, T given", "shapes"),
        ("T of the other data", "clutter"),
        ("T of width 64, width 96", "shapes"),
    ):
        assert found[name].masking_from == str(tmp_path / lender / "MLO-MAE-steps-2")  # the one before 3
        assert not found[name].masking_learns
    changed = {
        name: {key for key, value in vars(cfg).items() if vars(plain).get(key, value) != value} for name, cfg in found.items()
    }
    names = [name for name in results.METHODS if name.startswith("MLO-MAE, ")]
    given = {"masking_from"}
    settings = ["mask_restart", "level2", "pooling", "masking_network", "mask_choice", "hypergradient", "update_jacobian"]
    assert [changed[name] for name in names] == [given, *({name} for name in settings), {"mask_lr", "lr"}]
    assert changed["MAE, width 96"] == {"masking", "width", "lr"} and changed["T of width 64, width 96"] == given | {"width"}
    alike = {
        "MAE",
        "MAE, no restart",
        "MAE, width 96",
        "SemMAE",
        "U-MAE",
        "MLO-MAE, T at rest",
    }  # at a learning rate of their own
    assert {name for name, cfg in found.items() if cfg.lr != plain.lr} == alike
    assert {results.settings(Cell("cifar100", name, "steps", 3), at(tmp_path, 4))[0].lr for name in results.ROWS} == {2e-3}
    assert [name for name, (_, recipe) in both.items() if recipe.from_scratch] == ["no pretraining"]
    assert results.settings(Cell("clutter", "MLO-MAE", "steps", 3), at(tmp_path, 4))[0].data == "file.npz"


def test_what_a_cell_waits_for(tmp_path):
    def before(*cell, seeds=3):
        return results.needed(Cell(*cell), at(tmp_path, seeds))

    ours = Cell("clutter", "MLO-MAE", "steps", 2)
    assert before(*ours) == before("clutter", "no pretraining", "segment", 2) == []
    assert before("clutter", "MAE", "time", 2) == [ours, Cell("clutter", "MAE", "steps", 2)]
    assert before("clutter", "MLO-MAE", "detect", 2) == [ours]
    for seed, other in ((0, 1), (1, 0), (2, 1)):  # however many there are
        for seeds in (3, 5):
            cells = [
                ("clutter", "MLO-MAE, T given"),
                ("clutter", "T of width 64, width 96"),
                ("shapes", "T of the other data"),
            ]
            found = [before(*names, "steps", seed, seeds=seeds) for names in cells]
            assert found == 3 * [[ours._replace(seed=other)]]
    assert before("shapes", "SemMAE", "steps", 1) == [Cell("shapes", "MAE", "steps", 1)]


def test_a_cell_that_was_given_another_t_is_not_taken(tmp_path):
    given = Cell("shapes", "MLO-MAE, T given", "steps", 2)
    cell(tmp_path, given.method, "steps", 2, finetune=0.5)
    cfg, recipe = results.settings(given._replace(rule="segment"), at(tmp_path, 3))
    config = asdict(cfg) | {"masking_from": "elsewhere/shapes/MLO-MAE-steps-1"}
    (results.folder_of(tmp_path, given) / "config.json").write_text(json.dumps(config))
    assert results.is_finished(given, at(tmp_path, 3))
    dense = given._replace(rule="segment")  # on the encoder of that cell
    folder = results.folder_of(tmp_path, dense)
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"test_miou": 0.5}))
    (folder / "config.json").write_text(json.dumps({"recipe": asdict(recipe), "config": config}))
    assert results.is_finished(dense, at(tmp_path, 3))
    assert results.is_finished(given, at(tmp_path, 5))
    with pytest.raises(UserError, match="made with --masking-from MLO-MAE-steps-1, not MLO-MAE-steps-3; .* --out"):
        results.is_finished(given, at(tmp_path, 5, first=2))


def test_a_cell_of_other_settings_is_not_taken(tmp_path):
    """What is made with other settings, by another clock or with another recipe would stand in the table as today's."""
    made, grid = Cell("clutter", "MAE", "time", 0), at(tmp_path, 2)
    folder, config = results.folder_of(tmp_path, made), asdict(results.settings(made, grid)[0])
    cell(tmp_path, "MAE", "time", 0, data="clutter", threads=1)
    with pytest.raises(UserError, match="made with --threads 1, not --threads 2"):
        results.numbers(replace(grid, threads=2, seeds=1), "clutter", "MAE", "time")
    free = {"epochs": 31, "data_dir": "elsewhere", "data": "elsewhere/file.npz", "device": "cuda"}
    (folder / "config.json").write_text(json.dumps(config | free))
    assert results.read_cell(grid, made)["threads"] == 1
    for name, value, said in (
        ("lr", 1e-3, "--lr 0.001, not 0.006"),
        ("data", "other.npz", "--data other.npz, not file.npz"),
        ("flip", False, "--no-flip, not --flip"),
    ):
        (folder / "config.json").write_text(json.dumps(config | free | {name: value}))
        with pytest.raises(UserError, match=f"made with {said}; move it away, or give another --out$"):
            results.read_cell(grid, made)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="damaged or of another version"):
        results.read_cell(grid, made)
    steps = made._replace(rule="steps")
    cell(tmp_path, "MAE", "steps", 0, data="clutter")
    steps_folder = results.folder_of(tmp_path, steps)
    (steps_folder / "config.json").write_text(json.dumps(config | {"epochs": 31}))
    with pytest.raises(UserError, match="made with --epochs 31, not 24"):  # which time alone decides
        results.read_cell(grid, steps)
    (steps_folder / "config.json").unlink()
    (steps_folder / "cell.json").write_text("{")
    with pytest.raises(UserError, match="cell.json is damaged"):
        results.read_cell(grid, steps)
    dense = made._replace(rule="detect")
    (folder := results.folder_of(tmp_path, dense)).mkdir()
    (folder / "result.json").write_text(json.dumps({"test_ap": 0.5}))
    (folder / "config.json").write_text(json.dumps({"recipe": asdict(results.settings(dense, grid)[1]) | {"epochs": 3}}))
    with pytest.raises(UserError, match="made with --epochs 3, not 10"):
        results.read_cell(grid, dense)
    (folder / "config.json").write_text(json.dumps({"recipe": asdict(results.settings(dense, grid)[1])}))
    with pytest.raises(UserError, match="MAE-steps-0/cell.json is damaged"):  # its encoder's
        results.read_cell(grid, dense)


def test_a_cell_that_what_it_stands_beside_has_left_behind_is_not_taken(tmp_path):
    """Equal time is that of today's MLO-MAE; a probe, of today's encoder; a fine-tuned encoder, by today's recipe."""
    grid, timed = at(tmp_path, 1), Cell("shapes", "MAE", "time", 0)
    cell(tmp_path, "MAE", "time", 0, epochs=36, seconds=150.0)
    assert results.read_cell(grid, timed)
    for ours, epochs in ((150.0, 36), (149.0, 36), (120.0, 29)):  # MAE makes its 24 epochs in 100 seconds
        cell(tmp_path, "MLO-MAE", "steps", 0, epochs=24, seconds=ours)
        cell(tmp_path, "MAE", "steps", 0, epochs=24, seconds=100.0)
        if epochs == 36:
            assert results.read_cell(grid, timed)
    with pytest.raises(UserError, match="made with --epochs 36, not 29, for which MLO-MAE's seconds suffice by now"):
        results.read_cell(grid, timed)

    probed = replace(grid, methods=results.METHODS | {"MAE, few": results.Method(results.Config, results.MAE, encoder="MAE")})
    few = Cell("shapes", "MAE, few", "steps", 0)
    cell(tmp_path, few.method, "steps", 0, seconds=100.0)
    assert results.read_cell(probed, few)
    cell(tmp_path, "MAE", "steps", 0, seconds=101.0)
    with pytest.raises(UserError, match="made with an earlier run of MAE; move it away"):
        results.read_cell(probed, few)

    for method in ("MAE", "no pretraining"):
        made = Cell("shapes", method, "steps", 0)
        recipe = asdict(results.settings(made, grid)[1])
        cell(tmp_path, method, "steps", 0, finetune=0.5, finetune_recipe=recipe)
        assert results.is_finished(made, grid)
        cell(tmp_path, method, "steps", 0, finetune=0.5, finetune_recipe=recipe | {"epochs": 5})
        assert results.is_finished(made, replace(grid, tuned=False)) or method == "no pretraining"
        with pytest.raises(UserError, match="made with --epochs 5, not 3"):
            results.is_finished(made, grid)


def test_without_fine_tuning_there_is_nothing_to_do_without_pretraining(tmp_path):
    methods = ["MLO-MAE", "MAE", "no pretraining"]
    plain, bare = (at(tmp_path, 2, tuned=tuned) for tuned in (True, False))
    assert len(plain.cells("shapes", ("steps", "time"), methods)) == 2 * 5
    cells = bare.cells("shapes", ("steps", "time"), methods)
    assert {(cell.method, cell.rule) for cell in cells} == {("MLO-MAE", "steps"), ("MAE", "steps"), ("MAE", "time")}
    assert Cell("shapes", "no pretraining", "segment", 1) in bare.cells("shapes", ("steps", "segment"), methods)
    cell(tmp_path, "MAE", "steps", 0, probe=0.5)
    cell(tmp_path, "MAE", "steps", 1, probe=0.5, finetune=0.5)
    cells = [Cell("shapes", "MAE", "steps", seed) for seed in range(3)]
    assert [results.is_finished(each, plain) for each in cells] == [False, True, False]
    assert [results.is_finished(each, bare) for each in cells] == [True, True, False]


def test_a_row_is_set_against_each_rival():
    ours, mae, other = ([{"probe": value} for value in values] for values in ((0.5, 0.7), (0.4, 0.5), (0.6, 0.8)))
    found = results.compared(ours, ["probe", "probe_cls"], mae, other, ours, [])
    assert found[0] == "60.0 ± 14.1" and found[1].startswith("+15.0 ±") and found[2].startswith("-10.0 ± 0.0 (0:2)")
    assert found[3:] == [""] * 7  # against itself, what is not there, and a measure that is missing


# --------------------------------------------------------------------------------------------------------- seconds


def cfg_of(**changes):
    return mlo_mae.Config(**TINY | {"device": "cpu", "checkpoint_minutes": 0} | changes)


def later(now, seconds, value):
    now[0] += seconds
    return value


def test_seconds_are_the_loops_alone_and_add_up_over_interruptions(tmp_path, monkeypatch, drawn_once):
    """Loading, probes and pictures do not count; of an update that a crash ended, the one that is made again does."""
    now, cfg, loop, load = [0.0], cfg_of(epochs=2), mlo_mae.outer_iteration, mlo_mae.load_data
    monkeypatch.setattr(results, "clock_of", lambda threads: lambda: now[0])
    monkeypatch.setattr(mlo_mae, "load_data", lambda *arguments: later(now, 1000, load(*arguments)))
    told = {pooling: {"test_accuracy": share, "val_accuracy": share / 2} for pooling, share in (("mean", 0.5), ("cls", 0.4))}
    monkeypatch.setattr(results, "probe", lambda *arguments, pooling: later(now, 1000, told[pooling]))
    monkeypatch.setattr(results.show, "draw_run", lambda *arguments: later(now, 1000, []))
    stops = {1: lambda: signal.raise_signal(signal.SIGTERM), 3: lambda: 1 / 0}

    def working(net, state, *rest):
        later(now, 1, None)
        stops.pop(state.iteration, lambda: None)()
        return loop(net, state, *rest)

    monkeypatch.setattr(mlo_mae, "outer_iteration", working)
    kept = tmp_path / "run/seconds.json"
    for seconds, end in ((2, Interrupted), (3, ZeroDivisionError)):
        with pytest.raises(end):
            results.pretrain(cfg, tmp_path / "run", 1)
        assert json.loads(kept.read_text()) == seconds
    found = results.pretrain(cfg, tmp_path / "run", 1)
    assert found["seconds"] == 6 and found.keys() > {"object_auc", "object_weight"}
    probes = {"probe": 0.5, "probe_cls": 0.4, "probe_val": 0.25, "probe_cls_val": 0.2}
    assert {name: share for name, share in found.items() if name not in ("seconds", *results.OBJECTS)} == probes
    assert results.pretrain(cfg, tmp_path / "run", 1) == found  # a run that has ended is only looked at
    kept.unlink()
    with pytest.raises(UserError, match="not timed"):
        results.pretrain(cfg, tmp_path / "run", 1)


def test_the_clock_is_the_process_own_where_one_thread_does_the_work(monkeypatch):
    monkeypatch.setattr(results.cli, "choose_device", lambda name: torch.device("cpu"))
    assert results.clock_of(1) is time.process_time and results.clock_of(2) is time.perf_counter
    monkeypatch.setattr(results.cli, "choose_device", lambda name: torch.device("cuda"))
    assert results.clock_of(1) is time.perf_counter


def test_a_table_is_saved_with_its_pictures(tmp_path, monkeypatch, capsys):
    """Of the seeds that are the default."""
    first, saved = results.parse([]).first_seed, tmp_path / "benchmarks"
    saved.mkdir()
    for module in ("experiments.results", "harness.measure"):
        monkeypatch.setattr(f"{module}.BENCHMARKS", saved)
    for method in ("MLO-MAE", "MAE"):
        cell(tmp_path, method, "steps", first, probe=0.5, probe_cls=0.5)
    folder = results.folder_of(tmp_path, Cell("shapes", "MLO-MAE", "steps", first))
    rows = [{"epoch": epoch, "object_auc": 0.5 + 0.1 * epoch, "object_weight": 1.0 + epoch} for epoch in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "masks-over-training.png").write_bytes(b"masks")
    arguments = ["--table", "--save", "--seeds", "1", "--methods", "MLO-MAE", "MAE", "--out", str(tmp_path)]
    assert results.main(arguments) == 0
    assert (saved / "results-shapes-masks.png").read_bytes() == b"masks"
    assert (saved / "results-shapes.png").stat().st_size > 10_000
    text = (saved / "results-shapes.md").read_text("utf-8")
    assert text in capsys.readouterr().out and "| equal steps | MLO-MAE | 1 | 1 | 50.0 |" in text


@pytest.fixture
def shown(monkeypatch):
    """What `panels` is given; nothing is written."""
    given = []
    monkeypatch.setattr(results, "panels", lambda path, shown, text: given.append((shown, text)))
    return given


def write_metrics(out, method, seed, rows):
    cell(out, method, "steps", seed)
    path = results.folder_of(out, Cell("shapes", method, "steps", seed)) / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_figure_has_the_mean_of_seeds_and_a_band_from_the_lowest_to_the_highest(tmp_path, shown):
    for seed, auc in enumerate((0.6, 0.9, 0.9)):
        late = {"object_auc": auc, "object_weight": 10 * auc}
        write_metrics(tmp_path, "MLO-MAE", seed, [{"epoch": 1, "object_auc": 0.5}, {"epoch": 2} | late])
        write_metrics(tmp_path, "MAE", seed, [{"epoch": 1} | late])
    assert results.figure("shapes", ["MLO-MAE", "MAE"], at(tmp_path, 3), tmp_path / "results.png")
    (((auc, weight), text),) = shown
    assert list(auc.lines) == list(weight.lines) == ["MLO-MAE"] and (auc.chance, weight.chance) == (0.5, 1)
    assert "(AUC)" in auc.title and "ratio to p of the rest" in weight.title
    for found, wanted in zip(auc.lines["MLO-MAE"], ([1, 2], [0.5, 0.8], [0.5, 0.6], [0.5, 0.9])):
        np.testing.assert_allclose(found, wanted)
    for found, wanted in zip(weight.lines["MLO-MAE"], ([2], [8.0], [6.0], [9.0])):
        np.testing.assert_allclose(found, wanted)
    assert "mean of 3 seeds" in text and "Band: from the lowest seed to the highest" in text and "objects" in text


def test_a_figure_of_data_without_objects_shows_how_p_spreads(tmp_path, shown):
    assert not results.figure("shapes", ["MLO-MAE"], at(tmp_path), tmp_path / "results.png") and not shown
    write_metrics(tmp_path, "MLO-MAE", 0, [{"epoch": 1, "p_std": 0.1, "mask_overlap": 0.75}])
    assert results.figure("shapes", ["MLO-MAE"], at(tmp_path), tmp_path / "results.png")
    (((std, overlap), text),) = shown
    assert std.lines["MLO-MAE"][1] == [0.1] and overlap.lines["MLO-MAE"][1] == [0.75]
    assert "mean of 1 seed." in text and "objects" not in text


# ------------------------------------------------------------------------------------------------------ whole grids


@pytest.mark.slow
def test_a_grid_of_tiny_runs_and_its_rules(tiny, clutter_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(results.DATA, "shapes", results.DATA["clutter"])  # drawing shapes takes seconds a cell
    methods = ["MLO-MAE", "MLO-MAE, T given", "MAE", "no pretraining", "SemMAE"]
    arguments = ["--seeds", "2", "--first-seed", "0", "--workers", "1", "--out", str(tmp_path / "grid")]
    arguments += ["--clutter", str(clutter_file), "--methods", *methods]
    assert results.main([*arguments, "--no-finetune"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    before = {(row["rule"], row["method"]): row for row in report["rows"]}
    pretrained = [method for method in methods if method != "no pretraining"]
    longer = [("time", method) for method in ("MLO-MAE", "MAE", "SemMAE")]
    assert list(before) == [*(("steps", method) for method in pretrained), *longer]
    assert all(len(row["probe"]) == len(row["probe_cls"]) == 2 and "finetune" not in row for row in before.values())
    kept = [json.loads(path.read_text())["machine"] for path in (tmp_path / "grid").rglob("cell.json")]
    assert kept == [machine(choose_device("auto")) | {"threads": 1}] * 2 * 6
    checkpoints = {path: path.read_bytes() for path in (tmp_path / "grid").rglob("checkpoint.pt")}
    assert len(checkpoints) == 2 * 6 and all(min(row["seconds"]) > 0 for row in before.values())

    assert results.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"`python mlo_mae.py {shlex.join(['results', *arguments])}`"
    assert all(path.read_bytes() == content for path, content in checkpoints.items())  # nothing was pretrained again
    report = json.loads(printed[-1])
    rows = {(row["rule"], row["method"]): row for row in report["rows"]}
    timed = {("time", method) for method in ["MLO-MAE", *results.TIMED] if method in methods}
    assert set(rows) == {("steps", method) for method in methods} | timed
    assert all(row.items() <= rows[key].items() and len(rows[key]["finetune"]) == 2 for key, row in before.items())
    ours, mae, longer = rows["steps", "MLO-MAE"], rows["steps", "MAE"], rows["time", "MAE"]
    shares = zip(mae["epochs"], ours["seconds"], mae["seconds"])
    assert longer["epochs"] == [max(1, round(epochs * ours / mae)) for epochs, ours, mae in shares]
    scratch, tuned = rows["steps", "no pretraining"], rows["time", "no pretraining"]
    shares = zip(scratch["finetune_epochs"], ours["seconds"], scratch["finetune_seconds"])
    more = [epochs + round(epochs * ours / pace) for epochs, ours, pace in shares]
    assert tuned["finetune_epochs"] == more and tuned["epochs"] == [0, 0]
    folder = tmp_path / "grid/shapes"
    config = json.loads((folder / "SemMAE-steps-0/config.json").read_text())
    assert config["parts_from"] == str(folder / "MAE-steps-0") and (folder / "SemMAE-steps-0/parts.pt").exists()
    lent, given = (torch.load(folder / f"MLO-MAE{name}-steps-1/checkpoint.pt") for name in ("", "-T-given"))
    lent = torch.load(folder / "MLO-MAE-steps-0/checkpoint.pt")
    assert torch.equal(lent["masking"]["fc.weight"], given["masking"]["fc.weight"]) and lent["masking"]["fc.weight"].any()
    eyes = given["eyes"]["weights"]
    assert all(torch.equal(eyes[name], tensor) for name, tensor in lent["eyes"]["weights"].items())
    assert (folder / "results.png").stat().st_size > 10_000 and (folder / "MLO-MAE-steps-0/masks-over-training.png").exists()

    def forbidden(*arguments):
        raise AssertionError("a finished cell ran again")

    monkeypatch.setattr(results, "run_cell", forbidden)  # cannot even be sent to a worker
    assert results.main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == report["rows"]


@pytest.mark.slow
@pytest.mark.usefixtures("cells_here", "quick_probes")
def test_a_t_is_used_by_runs_of_another_seed_width_and_data(tiny, clutter_file, tmp_path, capsys):
    out = tmp_path / "grid"
    words = ["--transfer", "--seeds", 2, "--first-seed", 0, "--workers", 1, "--out", out, "--clutter", clutter_file]
    assert results.main([*map(str, words)]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = {(row["data"], row["method"]): row for row in json.loads(printed[-1])["rows"]}
    own = ["MAE", "MLO-MAE", "MLO-MAE, T given", "T of {}", "MAE, width 96", "T of width 64, width 96"]
    assert list(rows) == [(data, name.format(results.OTHER[data])) for data in results.OTHER for name in own]
    wide, rival = (rows["shapes", name] for name in ("T of width 64, width 96", "MAE, width 96"))
    (line,) = (line for line in printed if line.startswith("| shapes | T of width 64, width 96 | "))
    assert line.split(" | ")[4] == results.difference(wide["probe"], rival["probe"])
    for data, other in results.OTHER.items():
        config = json.loads((out / data / "T-of-the-other-data-steps-0/config.json").read_text())
        assert config["masking_from"] == str(out / other / "MLO-MAE-steps-1")
    assert not list(out.rglob("finetune*")) and not (out / "shapes/results.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("images", ["shapes", "clutter"])
@pytest.mark.usefixtures("cells_here", "quick_probes")
def test_dense_tasks_on_the_encoders_of_a_grid(tiny, clutter_file, tmp_path, monkeypatch, capsys, images):
    for task, dense in results.DENSE.items():
        monkeypatch.setitem(results.DENSE, task, dense._replace(recipe={"epochs": 1, "warmup_epochs": 0.0}))
    out, methods = tmp_path / "grid", ["MLO-MAE", "MAE", "no pretraining"]
    given = ["--data", images, "--clutter", clutter_file, "--no-finetune", "--methods", *methods]
    assert results.main([*map(str, ["--seeds", 1, "--first-seed", 0, "--workers", 1, "--out", out, "--dense", *given])]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = {row["method"]: row for row in json.loads(printed[-1])["rows"]}
    assert list(rows) == methods and not (out / images / "MAE-time-0").exists()
    for method, row in rows.items():
        folder = results.folder_of(out, Cell(images, method, "steps", 0))
        assert (folder / "cell.json").exists() == (method != "no pretraining")
        for task, measure in (("segment", "test_miou"), ("detect", "test_ap")):
            result = json.loads((folder / task / "result.json").read_text())
            assert row[task] == [result[measure]] and result["train_labels"] == 192
            config = json.loads((folder / task / "config.json").read_text())
            assert config["recipe"]["from_scratch"] == (method == "no pretraining") and config["config"]["width"] == 8
    (line,) = (line for line in printed if line.startswith("| MLO-MAE"))
    assert line.split(" | ")[2] == results.difference(rows["MLO-MAE"]["segment"], rows["MAE"]["segment"])


@pytest.mark.slow
@pytest.mark.parametrize("command", [[mlo_mae.__file__, "results"], ["-m", "experiments.results"]], ids=["command", "module"])
def test_cells_run_however_the_program_was_started(command, tmp_path):
    """All cells are finished but one, whose run is damaged: the one line that says so comes from the cell's process."""
    for method in ("MLO-MAE", "MAE"):
        cell(tmp_path, method, "steps", 0, probe=0.5, finetune=0.5, finetune_seconds=1.0)
    longer = results.folder_of(tmp_path, Cell("shapes", "MAE", "time", 0))
    longer.mkdir()
    (longer / "checkpoint.pt").write_bytes(b"no checkpoint")
    arguments = ["--seeds", "1", "--first-seed", "0", "--methods", "MLO-MAE", "MAE", "--out", str(tmp_path)]
    root = Path(mlo_mae.__file__).parent
    found = subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, cwd=root)
    lines = found.stderr.splitlines()
    assert found.returncode == 2 and len(lines) == 1, found.stderr
    assert lines[0].startswith(f"mlo_mae: {longer / 'checkpoint.pt'} cannot be read"), found.stderr


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--methods", "MAE"], "--methods needs MLO-MAE"),
        (["--seeds", "0"], "0 is not a positive whole number"),
        (["--first-seed", "-1"], "--first-seed -1 must be at least 0"),
        (["--seeds", "1"], "--seeds must be at least 2"),
        (["--transfer", "--seeds", "1"], "--seeds must be at least 2"),
        (["--transfer", "--data", "shapes"], "leave out --data"),
        (["--transfer", "--dense"], "not allowed with"),
        (["--methods", "MLO-MAE", "MAE", "MAE, width 96"], "--methods"),
        (["--data", "clutter"], "make it with python mlo_mae.py clutter runs/clutter.npz --data-dir DIR"),
        (["--transfer", "--clutter", "mine.npz"], "mine.npz does not exist"),
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


LEFT_ALONE = """
import os, time
from experiments import results

if __name__ == "__main__":
    with results.cell_process() as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_what_a_killed_grid_has_started_ends_too(tmp_path):
    (tmp_path / "alone.py").write_text(LEFT_ALONE)
    paths = os.environ | {"PYTHONPATH": str(Path(mlo_mae.__file__).parent)}
    grid = subprocess.Popen([sys.executable, tmp_path / "alone.py"], stdout=subprocess.PIPE, text=True, env=paths)
    worker = int(grid.stdout.readline())
    grid.kill()
    try:
        grid.communicate(timeout=20)  # until the last that could write there has ended
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGTERM)
        pytest.fail("it works on")


INTERRUPTED = """
import os, pathlib, sys, time
from experiments import results
from harness import cli

def work(*arguments):
    print(os.getpid(), flush=True)
    time.sleep(60)

results.run_cell = work
if __name__ == "__main__":
    grid = results.Grid(pathlib.Path(sys.argv[1]), "", pathlib.Path(), 3)
    cells = grid.cells("shapes", ["steps"], ["MAE"])
    sys.exit(cli.reported("mlo_mae", lambda: results.run_grid(cells, grid, 2)))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.slow
def test_ctrl_c_ends_a_grid_and_its_processes_and_begins_no_cell(tmp_path):
    (tmp_path / "grid.py").write_text(INTERRUPTED)
    paths = os.environ | {"PYTHONPATH": str(Path(mlo_mae.__file__).parent)}
    words, pipes = [sys.executable, tmp_path / "grid.py", tmp_path], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    grid = subprocess.Popen(words, **pipes, text=True, env=paths, start_new_session=True)
    first = [grid.stdout.readline() for _ in range(2)]
    os.killpg(grid.pid, signal.SIGINT)  # as a terminal does
    out, err = grid.communicate(timeout=20)  # until the last that could write there has ended
    assert all(first) and out == "" and grid.returncode == 130
    assert err == "mlo_mae: interrupted; what was written before is whole\n"
