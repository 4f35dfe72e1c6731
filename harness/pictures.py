"""Pictures, of arrays. matplotlib is needed here alone, and only once there is something to draw."""

import io
import itertools
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from harness import UserError
from harness.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How `grid` shows a row's values: keywords of matplotlib's imshow, and "bar", what the colour bar beside it says.
PIXELS = {"cmap": "gray", "vmin": 0, "vmax": 1}  # colours are shown as they are; the map is for images of one channel
PARTS = {"cmap": "nipy_spectral", "vmin": 0, "vmax": 1}  # of a part's number as a share of how many there are
HIDDEN = 0.5  # the grey that stands for hidden patches
CELL = 1.1  # inches of one image in a `grid`
LINE = 0.19  # inches of a line of text
TEXT = {"fontsize": 11}
DASHES = ("-", "--", "-.")  # so that lines at one place all show


class Group(NamedTuple):
    """A panel of `curves`: numbers of a metrics row that share a unit."""

    title: str
    unit: str
    words: dict[str, str]  # {name in the row: what it is}
    chance: float | None = None  # what it is where T sees nothing
    span: float = 0.0  # least range of the y axis: what is smaller is noise
    chance_in: str = ""  # which number of the row says what it is where the head sees nothing


GROUPS = (
    Group(
        "Level 1: reconstruction",
        "squared error of pixels",
        {"level1_loss": "L1, weighted reconstruction error", "reconstruction_error": "reconstruction error, not weighted"},
    ),
    Group(
        "Levels 2 and 3: classifier",
        "error of labels",
        {"level2_loss": "L2, classifier on training images", "level3_loss": "L3, classifier on held-out images"},
        chance_in="level3_chance",
    ),
    Group(
        "Weights of patches",
        "p, from 0 to 1",
        {"p_mean": "mean of p", "p_std": "standard deviation of p"},
    ),
    Group(
        "Hidden patches",
        "share of hidden patches",
        {"mask_churn": "hidden, but not at the point before", "mask_overlap": "hidden in another image too"},
        span=0.2,
    ),
    Group(
        "Objects",
        "ratio",
        {"object_hidden": "objects hidden, ratio to chance", "object_weight": "p of objects, ratio to p of the rest"},
        1.0,
        0.2,
    ),
    Group("Objects, as told by p", "AUC", {"object_auc": "p tells objects from the rest (AUC)"}, 0.5, 0.2),
)


class Panel(NamedTuple):
    """Lines over one axis."""

    title: str
    unit: str  # of the y axis
    lines: dict[str, tuple]  # {label: (x, y)}, or (x, y, lowest, highest): a band
    chance: float | None = None  # a dotted line
    span: float = 0.0  # least range of the y axis
    along: str = "epochs of level 1"
    log: bool = False  # whether the x axis is logarithmic


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG, whole or not at all. Raises UserError where it cannot be written."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name that is shown
        figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())


def wrapped(text: str, width: float) -> str:
    """The text in lines for a figure that is so many inches wide."""
    return "\n".join(textwrap.wrap(text, max(12, int(12.5 * width))))


def caption(figure: "Figure", text: str) -> None:
    """Say below a figure what to look for; a figure whose layout is "constrained" makes room."""
    width = figure.get_size_inches()[0]
    figure.supxlabel(wrapped(text, width), x=0.08 / width, ha="left", **TEXT)


def distinct(names: Sequence) -> dict:
    """A colour for each name."""
    from matplotlib import colormaps

    for few in ("tab10", "tab20"):
        if len(names) <= colormaps[few].N:
            return dict(zip(names, colormaps[few].colors))
    return dict(zip(names, colormaps["turbo"](np.linspace(0, 1, len(names)))[:, :3]))


def columns_of_key(names: Sequence[str], width: float) -> int:
    """How many of the names a key of so many inches has in a line."""
    return max(1, int(width / (0.55 + 0.09 * max(map(len, names), default=0))))


