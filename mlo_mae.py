"""MLO-MAE: masked autoencoders whose masks are learned (arXiv 2402.18128), in one script.

A masked autoencoder (MAE) hides most patches of an image and learns an encoder by reconstructing them.
Which patches it hides is usually left to chance. Here a masking network T chooses, and is trained so that the
encoder that results classifies held-out images well. Three problems, each nested in the next:

    level 1  pretrain   the encoder E and the decoder D, theta = (E, D), on images without labels
    level 2  classify   the head C, phi, on the encoder's features of labelled training images
    level 3  mask       the masking network T, psi, by how well E and C do on labelled validation images

Let i run over images and j over patches. One outer iteration computes

    p_ij = sigmoid(T(x_i; psi))_j,   m_ij = 1 for the patches of highest p (a fixed share), else 0             (1)
    L1(theta, p) = sum_ij m_ij p_ij l_ij(theta) / sum_ij m_ij,   l_ij the reconstruction error of a patch      (2)
    theta' = U(theta, g1),   g1 = dL1/dtheta                             (one AdamW step)                      (3)
    L2(phi, z2) = cross-entropy(C(z2; phi), y2),   z2 = E'(x2)           (features of whole images)            (4)
    phi' = U(phi, g2),   g2 = dL2/dphi                                   (one AdamW step)                      (5)
    L3(phi', z3) = cross-entropy(C(z3; phi'), y3),   z3 = E'(x3)         (validation images)                   (6)

and then moves psi along dL3/dpsi, the hypergradient: the derivative through both steps (3) and (5). The mask m is
a hard choice and has no derivative; the product p_ij l_ij in (2) is all that links T to E. Three observations
give that derivative exactly, without a Hessian and without a double backward through the autoencoder:

    v = dL3/dtheta'.  phi' depends on theta' only through the features z2, so the second derivative
        in (5) stays inside the head, and v is one ordinary backward pass through the encoder.                 (7)
    c = (dU/dg1)^T v.  AdamW treats each parameter alone, so dU/dg is a diagonal: a product by element.        (8)
    dL3/dp_ij = d<c, g1>/dp_ij.  g1 is the gradient of a sum of errors l_ij, so <c, dl_ij/dtheta> =: d_ij
        is the derivative of l_ij along the direction c: ONE forward-mode pass (jvp) gives all of them.        (9)
    dL3/dpsi = dL1(p(psi), d)/dpsi, since L1 is linear in l: the loss (2) with each error l_ij replaced
        by its directional derivative d_ij, and one backward through T.                                       (10)

The step U is AdamW's, with moments m, v (bias-corrected: mh, vh) after t steps:

    m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2,  theta' = (1 - lr wd) theta - lr mh / (sqrt(vh) + eps) (11)

whose diagonal in (8) is therefore

    dtheta'/dg = -lr [ (1-b1)/(1-b1^t) / (sqrt(vh)+eps) - mh (1-b2) g / ((1-b2^t) sqrt(vh) (sqrt(vh)+eps)^2) ] (12)

With several level-1 steps since the last mask update, (8) to (10) repeat from the last step to the first, and the
cotangent of theta is carried back through each by  (dU/dtheta)^T + H c,  H the Hessian of L1.                (13)

Read on in this order: configuration, networks, masks and the three losses, the AdamW step, the hypergradient in
three forms that must agree (exact, unrolled autograd, finite differences), the training loop, evaluation,
pictures, files, command line.

    python mlo_mae.py                                        # built-in images: pretrain, probe, pictures
    python mlo_mae.py pretrain --preset cifar100 --data-dir DIR
    python mlo_mae.py probe RUN
    python mlo_mae.py finetune RUN                           # finetune.py
    python mlo_mae.py show RUN
    python mlo_mae.py export RUN --to timm
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.utils import parameters_to_vector
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

import baselines
import data
import interchange
import kernels
from kernels import attention, gather_patches, patch_loss, scatter_tokens, select_patches
from processes import (ExchangeError, agree, average, end, exchanging, first_before_others, first_to_fail, from_first, gather,
                       join, leave, rank, share, summed, world)  # fmt: skip


class RunError(Exception):
    """What the user can mend: one line that says what is wrong and what to do."""


# ------------------------------------------------------------------------------------------------ configuration


def flag(default, meaning):
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Config:
    """One run. Every field is a command-line flag; a preset fills in a paper's values and flags override it."""

    preset: str = flag("shapes", "settings that the other flags override")

    data: str = flag("shapes", "shapes, cifar10, cifar100, a .npz file or a folder with train/<class>/*.jpg")
    data_dir: str = flag("data", "where cifar10 and cifar100 lie, or are downloaded to")
    images: int = flag(0, "use only this many training images (0: all)")
    image_size: int = flag(0, "pixels, square (0: as the data has it; folders 224)")
    val_fraction: float = flag(0.2, "share of the training images held out for level 3")
    skip_corrupt: bool = flag(False, "replace images that cannot be decoded instead of stopping")
    workers: int = flag(0, "processes that decode images (folders only)")

    patch_size: int = flag(4, "pixels, square")
    width: int = flag(64, "of the encoder's tokens")
    depth: int = flag(4, "blocks of the encoder")
    heads: int = flag(4, "attention heads of the encoder")
    decoder_width: int = flag(32, "of the decoder's tokens")
    decoder_depth: int = flag(1, "blocks of the decoder")
    decoder_heads: int = flag(2, "attention heads of the decoder")

    init: str = flag("", "weights that encoder and decoder start from: a run, or a public .pth or .safetensors")

    masking: Literal["learned", "random", "semantic"] = flag("learned", "by T; random as in MAE; semantic as in SemMAE")
    mask_ratio: float = flag(0.75, "share of the patches that is hidden")
    masking_input: Literal["pixels", "embeddings"] = flag("pixels", "what T reads: pixels, or detached embeddings")
    masking_network: Literal["shared", "mlp"] = flag("shared", "T: one small network for every position, or the paper's")
    masking_width: int = flag(64, "hidden units of T")
    mask_noise: float = flag(1.0, "scale of the Gumbel noise on T's logits when masks are drawn (0: the highest p, as published)")
    mask_start: float = flag(0.5, "share of the run with random masks before T is trained and used (0: none, as published)")
    parts_from: str = flag("", "semantic: the run, or its checkpoint, on whose frozen encoder parts are learned")
    parts: int = flag(7, "semantic: parts of an image")
    parts_steps: int = flag(300, "semantic: steps of part learning, before the run")
    uniformity: float = flag(0.0, "weight of U-MAE's uniformity term in level 1 (U-MAE: 0.01)")

    head_norm: Literal["batch", "layer"] = flag("batch", "of the head's input; layer as published")

    hypergradient: Literal["exact", "unrolled", "finite-difference", "first-order"] = flag("exact", "form of dL3/dpsi")
    update_jacobian: Literal["adamw", "identity"] = flag("adamw", "dU/dg of (8): AdamW's own, or -1 as published")
    unroll: Literal["last", "full"] = flag("last", "differentiate the last level-1 step, or all since the last mask")
    redraw_dropout: bool = flag(False, "redraw dropout between finite differences, as the published code does")

    epochs: int = flag(12, "passes of level 1 over its training images")
    batch_size: int = flag(32, "images a step of level 1, over all processes")
    labelled_batch_size: int = flag(64, "images a step of levels 2 and 3, each, over all processes")
    accumulate: int = flag(1, "parts that a batch is worked through in: less memory, same result")
    checkpoint_activations: bool = flag(False, "compute activations again in the backward pass: less memory, same result")
    level1_steps: int = flag(16, "encoder and decoder steps a mask update")
    head_steps: int = flag(10, "head steps a mask update, on one batch")
    lr: float = flag(2e-3, "level 1: peak learning rate of encoder and decoder")
    head_lr: float = flag(1e-2, "level 2: peak learning rate of the head")
    mask_lr: float = flag(1.0, "level 3: most that one step of T moves a pre-activation (its rate x fan-in)")
    weight_decay: float = flag(0.05, "of weights; biases, norms, tokens and positions have none")
    warmup: float = flag(0.05, "share of the run over which the learning rates rise, before their cosine to 0")
    dropout: float = flag(0.1, "in the head")

    seed: int = flag(0, "of weights, batches, masks and dropout")
    device: str = flag("auto", "auto, cpu, cuda, mps")
    precision: Literal["fp32", "bf16"] = flag("fp32", "of encoder and decoder; parameters are fp32 always")
    log_every: int = flag(10, "mask updates between two lines of metrics.jsonl")
    checkpoint_minutes: float = flag(5.0, "minutes between checkpoints (0: after every mask update)")


# Paper, section "Experimental settings", and the published code's scripts; weight decay 0.01 is what took effect there.
CIFAR = dict(
    image_size=32, patch_size=2, width=768, depth=12, heads=12, decoder_width=512, decoder_depth=8, decoder_heads=16,
    masking_network="mlp", masking_width=512, mask_noise=0.0, mask_start=0.0, mask_lr=0.05, head_norm="layer", epochs=200,
    batch_size=128, labelled_batch_size=128, level1_steps=2, head_steps=1, lr=1e-4, head_lr=1e-3, weight_decay=0.01, warmup=0.0,
)  # fmt: skip
IMAGENET = CIFAR | dict(
    data="imagenet", image_size=224, patch_size=16, epochs=50, batch_size=256, labelled_batch_size=256, lr=1.5e-4, head_lr=5e-4,
    weight_decay=0.05, workers=8,
)  # fmt: skip
PRESETS = {
    "shapes": {},
    "cifar10": CIFAR | dict(data="cifar10"),
    "cifar100": CIFAR | dict(data="cifar100"),
    "cifar100-paper": CIFAR | dict(  # as published, noise included
        data="cifar100", masking_input="embeddings", hypergradient="finite-difference", redraw_dropout=True,
        update_jacobian="identity"),  # fmt: skip
    "imagenet": IMAGENET,
    "imagenet-large": IMAGENET | dict(width=1024, depth=24, heads=16),
}
# What may change when a run is resumed, since the result does not depend on it.
MACHINE_FIELDS = {"data_dir", "device", "workers", "checkpoint_minutes", "accumulate", "checkpoint_activations"}
MAX_WEIGHTS = 2**31  # of a model; a damaged file must not ask for more


