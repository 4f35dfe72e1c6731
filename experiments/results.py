"""Does learning the masks help? A grid of methods x seeds on one data set, as a table, a figure and one line of JSON.

    python results.py                                      # shapes: a quarter of an hour on 2 CPU cores
    python results.py --data cifar100 --data-dir DIR       # a small ViT on 5,000 images
    python results.py --dense                              # shapes: segmentation and detection, by encoders of equal steps
    python results.py --table                              # from what is finished, without running anything

Two rules, since a mask update costs more than a step of MAE. *Equal steps*: every method makes the same level-1 steps.
*Equal time*: every method gets the seconds that MLO-MAE took in this grid, at the same seed, and makes more steps in them.
Methods of one seed share their data split, first weights and, under equal steps, the order of their images, so differences
are taken in pairs. Every method has the same labels: all of the training split to probe and fine-tune with, and the
validation split to choose with. A cell of the grid is a run's folder; a finished cell is not run again.
"""

import concurrent.futures
import json
import math
import multiprocessing
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import bench
import finetune
import mlo_mae
import transfer
from mlo_mae import RunError, write_whole

# What each method changes in the configuration. `{mae}` is the folder of this seed's MAE under equal steps.
METHODS = {
    "MLO-MAE": dict(masking="learned"),
    "MAE": dict(masking="random"),
    "SemMAE": dict(masking="semantic", parts_from="{mae}"),
    "no pretraining": None,
    "U-MAE": dict(masking="random", uniformity=0.01),
    "MLO-MAE, weights alone": dict(masking="learned", mask_noise=100.0),  # masks all but random, weighted by p
    "MLO-MAE, first-order": dict(masking="learned", hypergradient="first-order"),
    "MLO-MAE, identity": dict(masking="learned", update_jacobian="identity"),
    "MLO-MAE, slow T": dict(masking="learned", mask_lr=0.1),
}
MAIN = ["MLO-MAE", "MAE", "SemMAE", "no pretraining"]  # what runs by default
TIMED = ["MAE", "no pretraining"]  # what also runs for as long as MLO-MAE
MEASURES = {"probe": "linear probe %", "finetune": "fine-tuned %"}  # of a cell
DENSE = {"segment": ("test_miou", "segmentation, mIoU %", dict(epochs=5)),  # of a dense task: what, its heading, the recipe
         "detect": ("test_ap", "detection, AP %", dict(epochs=10))}  # fmt: skip
DATA = {  # the configuration, and how to fine-tune
    "shapes": (dict(epochs=8), dict(epochs=3)),
    "cifar100": (dict(data="cifar100", images=5000, epochs=12), dict(epochs=6)),
}


def settings(name, method, seed, out, data_dir):
    """A cell's Config, and its fine-tuning Recipe."""
    config, recipe = DATA[name]
    changes = {key: str(value).format(mae=out / f"MAE-steps-{seed}") if key == "parts_from" else value
               for key, value in (METHODS[method] or {}).items()}  # fmt: skip
    cfg = mlo_mae.Config(**config | dict(data_dir=data_dir, seed=seed))
    return replace(cfg, **changes), finetune.Recipe(seed=seed, from_scratch=METHODS[method] is None, **recipe)


def folder_of(out, method, rule, seed):
    return out / f"{method.replace(',', '').replace(' ', '-')}-{rule}-{seed}"


def read_cell(out, method, rule, seed):
    """A finished cell's numbers, or None. A dense task is a cell too, in the folder of its encoder."""
    dense = folder_of(out, method, "steps", seed) / rule / "result.json"
    path = dense if rule in DENSE else folder_of(out, method, rule, seed) / "cell.json"
    return json.loads(path.read_text()) if path.exists() else None


def run_cell(cfg, recipe, method, rule, seed, out, threads):
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
        summary = mlo_mae.pretrain(cfg, folder, resume=True)
        cell |= {"seconds": pretraining_seconds(folder, cfg), "probe": summary["probe"]["test_accuracy"]}
        start = finetune.starting_point(folder, recipe, {"data_dir": cfg.data_dir})
    else:
        start = finetune.starting_point(None, recipe, asdict(cfg))
        folder.mkdir(parents=True, exist_ok=True)
    tuned = finetune.finetune(*start, recipe)
    cell |= {"finetune": tuned["test_top1"], "finetune_epochs": recipe.epochs, "finetune_seconds": tuned["seconds"]}
    write_whole(folder / "cell.json", json.dumps(cell).encode())


def run_dense(cfg, recipe, method, task, seed, out, threads):
    """Train a dense task on the encoder of a finished cell, or on fresh weights."""
    torch.set_num_threads(threads)
    folder, (wanted, labels) = folder_of(out, method, "steps", seed), transfer.TASKS[task]
    settings = {name: getattr(cfg, name) for name in transfer.SETTING_NAMES} if recipe.from_scratch else {}
    start = transfer.starting_point(labels, None if recipe.from_scratch else folder, recipe, settings)
    finetune.finetune(*start, recipe, folder / task, resume=True, task=wanted)


