"""End-to-end fine-tuning: the pretrained encoder and a linear head learn to classify, all weights together.

    python mlo_mae.py finetune RUN                             # on the run's own data
    python mlo_mae.py finetune RUN --recipe mae                # MAE's ImageNet recipe for ViT-B
    python mlo_mae.py finetune RUN --from-scratch              # same network and data, fresh weights: no pretraining
    python mlo_mae.py finetune --from-scratch --data FILE.npz  # the same without a run
    python mlo_mae.py finetune FILE.pth --preset imagenet --data DIR    # a public encoder, .pth or .safetensors

The training split teaches. After each epoch the validation split is read, and the weights that do best on it are kept;
those are tested once, at the end. Unlike pretraining, which differentiates through its steps, this is ordinary training:
a module with parameters of its own, and torch's AdamW. In this order: recipes, the classifier, augmentation, layer-wise
learning rates and the loop (which transfer.py runs on other tasks), files, command line.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import mlo_mae
from mlo_mae import Config, RunError, flag, write_whole

# -------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Training:
    """How to train, whatever the task. Every field is a flag."""

    from_scratch: bool = flag(False, "start from fresh weights of --seed: the baseline without pretraining")
    epochs: int = flag(10, "passes over the training images")
    batch_size: int = flag(64, "images a step")
    lr: float = flag(2e-3, "peak learning rate of the head, for this batch size (MAE's blr x batch / 256)")
    min_lr: float = flag(0.0, "learning rate at the end of its cosine")
    warmup_epochs: float = flag(1.0, "epochs over which the learning rate rises")
    layer_decay: float = flag(0.75, "each layer's learning rate, as a share of that of the layer above")
    weight_decay: float = flag(0.05, "of weights; biases, norms, tokens and positions have none")
    drop_path: float = flag(0.0, "how often the last block's branches are left out; the first's never are")
    precision: Literal["fp32", "bf16"] = flag("fp32", "of the encoder; parameters and head are fp32 always")
    seed: int = flag(0, "of fresh weights, batches and augmentation")


@dataclass(frozen=True)
class Recipe(Training):
    """How to fine-tune a classifier. --recipe fills in published values and flags override them."""

    recipe: Literal["short", "cifar", "mae", "mae-large"] = flag("short", "cifar: the paper's; mae: MAE's for ViT-B, ViT-L")
    label_smoothing: float = flag(0.0, "share of a label that is spread over all classes")
    mixup: float = flag(0.0, "alpha of Beta(alpha, alpha), the share of one image in a blend of two (0: no mixup)")
    cutmix: float = flag(0.0, "alpha of Beta(alpha, alpha), the share of an image that is kept (0: no cutmix)")
    randaugment: float = flag(0.0, "magnitude, up to 10, of two random distortions an image (0: none)")
    erasing: float = flag(0.0, "how often a rectangle of an image is replaced by noise")
    pooling: Literal["cls", "mean"] = flag("mean", "what the head reads: the CLS token, or the mean of the patches' tokens")


# facebookresearch/mae, FINETUNE.md: batch 1024, lr 5e-4 (ViT-L: 1e-3) x 1024 / 256
MAE = dict(
    epochs=100, batch_size=1024, lr=2e-3, min_lr=1e-6, warmup_epochs=5.0, layer_decay=0.65, weight_decay=0.05, drop_path=0.1,
    label_smoothing=0.1, mixup=0.8, cutmix=1.0, randaugment=9.0, erasing=0.25, pooling="mean", precision="bf16",
)  # fmt: skip
RECIPES = {
    "short": {},
    # MLO-MAE's published code for CIFAR-100; for CIFAR-10 it has --batch-size 64
    "cifar": dict(epochs=100, batch_size=256, lr=1e-4, warmup_epochs=0.0, layer_decay=1.0, weight_decay=5e-5, pooling="cls"),
    "mae": MAE,
    "mae-large": MAE | dict(epochs=50, lr=4e-3, layer_decay=0.75, drop_path=0.2),
}


def check(recipe):
    """Raise RunError for a recipe that cannot run, naming the flag to change."""
    ranges = {"epochs": (1, math.inf), "batch_size": (1, math.inf), "layer_decay": (0, 1), "drop_path": (0, 0.99),
              "label_smoothing": (0, 1), "randaugment": (0, 10), "erasing": (0, 1)}  # fmt: skip
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        low, high = ranges.get(field.name, (0, math.inf))
        if field.type in (int, float) and not (low <= value <= high and math.isfinite(value)):
            limits = f"at least {low}" + (f" and at most {high}" if high < math.inf else "")
            raise RunError(f"--{field.name.replace('_', '-')} {value}: must be {limits}")
    if recipe.warmup_epochs >= recipe.epochs:
        raise RunError(f"--warmup-epochs {recipe.warmup_epochs} must be fewer than the {recipe.epochs} --epochs")


# What a random number is for, apart from mlo_mae's and data's purposes; see `mlo_mae.generator`.
BATCHES, DROP_PATH, AUGMENT = range(100, 103)

# ----------------------------------------------------------------------------------------------------- classifier


class Tuned(mlo_mae.Encoder):
    """The encoder as a part of models that are trained for a task."""

    def __init__(self, cfg, splits, recipe):
        super().__init__(splits.image_size, cfg.patch_size, splits.channels, cfg.width, cfg.depth, cfg.heads)
        self.bf16 = recipe.precision == "bf16"

    def tokens(self, images, scales):  # [B, C, H, W], factors of the branches [depth, 2, B, 1, 1] -> [B, 1+L, D]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return mlo_mae.Encoder.forward(self, images, scales=scales).float()


class Classifier(Tuned):
    """The encoder and a linear head, under the names of timm's VisionTransformer (global_pool "token" or "avg")."""

    def __init__(self, cfg, splits, recipe):
        super().__init__(cfg, splits, recipe)
        self.pooling = recipe.pooling
        if self.pooling == "mean":  # as MAE: average first, then a new norm in place of the pretrained one
            self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(cfg.width, eps=1e-6)
        self.head = nn.Linear(cfg.width, len(splits.class_names))
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # MAE
        nn.init.zeros_(self.head.bias)

    def forward(self, images, scales=None):  # -> [B, classes]
        tokens = self.tokens(images, scales)  # [B, 1+L, D]
        return self.head(tokens[:, 0] if self.pooling == "cls" else self.fc_norm(tokens[:, 1:].mean(1)))


