"""End-to-end fine-tuning: the pretrained encoder and a linear head learn to classify, all weights together.

    python mlo_mae.py finetune RUN                             # on the run's own data
    python mlo_mae.py finetune RUN --recipe mae                # MAE's ImageNet recipe for ViT-B
    python mlo_mae.py finetune RUN --from-scratch              # same network and data, fresh weights: no pretraining
    python mlo_mae.py finetune --from-scratch --data FILE.npz  # the same without a run
    python mlo_mae.py finetune FILE.pth --preset imagenet --data DIR    # a public encoder, .pth or .safetensors

The training split teaches. After each epoch the validation split is read, and the weights that do best on it are kept, of
epochs that do equally well those with the lowest loss on it; they are tested once, at the end. Unlike pretraining, which
differentiates through its steps, this is ordinary training: a module with parameters of its own, and torch's AdamW. In this
order: recipes, the classifier, a task (classification; transfer.py has others), the loop, where it starts, command line.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlo_mae
from data import COMPUTED, Batch, Folder, Images, Splits
from experiments import first_weights, open_run, trial_batch
from harness import UserError, cli, counted
from harness.augmentation import cutmix, erase, mixup, rand_augment, soft_targets
from harness.checkpoints import fitting, whole_number
from harness.cli import flag
from harness.files import append_line, write_whole
from harness.measure import seconds as seconds_of
from harness.memory import foresee, in_parts, uploaded
from harness.randomness import BATCHES, DISTORT, DROP_PATH, draw_dropout, numpy_generator, torch_generator
from harness.run import Run, first_name
from harness.schedule import schedule
from harness.vectors import decays, flatten, unflatten
from mlo_mae import MACHINE_FIELDS, PRESETS, Config, Encoder, Networks

# -------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Training:
    """How to train, whatever the task. Every field is a flag."""

    from_scratch: bool = flag(False, "start from fresh weights of --seed: the baseline without pretraining")
    epochs: int = flag(10, "passes over the training images", least=1, most=65536)
    batch_size: int = flag(64, "images a step", least=1, most=65536)
    accumulate: int = flag(1, "parts that the encoder works through a batch in: less memory, same result", least=1, most=65536)
    lr: float = flag(2e-3, "peak learning rate of the head, for this batch size (MAE's blr x batch / 256)", least=0)
    min_lr: float = flag(0.0, "learning rate at the end of its cosine", least=0)
    warmup_epochs: float = flag(
        1.0, "epochs over which the learning rate rises; a tenth of all where there are no more", least=0
    )
    layer_decay: float = flag(
        0.75, "each layer's learning rate, as a share of that of the layer above; of fresh weights 1", least=0, most=1
    )
    weight_decay: float = flag(0.05, "of weights; biases, norms, tokens and positions have none", least=0)
    drop_path: float = flag(0.0, "how often the last block's branches are left out; the first's never are", least=0, most=0.99)
    precision: Literal["fp32", "bf16"] = flag("fp32", "of the encoder; parameters and head are fp32 always")
    seed: int = flag(0, "of fresh weights, batches and augmentation", least=0, below=2**63)


@dataclass(frozen=True)
class Recipe(Training):
    """How to fine-tune a classifier. --recipe fills in published values and flags override them."""

    recipe: Literal["short", "cifar", "mae", "mae-large"] = flag("short", "cifar: the paper's; mae: MAE's for ViT-B, ViT-L")
    label_smoothing: float = flag(0.0, "share of a label that is spread over all classes", least=0, most=1)
    mixup: float = flag(0.0, "alpha of Beta(alpha, alpha), the share of one image in a blend of two (0: no mixup)", least=0)
    cutmix: float = flag(0.0, "alpha of Beta(alpha, alpha), the share of an image that is kept (0: no cutmix)", least=0)
    randaugment: float = flag(0.0, "magnitude, up to 10, of two random distortions an image (0: none)", least=0, most=10)
    erasing: float = flag(0.0, "how often a rectangle of an image is replaced by noise", least=0, most=1)
    pooling: Literal["cls", "mean"] = flag("mean", "what the head reads: the CLS token, or the mean of the patches' tokens")


# facebookresearch/mae, FINETUNE.md: batch 1024, lr 5e-4 (ViT-L: 1e-3) x 1024 / 256. Crops are those of pretraining (of a
# folder 20 to 100 % of the area), where MAE fine-tunes on 8 to 100 %.
MAE = {
    **{"epochs": 100, "batch_size": 1024, "lr": 2e-3, "min_lr": 1e-6, "warmup_epochs": 5.0, "layer_decay": 0.65},
    **{"weight_decay": 0.05, "drop_path": 0.1, "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
    **{"randaugment": 9.0, "erasing": 0.25, "pooling": "mean", "precision": "bf16"},
}
CIFAR = {  # MLO-MAE's published code for CIFAR-100; for CIFAR-10 it has --batch-size 64
    **{"epochs": 100, "batch_size": 256, "lr": 1e-4, "warmup_epochs": 0.0, "layer_decay": 1.0},
    **{"weight_decay": 5e-5, "pooling": "cls"},
}
RECIPES = {
    "short": {},
    "cifar": CIFAR,
    "mae": MAE,
    "mae-large": MAE | {"epochs": 50, "lr": 4e-3, "layer_decay": 0.75, "drop_path": 0.2},
}


def suited(recipe: Training, given: dict) -> Training:
    """The recipe; of what is not `given`, a --warmup-epochs for which there are too few epochs is a tenth of them, and the
    layers of fresh weights learn at one rate: a lower one below is for layers that have learned already."""
    if "warmup_epochs" not in given and recipe.warmup_epochs >= recipe.epochs:
        recipe = replace(recipe, warmup_epochs=recipe.epochs / 10)
    return replace(recipe, layer_decay=1.0) if recipe.from_scratch and "layer_decay" not in given else recipe


def check(recipe: Training) -> None:
    """Raise UserError for a recipe that cannot run, naming the flag to change."""
    cli.check(recipe)
    if recipe.warmup_epochs >= recipe.epochs:
        raise UserError(f"--warmup-epochs {recipe.warmup_epochs} must be fewer than the {recipe.epochs} --epochs")


# ----------------------------------------------------------------------------------------------------- classifier


class Tuned(Encoder):
    """The encoder as a part of models that are trained for a task."""

    def __init__(self, cfg: Config, splits: Splits, recipe: Training):
        super().__init__(splits.image_size, cfg.patch_size, splits.channels, cfg.width, cfg.depth, cfg.heads)
        self.bf16, self.accumulate = recipe.precision == "bf16", recipe.accumulate

    def tokens(self, images: Tensor, scales: Tensor | None) -> Tensor:
        """[B, C, H, W], factors of the branches [depth, 2, B, 1, 1] -> [B, 1+N, D] float32."""

        def work(images, *scales):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
                return (Encoder.forward(self, images, scales=scales[0].movedim(0, 2) if scales else None).float(),)

        by_image = [] if scales is None else [scales.movedim(2, 0)]  # [B, depth, 2, 1, 1]
        return in_parts(work, self.accumulate, images, *by_image)[0]


class Classifier(Tuned):
    """The encoder and a linear head, under the names of timm's VisionTransformer (global_pool "token" or "avg")."""

    def __init__(self, cfg: Config, splits: Splits, recipe: Recipe):
        super().__init__(cfg, splits, recipe)
        self.pooling = recipe.pooling
        if self.pooling == "mean":  # as MAE: average first, then a new norm in place of the pretrained one
            self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(cfg.width, eps=1e-6)
        self.head = nn.Linear(cfg.width, len(splits.class_names))
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # MAE
        nn.init.zeros_(self.head.bias)

    def forward(self, images, scales=None):  # -> [B, classes]
        tokens = self.tokens(images, scales)  # [B, 1+N, D]
        return self.head(tokens[:, 0] if self.pooling == "cls" else self.fc_norm(tokens[:, 1:].mean(1)))


