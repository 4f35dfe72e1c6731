"""Benchmarks of MLO-MAE: what is exact, what it costs, and what it could cost at best.

    python bench.py hypergradient    # every form of dL3/dpsi against autograd: error, time, memory, operations
    python bench.py kernels          # each kernel against the best that PyTorch offers
    python bench.py step             # one outer iteration, its parts, and its floor

Each prints the machine, a table, and one last line of compact JSON; --save writes the table under benchmarks/.
Times are medians (with quartiles) of interleaved runs after a warm-up. A number that was not measured is not printed.
Exit status: 0; 1 where a result is further from the truth than it may be; 2 for what the user can mend.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory on a CPU, is chatty

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import data
import kernels
import mlo_mae
from mlo_mae import Config, Level, Rates, RunError

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


def interleaved(calls, repeats, device):
    """{name: [seconds]} of calls made in turn, so that a disturbance of the machine falls on all of them alike."""
    times = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in list(calls)[:: -1 if repeat % 2 else 1]:
            times[name].append(seconds(calls[name], device))
    return times


def quartiles(values):
    """{"seconds": median, "seconds_q1", "seconds_q3"}."""
    places = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    found = torch.tensor(values, dtype=torch.float64).quantile(places)
    return dict(zip(("seconds", "seconds_q1", "seconds_q3"), found.tolist()))


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


def operations(function, arguments):
    """Floating-point operations of the matrix products of function(arguments), on the plain operations that the counter
    knows. Counted on tensors without values, so at no cost."""
    counter = FlopCounterMode(display=False)
    without_values = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, arguments)
    no_autocast = mock.patch.object(mlo_mae, "autocast", lambda *_: contextlib.nullcontext())  # it refuses "meta"
    with no_autocast, kernels.use("reference"), counter:
        function(without_values)
    return counter.get_total_flops()


def ceilings(device, dtype):
    """What this machine reaches: {"flops": operations/s of a large matrix product, "bytes": bytes/s of a large copy}."""
    gpu = device.type == "cuda"
    side, source = 8192 if gpu else 1024, torch.randn(2**28 if gpu else 2**24, device=device)
    target, work = torch.empty_like(source), {"bytes": 2 * source.nbytes}
    calls = {"bytes": lambda: target.copy_(source)}
    for kind in {dtype, torch.float32}:  # a CPU may well be slower in bfloat16
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        calls[kind], work[kind] = (lambda a=a, b=b: a @ b), 2 * side**3
    interleaved(calls, 2, device)
    rates = {name: work[name] / min(times) for name, times in interleaved(calls, 5, device).items()}
    return {"bytes": rates.pop("bytes"), "flops": max(rates.values())}


def machine(device):
    """{name: text or number}: all that a time depends on beside the program."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    triton = sys.modules.get("triton")
    return {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None, "cpu": cpu,
        "threads": torch.get_num_threads(), "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton and triton.__version__,
    }  # fmt: skip


