"""Does learning the masks help? A grid of methods x seeds on one data set, as tables, a figure and one line of JSON.

    python mlo_mae.py results                                  # shapes
    python mlo_mae.py results --data clutter                   # the same objects on photographs (clutter makes the file)
    python mlo_mae.py results --data cifar100 --data-dir DIR   # a small ViT on 5,000 images
    python mlo_mae.py results --no-finetune                    # probes alone; without the flag, later, the rest is filled in
    python mlo_mae.py results --transfer                       # T of one run used by another: other seed, width, data
    python mlo_mae.py results --dense                          # segmentation and detection, encoders of equal steps
    python mlo_mae.py results --table                          # from what is finished, without running anything

Two rules, since a mask update costs more than a step of MAE. *Equal steps*: every method makes the same level-1 steps.
*Equal time*: every method gets the seconds that MLO-MAE took in this grid, at the same seed, all that T costs included, and
makes more steps in them. Methods of one seed share their data split, first weights and, under equal steps, the order of
their images, so differences are taken in pairs. Every method has the same labels: all of the training split to probe and
fine-tune with, and the validation split to choose with. A cell of the grid is a run's folder; what is finished is not run
again.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import mlo_mae
from data import Splits
from experiments import baselines, finetune, open_run, show, transfer
from experiments.baselines import UMAE, SemMAE
from experiments.probe import probe
from harness import UserError, cli, counted
from harness.checkpoints import fitting
from harness.files import write_whole
from harness.measure import BENCHMARKS, machine, markdown, positive, show_page
from harness.pictures import panel_of, panels
from harness.processes import after_parent, end_children
from harness.run import difference as what_differs
from harness.run import read_metrics, read_settings
from harness.signals import SIGNALS, handled, ignore
from mlo_mae import MACHINE_FIELDS, Config


class Method(NamedTuple):
    """A row: what it runs as (None: no pretraining), and the settings that make it."""

    kind: type[Config] | None
    changes: dict = {}
    given: str = ""  # whose T it is given: of a run on "this" data set, on the "other" one, or on the one of this name
    rival: str = "MAE"  # what it is compared with
    prepare: Callable | None = None  # as `mlo_mae.train` has it
    encoder: str = ""  # the method whose run it probes, instead of one of its own


WIDE = {"width": 96}
ALIKE = {"lr": 6e-3}  # what suits methods whose patches count alike; learned weights do best at the default
MAE = {"masking": "random"} | ALIKE
METHODS = {
    "MLO-MAE": Method(Config),
    "MLO-MAE, T given": Method(Config, given="this"),
    "MAE": Method(Config, MAE),
    "no pretraining": Method(None),
    "SemMAE": Method(SemMAE, ALIKE, prepare=baselines.prepare),
    "U-MAE": Method(UMAE, {"uniformity": 0.01} | ALIKE, prepare=baselines.prepare),
    "MAE, no restart": Method(Config, MAE | {"mask_restart": False}),
    "MLO-MAE, no restart": Method(Config, {"mask_restart": False}),
    "MLO-MAE, head steps": Method(Config, {"level2": "steps"}),
    "MLO-MAE, CLS": Method(Config, {"pooling": "cls"}),
    "MLO-MAE, T on pixels": Method(Config, {"masking_network": "shared"}),
    "MLO-MAE, drawn by p": Method(Config, {"mask_choice": "odds"}),
    "MLO-MAE, first-order": Method(Config, {"hypergradient": "first-order"}),
    "MLO-MAE, identity": Method(Config, {"update_jacobian": "identity"}),
    "MLO-MAE, T at rest": Method(Config, {"mask_lr": 0.0} | ALIKE),
    # of --transfer alone
    "T of the other data": Method(Config, given="other"),
    "MAE, width 96": Method(Config, MAE | WIDE, rival="MAE, width 96"),
    "T of width 64, width 96": Method(Config, WIDE, "this", "MAE, width 96"),
}
TRANSFERRED = ["MAE", "MLO-MAE", "MLO-MAE, T given", "T of the other data", "MAE, width 96", "T of width 64, width 96"]
ROWS = [name for name in METHODS if name not in TRANSFERRED[3:]]  # that --methods may name
MAIN = ["MLO-MAE", "MLO-MAE, T given", "MAE", "no pretraining"]  # what runs by default
TIMED = ["MAE", "MAE, no restart", "no pretraining", "SemMAE", "U-MAE"]  # what also runs for as long as MLO-MAE
PROBES = {"probe": "probe, mean %", "probe_cls": "probe, CLS %"}  # measures of a cell, and their headings
MEASURES = PROBES | {"finetune": "fine-tuned %"}
OBJECTS = ("object_auc", "object_weight")  # how T sees them, in metrics.jsonl


class Dense(NamedTuple):
    """A dense task of transfer.py, whose name is a rule of the grid too."""

    measure: str  # in its result.json
    heading: str
    recipe: dict


DENSE = {
    "segment": Dense("test_miou", "segmentation, mIoU %", {"epochs": 5}),
    "detect": Dense("test_ap", "detection, AP %", {"epochs": 10}),
}
OLDER = {"lr": 2e-3, "mask_ratio": 0.75}  # where neither was chosen anew
DATA = {  # the configuration, and how to fine-tune; {clutter} is the file
    "shapes": ({}, {"epochs": 3}),
    "clutter": ({"data": "{clutter}"}, {"epochs": 3}),
    "cifar100": ({"data": "cifar100", "images": 5000, "labelled_batch_size": 512, "ridge": 3.0} | OLDER, {"epochs": 6}),
}
OTHER = {"shapes": "clutter", "clutter": "shapes"}  # data sets whose objects are known

# ------------------------------------------------------------------------------------------------------------ cells


class Cell(NamedTuple):
    """One run of the grid, or one training on its encoder."""

    data: str  # of DATA
    method: str  # of METHODS
    rule: str  # "steps", "time", or a task of DENSE
    seed: int


@dataclass(frozen=True)
class Grid:
    """Where the cells are, and what they share."""

    out: Path
    data_dir: str
    clutter: Path
    seeds: int
    threads: int = 1
    tuned: bool = True  # whether to fine-tune
    first: int = 0  # seed
    methods: dict[str, Method] = field(default_factory=lambda: METHODS)
    sets: dict[str, tuple[dict, dict]] = field(default_factory=lambda: DATA)

    @property
    def numbers(self) -> range:
        """The seeds."""
        return range(self.first, self.first + self.seeds)

    def cells(self, data: str, rules: Sequence[str], methods: Sequence[str]) -> list[Cell]:
        """The cells of a data set; without fine-tuning there is nothing to do for one that is not pretrained."""
        return [
            Cell(data, method, rule, seed)
            for rule in rules
            for seed in self.numbers
            for method in methods
            if (rule != "time" or method in TIMED) and (self.tuned or self.methods[method].kind or rule in DENSE)
        ]


def lender_of(cell: Cell, grid: "Grid") -> tuple[str, Cell] | None:
    """The setting that names another cell's run, and that cell, where this cell starts from what another has learned."""
    method = grid.methods[cell.method]
    if method.kind is SemMAE:
        return "parts_from", Cell(cell.data, "MAE", "steps", cell.seed)
    if method.given:  # of another seed, the one before: what T has seen is no part of this run
        data = {"this": cell.data, "other": OTHER.get(cell.data)}.get(method.given, method.given)
        return "masking_from", Cell(data, "MLO-MAE", "steps", grid.first + abs(cell.seed - grid.first - 1))
    return None


