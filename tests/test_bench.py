"""Every verb of bench.py at tiny sizes: what it prints, and when it fails."""

import itertools
import json
import math
import time

import numpy as np
import pytest
import torch
from helpers import nothing_overlaps

import bench
import kernels
import mlo_mae
from harness import measure
from kernels.race import GEOMETRY

CPU = torch.device("cpu")
TIMES = {"seconds", "seconds_q1", "seconds_q3"}
KERNELS = ["gather_patches", "select_patches", "scatter_tokens", "patch_loss", "attention"]
PEAK = 1e9  # operations a second, so low that attention is bound by it
NETWORKS = {"width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2, "masking_width": 8}
NANO = NETWORKS | {"level1_steps": 2, "mask_batches": 2, "mask_start": 0.25, "batch_size": 4, "labelled_batch_size": 4}
PIXELS = 8


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    monkeypatch.setitem(
        bench.SIZES, "tiny", (PIXELS, bench.PUBLISHED | NETWORKS | {"batch_size": 4, "labelled_batch_size": 4})
    )
    monkeypatch.setitem(bench.SIZES, "solved", (PIXELS, NANO))
    monkeypatch.setitem(mlo_mae.PRESETS, "shapes", NANO | {"image_size": PIXELS})
    monkeypatch.setitem(GEOMETRY, "cifar", (8, 2))
    monkeypatch.setattr(bench, "product_rate", lambda device, *dtypes: PEAK)


def run(capsys, *argv, device="cpu"):
    """(exit status, the last line's object, all of stdout)."""
    status = bench.main([*argv, "--device", device, "--repeats", "1"])
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1], parse_constant=pytest.fail)  # NaN is no JSON
    assert report["command"] == argv[0] and report["machine"]["threads"] == torch.get_num_threads()
    return status, report, out


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(bench, "GROWTH", {"depth": (1,), "batch": (2,), "unrolled steps": (1,)})
    monkeypatch.setattr(bench, "METHODS", {name: bench.METHODS[name] for name in ("exact", "unrolled", "finite-difference")})


@pytest.mark.slow
def test_hypergradient(capsys):
    """As published, and of the default run: level 2 solved, on the mean token, T on tokens."""
    status, report, out = run(capsys, "hypergradient", "--sizes", "solved", "tiny")
    assert status == 0 and list(report) == ["command", "machine", "rows", "growth"]
    assert "head solved on the mean token, T tokens" in out and "1 head step on the CLS token, T mlp" in out
    solved, rows = ({r["method"]: r for r in report["rows"] if r["size"] == size} for size in ("solved", "tiny"))
    assert list(rows) == list(bench.METHODS) and all(bench.METHODS[name].label in out for name in rows)
    keys = {"size", "method", "error_float32", "error_float64", "cosine", "verdict", "peak_bytes", "flops"} | TIMES
    keys |= {"allowed_float32", "allowed_float64"}
    assert all(set(row) == keys and row["seconds"] > 0 and row["flops"] > 0 for row in report["rows"])
    for name in ("exact", "exact-2"):
        assert all(some[name]["verdict"] == "exact" and some[name]["error_float64"] < 1e-12 for some in (rows, solved))
    assert rows["unrolled"]["error_float64"] == 0 and rows["unrolled"]["peak_bytes"] > rows["exact"]["peak_bytes"]
    for name in ("finite-difference", "redrawn", "published", "identity", "first-order", "last-of-2", "exact-bf16"):
        assert rows[name]["verdict"] != "exact"
    assert (
        rows["exact-bf16"]["cosine"] > 0.999 and rows["exact-bf16"]["error_float64"] < 1e-12
    )  # bfloat16 costs it digits only
    assert rows["finite-difference-bf16"]["verdict"] == "noise"
    assert "Betty" not in out  # which is published.py's
    assert rows["redrawn"]["error_float64"] > 10 * rows["finite-difference"]["error_float64"]
    assert rows.keys() - solved.keys() == {"finite-difference", "redrawn", "published", "finite-difference-bf16"}
    assert all(solved[name]["error_float64"] > 1e-3 for name in ("identity", "first-order", "last-of-2"))
    assert solved["exact-bf16"]["error_float64"] < 1e-12 and 1e-4 < solved["exact-bf16"]["error_float32"] < 0.5
    assert "of unrolled autograd." in out and "of unrolled autograd; " in out  # and of finite differences, where there are