def table(rows):
    """Rows of text, the first one the titles, as markdown that is aligned for reading as it is."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (rows[0], rule, *rows[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown_time(row):
    """Milliseconds: median [first quartile, third]."""
    median, q1, q3 = (f"{1e3 * row[name]:.4g}" for name in ("seconds", "seconds_q1", "seconds_q3"))
    return f"{median} [{q1}, {q3}]"


# -------------------------------------------------------------------------------------------------- hypergradient

LIMIT = {"float32": 1e-4, "float64": 1e-12}  # relative error of `exact` that its dtype allows; in float32 also twice
# autograd's own, since rounding of an ill-conditioned problem (batch normalisation of few features) is no form's fault
NOISE = 0.5  # cosine with the truth below which a direction is called noise

# Image size in pixels, and settings of Config. "small" is the default run of mlo_mae.py.
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
    form: str  # a key of mlo_mae.HYPERGRADIENTS
    settings: dict = {}  # of Config
    judged: int = 1  # level-1 steps that the judge unrolls
    given: int = 1  # level-1 steps that the form is given


REDRAWN, IDENTITY = {"redraw_dropout": True}, {"update_jacobian": "identity"}
METHODS = {
    "exact": Method("exact", "exact"),
    "unrolled": Method("unrolled autograd", "unrolled"),
    "finite-difference": Method("finite differences", "finite-difference"),
    "redrawn": Method("finite differences, dropout redrawn", "finite-difference", REDRAWN),
    "published": Method("as published: redrawn, and dU/dg = -1", "finite-difference", REDRAWN | IDENTITY),
    "identity": Method("exact but for dU/dg = -1", "exact", IDENTITY),
    "first-order": Method("first-order (L2's curvature left out)", "first-order"),
    "exact-2": Method("two steps: exact", "exact", {}, 2, 2),
    "unrolled-2": Method("two steps: unrolled autograd", "unrolled", {}, 2, 2),
    "last-of-2": Method("two steps: exact, of the last alone", "exact", {}, 2, 1),
}


def random_batches(cfg, size, count, device):
    """Endless data.Batch of smooth random images (noise on a coarse grid, and a little on every pixel), ten classes."""
    while True:
        coarse = F.interpolate(torch.randn(count, 3, 4, 4), size=(size, size), mode="bicubic")
        images = coarse + 0.1 * torch.randn(count, 3, size, size)
        yield data.Batch(images.to(device), torch.randint(10, (count,)).to(device))


def decays(net, device):
    modules = ((net.encoder, net.decoder), (net.head,), (net.masking,))
    return [mlo_mae.decay_of(net.cfg, *some).to(device) for some in modules]


def problem(cfg, size, device, count=2, warm=4):
    """(Networks, the arguments of a form of the hypergradient) as training makes them, in float32.

    `warm` outer iterations are really made, so that weights, moments and the head are not initial ones; then `count`
    level-1 steps, which the hypergradient is to explain."""
    cfg = dataclasses.replace(cfg, warmup=0.0)
    net, params = mlo_mae.build(cfg, size, 3, classes=10)
    state = mlo_mae.State(0, *(mlo_mae.fresh_level(vector, device) for vector in params))
    decay, mask_rate = decays(net, device), mlo_mae.inverse_fan_in(net.masking).to(device)
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


def bound(net, method):
    """One row's method as a function of the arguments of a form; it returns a mlo_mae.Result."""
    net = dataclasses.replace(net, cfg=dataclasses.replace(net.cfg, **method.settings))
    return lambda arguments: mlo_mae.HYPERGRADIENTS[method.form](net, *arguments[:4], arguments[4][-method.given :])


def cost(net, arguments, methods, repeats, device):
    """({method: Result}, {method: peak bytes, operations, seconds}) of running every method."""
    functions = {name: bound(net, method) for name, method in methods.items()}
    calls = {name: (lambda function=function: function(arguments)) for name, function in functions.items()}
    results, costs = {}, {}
    for name, call in calls.items():
        results[name], peak = peak_memory(call, device)  # also the warm-up
        costs[name] = {"peak_bytes": peak, "flops": operations(functions[name], arguments)}
    for name, times in interleaved(calls, repeats, device).items():
        costs[name] |= quartiles(times)
    return results, costs


def relative_error(found, judge):
    return float((found.double() - judge).norm() / judge.norm())


