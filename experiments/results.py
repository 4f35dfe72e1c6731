"""Does learning the masks help? A grid of methods x seeds on one data set, as a table, a figure and one line of JSON.

    python mlo_mae.py results                                  # shapes: a quarter of an hour on 2 CPU cores
    python mlo_mae.py results --data cifar100 --data-dir DIR   # a small ViT on 5,000 images
    python mlo_mae.py results --dense                          # shapes: segmentation and detection, encoders of equal steps
    python mlo_mae.py results --table                          # from what is finished, without running anything

Two rules, since a mask update costs more than a step of MAE. *Equal steps*: every method makes the same level-1 steps.
*Equal time*: every method gets the seconds that MLO-MAE took in this grid, at the same seed, and makes more steps in them.
Methods of one seed share their data split, first weights and, under equal steps, the order of their images, so differences
are taken in pairs. Every method has the same labels: all of the training split to probe and fine-tune with, and the
validation split to choose with. A cell of the grid is a run's folder; a finished cell is not run again.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import mlo_mae
from experiments import baselines, finetune, transfer
from experiments.baselines import UMAE, SemMAE
from harness import UserError, cli
from harness.files import write_whole
from harness.measure import BENCHMARKS, machine
from harness.pictures import save_figure
from harness.run import read_metrics
from mlo_mae import Config

# What each method runs as, and the settings that make it. `{mae}` is the folder of this seed's MAE under equal steps.
METHODS: dict[str, tuple[type[Config], dict] | None] = {
    "MLO-MAE": (Config, {"masking": "learned"}),
    "MAE": (Config, {"masking": "random"}),
    "SemMAE": (SemMAE, {"parts_from": "{mae}"}),
    "no pretraining": None,
    "U-MAE": (UMAE, {"uniformity": 0.01}),
    "MLO-MAE, weights alone": (Config, {"masking": "learned", "mask_noise": 100.0}),  # all but random masks, weighted by p
    "MLO-MAE, first-order": (Config, {"masking": "learned", "hypergradient": "first-order"}),
    "MLO-MAE, identity": (Config, {"masking": "learned", "update_jacobian": "identity"}),
    "MLO-MAE, slow T": (Config, {"masking": "learned", "mask_lr": 0.1}),
}
MAIN = ["MLO-MAE", "MAE", "SemMAE", "no pretraining"]  # what runs by default
TIMED = ["MAE", "no pretraining"]  # what also runs for as long as MLO-MAE
MEASURES = {"probe": "linear probe %", "finetune": "fine-tuned %"}  # of a cell


class Dense(NamedTuple):
    """A dense task of transfer.py, whose name is a rule of the grid too."""

    measure: str  # in its result.json
    heading: str
    recipe: dict


DENSE = {
    "segment": Dense("test_miou", "segmentation, mIoU %", {"epochs": 5}),
    "detect": Dense("test_ap", "detection, AP %", {"epochs": 10}),
}
DATA = {  # the configuration, and how to fine-tune
    "shapes": ({"epochs": 8}, {"epochs": 3}),
    "cifar100": ({"data": "cifar100", "images": 5000, "epochs": 12}, {"epochs": 6}),
}

# ------------------------------------------------------------------------------------------------------------ cells


def settings(name: str, method: str, seed: int, out: Path, data_dir: str) -> tuple[Config, finetune.Recipe]:
    """A cell's configuration, and how it is fine-tuned."""
    config, recipe = DATA[name]
    kind, changes = METHODS[method] or (Config, {})
    if "parts_from" in changes:
        changes = changes | {"parts_from": changes["parts_from"].format(mae=folder_of(out, "MAE", "steps", seed))}
    cfg = kind(**config | {"data_dir": data_dir, "seed": seed} | changes)
    return cfg, finetune.Recipe(seed=seed, from_scratch=METHODS[method] is None, **recipe)


def folder_of(out: Path, method: str, rule: str, seed: int) -> Path:
    """A cell's folder."""
    return out / f"{method.replace(',', '').replace(' ', '-')}-{rule}-{seed}"


def read_cell(out: Path, method: str, rule: str, seed: int) -> dict | None:
    """A finished cell's numbers, or None. A dense task is a cell too, in the folder of its encoder."""
    dense = folder_of(out, method, "steps", seed) / rule / "result.json"
    path = dense if rule in DENSE else folder_of(out, method, rule, seed) / "cell.json"
    return json.loads(path.read_text()) if path.exists() else None