def settings(cell: Cell, grid: Grid) -> tuple[Config, finetune.Training]:
    """A cell's configuration, and how its encoder is trained on."""
    config, recipe = grid.sets[cell.data]
    config = {name: str(grid.clutter) if value == "{clutter}" else value for name, value in config.items()}
    method, lender = grid.methods[cell.method], lender_of(cell, grid)
    given = {lender[0]: os.path.abspath(folder_of(grid.out, lender[1]))} if lender else {}
    shared = {"data_dir": grid.data_dir, "seed": cell.seed, "checkpoint_minutes": 0.25}  # a signal leaves little time to save
    cfg = (method.kind or Config)(**shared | method.changes | config | given)
    how = {"seed": cell.seed, "from_scratch": method.kind is None}
    dense = cell.rule in DENSE
    kind, recipe = (transfer.DenseRecipe, DENSE[cell.rule].recipe) if dense else (finetune.Recipe, recipe)
    return cfg, finetune.suited(kind(**how, **recipe), recipe)


def folder_of(out: Path, cell: Cell) -> Path:
    """A cell's folder; that of a dense task is in its encoder's."""
    dense = cell.rule in DENSE
    name = f"{cell.method.replace(',', '').replace(' ', '-')}-{'steps' if dense else cell.rule}-{cell.seed}"
    return out / cell.data / name / (cell.rule if dense else "")


