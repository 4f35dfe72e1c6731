"""What is measured of a network while and after it is trained: linear probes of its features, statistics of its masks.

Everything here works on arrays; where they come from is the caller's affair.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from data import index_batches
from harness.schedule import schedule

bar_if_long = partial(tqdm, delay=10, leave=False)  # shown once the work has taken so many seconds
BLOCK = 2**16  # rows whose logits are held at a time
Labelled = tuple[Tensor, Tensor]  # features [N, D] and labels [N]
Probe = Callable[[Tensor], Tensor]  # features [N, D] -> logits [N, classes]


def linear_probe(train: Labelled, val: Labelled, test: Labelled, classes: int, recipe: str = "lbfgs") -> dict[str, float]:
    """Multinomial logistic regression on frozen features; PROBES holds the recipes.

    Each recipe fits several probes to `train`; one is chosen on `val` (of equal accuracies the one with the lowest
    cross-entropy), and `test` is then looked at once.
    Returns {"test_accuracy", "val_accuracy": shares, and the name of what the probes differ in: its chosen value}."""
    differ_in, fit = PROBES[recipe]
    probes = fit(*train, classes)
    quality = {v: (accuracy(probe, *val), -F.cross_entropy(probe(val[0]), val[1]).item()) for v, probe in probes.items()}
    best = max(quality, key=quality.get)
    return {"test_accuracy": accuracy(probes[best], *test), "val_accuracy": quality[best][0], differ_in: best}


def accuracy(probe: Probe, features: Tensor, labels: Tensor) -> float:
    """Share of the features [N, D] whose label [N] gets the highest logit."""
    return (probe(features).argmax(1) == labels).double().mean().item()


def lbfgs_probes(train: Tensor, labels: Tensor, classes: int) -> dict[float, Probe]:
    """L-BFGS on standardised features [N, D] and labels [N], at most 100 iterations (at the lowest weight decay a full fit
    takes 100 to 230 and differs by 0.0 to 0.6 points: eight probes of 64 features and 8 classes): {weight decay: probe}.
    Works where the features are."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)

    def standardised(inputs):  # [N, D] -> [N, 1+D], with a constant for the bias
        return F.pad((inputs - mean) / std, (1, 0), value=1.0)

    blocks = list(zip(standardised(train).split(BLOCK), labels.split(BLOCK)))

    def fit(weight_decay):
        weight = torch.zeros(1 + train.shape[1], classes, device=train.device, requires_grad=True)
        solver = torch.optim.LBFGS([weight], max_iter=100, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

        def objective():
            solver.zero_grad()
            loss = 0.5 * weight_decay * weight[1:].square().sum()
            loss.backward()
            for inputs, those in blocks:
                error = F.cross_entropy(inputs @ weight, those) * (len(those) / len(labels))
                error.backward()
                loss = loss.detach() + error.detach()
            return loss

        solver.step(objective)
        weight = weight.detach()
        return lambda inputs: standardised(inputs) @ weight

    decays = bar_if_long((1e-4, 1e-3, 1e-2, 1e-1), "probes", unit="fit")
    return {decay: fit(decay) for decay in decays}


def sgd_probes(
    train: Tensor, labels: Tensor, classes: int, epochs: int = 90, warmup: int = 10, batch_size: int = 1024
) -> dict[float, Probe]:
    """MAE's probe (arXiv 2111.06377) on features [N, D] and labels [N]: BatchNorm without affine, then linear;
    90 epochs, 10 of warmup, cosine, no weight decay: {learning rate: probe}. Works where the features are.

    Where MAE has LARS at one rate and batches of 16,384 cropped images, here SGD with momentum 0.9 has several rates."""
    rates = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
    scale, batch_size = torch.tensor(rates, device=train.device)[:, None, None], min(batch_size, len(labels))
    steps = epochs * len(labels) // batch_size
    norm = nn.BatchNorm1d(train.shape[1], affine=False, eps=1e-6, device=train.device)
    weight = torch.zeros(len(rates), 1 + train.shape[1], classes, device=train.device, requires_grad=True)  # bias first
    velocity = torch.zeros_like(weight)

    def normed(inputs):  # [N, D] -> [N, 1+D], with a constant for the bias
        return F.pad(norm(inputs), (1, 0), value=1.0)

    bar = bar_if_long(range(steps), "probes", unit="step")
    for step, (_, indices) in zip(bar, index_batches(len(labels), batch_size, seed=0, start=0)):
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


PROBES = {"lbfgs": ("weight_decay", lbfgs_probes), "mae": ("learning_rate", sgd_probes)}  # what probes differ in, and the fit


def mask_statistics(
    prob: Tensor, mask: Tensor, previous_mask: Tensor | None, objects: Tensor | None, patch_size: int
) -> dict[str, float]:
    """How the masks of a fixed set of images stand, as {name: float}.

    prob [B, L]: p; mask [B, L]: 1 where hidden, as many in each image; previous_mask: the same at the last evaluation;
    objects [B, H, W]: pixels that belong to an object. Prob and masks are on the CPU, since not every device has float64.

    p_mean, p_std, p_entropy (bits): a saturated T has entropy 0. mask_churn: share of hidden patches that were visible
    at the last evaluation; a frozen T has 0. mask_overlap: share of hidden patches that two images have in common; by
    chance it is the mask ratio, and 1 where T ignores the image. object_hidden: how often a pixel of the object is
    hidden, as a ratio to chance (1 = T does not see objects); object_weight: the mean of p over pixels of objects, as a
    ratio to that over all others; object_auc: the chance that p is higher in a patch that an object covers by more than
    half than in another patch, ties counting half (the area under the ROC curve; 0.5 = T does not see objects). What has
    nothing to compare is left out. All dimensionless but the entropy."""
    p, (count, patches), hidden = prob.double(), mask.shape, int(mask[0].sum())
    entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / math.log(2)
    statistics = {"p_mean": p.mean(), "p_std": p.std(), "p_entropy": entropy.mean()}
    if previous_mask is not None:
        statistics["mask_churn"] = (mask * (1 - previous_mask)).sum(1).mean() / hidden
    if count > 1:
        times = mask.double().sum(0)  # [L] images that hide each patch
        statistics["mask_overlap"] = (times * (times - 1)).sum() / (count * (count - 1) * hidden)
    if objects is not None:
        covered = share_covered(objects.cpu(), patch_size)
        rest, inside = 1 - covered, covered > HALF
        if covered.any():
            statistics["object_hidden"] = (mask * covered).sum() / covered.sum() / (hidden / patches)
        if covered.any() and rest.any():
            weight, other = (p * covered).sum() / covered.sum(), (p * rest).sum() / rest.sum()
            statistics["object_weight"] = weight / other.clamp_min(1e-9)  # a saturated T must not make it infinite
        if inside.any() and not inside.all():
            statistics["object_auc"] = area_under_roc(p[inside], p[~inside])
    return {name: float(value) for name, value in statistics.items()}


HALF = 0.5  # a patch that an object covers by more is the object's


def share_covered(objects: Tensor, patch_size: int) -> Tensor:
    """The share of each patch [B, L] that objects [B, H, W] bool cover."""
    return rearrange(objects.float(), "b (h p) (w q) -> b (h w) (p q)", p=patch_size, q=patch_size).mean(-1)


def area_under_roc(positive: Tensor, negative: Tensor) -> float:
    """The chance that one of the scores `positive` [M] is higher than one of `negative` [N], ties counting half."""
    negative = negative.sort().values
    below, not_above = (torch.searchsorted(negative, positive, right=right).double() for right in (False, True))
    return float((below + not_above).mean() / (2 * len(negative)))
