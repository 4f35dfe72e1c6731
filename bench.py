"""Benchmarks of MLO-MAE: what is exact, what it costs, and what it could cost at best.

    python bench.py hypergradient    # every form of dL3/dpsi (and Betty's, where it is installed) against autograd
    python bench.py kernels          # each kernel against the best that PyTorch offers
    python bench.py step             # one outer iteration, its parts, and its floor
    python bench.py tiles            # attention in the tiles in use against the neighbouring ones (GPU)

Each prints the machine, a table row by row, and one last line of compact JSON; --save writes what is printed under
benchmarks/, as it comes, so that a run that is cut short leaves what it had.
Times are medians (with quartiles) of interleaved runs after a warm-up. A number that was not measured is not printed.
Exit status: 0; 1 where a result is further from the truth than it may be; 2 for what the user can mend.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import logging
import math
import os
import platform
import re
import shlex
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory on a CPU, is chatty

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import data
import kernels
import mlo_mae
from mlo_mae import Config, Level, Rates

with contextlib.suppress(ImportError):  # the engine under the published code (PyPI: betty-ml), a row where it is installed
    import betty.configs, betty.engine, betty.problems  # noqa: E401

# ------------------------------------------------------------------------------------------------------ measuring


def seconds(call, device):
    """Wall time of one call, in seconds, with the device idle at both ends."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(fresh, repeats, device):
    """{name: [seconds]} of the calls {name: function} that `fresh` returns, made in turn, so that a disturbance of the
    machine falls on all of them alike. `fresh` is called before each round, outside the timing, to draw new inputs."""
    times = {}
    for repeat in range(repeats):
        calls = fresh()
        for name in list(calls)[:: -1 if repeat % 2 else 1]:
            times.setdefault(name, []).append(seconds(calls[name], device))
    return times


def quartiles(values):
    """{"seconds": median, "seconds_q1", "seconds_q3"}."""
    median, q1, q3 = np.quantile(values, (0.5, 0.25, 0.75)).tolist()
    return {"seconds": median, "seconds_q1": q1, "seconds_q3": q3}