def check(cfg):
    """Raise RunError for a configuration that cannot run, naming the flag to change."""

    def need(condition, message):
        if not condition:
            raise RunError(message)

    for name in ("width", "decoder_width"):
        heads = getattr(cfg, name.replace("width", "heads"))
        flags = f"--{name.replace('_', '-')} {getattr(cfg, name)}"
        need(heads > 0 and getattr(cfg, name) % heads == 0, f"{flags} is not a multiple of its {heads} heads")
        need(getattr(cfg, name) % 4 == 0, f"{flags} is not a multiple of 4, which sin-cos positions need")
    for name in ("patch_size", "width", "depth", "decoder_width", "decoder_depth", "masking_width", "epochs",
                 "batch_size", "labelled_batch_size", "accumulate", "level1_steps", "head_steps", "log_every",
                 "parts", "parts_steps"):  # fmt: skip
        most = 1000 if "depth" in name else 65536  # a damaged file must not ask for all of the memory
        need(1 <= getattr(cfg, name) <= most, f"--{name.replace('_', '-')} must be at least 1 and at most {most}")
    for name in ("lr", "head_lr", "mask_lr", "mask_noise", "weight_decay", "checkpoint_minutes", "images", "workers", "seed",
                 "uniformity"):  # fmt: skip
        value = getattr(cfg, name)
        need(value >= 0 and math.isfinite(value), f"--{name.replace('_', '-')} must not be negative")
    need(cfg.seed < 2**63 and cfg.workers <= 1024, "--seed must be below 2^63, and --workers at most 1024")
    for name in ("mask_ratio", "val_fraction"):
        need(0 < getattr(cfg, name) < 1, f"--{name.replace('_', '-')} must lie between 0 and 1")
    for name in ("warmup", "dropout", "mask_start"):
        need(0 <= getattr(cfg, name) < 1, f"--{name.replace('_', '-')} must be at least 0 and below 1")
    need(
        cfg.hypergradient != "finite-difference" or (cfg.unroll == "last" and cfg.head_steps == 1),
        "--hypergradient finite-difference, as published, goes with --unroll last and --head-steps 1",
    )
    need(
        cfg.hypergradient == "finite-difference" or not cfg.redraw_dropout,
        "--redraw-dropout goes with --hypergradient finite-difference alone",
    )
    need(
        cfg.hypergradient in ("exact", "first-order") or world() == cfg.accumulate == 1,
        f"--hypergradient {cfg.hypergradient} goes with one process and --accumulate 1",
    )
    need(
        not cfg.checkpoint_activations or cfg.hypergradient in ("exact", "first-order") and cfg.unroll == "last",
        "--checkpoint-activations goes with --hypergradient exact or first-order, and --unroll last",
    )
    parts = world() * cfg.accumulate
    need(
        cfg.batch_size % parts == 0 and cfg.labelled_batch_size % world() == 0,
        f"--batch-size {cfg.batch_size} and --labelled-batch-size {cfg.labelled_batch_size} do not divide evenly: the first "
        f"must be a multiple of {parts} (processes x --accumulate), the second of {world()} (processes)",
    )
    need(cfg.masking != "semantic" or cfg.parts_from, "--masking semantic learns parts on a pretrained encoder: "
         "give --parts-from RUN, for instance a run of --masking random")  # fmt: skip
    need(cfg.masking == "semantic" or not cfg.parts_from, "--parts-from goes with --masking semantic alone")
    need(cfg.parts >= 2, "--parts must be at least 2")
    need(cfg.masking != "learned" or cfg.masking_network == "mlp" or cfg.mask_noise > 0,
         "--masking-network shared starts with all p equal, so its first masks need --mask-noise above 0")  # fmt: skip
    need(cfg.uniformity == 0 or cfg.masking != "learned", "--uniformity goes with --masking random or semantic: "
         "the hypergradient of learned masks does not hold its derivatives")  # fmt: skip
    need(cfg.uniformity == 0 or cfg.batch_size >= 2, "--uniformity compares images: --batch-size must be at least 2")
    need(cfg.uniformity == 0 or world() == cfg.accumulate == 1, "--uniformity compares all images of a batch: "
         "it goes with one process and --accumulate 1")  # fmt: skip
    need(cfg.masking != "semantic" or world() == 1, "--masking semantic goes with one process")


# ----------------------------------------------------------------------------------------------------- networks
# Names and computation are those of timm's VisionTransformer and of facebookresearch/mae, so weights interchange.


def linear(x, weight, bias):
    """F.linear, which in forward mode multiplies by zeros where an argument has no tangent. Here those products are left
    out: a constant decoder then costs its jvp two thirds of what it otherwise would."""
    (x, dx), (weight, dweight), (bias, dbias) = map(fwAD.unpack_dual, (x, weight, bias))
    out = F.linear(x, weight, bias)
    if dx is None and dweight is None:
        return out
    tangents = [] if dx is None else [F.linear(dx, weight)]
    tangents += [] if dweight is None else [F.linear(x, dweight, dbias)]  # weight and bias move together or not at all
    return fwAD.make_dual(out, sum(tangents))


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

    def forward(self, x):  # [B, N, D]
        return self.proj(attention(self.qkv(x).unflatten(2, (3, self.heads, -1))))  # qkv: [B, N, 3, H, d]


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
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x, scale=None):  # [B, N, D], factors of the two branches [2, B, 1, 1] (None: 1)
        mixed = self.attn(self.norm1(x))
        x = x + (mixed if scale is None else scale[0] * mixed)
        widened = self.mlp(self.norm2(x))
        return x + (widened if scale is None else scale[1] * widened)


def through(blocks, x, recompute, scales=None):
    """x [B, N, D] through the blocks; with `recompute`, a block keeps its input alone for the backward pass.

    scales [depth, 2, B, 1, 1]: factors of the blocks' branches (None: 1)."""
    for block, scale in zip(blocks, [None] * len(blocks) if scales is None else scales):
        if recompute and torch.is_grad_enabled():
            # Its parameters are arguments, since `call` has taken them out of the module by the time of the backward pass.
            x = recomputed(functional_call, block, dict(block.named_parameters()), (x, scale), use_reentrant=False)
        else:
            x = block(x, scale)
    return x


class Encoder(nn.Module):
    """ViT that sees the visible patches alone (MAE, section 3), or all of them."""

    recompute = False  # --checkpoint-activations

    def __init__(self, image_size, patch, channels, width, depth, heads):
        super().__init__()
        self.patch = patch
        self.patch_embed = PatchEmbed(patch, channels, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(sincos_positions(width, image_size // patch))  # [1, 1+L, D]
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.blocks.apply(initialise_linear)

    def forward(self, images, keep=None, scales=None):
        """[B, C, H, W] and the visible patches [B, K] (None: all L) -> tokens [B, 1+K, D], CLS first.

        scales [depth, 2, B, 1, 1] are factors of the residual branches: fine-tuning's drop path (None: 1)."""
        x = self.patch_embed(gather_patches(images, keep, self.patch))  # [B, K, D]
        positions = self.pos_embed[:, 1:]  # [1, L, D]
        x = x + (positions if keep is None else F.embedding(keep, positions[0]))  # indexing's gradient varies with threads
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1).to(x.dtype), x], dim=1)  # [B, 1+K, D]
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
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = Linear(width, patch * patch * channels)
        self.apply(initialise_linear)

    def forward(self, tokens, restore):
        """[B, 1+K, D] and each patch's place in the shuffled order [B, L] -> pixels [B, L, p*p*C]."""
        x = self.decoder_embed(tokens)
        x = scatter_tokens(x, self.mask_token, self.decoder_pos_embed, restore)  # [B, 1+L, D]
        x = through(self.decoder_blocks, x, self.recompute)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


class BatchStandardise(nn.Module):
    """Mean 0 and variance 1 for each feature over the batch, as MAE's linear probe has it: BatchNorm without affine."""

    def forward(self, features):  # [B, D]
        return F.batch_norm(features, None, None, training=True)


class Head(nn.Module):
    """Norm, dropout, linear, on the CLS token (published code). Dropout is an argument: see `draw_dropout`."""

    def __init__(self, width, classes, norm):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm == "layer" else BatchStandardise()
        self.fc = nn.Linear(width, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features, dropout=1.0):  # [B, D], [B, D] -> [B, classes]
        return self.fc(self.norm(features) * dropout)


class MaskingNetwork(nn.Module):
    """T: two linear layers on the whole image, one logit a patch (paper, section 3).

    Each image is standardised and each layer starts with variance 1/fan-in, so the first logits have a spread of
    about one half around 0 and follow the image: no patch starts saturated, and masks differ between images.
    """

    def __init__(self, inputs, width, patches):
        super().__init__()
        self.fc1 = nn.Linear(inputs, width)
        self.fc2 = nn.Linear(width, patches)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x):  # [B, C, H, W] -> p [B, L]
        x = x.flatten(1)
        return self.fc2(F.relu(self.fc1(F.layer_norm(x, x.shape[1:])))).sigmoid()


class SharedMaskingNetwork(nn.Module):
    """T as one small network for every position: it reads a patch and the eight around it. Each image then gives it as
    many examples as it has patches, where the paper's T learns every position by itself.

    An image's logits have mean 0, since only comparing its patches matters: AdamW makes level 1 blind to a common
    factor of p. The last layer starts at 0: p = 1/2 throughout, which is MAE's loss.
    """

    def __init__(self, channels, patch, width):
        super().__init__()
        self.window = nn.Conv2d(channels, width, 3 * patch, stride=patch, padding=patch)
        self.fc = nn.Conv2d(width, 1, 1, bias=False)
        nn.init.normal_(self.window.weight, std=self.window.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.window.bias)
        nn.init.zeros_(self.fc.weight)

    def forward(self, x):  # [B, C, H, W] -> p [B, L]
        logits = self.fc(F.gelu(self.window(F.layer_norm(x, x.shape[1:])))).flatten(1)
        return (logits - logits.mean(1, keepdim=True)).sigmoid()


def initialise_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def sincos_positions(width, grid):
    """Two-dimensional sin-cos positions [1, 1+grid*grid, width], column half first; zeros for CLS (MAE)."""
    frequency = 10000.0 ** -(torch.arange(width // 4) / (width // 4))  # [D/4]
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (column, row)]  # each [L, D/4]
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)  # [L, D]
    return torch.cat([torch.zeros(1, width), table])[None]


# Each level's parameters are ONE vector, so that an optimiser step, its Jacobian and a direction in parameter space
# are one line each, as in the equations. Modules keep the architecture alone; `call` runs one with a given vector.


@dataclass
class Networks:
    """The four architectures (parameters on the meta device) and what depends on them alone."""

    cfg: Config
    encoder: nn.Module
    decoder: nn.Module
    head: nn.Module
    masking: nn.Module
    parts: "Parts | None" = None  # for --masking semantic

    @property
    def patches(self):  # L
        return self.encoder.pos_embed.shape[1] - 1

    @property
    def visible(self):  # K, rounded as MAE rounds it
        return int(self.patches * (1 - self.cfg.mask_ratio))

    @property
    def encoder_size(self):  # where E ends and D begins in theta
        return sum(p.numel() for p in self.encoder.parameters())