def pretraining_seconds(folder, cfg):
    """Seconds of the loop itself, without evaluation and pictures; also of a run that was interrupted."""
    seconds, before = 0.0, 0
    for row in mlo_mae.read_metrics(folder / "metrics.jsonl"):
        seconds += (row["iteration"] - before) * cfg.level1_steps * cfg.batch_size / row["images_per_second"]
        before = row["iteration"]
    return seconds


def needed(method, rule):
    """The cells of the same seed that must be finished before this one."""
    if rule == "time":
        return [("MLO-MAE", "steps"), (method, "steps")]
    if rule in DENSE:
        return [(method, "steps")]
    return [("MAE", "steps")] if method == "SemMAE" else []


def grid(name, rules, methods, seeds, out, data_dir, workers, threads):
    """Run what is not finished, each cell as soon as what it needs is."""

    def finished(method, rule, seed):
        return read_cell(out, method, rule, seed) is not None

    cells = [(method, rule, seed) for rule in rules for seed in seeds for method in methods
             if rule != "time" or method in TIMED]  # fmt: skip
    todo, running = [cell for cell in cells if not finished(*cell)], {}
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        while todo or running:
            for method, rule, seed in list(todo):
                if all(finished(*cell, seed) for cell in needed(method, rule)):
                    (cfg, recipe), run = settings(name, method, seed, out, data_dir), run_cell
                    if rule in DENSE:
                        recipe, run = transfer.Recipe(seed=seed, from_scratch=METHODS[method] is None, **DENSE[rule][2]), run_dense
                    running[pool.submit(run, cfg, recipe, method, rule, seed, out, threads)] = (method, rule, seed)
                    todo.remove((method, rule, seed))
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                future.result()
                print("finished", *running.pop(future), file=sys.stderr)


# --------------------------------------------------------------------------------------------------- table and figure


def t_quantile(freedom, share=0.975):
    """Student's t quantile: t = sqrt(freedom) tan(angle), where the angle's density is proportional to cos^(freedom - 1)."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 1_000_001)[1:-1]
    below = np.cumsum(np.cos(angle) ** (freedom - 1))
    return float(np.sqrt(freedom) * np.tan(angle[np.searchsorted(below / below[-1], share)]))


def spread(values):
    """"mean +- standard deviation", in per cent."""
    values = 100 * np.array(values)
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def difference(ours, theirs):
    """Mean of the paired differences in points, the half-width of its 95 % confidence interval, and in how many seeds it is
    above 0 and below it, which one seed far off does not sway."""
    gaps = 100 * (np.array(ours) - np.array(theirs))
    if len(gaps) < 2:
        return f"{gaps.mean():+.1f}"
    half = t_quantile(len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps))
    return f"{gaps.mean():+.1f} ± {half:.1f} ({(gaps > 1e-9).sum()}:{(gaps < -1e-9).sum()})"


def table(methods, seeds, out):
    """The results as markdown lines, and as rows for JSON."""
    lines = ["| rule | method | epochs | seconds | " + " | against MAE | ".join(MEASURES.values()) + " | against MAE |",
             "|---|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    rows = []
    for rule in ("steps", "time"):
        for method in methods:
            same = "steps" if method == "MLO-MAE" else rule  # its own time is the rule
            cells = [read_cell(out, method, same, seed) for seed in seeds]
            mae = [read_cell(out, "MAE", rule, seed) for seed in seeds]
            if not all(cells) or not all(mae):
                continue
            row = [f"equal {rule}", method, f"{np.mean([cell['epochs'] for cell in cells]):.0f}",
                   f"{np.mean([cell['seconds'] for cell in cells]):.0f}"]  # fmt: skip
            for measure in MEASURES:
                values = [cell.get(measure) for cell in cells]
                row += compared(values, [cell[measure] for cell in mae], method) if None not in values else ["", ""]
            lines.append("| " + " | ".join(row) + " |")
            rows.append({"rule": rule, "method": method, **{key: [cell.get(key) for cell in cells] for key in cells[0]}})
    return lines, rows


def compared(values, mae, method):
    """A measure over seeds, and its difference to MAE's."""
    return [spread(values), difference(values, mae) if method != "MAE" else ""]


def dense_table(methods, seeds, out):
    """`table` for the dense tasks."""
    lines = ["| method | " + " | against MAE | ".join(heading for _, heading, _ in DENSE.values()) + " | against MAE |",
             "|---|--:|--:|--:|--:|"]  # fmt: skip
    rows = []
    for method in methods:
        row, found = [method], {}
        for task, (measure, _, _) in DENSE.items():
            cells, mae = ([read_cell(out, name, task, seed) for seed in seeds] for name in (method, "MAE"))
            if all(cells) and all(mae):
                found[task] = [cell[measure] for cell in cells]
                row += compared(found[task], [cell[measure] for cell in mae], method)
        if len(found) == len(DENSE):
            lines.append("| " + " | ".join(row) + " |")
            rows.append({"method": method, **found})
    return lines, rows