PATHS = ("data", "masking_from", "parts_from")  # settings that name files, which may lie elsewhere by now


def read_cell(grid: Grid, cell: Cell) -> dict | None:
    """A cell's numbers, as far as there are any. Raises UserError where they are damaged, or were made otherwise than this
    grid would make them."""
    folder, dense = folder_of(grid.out, cell), cell.rule in DENSE
    path = folder / ("result.json" if dense else "cell.json")
    if not path.exists():
        return None
    (cfg, recipe), config = settings(cell, grid), folder / "config.json"
    with fitting(path):
        found = json.loads(path.read_text())
        threads = found.get("threads", grid.threads)  # on others, seconds are of another clock: see `clock_of`
        unlike = f"--threads {threads}, not --threads {grid.threads}" if threads != grid.threads else ""
    if config.exists() and dense:
        with fitting(config):
            unlike = what_differs(json.loads(config.read_text())["recipe"], asdict(recipe), MACHINE_FIELDS, flags=True)
    elif config.exists():
        theirs, ours = (
            values | {name: Path(values[name]).name for name in PATHS if values.get(name)}
            for values in (read_settings(config, type(cfg)), asdict(cfg))
        )
        free = (MACHINE_FIELDS - {"data"}) | ({"epochs"} if cell.rule == "time" else set())  # as many as there was time for
        unlike = unlike or what_differs(theirs, ours, free, flags=True)
    method = grid.methods[cell.method]
    if dense and method.kind and not unlike:
        read_cell(grid, cell._replace(rule="steps"))  # raises where its encoder was made otherwise
    elif method.encoder:
        lent = read_cell(grid, cell._replace(method=method.encoder))
        if lent and lent["seconds"] != found["seconds"]:
            unlike = unlike or f"an earlier run of {method.encoder}"
    elif cell.rule == "time" and method.kind:
        ours, own = (read_cell(grid, other) for other in needed(cell, grid))
        if ours and own and (epochs := in_time(cfg, ours, own)) != found["epochs"]:
            unlike = unlike or f"--epochs {found['epochs']}, not {epochs}, for which MLO-MAE's seconds suffice by now"
    if grid.tuned and "finetune_recipe" in found:
        free = {"epochs"} if cell.rule == "time" and not method.kind else set()
        unlike = unlike or what_differs(found["finetune_recipe"], asdict(recipe), free, flags=True)
    if unlike:
        raise UserError(f"{folder} was made with {unlike}; move it away, or give another --out")
    return found


def in_time(cfg: Config, ours: dict, own: dict) -> int:
    """The epochs that a method makes in the seconds of MLO-MAE's cell `ours`, by its pace in its `own` at equal steps."""
    return max(1, round(cfg.epochs * ours["seconds"] / own["seconds"]))


def is_finished(cell: Cell, grid: Grid) -> bool:
    """Whether nothing is left to do for a cell."""
    found = read_cell(grid, cell)
    return found is not None and (cell.rule in DENSE or not grid.tuned or "finetune" in found)


def run_cell(cfg: Config, recipe: finetune.Recipe, cell: Cell, grid: Grid) -> None:
    """Do what is left of one cell and write its cell.json: accuracies on the test split (shares), epochs, seconds; where the
    data knows its objects, also how T saw them in the end.

    Under the rule "time" a method gets the seconds of MLO-MAE's pretraining, and the epochs that fit, by its own pace
    under the rule "steps": so a cell is a run like any other, and follows from its flags."""
    torch.set_num_threads(grid.threads)
    folder, found, pretrained = folder_of(grid.out, cell), read_cell(grid, cell), not recipe.from_scratch
    if cell.rule == "time":
        ours, own = (read_cell(grid, other) for other in needed(cell, grid))
        if pretrained:
            cfg = replace(cfg, epochs=in_time(cfg, ours, own))
        else:  # no pretraining: its seconds go to fine-tuning
            recipe = replace(recipe, epochs=recipe.epochs + round(recipe.epochs * ours["seconds"] / own["finetune_seconds"]))
    method, about = grid.methods[cell.method], {"threads": grid.threads, "machine": machine(cli.choose_device(cfg.device))}
    if method.encoder or not pretrained:  # there is no run that writes its settings
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", json.dumps(asdict(cfg)).encode())
    if pretrained and found is None:
        if method.encoder:
            found = probed_again(cfg, cell._replace(method=method.encoder), method, grid)
        else:
            found = {"epochs": cfg.epochs} | about | pretrain(cfg, folder, grid.threads, method.prepare)
        write_whole(folder / "cell.json", json.dumps(found).encode())
    if grid.tuned:
        if pretrained:
            start = finetune.encoder_and_data(folder, recipe, {"data_dir": cfg.data_dir})
        else:
            found = {"epochs": 0} | about | {"seconds": 0.0}
            start = finetune.encoder_and_data(None, recipe, asdict(cfg))
        clock = clock_of(grid.threads)
        began = clock()
        found |= {"finetune": finetune.finetune(*start, recipe)["test_top1"], "finetune_epochs": recipe.epochs}
        found |= {"finetune_seconds": clock() - began, "finetune_recipe": asdict(recipe)}
        write_whole(folder / "cell.json", json.dumps(found).encode())


