"""Every verb of bench.py at tiny sizes: what it prints, when it fails, and its counters against cases known by hand."""

import functools
import json
import math
import sys
import time

import pytest
import torch
from torch.utils._pytree import tree_leaves

import bench
import mlo_mae

CPU = torch.device("cpu")
TIMES = {"seconds", "seconds_q1", "seconds_q3"}
PEAK = 1e9  # operations a second, so low that attention is bound by it
NANO = (8, dict(width=8, depth=1, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2, masking_width=8,
                level1_steps=2, mask_start=0.25, batch_size=4, labelled_batch_size=4))  # fmt: skip


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "tiny", NANO)
    monkeypatch.setitem(mlo_mae.PRESETS, "shapes", NANO[1] | {"image_size": NANO[0]})
    monkeypatch.setitem(bench.GEOMETRY, "cifar", (8, 2))
    monkeypatch.setattr(bench, "product_rate", lambda device, dtype: PEAK)


def run(capsys, *argv, device="cpu"):
    """(exit status, the last line's object, all of stdout)."""
    status = bench.main([*argv, "--device", device, "--repeats", "1"])
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1], parse_constant=pytest.fail)  # NaN is no JSON
    assert report["verb"] == argv[0] and report["machine"]["threads"] == torch.get_num_threads()
    return status, report, out


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(bench, "GROWTH", {"depth": (1,), "batch": (2,), "unrolled steps": (1,)})
    monkeypatch.setattr(bench, "METHODS", {name: bench.METHODS[name] for name in ("exact", "unrolled", "finite-difference")})


def test_hypergradient(capsys):
    status, report, out = run(capsys, "hypergradient", "--sizes", "tiny")
    assert status == 0 and list(report) == ["verb", "machine", "rows", "growth"]
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == list(bench.METHODS) and all(bench.METHODS[name].label in out for name in rows)
    keys = {"size", "method", "error_float32", "error_float64", "cosine", "verdict", "peak_bytes", "flops",
            "allowed_float32", "allowed_float64"} | TIMES  # fmt: skip
    assert all(set(row) == keys and row["seconds"] > 0 and row["flops"] > 0 for row in rows.values())
    for name in ("exact", "exact-2"):
        assert rows[name]["verdict"] == "exact" and rows[name]["error_float64"] < 1e-12
    assert rows["unrolled"]["error_float64"] == 0 and rows["unrolled"]["peak_bytes"] > rows["exact"]["peak_bytes"]
    for name in ("finite-difference", "redrawn", "published", "identity", "first-order", "last-of-2", "exact-bf16"):
        assert rows[name]["verdict"] != "exact"
    assert rows["exact-bf16"]["cosine"] > 0.999 and rows["exact-bf16"]["error_float64"] < 1e-12  # bfloat16 costs it digits only
    assert rows["finite-difference-bf16"]["verdict"] == "noise"
    assert ("Betty" in out) == ("betty" in rows)  # silent where it is not installed
    assert rows["redrawn"]["error_float64"] > 10 * rows["finite-difference"]["error_float64"]


def test_masks_are_learned_from_the_first():
    size, settings = NANO
    cfg = mlo_mae.Config(**settings)
    net, (_, psi, head, _, steps) = bench.problem(cfg, size, CPU, warm=1)
    assert cfg.mask_start > 0 and mlo_mae.learned_by(net.cfg, 0.0) and head.t == cfg.head_steps and len(steps) == 2
    assert not torch.equal(psi, mlo_mae.build(cfg, size, 3, 10)[1][2])


def test_hypergradient_fails_where_exact_is_wrong(capsys, monkeypatch, few):
    def broken(*arguments):
        result = mlo_mae.exact(*arguments)
        return result._replace(hypergradient=result.hypergradient * (1 + 1e-9))

    monkeypatch.setitem(mlo_mae.HYPERGRADIENTS, "exact", broken)
    status, report, out = run(capsys, "hypergradient", "--sizes", "tiny")
    assert status == 1 and "WRONG: exact at tiny in float64: relative error 1.0e-09, allowed 1e-12" in out
    assert "in float32" not in out.split("WRONG", 1)[1]  # there it is within rounding


