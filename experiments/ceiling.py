"""How much do weights gain that follow the task? They are placed by what a supervised classifier looks at, from the start.

    python mlo_mae.py ceiling                                                       # shapes
    python mlo_mae.py ceiling --data cifar100 --data-dir DIR --images 20000 --epochs 6

A yardstick for T: where such weights gain nothing, a T that learns what matters cannot be expected to. A classifier with the
run's encoder learns from the training labels (`finetune --from-scratch`). A patch's saliency is how much the score of its
image's class changes with the patch's pixels. Weights are a sigmoid of its logarithm, standardised within the image, with
the mean that T's logits have. Two pretrainings of a seed then differ in the weights alone.
"""

import argparse
import sys
from collections import deque
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import mlo_mae
from data import Images, Splits
from experiments import finetune, level1_alone
from experiments.results import PROBES, compared, probed
from harness import UserError, cli
from harness.measure import machine, markdown, show_page
from mlo_mae import Config, Networks, State

SETTINGS = ("data", "data_dir", "images", "epochs", "device")  # of pretrain
NOTE = """\
Test split, mean ± standard deviation over seeds of pretraining; "against" is the mean paired difference in points with its
95 % confidence interval (Student's t), and in how many seeds it is better : worse. All share one data split and one
classifier, and the rate of learned weights, which is not MAE's best."""


def saliency(model: nn.Module, split: Images, patch_size: int) -> Tensor:
    """[images, h, w]: root mean square of the gradient of the logit of the image's class, less the mean logit, by the pixels
    of each patch; of the image and its mirror image together."""
    found = []
    for images, labels in tqdm(split.ordered(128), desc="saliency", total=-(-len(split) // 128)):
        total = 0
        for mirror in (lambda x: x, lambda x: x.flip(3)):
            pixels = mirror(images).requires_grad_()
            logits = model(pixels)  # [B, classes]
            (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum() - logits.mean(1).sum(), pixels)
            total = total + mirror(gradient).square().mean(1, keepdim=True)  # [B, 1, H, W]
        found.append(F.avg_pool2d(total, patch_size).sqrt()[:, 0])
    return torch.cat(found)


def weights_of(maps: Tensor) -> Tensor:
    """p [images, h, w] of saliencies."""
    logs = maps.clamp_min(1e-9).log()
    centred = logs - logs.mean((1, 2), keepdim=True)
    return (centred / centred.std((1, 2), keepdim=True).clamp_min(1e-9) - 2).sigmoid()


def classifier(net: Networks, theta: Tensor, splits: Splits, epochs: int) -> tuple[nn.Module, float]:
    """A Classifier after so many epochs (the best of them on the validation split), and its share of right test images."""
    recipe, used = finetune.suited(finetune.Recipe(from_scratch=True, epochs=epochs, seed=net.cfg.seed), {}), []

    def evaluate(model: nn.Module, split: Images) -> dict[str, float]:
        used.append(model)
        return finetune.evaluate(model, split)

    result = finetune.finetune(net, theta, splits, recipe, task=finetune.CLASSIFY._replace(evaluate=evaluate))
    return used[-1].requires_grad_(False), result["test_top1"]  # the test split is read last, with the weights that are kept


def pretrained(cfg: Config, splits: Splits, weights: Tensor) -> tuple[Networks, State]:
    """Networks and State after level 1 alone, with weights [images, h, w] of the training images that move with them."""
    ((net, state, _),) = deque(level1_alone(cfg, splits, splits.train.accompanied(weights)), maxlen=1)
    return net, state


def measure(cfg: Config, device: torch.device, seeds: int, classifier_epochs: int) -> tuple[float, dict[str, list[dict]]]:
    """The classifier's share of right test images, and {weights: [{name in PROBES: share} of each seed]}."""
    splits = mlo_mae.load_data(cfg, device)
    if not isinstance(splits.train, Images):
        raise UserError(f"--data {cfg.data}: a folder's images are not kept in memory; give an .npz file or built-in images")
    net, (theta, *_) = mlo_mae.build(cfg, splits.image_size, splits.channels, len(splits.class_names))
    model, supervised = classifier(net, theta, splits, classifier_epochs)
    placed = weights_of(saliency(model, splits.train, cfg.patch_size))
    ways = {"all alike": torch.ones_like(placed), "saliency": placed}
    found = {way: [] for way in ways}
    for seed in range(cfg.seed, cfg.seed + seeds):
        for way, weights in ways.items():
            net, state = pretrained(replace(cfg, seed=seed), splits, weights)
            found[way].append(probed(net, state, splits))
    return supervised, found


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = cli.Parser(prog="mlo_mae.py ceiling", description=__doc__.splitlines()[0])
    cli.add_flags(parser, [field for field in fields(Config) if field.name in SETTINGS])
    parser.add_argument("--classifier-epochs", type=int, default=10, help="of the classifier (default 10)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/ceiling-<data>.md")
    options = parser.parse_args(argv)
    if not 1 <= options.seeds <= 100 or options.classifier_epochs < 2:
        raise UserError("--seeds must be 1 to 100, and --classifier-epochs at least 2")
    return options


def run_command(argv: list[str]) -> dict:
    """Run `ceiling` with these flags; prints the table, and returns what its last line reports."""
    options = parse(argv)
    same = {name: value for name, value in vars(options).items() if name in SETTINGS}
    cfg = Config(**same, seed=options.first_seed, masking_from="saliency")  # weights that are given, from the first step on
    mlo_mae.check(cfg)
    device = cli.choose_device(cfg.device)
    supervised, found = measure(cfg, device, options.seeds, options.classifier_epochs)
    rivals = found["all alike"]
    rows = [[way, *compared(cells, PROBES, rivals)] for way, cells in found.items()]
    titles = ["weights", *(title for heading in PROBES.values() for title in (heading, "against"))]
    facts = machine(device) | {"seeds": options.seeds, "classifier, test": f"{supervised:.1%}"}
    save = f"ceiling-{Path(cfg.data).stem}" if options.save else ""
    show_page(["ceiling", *argv], facts, markdown(titles, rows), [NOTE], save)
    return {"command": "ceiling", "machine": facts, "rows": [{"weights": way, "cells": cells} for way, cells in found.items()]}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
