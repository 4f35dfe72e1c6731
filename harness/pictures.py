"""Pictures, of arrays. matplotlib is needed here alone, and only once there is something to draw."""

import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from harness import UserError
from harness.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How `grid` shows a row's values: keywords of matplotlib's imshow.
PIXELS = {"cmap": "gray", "vmin": 0, "vmax": 1}  # colours are shown as they are; the map is for images of one channel
PROBABILITY = {"cmap": "magma", "vmin": 0, "vmax": 1}
PARTS = {"cmap": "nipy_spectral", "vmin": 0, "vmax": 1}  # of a part's number as a share of how many there are

CURVES = {  # panels of `curves`, and which of a metrics row's numbers each one shows
    "losses": ("level1_loss", "reconstruction_error", "level2_loss", "level3_loss"),
    "masks": ("p_mean", "p_std", "p_entropy", "mask_churn", "mask_overlap"),
    "object patches": ("object_hidden", "object_weight", "object_auc"),
}
LABELS = {  # of lines whose names do not say enough
    "object_hidden": "hidden, as a ratio to chance",
    "object_weight": "weight p, as a ratio to the rest",
    "object_auc": "AUC of p against object patches",
}
CELL = 1.25  # inches of one image in a `grid`


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG, whole or not at all. Raises UserError where it cannot be written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())


def as_images(patches: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised patches [B, L, p*p*C], and each channel's mean and deviation, as images [B, H, W, C] from 0 to 1."""
    grid = round(patches.shape[1] ** 0.5)
    pixels = rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", h=grid, p=patch_size, q=patch_size)
    mean, std = (torch.tensor(value, device=pixels.device) for value in (mean, std))
    return (pixels * std + mean).clamp(0, 1).cpu().numpy()


def grid(
    path: Path,
    rows: Sequence[tuple[str, np.ndarray | Tensor, dict]],
    annotate: Callable[[np.ndarray], object] | None = None,
) -> None:
    """Write a PNG of rows of small images: (title, values, style), values as images [N, H, W] or [N, H, W, C], or one for
    each patch of a square image [N, L]; style as PIXELS is. annotate(axes [rows, N]) may draw on the images. A colour bar
    stands beside rows of PROBABILITY.

    Raises UserError where it cannot be written."""
    from matplotlib.figure import Figure

    columns, bars = len(rows[0][1]), any(style == PROBABILITY for *_, style in rows)
    left = 0.15 + 0.075 * max(len(title) for title, *_ in rows)  # inches, of the titles
    width, height = left + CELL * columns + (0.6 if bars else 0.05), CELL * len(rows) + 0.2
    figure = Figure(figsize=(width, height))
    place = {"left": left / width, "right": (left + CELL * columns) / width, "bottom": 0.1 / height, "top": 1 - 0.1 / height}
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=place | {"wspace": 0.04, "hspace": 0.04})
    for line, (title, images, style) in zip(axes, rows):
        images = torch.as_tensor(images).cpu()
        if images.ndim == 2:
            images = images.unflatten(1, (round(images.shape[1] ** 0.5), -1))
        for axis, pixels in zip(line, images.numpy()):
            axis.imshow(pixels, **style)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
    for with_bar, group in itertools.groupby(zip(axes[:, -1], rows), lambda pair: pair[1][2] == PROBABILITY):
        if with_bar:  # one for rows that follow each other
            ends = [axis for axis, _ in group]
            bottom, top = ends[-1].get_position().y0, ends[0].get_position().y1
            beside = figure.add_axes((place["right"] + 0.08 / width, bottom, 0.12 / width, top - bottom))
            figure.colorbar(ends[0].images[0], cax=beside, ticks=[0, 0.5, 1])
    if annotate:
        annotate(axes)
    save_figure(figure, path)


def is_number(value: object) -> bool:
    """Whether this is a finite number, as a file of metrics holds them."""
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def curves(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Write a PNG of metrics rows over their "epoch": the losses, how the masks stand, and how often objects are hidden.

    A number is drawn where rows have it, and a panel of none is not drawn. Raises UserError where there is nothing to draw,
    or something else than numbers."""
    from matplotlib.figure import Figure

    panels = {title: [name for name in names if any(name in row for row in rows)] for title, names in CURVES.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels or not all("epoch" in row and all(map(is_number, row.values())) for row in rows):
        raise UserError(f"{path} cannot be drawn: metrics.jsonl is empty or damaged; move it away")
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            marker = "o" if len(points) == 1 else ""  # a line of one point shows nothing
            axis.plot(*zip(*points), marker=marker, label=LABELS.get(name, name))
        axis.set(title=title, xlabel="epochs of level 1")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path)