def figure(methods, seeds, out, path):
    """How the masks stood over training: objects hidden and weighted, where the data knows its objects, else p's spread."""
    from matplotlib.figure import Figure

    runs = {method: [mlo_mae.read_metrics(folder_of(out, method, "steps", seed) / "metrics.jsonl") for seed in seeds]
            for method in methods if METHODS[method] is not None
            and all(read_cell(out, method, "steps", seed) for seed in seeds)}  # fmt: skip
    panels = [("object patches hidden, ratio to chance", "object_hidden"),
              ("weight p of object patches, ratio to mean", "object_weight")]  # fmt: skip
    if "object_hidden" not in runs["MAE"][0][-1]:
        panels = [("standard deviation of p", "p_std"), ("hidden patches that two images have in common", "mask_overlap")]
    drawing = Figure(figsize=(10, 3.5), layout="constrained")
    for axis, (title, name) in zip(drawing.subplots(1, len(panels)), panels):
        for method, curves in runs.items():
            values = np.array([[row[name] for row in rows] for rows in curves])  # [seeds, lines]
            epochs = [row["epoch"] for row in curves[0]]
            (line,) = axis.plot(epochs, values.mean(0), label=method)
            axis.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
        axis.set(title=title, xlabel="epochs of level 1")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    mlo_mae.save_figure(drawing, path)


# ------------------------------------------------------------------------------------------------------- command line


def parse(argv):
    parser = mlo_mae.Parser(prog="results.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=list(DATA), default="shapes")
    parser.add_argument("--data-dir", default="data", help="where cifar100 lies, or is downloaded to")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=MAIN,
                        help=f"rows (default: {', '.join(MAIN)})")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default 3)")
    parser.add_argument("--out", type=Path, help="folder of the grid (default runs/results-<data>)")
    parser.add_argument("--workers", type=int, default=2, help="cells at once (default 2; use 1 on a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a cell on a CPU (default 1)")
    parser.add_argument("--dense", action="store_true", help="on shapes: segmentation and detection, at equal steps alone")
    parser.add_argument("--table", action="store_true", help="only write the table of what is finished")
    parser.add_argument("--save", action="store_true", help="also write the table and figure under benchmarks/")
    return parser.parse_args(argv)


NOTE = "Epochs and seconds are pretraining's; \"no pretraining\" fine-tunes for as long instead."
DENSE_NOTE = "All weights learn, with one linear layer on every patch's token; segmentation {segment} epochs, detection {detect}.".format(
    **{task: recipe["epochs"] for task, (_, _, recipe) in DENSE.items()})  # fmt: skip


def run(options):
    if "MAE" not in options.methods or "MLO-MAE" not in options.methods:
        raise RunError("--methods needs MLO-MAE, whose time is the rule, and MAE, which it is compared with")
    if min(options.seeds, options.workers, options.threads) < 1:
        raise RunError("--seeds, --workers and --threads must be at least 1")
    if options.dense and options.data != "shapes":
        raise RunError("--dense needs images whose objects are known; leave out --data")
    out, seeds = options.out or Path("runs") / f"results-{options.data}", range(options.seeds)
    if not options.table:
        out.mkdir(parents=True, exist_ok=True)
        rules = ("steps", *DENSE) if options.dense else ("steps", "time")
        grid(options.data, rules, options.methods, seeds, out, options.data_dir, options.workers, options.threads)
    lines, rows = (dense_table if options.dense else table)(options.methods, seeds, out)
    if not rows:
        raise RunError(f"{out} holds no finished rows; run without --table")
    facts = bench.machine(mlo_mae.choose_device("auto")) | {"cells at once": options.workers, "seeds": options.seeds}
    facts["threads"] = options.threads
    header = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    text = "\n".join([f"`python {shlex.join(['results.py', *sys.argv[1:]])}`", "", header, "", *lines, "",
                      "Mean ± standard deviation over seeds, on the test split; \"against MAE\" is the mean paired difference in points with its",
                      "95 % confidence interval (Student's t), and in how many seeds the method is better : worse.",
                      DENSE_NOTE if options.dense else NOTE])  # fmt: skip
    print(text)
    pictures = {}
    if not options.dense:
        figure(options.methods, seeds, out, out / "results.png")
        pictures = {"": out / "results.png", "-masks": folder_of(out, "MLO-MAE", "steps", 0) / "masks-over-training.png"}
    if options.save:
        folder, name = Path(__file__).parent / "benchmarks", f"results-{options.data}{'-dense' * options.dense}"
        write_whole(folder / f"{name}.md", (text + "\n").encode())
        for suffix, picture in pictures.items():
            write_whole(folder / f"{name}{suffix}.png", picture.read_bytes())
    return {"verb": "results", "machine": facts, "rows": rows}


if __name__ == "__main__":
    sys.exit(mlo_mae.reported("results", lambda: run(parse(sys.argv[1:]))))