def unflatten(module, params):
    """The vector `params` [P] as {name: view}, in the order of `module.named_parameters()`."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    pieces = params.split([shape.numel() for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces)}


def call(module, params, *args):
    """`module(*args)` with its parameters taken from the vector `params` [P]; differentiable in it to any order."""
    return functional_call(module, unflatten(module, params), args)


def build(cfg, image_size, channels, classes):
    """Networks, and their initial parameters (theta [P1], phi [P2], psi [P3]); the encoder's depend on the seed alone.

    Raises RunError where the sizes do not fit."""
    if image_size % cfg.patch_size:
        raise RunError(f"images of {image_size} pixels do not divide into patches of {cfg.patch_size}; "
                       f"choose another --patch-size or --image-size")  # fmt: skip
    patches = (image_size // cfg.patch_size) ** 2
    if not 0 < int(patches * (1 - cfg.mask_ratio)) < patches:
        raise RunError(f"--mask-ratio {cfg.mask_ratio} of {patches} patches leaves none visible or none hidden")
    # What T reads: its channels, the pixels of a patch along a side, and how many values one hidden unit sees.
    seen, cell = (channels, cfg.patch_size) if cfg.masking_input == "pixels" else (cfg.width, 1)
    inputs = seen * cell**2 * (9 if cfg.masking_network == "shared" else patches)
    weights = (12 * (cfg.depth * cfg.width**2 + cfg.decoder_depth * cfg.decoder_width**2) + inputs * cfg.masking_width
               + (patches + channels * cfg.patch_size**2) * (cfg.width + cfg.decoder_width + cfg.masking_width))  # fmt: skip
    if weights > MAX_WEIGHTS:
        raise RunError(f"a model of {weights:.1e} weights is too large; lower --width, --depth or --masking-width")
    torch.manual_seed(cfg.seed)
    encoder = Encoder(image_size, cfg.patch_size, channels, cfg.width, cfg.depth, cfg.heads)
    decoder = Decoder(image_size, cfg.patch_size, channels, cfg.width, cfg.decoder_width, cfg.decoder_depth,
                      cfg.decoder_heads)  # fmt: skip
    encoder.recompute = decoder.recompute = cfg.checkpoint_activations
    head = Head(cfg.width, classes, cfg.head_norm)
    if cfg.masking_network == "shared":
        masking = SharedMaskingNetwork(seen, cell, cfg.masking_width)
    else:
        masking = MaskingNetwork(inputs, cfg.masking_width, patches)
    theta = torch.cat([parameters_to_vector(net.parameters()) for net in (encoder, decoder)]).detach()
    phi, psi = (parameters_to_vector(net.parameters()).detach() for net in (head, masking))
    return Networks(cfg, *(net.to("meta") for net in (encoder, decoder, head, masking))), (theta, phi, psi)


def starting_weights(net, theta_params, path):
    """theta [P1] with the weights found in `path` (a run's folder, or a public .pth or .safetensors) in their places. The
    encoder must be there whole; a decoder that is absent or of another shape keeps its values of `theta_params`, which
    may also cover the encoder alone.

    Prints what was used, one line on stderr. Raises interchange.WeightsError, or RunError where a run has other heads."""
    path = Path(path)
    pieces = zip((net.encoder, net.decoder), theta_params.tensor_split([net.encoder_size]))
    fresh = {name: tensor for module, params in pieces if len(params) for name, tensor in unflatten(module, params).items()}
    weights = interchange.read_weights(path / "checkpoint.pt" if path.is_dir() else path)
    taken, report = interchange.fit(weights, {name: tuple(tensor.shape) for name, tensor in fresh.items()})
    if path.is_dir():  # heads leave no trace in the weights' shapes, but a run records them
        settings = read_config(path / "config.json")
        for name, used in (("heads", True), ("decoder_heads", "decoder_pred.weight" in taken)):
            if used and settings[name] != getattr(net.cfg, name):
                raise RunError(f"{path} was trained with --{name.replace('_', '-')} {settings[name]}, "
                               f"not {getattr(net.cfg, name)}; give that flag")  # fmt: skip
    print(f"{path}: {report.line}", file=sys.stderr)
    return torch.cat([taken.get(name, tensor).to(tensor).reshape(-1) for name, tensor in fresh.items()])


# --------------------------------------------------------------------------------- masks and the three losses


def generator(*keys):
    """A CPU generator that depends on its keys alone: all randomness is a function of (seed, purpose, step), so that
    a resumed run needs no generator state and every device draws the same numbers."""
    state = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


MASKS, DROPOUT, REDRAWN, LEVEL1_DATA, LEVEL2_DATA, LEVEL3_DATA, PARTS = range(7)  # purposes


def masking_probability(net, psi, images, encoder_params):
    """p of (1), [B, L]: how much T wants each patch hidden. With the embeddings as input, E is held constant."""
    if net.cfg.masking_input == "pixels":
        inputs = images
    else:
        embedding = {name: piece.detach() for name, piece in unflatten(net.encoder, encoder_params).items()}
        proj = {name.removeprefix("patch_embed."): piece for name, piece in embedding.items() if "patch_embed" in name}
        patches = gather_patches(images, None, net.cfg.patch_size)
        inputs = functional_call(net.encoder.patch_embed, proj, (patches,)) + embedding["pos_embed"][:, 1:]  # [B, L, D]
        inputs = inputs.mT.unflatten(2, (int(net.patches**0.5), -1))  # [B, D, H/p, W/p]
    return call(net.masking, psi, inputs)


def autocast(net, device):
    """bfloat16 for encoder and decoder where asked for; T, the head and every loss stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=net.cfg.precision == "bf16")


def patch_errors(net, encoder_params, decoder_params, batch):
    """l of (2), [B, L]: mean squared error of each hidden patch's normalised pixels, 0 where the patch is visible."""
    return errors_and_features(net, encoder_params, decoder_params, batch)[0]


def errors_and_features(net, encoder_params, decoder_params, batch):
    """l of (2), [B, L], and the CLS tokens of the masked images [B, D], which U-MAE's term compares."""
    with autocast(net, batch.images.device):
        tokens = call(net.encoder, encoder_params, batch.images, batch.keep)  # [B, 1+K, D]
        pred = call(net.decoder, decoder_params, tokens, batch.restore)  # [B, L, p*p*C]
    return patch_loss(pred, batch.images, batch.mask), tokens[:, 0].to(encoder_params.dtype)


def level1_loss(prob, mask, errors):
    """L1 of (2), a scalar. Linear in `errors`, which (10) relies on."""
    return (mask * prob * errors).sum() / mask.sum()


def encode(net, encoder_params, images, pooling="cls"):
    """The features z of whole images, [B, D]: after the last norm, the CLS token, or the mean of the patches' tokens."""
    with autocast(net, images.device):
        tokens = call(net.encoder, encoder_params, images)
    return (tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)).to(encoder_params.dtype)


def encode_in_parts(net, encoder_params, images):
    """`encode`, with the activations of one of --accumulate parts held at a time: the backward pass makes them again."""
    if net.cfg.accumulate == 1:
        return encode(net, encoder_params, images)
    parts = images.chunk(net.cfg.accumulate)
    return torch.cat([recomputed(encode, net, encoder_params, part, use_reentrant=False) for part in parts])


def draw_dropout(rate, shape, *keys):
    """Inverted dropout as a factor, 0 or 1/(1-rate). An explicit tensor, so that a loss is a function of its arguments
    and differences between two of its values are differences of parameters, not of dropout."""
    return (torch.rand(shape, generator=generator(*keys)) >= rate).float() / (1 - rate)


# --------------------------------------------------------------------------------------- SemMAE's parts (a baseline)


class Parts(NamedTuple):
    """What gives each patch its part: a pretrained encoder that no longer changes, and what was learned on it."""

    encoder: nn.Module
    learner: baselines.PartLearner


def part_ids(net, images):
    """The part of each patch, [B, L] int64."""
    return net.parts.learner.maps(frozen_tokens(net, net.parts.encoder, images)).argmax(1)


@torch.no_grad()
def frozen_tokens(net, encoder, images):
    """Tokens [B, 1+L, D] of whole images, CLS first."""
    with autocast(net, images.device):
        return encoder(images).float()


def learned_parts(net, splits, device):
    """Parts, learned on the encoder of --parts-from and on the training images as level 1 sees them.

    Raises RunError where that encoder does not see these images in these patches, SystemExit where a signal stops it."""
    cfg = net.cfg
    path = Path(cfg.parts_from)
    encoder = frozen_encoder(cfg, splits, path / "checkpoint.pt" if path.is_dir() else path).to(device)
    seed = generator(cfg.seed, PARTS).initial_seed()
    torch.manual_seed(seed)
    learner = baselines.PartLearner(encoder.pos_embed.shape[2], cfg.parts, splits.channels * cfg.patch_size**2)

    def examples(stop):
        for batch in splits.train.stream(cfg.batch_size, seed):
            if stop:
                return
            yield frozen_tokens(net, encoder, batch.images), gather_patches(batch.images, None, cfg.patch_size)

    with stop_signals() as stop:
        learner = baselines.learn_parts(learner.to(device), examples(stop), cfg.parts_steps)
    if stop:
        print("stopped while parts were learned; start again", file=sys.stderr)
        raise SystemExit(128 + stop[0])
    return Parts(encoder, learner)


# ------------------------------------------------------------------------------------ the AdamW step and its pullback

BETA1, BETA2, EPS = 0.9, 0.95, 1e-8  # paper, all levels
TINY = 1e-36  # floor of the second moment: below it sqrt has no useful derivative, and the step is 0 anyway


class Level(NamedTuple):
    """What one level learns, and AdamW's memory of it."""

    params: Tensor  # [P]
    m: Tensor  # [P] first moment
    v: Tensor  # [P] second moment
    t: int  # steps made


class Rates(NamedTuple):
    """What AdamW needs beside the gradient."""

    lr: float | Tensor  # learning rate, or one a parameter [P]
    decay: Tensor  # [P] weight decay of each parameter
    eps: float = EPS


def adamw(level, gradient, rates, jacobian="adamw"):
    """One AdamW step, equation (11): Level -> Level. A pure function, used for training and differentiated as it is.

    jacobian="identity" keeps AdamW's value but gives it the derivative dtheta'/dg = -1: the published method, which
    replaces each best response's inverse Hessian by the identity.
    """
    t = level.t + 1
    m = BETA1 * level.m + (1 - BETA1) * gradient
    v = BETA2 * level.v + (1 - BETA2) * gradient.square()
    root = (v / (1 - BETA2**t)).clamp_min(TINY).sqrt()
    step = rates.lr * (m / (1 - BETA1**t)) / (root + rates.eps)
    if jacobian == "identity":
        step, m, v = step.detach() + gradient - gradient.detach(), m.detach(), v.detach()
    return Level((1 - rates.lr * rates.decay) * level.params - step, m, v, t)


def adamw_pullback(level, gradient, rates, jacobian, cotangent):
    """Carry a cotangent of AdamW's result (theta', m', v') back to its arguments (theta, m, v) and g: equation (8).

    Each element is on its own, so `cotangent` may cover the leading n of P parameters only.
    Returns ((of theta, of m, of v), of g), each [n]."""
    n = len(cotangent[0])

    def step(params, m, v, gradient):
        return tuple(adamw(Level(params, m, v, level.t), gradient, Rates(rates.lr, rates.decay[:n]), jacobian)[:3])

    *back, c = vjp(step, level.params[:n], level.m[:n], level.v[:n], gradient[:n])[1](tuple(cotangent))
    return tuple(back), c


def of_params(cotangent):
    """The cotangent of (theta', m', v') of a loss that sees theta' alone."""
    return cotangent, torch.zeros_like(cotangent), torch.zeros_like(cotangent)


# -------------------------------------------------------------------------------------------------- hypergradient


class Step(NamedTuple):
    """One level-1 step as it was made: all that differentiating it takes."""

    theta: Level  # before the step
    gradient: Tensor  # g1 [P]
    rates: Rates
    images: Tensor  # [B, C, H, W]
    keep: Tensor  # [B, K] visible patches
    restore: Tensor  # [B, L] each patch's place in the shuffled order
    mask: Tensor  # [B, L] 1 = hidden


def parts_of(net, step):
    """A Step's batch in --accumulate parts of the same size, as Steps."""
    pieces = zip(*(tensor.chunk(net.cfg.accumulate) for tensor in (step.images, step.keep, step.restore, step.mask)))
    return [Step(step.theta, step.gradient, step.rates, *piece) for piece in pieces]


class Labelled(NamedTuple):
    """What levels 2 and 3 see in one outer iteration: this process's images, and the rest for those of all processes."""

    images2: Tensor  # [B / processes, C, H, W] training images
    labels2: Tensor  # [B]
    images3: Tensor  # [B / processes, C, H, W] validation images
    labels3: Tensor  # [B]
    dropout: Tensor  # [head_steps, B, D] factors of level 2's dropout
    redrawn: Tensor  # [2, B, D] fresh ones, for finite differences as published
    rates: Rates  # of the head