def run_hypergradient(options, device):
    """Every form at every size: error in both dtypes against autograd in float64, and cost in float32."""
    rows, text = [], []
    for size in options.sizes or ["tiny", "small", "medium"] + ["vit-b/2"] * (device.type == "cuda"):
        pixels, settings = SIZES[size]
        cfg = Config(**{"head_norm": "layer"} | settings)  # as published
        net, single = problem(cfg, pixels, device)
        double = in_double(net, single)
        judge_of = {method.judged: name for name, method in METHODS.items() if method.form == "unrolled"}
        judges = {count: bound(net, METHODS[name])(double).hypergradient for count, name in judge_of.items()}
        results, costs = cost(net, single, METHODS, options.repeats, device)
        found = []
        for name, method in METHODS.items():
            judge, result = judges[method.judged], results[name].hypergradient
            precise = judge if method.form == "unrolled" else bound(net, method)(double).hypergradient
            row = {"size": size, "method": name, "error_float32": relative_error(result, judge),
                   "error_float64": relative_error(precise, judge),
                   "cosine": float(F.cosine_similarity(result.double(), judge, dim=0))}  # fmt: skip
            row |= {f"allowed_{dtype}": limit for dtype, limit in LIMIT.items()}
            exact = all(row[f"error_{dtype}"] <= row[f"allowed_{dtype}"] for dtype in LIMIT)
            row["verdict"] = "exact" if exact else "approximate" if row["cosine"] >= NOISE else "noise"
            found.append(row | costs[name])
        part = ["", f"{size}: width {cfg.width}, depth {cfg.depth}, {net.patches} patches, batches of {cfg.batch_size} "
                f"and twice {cfg.labelled_batch_size}", "", *hypergradient_text(found)]  # fmt: skip
        print("\n".join(part), flush=True)
        rows, text = rows + found, text + part
    text += ["", "Error: |h - judge| / |judge|; the judge is autograd through the same steps in float64 (two steps: through "
             f"both). Exact: within {LIMIT['float64']:.0e} of it in float64, and within {LIMIT['float32']:.0e} in float32. "
             f"Noise: cosine below {NOISE}. Cosine, ms (median [quartiles] of "
             f"{options.repeats}), MiB (the most held at once) and GFLOP (matrix products) are float32's."]  # fmt: skip
    print("\n" + text[-1])
    wrong = [f"{row['method']} at {row['size']} in {dtype}: relative error {row['error_' + dtype]:.1e}, "
             f"allowed {row['allowed_' + dtype]:.0e}"
             for row in rows if row["method"] in ("exact", "exact-2")
             for dtype in LIMIT if not row["error_" + dtype] <= row["allowed_" + dtype]]  # fmt: skip
    grown, picture = [], options.plot or (options.save and saved_path("hypergradient", device, "png"))
    if picture:
        grown = growth(device, options.repeats)
        draw(rows, grown, picture)
    return {"rows": rows, "growth": grown}, text, wrong


def hypergradient_text(rows):
    """The table of one size, and what exact costs beside its rivals."""
    lines = [["method", "error, float32", "error, float64", "cosine", "verdict", "ms", "MiB", "GFLOP"]]
    for row in rows:
        method = METHODS[row["method"]]
        lines.append([
            method.label, f"{row['error_float32']:.1e}",
            "judge" if method.form == "unrolled" else f"{row['error_float64']:.1e}", f"{row['cosine']:.4f}",
            row["verdict"], shown_time(row), f"{row['peak_bytes'] / 2**20:.1f}", f"{row['flops'] / 1e9:.3g}",
        ])  # fmt: skip
    ours, *rivals = (row for row in rows if row["method"] in ("exact", "unrolled", "finite-difference"))
    ratios = ["{:.2f}x the time, {:.2f}x the memory and {:.2f}x the operations of {}".format(
        *(ours[name] / rival[name] for name in ("seconds", "peak_bytes", "flops")), METHODS[rival["method"]].label)
        for rival in rivals]  # fmt: skip
    return [table(lines), "", f"exact takes {'; '.join(ratios)}."]


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
            cfg = Config(**settings | {"patch_size": 2} | changed.get(along, {}))
            net, arguments = problem(cfg, pixels, device, steps, warm=1)
            methods = {form: Method(form, form, {}, steps, steps) for form in FORMS}
            costs = cost(net, arguments, methods, repeats, device)[1]
            rows += [{"along": along, "value": value, "method": name, **row} for name, row in costs.items()]
    return rows


