"""MLO-MAE: masked autoencoders whose masks are learned (arXiv 2402.18128), in one script.

A masked autoencoder (MAE) hides most patches of an image and learns an encoder by reconstructing them. Which patches
it hides is usually left to chance, and all count alike. Here a masking network T says how much each patch counts, or
which to hide, and T is trained so that the encoder that results classifies held-out images well. Three problems, each
nested in the next:

    level 1  pretrain   the encoder E and the decoder D, theta = (E, D), on images without labels
    level 2  classify   the head C, phi, on the encoder's features of labelled training images
    level 3  mask       the masking network T, psi, by how well E and C do on labelled validation images

Let i run over images and j over patches. T gives each patch p_ij = sigmoid(T(x_i; psi))_j; l_ij is its reconstruction
error, and m_ij is 1 where it is hidden. By default T is one linear layer on E's own tokens of the whole image; no
derivative passes through these tokens. One outer iteration (flags call it a mask update, also where T does not learn) makes
--level1-steps steps, (1) to (3); where T learns, it then computes (4) to (6) of the last theta'. Losses are means over images:

    m_ij = 1 for a fixed share of each image's patches: at random by default, so that p weighs patches and chance hides
        them; as published, those of highest p_ij; or drawn by the odds p/(1-p). Before --mask-start, unless T is
        another run's, p = 1 and m is random: plain MAE. A crop may reach beyond its image, and what is there does
        not count: p is at all times multiplied by the share of the patch that the image covers                   (1)
    L1(p, l) = sum_ij m_ij p_ij l_ij / sum_ij m_ij                          (linear in p and in l)                (2)
    theta' = U(theta, g1),   g1 = dL1(p, l(theta))/dtheta                   (one AdamW step)                      (3)
    L2(phi, z2) = |C(z2; phi) - y2|^2 + penalty |phi|^2,   z2 = E'(x2)      (features of whole images)            (4)
    phi' = argmin_phi L2(phi, z2)                                           (solved: ridge regression)            (5)
    L3(phi', z3) = |C(z3; phi') - y3|^2,   z3 = E'(x3)                      (validation images)                   (6)

and then moves psi against dL3/dpsi, the hypergradient: the derivative through (3) and (5). (5) is the paper's own argmin,
not a step towards it. y is one-hot; the penalty is on C's weights for standardised features; phi is stored as the means and
covariances of (z2, y2), of which (5) makes these weights. --level2 steps is what is published: cross-entropy in (4) and (6),
and phi' = U(phi, dL2/dphi). What the derivative holds fixed: the masks m, which are a hard choice, and every step before. Then
p in (2) is all that links T to E, and three observations give it exactly, without a Hessian and without a double backward
through the autoencoder:

    a = dL3/dtheta'.  phi' depends on theta' through the features z2 alone, so the derivative of (5) stays inside
        the head, and a is one ordinary backward pass through the encoder.                                        (7)
    c = (dU/dg1)^T a.  AdamW treats each parameter alone, so dU/dg is a diagonal: a product by element.           (8)
    <c, g1> = L1(p, d),  d_ij = <c, dl_ij/dtheta>: the errors' derivatives along c, which ONE forward-mode pass
        (jvp) gives all at once.  So dL3/dp_ij = m_ij d_ij / sum(m).                                              (9)
    dL3/dpsi = dL1(p(psi), d)/dpsi: the loss (2) with d in place of l, and one backward pass through T.          (10)

By default (9) and (10) are taken over the last four batches of level 1, all with the last step's theta and c, though only the
last batch made that step: a mean over four is less noisy. With --mask-batches 1 the derivative is exact.

U is AdamW's step number t, with moments mu and nu:

    mu' = b1 mu + (1 - b1) g,   nu' = b2 nu + (1 - b2) g^2,   mh = mu' / (1 - b1^t),   nh = nu' / (1 - b2^t),
    theta' = (1 - lr wd) theta - lr mh / (sqrt(nh) + eps)                                                        (11)

    dtheta'/dg = -lr [ (1-b1)/(1-b1^t) / (sqrt(nh)+eps) - mh (1-b2) g / ((1-b2^t) sqrt(nh) (sqrt(nh)+eps)^2) ]   (12)

--unroll full differentiates all level-1 steps since the last mask update. The cotangent then covers a step's whole result,
A = (a_theta, a_mu, a_nu) of (theta', mu', nu'), which is (a, 0, 0) at the last step. From the last step to the first,
c = (dU/dg)^T A, then (9) and (10), then A <- (dU/d(theta, mu, nu))^T A, and a_theta <- a_theta + H c, where
H = d2L1/dtheta2. The hypergradient is the sum of (10) over these steps.                                         (13)

A run has three parts. Before --mask-start it is MAE. Then T learns, and weighs. While the head is no better on the validation
images than their classes' shares would be, it has little to tell, and T waits (--mask-wait). After --mask-until (plus what
T has waited) T and the encoder it reads are frozen, and p of images in memory is computed once. E and D have far to go under
these weights, so their learning rate starts again (--mask-restart; with --masking random too, which gains by it).

Read on in this order: configuration, masks and the three losses, the AdamW step, the hypergradient and its judge (plain
autograd, at a higher price), the loop; then the networks, a whole run, the command line. Images come from data.py; kernels/
has five operations, each as plain PyTorch (the "reference") and as GPU kernels. What any run needs and no equation mentions
(files, processes, flags) is in harness/. Shapes: B images, N patches, K of them visible, D channels of a token, n numbers of
a vector; in shapes alone, C channels of an image, H and W its sides, p a patch's side.

    python mlo_mae.py                                        # built-in images: pretrain, probe, pictures
    python mlo_mae.py pretrain --preset cifar100 --data-dir DIR
    python mlo_mae.py probe RUN                              # any program in experiments/, by its name
"""

from harness.signals import end_at_once

if __name__ == "__main__":
    end_at_once("mlo_mae")  # the imports take seconds

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import grad, jvp
from torch.nn.utils import parameters_to_vector
from torch.optim.adamw import adamw as torchs_adamw

import data
import kernels
from harness import UserError, cli
from harness.checkpoints import fitting, newest, packed, unpacked, whole_number
from harness.cli import flag
from harness.graphs import replayed
from harness.memory import foresee, in_parts, through, uploaded
from harness.probe import mask_statistics
from harness.processes import (
    agree,
    alike,
    all_cores,
    as_first,
    average,
    averaged_gradient,
    end,
    first_before_others,
    gather,
    leave,
    rank,
    share,
    summed,
    told,
    world,
)
from harness.randomness import DROPOUT, LEVEL1_DATA, LEVEL2_DATA, LEVEL3_DATA, MASKS, draw_dropout, torch_generator
from harness.run import Run, add_run_flags, first_name, read_metrics, settings_of
from harness.schedule import schedule
from harness.vectors import Params, call, flatten, inverse_fan_in, size_of, unflatten, weight_decays
from harness.weights import starting_weights
from kernels import attention, gather_patches, patch_loss, scatter_tokens, select_patches

# ------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class Config:
    """One run. Every field is a command-line flag; a preset fills in a paper's values and flags override it."""

    preset: Literal["shapes", "cifar10", "cifar100", "imagenet", "imagenet-large"] = flag("shapes", "settings to start from")

    data: str = flag(
        "shapes",
        "shapes, shapes-anywhere, shapes-stripes, cifar10, cifar100, cifar100-coarse, FILE.npz, DIR with train/<class>/*.jpg",
        group="data",
    )
    data_dir: str = flag("data", "where cifar10 and cifar100 lie, or are downloaded to")
    images: int = flag(0, "use only this many training images (0: all)", least=0)
    image_size: int = flag(0, "pixels, square (0: as the data has it; folders 224)", least=0)
    val_fraction: float = flag(0.2, "share of the training images held out for level 3", above=0, below=1)
    skip_corrupt: bool = flag(False, "replace images that cannot be decoded instead of stopping")
    workers: int = flag(0, "processes that decode images (folders only)", least=0, most=1024)
    flip: bool = flag(True, "mirror images at random, at all levels; --no-flip where left and right tell classes apart")
    crop: bool = flag(True, "cut pieces out of images at random, at all levels")

    patch_size: int = flag(4, "pixels, square", least=1, most=65536, group="networks")
    width: int = flag(64, "of the encoder's tokens", least=1, most=65536)
    depth: int = flag(4, "blocks of the encoder", least=1, most=1000)
    heads: int = flag(4, "attention heads of the encoder", least=1)
    decoder_width: int = flag(32, "of the decoder's tokens", least=1, most=65536)
    decoder_depth: int = flag(1, "blocks of the decoder", least=1, most=1000)
    decoder_heads: int = flag(2, "attention heads of the decoder", least=1)
    init: str = flag("", "weights that encoder and decoder start from: a run, or a public .pth or .safetensors")

    masking: Literal["learned", "random"] = flag("learned", "by T, or random as in MAE", group="masks")
    mask_ratio: float = flag(0.5, "share of the patches that is hidden", above=0, below=1)
    mask_choice: Literal["random", "odds", "highest"] = flag("random", "how (1) hides: by chance, by the odds of p, highest p")
    masking_network: Literal["tokens", "shared", "mlp"] = flag("tokens", "T: linear on tokens, a small net, or the paper's")
    masking_blocks: int = flag(4, "T reads tokens after so many blocks of E, or after all (tokens)", least=0, most=1000)
    masking_input: Literal["pixels", "embeddings"] = flag("pixels", "what shared and mlp read: pixels, or detached embeddings")
    masking_width: int = flag(64, "hidden units of shared and mlp", least=1, most=65536)
    mask_start: float = flag(0.2, "share of the run before T learns and weighs (0: none, as published)", least=0, below=1)
    mask_until: float = flag(0.3, "share of the run after which T stays as it is (1: never, as published)", above=0, most=1)
    mask_wait: float = flag(0.1, "share of the run that T may wait for a head better than chance (0: none)", least=0, most=1)
    mask_restart: bool = flag(True, "at --mask-until the learning rate of level 1 starts again, with any masks")
    masking_from: str = flag("", "run whose T, as it is, weighs from the first step")
    masking_learns: bool = flag(False, "train the T of --masking-from further")

    level2: Literal["ridge", "steps"] = flag(
        "ridge",
        "the head: solved (ridge regression), or AdamW steps as published",
        group="levels 2 and 3, and the hypergradient",
    )
    pooling: Literal["mean", "cls"] = flag("mean", "features: mean of the patches' tokens, or CLS token as published")
    ridge: float = flag(0.3, "penalty of the ridge regression, on standardised features", above=0)
    head_norm: Literal["batch", "layer"] = flag("batch", "of the head's input (steps); layer as published")

    hypergradient: Literal["exact", "unrolled", "first-order"] = flag("exact", "of dL3/dpsi: (7) to (10), autograd, phi' held")
    update_jacobian: Literal["adamw", "identity"] = flag("adamw", "dU/dg in (8) and head steps: its own, or -1 as published")
    unroll: Literal["last", "full"] = flag("last", "differentiate the last level-1 step, or all since the last mask update")

    epochs: int = flag(24, "passes of level 1 over its training images", least=1, most=65536, group="steps and rates")
    batch_size: int = flag(32, "images a step of level 1, over all processes", least=1, most=65536)
    labelled_batch_size: int = flag(256, "images a step of levels 2 and 3, each, over all processes", least=1, most=65536)
    accumulate: int = flag(1, "parts that a batch is worked through in: less memory, same result", least=1, most=65536)
    checkpoint_activations: bool = flag(False, "compute activations again in the backward pass: less memory, same result")
    level1_steps: int = flag(16, "encoder and decoder steps a mask update", least=1, most=65536)
    mask_batches: int = flag(4, "latest batches of level 1, at most --level1-steps, for (9)", least=1, most=65536)
    head_steps: int = flag(10, "head steps a mask update, on one batch (steps)", least=1, most=65536)
    lr: float = flag(4e-3, "level 1: peak learning rate of encoder and decoder", least=0)
    head_lr: float = flag(1e-2, "level 2: peak learning rate of the head (steps)", least=0)
    mask_lr: float = flag(2.0, "level 3: most that one step of T moves a pre-activation (its rate x fan-in)", least=0)
    weight_decay: float = flag(0.05, "of weights; biases, norms, tokens and positions have none", least=0)
    warmup: float = flag(0.05, "share of a schedule in which its rate rises, then a cosine to 0", least=0, below=1)
    dropout: float = flag(0.1, "in the head (steps)", least=0, below=1)

    seed: int = flag(0, "of weights, batches, masks and dropout", least=0, below=2**63, group="machine and files")
    device: str = flag("auto", "auto, cpu, cuda, mps")
    precision: Literal["auto", "fp32", "bf16"] = flag("fp32", "of encoder and decoder; auto: bf16 on a GPU that has it")
    graphs: Literal["auto", "off"] = flag("auto", "on a GPU, start a step of level 1 in one launch: less time, more memory")
    log_every: int = flag(10, "mask updates between two lines of metrics.jsonl", least=1, most=65536)
    tensorboard: bool = flag(False, "write these lines for TensorBoard, too")
    checkpoint_minutes: float = flag(5.0, "minutes between checkpoints (0: after every mask update)", least=0)