def clock_of(threads: int) -> Callable[[], float]:
    """What tells seconds: of this process alone, which other programs change less, where one thread does all the work."""
    return time.process_time if threads == 1 and cli.choose_device("auto").type == "cpu" else time.perf_counter


def probed_again(cfg: Config, lender: Cell, method: Method, grid: Grid) -> dict:
    """What a cell has of another's run whose labels `method` prepares."""
    net, state, splits = open_run(folder_of(grid.out, lender), data_dir=cfg.data_dir)
    method.prepare(replace(net, cfg=cfg), splits, state.theta.params.device, None)
    pretrained = {name: value for name, value in read_cell(grid, lender).items() if not name.startswith("finetune")}
    return pretrained | probed(net, state, splits)


def pretrain(cfg: Config, folder: Path, threads: int, prepared: Callable | None = None) -> dict:
    """Pretrain into a folder, or go on with what is there; returns what a cell has of it. prepared: `Method.prepare`.

    The seconds are those of the loop, T's and SemMAE's parts included. They are kept with each checkpoint, so that those of
    a run that was interrupted add up, but for what it did in vain."""
    clock, kept = clock_of(threads), folder / "seconds.json"

    def prepare(net, splits, device, run):
        if run.checkpoint is not None and not kept.exists():
            raise UserError(f"{folder} holds a run that was not timed; move it away")
        before, began, save = json.loads(kept.read_text()) if run.checkpoint is not None else 0.0, clock(), run.save

        def save_with_seconds(content):
            save(content)
            write_whole(kept, json.dumps(before + clock() - began).encode())

        run.save = save_with_seconds
        if prepared:
            prepared(net, splits, device, run)

    net, state, splits = mlo_mae.train(cfg, folder, resume=True, prepare=prepare)
    show.draw_run(net, state, splits, folder)
    last = read_metrics(folder / "metrics.jsonl")[-1]
    seen = {name: last[name] for name in OBJECTS if name in last}
    return {"seconds": json.loads(kept.read_text())} | probed(net, state, splits) | seen


def probed(net: mlo_mae.Networks, state: mlo_mae.State, splits: Splits) -> dict[str, float]:
    """{name in PROBES: share of right test images} of a state's encoder; with `_val` behind the name, of validation images, by
    which settings may be chosen."""
    found = {name: probe(net, state, splits, pooling=pooling) for name, pooling in zip(PROBES, ("mean", "cls"))}
    by_test, by_val = ({name: each[of] for name, each in found.items()} for of in ("test_accuracy", "val_accuracy"))
    return by_test | {f"{name}_val": share for name, share in by_val.items()}


def run_dense(cfg: Config, recipe: transfer.DenseRecipe, cell: Cell, grid: Grid) -> None:
    """Train a dense task on the encoder of a finished cell, or on fresh weights."""
    torch.set_num_threads(grid.threads)
    folder, task = folder_of(grid.out, cell), transfer.TASKS[cell.rule]
    if recipe.from_scratch:
        own = {setting: getattr(cfg, setting) for setting in transfer.SETTINGS}
        start = transfer.encoder_and_dense_data(task, None, recipe, own)
    else:
        start = transfer.encoder_and_dense_data(task, folder.parent, recipe, {})
    finetune.finetune(*start, recipe, folder, resume=True, task=task)


# -------------------------------------------------------------------------------------------------------------- grid