def test_betty_is_driven_to_the_derivative_that_it_approximates(monkeypatch):
    """Where steps and differences are small, Betty's -1 for dU/dg and its differences after the steps are all that is left."""
    configs = pytest.importorskip("betty.configs")
    monkeypatch.setattr(configs, "Config", functools.partial(configs.Config, darts_alpha=1e-4))
    size, settings = NANO
    cfg = mlo_mae.Config(**settings | {"head_norm": "layer", "lr": 1e-7, "head_lr": 1e-7, "update_jacobian": "identity"})
    net, arguments = bench.problem(cfg, size, CPU, count=1)
    arguments = bench.in_double(net, arguments)
    before = [x.clone() for x in tree_leaves(arguments) if torch.is_tensor(x)]
    found, exact = (form(net, *arguments).hypergradient for form in (bench.by_betty, mlo_mae.exact))
    assert bench.relative_error(found, exact) < 1e-3
    assert all(map(torch.equal, before, [x for x in tree_leaves(arguments) if torch.is_tensor(x)]))


def test_hypergradient_writes_table_and_picture(capsys, monkeypatch, tmp_path, few):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    status, report, out = run(capsys, "hypergradient", "--sizes", "tiny", "--save")
    pages, pictures = ([*(tmp_path / "benchmarks").glob(f"hypergradient-*.{suffix}")] for suffix in ("md", "png"))
    assert status == 0 and len(pages) == len(pictures) == 1
    page = pages[0].read_text()
    assert page.startswith("`python bench.py hypergradient --sizes tiny --save ") and "| exact " in page
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    assert {row["along"] for row in report["growth"]} == {"depth", "batch", "unrolled steps"}
    assert {"along", "value", "method", "peak_bytes", "flops"} | TIMES == set(report["growth"][0])


def test_kernels(capsys):
    status, report, out = run(capsys, "kernels", "--shapes", "cifar", "--batch-size", "2", "--dtypes", "fp32", "--no-compile")
    assert status == 0 and list(report) == ["verb", "machine", "rows"]
    assert {row["kernel"] for row in report["rows"]} == {
        "gather_patches", "select_patches", "scatter_tokens", "patch_loss", "attention"}  # fmt: skip
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
    saved, compare = [], bench.compare

    def failing(case, direction, *rest):
        saved.append([page.read_text() for page in (tmp_path / "benchmarks").glob("*.md")])
        if case.kernel == "scatter_tokens":
            raise RuntimeError("no room\nat all")
        return compare(case, direction, *rest)

    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    monkeypatch.setattr(bench, "compare", failing)
    status, report, out = run(
        capsys, "kernels", "--shapes", "cifar", "--batch-size", "2", "--dtypes", "fp32", "--no-compile", "--save"
    )
    assert status == 1 and out.count("WRONG: scatter_tokens") == 3 and "RuntimeError: no room\n" in out
    assert {row["kernel"] for row in report["rows"]} == {"gather_patches", "select_patches", "patch_loss", "attention"}
    assert "| gather_patches |" in saved[1][0] and "| patch_loss" in saved[-1][0]
    (page,) = (tmp_path / "benchmarks").glob("*.md")
    assert page.name.startswith("kernels-cifar-fp32-2-") and page.read_text() in f"`{page.read_text().split('`')[1]}`\n\n{out}"


def test_every_repeat_of_a_kernel_has_new_inputs():
    seen = []

    def watched(x, ids):
        seen.append((float(x.sum()), ids))
        return x * ids

    case = bench.Case("watched", "", (torch.ones(4, 3), torch.arange(12).view(4, 3)), 1, watched, torch.mul, {"forward": (144, 0)})
    rows, error = bench.compare(case, "forward", False, 3, CPU)
    assert error is None and all(torch.equal(ids.sort(0).values, case.tensors[1]) for _, ids in seen)
    assert len({total for total, _ in seen}) == 1 + 3  # the check, and three repeats
    assert 12.0 not in {total for total, _ in seen}  # none with the inputs as they were given