def start(net, theta, splits, recipe, model=Classifier):
    """The model before its first step: the encoder of theta [P1], or a fresh one; the head is always fresh."""
    torch.manual_seed(recipe.seed)
    model = model(net.cfg, splits, recipe)
    if not recipe.from_scratch:
        encoder = mlo_mae.unflatten(net.encoder, theta[: net.encoder_size])
        model.load_state_dict(encoder, strict=False)  # not strict: no head there, and no norm here under mean pooling
    return model.to(splits.train.mean.device)


def drop_path(rate, depth, batch, *keys):
    """Factors of the residual branches, [depth, 2, B, 1, 1]: stochastic depth (arXiv 1603.09382) leaves a branch out of an
    image with a probability that rises from 0 in the first block to `rate` in the last, and keeps its expectation."""
    rates = torch.linspace(0, rate, depth)[:, None, None, None, None]
    return mlo_mae.draw_dropout(rates, (depth, 2, batch, 1, 1), *keys)


# --------------------------------------------------------------------------------------------------- augmentation
# Crop and flip are the data's own (`stream`). Here images are [B, C, H, W], normalised, and targets are soft, [B, classes].


def soft_targets(labels, classes, smoothing):
    """[B] -> [B, classes]: 1 - smoothing for the label, and smoothing spread over all classes (arXiv 1512.00567)."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mixup(images, targets, share):
    """`share` of each image and target, and 1 - share of the one opposite in the batch (arXiv 1710.09412)."""
    return share * images + (1 - share) * images.flip(0), share * targets + (1 - share) * targets.flip(0)


def cutmix(images, targets, share, rng):
    """A rectangle of about 1 - share of each image, centred anywhere, comes from the one opposite in the batch; targets
    follow the share of pixels that did come, since the border cuts off some rectangles (arXiv 1905.04899)."""

    def interval(size):
        half, centre = int(size * math.sqrt(1 - share)) // 2, int(rng.integers(size))
        return slice(max(centre - half, 0), min(centre + half, size))

    rows, columns = map(interval, images.shape[2:])
    mixed = images.clone()
    mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
    kept = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / images[0, 0].numel()
    return mixed, kept * targets + (1 - kept) * targets.flip(0)


def erase(images, probability, rng):
    """In each image, with this probability, noise in a rectangle of 2 to 33 % of its area and a ratio of sides from 0.3
    to 1/0.3 (arXiv 1708.04896, settings of MAE's recipe)."""
    images, (channels, height, width) = images.clone(), images.shape[1:]
    for i in np.flatnonzero(rng.random(len(images)) < probability):
        for _ in range(10):  # some are too long to fit
            area, ratio = height * width * rng.uniform(0.02, 1 / 3), 0.3 ** rng.uniform(-1, 1)
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                noise = torch.from_numpy(rng.standard_normal((channels, h, w), np.float32))
                images[i, :, top : top + h, left : left + w] = noise.to(images.device)
                break
    return images


def warp(pixels, *matrix):
    """Pixels at the places that an affine map of each place gives (coordinates -1 to 1; 6 numbers or [n, 1, 1, 1]); grey
    where that is outside."""
    matrix = [torch.as_tensor(entry, device=pixels.device).float().expand(len(pixels), 1, 1, 1) for entry in matrix]
    grid = F.affine_grid(torch.cat(matrix, dim=1).view(-1, 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - 128, grid, align_corners=False) + 128


def rotate(pixels, s):
    angle = math.radians(30) * s
    return warp(pixels, angle.cos(), angle.sin(), 0, -angle.sin(), angle.cos(), 0)


def blend(pixels, plain, s):
    """From `plain` (factor 0.1) past the image itself (1) to its exaggeration (1.9)."""
    return torch.lerp(plain.expand_as(pixels), pixels, (1 + 0.9 * s).clamp_min(0.1))


def grey(pixels):  # -> [n, 1, H, W], luminance of ITU-R 601
    weights = (0.299, 0.587, 0.114) if pixels.shape[1] == 3 else (1.0,)
    return (pixels * pixels.new_tensor(weights)[:, None, None]).sum(1, keepdim=True)


def smooth(pixels):  # the neighbours weigh 1 each, the pixel itself 5, of 13
    return (9 * F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False) + 4 * pixels) / 13


def stretch(pixels):  # each channel to the whole range
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    return torch.where(high > low, (pixels - low) * 255 / (high - low).clamp_min(1), pixels)


def equalise(pixels):
    """Each channel's histogram made flat: a level becomes the share of pixels below it, the brightest level left out."""
    levels = pixels.round().long().flatten(2)  # [n, C, H*W]
    counts = torch.zeros(*levels.shape[:2], 256, device=pixels.device).scatter_add_(2, levels, pixels.new_ones(levels.shape))
    step = (levels.shape[2] - counts.gather(2, levels.amax(2, keepdim=True))).div(255, rounding_mode="floor")
    below = (counts.cumsum(2) - counts + step.div(2, rounding_mode="floor")).div(step.clamp_min(1), rounding_mode="floor")
    return torch.where(step > 0, below.gather(2, levels), levels).view_as(pixels)


# RandAugment's distortions with the strengths of timm's "inc1": from pixels [n, C, H, W] of 0 to 255 and s [n, 1, 1, 1]
# of -1 to 1. Those without a direction go by |s|.
DISTORTIONS = {
    "auto-contrast": lambda x, s: stretch(x),
    "equalise": lambda x, s: equalise(x),
    "invert": lambda x, s: 255 - x,
    "rotate": rotate,
    "posterise": lambda x, s: x.round() - x.round() % 2 ** (4 + (4 * s.abs()).floor()),  # so many low bits go
    "solarise": lambda x, s: torch.where(x.round() >= 256 - (256 * s.abs()).floor(), 255 - x, x),
    "solarise-add": lambda x, s: torch.where(x.round() < 128, x + (110 * s.abs()).floor(), x),
    "colour": lambda x, s: blend(x, grey(x), s),
    "contrast": lambda x, s: blend(x, grey(x).mean((2, 3), keepdim=True), s),
    "brightness": lambda x, s: blend(x, torch.zeros_like(x), s),
    "sharpness": lambda x, s: blend(x, smooth(x), s),
    "shear-x": lambda x, s: warp(x, 1, 0.3 * s, 0.3 * s, 0, 1, 0),  # about the top left corner
    "shear-y": lambda x, s: warp(x, 1, 0, 0, 0.3 * s, 1, 0.3 * s),
    "translate-x": lambda x, s: warp(x, 1, 0, 0.9 * s, 0, 1, 0),  # 0.45 of the width of 2
    "translate-y": lambda x, s: warp(x, 1, 0, 0, 0, 1, 0.9 * s),
}


def rand_augment(images, magnitude, split, rng):
    """Two distortions in a row for each image, each left out half of the time, of strength N(magnitude, 0.5) / 10 within
    0 to 1 (arXiv 1909.13719; timm's rand-m9-mstd0.5-inc1 for magnitude 9, but grey outside warped images, and bilinear)."""
    pixels = (images * split.std + split.mean).clamp_(0, 255)
    for _ in range(2):
        kinds = np.where(rng.random(len(images)) < 0.5, -1, rng.integers(len(DISTORTIONS), size=len(images)))
        strengths = rng.normal(magnitude, 0.5, len(images)).clip(0, 10) / 10 * rng.choice((-1, 1), len(images))
        for kind, distort in enumerate(DISTORTIONS.values()):
            chosen = np.flatnonzero(kinds == kind)
            if len(chosen):
                s = torch.from_numpy(strengths[chosen]).float()[:, None, None, None].to(pixels.device)
                chosen = torch.from_numpy(chosen).to(pixels.device)
                pixels[chosen] = distort(pixels[chosen], s).clamp(0, 255)
    return (pixels - split.mean) / split.std


def augment(batch, recipe, split, classes, step):
    """A data.Batch -> images [B, C, H, W] and targets [B, classes], distorted, erased and mixed as the recipe says."""
    rng = data.generator(recipe.seed, AUGMENT, step)
    images, targets = batch.images, soft_targets(batch.labels, classes, recipe.label_smoothing)
    if recipe.randaugment:
        images = rand_augment(images, recipe.randaugment, split, rng)
    if recipe.erasing:
        images = erase(images, recipe.erasing, rng)
    if recipe.cutmix and (not recipe.mixup or rng.random() < 0.5):  # one of the two a batch
        return cutmix(images, targets, rng.beta(recipe.cutmix, recipe.cutmix), rng)
    if recipe.mixup:
        return mixup(images, targets, rng.beta(recipe.mixup, recipe.mixup))
    return images, targets


# ------------------------------------------------------------------------------------------------------- training


def layer_groups(model, recipe):
    """AdamW's groups of parameters. "scale" is a group's share of the learning rate, layer_decay ** (depth + 1 - layer):
    tokens, positions and patch embedding are layer 0, block i is layer i + 1, norm and head depth + 1 (as MAE)."""
    top, groups = len(model.blocks) + 1, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, *rest = name.split(".")
        layer = int(rest[0]) + 1 if part == "blocks" else 0 if part in ("cls_token", "pos_embed", "patch_embed") else top
        decay = recipe.weight_decay if mlo_mae.decays(name, parameter) else 0.0
        fresh = {"params": [], "scale": recipe.layer_decay ** (top - layer), "weight_decay": decay}
        groups.setdefault((layer, decay > 0), fresh)["params"].append(parameter)
    return list(groups.values())


def learning_rate(recipe, step, per_epoch):
    """Linear warmup to recipe.lr, then a cosine to recipe.min_lr, by the step; `per_epoch` steps an epoch."""
    share = mlo_mae.schedule(step, recipe.epochs * per_epoch, recipe.warmup_epochs * per_epoch)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * share


def classification_loss(model, batch, scales, recipe, splits, step):
    images, targets = augment(batch, recipe, splits.train, len(splits.class_names), step)
    return F.cross_entropy(model(images, scales), targets)


@torch.no_grad()
def evaluate(model, split):
    """{"top1": share of the images whose class comes first, and "top5": among the first 5, where there are more classes}"""
    hits = []
    for images, labels in split.ordered(256):
        logits = model(images)  # [B, classes]
        hits.append((logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).cpu().double())
    hits = torch.cat(hits)  # [N, 5], at most one 1 a row
    return {"top1": hits[:, 0].mean().item()} | ({"top5": hits.sum(1).mean().item()} if logits.shape[1] > 5 else {})


class Task(NamedTuple):
    """What the encoder is trained for, and how well it does."""

    name: str  # of the bar
    format: str  # of checkpoint.pt: the state to resume from, and the chosen weights under "best"
    model: Callable  # (Config, Splits, recipe) -> an Encoder with a head
    loss: Callable  # (model, Batch, drop path's factors, recipe, Splits, step) -> a scalar
    evaluate: Callable  # (model, split) -> {measure: share}
    measure: str  # what the weights to keep are chosen by
    draw: Callable | None = None  # (model, Splits, folder): write pictures there


FORMAT = "mlo-mae fine-tuning 1"
CLASSIFY = Task("finetune", FORMAT, Classifier, classification_loss, evaluate, "top1")


def finetune(net, theta, splits, recipe, out=None, resume=False, task=CLASSIFY):
    """Fine-tune the encoder of theta [P1], a run's or any; a fresh one where recipe.from_scratch. See the top of this file.

    With `out`, write that folder, and with `resume` continue what is there; else touch no file. Returns the accuracies
    (shares) and what they are of (see the end). Raises RunError for what the user can mend, data.DataError, and with
    `out` SystemExit (130, 143) after a checkpoint where SIGINT or SIGTERM asked to stop."""
    check(recipe)
    checkpoint = find_checkpoint(net, splits, recipe, out, resume, task) if out else None
    model, measure = start(net, theta, splits, recipe, task.model), f"val_{task.measure}"
    optimizer = torch.optim.AdamW(layer_groups(model, recipe), betas=(0.9, 0.999))
    step, seconds, best = 0, 0.0, {measure: -1.0}
    loss_sum = torch.zeros((), device=splits.train.mean.device)  # of this epoch; read seldom: that waits for the device
    if checkpoint:
        step, seconds, best = checkpoint["step"], checkpoint["seconds"], checkpoint["best"]
        loss_sum += checkpoint["loss_sum"]
        try:
            model.load_state_dict(checkpoint["model"])
            load_moments(optimizer, checkpoint["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise RunError(f"{out / 'checkpoint.pt'} is damaged: its weights do not fit its settings; start again") from None
    if out:
        out.mkdir(parents=True, exist_ok=True)  # not before all that the user may have to mend
        mlo_mae.claim(out)
        write_whole(out / "config.json", json.dumps(describe(net, splits, recipe), indent=2).encode())
        mlo_mae.truncate_metrics(out / "metrics.jsonl", step)

    per_epoch = max(1, len(splits.train) // recipe.batch_size)
    total = recipe.epochs * per_epoch
    batches = splits.train.stream(recipe.batch_size, mlo_mae.generator(recipe.seed, BATCHES).initial_seed(), start=step)
    saved = began = time.monotonic()
    bar = tqdm(total=total, initial=step, desc=task.name, unit="step", mininterval=1)
    with bar, mlo_mae.stop_signals() if out else contextlib.nullcontext([]) as stop:
        while step < total:
            batch, keys = next(batches), (recipe.seed, DROP_PATH, step)
            scales = drop_path(recipe.drop_path, net.cfg.depth, len(batch.images), *keys).to(batch.images.device)
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate(recipe, step, per_epoch)
            loss = task.loss(model, batch, scales, recipe, splits, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            step += 1
            bar.update()

            epoch, within = divmod(step, per_epoch)
            due = out and (time.monotonic() - saved >= 60 * net.cfg.checkpoint_minutes or step == total or bool(stop))
            if within and not due:
                continue
            if not loss_sum.isfinite() or not all(parameter.isfinite().all() for parameter in model.parameters()):
                kept = f"{out} holds the last good state, if any; " if out else ""
                raise RunError(f"the loss or a weight is not finite by step {step}; {kept}lower --lr")
            if not within:
                share, train_loss = task.evaluate(model, splits.val)[task.measure], loss_sum.item() / per_epoch
                if share > best[measure]:
                    weights = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
                    best = {measure: share, "epoch": epoch, "model": weights}
                bar.set_postfix(loss=f"{train_loss:.3f}", val=f"{share:.1%}")
                loss_sum.zero_()
                if out:
                    row = {"iteration": step, "epoch": epoch, "train_loss": train_loss, measure: share}
                    mlo_mae.append_line(out / "metrics.jsonl", json.dumps(row))
            if due:
                content = describe(net, splits, recipe) | {
                    "format": task.format, "step": step, "seconds": seconds + time.monotonic() - began, "best": best,
                    "loss_sum": loss_sum, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                }  # fmt: skip
                write_whole(out / "checkpoint.pt", lambda file: torch.save(content, file))
                saved = time.monotonic()
                if stop:  # only here: a stop that comes later than `due` waits for the next checkpoint, one step on
                    break
    if stop and step < total:
        print(f"stopped at step {step} of {total}; continue with --resume", file=sys.stderr)
        raise SystemExit(128 + stop[0])

    model.load_state_dict(best["model"])
    result = {"recipe": getattr(recipe, "recipe", task.name), "from_scratch": recipe.from_scratch, "seed": recipe.seed,
              **{f"test_{name}": share for name, share in task.evaluate(model, splits.test).items()},
              measure: best[measure], "epoch": best["epoch"], "epochs": recipe.epochs,
              "train_labels": len(splits.train), "val_labels": len(splits.val),
              "seconds": round(seconds + time.monotonic() - began, 1)}  # fmt: skip
    if out:
        if task.draw:
            task.draw(model, splits, out)
        write_whole(out / "result.json", json.dumps(result).encode())
    return result


def load_moments(optimizer, content):
    """Put a checkpoint's state into an optimizer. Raises ValueError where its groups or shapes are not this optimizer's, or
    what torch raises."""
    def settings():
        return [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in optimizer.param_groups]

    fresh = settings()
    optimizer.load_state_dict(content)
    moments = [(parameter, state[name]) for parameter, state in optimizer.state.items() for name in ("exp_avg", "exp_avg_sq")]
    if settings() != fresh or any(parameter.shape != moment.shape for parameter, moment in moments) \
            or any(state["step"].numel() != 1 for state in optimizer.state.values()):  # fmt: skip
        raise ValueError("another optimizer's state")


# ---------------------------------------------------------------------------------------------------------- files


def describe(net, splits, recipe):
    """What a fine-tuning depends on, for its files."""
    return {"recipe": dataclasses.asdict(recipe), "config": dataclasses.asdict(net.cfg), "data": mlo_mae.data_facts(splits)}


def is_whole(content, task=CLASSIFY):
    """Whether a checkpoint's content is of the kinds that `finetune` writes; loading it checks names and shapes."""
    try:
        best, recipe = content["best"], content["recipe"]
        return (
            mlo_mae.are_facts(content["data"]) and type(recipe) is dict
            and (task != CLASSIFY or recipe["pooling"] in ("cls", "mean"))  # which `mlo_mae.export` reads
            and type(best) is dict and type(best[f"val_{task.measure}"]) is type(content["seconds"]) is float
            and ("model" not in best or mlo_mae.are_weights(best["model"]) and mlo_mae.is_count(best["epoch"]))
            and mlo_mae.is_count(content["step"]) and mlo_mae.is_tensor(content["loss_sum"])
            and mlo_mae.are_weights(content["model"]) and type(content["optimizer"]) is dict
        )  # fmt: skip
    except (KeyError, TypeError):  # something else stands where a dict should
        return False


def find_checkpoint(net, splits, recipe, out, resume, task):
    """What there is to resume: None, or a checkpoint. Raises RunError where `out` is taken, or holds something else."""
    path = out / "checkpoint.pt"
    if not (resume and path.exists()):
        if not resume:
            mlo_mae.refuse_taken(out)
        return None
    found = mlo_mae.read_checkpoint(path, {task.format: lambda content: is_whole(content, task)})
    wanted = describe(net, splits, recipe)
    for part in wanted:
        for name, value in wanted[part].items():
            if name not in mlo_mae.MACHINE_FIELDS and found[part].get(name) != value:
                raise RunError(f"{out} was started with another {part}: its {name} is {found[part].get(name)}, not {value}; "
                               f"resume it with its own flags or choose another --out")  # fmt: skip
    return found


# --------------------------------------------------------------------------------------------------- command line

# Settings of Config that matter here; those of a run are its own, but for mlo_mae.MACHINE_FIELDS.
SETTINGS = [field for field in dataclasses.fields(Config) if field.name in (
    "preset", "data", "data_dir", "images", "image_size", "val_fraction", "skip_corrupt", "workers", "patch_size", "width",
    "depth", "heads", "device", "checkpoint_minutes")]  # fmt: skip


def add_command(commands):
    """The command `finetune` and its flags."""
    parser = commands.add_parser("finetune", help="fine-tune a run's encoder, or train one from scratch",
                                 description="Defaults are those of --recipe short.")  # fmt: skip
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN_OR_CHECKPOINT",
                        help="folder of a run, or a public .pth or .safetensors; not needed with --from-scratch")  # fmt: skip
    mlo_mae.add_flags(parser, dataclasses.fields(Recipe))
    mlo_mae.add_flags(parser.add_argument_group("data, encoder and machine, as for pretrain"), SETTINGS)
    parser.add_argument("--out", type=Path, help="folder to write (default finetune-<recipe>-<seed>, or scratch-..., in RUN "
                        "or, without one, named in runs)")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue the fine-tuning in --out, or start it")


def is_run(run, own):
    """Whether `run` is the folder of a run rather than a file of weights, or None. Raises RunError where it does not exist,
    and where a setting is given that is a run's `own`."""
    if run is not None and not run.exists():
        raise RunError(f"{run} does not exist; give the folder of a run, or a .pth or .safetensors file")
    if run is None or not run.is_dir():
        return False
    if own:
        raise RunError(f"--{min(own).replace('_', '-')} is the run's own affair: leave it out, or leave out {run}")
    return True


def default_folder(run, name, preset):
    """Where a training named so writes: into its run, or else into runs/."""
    return run / name if run and run.is_dir() else Path("runs") / f"{run.stem if run else preset}-{name}"


def starting_point(run, recipe, settings):
    """(Networks, theta [P1] or its encoder's part, Splits) of a run's folder; or by `settings`, with the weights of the
    public checkpoint `run`, or fresh ones without: here, and nowhere else, it is decided which weights and images a
    fine-tuning starts from. Raises RunError, data.DataError and interchange.WeightsError."""
    if is_run(run, settings.keys() - mlo_mae.MACHINE_FIELDS):
        net, state, splits = mlo_mae.open_run(run, settings.pop("device", "auto"), **settings)
        return net, state.theta.params, splits
    if recipe.from_scratch == (run is not None):
        raise RunError("give either a run or a file of weights to fine-tune, or --from-scratch")
    preset = settings.get("preset", "shapes")
    origin = {"seed": recipe.seed, "init": str(run or "")}
    cfg = Config(**{"preset": preset} | mlo_mae.PRESETS[preset] | settings | origin)
    mlo_mae.check(cfg)
    splits = mlo_mae.load_data(cfg, mlo_mae.choose_device(cfg.device))
    net, (theta, _, _) = mlo_mae.build(cfg, splits.image_size, splits.channels, len(splits.class_names))
    return net, mlo_mae.starting_weights(net, theta[: net.encoder_size], run) if run else theta, splits


def run_command(run, out, resume, **flags):
    """Run `finetune`; returns what its last line reports."""
    settings = {field.name: flags.pop(field.name) for field in SETTINGS if field.name in flags}
    recipe = Recipe(**RECIPES[flags.get("recipe", "short")] | flags)
    check(recipe)
    net, theta, splits = starting_point(run, recipe, settings)
    name = f"{'scratch' if recipe.from_scratch else 'finetune'}-{recipe.recipe}-{recipe.seed}"
    out = out or default_folder(run, name, net.cfg.preset)
    return {"verb": "finetune", "run": str(out), **finetune(net, theta, splits, recipe, out, resume)}