def needed(cell: Cell, grid: Grid) -> list[Cell]:
    """The cells whose pretraining must be finished before this one."""
    if cell.rule == "time":
        return [cell._replace(method="MLO-MAE", rule="steps"), cell._replace(rule="steps")]
    if cell.rule in DENSE:
        return [cell._replace(rule="steps")] if grid.methods[cell.method].kind else []
    method, lender = grid.methods[cell.method], lender_of(cell, grid)
    return [lender[1]] if lender else [cell._replace(method=method.encoder)] if method.encoder else []


GRACE = 1.5  # seconds


def end_with_parent() -> None:
    """In a process that works on a cell: stop (in a loop: with a checkpoint) where the program that started it was killed;
    SIGTERM does the same, and what a terminal sends is that program's business."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own one is of the system's, and of a process that is killed would be left there

    def stop() -> None:
        while True:  # a first signal asks a run to stop; where there is none, it ends the process
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)

    after_parent(stop)


def cell_process() -> concurrent.futures.ProcessPoolExecutor:
    """A process for one cell at a time, which ends with this one."""
    return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=end_with_parent)


def run_grid(cells: list[Cell], grid: Grid, workers: int) -> None:
    """Run what is not finished, each cell in a process that does nothing else, as soon as what it needs is there.
    Where one fails, or a signal comes, the others stop: in a loop they save first, for which they have GRACE. Raises
    UserError."""
    todo, running, idle = [cell for cell in cells if not is_finished(cell, grid)], {}, []
    try:
        while todo or running:
            for cell in list(todo):
                if len(running) < workers and all(read_cell(grid, before) for before in needed(cell, grid)):
                    work, process = run_dense if cell.rule in DENSE else run_cell, idle.pop() if idle else cell_process()
                    with handled(signal.SIG_IGN):  # which it takes over: Ctrl-C must not meet its imports
                        running[process.submit(work, *settings(cell, grid), cell, grid)] = cell, process
                    todo.remove(cell)
            # a second at a time: on Windows a signal is heard in between
            for future in concurrent.futures.wait(running, 1, concurrent.futures.FIRST_COMPLETED).done:
                cell, process = running.pop(future)
                idle.append(process)  # first, so that it is shut down where its cell fails, too
                try:
                    future.result()
                except concurrent.futures.process.BrokenProcessPool:
                    raise UserError(f"the process of {folder_of(grid.out, cell)} was ended; start again to go on") from None
                print("finished", *cell, file=sys.stderr)
    finally:
        with handled(ignore), concurrent.futures.ThreadPoolExecutor() as waiting:
            for process in (*idle, *(process for _, process in running.values())):
                waiting.submit(process.shutdown)
            end_children(GRACE)


# ------------------------------------------------------------------------------------------------------------- table


def t_quantile(freedom: int) -> float:
    """Student's t quantile of 0.975: t = sqrt(freedom) tan(angle), where the angle's density is proportional to
    cos^(freedom - 1)."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 1_000_001)[1:-1]
    below = np.cumsum(np.cos(angle) ** (freedom - 1))
    return float(np.sqrt(freedom) * np.tan(angle[np.searchsorted(below / below[-1], 0.975)]))


def spread(values: Iterable[float], scale: float = 100, digits: int = 1) -> str:
    """Mean ± standard deviation, of shares in per cent; of one value, that value."""
    values = scale * np.array(values)
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def difference(ours: list[float], theirs: list[float]) -> str:
    """Mean of the paired differences of shares in points, the half-width of its 95 % confidence interval, and in how many
    seeds it is above 0 and below it, which one seed far off does not sway."""
    gaps = 100 * (np.array(ours) - np.array(theirs))
    if len(gaps) < 2:
        return f"{gaps.mean():+.1f}"
    half = t_quantile(len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps))
    return f"{gaps.mean():+.1f} ± {half:.1f} ({(gaps > 1e-9).sum()}:{(gaps < -1e-9).sum()})"


def numbers(grid: Grid, data: str, method: str, rule: str) -> list[dict]:
    """The numbers of a row's cells, of all seeds; none where one is missing."""
    found = [read_cell(grid, Cell(data, method, rule, seed)) for seed in grid.numbers]
    return found if all(found) else []


def compared(cells: list[dict], measures: Iterable[str], *rivals: list[dict]) -> list[str]:
    """Of each measure, the values over seeds and their difference to those of each rival; nothing where one is missing."""
    columns = []
    for measure in measures:
        ours = [cell.get(measure) for cell in cells]
        columns.append("" if None in ours else spread(ours))
        for some in rivals:
            theirs = [cell.get(measure) for cell in some]
            missing = not theirs or None in ours + theirs
            columns.append("" if missing or cells == some else difference(ours, theirs))
    return columns


