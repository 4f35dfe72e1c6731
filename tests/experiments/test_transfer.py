"""transfer.py: segmentation, detection and its measure, and both from the command line."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, as_flags, bare, copied, write_coco, write_masked
from PIL import Image

import data
import mlo_mae
from experiments import finetune, transfer
from experiments.transfer import DenseRecipe
from harness.checkpoints import read_saved
from harness.dense import IGNORED, Boxed, Masked, load_dense, tightest_boxes
from harness.vectors import unflatten

SIZES = ("patch_size", "width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads", "masking_width")
FEW = ["--batch-size", "40", "--epochs", "2", "--device", "cpu", "--checkpoint-minutes", "0"]
pytestmark = pytest.mark.usefixtures("drawn_once")


@pytest.fixture(scope="module")
def run(drawn_once, tmp_path_factory):
    """A run on a few shapes."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = {name: getattr(TINY, name) for name in SIZES} | {"batch_size": 16, "labelled_batch_size": 8, "epochs": 1}
    settings |= {"images": 200, "device": "cpu", "checkpoint_minutes": 0, "mask_start": 0}
    with bare():
        assert mlo_mae.main(["pretrain", "--data", "shapes", "--out", str(out), *as_flags(settings)]) == 0
    return out


def command(*words):
    return mlo_mae.main(["transfer", *map(str, words)])


def refused(capsys, words, *expected):
    """The command ends with status 2 and one line that holds these words, after what was said of the weights."""
    capsys.readouterr()
    assert command(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "mlo_mae: " in line]
    assert len(lines) == 1 and all(str(word) in lines[0] for word in expected), lines


# --------------------------------------------------------------------------------------------------- segmentation


class Fixed:
    """A split of given batches."""

    def __init__(self, *batches):
        self.batches = [data.Batch(*batch) for batch in batches]

    def ordered(self, batch_size):
        return iter(self.batches)


def test_intersection_over_union_is_of_the_whole_split():
    """Two batches; class 3 is neither there nor found, class 2 is found but not there."""
    truth = torch.tensor([[[0, 0], [1, 1]], [[0, IGNORED], [1, 1]]], dtype=torch.uint8)
    found = torch.tensor([[[0, 1], [1, 1]], [[0, 2], [2, 1]]])
    split = Fixed(*((F.one_hot(f, 4).movedim(-1, 1).float(), t) for f, t in zip(found[:, None], truth[:, None])))
    result = transfer.evaluate_pixels(lambda images: images, split)
    chances = torch.tensor([math.e, 1]) / (math.e + 3)  # of the class that is found, and of another
    loss = -(5 * chances[0].log() + 2 * chances[1].log()).item() / 7
    assert result == {
        "miou": pytest.approx((2 / 3 + 3 / 5 + 0) / 3),
        "pixels": pytest.approx(5 / 7),
        "loss": pytest.approx(loss),
    }
    nothing = Fixed((torch.zeros(1, 4, 2, 2), torch.full((1, 2, 2), IGNORED, dtype=torch.uint8)))
    assert transfer.evaluate_pixels(lambda images: images, nothing) == {"miou": 0, "pixels": 0, "loss": 0}


def test_pixels_without_a_class_do_not_teach():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    labels[0, :2] = IGNORED
    loss = transfer.pixel_loss(lambda images, scales: logits, data.Batch(None, labels), None, None, None, 0)
    counted = labels != IGNORED
    wanted = F.cross_entropy(logits.movedim(1, -1)[counted], labels[counted].long())
    torch.testing.assert_close(loss, wanted)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad.abs().sum(1) > 0, counted)
    nothing = torch.full_like(labels, IGNORED)
    assert transfer.pixel_loss(lambda images, scales: logits, data.Batch(None, nothing), None, None, None, 0) == 0


def model_of(task, frozen=False, image_size=32):
    splits = load_dense("shapes", {"segment": "masks", "detect": "boxes"}[task], limit=40, image_size=image_size)
    net, (theta, _, _) = mlo_mae.build(TINY, image_size, 3, 8)
    recipe = DenseRecipe(frozen=frozen)
    return finetune.start(net, theta, splits, recipe, transfer.TASKS[task].model), net, theta, splits, recipe


