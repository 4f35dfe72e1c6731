"""Two baselines on top of the method: U-MAE's uniformity term, and SemMAE's parts and masks.

    python mlo_mae.py baselines u-mae                               # MAE, and features of different images set apart
    python mlo_mae.py pretrain --masking random                     # MAE, whose encoder then gives parts:
    python mlo_mae.py baselines semmae --parts-from runs/shapes-random-0

U-MAE (arXiv 2210.08344) is MAE with one more term in its loss, `uniformity`, which pushes the features of different
images apart.

SemMAE (arXiv 2206.10207) hides patches by the part of the image that they belong to.

(A) Parts are learned without labels on a *frozen* encoder (`PartLearner`, `learn_parts`). The class token is embedded
    into N part tokens; a part token multiplied with the patch tokens gives the part's attention map; the maps are
    blurred; a small decoder, modulated by the class token (AdaIN), draws the image from the maps alone; a diversity
    loss keeps the maps apart. A patch belongs to the part whose map is highest there.
(B) Masks (`semantic_scores`) move, over the run, from a share of the patches inside every part to whole parts. Of images in
    memory parts are found once (`part_maps`), as MLO-MAE does with p.

The authors' code for (A) is not public. What the description leaves open is chosen here: each map is a softmax over
patches, as in attention (with a softmax over parts, one or two parts take every image; with this one, most of them have
patches); the diversity loss is the mean cosine similarity of the maps; the decoder is three convolutions on the grid of
patches. N = 7 is what their code for (B) has.

A run is one of mlo_mae.py's, with masks that T has no part in. In this order: the two methods' formulas, a run's parts
(learned, kept in its folder, read again), and the commands.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import mlo_mae
from data import Images, Splits
from harness import UserError, cli
from harness.checkpoints import fitting, newest, read_saved
from harness.cli import flag
from harness.processes import world
from harness.randomness import PARTS, torch_generator
from harness.run import Run, add_run_flags, settings_of
from harness.signals import Interrupted, stop_signals
from harness.vectors import flatten
from kernels import gather_patches
from mlo_mae import PRESETS, Config, Encoder, Networks, autocast

# ------------------------------------------------------------------------------------------------------- U-MAE


def uniformity(features: Tensor) -> Tensor:
    """Mean squared cosine similarity of the features [B, D] over all pairs of different images: a scalar, 0 where they
    are orthogonal and 1 where they are parallel. Needs B >= 2.

    U-MAE's own code averages over all B^2 pairs, with each image's pair with itself: this is a constant 1/B more, and
    otherwise (B-1)/B times the value here. Its features are the CLS tokens of the *masked* images, after the last
    norm; its weight, 1e-4 on similarities divided by 0.1, is 0.01 on these."""
    unit = F.normalize(features, dim=1)
    count = len(unit)
    return ((unit @ unit.T).square().sum() - count) / (count * (count - 1))


# --------------------------------------------------------------------------------------- SemMAE (A): learning parts

LEARNING_RATE = 1e-3  # of part learning, AdamW
DIVERSITY = 0.3  # weight of the diversity loss beside the reconstruction error of standardised pixels
CHANNELS = 64  # of the decoder that draws the image from the maps


class PartLearner(nn.Module):
    """Attention maps of N parts over the patches of an image, and the image drawn again from those maps.

    width: D of the frozen encoder's tokens; parts: N; values: pixels of one patch times channels, P."""

    def __init__(self, width: int, parts: int, values: int):
        super().__init__()
        self.parts = parts
        self.part_tokens = nn.Linear(width, parts * width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, CHANNELS, 3, padding=1, padding_mode="replicate") for inputs in (parts, CHANNELS)
        )
        self.styles = nn.ModuleList(nn.Linear(width, 2 * CHANNELS) for _ in self.convolutions)
        self.pixels = nn.Conv2d(CHANNELS, values, 1)

    def maps(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 1+L, D], CLS first -> blurred attention maps of the parts [B, N, L], with a mean of about 1."""
        cls, patches = tokens[:, 0], tokens[:, 1:]
        parts = self.part_tokens(cls).unflatten(1, (-1, cls.shape[1]))  # [B, N, D]
        return blur((parts @ patches.mT * cls.shape[1] ** -0.5).softmax(2) * patches.shape[1])

    def draw(self, maps: Tensor, cls: Tensor) -> Tensor:
        """Maps [B, N, L] and class tokens [B, D] -> pixels [B, L, P]. What a part looks like comes from the class token,
        where it lies from the maps."""
        x = on_grid(maps)  # [B, N, g, g]
        for convolution, style in zip(self.convolutions, self.styles):
            scale, shift = style(cls)[..., None, None].chunk(2, dim=1)  # each [B, CHANNELS, 1, 1]
            x = F.gelu(F.group_norm(convolution(x), CHANNELS) * (1 + scale) + shift)  # AdaIN: one group a channel
        return self.pixels(x).flatten(2).mT

    def loss(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """Squared error of the drawn image [B, L, P], plus how much the maps of different parts overlap."""
        maps = self.maps(tokens)
        return F.mse_loss(self.draw(maps, tokens[:, 0]), pixels) + DIVERSITY * overlap(maps)


def on_grid(maps: Tensor) -> Tensor:
    """[B, N, L] -> [B, N, g, g]."""
    return maps.unflatten(2, (round(maps.shape[2] ** 0.5), -1))


def blur(maps: Tensor) -> Tensor:
    """Binomial blur [1 2 1]/4 in both directions of maps [B, N, L]; at the border the nearest patch is repeated."""
    x = F.pad(on_grid(maps), (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(x, 2, 1), 2, 1).flatten(2)


def overlap(maps: Tensor) -> Tensor:
    """The diversity loss: mean cosine similarity of different parts' maps [B, N, L]. A scalar, 0 where no patch has
    two parts, 1 where all maps are the same up to a factor. Needs N >= 2."""
    unit = F.normalize(maps, dim=2)
    parts = maps.shape[1]
    return ((unit @ unit.mT).sum((1, 2)) - parts).mean() / (parts * (parts - 1))


def learn_parts(learner: PartLearner, examples: Iterator[tuple[Tensor, Tensor]], steps: int) -> PartLearner:
    """Train a PartLearner, in place, for `steps` steps of AdamW, and return it frozen.

    examples: iterator of (tokens [B, 1+L, D] of whole images by the frozen encoder, their pixels by patch [B, L, P])."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=LEARNING_RATE)
    bar = tqdm(islice(examples, steps), total=steps, desc="parts", unit="step", mininterval=1)
    for number, (tokens, pixels) in enumerate(bar):
        optimizer.zero_grad()
        loss = learner.loss(tokens, pixels)
        loss.backward()
        optimizer.step()
        if number % 20 == 0:  # reading a loss waits for the device
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return learner.requires_grad_(False)