def peak_memory(call, device):
    """(what the call returns, the most bytes that it held at once beyond those in use before it)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return result, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    held = peak = 0
    for event in record.profiler.kineto_results.events():  # allocations (+) and releases (-), in order
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return result, peak


def operations(call):
    """Floating-point operations of the matrix products of a call, on the plain operations that the counter knows."""
    with kernels.use("reference"), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def product_rate(device, dtype):
    """Operations a second of a large matrix product on this machine, in the faster of dtype and float32."""
    side, calls = 8192 if device.type == "cuda" else 1024, {}
    for kind in {dtype, torch.float32}:  # a CPU may well be slower in bfloat16
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        calls[kind] = lambda a=a, b=b: a @ b
    interleaved(lambda: calls, 2, device)
    return 2 * side**3 / min(map(min, interleaved(lambda: calls, 5, device).values()))


def machine(device):
    """{name: text or number}: all that a time depends on beside the program."""
    cpu, kind = platform.processor() or platform.machine(), None
    with contextlib.suppress(OSError, TypeError):
        text = Path("/proc/cpuinfo").read_text()
        cpu = re.search(r"model name\s*: (.*)", text)[1]
        kind = "/".join(re.search(rf"{name}\s*: (\d+)", text)[1] for name in ("family", "model"))  # where a name covers several
    triton = sys.modules.get("triton")
    return {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None, "cpu": cpu, "family/model": kind,
        "threads": torch.get_num_threads(), "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton and triton.__version__,
    }  # fmt: skip


def table(rows, widths=None):
    """Rows of text, the first one the titles, as markdown that is aligned for reading as it is."""
    widths = widths or [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (rows[0], rule, *rows[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Page:
    """What a verb says: on the screen at once, and in a file (or None), whole after every line."""

    def __init__(self, path, lines):
        self.path, self.lines = path, lines

    def say(self, *lines):
        print("\n".join(lines), flush=True)
        self.lines += lines
        if self.path:
            mlo_mae.write_whole(self.path, "\n".join([*self.lines, ""]).encode())

    def start(self, titles, least):
        """Begin a table whose rows come one by one, by `row`; its columns are as wide as the titles, and at least `least`."""
        self.widths = [max(len(title), width) for title, width in zip(titles, least)]
        self.say("", *table([titles], self.widths).splitlines())

    def row(self, cells):
        self.say(table([cells], self.widths).splitlines()[0])


def shown_cost(row):
    """Milliseconds as median [first quartile, third], and MiB."""
    median, q1, q3 = (f"{1e3 * row[name]:.4g}" for name in ("seconds", "seconds_q1", "seconds_q3"))
    return f"{median} [{q1}, {q3}]", f"{row['peak_bytes'] / 2**20:.1f}"


# -------------------------------------------------------------------------------------------------- hypergradient

LIMIT = {"float32": 1e-4, "float64": 1e-12}  # relative error of `exact` that its dtype allows
NOISE = 0.5  # cosine with the truth below which a direction is called noise

# T, head and steps as published, with which finite differences go too; batches of levels 1, and 2 and 3, where a size has none.
PUBLISHED = dict(head_norm="layer", masking_network="mlp", masking_width=512, mask_noise=0.0, level1_steps=2, head_steps=1,
                 batch_size=128, labelled_batch_size=64)  # fmt: skip
# Image size in pixels, and settings of Config. "small" has the networks of mlo_mae.py's default run.
SIZES = {
    "tiny": (16, dict(width=32, depth=2, heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2, masking_width=64,
                      batch_size=16, labelled_batch_size=16)),
    "small": (32, {}),
    "medium": (32, dict(width=192, depth=6, heads=3, decoder_width=128, batch_size=16, labelled_batch_size=16)),
    "vit-b/2": (32, mlo_mae.CIFAR | dict(batch_size=16, labelled_batch_size=16)),
}  # fmt: skip


class Method(NamedTuple):
    """One row: a form of the hypergradient, the settings it runs with, and how many level-1 steps it is to explain."""

    label: str
    form: str  # a key of mlo_mae.HYPERGRADIENTS, or "betty"
    settings: dict = {}  # of Config
    judged: int = 1  # level-1 steps that the judge unrolls
    given: int = 1  # level-1 steps that the form is given


REDRAWN, IDENTITY, HALF = {"redraw_dropout": True}, {"update_jacobian": "identity"}, {"precision": "bf16"}
METHODS = {
    "exact": Method("exact", "exact"),
    "unrolled": Method("unrolled autograd", "unrolled"),
    "finite-difference": Method("finite differences", "finite-difference"),
    "redrawn": Method("finite differences, dropout redrawn", "finite-difference", REDRAWN),
    "published": Method("as published: redrawn, and dU/dg = -1", "finite-difference", REDRAWN | IDENTITY),
    "identity": Method("exact but for dU/dg = -1", "exact", IDENTITY),
    "first-order": Method("first-order (L2's curvature left out)", "first-order"),
    "exact-bf16": Method("networks in bfloat16: exact", "exact", HALF),
    "finite-difference-bf16": Method("networks in bfloat16: finite differences", "finite-difference", HALF),
    "exact-2": Method("two steps: exact", "exact", {}, 2, 2),
    "unrolled-2": Method("two steps: unrolled autograd", "unrolled", {}, 2, 2),
    "last-of-2": Method("two steps: exact, of the last alone", "exact", {}, 2, 1),
}
if "betty.problems" in sys.modules:
    METHODS["betty"] = Method("Betty's finite differences, dU/dg = -1", "betty")


def random_batches(cfg, size, count, device):
    """Endless data.Batch of smooth random images (noise on a coarse grid, and a little on every pixel), ten classes."""
    while True:
        coarse = F.interpolate(torch.randn(count, 3, 4, 4), size=(size, size), mode="bicubic")
        images = coarse + 0.1 * torch.randn(count, 3, size, size)
        yield data.Batch(images.to(device), torch.randint(10, (count,)).to(device))


def problem(cfg, size, device, count=2, warm=4):
    """(Networks, the arguments of a form of the hypergradient) as training makes them, in float32.

    `warm` outer iterations are really made, so that weights, moments and the head are not initial ones; then `count`
    level-1 steps, which the hypergradient is to explain."""
    cfg = dataclasses.replace(cfg, warmup=0.0, mask_start=0.0)  # masks are T's from the first
    net, params = mlo_mae.build(cfg, size, 3, classes=10)
    state = mlo_mae.State(0, *(mlo_mae.fresh_level(vector, device) for vector in params))
    decay, mask_rate = mlo_mae.level_decays(net, device), mlo_mae.inverse_fan_in(net.masking).to(device)
    torch.manual_seed(1)
    batches = [random_batches(cfg, size, n, device) for n in (cfg.batch_size, *[cfg.labelled_batch_size] * 2)]
    for _ in range(warm):
        state, _ = mlo_mae.outer_iteration(net, state, batches, 1000, decay, mask_rate)
    theta, steps, rates = state.theta, [], Rates(cfg.lr, decay[0])
    for number in range(count):
        images = next(batches[0]).images
        theta, step, _, _ = mlo_mae.level1_step(net, theta, state.psi.params, images, rates, 0, number)
        steps.append(step)
    dropout, redrawn = (
        mlo_mae.draw_dropout(cfg.dropout, (n, cfg.labelled_batch_size, cfg.width), 0, purpose).to(device)
        for n, purpose in ((cfg.head_steps, mlo_mae.DROPOUT), (2, mlo_mae.REDRAWN))
    )
    labelled = (*next(batches[1]), *next(batches[2]))
    given = mlo_mae.Labelled(*labelled, dropout, redrawn, Rates(cfg.head_lr, decay[1]))
    return net, (theta, state.psi.params, state.head, given, steps)


def to_double(tree):
    return tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree)


def in_double(net, arguments):
    """The same problem in float64: the same state before the level-1 steps, masks and dropout; the steps made again."""
    _, psi, head, given, steps = to_double(arguments)
    split, theta, made = net.encoder_size, steps[0].theta, []
    for step in steps:
        params = theta.params.clone().requires_grad_()
        prob = mlo_mae.masking_probability(net, psi, step.images, theta.params[:split])
        loss = mlo_mae.level1_loss(prob, step.mask, mlo_mae.patch_errors(net, params[:split], params[split:], step))
        (gradient,) = torch.autograd.grad(loss, params)
        made.append(step._replace(theta=theta, gradient=gradient))
        theta = mlo_mae.adamw(theta, gradient, step.rates)
    return theta, psi, head, given, made


def by_betty(net, theta, psi, head, given, steps):
    """The hypergradient as Betty's engine computes it on our networks, losses, masks, dropout and AdamW steps; the engine
    is entered where the level-1 step has been made. Takes what the forms of mlo_mae do; of the Result, only the
    hypergradient is there.

    Betty puts -1 for dU/dg, takes central differences around the parameters after the steps, and follows the path from
    L3 through the head and the path past it one after the other, each with its own differences at level 1."""
    logging.getLogger("betty").disabled = True  # it reports on stdout
    head_before, step, split, found = head, steps[-1], net.encoder_size, []
    theta, phi, psi = (torch.nn.Parameter(x) for x in (theta.params.clone(), head.params.clone(), psi))  # T stays put

    def loss1(_):
        prob = mlo_mae.masking_probability(net, psi, step.images, theta[:split])
        return mlo_mae.level1_loss(prob, step.mask, mlo_mae.patch_errors(net, theta[:split], theta[split:], step))

    def loss2(_):
        features = mlo_mae.encode(net, theta[:split], given.images2)
        return mlo_mae.level2_loss(net, phi, features, given.labels2, given.dropout[0])

    def loss3(_):
        return mlo_mae.level3_loss(net, phi, mlo_mae.encode(net, theta[:split], given.images3), given.labels3)

    def head_step():
        phi.data = mlo_mae.adamw(head_before, phi.grad, given.rates).params

    def level(name, params, loss, update):
        module = torch.nn.ParameterList([params])
        module.to = lambda _: module  # Betty would choose the device
        optimizer = torch.optim.SGD([params], lr=0)  # a stand-in: Betty rebuilds AdamW with arguments that torch now refuses
        made = betty.problems.ImplicitProblem(name, betty.configs.Config(retain_graph=True), module, optimizer)
        made.get_batch, made.training_step, made.custom_optimizer_step = tuple, loss, update
        return made

    pretrain, finetune = level("pretrain", theta, loss1, None), level("finetune", phi, loss2, head_step)
    mask = level("mask", psi, loss3, lambda: found.append(psi.grad))
    above, below = {pretrain: [finetune, mask], finetune: [mask]}, {mask: [pretrain]}
    betty.engine.Engine([pretrain, finetune, mask], betty.configs.EngineConfig(), {"l2u": above, "u2l": below})
    mask.ready[mask.children.index(pretrain)], finetune.ready[0] = True, True  # as Betty sets them after a level-1 step
    finetune.step_normal()  # and then it calls this, which calls T's
    return mlo_mae.Result(found[0], None, None, None)


def bound(net, method, arguments):
    """One row's method as a call without arguments; it returns a mlo_mae.Result."""
    net = dataclasses.replace(net, cfg=dataclasses.replace(net.cfg, **method.settings))
    form = by_betty if method.form == "betty" else mlo_mae.HYPERGRADIENTS[method.form]
    return functools.partial(form, net, *arguments[:4], arguments[4][-method.given :])