def patched(monkeypatch, width, grid):
    """Encoders whose tokens say where they are: of patch (row, column), row and column in the first two features."""
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    tokens = torch.zeros(1, 1 + grid * grid, width)
    tokens[0, 1:, 0], tokens[0, 1:, 1] = rows.flatten(), columns.flatten()

    def forward(self, images, keep=None, scales=None):
        return tokens.expand(len(images), -1, -1)

    monkeypatch.setattr(mlo_mae.Encoder, "forward", forward)


def test_logits_lie_where_their_patches_are(monkeypatch):
    model, *_ = model_of("segment")
    grid, p = 32 // model.patch, model.patch
    patched(monkeypatch, model.head.in_features, grid)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[0, 0] = model.head.weight[1, 1] = 1
        logits = model(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 9, 32, 32)
    ramp = ((torch.arange(32) + 0.5) / p - 0.5).clamp(0, grid - 1)  # interpolated between the patches' centres
    torch.testing.assert_close(logits[0, 0], ramp[:, None].expand(32, 32))
    torch.testing.assert_close(logits[1, 1], ramp.expand(32, 32))


# ------------------------------------------------------------------------------------------------------ detection


def test_boxes_lie_where_their_patches_are(monkeypatch):
    model, *_ = model_of("detect")
    p, grid = model.patch, 32 // model.patch
    patched(monkeypatch, model.head.in_features, grid)
    with torch.no_grad():
        model.head.weight.zero_()
        logits, boxes = model(torch.zeros(2, 3, 32, 32))
        assert torch.allclose(logits.sigmoid(), torch.tensor(0.01))
        corners = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).flip(1) * p  # x, y in raster order
        torch.testing.assert_close(
            boxes[1], torch.cat([corners, corners + p], 1).float()
        )  # at first, a patch's box is its own
        model.head.bias[-4:] = torch.tensor([0.5, -1, math.log(2), math.log(3)])
        found = model(torch.zeros(1, 3, 32, 32))[1][0]
    moved = torch.tensor([p * (0.5 + 0.5 - 1), p * (0.5 - 1 - 1.5), p * (0.5 + 0.5 + 1), p * (0.5 - 1 + 1.5)])
    torch.testing.assert_close(found, corners.repeat(1, 2) + moved)


def test_each_patch_is_to_find_the_smallest_box_around_its_centre():
    places = transfer.centres(16, 4, "cpu")
    boxes = torch.tensor([[0, 0, 16, 16, 2], [4, 4, 12, 12, 0], [0, 0, 1.5, 1, 1], [0, 0, 16, 16, -1]])[None]
    index, found = transfer.assign(boxes, places, 4)
    wanted = torch.zeros(4, 4, dtype=torch.int64)
    wanted[1:3, 1:3] = 1
    wanted[0, 0] = 2  # no centre is in it, but its own is in this patch
    assert found.all() and torch.equal(index[0].view(4, 4), wanted)
    _, found = transfer.assign(boxes[:, 1:], places, 4)
    assert torch.equal(found[0].view(4, 4), wanted > 0)
    assert not transfer.assign(boxes[:, 3:], places, 4)[1].any()