def test_t_learns_from_the_first_and_the_head_is_a_warm_one():
    cfg = mlo_mae.Config(**NANO)
    net, (theta, psi, head, _, steps) = bench.problem(cfg, PIXELS, CPU, warm=3)
    assert (
        cfg.mask_start > 0 and mlo_mae.learns_at(net.cfg, 0, 1000, 0) and mlo_mae.weighed_by(net.cfg, 0.0) and len(steps) == 2
    )
    assert psi.any() and not mlo_mae.build(cfg, PIXELS, 3, 10)[1][2].any()  # its weights start at 0
    shares = head.params.view(net.head.moments.shape)[0, cfg.width :]  # of the classes, in the last batch
    assert head.t == 3 and shares.sum() == pytest.approx(1)
    cfg = mlo_mae.Config(**bench.SIZES["tiny"][1] | {"head_steps": 2})
    _, (_, psi, head, _, _) = bench.problem(cfg, PIXELS, CPU, warm=3)
    assert head.t == 3 * 2 and not torch.equal(psi, mlo_mae.build(cfg, PIXELS, 3, 10)[1][2])


def test_the_problem_in_float64_is_the_same_one():
    net, single = bench.problem(mlo_mae.Config(**NANO), PIXELS, CPU)
    double = bench.in_double(net, single)
    for before, after in zip(single[4], double[4]):
        assert after.theta.params.dtype == after.gradient.dtype == after.eyes.dtype == torch.float64
        assert torch.equal(after.eyes, after.theta.params[: net.encoder_size])  # what T reads is the encoder of that step
        assert measure.relative_error(before.gradient, after.gradient) < 1e-4
    assert torch.equal(double[3].images2, single[3].images2.double())


def test_hypergradient_fails_where_exact_is_wrong(capsys, monkeypatch, few):
    def broken(*arguments):
        result = mlo_mae.exact(*arguments)
        return result._replace(hypergradient=result.hypergradient * (1 + 1e-9))

    monkeypatch.setitem(bench.METHODS, "exact", bench.METHODS["exact"]._replace(form=broken))
    status, report, out = run(capsys, "hypergradient", "--sizes", "tiny")
    assert status == 1 and "WRONG: exact at tiny in float64: relative error 1.0e-09, allowed 1e-12" in out
    assert "in float32" not in out.split("WRONG", 1)[1]  # there it is within rounding