def run_cell(cfg: Config, recipe: finetune.Recipe, method: str, rule: str, seed: int, out: Path, threads: int) -> None:
    """Run one cell and write its cell.json: accuracies on the test split (shares), epochs, seconds.

    Under the rule "time" a method gets the seconds of MLO-MAE's pretraining, and the epochs that fit, by its own pace
    under the rule "steps": so a cell is a run like any other, and follows from its flags."""
    torch.set_num_threads(threads)
    folder, pretrained = folder_of(out, method, rule, seed), METHODS[method] is not None
    if rule == "time":
        budget = read_cell(out, "MLO-MAE", "steps", seed)["seconds"]
        pace = read_cell(out, method, "steps", seed)
        if pretrained:
            cfg = replace(cfg, epochs=max(1, round(cfg.epochs * budget / pace["seconds"])))
        else:  # no pretraining: its seconds go to fine-tuning
            recipe = replace(recipe, epochs=recipe.epochs + round(recipe.epochs * budget / pace["finetune_seconds"]))
    cell = {"epochs": cfg.epochs if pretrained else 0, "seconds": 0.0}
    if pretrained:
        summary = pretrain(cfg, folder)
        cell |= {"seconds": pretraining_seconds(folder, cfg), "probe": summary["probe"]["test_accuracy"]}
        start = finetune.encoder_and_data(folder, recipe, {"data_dir": cfg.data_dir})
    else:
        start = finetune.encoder_and_data(None, recipe, asdict(cfg))
        folder.mkdir(parents=True, exist_ok=True)
    tuned = finetune.finetune(*start, recipe)
    cell |= {"finetune": tuned["test_top1"], "finetune_epochs": recipe.epochs, "finetune_seconds": tuned["seconds"]}
    write_whole(folder / "cell.json", json.dumps(cell).encode())


def pretrain(cfg: Config, folder: Path) -> dict:
    """Pretrain into a folder, or go on with what is there, and probe; returns the run's report."""
    if not isinstance(cfg, UMAE):
        return mlo_mae.reported_run(cfg, folder, resume=True)
    baselines.check(cfg)
    return mlo_mae.reported_run(cfg, folder, resume=True, prepare=baselines.prepare)


def run_dense(cfg: Config, recipe: transfer.DenseRecipe, method: str, name: str, seed: int, out: Path, threads: int) -> None:
    """Train a dense task on the encoder of a finished cell, or on fresh weights."""
    torch.set_num_threads(threads)
    folder, task = folder_of(out, method, "steps", seed), transfer.TASKS[name]
    if recipe.from_scratch:
        own = {setting: getattr(cfg, setting) for setting in transfer.SETTINGS}
        start = transfer.encoder_and_dense_data(task, None, recipe, own)
    else:
        start = transfer.encoder_and_dense_data(task, folder, recipe, {})
    finetune.finetune(*start, recipe, folder / name, resume=True, task=task)


def pretraining_seconds(folder: Path, cfg: Config) -> float:
    """Seconds of the loop itself, without evaluation and pictures; also of a run that was interrupted."""
    seconds, before = 0.0, 0
    for row in read_metrics(folder / "metrics.jsonl"):
        seconds += (row["iteration"] - before) * cfg.level1_steps * cfg.batch_size / row["images_per_second"]
        before = row["iteration"]
    return seconds


# -------------------------------------------------------------------------------------------------------------- grid


def needed(method: str, rule: str) -> list[tuple[str, str]]:
    """The cells (method, rule) of the same seed that must be finished before this one."""
    if rule == "time":
        return [("MLO-MAE", "steps"), (method, "steps")]
    if rule in DENSE:
        return [(method, "steps")]
    return [("MAE", "steps")] if method == "SemMAE" else []


