"""scale: each formula against a count of what the program does at small sizes, and what the command prints."""

import gc
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from helpers import as_flags, noise_batches, refused

import bench
import kernels
import mlo_mae
from experiments import scale
from harness import measure, memory, processes
from harness.vectors import size_of

BASE = scale.Settings(
    **{"image_size": 24, "patch_size": 4, "width": 32, "depth": 3, "heads": 2, "masking_blocks": 2, "masking_width": 12},
    **{"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2, "batch_size": 4, "labelled_batch_size": 8},
    **{"level1_steps": 2, "mask_batches": 2, "head_steps": 3, "classes": 10, "precision": "fp32"},
)
STEPS = {"level2": "steps", "pooling": "cls"}
CASES = [
    {},
    {"masking_network": "shared", "mask_batches": 1},
    {"masking_network": "mlp", "head_norm": "batch"} | STEPS,
    {"masking_network": "mlp", "head_norm": "layer", "masking_input": "embeddings"} | STEPS,
    {"masking_network": "shared", "head_norm": "layer", "head_steps": 1, "masking_input": "embeddings"} | STEPS,
    {"accumulate": 2},
    {"checkpoint_activations": True},
    {"accumulate": 2, "checkpoint_activations": True},
    {"masking_blocks": 9, "mask_ratio": 0.6, "patch_size": 6},
]
CPU = torch.device("cpu")


def of_program(cfg):
    """The configuration as the program takes it."""
    return mlo_mae.Config(**{field.name: getattr(cfg, field.name) for field in fields(mlo_mae.Config)})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operations_and_parameters_are_those_that_are_counted(case):
    """To the last one: of matrix products, on the reference, whose attention makes its two products (and four backward)."""
    cfg = replace(BASE, **case)
    net, (theta, psi, head, labelled, steps) = bench.problem(of_program(cfg), cfg.image_size, CPU, 2, warm=1)
    sizes = {name: size_of(getattr(net, name)) for name in ("encoder", "decoder", "head", "masking")}
    assert scale.parameters(cfg) == sizes
    joined, split, count = mlo_mae.joined(steps[-cfg.mask_batches :]), net.encoder_size, measure.operations
    plain = replace(net, cfg=replace(net.cfg, masking="random"))

    def level1(net):
        return count(lambda: mlo_mae.level1_step(net, theta, psi, steps[0].images, steps[0].rates, 0, 0))

    def encoder(loss):
        params = theta.params[:split].detach().requires_grad_()
        return torch.autograd.grad(loss(params), params)

    def of_t():
        leaf = psi.detach().requires_grad_()
        prob = mlo_mae.masking_probability(net, leaf, joined.images, joined.eyes)
        return torch.autograd.grad(mlo_mae.level1_loss(prob, joined.mask, prob.detach()), leaf)

    images = torch.cat([labelled.images2, labelled.images3])
    features = count(lambda: encoder(lambda params: mlo_mae.encode(net, params, images).sum()))
    upper = count(lambda: encoder(lambda params: mlo_mae.upper_levels(net, params, head, labelled)[0]))
    of_step = level1(plain)
    counted = {
        "level 1": of_step * cfg.level1_steps,
        "T weighs": (level1(net) - of_step) * cfg.level1_steps,
        "levels 2 and 3": features,
        "jvp of (9)": count(lambda: mlo_mae.directional_errors(net, joined, joined.gradient[:split])),
        "T, (10)": count(of_t),
        "head": upper - features,
    }
    assert {name: one * images for name, (one, images) in scale.operations(cfg).items()} == counted
    assert min(counted.values()) > 0


@pytest.mark.parametrize("case", [{}, {"masking_network": "mlp", "mask_batches": 1} | STEPS], ids=["solved", "stepped"])
def test_a_whole_outer_iteration_makes_these_operations(case):
    cfg = replace(BASE, image_size=16, classes=5, mask_start=0.0, mask_until=1.0, mask_wait=0.0, **case)
    net, state, rates = begun(cfg)
    counted = measure.operations(lambda: mlo_mae.outer_iteration(net, state, noise_batches(of_program(cfg)), 10, *rates))
    assert counted == sum(one * images for one, images in scale.operations(cfg).values())


def begun(cfg):
    """Networks, a State, and the rates that `outer_iteration` takes, for images of 16 pixels in five classes."""
    net, params = mlo_mae.build(of_program(cfg), 16, 3, 5)
    return net, mlo_mae.State(0, *(mlo_mae.fresh_level(vector, CPU) for vector in params)), mlo_mae.rates_of(net, CPU)


@pytest.mark.parametrize("case", [{}, {"mask_wait": 0.5}, {"masking_network": "mlp", "mask_batches": 1} | STEPS], ids=str)
@pytest.mark.parametrize("learns", [True, False])
def test_bytes_exchanged_are_those_of_an_outer_iteration(monkeypatch, case, learns):
    """Of two processes, of which the second is not there: what would be sent is counted."""
    cfg = replace(BASE, **{"image_size": 16, "classes": 5, "mask_start": 0.0, "mask_wait": 0.0} | case)
    cfg = replace(cfg, mask_until=1.0 if learns else 0.1)
    net, state, rates = begun(cfg)
    state = state._replace(iteration=0 if learns else 9)
    state = mlo_mae.with_kept_eyes(net, state, 10)
    summed, gathered = [], []

    def gather(parts, mine):
        gathered.append(len(parts) * mine.nbytes)
        for part in parts:
            part.copy_(mine)

    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(processes.dist, "all_reduce", lambda tensor, *how: summed.append(tensor.nbytes))
    monkeypatch.setattr(processes.dist, "all_gather", gather)
    monkeypatch.setattr(mlo_mae, "chance_loss", lambda *arguments: 1e9)  # T does not wait
    mlo_mae.outer_iteration(net, state, noise_batches(of_program(cfg)), 10, *rates)
    gradient, *late, both = scale.exchanged(cfg).values()
    assert sorted(summed) == sorted([gradient] * cfg.level1_steps + [size for size in late if size] * learns)
    assert sum(gathered) == both * learns


@pytest.mark.parametrize(
    "masking, steps, batches",
    [
        *(("learned", *counts) for counts in [(1, 1), (2, 1), (3, 2), (2, 2), (4, 3), (2, 4)]),
        *(("random", *counts) for counts in [(2, 1), (3, 2), (4, 1)]),
    ],
)
def test_vectors_of_theta_are_those_that_are_held(monkeypatch, masking, steps, batches):
    """At the jvp, or in MAE's last step: all but the gradient at work."""
    cfg = replace(BASE, image_size=16, classes=5, level1_steps=steps, mask_batches=batches, mask_start=0.0, mask_wait=0.0)
    net, state, rates = begun(cfg := replace(cfg, masking=masking))
    length, held = len(state.theta.params), []

    def watching(name):
        real = getattr(mlo_mae, name)

        def watched(*arguments):
            every = (t for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() == length)
            held.append(len({t.untyped_storage().data_ptr() for t in every}))
            return real(*arguments)

        monkeypatch.setattr(mlo_mae, name, watched)

    watching("directional_errors" if masking == "learned" else "errors_and_features")
    mlo_mae.decays_of.cache_clear()  # it has weight decays of other tests
    gc.collect()
    mlo_mae.outer_iteration(net, state, noise_batches(of_program(cfg)), 10, *rates)
    assert 4 * length * (held[-1] + 1) == scale.memory(cfg, 1)["vectors of theta"]


def held_of_an_image(cfg, backend):
    net, (theta, *_) = mlo_mae.build(of_program(cfg), cfg.image_size, 3, cfg.classes)
    told = []
    with pytest.MonkeyPatch.context() as patch, kernels.use(backend):
        patch.setattr(mlo_mae, "foresee", lambda function, *rest: told.append(function))
        mlo_mae.foresee_memory(net, theta, (3, cfg.image_size, cfg.image_size))
        counts = [[memory.held_for_backward(lambda n=n, f=f: f(n)) for n in (1, 2)] for f in told]
    return dict(zip(("level 1", "levels 2 and 3"), (two - one for one, two in counts)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend, error", [("auto", 0.1), pytest.param("triton", 0.005, marks=pytest.mark.slow)])
def test_activations_are_those_that_are_held(precision, backend, error):
    """On a CPU the loss keeps pixels that its kernel computes again."""
    pixels = 96 if backend == "auto" else 32
    cfg = replace(BASE, image_size=pixels, patch_size=8, width=64, decoder_width=32, precision=precision)
    assert scale.activations(cfg) == pytest.approx(held_of_an_image(cfg, backend), rel=error)


def test_blocks_that_are_made_again_hold_their_inputs():
    """`held_for_backward` does not see inputs of what is made again: the most that is held at once, by depth."""
    cfg, found = replace(BASE, image_size=96, patch_size=8, width=64, checkpoint_activations=True), []
    for depth in (4, 8):
        cfg = replace(cfg, depth=depth)
        net, (theta, *_) = mlo_mae.build(of_program(cfg), 96, 3, 10)
        params, images = theta[: net.encoder_size].requires_grad_(), torch.zeros(16, 3, 96, 96)
        found.append(measure.peak_memory(lambda: mlo_mae.encode(net, params, images), CPU)[1])  # noqa: B023
    eight, four = (scale.activations(replace(cfg, depth=depth))["levels 2 and 3"] for depth in (8, 4))
    assert found[1] - found[0] == pytest.approx(16 * (eight - four), rel=0.1)


def test_time_is_operations_bytes_and_updates():
    cfg = replace(BASE, batch_size=64, labelled_batch_size=64, precision="bf16", share=0.5)
    cost, sent = scale.operations(cfg), scale.exchanged(cfg)
    (whole, exchange), (plain, _), (weighs, _) = (scale.seconds(cfg, 16)[part] for part in ("T learns", "MAE", "T weighs"))
    ring = 15 / 16 / 50e9
    gradients = ring * 2 * 2 * sent["gradient of theta, a step"]
    late = ring * (2 * (sent["a of (7)"] + sent["hypergradient"] + 8) + sent["features and labels"])
    assert exchange == pytest.approx(gradients + late)
    level1 = 128 * cost["level 1"][0] / 16 / (0.5 * 989e12)
    assert plain == pytest.approx(level1 + gradients + 2 * 7 * sent["gradient of theta, a step"] / 3.35e12)
    assert weighs - plain == pytest.approx(128 * cost["T weighs"][0] / 16 / (0.5 * 989e12))
    shared = 128 * cost["levels 2 and 3"][0] + 128 * (cost["jvp of (9)"][0] + cost["T, (10)"][0])
    assert whole - weighs == pytest.approx((shared / 16 + cost["head"][0]) / (0.5 * 989e12) + late)
    alone, _ = scale.seconds(cfg, 1)["MAE"]
    assert alone > plain - gradients and scale.seconds(cfg, 1)["T learns"][1] == 0
    near, far = (scale.seconds(cfg, count)["MAE"][1] for count in (8, 9))
    assert far / near == pytest.approx(9 * (8 / 9) / (7 / 8))


def test_a_run_has_the_programs_parts():
    cfg = replace(BASE, images=1000, epochs=6, mask_start=0.2, mask_until=0.3)  # 800 images, 100 updates an epoch
    assert scale.iterations(cfg) == {"MAE": 120, "T learns": 60, "T weighs": 420}
    assert scale.iterations(replace(cfg, mask_start=0.0, mask_until=1.0)) == {"MAE": 0, "T learns": 600, "T weighs": 0}


def test_a_batch_is_cut_until_it_fits(monkeypatch):
    cfg = replace(BASE, batch_size=96, labelled_batch_size=48)
    least = sum(size for name, size in scale.memory(cfg, 4).items() if name != "activations")
    for parts in (1, 2, 3, 4, 6):
        level1, labelled = scale.activations(cfg).values()
        most = least + max(24 // parts * level1, (24 if parts == 1 else -(-12 // parts)) * labelled)
        monkeypatch.setattr(scale, "MEMORY", most)
        assert scale.fitting(cfg, 4).accumulate == parts and sum(scale.memory(scale.fitting(cfg, 4), 4).values()) == most


@pytest.mark.parametrize("preset, images, pixels, classes", [("shapes", 6000, 32, 8), ("cifar100", 50_000, 32, 100)])
def test_a_preset_is_priced_with_its_own_data(preset, images, pixels, classes, capsys):
    report = {}
    for more in ([], ["--images", "1000"]):
        assert mlo_mae.main(["scale", "--preset", preset, "--gpus", "1", "--json", *more]) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]
        found = report["images"], report["image_size"], report["classes"]
        assert found == (1000 if more else images, pixels, classes)
    own = ["--data", "photos", "--images", "500", "--image-size", "32"]
    refused(["scale", "--preset", preset, "--gpus", "1", *own], capsys, "--data photos", "--classes")
    assert mlo_mae.main(["scale", "--preset", preset, "--gpus", "1", *own, "--classes", "3"]) == 0


FLAGS = ["--preset", "imagenet", "--batch-size", "4096", "--labelled-batch-size", "4096", "--gpus", "8", "512"]


def test_the_command_prints_tables(capsys):
    assert mlo_mae.main(["scale", *FLAGS, "--level2", "ridge", "--mask-start", "0.2"]) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    settings, cfg = report["settings"], scale.Settings(**report["settings"])
    assert (settings["width"], settings["precision"], settings["images"], settings["level2"]) == (
        768,
        "bf16",
        1281167,
        "ridge",
    )
    assert asdict(cfg) == settings and [row["GPUs"] for row in report["rows"]] == [8, 512]
    for row in report["rows"]:
        way = scale.fitting(cfg, row["GPUs"])
        times, count = scale.seconds(way, row["GPUs"]), scale.iterations(cfg)
        hours = sum(times[part][0] * number for part, number in count.items()) / 3600
        assert row["hours"] == pytest.approx(hours) and row["ratio"] == pytest.approx(hours / row["hours, MAE"])
        assert row["GB"] < 80 and row["--accumulate"] == way.accumulate and row["s, T learns"] == times["T learns"][0]
    one, images = scale.operations(cfg)["levels 2 and 3"]
    (line,) = [line for line in printed if line.startswith("| levels 2 and 3")]
    assert [cell.strip() for cell in line.split("|")[2:5]] == [f"{one / 1e9:.4g}", "8192", f"{one * images / 1e12:.4g}"]


def test_the_page_says_what_the_command_prints(capsys):
    """docs/scale.md: each command there is run, and its numbers are on the page."""
    page = Path(mlo_mae.__file__).with_name("docs").joinpath("scale.md").read_text("utf-8")
    commands = [line.split("#")[0].split()[2:] for line in page.splitlines() if line.startswith("python mlo_mae.py scale")]
    assert len(commands) == 6
    for command in commands:
        assert mlo_mae.main(command) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        cost = {row["part"]: row["GFLOP an image"] for row in report["parts"]}
        size = {row["bytes"]: row["MB"] for row in report["bytes"]}
        expected = [f"{cost[name]:#.4g}" for name in ("level 1", "levels 2 and 3", "jvp of (9)")]
        expected += [f"{size[f'exchanged: {name}']:.4g}" for name in ("gradient of theta, a step", "a of (7)")]
        expected += [f"{size[f'of an image: {name}']:.1f}" for name in ("level 1", "levels 2 and 3")]
        expected += [f"{size['on a GPU: vectors of theta'] / 1e3:.3g}"]
        for row in report["rows"]:
            held = f"{row['GB']:.0f} ({row['--accumulate']}) | {row['exchange']:.0%}"
            expected.append(" | ".join([held, *(f"{row[name]:.3g}" for name in ("hours, MAE", "hours", "ratio"))]))
        assert not [text for text in expected if text not in page], command


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gpus", "512"], ["--gpus 512", "--batch-size"]),
        (["--gpus", "0"], ["--gpus", "0 is not a positive whole number"]),
        (["--share", "1.5"], ["--share 1.5", "at most 1"]),
        (["--classes", "-1"], ["--classes -1"]),
        (["--width", "30"], ["--width 30"]),
        (["--image-size", "225"], ["225", "--patch-size"]),
        (["--masking", "random"], ["plain MAE stands beside it"]),
        (["--masking-network", "tokens", "--mask-choice", "odds", "--masking-from", "RUN"], ["plain MAE stands beside it"]),
        (["--unroll", "full"], ["its last step"]),
        (["--preset", "imagenet-huge"], ["--preset", "imagenet-large"]),
        (as_flags({"width": 65536, "heads": 1, "depth": 1000}), ["--width"]),
    ],
    ids=str,
)
def test_what_cannot_be_priced_ends_in_one_line(capsys, flags, words):
    refused(["scale", *flags], capsys, *words)
