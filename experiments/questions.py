"""The questions that the paper leaves open, each one command: a table with seeds, and a picture where looking says more.

    python mlo_mae.py questions labels       # few labels, wrong labels: does T still find the objects?
    python mlo_mae.py questions ratio        # how much is hidden
    python mlo_mae.py questions length       # runs of half and twice the length: what a second is worth
    python mlo_mae.py questions choices      # the defaults, each one alone changed
    python mlo_mae.py questions unrolling    # how much of levels 1 and 2 the derivative sees
    python mlo_mae.py questions places       # T beside weights by nearness to the middle, where that tells and where not
    python mlo_mae.py questions transfer     # T of one data set, used on another
    python mlo_mae.py questions medical      # lesions in tissue (tissue makes the images)
    python mlo_mae.py questions cost         # all methods in equal time; where the time of a run goes
    python mlo_mae.py questions learned      # what T looks at: between seeds, beside attention, and what it was told

docs/questions.md has the answers. The grid, its rules and its columns are those of results.py, and so is the folder: a cell
that one command has finished, no other runs again.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import bench
from data import Splits, choose
from experiments import clutter, encode, level1_alone, open_run, tissue
from experiments.results import (
    CLOCKS,
    DATA,
    GIVEN_NOTE,
    MAE,
    METHODS,
    OBJECTS,
    PROBES,
    RATES_NOTE,
    SEMMAE_NOTE,
    SPREAD_NOTE,
    TIMED,
    Cell,
    Grid,
    Method,
    add_grid_flags,
    clock_of,
    folder_of,
    made_on,
    needed,
    numbers,
    rows_by_data,
    run_grid,
    settings,
    spread,
    table,
)
from harness import UserError, cli, counted
from harness.cli import flag
from harness.files import write_whole
from harness.measure import BENCHMARKS, interleaved, markdown, operations, peak_memory, quartiles, show_page
from harness.pictures import PIXELS, Panel, as_images, panels
from harness.pictures import grid as grid_picture
from harness.probe import HALF, area_under_roc, share_covered
from harness.randomness import LABELS, numpy_generator, torch_generator
from kernels import gather_patches, select_patches
from mlo_mae import (
    SHOWN,
    Config,
    Networks,
    Rates,
    State,
    Step,
    adamw_pullback,
    coverage,
    directional_errors,
    labelled_of,
    level1_step,
    load_data,
    mask_updates,
    masking_probability,
    moved_weights,
    params_only,
    patch_errors,
    upper_levels,
    window,
)

# ------------------------------------------------------------------------------------------------------------ labels


@dataclass(frozen=True)
class FewLabels(Config):
    """A run whose levels 2 and 3, and whose probes, know few labels, or wrong ones. Level 1 has all images. What reads the run
    later (`probe RUN`, ...) reads the data with all labels."""

    label_fraction: float = flag(1.0, "share of the labels that are known, the same of each class", above=0, most=1)
    label_noise: float = flag(0.0, "share of these that are another class's, drawn at random", least=0, below=1)
    noisy: Literal["both", "train", "val"] = flag("both", "whose labels these are: of level 2, of level 3, or of both")


def hide_labels(net: Any, splits: Splits, device: torch.device, run: Any) -> None:
    """Leave the splits the labels that the configuration leaves them; as `mlo_mae.train` calls it. At least one a class."""
    cfg, classes, known = net.cfg, len(splits.class_names), []
    for number, (name, split) in enumerate((("train", splits.train), ("val", splits.val))):
        labels = split.labels.cpu().numpy()
        kept = choose(labels, max(classes, round(cfg.label_fraction * len(labels))), cfg.seed, name)
        labels = labels[kept]
        if cfg.noisy in ("both", name):
            rng = numpy_generator(cfg.seed, LABELS, number)
            wrong = rng.permutation(len(labels))[: round(cfg.label_noise * len(labels))]
            labels[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
        known.append(split.part(kept, labels))
    splits.known = tuple(known)


# -------------------------------------------------------------------------------------------------- weights without T


def nearness(side: int) -> Tensor:
    """[side, side]: minus the square of each patch's distance to the middle of the image, in patches."""
    place = torch.arange(side) - (side - 1) / 2
    return -(place.square()[:, None] + place.square())