# Masks, T, head and steps as published, but that T reads pixels (published: embeddings) and the hypergradient is exact.
PUBLISHED = (
    {"mask_ratio": 0.75, "masking_network": "mlp", "masking_width": 512, "mask_choice": "highest", "mask_batches": 1}
    | {"mask_start": 0.0, "mask_until": 1.0, "mask_wait": 0.0, "mask_restart": False}
    | {"level2": "steps", "pooling": "cls", "head_norm": "layer", "level1_steps": 2, "head_steps": 1}
)
# Paper, section "Experimental settings", and the published code's scripts; weight decay 0.01 is what took effect there.
CIFAR = (
    PUBLISHED
    | {"image_size": 32, "patch_size": 2, "width": 768, "depth": 12, "heads": 12}
    | {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16}
    | {"epochs": 200, "batch_size": 128, "labelled_batch_size": 128}
    | {"lr": 1e-4, "head_lr": 1e-3, "mask_lr": 0.05, "weight_decay": 0.01, "warmup": 0.0, "precision": "auto"}
)
IMAGENET = (
    CIFAR
    | {"data": "imagenet", "image_size": 224, "patch_size": 16, "workers": 8, "epochs": 50, "batch_size": 256}
    | {"labelled_batch_size": 256, "lr": 1.5e-4, "head_lr": 5e-4, "weight_decay": 0.05}
)
PRESETS = {
    "shapes": {},
    "cifar10": CIFAR | {"data": "cifar10"},
    "cifar100": CIFAR | {"data": "cifar100"},
    "imagenet": IMAGENET,
    "imagenet-large": IMAGENET | {"width": 1024, "depth": 24, "heads": 16},
}
# What may change when a run is resumed, since the result does not depend on it; data may lie elsewhere, and must be the same.
MACHINE_FIELDS = {"data", "data_dir", "device", "workers", "graphs", "checkpoint_minutes"}
MACHINE_FIELDS |= {"accumulate", "checkpoint_activations", "tensorboard"}
MAX_WEIGHTS = 2**31  # of a model; a damaged file must not ask for more


def check(cfg: Config) -> None:
    """Raise UserError for a configuration that cannot run, naming the flag to change."""
    cli.check(cfg)
    for name, heads in (("width", cfg.heads), ("decoder_width", cfg.decoder_heads)):
        width = getattr(cfg, name)
        if width % heads or width % 4:
            raise UserError(
                f"--{name.replace('_', '-')} {width} is not a multiple of its {heads} heads and of 4, which "
                "sin-cos positions need (a multiple of 4)"
            )
    if trains(cfg) and not cfg.masking_from and cfg.masking_network != "mlp" and cfg.mask_choice == "highest":
        raise UserError("--mask-choice highest needs --masking-network mlp: the others start with all p equal")
    if trains(cfg) and cfg.mask_start >= cfg.mask_until:
        raise UserError(f"--mask-start {cfg.mask_start} must be below --mask-until {cfg.mask_until}: T learns in between")
    if trains(cfg) and cfg.mask_batches > 1 and cfg.unroll == "full":
        raise UserError(f"--unroll full goes with --mask-batches 1, not {cfg.mask_batches}: it takes each step's batch")
    by_deviation = cfg.level2 == "ridge" or cfg.head_norm == "batch"
    if trains(cfg) and by_deviation and cfg.labelled_batch_size < 2:
        raise UserError("--labelled-batch-size 1 has no deviation, by which the head's input is divided; give 2 or more")
    if cfg.masking_from and (cfg.masking, cfg.masking_network) != ("learned", "tokens"):
        raise UserError("--masking-from goes with --masking learned and --masking-network tokens")
    if cfg.masking_learns and not cfg.masking_from:
        raise UserError("--masking-learns trains the T of another run; name it with --masking-from")
    parts = world() * cfg.accumulate
    if trains(cfg) and cfg.hypergradient == "unrolled" and parts > 1:
        raise UserError("--hypergradient unrolled goes with one process and --accumulate 1")
    if trains(cfg) and cfg.checkpoint_activations and (cfg.hypergradient == "unrolled" or cfg.unroll == "full"):
        raise UserError("--checkpoint-activations goes with --hypergradient exact or first-order, and --unroll last")
    if cfg.batch_size % parts or cfg.labelled_batch_size % world():
        raise UserError(
            f"--batch-size {cfg.batch_size} and --labelled-batch-size {cfg.labelled_batch_size} do not divide evenly: the "
            f"first must be a multiple of {parts} (processes x --accumulate), the second of {world()} (processes)"
        )


# --------------------------------------------------------------------------------- masks and the three losses
# Each level's parameters are ONE vector (why: harness/vectors.py); `call` runs a module with a given one, and `in_parts` a
# function on --accumulate parts of a batch, one after the other, of which it joins the results.


class Level(NamedTuple):
    """What one level learns, and AdamW's memory of it."""

    params: Tensor  # theta, phi or psi
    mu: Tensor  # first moment, of the same length
    nu: Tensor  # second moment
    t: int | Tensor  # steps made; a scalar tensor in `in_one_launch` alone


def fresh_level(params: Tensor, device: torch.device | str) -> Level:
    return Level(params.to(device), torch.zeros_like(params, device=device), torch.zeros_like(params, device=device), 0)


def copied(level: Level) -> Level:
    return Level(*(vector.clone() for vector in level[:3]), level.t)


def detached(level: Level) -> Level:
    return Level(level.params.detach(), level.mu.detach(), level.nu.detach(), level.t)


class Sight(NamedTuple):
    """How a T that was learned in another run sees this run's images."""

    encoder: nn.Module  # what T reads, on the meta device
    facts: dict  # its sizes, and the mean and deviation of the pixels that it knows
    scale: Tensor  # [C, 1, 1]: pixels normalised as here, times `scale` plus `shift`, are normalised as there
    shift: Tensor


@dataclass
class Networks:
    """The four architectures (parameters on the meta device) and what depends on them alone."""

    cfg: Config
    encoder: nn.Module
    decoder: nn.Module
    head: nn.Module
    masking: nn.Module
    sight: Sight | None = None  # set where T is another run's
    replay: "Callable[[Step, Tensor], Update] | None" = None  # `in_one_launch`, for steps that are made in place
    # For baselines. Another choice of masks: (images, known, generator, progress) -> [B, N], of which the highest are hidden;
    # T does not weigh then
    score: Callable[[Tensor, Tensor | None, torch.Generator, float], Tensor] | None = None
    # M maps of each training image, made once. Cropped and flipped as it is, they are `known` [B, M*N]; their sum weighs
    maps: Callable[[data.Images], data.Images] | None = None
    penalty: Callable[[Tensor], Tensor] | None = None  # a term added to L1: CLS tokens [B, D] -> scalar

    @property
    def patches(self) -> int:  # N
        return self.encoder.pos_embed.shape[1] - 1

    @property
    def visible(self) -> int:  # K, rounded as MAE rounds it
        return int(self.patches * (1 - self.cfg.mask_ratio))

    @property
    def seer(self) -> nn.Module:  # the encoder that T reads
        return self.sight.encoder if self.sight else self.encoder

    @property
    def encoder_size(self) -> int:  # where E ends and D begins in theta
        return size_of(self.encoder)


class Step(NamedTuple):
    """One level-1 step as it was made: all that differentiating it takes. A field is None where it will not be needed."""

    theta: Level | None  # before the step
    gradient: Tensor | None  # g1
    rates: "Rates | None"
    images: Tensor  # [B, C, H, W]
    keep: Tensor  # [B, K] visible patches
    restore: Tensor  # [B, N] each patch's place in the shuffled order
    mask: Tensor  # [B, N] 1 = hidden
    eyes: Tensor | None = None  # parameters of the encoder that T read
    covered: Tensor | None = None  # [B, N] share of each patch that the image covers; None: all, or p has it in it