class Result(NamedTuple):
    hypergradient: Tensor  # dL3/dpsi [P3]
    head: Level  # phi' of (5)
    level2_loss: Tensor
    level3_loss: Tensor


def level2_loss(net, head_params, features, labels, dropout):
    """L2 of (4)."""
    return F.cross_entropy(call(net.head, head_params, features, dropout), labels)


def level3_loss(net, head_params, features, labels):
    """L3 of (6); as every evaluation, without dropout."""
    return F.cross_entropy(call(net.head, head_params, features), labels)


def upper_levels(net, encoder_params, head, given, through_head=True):
    """Levels 2 and 3 as one function of E': (4), (5), (6), with the head's steps differentiable.

    through_head=False holds phi' constant: L3 then sees E' through its own features alone.
    Returns L3, phi', and L2 before the first head step."""
    images = torch.cat([given.images2, given.images3])
    features = encode_in_parts(net, encoder_params, images).split([len(given.images2), len(given.images3)])
    features2, features3 = map(gather, features)  # the head is small: every process has it see the whole batch
    features2 = features2 if through_head else features2.detach()
    head, losses = head._replace(params=head.params.detach().requires_grad_()), []
    for dropout in given.dropout:
        losses.append(level2_loss(net, head.params, features2, given.labels2, dropout))  # (4)
        (gradient,) = torch.autograd.grad(losses[-1], head.params, create_graph=True)
        head = adamw(head, gradient, given.rates, net.cfg.update_jacobian)  # (5)
    return level3_loss(net, head.params, features3, given.labels3), head, losses[0]  # (6)


def exact(net, theta, psi, head, given, steps, through_head=True):
    """The hypergradient by one backward through the encoder and one jvp through the autoencoder, (7) to (10).

    theta: Level after the level-1 steps; psi [P3]; head: Level before level 2; given: Labelled; steps: the level-1
    steps to differentiate, in order. Returns a Result. The forms below take and return the same."""
    split, jacobian = net.encoder_size, net.cfg.update_jacobian
    encoder_params = theta.params[:split].detach().requires_grad_()
    loss3, head, loss2 = upper_levels(net, encoder_params, head, given, through_head)
    v = summed(torch.autograd.grad(loss3, encoder_params)[0])  # (7): D has no part in L3, so v covers E alone
    cotangent, hypergradient = of_params(v), torch.zeros_like(psi)
    for number, step in reversed(list(enumerate(steps))):
        cotangent, c = adamw_pullback(step.theta, step.gradient, step.rates, jacobian, cotangent)  # (8)
        wanted = psi.detach().requires_grad_()
        prob = masking_probability(net, wanted, step.images, step.theta.params[:split])
        if number == 0:
            d = directional_errors(net, step, c)  # (9)
        else:  # the steps before moved D as well, and through g1 L3 sees that: from here on (E, D) count
            of_theta, *of_moments = (F.pad(part, (0, len(step.theta.params) - len(c))) for part in cotangent)
            d, hessian_c = errors_and_hessian(net, step, prob.detach(), F.pad(c, (0, len(of_theta) - len(c))))  # (9)
            cotangent = (of_theta + hessian_c, *of_moments)  # (13)
        hypergradient += torch.autograd.grad(level1_loss(prob, step.mask, d), wanted)[0]  # (10)
    return Result(average(hypergradient), detached(head), loss2.detach(), loss3.detach())


def directional_errors(net, step, direction):
    """d of (9), [B, L]: the derivative of each patch's error along `direction` [n], which covers the leading n
    parameters of theta; the rest, if any, is constant."""
    params, split, n = step.theta.params, net.encoder_size, len(direction)

    def errors(part):
        return lambda moving: patch_errors(net, moving[:split], (moving if n > split else params)[split:], part)

    with torch.no_grad():
        return torch.cat([jvp(errors(part), (params[:n],), (direction,))[1] for part in parts_of(net, step)])


def errors_and_hessian(net, step, prob, direction):
    """d of (9), [B, L], and H c of (13), [P]: how errors and dL1/dtheta change along `direction` [P], in one pass."""

    def loss(params, part, prob):
        errors = patch_errors(net, params[: net.encoder_size], params[net.encoder_size :], part)
        return level1_loss(prob, part.mask, errors) / net.cfg.accumulate, errors

    parts, hessian_c, d = zip(parts_of(net, step), prob.chunk(net.cfg.accumulate)), torch.zeros_like(direction), []
    with kernels.use("reference"), torch.no_grad():  # the plain operations have derivatives of every order
        for part in parts:
            gradient = grad(lambda params: loss(params, *part), has_aux=True)
            of_gradient, of_errors = jvp(gradient, (step.theta.params,), (direction,))[1]
            hessian_c += of_gradient
            d.append(of_errors)
    return torch.cat(d), average(hessian_c)


def first_order(net, theta, psi, head, given, steps):
    """`exact` without the second derivative at level 2: T hears of the validation images only through E."""
    return exact(net, theta, psi, head, given, steps, through_head=False)


def unrolled(net, theta, psi, head, given, steps):
    """The hypergradient by autograd through the steps themselves: the judge of the other two, at the price of keeping
    the graph of every gradient. `theta` is not used: the steps are made again."""
    psi = psi.detach().requires_grad_()
    theta = steps[0].theta._replace(params=steps[0].theta.params.detach().requires_grad_())
    with kernels.use("reference"):  # the plain operations have derivatives of every order
        for step in steps:
            encoder_params, decoder_params = theta.params.tensor_split([net.encoder_size])
            prob = masking_probability(net, psi, step.images, encoder_params)  # (1)
            loss1 = level1_loss(prob, step.mask, patch_errors(net, encoder_params, decoder_params, step))  # (2)
            (gradient,) = torch.autograd.grad(loss1, theta.params, create_graph=True)
            theta = adamw(theta, gradient, step.rates, net.cfg.update_jacobian)  # (3)
        loss3, head, loss2 = upper_levels(net, theta.params[: net.encoder_size], head, given)  # (4) to (6)
        (hypergradient,) = torch.autograd.grad(loss3, psi)
    return Result(hypergradient, detached(head), loss2.detach(), loss3.detach())


def finite_difference(net, theta, psi, head, given, steps):
    """The hypergradient by central differences of width 0.01/|direction|, one for each of the two steps, as published.
    With cfg.redraw_dropout the two evaluations of level 2 see different dropout, as in the published code."""
    jacobian, split, step = net.cfg.update_jacobian, net.encoder_size, steps[-1]
    encoder_params = theta.params[:split].detach().requires_grad_()
    before, phi = head, head.params.detach().requires_grad_()
    features2 = encode(net, encoder_params.detach(), given.images2)
    loss2 = level2_loss(net, phi, features2, given.labels2, given.dropout[0])  # (4)
    (gradient2,) = torch.autograd.grad(loss2, phi)
    head = adamw(before, gradient2, given.rates)  # (5)
    phi = head.params.detach().requires_grad_()
    loss3 = level3_loss(net, phi, encode(net, encoder_params, given.images3), given.labels3)  # (6)
    v, u = torch.autograd.grad(loss3, (encoder_params, phi))

    # dL3/dphi' reaches E' through g2: the difference quotient of dL2/dE' along the head's direction c2
    c2 = adamw_pullback(before, gradient2, given.rates, jacobian, of_params(u))[1]
    dropouts = iter(given.redrawn if net.cfg.redraw_dropout else given.dropout.expand(2, -1, -1))

    def level2_gradient(head_params):
        features = encode(net, encoder_params, given.images2)
        loss = level2_loss(net, head_params, features, given.labels2, next(dropouts))
        return torch.autograd.grad(loss, encoder_params)[0]

    v = v + central_difference(level2_gradient, before.params, c2)  # (7)
    c = adamw_pullback(step.theta, step.gradient, step.rates, jacobian, of_params(v))[1]  # (8)
    encoder_before, decoder_before = step.theta.params.tensor_split([split])
    with torch.no_grad():
        d = central_difference(lambda params: patch_errors(net, params, decoder_before, step), encoder_before, c)  # (9)
    psi = psi.detach().requires_grad_()
    prob = masking_probability(net, psi, step.images, encoder_before)
    (hypergradient,) = torch.autograd.grad(level1_loss(prob, step.mask, d), psi)  # (10)
    return Result(hypergradient, head, loss2.detach(), loss3.detach())


def central_difference(function, params, direction):
    """The derivative of `function` at `params` along `direction`, from two evaluations 0.02 apart (published alpha)."""
    width = 0.01 / direction.norm().clamp_min(TINY)
    return (function(params + width * direction) - function(params - width * direction)) / (2 * width)


def detached(level):
    return Level(level.params.detach(), level.m.detach(), level.v.detach(), level.t)


HYPERGRADIENTS = {
    "exact": exact,
    "unrolled": unrolled,
    "finite-difference": finite_difference,
    "first-order": first_order,
}


# -------------------------------------------------------------------------------------------------- training


@dataclass
class State:
    """Everything that changes in a run; a checkpoint holds just this."""

    iteration: int  # outer iterations (mask updates) made
    theta: Level
    head: Level
    psi: Level


def as_first(state):
    """The State of process 0, which alone reads a run's folder."""
    levels = (state.theta, state.head, state.psi)
    counts = torch.tensor([state.iteration, *(level.t for level in levels)])
    from_first([counts, *(tensor for level in levels for tensor in level[:3])])
    iteration, *steps = counts.tolist()
    return State(iteration, *(level._replace(t=t) for level, t in zip(levels, steps)))


def fresh_level(params, device):
    return Level(params.to(device), torch.zeros_like(params, device=device), torch.zeros_like(params, device=device), 0)


def decays(name, parameter):
    """Whether weight decay acts on a parameter: not on biases, norms, tokens and positions."""
    return name.endswith("weight") and parameter.ndim >= 2


def decay_of(cfg, *modules):
    """Weight decay of each parameter, [P]."""
    named = [pair for module in modules for pair in module.named_parameters()]
    return torch.cat([torch.full((p.numel(),), cfg.weight_decay if decays(name, p) else 0.0) for name, p in named])


def level_decays(net, device="cpu"):
    """Weight decay vectors of the three levels, [P1], [P2] and [P3]."""
    return [decay_of(net.cfg, *modules).to(device) for modules in ((net.encoder, net.decoder), (net.head,), (net.masking,))]


def inverse_fan_in(module):
    """1/fan-in for each weight, 1 for each bias, [P]: AdamW moves every weight by about its learning rate, and a unit
    that sums fan-in of them by fan-in times that; this scale makes --mask-lr the most a unit moves in one step."""
    scales = [torch.full((p.numel(),), 1 / p[0].numel() if p.ndim > 1 else 1.0) for p in module.parameters()]
    return torch.cat(scales)


def schedule(step, total, warmup):
    """Share of the peak learning rate at `step` of `total`: linear warmup over `warmup` steps, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def learned_by(cfg, progress):
    """Whether T chooses the masks, and is trained, at this share of the run."""
    return cfg.masking == "learned" and progress >= cfg.mask_start


def draw_masks(net, psi, images, encoder_params, *keys, progress=1.0):
    """p [B, L], and the choice that follows from it (1): visible ids [B, K], restore ids [B, L], mask [B, L].

    With --masking random, and before --mask-start, p is 1 and the choice is uniform: L1 is then MAE's loss. With semantic,
    p is 1 and the choice is SemMAE's. `progress` is the share of the run that is done."""
    cfg, joined = net.cfg, world() * len(images)  # random numbers must not depend on the number of processes
    uniform = torch.rand(joined, net.patches, generator=generator(*keys))[share(joined)].to(images.device)
    prob = torch.ones_like(uniform)
    if cfg.masking == "semantic":
        rng, hidden = generator(*keys), net.patches - net.visible
        score = baselines.semantic_scores(part_ids(net, images), cfg.parts, progress, hidden, rng)
    elif learned_by(cfg, progress):
        score = prob = masking_probability(net, psi, images, encoder_params)
        if cfg.mask_noise:  # the highest of logit + Gumbel noise are a draw without replacement, each patch by its odds
            gumbel = -(-uniform.clamp(1e-9, 1 - 1e-7).to(prob).log()).log()
            score = prob.logit(1e-6) + cfg.mask_noise * gumbel
    else:
        score = uniform
    return prob, *select_patches(score, net.visible)