@pytest.mark.skipif("triton" not in sys.modules, reason="triton is not installed here")
def test_tiles_are_cut_as_named_and_a_wrong_kernel_is_named(capsys, monkeypatch):
    attention, seen, factor = sys.modules["kernels.attention"], [], 1
    launch = attention.launch

    def watched(kernel, *rest, **cut):
        seen.append(f"{cut['ROWS']} x {cut['KEYS']}, {cut['num_warps']} warps" + ", a row" * ("TOKEN" in cut))
        launch(kernel, *rest, **cut)

    def cases(geometry, batch, dtype, device):
        qkv, work = torch.randn(batch, 20, 3, 1, 16, device=device, dtype=dtype), dict.fromkeys(["forward", "backward", "jvp"])
        yield bench.Case("attention", "short", (qkv,), 1, lambda x: factor * bench.kernels.attention(x),
                         attention.attention_reference, work)  # fmt: skip

    monkeypatch.setattr(attention, "launch", watched)
    monkeypatch.setattr(bench, "cases", cases)
    device, dtype = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")  # the interpreter's bfloat16 is not a chip's
    arguments = "tiles", "--shapes", "cifar", "--batch-size", "1", "--dtypes", dtype
    status, report, out = run(capsys, *arguments, device=device)
    assert status == 0 and {row["tiles"] for row in report["rows"]} == set(seen)
    for direction in ("forward", "backward", "jvp"):
        tiles = [row["tiles"] for row in report["rows"] if row["direction"] == direction]
        assert len(set(tiles)) == len(tiles) > 2
    assert all(set(row) == {"shape", "dtype", "direction", "tiles"} | TIMES and row["seconds"] > 0 for row in report["rows"])
    factor = 1.01
    status, report, out = run(capsys, *arguments, device=device)
    assert status == 1 and not report["rows"] and out.count(f"WRONG: {dtype} short") == 3


def test_tiles_need_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(bench.kernels.backend, "DEVICES", {"cuda"})
    assert bench.main(["tiles", "--device", "cpu"]) == 2
    assert "need a GPU" in capsys.readouterr().err


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_calls_in_a_row_take_their_inputs_in_turn(device):
    device = torch.device(device)
    inputs = [(torch.zeros(3, device=device), torch.full((), float(10**n), device=device)) for n in range(2)]
    run = bench.in_a_row(lambda total, step: lambda: total.add_(step), inputs, 5, device)
    before = [total.clone() for total, _ in inputs]
    run()
    assert [(total - old).tolist() for (total, _), old in zip(inputs, before)] == [[3.0] * 3, [20.0] * 3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "backward", "jvp"])
def test_calls_in_a_row_run_every_direction(device, direction):
    device = torch.device(device)
    case = bench.Case("twice", "", (torch.ones(4, 3, device=device),), 1, torch.square, torch.square, {direction: (96, 0)})
    rows, error = bench.compare(case, direction, False, 1, device)
    assert error is None and [row["implementation"] for row in rows] == ["ours", "eager", "copy"]
    assert all(row["seconds"] > 0 for row in rows)


def test_a_plain_copy_moves_the_bytes_that_it_is_asked_to():
    make = bench.copier((4096.0, 0), CPU)
    assert make()().nbytes == 4096 // 2  # read once, written once


def test_a_wrong_kernel_gets_no_speedup(capsys, monkeypatch):
    right = bench.kernels.patch_loss
    monkeypatch.setattr(bench.kernels, "patch_loss", lambda pred, images, mask: right(pred, images, mask) * (1 + 1e-3))
    status, report, out = run(capsys, "kernels", "--shapes", "cifar", "--batch-size", "2", "--dtypes", "fp32", "--no-compile")
    assert status == 1 and "WRONG: patch_loss" in out and "more than twice eager's" in out
    ours = [row for row in report["rows"] if row["implementation"] == "ours"]
    assert all((row["speedup"] is None) == (row["kernel"] == "patch_loss") for row in ours)