def cost(net, arguments, methods, repeats, device):
    """({method: Result}, {method: peak bytes, operations, seconds}) of running every method."""
    calls = {name: bound(net, method, arguments) for name, method in methods.items()}
    results, costs = {}, {}
    for name, call in calls.items():
        results[name], peak = peak_memory(call, device)  # also the warm-up
        costs[name] = {"peak_bytes": peak, "flops": operations(call)}
    for name, times in interleaved(lambda: calls, repeats, device).items():
        costs[name] |= quartiles(times)
    return results, costs


def relative_error(found, judge):
    return float((found.double() - judge).norm() / judge.norm())


def run_hypergradient(options, device, page):
    """Every form at every size: error in both dtypes against autograd in float64, and cost in float32."""
    rows = []
    for size in options.sizes or ["tiny", "small", "medium"] + ["vit-b/2"] * (device.type == "cuda"):
        pixels, settings = SIZES[size]
        emulated = device.type == "cpu" and size != "tiny" and not options.sizes  # bfloat16 on a CPU: minutes, unless asked for
        methods = {name: method for name, method in METHODS.items() if not (emulated and method.settings == HALF)}
        cfg = Config(**PUBLISHED | settings)
        net, single = problem(cfg, pixels, device)
        double = in_double(net, single)
        precise = {name: bound(net, method, double)().hypergradient for name, method in methods.items()}
        judges = {method.judged: precise[name] for name, method in methods.items() if method.form == "unrolled"}
        results, costs = cost(net, single, methods, options.repeats, device)
        found = []
        for name, method in methods.items():
            judge, result = judges[method.judged], results[name].hypergradient.double()
            row = {"size": size, "method": name, "error_float32": relative_error(result, judge),
                   "error_float64": relative_error(precise[name], judge),
                   "cosine": float(F.cosine_similarity(result, judge, dim=0))}  # fmt: skip
            row |= {f"allowed_{dtype}": limit for dtype, limit in LIMIT.items()}
            exact = all(row[f"error_{dtype}"] <= row[f"allowed_{dtype}"] for dtype in LIMIT)
            row["verdict"] = "exact" if exact else "approximate" if row["cosine"] >= NOISE else "noise"
            found.append(row | costs[name])
        page.say("", f"{size}: width {cfg.width}, depth {cfg.depth}, {net.patches} patches, batches of {cfg.batch_size} "
                 f"and twice {cfg.labelled_batch_size}", "", *hypergradient_text(found))  # fmt: skip
        rows += found
    note = ("Error: |h - judge| / |judge|; the judge is autograd through the same steps in float64 (two steps: through both). "
            f"Exact: within {LIMIT['float64']:.0e} of it in float64, and within {LIMIT['float32']:.0e} in float32. Noise: "
            f"cosine below {NOISE}. Cosine, ms (median [quartiles] of {options.repeats}), MiB (the most held at once) and GFLOP "
            "(matrix products) are float32's. Networks in bfloat16: encoder and decoder under autocast, which leaves float64 as it "
            "is.")  # fmt: skip
    if "betty" in METHODS:
        note += (f" Betty {betty.__version__} runs our networks, batches, masks and AdamW steps, with dropout held. Its "
                 "own are dU/dg = -1, differences around the parameters after the steps, and a pass of level 1 for each of "
                 "two paths. Its MiB include a copy of the parameters, which it overwrites.")  # fmt: skip
    page.say("", note)
    wrong = [f"{row['method']} at {row['size']} in {dtype}: relative error {row['error_' + dtype]:.1e}, "
             f"allowed {row['allowed_' + dtype]:.0e}"
             for row in rows if row["method"] in ("exact", "exact-2")
             for dtype in LIMIT if not row["error_" + dtype] <= row["allowed_" + dtype]]  # fmt: skip
    grown, picture = [], options.plot or (options.save and saved_path(options, device, "png"))
    if picture:
        grown = growth(device, options.repeats)
        draw(rows, grown, picture)
    return {"rows": rows, "growth": grown}, wrong


def hypergradient_text(rows):
    """The table of one size, and what exact costs beside its rivals."""
    lines = [["method", "error, float32", "error, float64", "cosine", "verdict", "ms", "MiB", "GFLOP"]]
    for row in rows:
        method = METHODS[row["method"]]
        lines.append([
            method.label, f"{row['error_float32']:.1e}",
            "judge" if method.form == "unrolled" else f"{row['error_float64']:.1e}", f"{row['cosine']:.4f}",
            row["verdict"], *shown_cost(row), f"{row['flops'] / 1e9:.3g}",
        ])  # fmt: skip
    ours, *rivals = (row for row in rows if row["method"] in ("exact", "unrolled", "finite-difference"))
    ratios = ["{:.2f}x the time, {:.2f}x the memory and {:.2f}x the operations of {}".format(
        *(ours[name] / rival[name] for name in ("seconds", "peak_bytes", "flops")), METHODS[rival["method"]].label)
        for rival in rivals]  # fmt: skip
    return [*table(lines).splitlines(), "", f"exact takes {'; '.join(ratios)}."]


FORMS = {"exact": "#1a7f4b", "unrolled": "#4062bb", "finite-difference": "#d9822b"}  # and their colours
GROWTH = {"depth": (2, 4, 8), "batch": (16, 32, 64), "unrolled steps": (1, 2, 4)}


def growth(device, repeats):
    """How time and memory of three forms grow with depth, batch and unrolled steps, in float32: rows."""
    pixels, settings = SIZES["tiny"]
    rows = []
    for along, values in GROWTH.items():
        for value in values:
            changed = {"depth": {"depth": value}, "batch": {"batch_size": value, "labelled_batch_size": value}}
            steps = value if along == "unrolled steps" else 1
            cfg = Config(**PUBLISHED | settings | {"patch_size": 2} | changed.get(along, {}))
            net, arguments = problem(cfg, pixels, device, steps, warm=1)
            methods = {form: Method(form, form, {}, steps, steps) for form in FORMS}
            costs = cost(net, arguments, methods, repeats, device)[1]
            rows += [{"along": along, "value": value, "method": name, **row} for name, row in costs.items()]
    return rows