def level1_step(net, theta, psi, images, rates, *keys, progress=1.0):
    """One AdamW step of encoder and decoder under T's masks: (1), (2), (3).

    Returns theta' (Level), the Step that was made, and of this process's images L1 and the mean unweighted error of the
    hidden patches. Every image hides as many patches, so L1 is the mean over parts of a batch, as is its gradient."""
    with torch.no_grad():
        prob, *choice = draw_masks(net, psi, images, theta.params[: net.encoder_size], *keys, progress=progress)  # (1)
    step = Step(theta, None, rates, images, *choice)
    params = theta.params.detach().requires_grad_()
    gradient, losses = torch.zeros_like(params), []
    for part, some in zip(parts_of(net, step), prob.chunk(net.cfg.accumulate)):
        errors, features = errors_and_features(net, params[: net.encoder_size], params[net.encoder_size :], part)
        loss = level1_loss(some, part.mask, errors)  # (2)
        if net.cfg.uniformity:
            loss = loss + net.cfg.uniformity * baselines.uniformity(features)
        gradient += torch.autograd.grad(loss / net.cfg.accumulate, params)[0]
        losses.append((loss.detach(), errors.detach().sum() / part.mask.sum()))
    gradient = average(gradient)
    loss, error = (sum(column) / len(column) for column in zip(*losses))
    return adamw(theta, gradient, rates), step._replace(gradient=gradient), loss, error  # (3)


def outer_iteration(net, state, batches, total, decay, mask_rate):
    """N level-1 steps, then (if masks are learned) K head steps and one step of T.

    batches: iterators of data.Batch for levels 1, 2, 3; total: outer iterations of the whole run; decay: weight decay
    vectors of the three levels; mask_rate: learning rate of each parameter of T relative to --mask-lr, [P3].
    Returns the next State and the iteration's losses, scalars on the device."""
    cfg, theta, head, psi, steps = net.cfg, state.theta, state.head, state.psi, []
    warmup, progress = cfg.warmup * total, state.iteration / total

    for n in range(cfg.level1_steps):
        number = state.iteration * cfg.level1_steps + n
        lr = cfg.lr * schedule(number, total * cfg.level1_steps, warmup * cfg.level1_steps)
        images = next(batches[0]).images
        if cfg.unroll == "last":
            steps.clear()
        keys = (cfg.seed, MASKS, number)
        theta, step, loss1, error = level1_step(net, theta, psi.params, images, Rates(lr, decay[0]), *keys, progress=progress)
        steps.append(step)
    losses = {"level1_loss": loss1, "reconstruction_error": error}

    if learned_by(cfg, progress):
        level2, level3 = next(batches[1]), next(batches[2])
        relative = schedule(state.iteration, total, warmup)
        dropout, redrawn = (
            draw_dropout(cfg.dropout, (count, cfg.labelled_batch_size, cfg.width), cfg.seed, purpose, state.iteration)
            for count, purpose in ((cfg.head_steps, DROPOUT), (2, REDRAWN))
        )
        given = Labelled(level2.images, gather(level2.labels), level3.images, gather(level3.labels),
                         dropout.to(images.device), redrawn.to(images.device), Rates(cfg.head_lr * relative, decay[1]))  # fmt: skip
        result = HYPERGRADIENTS[cfg.hypergradient](net, theta, psi.params, head, given, steps)
        head = result.head
        # The hypergradient's scale follows the levels below it; eps must stay below any of its elements.
        rates = Rates(cfg.mask_lr * relative * mask_rate, decay[2], eps=TINY**0.5)
        psi = adamw(psi, result.hypergradient, rates)
        losses |= {
            "level2_loss": result.level2_loss,
            "level3_loss": result.level3_loss,
            "hypergradient_norm": result.hypergradient.norm(),
        }
    return State(state.iteration + 1, theta, head, psi), losses


def pretrain(cfg, out, resume=False):
    """Pretrain, probe, and write the run's folder `out` (README, "A run"); with `resume`, continue what is there.

    Of several processes (see `join`) the first alone reads and writes the folder. Returns a summary (the command line's
    last line; None in the other processes). Raises RunError or data.DataError for what the user can mend, and SystemExit
    (130, 143) after a checkpoint where SIGINT or SIGTERM asked to stop."""
    check(cfg)
    device, writer, processes = choose_device(cfg.device), rank() == 0, world()
    checkpoint = find_checkpoint(cfg, out, resume) if writer else None
    splits = first_before_others(lambda: load_data(cfg, device))
    net, params = build(cfg, splits.image_size, splits.channels, len(splits.class_names))
    if cfg.init and writer and checkpoint is None:
        params = (starting_weights(net, params[0], cfg.init), *params[1:])
    if cfg.masking == "semantic":
        parts = out / "parts.pt"
        net.parts = learned_parts(net, splits, device) if checkpoint is None else read_parts(cfg, splits, parts, device)
    state = State(0, *(fresh_level(vector, device) for vector in params))
    if checkpoint is not None:
        state = restore(net, checkpoint, device)
    if writer:
        out.mkdir(parents=True, exist_ok=True)  # not before all that the user may have to mend
        claim(out)
        write_whole(out / "config.json", json.dumps(dataclasses.asdict(cfg), indent=2).encode())
        if cfg.masking == "semantic" and checkpoint is None:
            save_parts(net.parts, parts)
        for name in ("metrics.jsonl", "masks.jsonl"):
            truncate_metrics(out / name, state.iteration)
    state = as_first(state)

    decay, mask_rate = level_decays(net, device), inverse_fan_in(net.masking).to(device)
    total = mask_updates(cfg, splits)
    mask_steps = sum(learned_by(cfg, n / total) for n in range(min(state.iteration, total)))  # steps that T has made
    waited, exchanging[0] = [0.0], 0.0  # seconds that the loop has waited, since the last metrics line, for images and others
    batches = [
        timed(split.stream(size, generator(cfg.seed, purpose).initial_seed(), start=used, part=share(size)), waited)
        for split, size, purpose, used in (
            (splits.train, cfg.batch_size, LEVEL1_DATA, state.iteration * cfg.level1_steps),
            (splits.train, cfg.labelled_batch_size, LEVEL2_DATA, mask_steps),
            (splits.val, cfg.labelled_batch_size, LEVEL3_DATA, mask_steps),
        )
    ]
    watched = next(iter(splits.val.ordered(min(256, len(splits.val))))).images  # the same images at every evaluation
    objects = getattr(splits.val, "objects", None)
    objects = None if objects is None else objects[: len(watched)]

    stop, previous_mask, losses, window = 0, None, [], []  # losses still on the device, losses since the last metrics line
    looked = saved = logged = time.monotonic()
    bar = tqdm(total=total, initial=state.iteration, desc=f"{cfg.preset} {cfg.masking}", unit="update", mininterval=1,
               disable=not writer)  # fmt: skip
    with bar, stop_signals() as received:
        while state.iteration < total:
            state, new = outer_iteration(net, state, batches, total, decay, mask_rate)
            losses.append(new)
            bar.update()
            progress, epoch = state.iteration / total, state.iteration * cfg.batch_size * cfg.level1_steps / len(splits.train)
            snapshot = state.iteration * SNAPSHOTS // total > (state.iteration - 1) * SNAPSHOTS // total
            if writer and snapshot and learned_by(cfg, progress):
                record_masks(net, state, watched, epoch, out)
            now = time.monotonic()
            due = now - saved >= 60 * cfg.checkpoint_minutes or state.iteration == total
            look, due, stop = agree(now - looked > 1, due, received[0] if received else 0)
            line = state.iteration % cfg.log_every == 0 or state.iteration == total
            if not (due or line or look or stop):
                continue  # reading a loss waits for the device
            window += read_losses(net, losses, state, out)
            losses, looked = [], now
            elapsed = max(now - logged, 1e-9)
            speed = len(window) * cfg.batch_size * cfg.level1_steps / elapsed
            shown = {f"L{level}": f"{window[-1][f'level{level}_loss']:.3f}"
                     for level in (1, 2, 3) if f"level{level}_loss" in window[-1]}  # fmt: skip
            bar.set_postfix(shown | {"img/s": f"{speed:.0f}"})
            if line:
                means = {name: float(np.mean([row[name] for row in window if name in row])) for name in window[-1]}
                masks, previous_mask = mask_statistics(net, state, watched, objects, previous_mask, progress)
                row = {"iteration": state.iteration, "epoch": round(epoch, 3), **means, **masks,
                       "images_per_second": speed, "waiting_share": waited[0] / elapsed}  # fmt: skip
                if processes > 1:
                    row["exchange_share"] = exchanging[0] / elapsed
                if writer:
                    append_line(out / "metrics.jsonl", json.dumps(row))
                window, logged, waited[0], exchanging[0] = [], time.monotonic(), 0.0, 0.0
            if due or stop:
                if writer:
                    save_checkpoint(net, state, splits, out / "checkpoint.pt")
                saved = time.monotonic()
            if stop:
                break
    leave()
    if stop and state.iteration < total:
        if writer:
            print(f"stopped at update {state.iteration} of {total}; continue with --resume", file=sys.stderr)
        raise SystemExit(128 + stop)
    if not writer:
        return None

    summary = {"verb": "pretrain", "run": str(out), "updates": total, "processes": processes,
               **read_metrics(out / "metrics.jsonl")[-1]}  # fmt: skip
    summary["probe"] = linear_probe(net, state, splits)
    write_whole(out / "probe.json", json.dumps(summary["probe"]).encode())
    draw_run(net, state, splits, out)
    return summary


SNAPSHOTS, SHOWN = 10, 8  # times in a run at which p is recorded, and for how many images


@torch.no_grad()
def record_masks(net, state, images, epoch, out):
    """Add a line to masks.jsonl: p [B, L] of the first images, for the picture of masks over training."""
    p = masking_probability(net, state.psi.params, images[:SHOWN], state.theta.params[: net.encoder_size])
    row = {"iteration": state.iteration, "epoch": round(epoch, 3), "p": [[round(x, 3) for x in line] for line in p.tolist()]}
    append_line(out / "masks.jsonl", json.dumps(row))


def timed(stream, waited):
    """The items of a stream; adds the seconds that each was waited for to waited[0]."""
    while True:
        began = time.monotonic()
        item = next(stream)
        waited[0] += time.monotonic() - began
        yield item


def mask_updates(cfg, splits):
    """Outer iterations of a whole run."""
    return math.ceil(cfg.epochs * len(splits.train) / (cfg.batch_size * cfg.level1_steps))