def test_the_picture_has_a_panel_a_question_and_a_label_a_point(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(bench, "save_figure", lambda figure, path: saved.append(figure))
    verdicts = ["exact"] * 2 + ["noise"] * 3 + ["approximate"] * (len(bench.METHODS) - 5)
    rows = {
        name: {"error_float32": 10.0 ** (n - 7), "seconds": 0.1 + n, "peak_bytes": (3 + n) * 2**20, "verdict": verdict}
        for n, (name, verdict) in enumerate(zip(bench.METHODS, verdicts))
    }
    grown = [
        {"along": along, "value": value, "method": form, "seconds": value / 10, "peak_bytes": value * 2**21}
        for along, values in bench.GROWTH.items()
        for value in values
        for form in bench.FORMS
    ]
    bench.draw(rows, bench.METHODS, "tiny", grown, tmp_path / "picture.png")
    figure = saved[0]
    nothing_overlaps(figure)
    above, below = figure.axes[:3], figure.axes[3:]
    labels = [method.label for method in bench.METHODS.values()]
    assert [text.get_text() for text in above[0].get_yticklabels()] == labels
    for axis, name, scale in zip(above, ("error_float32", "seconds", "peak_bytes"), (1, 1e3, 2**-20)):
        points = axis.collections[0].get_offsets().tolist()
        assert points == [[pytest.approx(scale * row[name]), place] for place, row in enumerate(rows.values())]
        for text, point in zip(axis.texts, points):
            assert list(text.xy) == point and float(text.get_text()) == pytest.approx(point[0], rel=0.05)
            assert text.get_window_extent().x1 <= axis.bbox.x1
        colours = [tuple(colour) for colour in axis.collections[0].get_facecolors()]
        assert len({(verdict, colour) for verdict, colour in zip(verdicts, colours)}) == 3 == len(set(colours))
    assert len(below) == 6 and below[0].get_title(loc="left") == "How does time grow with depth?"
    for axis, (name, along) in zip(below, ((name, along) for name in ("time", "memory") for along in bench.GROWTH)):
        assert len(axis.lines) == 3 and axis.get_xlabel() == bench.ALONG[along] and axis.get_ylim()[0] == 0
        for line in axis.lines:
            wanted = [100 * value if name == "time" else 2 * value for value in bench.GROWTH[along]]
            assert list(line.get_xdata()) == list(bench.GROWTH[along]) and np.allclose(line.get_ydata(), wanted)
    bench.draw(dict(itertools.islice(rows.items(), 3)), bench.METHODS, "tiny", grown, tmp_path / "picture.png")
    nothing_overlaps(saved[1])
    for axis in saved[1].axes[:3]:  # of few rows, too, nothing lies on the frame
        boxes = [text.get_window_extent() for text in axis.texts]
        assert all(axis.bbox.y0 < box.y0 and box.y1 < axis.bbox.y1 for box in boxes)


@pytest.mark.slow
def test_hypergradient_writes_table_and_picture(capsys, monkeypatch, tmp_path, few):
    monkeypatch.setattr(measure, "BENCHMARKS", tmp_path / "benchmarks")
    status, report, out = run(capsys, "hypergradient", "--sizes", "tiny", "--save")
    pages, pictures = ([*(tmp_path / "benchmarks").glob(f"hypergradient-*.{suffix}")] for suffix in ("md", "png"))
    assert status == 0 and len(pages) == len(pictures) == 1
    page = pages[0].read_text("utf-8")
    assert page.startswith("`python bench.py hypergradient --sizes tiny --save ") and "| exact " in page
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    assert {row["along"] for row in report["growth"]} == {"depth", "batch", "unrolled steps"}
    assert {"along", "value", "method", "peak_bytes", "flops"} | TIMES == set(report["growth"][0])


def test_kernels(capsys):
    status, report, out = run(capsys, "kernels", "--shapes", "cifar", "--batch-size", "2", "--dtypes", "fp32", "--no-compile")
    assert status == 0 and list(report) == ["command", "machine", "rows"]
    assert {row["kernel"] for row in report["rows"]} == set(KERNELS)
    common = {"kernel", "shape", "dtype", "direction", "implementation", "error"} | TIMES
    for row in report["rows"]:
        assert set(row) == common | ({"rate", "share_of_ceiling", "speedup"} if row["implementation"] == "ours" else set())
    cells = {}
    for row in report["rows"]:
        cells.setdefault((row["kernel"], row["shape"], row["direction"]), {})[row["implementation"]] = row
    for (kernel, shape, direction), cell in cells.items():
        ours, copy = cell["ours"], cell["copy"]["seconds"]
        if kernel != "attention":
            assert ours["share_of_ceiling"] == pytest.approx(copy / ours["seconds"])
            continue
        batch, n, _, heads, d = json.loads(shape.split("]")[0] + "]")
        made = {"forward": 2, "backward": 5, "jvp": 6}[direction] * 2 * batch * heads * n * n * d
        assert ours["rate"] == pytest.approx(made / ours["seconds"])
        assert ours["share_of_ceiling"] == pytest.approx(made / PEAK / ours["seconds"])
    flash = [row for row in report["rows"] if row["implementation"] == "SDPA flash"]
    assert flash and {row["direction"] for row in flash} == {"forward", "backward"}
    cudnn = [row for row in report["rows"] if row["implementation"] == "SDPA cuDNN"]
    assert cudnn and all(row["seconds"] is None for row in cudnn)  # it refuses a CPU


def test_a_comparison_that_fails_leaves_the_others_which_are_saved_as_they_come(capsys, monkeypatch, tmp_path):
    path, saved, seen, right = tmp_path / "rows.jsonl", [], [], bench.race

    def failing(case, direction, *rest):
        saved.append([page.read_text("utf-8") for page in (tmp_path / "benchmarks").glob("*.md")])
        seen.append(path.read_text("utf-8").count('"kernel"'))
        if case.kernel == "scatter_tokens":
            raise RuntimeError("no room\nat all")
        return right(case, direction, *rest)

    monkeypatch.setattr(measure, "BENCHMARKS", tmp_path / "benchmarks")
    monkeypatch.setattr(bench, "race", failing)
    words = ("--shapes", "cifar", "--batch-size", "2", "--dtypes", "fp32", "--no-compile", "--save", "--rows", str(path))
    status, report, out = run(capsys, "kernels", *words)
    assert status == 1 and out.count("WRONG: scatter_tokens") == 3 and "RuntimeError: no room\n" in out
    assert {row["kernel"] for row in report["rows"]} == {"gather_patches", "select_patches", "patch_loss", "attention"}
    assert "| gather_patches |" in saved[1][0] and "| patch_loss" in saved[-1][0]
    (page,) = (tmp_path / "benchmarks").glob("*.md")
    text = page.read_text("utf-8")
    assert page.name.startswith("kernels-cifar-fp32-2-") and text in f"`{text.split('`')[1]}`\n\n{out}"
    assert seen[:3] == [0, 3, 6]  # ours, eager and a copy of each
    first, *rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text("utf-8").splitlines()]
    assert first["command"] == f"python bench.py kernels {' '.join(words)} --device cpu --repeats 1"
    assert first["machine"] == report["machine"]
    assert [row for row in rows if "failed" not in row] == report["rows"]
    assert [row["failed"] for row in rows if "failed" in row] == ["RuntimeError: no room"] * 3
    run(capsys, "rates", "--rows", str(path))
    whole = path.read_text("utf-8").splitlines()
    assert json.loads(whole[1 + len(rows)])["command"].startswith("python bench.py rates") and len(whole) > len(rows) + 4