# ------------------------------------------------------------------------------------------------ SemMAE (B): masks


def semantic_quota(counts: Tensor, progress: float, hidden: int, generator: torch.Generator) -> Tensor:
    """How many patches of each part to hide, [B, N], not yet rounded; each row sums to `hidden`.

    counts [B, N]: patches of each part, which sum to L; progress: share of the run that is done, 0 to 1;
    hidden: patches to hide in each image.

        quota = lam * n_part * hidden/L  +  (1 - lam) * (parts filled one by one, in random order, up to `hidden`)
        lam = 1 - progress^2

    The published lam, 1 - ((epoch+1)/800)^2, is this at the end of each of its 800 epochs; the authors' public code has
    (1 + cos(pi progress))/2 in its place."""
    lam = 1 - progress**2
    within = counts * hidden / counts.sum(1, keepdim=True)
    order = torch.rand(counts.shape, generator=generator).argsort(1).to(counts.device)
    shuffled = counts.gather(1, order)
    before = shuffled.cumsum(1) - shuffled  # patches in the parts that come earlier
    whole = torch.empty_like(counts).scatter(1, order, (hidden - before).clamp(min=0).minimum(shuffled))
    return lam * within + (1 - lam) * whole


def semantic_scores(part_ids: Tensor, parts: int, progress: float, hidden: int, generator: torch.Generator) -> Tensor:
    """A score [B, L] of which the `hidden` highest are SemMAE's mask.

    part_ids [B, L] int64: the part of each patch, 0 to parts-1. Inside its part a patch is drawn at random.

    With s = 1, 2, ... the patches of a part in random order, the score is quota - s. Its `hidden` highest hold the
    whole-number part of every quota, and then the largest remainders: the total is exact, and each part's number is
    its quota rounded up or down. (Published: each quota is rounded, and what the total then lacks is taken anywhere.)"""
    members = F.one_hot(part_ids, parts).float()  # [B, L, N]
    quota = semantic_quota(members.sum(1), progress, hidden, generator)  # [B, N]
    order = torch.rand(part_ids.shape, generator=generator).argsort(1).to(part_ids.device)  # [B, L]
    shuffled = members.gather(1, order[..., None].expand_as(members))
    score = ((quota[:, None] - shuffled.cumsum(1)) * shuffled).sum(2)  # [B, L]
    return torch.empty_like(score).scatter(1, order, score)


# --------------------------------------------------------------------------------------------- the parts of a run

PARTS_FORMAT = "mlo-mae parts 1"


class Parts(NamedTuple):
    """What gives each patch its part: a pretrained encoder that no longer changes, and what was learned on it."""

    encoder: Encoder
    learner: PartLearner