def draw(rows, grown, path):
    """Write the picture: error against time, one point a method, at the largest size; and how cost grows."""
    from matplotlib.figure import Figure

    size = rows[-1]["size"]
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.1])
    axis = left.subplots()
    colours = {"exact": "#1a7f4b", "approximate": "#d9822b", "noise": "#b3262a"}
    points = [(1e3 * row["seconds"], row["error_float32"], row) for row in rows if row["size"] == size]
    bottom, top = min(y for _, y, _ in points) / 100, 3 * max(y for _, y, _ in points)
    decade, free = 290 / math.log10(top / bottom), math.inf  # points of height; the height below which no label is yet
    for x, y, row in sorted(points, key=lambda point: -point[1]):
        colour, exact, method = colours[row["verdict"]], row["verdict"] == "exact", METHODS[row["method"]]
        axis.scatter(x, y, s=60, color=colour, marker="os"[method.judged - 1], zorder=3)
        up = 1 if method.form == "unrolled" else -1  # labels apart, since exact and the judge agree
        height = decade * math.log10(y / bottom)
        free = min(height, free - 11)
        axis.annotate(method.label, (x, y), (2, 8 * up) if exact else (8, free - height), textcoords="offset points", fontsize=8,
                      rotation=50 * up * exact, color=colour, va={1: "bottom", -1: "top"}[up] if exact else "center")  # fmt: skip
    axis.axhspan(bottom, LIMIT["float32"], color=colours["exact"], alpha=0.07, lw=0)
    axis.text(0, LIMIT["float32"], "  what float32 allows", va="top", fontsize=8, color=colours["exact"])
    axis.set(yscale="log", xlim=(0, 1.5 * max(x for x, _, _ in points)), ylim=(bottom, top), xlabel="milliseconds",
             ylabel="relative error, judged by autograd in float64")  # fmt: skip
    axis.set_title(f"Error against cost ({size}, float32; squares: two level-1 steps)", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
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


class Case(NamedTuple):
    """One kernel at one shape. The first `variables` of `tensors`, which the functions take, are differentiated; `work`
    is the least that each direction costs: bytes moved, or operations for attention."""

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
               {"forward": 2 * shown, "backward": shown + images.nbytes, "jvp": 4 * shown})  # fmt: skip
    yield Case("select_patches", f"{list(prob.shape)} to {visible}", (prob,), 0,
               lambda p: kernels.select_patches(p, visible), lambda p: select(p, visible),
               {"forward": sum(x.nbytes for x in (prob, keep, restore, mask))})  # fmt: skip

    tokens, single = normal(batch, 1 + visible, 512), torch.float32  # embeddings are parameters, so float32
    embeddings = (normal(1, 1, 512, dtype=single), normal(1, 1 + length, 512, dtype=single))
    moved = tokens.nbytes + restore.nbytes + embeddings[1].nbytes + batch * (1 + length) * 512 * single.itemsize
    yield Case("scatter_tokens", f"{list(tokens.shape)} to {1 + length}", (tokens, *embeddings, restore), 3,
               kernels.scatter_tokens, modules["tokens"].scatter_tokens_reference,
               {"forward": moved, "backward": moved, "jvp": 2 * moved - restore.nbytes})  # fmt: skip

    pred, target = normal(batch, length, values), normal(batch, 3, size, size, dtype=single)
    hidden = (1 - visible / length) * pred.nbytes
    moved = hidden + (1 - visible / length) * target.nbytes + 2 * mask.nbytes
    yield Case("patch_loss", str(list(pred.shape)), (pred, target, mask), 1,
               kernels.patch_loss, modules["loss"].patch_loss_reference,
               {"forward": moved, "backward": moved + pred.nbytes, "jvp": moved + hidden + mask.nbytes})  # fmt: skip

    for where, n, heads, d in (("encoder, visible", 1 + visible, 12, 64), ("encoder, all", 1 + length, 12, 64),
                               ("decoder", 1 + length, 16, 32)):  # fmt: skip
        product = 2 * batch * heads * n * n * d
        yield Case("attention", f"{[batch, n, 3, heads, d]} {where}", (normal(batch, n, 3, heads, d),), 1,
                   kernels.attention, modules["attention"].attention_reference,
                   {"forward": 2 * product, "backward": 5 * product, "jvp": 6 * product})  # fmt: skip


