"""harness/measure.py: its counters against cases known by hand, and what a program that measures writes and ends with."""

import argparse
import json
import math

import pytest
import torch

from harness import UserError, cli, measure

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]

# ------------------------------------------------------------------------------------------------- time and memory


def test_operations_of_a_matrix_product_and_of_its_tangent():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    product = 2 * 3 * 5 * 7
    assert measure.operations(lambda: a @ b) == product
    assert measure.operations(lambda: torch.func.jvp(torch.matmul, (a, b), (a, b))) == 3 * product

    def backward():
        moving = [x.requires_grad_() for x in (a, b)]
        torch.autograd.grad((moving[0] @ moving[1]).sum(), moving)

    assert measure.operations(backward) == 3 * product


def test_operators_are_what_computes():
    x, weight = torch.ones(2, 3), torch.ones(3, 4, requires_grad=True)
    assert measure.operators(lambda: (x @ weight).T.reshape(8)) == 2  # a product, and a copy in another order
    assert measure.operators(lambda: x.view(6).unsqueeze(0).expand(5, 6).detach()) == 0
    assert measure.operators(lambda: torch.autograd.grad((x @ weight).sum(), weight)) == 4  # product and sum; ones, product


def test_peak_memory_of_a_chain():
    def chain():
        x = torch.ones(1000)  # 4000 bytes
        y = x + 1  # 8000 at once
        del x
        return y * 2  # 8000 at once

    result, peak = measure.peak_memory(chain, CPU)
    assert 8000 <= peak < 8100 and float(result[0]) == 4  # the profiler sees the scalars too


def test_quartiles_and_interleaving():
    assert measure.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"seconds": 3.0, "seconds_q1": 2.0, "seconds_q3": 4.0}
    order = []
    measure.interleaved(lambda: {name: lambda name=name: order.append(name) for name in "ab"}, 3, CPU)
    assert order == ["a", "b", "b", "a", "a", "b"]