def seconds_of(method: Method, cells: list[dict]) -> str:
    """The mean; `+ T` where a T was given, whose seconds are not among them."""
    return f"{np.mean([cell['seconds'] for cell in cells]):.0f}{' + T' * bool(method.given)}"


def in_columns(cells: list[dict]) -> dict[str, list]:
    """{name: values over seeds}, for JSON."""
    names = dict.fromkeys(name for cell in cells for name in cell if name != "finetune_recipe")
    return {name: [cell.get(name) for cell in cells] for name in names}


def made_on(rows: list[dict]) -> dict[str, str | None]:
    """The machine that the cells of these rows were made on, which this takes out of the rows; where cells differ, all of
    theirs. Cells of before it was kept in them are taken for this one's."""
    here = machine(cli.choose_device("auto"))
    each = [kept or here for row in rows for kept in row.pop("machine", [None])]
    told = {name: list(dict.fromkeys(some[name] for some in each if some.get(name) is not None)) for name in here}
    return {name: " and ".join(map(str, some)) or None for name, some in told.items()}


def table(data: str, methods: list[str], grid: Grid) -> tuple[list[str], list[dict]]:
    """The results as markdown lines, and as rows for JSON; a method that lacks a seed has no row."""
    shown, rows = [], []
    for rule in ("steps", "time"):
        for method in methods:
            cells = numbers(grid, data, method, "steps" if method == "MLO-MAE" else rule)  # its own time is the rule
            rivals = numbers(grid, data, "MAE", rule)
            if not cells or not rivals:
                continue
            epochs = f"{np.mean([cell['epochs'] for cell in cells]):.0f}"
            shown.append(
                [f"equal {rule}", method, epochs, seconds_of(grid.methods[method], cells), *compared(cells, MEASURES, rivals)]
            )
            rows.append({"rule": rule, "method": method, **in_columns(cells)})
    against = [title for heading in MEASURES.values() for title in (heading, "against MAE")]
    lines = markdown(["rule", "method", "epochs", "seconds", *against], shown, left=2)
    seen = [
        [method, *columns]
        for method in methods
        if (columns := sight(numbers(grid, data, method, "steps"), grid.methods[method]))
    ]
    return lines + (["", *markdown(["method", *OBJECTS], seen)] if seen else []), rows


def learns(method: Method) -> bool:
    """Whether a T weighs patches."""
    return method.kind not in (None, UMAE, SemMAE) and method.changes.get("masking") != "random"


def sight(cells: list[dict], method: Method) -> list[str]:
    """How T saw the objects in the end, where there is a T and the data knows its objects."""
    if not cells or not learns(method) or any(name not in cell for cell in cells for name in OBJECTS):
        return []
    return [spread([cell[name] for cell in cells], scale=1, digits=2) for name in OBJECTS]


def transfer_table(grid: Grid) -> tuple[list[str], list[dict]]:
    """`table` for a T that another run has learned."""
    lines, rows = rows_by_data(grid, [(data, method) for data in OTHER for method in TRANSFERRED])
    titles = ["data", "method", "seconds", *(title for heading in PROBES.values() for title in (heading, "against MAE"))]
    return markdown(titles, lines, left=2), rows


def rows_by_data(
    grid: Grid, pairs: Iterable[tuple[str, str]], sees: bool = False, also: str = ""
) -> tuple[list[list[str]], list[dict]]:
    """A row of a table for each (data set, method) whose seeds are all there, and the same for JSON: probes beside those of
    the method's rival, those of the method `also` and, where `sees`, how T saw the objects."""
    lines, rows = [], []
    for data, name in pairs:
        method = grid.methods[name]
        cells, rivals = (numbers(grid, data, some, "steps") for some in (name, method.rival))
        if cells and rivals:
            name = name.replace("the other data", OTHER.get(data, ""))
            seen = (sight(cells, method) or [""] * len(OBJECTS)) if sees else []
            seconds = seconds_of(grid.methods.get(method.encoder, method), cells)
            others = [rivals, numbers(grid, data, also, "steps")] if also else [rivals]
            lines.append([data, name, seconds, *compared(cells, PROBES, *others), *seen])
            rows.append({"data": data, "method": name, **in_columns(cells)})
    return lines, rows