def test_overlaps_of_boxes():
    a = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 2, 2], [1, 1, 1, 1]], dtype=torch.float64)
    b = torch.tensor([[0, 0, 4, 4], [2, 0, 6, 4], [4, 0, 6, 2], [1, 1, 1, 1]], dtype=torch.float64)
    iou, apart = transfer.overlap(a, b)
    torch.testing.assert_close(iou, torch.tensor([1, 8 / 24, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(apart[:3], torch.tensor([0, 0, 4 / 12], dtype=torch.float64))
    assert apart.isfinite().all()


def test_the_focal_loss_is_the_published_formula():
    logits, wanted = torch.randn(50), (torch.rand(50) < 0.3).float()
    p = logits.sigmoid()
    right = torch.where(wanted == 1, p, 1 - p)
    formula = -torch.where(wanted == 1, 0.25, 0.75) * (1 - right) ** 2 * right.log()
    torch.testing.assert_close(transfer.focal_loss(logits, wanted), formula)


def test_the_box_loss_is_of_the_patches_that_have_one():
    model, _, _, splits, recipe = model_of("detect")
    batch = splits.train.pick(torch.arange(6))
    batch.labels[0, 0, 4] = -1  # an image without an object: its patches have no box to find
    loss = transfer.box_loss(model, batch, None, recipe, splits, 0)
    logits, boxes = model(batch.images)
    total, count = 0, 0
    for i in range(6):
        low, high = batch.labels[i, 0, :2], batch.labels[i, 0, 2:4]
        wanted = torch.zeros(logits.shape[1:])
        for j, place in enumerate(transfer.centres(32, model.patch, "cpu")):
            if i and ((low <= place) & (place < high)).all():
                count += 1
                wanted[j, int(batch.labels[i, 0, 4])] = 1
                iou, apart = transfer.overlap(boxes[i, j], batch.labels[i, 0, :4])
                total = total + 1 - iou + apart
        total = total + transfer.focal_loss(logits[i], wanted).sum()
    assert count > 20
    torch.testing.assert_close(loss, total / count)
    empty = batch._replace(labels=torch.full_like(batch.labels, -1))
    assert transfer.box_loss(model, empty, None, recipe, splits, 0).isfinite()


def test_worse_boxes_of_the_same_class_are_suppressed():
    """Against the rule itself, one box at a time."""
    generator = torch.Generator().manual_seed(1)
    low = torch.rand(3, 40, 2, generator=generator) * 20
    boxes = torch.cat([low, low + 4 + 8 * torch.rand(3, 40, 2, generator=generator)], 2)
    logits = torch.randn(3, 40, 2, generator=generator) - 1
    found, suppressed = transfer.detections(logits, boxes, 24), 0
    for image in range(3):
        rows, kept = logits[image].sigmoid().tolist(), []
        pairs = sorted(((score, j, label) for j, row in enumerate(rows) for label, score in enumerate(row)), reverse=True)
        for score, j, label in pairs:
            box = boxes[image, j].clamp(0, 24)
            beaten = any(label == other[5] and transfer.overlap(box, torch.tensor(other[:4]))[0] > 0.5 for other in kept)
            suppressed += beaten
            if score >= 0.05 and not beaten:
                kept.append([*box.tolist(), score, label])
        torch.testing.assert_close(found[image][found[image, :, 4] > 0], torch.tensor(kept))
        few = transfer.detections(logits, boxes, 24, most=20)[image]  # of the 80 looked at, the best 20 that stay
        torch.testing.assert_close(few[few[:, 4] > 0], torch.tensor(kept[:20]))
    assert suppressed > 30


def test_average_precision_by_hand():
    """Class 0: of two true boxes one is found, by the second-best of three boxes, with an overlap of 0.75. Class 1: found."""
    truth = [torch.tensor([[0, 0, 4, 4, 0], [10, 10, 14, 14, 0]]).float(), torch.tensor([[0, 0, 8, 8, 1]]).float()]
    found = [
        torch.tensor([[20, 20, 24, 24, 0.9, 0], [0, 0, 4, 3, 0.8, 0], [0, 0, 4, 4, 0.7, 0]]).float(),
        torch.tensor([[0, 0, 8, 8, 0.6, 1], [0, 0, 8, 8, 0.5, 2]]).float(),
    ]
    loose, strict = 0.5 * 51 / 101, 1 / 3 * 51 / 101  # up to 0.75 the second box is right, above it the third
    result = transfer.average_precision(found, truth)
    assert result["ap50"] == pytest.approx((loose + 1) / 2)
    assert result["ap"] == pytest.approx((0.6 * loose + 0.4 * strict + 1) / 2)
    assert transfer.average_precision([torch.zeros(0, 6)] * 2, truth) == {"ap": 0, "ap50": 0}
    assert transfer.average_precision(found, [torch.zeros(0, 5)] * 2) == {"ap": 0, "ap50": 0}  # nothing is there


def random_boxes(seed, images=30, classes=3):
    generator = torch.Generator().manual_seed(seed)

    def some(count):
        low = torch.rand(count, 2, generator=generator) * 40
        return torch.cat([low, low + 5 + 15 * torch.rand(count, 2, generator=generator)], 1)

    found, truth = [], []
    for _ in range(images):
        boxes = some(int(torch.randint(0, 6, (), generator=generator)))
        labels = torch.randint(0, classes, (len(boxes), 1), generator=generator)
        truth.append(torch.cat([boxes, labels], 1))
        near = boxes.repeat(2, 1) + torch.randn(2 * len(boxes), 4, generator=generator)
        guesses = torch.cat([near, some(3)])
        right = torch.cat([labels, labels, torch.randint(0, classes, (3, 1), generator=generator)])
        found.append(torch.cat([guesses, torch.rand(len(guesses), 1, generator=generator), right], 1))
    return found, truth


def test_average_precision_is_cocos():
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    found, truth = random_boxes(0)

    def rows(images, scored):
        for image, boxes in enumerate(images):
            for left, top, right, bottom, *rest in boxes.tolist():
                box = {
                    "image_id": image + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "category_id": int(rest[-1]),
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
                yield box | ({"score": rest[0]} if scored else {})

    judge = coco.COCO()
    annotations = [row | {"id": number} for number, row in enumerate(rows(truth, False), 1)]
    judge.dataset = {
        "images": [{"id": i + 1} for i in range(len(truth))],
        "annotations": annotations,
        "categories": [{"id": i} for i in range(3)],
    }
    judge.createIndex()
    evaluation = cocoeval.COCOeval(judge, judge.loadRes(list(rows(found, True))), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    result = transfer.average_precision(found, truth)
    assert [result["ap"], result["ap50"]] == pytest.approx(evaluation.stats[:2].tolist(), abs=1e-9)
    assert 0.1 < result["ap"] < result["ap50"] < 0.9


def test_boxes_of_the_truth_are_all_right():
    splits = load_dense("shapes", "boxes", limit=40)
    labels = F.one_hot(splits.test.labels[:, 0, 4].long(), 8) * 20.0 - 10

    class Oracle:
        at, patch = 0, 32  # one patch an image, as large as it is

        def __call__(self, images):
            rows = slice(self.at, self.at + len(images))
            self.at += len(images)
            return labels[rows, None], splits.test.labels[rows, :, :4]

    result = transfer.evaluate_boxes(Oracle(), splits.test)
    assert result == {"ap": pytest.approx(1), "ap50": pytest.approx(1), "loss": pytest.approx(0, abs=1e-4)}


# ----------------------------------------------------------------------------------------------- from start to end


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_drop_path_reaches_the_loss(task):
    model, net, theta, splits, recipe = model_of(task)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = splits.train.pick(torch.arange(8))
    kept, left_out = torch.ones(2, 2, 8, 1, 1), torch.zeros(2, 2, 8, 1, 1)
    plain, one, other = (
        transfer.TASKS[task].loss(model, batch, scales, recipe, splits, 0).item() for scales in (None, kept, left_out)
    )
    assert one == pytest.approx(plain, rel=1e-5) and abs(other - one) > 1e-3


def test_frozen_encoders_stay_as_they_are():
    model, net, theta, splits, recipe = model_of("segment", frozen=True)
    groups = finetune.layer_groups(model, recipe)
    assert {id(p) for group in groups for p in group["params"]} == set(map(id, model.head.parameters()))
    finals, found = [], {"miou": 0.5, "loss": 1.0}
    task = transfer.SEGMENT._replace(evaluate=lambda model, split: finals.append(model.state_dict()) or found)
    finetune.finetune(net, theta, splits, DenseRecipe(frozen=True, epochs=2, warmup_epochs=0.5, batch_size=8), task=task)
    for name, tensor in unflatten(net.encoder, theta[: net.encoder_size]).items():
        assert torch.equal(finals[-1][name], tensor), name
    assert not torch.equal(finals[-1]["head.weight"], model.head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("task, measure", [("segment", "miou"), ("detect", "ap50")])
def test_it_learns(task, measure):
    """Large plain discs and squares on black, which a few steps tell apart."""
    rng, count = np.random.default_rng(0), 120
    labels = np.arange(count) % 2
    middle, objects = rng.integers(10, 22, (2, count, 1, 1)), np.zeros((count, 32, 32), bool)
    y, x = np.mgrid[:32, :32]
    for label in (0, 1):
        distance = np.stack([np.abs(y - middle[0]), np.abs(x - middle[1])])
        distance = np.hypot(*distance) if label == 0 else distance.max(0)
        objects |= (distance < 9) & (labels == label)[:, None, None]
    images = (255 * objects[:, None] * np.array([[1, 0, 0], [0, 0, 1]])[labels][:, :, None, None]).astype(np.uint8)
    if task == "segment":
        kind, wanted = Masked, objects * (1 + labels[:, None, None])
    else:
        kind, wanted = Boxed, tightest_boxes(objects, labels)
    parts = (kind(images[part], wanted[part], (0.2,) * 3, (0.3,) * 3) for part in np.split(np.arange(count), (80, 100)))
    names = ["none", "disc", "square"] if task == "segment" else ["disc", "square"]
    splits = data.Splits(*parts, names, 3, 32, (0.2,) * 3, (0.3,) * 3)
    net, (theta, _, _) = mlo_mae.build(TINY, 32, 3, 2)
    recipe = DenseRecipe(from_scratch=True, epochs=25, batch_size=8, lr=5e-3, layer_decay=1.0)
    result = finetune.finetune(net, theta, splits, recipe, task=transfer.TASKS[task])
    assert result[f"test_{measure}"] > 0.5 and result["recipe"] == task


@pytest.fixture(scope="module", params=["segment", "detect"])
def done(request, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("dense") / request.param
    assert command(request.param, run, *FEW, "--out", out) == 0
    return request.param, out


@pytest.mark.slow
def test_files_of_a_task(done, run):
    task, out = done
    result = json.loads((out / "result.json").read_text())
    measures = {"segment": {"test_miou", "test_pixels", "val_miou"}, "detect": {"test_ap", "test_ap50", "val_ap"}}[task]
    assert measures | {"epoch", "seconds", "train_labels"} <= result.keys() and result["train_labels"] == 160
    saved = {"checkpoint.pt", "checkpoint.previous.pt", "predictions.png"}
    assert {path.name for path in out.iterdir()} == {"config.json", "metrics.jsonl", "result.json", "lock"} | saved
    with Image.open(out / "predictions.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 20


@pytest.mark.slow
def test_interrupted_and_resumed_ends_the_same(done, run, tmp_path, monkeypatch):
    task, out = done
    real, cut, steps = transfer.TASKS[task], tmp_path / "cut", []

    def loss(*arguments):
        steps.append(1)
        if len(steps) == 6:
            signal.raise_signal(signal.SIGTERM)
        return real.loss(*arguments)

    monkeypatch.setitem(transfer.TASKS, task, real._replace(loss=loss))
    words = [task, run, *FEW, "--out", cut]
    assert command(*words) == 143
    assert not (cut / "result.json").exists()
    words[1] = os.path.relpath(run)  # the run may be named otherwise
    assert command(*words, "--resume") == 0
    ends = [read_saved(folder / "checkpoint.pt", real.format)["best"] for folder in (out, cut)]
    assert all(torch.equal(tensor, ends[1]["model"][name]) for name, tensor in ends[0]["model"].items())
    assert len(steps) == 2 * (160 // 40)


def test_other_data_than_the_runs(run, tmp_path, capsys):
    """Larger images, other classes; positions are interpolated."""
    root, few = write_masked(tmp_path / "data"), ["--epochs", "2", "--batch-size", "2", "--device", "cpu"]
    assert command("segment", run, "--data", root, "--image-size", "40", *few, "--out", tmp_path / "a") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["command"] == "segment" and "interpolated" in printed.err
    root, sizes = write_coco(tmp_path / "boxes"), ["--image-size", "32", "--patch-size", "8"]
    assert command("detect", "--from-scratch", "--data", root, *sizes, *few, "--out", tmp_path / "b") == 0


def test_a_value_that_is_ignored_may_be_kept(tmp_path, capsys):
    words = ["segment", "--from-scratch", "--data", write_masked(tmp_path / "data", values=(0, 255)), "--epochs", "1"]
    words += ["--warmup-epochs", "0", "--batch-size", "4", "--image-size", "16", "--patch-size", "8", "--width", "16"]
    words += ["--depth", "1", "--device", "cpu", "--out", tmp_path / "a"]
    refused(capsys, words, "show 1 class;", "--ignore none")
    assert command(*words, "--ignore", "none") == 0


@pytest.fixture(scope="module")
def with_objects(tmp_path_factory):
    """An .npz of 60 + 12 images of two classes whose objects are known: rectangles, none in the first image of each part."""
    path, rng, arrays = tmp_path_factory.mktemp("data") / "objects.npz", np.random.default_rng(0), {}
    for part, count in (("train", 60), ("test", 12)):
        objects, labels = np.zeros((count, 16, 16), bool), np.arange(count) % 2
        for i in range(1, count):
            objects[i, 2 + i % 5 : 12, 3 : 9 + i % 4] = True
        images = (
            rng.integers(0, 60, (count, 16, 16, 3)) + 150 * objects[..., None] * np.eye(3, dtype=int)[labels][:, None, None]
        )
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels, f"{part}_objects": objects}
    np.savez(path, **arrays)
    return path, arrays


def test_objects_of_a_file_are_masks_and_boxes(with_objects):
    path, arrays = with_objects
    objects, labels = arrays["test_objects"], arrays["test_labels"]
    masks, boxes = (load_dense(path, kind) for kind in ("masks", "boxes"))
    assert masks.class_names == ["background", "0", "1"] and boxes.class_names == ["0", "1"]
    assert torch.equal(masks.test.labels, torch.from_numpy(objects * (1 + labels[:, None, None])).byte())
    assert boxes.test.labels[0, 0, 4] == -1 and not masks.test.labels[0].any()  # no object, no box
    assert boxes.test.labels[3, 0].tolist() == [3, 5, 12, 12, 1]  # left, top, right, bottom, class
    plain = data.load(path, "")
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(masks, split).images, getattr(plain, split).images)
        assert torch.equal(getattr(masks, split).labels > 0, getattr(plain, split).objects)
    assert len(load_dense(path, "boxes", limit=30, val_fraction=0.5).train) == 15


def test_a_run_on_such_a_file_is_transferred_on_it(with_objects, tmp_path, capsys):
    path, sizes = with_objects[0], {name: getattr(TINY, name) for name in SIZES}
    settings = sizes | {"batch_size": 16, "labelled_batch_size": 8, "epochs": 1, "mask_start": 0, "device": "cpu"}
    with bare():
        assert mlo_mae.main(["pretrain", "--data", str(path), "--out", str(tmp_path / "run"), *as_flags(settings)]) == 0
    few = ["--batch-size", "12", "--epochs", "2", "--device", "cpu"]
    for task in transfer.TASKS:
        assert command(task, tmp_path / "run", *few) == 0
        result = json.loads((tmp_path / "run" / f"{task}-0" / "result.json").read_text())
        assert (result["train_labels"], result["val_labels"]) == (48, 12)


def test_a_file_without_objects_is_refused(with_objects, run, tmp_path, capsys):
    blind = {name: array for name, array in with_objects[1].items() if "objects" not in name}
    np.savez(tmp_path / "blind.npz", **blind)
    refused(capsys, ["segment", run, "--data", tmp_path / "blind.npz"], "blind.npz does not say where its objects are")
    many = {f"train_{name}": np.zeros((255, 16, 16), np.uint8) for name in ("images", "objects")}
    many["train_labels"] = np.arange(255)
    many |= {name: many[name.replace("test", "train")][:9] for name in ("test_images", "test_objects", "test_labels")}
    np.savez(tmp_path / "many.npz", **many)
    refused(capsys, ["segment", run, "--data", tmp_path / "many.npz"], "many.npz has 256 classes")


@pytest.mark.slow
def test_a_baselines_run_has_more_settings(run, done, tmp_path):
    """Its encoder is transferred as any other, to the same end."""
    task, out = done
    other = copied(run, tmp_path / "other")
    content = torch.load(other / "checkpoint.pt", weights_only=True)
    torch.save(content | {"config": content["config"] | {"uniformity": 0.01}}, other / "checkpoint.pt")
    assert command(task, other, *FEW, "--out", tmp_path / "out") == 0
    results = [json.loads((folder / "result.json").read_text()) | {"seconds": 0} for folder in (out, tmp_path / "out")]
    assert results[0] == results[1]


@pytest.mark.slow
def test_where_a_task_writes(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--epochs", "1", "--warmup-epochs", "0", "--images", "60", "--device", "cpu"]
    for words, expected in (
        (["segment", run, "--frozen", "--seed", "3"], run / "segment-frozen-3"),
        (["segment", "--from-scratch", "--width", "16", "--depth", "1"], "runs/shapes-scratch-segment-0"),
    ):
        assert command(*words, *short) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["run"] == str(expected)


def test_bad_input_ends_in_one_line(run, done, tmp_path, capsys):
    task, out = done
    refused(capsys, [task, run, "--out", out], out, "--resume")
    refused(capsys, [task, run, "--out", out, "--resume", "--seed", "7"], "started with --epochs 2, not 10")
    refused(capsys, [{"segment": "detect", "detect": "segment"}[task], run, "--out", out, "--resume"], "kind")
    refused(capsys, [task], "--from-scratch")
    refused(capsys, [task, run, "--from-scratch"], "--from-scratch")
    refused(capsys, [task, "--from-scratch", "--frozen"], "--frozen")
    refused(capsys, [task, tmp_path / "no"], "does not exist")
    refused(capsys, [task, tmp_path], "checkpoint.pt does not exist", "give a folder that has it")
    refused(capsys, [task, run, "--width", "32"], "--width", "own affair")
    refused(capsys, [task, run, *FEW, "--out", out, "--resume", "--no-flip"], "started with --flip, not --no-flip")
    refused(capsys, [task, run, "--data", "cifar100"], "cifar100: neither shapes nor a folder")
    refused(capsys, [task, "--from-scratch", "--preset", "cifar100"], "cifar100 has no", "--data")
    refused(capsys, [task, run, "--epochs", "0"], "--epochs")
    refused(capsys, [task, run, "--colour", "red"], "--colour")
    refused(capsys, ["segment", run, "--ignore", "nothing"], "--ignore: nothing is neither a value (0 to 255) nor none")
    refused(capsys, ["segment", run, "--ignore", "256"], "--ignore 256 (0 to 255, or none)")
    refused(capsys, ["classify", run], "classify")


def test_a_damaged_folder_of_a_run_ends_in_one_line(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    content = torch.load(copy / "checkpoint.pt", weights_only=True)
    torch.save(content | {"config": {}}, copy / "checkpoint.pt")
    refused(capsys, ["segment", copy], "checkpoint.pt is damaged or of another version")
    (copy / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:2000])
    refused(capsys, ["segment", copy], "checkpoint.pt")


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_the_picture_shows_classes_in_turn(tmp_path, monkeypatch, kind):
    """Images in the order of their classes, as a folder has them; a background is in all of them."""
    classes = np.repeat(np.arange(1, 5), 10)
    images = np.zeros((40, 3, 8, 8), np.uint8) + classes[:, None, None, None].astype(np.uint8)
    masks, boxes = np.zeros((40, 8, 8), np.uint8), np.full((40, 2, 5), -1, np.float32)
    masks[:, 2:4, 2:4] = classes[:, None, None]
    boxes[:, 0] = np.stack([*np.tile([[2], [2], [4], [4]], 40), classes])[[0, 1, 2, 3, 4]].T
    part = (Masked if kind == "masks" else Boxed)(images, masks if kind == "masks" else boxes, (0.0,) * 3, (1.0,) * 3)
    splits, shown = data.Splits(part, part, part, list("abcde"), 3, 8, (0.0,) * 3, (1.0,) * 3), []
    monkeypatch.setattr(transfer, "grid", lambda path: None)
    transfer.draw(lambda images: shown.append(images), splits, tmp_path, lambda *arguments: {})
    found = (255 * shown[0][:, 0, 0, 0]).round().int().tolist()
    found = [value // min(found) for value in found]
    assert sorted(found[:4]) == sorted(found[4:]) == [1, 2, 3, 4]


NAMES = ["background", *(f"class {number}" for number in range(1, 12))]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_masks_has_a_colour_a_class_and_a_key(channels):
    rng = np.random.default_rng(0)
    pixels, masks, found = (
        rng.random((2, 8, 8, channels)),
        rng.choice([0, 3, 5, IGNORED], (2, 8, 8)),
        rng.choice([0, 3, 11], (2, 8, 8)),
    )
    logits = torch.nn.functional.one_hot(torch.from_numpy(found), 12).movedim(3, 1).float()
    picture = transfer.picture_of_masks(pixels, logits, masks.astype(np.uint8), NAMES)
    (_, image, _), (_, truth, _), (_, shown, _) = picture["rows"]
    assert [title for title, *_ in picture["rows"]] == ["image", "truth", "found"] and image is pixels
    key = picture["key"]
    assert list(key) == ["background", "class 3", "class 5", "class 11"] and key["background"] == (0, 0, 0)
    assert len(set(map(tuple, key.values()))) == 4
    for labels, painted in ((masks, truth), (found, shown)):
        for label in (0, 3, 5, 11):
            assert (painted[labels == label] == key[NAMES[label]]).all()
    assert np.array_equal(truth[masks == IGNORED], np.broadcast_to(pixels, (2, 8, 8, 3))[masks == IGNORED])
    assert (masks == IGNORED).any() and np.isfinite(truth).all()


def test_boxes_show_their_class_by_colour_and_cover_no_other(tmp_path, monkeypatch):
    """Three boxes at one place: each has a rim that those above it do not hide; no text is on the images."""
    saved, size = [], 16
    monkeypatch.setattr("harness.pictures.save_figure", lambda figure, path: saved.append(figure))
    boxes = np.full((2, 2, 5), -1, np.float32)
    boxes[0, 0], boxes[1, 0], boxes[1, 1] = (2, 2, 10, 10, 4), (0, 0, 4, 4, 7), (9, 9, 15, 15, 7)
    logits, corners = torch.full((2, 5, 12), -9.0), torch.tensor([2.0, 2, 10, 10]).expand(2, 5, 4).clone()
    for place, (label, logit) in enumerate([(4, 3.0), (1, 2.0), (7, 1.0), (9, -2.0)]):  # the last scores 0.12
        logits[0, place, label] = logit
    logits[1, 4, 7], corners[1, 4] = 3.0, torch.tensor([0.0, 0, 4, 4])
    picture = transfer.picture_of_boxes(np.zeros((2, size, size, 3)), (logits, corners), boxes, NAMES)
    transfer.grid(tmp_path / "a.png", **picture)
    assert list(picture["key"]) == ["class 1", "class 4", "class 7"]
    axes = np.array(saved[0].axes).reshape(3, 2)
    drawn = [[[line for line in axis.lines if line.get_color() != "white"] for axis in row] for row in axes]
    names = {tuple(colour): name for name, colour in picture["key"].items()}
    said = [[[names[tuple(line.get_color())] for line in lines] for lines in row] for row in drawn]
    assert said == [[[], []], [["class 4"], ["class 7"] * 2], [["class 7", "class 1", "class 4"], ["class 7"]]]  # best last
    widths = [line.get_linewidth() for line in drawn[2][0]]
    assert all(below - above >= 2 for below, above in zip(widths, widths[1:]))
    assert {line.get_linewidth() for lines in drawn[1] for line in lines} == {min(widths)}  # boxes apart are alike
    assert list(drawn[2][1][0].get_xdata()) == [-0.5, 3.5, 3.5, -0.5, -0.5]
    assert not any(axis.texts for axis in saved[0].axes)