# ---------------------------------------------------------------------------------------------------------- tasks


class Task(NamedTuple):
    """What the encoder is trained for, and how well it does."""

    name: str  # of the progress bar
    format: str  # of checkpoint.pt: the state to resume from, and the chosen weights under "best"
    model: Callable  # (Config, Splits, recipe) -> an Encoder with a head
    loss: Callable  # (model, Batch, drop path's factors, recipe, Splits, step) -> a scalar
    evaluate: Callable  # (model, split) -> {measure: share, "loss": of the split}
    measure: str  # what the weights to keep are chosen by
    labels: str = "classes"  # or those of harness.dense: "masks", "boxes"
    draw: Callable | None = None  # (model, Splits, folder): write pictures there


def augment(batch: Batch, recipe: Recipe, split: Images | Folder, classes: int, step: int) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] and targets [B, classes], distorted, erased and mixed as the recipe says."""
    rng = numpy_generator(recipe.seed, DISTORT, step)
    images, targets = batch.images, soft_targets(batch.labels, classes, recipe.label_smoothing)
    if recipe.randaugment:
        images = rand_augment(images, recipe.randaugment, split.mean, split.std, rng)
    if recipe.erasing:
        images = erase(images, recipe.erasing, rng)
    if recipe.cutmix and (not recipe.mixup or rng.random() < 0.5):  # one of the two a batch
        return cutmix(images, targets, rng.beta(recipe.cutmix, recipe.cutmix), rng)
    if recipe.mixup:
        return mixup(images, targets, rng.beta(recipe.mixup, recipe.mixup))
    return images, targets


def classification_loss(
    model: Classifier, batch: Batch, scales: Tensor | None, recipe: Recipe, splits: Splits, step: int
) -> Tensor:
    """Cross-entropy of the augmented batch."""
    images, targets = augment(batch, recipe, splits.train, len(splits.class_names), step)
    return F.cross_entropy(model(images, scales), targets)


@torch.no_grad()
def evaluate(model: Classifier, split: Images | Folder) -> dict[str, float]:
    """{"top1": share of the images whose class comes first, "top5": among the first 5, where there are more classes, "loss":
    mean cross-entropy}"""
    hits, loss = [], 0.0
    for images, labels in split.ordered(256):
        logits = model(images)  # [B, classes]
        hits.append((logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).cpu().double())
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
    hits = torch.cat(hits)  # [images, 5], at most one 1 a row
    shares = {"top1": hits[:, 0].mean().item()} | ({"top5": hits.sum(1).mean().item()} if logits.shape[1] > 5 else {})
    return shares | {"loss": loss / len(hits)}


FORMAT = "mlo-mae fine-tuning 2"
CLASSIFY = Task("finetune", FORMAT, Classifier, classification_loss, evaluate, "top1")

# ------------------------------------------------------------------------------------------------------- the loop


def start(net: Networks, theta: Tensor, splits: Splits, recipe: Training, model: Callable = Classifier) -> Tuned:
    """The model before its first step: the encoder of theta, or a fresh one; the head is always fresh."""
    torch.manual_seed(recipe.seed)
    model = model(net.cfg, splits, recipe)
    if not recipe.from_scratch:
        encoder = unflatten(net.encoder, theta[: net.encoder_size])
        model.load_state_dict(encoder, strict=False)  # not strict: no head there, and no norm here under mean pooling
    return model.to(splits.train.mean.device)


def drop_path(rate: float, depth: int, batch: int, *keys: int) -> Tensor:
    """Factors of the residual branches, [depth, 2, B, 1, 1]: stochastic depth (arXiv 1603.09382) leaves a branch out of an
    image with a probability that rises from 0 in the first block to `rate` in the last, and keeps its expectation."""
    rates = torch.linspace(0, rate, depth)[:, None, None, None, None]
    return draw_dropout(rates, (depth, 2, batch, 1, 1), *keys)


def layer_groups(model: Tuned, recipe: Training) -> list[dict]:
    """AdamW's groups of parameters. "scale" is a group's share of the learning rate, layer_decay ** (depth + 1 - layer):
    tokens, positions and patch embedding are layer 0, block i is layer i + 1, norm and head depth + 1 (as MAE)."""
    top, groups = len(model.blocks) + 1, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, *rest = name.split(".")
        layer = int(rest[0]) + 1 if part == "blocks" else 0 if part in ("cls_token", "pos_embed", "patch_embed") else top
        decay = recipe.weight_decay if decays(name, parameter) else 0.0
        fresh = {"params": [], "scale": recipe.layer_decay ** (top - layer), "weight_decay": decay}
        groups.setdefault((layer, decay > 0), fresh)["params"].append(parameter)
    return list(groups.values())


def learning_rate(recipe: Training, step: int, per_epoch: int) -> float:
    """Linear warmup to recipe.lr, then a cosine to recipe.min_lr, by the step; `per_epoch` steps an epoch."""
    share = schedule(step, recipe.epochs * per_epoch, recipe.warmup_epochs * per_epoch)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * share


def finetune(
    net: Networks,
    theta: Tensor,
    splits: Splits,
    recipe: Training,
    out: Path | None = None,
    resume: bool = False,
    task: Task = CLASSIFY,
    announce: Callable[[dict[str, str]], None] | None = None,
) -> dict:
    """Fine-tune the encoder of theta, a run's or any; a fresh one where recipe.from_scratch. See the top of this file.

    With `out`, write that folder, and with `resume` continue what is there; else touch no file. announce: gets what it is
    going to be, {of what: a line}, before anything is written. Returns the measures (shares; losses in nats) and what they are
    of (see the end; tied_epochs: how many reached the best measure). Raises UserError, and with `out` Interrupted after a
    checkpoint where a signal asked to stop."""
    check(recipe)
    settings = {"recipe": asdict(recipe), "config": asdict(net.cfg), "data": splits.facts()}
    run = Run(out, settings, resume, task.format, MACHINE_FIELDS | COMPUTED, net.cfg.checkpoint_minutes)
    run.beside["config.json"] = json.dumps(settings, indent=2).encode()
    model, measure = start(net, theta, splits, recipe, task.model), f"val_{task.measure}"
    optimizer = torch.optim.AdamW(layer_groups(model, recipe), betas=(0.9, 0.999))
    per_epoch = max(1, len(splits.train) // recipe.batch_size)
    total = recipe.epochs * per_epoch
    step, seconds, unread, best = 0, 0.0, False, {measure: -1.0, "loss": math.inf, "tied": 0}
    loss_sum = torch.zeros((), device=splits.train.mean.device)  # of this epoch; read seldom: that waits for the device
    if run.checkpoint is not None:
        with fitting(out / "checkpoint.pt"):
            step, seconds, best, so_far = restored(run.checkpoint, model, optimizer, measure)
            unread = so_far != 0 and step % per_epoch == 0  # the epoch's losses are there still
            if step > total or (step // per_epoch > unread) != ("model" in best):
                raise UserError(f"step {step} of {total} and the epochs that have ended do not go together")
        loss_sum += so_far

    size, device = (splits.channels, splits.image_size, splits.image_size), loss_sum.device
    model.accumulate, at_a_time = 1, math.ceil(recipe.batch_size / recipe.accumulate)
    foresee(lambda count: model(torch.zeros(count, *size, device=device)), at_a_time, task.name, device, LESS_MEMORY)
    model.accumulate = recipe.accumulate
    if announce:
        announce(plan(model, splits, recipe, task, total - step) | {"files": str(out)})
    batches = splits.train.stream(recipe.batch_size, torch_generator(recipe.seed, BATCHES).initial_seed(), start=step)
    began = time.monotonic()

    def content():
        state = {"step": step, "seconds": seconds + time.monotonic() - began, "best": best, "loss_sum": loss_sum}
        weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return {"format": task.format} | settings | state | weights

    run.content = content
    with run.at_work(total, step, task.name, "step"):
        while (step < total or unread) and not run.stop:
            if not unread:  # else an epoch whose evaluation a signal has ended
                batch, keys = next(batches), (recipe.seed, DROP_PATH, step)
                scales = uploaded(drop_path(recipe.drop_path, net.cfg.depth, len(batch.images), *keys), batch.images.device)
                for group in optimizer.param_groups:
                    group["lr"] = group["scale"] * learning_rate(recipe, step, per_epoch)
                loss = task.loss(model, batch, scales, recipe, splits, step)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach()
                step += 1
                run.bar.update()

            epoch, within = divmod(step, per_epoch)
            due, unread = run.is_due(step), not within
            if within and not due:
                continue
            sound = loss_sum.isfinite() and all(parameter.isfinite().all() for parameter in model.parameters())
            if sound and unread:
                with run.at_once():
                    found = task.evaluate(model, splits.val)
                sound = math.isfinite(found["loss"])  # weights may be finite, and too large for a pass
            if not sound:
                kept = f"{out} holds the last good state, if any; " if out else ""
                raise UserError(f"the loss or a weight is not finite by step {step}; {kept}lower --lr")
            if unread:
                unread, train_loss = False, loss_sum.item() / per_epoch
                share, val_loss = found[task.measure], found["loss"]
                better, equal = share > best[measure], share == best[measure]
                tied = 1 if better else best["tied"] + equal  # a small split cannot tell many epochs apart
                if better or (equal and val_loss < best["loss"]):
                    weights = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
                    best = {measure: share, "loss": val_loss, "epoch": epoch, "model": weights}
                best["tied"] = tied
                run.bar.set_postfix(loss=f"{train_loss:.3f}", val=f"{share:.1%}")
                loss_sum.zero_()
                if out:
                    row = {"iteration": step, "epoch": epoch, "train_loss": train_loss, "val_loss": val_loss, measure: share}
                    append_line(out / "metrics.jsonl", row)
            if due:
                run.save(content())
    run.leave_if_stopped(step, "step")

    model.load_state_dict(best["model"])
    result = {
        **{"recipe": getattr(recipe, "recipe", task.name), "from_scratch": recipe.from_scratch, "seed": recipe.seed},
        **{f"test_{name}": share for name, share in task.evaluate(model, splits.test).items()},
        **{measure: best[measure], "epoch": best["epoch"], "tied_epochs": best["tied"], "epochs": recipe.epochs},
        **{"train_labels": len(splits.train), "val_labels": len(splits.val)},
        "seconds": round(seconds + time.monotonic() - began, 1),
    }
    if out:
        if task.draw:
            task.draw(model, splits, out)
        write_whole(out / "result.json", json.dumps(result).encode())
    return result


def restored(content: dict, model: Tuned, optimizer: torch.optim.Optimizer, measure: str) -> tuple[int, float, dict, float]:
    """Put a checkpoint's weights and moments in place; returns its step, its seconds, the best epoch so far and the sum of
    the losses of this one. Raises UserError where something does not fit, and others: see `fitting`."""
    flatten([model], content["model"])  # the check of names, shapes and values
    model.load_state_dict(content["model"])
    load_moments(optimizer, content["optimizer"])
    best = {name: float(content["best"][name]) for name in (measure, "loss")}
    best["tied"] = whole_number(content["best"]["tied"])
    if "model" in content["best"]:
        flatten([model], content["best"]["model"])
        best |= {"epoch": whole_number(content["best"]["epoch"]), "model": content["best"]["model"]}
    return whole_number(content["step"]), float(content["seconds"]), best, content["loss_sum"].item()


def load_moments(optimizer: torch.optim.Optimizer, content: dict) -> None:
    """Put a checkpoint's state into an optimizer. Raises as `restored` does."""

    def settings():  # of the groups; rates follow the step
        groups = optimizer.param_groups
        return [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]

    fresh = settings()
    optimizer.load_state_dict(content)
    if settings() != fresh:
        raise UserError("its optimizer has other settings")
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        state = optimizer.state[parameter]
        moments = torch.stack([state["exp_avg"], state["exp_avg_sq"]])
        if moments[0].shape != parameter.shape or not moments.isfinite().all() or state["step"].numel() != 1:
            raise UserError("its optimizer's moments are not those of the weights")


