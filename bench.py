"""What is exact, what it costs, and what it could cost at best.

    python bench.py hypergradient    # every form of dL3/dpsi against autograd, and finite differences as published
    python bench.py step             # one outer iteration, its parts, and its floor
    python bench.py kernels          # each kernel against the best that PyTorch offers
    python bench.py rates            # what this machine copies and multiplies at best
    python bench.py gpu --out DIR    # all of these at the sizes that matter on a GPU, in order, within a time

Each prints the machine, a table row by row, and one last line of compact JSON; --save writes what is printed under
benchmarks/, as it comes, so that a run that is cut short leaves what it had.
Times are medians (with quartiles) of interleaved runs after a warm-up. A number that was not measured is not printed.
Exit status: 0; 1 where a result is further from the truth than it may be, or a rival fails; 2 for what the user can mend.
"""

from harness.signals import end_at_once

if __name__ == "__main__":
    end_at_once("bench")  # the imports take seconds

import argparse
import contextlib
import dataclasses
import functools
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import data
import kernels
import mlo_mae
from harness import UserError, cli, counted, first_line, measure, printable
from harness.files import append_line, check_free, read_rows, write_whole
from harness.measure import Page, interleaved, operations, operators, peak_memory, product_rate, quartiles, relative_error
from harness.pictures import Panel, caption, draw_panels, save_figure
from harness.randomness import REDRAWN, draw_dropout
from harness.vectors import decays
from kernels.race import COMPILED, DTYPES, GEOMETRY, KERNELS, SDPA, cases, race
from mlo_mae import Config, Labelled, Level, Networks, Rates, Result, Step

# ----------------------------------------------------------------------------- the hypergradient, as published


def finite_difference(
    net: Networks,
    theta: Level,
    psi: Tensor,
    head: Level,
    labelled: Labelled,
    steps: list[Step],
    redrawn: Tensor | None = None,
) -> Result:
    """The hypergradient by central differences of width 0.01/|direction|, one for each of the two steps, as published:
    of the last level-1 step and of one head step (--level2 steps), in one process. Takes and returns what the forms in
    mlo_mae.py do.

    redrawn [2, B, D]: dropout of the two evaluations of level 2, which the published code draws anew (None: held)."""
    jacobian, split, step = net.cfg.update_jacobian, net.encoder_size, steps[-1]
    encoder_params = theta.params[:split].detach().requires_grad_()
    before, phi = head, head.params.detach().requires_grad_()
    features2 = mlo_mae.encode(net, encoder_params.detach(), labelled.images2)
    loss2 = mlo_mae.head_loss(net, phi, features2, labelled.labels2, labelled.dropout[0])  # (4)
    (gradient2,) = torch.autograd.grad(loss2, phi)
    head = mlo_mae.adamw(before, gradient2, labelled.rates)  # (5)
    phi = head.params.detach().requires_grad_()
    loss3 = mlo_mae.head_loss(net, phi, mlo_mae.encode(net, encoder_params, labelled.images3), labelled.labels3)  # (6)
    if mlo_mae.waits(labelled, loss3):
        return Result(None, head, loss2.detach(), loss3.detach())
    a, of_head = torch.autograd.grad(loss3, (encoder_params, phi))

    # dL3/dphi' reaches E' through g2: the difference quotient of dL2/dE' along the head's direction c2
    c2 = mlo_mae.adamw_pullback(before, gradient2, labelled.rates, jacobian, mlo_mae.params_only(of_head), False)[1]
    dropouts = iter(labelled.dropout.expand(2, -1, -1) if redrawn is None else redrawn)

    def level2_gradient(head_params):
        features = mlo_mae.encode(net, encoder_params, labelled.images2)
        loss = mlo_mae.head_loss(net, head_params, features, labelled.labels2, next(dropouts))
        return torch.autograd.grad(loss, encoder_params)[0]

    a = a + central_difference(level2_gradient, before.params, c2)  # (7)
    c = mlo_mae.adamw_pullback(step.theta, step.gradient, step.rates, jacobian, mlo_mae.params_only(a))[1]  # (8)
    encoder_before, decoder_before = step.theta.params.tensor_split([split])
    with torch.no_grad():
        d = central_difference(  # (9)
            lambda params: mlo_mae.patch_errors(net, params, decoder_before, step), encoder_before, c
        )
    psi_leaf = psi.detach().requires_grad_()
    prob = mlo_mae.weights_of(net, psi_leaf, step)
    (hypergradient,) = torch.autograd.grad(mlo_mae.level1_loss(prob, step.mask, d), psi_leaf)  # (10)
    return Result(hypergradient, head, loss2.detach(), loss3.detach())


def central_difference(function: Callable[[Tensor], Tensor], params: Tensor, direction: Tensor) -> Tensor:
    """The derivative of `function` at `params` along `direction`, from two evaluations 0.02 apart (published alpha)."""
    width = 0.01 / direction.norm().clamp_min(mlo_mae.TINY)
    return (function(params + width * direction) - function(params - width * direction)) / (2 * width)


# ----------------------------------------------------------------------------- the hypergradient, judged by autograd

LIMIT = {"float32": 1e-4, "float64": 1e-12}  # relative error of `exact` that its dtype allows
NOISE = 0.5  # cosine with the truth below which a direction is called noise

PUBLISHED = mlo_mae.PUBLISHED | {"lr": 2e-3, "mask_lr": 1.0}  # finite differences go with these too
FEW = {"batch_size": 16, "labelled_batch_size": 16}
TINY = {"width": 32, "depth": 2, "heads": 2, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "masking_width": 64}
# Image size in pixels, and settings of Config. "solved" is mlo_mae.py's default run; "small" has its networks for images.
SIZES = {
    "solved": (32, {}),
    "tiny": (16, PUBLISHED | FEW | TINY),
    "small": (32, PUBLISHED | {"batch_size": 128, "labelled_batch_size": 64}),
    "medium": (32, PUBLISHED | FEW | {"width": 192, "depth": 6, "heads": 3, "decoder_width": 128}),
    "vit-b/2": (32, mlo_mae.CIFAR | FEW | {"precision": "fp32"}),
}


class Method(NamedTuple):
    """One row: a form of the hypergradient, the settings it runs with, and how many level-1 steps it is to explain."""

    label: str
    form: Callable[..., Result]
    settings: dict = {}  # of Config
    judged: int = 1  # level-1 steps that the judge unrolls
    seen: int = 1  # level-1 steps that the form is given
    redraws: bool = False  # whether the form gets dropout drawn anew
    solved: bool = True  # whether the form goes with a head that is solved, which makes no steps


