"""published.py: a run with the published code's finite differences, and Betty's row where Betty is installed."""

import dataclasses
import functools
import json

import pytest
import torch
from helpers import SMALL, as_flags, hypergradient_problem, noise_batches, refused, relative_error, same, weights
from torch.utils._pytree import tree_leaves

import bench
import mlo_mae
from experiments import open_run, published
from experiments.published import PRESETS, Published
from harness import UserError
from harness.randomness import REDRAWN, draw_dropout, torch_generator
from harness.vectors import inverse_fan_in, weight_decays
from mlo_mae import Config, main

# --------------------------------------------------------------------------------------------------------- a run


def arguments(source, out, *more):
    """The command line of a small run with the published code's choices."""
    flags = SMALL | {"preset": "cifar100-paper", "data": source, "out": out, "epochs": 2}
    own = {name: value for name, value in flags.items() if name not in ("head_steps", "mask_batches")}  # the preset's count
    return ["published", *as_flags(own), *map(str, more)]


@pytest.fixture(scope="module")
def run(sides, tmp_path_factory):
    out = tmp_path_factory.mktemp("published") / "run"
    assert main(arguments(sides, out)) == 0
    return out


def test_a_run_records_the_published_choices(run):
    config = json.loads((run / "config.json").read_text())
    choices = {"preset": "cifar100-paper", "masking_input": "embeddings", "update_jacobian": "identity", "unroll": "last"}
    choices |= {"hypergradient": "finite-difference", "redraw_dropout": True, "head_steps": 1, "mask_start": 0}
    choices |= {"level2": "steps", "pooling": "cls", "masking_network": "mlp", "mask_choice": "highest"}
    assert config.items() >= choices.items() and (config["mask_until"], config["mask_batches"]) == (1, 1)
    assert not config["mask_restart"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["hypergradient_norm"] > 0 and row["level3_loss"] > 0 for row in rows)


def test_the_presets_are_the_methods_and_the_papers():
    assert PRESETS.items() >= mlo_mae.PRESETS.items() and len(PRESETS) == len(mlo_mae.PRESETS) + 1
    published.check(Published(**{"preset": "cifar100-paper"} | PRESETS["cifar100-paper"]))
    changed = {"hypergradient", "redraw_dropout", "unroll", "level2", "head_steps", "preset", "mask_wait"}
    fields = {field.name: field for field in dataclasses.fields(Published)}
    for field in dataclasses.fields(Config):
        if field.name not in changed:
            assert fields[field.name].default == field.default and fields[field.name].metadata == field.metadata
    assert fields["mask_wait"].default == 0  # it never waits
    assert fields.keys() - {field.name for field in dataclasses.fields(Config)} == {"redraw_dropout"}


@pytest.mark.slow
def test_every_program_reads_such_a_run(run, capsys):
    net, state, _ = open_run(run, "cpu")
    assert (net.cfg.hypergradient, net.cfg.preset, net.cfg.masking_input) == ("exact", Config.preset, "embeddings")
    assert type(net.cfg) is Config and state.iteration == 3 and state.head.t == 3
    for argv in (["probe", run], ["show", run], ["finetune", run, "--epochs", 2]):
        assert main([*map(str, argv), "--device", "cpu"]) == 0
    assert (run / "masks-over-training.png").exists()
    assert json.loads((run / "finetune-short-0" / "result.json").read_text())


def test_a_run_goes_on_to_the_same_weights(run, sides, tmp_path, monkeypatch, bare_runs):
    """The draws of dropout are numbered by what the checkpoint holds."""

    class Crash(Exception):
        pass

    real, out = mlo_mae.outer_iteration, tmp_path / "again"

    def crashing(net, state, *rest):
        if state.iteration == 2:
            raise Crash
        return real(net, state, *rest)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(mlo_mae, "outer_iteration", crashing)
        main(arguments(sides, out, "--checkpoint-minutes", 0))
    assert main(arguments(sides, out, "--resume")) == 0
    assert same(weights(run), weights(out))
    assert main(arguments(sides, tmp_path / "held", "--no-redraw-dropout")) == 0
    assert not same(weights(run), weights(tmp_path / "held"))