def masking_input(net: Networks, images: Tensor, eyes: Tensor) -> Tensor:
    """What T reads, constant: images [B, C, H, W], or tokens of the encoder with parameters `eyes` as [B, D, H/p, W/p]."""
    cfg = net.cfg
    if cfg.masking_network != "tokens" and cfg.masking_input == "pixels":
        return images
    blocks = cfg.masking_blocks if cfg.masking_network == "tokens" else 0  # 0: the embeddings
    if net.sight:
        blocks, size = net.sight.facts["masking_blocks"], net.sight.facts["image_size"]
        images = images * net.sight.scale + net.sight.shift
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)

    def work(images):
        with autocast(net, images.device):
            return (call(net.seer, eyes, images, None, None, blocks)[:, 1:].to(eyes.dtype),)

    with torch.no_grad():
        tokens = in_parts(work, cfg.accumulate, images)[0]  # [B, N, D]
    return tokens.mT.unflatten(2, (math.isqrt(tokens.shape[1]), -1))


def masking_probability(net: Networks, psi: Tensor, images: Tensor, eyes: Tensor) -> Tensor:
    """p, [B, N]: how much T wants each patch to count. eyes: parameters of the encoder that T reads, see `eyes_of`."""
    return call(net.masking, psi, masking_input(net, images, eyes))


def weights_of(net: Networks, psi: Tensor, step: Step) -> Tensor:
    """p of (1) as a function of psi, [B, N], of a step that is differentiated."""
    prob = masking_probability(net, psi, step.images, step.eyes)
    return prob if step.covered is None else prob * step.covered


def draw_masks(
    net: Networks,
    psi: Tensor,
    images: Tensor,
    eyes: Tensor,
    *keys: int,
    progress: float = 1.0,
    covered: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p [B, N], and the choice (1): visible ids [B, K], restore ids [B, N], mask [B, N].

    `keys` seed the draw; `progress` is the share of the run that is done; `covered` is the share of each patch that the image
    covers (None: all of it); `known` is p [B, N], where T need not be asked, or a baseline's maps [B, M*N]: see `Networks`."""
    cfg, weighs = net.cfg, weighed_by(net.cfg, progress) and not net.score
    prob = torch.ones(len(images), net.patches, device=images.device) if covered is None else covered
    if weighs:
        prob = known if known is not None else prob * masking_probability(net, psi, images, eyes)  # p of (1)
    elif known is not None:  # a baseline's maps: their sum weighs (of parts it is what the image covers)
        prob = known.unflatten(1, (-1, net.patches)).sum(1)
    if net.score:
        score = net.score(images, known, torch_generator(*keys), progress)
    elif weighs and cfg.mask_choice == "highest":
        score = prob
    else:
        count = world() * len(images)  # random numbers must not depend on the number of processes
        score = torch.rand(count, net.patches, generator=torch_generator(*keys))[share(count)]
        score = uploaded(score, images.device)
        if weighs and cfg.mask_choice == "odds":  # the highest of logit + Gumbel noise: drawn without replacement by the odds
            score = prob.logit(1e-6) - (-score.clamp(1e-9, 1 - 1e-7).to(prob).log()).log()
    return prob, *select_patches(score, net.visible)  # m of (1): the highest scores are hidden


def weighed_by(cfg: Config, progress: float) -> bool:
    """Whether T's p weighs the errors at this share of the run."""
    return cfg.masking == "learned" and (progress >= cfg.mask_start or bool(cfg.masking_from))


def is_given(cfg: Config) -> bool:
    """Whether T is another run's, as it is."""
    return bool(cfg.masking_from) and not cfg.masking_learns


def trains(cfg: Config) -> bool:
    """Whether this run trains a T, and so has levels 2 and 3."""
    return cfg.masking == "learned" and not is_given(cfg)


def autocast(net: Networks, device: torch.device):
    """bfloat16 for encoder and decoder where asked for; T, the head and every loss stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=net.cfg.precision == "bf16")


def with_precision(cfg: Config, device: torch.device) -> Config:
    """The configuration with what --precision auto is on this device. Beside bfloat16 a GPU may multiply float32 as TF32."""
    gpu = device.type == "cuda"
    if cfg.precision == "auto":
        cfg = dataclasses.replace(cfg, precision="bf16" if gpu and torch.cuda.is_bf16_supported(False) else "fp32")
    if gpu:
        torch.set_float32_matmul_precision("high" if cfg.precision == "bf16" else "highest")
        torch.backends.cudnn.allow_tf32 = cfg.precision == "bf16"  # in convolutions, which that does not speak of
    return cfg


def errors_and_features(net: Networks, encoder_params: Params, decoder_params: Params, step: Step) -> tuple[Tensor, Tensor]:
    """l [B, N]: mean squared error of each hidden patch's normalised pixels, 0 where the patch is visible; and, for a
    baseline's penalty, the CLS tokens of the masked images [B, D]."""

    def work(images, keep, restore, mask):
        with autocast(net, images.device):
            tokens = call(net.encoder, encoder_params, images, keep)  # [B, 1+K, D]
            pred = call(net.decoder, decoder_params, tokens, restore)  # [B, N, p*p*C]
        return patch_loss(pred, images, mask), tokens[:, 0].to(images.dtype)

    return in_parts(work, net.cfg.accumulate, step.images, step.keep, step.restore, step.mask)


def patch_errors(net: Networks, encoder_params: Tensor, decoder_params: Tensor, step: Step) -> Tensor:
    """l [B, N] of (2)."""
    return errors_and_features(net, encoder_params, decoder_params, step)[0]


def level1_loss(prob: Tensor, mask: Tensor, errors: Tensor) -> Tensor:
    """L1 of (2), a scalar, from three [B, N]. Linear in `errors`, which (9) and (10) rely on."""
    return (mask * prob * errors).sum() / mask.sum()


def encode(net: Networks, encoder_params: Tensor, images: Tensor, pooling: str = "") -> Tensor:
    """The features z of whole images, [B, D]: after the last norm, the mean of the patches' tokens ("mean") or the CLS token
    ("cls"); by default as the configuration has it."""
    pooling = pooling or net.cfg.pooling

    def work(images):
        with autocast(net, images.device):
            tokens = call(net.encoder, encoder_params, images)
        return ((tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)).to(encoder_params.dtype),)

    return in_parts(work, net.cfg.accumulate, images)[0]


def head_loss(net: Networks, head_params: Tensor, features: Tensor, labels: Tensor, dropout: Tensor | float = 1.0) -> Tensor:
    """The error of C in (4) and (6), a mean over images: squared, of one-hot labels; or cross-entropy, for --level2 steps.

    dropout: factors [B, D] of the head's input, for training steps alone."""
    if net.cfg.level2 == "steps":
        return F.cross_entropy(call(net.head, head_params, features, dropout), labels)
    scores = call(net.head, head_params, features)  # [B, classes]
    return (scores - F.one_hot(labels, scores.shape[1])).square().sum(1).mean()


def chance_loss(cfg: Config, labels: Tensor) -> float:
    """L3 of a C that sees nothing and knows each class's share of `labels` [B]: their variance, or entropy for steps."""
    counts = labels.bincount()
    shares = (counts / counts.sum())[counts > 0]
    return float(-(shares * shares.log()).sum() if cfg.level2 == "steps" else 1 - shares.square().sum())


def solved_head(net: Networks, features: Tensor, labels: Tensor) -> Tensor:
    """phi' of (5), differentiable in the features: the means and covariances of (z2, y2) that give the solution, a vector."""
    rows, columns = net.head.moments.shape  # 1+D, D+classes
    both = torch.cat([features, F.one_hot(labels, columns - rows + 1).to(features)], dim=1)  # [B, D+classes]
    mean = both.mean(0)  # [D+classes]
    covariance = (features - mean[: rows - 1]).mT @ (both - mean) / len(both)  # [D, D+classes]
    return torch.cat([mean[None], covariance]).flatten()


# ------------------------------------------------------------------------------------ the AdamW step and its pullback

BETA1, BETA2, EPS = 0.9, 0.95, 1e-8  # paper, all levels
TINY = 1e-36  # floor of nh: below it (gradients under 1e-18) sqrt has no useful derivative


class Rates(NamedTuple):
    """What AdamW needs beside the gradient."""

    lr: float | Tensor  # learning rate: a number, a scalar tensor, or a vector with one for each parameter
    decay: Tensor  # weight decay of each parameter
    eps: float = EPS


def adamw(level: Level, gradient: Tensor, rates: Rates, jacobian: str = "adamw") -> Level:
    """One AdamW step, (11). A pure function: the definition, which is differentiated as it is.

    jacobian="identity" keeps AdamW's value but gives it the derivative dtheta'/dg = -1: the published method, which
    replaces each best response's inverse Hessian by the identity."""
    t = level.t + 1
    mu = BETA1 * level.mu + (1 - BETA1) * gradient
    nu = BETA2 * level.nu + (1 - BETA2) * gradient.square()
    root = (nu / (1 - BETA2**t)).clamp_min(TINY).sqrt()
    move = rates.lr * (mu / (1 - BETA1**t)) / (root + rates.eps)
    if jacobian == "identity":
        move, mu, nu = move.detach() + gradient - gradient.detach(), mu.detach(), nu.detach()
    return Level((1 - rates.lr * rates.decay) * level.params - move, mu, nu, t)


@torch.no_grad()
def stepped(level: Level, gradient: Sequence[Tensor], rates: Rates, in_place: bool = False) -> Level:
    """`adamw`'s value, to rounding, by torch's one pass over memory where the definition takes a dozen.

    gradient: in pieces, in the vector's order, each of one weight decay. in_place: in the memory of `level`, which then holds
    the next one."""
    after = level if in_place else copied(level)
    sizes, groups = tuple(piece.numel() for piece in gradient), {}
    pieces = zip(*(vector.split(sizes) for vector in after[:3]), (piece.reshape(-1) for piece in gradient))
    for decay, some in zip(decays_of(rates.decay, sizes), pieces):
        groups.setdefault(decay, []).append(some)
    how = {"fused": True, "amsgrad": False, "maximize": False, "beta1": BETA1, "beta2": BETA2, "eps": rates.eps}
    for decay, some in groups.items():
        params, mu, nu, gradients = map(list, zip(*some))
        on_device = isinstance(level.t, Tensor)  # in `in_one_launch`
        made = level.t.repeat(len(some)) if on_device else torch.full((len(some),), float(level.t), device=level.params.device)
        count = list(made.unbind())  # which the pass counts up
        torchs_adamw(params, gradients, mu, nu, [], count, lr=rates.lr, weight_decay=decay, **how)
    return after._replace(t=level.t + 1)


