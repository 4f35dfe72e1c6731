"""Pictures, of arrays. matplotlib is needed here alone, and only once there is something to draw."""

import io
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
    "object patches: hidden and weighted, ratio to chance": ("object_hidden", "object_weight"),
}


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
    each patch of a square image [N, L]; style as PIXELS is. annotate(axes [rows, N]) may draw on the images.

    Raises UserError where it cannot be written."""
    from matplotlib.figure import Figure

    columns = len(rows[0][1])
    figure = Figure(figsize=(1.25 * columns + 0.5, 1.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (title, images, style) in zip(axes, rows):
        images = torch.as_tensor(images).cpu()
        if images.ndim == 2:
            images = images.unflatten(1, (round(images.shape[1] ** 0.5), -1))
        for axis, pixels in zip(line, images.numpy()):
            axis.imshow(pixels, **style)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
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

    A number that the last row lacks is not drawn, nor is a panel of none; one that comes later starts there. Raises
    UserError where there is nothing to draw, or something else than numbers."""
    from matplotlib.figure import Figure

    panels = {title: [name for name in names if rows and name in rows[-1]] for title, names in CURVES.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels or not all("epoch" in row and all(map(is_number, row.values())) for row in rows):
        raise UserError(f"{path} cannot be drawn: metrics.jsonl is empty or damaged; move it away")
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name in names:
            axis.plot([row["epoch"] for row in rows if name in row], [row[name] for row in rows if name in row], label=name)
        axis.set(title=title, xlabel="epochs of level 1")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path)