def weigh_the_middle(net: Networks, splits: Splits, device: torch.device, run: Any, deviation: float = 1.0) -> None:
    """Patches near the middle of an image count more, from the first step on, and nothing is learned: logits of T's mean and
    this deviation, moved with the crops. As `mlo_mae.train` calls it."""
    near = nearness(math.isqrt(net.patches)).to(device)
    weights = (deviation * (near - near.mean()) / near.std() - 2).sigmoid()
    net.maps = lambda images: images.accompanied(weights.expand(len(images), -1, -1))


# --------------------------------------------------------------------------------------------------------- questions


def beside(name: str, changes: dict, *given: str) -> dict[str, Method]:
    """MLO-MAE with these changes, T's of these data sets, and the MAE they are compared with, at its own learning rate."""
    rival = f"MAE, {name}"
    return {
        f"MLO-MAE, {name}": Method(Config, changes, rival=rival),
        **{f"T of {other}, {name}": Method(Config, changes, other, rival) for other in given},
        rival: Method(Config, changes | MAE, rival=rival),
    }


def knowing(name: str, changes: dict) -> dict[str, Method]:
    """MLO-MAE, MAE, and a T that clutter-1 taught, where labels are known so. The last two pretrain without labels: their runs
    are those of all labels."""
    rival, other = f"MAE, {name}", "T of clutter-1"
    known = {"rival": rival, "prepare": hide_labels}
    return {
        f"MLO-MAE, {name}": Method(FewLabels, changes, **known),
        f"{other}, {name}": Method(FewLabels, changes, **known, encoder=other),
        rival: Method(FewLabels, changes | MAE, **known, encoder="MAE"),
    }


RATIOS = (0.4, 0.5, 0.6, 0.75, 0.9)
LENGTHS = (12, 24, 48)  # epochs
IN_TIME = 61  # MAE's in the seconds of MLO-MAE's longest
AS_LONG = f"MAE, {IN_TIME} epochs"
FRACTIONS = {0.1: "a tenth of the labels", 0.01: "a hundredth of the labels"}
NOISE = 0.4
WRONG = {"both": "labels wrong", "train": "labels of level 2 wrong", "val": "labels of level 3 wrong"}
BY_RATIO = {ratio: beside(f"mask ratio {ratio}", {"mask_ratio": ratio}) for ratio in RATIOS if ratio != Config.mask_ratio}
BY_LENGTH = {n: beside(f"{n} epochs", {"epochs": n}, "shapes") for n in LENGTHS if n != Config.epochs}
BY_FRACTION = {share: knowing(words, {"label_fraction": share}) for share, words in FRACTIONS.items()}
BY_NOISE = {noisy: knowing(f"two in five {words}", {"label_noise": NOISE, "noisy": noisy}) for noisy, words in WRONG.items()}
SEEN = {
    "MLO-MAE, 1 batch": Method(Config, {"mask_batches": 1}),
    "MLO-MAE, unrolled": Method(Config, {"mask_batches": 1, "unroll": "full"}),
    "MLO-MAE, 4 steps": Method(Config, {"level1_steps": 4, "log_every": 40}),  # lines of metrics ask T too: as far apart
    "MLO-MAE, 64 steps": Method(Config, {"level1_steps": 64, "log_every": 3}),
}
CHOICES = [f"MLO-MAE, {name}" for name in ("head steps", "CLS", "T on pixels", "drawn by p", "identity")]
MIDDLE = {
    "weights by nearness": Method(Config, {"masking": "random"}, prepare=weigh_the_middle),
    "weights by nearness, steeper": Method(Config, {"masking": "random"}, prepare=partial(weigh_the_middle, deviation=2.0)),
}
TOGETHER = {"MLO-MAE, these five": Method(Config, {k: v for name in CHOICES for k, v in METHODS[name].changes.items()})}
LENDERS = ("shapes", "clutter-1", "shapes-stripes", "cifar100", "cifar100-coarse")
GIVEN = {f"T of {name}": Method(Config, given=name) for name in LENDERS}
ALL = METHODS | {AS_LONG: Method(Config, MAE | {"epochs": IN_TIME}, rival=AS_LONG)} | SEEN | MIDDLE | TOGETHER | GIVEN
for some in (*BY_RATIO.values(), *BY_LENGTH.values(), *BY_FRACTION.values(), *BY_NOISE.values()):
    ALL |= some
