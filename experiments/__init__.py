"""Programs on top of the method: each file is a command of mlo_mae.py, by its name. Here is what they all read: a run."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import mlo_mae
from harness import UserError, cli
from harness.checkpoints import fitting, newest, whole_number
from harness.probe import bar_if_long
from harness.randomness import LEVEL1_DATA, torch_generator
from harness.run import difference
from harness.vectors import call
from harness.weights import starting_weights
from kernels import gather_patches


def config_of(content: dict) -> mlo_mae.Config:
    """The configuration in a run's checkpoint, as far as it is mlo_mae.py's: experiments have fields of their own. Raises
    UserError, and others: see `fitting`."""
    kept = {field.name: content["config"][field.name] for field in dataclasses.fields(mlo_mae.Config)}
    # Some record a form and a preset of their own, and reading a run needs neither.
    known = kept["preset"] if kept["preset"] in mlo_mae.PRESETS else mlo_mae.Config.preset
    cfg = mlo_mae.Config(**kept | {"hypergradient": "exact", "preset": known})
    mlo_mae.check(cfg)
    return cfg


def read_run(run: Path, device: torch.device, **machine) -> tuple[mlo_mae.Networks, mlo_mae.State, dict]:
    """A run's networks, state, and what its checkpoint says of its data, which are not needed; `machine` overrides fields of
    its configuration. Raises UserError."""
    content = newest(run, mlo_mae.FORMAT)
    with fitting(run / "checkpoint.pt"):
        cfg, facts = dataclasses.replace(config_of(content), **machine), content["data"]
        mlo_mae.check(cfg)
        sizes = [whole_number(facts["image_size"]), whole_number(facts["channels"]), len(facts["class_names"])]
        if cfg.image_size not in (0, sizes[0]):
            raise UserError(f"its images have {sizes[0]} pixels, but --image-size is {cfg.image_size}")
        sight = mlo_mae.sight_of(content, facts, device) if cfg.masking_from else None
        net, _ = mlo_mae.build(cfg, *sizes, sight)
        return net, mlo_mae.restored(net, content, device), facts


def open_run(
    run: str | Path, device: str = "auto", classes: bool = True, **machine
) -> tuple[mlo_mae.Networks, mlo_mae.State, data.Splits]:
    """`read_run`, and its data. Raises UserError, where `classes` are asked for and its data have none too."""
    run, device = Path(run), cli.choose_device(device)
    net, state, facts = read_run(run, device, **machine)  # before the data, whose size a damaged file could make absurd
    splits = mlo_mae.load_data(net.cfg, device)
    with fitting(run / "checkpoint.pt"):
        what = difference(facts, splits.facts(), data.COMPUTED)
    if what:
        raise UserError(f"{net.cfg.data} is not the data that {run} was trained on: {what}")
    if classes and not splits.class_names:
        raise UserError(f"{net.cfg.data}, which {run} was trained on, has no classes; give data that has, or see `encode`")
    return net, state, splits


def level1_alone(
    cfg: mlo_mae.Config, splits: data.Splits, maps: data.Images
) -> Iterator[tuple[mlo_mae.Networks, mlo_mae.State, list[Tensor]]]:
    """A run of level 1 alone, in which these maps of the training images weigh: after each mask update networks, state, and
    the weight decays of the three levels."""
    net, params = mlo_mae.build(cfg, splits.image_size, splits.channels, len(splits.class_names))
    device, total = splits.train.mean.device, mlo_mae.mask_updates(cfg, splits)
    state, rates = mlo_mae.State(0, *(mlo_mae.fresh_level(vector, device) for vector in params)), mlo_mae.rates_of(net, device)
    seed = torch_generator(cfg.seed, LEVEL1_DATA).initial_seed()
    weights = mlo_mae.moved_weights(maps.stream(cfg.batch_size, seed), cfg.patch_size)
    streams = mlo_mae.Streams(splits.train.stream(cfg.batch_size, seed), iter(()), iter(()), known=weights)  # no T learns
    for _ in tqdm(range(total), desc=f"seed {cfg.seed}", unit="update"):
        state, _ = mlo_mae.outer_iteration(net, state, streams, total, *rates)
        yield net, state, rates[0]


@torch.no_grad()
def reconstructed(
    net: mlo_mae.Networks, theta: Tensor, images: Tensor, keep: Tensor, restore: Tensor, raw: bool = False
) -> Tensor:
    """The decoder's patches [B, N, p*p*C] of images of which it sees the patches `keep`. What it predicts are normalised
    patches (unless `raw`): they get each true patch's own mean and deviation, which it does not know."""
    encoder_params, decoder_params = theta.tensor_split([net.encoder_size])
    with mlo_mae.autocast(net, images.device):
        pred = call(net.decoder, decoder_params, call(net.encoder, encoder_params, images, keep), restore).float()
    if raw:
        return pred
    target = gather_patches(images, None, net.cfg.patch_size)
    return pred * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)


def trial_batch(split: data.Images | data.Folder, size: int) -> data.Batch:
    """So many images of a split to try a step with, not augmented. Of a folder a stream would read more of them ahead."""
    return split.pick(np.arange(size) % len(split))


@torch.no_grad()
def features(net: mlo_mae.Networks, params: Tensor, split, pooling: str = "") -> tuple[Tensor, Tensor]:
    """Features [images, D] of `mlo_mae.encode` and labels [images] of a whole split, without augmentation, on the CPU.

    params: theta, or the encoder's part of it."""
    params = params[: net.encoder_size]
    batches = bar_if_long(split.ordered(256), "features", math.ceil(len(split) / 256), unit="batch")
    pairs = [(mlo_mae.encode(net, params, batch.images, pooling).cpu(), batch.labels.cpu()) for batch in batches]
    return tuple(torch.cat(column) for column in zip(*pairs))


def first_weights(net: mlo_mae.Networks, theta: Tensor, path: str | Path) -> Tensor:
    """The encoder's part of theta, with the weights found in `path` (a run, or a public file). Raises UserError."""
    return starting_weights(path, [net.encoder], theta[: net.encoder_size], {"heads": net.cfg.heads})
