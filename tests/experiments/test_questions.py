"""questions.py: which labels a run knows, what its rows are, and each question at a tiny size."""

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import consume

import data
import mlo_mae
from experiments import clutter, encode, level1_alone, questions, results, tissue
from experiments.questions import ALL, QUESTIONS, FewLabels, hide_labels
from experiments.results import Cell, Grid
from harness.run import read_metrics
from kernels import attention, select_patches
from mlo_mae import Config

pytestmark = pytest.mark.usefixtures("drawn_once")
SIZES = {"patch_size": 8, "width": 8, "depth": 2, "heads": 2, "decoder_width": 8, "decoder_heads": 2, "masking_blocks": 1}
PART = {"mask_start": 0.1, "mask_until": 0.6, "mask_wait": 0.0}
TINY = SIZES | PART | {"epochs": 1, "level1_steps": 2, "mask_batches": 2, "labelled_batch_size": 64, "log_every": 1}


class Net:
    """All that `hide_labels` looks at."""

    def __init__(self, **changes):
        self.cfg = FewLabels(**changes)


@pytest.fixture(scope="module")
def splits():
    """Of 1,000 + 250 + 2,000 images."""
    return consume(data.load("shapes", limit=1250))


def known(splits, **changes):
    some = replace(splits)
    hide_labels(Net(**changes), some, torch.device("cpu"), None)
    return some


def test_without_less_all_labels_are_known(splits):
    assert splits.labelled == (splits.train, splits.val)
    for found, whole in zip(known(splits).labelled, splits.labelled):
        assert torch.equal(found.labels, whole.labels) and torch.equal(found.images, whole.images)


@pytest.mark.parametrize("share, counts", [(0.1, (100, 25)), (0.01, (10, 8)), (0.0001, (8, 8))])
def test_few_labels_are_of_all_classes_alike_and_right(splits, share, counts):
    """At least one a class."""
    hidden = known(splits, label_fraction=share)
    assert hidden.train is splits.train and hidden.val is splits.val  # level 1 and the metrics have all images
    for found, whole, count in zip(hidden.labelled, splits.labelled, counts):
        by_class = torch.bincount(found.labels, minlength=8)
        assert len(found) == count and by_class.max() - by_class.min() <= 1 and by_class.min() >= 1
        label_of = {image.numpy().tobytes(): label for image, label in zip(whole.images, whole.labels.tolist())}
        assert [label_of[image.numpy().tobytes()] for image in found.images] == found.labels.tolist()
        assert len(found.objects) == count and found.crop == whole.crop
    again, other = (known(splits, label_fraction=share, seed=seed).labelled[0] for seed in (0, 1))
    assert torch.equal(again.images, hidden.labelled[0].images) and not torch.equal(other.images, again.images)


@pytest.mark.parametrize("noisy, shares", [("both", (0.4, 0.4)), ("train", (0.4, 0.0)), ("val", (0.0, 0.4))])
def test_wrong_labels_are_as_many_as_asked_for_and_of_any_class(splits, noisy, shares):
    hidden = known(splits, label_noise=0.4, noisy=noisy)
    for found, whole, share in zip(hidden.labelled, splits.labelled, shares):
        assert torch.equal(found.images, whole.images)
        assert int((found.labels != whole.labels).sum()) == share * len(whole)
    if shares[0]:
        moves = (hidden.labelled[0].labels - splits.train.labels) % 8
        assert torch.bincount(moves, minlength=8)[1:].min() > 30  # of 57 each
    assert torch.equal(known(splits, label_noise=0.4).labelled[0].labels, known(splits, label_noise=0.4).labelled[0].labels)


def test_levels_2_and_3_and_probes_see_what_is_known_and_nothing_else(splits, tmp_path, monkeypatch):
    """Known labels of level 2's split are made 0 and those of level 3's 1: no other may appear, and each at its level."""

    def prepare(net, some, device, run):
        some.known = tuple(split.part(np.arange(40), np.full(40, n)) for n, split in enumerate((some.train, some.val)))

    seen, labelled_of = [], mlo_mae.labelled_of

    def spy(cfg, level2, level3, *rest):
        seen.append((level2.labels, level3.labels))
        return labelled_of(cfg, level2, level3, *rest)

    monkeypatch.setattr(mlo_mae, "labelled_of", spy)
    monkeypatch.setattr(mlo_mae, "load_data", lambda cfg, device: replace(splits))
    cfg = FewLabels(**TINY, images=1250, device="cpu")
    net, state, found = mlo_mae.train(cfg, tmp_path / "run", prepare=prepare)
    assert len(seen) >= 2 and all(not of2.any() and of3.eq(1).all() for of2, of3 in seen)
    test = found.test.labels
    right = questions_probe(net, state, found)
    assert right == pytest.approx((test == 0).double().mean().item())  # a probe that knows one class says nothing else