def dense_table(data: str, methods: list[str], grid: Grid) -> tuple[list[str], list[dict]]:
    """`table` for the dense tasks."""
    shown, rows = [], []
    for method in methods:
        row, found = [method], {}
        for task, dense in DENSE.items():
            cells, rivals = (numbers(grid, data, name, task) for name in (method, "MAE"))
            if cells and rivals:
                found[task] = [cell[dense.measure] for cell in cells]
                row += compared(cells, [dense.measure], rivals)
        if len(found) == len(DENSE):
            shown.append(row)
            kept = [cell.get("machine") for cell in numbers(grid, data, method, "steps")]  # of the encoders
            rows.append({"method": method, **found} | ({"machine": kept} if kept else {}))
    titles = [title for dense in DENSE.values() for title in (dense.heading, "against MAE")]
    return markdown(["method", *titles], shown), rows


def figure(data: str, methods: list[str], grid: Grid, path: Path) -> bool:
    """Draw how T stood over training: how it saw objects, where the data knows them, else p's spread. False where no row
    with a T is whole."""
    runs = {}
    for method in (name for name in methods if learns(grid.methods[name])):
        if numbers(grid, data, method, "steps"):
            folders = [folder_of(grid.out, Cell(data, method, "steps", seed)) for seed in grid.numbers]
            runs[method] = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    names, text = OBJECTS, " Above the dotted lines (chance), T weighs objects more than the rest."
    if not any(name in row for curves in runs.values() for rows in curves for row in rows for name in names):
        names, text = ("p_std", "mask_overlap"), " Where p does not spread, T weighs all patches alike."
    shown = []
    for name in names:
        lines = {}
        for method, curves in runs.items():
            kept = [rows for rows in zip(*curves) if all(name in row for row in rows)]  # a line may lack it
            if kept:
                values = np.array([[row[name] for row in rows] for rows in kept])  # [lines, seeds]
                lines[method] = [rows[0]["epoch"] for rows in kept], values.mean(1), values.min(1), values.max(1)
        if lines:
            shown.append(panel_of(name, lines))
    if not shown:
        return False
    seeds = counted(len(grid.numbers), "seed")
    panels(path, shown, f"Line: mean of {seeds}. Band: from the lowest seed to the highest.{text}")
    return True


# ------------------------------------------------------------------------------------------------------- command line

SPREAD_NOTE = """\
Mean ± standard deviation over seeds, on the test split (how T sees objects: on 256 validation images); "against MAE" is the
mean paired difference in points with its 95 % confidence interval (Student's t), and in how many seeds the method is better :
worse."""
RATES_NOTE = (
    f"Learning rates: {ALIKE['lr']:g} where all patches count alike (chosen for MAE; SemMAE and U-MAE take it as it is), "
    f"{Config.lr:g} where T weighs them. Mask ratio {Config.mask_ratio:g}, unless a row says otherwise. On CIFAR-100 "
    f"{OLDER['lr']:g} for all, and {OLDER['mask_ratio']:g}."
)
NOTE = 'Epochs and seconds are pretraining\'s; "no pretraining" fine-tunes for as long instead.'
CLOCKS = {
    time.process_time: "Seconds: the loop's, with all that T costs, as CPU time of a process with one thread (longer where "
    "other programs run beside).",
    time.perf_counter: "Seconds: the loop's, with all that T costs, by the clock on the wall.",
}
GIVEN_NOTE = (
    "+ T: and what the T cost that was given: it is that of MLO-MAE with the seed before (of the first: with the second), as "
    "it was in the end, and weighs from the first step on."
)
SEMMAE_NOTE = (
    "SemMAE's seconds hold its part learning, and not the MAE whose encoder the parts are learned on; in equal time its "
    "epochs are counted as if part learning took longer with them."
)
TRANSFER_NOTE = "T is another seed's throughout. Rows of width 96 are against MAE of width 96."
DENSE_NOTE = (
    "All weights learn, with one linear layer on every patch's token; "
    f"segmentation {DENSE['segment'].recipe['epochs']} epochs, detection {DENSE['detect'].recipe['epochs']}."
)