def draw(rows, grown, path):
    """Write the picture: error against time, one point a method, at the largest size; and how cost grows."""
    import matplotlib
    from matplotlib.figure import Figure

    size = rows[-1]["size"]
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axis, colours = left.subplots(), matplotlib.colormaps["tab20"].colors
    for row, colour in zip([row for row in rows if row["size"] == size], colours):
        method = METHODS[row["method"]]
        axis.scatter(1e3 * row["seconds"], row["error_float32"], s=70, color=colour, marker="os"[method.judged - 1],
                     label=method.label, zorder=3)  # fmt: skip
    axis.axhspan(1e-8, LIMIT["float32"], color="green", alpha=0.07, lw=0, label="what float32 allows")
    axis.set(xscale="log", yscale="log", xlabel="milliseconds", ylabel="relative error, judged by autograd in float64")
    axis.set_title(f"Error against cost ({size}; squares: two level-1 steps)", fontsize=11)
    left.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    panels = right.subplots(2, 3, sharex="col")
    for column, along in enumerate(dict.fromkeys(row["along"] for row in grown)):
        for line, (name, unit, scale) in enumerate((("seconds", "ms", 1e3), ("peak_bytes", "MiB", 2**-20))):
            axis = panels[line][column]
            for form, colour in FORMS.items():
                points = [(row["value"], scale * row[name]) for row in grown if (row["along"], row["method"]) == (along, form)]
                axis.plot(*zip(*points), marker="o", markersize=4, color=colour, label=METHODS[form].label)
            axis.set(xticks=[x for x, _ in points], ylim=(0, 1.35 * axis.dataLim.y1), ylabel=unit if column == 0 else None)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel(along)
    panels[0][0].legend(fontsize=8, frameon=False)
    right.suptitle("How cost grows (width 32, 64 patches; finite differences see one step)", fontsize=11)
    mlo_mae.save_figure(figure, Path(path))


# -------------------------------------------------------------------------------------------------------- kernels

SDPA = {"SDPA math": "MATH", "SDPA efficient": "EFFICIENT_ATTENTION", "SDPA flash": "FLASH_ATTENTION",
        "SDPA cuDNN": "CUDNN_ATTENTION"}  # fmt: skip
GEOMETRY = {"cifar": (32, 2), "imagenet": (224, 16)}  # image and patch size in pixels: ViT-B/2, ViT-B/16
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


COMPILED = {"attention", "patch_loss"}  # what torch.compile may fuse better than eager; the others gather or sort


class Case(NamedTuple):
    """One kernel at one shape. The first `variables` of `tensors`, which the functions take, are differentiated; `work`
    is the least that each direction costs: bytes moved, and operations of matrix products."""

    kernel: str
    shape: str
    tensors: tuple
    variables: int
    ours: Callable
    eager: Callable
    work: dict


def cases(geometry, batch, dtype, device):
    """Every kernel at the shapes of a ViT-B autoencoder: encoder 768 wide, decoder 512, a quarter of the patches visible."""
    modules = {name: sys.modules[f"kernels.{name}"] for name in ("attention", "loss", "patches", "tokens")}
    size, patch = GEOMETRY[geometry]
    length, values = (size // patch) ** 2, 3 * patch**2
    visible = length // 4

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, device=device).to(dtype)

    images, prob = normal(batch, 3, size, size), torch.rand(batch, length, device=device)
    keep, restore, mask = modules["tokens"].select_patches_reference(prob, visible)
    gather, select = modules["patches"].gather_patches_reference, modules["tokens"].select_patches_reference
    shown = batch * visible * values * images.element_size()  # bytes of the visible patches
    yield Case("gather_patches", f"{list(images.shape)} to {visible} of {values}", (images, keep), 1,
               lambda x, ids: kernels.gather_patches(x, ids, patch), lambda x, ids: gather(x, ids, patch),
               {"forward": (2 * shown, 0), "backward": (shown + images.nbytes, 0), "jvp": (4 * shown, 0)})  # fmt: skip
    yield Case("select_patches", f"{list(prob.shape)} to {visible}", (prob,), 0,
               lambda p: kernels.select_patches(p, visible), lambda p: select(p, visible),
               {"forward": (sum(x.nbytes for x in (prob, keep, restore, mask)), 0)})  # fmt: skip

    tokens, single = normal(batch, 1 + visible, 512), torch.float32  # embeddings are parameters, so float32
    embeddings = (normal(1, 1, 512, dtype=single), normal(1, 1 + length, 512, dtype=single))
    moved = tokens.nbytes + restore.nbytes + embeddings[1].nbytes + batch * (1 + length) * 512 * single.itemsize
    yield Case("scatter_tokens", f"{list(tokens.shape)} to {1 + length}", (tokens, *embeddings, restore), 3,
               kernels.scatter_tokens, modules["tokens"].scatter_tokens_reference,
               {"forward": (moved, 0), "backward": (moved, 0), "jvp": (2 * moved - restore.nbytes, 0)})  # fmt: skip

    pred, target = normal(batch, length, values), normal(batch, 3, size, size, dtype=single)
    hidden = (1 - visible / length) * pred.nbytes
    moved = hidden + (1 - visible / length) * target.nbytes + 2 * mask.nbytes
    yield Case("patch_loss", str(list(pred.shape)), (pred, target, mask), 1,
               kernels.patch_loss, modules["loss"].patch_loss_reference,
               {"forward": (moved, 0), "backward": (moved + pred.nbytes, 0), "jvp": (moved + hidden + mask.nbytes, 0)})  # fmt: skip

    for where, n, heads, d in (("encoder, visible", 1 + visible, 12, 64), ("encoder, all", 1 + length, 12, 64),
                               ("decoder", 1 + length, 16, 32)):  # fmt: skip
        product, qkv = 2 * batch * heads * n * n * d, normal(batch, n, 3, heads, d)
        once = qkv.nbytes // 3  # bytes of the output, or of one of queries, keys and values
        yield Case("attention", f"{list(qkv.shape)} {where}", (qkv,), 1,
                   kernels.attention, modules["attention"].attention_reference,
                   {"forward": (4 * once, 2 * product), "backward": (7 * once, 5 * product), "jvp": (8 * once, 6 * product)})  # fmt: skip