SETS = DATA | {
    "shapes-anywhere": ({"data": "shapes-anywhere"}, {}),
    "shapes-stripes": ({"data": "shapes-stripes"}, {}),
    "cifar100-coarse": (DATA["cifar100"][0] | {"data": "cifar100-coarse"}, {}),
}
WHOLE = ["MLO-MAE", "T of clutter-1", "MAE"]
LONG_AND_SHORT = {n: list(BY_LENGTH.get(n, ["MLO-MAE", "T of shapes", "MAE"])) for n in LENGTHS} | {IN_TIME: [AS_LONG]}
SECONDS = "seconds of a run"  # as the x axis of a figure: those that cells took


class Question(NamedTuple):
    """What is asked of the grid."""

    words: str
    pairs: list[tuple[str, str]]  # data sets and methods
    notes: Sequence[str] = ()
    along: tuple[str, dict[float, list[str]]] | None = None  # of a figure: its x axis, {value: methods, by line to the comma}
    also: str = ""  # a method that rows are set against besides MAE


def paired(data: str, *methods: str) -> list[tuple[str, str]]:
    return [(data, method) for method in methods]


LABELS_NOTE = (
    "Levels 2 and 3 and the probes know the same labels (test labels are right): level 2's fit a probe, level 3's choose its "
    "weight decay. T of clutter-1 was learned there, with all of its labels. Without any label there is no feedback: "
    "MAE."
)
LENGTH_NOTE = (
    f"Rows that name no number have {Config.epochs} epochs, the default. T of shapes was learned in {Config.epochs} epochs; "
    f"its seconds are in no row. {AS_LONG}: about the seconds of MLO-MAE's {max(LENGTHS)}."
)
UNROLLING_NOTE = (
    f"MLO-MAE itself: {Config.level1_steps} level-1 steps a mask update, of which the last is differentiated, for "
    f"{Config.mask_batches} batches at once. 1 batch: for one. Unrolled: all {Config.level1_steps} are, for their own batch "
    "each. 4 and 64 steps: as many a mask update, so more and fewer of these, of which the last is whole. "
    f"Head steps: level 2 is {Config.head_steps} AdamW steps, not solved."
)
CHOICES_NOTE = (
    f"Head steps: level 2 is {Config.head_steps} AdamW steps on cross-entropy a look. CLS: features are the CLS token. "
    "T on pixels: a small network on the pixels of a patch and its eight neighbours. Drawn by p: masks are. Identity: "
    "dU/dg = -1. First-order: the head is held constant. No restart: the learning rate of level 1 is one cosine. "
    "T at rest: p is the same everywhere, at MAE's rate."
)
NEARNESS_NOTE = (
    "Weights by nearness: nothing is learned; patches near the middle of the image count more, from the first step on, by "
    "logits of T's mean and a deviation of 1 (steeper: 2), at T's rate."
)
PLACES_NOTE = (
    "shapes-anywhere: the images of shapes, each moved by a random distance, what leaves it on one side coming in on the "
    "other."
)
LEARNED_NOTE = (
    "Of 512 test images; mean ± standard deviation over seeds. AUC: how often a map is higher in a patch that the object "
    "covers by more than half than in another, of all images, or of the same one (mean over images); 0.5 is chance. "
    "Correlations: over an image's patches, mean over images. Another seed's T: the next one's. "
    "d (9) is that of random masks with all patches alike, of 64 validation images, mean over 24 labelled batches; -d above 0 "
    "says: weigh more."
)
AGAINST_NOTE = (
    '"Against MAE" is against the MAE of the same data, mask ratio and labels to probe with. clutter-1 (`clutter FILE --seed '
    "1`): other objects of the kinds of shapes, on photographs."
)
TRANSFER_NOTE = (
    "cifar100: 5,000 images, 512 + 512 labelled ones a look, penalty 3; cifar100-coarse: 5,000 with the 20 classes that "
    "the 100 are of, else alike. With another seed nine in ten are other images."
)
COST_NOTE = (
    "Parts: of the default run, each alone, by the clock on the wall, median [quartiles]; operations are those of matrix "
    f"products. Levels 2 and 3 see {Config.labelled_batch_size} whole images each, d {Config.mask_batches} batches of level "
    "1. p is asked of each batch while T learns, then once of every image."
)
QUESTIONS = {
    "labels": Question(
        "few labels, wrong labels: does T still find the objects?",
        paired("shapes", *WHOLE, *(name for some in (BY_FRACTION, BY_NOISE) for rows in some.values() for name in rows)),
        [LABELS_NOTE],
        ("share of the labels that are known", {1.0: WHOLE} | {share: list(rows) for share, rows in BY_FRACTION.items()}),
    ),
    "ratio": Question(
        "how much is hidden",
        [
            (data, name)
            for data in ("shapes", "clutter-1")
            for ratio in RATIOS
            for name in BY_RATIO.get(ratio, ["MLO-MAE", "MAE"])
        ],
        (),
        ("mask ratio", {ratio: list(BY_RATIO.get(ratio, ["MLO-MAE", "MAE"])) for ratio in RATIOS}),
    ),
    "length": Question(
        "runs of half and twice the length",
        paired("clutter-1", *(name for rows in LONG_AND_SHORT.values() for name in rows)),
        [LENGTH_NOTE],
        (SECONDS, LONG_AND_SHORT),
        also=AS_LONG,
    ),
    "unrolling": Question(
        "how much of levels 1 and 2 the derivative sees",
        paired("shapes", "MLO-MAE", *SEEN, "MLO-MAE, head steps", "MAE"),
        [UNROLLING_NOTE],
        also="MLO-MAE",
    ),
    "choices": Question(
        "the defaults, each one alone changed",
        paired(
            "shapes",
            *("MLO-MAE", *CHOICES, "MLO-MAE, first-order", *TOGETHER),
            *("MLO-MAE, no restart", "MLO-MAE, T at rest", "MAE, no restart", "MAE"),
        ),
        [CHOICES_NOTE],
        also="MLO-MAE",
    ),
    "places": Question(
        "is it more than nearness to the middle?",
        [
            *paired("shapes", "MAE", "MLO-MAE", "MLO-MAE, T given", *MIDDLE),
            *paired("clutter-1", "MAE", "MLO-MAE", "T of shapes", *MIDDLE),
            *paired("shapes-anywhere", "MAE", "MLO-MAE", "T of shapes", *MIDDLE),
        ],
        [NEARNESS_NOTE, PLACES_NOTE],
    ),
    "transfer": Question(
        "T of one data set, used on another",
        [
            *paired("shapes", "MAE", "MLO-MAE", "MLO-MAE, T given", "T of clutter-1", "T of shapes-stripes"),
            *paired("clutter-1", "MAE", "MLO-MAE", "T of shapes", "T of cifar100"),
            *paired("shapes-stripes", "MAE", "MLO-MAE", "T of shapes"),
            *paired("cifar100", "MAE", "MLO-MAE", "T of cifar100-coarse", "T of clutter-1"),
            *paired("cifar100-coarse", "MAE", "MLO-MAE", "T of cifar100"),
        ],
        [TRANSFER_NOTE],
    ),
    "medical": Question(
        "lesions in tissue",
        paired("tissue", "MAE", "MLO-MAE", "MLO-MAE, T given", "T of shapes", "T of clutter-1", *MIDDLE),
        [NEARNESS_NOTE],
    ),
    "cost": Question(
        "all methods in equal time; where the time of a run goes",
        paired("shapes", "MLO-MAE", "MAE", "SemMAE", "U-MAE"),
    ),
    "learned": Question(
        "what T looks at: between seeds, beside attention, and what it was told", paired("shapes", "MLO-MAE", "MAE")
    ),
}