def grid(
    name: str, rules: Sequence[str], methods: list[str], seeds: range, out: Path, data_dir: str, workers: int, threads: int
) -> None:
    """Run what is not finished, each cell in a process as soon as what it needs is there. Raises UserError."""

    def finished(method, rule, seed):
        return read_cell(out, method, rule, seed) is not None

    cells = [
        (method, rule, seed) for rule in rules for seed in seeds for method in methods if rule != "time" or method in TIMED
    ]
    todo, running = [cell for cell in cells if not finished(*cell)], {}
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        while todo or running:
            for cell in list(todo):
                method, rule, seed = cell
                if all(finished(*before, seed) for before in needed(method, rule)):
                    (cfg, recipe), work = settings(name, method, seed, out, data_dir), run_cell
                    if rule in DENSE:
                        scratch, work = METHODS[method] is None, run_dense
                        recipe = transfer.DenseRecipe(seed=seed, from_scratch=scratch, **DENSE[rule].recipe)
                    running[pool.submit(work, cfg, recipe, *cell, out, threads)] = cell
                    todo.remove(cell)
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                future.result()
                print("finished", *running.pop(future), file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------- table


def t_quantile(freedom: int, share: float = 0.975) -> float:
    """Student's t quantile: t = sqrt(freedom) tan(angle), where the angle's density is proportional to
    cos^(freedom - 1)."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 1_000_001)[1:-1]
    below = np.cumsum(np.cos(angle) ** (freedom - 1))
    return float(np.sqrt(freedom) * np.tan(angle[np.searchsorted(below / below[-1], share)]))


def spread(values: Iterable[float]) -> str:
    """Mean ± standard deviation of shares, in per cent; of one value, that value."""
    values = 100 * np.array(values)
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def difference(ours: list[float], theirs: list[float]) -> str:
    """Mean of the paired differences of shares in points, the half-width of its 95 % confidence interval, and in how many
    seeds it is above 0 and below it, which one seed far off does not sway."""
    gaps = 100 * (np.array(ours) - np.array(theirs))
    if len(gaps) < 2:
        return f"{gaps.mean():+.1f}"
    half = t_quantile(len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps))
    return f"{gaps.mean():+.1f} ± {half:.1f} ({(gaps > 1e-9).sum()}:{(gaps < -1e-9).sum()})"


def compared(values: list[float], mae: list[float], method: str) -> list[str]:
    """A measure over seeds, and its difference to MAE's."""
    return [spread(values), difference(values, mae) if method != "MAE" else ""]


def table(methods: list[str], seeds: range, out: Path) -> tuple[list[str], list[dict]]:
    """The results as markdown lines, and as rows for JSON; a method that lacks a seed has no row."""
    headings = " | against MAE | ".join(MEASURES.values())
    lines = [f"| rule | method | epochs | seconds | {headings} | against MAE |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    rows = []
    for rule in ("steps", "time"):
        for method in methods:
            same = "steps" if method == "MLO-MAE" else rule  # its own time is the rule
            cells = [read_cell(out, method, same, seed) for seed in seeds]
            mae = [read_cell(out, "MAE", rule, seed) for seed in seeds]
            if not all(cells) or not all(mae):
                continue
            row = [
                f"equal {rule}",
                method,
                *(f"{np.mean([cell[name] for cell in cells]):.0f}" for name in ("epochs", "seconds")),
            ]
            for measure in MEASURES:
                values = [cell.get(measure) for cell in cells]
                row += compared(values, [cell[measure] for cell in mae], method) if None not in values else ["", ""]
            lines.append(f"| {' | '.join(row)} |")
            rows.append({"rule": rule, "method": method, **{key: [cell.get(key) for cell in cells] for key in cells[0]}})
    return lines, rows


def dense_table(methods: list[str], seeds: range, out: Path) -> tuple[list[str], list[dict]]:
    """`table` for the dense tasks."""
    headings = " | against MAE | ".join(dense.heading for dense in DENSE.values())
    lines = [f"| method | {headings} | against MAE |", "|---|--:|--:|--:|--:|"]
    rows = []
    for method in methods:
        row, found = [method], {}
        for task, dense in DENSE.items():
            cells, mae = ([read_cell(out, name, task, seed) for seed in seeds] for name in (method, "MAE"))
            if all(cells) and all(mae):
                found[task] = [cell[dense.measure] for cell in cells]
                row += compared(found[task], [cell[dense.measure] for cell in mae], method)
        if len(found) == len(DENSE):
            lines.append(f"| {' | '.join(row)} |")
            rows.append({"method": method, **found})
    return lines, rows


def figure(methods: list[str], seeds: range, out: Path, path: Path) -> None:
    """How the masks stood over training: objects hidden and weighted, where the data knows its objects, else p's spread."""
    from matplotlib.figure import Figure

    pretrained = [method for method in methods if METHODS[method]]
    whole = [method for method in pretrained if all(read_cell(out, method, "steps", seed) for seed in seeds)]
    files = {method: [folder_of(out, method, "steps", seed) / "metrics.jsonl" for seed in seeds] for method in whole}
    runs = {method: [read_metrics(file) for file in some] for method, some in files.items()}
    panels = {
        "object patches hidden, ratio to chance": "object_hidden",
        "weight p of object patches, ratio to mean": "object_weight",
    }
    if "object_hidden" not in runs["MAE"][0][-1]:
        panels = {"standard deviation of p": "p_std", "hidden patches that two images have in common": "mask_overlap"}
    drawing = Figure(figsize=(10, 3.5), layout="constrained")
    for axis, (title, name) in zip(drawing.subplots(1, len(panels)), panels.items()):
        for method, curves in runs.items():
            values = np.array([[row[name] for row in rows] for rows in curves])  # [seeds, lines]
            epochs = [row["epoch"] for row in curves[0]]
            (line,) = axis.plot(epochs, values.mean(0), label=method)
            axis.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
        axis.set(title=title, xlabel="epochs of level 1")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(drawing, path)


# ------------------------------------------------------------------------------------------------------- command line

SPREAD_NOTE = """\
Mean ± standard deviation over seeds, on the test split; "against MAE" is the mean paired difference in points with its
95 % confidence interval (Student's t), and in how many seeds the method is better : worse."""
NOTE = 'Epochs and seconds are pretraining\'s; "no pretraining" fine-tunes for as long instead.'
DENSE_NOTE = (
    "All weights learn, with one linear layer on every patch's token; "
    f"segmentation {DENSE['segment'].recipe['epochs']} epochs, detection {DENSE['detect'].recipe['epochs']}."
)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = cli.Parser(prog="mlo_mae.py results", description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=list(DATA), default="shapes")
    parser.add_argument("--data-dir", default="data", help="where cifar100 lies, or is downloaded to")
    rows = f"rows (default: {', '.join(MAIN)})"
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=MAIN, help=rows)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default 3)")
    parser.add_argument("--out", type=Path, help="folder of the grid (default runs/results-<data>)")
    parser.add_argument("--workers", type=int, default=2, help="cells at once (default 2; use 1 on a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a cell on a CPU (default 1)")
    parser.add_argument("--dense", action="store_true", help="on shapes: segmentation and detection, at equal steps alone")
    parser.add_argument("--table", action="store_true", help="only write the table of what is finished")
    parser.add_argument("--save", action="store_true", help="also write the table and figure under benchmarks/")
    options = parser.parse_args(argv)
    if "MAE" not in options.methods or "MLO-MAE" not in options.methods:
        raise UserError("--methods needs MLO-MAE, whose time is the rule, and MAE, which it is compared with")
    if min(options.seeds, options.workers, options.threads) < 1:
        raise UserError("--seeds, --workers and --threads must be at least 1")
    if options.dense and options.data != "shapes":
        raise UserError("--dense needs images whose objects are known; leave out --data")
    return options