def read_losses(net, losses, state, out):
    """A list of {name: scalar on the device} as floats, means over processes, in one transfer.

    Raises RunError at the first that is not finite."""
    values = iter(average(torch.stack([value for row in losses for value in row.values()])).tolist())
    rows = [{name: next(values) for name in row} for row in losses]
    for number, row in enumerate(rows):
        for name, value in row.items():
            if not math.isfinite(value):
                update = state.iteration - len(rows) + number + 1
                path = out / "checkpoint.pt"
                kept = f"{path} holds the last good state" if path.exists() else "there was no checkpoint yet"
                raise RunError(f"{name} is {value} at mask update {update} (level-1 step "
                               f"{update * net.cfg.level1_steps}); {kept}; lower --lr, --head-lr or --mask-lr")  # fmt: skip
    return rows


@contextlib.contextmanager
def stop_signals():
    """A list that the first SIGINT or SIGTERM fills, so that the iteration under way ends; a second one interrupts."""
    received = []

    def handler(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    former = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, function in former.items():
            signal.signal(number, function)


def choose_device(name):
    """torch.device for --device. Raises RunError where the machine does not have it."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available.get(name.split(":")[0], False):
        have = ", ".join(kind for kind, here in available.items() if here)
        raise RunError(f"--device {name} is not available here; this machine has: {have}")
    if world() > 1 and name not in ("cpu", "cuda"):
        raise RunError(f"--device {name} does not go with several processes; choose cpu or cuda (each its own GPU)")
    return torch.device(name)


def load_data(cfg, device):
    return data.load(
        cfg.data, cfg.data_dir, image_size=cfg.image_size, limit=cfg.images, val_fraction=cfg.val_fraction,
        seed=cfg.seed, skip_corrupt=cfg.skip_corrupt, workers=cfg.workers, device=device,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def mask_statistics(net, state, images, objects, previous_mask, progress=1.0):
    """How the masks of a fixed set of images stand, as {name: float}, and the masks [B, L] themselves, on the CPU.

    p_mean, p_std, p_entropy (bits): a saturated T has entropy 0. mask_churn: share of hidden patches that were visible
    at the last evaluation; a frozen T has 0. mask_overlap: share of hidden patches that two images have in common; by
    chance it is the mask ratio, and 1 where T ignores the image. object_hidden: how often a pixel of the object is
    hidden, as a ratio to chance (1 = T does not see objects); object_weight: p there, as a ratio to the mean of p. All
    dimensionless but the entropy."""
    prob, _, _, mask = draw_masks(net, state.psi.params, images, state.theta.params[: net.encoder_size],
                                  net.cfg.seed, MASKS, state.iteration, 1, progress=progress)  # fmt: skip
    prob, mask = prob.cpu(), mask.cpu()  # not every device has float64
    p = prob.double()
    entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / math.log(2)
    statistics = {"p_mean": p.mean(), "p_std": p.std(), "p_entropy": entropy.mean()}
    hidden = net.patches - net.visible
    if previous_mask is not None:
        statistics["mask_churn"] = (mask * (1 - previous_mask)).sum(1).mean() / hidden
    if len(mask) > 1:
        times = mask.double().sum(0)  # [L] images that hide each patch
        statistics["mask_overlap"] = (times * (times - 1)).sum() / (len(mask) * (len(mask) - 1) * hidden)
    if objects is not None:
        size = net.cfg.patch_size
        covered = rearrange(objects.cpu().float(), "b (h p) (w q) -> b (h w) (p q)", p=size, q=size).mean(-1)  # [B, L]
        statistics["object_hidden"] = (mask * covered).sum() / covered.sum() / (hidden / net.patches)
        statistics["object_weight"] = (prob * covered).sum() / covered.sum() / prob.mean()
    return {name: float(value) for name, value in statistics.items()}, mask


@torch.no_grad()
def features(net, state, split, pooling="cls"):
    """Features [N, D] of `encode` and labels [N] of a whole split, without augmentation, on the CPU."""
    encoder_params = state.theta.params[: net.encoder_size]
    pairs = [(encode(net, encoder_params, batch.images, pooling).cpu(), batch.labels.cpu()) for batch in split.ordered(256)]
    return (torch.cat(column) for column in zip(*pairs))


def linear_probe(net, state, splits, recipe="lbfgs", pooling="cls"):
    """Multinomial logistic regression on frozen features (levels 1 and 2's images train it); PROBES holds the recipes.

    Each recipe fits several probes; one is chosen on the validation split, and the test split is then read once.
    Returns {"test_accuracy", "val_accuracy": shares, and the name of what the probes differ in: its chosen value}."""
    differ_in, fit = PROBES[recipe]
    probes = fit(*features(net, state, splits.train, pooling), len(splits.class_names))

    def accuracy(probe, inputs, labels):
        return (probe(inputs).argmax(1) == labels).double().mean().item()

    val = tuple(features(net, state, splits.val, pooling))
    val_accuracy = {value: accuracy(probe, *val) for value, probe in probes.items()}
    best = max(val_accuracy, key=val_accuracy.get)
    test_accuracy = accuracy(probes[best], *features(net, state, splits.test, pooling))
    return {"test_accuracy": test_accuracy, "val_accuracy": val_accuracy[best], differ_in: best}


def lbfgs_probes(train, labels, classes):
    """L-BFGS on standardised features [N, D] and labels [N], to convergence: {weight decay: features -> logits}."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)

    def standardised(inputs):  # [N, D] -> [N, 1+D], with a constant for the bias
        return F.pad((inputs - mean) / std, (1, 0), value=1.0)

    def fit(weight_decay):
        weight = torch.zeros(1 + train.shape[1], classes, requires_grad=True)
        inputs = standardised(train)
        solver = torch.optim.LBFGS([weight], max_iter=100, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

        def objective():
            solver.zero_grad()
            loss = F.cross_entropy(inputs @ weight, labels) + 0.5 * weight_decay * weight[1:].square().sum()
            loss.backward()
            return loss

        solver.step(objective)
        weight = weight.detach()
        return lambda inputs: standardised(inputs) @ weight

    return {decay: fit(decay) for decay in (1e-4, 1e-3, 1e-2, 1e-1)}


def sgd_probes(train, labels, classes, epochs=90, warmup=10, batch_size=1024):
    """MAE's probe (arXiv 2111.06377) on features [N, D] and labels [N]: BatchNorm without affine, then linear;
    90 epochs, 10 of warmup, cosine, no weight decay: {learning rate: features -> logits}.

    Where MAE has LARS at one rate and batches of 16,384 cropped images, here SGD with momentum 0.9 has several rates."""
    rates = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
    scale, batch_size = torch.tensor(rates)[:, None, None], min(batch_size, len(labels))
    steps = epochs * len(labels) // batch_size
    norm = nn.BatchNorm1d(train.shape[1], affine=False, eps=1e-6)
    weight = torch.zeros(len(rates), 1 + train.shape[1], classes, requires_grad=True)  # the bias comes first
    velocity = torch.zeros_like(weight)

    def normed(inputs):  # [N, D] -> [N, 1+D], with a constant for the bias
        return F.pad(norm(inputs), (1, 0), value=1.0)

    for step, (_, indices) in zip(range(steps), data.index_batches(len(labels), batch_size, seed=0, start=0)):
        # All rates learn in one pass: their probes share no parameter, so the sum of their losses trains each alone.
        logits = normed(train[indices]) @ weight  # [R, B, classes]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[indices].repeat(len(rates)), reduction="sum") / batch_size
        velocity = 0.9 * velocity + torch.autograd.grad(loss, weight)[0]
        lr = schedule(step, steps, warmup * steps / epochs) * scale
        weight = (weight - lr * velocity).detach().requires_grad_()
    norm.eval()
    weight = weight.detach()

    def probe(number):
        return lambda inputs: normed(inputs) @ weight[number]

    return {rate: probe(number) for number, rate in enumerate(rates)}


PROBES = {"lbfgs": ("weight_decay", lbfgs_probes), "mae": ("learning_rate", sgd_probes)}


# --------------------------------------------------------------------------------------------------- pictures


def draw_run(net, state, splits, out):
    """Write all pictures of a run into its folder; returns their paths."""
    draw_images(net, state, splits, out / "masks.png")
    draw_curves(out)
    written = [out / "masks.png", out / "curves.png"]
    if (out / "masks.jsonl").exists():
        draw_masks_over_training(net, splits, out)
        written.append(out / "masks-over-training.png")
    return written


def draw_masks_over_training(net, splits, out):
    """Write masks-over-training.png from masks.jsonl: images, and below each p at points of the run, from T's first on."""
    from matplotlib.figure import Figure

    images = next(iter(splits.val.ordered(min(SHOWN, len(splits.val))))).images
    try:
        rows = [json.loads(line) for line in (out / "masks.jsonl").read_text().splitlines()]
        if len(rows) > SNAPSHOTS:
            raise ValueError
        p = np.array([row["p"] for row in rows], dtype=float).reshape(len(rows), len(images), net.patches)
        epochs = [float(row["epoch"]) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise RunError(f"{out / 'masks.jsonl'} is damaged, so the masks over training cannot be drawn; move it away") from None
    figure = Figure(figsize=(1.25 * len(images) + 0.5, 1.3 * (1 + len(rows))), layout="constrained")
    axes = figure.subplots(1 + len(rows), len(images), squeeze=False)
    for axis, pixels in zip(axes[0], pictures(gather_patches(images, None, net.cfg.patch_size), net, splits)):
        axis.imshow(pixels)
    for line, epoch, values in zip(axes[1:], epochs, p):
        line[0].set_ylabel(f"p, epoch {epoch:.1f}")
        for axis, value in zip(line, values):
            axis.imshow(rearrange(value, "(h w) -> h w", h=int(net.patches**0.5)), cmap="magma", vmin=0, vmax=1)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("image")
    save_figure(figure, out / "masks-over-training.png")


def pictures(patches, net, splits):
    """Patches [B, L, p*p*C] as images [B, H, W, C] for a plot, 0 to 1."""
    size, grid = net.cfg.patch_size, int(net.patches**0.5)
    pixels = rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", h=grid, p=size, q=size)
    mean, std = (torch.tensor(value, device=pixels.device) for value in (splits.mean, splits.std))
    return (pixels * std + mean).clamp(0, 1).cpu().numpy()


@torch.no_grad()
def draw_images(net, state, splits, path):
    """Write a PNG: originals, p (or SemMAE's parts), masked images, reconstructions, the same with the visible patches.

    The decoder predicts normalised patches; they are un-normalised here with each patch's own mean and deviation."""
    from matplotlib.figure import Figure

    images = next(iter(splits.val.ordered(min(SHOWN, len(splits.val))))).images
    encoder_params, decoder_params = state.theta.params.tensor_split([net.encoder_size])
    progress = state.iteration / mask_updates(net.cfg, splits)
    prob, keep, restore, mask = draw_masks(net, state.psi.params, images, encoder_params,
                                           net.cfg.seed, MASKS, state.iteration, 1, progress=progress)  # fmt: skip
    with autocast(net, images.device):
        pred = call(net.decoder, decoder_params, call(net.encoder, encoder_params, images, keep), restore).float()
    size, grid = net.cfg.patch_size, int(net.patches**0.5)
    target = gather_patches(images, None, size)  # [B, L, p*p*C]
    pred = pred * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
    hidden = mask[..., None]

    colour = dict(cmap="gray", vmin=0, vmax=1)
    if net.cfg.masking == "semantic":
        name, values, style = "part", part_ids(net, images), dict(cmap="nipy_spectral", vmin=0, vmax=net.cfg.parts)
    else:
        name, values, style = "p(hide)", prob, dict(cmap="magma", vmin=0, vmax=1)
    rows = [
        ("image", pictures(target, net, splits), colour),
        (name, rearrange(values, "b (h w) -> b h w", h=grid).cpu().numpy(), style),
        ("visible", pictures(target * (1 - hidden), net, splits), colour),  # hidden patches in the data set's mean colour
        ("reconstruction", pictures(pred, net, splits), colour),
        ("with visible", pictures(target * (1 - hidden) + pred * hidden, net, splits), colour),
    ]
    figure = Figure(figsize=(1.25 * len(images) + 0.5, 1.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for line, (title, shown, style) in zip(axes, rows):
        for axis, pixels in zip(line, shown):
            axis.imshow(pixels, **style)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    save_figure(figure, path)


def draw_curves(out):
    """Write curves.png from metrics.jsonl: the losses, how the masks stand, and how often objects are hidden."""
    from matplotlib.figure import Figure

    rows = read_metrics(out / "metrics.jsonl")
    panels = [
        ("losses", ["level1_loss", "reconstruction_error", "level2_loss", "level3_loss"]),
        ("masks", ["p_mean", "p_std", "p_entropy", "mask_churn", "mask_overlap"]),
        ("object patches: hidden and weighted, ratio to chance", ["object_hidden", "object_weight"]),
    ]
    panels = [(title, [name for name in names if name in rows[-1]]) for title, names in panels]
    panels = [(title, names) for title, names in panels if names]
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name in names:
            axis.plot([row["epoch"] for row in rows if name in row], [row[name] for row in rows if name in row], label=name)
        axis.set(title=title, xlabel="epochs of level 1")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, out / "curves.png")


def save_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())


# ------------------------------------------------------------------------------------------------------ files

FORMAT, PARTS_FORMAT = "mlo-mae checkpoint 1", "mlo-mae parts 1"


def write_whole(path, content, previous=None):
    """Write bytes, or what a function writes to an open file: to a temporary name, to disk, then in place at once. What
    was in place before goes to `previous`, if given. Raises RunError where it cannot be written; `path` is then as it was."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise unwritable(path, error) from None


def append_line(path, line):
    """Add a line to a file. Raises RunError where it cannot be written."""
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path, error):
    """The RunError for a full disk or a folder without permission to write."""
    cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises RuntimeError in place of OSError
    reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
    return RunError(f"{path} cannot be written ({reason}); what was there before is intact: mend that, then --resume")


def claim(out):
    """Keep a run's folder to this process as long as it lives: the lock ends with it, however it ends. Raises RunError
    where another process has it."""
    lock = os.open(out / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB) if fcntl else msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        raise RunError(f"another process is at work in {out}; wait until it ends, or choose another --out") from None


def find_checkpoint(cfg, out, resume):
    """What there is to resume: None, or a checkpoint. Raises RunError where a run is there already, or is not this one."""
    if resume and any((out / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt")):
        checkpoint = newest_checkpoint(out)
        for name, value in dataclasses.asdict(cfg).items():
            if name not in MACHINE_FIELDS and checkpoint["config"][name] != value:
                raise RunError(f"{out} was started with --{name.replace('_', '-')} {checkpoint['config'][name]}, "
                               f"not {value}; resume it with its own flags or choose another --out")  # fmt: skip
        return checkpoint
    if not resume:
        refuse_taken(out)
    return None


def refuse_taken(out):
    """Raise RunError where a new run would overwrite something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already; continue it with --resume, or choose another --out")


def newest_checkpoint(out):
    """The content of a run's checkpoint or, where that is absent or damaged, of the one before it, saying so."""
    previous = out / "checkpoint.previous.pt"
    try:
        return read_checkpoint(out / "checkpoint.pt")
    except RunError as error:
        if not previous.exists():
            raise
        content = read_checkpoint(previous)
        print(f"mlo_mae: {error}; going on from {previous}, mask update {content['iteration']}", file=sys.stderr)
        return content


def check_settings(settings):
    """Raise ValueError where a file's settings are not a Config's: other names, or values of other types."""
    fields = {field.name: field.type for field in dataclasses.fields(Config)}
    if not isinstance(settings, dict) or set(settings) != set(fields):
        differ = set(fields) ^ set(settings) if isinstance(settings, dict) else "all of them"
        raise ValueError(f"settings that differ: {', '.join(sorted(map(str, differ)))[:200]}")
    for name, kind in fields.items():
        value = settings[name]
        if not (value in get_args(kind) if get_origin(kind) is Literal else type(value) in (kind, *[int] * (kind is float))):
            raise ValueError(f"{name} is {' '.join(repr(value).split())[:80]}")
        if kind is float:
            float(value)  # an integer may be too long
    if settings["preset"] not in PRESETS:
        raise ValueError(f"preset is {settings['preset'][:80]!r}")


def read_config(path):
    """The settings in a run's config.json. Raises RunError where they are not this program's."""
    try:
        settings = json.loads(path.read_text())
        check_settings(settings)
        return settings
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise RunError(f"{path} is damaged or of another version ({error}); give all flags, and another --out") from None


def read_metrics(path):
    """The lines of metrics.jsonl, {name: number}. Raises RunError where it is absent, empty or damaged."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if not rows or any("epoch" not in row or not all(math.isfinite(value) for value in row.values()) for row in rows):
            raise ValueError
        return rows
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise RunError(f"{path} is absent, empty or damaged, so there are no curves to draw") from None


def truncate_metrics(path, iteration):
    """Drop the lines after `iteration`, which a resumed run writes again, and a line cut short by a crash."""
    if not path.exists():
        return
    try:
        lines = path.read_text().splitlines(keepends=True)
        lines = lines if not lines or lines[-1].endswith("\n") else lines[:-1]
        kept = [line for line in lines if json.loads(line)["iteration"] <= iteration]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RunError(f"{path} is damaged; move it away and resume again: the run starts a new one") from None
    write_whole(path, "".join(kept).encode())


def data_facts(splits):
    """What a checkpoint says about the data."""
    return {"image_size": splits.image_size, "channels": splits.channels, "class_names": splits.class_names,
            "mean": list(splits.mean), "std": list(splits.std)}  # fmt: skip


def save_checkpoint(net, state, splits, path):
    """Write the whole state with public parameter names, whole or not at all. Raises RunError if a weight is not
    finite, and leaves the checkpoint before it in place."""
    if not all(level.params.isfinite().all() for level in (state.theta, state.head, state.psi)):
        raise RunError(f"a weight is not finite after mask update {state.iteration}; {path} is left as it was: "
                       f"lower the learning rates")  # fmt: skip
    encoder_params, decoder_params = state.theta.params.tensor_split([net.encoder_size])
    named = {
        "model": unflatten(net.encoder, encoder_params) | unflatten(net.decoder, decoder_params),
        "head": unflatten(net.head, state.head.params),
        "masking": unflatten(net.masking, state.psi.params),
    }
    levels = {"model": state.theta, "head": state.head, "masking": state.psi}
    content = {
        "format": FORMAT,
        "config": dataclasses.asdict(net.cfg),
        "data": data_facts(splits),
        "iteration": state.iteration,
        "moments": {name: {"m": level.m.cpu(), "v": level.v.cpu(), "t": level.t} for name, level in levels.items()},
    } | {part: {name: tensor.cpu().clone() for name, tensor in tensors.items()} for part, tensors in named.items()}  # fmt: skip
    write_whole(path, lambda file: torch.save(content, file), previous=path.with_name("checkpoint.previous.pt"))


def read_saved(path, *kinds):
    """What `torch.save` wrote with one of these kinds as its "format", tensors on the CPU; nothing in the file is
    executed. Raises RunError for a file that is absent, damaged (every record's CRC is checked), or of another kind."""
    wanted = " or ".join(kinds)
    try:
        interchange.check_records(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; give a folder that has it") from None
    except interchange.WeightsError as error:
        raise RunError(f"{path} is damaged: {error}") from None
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path} cannot be read ({reason}); it is damaged, or no file of the kind '{wanted}'") from None
    if not isinstance(content, dict) or content.get("format") not in kinds:
        raise RunError(f"{path} is no file of the kind '{wanted}'")
    return content


def read_checkpoint(path, checks=None):
    """The content of a run's checkpoint, or of a file of other kinds: `checks` are {kind: function that says whether a
    content is whole}. Raises RunError as `read_saved`, and for one of another version."""
    checks = checks or {FORMAT: is_whole}
    content = read_saved(path, *checks)
    try:
        check_settings(content.get("config"))
    except (ValueError, TypeError, OverflowError) as error:
        raise RunError(f"{path} was written by another version of this program ({error})") from None
    if not checks[content["format"]](content):
        raise RunError(f"{path} is damaged: it does not hold what this program writes; use a copy, or start again")
    return content


def is_whole(content):
    """Whether a checkpoint's content is of the kinds that `save_checkpoint` writes; `restore` checks names and shapes."""
    try:
        parts = ("model", "head", "masking")
        moments = [content["moments"][part] for part in parts]
        return (
            all(type(moment) is dict and is_count(moment["t"]) for moment in moments)
            and are_facts(content["data"]) and is_count(content["iteration"])
            and all(is_tensor(moment[name]) for moment in moments for name in "mv")
            and all(are_weights(content[part]) for part in parts)
        )  # fmt: skip
    except (KeyError, TypeError, IndexError):  # something else stands where a dict should
        return False


def is_count(value):
    return type(value) is int and 0 <= value < 2**48


def is_tensor(value):
    return type(value) is Tensor and (value.dtype, value.layout, value.device.type) == (torch.float32, torch.strided, "cpu")


def are_weights(value):
    return isinstance(value, dict) and all(type(name) is str and is_tensor(tensor) for name, tensor in value.items())


def are_facts(value):
    """Whether this is of the kinds that `data_facts` returns."""
    return (
        type(value) is dict and is_count(value["image_size"]) and is_count(value["channels"]) and value["channels"] in (1, 3)
        and type(value["class_names"]) is list and all(type(name) is str for name in value["class_names"])
        and all(type(value[name]) is list and all(type(x) is float for x in value[name]) for name in ("mean", "std"))
    )  # fmt: skip


def restore(net, content, device):
    """State from a checkpoint's content. Raises RunError where names or shapes are not this network's."""

    def level(part, *modules):
        tensors, moments = content[part], content["moments"][part]
        expected = {name: tuple(p.shape) for module in modules for name, p in module.named_parameters()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            wrong = next(name for name in expected | found if expected.get(name) != found.get(name))
            raise RunError(f"the checkpoint's {part} does not fit: {wrong} is {found.get(wrong, 'missing')}, "
                           f"expected {expected.get(wrong, 'nothing')}")  # fmt: skip
        params = torch.cat([tensors[name].reshape(-1) for name in expected])
        if not params.shape == moments["m"].shape == moments["v"].shape:
            raise RunError(f"the checkpoint's moments of {part} do not fit its {len(params)} weights")
        return Level(params.to(device), moments["m"].to(device), moments["v"].to(device), moments["t"])

    return State(content["iteration"], level("model", net.encoder, net.decoder), level("head", net.head),
                 level("masking", net.masking))  # fmt: skip


def frozen_encoder(cfg, splits, path):
    """The encoder of a run's checkpoint, for part learning; it may be of another size than this run's, but not see
    other images or patches. Raises RunError."""
    content = read_checkpoint(path)
    theirs, facts = content["config"], content["data"]
    wanted = {"pixels": splits.image_size, "channels": splits.channels, "pixels a patch": cfg.patch_size}
    found = dict(zip(wanted, (facts["image_size"], facts["channels"], theirs["patch_size"])))
    for name, value in wanted.items():
        if found[name] != value:
            raise RunError(f"--parts-from {path}: its images have {found[name]} {name}, this run's {value}; "
                           f"give a run on the same images and patches")  # fmt: skip
    shape = theirs["width"], theirs["depth"], theirs["heads"]
    with fitting(path):
        return frozen(Encoder(splits.image_size, cfg.patch_size, splits.channels, *shape), content["model"])


@contextlib.contextmanager
def fitting(path):
    """RunError where what is taken out of the file `path` is absent, of another type, or does not fit together."""
    try:
        with torch.device("meta"):  # what is built here takes no memory before the file's weights are put in
            yield
    except (KeyError, TypeError, ValueError, RuntimeError, RunError):
        raise RunError(f"{path} is damaged: its weights do not fit its settings; use a copy, or start again") from None


def frozen(module, weights):
    """The module with these weights, of which there may be more than it has."""
    module.load_state_dict({name: weights[name] for name in module.state_dict()}, assign=True)
    return module.float().requires_grad_(False)


def save_parts(parts, path):
    """Write parts.pt: what masks need beside the checkpoint, so that the run needs --parts-from no longer."""
    encoder = parts.encoder
    content = {
        "format": PARTS_FORMAT,
        "encoder_shape": [encoder.pos_embed.shape[2], len(encoder.blocks), encoder.blocks[0].attn.heads],
        "encoder": {name: tensor.cpu() for name, tensor in encoder.state_dict().items()},
        "learner": {name: tensor.cpu() for name, tensor in parts.learner.state_dict().items()},
    }
    write_whole(path, lambda file: torch.save(content, file))


def read_parts(cfg, splits, path, device):
    """Parts from a run's parts.pt. Raises RunError."""
    content = read_saved(path, PARTS_FORMAT)
    with fitting(path):
        width, depth, heads = map(int, content["encoder_shape"])
        check(dataclasses.replace(cfg, width=width, depth=depth, heads=heads))
        encoder = Encoder(splits.image_size, cfg.patch_size, splits.channels, width, depth, heads)
        learner = baselines.PartLearner(width, cfg.parts, splits.channels * cfg.patch_size**2)
        return Parts(frozen(encoder, content["encoder"]).to(device), frozen(learner, content["learner"]).to(device))


def open_run(run, device_name, **machine):
    """(Networks, State, Splits) of a run's checkpoint; `machine` overrides fields of its configuration."""
    content = newest_checkpoint(run)
    cfg, facts = dataclasses.replace(Config(**content["config"]), **machine), content["data"]
    check(cfg)
    if cfg.image_size not in (0, facts["image_size"]):
        raise RunError(f"{run} holds a checkpoint of images of {facts['image_size']} pixels, but --image-size {cfg.image_size}")
    device = choose_device(device_name)
    net, _ = build(cfg, facts["image_size"], facts["channels"], len(facts["class_names"]))
    state = restore(net, content, device)  # before the data, whose size a damaged file could make absurd
    splits = load_data(cfg, device)
    if (splits.image_size, splits.channels, list(splits.class_names)) != (
            facts["image_size"], facts["channels"], facts["class_names"]):  # fmt: skip
        raise RunError(f"{cfg.data} is not the data that {run} was trained on: sizes or class names differ")
    return net, state, splits


EXPORTS = {"timm": "encoder-timm.safetensors", "mae": "autoencoder-mae.pth"}  # kinds, and their files in a run's folder
TIMM = {(768, 12, 12): "vit_base_patch16_224", (1024, 24, 16): "vit_large_patch16_224"}  # width, depth, heads; patch 16 at 224


def export(run, to, file=None):
    """Write a run's weights for other programs, to `file` or into the run's folder; returns what the command reports.

    to="timm": safetensors of the encoder, which timm's VisionTransformer loads strictly. It wants a classifier as well:
    that of a fine-tuning, if `run` is the folder of one; an encoder that was only pretrained has none, and head.weight
    and head.bias, for the run's classes, are zeros.
    to="mae": a .pth of {"model": encoder and decoder}, as facebookresearch/mae names them.
    Raises RunError where the file exists already, or where a fine-tuning does not have what is asked for."""
    import finetune  # which imports this module

    content = read_checkpoint(run / "checkpoint.pt", {FORMAT: is_whole, finetune.FORMAT: finetune.is_whole})
    tuned = content["format"] == finetune.FORMAT
    if tuned and to == "mae":
        raise RunError(f"{run} is a fine-tuning, which has no decoder; export it --to timm, or the run that it started from")
    if tuned and "model" not in content["best"]:
        raise RunError(f"{run} has no finished epoch yet; continue it with --resume")
    cfg, facts, model = Config(**content["config"]), content["data"], (content["best"] if tuned else content)["model"]
    file = run / EXPORTS[to] if file is None else file
    if file.exists():
        raise RunError(f"{file} exists already; move it away, or name another with --file")
    image_size, channels, classes = facts["image_size"], facts["channels"], len(facts["class_names"])
    sizes = (f"img_size={image_size}, patch_size={cfg.patch_size}, in_chans={channels}, "
             f"embed_dim={cfg.width}, depth={cfg.depth}, num_heads={cfg.heads}")  # fmt: skip
    report = {"verb": "export", "run": str(run), "file": str(file), "mean": facts["mean"], "std": facts["std"]}
    if to == "mae":
        write_whole(file, lambda opened: torch.save({"model": model}, opened))
        return report | {"call": f"MaskedAutoencoderViT({sizes}, decoder_embed_dim={cfg.decoder_width}, "
                                 f"decoder_depth={cfg.decoder_depth}, decoder_num_heads={cfg.decoder_heads}, "
                                 f"norm_layer=partial(nn.LayerNorm, eps=1e-6), norm_pix_loss=True)"}  # fmt: skip
    standard = TIMM.get((cfg.width, cfg.depth, cfg.heads)) if (image_size, channels, cfg.patch_size) == (224, 3, 16) else None
    classifier = f"num_classes={classes}" + (", global_pool='avg'" if tuned and content["recipe"]["pooling"] == "mean" else "")
    call = f"timm.models.VisionTransformer({sizes}, {classifier})"
    if standard:
        call = f"timm.create_model('{standard}', {classifier})"
    encoder = {name: tensor for name, tensor in model.items() if not interchange.is_decoder(name)}
    if not tuned:
        encoder |= {"head.weight": torch.zeros(classes, cfg.width), "head.bias": torch.zeros(classes)}
    metadata = {"call": call, "mean": json.dumps(facts["mean"]), "std": json.dumps(facts["std"])}
    write_whole(file, lambda opened: interchange.write_safetensors(encoder, opened, metadata))
    head = "the fine-tuned classifier" if tuned else "zeros: a pretrained encoder has no classifier"
    return report | {"call": call, "head": head}


# ----------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise RunError(f"{message}; see {self.prog} --help")


def add_flags(parser, fields):
    """A flag for each of these dataclass fields; one that the user leaves out is absent from the arguments."""
    for field in fields:
        name, options = "--" + field.name.replace("_", "-"), {"help": field.metadata["help"], "default": argparse.SUPPRESS}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.name == "preset":
            options["choices"] = list(PRESETS)
        elif get_origin(field.type) is Literal:
            options["choices"] = get_args(field.type)
        else:
            options |= {"type": field.type, "metavar": field.type.__name__}
        options["help"] += f" (default {field.default})"
        parser.add_argument(name, **options)


def parse(argv):
    """Arguments, with the command first; without one, pretrain."""
    import finetune  # which imports this module

    parser = Parser(prog="mlo_mae.py", description=__doc__.splitlines()[0],
                    epilog="without a command: pretrain; its flags are listed by pretrain --help")  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="pretrain | probe | finetune | show | export")
    pretraining = commands.add_parser("pretrain", help="pretrain, probe, write pictures")
    add_flags(pretraining, dataclasses.fields(Config))
    pretraining.add_argument("--out", type=Path, help="folder of the run (default runs/<preset>-<masking>-<seed>)")
    pretraining.add_argument("--resume", action="store_true", help="continue the run in --out, or start it")
    for command, purpose in (("probe", "linear probe of a run"), ("show", "pictures of a run")):
        reading = commands.add_parser(command, help=purpose)
        reading.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
        reading.add_argument("--data-dir", default=argparse.SUPPRESS, help="where the data lies now")
        reading.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
        if command == "probe":
            reading.add_argument("--recipe", choices=list(PROBES), default="lbfgs", help="lbfgs: to convergence, weight decay "
                                 "chosen on validation; mae: MAE's, by SGD, learning rate chosen on validation (default lbfgs)")
            reading.add_argument("--pooling", choices=["cls", "mean"], default="cls",
                                 help="CLS token, or mean of the patches' tokens (default cls)")  # fmt: skip
    exporting = commands.add_parser("export", help="a run's weights for timm or facebookresearch/mae")
    exporting.add_argument("run", type=Path, metavar="RUN", help="folder of the run, or of its fine-tuning")
    exporting.add_argument("--to", choices=list(EXPORTS), required=True, help="timm: the encoder; mae: the decoder too")
    exporting.add_argument("--file", type=Path, help=f"where to (default in RUN: {', '.join(EXPORTS.values())})")
    finetune.add_command(commands)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["pretrain", *argv]
    return vars(parser.parse_args(argv))


def run_command(arguments):
    """Run one command; returns what its last line reports."""
    command = arguments.pop("command")
    if command != "pretrain" and world() > 1:
        raise RunError(f"{command} runs as one process; start it without torchrun")
    if command == "pretrain":
        out, resume = arguments.pop("out"), arguments.pop("resume")
        if resume and out and (out / "config.json").exists():
            arguments = read_config(out / "config.json") | arguments
        preset = arguments.get("preset", "shapes")
        cfg = Config(**{"preset": preset} | PRESETS[preset] | arguments)
        return pretrain(cfg, out or Path("runs") / f"{cfg.preset}-{cfg.masking}-{cfg.seed}", resume)
    if command == "export":
        return export(**arguments)
    if command == "finetune":
        import finetune  # which imports this module

        return finetune.run_command(**arguments)
    run, device = arguments.pop("run"), arguments.pop("device")
    how = {name: arguments.pop(name) for name in ("recipe", "pooling") if name in arguments}
    net, state, splits = open_run(run, device, **arguments)
    if command == "probe":
        return {"verb": "probe", "run": str(run), **how, **linear_probe(net, state, splits, **how)}
    if net.cfg.masking == "semantic":
        net.parts = read_parts(net.cfg, splits, run / "parts.pt", choose_device(device))
    return {"verb": "show", "run": str(run), "pictures": list(map(str, draw_run(net, state, splits, run)))}


def main(argv=None):
    """Exit status 0, or 2 after one line, whatever the number of processes, for what the user can mend."""

    def work():
        join()
        return run_command(parse(sys.argv[1:] if argv is None else argv))

    return reported("mlo_mae", work)


def reported(program, work, remedy="Lower --batch-size"):
    """Print what work() returns, unless None, as one line of JSON. Exit status 0, or 2 after one line for what the user
    can mend; `remedy` is for a device out of memory."""
    try:
        summary = work()
        if summary is not None:
            print(json.dumps(summary, separators=(",", ":")))
        return 0
    except (RunError, ExchangeError, data.DataError, interchange.WeightsError) as error:
        message = str(error)
    except torch.OutOfMemoryError as error:
        message = f"out of memory: {str(error).splitlines()[0]} {remedy}"
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    if first_to_fail():
        print(f"{program}: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    import mlo_mae  # so that finetune.py, which imports it too, meets the same classes

    end(mlo_mae.main())