def test_dropout_is_drawn_anew_for_each_mask_update():
    """The run's states are those of finite differences with the draws of updates 0, 1, 2."""
    sizes = {name: value for name, value in SMALL.items() if name not in ("image_size", "device", "log_every")}
    paper = PRESETS["cifar100-paper"] | sizes | {"dropout": 0.5, "seed": 5}

    def states(cfg, form_of):
        net, params = mlo_mae.build(cfg, 16, 3, 5)
        state, streams = mlo_mae.State(0, *(mlo_mae.fresh_level(vector, "cpu") for vector in params)), noise_batches(cfg)
        decay = [weight_decays(modules, cfg.weight_decay) for modules in mlo_mae.modules_of(net).values()]
        for update in range(3):
            state, _ = mlo_mae.outer_iteration(net, state, streams, 3, decay, inverse_fan_in(net.masking), form_of(update))
            yield state

    def redrawn(update):
        uniform = torch.rand(2, 8, 16, generator=torch_generator(5, REDRAWN, update))
        factors = torch.where(uniform >= 0.5, 2.0, 0.0)
        assert torch.equal(factors, draw_dropout(0.5, (2, 8, 16), 5, REDRAWN, update))
        return functools.partial(bench.finite_difference, redrawn=factors)

    ours = list(states(Published(**paper), lambda update: published.form))
    by_hand = states(Published(**paper), redrawn)
    assert all(torch.equal(a.psi.params, b.psi.params) for a, b in zip(ours, by_hand))
    held = list(states(Published(**paper | {"redraw_dropout": False}), lambda update: published.form))
    plain = states(Published(**paper), lambda update: bench.finite_difference)
    assert all(torch.equal(a.psi.params, b.psi.params) for a, b in zip(held, plain))
    assert not torch.equal(ours[0].psi.params, held[0].psi.params)


@pytest.mark.parametrize("jacobian", ["adamw", "identity"])
def test_the_form_is_finite_differences(jacobian):
    net, problem = hypergradient_problem(update_jacobian=jacobian, labelled_batch_size=6)
    net.cfg = Published(**dataclasses.asdict(net.cfg) | {"hypergradient": "finite-difference", "redraw_dropout": False})
    found, exact = published.form(net, *problem), mlo_mae.exact(net, *problem)
    assert 0 < relative_error(found.hypergradient, exact.hypergradient) < 1e-3
    net.cfg = dataclasses.replace(net.cfg, redraw_dropout=True)
    assert relative_error(published.form(net, *problem).hypergradient, exact.hypergradient) > 0.3


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--unroll", "full"], ["--unroll", "last"]),
        (["--level2", "ridge"], ["--level2", "steps"]),
        (["--head-steps", "2"], ["--head-steps 2", "at most 1"]),
        (["--accumulate", "2"], ["one process", "--accumulate 1"]),
        (["--checkpoint-activations"], ["--checkpoint-activations"]),
        (["--hypergradient", "exact"], ["--hypergradient", "finite-difference"]),
        (["--preset", "cifar1000"], ["--preset", "cifar100-paper"]),
        (["--mask-ratio", "1.5"], ["--mask-ratio 1.5"]),
    ],
    ids=" ".join,
)
def test_bad_flags_end_in_one_line(sides, tmp_path, capsys, flags, words):
    refused(arguments(sides, tmp_path / "bad", *flags), capsys, *words)
    assert not (tmp_path / "bad").exists()


def test_it_goes_with_one_process(monkeypatch):
    monkeypatch.setattr(published, "world", lambda: 2)
    with pytest.raises(UserError, match="one process"):
        published.check(Published())


# ------------------------------------------------------------------------------------------------------- the table


