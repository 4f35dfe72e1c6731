"""Two baselines in small pieces: U-MAE's uniformity term, and SemMAE's parts and masks.

U-MAE (arXiv 2210.08344) is MAE with one more term in its loss, `uniformity`, which pushes the features of different
images apart.

SemMAE (arXiv 2206.10207) hides patches by the part of the image that they belong to.

(A) Parts are learned without labels on a *frozen* encoder (`PartLearner`, `learn_parts`). The class token is embedded
    into N part tokens; a part token multiplied with the patch tokens gives the part's attention map; the maps are
    blurred; a small decoder, modulated by the class token (AdaIN), draws the image from the maps alone; a diversity
    loss keeps the maps apart. A patch belongs to the part whose map is highest there.
(B) Masks (`semantic_scores`) move, over the run, from a share of the patches inside every part to whole parts.

The authors' code for (A) is not public. What the description leaves open is chosen here: each map is a softmax over
patches, as in attention (with a softmax over parts, one or two parts take every image; with this one, most of them have
patches); the diversity loss is the mean cosine similarity of the maps; the decoder is three convolutions on the grid of
patches. N = 7 is what their code for (B) has.
"""

from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------- U-MAE


def uniformity(features):
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

    def __init__(self, width, parts, values):
        super().__init__()
        self.part_tokens = nn.Linear(width, parts * width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, CHANNELS, 3, padding=1, padding_mode="replicate") for inputs in (parts, CHANNELS)
        )
        self.styles = nn.ModuleList(nn.Linear(width, 2 * CHANNELS) for _ in self.convolutions)
        self.pixels = nn.Conv2d(CHANNELS, values, 1)

    def maps(self, tokens):
        """Tokens [B, 1+L, D], CLS first -> blurred attention maps of the parts [B, N, L], with a mean of about 1."""
        cls, patches = tokens[:, 0], tokens[:, 1:]
        parts = self.part_tokens(cls).unflatten(1, (-1, cls.shape[1]))  # [B, N, D]
        return blur((parts @ patches.mT * cls.shape[1] ** -0.5).softmax(2) * patches.shape[1])

    def draw(self, maps, cls):
        """Maps [B, N, L] and class tokens [B, D] -> pixels [B, L, P]. What a part looks like comes from the class token,
        where it lies from the maps."""
        x = on_grid(maps)  # [B, N, g, g]
        for convolution, style in zip(self.convolutions, self.styles):
            scale, shift = style(cls)[..., None, None].chunk(2, dim=1)  # each [B, CHANNELS, 1, 1]
            x = F.gelu(F.group_norm(convolution(x), CHANNELS) * (1 + scale) + shift)  # AdaIN: one group a channel
        return self.pixels(x).flatten(2).mT

    def loss(self, tokens, pixels):
        """Squared error of the drawn image [B, L, P], plus how much the maps of different parts overlap."""
        maps = self.maps(tokens)
        return F.mse_loss(self.draw(maps, tokens[:, 0]), pixels) + DIVERSITY * overlap(maps)


def on_grid(maps):
    """[B, N, L] -> [B, N, g, g]."""
    return maps.unflatten(2, (round(maps.shape[2] ** 0.5), -1))


def blur(maps):
    """Binomial blur [1 2 1]/4 in both directions of maps [B, N, L]; at the border the nearest patch is repeated."""
    x = F.pad(on_grid(maps), (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(x, 2, 1), 2, 1).flatten(2)


def overlap(maps):
    """The diversity loss: mean cosine similarity of different parts' maps [B, N, L]. A scalar, 0 where no patch has
    two parts, 1 where all maps are the same up to a factor. Needs N >= 2."""
    unit = F.normalize(maps, dim=2)
    parts = maps.shape[1]
    return ((unit @ unit.mT).sum((1, 2)) - parts).mean() / (parts * (parts - 1))


def learn_parts(learner, examples, steps):
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


def semantic_quota(counts, progress, hidden, generator):
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


def semantic_scores(part_ids, parts, progress, hidden, generator):
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
