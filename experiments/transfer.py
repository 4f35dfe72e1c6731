"""Dense tasks on a pretrained encoder: the class of every pixel (segmentation), and boxes around objects (detection).

    python mlo_mae.py transfer segment RUN                  # on images whose objects are known: their pixels, by class
    python mlo_mae.py transfer detect RUN
    python mlo_mae.py transfer segment RUN --frozen         # the encoder is held as it is: how much do its tokens tell?
    python mlo_mae.py transfer segment --from-scratch       # fresh weights: no pretraining
    python mlo_mae.py transfer segment RUN --data DIR       # DIR/images/train/*.jpg, DIR/masks/train/*.png, ... (ADE20K)
    python mlo_mae.py transfer detect RUN --data DIR        # DIR/annotations/instances_train*.json, DIR/train*/ ... (COCO)

Both heads are one linear layer on every patch's token, so that what is measured is the encoder; they are no rivals of the
heads of several million weights that win competitions. The training loop is finetune.py's: the validation split is read
after each epoch, the weights that do best on it are kept, and the test split is read once. In this order: segmentation,
detection (targets, losses, boxes from predictions, average precision), pictures, where it starts, command line.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlo_mae
from data import DRAWN, Batch, Splits, sample
from experiments import config_of, finetune, first_weights
from harness import UserError, cli
from harness.checkpoints import fitting, newest
from harness.cli import flag
from harness.dense import IGNORED, Boxed, Masked, load_dense
from harness.pictures import PIXELS, distinct, grid
from mlo_mae import PRESETS, Config, Networks


@dataclass(frozen=True)
class DenseRecipe(finetune.Training):
    """How to train. Every field is a flag."""

    frozen: bool = flag(False, "hold the encoder as it is, and let the head learn alone")


def check(recipe: DenseRecipe) -> None:
    """Raise UserError for a recipe that cannot run, naming the flag to change."""
    finetune.check(recipe)
    if recipe.frozen and recipe.from_scratch:
        raise UserError("--frozen holds an encoder that has learned something; leave out --from-scratch")


class Dense(finetune.Tuned):
    """The encoder, and a linear layer on every patch's token."""

    def __init__(self, cfg: Config, splits: Splits, recipe: DenseRecipe, outputs: int):
        super().__init__(cfg, splits, recipe)
        self.requires_grad_(not recipe.frozen)
        self.head = nn.Linear(cfg.width, outputs)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images, scales=None):  # [B, C, H, W], factors of the branches -> [B, N, outputs]
        return self.head(self.tokens(images, scales)[:, 1:])


# --------------------------------------------------------------------------------------------------- segmentation