# ------------------------------------------------------------------------------------------------ where it starts

# Settings of Config that matter here; those of a run are its own, but for MACHINE_FIELDS and MOVES.
SETTINGS = (
    *("preset", "data", "data_dir", "images", "image_size", "val_fraction", "skip_corrupt", "workers", "flip", "crop"),
    *("patch_size", "width", "depth", "heads", "device", "checkpoint_minutes"),
)
MOVES = {"flip", "crop"}  # which a fine-tuning may have otherwise than its run


def is_run(run: Path | None, own: set[str]) -> bool:
    """Whether `run` is the folder of a run rather than a file of weights, or None. Raises UserError where it does not
    exist, and where a setting is given that is a run's `own`."""
    if run is not None and not run.exists():
        raise UserError(f"{run} does not exist; give the folder of a run, or a .pth or .safetensors file")
    if run is None or not run.is_dir():
        return False
    if own:
        raise UserError(f"{cli.flag_name(min(own))} is the run's own affair: leave it out, or leave out {run}")
    return True


def plan(model: Tuned, splits: Splits, recipe: Training, task: Task, steps: int) -> dict[str, str]:
    """What so many steps of a training are going to be, {of what: a line}; how long they take, by trial."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = trial_batch(splits.train, recipe.batch_size)
    scales = drop_path(recipe.drop_path, len(model.blocks), len(batch.images), 0).to(batch.images.device)

    def trial():
        torch.autograd.grad(task.loss(model, batch, scales, recipe, splits, 0), learning, allow_unused=True)

    trial()  # the first of all is slower than others
    device, total = batch.images.device, sum(parameter.numel() for parameter in model.parameters())
    about = f"{task.name}: {total:,} weights, {sum(map(Tensor.numel, learning)):,} of them learn"
    method = f"{counted(recipe.epochs, 'epoch')}, {counted(steps, 'step')} of {recipe.batch_size} images"
    method += f", peak learning rate {recipe.lr}{', from scratch' * recipe.from_scratch}"
    time = f"about {cli.duration(steps * seconds_of(trial, device))}" if steps else cli.ENDED
    return {"model": about, "method": method, "machine": f"{cli.described(device)}, {recipe.precision}", "time": time}


def default_folder(run: Path | None, name: str, cfg: Config) -> Path:
    """Where a training named so writes: into its run, or else into runs/."""
    return run / name if run and run.is_dir() else Path("runs") / f"{run.stem if run else first_name(cfg, PRESETS)}-{name}"


def encoder_and_data(run: Path | None, recipe: Training, settings: dict) -> tuple[Networks, Tensor, Splits]:
    """(Networks, theta or its encoder's part, Splits) of a run's folder; or by `settings`, with the weights of the public
    checkpoint `run`, or fresh ones without: here, and nowhere else, it is decided which weights and images a fine-tuning
    starts from. Raises UserError."""
    if is_run(run, settings.keys() - MACHINE_FIELDS - MOVES):
        net, state, splits = open_run(run, **settings)
        return net, state.theta.params, splits
    if recipe.from_scratch == (run is not None):
        raise UserError("give either a run or a file of weights to fine-tune, or --from-scratch")
    preset = settings.get("preset", "shapes")
    origin = {"seed": recipe.seed, "init": str(run or "")}
    cfg = Config(**{"preset": preset} | PRESETS[preset] | settings | origin)
    mlo_mae.check(cfg)
    splits = mlo_mae.load_data(cfg, cli.choose_device(cfg.device))
    net, (theta, _, _) = mlo_mae.build(cfg, splits.image_size, splits.channels, len(splits.class_names))
    return net, first_weights(net, theta, run) if run else theta, splits


# --------------------------------------------------------------------------------------------------- command line


LESS_MEMORY = (
    "raise --accumulate (the same result), lower --batch-size, or where no run settles these, give a larger --patch-size or a "
    "smaller --image-size"
)


def add_training_flags(
    parser: argparse.ArgumentParser, recipe: type[Training], settings: tuple[str, ...], folder: str
) -> argparse._ArgumentGroup:
    """What every training of an encoder asks for: the flags of a recipe, those settings of Config, and where it goes;
    `folder` is the default in words. Returns the group of the settings."""
    weights = "folder of a run, or a public .pth or .safetensors; not needed with --from-scratch"
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN_OR_CHECKPOINT", help=weights)
    cli.add_flags(parser, fields(recipe))
    group = parser.add_argument_group("data, encoder and machine, as for pretrain")
    cli.add_flags(group, [field for field in fields(Config) if field.name in settings])
    where = f"folder to write (default {folder}, or scratch-..., in RUN or, without one, named in runs)"
    parser.add_argument("--out", type=cli.named_path, help=where)
    parser.add_argument("--resume", action="store_true", help="continue what is in --out, or start it")
    cli.add_dry_run(parser)
    return group


def run_command(argv: list[str] | None) -> dict:
    """Run `finetune` with these flags; returns what its last line reports."""
    parser = cli.Parser(
        prog="mlo_mae.py finetune", description=__doc__.splitlines()[0], epilog="Defaults are those of --recipe short."
    )
    add_training_flags(parser, Recipe, SETTINGS, "finetune-<recipe>-<seed>")
    flags = vars(parser.parse_args(argv))
    run, out, resume = (flags.pop(name) for name in ("run", "out", "resume"))
    settings = {name: flags.pop(name) for name in SETTINGS if name in flags}
    recipe = suited(Recipe(**RECIPES[flags.get("recipe", "short")] | flags), flags)
    check(recipe)
    net, theta, splits = encoder_and_data(run, recipe, settings)
    name = f"{'scratch' if recipe.from_scratch else 'finetune'}-{recipe.recipe}-{recipe.seed}"
    out = out or default_folder(run, name, net.cfg)
    return {"command": "finetune", "run": str(out), **finetune(net, theta, splits, recipe, out, resume, announce=cli.announce)}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv), LESS_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