def pinned(backend):
    """Attention by one of PyTorch's own backends, which refuses rather than fall back."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def rival(qkv):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)

    return rival


def prepared(direction, function, wrap, tensors, variables, others):
    """A call that runs one direction and returns its results; for a backward, the forward is made here. `others`: the
    cotangent of the result, or the tangents of the variables. `wrap` compiles, or does nothing."""
    moving, constants = tensors[:variables], tensors[variables:]
    if direction == "jvp":
        pushed = wrap(lambda *moving: torch.func.jvp(lambda *x: function(*x, *constants), moving, tuple(others)))
        return torch.no_grad()(lambda: pushed(*moving))
    function = wrap(function)
    if direction == "forward":
        return torch.no_grad()(lambda: function(*tensors))
    moving = [x.detach().requires_grad_() for x in moving]
    result = function(*moving, *constants)
    return lambda: torch.autograd.grad(result, moving, others.to(result.dtype), retain_graph=True)


def compiled(function):
    from torch._functorch import config

    config.donated_buffer = False  # a compiled backward is run several times
    torch._dynamo.reset()  # its limit on recompilation counts over all cases
    return torch.compile(function, dynamic=False)


def compare(case, direction, compiles, repeats, device):
    """([one row an implementation, ours first], what is wrong with ours or None)."""
    others = [torch.randn_like(x) for x in case.tensors[: case.variables]]
    if direction == "backward":
        others = torch.randn_like(case.eager(*case.tensors))
    candidates = {"ours": case.ours, "eager": case.eager} | ({"compile": case.eager} if compiles else {})
    if case.kernel == "attention":
        candidates |= {name: pinned(SDPA[name]) for name in (["SDPA math"] if direction == "jvp" else SDPA)}
    judge = prepared(direction, case.eager, lambda f: f, to_double(case.tensors), case.variables, to_double(others))()
    errors, calls, counts = {}, {}, {}
    for name, function in candidates.items():
        try:
            wrap = compiled if name == "compile" else lambda f: f
            call = prepared(direction, function, wrap, case.tensors, case.variables, others)
            errors[name] = max(map(relative_error, tree_leaves(call()), map(torch.Tensor.double, tree_leaves(judge))))
            once = min(seconds(call, device) for _ in range(3))
        except Exception:
            if name in ("ours", "eager"):
                raise
            continue  # rivals refuse, or run out of memory, in many ways
        counts[name] = max(1, min(50, int(2e-3 / once)))  # so many that the clock does not matter
        calls[name] = lambda call=call, count=counts[name]: [call() for _ in range(count)]
    times = {name: [t / counts[name] for t in found] for name, found in interleaved(calls, repeats, device).items()}
    rows = [{"implementation": name, "error": errors.get(name, math.nan), **quartiles(times.get(name, [math.nan]))}
            for name in candidates]  # fmt: skip
    if errors["ours"] <= 2 * errors["eager"]:
        return rows, None
    return rows, f"relative error {errors['ours']:.1e}, more than twice eager's {errors['eager']:.1e}"


def run_kernels(options, device):
    """Every kernel, shape, dtype and direction; wrong where ours errs more than twice as much as eager PyTorch."""
    gpu = device.type == "cuda"
    batch = options.batch_size or (128 if gpu else 4)
    rivals = ["eager", "compile", *SDPA]
    rows, wrong = [], []
    lines = [["kernel", "shape", "dtype", "direction", "ours, ms", *rivals, "speedup", "rate", "of ceiling"]]
    torch.manual_seed(0)
    for dtype in options.dtypes:
        ceiling = ceilings(device, DTYPES[dtype])
        for case in (case for name in options.shapes for case in cases(name, batch, DTYPES[dtype], device)):
            for direction, work in case.work.items():
                found, error = compare(case, direction, options.compile, options.repeats, device)
                ours, times = found[0], {row["implementation"]: row["seconds"] for row in found}
                measure, unit = ("flops", "GFLOP/s") if case.kernel == "attention" else ("bytes", "GB/s")
                best = min(times[name] for name in times if name != "ours" and math.isfinite(times[name]))
                ours |= {"rate": work / ours["seconds"], "share_of_ceiling": work / ours["seconds"] / ceiling[measure],
                         "speedup": math.nan if error else best / ours["seconds"]}  # fmt: skip
                what = {"kernel": case.kernel, "shape": case.shape, "dtype": dtype, "direction": direction}
                rows += [what | row for row in found]
                wrong += [f"{' '.join(what.values())}: {error}"] if error else []
                shown = [times.get(name, math.nan) for name in ("ours", *rivals)]
                lines.append([*what.values(), *(f"{1e3 * t:.3g}" if math.isfinite(t) else "-" for t in shown),
                              "WRONG" if error else f"{ours['speedup']:.2f}", f"{ours['rate'] / 1e9:.3g} {unit}",
                              f"{100 * ours['share_of_ceiling']:.0f}%"])  # fmt: skip
    note = ("ms: medians of calls in a row on the same tensors. Speedup: over the best rival. Rate: of the bytes that must move "
            "(attention: operations), beside a large copy's (a large matrix product's). -: refused, out of memory, or not run.")  # fmt: skip
    note += "" if gpu else f" No GPU here: ours IS the reference path, at batch {batch}."
    text = ["", table(lines), "", note]
    print("\n".join(text))
    return {"rows": rows}, text, wrong


# ----------------------------------------------------------------------------------------------------------- step

TRAINING_IMAGES = {"shapes": 6000, "cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167}  # level 3's included


def parts_of(net):
    """{name: function of the arguments of a form}: what a mask update is compared with, itself, and the parts of an
    outer iteration. Directions and cotangents are stand-ins of the right shape: no time depends on their values."""
    split, plain = net.encoder_size, dataclasses.replace(net, cfg=dataclasses.replace(net.cfg, masking="random"))

    def step_of_masks(psi, gradient):
        level = Level(psi.detach(), gradient, gradient.square(), 3)
        return mlo_mae.adamw(level, gradient, Rates(1e-3, torch.zeros_like(gradient)))

    def mask_update(arguments):
        theta, psi, head, given, steps = arguments
        result = mlo_mae.HYPERGRADIENTS[net.cfg.hypergradient](net, theta, psi, head, given, steps[-1:])
        return step_of_masks(psi, result.hypergradient)

    def level1(net, arguments):
        theta, psi, _, _, (*_, step) = arguments
        return mlo_mae.level1_step(net, theta, psi, step.images, step.rates, 0, 0)

    def encoder_pass(arguments):
        theta, _, head, given, _ = arguments
        params = theta.params[:split].detach().requires_grad_()
        return torch.autograd.grad(mlo_mae.upper_levels(net, params, head, given)[0], params)

    def pullback(arguments):
        step = arguments[-1][-1]
        cotangent = (step.gradient[:split],) * 3
        return mlo_mae.adamw_pullback(step.theta, step.gradient, step.rates, net.cfg.update_jacobian, cotangent)

    def forward_mode(arguments):
        step = arguments[-1][-1]
        params = step.theta.params
        with torch.no_grad():
            return torch.func.jvp(lambda moving: mlo_mae.patch_errors(net, moving, params[split:], step),
                                  (params[:split],), (step.gradient[:split],))  # fmt: skip

    def masking(arguments):
        _, psi, _, _, (*_, step) = arguments
        psi = psi.detach().requires_grad_()
        prob = mlo_mae.masking_probability(net, psi, step.images, step.theta.params[:split])
        return step_of_masks(psi, torch.autograd.grad(mlo_mae.level1_loss(prob, step.mask, prob.detach()), psi)[0])

    return {
        "plain MAE step": lambda arguments: level1(plain, arguments),
        "mask update": mask_update,
        "level-1 step": lambda arguments: level1(net, arguments),
        "levels 2 and 3: encoder": encoder_pass,
        "AdamW's Jacobian": pullback,
        "jvp of the autoencoder": forward_mode,
        "T: backward and step": masking,
    }


def run_step(options, device):
    """One outer iteration and its parts, the floor of a mask update, and the projection of the preset's whole run."""
    cfg = Config(**{"preset": options.preset} | mlo_mae.PRESETS[options.preset] | {"precision": options.precision})
    batch = options.batch_size or cfg.batch_size
    labelled = max(1, round(cfg.labelled_batch_size * batch / cfg.batch_size))
    cfg, pixels = dataclasses.replace(cfg, batch_size=batch, labelled_batch_size=labelled), cfg.image_size or 32
    net, arguments = problem(cfg, pixels, device, warm=2)
    theta, psi, head, _, _ = arguments
    state = mlo_mae.State(0, theta, head, mlo_mae.fresh_level(psi, device))
    decay, mask_rate = decays(net, device), mlo_mae.inverse_fan_in(net.masking).to(device)
    images = torch.randint(256, (1024, 3, pixels, pixels), dtype=torch.uint8)  # resident and augmented, as CIFAR's are
    split = data.Images(images, torch.arange(1024) % 10, (0.5,) * 3, (0.25,) * 3, device=device)
    streams = [split.stream(n, 0) for n in (batch, labelled, labelled)]

    def whole(backend="auto"):
        with kernels.use(backend):
            return mlo_mae.outer_iteration(net, state, streams, 1000, decay, mask_rate)

    def batches():
        return [next(streams[0]) for _ in range(cfg.level1_steps)], next(streams[1]), next(streams[2])

    functions = parts_of(net)
    calls = {"outer iteration": whole, "data": batches}
    calls |= {name: (lambda function=function: function(arguments)) for name, function in functions.items()}
    triton = device.type == "cuda" and "triton" in sys.modules
    if triton:
        calls["outer iteration, kernels off"] = lambda: whole("reference")
    rows = {name: {"part": name, "peak_bytes": peak_memory(call, device)[1]} for name, call in calls.items()}
    for name, times in interleaved(calls, options.repeats, device).items():
        rows[name] |= quartiles(times)
    once = dict.fromkeys(["data", *list(functions)[3:]], 1) | {"level-1 step": cfg.level1_steps}
    for name, row in rows.items():  # how often an outer iteration makes this part; what is only compared with: never
        row |= {"times": once.get(name, 0), "flops": operations(functions[name], arguments) if name in functions else 0}
    flops = sum(row["times"] * row["flops"] for row in rows.values())
    rows["outer iteration"]["flops"] = rows.get("outer iteration, kernels off", {})["flops"] = flops
    ceiling = ceilings(device, DTYPES[cfg.precision])["flops"]
    total, update, plain = (rows[name] for name in ("outer iteration", "mask update", "plain MAE step"))
    for row in rows.values():
        row["share_of_time"] = row["times"] * row["seconds"] / total["seconds"]
        row["share_of_flops"] = row["times"] * row["flops"] / flops
        row["share_of_peak"] = row["flops"] / row["seconds"] / ceiling
    ratios = {name: update[name] / plain[name] for name in ("seconds", "flops")}
    updates = math.ceil(cfg.epochs * TRAINING_IMAGES[cfg.data] * (1 - cfg.val_fraction) / (batch * cfg.level1_steps))
    summary = {
        "preset": cfg.preset, "precision": cfg.precision, "batch_size": batch, "labelled_batch_size": labelled,
        "images_per_second": batch * cfg.level1_steps / total["seconds"], "peak_bytes": total["peak_bytes"],
        "time_ratio": ratios["seconds"], "operation_ratio": ratios["flops"],
        "overhead": ratios["seconds"] / ratios["flops"], "peak_flops": ceiling,
        "updates": updates, "hours": updates * total["seconds"] / 3600,
    }  # fmt: skip
    lines = [["part", "times", "ms", "of the time", "GFLOP", "of the operations", "of peak", "MiB"]]
    for row in rows.values():
        time_share, flop_share, peak_share = (f"{100 * row[f'share_of_{what}']:.0f}%" for what in ("time", "flops", "peak"))
        lines.append([
            row["part"], str(row["times"] or "-"), shown_time(row), time_share if row["times"] else "-",
            *((f"{row['flops'] / 1e9:.3g}", flop_share if row["times"] else "-", peak_share) if row["flops"] else "---"),
            f"{row['peak_bytes'] / 2**20:.1f}",
        ])  # fmt: skip
    text = [
        "", f"{cfg.preset}: width {cfg.width}, depth {cfg.depth}, {net.patches} patches, batches of {batch} and twice "
        f"{labelled}, {cfg.level1_steps} level-1 steps a mask update, {cfg.precision}", "", table(lines), "",
        f"A mask update takes {ratios['seconds']:.2f}x the time of a plain MAE step and {ratios['flops']:.2f}x its "
        f"operations: {summary['overhead']:.2f}x the floor. {summary['images_per_second']:.0f} images a second.",
        f"{updates} mask updates, the whole run of this preset, take {summary['hours']:.2f} hours at this pace"
        + (" (decoding of image files not included)." if cfg.data == "imagenet" else "."),
        f"Peak: a large matrix product's {ceiling / 1e9:.3g} GFLOP/s. Parts are timed apart."
        + ("" if triton else " No Triton on this device: kernels are off."),
    ]  # fmt: skip
    print("\n".join(text))
    if options.profile:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with profile(activities=activities) as record:
            whole()
        record.export_chrome_trace(str(options.profile))
    return {"rows": list(rows.values()), "summary": summary}, text, []