def pinned(backend):
    """Attention by one of PyTorch's own backends, which refuses rather than fall back."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def rival(qkv):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)

    return rival


def drawn(case, direction):
    """New inputs of a case (the variables drawn anew, the images of the rest shuffled), and what goes with them: the
    cotangent of the result, or the tangents of the variables."""
    variables, fixed = case.tensors[: case.variables], case.tensors[case.variables :]
    tensors = *map(torch.randn_like, variables), *(x[torch.randperm(len(x))] for x in fixed)
    if direction == "backward":
        return tensors, torch.randn_like(case.eager(*tensors))
    return tensors, tuple(map(torch.randn_like, variables))


def maker(direction, function, wrap, count):
    """A function of what `drawn` returns: it makes a call that runs one direction and returns its results; for a backward,
    it makes the forward. `count` of the tensors are variables. `wrap` compiles, or does nothing."""
    if direction == "jvp":
        pushed = wrap(lambda moving, fixed, tangents: torch.func.jvp(lambda *x: function(*x, *fixed), moving, tangents))
        return lambda tensors, tangents: torch.no_grad()(lambda: pushed(tensors[:count], tensors[count:], tangents))
    function = wrap(function)
    if direction == "forward":
        return lambda tensors, _: torch.no_grad()(lambda: function(*tensors))

    def backward(tensors, cotangent):
        moving = [x.detach().requires_grad_() for x in tensors[:count]]
        result = function(*moving, *tensors[count:])
        return lambda: torch.autograd.grad(result, moving, cotangent.to(result.dtype), retain_graph=True)

    return backward


def eager(function):
    return function


def compiled(function):
    from torch._functorch import config

    config.donated_buffer = False  # a compiled backward is run several times
    torch._dynamo.reset()  # its limit on recompilation counts over all cases
    return torch.compile(function, dynamic=False)


def copier(work, device):
    """A maker as `maker` returns: a plain copy that moves as many bytes as must move."""

    def make(*_):
        source = torch.randn(max(1, int(work[0]) // 8), device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return make


CACHE = 2**28  # bytes, several times what any GPU's last cache holds


def in_a_row(make, inputs, count, device):
    """A function that makes `count` calls, of the inputs in turn. On a GPU they are one CUDA graph, whose replay takes the
    device's time alone: Python and launches, which other work hides in a program, do not count."""

    def run(calls):
        for number in range(count):
            calls[number % len(calls)]()

    if device.type != "cuda":
        return functools.partial(run, [make(*each) for each in inputs])
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a backward runs on the stream of its forward
        calls = [make(*each) for each in inputs]
        run(calls)
    with torch.cuda.graph(graph, stream=stream):
        run(calls)

    def replay(held=calls):  # the graph reads and writes their tensors
        graph.replay()

    replay()  # the first one uploads the graph
    return replay


def repeats_of(call, device):
    """So many calls in a row, about 10 ms of them, that the clock does not matter."""
    return max(1, min(100, int(1e-2 / min(seconds(call, device) for _ in range(3)))))