# -------------------------------------------------------------------------------------------------------------- grid


def with_needed(cells: list[Cell], grid: Grid) -> list[Cell]:
    """These cells, and before each those that it needs."""
    found = {}
    for cell in cells:
        found |= dict.fromkeys(with_needed(needed(cell, grid), grid)) | {cell: None}
    return list(found)


def sweep(question: Question, grid: Grid, path: Path) -> bool:
    """Draw probes along what a question varies, or the seconds that this takes: lines are means over seeds, bands go from the
    lowest to the highest. False where nothing is there to draw."""
    along, rows = question.along
    shown = []
    for data in dict.fromkeys(data for data, _ in question.pairs):
        for measure, heading in PROBES.items():
            points = {}
            for value, name in [(value, name) for value, names in sorted(rows.items()) for name in names]:
                if cells := numbers(grid, data, name, "steps"):
                    x = np.mean([cell["seconds"] for cell in cells]) if along == SECONDS else value
                    shares = 100 * np.array([cell[measure] for cell in cells])
                    points.setdefault(name.split(",")[0], []).append((x, shares.mean(), shares.min(), shares.max()))
            if points:
                lines = {name: tuple(map(list, zip(*some))) for name, some in points.items()}
                title = f"{data}: {heading.removesuffix(' %')}"
                shown.append(Panel(title, "% of test images", lines, along=along, log=min(rows) < 0.1))
    if shown:
        text = f"Line: mean of {counted(len(grid.numbers), 'seed')}. Band: from the lowest seed to the highest."
        if along == SECONDS:
            text += f" Points: {', '.join(map(str, rows))} epochs. Seconds of a T that is given are not counted."
        panels(path, shown, text, across=2)
    return bool(shown)