def test_some_kernels_alone(capsys):
    words = "--shapes", "tiny", "--batch-size", "2", "--dtypes", "fp32", "--no-compile"
    status, report, _ = run(capsys, "kernels", "--kernels", "patch_loss", "select_patches", *words)
    assert status == 0 and {row["kernel"] for row in report["rows"]} == {"patch_loss", "select_patches"}


def test_a_wrong_kernel_gets_no_speedup(capsys, monkeypatch):
    right = kernels.patch_loss
    monkeypatch.setattr(kernels, "patch_loss", lambda pred, images, mask: right(pred, images, mask) * (1 + 1e-3))
    status, report, out = run(capsys, "kernels", "--shapes", "cifar", "--batch-size", "2", "--dtypes", "fp32", "--no-compile")
    assert status == 1 and "WRONG: patch_loss" in out and "more than twice eager's" in out
    ours = [row for row in report["rows"] if row["implementation"] == "ours"]
    assert all((row["speedup"] is None) == (row["kernel"] == "patch_loss") for row in ours)


@pytest.mark.parametrize("block", bench.RIVALS.values(), ids=bench.RIVALS)
def test_a_rival_does_the_same_work(block):
    """Its block, given the weights of ours, gives the same; and its whole step moves all parameters downhill."""
    torch.manual_seed(0)
    try:
        theirs = block(16, 2)
    except ImportError:
        pytest.skip("needs timm")
    ours, x = mlo_mae.Block(16, 2), torch.randn(3, 5, 16)
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(theirs(x), ours(x), atol=1e-5)
    cfg = mlo_mae.Config(**NANO)
    _, (*_, steps) = bench.problem(cfg, PIXELS, CPU, 1)
    step = bench.rival_step(cfg, steps[-1], block)
    for group in (optimizer := step.__closure__[[*step.__code__.co_freevars].index("optimizer")].cell_contents).param_groups:
        group["lr"] = 1e-2
    before = [p.clone() for group in optimizer.param_groups for p in group["params"]]
    losses = [step().item() for _ in range(30)]
    assert losses[-1] < losses[0] < 3
    assert not any(torch.equal(p, old) for p, old in zip((p for g in optimizer.param_groups for p in g["params"]), before))