@functools.lru_cache(maxsize=2)
def decays_of(decay: Tensor, sizes: tuple[int, ...]) -> list[float]:
    """The weight decay of each piece, of a vector's: looked up once a run, since it waits for the device."""
    return torch.stack([piece[0] for piece in decay.split(sizes)]).tolist()


Cotangent = tuple[Tensor, Tensor | None, Tensor | None]  # A, of (theta, mu, nu); None: 0


def adamw_pullback(
    level: Level, gradient: Tensor, rates: Rates, jacobian: str, cotangent: Cotangent, whole: bool = True
) -> tuple[Cotangent | None, Tensor]:
    """Carry the cotangent A of (theta', mu', nu') back to (theta, mu, nu) and to g: (8), (13). Autograd of
    `adamw` gives (12).

    Each element is on its own, so `cotangent` may cover the leading n parameters only. rates.lr is one number.
    Returns ((a_theta, a_mu, a_nu), c), each [n]; without `whole`, (None, c), at half the price."""
    n = len(cotangent[0])
    *before, g = (vector[:n].detach() for vector in (*level[:3], gradient))
    wanted = [vector.requires_grad_() for vector in ([*before, g] if whole else [g])]
    with torch.enable_grad():
        after = adamw(Level(*before, level.t), g, rates._replace(decay=rates.decay[:n]), jacobian)
        pairs = [(x, part) for x, part in zip(after, cotangent) if part is not None and x.requires_grad]
        outputs, parts = zip(*pairs)
        *back, c = torch.autograd.grad(outputs, wanted, parts, materialize_grads=True)
    return (tuple(back) if whole else None), c  # (8), with (12)


def params_only(cotangent: Tensor) -> Cotangent:
    """A = (a, 0, 0): the cotangent of (theta', mu', nu') of a loss that sees theta' alone."""
    return cotangent, None, None


# -------------------------------------------------------------------------------------------------- hypergradient


class Labelled(NamedTuple):
    """What levels 2 and 3 see in one outer iteration: images are this process's own; labels and dropout are those of all."""

    images2: Tensor  # [B / processes, C, H, W] training images
    labels2: Tensor  # [B]
    images3: Tensor  # [B / processes, C, H, W] validation images
    labels3: Tensor  # [B]
    dropout: Tensor  # [head_steps, B, D] factors of level 2's dropout; not read where level 2 is solved
    rates: Rates  # of the head
    chance: float = math.inf  # T waits where L3 is at least this; inf: never


class Result(NamedTuple):
    hypergradient: Tensor | None  # dL3/dpsi; None where T is to wait
    head: Level  # phi' of (5)
    level2_loss: Tensor  # without its penalty; with --level2 steps: before the first of them
    level3_loss: Tensor


def upper_levels(
    net: Networks, encoder_params: Tensor, head: Level, labelled: Labelled, through_head: bool = True
) -> tuple[Tensor, Level, Tensor]:
    """Levels 2 and 3 as one function of E', with phi' differentiable: L3, phi' (Level), and L2 as `Result` has it.

    through_head=False holds phi' constant: L3 then sees E' through its own features alone."""
    # The head is small: every process has it see the whole batch. Derivatives reach the process's own images alone.
    features2, features3 = (gather(encode(net, encoder_params, images)) for images in (labelled.images2, labelled.images3))
    features2 = features2 if through_head else features2.detach()
    if net.cfg.level2 == "ridge":
        head = head._replace(params=solved_head(net, features2, labelled.labels2), t=head.t + 1)  # all that (5) needs
        first_loss = head_loss(net, head.params, features2, labelled.labels2)  # (4)
    else:
        head, losses = head._replace(params=head.params.detach().requires_grad_()), []
        for dropout in labelled.dropout:
            losses.append(head_loss(net, head.params, features2, labelled.labels2, dropout))  # (4)
            (gradient,) = torch.autograd.grad(losses[-1], head.params, create_graph=True)
            head = adamw(head, gradient, labelled.rates, net.cfg.update_jacobian)  # (5)
        first_loss = losses[0]
    return head_loss(net, head.params, features3, labelled.labels3), head, first_loss  # (6)


def waits(labelled: Labelled, loss3: Tensor) -> bool:
    """Whether T is to wait for a better head: what this one says of the patches is noise. All processes say the same."""
    return labelled.chance < math.inf and agree(bool(loss3 >= labelled.chance))[0]


def exact(
    net: Networks, theta: Level, psi: Tensor, head: Level, labelled: Labelled, steps: list[Step], through_head: bool = True
) -> Result:
    """The hypergradient by one backward through the encoder and one jvp through the autoencoder, (7) to (10).

    theta: after the level-1 steps; head: before level 2; steps: the level-1 steps to differentiate, in order. The other
    forms take and return the same."""
    split, jacobian = net.encoder_size, net.cfg.update_jacobian
    encoder_params = theta.params[:split].detach().requires_grad_()
    loss3, head, loss2 = upper_levels(net, encoder_params, head, labelled, through_head)
    if waits(labelled, loss3):
        return Result(None, detached(head), loss2.detach(), loss3.detach())
    # (7). D has no part in L3, so a covers E alone. L3 is a mean over all processes' images: their parts of `a` add up.
    a = summed(torch.autograd.grad(loss3, encoder_params)[0])
    cotangent, hypergradient = params_only(a), torch.zeros_like(psi)
    for number, step in reversed(list(enumerate(steps))):
        cotangent, c = adamw_pullback(step.theta, step.gradient, step.rates, jacobian, cotangent, whole=number > 0)  # (8)
        psi_leaf = psi.detach().requires_grad_()
        prob = weights_of(net, psi_leaf, step)
        if number == 0:
            d = directional_errors(net, step, c)  # (9)
        else:  # earlier steps moved D too, which L3 sees through the later g1: pad to all of theta
            of_theta, *of_moments = (F.pad(part, (0, len(step.theta.params) - len(c))) for part in cotangent)
            c = F.pad(c, (0, len(of_theta) - len(c)))
            d, hessian_c = directional_errors_and_hessian(net, step, prob.detach(), c)  # (9)
            cotangent = (of_theta + hessian_c, *of_moments)  # (13)
        hypergradient += torch.autograd.grad(level1_loss(prob, step.mask, d), psi_leaf)[0]  # (10)
    # Each process's L1 is a mean over its own images, so the whole batch's is the mean of theirs.
    return Result(average(hypergradient), detached(head), loss2.detach(), loss3.detach())


def directional_errors(net: Networks, step: Step, direction: Tensor) -> Tensor:
    """d of (9), [B, N]: the derivative of each patch's error along `direction` [n], of E alone (D is then constant) or of
    theta."""
    params, split, n = step.theta.params, net.encoder_size, len(direction)

    with torch.no_grad(), fwAD.dual_level():
        moving = fwAD.make_dual(params[:n], direction)
        errors = patch_errors(net, moving[:split], (moving if n > split else params)[split:], step)
        return fwAD.unpack_dual(errors).tangent