# -------------------------------------------------------------------------------------------------------------- cost


def calls_of_a_run(cfg: Config, splits: Splits) -> dict[str, np.ndarray]:
    """How often a run on these data does each of its pieces in each of its mask updates, {piece: [updates]}, if T does not
    wait."""
    updates, batches = mask_updates(cfg, splits), math.ceil(len(splits.train) / cfg.batch_size)
    start, end = window(cfg, updates)
    looks = np.zeros(updates, int)
    looks[start:end] = 1
    weights = cfg.level1_steps * looks  # asked for at each step while T learns,
    if end < updates:
        weights[end] += batches  # then once for every image
    return {
        "level 1: a step, p known": np.full(updates, cfg.level1_steps),
        "p of a batch, by T": weights,
        "levels 2 and 3, and a (7)": looks,
        "c (8)": looks,
        "d (9)": looks,
        "dL3/dpsi (10)": looks,
    }


def parts_of_a_run(cfg: Config, splits: Splits) -> list[dict]:
    """What each piece of a run on these data takes, in the order in which it does them, on random images, by CPU: {"part",
    "calls" of a whole run, "seconds" of one call (median), "seconds_q1", "seconds_q3", "operations" (a multiplication and an
    addition are two), "peak_bytes"}."""
    device, calls = torch.device("cpu"), calls_of_a_run(cfg, splits)
    net, problem = bench.problem(cfg, splits.image_size, device, count=min(cfg.mask_batches, cfg.level1_steps))
    parts, (_, psi, _, _, (*_, step)) = bench.parts_of(net, problem), problem

    def weights():
        with torch.no_grad():
            return masking_probability(net, psi, step.images, step.eyes)

    names = "levels 2 and 3: encoder", "AdamW's Jacobian", "jvp of the autoencoder", "T: backward and step"
    pieces = dict(zip(calls, [parts["plain MAE step"], weights, *(parts[name] for name in names)]))
    times = interleaved(lambda: pieces, 7, device)
    rows = []
    for name, call in pieces.items():
        about = {"operations": operations(call), "peak_bytes": peak_memory(call, device)[1]}
        rows.append({"part": name, "calls": int(calls[name].sum())} | quartiles(times[name]) | about)
    return rows


def draw_cost(rows: list[dict], cfg: Config, splits: Splits, path: Path) -> None:
    """A picture of `parts_of_a_run` over a run."""
    calls = calls_of_a_run(cfg, splits)
    updates = mask_updates(cfg, splits)
    epochs = cfg.epochs * np.arange(1, 1 + updates) / updates
    shown = []
    for name, title, unit, scale in (
        ("seconds", "Time so far", "seconds", 1),
        ("operations", "Operations so far", "10^12 operations", 1e12),
    ):
        sums = {row["part"]: (calls[row["part"]] * row[name]).cumsum() / scale for row in rows}
        shown.append(Panel(title, unit, {part: (epochs, values) for part, values in sums.items()}))
    memory = {row["part"]: np.where(calls[row["part"]] > 0, row["peak_bytes"] / 2**20, np.nan) for row in rows}
    shown.append(Panel("Memory while at work", "MiB", {name: (epochs, values) for name, values in memory.items()}))
    text = "From the medians of each piece. T learns between the two kinks; p of every image is computed once at the second."
    panels(path, shown, text)


def cost_lines(rows: list[dict]) -> list[str]:
    """`parts_of_a_run` as a table."""
    whole = {name: sum(row["calls"] * row[name] for row in rows) for name in ("seconds", "operations")}
    shown = []
    for row in rows:
        shares = [row["calls"] * row[name] / whole[name] for name in ("seconds", "operations")]
        one = [f"{1e3 * row['seconds']:.1f} [{1e3 * row['seconds_q1']:.1f}, {1e3 * row['seconds_q3']:.1f}]"]
        one += [f"{row['operations'] / 1e9:.2f}", f"{row['peak_bytes'] / 2**20:.1f}"]
        shown.append([row["part"], *one, str(row["calls"]), *(f"{share:.1%}" for share in shares)])
    titles = ["part of a run", "ms", "10^9 operations", "memory, MiB", "calls", "of the time", "of the operations"]
    return markdown(titles, shown)