def run_command(argv: list[str]) -> dict:
    """Run `results` with these flags; prints the table, and returns what its last line reports."""
    options = parse(argv)
    out, seeds = options.out or Path("runs") / f"results-{options.data}", range(options.seeds)
    if not options.table:
        out.mkdir(parents=True, exist_ok=True)
        rules = ("steps", *DENSE) if options.dense else ("steps", "time")
        grid(options.data, rules, options.methods, seeds, out, options.data_dir, options.workers, options.threads)
    lines, rows = (dense_table if options.dense else table)(options.methods, seeds, out)
    if not rows:
        raise UserError(f"{out} holds no finished rows; run without --table")
    facts = machine(cli.choose_device("auto")) | {"cells at once": options.workers, "seeds": options.seeds}
    facts["threads"] = options.threads
    heading = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    notes = [SPREAD_NOTE, DENSE_NOTE if options.dense else NOTE]
    text = "\n".join([f"`python mlo_mae.py {shlex.join(['results', *argv])}`", "", heading, "", *lines, "", *notes])
    print(text)
    pictures = {}
    if not options.dense:
        figure(options.methods, seeds, out, out / "results.png")
        masks = folder_of(out, "MLO-MAE", "steps", 0) / "masks-over-training.png"
        pictures = {"": out / "results.png", "-masks": masks}
    if options.save:
        name = f"results-{options.data}{'-dense' if options.dense else ''}"
        write_whole(BENCHMARKS / f"{name}.md", (text + "\n").encode())
        for suffix, picture in pictures.items():
            write_whole(BENCHMARKS / f"{name}{suffix}.png", picture.read_bytes())
    return {"verb": "results", "machine": facts, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