# --------------------------------------------------------------------------------------------------- command line

VERBS = {"hypergradient": run_hypergradient, "kernels": run_kernels, "step": run_step}


def saved_path(verb, device, suffix):
    """benchmarks/<verb>-<machine>.<suffix>, beside this file."""
    facts = machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or f"{facts['cpu']} {facts['threads']} threads").lower()).strip("-")
    folder = Path(__file__).resolve().parent / "benchmarks"
    folder.mkdir(exist_ok=True)
    return folder / f"{verb}-{name}.{suffix}"


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
    common.add_argument("--save", action="store_true", help="write the table to benchmarks/<verb>-<machine>.md")
    parser = Parser(prog="bench.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=" | ".join(VERBS))
    forms = verbs.add_parser("hypergradient", parents=[common], help="the forms of the hypergradient against autograd")
    forms.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: all; without a GPU, not vit-b/2")
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
    return parser.parse_args(argv)


def main(argv=None):
    """Exit status 0, 1 after a wrong result, 2 after one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    try:
        device = mlo_mae.choose_device(options.device)
        device = torch.device("cpu") if device.type == "mps" else device  # no float64 there
        facts = machine(device)
        heading = " | ".join(f"{name} {value}" for name, value in facts.items() if value)
        print(heading)
        for path in (vars(options).get("plot"), vars(options).get("profile")):
            if path:
                path.touch()  # rather fail now than after the measurements
        report, text, wrong = VERBS[options.verb](options, device)
        for line in wrong:
            print(f"WRONG: {line}")
        if options.save:
            page = [f"`python bench.py {shlex.join(argv)}`", "", heading, *text, ""]
            mlo_mae.write_whole(saved_path(options.verb, device, "md"), "\n".join(page).encode())
        report = tree_map(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, report)  # JSON has no NaN
        print(json.dumps({"verb": options.verb, "machine": facts} | report, separators=(",", ":")))
        return 1 if wrong else 0
    except (RunError, data.DataError) as error:
        message = str(error)
    except torch.OutOfMemoryError as error:
        message = f"out of memory: {str(error).splitlines()[0]} Choose a smaller size"
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    print(f"bench: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