def test_step(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    status, report, out = run(capsys, "step", "--batch-size", "6", "--profile", str(trace))
    assert status == 0 and list(report) == ["verb", "machine", "rows", "summary"]
    rows = {row["part"]: row for row in report["rows"]}
    keys = {"part", "times", "peak_bytes", "flops", "share_of_time", "share_of_flops", "share_of_peak"} | TIMES
    assert all(set(row) == keys for row in rows.values())
    assert rows["level-1 step"]["times"] == 2 and "outer iteration, kernels off" not in rows
    parts = [row for row in rows.values() if row["times"]]
    assert sum(row["share_of_flops"] for row in parts) == pytest.approx(1)
    # The parts are the whole: encoder pass, jvp and T make the mask update; only T's look at p comes on top of MAE's step.
    update = sum(rows[name]["flops"] for name in ("levels 2 and 3: encoder", "jvp of the autoencoder", "T: backward and step"))
    assert rows["mask update"]["flops"] == update
    assert rows["level-1 step"]["flops"] > rows["plain MAE step"]["flops"]
    summary = report["summary"]
    assert summary["batch_size"] == summary["labelled_batch_size"] == 6
    cfg = mlo_mae.Config()  # what is not a size
    assert summary["updates"] == math.ceil(cfg.epochs * bench.TRAINING_IMAGES["shapes"] * (1 - cfg.val_fraction) / (6 * 2))
    plain, whole = (rows[name]["seconds"] for name in ("plain MAE step", "outer iteration"))
    pace = 0.25 * 2 * plain + 0.75 * whole  # of NANO's mask_start
    assert summary["hours"] == pytest.approx(summary["updates"] * pace / 3600) and "the first 25 % of them plain MAE" in out
    assert summary["input_images_per_second"] > summary["needed_images_per_second"]  # from memory
    assert summary["needed_images_per_second"] == pytest.approx((6 * 2 + 2 * 6) / whole)
    assert summary["overhead"] == pytest.approx(summary["time_ratio"] / summary["operation_ratio"])
    assert json.loads(trace.read_text())["traceEvents"]


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


@pytest.mark.parametrize("argv", [["hypergradient", "--sizes", "huge"], ["step", "--repeats", "0"], ["kernel"], []])
def test_bad_flags_end_in_one_line(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("bench: ") and error.count("\n") == 1


def test_what_the_user_can_mend_ends_in_one_line(capsys, tmp_path):
    bad = ["step", "--batch-size", "2", "--repeats", "1", "--profile", str(tmp_path / "no" / "folder")]
    assert bench.main([*bad, "--device", "cpu"]) == 2
    if not torch.cuda.is_available():
        assert bench.main(["step", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert all(line.startswith("bench: ") for line in error.splitlines())


def test_operations_of_a_matrix_product_and_of_its_tangent():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    product = 2 * 3 * 5 * 7
    assert bench.operations(lambda: a @ b) == product
    assert bench.operations(lambda: torch.func.jvp(torch.matmul, (a, b), (a, b))) == 3 * product

    def backward():
        moving = [x.requires_grad_() for x in (a, b)]
        torch.autograd.grad((moving[0] @ moving[1]).sum(), moving)

    assert bench.operations(backward) == 3 * product


def test_peak_memory_of_a_chain():
    def chain():
        x = torch.ones(1000)  # 4000 bytes
        y = x + 1  # 8000 at once
        del x
        return y * 2  # 8000 at once

    result, peak = bench.peak_memory(chain, CPU)
    assert 8000 <= peak < 8100 and float(result[0]) == 4  # the profiler sees the scalars too


def test_quartiles_and_interleaving():
    assert bench.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"seconds": 3.0, "seconds_q1": 2.0, "seconds_q3": 4.0}
    order = []
    bench.interleaved(lambda: {name: lambda name=name: order.append(name) for name in "ab"}, 3, CPU)
    assert order == ["a", "b", "b", "a", "a", "b"]