IDENTITY, HALF = {"update_jacobian": "identity"}, {"precision": "bf16"}
METHODS = {  # experiments/published.py adds a row
    "exact": Method("exact", mlo_mae.exact),
    "unrolled": Method("unrolled autograd", mlo_mae.unrolled),
    "finite-difference": Method("finite differences", finite_difference, solved=False),
    "redrawn": Method("finite differences, dropout redrawn", finite_difference, redraws=True, solved=False),
    "published": Method("as published: redrawn, and dU/dg = -1", finite_difference, IDENTITY, redraws=True, solved=False),
    "identity": Method("exact but for dU/dg = -1", mlo_mae.exact, IDENTITY),
    "first-order": Method("first-order (L2's curvature left out)", mlo_mae.first_order),
    "exact-bf16": Method("networks in bfloat16: exact", mlo_mae.exact, HALF),
    "finite-difference-bf16": Method("networks in bfloat16: finite differences", finite_difference, HALF, solved=False),
    "exact-2": Method("two steps: exact", mlo_mae.exact, {}, 2, 2),
    "unrolled-2": Method("two steps: unrolled autograd", mlo_mae.unrolled, {}, 2, 2),
    "last-of-2": Method("two steps: exact, of the last alone", mlo_mae.exact, {}, 2, 1),
}
EXACT = ("exact", "exact-2")  # the rows that must be within LIMIT
Problem = tuple[Level, Tensor, Level, Labelled, list[Step]]  # what a form takes after the networks


def random_batches(size: int, count: int, device: torch.device) -> Iterator[data.Batch]:
    """Endless batches of smooth random images (noise on a coarse grid, and a little on every pixel), ten classes."""
    while True:
        coarse = F.interpolate(torch.randn(count, 3, 4, 4), size=(size, size), mode="bicubic")
        images = coarse + 0.1 * torch.randn(count, 3, size, size)
        yield data.Batch(images.to(device), torch.randint(10, (count,)).to(device))


def problem(cfg: Config, size: int, device: torch.device | str, count: int = 2, warm: int = 4) -> tuple[Networks, Problem]:
    """Networks, and what a form of the hypergradient takes after them as training makes it, in float32.

    `warm` outer iterations are really made, so that weights and moments are not initial ones; then `count` level-1 steps,
    which the hypergradient is to explain."""
    cfg = dataclasses.replace(cfg, warmup=0.0, mask_start=0.0, mask_wait=0.0)  # T learns and weighs from the first
    net, params = mlo_mae.build(cfg, size, 3, classes=10)
    state = mlo_mae.State(0, *(mlo_mae.fresh_level(vector, device) for vector in params))
    decay, mask_rate = mlo_mae.rates_of(net, device)
    torch.manual_seed(1)
    streams = mlo_mae.Streams(*(random_batches(size, n, device) for n in (cfg.batch_size, *[cfg.labelled_batch_size] * 2)))
    for _ in range(warm):
        state, _ = mlo_mae.outer_iteration(net, state, streams, 1000, decay, mask_rate)
    theta, steps, rates = state.theta, [], Rates(cfg.lr, decay[0])
    for number in range(count):
        images = next(streams.level1).images
        theta, step, _, _ = mlo_mae.level1_step(net, theta, state.psi.params, images, rates, 0, number)
        steps.append(step)
    labelled = mlo_mae.labelled_of(cfg, next(streams.level2), next(streams.level3), Rates(cfg.head_lr, decay[1]), 0)
    return net, (theta, state.psi.params, state.head, labelled, steps)


def in_double(net: Networks, arguments: Problem) -> Problem:
    """The same problem in float64: the same state before the level-1 steps, masks and dropout; the steps made again."""
    _, psi, head, labelled, steps = measure.to_double(arguments)
    split, theta, made = net.encoder_size, steps[0].theta, []
    for step in steps:
        params, step = theta.params.clone().requires_grad_(), step._replace(eyes=theta.params[:split])
        prob = mlo_mae.weights_of(net, psi, step)
        loss = mlo_mae.level1_loss(prob, step.mask, mlo_mae.patch_errors(net, params[:split], params[split:], step))
        (gradient,) = torch.autograd.grad(loss, params)
        made.append(step._replace(theta=theta, gradient=gradient))
        theta = mlo_mae.adamw(theta, gradient, step.rates)
    return theta, psi, head, labelled, made


def bound(net: Networks, method: Method, arguments: Problem) -> Callable[[], Result]:
    """One row's method as a call without arguments."""
    *before, labelled, steps = arguments
    cfg = dataclasses.replace(net.cfg, **method.settings)
    call = functools.partial(method.form, dataclasses.replace(net, cfg=cfg), *before, labelled, steps[-method.seen :])
    if method.redraws:
        shape = (2, cfg.labelled_batch_size, cfg.width)
        call.keywords["redrawn"] = draw_dropout(cfg.dropout, shape, 0, REDRAWN).to(labelled.dropout)
    return call


def cost(
    net: Networks, arguments: Problem, methods: dict[str, Method], repeats: int, device: torch.device
) -> tuple[dict[str, Result], dict[str, dict]]:
    """({name: Result}, {name: peak bytes, operations, seconds}) of running every method."""
    calls = {name: bound(net, method, arguments) for name, method in methods.items()}
    results, costs = {}, {}
    for name, call in calls.items():
        results[name], peak = peak_memory(call, device)  # also the warm-up
        costs[name] = {"peak_bytes": peak, "flops": operations(call)}
    for name, times in interleaved(lambda: calls, repeats, device).items():
        costs[name] |= quartiles(times)
    return results, costs


def compare_forms(cfg: Config, pixels: int, methods: dict[str, Method], repeats: int, device: torch.device) -> dict[str, dict]:
    """{name: row} of every method in one problem: errors in both dtypes against autograd in float64, and cost in float32."""
    net, single = problem(cfg, pixels, device)
    double = in_double(net, single)
    precise = {name: bound(net, method, double)().hypergradient for name, method in methods.items()}
    judges = {method.judged: precise[name] for name, method in methods.items() if method.form is mlo_mae.unrolled}
    results, costs = cost(net, single, methods, repeats, device)
    rows = {}
    for name, method in methods.items():
        judge, found = judges[method.judged], results[name].hypergradient.double()
        row = {
            "error_float32": relative_error(found, judge),
            "error_float64": relative_error(precise[name], judge),
            "cosine": float(F.cosine_similarity(found, judge, dim=0)),
        }
        row |= {f"allowed_{dtype}": limit for dtype, limit in LIMIT.items()}
        exact = all(row[f"error_{dtype}"] <= row[f"allowed_{dtype}"] for dtype in LIMIT)
        row["verdict"] = "exact" if exact else "approximate" if row["cosine"] >= NOISE else "noise"
        rows[name] = row | costs[name]
    return rows