def add_grid_flags(parser: argparse.ArgumentParser, seeds: int, table: str) -> None:
    """The flags of every command on the grid; seeds: how many by default; table: what --table does."""
    parser.add_argument("--data-dir", default="data", help="where cifar100 lies, or is downloaded to")
    parser.add_argument("--seeds", type=positive, default=seeds, help="how many (default %(default)s)")
    parser.add_argument("--first-seed", type=int, default=40, help="(default 40: those below have served to choose settings)")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder of the grids (default %(default)s)")
    parser.add_argument("--workers", type=positive, default=2, help="cells at once (default 2; use 1 on a GPU)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of a cell on a CPU (default 1)")
    parser.add_argument("--table", action="store_true", help=table)
    parser.add_argument("--save", action="store_true", help="also write the table and figure under benchmarks/")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = cli.Parser(prog="mlo_mae.py results", description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=list(DATA), help="default shapes")
    parser.add_argument("--clutter", type=Path, default=Path("runs/clutter.npz"), help="clutter's file (default %(default)s)")
    rows = f"rows (default: {', '.join(MAIN)})"
    parser.add_argument("--methods", nargs="+", choices=ROWS, help=rows)
    add_grid_flags(parser, 5, "only write the table of what is finished")
    tuned = "leave fine-tuning out; a later call without this flag fills it in"
    parser.add_argument("--no-finetune", dest="tuned", action="store_false", help=tuned)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dense", action="store_true", help="segmentation and detection, at equal steps alone")
    what.add_argument("--transfer", action="store_true", help="T of one run used by another, on shapes and on clutter")
    options = parser.parse_args(argv)
    if options.transfer and (options.data or options.methods):
        raise UserError("--transfer has its own rows, on shapes and on clutter; leave out --data and --methods")
    options.data = options.data or "shapes"
    options.methods = list(dict.fromkeys(options.methods or (TRANSFERRED if options.transfer else MAIN)))
    if "MAE" not in options.methods or "MLO-MAE" not in options.methods:
        raise UserError("--methods needs MLO-MAE, whose time is the rule, and MAE, which it is compared with")
    if options.first_seed < 0:
        raise UserError(f"--first-seed {options.first_seed} must be at least 0")
    if options.seeds < 2 and any(METHODS[method].given for method in options.methods):
        raise UserError("a T is given to another seed: --seeds must be at least 2, or name other --methods")
    if options.dense and options.data not in OTHER:
        raise UserError("--dense needs images whose objects are known; leave out --data")
    if "clutter" in (options.data, *(OTHER if options.transfer else ())) and not (options.table or options.clutter.is_file()):
        made = f"python mlo_mae.py clutter {options.clutter} --data-dir DIR"
        raise UserError(f"{options.clutter} does not exist; make it with {made}, or name another with --clutter")
    return options


def run_command(argv: list[str]) -> dict:
    """Run `results` with these flags; prints the table, and returns what its last line reports."""
    options = parse(argv)
    out, data, methods = options.out, options.data, options.methods
    tuned = options.tuned and not options.transfer
    grid = Grid(out, options.data_dir, options.clutter, options.seeds, options.threads, tuned, options.first_seed)
    if not options.table:
        out.mkdir(parents=True, exist_ok=True)
        rules = ("steps",) if options.transfer else ("steps", *DENSE) if options.dense else ("steps", "time")
        cells = [cell for name in (OTHER if options.transfer else [data]) for cell in grid.cells(name, rules, methods)]
        run_grid(cells, grid, options.workers)
    notes = [SPREAD_NOTE, RATES_NOTE]
    if options.transfer:
        (lines, rows), name = transfer_table(grid), "transfer"
        notes += [CLOCKS[clock_of(grid.threads)], GIVEN_NOTE, TRANSFER_NOTE]
    elif options.dense:
        (lines, rows), name = dense_table(data, methods, grid), f"{data}-dense"
        notes.append(DENSE_NOTE)
    else:
        (lines, rows), name = table(data, methods, grid), data
        notes += [NOTE, CLOCKS[clock_of(grid.threads)]]
        notes += [GIVEN_NOTE] * any(METHODS[method].given for method in methods) + [SEMMAE_NOTE] * ("SemMAE" in methods)
    if not rows:
        raise UserError(f"{out} holds no finished rows; run without --table")
    facts = made_on(rows) | {"threads": options.threads, "cells at once": options.workers, "seeds": options.seeds}
    save, pictures = f"results-{name}" if options.save else "", {}
    if name == data and figure(data, methods, grid, out / data / "results.png"):
        masks = folder_of(out, Cell(data, "MLO-MAE", "steps", grid.first)) / "masks-over-training.png"
        pictures = {"": out / data / "results.png", "-masks": masks}
    show_page(["results", *argv], facts, lines, notes, save)
    for suffix, picture in pictures.items() if save else ():
        write_whole(BENCHMARKS / f"{save}{suffix}.png", picture.read_bytes())
    return {"command": "results", "machine": facts, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