class Segmenter(Dense):
    """A class for every pixel: the patches' logits, interpolated (the linear decoder of arXiv 2105.05633)."""

    def __init__(self, cfg: Config, splits: Splits, recipe: DenseRecipe):
        super().__init__(cfg, splits, recipe, len(splits.class_names))

    def forward(self, images, scales=None):  # -> [B, classes, H, W]
        logits = super().forward(images, scales).mT.unflatten(2, (images.shape[2] // self.patch, -1))  # [B, classes, H/p, W/p]
        return F.interpolate(logits, images.shape[2:], mode="bilinear")


def pixel_loss(
    model: Segmenter, batch: Batch, scales: Tensor | None, recipe: DenseRecipe, splits: Splits, step: int
) -> Tensor:
    """Mean cross-entropy of the pixels that have a class."""
    total, count = pixel_errors(model(batch.images, scales), batch.labels)
    return total / count.clamp_min(1)


def pixel_errors(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits [B, classes, H, W], summed over the pixels that have a class [B, H, W], and their number."""
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="sum"), (labels != IGNORED).sum()


@torch.no_grad()
def evaluate_pixels(model: Segmenter, split: Masked) -> dict[str, float]:
    """{"miou": intersection over union of each class's true and predicted pixels in the whole split, mean over the classes
    that are either; "pixels": share of the pixels whose class is right; "loss": their mean cross-entropy}. Pixels without a
    class do not count."""
    confusion, loss = 0, 0.0  # [classes, classes]: truth, prediction
    for images, labels in split.ordered(64):
        logits, counted = model(images), labels != IGNORED
        loss += pixel_errors(logits, labels)[0].item()
        classes = logits.shape[1]
        pairs = labels[counted].long() * classes + logits.argmax(1)[counted]
        confusion = confusion + torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu().double()
    right, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    shares = right / union.clamp_min(1)
    return {
        "miou": (shares.sum() / (union > 0).sum().clamp_min(1)).item(),
        "pixels": (right.sum() / confusion.sum().clamp_min(1)).item(),
        "loss": loss / confusion.sum().clamp_min(1).item(),
    }


# ------------------------------------------------------------------------------------------------------ detection


class Detector(Dense):
    """At every patch, a score for each class and one box: FCOS (arXiv 1904.01355) at one scale, without its centre-ness.

    Boxes are left, top, right, bottom in pixels."""

    def __init__(self, cfg: Config, splits: Splits, recipe: DenseRecipe):
        super().__init__(cfg, splits, recipe, len(splits.class_names) + 4)
        # Scores of 0.01, so that the many patches without an object do not drown the first steps (arXiv 1708.02002)
        nn.init.constant_(self.head.bias[:-4], -np.log(99))

    def forward(self, images, scales=None):  # -> logits [B, N, classes], boxes [B, N, 4]
        found = super().forward(images, scales)
        logits, place, size = found.split([found.shape[2] - 4, 2, 2], dim=2)
        middle = centres(images.shape[2], self.patch, images.device) + self.patch * place
        half = self.patch / 2 * size.clamp(max=8).exp()  # a patch's size at first
        return logits, torch.cat([middle - half, middle + half], dim=2)


def centres(size: int, patch: int, device: torch.device | str) -> Tensor:
    """The centres of the patches, [N, 2]: x, y in pixels."""
    ends = torch.arange(patch / 2, size, patch, device=device)
    return torch.cartesian_prod(ends, ends).flip(1)


def assign(boxes: Tensor, places: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Which box each patch is to find, [B, N], and whether there is any: of those around its centre, or those whose own
    centre is in the patch, the smallest. boxes [B, M, 5], places [N, 2]."""
    low, high, label = boxes[:, None, :, :2], boxes[:, None, :, 2:4], boxes[:, None, :, 4]  # [B, 1, M, ...]
    places = places[None, :, None]  # [1, N, 1, 2]
    around = ((low <= places) & (places < high)).all(-1)
    within = (((low + high) / 2 - places).abs() <= patch / 2).all(-1)
    area = (high - low).prod(-1).where((around | within) & (label >= 0), torch.inf)  # [B, N, M]
    smallest, index = area.min(2)
    return index, smallest.isfinite()


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes, [..., 4] and [..., 4] -> [...], and what generalised IoU takes off it: the share of
    the box around both that is in neither (arXiv 1902.09630)."""

    def area(low, high):
        return (high - low).clamp_min(0).prod(-1)

    (a_low, a_high), (b_low, b_high) = a.split(2, dim=-1), b.split(2, dim=-1)
    common = area(torch.maximum(a_low, b_low), torch.minimum(a_high, b_high))
    union = (area(a_low, a_high) + area(b_low, b_high) - common).clamp_min(1e-9)
    hull = area(torch.minimum(a_low, b_low), torch.maximum(a_high, b_high)).clamp_min(1e-9)
    return common / union, 1 - union / hull


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross-entropy, in which a prediction counts by its error squared (arXiv 1708.02002: gamma 2, alpha 0.25)."""
    off = (wanted - logits.sigmoid()).abs()
    weight = 0.25 * wanted + 0.75 * (1 - wanted)
    return weight * off**2 * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def box_loss(model: Detector, batch: Batch, scales: Tensor | None, recipe: DenseRecipe, splits: Splits, step: int) -> Tensor:
    """Focal loss of all scores, and 1 - generalised IoU of the boxes of patches that have one to find; by their number."""
    total, count = box_errors(*model(batch.images, scales), batch.labels, batch.images.shape[2], model.patch)
    return total / count.clamp_min(1)


def box_errors(logits: Tensor, boxes: Tensor, labels: Tensor, size: int, patch: int) -> tuple[Tensor, Tensor]:
    """`box_loss` before the division, of a detector's logits [B, N, classes] and boxes [B, N, 4], and the number of patches
    that have a box to find, of labels [B, M, 5]. Images are `size` pixels wide."""
    index, found = assign(labels, centres(size, patch, boxes.device), patch)
    wanted = labels.gather(1, index[..., None].expand(-1, -1, 5))  # [B, N, 5]
    classes = F.one_hot(wanted[..., 4].clamp_min(0).long(), logits.shape[2]) * found[..., None]
    iou, apart = overlap(boxes[found], wanted[found][:, :4])
    return focal_loss(logits, classes.float()).sum() + (1 - iou + apart).sum(), found.sum()


def detections(logits: Tensor, boxes: Tensor, size: int, most: int = 100, least: float = 0.05, same: float = 0.5) -> Tensor:
    """The `most` best boxes of each image, of four times as many looked at, [B, most, 6]: corners within the image, score,
    class. The score is -1 where it is below `least`, or where a better box of the same class overlaps by more than `same`."""
    scores, places = logits.sigmoid().flatten(1).topk(min(4 * most, logits[0].numel()), dim=1)  # [B, K]: best first
    labels = places % logits.shape[2]
    boxes = boxes.gather(1, (places // logits.shape[2])[..., None].expand(-1, -1, 4)).clamp(0, size)
    rivals = overlap(boxes[:, :, None], boxes[:, None])[0] > same  # [B, K, K]
    rivals &= labels[:, :, None] == labels[:, None]
    stays = scores >= least
    for k in range(scores.shape[1]):  # a box that is itself suppressed suppresses none
        stays[:, k + 1 :] &= ~(stays[:, k, None] & rivals[:, k, k + 1 :])
    found = torch.cat([boxes, scores.where(stays, -1)[..., None], labels[..., None]], dim=2)  # [B, K, 6]
    best = found[..., 4].topk(min(most, found.shape[1]), dim=1).indices
    return found.gather(1, best[..., None].expand(-1, -1, 6))


THRESHOLDS = torch.linspace(0.5, 0.95, 10, dtype=torch.float64)  # of IoU


def matches(found: Tensor, truth: Tensor) -> Tensor:
    """Which of an image's boxes of one class are right, [10, n], at each of THRESHOLDS: the best first, each takes the true
    box that it overlaps most of those that are left. found [n, 6] by falling score, truth [m, 5]."""
    right = torch.zeros(len(THRESHOLDS), len(found), dtype=torch.bool)
    if len(truth) == 0:
        return right
    iou = overlap(found[:, None, :4].double(), truth[None, :, :4].double())[0]  # [n, m]
    left = torch.ones(len(THRESHOLDS), len(truth), dtype=torch.bool)
    for i, row in enumerate(iou):
        best, index = row.where(left, -1.0).max(1)  # each [10]
        right[:, i] = best >= THRESHOLDS
        left[right[:, i], index[right[:, i]]] = False
    return right


def average_precision(found: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
    """COCO's average precision: {"ap": mean over IoU 0.50 to 0.95, "ap50": at 0.50}, over the classes that are there.

    found: of each image, its boxes [n, 6] (corners, score, class); truth: its true boxes [m, 5]. The precision at a recall
    is the best at that recall or any higher one, and the mean is over recalls of 0, 0.01, ..., 1. Crowds, whose boxes COCO
    neither rewards nor punishes, are not known here."""
    per_class, labels = [torch.zeros(0, len(THRESHOLDS))], torch.cat(truth)[:, 4]
    nothing = torch.zeros(0), torch.zeros(len(THRESHOLDS), 0, dtype=torch.bool)
    judged = {label: [nothing] for label in labels.unique().tolist()}  # of each class: scores, and which are right
    for boxes, there in zip(found, truth):
        boxes = boxes[boxes[:, 4].argsort(descending=True, stable=True)]
        for label in judged.keys() & boxes[:, 5].tolist():  # an image has few of the classes
            some = boxes[boxes[:, 5] == label]
            judged[label].append((some[:, 4], matches(some, there[there[:, 4] == label])))
    for label, pairs in judged.items():
        scores, right = zip(*pairs)
        order = torch.cat(scores).argsort(descending=True, stable=True)
        right = torch.cat(right, dim=1)[:, order].double().cumsum(1)  # [10, n]: how many of the best are right
        recall = right / (labels == label).sum()
        precision = right / torch.arange(1, len(order) + 1)
        precision = F.pad(precision.flip(1).cummax(1).values.flip(1), (0, 1)) if len(order) else torch.zeros(len(right), 1)
        steps = torch.linspace(0, 1, 101, dtype=torch.float64).expand(len(right), -1).contiguous()
        per_class.append(precision.gather(1, torch.searchsorted(recall.contiguous(), steps)).mean(1)[None])  # [1, 10]
    mean = torch.cat(per_class).sum(0) / max(1, len(per_class) - 1)
    return {"ap": mean.mean().item(), "ap50": mean[0].item()}


@torch.no_grad()
def evaluate_boxes(model: Detector, split: Boxed) -> dict[str, float]:
    """`average_precision` of a split, and "loss": that of `box_loss`, of all patches that have a box to find."""
    found, truth, loss, count = [], [], 0.0, 0
    for images, labels in split.ordered(64):
        logits, boxes = model(images)
        errors, patches = box_errors(logits, boxes, labels, images.shape[2], model.patch)
        loss, count = loss + errors.item(), count + patches.item()
        found += [boxes[boxes[:, 4] > 0] for boxes in detections(logits, boxes, images.shape[2]).cpu()]
        truth += [boxes[boxes[:, 4] >= 0] for boxes in labels.cpu()]
    return average_precision(found, truth) | {"loss": loss / max(1, count)}


# ------------------------------------------------------------------------------------------------------- pictures

SHOWN = 8  # images
LEAST = 0.3  # score of a box that is shown
BETTER = "The better the encoder, the closer what is found comes to the truth."


@torch.no_grad()
def draw(model: Dense, splits: Splits, out: Path, picture: Callable) -> None:
    """Write predictions.png: test images (a sample: each one's rarest class has its turn), the truth below them, and below
    that what the model finds.

    picture(pixels [images, H, W, C], the model's output, labels, class names) returns what `grid` takes."""
    split = splits.test
    values, classes = split.labels.cpu().numpy(), np.arange(len(splits.class_names))
    values = values[..., 4] if isinstance(split, Boxed) else values
    there = np.array([np.isin(classes, row) for row in values])  # [images, classes]
    rarest = np.where(there, there.sum(0), len(there) + 1).argmin(1)  # of each image's classes
    batch = split.pick(sample(rarest, SHOWN))
    pixels = (batch.images * split.std + split.mean).div(255).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    grid(out / "predictions.png", **picture(pixels, model(batch.images), batch.labels.cpu().numpy(), splits.class_names))


def colours_of(labels: np.ndarray, class_names: list[str]) -> tuple[dict[int, Sequence[float]], dict[str, Sequence[float]]]:
    """A colour for each class that is among the labels, by its number and by its name; a background is black."""
    labels = np.unique(labels).astype(int).tolist()
    colours = {label: (0.0, 0.0, 0.0) for label in labels if class_names[label] == "background"}
    colours |= distinct([label for label in labels if label not in colours])
    return colours, {class_names[label]: colour for label, colour in colours.items()}


def picture_of_masks(pixels: np.ndarray, logits: Tensor, masks: np.ndarray, class_names: list[str]) -> dict:
    """Colours for classes, in place of the images, which show where a pixel has no class."""
    shown = np.stack([masks, logits.argmax(1).cpu().numpy()])  # [2, images, H, W]
    colours, key = colours_of(shown[shown != IGNORED], class_names)
    painted = np.broadcast_to(pixels, (2, *pixels.shape[:3], 3)).copy()
    for label, colour in colours.items():
        painted[shown == label] = colour
    rows = [(title, values, PIXELS) for title, values in zip(("image", "truth", "found"), (pixels, *painted))]
    return {"rows": rows, "text": BETTER, "key": key}


def picture_of_boxes(pixels: np.ndarray, found: tuple[Tensor, Tensor], boxes: np.ndarray, class_names: list[str]) -> dict:
    """Boxes in their classes' colours over the images; of what is found, those with a score of at least LEAST."""
    found = detections(*found, pixels.shape[1]).cpu().numpy()
    shown = [[rows[rows[:, 4] >= 0] for rows in boxes], [rows[rows[:, 4] >= LEAST][:, [0, 1, 2, 3, 5]] for rows in found]]
    colours, key = colours_of(np.concatenate([rows[:, 4] for row in shown for rows in row]), class_names)

    def annotate(axes):
        for line, row in zip(axes[1:], shown):
            for axis, rows in zip(line, row):
                corners = torch.as_tensor(rows[:, :4])
                below = (overlap(corners[:, None], corners)[0] > 0.5).triu(1).sum(0)  # how many better ones lie at its place
                for rank, (left, top, right, bottom, label) in reversed([*zip(below.tolist(), rows)]):  # the best above others
                    x, y = np.array([left, right, right, left, left]) - 0.5, np.array([top, top, bottom, bottom, top]) - 0.5
                    width = 1.5 + 2 * min(rank, 3)  # so that boxes at one place all show
                    axis.plot(x, y, color="white", linewidth=width + 1)
                    axis.plot(x, y, color=colours[int(label)], linewidth=width)

    rows = [(title, pixels, PIXELS) for title in ("image", "truth", f"found\n(score {LEAST}\nor more)")]
    text = f"{BETTER} Of boxes at one place, the thinnest has the best score."
    return {"rows": rows, "text": text, "key": key, "annotate": annotate}


# ------------------------------------------------------------------------------------------------ where it starts

SEGMENT = finetune.Task(
    name="segment",
    format="mlo-mae segmentation 2",
    model=Segmenter,
    loss=pixel_loss,
    evaluate=evaluate_pixels,
    measure="miou",
    labels="masks",
    draw=partial(draw, picture=picture_of_masks),
)
DETECT = finetune.Task(
    name="detect",
    format="mlo-mae detection 2",
    model=Detector,
    loss=box_loss,
    evaluate=evaluate_boxes,
    measure="ap",
    labels="boxes",
    draw=partial(draw, picture=picture_of_boxes),
)
TASKS = {"segment": SEGMENT, "detect": DETECT}
SETTINGS = tuple(name for name in finetune.SETTINGS if name not in ("data_dir", "skip_corrupt", "workers"))
ARCHITECTURE = {"preset", "patch_size", "width", "depth", "heads"}  # which a run has settled


def encoder_and_dense_data(
    task: finetune.Task, run: Path | None, recipe: DenseRecipe, settings: dict, ignored: int | None = IGNORED
) -> tuple[Networks, Tensor, Splits]:
    """(Networks, theta of the encoder, Splits) for a task, of a run's folder, or of a public checkpoint, or fresh ones by
    `settings`; `ignored` is for `load_dense`. Raises UserError."""
    if recipe.from_scratch == (run is not None):
        raise UserError("give either a run or a file of weights, or --from-scratch")
    if finetune.is_run(run, settings.keys() & ARCHITECTURE):
        content = newest(run, mlo_mae.FORMAT)
        with fitting(run / "checkpoint.pt"):
            base = asdict(config_of(content)) | ({"image_size": 0, "images": 0} if "data" in settings else {})
    else:
        preset = settings.get("preset", "shapes")
        base = {"preset": preset, "seed": recipe.seed, "init": str(run or "")} | PRESETS[preset]
    cfg = Config(**base | settings)
    mlo_mae.check(cfg)
    known = cfg.data in DRAWN or Path(cfg.data).is_file()  # of a file, `load_dense` says whether it knows its objects
    if not known and "data" not in settings:
        where = "give --data DIR, a folder that has (transfer --help), or --data shapes"
        raise UserError(f"{cfg.data} has no {task.labels}; {where}")
    same = {name: getattr(cfg, name) for name in ("image_size", "val_fraction", "seed", "flip", "crop")}
    device = cli.choose_device(cfg.device)
    splits = load_dense(cfg.data, task.labels, limit=cfg.images, ignored=ignored, device=device, **same)
    net, (theta, _, _) = mlo_mae.build(cfg, splits.image_size, splits.channels, len(splits.class_names))
    theta = theta[: net.encoder_size]
    return net, first_weights(net, theta, run) if run else theta, splits


# --------------------------------------------------------------------------------------------------- command line

LAYOUTS = {
    "segment": "images/<split>/*.jpg, masks/<split>/*.png",
    "detect": "annotations/instances_<split>*.json, <split>*/*.jpg",
}
PURPOSES = {"segment": "the class of every pixel", "detect": "boxes around objects"}


def value_or_none(text: str) -> int | None:
    """--ignore's value. Raises ArgumentTypeError."""
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither a value (0 to 255) nor none")
    return None if text == "none" else int(text)


def parse(argv: list[str] | None) -> dict:
    """The command line. Raises UserError."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(prog="mlo_mae.py transfer", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="task", required=True, metavar=" | ".join(TASKS))
    for name in TASKS:
        command = commands.add_parser(name, help=PURPOSES[name])
        settings = tuple(setting for setting in SETTINGS if setting != "data")
        group = finetune.add_training_flags(command, DenseRecipe, settings, f"{name}-<seed>")
        where = f"{', '.join(DRAWN)}, an .npz file with objects, or a folder with {LAYOUTS[name]} for the splits train and "
        where += "val, or test as well (default: the run's, if its objects are known)"
        group.add_argument("--data", default=argparse.SUPPRESS, metavar="str", help=where)
        if name == "segment":
            what = "value in a folder's masks that is no class, beside 255 (ADE20K: 0); none: 255 is a class as well"
            group.add_argument("--ignore", type=value_or_none, default=IGNORED, metavar="int | none", help=what)
    return vars(parser.parse_args(argv))


def run_command(argv: list[str] | None) -> dict:
    """Run `transfer` with these flags; returns what its last line reports."""
    flags = parse(argv)
    name, run, out, resume = (flags.pop(flag) for flag in ("task", "run", "out", "resume"))
    task, ignored = TASKS[name], flags.pop("ignore", IGNORED)
    settings = {setting: flags.pop(setting) for setting in SETTINGS if setting in flags}
    recipe = finetune.suited(DenseRecipe(**flags), flags)
    check(recipe)
    net, theta, splits = encoder_and_dense_data(task, run, recipe, settings, ignored)
    kind = f"scratch-{name}" if recipe.from_scratch else f"{name}-frozen" if recipe.frozen else name
    out = out or finetune.default_folder(run, f"{kind}-{recipe.seed}", net.cfg)
    return {"command": name, "run": str(out), **finetune.finetune(net, theta, splits, recipe, out, resume, task, cli.announce)}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv), finetune.LESS_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