def directional_errors_and_hessian(net: Networks, step: Step, prob: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """d of (9), [B, N], and H c of (13): how errors and dL1/dtheta change along `direction` = c, in one pass."""
    whole = dataclasses.replace(net, cfg=dataclasses.replace(net.cfg, accumulate=1))  # the parts are made here
    split, pieces = net.encoder_size, (step.images, step.keep, step.restore, step.mask, prob)
    d, hessian_c = [], torch.zeros_like(direction)
    with kernels.use("reference"), torch.no_grad():  # the plain operations have derivatives of every order
        for *batch, some in zip(*(tensor.chunk(net.cfg.accumulate) for tensor in pieces)):
            part = Step(step.theta, step.gradient, step.rates, *batch)

            def loss(params):
                errors = patch_errors(whole, params[:split], params[split:], part)
                return level1_loss(some, part.mask, errors) / net.cfg.accumulate, errors

            of_gradient, of_errors = jvp(grad(loss, has_aux=True), (step.theta.params,), (direction,))[1]
            hessian_c += of_gradient
            d.append(of_errors)
    return torch.cat(d), average(hessian_c)


def unrolled(net: Networks, theta: Level, psi: Tensor, head: Level, labelled: Labelled, steps: list[Step]) -> Result:
    """The hypergradient by autograd through the steps themselves: the judge of every other form, at the price of keeping
    the graph of every gradient. `theta` is not used: the steps are made again."""
    psi = psi.detach().requires_grad_()
    theta = steps[0].theta._replace(params=steps[0].theta.params.detach().requires_grad_())
    with kernels.use("reference"):  # the plain operations have derivatives of every order
        for step in steps:
            encoder_params, decoder_params = theta.params.tensor_split([net.encoder_size])
            prob = weights_of(net, psi, step)
            loss1 = level1_loss(prob, step.mask, patch_errors(net, encoder_params, decoder_params, step))  # (2)
            (gradient,) = torch.autograd.grad(loss1, theta.params, create_graph=True)
            gradient = step.gradient + (gradient - gradient.detach())  # value: as made; derivative: of all batches
            theta = adamw(theta, gradient, step.rates, net.cfg.update_jacobian)  # (3)
        loss3, head, loss2 = upper_levels(net, theta.params[: net.encoder_size], head, labelled)  # (4) to (6)
        hypergradient = None if waits(labelled, loss3) else torch.autograd.grad(loss3, psi)[0]
    return Result(hypergradient, detached(head), loss2.detach(), loss3.detach())


def first_order(*problem) -> Result:
    """`exact` with phi' held constant: L3 sees E' through z3 alone."""
    return exact(*problem, through_head=False)


HYPERGRADIENTS = {"exact": exact, "unrolled": unrolled, "first-order": first_order}

# -------------------------------------------------------------------------------------------------------- the loop


class State(NamedTuple):
    """Everything that changes in a run, and that its checkpoint is for."""

    iteration: int  # outer iterations (mask updates) made
    theta: Level
    head: Level
    psi: Level
    eyes: Tensor | None = None  # parameters of the encoder that T reads, once they are kept; None: those of theta
    waited: int = 0  # mask updates of T's part that did not move T


def eyes_of(net: Networks, state: State) -> Tensor:
    """Parameters of the encoder that T reads, [n]."""
    return state.theta.params[: net.encoder_size] if state.eyes is None else state.eyes


def level1_step(
    net: Networks,
    theta: Level,
    psi: Tensor,
    images: Tensor,
    rates: Rates,
    *keys: int,
    progress: float = 1.0,
    eyes: Tensor | None = None,
    covered: Tensor | None = None,
    known: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Level, Step, Tensor, Tensor]:
    """One AdamW step of encoder and decoder under T's masks: (1), (2), (3). eyes: parameters of the encoder that T reads
    (None: those of theta); covered, known: as in `draw_masks`; in_place: theta' is put where theta was, and the Step has
    neither theta nor gradient.

    Returns theta' (Level), the Step that was made, and of this process's images L1 and the mean unweighted error of the
    hidden patches."""
    eyes = theta.params[: net.encoder_size] if eyes is None else eyes
    with torch.no_grad():
        prob, *choice = draw_masks(net, psi, images, eyes, *keys, progress=progress, covered=covered, known=known)  # (1)
    step = Step(theta, None, rates, images, *choice, eyes, covered)
    update = net.replay if in_place and net.replay else functools.partial(level1_update, net, in_place=in_place)
    theta, gradient, loss, error = update(step, prob)
    step = step._replace(theta=None) if in_place else step._replace(gradient=gradient)
    return theta, step, loss, error


Update = tuple[Level, Tensor | None, Tensor, Tensor]  # theta', g1 as a vector (None: in pieces), L1, mean unweighted error


def level1_update(net: Networks, step: Step, prob: Tensor, in_place: bool = False) -> Update:
    """(2) and (3), when p and the masks are there."""
    theta = step.theta
    parts = zip((net.encoder, net.decoder), theta.params.tensor_split([net.encoder_size]))
    pieces = [{name: piece.detach().requires_grad_() for name, piece in unflatten(*part).items()} for part in parts]
    errors, features = errors_and_features(net, *pieces, step)
    loss = level1_loss(prob, step.mask, errors)  # (2)
    if net.penalty:
        loss = loss + net.penalty(features)
    leaves = [piece for part in pieces for piece in part.values()]
    if world() == 1 and in_place:
        gradient, vector = torch.autograd.grad(loss, leaves), None  # g1, in pieces
    else:  # a vector where several processes exchange it or a derivative may ask for it
        vector = averaged_gradient(loss, leaves)  # g1: all images hide as many patches, so it is the processes' mean
        gradient = vector.split([leaf.numel() for leaf in leaves])
    error = errors.detach().sum() / step.mask.sum()
    return stepped(theta, gradient, step.rates, in_place), vector, loss.detach(), error  # (3)


def in_one_launch(net: Networks, decay: Tensor, **how) -> Callable[[Step, Tensor], Update]:
    """`level1_update` in place, as one launch of a GPU. What changes from step to step has to be a tensor, so the learning
    rate and the number of steps made are scalar tensors here. how: what else `replayed` takes."""

    def work(params, mu, nu, t, lr, prob, *batch):
        step = Step(Level(params, mu, nu, t), None, Rates(lr, decay), *batch)
        return level1_update(net, step, prob, in_place=True)[2:]

    run = replayed(work, 3, lambda: (kernels.current(), net.penalty), **how)

    def update(step: Step, prob: Tensor) -> Update:
        numbers = (torch.full((), float(value), device=prob.device) for value in (step.theta.t, step.rates.lr))
        batch = step.images, step.keep, step.restore, step.mask
        *vectors, loss, error = run(*step.theta[:3], *numbers, prob, *batch)
        return Level(*vectors, step.theta.t + 1), None, loss, error

    return update


def joined(steps: list[Step]) -> Step:
    """The last step, with the images and masks of all: (9) and (10) over more batches, for one a. What another batch would
    have changed in dU/dg1 is left out."""
    names = [name for name in ("images", "keep", "restore", "mask", "covered") if getattr(steps[-1], name) is not None]
    return steps[-1]._replace(**{name: torch.cat([getattr(step, name) for step in steps]) for name in names})


def window(cfg: Config, total: int, waited: int = 0) -> tuple[int, int]:
    """(start, end): T learns in the outer iterations from `start` to before `end`, in one at least unless the run ends first.
    Waiting makes `end` later. Where no T learns, `began` alone uses `end`."""
    start, end = (math.ceil(part * total - 1e-9) for part in (cfg.mask_start, cfg.mask_until))  # 0.07 x 100 is above 7
    return start, min(max(end, start + 1) + waited if trains(cfg) else end, total)


def began(cfg: Config, iteration: int, total: int, waited: int) -> int:
    """The outer iteration in which the present schedule of level 1's learning rate began. The first schedule is laid over the
    whole run, though it breaks off at the restart: E is still to move while T learns from it."""
    restart = window(cfg, total, waited)[1] if cfg.mask_restart else total
    return 0 if iteration < restart else restart


def level1_rate(cfg: Config, iteration: int, step: int, total: int, waited: int) -> float:
    """The learning rate of encoder and decoder in this step of this outer iteration."""
    first = began(cfg, iteration, total, waited)
    done, steps = (iteration - first) * cfg.level1_steps + step, (total - first) * cfg.level1_steps
    return cfg.lr * schedule(done, steps, cfg.warmup * steps)


def upper_schedules(cfg: Config, iteration: int, total: int, waited: int) -> tuple[float, float]:
    """The head's and T's shares of their peak learning rates in this outer iteration, of T's part of the run. While T waits
    its own schedule stands still, and the head's, which goes on, is stretched."""
    start, end = window(cfg, total)
    look, looks, warm = iteration - start, end - start, cfg.warmup * (end - start)
    return schedule(look, looks + waited, warm), schedule(look - waited, looks, warm)  # T alone waits


def learns_at(cfg: Config, iteration: int, total: int, waited: int) -> bool:
    """Whether T is to be trained in this outer iteration."""
    start, end = window(cfg, total, waited)
    return trains(cfg) and start <= iteration < end


def stays(cfg: Config, iteration: int, total: int, waited: int) -> bool:
    """Whether a T weighs patches and will not change any more."""
    return cfg.masking == "learned" and (is_given(cfg) or iteration >= window(cfg, total, waited)[1])


class Streams(NamedTuple):
    """What a run draws from without end: batches of each level, and maps of level 1's images, by patch, if there are any."""

    level1: Iterator[data.Batch]
    level2: Iterator[data.Batch]
    level3: Iterator[data.Batch]
    covered: Iterator[Tensor] | None = None  # the share of each patch that its image covers [B, N]
    known: Iterator[Tensor] | None = None  # in its place: p of a T that stays as it is, or a baseline's maps [B, M*N]


def outer_iteration(
    net: Networks,
    state: State,
    streams: Streams,
    total: int,
    decay: list[Tensor],
    mask_rate: Tensor,
    hypergradient: Callable[..., Result] | None = None,
) -> tuple[State, dict[str, Tensor]]:
    """Some level-1 steps, then (where T learns) level 2 and one step of T.

    total: outer iterations of the whole run; decay: of the three levels; mask_rate: learning rate of each parameter of T
    relative to --mask-lr; hypergradient: another form than the configuration's.
    Returns the next State and the iteration's losses, scalars on the device."""
    cfg, head, psi, waited, steps = net.cfg, state.head, state.psi, state.waited, []
    progress, learns, all_steps = state.iteration / total, learns_at(cfg, state.iteration, total, waited), cfg.unroll == "full"
    watched = learns * (cfg.level1_steps if all_steps else 1)  # so many steps, the last ones, are differentiated
    unwatched = cfg.level1_steps - watched  # the others are made in place
    theta = copied(state.theta) if unwatched else state.theta  # the caller has its state still

    for n in range(cfg.level1_steps):
        lr = level1_rate(cfg, state.iteration, n, total, waited)
        images, keys = next(streams.level1).images, (cfg.seed, MASKS, state.iteration * cfg.level1_steps + n)
        how = {"progress": progress, "eyes": state.eyes, "in_place": n < unwatched}
        how |= {name: next(maps) for name, maps in (("covered", streams.covered), ("known", streams.known)) if maps}
        theta, step, loss1, error = level1_step(net, theta, psi.params, images, Rates(lr, decay[0]), *keys, **how)
        if learns:  # of steps that were made in place the images and masks alone are looked at
            steps = [*steps, step][-(cfg.level1_steps if all_steps else cfg.mask_batches) :]
    losses = {"level1_loss": loss1, "reconstruction_error": error}

    if learns:
        level2, level3 = next(streams.level2), next(streams.level3)
        of_head, of_t = upper_schedules(cfg, state.iteration, total, waited)
        labelled = labelled_of(cfg, level2, level3, Rates(cfg.head_lr * of_head, decay[1]), state.iteration)
        if waited < round(cfg.mask_wait * total):
            labelled = labelled._replace(chance=chance_loss(cfg, labelled.labels3))
        form = hypergradient or HYPERGRADIENTS[cfg.hypergradient]
        looked_at = steps if all_steps else [joined(steps)]
        result = form(net, theta, psi.params, head, labelled, looked_at)
        head = result.head
        losses |= {"level2_loss": result.level2_loss, "level3_loss": result.level3_loss}
        if result.hypergradient is None:
            waited += 1
        else:  # its scale depends on the levels below; eps must be far below its elements, however small they are
            psi = adamw(psi, result.hypergradient, Rates(cfg.mask_lr * of_t * mask_rate, decay[2], eps=TINY**0.5))  # (11)
            losses["hypergradient_norm"] = result.hypergradient.norm()
    theta = copied(theta) if net.replay and not watched else theta  # the next replay works in the same memory
    return State(state.iteration + 1, theta, head, psi, state.eyes, waited), losses


def labelled_of(cfg: Config, level2: data.Batch, level3: data.Batch, rates: Rates, iteration: int) -> Labelled:
    """What levels 2 and 3 see in an outer iteration, of these batches; T does not wait."""
    shape = (cfg.head_steps if cfg.level2 == "steps" else 0, cfg.labelled_batch_size, cfg.width)
    dropout = uploaded(draw_dropout(cfg.dropout, shape, cfg.seed, DROPOUT, iteration), level2.images.device)
    return Labelled(level2.images, gather(level2.labels), level3.images, gather(level3.labels), dropout, rates)


def with_kept_eyes(net: Networks, state: State, total: int) -> State:
    """The state; once T stays as it is, with a copy of the encoder that T reads, which level 1 then leaves alone."""
    if state.eyes is not None or not stays(net.cfg, state.iteration, total, state.waited):
        return state
    return state._replace(eyes=eyes_of(net, state).clone())  # a view would keep all of theta in memory


@torch.no_grad()
def weight_maps(net: Networks, state: State, images: data.Images) -> data.Images:
    """p of each whole image, as maps that its crops and flips move with it: once T stays as it is, it need look no more at
    images in memory, and a step costs what MAE's does."""
    p = [masking_probability(net, state.psi.params, batch.images, eyes_of(net, state)) for batch in images.ordered(256)]
    precision = torch.float16 if net.cfg.mask_choice == "random" else torch.float32  # which tells p near 1 apart, to choose by
    return images.accompanied(torch.cat(p).unflatten(1, (math.isqrt(net.patches), -1)), precision)


def coverage(images: data.Images) -> data.Images:
    """Maps of 1 on each whole image. Cropped as the image is, they tell how much of each patch it covers."""
    return images.accompanied(torch.ones(len(images), 1, 1, device=images.images.device))


def moved_weights(maps: Iterator[data.Batch], patch_size: int) -> Iterator[Tensor]:
    """Each batch of maps that have been cropped and flipped, by patch: [B, N] of one map an image, [B, M*N] of M."""
    return (F.avg_pool2d(batch.images, patch_size).flatten(1) for batch in maps)


# ----------------------------------------------------------------------------------------------------- the networks
# Names and computation are those of timm's VisionTransformer and of facebookresearch/mae, so weights interchange.


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear, which in forward mode multiplies by zeros where an argument has no tangent. Here those products are left
    out: a constant decoder then costs its jvp two thirds of what it otherwise would."""
    (x, dx), (weight, dweight), (bias, dbias) = map(fwAD.unpack_dual, (x, weight, bias))
    out = F.linear(x, weight, bias)
    if dx is None and dweight is None:
        return out
    of_x = None if dx is None else F.linear(dx, weight)
    of_weight = None if dweight is None else F.linear(x, dweight, dbias)  # weight and bias move together or not at all
    return fwAD.make_dual(out, joint_tangent(of_x, of_weight))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.layer_norm, whose forward mode torch composes of twenty passes. The normalisation's Jacobian is symmetric, so that
    torch's backward kernel serves a tangent as well; what weight and bias add by moving is a layer norm with these moves."""
    (x, dx), (weight, dweight), (bias, dbias) = map(fwAD.unpack_dual, (x, weight, bias))
    if dx is None and dweight is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    out, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
    backward = torch.ops.aten.native_layer_norm_backward
    of_x = None if dx is None else weight * backward(dx, x, weight.shape, mean, rstd, None, None, [True, False, False])[0]
    of_weight = None if dweight is None else F.layer_norm(x, weight.shape, dweight, dbias, eps)
    return fwAD.make_dual(out, joint_tangent(of_x, of_weight))


def joint_tangent(first: Tensor | None, second: Tensor | None) -> Tensor:
    """Their sum, of which one may be absent."""
    return second if first is None else first if second is None else first + second


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return layer_norm(x, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class PatchEmbed(nn.Module):
    """Linear embedding of patches; the weight has a convolution's shape, as public checkpoints have it."""

    def __init__(self, patch, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches):  # [B, K, p*p*C]
        return linear(patches, rearrange(self.proj.weight, "d c p q -> d (p q c)"), self.proj.bias)  # [B, K, D]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x):  # [B, tokens, D]
        return self.proj(attention(self.qkv(x).unflatten(2, (3, self.heads, -1))))  # qkv: [B, tokens, 3, heads, D/heads]


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x, scale=None):  # [B, tokens, D], factors of the two branches [2, B, 1, 1] (None: 1)
        mixed = self.attn(self.norm1(x))
        x = x + (mixed if scale is None else scale[0] * mixed)
        widened = self.mlp(self.norm2(x))
        return x + (widened if scale is None else scale[1] * widened)


class Encoder(nn.Module):
    """ViT that sees the visible patches alone (MAE, section 3), or all of them."""

    recompute = False  # --checkpoint-activations

    def __init__(self, image_size, patch, channels, width, depth, heads):
        super().__init__()
        self.patch = patch
        self.patch_embed = PatchEmbed(patch, channels, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(sincos_positions(width, image_size // patch))  # [1, 1+N, D]
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = LayerNorm(width, eps=1e-6)
        self.blocks.apply(initialise_linear)

    def forward(self, images, keep=None, scales=None, blocks=None):
        """[B, C, H, W] and the visible patches [B, K] (None: all N) -> tokens [B, 1+K, D], CLS first.

        scales [depth, 2, B, 1, 1] are factors of the residual branches: fine-tuning's drop path (None: 1). blocks: only so
        many of them, and no last norm."""
        x = self.patch_embed(gather_patches(images, keep, self.patch))  # [B, K, D]
        positions = self.pos_embed[:, 1:]  # [1, N, D]
        x = x + (positions if keep is None else F.embedding(keep, positions[0]))  # indexing's gradient varies with threads
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1).to(x.dtype), x], dim=1)  # [B, 1+K, D]
        if blocks is not None:
            return through(self.blocks[:blocks], x, self.recompute)
        return self.norm(through(self.blocks, x, self.recompute, scales))


class Decoder(nn.Module):
    """Reconstructs every patch's pixels from the tokens of the visible ones."""

    recompute = False  # --checkpoint-activations

    def __init__(self, image_size, patch, channels, encoder_width, width, depth, heads):
        super().__init__()
        self.decoder_embed = Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.decoder_pos_embed = nn.Parameter(sincos_positions(width, image_size // patch))
        self.decoder_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.decoder_norm = LayerNorm(width, eps=1e-6)
        self.decoder_pred = Linear(width, patch * patch * channels)
        self.apply(initialise_linear)

    def forward(self, tokens, restore):
        """[B, 1+K, D] and each patch's place in the shuffled order [B, N] -> pixels [B, N, p*p*C]."""
        x = self.decoder_embed(tokens)
        x = scatter_tokens(x, self.mask_token, self.decoder_pos_embed, restore)  # [B, 1+N, decoder D]
        x = through(self.decoder_blocks, x, self.recompute)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


class Head(nn.Module):
    """C of --level2 steps: norm, dropout, linear, on the features z. As published, z is the CLS token and the norm a layer
    norm. Dropout is an argument: see `draw_dropout`."""

    def __init__(self, width, classes, norm):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm == "layer" else None  # None: over the batch, as MAE's linear probe
        self.fc = nn.Linear(width, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features, dropout=1.0):  # [B, D], [B, D] -> [B, classes]
        standardised = F.batch_norm(features, None, None, training=True) if self.norm is None else self.norm(features)
        return self.fc(standardised * dropout)


class RidgeHead(nn.Module):
    """C solved: ridge regression of one-hot labels on standardised features, from means and covariances."""

    def __init__(self, width, classes, penalty):
        super().__init__()
        self.penalty = penalty
        self.moments = nn.Parameter(torch.zeros(1 + width, width + classes))  # means of (z, y); covariances of z with (z, y)

    def forward(self, features):  # [B, D] -> [B, classes]
        width = features.shape[1]
        (mean, of_labels), second = self.moments[0].tensor_split([width]), self.moments[1:]  # [D], [classes], [D, D+classes]
        deviation = (second.diagonal() + 1e-6).sqrt()  # [D]
        covariance, cross = (second / deviation[:, None]).split([len(mean), len(of_labels)], dim=1)  # [D, D], [D, classes]
        correlation = covariance / deviation + self.penalty * torch.eye(len(mean), device=mean.device, dtype=mean.dtype)
        place = "cpu" if mean.device.type == "mps" else mean.device  # torch 2.11's backward is wrong on mps (pytorch #175192)
        solution = torch.linalg.solve(correlation.to(place), cross.to(place)).to(mean.device)  # (5), [D, classes]
        return of_labels + (features - mean) / deviation @ solution


class TokenMaskingNetwork(nn.Module):
    """T as one linear layer on an encoder's tokens, each of them normalised by itself, so that nothing depends on the batch.

    Its gradient is noisy, and it has few weights to be misled with; what tells objects apart is in the tokens already. An
    image's logits have mean -2: only comparing its patches matters, since AdamW makes level 1 blind to a factor that all p
    share, and well below 0 a sigmoid lets p differ by large factors. All p are equal at the start."""

    def __init__(self, width, patches):
        super().__init__()
        self.grid = math.isqrt(patches)  # of this run's images; the encoder that is read may have another
        self.fc = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.fc.weight)

    def forward(self, x):  # [B, D, h, w] -> p [B, N]
        logits = self.fc(F.layer_norm(x.movedim(1, 3), x.shape[1:2])).movedim(3, 1)  # [B, 1, h, w]
        if logits.shape[-1] != self.grid:
            place = "cpu" if logits.device.type == "mps" else logits.device  # mps has no backward of it
            logits = F.interpolate(logits.to(place), (self.grid, self.grid), mode="bilinear", antialias=True).to(logits.device)
        logits = logits.flatten(1)
        return (logits - logits.mean(1, keepdim=True) - 2).sigmoid()


class MaskingNetwork(nn.Module):
    """T: two linear layers on the whole image, one logit a patch (paper, section 3).

    Each image is standardised and each layer starts with variance 1/fan-in, so the first logits have a variance of
    about one half around 0 and follow the image: no patch starts saturated, and masks differ between images."""

    def __init__(self, inputs, width, patches):
        super().__init__()
        self.fc1 = nn.Linear(inputs, width)
        self.fc2 = nn.Linear(width, patches)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x):  # [B, C, H, W], or embeddings [B, D, H/p, W/p] -> p [B, N]
        x = x.flatten(1)
        return self.fc2(F.relu(self.fc1(F.layer_norm(x, x.shape[1:])))).sigmoid()


class SharedMaskingNetwork(nn.Module):
    """T as one small network for every position: it reads a patch and the eight around it. Each image then gives it as
    many examples as it has patches, where the paper's T learns every position by itself.

    An image's logits have mean 0, since only comparing its patches matters: AdamW makes level 1 blind to a common
    factor of p. The last layer starts at 0: p = 1/2 throughout, half of MAE's loss."""

    def __init__(self, channels, patch, width):
        super().__init__()
        self.window = nn.Conv2d(channels, width, 3 * patch, stride=patch, padding=patch)
        self.fc = nn.Conv2d(width, 1, 1, bias=False)
        nn.init.normal_(self.window.weight, std=self.window.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.window.bias)
        nn.init.zeros_(self.fc.weight)

    def forward(self, x):  # [B, C, H, W], or embeddings [B, D, H/p, W/p] -> p [B, N]
        logits = self.fc(F.gelu(self.window(F.layer_norm(x, x.shape[1:])))).flatten(1)
        return (logits - logits.mean(1, keepdim=True)).sigmoid()


def initialise_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def sincos_positions(width: int, grid: int) -> Tensor:
    """Two-dimensional sin-cos positions [1, 1+grid*grid, width], column half first; zeros for CLS: as in MAE,
    which keeps them so. Here they learn, as in the published code."""
    frequency = 10000.0 ** -(torch.arange(width // 4) / (width // 4))  # [D/4]
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (column, row)]  # each [N, D/4]
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)  # [N, D]
    return torch.cat([torch.zeros(1, width), table])[None]


def read_by_masking(cfg: Config, patches: int, channels: int) -> tuple[int, int, int]:
    """What T reads: its channels, the pixels of a patch along a side, and how many values a unit of its first layer sees."""
    if cfg.masking_network == "tokens":
        return cfg.width, 1, cfg.width
    seen, cell = (channels, cfg.patch_size) if cfg.masking_input == "pixels" else (cfg.width, 1)
    return seen, cell, seen * cell**2 * (9 if cfg.masking_network == "shared" else patches)


def check_size(cfg: Config, image_size: int, channels: int) -> None:
    """Raise UserError for sizes that do not fit together, or make too large a model."""
    if image_size % cfg.patch_size:
        raise UserError(
            f"images of {image_size} pixels do not divide into patches of {cfg.patch_size}; "
            "choose another --patch-size or --image-size"
        )
    patches = (image_size // cfg.patch_size) ** 2
    if not 0 < int(patches * (1 - cfg.mask_ratio)) < patches:
        raise UserError(f"--mask-ratio {cfg.mask_ratio} of {patches} patches leaves none visible or none hidden")
    _, _, inputs = read_by_masking(cfg, patches, channels)
    hidden = 0 if cfg.masking_network == "tokens" else cfg.masking_width
    weights = (
        12 * (cfg.depth * cfg.width**2 + cfg.decoder_depth * cfg.decoder_width**2)
        + inputs * hidden
        + (patches + channels * cfg.patch_size**2) * (cfg.width + cfg.decoder_width + hidden)
    )
    if weights > MAX_WEIGHTS:
        raise UserError(f"a model of {weights:.1e} weights is too large; lower --width, --depth or --masking-width")


def build(
    cfg: Config, image_size: int, channels: int, classes: int, sight: Sight | None = None
) -> tuple[Networks, tuple[Tensor, Tensor, Tensor]]:
    """Networks, and their initial parameters theta, phi, psi, a vector each; the encoder's depend on the seed alone.

    classes: 0 where there are none, and so no work for C; sight: of the T of another run. Raises UserError where the sizes do
    not fit."""
    check_size(cfg, image_size, channels)
    classes = max(1, classes)
    patches = (image_size // cfg.patch_size) ** 2
    seen, cell, inputs = read_by_masking(cfg, patches, channels)
    torch.manual_seed(cfg.seed)
    sizes = image_size, cfg.patch_size, channels
    encoder = Encoder(*sizes, cfg.width, cfg.depth, cfg.heads)
    decoder = Decoder(*sizes, cfg.width, cfg.decoder_width, cfg.decoder_depth, cfg.decoder_heads)
    encoder.recompute = decoder.recompute = cfg.checkpoint_activations
    ridge = cfg.level2 == "ridge"
    head = RidgeHead(cfg.width, classes, cfg.ridge) if ridge else Head(cfg.width, classes, cfg.head_norm)
    if cfg.masking_network == "tokens":
        masking = TokenMaskingNetwork(sight.facts["width"] if sight else cfg.width, patches)
    elif cfg.masking_network == "shared":
        masking = SharedMaskingNetwork(seen, cell, cfg.masking_width)
    else:
        masking = MaskingNetwork(inputs, cfg.masking_width, patches)
    theta = torch.cat([parameters_to_vector(module.parameters()) for module in (encoder, decoder)]).detach()
    phi, psi = (parameters_to_vector(module.parameters()).detach() for module in (head, masking))
    return Networks(cfg, *(module.to("meta") for module in (encoder, decoder, head, masking)), sight=sight), (theta, phi, psi)


# -------------------------------------------------------------------------------------------------------- a whole run

FORMAT = "mlo-mae checkpoint 6"
SHOWN = 8  # images in pictures, and those whose p is recorded over training


def rates_of(net: Networks, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Weight decays of the three levels, and learning rates of T's parameters relative to --mask-lr, as `outer_iteration`
    takes them."""
    decay = [weight_decays(modules, net.cfg.weight_decay).to(device) for modules in modules_of(net).values()]
    return decay, inverse_fan_in(net.masking).to(device)


def train(
    cfg: Config,
    out: Path | None,
    resume: bool = False,
    hypergradient: Callable[..., Result] | None = None,
    prepare: Callable | None = None,
    announce: Callable | None = None,
) -> tuple[Networks, State, data.Splits]:
    """Pretrain, and write the run's folder `out` (docs/usage.md; None: nothing is written); with `resume`, continue what is
    there.

    hypergradient: another form than the configuration's, for `outer_iteration`; prepare(net, splits, device, run): sets up
    a baseline's own networks; announce(out, net, state, splits, total, decay): is called before anything is written. Of
    several processes the first alone writes.
    Raises UserError, and Interrupted after a checkpoint where a signal asked to stop."""
    check(cfg)
    device = cli.choose_device(cfg.device)
    cfg = with_precision(cfg, device)
    settings = {"config": dataclasses.asdict(cfg)}
    if not alike({name: value for name, value in settings["config"].items() if name not in MACHINE_FIELDS}):
        raise UserError("the processes have other settings; give all of them the same flags, with --resume those of the run")
    run = Run(out, settings, resume, FORMAT, MACHINE_FIELDS, cfg.checkpoint_minutes, cfg.tensorboard)
    splits = first_before_others(lambda: load_data(cfg, device))
    if not alike({name: value for name, value in splits.facts().items() if name not in data.COMPUTED}):
        raise UserError(f"the processes do not read the same data; give all of them the same --data {cfg.data}")
    run.compare("data", splits.facts(), data.COMPUTED)
    if splits.class_names and len(splits.train) < 2:
        raise UserError(f"--data {cfg.data}: features of one training image have no deviation; use more images")
    if splits.channels * cfg.patch_size**2 == 1:
        raise UserError("a patch of one value has no deviation, by which pixels are normalised; give --patch-size 2 or more")
    source = (out if run.checkpoint else Path(cfg.masking_from)) / "checkpoint.pt"  # a run keeps what it needs of another's T
    learned = (run.checkpoint or newest(source.parent, FORMAT)) if cfg.masking_from and rank() == 0 else None
    with fitting(source):
        about = told({"eyes": {"facts": learned["eyes"]["facts"]}, "config": learned["config"]} if learned else None)
        sight = sight_of(about, splits.facts(), device) if about else None
    net, params = build(cfg, splits.image_size, splits.channels, len(splits.class_names), sight)
    if cfg.init and rank() == 0 and run.checkpoint is None:
        heads = {"heads": cfg.heads, "decoder_heads": cfg.decoder_heads}
        params = (starting_weights(cfg.init, [net.encoder, net.decoder], params[0], heads), *params[1:])
    state = State(0, *(fresh_level(vector, device) for vector in params))
    if learned and run.checkpoint is None:
        with fitting(source):
            psi, eyes = masks_of(net, learned)
        state = state._replace(psi=fresh_level(psi, device), eyes=eyes.to(device))
    if run.checkpoint is not None:
        with fitting(out / "checkpoint.pt"):
            state = restored(net, run.checkpoint, device)
    if agree(state.eyes is not None)[0] and state.eyes is None:  # the first process alone has read them
        state = state._replace(eyes=torch.zeros(size_of(net.seer), device=device))
    state, learned = as_first(state), None
    run.checkpoint = None if run.checkpoint is None else {}  # what it held is in the state
    foresee_memory(net, state.theta.params, (splits.channels, splits.image_size, splits.image_size))

    (decay, mask_rate), total = rates_of(net, device), mask_updates(cfg, splits)
    if cfg.graphs == "auto" and device.type == "cuda" and world() * cfg.accumulate == 1 and not cfg.checkpoint_activations:
        net.replay = in_one_launch(net, decay[0])
    start, end = window(cfg, total)
    if trains(cfg) and start == end:
        raise UserError(f"T would learn in none of {total} mask updates; raise --epochs, or lower --mask-start")
    if announce:
        announce(out, net, state, splits, total, decay)
    if prepare:
        prepare(net, splits, device, run)
    looks = sum(learns_at(cfg, n, total, state.waited) for n in range(min(state.iteration, total)))  # labelled batches used

    def stream(purpose, split, size, used):
        seed = torch_generator(cfg.seed, purpose).initial_seed()
        return run.timed(split.stream(size, seed, start=used, part=share(size)))

    streams = Streams(
        stream(LEVEL1_DATA, splits.train, cfg.batch_size, state.iteration * cfg.level1_steps),
        stream(LEVEL2_DATA, splits.labelled[0], cfg.labelled_batch_size, looks),
        stream(LEVEL3_DATA, splits.labelled[1], cfg.labelled_batch_size, looks),
    )
    watched, objects = splits.watched(256)
    previous = None  # masks of `watched` at the last line of metrics
    chance = chance_loss(cfg, splits.labelled[1].labels)

    def metrics(epoch, moved, means):  # moved: whether T was, by the outer iteration just made
        nonlocal previous
        prob, _, _, mask = (tensor.cpu() for tensor in masks_now(net, state, watched, state.iteration / total))
        row, previous = mask_statistics(prob, mask, previous, objects, cfg.patch_size), mask
        last, waited = state.iteration - 1, state.waited
        row["learning_rate"] = level1_rate(cfg, last, cfg.level1_steps - 1, total, waited)
        if moved:
            row["mask_learning_rate"] = cfg.mask_lr * upper_schedules(cfg, last, total, waited)[1]
        if "level3_loss" in means:
            row["level3_chance"] = chance
        return {"epoch": epoch} | row | ({"waited": waited} if waited else {})

    def along(maps):
        return moved_weights(stream(LEVEL1_DATA, maps, cfg.batch_size, state.iteration * cfg.level1_steps), cfg.patch_size)

    resident = isinstance(splits.train, data.Images)
    if resident and cfg.crop:
        streams = streams._replace(covered=along(coverage(splits.train)))

    per_update = cfg.level1_steps * cfg.batch_size  # images of a mask update
    if run.writer and (epochs := total * per_update / len(splits.train)) > 1.05 * cfg.epochs:
        why = f"a mask update takes {per_update} images (--batch-size times --level1-steps)"
        print(f"data are seen {epochs:.1f} times, not {cfg.epochs}: {why}", file=sys.stderr)
    with run.at_work(total, state.iteration, f"{first_name(cfg, PRESETS)} {cfg.masking}"):
        while state.iteration < total and not run.stop:
            state = with_kept_eyes(net, state, total)
            if resident and not streams.known and (net.maps or stays(cfg, state.iteration, total, state.waited)):
                with run.at_once():
                    maps = net.maps(splits.train) if net.maps else weight_maps(net, state, splits.train)
                streams = streams._replace(covered=None, known=along(maps))
            moves = state.psi.t
            state, losses = outer_iteration(net, state, streams, total, decay, mask_rate, hypergradient)
            epoch, moved = round(state.iteration * per_update / len(splits.train), 3), state.psi.t > moves
            if moved and run.is_tenth(state.psi.t, end - start):
                with torch.no_grad():
                    p = masking_probability(net, state.psi.params, watched[:SHOWN], eyes_of(net, state))
                run.record_masks(state.iteration, epoch, p)
            line = functools.partial(metrics, epoch, moved)
            run.after(state.iteration, losses, cfg, line, lambda: content(net, state, splits))
    leave()
    run.leave_if_stopped(state.iteration, "update")
    return net, state, splits


def held_at_once(cfg: Config, processes: int) -> tuple[int, int]:
    """How many images' activations a process holds at a time: of level 1; and of levels 2 and 3 together, or of one where they
    are made in parts (0: no T is trained)."""
    level1, labelled = (math.ceil(size / processes / cfg.accumulate) for size in (cfg.batch_size, cfg.labelled_batch_size))
    return level1, trains(cfg) * labelled * (2 if cfg.accumulate == 1 else 1)


def foresee_memory(net: Networks, theta: Tensor, size: tuple[int, int, int]) -> None:
    """Raise UserError where the images [C, H, W] of a step cannot fit in memory."""
    whole = dataclasses.replace(net, cfg=dataclasses.replace(net.cfg, accumulate=1))
    encoder_params, decoder_params = theta.detach().requires_grad_().tensor_split([net.encoder_size])

    def level1(count: int) -> Tensor:
        choice = select_patches(theta.new_zeros(count, net.patches), net.visible)
        step = Step(None, None, None, theta.new_zeros(count, *size), *choice)
        return patch_errors(whole, encoder_params, decoder_params, step)

    def levels_2_and_3(count: int) -> Tensor:
        return encode(whole, encoder_params, theta.new_zeros(count, *size))

    of_level1, labelled = held_at_once(net.cfg, world())
    foresee(level1, of_level1, "level 1", theta.device, cli.LESS_MEMORY)
    if labelled:
        foresee(levels_2_and_3, labelled, "levels 2 and 3", theta.device, cli.LESS_MEMORY)


def mask_updates(cfg: Config, splits: data.Splits) -> int:
    """Outer iterations of a whole run."""
    return math.ceil(cfg.epochs * len(splits.train) / (cfg.batch_size * cfg.level1_steps))


def load_data(cfg: Config, device: torch.device) -> data.Splits:
    """The run's data, split. Raises UserError."""
    names = "image_size", "val_fraction", "seed", "skip_corrupt", "workers", "flip", "crop"
    same = {name: getattr(cfg, name) for name in names}
    classes = trains(cfg)  # levels 2 and 3 need them
    return data.load(cfg.data, cfg.data_dir, limit=cfg.images, classes=classes, device=device, **same)


@torch.no_grad()
def masks_now(net: Networks, state: State, images: Tensor, progress: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `draw_masks` returns for some images at this point of a run."""
    keys = (net.cfg.seed, MASKS, state.iteration, 1)
    return draw_masks(net, state.psi.params, images, eyes_of(net, state), *keys, progress=progress)


def modules_of(net: Networks) -> dict[str, list[nn.Module]]:
    """The modules of theta, phi and psi, under the names that checkpoints give these parts."""
    return {"model": [net.encoder, net.decoder], "head": [net.head], "masking": [net.masking]}


def content(net: Networks, state: State, splits: data.Splits) -> dict:
    """What a checkpoint holds: the whole state, under public parameter names."""
    levels = dict(zip(modules_of(net), (state.theta, state.head, state.psi)))
    about = {"format": FORMAT, "config": dataclasses.asdict(net.cfg), "data": splits.facts()}
    about |= {"iteration": state.iteration, "waited": state.waited}
    own = {name: getattr(net.cfg, name) for name in ("patch_size", "width", "depth", "heads", "masking_blocks")}
    eyes = {"facts": net.sight.facts if net.sight else own | splits.facts()}
    if state.eyes is not None:
        eyes["weights"] = {name: tensor.cpu().clone() for name, tensor in unflatten(net.seer, state.eyes).items()}
    return about | {"eyes": eyes} | packed(levels, modules_of(net))


def restored(net: Networks, content: dict, device: torch.device) -> State:
    """The opposite of `content`. Raises UserError where something is not this network's, and others: see `fitting`."""
    levels = (Level(*level) for level in unpacked(content, modules_of(net), device))
    kept = content["eyes"].get("weights")
    absent = kept is None and not net.sight
    eyes = None if absent else flatten([net.seer], kept).to(device)
    return State(whole_number(content["iteration"]), *levels, eyes, whole_number(content["waited"]))


def sight_of(content: dict, here: dict, device: torch.device) -> Sight:
    """How the T in a checkpoint, of another run or taken from one, sees the images whose facts are `here`. Raises UserError,
    and others: see `fitting`."""
    facts, config = content["eyes"]["facts"], content["config"]
    if (config["masking"], config["masking_network"]) != ("learned", "tokens"):
        raise UserError("it has no T that was learned and reads tokens; take a run with --masking-network tokens")
    if facts["channels"] != here["channels"]:
        raise UserError(f"its T sees images of {facts['channels']} channels, and these have {here['channels']}")
    names = "image_size", "patch_size", "width", "depth", "heads", "masking_blocks"
    # Its encoder alone is built; the rest has to pass `check` with as many processes as there are.
    small = {"decoder_width": 4, "decoder_heads": 1, "batch_size": world(), "labelled_batch_size": 2 * world()}
    its = Config(**{name: facts[name] for name in names}, **small)
    check(its)
    check_size(its, its.image_size, here["channels"])
    with torch.device("meta"):
        encoder = Encoder(its.image_size, its.patch_size, here["channels"], its.width, its.depth, its.heads)
    return Sight(encoder, facts, *(part.to(device) for part in renormalised(here, facts)))


def renormalised(here: dict, there: dict) -> tuple[Tensor, Tensor]:
    """Scale and shift [C, 1, 1] that make pixels normalised as these data are (`Splits.facts`) those of others. Raises
    UserError."""
    pairs = [[torch.tensor(each[name])[:, None, None] for name in ("mean", "std")] for each in (here, there)]
    (mean, std), (its_mean, its_std) = pairs
    scale, shift = std / its_std, (mean - its_mean) / its_std
    if len(its_mean) != len(mean) or not (scale.isfinite() & (scale > 0) & shift.isfinite()).all():
        raise UserError("the mean and deviation of its pixels are not finite, or no deviation above 0")
    return scale, shift


def masks_of(net: Networks, content: dict) -> tuple[Tensor, Tensor]:
    """psi, and the parameters of the encoder that T reads, out of another run's checkpoint. Raises as `sight_of` does, and
    UserError where T has not learned, to which all patches are alike, and either is not to learn or alone chooses masks."""
    kept = content["eyes"].get("weights")
    kept = {name: content["model"][name] for name, _ in net.seer.named_parameters()} if kept is None else kept
    psi = flatten([net.masking], content["masking"])
    if not psi.any() and (not net.cfg.masking_learns or net.cfg.mask_choice == "highest"):
        raise UserError("its T has not learned (all its weights are 0); take a run whose T has")
    return psi, flatten([net.seer], kept)


# ------------------------------------------------------------------------------------------- in Python, command line


def load(path: str | Path, device: str = "auto", **how):
    """A run, or public weights, for images of your own: `experiments.encode.load`, which names all it takes and raises.

    model = load("runs/shapes-learned-0")
    model.features(images), model.weights(images), model.reconstruct(images), model.encoder"""
    return cli.command("encode").load(path, device, **how)


def reported_run(cfg: Config, out: Path, resume: bool = False, **baseline) -> dict | None:
    """`train`, then probe and pictures: what to report, in the first of several processes."""
    processes, first = world(), rank() == 0
    net, state, splits = train(cfg, out, resume, announce=cli.command("presets").announce, **baseline)
    if not first:
        return None
    updates = {"command": "pretrain", "run": str(out), "updates": mask_updates(cfg, splits), "processes": processes}
    rows, chance = read_metrics(out / "metrics.jsonl"), chance_loss(cfg, splits.labelled[1].labels)
    losses3 = [row["level3_loss"] for row in rows if "level3_loss" in row]
    if losses3 and (losses3[-1] >= chance or not state.psi.t):
        learned = "T learned from a head no better than chance, so its weights may mean nothing"
        never = f"T had a head no better than chance in all of its {state.waited} looks, and never learned"
        mend = "give more --epochs or --labelled-batch-size, or a later --mask-start and --mask-until"
        about = f"(last L3 {losses3[-1]:.3f}, chance {chance:.3f})"
        print(f"{learned if state.psi.t else never} {about}; {mend}", file=sys.stderr)
    report = updates | ({"level3_loss": losses3[-1], "level3_chance": chance} if losses3 else {}) | rows[-1]
    with all_cores():
        if splits.class_names:
            report["probe"] = cli.command("probe").after_training(net, state, splits, out)
        report["pictures"] = [str(path) for path in cli.command("show").after_training(net, state, splits, out)]
    return report


def pretrain(argv: list[str]) -> dict | None:
    """Run `pretrain` with these flags; returns what its last line reports."""
    others = f"other commands, each with --help:\n{cli.described_commands()}"
    about = {"usage": "%(prog)s [flags]", "description": __doc__.splitlines()[0], "epilog": others}
    parser = cli.Parser(prog="mlo_mae.py pretrain", formatter_class=argparse.RawDescriptionHelpFormatter, **about)
    add_run_flags(parser, Config, "<masking>", PRESETS.get(cli.value_in(argv, "--preset"), {}))
    return reported_run(*settings_of(vars(parser.parse_args(argv)), Config, PRESETS, "<masking>"))


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line, whatever the number of processes, for what the user can mend (130: Ctrl-C)."""
    return cli.dispatch(argv, pretrain)


if __name__ == "__main__":
    end(main())