def run_hypergradient(
    options: argparse.Namespace, device: torch.device, page: Page, more: dict[str, Method] | None = None, note: str = ""
) -> dict:
    """Every form at every size. Wrong where `exact` is not exact. `more`: rows beside METHODS, and `note` on them."""
    methods = METHODS | (more or {})
    if options.methods:
        asked = {"exact", *options.methods}
        judged = {methods[name].judged for name in asked}
        asked |= {name for name, method in methods.items() if method.form is mlo_mae.unrolled and method.judged in judged}
        methods = {name: method for name, method in methods.items() if name in asked}
    sizes = options.sizes or [size for size in SIZES if size != "vit-b/2" or device.type == "cuda"]
    for name in options.methods or ():
        if not methods[name].solved and sizes == ["solved"]:
            raise UserError(f"--methods {name} has no part in --sizes solved, whose head makes no steps; name another size")
    if options.plot:
        options.plot.touch()  # rather fail now than after the measurements
    for size in sizes:
        pixels, settings = SIZES[size]
        cfg = Config(**settings)
        slow_bf16 = device.type == "cpu" and size != "tiny" and not options.sizes  # it can take minutes: only if asked for
        some = {name: method for name, method in methods.items() if method.solved or cfg.level2 == "steps"}
        some = {name: method for name, method in some.items() if not (slow_bf16 and method.settings == HALF)}
        rows = compare_forms(cfg, pixels, some, options.repeats, device)
        patches = (pixels // cfg.patch_size) ** 2
        page.say(
            "",
            f"{size}: width {cfg.width}, depth {cfg.depth}, {patches} patches, batches of {cfg.batch_size} "
            f"and twice {cfg.labelled_batch_size}, {described(cfg)}",
            "",
            *forms_text(rows, some),
        )
        page.record(*({"size": size, "method": name} | row for name, row in rows.items()))
        page.wrong += [
            f"{name} at {size} in {dtype}: relative error {rows[name][f'error_{dtype}']:.1e}, allowed {limit:.0e}"
            for name in EXACT
            for dtype, limit in LIMIT.items()
            if name in rows and not rows[name][f"error_{dtype}"] <= limit
        ]
    page.say(
        "",
        "Error: |h - judge| / |judge|; the judge is autograd through the same steps in float64 (two steps: through both). "
        f"Exact: within {LIMIT['float64']:.0e} of it in float64, and within {LIMIT['float32']:.0e} in float32. Noise: "
        f"cosine below {NOISE}. Cosine, ms (median [quartiles] of {options.repeats}), MiB (the most held at once) and GFLOP "
        "(matrix products) are float32's. Networks in bfloat16: encoder and decoder under autocast, which leaves float64 as "
        f"it is.{note if set(more or ()) & set(methods) else ''}",
    )
    picture = options.plot or (options.save and measure.saved_path(measure.name_of(options), device, "png"))
    grown = growth(device, options.repeats) if picture else []
    if picture:
        draw(rows, some, size, grown, picture)
    return {"rows": page.rows, "growth": grown}


def described(cfg: Config) -> str:
    """What levels 2 and 3 are made of."""
    steps = counted(cfg.head_steps, "head step")
    features = {"mean": "the mean token", "cls": "the CLS token"}[cfg.pooling]
    return f"{'head solved' if cfg.level2 == 'ridge' else steps} on {features}, T {cfg.masking_network}"


def forms_text(rows: dict[str, dict], methods: dict[str, Method]) -> list[str]:
    """The table of one size, and what exact costs beside its rivals."""
    lines = [["method", "error, float32", "error, float64", "cosine", "verdict", "ms", "MiB", "GFLOP"]]
    for name, row in rows.items():
        precise = "judge" if methods[name].form is mlo_mae.unrolled else f"{row['error_float64']:.1e}"
        errors = [f"{row['error_float32']:.1e}", precise, f"{row['cosine']:.4f}", row["verdict"]]
        lines.append([methods[name].label, *errors, *measure.shown_cost(row), f"{row['flops'] / 1e9:.3g}"])
    ratios = [
        "{:.2f}x the time, {:.2f}x the memory and {:.2f}x the operations of {}".format(
            *(rows["exact"][what] / rows[rival][what] for what in ("seconds", "peak_bytes", "flops")), methods[rival].label
        )
        for rival in ("unrolled", "finite-difference")
        if rival in rows
    ]
    return [*measure.table(lines).splitlines(), "", f"exact takes {'; '.join(ratios)}."]


FORMS = ("exact", "unrolled", "finite-difference")
VERDICTS = {"exact": "tab:green", "approximate": "tab:orange", "noise": "tab:red"}  # and their colours
QUESTIONS = (  # of the picture: title, unit, name in a row, scale
    ("Is it exact?", "relative error in float32 (judge: autograd in float64)", "error_float32", 1),
    ("How long does it take?", "milliseconds", "seconds", 1e3),
    ("How much memory does it hold?", "MiB", "peak_bytes", 2**-20),
)
WHAT = {"seconds": "time", "peak_bytes": "memory"}
ALONG = {"depth": "blocks of the encoder", "batch": "images in a batch", "unrolled steps": "level-1 steps unrolled"}
CAPTION = (
    "Above: the shaded band is what float32 allows; a method is of use where its dot lies in it, or near it and further left "
    "in the other panels. Below: width 32, 64 patches; finite differences see one step, however many are unrolled."
)
GROWTH = {"depth": (2, 4, 8), "batch": (16, 32, 64), "unrolled steps": (1, 2, 4)}


def growth(device: torch.device, repeats: int) -> list[dict]:
    """How time and memory of three forms grow with depth, batch and unrolled steps, in float32: rows."""
    pixels, settings = SIZES["tiny"]
    rows = []
    for along, values in GROWTH.items():
        for value in values:
            changed = {"depth": {"depth": value}, "batch": {"batch_size": value, "labelled_batch_size": value}}
            steps = value if along == "unrolled steps" else 1
            cfg = Config(**settings | {"patch_size": 2} | changed.get(along, {}))
            net, arguments = problem(cfg, pixels, device, steps, warm=1)
            methods = {name: METHODS[name]._replace(judged=steps, seen=steps) for name in FORMS}
            costs = cost(net, arguments, methods, repeats, device)[1]
            rows += [{"along": along, "value": value, "method": name, **row} for name, row in costs.items()]
    return rows


def draw(rows: dict[str, dict], methods: dict[str, Method], size: str, grown: list[dict], path: Path) -> None:
    """Write the picture: of every method at one size its error, time and memory; and how time and memory grow."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    heights = 1.6 + 0.27 * len(rows), 6.2
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    axes, places = above.subplots(1, 3, sharey=True), range(len(rows))
    error = axes[0]
    for axis, (title, unit, name, scale) in zip(axes, QUESTIONS):
        values = [scale * row[name] for row in rows.values()]
        axis.scatter(values, places, s=45, color=[VERDICTS[row["verdict"]] for row in rows.values()], zorder=3)
        for place, value in zip(places, values):
            said = f"{value:.1e}" if axis is error else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
            axis.annotate(said, (value, place), (7, -3.5), textcoords="offset points", fontsize=9)
        axis.set_title(title, loc="left")
        axis.set(xlabel=unit, yticks=places, yticklabels=[methods[name].label for name in rows])
        axis.set_xlim(0, 1.25 * max(values))
        axis.grid(alpha=0.3)
    errors = [row["error_float32"] for row in rows.values()]
    low, high = min(1e-8, *errors), max(1, *errors)
    error.set(xscale="log", xlim=(low, high * (high / low) ** 0.3))  # room for what is said at the points
    error.axvspan(low, LIMIT["float32"], color="green", alpha=0.07, lw=0)
    error.set_ylim(len(rows) - 0.5, -0.5)  # the first above; half a row of room, also where they are few
    dots = [Line2D([], [], marker="o", linestyle="", color=colour, label=verdict) for verdict, colour in VERDICTS.items()]
    above.legend(
        handles=dots,
        loc="outside upper left",
        ncols=len(dots),
        frameon=False,
        title=f"{size}: a row for each method",
        alignment="left",
    )
    shown = []
    for name, unit, scale in (("seconds", "ms", 1e3), ("peak_bytes", "MiB", 2**-20)):
        for along in dict.fromkeys(row["along"] for row in grown):
            lines = {}
            for form in FORMS:
                some = [(row["value"], scale * row[name]) for row in grown if (row["along"], row["method"]) == (along, form)]
                lines[METHODS[form].label] = tuple(zip(*some))
            shown.append(Panel(f"How does {WHAT[name]} grow with {along}?", unit, lines, along=ALONG[along]))
    draw_panels(below, shown, 3)
    for axis, panel in zip(below.axes, shown):
        axis.set(ylim=(0, None), xticks=next(iter(panel.lines.values()))[0])
    caption(figure, CAPTION)
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------- step

TRAINING_IMAGES = {"shapes": 6000, "cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167}  # level 3's included


class SdpaBlock(mlo_mae.Block):
    """A block of the encoder as most programs have it: torch's fused attention, no forward mode."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.heads = heads
        self.norm1, self.norm2 = (torch.nn.LayerNorm(width, eps=1e-6) for _ in range(2))

    def forward(self, x, scale=None):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def timms_block(width: int, heads: int) -> torch.nn.Module:
    """timm's block. ImportError where timm is not installed."""
    from timm.models.vision_transformer import Block

    class Scaled(Block):
        def forward(self, x, scale=None):
            return super().forward(x)

    return Scaled(width, heads, qkv_bias=True)


RIVALS = {"rival: MAE on SDPA": SdpaBlock, "rival: MAE on timm's blocks": timms_block}


def rival_step(cfg: Config, step: Step, block: Callable[[int, int], torch.nn.Module]) -> Callable[[], Tensor]:
    """A step of MAE as most programs have it, as a call that returns its loss: these blocks, a module's own parameters, and
    torch's fused AdamW. Images and random masks are those of `step`; patches are cut and judged as here."""
    device, (_, channels, size, _) = step.images.device, step.images.shape
    sizes = size, cfg.patch_size, channels
    encoder = mlo_mae.Encoder(*sizes, cfg.width, cfg.depth, cfg.heads)
    encoder.blocks = torch.nn.ModuleList(block(cfg.width, cfg.heads) for _ in range(cfg.depth))
    decoder = mlo_mae.Decoder(*sizes, cfg.width, cfg.decoder_width, cfg.decoder_depth, cfg.decoder_heads)
    decoder.decoder_blocks = torch.nn.ModuleList(block(cfg.decoder_width, cfg.decoder_heads) for _ in range(cfg.decoder_depth))
    both = torch.nn.ModuleList([encoder, decoder]).to(device)
    groups = {True: [], False: []}
    for name, parameter in both.named_parameters():
        groups[decays(name, parameter)].append(parameter)
    groups = [{"params": some, "weight_decay": cfg.weight_decay * whether} for whether, some in groups.items()]
    optimizer = torch.optim.AdamW(groups, lr=1e-9, betas=(mlo_mae.BETA1, mlo_mae.BETA2), fused=True)

    def made():
        uniform = torch.rand(len(step.images), step.mask.shape[1]).to(device)
        keep, restore, mask = mlo_mae.select_patches(uniform, step.keep.shape[1])
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            pred = decoder(encoder(step.images, keep), restore)
        loss = (mlo_mae.patch_loss(pred, step.images, mask) * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return made


LAUNCHED, WITHOUT = "plain MAE step, in one launch", "outer iteration, kernels off"  # parts that a GPU has


def parts_of(net: Networks, arguments: Problem) -> dict[str, Callable]:
    """{name: call}: what a mask update is compared with, itself, and the parts of an outer iteration. Directions and
    cotangents are stand-ins of the right shape: no time depends on their values."""
    theta, psi, head, labelled, steps = arguments
    step, looked_at = steps[-1], mlo_mae.joined(steps)  # (9) and (10) are taken over the latest batches
    split, cfg = net.encoder_size, net.cfg
    plain = dataclasses.replace(net, cfg=dataclasses.replace(cfg, masking="random"), replay=None)
    own = mlo_mae.copied(theta)

    def level1(net):
        return mlo_mae.level1_step(net, own, psi, step.images, step.rates, 0, 0, in_place=True)  # as most steps are made

    def step_of_masks(gradient):
        level = Level(psi, gradient, gradient.square(), 3)
        return mlo_mae.adamw(level, gradient, Rates(1e-3, torch.zeros_like(gradient)))

    def mask_update():
        form = mlo_mae.HYPERGRADIENTS[cfg.hypergradient]
        return step_of_masks(form(net, theta, psi, head, labelled, [looked_at]).hypergradient)

    def encoder_pass():
        params = theta.params[:split].detach().requires_grad_()
        return torch.autograd.grad(mlo_mae.upper_levels(net, params, head, labelled)[0], params)

    def pullback():
        cotangent = mlo_mae.params_only(step.gradient[:split])
        return mlo_mae.adamw_pullback(step.theta, step.gradient, step.rates, cfg.update_jacobian, cotangent, whole=False)

    def masking():
        psi_leaf = psi.detach().requires_grad_()
        prob = mlo_mae.weights_of(net, psi_leaf, looked_at)
        return step_of_masks(torch.autograd.grad(mlo_mae.level1_loss(prob, looked_at.mask, prob.detach()), psi_leaf)[0])

    launched = {}
    if net.replay:
        at_once = dataclasses.replace(plain, replay=mlo_mae.in_one_launch(plain, step.rates.decay))
        launched = {LAUNCHED: lambda: level1(at_once)}
    return launched | {
        "plain MAE step": lambda: level1(plain),
        "mask update": mask_update,
        "level-1 step": lambda: level1(net),
        "levels 2 and 3: encoder": encoder_pass,
        "AdamW's Jacobian": pullback,
        "jvp of the autoencoder": lambda: mlo_mae.directional_errors(net, looked_at, step.gradient[:split]),
        "T: backward and step": masking,
    }


def training_images(cfg: Config, size: int, device: torch.device, folder: str | Path) -> data.Images | data.Folder:
    """Random images as the preset reads them: decoded from JPEG files of ImageNet's usual 500 x 375 in `folder`, or
    resident and augmented, as CIFAR's are."""
    if cfg.data != "imagenet":
        images = torch.randint(256, (1024, 3, size, size), dtype=torch.uint8)
        return data.Images(images, torch.arange(1024) % 10, (0.5,) * 3, (0.25,) * 3, device=device)
    for number in range(max(512, 4 * cfg.batch_size)):
        path = Path(folder, "train" if number > 3 else "val", str(number % 2), f"{number}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(256, size=(25, 33, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return data.load(folder, "", image_size=size, workers=cfg.workers, device=device).train


def input_rate(split: data.Images | data.Folder, cfg: Config, device: torch.device) -> float:
    """Images a second that reading delivers with nothing else to do, once what was decoded ahead is used up."""
    stream, count = split.stream(cfg.batch_size, 1), 2 * cfg.workers + 4

    def read():
        for _ in range(count):
            next(stream)

    read()
    return count * cfg.batch_size / measure.seconds(read, device)


def run_step(options: argparse.Namespace, device: torch.device, page: Page) -> dict:
    """One outer iteration and its parts, the floor of a mask update, and the projection of the preset's whole run."""
    if options.profile:
        check_free(options.profile)  # rather fail now than after the measurements
    preset = options.preset or "shapes"
    given = {"precision": options.precision} if options.precision else {}
    cfg = mlo_mae.with_precision(Config(**{"preset": preset} | mlo_mae.PRESETS[preset] | given), device)
    batch = options.batch_size or cfg.batch_size
    labelled = max(1, round(cfg.labelled_batch_size * batch / cfg.batch_size))
    cfg = dataclasses.replace(cfg, batch_size=batch, labelled_batch_size=labelled)
    with tempfile.TemporaryDirectory() as folder:  # for the images of presets that decode files
        split = training_images(cfg, cfg.image_size or 32, device, folder)
        whole, rows, summary = measure_step(cfg, split, options.repeats, device, page)
    page.record(*rows.values())
    page.say(*step_text(cfg, rows, summary))
    if options.profile:
        whole()  # records
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with profile(activities=activities) as record:
            whole()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / options.profile.name  # whose ending says whether to compress
            record.export_chrome_trace(str(trace))
            write_whole(options.profile, trace.read_bytes())
    return {"rows": page.rows, "summary": summary}


def measure_step(
    cfg: Config, split: data.Images | data.Folder, repeats: int, device: torch.device, page: Page
) -> tuple[Callable, dict[str, dict], dict]:
    """(the outer iteration as a call, {part: row}, what follows from the rows). What is only compared with may fail. The page
    gets memory and times as soon as they are there."""
    net, arguments = problem(cfg, cfg.image_size or 32, device, cfg.mask_batches, warm=2)
    theta, psi, head, _, _ = arguments
    state, rates = mlo_mae.State(0, theta, head, mlo_mae.fresh_level(psi, device)), mlo_mae.rates_of(net, device)
    off = dataclasses.replace(net)  # for kernels off: a recording has them on or off

    def record(wanted: bool):
        for some in (net, off):
            some.replay = mlo_mae.in_one_launch(some, rates[0][0]) if wanted and device.type == "cuda" else None

    record(True)
    batch, labelled, compared = cfg.batch_size, cfg.labelled_batch_size, parts_of(net, arguments)
    streams = mlo_mae.Streams(*(split.stream(n, 0) for n in (batch, labelled, labelled)))
    if isinstance(split, data.Images):
        covered = mlo_mae.moved_weights(mlo_mae.coverage(split).stream(batch, 0), cfg.patch_size)
        streams = streams._replace(covered=covered)

    def whole(net: Networks = net):
        return mlo_mae.outer_iteration(net, state, streams, 1000, *rates)

    def without_kernels():
        with kernels.use("reference"):
            return whole(off)

    def batches():
        drawn = [streams.level1, streams.covered] * cfg.level1_steps + [streams.level2, streams.level3]
        return [next(stream) for stream in drawn if stream]

    calls, rows = {"outer iteration": whole, "data": batches} | compared, {}
    has_kernels = device.type == "cuda" and "triton" in sys.modules

    def tried(name: str, function: Callable) -> Any:
        """function(); where it fails, and is only compared with, None, and a line that says so."""
        try:
            return function()
        except Exception as failure:
            if name not in (*RIVALS, WITHOUT) or isinstance(failure, ImportError):
                raise
            for found in (calls, rows):
                found.pop(name, None)
            page.wrong.append(f"{name}: {type(failure).__name__}: {first_line(failure, 1000)}")

    for name, block in RIVALS.items():
        with contextlib.suppress(ImportError):  # of timm
            if made := tried(name, lambda block=block: rival_step(cfg, arguments[-1][-1], block)):
                calls[name] = made
    if has_kernels:
        calls[WITHOUT] = without_kernels
    record(False)  # a replay allocates nothing
    counted = calls | {name: calls["plain MAE step"] for name in calls if name == LAUNCHED}
    for name, call in counted.items():
        if measured := tried(name, lambda call=call: peak_memory(call, device)):
            rows[name] = {"part": name, "peak_bytes": measured[1]}
    page.append({"so_far": [*rows.values()]})
    record(True)
    for name, call in [*calls.items()]:
        tried(name, lambda call=call: measure.seconds(call, device))  # the warm-up, which records
    for name, times in interleaved(lambda: calls, repeats, device).items():
        rows[name] |= quartiles(times)
    page.append({"so_far": [*rows.values()]})
    rivals = [name for name in RIVALS if name in calls]
    parts = [name for name in compared if not name.startswith(("plain MAE step", "mask update"))]
    once = dict.fromkeys(["data", *parts], 1) | {"level-1 step": cfg.level1_steps}
    ceiling = product_rate(device, DTYPES[cfg.precision], torch.float32)  # a CPU may well be slower in bfloat16
    for name, row in rows.items() if device.type == "cuda" else ():
        row["host_seconds"] = min(measure.host_seconds(calls[name]) for _ in range(3))
    record(False)  # nor does it run an operator that could be counted
    for name, row in rows.items():  # how often an outer iteration makes this part; what is only compared with: never
        row |= {"times": once.get(name, 0), "flops": operations(counted[name]), "operators": operators(counted[name])}
    names = ("outer iteration", "mask update", "plain MAE step", "level-1 step")
    record(True)
    total, update, plain, weighed = (rows[name] for name in names)
    launched = rows.get(LAUNCHED, plain)  # as a run makes them
    for row in rows.values():
        row["share_of_time"] = row["times"] * row["seconds"] / total["seconds"]
        row["share_of_flops"] = row["times"] * row["flops"] / total["flops"]
        row["share_of_peak"] = row["flops"] / row["seconds"] / ceiling
    time_ratio, operation_ratio = (update[name] / plain[name] for name in ("seconds", "flops"))
    updates = math.ceil(cfg.epochs * TRAINING_IMAGES[cfg.data] * (1 - cfg.val_fraction) / (batch * cfg.level1_steps))
    # A run's parts, as (share of it, seconds of an outer iteration, images that this reads): before T, while it learns, and
    # with T as it is, which images in memory need not ask any more. Without --mask-start and --mask-until: the second alone.
    # A T that waits (--mask-wait) makes the second longer.
    reads, inside = batch * cfg.level1_steps, cfg.mask_until - cfg.mask_start
    parts = [(cfg.mask_start, cfg.level1_steps * launched["seconds"], reads), (inside, total["seconds"], reads + 2 * labelled)]
    late = launched if isinstance(split, data.Images) else weighed
    parts.append((1 - cfg.mask_until, cfg.level1_steps * late["seconds"], reads))
    pace = sum(share * seconds for share, seconds, _ in parts)
    summary = {
        "preset": cfg.preset,
        "precision": cfg.precision,
        "kernels": has_kernels,
        "batch_size": batch,
        "labelled_batch_size": labelled,
        "images_per_second": reads / pace,
        "peak_bytes": total["peak_bytes"],
        "time_ratio": time_ratio,
        "operation_ratio": operation_ratio,
        "overhead": time_ratio / operation_ratio,
        "best_rival": (best := min(rivals, key=lambda name: rows[name]["seconds"], default=None)),
        "rival_ratio": best and plain["seconds"] / rows[best]["seconds"],
        "peak_flops": ceiling,
        "updates": updates,
        "hours": updates * pace / 3600,
        "input_images_per_second": input_rate(split, cfg, device),
        "needed_images_per_second": max(images / seconds for share, seconds, images in parts if share > 0),
    }
    return whole, rows, summary


def step_text(cfg: Config, rows: dict[str, dict], summary: dict) -> list[str]:
    """The table of the parts, and what follows from it."""
    lines = [["part", "times", "ms", "host, ms", "MiB", "operators", "GFLOP", "of peak", "of the time", "of the operations"]]
    for row in rows.values():
        work, peak = (f"{row['flops'] / 1e9:.3g}", f"{100 * row['share_of_peak']:.0f}%") if row["flops"] else "--"
        shares = [f"{100 * row[f'share_of_{name}']:.0f}%" if row["times"] else "-" for name in ("time", "flops")]
        milliseconds, mebibytes = measure.shown_cost(row)
        host = f"{1e3 * row['host_seconds']:.4g}" if "host_seconds" in row else "-"
        costs = [milliseconds, host, mebibytes, str(row["operators"])]
        lines.append([row["part"], str(row["times"] or "-"), *costs, work, peak, *shares])
    patches = ((cfg.image_size or 32) // cfg.patch_size) ** 2
    before, after = (100 * share for share in (cfg.mask_start, 1 - cfg.mask_until))
    plain = f", the first {before:.0f} % of them plain MAE steps" if before else ""
    kept = f", the last {after:.0f} % level-1 steps under the T that was learned" if after else ""
    kept += ", with a T that never waits" if cfg.mask_wait else ""
    source = f"JPEG files, {cfg.workers} processes" if cfg.workers else "from memory"
    rival = "No rival's step could be measured."
    if best := summary["best_rival"]:
        of = f"the faster rival's ({best.removeprefix('rival: ')}, with torch's fused AdamW)"
        rival = f"A plain MAE step takes {summary['rival_ratio']:.2f}x the time of {of}."
    off = "" if summary["kernels"] else " No Triton on this device: kernels are off."
    return [
        "",
        f"{cfg.preset}: width {cfg.width}, depth {cfg.depth}, {patches} patches, batches of {cfg.batch_size} and twice "
        f"{cfg.labelled_batch_size}, {cfg.level1_steps} level-1 steps a mask update, {described(cfg)}, {cfg.precision}",
        "",
        *measure.table(lines).splitlines(),
        "",
        f"A mask update takes {summary['time_ratio']:.2f}x the time of a plain MAE step and "
        f"{summary['operation_ratio']:.2f}x its operations: {summary['overhead']:.2f}x the time that as many of its own take.",
        rival,
        f"{summary['updates']} outer iterations, the whole run of this preset, take {summary['hours']:.2f} hours at this pace"
        f"{plain}{kept}: {summary['images_per_second']:.0f} images a second.",
        f"Reading by itself ({source}) delivers {summary['input_images_per_second']:.0f} images a second; levels 1 to 3 take "
        f"{summary['needed_images_per_second']:.0f}.",
        f"Peak: a large matrix product's {summary['peak_flops'] / 1e9:.3g} GFLOP/s. Parts are timed apart.{off}",
        "Host: until a GPU has been told all. Operators: torch's, on the plain operations, without views. MiB, too: of steps "
        "that are not started in one launch. Where the GPU takes longer than Python, none is, and both rows are one thing.",
    ]


# -------------------------------------------------------------------------------------------------------- kernels


def shown_times(rows: list[dict]) -> dict[str, str]:
    """{implementation: milliseconds, and half the distance between the quartiles}, of those that were timed."""
    timed = {row["implementation"]: row for row in rows if math.isfinite(row["seconds"])}
    spread = {name: (row["seconds_q3"] - row["seconds_q1"]) / row["seconds"] / 2 for name, row in timed.items()}
    return {name: f"{1e3 * row['seconds']:.3g} ±{spread[name]:.1%}" for name, row in timed.items()}


def run_kernels(options: argparse.Namespace, device: torch.device, page: Page) -> dict:
    """Every kernel, shape, dtype and direction; wrong where ours errs more than twice as much as eager PyTorch."""
    gpu, rivals = device.type == "cuda", ["eager", "compile", *SDPA]
    batch = options.batch_size or (128 if gpu else 4)
    titles = ["kernel", "shape", "dtype", "direction", "ours, ms", *rivals, "speedup", "rate", "copy, ms", "of ceiling"]
    page.start(titles, [14, 39, 5, 9, *[12] * (1 + len(rivals)), 7, 15, 12, 10])
    torch.manual_seed(0)
    for dtype in options.dtypes or DTYPES:
        most = product_rate(device, DTYPES[dtype], torch.float32)
        for case in (case for name in options.shapes or USUAL for case in cases(name, batch, DTYPES[dtype], device)):
            if case.kernel not in (options.kernels or KERNELS):
                continue
            for direction, (moved, made) in case.work.items():
                what = {"kernel": case.kernel, "shape": case.shape, "dtype": dtype, "direction": direction}
                try:
                    found, error = race(case, direction, options.compile, options.repeats, device)
                except Exception as failure:  # one comparison that cannot be made does not end the others
                    error = f"{type(failure).__name__}: {first_line(failure, 1000)}"
                    page.append(what | {"failed": error})
                    page.wrong.append(f"{' '.join(what.values())}: {error}")
                    continue
                ours, times = found[0], {row["implementation"]: row["seconds"] for row in found}
                best = min(times[name] for name in times if name not in ("ours", "copy") and math.isfinite(times[name]))
                floor, work, unit = max((times["copy"], moved, "GB/s"), (made / most, made, "GFLOP/s"))
                ours |= {"rate": work / ours["seconds"], "share_of_ceiling": floor / ours["seconds"]}
                ours["speedup"] = math.nan if error else best / ours["seconds"]
                page.record(*(what | row for row in found))
                page.wrong += [f"{' '.join(what.values())}: {error}"] if error else []
                shown = shown_times(found)
                each = [shown.get(name, "-") for name in ("ours", *rivals)]
                verdict = "WRONG" if error else f"{ours['speedup']:.2f}"
                rate = f"{ours['rate'] / 1e9:.3g} {unit}"
                page.row([*what.values(), *each, verdict, rate, shown["copy"], f"{100 * ours['share_of_ceiling']:.0f}%"])
    where = f"No GPU here: ours IS the reference path, at batch {batch}."
    if gpu:
        where = "The device's time, without Python's: calls in a row are a CUDA graph, on inputs that no cache holds (but for "
        where += "select_patches')."
    page.say(
        "",
        f"ms: medians of {options.repeats} runs of calls in a row, on new inputs each time, ± half the distance between the "
        "quartiles. Speedup: over the best rival. Rate and ceiling: of the bytes that must move, beside a plain copy that "
        "moves as many, or of the operations that must be made, beside a large matrix product's, whichever takes longer. "
        "-: refused, out of memory, or not run; torch.compile runs where it might fuse better, "
        f"{', '.join(sorted(COMPILED))}. {where}",
    )
    return {"rows": page.rows}


# ------------------------------------------------------------------------------------------------- rates, and gpu


def run_rates(options: argparse.Namespace, device: torch.device, page: Page) -> dict:
    """What a large copy and a large matrix product reach: what other rates are compared with."""
    page.start(["what", "rate"], [24, 14])
    page.record({"what": "copy", "bytes_per_second": (rate := measure.copy_rate(device))})
    page.row(["copy, read and written", f"{rate / 1e9:.4g} GB/s"])
    for name, dtype in DTYPES.items():
        page.record({"what": "matrix product", "dtype": name, "flops_per_second": (rate := product_rate(device, dtype))})
        page.row([f"matrix product, {name}", f"{rate / 1e12:.4g} TFLOP/s"])
    return {"rows": page.rows}


def gpu_commands(device: torch.device, out: Path) -> dict[str, list[str]]:
    """{name: flags of this program}: what is worth measuring on a GPU, first what other numbers rest on. On a CPU, where
    this is only tried, the same at tiny sizes."""
    if device.type == "cpu":
        lines = ("hypergradient --sizes tiny", "step --batch-size 2", "kernels --shapes tiny --dtypes fp32 --no-compile")
        return {"rates": ["rates"]} | {line.split()[0]: line.split() for line in lines}
    runs = ("cifar100", "bf16"), ("shapes", "bf16"), ("shapes", "fp32"), ("cifar100", "fp32"), ("imagenet", "bf16")
    steps = {f"step-{preset}-{kind}": ["step", "--preset", preset, "--precision", kind] for preset, kind in runs}
    trace = out / "step-cifar100-bf16-trace.json.gz"
    steps["step-cifar100-bf16"] += [] if trace.exists() else ["--profile", str(trace)]
    forms = {f"hypergradient-{size.replace('/', '')}": ["hypergradient", "--sizes", size] for size in SIZES}
    heavy = ["attention", "patch_loss"]
    races = {
        f"kernels-{words[0]}-{shape}-{dtype}": ["kernels", "--shapes", shape, "--dtypes", dtype, "--kernels", *words]
        for words in (heavy, [name for name in KERNELS if name not in heavy])
        for dtype in DTYPES
        for shape in USUAL
    }
    commands = {"rates": ["rates"]} | steps | forms | races
    first = ["rates", "step-cifar100-bf16", "step-shapes-bf16", "hypergradient-solved", "hypergradient-vit-b2", *races]
    return {name: commands[name] for name in dict.fromkeys((*first, *commands))}


def run_gpu(options: argparse.Namespace, device: torch.device, page: Page) -> dict:
    """`gpu_commands`, each in a process of its own: a fault that ends one, as a wrong kernel can, spares the others.

    In the folder --out, NAME.jsonl has the rows of a command, each as soon as it is there, and a last one that says how it
    ended; NAME.txt has what it printed. A command that gave its report is not run again, and nothing is overwritten. --only
    names some of them."""
    began, out, commands = time.monotonic(), options.out, gpu_commands(device, options.out)
    if unknown := set(options.only or ()) - set(commands):
        raise UserError(f"--only {sorted(unknown)[0]} is not among {', '.join(commands)}")
    out.mkdir(parents=True, exist_ok=True)
    page.start(["measured", "seconds", "rows", "ended"], [max(map(len, commands)), 7, 5, 40])
    for name in options.only or commands:
        path, flags = out / f"{name}.jsonl", commands[name]
        before = read_rows(path) if path.exists() else []
        left = options.seconds - (time.monotonic() - began)
        ended = [row.get("reason", "") for row in before if row.get("reported")]
        if ended:
            page.row([name, "-", "-", ended[-1] or "before"])
            page.wrong += [f"{name}: {ended[-1]}"] if ended[-1] else []
            continue
        if left < 1:
            page.row([name, "-", "-", "no time left"])
            break
        flags += ["--device", device.type, "--repeats", str(options.repeats), "--rows", str(path)]
        end = supervised(flags, out / f"{name}.txt", left)
        append_line(path, end)
        page.record({"measured": name} | end)
        found = read_rows(path)[len(before) :]
        count = max(0, sum("so_far" not in row for row in found) - 2)  # less the command's line, and the end's
        page.row([name, f"{end['seconds']:.0f}", str(count), end["reason"] or "well"])
        page.wrong += [f"{name}: {end['reason']}"] if end["reason"] else []
    return {"rows": page.rows}


def supervised(flags: list[str], log: Path, limit: float) -> dict:
    """Run this program with these flags, what it prints going to the end of `log`, for at most `limit` seconds. A row: whether
    it gave its report, its exit status (None: cut off), why that is not 0, and the seconds it took."""
    began, status = time.monotonic(), None
    with open(log, "a+") as file:
        start = file.tell()
        with contextlib.suppress(subprocess.TimeoutExpired):
            words = [sys.executable, __file__, *flags]
            status = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
        file.seek(start)
        lines = [line for line in file.read().splitlines() if line]
    reported = bool(lines) and lines[-1].startswith('{"command"')
    said = next((line for line in reversed(lines) if not line.startswith("{")), f"exit status {status}")
    reason = f"cut off after {limit:.0f} s" if status is None else printable(said, 200) if status else ""
    return {"reported": reported, "status": status, "reason": reason, "seconds": time.monotonic() - began}


# --------------------------------------------------------------------------------------------------- command line

USUAL = ["cifar", "imagenet"]  # shapes of kernels


def add_hypergradient_flags(parser: argparse.ArgumentParser, more: Iterable[str] = ()) -> None:
    """The flags of `hypergradient` beside those of every program that measures; more: names of methods beside METHODS."""
    sizes = "default: all; without a GPU, not vit-b/2, and bfloat16 at tiny alone"
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help=sizes)
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, *more], help="these, exact, and their judges (default: all)"
    )
    parser.add_argument("--plot", type=Path, help="where to write the picture (with --save: beside the table)")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = cli.Parser(prog="bench.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="command", required=True, metavar="VERB")

    def add(verb, work, meaning):
        measure.add_flags(made := verbs.add_parser(verb, help=meaning, description=meaning), verb, work)
        return made

    forms = add("hypergradient", run_hypergradient, "the forms of the hypergradient against autograd")
    add_hypergradient_flags(forms)
    whole = add("step", run_step, "one outer iteration, its parts and its floor")
    whole.add_argument("--preset", choices=list(mlo_mae.PRESETS), help="whose sizes (default shapes)")
    whole.add_argument("--batch-size", type=measure.positive, help="of level 1; levels 2 and 3 keep their ratio to it")
    whole.add_argument("--precision", choices=list(DTYPES), help="default: the preset's")
    whole.add_argument("--profile", type=Path, help="where to write a trace for chrome://tracing (.gz: compressed)")
    each = add("kernels", run_kernels, "each kernel against the best that PyTorch offers")
    each.add_argument("--kernels", nargs="+", choices=KERNELS, help="default: all")
    each.add_argument("--shapes", nargs="+", choices=list(GEOMETRY), help=f"default: {' '.join(USUAL)}")
    each.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default: both")
    each.add_argument("--batch-size", type=measure.positive, help="default 128, on a CPU 4")
    compiles = {"action": argparse.BooleanOptionalAction, "default": torch.cuda.is_available()}
    each.add_argument("--compile", help="race torch.compile too (default: where there is a GPU)", **compiles)
    add("rates", run_rates, "what this machine copies and multiplies at best")
    everything = add("gpu", run_gpu, "all of this at the sizes that matter on a GPU, in order")
    everything.add_argument("--out", type=Path, required=True, help="folder that gets the rows")
    everything.add_argument("--only", nargs="+", metavar="NAME", help="these of them (default: all)")
    everything.add_argument("--seconds", type=measure.positive, default=540, help="most that it may take (default 540)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, 1 after a wrong result, 2 after one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return measure.run("bench", f"python bench.py {shlex.join(argv)}", lambda: parse(argv))


if __name__ == "__main__":
    sys.exit(main())