def as_images(patches: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised patches [B, L, p*p*C], and each channel's mean and deviation, as images [B, H, W, C] from 0 to 1."""
    grid = round(patches.shape[1] ** 0.5)
    pixels = rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", h=grid, p=patch_size, q=patch_size)
    mean, std = (torch.tensor(value, device=pixels.device) for value in (mean, std))
    return (pixels * std + mean).clamp(0, 1).cpu().numpy()


def scale_of(values: np.ndarray | Tensor) -> dict:
    """A style for `grid`: p, from 0 to the highest there is; AdamW makes level 1 blind to a common factor of p."""
    return {"cmap": "magma", "vmin": 0, "vmax": max(1e-9, float(values.max())), "bar": "p"}


def overlaid(images: np.ndarray, values: np.ndarray, style: dict) -> np.ndarray:
    """Values of patches [B, L] as colours of the style, over images [B, H, W, C] in grey: [B, H, W, 3]."""
    from matplotlib import colormaps

    side = round(values.shape[1] ** 0.5)
    share = np.clip((values - style["vmin"]) / (style["vmax"] - style["vmin"]), 0, 1)
    colours = colormaps[style["cmap"]](share.reshape(-1, side, side))[..., :3]
    size = images.shape[1] // side
    return (0.8 * colours.repeat(size, 1).repeat(size, 2) + 0.3 * images.mean(-1, keepdims=True)).clip(0, 1)


def grid(
    path: Path,
    rows: Sequence[tuple[str, np.ndarray | Tensor, dict]],
    text: str,
    key: dict[str, Sequence[float]] | None = None,
    annotate: Callable[[np.ndarray], object] | None = None,
    film: bool = False,
    columns: Sequence[str] = (),
) -> None:
    """Write a PNG of rows of small images: (title, values, style), values as images [N, H, W] or [N, H, W, C], or one for
    each patch of a square image [N, L]; style as PIXELS is. Below them stand a key, {name: colour}, and `text`, which says
    what to look for. annotate(axes [rows, N]) may draw on the images. As a film, rows are columns from left to right.
    columns: a name above each column, of which as much is shown as has room. A colour bar stands beside the images of a style
    that has a "bar".

    Raises UserError where it cannot be written."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    titles, count, key = [title for title, *_ in rows], len(rows[0][1]), key or {}
    across, down = (len(rows), count) if film else (count, len(rows))
    left = 0.1 if film else 0.2 + 0.09 * max(len(line) for title in titles for line in title.split("\n"))  # inches
    top = 0.1 + (LINE * (1 + max(title.count("\n") for title in titles)) if film else LINE if columns else 0)
    width = left + CELL * across + (0.75 if any("bar" in style for *_, style in rows) else 0.1)
    beside = columns_of_key(list(key), width)
    key_height = LINE * 1.3 * math.ceil(len(key) / beside)
    bottom = 0.2 + LINE * (1 + wrapped(text, width).count("\n")) + key_height
    height = bottom + CELL * down + top
    figure = Figure(figsize=(width, height))
    place = {"left": left / width, "right": (left + CELL * across) / width, "bottom": bottom / height, "top": 1 - top / height}
    axes = figure.subplots(down, across, squeeze=False, gridspec_kw=place | {"wspace": 0.04, "hspace": 0.04})
    axes = axes.T if film else axes
    for line, (title, images, style) in zip(axes, rows):
        images = torch.as_tensor(images).cpu()
        if images.ndim == 2:
            images = images.unflatten(1, (round(images.shape[1] ** 0.5), -1))
        for axis, pixels in zip(line, images.numpy()):
            axis.imshow(pixels, **{name: value for name, value in style.items() if name != "bar"})
            axis.set(xticks=[], yticks=[])
        if film:
            line[0].set_title(title, pad=4, **TEXT)
        else:
            line[0].set_ylabel(title, rotation=0, ha="right", va="center", **TEXT)
    for style, group in itertools.groupby(zip(axes, rows), lambda pair: pair[1][2]):
        if "bar" in style:  # one for rows that follow each other
            boxes = [axis.get_position() for line, _ in group for axis in line]
            low, high = min(box.y0 for box in boxes), max(box.y1 for box in boxes)
            strip = figure.add_axes((place["right"] + 0.1 / width, low, 0.13 / width, high - low))
            norm = Normalize(style["vmin"], style["vmax"])
            bar = figure.colorbar(ScalarMappable(norm, style["cmap"]), cax=strip, ticks=np.linspace(0, norm.vmax, 3))
            bar.ax.set_yticklabels([f"{tick:.2g}" for tick in bar.get_ticks()])
            strip.set_title(style["bar"], pad=4, **TEXT)
    for axis, name in zip(axes[0], columns):
        axis.set_title(name if len(name) <= 14 else f"{name[:6]}…{name[-7:]}", pad=4, fontsize=8, parse_math=False)
    if key:
        handles = [Patch(facecolor=colour, edgecolor="grey", label=name) for name, colour in key.items()]
        at = {"loc": "upper left", "bbox_to_anchor": (0.08 / width, (bottom - 0.08) / height), "frameon": False}
        figure.legend(handles=handles, ncols=beside, handlelength=1.2, borderaxespad=0, borderpad=0.2, **at, **TEXT)
    if annotate:
        annotate(axes)
    caption(figure, text)
    save_figure(figure, path)


def draw_panels(figure: "Figure", panels: Sequence[Panel], across: int) -> None:
    """Draw panels into a figure whose layout is "constrained", `across` beside each other. A label has one colour in all of
    them, and legends stand outside of the axes: one for all where panels share labels."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    shared = len(panels) > 1 and sum(len(panel.lines) for panel in panels) > len(labels)
    across = min(across, len(panels))
    alike = len({panel.along for panel in panels}) == 1
    axes = figure.subplots(math.ceil(len(panels) / across), across, squeeze=False, sharex=alike).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels):
        colours = distinct(labels if shared else list(panel.lines))
        for (label, colour), dashes in zip(colours.items(), itertools.cycle(DASHES)):
            if label not in panel.lines:
                continue
            x, y, *band = panel.lines[label]
            axis.plot(x, y, dashes, color=colour, marker="o" if len(x) == 1 else "", label=label)  # one point is no line
            if band:
                axis.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0)
        if panel.chance is not None:
            axis.axhline(panel.chance, color="grey", linestyle=":")
        low, high = axis.get_ylim()
        axis.set(xlabel=panel.along, ylabel=panel.unit, xscale="log" if panel.log else "linear")
        if high - low < panel.span:
            axis.set_ylim((low + high - panel.span) / 2, (low + high + panel.span) / 2)
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
        if shared:
            axis.set_title(panel.title, loc="left", **TEXT)
        else:  # above the axes, below its title
            look = {"loc": "lower left", "bbox_to_anchor": (0, 1), "alignment": "left", "frameon": False, "borderaxespad": 0.2}
            axis.legend(title=panel.title, title_fontsize=TEXT["fontsize"], **look)
    if shared:
        handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
        columns = columns_of_key(labels, figure.bbox.width / figure.dpi)
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns, frameon=False, **TEXT)