@pytest.fixture
def small_table(monkeypatch):
    machine = ("image_size", "device", "log_every", "head_steps")
    sizes = {name: value for name, value in SMALL.items() if name not in machine}
    monkeypatch.setitem(bench.SIZES, "tiny", (8, bench.PUBLISHED | sizes | {"batch_size": 4, "labelled_batch_size": 4}))
    names = ("exact", "unrolled", "finite-difference")
    monkeypatch.setattr(bench, "GROWTH", {"depth": (1,)})
    monkeypatch.setattr(bench, "METHODS", {name: bench.METHODS[name] for name in names})
    return names


def table(capsys, *argv):
    status = main(["published", "hypergradient", "--sizes", "tiny", "--device", "cpu", "--repeats", "1", *map(str, argv)])
    out = capsys.readouterr().out
    return status, json.loads(out.splitlines()[-1]), out


@pytest.mark.slow
def test_the_table_is_benchs_with_bettys_row_where_it_is_there(capsys, small_table, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.measure, "BENCHMARKS", tmp_path)
    status, report, out = table(capsys, "--save", "--rows", tmp_path / "rows.jsonl")
    there = hasattr(published, "betty")
    assert (
        status == 0 and report["command"] == "hypergradient" and ("Betty" in out) == there
    )  # silent where it is not installed
    assert [row["method"] for row in report["rows"]] == [*small_table, *["betty"] * there]
    (page,) = tmp_path.glob("hypergradient-tiny-*.md")
    assert page.read_text().startswith("`python mlo_mae.py published hypergradient --sizes tiny ")
    assert "betty" not in bench.METHODS


@pytest.mark.slow
def test_a_row_that_is_added_is_judged_as_the_others_are(capsys, small_table, monkeypatch):
    def half(*problem):
        result = mlo_mae.exact(*problem)
        return result._replace(hypergradient=result.hypergradient / 2)

    monkeypatch.setitem(published.sys.modules, "betty.problems", object())
    monkeypatch.setattr(published, "betty", type("betty", (), {"__version__": "9.9"}), raising=False)
    monkeypatch.setattr(published, "by_betty", half)
    status, report, out = table(capsys)
    row = report["rows"][-1]
    assert status == 0 and row["method"] == "betty" and row["error_float64"] == pytest.approx(0.5) and "Betty 9.9 runs" in out
    assert row["cosine"] == pytest.approx(1) and row["verdict"] == "approximate"


def test_the_tables_flags_are_checked(capsys):
    refused(["published", "hypergradient", "--sizes", "huge"], capsys, "--sizes", "tiny")
    refused(["published", "hypergradient", "--preset", "shapes"], capsys, "--preset")


def test_betty_is_driven_to_the_derivative_that_it_approximates(monkeypatch):
    """Where steps and differences are small, Betty's -1 for dU/dg and its differences after the steps are all that is left."""
    configs = pytest.importorskip("betty.configs")
    monkeypatch.setattr(configs, "Config", functools.partial(configs.Config, darts_alpha=1e-4))
    networks = {"width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
    sizes = {"masking_width": 8, "level1_steps": 2, "mask_start": 0.25, "batch_size": 4, "labelled_batch_size": 4}
    shared = {"masking_network": "shared", "mask_choice": "odds"}
    steps = {"lr": 1e-7, "head_lr": 1e-7, "update_jacobian": "identity"}
    cfg = Config(**bench.PUBLISHED | networks | sizes | shared | steps)
    net, arguments = bench.problem(cfg, 8, torch.device("cpu"), count=1)
    arguments = bench.in_double(net, arguments)
    before = [x.clone() for x in tree_leaves(arguments) if torch.is_tensor(x)]
    found, exact = (form(net, *arguments).hypergradient for form in (published.by_betty, mlo_mae.exact))
    assert relative_error(found, exact) < 1e-3
    assert all(map(torch.equal, before, [x for x in tree_leaves(arguments) if torch.is_tensor(x)]))