def part_ids(net: Networks, parts: Parts, images: Tensor) -> Tensor:
    """The part of each patch, [B, L] int64."""
    return parts.learner.maps(frozen_tokens(net, parts.encoder, images)).argmax(1)


def part_maps(net: Networks, parts: Parts, images: Images) -> Images:
    """Where each part of each whole image lies, as maps that its crops and flips move with it: so the frozen encoder looks at
    each image once. What lies beside an image is no part's."""
    ids = torch.cat([part_ids(net, parts, batch.images) for batch in images.ordered(256)])
    return images.accompanied(on_grid(F.one_hot(ids, parts.learner.parts).mT))


def moved_ids(shares: Tensor, parts: int) -> Tensor:
    """What most of each patch belongs to, [B, L] int64, of the shares of `parts` parts [B, N*L], after one another; `parts`
    is beside the image."""
    shares = shares.unflatten(1, (parts, -1))
    return torch.cat([shares, 1 - shares.sum(1, keepdim=True)], 1).argmax(1)


@torch.no_grad()
def frozen_tokens(net: Networks, encoder: Encoder, images: Tensor) -> Tensor:
    """Tokens [B, 1+L, D] of whole images, CLS first."""
    with autocast(net, images.device):
        return encoder(images).float()


def semantic_masks(net: Networks, parts: Parts) -> Callable[[Tensor, Tensor | None, torch.Generator, float], Tensor]:
    """SemMAE's way to choose masks, for `Networks.score`."""
    count = parts.learner.parts

    def score(images, known, generator, progress):
        ids = part_ids(net, parts, images) if known is None else moved_ids(known, count)
        return semantic_scores(ids, count + 1, progress, net.patches - net.visible, generator)

    return score


def learned_parts(net: Networks, splits: Splits, device: torch.device) -> Parts:
    """Parts, learned on the encoder of --parts-from and on the training images as level 1 sees them.

    Raises UserError where that encoder does not see these images in these patches, Interrupted where a signal stops it."""
    cfg = net.cfg
    encoder = frozen_encoder(cfg, splits, Path(cfg.parts_from)).to(device)
    seed = torch_generator(cfg.seed, PARTS).initial_seed()
    torch.manual_seed(seed)
    learner = PartLearner(encoder.pos_embed.shape[2], cfg.parts, splits.channels * cfg.patch_size**2)

    def examples(stop):
        for batch in splits.train.stream(cfg.batch_size, seed):
            if stop:
                return
            yield frozen_tokens(net, encoder, batch.images), gather_patches(batch.images, None, cfg.patch_size)

    with stop_signals() as stop:
        learner = learn_parts(learner.to(device), examples(stop), cfg.parts_steps)
    if stop:
        raise Interrupted(stop[0], "stopped while parts were learned; start again")
    return Parts(encoder, learner)


def frozen_encoder(cfg: Config, splits: Splits, path: Path) -> Encoder:
    """The encoder of a run's folder or checkpoint, for part learning; it may be of another size than this run's, but not see
    images of another size or other patches. Where its pixels were normalised otherwise, its first layer is changed so that it
    sees those of this run as it knows them. Raises UserError."""
    content = newest(path, mlo_mae.FORMAT) if path.is_dir() else read_saved(path, mlo_mae.FORMAT)
    with fitting(path):
        theirs, facts = content["config"], content["data"]
        found = {"pixels": facts["image_size"], "channels": facts["channels"], "pixels a patch": theirs["patch_size"]}
        for name, value in zip(found, (splits.image_size, splits.channels, cfg.patch_size)):
            if found[name] != value:
                raise UserError(
                    f"its images have {found[name]} {name}, this run's {value}; "
                    "give --parts-from a run on the same images and patches"
                )
        encoder = frozen(empty_encoder(cfg, splits, theirs["width"], theirs["depth"], theirs["heads"]), content["model"])
        scale, shift = (part.cpu() for part in mlo_mae.renormalised(splits.facts(), facts))
        first = encoder.patch_embed.proj
        with torch.no_grad():
            first.bias += (first.weight * shift).sum((1, 2, 3))
            first.weight *= scale
        return encoder


def empty_encoder(cfg: Config, splits: Splits, width: int, depth: int, heads: int) -> Encoder:
    """An encoder without memory for weights, which for these sizes, out of a file, might be more than there is.

    Raises UserError where the sizes are absurd."""
    mlo_mae.check(dataclasses.replace(cfg, width=width, depth=depth, heads=heads))
    with torch.device("meta"):
        return Encoder(splits.image_size, cfg.patch_size, splits.channels, width, depth, heads)