@pytest.mark.parametrize("device", DEVICES)
def test_rates_are_work_over_the_shortest_time(monkeypatch, device):
    device, sizes = torch.device(device), []

    def timed(call, device):
        sizes.append(call().nbytes)
        return 0.5 + len(sizes)

    monkeypatch.setattr(measure, "seconds", timed)
    assert measure.copy_rate(device) == pytest.approx(2 * sizes[0] / 3.5)  # two calls warm up
    sizes.clear()
    rate, side = measure.product_rate(device, torch.float32, torch.bfloat16, torch.float32), math.isqrt(min(sizes) // 2)
    assert len(sizes) == 2 * (2 + 5) and set(sizes) == {2 * side**2, 4 * side**2}
    assert rate == pytest.approx(2 * side**3 / 5.5)


def test_the_machine():
    facts = measure.machine(CPU)
    assert facts["gpu"] is None and facts["cpu"] and facts["threads"] == torch.get_num_threads()
    assert facts["torch"] == torch.__version__ and json.dumps(facts)


# --------------------------------------------------------------------- calls too short for the clock, in a row


@pytest.mark.parametrize("device", DEVICES)
def test_calls_in_a_row_take_their_inputs_in_turn(device):
    device = torch.device(device)
    inputs = [(torch.zeros(3, device=device), torch.full((), float(10**n), device=device)) for n in range(2)]
    run = measure.in_a_row(lambda total, step: lambda: total.add_(step), inputs, 5, device)
    before = [total.clone() for total, _ in inputs]
    run()
    assert [(total - old).tolist() for (total, _), old in zip(inputs, before)] == [[3.0] * 3, [20.0] * 3]


def test_a_plain_copy_moves_the_bytes_that_it_is_asked_to():
    make = measure.copier(4096.0, CPU)
    assert make()().nbytes == 4096 // 2  # read once, written once


def test_inputs_suffice_that_no_cache_holds_them(monkeypatch):
    def draw():
        return torch.zeros(8, device=CPU), (torch.zeros(8),)  # 64 bytes

    assert len(measure.input_sets(draw, 100, CPU)) == 1
    monkeypatch.setattr(measure, "CACHE", 640)
    other = torch.device("meta")  # any but a CPU
    assert [len(measure.input_sets(draw, count, other)) for count in (1, 4, 100)] == [1, 4, 10]


# ------------------------------------------------------------------------------------------------- pages and errors


def test_errors():
    judge = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert measure.relative_error(torch.tensor([3.0, 4.5]), judge) == pytest.approx(0.1)
    assert measure.largest_error((judge, {"b": judge * 1.2}), (judge, {"b": judge})) == pytest.approx(0.2)
    for wrong in ((judge * math.nan, judge), (judge, judge * math.nan)):
        assert math.isnan(measure.largest_error(wrong, (judge, judge)))
    tree = measure.to_double([torch.ones(1), torch.ones(1, dtype=torch.int64), "text"])
    assert [getattr(x, "dtype", x) for x in tree] == [torch.float64, torch.int64, "text"]


def test_a_table_is_aligned_markdown():
    lines = measure.table([["a", "b"], ["long", "1"]]).splitlines()
    assert lines == ["| a    | b |", "| ---- | -: |".replace("-:", ":"), "| long | 1 |"] and len({*map(len, lines)}) == 1
    assert measure.table([["a", "b"]], [2, 4]).splitlines() == ["| a  |    b |", "| -- | ---: |"]


def test_a_page_is_whole_after_every_line(capsys, tmp_path):
    page = measure.Page(["`command`", ""], tmp_path / "page.md", tmp_path / "rows.jsonl")
    page.start(["name", "ms"], [6, 4])
    page.row(["one", "1"])
    whole = "`command`\n\n\n| name   |   ms |\n| ------ | ---: |\n| one    |    1 |\n"
    assert (tmp_path / "page.md").read_text("utf-8") == whole
    assert capsys.readouterr().out == whole.removeprefix("`command`\n\n")
    page.record({"name": "one", "error": math.nan}, {"name": "two"})
    page.append({"failed": True})
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert rows == [{"name": "one", "error": None}, {"name": "two"}, {"failed": True}] and len(page.rows) == 2
    page.say("last")
    assert (tmp_path / "page.md").read_text("utf-8") == whole + "last\n"


def test_runs_that_measure_different_things_write_different_files(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "BENCHMARKS", tmp_path / "benchmarks")
    usual = argparse.Namespace(verb="kernels", shapes=None, dtypes=None, batch_size=None, repeats=9)
    limited = argparse.Namespace(verb="kernels", shapes=["cifar"], dtypes=["bf16", "fp32"], batch_size=2)
    assert measure.name_of(usual) == "kernels" and measure.name_of(limited) == "kernels-cifar-bf16-fp32-2"
    assert measure.name_of(argparse.Namespace(verb="hypergradient", sizes=["vit-b/2"])) == "hypergradient-vit-b2"
    path = measure.saved_path("kernels", CPU, "md")
    assert path.parent == tmp_path / "benchmarks" and path.parent.is_dir()
    assert path.name.startswith("kernels-") and path.name.endswith("-threads.md") and path.name == path.name.lower()


# ---------------------------------------------------------------------------------------- programs that measure


def run(capsys, work, *argv):
    parser = cli.Parser(prog="some")
    measure.add_flags(parser, "some", work)
    status = measure.run("program", "command", lambda: parser.parse_args([*argv, "--device", "cpu"]))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_report_is_the_last_line(capsys, monkeypatch, tmp_path):
    def work(options, device, page):
        page.say(f"{options.repeats} {device}")
        return {"found": [1.0, math.inf]}

    monkeypatch.setattr(measure, "BENCHMARKS", tmp_path)
    status, out, err = run(capsys, work, "--save", "--repeats", "3")
    heading, line, report = out.splitlines()
    assert status == 0 and not err and heading.startswith("cpu ") and line == "3 cpu"
    assert json.loads(report) == {"command": "some", "machine": measure.machine(CPU), "found": [1.0, None]}
    (page,) = tmp_path.iterdir()
    assert page.read_text("utf-8") == f"`command`\n\n{heading}\n{line}\n"


def test_a_wrong_result_is_status_1_and_a_line(capsys):
    status, out, _ = run(capsys, lambda options, device, page: page.wrong.append("off by 2") or {})
    assert status == 1 and out.splitlines()[1:3] == ["", "WRONG: off by 2"] and '"command":"some"' in out


def test_what_the_user_can_mend_is_status_2_and_a_line(capsys):
    def work(options, device, page):
        raise UserError("no such size")

    assert run(capsys, work)[::2] == (2, "program: no such size\n")
    for bad in (["--repeats", "0"], ["--repeats", "many"], ["--device", "tpu"], ["--rows"]):
        status, out, err = run(capsys, work, *bad)
        assert status == 2 and not out and err.startswith("program: ") and err.count("\n") == 1