def test_the_chance_in_metrics_is_that_of_the_labels_of_level_3(splits, tmp_path, monkeypatch):
    def prepare(net, some, device, run):
        shares = np.arange(40) % 8, np.arange(40) % 2
        some.known = tuple(split.part(np.arange(40), labels) for split, labels in zip((some.train, some.val), shares))

    monkeypatch.setattr(mlo_mae, "load_data", lambda cfg, device: replace(splits))
    mlo_mae.train(FewLabels(**TINY, images=1250, device="cpu"), tmp_path / "run", prepare=prepare)
    chances = {row["level3_chance"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "level3_chance" in row}
    (chance,) = chances
    assert chance == pytest.approx(0.5)  # of two classes; of eight it is 0.875


def questions_probe(net, state, splits):
    return results.probed(net, state, splits)["probe"]


# ----------------------------------------------------------------------------------------------------------- the rows


def grid_at(out, seeds=2, sets=None):
    own = {name: ({"data": name}, {}) for name in ("tissue", "clutter-1")}
    return Grid(out, "there", Path("file.npz"), seeds, tuned=False, methods=ALL, sets=sets or questions.SETS | own)


def test_every_row_can_run_and_has_its_rival(tmp_path):
    grid = grid_at(tmp_path)
    for name, question in QUESTIONS.items():
        asked = set(question.pairs)
        for data_set, method in question.pairs:
            mlo_mae.check(results.settings(Cell(data_set, method, "steps", 0), grid)[0])
            assert (data_set, ALL[method].rival) in asked, (name, data_set, method)
        if question.along:
            rows = [row for rows in question.along[1].values() for row in rows]
            assert {method for _, method in question.pairs} >= set(rows)


def test_rows_differ_from_their_rivals_in_what_they_say(tmp_path):
    grid, plain = grid_at(tmp_path), vars(Config())
    for name, changes in {
        "MLO-MAE, mask ratio 0.9": {"mask_ratio"},
        "MAE, mask ratio 0.9": {"mask_ratio", "masking", "lr"},
        "MLO-MAE, a tenth of the labels": {"label_fraction"},
        "MAE, two in five labels of level 3 wrong": {"label_noise", "noisy", "masking", "lr"},
        "MLO-MAE, unrolled": {"mask_batches", "unroll"},
        "MLO-MAE, 64 steps": {"level1_steps", "log_every"},
        "MLO-MAE, 48 epochs": {"epochs"},
        "T of shapes, 12 epochs": {"epochs", "masking_from"},
        "MAE, 12 epochs": {"epochs", "masking", "lr"},
        "MAE, no restart": {"mask_restart", "masking", "lr"},
        "MLO-MAE, these five": {"level2", "pooling", "masking_network", "mask_choice", "update_jacobian"},
    }.items():
        found = vars(results.settings(Cell("shapes", name, "steps", 0), grid)[0])
        new = {"label_fraction": 1.0, "label_noise": 0.0, "noisy": "both"}
        differ = {key for key, value in found.items() if (plain | new)[key] != value} - {"data_dir", "checkpoint_minutes"}
        assert differ == changes, name


def test_what_a_row_needs_runs_before_it(tmp_path):
    grid = grid_at(tmp_path)
    asked = [
        Cell("shapes", "T of clutter-1, a tenth of the labels", "steps", 1),
        Cell("tissue", "T of shapes", "steps", 0),
    ]
    assert questions.with_needed(asked, grid) == [
        Cell("clutter-1", "MLO-MAE", "steps", 0),  # of two seeds the other
        Cell("shapes", "T of clutter-1", "steps", 1),
        asked[0],
        Cell("shapes", "MLO-MAE", "steps", 1),
        asked[1],
    ]


def test_a_sweep_has_a_line_for_each_method_and_a_point_for_each_value(tmp_path, monkeypatch):
    given, question = [], QUESTIONS["ratio"]
    monkeypatch.setattr(questions, "panels", lambda path, shown, text, across: given.append((shown, text)))
    assert not questions.sweep(question, grid_at(tmp_path), tmp_path / "x.png") and not given
    for (ratio, names), seed in itertools.product(question.along[1].items(), (0, 1)):
        for name, high in zip(names, (0.5, 0.0)):
            folder = results.folder_of(tmp_path, Cell("clutter-1", name, "steps", seed))
            folder.mkdir(parents=True)
            shares = {"probe": high + ratio / 10 + 0.02 * seed, "probe_cls": 0.1}
            (folder / "cell.json").write_text(json.dumps(shares))
    assert questions.sweep(question, grid_at(tmp_path), tmp_path / "x.png")
    (((mean, cls), text),) = given
    assert (mean.title, cls.title, mean.along) == ("clutter-1: probe, mean", "clutter-1: probe, CLS", "mask ratio")
    x, *values = mean.lines["MLO-MAE"]
    assert x == [0.4, 0.5, 0.6, 0.75, 0.9] and list(mean.lines) == ["MLO-MAE", "MAE"]
    expected = 100 * (0.5 + np.array(x) / 10)
    for found, above in zip(values, (1, 0, 2)):  # mean, lowest, highest
        np.testing.assert_allclose(found, expected + above)
    assert "mean of 2 seeds" in text


def test_a_sweep_of_lengths_is_along_the_seconds_that_each_method_took(tmp_path, monkeypatch):
    given, question = [], QUESTIONS["length"]
    monkeypatch.setattr(questions, "panels", lambda path, shown, text, across: given.append((shown, text)))
    for (epochs, names), seed in itertools.product(question.along[1].items(), (0, 1)):
        for name, pace in zip(names, (13, 11, 10) if len(names) == 3 else (10,)):
            folder = results.folder_of(tmp_path, Cell("clutter-1", name, "steps", seed))
            folder.mkdir(parents=True)
            found = {"probe": pace * epochs / 1000, "probe_cls": 0.1, "seconds": pace * epochs + 2 * seed - 1}
            (folder / "cell.json").write_text(json.dumps(found))
    assert questions.sweep(question, grid_at(tmp_path), tmp_path / "x.png")
    (((mean, _), text),) = given
    for name, pace in {"MLO-MAE": 13, "T of shapes": 11, "MAE": 10}.items():
        seconds, means, *_ = mean.lines[name]
        epochs = (12, 24, 48, 61) if name == "MAE" else (12, 24, 48)
        assert seconds == [n * pace for n in epochs] and means == pytest.approx([0.1 * some for some in seconds])
    assert list(mean.lines) == ["MLO-MAE", "T of shapes", "MAE"] and mean.along == "seconds of a run"
    assert "12, 24, 48, 61 epochs" in text


# ---------------------------------------------------------------------------------------------------- what is measured


def test_maps_that_are_alike():
    random = torch.Generator().manual_seed(0)
    maps, noise = torch.rand(40, 64, generator=random), torch.rand(40, 64, generator=random)
    assert questions.alike(maps, 3 * maps + 1) == pytest.approx(1) and questions.alike(maps, -maps) == pytest.approx(-1)
    assert abs(questions.alike(maps, noise)) < 0.06
    flat = maps.clone()
    flat[1:] = 0.5  # images in which a map does not vary tell nothing
    assert questions.alike(flat, maps) == pytest.approx(1)


def test_objects_are_told_from_the_rest_in_all_images_and_in_each():
    """Among all, an image whose map is high everywhere hides what it tells; one without both kinds has no curve of its own."""
    inside = torch.tensor([[True, False, False, False], [False, True, False, False], [False] * 4])
    maps = torch.tensor([[0.3, 0.2, 0.1, 0.0], [5.0, 6.0, 7.0, 4.0], [9.0, 9.0, 9.0, 9.0]])
    pooled, by_image = questions.aucs(maps, inside)
    assert by_image == pytest.approx((1 + 2 / 3) / 2)
    assert pooled == pytest.approx((3 + (3 + 2)) / (2 * 10))


def test_the_attention_is_the_encoders_own(whole_run, monkeypatch):
    """Of the last block, whose output this attention makes."""
    model = encode.load(whole_run[0], "cpu")
    inputs = torch.randn(3, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
    found, taken, real = questions.cls_attention(model, inputs), [], attention
    assert found.shape == (3, model.net.patches) and (found > 0).all() and (found.sum(1) < 1).all()
    monkeypatch.setattr(mlo_mae, "attention", lambda qkv: taken.append(qkv) or real(qkv))
    model.encoder(inputs)
    q, k, _ = taken[-1].unbind(2)  # each [B, 1+N, heads, D/heads]
    scores = torch.einsum("bhd,bnhd->bhn", q[:, 0], k) / math.sqrt(q.shape[-1])
    assert torch.allclose(found, scores.softmax(-1)[:, :, 1:].mean(1), atol=1e-6)


def test_mean_errors_count_only_where_a_patch_is_hidden(splits):
    cfg = Config(**SIZES)
    net, (theta, _, _) = mlo_mae.build(cfg, 32, 3, 8)
    images = splits.val.pick(np.arange(6)).images
    found = questions.mean_errors(net, theta, images, draws=40)
    assert found.shape == (6, 16) and 0.3 < found.min() and found.mean() == pytest.approx(1.0, abs=0.4)  # normalised pixels
    step = mlo_mae.Step(None, None, None, images, *select_patches(torch.rand(6, 16), net.visible))
    errors = mlo_mae.patch_errors(net, theta[: net.encoder_size], theta[net.encoder_size :], step)
    assert errors.mean() < 0.9 * found.mean()  # a quarter is not hidden, and counts 0 there


def test_what_is_told_is_the_derivative_by_each_weight(splits, monkeypatch):
    """Of one look: against the exact derivative by p of the images that are asked about, where those are the step's own."""
    monkeypatch.setattr(questions, "LOOKS", 1)
    cfg = Config(**SIZES | {"batch_size": 8, "labelled_batch_size": 64})
    net, params = mlo_mae.build(cfg, 32, 3, 8)
    state = mlo_mae.State(0, *(mlo_mae.fresh_level(vector, "cpu") for vector in params))
    rates = mlo_mae.Rates(1e-3, torch.zeros(len(params[0])))
    images = next(splits.train.stream(8, 2)).images
    found, loss3 = questions.told(net, state, splits, images, rates, torch.zeros(len(params[1])))
    level2, level3 = (next(part.stream(64, 1)) for part in splits.labelled)
    labelled = mlo_mae.labelled_of(cfg, level2, level3, rates, 0)
    draw = questions.torch_generator(4, 0)
    choice = select_patches(torch.rand(8, net.patches, generator=draw), net.visible)

    def loss3_of(theta):
        return mlo_mae.upper_levels(net, theta[: net.encoder_size], state.head, labelled)[0]

    assert loss3 == pytest.approx(loss3_of(params[0]).item())
    covered = next(mlo_mae.moved_weights(mlo_mae.coverage(splits.train).stream(8, 2), net.cfg.patch_size))
    assert 0 < covered.min() < covered.max() == 1
    _, step, _, _ = mlo_mae.level1_step(net, state.theta, state.psi.params, images, rates, 3, 0, covered=covered)
    theta = params[0].clone().requires_grad_()
    a = torch.autograd.grad(loss3_of(theta), theta)[0]
    g = step.gradient.detach().requires_grad_()
    c = torch.autograd.grad(mlo_mae.adamw(state.theta, g, rates).params, g, a)[0]
    errors = mlo_mae.patch_errors(
        net,
        theta[: net.encoder_size],
        theta[net.encoder_size :],
        step._replace(images=images, keep=choice[0], restore=choice[1], mask=choice[2]),
    )
    for i, j in ((0, 0), (3, 7), (7, 15), (5, 4)):
        by_theta = torch.autograd.grad(errors[i, j], theta, retain_graph=True)[0]
        assert found[i, j].item() == pytest.approx(-(by_theta @ c).item(), rel=1e-3, abs=1e-9)
    hidden = choice[2].bool()
    assert not found[~hidden].any() and found[hidden].all()


def test_weights_by_nearness_are_those_of_level_1():
    """From the first step on: the run is that of a loop in which these maps weigh, and its masks are those of MAE."""
    cfg = Config(**TINY | {"masking": "random"})
    _, state, splits = mlo_mae.train(cfg, None, prepare=partial(questions.weigh_the_middle, deviation=2.0))
    side = splits.image_size // cfg.patch_size
    assert torch.equal(questions.nearness(4)[0], torch.tensor([-4.5, -2.5, -2.5, -4.5]))
    near = questions.nearness(side)
    weights = torch.sigmoid(2 * (near - near.mean()) / near.std() - 2)
    assert 0.2 < weights[side // 2, side // 2] < 0.9 and weights[0, 0] < 0.05
    maps = splits.train.accompanied(weights.expand(len(splits.train), -1, -1))
    *_, (_, alone, _) = level1_alone(cfg, splits, maps)
    plain = mlo_mae.train(cfg, None)[1]
    assert torch.equal(state.theta.params, alone.theta.params) and not torch.equal(state.theta.params, plain.theta.params)


def test_another_seeds_t_is_the_next_seeds(tmp_path, monkeypatch):
    """So that each two of three seeds are one pair, and none counts twice."""
    asked, maps = [], torch.rand(2, 4)
    found = {"p of T": maps}, torch.tensor([[True, False, False, False]] * 2)
    told = [questions.Told(0.1, maps, 0.9)], found[1], None
    monkeypatch.setattr(questions, "maps_of_a_seed", lambda *folders: asked.append([path.name for path in folders]) or found)
    monkeypatch.setattr(questions, "told_over_a_run", lambda cfg: told)
    monkeypatch.setattr(questions, "draw_told", lambda *how: None)
    questions.learned(replace(grid_at(tmp_path, 3), first=40), tmp_path / "x.png")
    pairs = ((40, 41), (41, 42), (42, 40))
    assert asked == [[f"MLO-MAE-steps-{own}", f"MAE-steps-{own}", f"MLO-MAE-steps-{other}"] for own, other in pairs]


# --------------------------------------------------------------------------------------------------------- in one look


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small ones of clutter and of tissue."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    pools = {part: rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8) for part, count in clutter.COUNTS.items()}
    parts = {
        "clutter": clutter.on_photographs(pools, 0),
        "tissue": {
            part: (images.repeat(2, 2).repeat(2, 3)[..., :32, :32], labels, where.repeat(2, 1).repeat(2, 2)[:, :32, :32])
            for part, (images, labels, where) in small_tissue().items()
        },
    }
    for name, some in parts.items():
        few = {part: tuple(array[:count] for array in some[part]) for part, count in (("train", 240), ("test", 60))}
        np.savez(folder / f"{name}.npz", **clutter.arrays_of(few))
    return folder


def small_tissue():
    labels = np.arange(300) % 4
    images, where = tissue.draw(np.random.default_rng(0), labels)
    return {"train": (images[:240], labels[:240], where[:240]), "test": (images[240:], labels[240:], where[240:])}


@pytest.mark.slow
@pytest.mark.usefixtures("quick_probes")
def test_each_question_at_a_tiny_size(files, tmp_path, monkeypatch, capsys):
    """All on the images of clutter's small file, and in this process. What one question has finished, the next ones find."""
    small = (TINY | {"data": str(files / "clutter.npz")}, {})
    for name in ("shapes", "shapes-anywhere", "cifar100", "cifar100-coarse"):
        monkeypatch.setitem(questions.SETS, name, small)
    shorter = {"SemMAE": {"parts_steps": 2}, "MLO-MAE, 64 steps": {"level1_steps": 3}}
    for epochs, rows in questions.BY_LENGTH.items():
        shorter |= {name: ALL[name].changes | {"epochs": epochs // 12} for name in rows}
    shorter[questions.AS_LONG] = ALL[questions.AS_LONG].changes | {"epochs": 3}
    for name, changes in shorter.items():
        monkeypatch.setitem(ALL, name, ALL[name]._replace(changes=changes))
    monkeypatch.setattr(tissue, "write", lambda path: path.write_bytes((files / "tissue.npz").read_bytes()))
    monkeypatch.setattr(clutter, "write", lambda path, data_dir, seed: path.write_bytes((files / "clutter.npz").read_bytes()))
    for module in ("experiments.questions", "harness.measure"):
        monkeypatch.setattr(f"{module}.BENCHMARKS", tmp_path)
    monkeypatch.setattr(questions, "LOOKS", 2)
    monkeypatch.setattr(results.show, "draw_run", lambda *arguments: [])
    ran, rows = [], {}

    def small_settings(cell, grid, usual=results.settings):
        cfg, recipe = usual(cell, grid)
        cfg = replace(cfg, data=str(files / f"{'tissue' if cell.data == 'tissue' else 'clutter'}.npz"), **TINY)
        return replace(cfg, **grid.methods[cell.method].changes), recipe

    def here(cells, grid, workers):
        for cell in cells:
            assert all(results.read_cell(grid, other) for other in results.needed(cell, grid))
            if not results.is_finished(cell, grid):
                results.run_cell(*small_settings(cell, grid), cell, grid)
                ran.append(cell)

    monkeypatch.setattr(results, "settings", small_settings)
    monkeypatch.setattr(questions, "run_grid", here)
    words = ["--seeds", "2", "--first-seed", "0", "--out", str(tmp_path / "grid"), "--save"]
    for name, question in QUESTIONS.items():
        assert mlo_mae.main(["questions", name, *words]) == 0
        text, report = capsys.readouterr().out.rsplit("\n", 2)[:2]
        rows[name] = json.loads(report)["rows"]
        assert (tmp_path / f"questions-{name}.md").read_text("utf-8") == text + "\n"
        drawn = question.along is not None or name in ("learned", "cost")
        assert (tmp_path / f"questions-{name}.png").exists() == drawn
    assert len(ran) == len(set(ran))
    for name in ("labels", "ratio", "length", "unrolling", "choices", "places", "transfer", "medical"):
        assert len(rows[name]) == len(QUESTIONS[name].pairs) and all(len(row["probe"]) == 2 for row in rows[name])
    lines = (tmp_path / "questions-choices.md").read_text("utf-8").splitlines()
    columns = {line.split(" | ")[1]: line.split(" | ")[3:9] for line in lines if line.startswith("| shapes |")}
    assert any("| against MAE | against MLO-MAE | probe, CLS % |" in line for line in lines)
    assert [bool(value) for value in columns["MLO-MAE"]] == [True, True, False] * 2
    assert [bool(value) for value in columns["MAE"]] == [True, False, True] * 2
    few = {row["method"]: row for row in rows["labels"]}
    assert few["MAE, a tenth of the labels"]["seconds"] == few["MAE"]["seconds"]  # the same runs, probed with fewer
    folder = tmp_path / "grid/shapes/MLO-MAE-a-hundredth-of-the-labels-steps-0"
    assert json.loads((folder / "config.json").read_text("utf-8"))["label_fraction"] == 0.01
    assert {row.get("rule") for row in rows["cost"]} == {"steps", "time", None}
    parts = {row["part"]: row for row in rows["cost"] if "part" in row}
    assert len(parts) == 6 and all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in parts.values())
    # 3 mask updates of 2 steps; T learns in one of them, and then looks at 6 batches of 32
    assert [row["calls"] for row in parts.values()] == [6, 2 + 6, 1, 1, 1, 1] and parts["d (9)"]["operations"] > 0
    runs = [tmp_path / "grid/shapes" / name for name in ("MLO-MAE-steps-0", "MAE-steps-0", "MLO-MAE-steps-1")]
    (ours, plain, other), (drawn, _) = (encode.load(run, "cpu") for run in runs), questions.maps_of_a_seed(*runs)
    images = data.load(str(files / "clutter.npz")).test.images[: questions.LOOKED_AT].float() / 255
    for name, expected in {
        "p of T": ours.weights(images).flatten(1),
        "p of another seed's T": other.weights(images).flatten(1),
        "CLS attention, last block": questions.cls_attention(ours, ours.inputs(images)),
        "CLS attention of MAE": questions.cls_attention(plain, plain.inputs(images)),
        "reconstruction error of MAE": questions.mean_errors(plain.net, plain.state.theta.params, plain.inputs(images)),
    }.items():  # each of its own run
        assert torch.allclose(drawn[name], expected), name
    assert not any(torch.allclose(one, another) for one, another in itertools.combinations(drawn.values(), 2))
    maps = {row["map"]: row for row in rows["learned"] if "map" in row}
    assert maps["p of T"]["with p"] == pytest.approx([1, 1]) and maps["nearness to the middle"]["auc"][0] > 0.7
    assert all(len(row["auc"]) == len(row["auc_by_image"]) == 2 for row in rows["learned"] if "auc" in row)
    assert [row["share"] for row in rows["learned"] if "share" in row] == [0.2, 0.5, 1.0]  # of 3 updates, 0.1 is 0.2


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["every"], "choose from"),
        (["ratio", "--seeds", "1"], "--seeds at least 2"),
        (["ratio", "--first-seed", "-1"], "--first-seed must be at least 0"),
        (["ratio", "--workers", "0"], "0 is not a positive whole number"),
        (["ratio", "--table", "--out", "nowhere"], "run without --table"),
        (["learned", "--table", "--out", "nowhere"], "run without --table"),
    ],
)
def test_what_cannot_run_ends_in_one_line(arguments, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mlo_mae.main(["questions", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line and not list(tmp_path.iterdir())