def input_sets(case, direction, count, device):
    """Inputs for `count` calls to take in turn: as many draws as it takes that no cache of the device holds them."""
    inputs = [drawn(case, direction)]
    size = sum(x.nbytes for x in tree_leaves(inputs))
    more = 0 if device.type == "cpu" else min(count, CACHE // size) - 1
    return inputs + [drawn(case, direction) for _ in range(more)]


def largest_error(result, judge):
    """Of the tensors that a call returned, the largest relative error against those in float64."""
    return max(map(relative_error, tree_leaves(result), map(torch.Tensor.double, tree_leaves(judge))))


def compare(case, direction, compiles, repeats, device):
    """([one row an implementation, ours first and a plain copy of as many bytes last], what is wrong with ours or None)."""
    candidates = {"ours": case.ours, "eager": case.eager}
    candidates |= {"compile": case.eager} if compiles and case.kernel in COMPILED else {}
    if case.kernel == "attention":
        candidates |= {name: pinned(SDPA[name]) for name in (["SDPA math"] if direction == "jvp" else SDPA)}
    inputs = drawn(case, direction)
    judge = maker(direction, case.eager, eager, case.variables)(*to_double(inputs))()
    errors, makers, counts = {}, {}, {}
    for name, function in candidates.items():
        try:
            make = maker(direction, function, compiled if name == "compile" else eager, case.variables)
            call = make(*inputs)
            errors[name] = largest_error(call(), judge)
            count = repeats_of(in_a_row(make, [inputs], 1, device), device)
        except Exception:
            if name in ("ours", "eager"):
                raise
            continue  # rivals refuse, or run out of memory, in many ways
        makers[name], counts[name] = make, count
    makers["copy"], counts["copy"] = copier(case.work[direction], device), counts["ours"]

    def fresh():
        inputs = input_sets(case, direction, counts["ours"], device)
        return {name: in_a_row(make, inputs, counts[name], device) for name, make in makers.items()}

    times = interleaved(fresh, repeats, device)
    rows = [{"implementation": name, "error": errors.get(name, math.nan),
             **quartiles([t / counts[name] for t in times[name]] if name in times else [math.nan])}
            for name in [*candidates, "copy"]]  # fmt: skip
    if errors["ours"] <= 2 * errors["eager"]:
        return rows, None
    return rows, f"relative error {errors['ours']:.1e}, more than twice eager's {errors['eager']:.1e}"


def shown_times(rows):
    """{implementation: milliseconds, and half the distance between the quartiles}; those that were not timed are left out."""
    return {
        row["implementation"]: f"{1e3 * row['seconds']:.3g} ±{(row['seconds_q3'] - row['seconds_q1']) / row['seconds']:.1%}"
        for row in rows
        if math.isfinite(row["seconds"])
    }


def run_kernels(options, device, page):
    """Every kernel, shape, dtype and direction; wrong where ours errs more than twice as much as eager PyTorch."""
    gpu = device.type == "cuda"
    batch = options.batch_size or (128 if gpu else 4)
    rivals = ["eager", "compile", *SDPA]
    rows, wrong = [], []
    titles = ["kernel", "shape", "dtype", "direction", "ours, ms", *rivals, "speedup", "rate", "copy, ms", "of ceiling"]
    page.start(titles, [14, 39, 5, 9, *[12] * (1 + len(rivals)), 7, 15, 12, 10])
    torch.manual_seed(0)
    for dtype in options.dtypes:
        most = product_rate(device, DTYPES[dtype])
        for case in (case for name in options.shapes for case in cases(name, batch, DTYPES[dtype], device)):
            for direction, (moved, made) in case.work.items():
                what = {"kernel": case.kernel, "shape": case.shape, "dtype": dtype, "direction": direction}
                try:
                    found, error = compare(case, direction, options.compile, options.repeats, device)
                except Exception as failure:  # one comparison that cannot be made does not end the others
                    wrong.append(f"{' '.join(what.values())}: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}")
                    continue
                ours, times = found[0], {row["implementation"]: row["seconds"] for row in found}
                best = min(times[name] for name in times if name not in ("ours", "copy") and math.isfinite(times[name]))
                floor, work, unit = max((times["copy"], moved, "GB/s"), (made / most, made, "GFLOP/s"))
                ours |= {
                    "rate": work / ours["seconds"],
                    "share_of_ceiling": floor / ours["seconds"],
                    "speedup": math.nan if error else best / ours["seconds"],
                }
                rows += [what | row for row in found]
                wrong += [f"{' '.join(what.values())}: {error}"] if error else []
                shown = shown_times(found)
                page.row([
                    *what.values(), *(shown.get(name, "-") for name in ("ours", *rivals)),
                    "WRONG" if error else f"{ours['speedup']:.2f}", f"{ours['rate'] / 1e9:.3g} {unit}", shown["copy"],
                    f"{100 * ours['share_of_ceiling']:.0f}%",
                ])  # fmt: skip
    note = (
        f"ms: medians of {options.repeats} runs of calls in a row, on new inputs each time, ± half the distance between the "
        "quartiles. Speedup: over the best rival. Rate and ceiling: of the bytes that must move, beside a plain copy that moves "
        "as many, or of the operations that must be made, beside a large matrix product's, whichever takes longer. -: refused, "
        f"out of memory, or not run; torch.compile runs where it might fuse better, {' and '.join(sorted(COMPILED))}."
    )
    note += (" The device's time, without Python's: calls in a row are a CUDA graph, on inputs that no cache holds." if gpu else
             f" No GPU here: ours IS the reference path, at batch {batch}.")  # fmt: skip
    page.say("", note)
    return {"rows": rows}, wrong


# ---------------------------------------------------------------------------------------------------------- tiles


class Tiles(NamedTuple):
    """How an attention kernel cuts its work. `alone`: a backward whose program holds all queries of a row."""

    queries: int
    keys: int
    warps: int
    alone: bool

    def __str__(self):
        return f"{self.queries} x {self.keys}, {self.warps} warps{', a row' * self.alone}"


def tile_choices(qkv, direction):
    """[Tiles]: those in use, then those with half or twice as many of one thing, and the backward's other scheme."""
    module = sys.modules["kernels.attention"]
    whole = module._row_tiles(qkv) if direction == "backward" else None
    chosen = Tiles(*(whole or module._tiles(qkv, direction)), bool(whole))
    choices = [chosen]
    for field, least in (("queries", 16), ("keys", 16), ("warps", 1)):
        if whole and field == "queries":
            continue  # it holds them all
        size = getattr(chosen, field)
        choices += [chosen._replace(**{field: other}) for other in (size // 2, 2 * size) if other >= least]
    return choices + ([Tiles(*module._tiles(qkv, direction), False)] if whole and qkv.shape[1] > chosen.keys else [])


@contextlib.contextmanager
def cut_into(tiles, direction):
    """Attention's kernels of that direction, started in here, are cut so."""
    module, cut = sys.modules["kernels.attention"], (tiles.queries, tiles.keys, tiles.warps)
    in_use = module._tiles
    with unittest.mock.patch.object(module, "_tiles", lambda qkv, kind: cut if kind == direction else in_use(qkv, kind)):
        with unittest.mock.patch.object(module, "_row_tiles", lambda _: cut if tiles.alone else None):
            yield


def race_tiles(case, direction, repeats, device):
    """One row a choice of tiles, those in use first; of the others, those that the chip has room for. ValueError where a
    choice errs more than twice as much as eager."""
    make, inputs = maker(direction, case.ours, eager, 1), drawn(case, direction)
    judge, plain = (maker(direction, case.eager, eager, 1)(*x)() for x in (to_double(inputs), inputs))
    allowed, fitting, count = 2 * largest_error(plain, judge), [], 1
    for tiles in tile_choices(case.tensors[0], direction):
        with cut_into(tiles, direction):
            try:
                found = largest_error(make(*inputs)(), judge)
            except Exception:
                if not fitting:
                    raise
                continue  # too much shared memory, or a tile that the compiler cannot cut
            if found > allowed:
                raise ValueError(f"{case.shape} {direction} in {tiles}: relative error {found:.1e}")
            if not fitting:
                count = repeats_of(make(*inputs), device)
            fitting.append(tiles)

    def timed(tiles, inputs):  # a GPU's calls are recorded in here, a CPU's made anew each time
        with cut_into(tiles, direction):
            run = in_a_row(make, inputs, count, device)
        return cut_into(tiles, direction)(run)

    def fresh():
        inputs = input_sets(case, direction, count, device)
        return {tiles: timed(tiles, inputs) for tiles in fitting}

    times = interleaved(fresh, repeats, device)
    return [{"tiles": str(tiles), **quartiles([t / count for t in times[tiles]])} for tiles in fitting]


def run_tiles(options, device, page):
    """Attention at every shape, dtype and direction, in the tiles in use and in the neighbouring ones."""
    if device.type not in kernels.backend.DEVICES:
        raise mlo_mae.RunError("tiles are of Triton's kernels, which need a GPU here; run it where there is one")
    rows, wrong = [], []
    page.start(
        ["shape", "dtype", "direction", "in use", "ms", "fastest neighbour", "ms", "in use takes"], [39, 5, 9, 26, 6, 26, 6, 12]
    )
    torch.manual_seed(0)
    for dtype in options.dtypes:
        for case in (case for name in options.shapes for case in cases(name, options.batch_size, DTYPES[dtype], device)):
            for direction in case.work if case.kernel == "attention" else ():
                what = {"shape": case.shape, "dtype": dtype, "direction": direction}
                try:
                    with kernels.use("triton"):
                        found = race_tiles(case, direction, options.repeats, device)
                except ValueError as error:
                    wrong.append(f"{dtype} {error}")
                    continue
                rows += [what | row for row in found]
                ours, best = found[0], min(found[1:], key=lambda row: row["seconds"], default=found[0])
                page.row([*what.values(), ours["tiles"], f"{1e3 * ours['seconds']:.3g}", best["tiles"],
                          f"{1e3 * best['seconds']:.3g}", f"{ours['seconds'] / best['seconds']:.2f}x"])  # fmt: skip
    page.say("", "ms: medians of calls in a row. Queries a program x keys a step; neighbours have half or twice as many of one.")
    return {"rows": rows}, wrong


# ----------------------------------------------------------------------------------------------------------- step

TRAINING_IMAGES = {"shapes": 6000, "cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167}  # level 3's included


def parts_of(net, theta, psi, head, given, steps):
    """{name: call}: what a mask update is compared with, itself, and the parts of an outer iteration. Directions and
    cotangents are stand-ins of the right shape: no time depends on their values."""
    split, step = net.encoder_size, steps[-1]
    plain = dataclasses.replace(net, cfg=dataclasses.replace(net.cfg, masking="random"))

    def level1(net):
        return mlo_mae.level1_step(net, theta, psi, step.images, step.rates, 0, 0)

    def step_of_masks(gradient):
        level = Level(psi, gradient, gradient.square(), 3)
        return mlo_mae.adamw(level, gradient, Rates(1e-3, torch.zeros_like(gradient)))

    def mask_update():
        form = mlo_mae.HYPERGRADIENTS[net.cfg.hypergradient]
        return step_of_masks(form(net, theta, psi, head, given, [step]).hypergradient)

    def encoder_pass():
        params = theta.params[:split].detach().requires_grad_()
        return torch.autograd.grad(mlo_mae.upper_levels(net, params, head, given)[0], params)

    def pullback():
        cotangent = (step.gradient[:split],) * 3
        return mlo_mae.adamw_pullback(step.theta, step.gradient, step.rates, net.cfg.update_jacobian, cotangent)

    def masking():
        wanted = psi.detach().requires_grad_()
        prob = mlo_mae.masking_probability(net, wanted, step.images, step.theta.params[:split])
        return step_of_masks(torch.autograd.grad(mlo_mae.level1_loss(prob, step.mask, prob.detach()), wanted)[0])

    return {
        "plain MAE step": lambda: level1(plain),
        "mask update": mask_update,
        "level-1 step": lambda: level1(net),
        "levels 2 and 3: encoder": encoder_pass,
        "AdamW's Jacobian": pullback,
        "jvp of the autoencoder": lambda: mlo_mae.directional_errors(net, step, step.gradient[:split]),
        "T: backward and step": masking,
    }


def training_images(cfg, size, device, folder):
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


def input_rate(split, cfg, device):
    """Images a second that reading delivers with nothing else to do, once what was decoded ahead is used up."""
    stream, count = split.stream(cfg.batch_size, 1), 2 * cfg.workers + 4

    def read():
        for _ in range(count):
            next(stream)

    read()
    return count * cfg.batch_size / seconds(read, device)


def run_step(options, device, page):
    """One outer iteration and its parts, the floor of a mask update, and the projection of the preset's whole run."""
    with tempfile.TemporaryDirectory() as folder:
        return measure_step(options, device, page, folder)


def measure_step(options, device, page, folder):
    """`run_step`, with a folder for the images of presets that decode files."""
    cfg = Config(**{"preset": options.preset} | mlo_mae.PRESETS[options.preset] | {"precision": options.precision})
    batch = options.batch_size or cfg.batch_size
    labelled = max(1, round(cfg.labelled_batch_size * batch / cfg.batch_size))
    cfg, pixels = dataclasses.replace(cfg, batch_size=batch, labelled_batch_size=labelled), cfg.image_size or 32
    net, arguments = problem(cfg, pixels, device, warm=2)
    theta, psi, head, _, _ = arguments
    state = mlo_mae.State(0, theta, head, mlo_mae.fresh_level(psi, device))
    decay, mask_rate = mlo_mae.level_decays(net, device), mlo_mae.inverse_fan_in(net.masking).to(device)
    split = training_images(cfg, pixels, device, folder)
    streams = [split.stream(n, 0) for n in (batch, labelled, labelled)]

    def whole(backend="auto"):
        with kernels.use(backend):
            return mlo_mae.outer_iteration(net, state, streams, 1000, decay, mask_rate)

    def batches():
        return [next(streams[0]) for _ in range(cfg.level1_steps)], next(streams[1]), next(streams[2])

    parts = parts_of(net, *arguments)
    calls = {"outer iteration": whole, "data": batches} | parts
    triton = device.type == "cuda" and "triton" in sys.modules
    if triton:
        calls["outer iteration, kernels off"] = lambda: whole("reference")
    rows = {name: {"part": name, "peak_bytes": peak_memory(call, device)[1]} for name, call in calls.items()}  # the warm-up too
    for name, times in interleaved(lambda: calls, options.repeats, device).items():
        rows[name] |= quartiles(times)
    once = dict.fromkeys(["data", *list(parts)[2:]], 1) | {"level-1 step": cfg.level1_steps}
    for name, row in rows.items():  # how often an outer iteration makes this part; what is only compared with: never
        row |= {"times": once.get(name, 0), "flops": operations(calls[name])}
    ceiling = product_rate(device, DTYPES[cfg.precision])
    total, update, plain = (rows[name] for name in ("outer iteration", "mask update", "plain MAE step"))
    for row in rows.values():
        row["share_of_time"] = row["times"] * row["seconds"] / total["seconds"]
        row["share_of_flops"] = row["times"] * row["flops"] / total["flops"]
        row["share_of_peak"] = row["flops"] / row["seconds"] / ceiling
    time_ratio, operation_ratio = (update[name] / plain[name] for name in ("seconds", "flops"))
    updates = math.ceil(cfg.epochs * TRAINING_IMAGES[cfg.data] * (1 - cfg.val_fraction) / (batch * cfg.level1_steps))
    pace = (1 - cfg.mask_start) * total["seconds"] + cfg.mask_start * cfg.level1_steps * plain["seconds"]  # an update, on average
    summary = {
        "preset": cfg.preset, "precision": cfg.precision, "batch_size": batch, "labelled_batch_size": labelled,
        "images_per_second": batch * cfg.level1_steps / total["seconds"], "peak_bytes": total["peak_bytes"],
        "time_ratio": time_ratio, "operation_ratio": operation_ratio, "overhead": time_ratio / operation_ratio,
        "peak_flops": ceiling, "updates": updates, "hours": updates * pace / 3600,
        "input_images_per_second": input_rate(split, cfg, device),
        "needed_images_per_second": (batch * cfg.level1_steps + 2 * labelled) / total["seconds"],
    }  # fmt: skip
    lines = [["part", "times", "ms", "MiB", "GFLOP", "of peak", "of the time", "of the operations"]]
    for row in rows.values():
        work, peak = (f"{row['flops'] / 1e9:.3g}", f"{100 * row['share_of_peak']:.0f}%") if row["flops"] else "--"
        shares = [f"{100 * row[f'share_of_{name}']:.0f}%" if row["times"] else "-" for name in ("time", "flops")]
        lines.append([row["part"], str(row["times"] or "-"), *shown_cost(row), work, peak, *shares])
    page.say(
        "", f"{cfg.preset}: width {cfg.width}, depth {cfg.depth}, {net.patches} patches, batches of {batch} and twice "
        f"{labelled}, {cfg.level1_steps} level-1 steps a mask update, {cfg.precision}", "", *table(lines).splitlines(), "",
        f"A mask update takes {time_ratio:.2f}x the time of a plain MAE step and {operation_ratio:.2f}x its "
        f"operations: {summary['overhead']:.2f}x the floor. {summary['images_per_second']:.0f} images a second.",
        f"{updates} mask updates, the whole run of this preset, take {summary['hours']:.2f} hours at this pace"
        + (f", the first {100 * cfg.mask_start:.0f} % of them plain MAE steps" if cfg.mask_start else "")
        + ".",
        f"Reading by itself ({f'JPEG files, {cfg.workers} processes' if cfg.workers else 'from memory'}) delivers "
        f"{summary['input_images_per_second']:.0f} images a second; levels 1 to 3 take {summary['needed_images_per_second']:.0f}.",
        f"Peak: a large matrix product's {ceiling / 1e9:.3g} GFLOP/s. Parts are timed apart."
        + ("" if triton else " No Triton on this device: kernels are off."),
    )  # fmt: skip
    if options.profile:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with profile(activities=activities) as record:
            whole()
        record.export_chrome_trace(str(options.profile))
    return {"rows": list(rows.values()), "summary": summary}, []


# --------------------------------------------------------------------------------------------------- command line

LIMITS = ("sizes", "preset", "precision", "shapes", "dtypes", "batch_size")  # flags that say what is measured
VERBS = {"hypergradient": run_hypergradient, "kernels": run_kernels, "step": run_step, "tiles": run_tiles}


def saved_path(options, device, suffix):
    """benchmarks/<verb>-<what it was limited to>-<machine>.<suffix>, beside this file: two runs that measure different things
    write different files."""
    facts, whole = machine(device), parse([options.verb])
    limits = [value for name in LIMITS if (value := getattr(options, name, None)) != getattr(whole, name, None)]
    parts = [options.verb, *(text for value in limits for text in (value if isinstance(value, list) else [str(value)]))]
    name = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or f"{facts['cpu']} {facts['threads']} threads").lower()).strip("-")
    folder = Path(__file__).resolve().parent / "benchmarks"
    folder.mkdir(exist_ok=True)
    return folder / f"{'-'.join(parts).replace('/', '')}-{name}.{suffix}"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"bench: {message}; see {self.prog} --help\n")


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def parse(argv):
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    common.add_argument("--repeats", type=positive, default=5, help="timed runs of each call (default 5)")
    common.add_argument("--save", action="store_true", help="write the table to benchmarks/, row by row")
    parser = Parser(prog="bench.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=" | ".join(VERBS))
    forms = verbs.add_parser("hypergradient", parents=[common], help="the forms of the hypergradient against autograd")
    forms.add_argument("--sizes", nargs="+", choices=list(SIZES),
                       help="default: all; without a GPU, not vit-b/2, and bfloat16 at tiny alone")  # fmt: skip
    forms.add_argument("--plot", type=Path, help="where to write the picture (with --save: beside the table)")
    each = verbs.add_parser("kernels", parents=[common], help="each kernel against the best that PyTorch offers")
    each.add_argument("--shapes", nargs="+", default=list(GEOMETRY), choices=list(GEOMETRY), help="default: both")
    each.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), help="default: both")
    each.add_argument("--batch-size", type=positive, help="default 128, on a CPU 4")
    each.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                      help="race torch.compile too (default: where there is a GPU)")  # fmt: skip
    whole = verbs.add_parser("step", parents=[common], help="one outer iteration, its parts and its floor")
    whole.add_argument("--preset", default="shapes", choices=list(mlo_mae.PRESETS), help="whose sizes (default shapes)")
    whole.add_argument("--batch-size", type=positive, help="of level 1; levels 2 and 3 keep their ratio to it")
    whole.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="default fp32")
    whole.add_argument("--profile", type=Path, help="where to write a trace for chrome://tracing")
    cut = verbs.add_parser("tiles", parents=[common], help="attention in the tiles in use against the neighbouring ones")
    cut.add_argument("--shapes", nargs="+", default=list(GEOMETRY), choices=list(GEOMETRY), help="default: both")
    cut.add_argument("--dtypes", nargs="+", default=["bf16"], choices=list(DTYPES), help="default: bf16")
    cut.add_argument("--batch-size", type=positive, default=128, help="default 128")
    return parser.parse_args(argv)


def main(argv=None):
    """Exit status 0, 1 after a wrong result, 2 after one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options, failures = parse(argv), []

    def work():
        device = mlo_mae.choose_device(options.device)
        device = torch.device("cpu") if device.type == "mps" else device  # no float64 there
        facts = machine(device)
        heading = " | ".join(f"{name} {value}" for name, value in facts.items() if value)
        print(heading, flush=True)
        for path in (vars(options).get("plot"), vars(options).get("profile")):
            if path:
                path.touch()  # rather fail now than after the measurements
        page = Page(saved_path(options, device, "md") if options.save else None, [f"`python bench.py {shlex.join(argv)}`", "", heading])
        report, wrong = VERBS[options.verb](options, device, page)
        for line in wrong:
            page.say("", f"WRONG: {line}")
        report = tree_map(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, report)  # JSON has no NaN
        failures.extend(wrong)
        return {"verb": options.verb, "machine": facts} | report

    return mlo_mae.reported("bench", work, "Choose a smaller size") or int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