# Operators of an outer iteration, which do not depend on widths, batches or patches. Each is a launch on a GPU, where whatever
# has a kernel of its own takes fewer. Before LayerNorm's tangent and AdamW were brought down there were 4,862 and 14,165.
# Some 520 are there since levels 2 and 3 encode each by itself, which on a CPU takes a quarter less time than both at once.
LAUNCHES = {"cifar100": (mlo_mae.CIFAR, 4467), "width 192": ({"depth": 12}, 13887)}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_an_outer_iteration_has_no_more_operators_than_it_had(name):
    settings, most = LAUNCHES[name]
    small = {"width": 16, "heads": 2, "decoder_width": 16, "decoder_heads": 2, "masking_width": 8, "patch_size": 8}
    cfg = mlo_mae.Config(**settings | small | {"batch_size": 2, "labelled_batch_size": 4})
    net, (theta, psi, head, _, _) = bench.problem(cfg, 32, CPU, 1, warm=1)
    state, rates = mlo_mae.State(5, theta, head, mlo_mae.fresh_level(psi, CPU)), mlo_mae.rates_of(net, CPU)
    sizes = (cfg.batch_size, cfg.labelled_batch_size, cfg.labelled_batch_size)
    streams = mlo_mae.Streams(
        *(iter([next(bench.random_batches(32, n, CPU)) for _ in range(cfg.level1_steps)]) for n in sizes)
    )
    count = measure.operators(lambda: mlo_mae.outer_iteration(net, state, streams, 1000, *rates))
    assert 0.99 * most < count <= most