# ----------------------------------------------------------------------------------------------------------- learned

LOOKED_AT = 512  # test images
EARLY_AND_LATE = (0.1, 0.2, 0.5, 1.0)  # shares of an MAE's run
LOOKS, TOLD = 24, 64  # labelled batches that speak at each point, and validation images of which they do


def alike(first: Tensor, second: Tensor) -> float:
    """Mean over images of the correlation of two maps [B, N] over patches; of the images in which both vary."""
    first, second = (x.double() - x.double().mean(1, keepdim=True) for x in (first, second))
    sizes = first.norm(dim=1) * second.norm(dim=1)
    vary = sizes > 1e-12
    return float(((first * second).sum(1)[vary] / sizes[vary]).mean())


def aucs(maps: Tensor, inside: Tensor) -> tuple[float, float]:
    """How well a map [B, N] tells the patches `inside` [B, N] from the others: the area under its ROC curve, of the patches of
    all images, and of each image's own, mean over the images that have both."""
    some = inside.any(1) & ~inside.all(1)
    each = [area_under_roc(values[where], values[~where]) for values, where in zip(maps[some], inside[some])]
    return area_under_roc(maps[inside], maps[~inside]), float(np.mean(each))


@torch.no_grad()
def cls_attention(model: encode.Model, inputs: Tensor) -> Tensor:
    """[B, N]: how much the CLS token attends to each patch in the last block, mean over heads."""
    encoder, heads = model.encoder, model.net.cfg.heads
    block = encoder.blocks[-1]
    x = block.norm1(encoder(inputs, blocks=len(encoder.blocks) - 1))
    q, k, _ = block.attn.qkv(x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, 1+N, D/heads]
    return (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, 0, 1:].mean(1)


@torch.no_grad()
def mean_errors(net: Networks, theta: Tensor, images: Tensor, draws: int = 8) -> Tensor:
    """l [B, N], the mean over random masks in which a patch is hidden."""
    total, hidden, split = 0, 0, net.encoder_size
    for draw in range(draws):
        choice = select_patches(torch.rand(len(images), net.patches, generator=torch_generator(0, draw)), net.visible)
        step = Step(None, None, None, images, *choice)
        total = total + patch_errors(net, theta[:split], theta[split:], step)
        hidden = hidden + step.mask
    return total / hidden.clamp_min(1)