def panels(path: Path, shown: Sequence[Panel], text: str, across: int = 3) -> None:
    """Write a PNG of panels of lines, and `text` below them. Raises UserError where it cannot be written."""
    from matplotlib.figure import Figure

    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(4 * min(across, len(shown)), 3.4 * down + 0.4), layout="constrained")
    draw_panels(figure, shown, across)
    caption(figure, text)
    save_figure(figure, path)


def panel_of(word: str, lines: dict[str, tuple], unit: str = "", chance: float | None = None) -> Panel:
    """The Panel of one number of a metrics row; `unit` and `chance` in place of its group's."""
    group = next(group for group in GROUPS if word in group.words)
    return Panel(group.words[word], unit or group.unit, lines, group.chance if chance is None else chance, group.span)


def curves(path: Path, runs: dict[str, Sequence[dict[str, float]]], labels_unit: str = "") -> None:
    """Write a PNG of {name of a run: its metrics rows} over their "epoch": of one run a panel for each of GROUPS, of several
    a panel for each number and a colour for each run. labels_unit: what levels 2 and 3 minimise.

    Rows are as `read_metrics` has them. A number is drawn where rows have it, and a panel of none is not drawn. Raises
    UserError where there is nothing to draw."""
    for name, rows in runs.items():
        if not any(word in row for group in GROUPS for word in group.words for row in rows):
            raise UserError(f"{path} cannot be drawn: metrics.jsonl of {name} is empty or damaged; move it away")
    shown = []
    for group in GROUPS:
        unit, found = labels_unit if "level2_loss" in group.words else "", []
        chance = chance_of(runs, group.chance_in)
        for word in group.words:
            points = {name: [(row["epoch"], row[word]) for row in rows if word in row] for name, rows in runs.items()}
            if lines := {name: tuple(zip(*some)) for name, some in points.items() if some}:
                found.append(panel_of(word, lines, unit, chance if word == "level3_loss" or len(runs) == 1 else None))
        if found and len(runs) == 1:
            lines = {panel.title: line for panel in found for line in panel.lines.values()}
            found = [found[0]._replace(title=group.title, lines=lines)]
        shown += found
    panels(path, shown, look_for(runs), 3 if len(runs) == 1 else 4)


def chance_of(runs: dict[str, Sequence[dict[str, float]]], name: str) -> float | None:
    """What the runs' rows say of chance under this name; None where they say nothing, or differ in it."""
    chances = [row[name] for rows in runs.values() for row in rows if name in row]
    return chances[0] if chances and max(chances) <= 1.01 * min(chances) else None


def look_for(runs: dict[str, Sequence[dict[str, float]]]) -> str:
    """What to look for in `curves`."""
    names = {name for rows in runs.values() for row in rows for name in row}
    if "level3_loss" not in names:
        return "No T learns here: the reconstruction error should fall, and then flatten."
    where = " below chance (dotted)" * (chance_of(runs, "level3_chance") is not None)
    text = (
        f"L2 and L3 have points while T learns; L3 should fall{where}. L1 drops at once where p begins to weigh: look at the "
    )
    text += "error that is not weighted."
    return text + (" Of objects: above the dotted lines, p is higher there." if "object_auc" in names else "")