def frozen(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The module with these weights, of which there may be more than it has. Raises UserError where they do not fit."""
    weights = {name: weights[name] for name in module.state_dict()}
    flatten([module], weights)  # the one check of names, shapes and values
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False)


def content_of(parts: Parts) -> dict:
    """What parts.pt holds: all that masks need beside the checkpoint, so that the run needs --parts-from no longer."""
    encoder = parts.encoder
    return {
        "format": PARTS_FORMAT,
        "encoder_shape": [encoder.pos_embed.shape[2], len(encoder.blocks), encoder.blocks[0].attn.heads],
        "encoder": {name: tensor.cpu() for name, tensor in encoder.state_dict().items()},
        "learner": {name: tensor.cpu() for name, tensor in parts.learner.state_dict().items()},
    }


def read_parts(cfg: Config, splits: Splits, path: Path, device: torch.device) -> Parts:
    """Parts from a run's parts.pt. Raises UserError."""
    content = read_saved(path, PARTS_FORMAT)
    with fitting(path):
        width, depth, heads = content["encoder_shape"]
        encoder = empty_encoder(cfg, splits, width, depth, heads)
        count = len(content["learner"]["part_tokens.bias"]) // width
        with torch.device("meta"):
            learner = PartLearner(width, count, splits.channels * cfg.patch_size**2)
        return Parts(frozen(encoder, content["encoder"]).to(device), frozen(learner, content["learner"]).to(device))


# ------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class UMAE(Config):
    """A run of MAE with a uniformity term."""

    masking: Literal["random"] = flag(
        "random", "the hypergradient of learned masks would lack the term's derivatives", group="masks"
    )
    uniformity: float = flag(0.01, "weight of the uniformity term in level 1", least=0, group="the baseline's own")


@dataclass(frozen=True)
class SemMAE(UMAE):
    """A run of SemMAE, which may have U-MAE's term as well."""

    masking: Literal["random"] = flag("random", "by parts, and inside a part by chance", group="masks")
    uniformity: float = flag(
        0.0, "weight of U-MAE's uniformity term in level 1 (U-MAE: 0.01)", least=0, group="the baseline's own"
    )
    parts_from: str = flag("", "the run, or its checkpoint, on whose frozen encoder parts are learned")
    parts: int = flag(7, "parts of an image", least=2, most=65536)
    parts_steps: int = flag(300, "steps of part learning, before the run", least=1, most=65536)


METHODS = {"u-mae": UMAE, "semmae": SemMAE}


def check(cfg: UMAE) -> None:
    """Raise UserError for a configuration that cannot run, naming the flag to change."""
    mlo_mae.check(cfg)
    if cfg.uniformity and cfg.batch_size < 2:
        raise UserError("--uniformity compares images: --batch-size must be at least 2")
    if cfg.uniformity and world() * cfg.accumulate > 1:
        raise UserError("--uniformity compares all images of a batch: it goes with one process and --accumulate 1")
    if isinstance(cfg, SemMAE) and not cfg.parts_from:
        raise UserError(
            "semmae learns parts on a pretrained encoder: give --parts-from RUN, for instance a run of --masking random"
        )
    if isinstance(cfg, SemMAE) and world() > 1:
        raise UserError("semmae goes with one process")


def prepare(net: Networks, splits: Splits, device: torch.device, run: Run) -> None:
    """Give a run its baseline's term and masks, for `mlo_mae.train`: parts are learned when it begins, and kept with it."""
    cfg = net.cfg
    if cfg.uniformity:
        net.penalty = lambda features: cfg.uniformity * uniformity(features)
    if isinstance(cfg, SemMAE):
        if run.checkpoint is None:
            parts = learned_parts(net, splits, device)
            run.beside["parts.pt"] = lambda file: torch.save(content_of(parts), file)
        else:
            parts = read_parts(cfg, splits, run.out / "parts.pt", device)
        net.score, net.maps = semantic_masks(net, parts), functools.partial(part_maps, net, parts)


def run_command(argv: list[str] | None) -> dict | None:
    """Run one of METHODS with these flags; returns what its last line reports."""
    parser = cli.Parser(prog="mlo_mae.py baselines", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="method", required=True, metavar=" | ".join(METHODS))
    for name, kind in METHODS.items():
        command = commands.add_parser(name, help=kind.__doc__, description=kind.__doc__)
        add_run_flags(command, kind, name)
    flags = vars(parser.parse_args(argv))
    method = flags.pop("method")
    cfg, out, resume = settings_of(flags, METHODS[method], PRESETS, method)
    check(cfg)
    if isinstance(cfg, SemMAE) and not (out / "parts.pt").exists() and not Path(cfg.parts_from).exists():
        raise UserError(f"--parts-from {cfg.parts_from} does not exist; give a run, or its checkpoint")
    return mlo_mae.reported_run(cfg, out, resume, prepare=prepare)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv), cli.LESS_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