def maps_of_a_seed(ours: Path, mae: Path, other: Path) -> tuple[dict[str, Tensor], Tensor]:
    """{what it is: map [B, N] of test images}, and where their objects are [B, N] bool. The folders are those of an MLO-MAE,
    of an MAE of its seed, and of an MLO-MAE of another."""
    model, plain, another = (encode.load(folder, "cpu") for folder in (ours, mae, other))
    test, size = open_run(ours, "cpu")[2].test, model.net.cfg.patch_size
    images = test.images[:LOOKED_AT].float() / 255
    inputs = model.inputs(images)
    patches = gather_patches(images, None, size)  # [B, N, p*p*C]
    return {
        "p of T": model.weights(images).flatten(1),
        "p of another seed's T": another.weights(images).flatten(1),
        "CLS attention, last block": cls_attention(model, inputs),
        "CLS attention of MAE": cls_attention(plain, plain.inputs(images)),
        "reconstruction error of MAE": mean_errors(plain.net, plain.state.theta.params, plain.inputs(images)),
        "contrast of the pixels": patches.unflatten(2, (size**2, -1)).std(2).mean(2),
        "nearness to the middle": nearness(images.shape[-1] // size).flatten().expand(len(images), -1),
    }, share_covered(test.objects[:LOOKED_AT], size) > HALF


class Told(NamedTuple):
    """What levels 2 and 3 say at one point of an MAE's run."""

    share: float  # of the run
    maps: Tensor  # -d [B, N] of validation images, mean over looks: above 0 where weighing more lowers L3
    loss3: float


def told_over_a_run(cfg: Config) -> tuple[list[Told], Tensor, Splits]:
    """What is Told at EARLY_AND_LATE points of the MAE of this configuration; objects [B, N] bool of the images; the data."""
    splits = load_data(cfg, torch.device("cpu"))
    (images, objects), total = splits.watched(TOLD), mask_updates(cfg, splits)
    points, found = {max(1, round(share * total)): share for share in EARLY_AND_LATE}, []
    for net, state, decay in level1_alone(cfg, splits, coverage(splits.train)):
        if state.iteration in points:
            rates = Rates(cfg.lr, decay[0])
            found.append(Told(points[state.iteration], *told(net, state, splits, images, rates, decay[1])))
    return found, share_covered(objects, cfg.patch_size) > HALF, splits


def told(
    net: Networks, state: State, splits: Splits, images: Tensor, rates: Rates, head_decay: Tensor
) -> tuple[Tensor, float]:
    """-d [B, N] of these images, mean over LOOKS labelled batches, each with masks of its own; and the mean of L3."""
    cfg, split = net.cfg, net.encoder_size
    level2, level3 = (part.stream(cfg.labelled_batch_size, 1) for part in splits.labelled)
    level1, keys = splits.train.stream(cfg.batch_size, 2), itertools.count()
    maps = moved_weights(coverage(splits.train).stream(cfg.batch_size, 2), cfg.patch_size)
    total, hidden, losses = 0, 0, []
    for look in range(LOOKS):
        images1, how = next(level1).images, {"covered": next(maps)}
        _, step, _, _ = level1_step(net, state.theta, state.psi.params, images1, rates, 3, next(keys), **how)
        labelled = labelled_of(cfg, next(level2), next(level3), Rates(cfg.head_lr, head_decay), look)
        params = state.theta.params[:split].detach().requires_grad_()
        loss3 = upper_levels(net, params, state.head, labelled)[0]
        losses.append(loss3.item())
        a = torch.autograd.grad(loss3, params)[0]  # (7)
        c = adamw_pullback(step.theta, step.gradient, rates, cfg.update_jacobian, params_only(a), whole=False)[1]  # (8)
        choice = select_patches(torch.rand(len(images), net.patches, generator=torch_generator(4, look)), net.visible)
        shown = step._replace(images=images, keep=choice[0], restore=choice[1], mask=choice[2])
        total, hidden = total - directional_errors(net, shown, c), hidden + choice[2]  # (9)
    return total / hidden.clamp_min(1), float(np.mean(losses))


def learned(grid: Grid, picture: Path) -> tuple[list[str], list[dict]]:
    """Two tables as lines, of what T looks at and of what it was told, and their rows for JSON; draws the latter of the first
    seed."""
    maps, tolds = {}, []
    for seed in grid.numbers:
        ours, mae = (Cell("shapes", name, "steps", seed) for name in ("MLO-MAE", "MAE"))
        other = ours._replace(seed=grid.first + (seed - grid.first + 1) % grid.seeds)
        found, inside = maps_of_a_seed(*(folder_of(grid.out, cell) for cell in (ours, mae, other)))
        for name, values in found.items():
            row = maps.setdefault(name, {"auc": [], "auc_by_image": [], "with p": []})
            for column, value in zip(row.values(), (*aucs(values, inside), alike(values, found["p of T"]))):
                column.append(value)
        points, inside, splits = told_over_a_run(settings(mae, grid)[0])
        tolds.append([(each, *aucs(each.maps, inside)) for each in points])
        if seed == grid.first:
            draw_told(points, splits, picture)
    lines = [[name, *(spread(values, 1, 2) for values in row.values())] for name, row in maps.items()]
    titles = ["map of the patches", "AUC against objects", "image by image", "correlation with p of T"]
    shown = markdown(titles, lines)
    said, rows = [], [{"map": name, **row} for name, row in maps.items()]
    for points in zip(*tolds):
        (of_first, *_), losses = points[0], [each.loss3 for each, *_ in points]
        pooled, by_image = zip(*(found for _, *found in points))
        said.append([f"{of_first.share:.0%}", spread(losses, 1, 3), spread(pooled, 1, 2), spread(by_image, 1, 2)])
        rows.append({"share": of_first.share, "level3_loss": losses, "auc": pooled, "auc_by_image": by_image})
    shown += ["", *markdown(["after this share of MAE's run", "L3", "AUC of -d against objects", "image by image"], said)]
    return shown, rows


def draw_told(points: list[Told], splits: Splits, path: Path) -> None:
    """A picture of what is told, of the first images."""
    images = splits.watched(SHOWN)[0]
    pixels = as_images(gather_patches(images, None, images.shape[-1] // 8), images.shape[-1] // 8, splits.mean, splits.std)
    rows = [("image", pixels, PIXELS)]
    for each in points:
        values = each.maps[:SHOWN]
        scale = float(each.maps.abs().quantile(0.98))
        style = {"cmap": "RdBu_r", "vmin": -scale, "vmax": scale}
        rows.append((f"after {each.share:.0%}", values, style))
    text = (
        "Red: weighing the errors of this patch more lowers L3, as the derivative says (-d, mean over looks and masks; each "
    )
    text += "row on its own scale). Blue: it raises L3."
    grid_picture(path, rows, text)


# ------------------------------------------------------------------------------------------------------- command line


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = cli.Parser(prog="mlo_mae.py questions", description=__doc__.splitlines()[0])
    words = "; ".join(f"{name}: {question.words}" for name, question in QUESTIONS.items())
    parser.add_argument("question", choices=list(QUESTIONS), help=words)
    add_grid_flags(parser, 3, "run nothing of the grid (cost and learned still measure)")
    options = parser.parse_args(argv)
    if options.first_seed < 0 or options.seeds < 2:
        raise UserError("--first-seed must be at least 0, and --seeds at least 2: a T is given to another seed")
    return options


def run_command(argv: list[str]) -> dict:
    """Run `questions` with these flags; prints the table, and returns what its last line reports."""
    options = parse(argv)
    name, out = options.question, options.out
    question, files = QUESTIONS[name], {name: out / f"{name}.npz" for name in ("tissue", "clutter-1")}
    sets = SETS | {name: ({"data": str(path)}, {}) for name, path in files.items()}
    how = {"tuned": False, "first": options.first_seed, "methods": ALL, "sets": sets}
    grid = Grid(out, options.data_dir, files["clutter-1"], options.seeds, options.threads, **how)
    rules = ("steps", "time") if name == "cost" else ("steps",)
    if not options.table:
        asked = [
            Cell(data, method, rule, seed)
            for rule in rules
            for seed in grid.numbers
            for data, method in question.pairs
            if rule == "steps" or method in TIMED
        ]
        cells = with_needed(asked, grid)
        out.mkdir(parents=True, exist_ok=True)
        used = {cell.data for cell in cells if not files.get(cell.data, out).exists()}
        if "tissue" in used:
            tissue.write(files["tissue"])
        if "clutter-1" in used:
            clutter.write(files["clutter-1"], options.data_dir, seed=1)
        run_grid(cells, grid, options.workers)
    torch.set_num_threads(options.threads)
    notes, figure = [SPREAD_NOTE, RATES_NOTE, CLOCKS[clock_of(grid.threads)], *question.notes], out / f"{name}.png"
    if name == "learned":
        if not all(numbers(grid, *pair, "steps") for pair in question.pairs):
            raise UserError(f"{out} lacks runs of these seeds; run without --table")
        (lines, rows), notes, drawn = learned(grid, figure), [LEARNED_NOTE], True
    elif name == "cost":
        lines, rows = table("shapes", [method for _, method in question.pairs], grid)
        if not rows:
            raise UserError(f"{out} holds no finished rows; run without --table")
        cfg, _ = settings(Cell("shapes", "MLO-MAE", "steps", grid.first), grid)
        splits = load_data(cfg, torch.device("cpu"))
        parts = parts_of_a_run(cfg, splits)
        draw_cost(parts, cfg, splits, figure)
        lines, rows, drawn = [*lines, "", *cost_lines(parts)], rows + parts, True
        notes += [SEMMAE_NOTE, COST_NOTE]
    else:
        found, rows = rows_by_data(grid, question.pairs, sees=True, also=question.also)
        rivals = [f"against {some}" for some in ("MAE", question.also) if some]
        against = [title for heading in PROBES.values() for title in (heading, *rivals)]
        lines = markdown(["data", "method", "seconds", *against, *(some.replace("_", " ") for some in OBJECTS)], found, left=2)
        notes += [AGAINST_NOTE] + [GIVEN_NOTE] * any(grid.methods[method].given for _, method in question.pairs)
        drawn = question.along is not None and sweep(question, grid, figure)
    if not rows:
        raise UserError(f"{out} holds no finished rows; run without --table")
    facts = made_on(rows) | {"threads": options.threads, "cells at once": options.workers, "seeds": options.seeds}
    save = f"questions-{name}" if options.save else ""
    show_page(["questions", *argv], facts, lines, notes, save)
    if save and drawn:
        write_whole(BENCHMARKS / f"{save}.png", figure.read_bytes())
    return {"command": "questions", "question": name, "machine": facts, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