@pytest.mark.slow
def test_step(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    status, report, out = run(capsys, "step", "--batch-size", "6", "--profile", str(trace))
    assert status == 0 and list(report) == ["command", "machine", "rows", "summary"]
    rows = {row["part"]: row for row in report["rows"]}
    keys = {"part", "times", "peak_bytes", "flops", "operators", "share_of_time", "share_of_flops", "share_of_peak"} | TIMES
    assert all(set(row) == keys for row in rows.values())
    assert rows["level-1 step"]["times"] == 2 and "outer iteration, kernels off" not in rows
    parts = [row for row in rows.values() if row["times"]]
    assert sum(row["share_of_flops"] for row in parts) == pytest.approx(1)
    # The parts are the whole: encoder pass, jvp and T make the mask update; only T's look at p comes on top of MAE's step.
    assert "head solved on the mean token, T tokens" in out
    update = sum(rows[name]["flops"] for name in ("levels 2 and 3: encoder", "jvp of the autoencoder", "T: backward and step"))
    assert rows["mask update"]["flops"] == update
    assert rows["level-1 step"]["flops"] > rows["plain MAE step"]["flops"]
    assert sum(rows[name]["operators"] for name in ("levels 2 and 3: encoder", "jvp of the autoencoder")) > 100
    summary = report["summary"]
    rivals = [row["seconds"] for name, row in rows.items() if name.startswith("rival: ")]
    assert rivals and summary["rival_ratio"] == pytest.approx(rows["plain MAE step"]["seconds"] / min(rivals))
    assert summary["batch_size"] == summary["labelled_batch_size"] == 6
    cfg = mlo_mae.Config()  # what is not a size
    assert summary["updates"] == math.ceil(cfg.epochs * bench.TRAINING_IMAGES["shapes"] * (1 - cfg.val_fraction) / (6 * 2))
    plain, whole = (rows[name]["seconds"] for name in ("plain MAE step", "outer iteration"))
    until = mlo_mae.Config.mask_until
    pace = 0.25 * 2 * plain + (until - 0.25) * whole + (1 - until) * 2 * plain  # 0.25: NANO's mask_start
    assert summary["hours"] == pytest.approx(summary["updates"] * pace / 3600) and "the first 25 % of them plain MAE" in out
    assert f"the last {100 * (1 - until):.0f} % level-1 steps under the T that was learned" in out
    assert summary["images_per_second"] == pytest.approx(6 * 2 / pace)
    assert summary["input_images_per_second"] > summary["needed_images_per_second"]  # from memory
    needs = 6 / plain, (6 * 2 + 2 * 6) / whole
    assert summary["needed_images_per_second"] == pytest.approx(max(needs))
    assert summary["overhead"] == pytest.approx(summary["time_ratio"] / summary["operation_ratio"])
    assert json.loads(trace.read_text("utf-8"))["traceEvents"]


def test_some_forms_alone_have_their_judges(capsys):
    words = "hypergradient", "--sizes", "tiny", "--methods", "first-order", "exact-2"
    status, report, _ = run(capsys, *words)
    rows = {row["method"]: row for row in report["rows"]}
    assert status == 0 and set(rows) == {"first-order", "exact", "unrolled", "exact-2", "unrolled-2"}
    assert rows["exact-2"]["verdict"] == "exact" and rows["first-order"]["verdict"] != "exact"


def test_a_form_that_no_size_has_is_refused(capsys):
    assert bench.main(["hypergradient", "--sizes", "solved", "--methods", "finite-difference"]) == 2
    assert "--methods finite-difference has no part in --sizes solved" in capsys.readouterr().err


def test_what_is_only_compared_with_may_fail(capsys, monkeypatch, tmp_path):
    """The parts that are a run's may not. Memory, then times, are in the file before anything follows from them."""
    real, path = bench.rival_step, tmp_path / "rows.jsonl"
    monkeypatch.setattr(bench, "RIVALS", {"good": bench.SdpaBlock, "bad": None})
    monkeypatch.setattr(bench, "rival_step", lambda *how: real(*how) if how[2] else lambda: [][0])
    status, report, out = run(capsys, "step", "--batch-size", "2", "--rows", str(path))
    assert status == 1 and out.count("WRONG") == 1 and "WRONG: bad: IndexError: list index out of range" in out
    assert "bad" not in {row["part"] for row in report["rows"]} and report["summary"]["best_rival"] == "good"
    memory, times = (row["so_far"] for row in rows_of(path) if "so_far" in row)
    assert all(set(row) == {"part", "peak_bytes"} for row in memory) and all(row["seconds"] > 0 for row in times)
    monkeypatch.setattr(bench, "RIVALS", {})
    status, report, out = run(capsys, "step", "--batch-size", "2")
    assert status == 0 and report["summary"]["best_rival"] is None and "No rival's step could be measured." in out
    monkeypatch.setattr(bench, "parts_of", lambda *arguments: {"mask update": lambda: [][0]})
    with pytest.raises(IndexError):
        run(capsys, "step", "--batch-size", "2")


def test_a_published_preset_has_one_part_alone(capsys, monkeypatch):
    monkeypatch.setitem(mlo_mae.PRESETS, "cifar100", mlo_mae.CIFAR | NETWORKS | {"data": "cifar100", "image_size": PIXELS})
    status, report, out = run(capsys, "step", "--preset", "cifar100", "--batch-size", "4")
    (whole,) = (row["seconds"] for row in report["rows"] if row["part"] == "outer iteration")
    assert status == 0 and "plain MAE steps" not in out and "T that was learned" not in out and "T mlp" in out
    summary = report["summary"]
    assert summary["images_per_second"] == pytest.approx(4 * 2 / whole)
    assert summary["hours"] == pytest.approx(summary["updates"] * whole / 3600)
    assert summary["needed_images_per_second"] == pytest.approx((4 * 2 + 2 * 4) / whole)


def test_the_mask_updates_parts_see_the_batches_that_it_joins():
    cfg = mlo_mae.Config(**NANO)
    net, arguments = bench.problem(cfg, PIXELS, CPU, cfg.mask_batches)
    parts = bench.parts_of(net, arguments)
    assert len(parts["jvp of the autoencoder"]()) == 2 * cfg.batch_size
    theta, psi, head, labelled, steps = arguments
    gradient = mlo_mae.exact(net, theta, psi, head, labelled, [mlo_mae.joined(steps)]).hypergradient
    assert torch.equal(parts["mask update"]().mu, 0.9 * gradient + 0.1 * gradient)


@pytest.mark.slow
def test_the_images_of_a_preset_that_decodes_files(tmp_path):
    cfg = mlo_mae.Config(data="imagenet", batch_size=8, workers=0)
    split = bench.training_images(cfg, 32, torch.device("cpu"), tmp_path)
    assert abs(len(split) - 0.8 * 508) < 1  # 512 files, 4 of them for testing, a fifth held out
    assert next(split.stream(8, 0)).images.shape == (8, 3, 32, 32)
    slow, real = 0.01, split.stream

    def delayed(*arguments):
        for batch in real(*arguments):
            time.sleep(slow)
            yield batch

    split.stream = delayed
    assert 0 < bench.input_rate(split, cfg, torch.device("cpu")) < 8 / slow


def test_rates(capsys):
    status, report, out = run(capsys, "rates")
    assert status == 0 and list(report) == ["command", "machine", "rows"]
    copy, *products = report["rows"]
    assert 1e8 < copy["bytes_per_second"] < 1e13 and f"{copy['bytes_per_second'] / 1e9:.4g} GB/s" in out
    assert {row["dtype"]: row["flops_per_second"] for row in products} == {"bf16": PEAK, "fp32": PEAK}


# ------------------------------------------------------------------------------------------------------------ gpu

FAKE = """import json, sys, time
words = sys.argv[1:]
path = words[words.index("--rows") + 1]
def row(**what):
    with open(path, "a") as file:
        print(json.dumps(what), file=file)
print("begun", words[0], flush=True)
row(command=" ".join(words))
row(number=1)
if words[0] == "slow":
    time.sleep(60)
row(number=2)
if words[0] == "faulty":
    print("an illegal memory access", file=sys.stderr)
    sys.exit(3)
if words[0] == "raising":
    raise ValueError("no")
if words[0] == "wrong":
    print("WRONG: off by 2")
print('{"command":"fake"}')
sys.exit(int(words[0] == "wrong"))
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """`gpu` has these commands, of a program that writes two rows; it fails at some of them, and takes a minute at `slow`."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "fake.py"))

    def set_commands(*names):
        monkeypatch.setattr(bench, "gpu_commands", lambda device, out: {name: [name] for name in names})

    return set_commands


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_failure_is_a_row_and_no_end(capsys, fake, tmp_path):
    fake("first", "faulty", "last")
    out = tmp_path / "out"
    status, report, text = run(capsys, "gpu", "--out", str(out))
    assert status == 1 and [row["status"] for row in report["rows"]] == [0, 3, 0]
    assert "WRONG: faulty: an illegal memory access\n" in text and text.count("WRONG") == 1
    for name, code, reason in (("first", 0, ""), ("faulty", 3, "an illegal memory access"), ("last", 0, "")):
        command, one, two, end = rows_of(out / f"{name}.jsonl")
        assert [one, two] == [{"number": 1}, {"number": 2}] and (end["status"], end["reason"]) == (code, reason)
        assert command["command"] == f"{name} --device cpu --repeats 1 --rows {out / name}.jsonl" and end["seconds"] > 0
        assert end["reported"] == (code == 0) and end in [{n: row[n] for n in end} for row in report["rows"]]
        assert (out / f"{name}.txt").read_text("utf-8").startswith(f"begun {name}\n")


def test_a_fault_may_well_have_the_status_of_a_wrong_result(capsys, fake, tmp_path):
    """Python's status after an exception is 1, as bench.py's is after WRONG: the report tells which it was."""
    fake("wrong", "raising")
    status, report, text = run(capsys, "gpu", "--out", str(tmp_path / "out"))
    assert status == 1 and [(row["status"], row["reported"]) for row in report["rows"]] == [(1, True), (1, False)]
    assert "wrong: WRONG: off by 2" in text and "raising: ValueError: no" in text
    fake("wrong")
    status, report, text = run(capsys, "gpu", "--out", str(tmp_path / "out"))  # what was wrong still is
    assert status == 1 and not report["rows"] and "wrong: WRONG: off by 2" in text and "before" not in text
    fake("wrong", "raising")
    _, report, text = run(capsys, "gpu", "--out", str(tmp_path / "out"))
    assert [row["measured"] for row in report["rows"]] == ["raising"]


def test_nothing_is_overwritten_and_what_has_ended_is_not_run_again(capsys, fake, tmp_path):
    fake("first", "faulty")
    out = tmp_path / "out"
    run(capsys, "gpu", "--out", str(out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    status, report, text = run(capsys, "gpu", "--out", str(out))
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert status == 1 and [row["measured"] for row in report["rows"]] == ["faulty"] and "before" in text
    assert {name: content for name, content in after.items() if name.startswith("first")}.items() <= before.items()
    assert all(after[name].startswith(content) for name, content in before.items())
    assert len(rows_of(out / "faulty.jsonl")) == 8  # both attempts


def test_it_stops_within_its_time(capsys, fake, tmp_path):
    fake("first", "slow", "last")
    began = time.monotonic()
    status, report, text = run(capsys, "gpu", "--out", str(tmp_path / "out"), "--seconds", "2")
    assert time.monotonic() - began < 4 and status == 1
    assert [(row["measured"], row["status"]) for row in report["rows"]] == [("first", 0), ("slow", None)]
    assert rows_of(tmp_path / "out/slow.jsonl")[1] == {"number": 1} and "cut off" in text and "no time left" in text


def test_what_a_gpu_is_asked_can_be_typed(tmp_path):
    for device in ("cpu", "cuda"):
        commands = bench.gpu_commands(torch.device(device), tmp_path)
        asked = [bench.parse(flags) for flags in commands.values()]
        verbs = [each.verb for each in asked]
        assert device == "cpu" or verbs[:6] == ["rates", *["step"] * 2, *["hypergradient"] * 2, "kernels"], verbs
        assert {each.verb for each in asked} == {"rates", "hypergradient", "step", "kernels"} and asked[0].verb == "rates"
        assert all(name.startswith(flags[0]) and "/" not in name for name, flags in commands.items())
    assert {size for each in asked if each.verb == "hypergradient" for size in each.sizes} == set(bench.SIZES)
    races = [
        (k, s, d) for each in asked if each.verb == "kernels" for k in each.kernels for s in each.shapes for d in each.dtypes
    ]
    assert sorted(races) == sorted(itertools.product(bench.KERNELS, bench.USUAL, bench.DTYPES))


def test_some_commands_alone(capsys, fake, tmp_path):
    fake("first", "faulty", "last")
    status, report, _ = run(capsys, "gpu", "--out", str(tmp_path / "out"), "--only", "last", "first")
    assert status == 0 and [row["measured"] for row in report["rows"]] == ["last", "first"]
    assert bench.main(["gpu", "--out", str(tmp_path / "other"), "--device", "cpu", "--only", "frist"]) == 2
    assert "--only frist is not among first, faulty, last" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_gpu_as_it_is_at_tiny_sizes(capsys, tmp_path):
    status, report, text = run(capsys, "gpu", "--out", str(tmp_path))
    assert status == 0 and all(row["status"] == 0 for row in report["rows"]), text
    for name in ("rates", "hypergradient", "step", "kernels"):
        first, *rows, end = rows_of(tmp_path / f"{name}.jsonl")
        rows = [row for row in rows if "so_far" not in row]
        assert first["machine"] == report["machine"] and len(rows) >= 3 and end["reported"]
        assert json.loads((tmp_path / f"{name}.txt").read_text("utf-8").splitlines()[-1])["rows"] == rows


# --------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("argv", [["hypergradient", "--sizes", "huge"], ["step", "--repeats", "0"], ["kernel"], [], ["gpu"]])
def test_bad_flags_end_in_one_line(capsys, argv):
    assert bench.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ") and error.count("\n") == 1


def test_what_the_user_can_mend_ends_in_one_line(capsys, tmp_path):
    (tmp_path / "kept").write_text("a trace of before")
    for where in ("no/folder", "kept"):
        bad = ["step", "--batch-size", "2", "--repeats", "1", "--profile", str(tmp_path / where)]
        assert bench.main([*bad, "--device", "cpu"]) == 2
    assert (tmp_path / "kept").read_text("utf-8") == "a trace of before"
    if not torch.cuda.is_available():
        assert bench.main(["step", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error and all(line.startswith("bench: ") for line in error.splitlines())
