"""Pictures: what is drawn where, and that a picture is never half written."""

import math

import numpy as np
import pytest
import torch

from harness import UserError, pictures
from harness.pictures import PIXELS, PROBABILITY, as_images, curves, grid

PNG = b"\x89PNG"


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, real = [], pictures.save_figure
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: saved.append(figure) or real(figure, path))
    return saved


EARLY = {"epoch": 1, "iteration": 1, "level1_loss": 0.9, "reconstruction_error": 0.9, "p_mean": 1.0}


def test_curves_hold_losses_where_rows_have_them(tmp_path, figures):
    later = {"level2_loss": 0.7, "level3_loss": 0.8}
    rows = [EARLY, *(EARLY | {"epoch": epoch} | later for epoch in (2, 3)), EARLY | {"epoch": 4}]
    curves(tmp_path / "curves.png", rows)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figures[0].axes[0].lines}
    assert lines["level1_loss"] == ([1, 2, 3, 4], [0.9] * 4) and lines["level2_loss"] == ([2, 3], [0.7] * 2)
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert [axis.get_title() for axis in figures[0].axes] == ["losses", "masks"]  # no objects, no panel


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{}],
        [{"epoch": 1}],
        [{"level1_loss": 1.0}],
        *([EARLY | {"p_mean": odd}] for odd in ("1", None, [1], math.nan, 10**400)),
    ],
)
def test_what_is_no_metrics_is_refused(tmp_path, rows):
    with pytest.raises(UserError, match="curves.png cannot be drawn: metrics.jsonl is empty or damaged"):
        curves(tmp_path / "curves.png", rows)
    assert not list(tmp_path.iterdir())


def test_a_grid_has_a_row_for_each_title(tmp_path, figures):
    random = np.random.default_rng(0)
    colour, maps = random.random((3, 8, 8, 3)), random.random((3, 4, 4))
    rows, given = [("image", colour, {}), ("p", torch.tensor(maps).flatten(1), PROBABILITY)], []
    grid(tmp_path / "grid.png", rows, given.append)
    axes = np.array(figures[0].axes[:6]).reshape(2, 3)
    assert len(given) == 1 and np.array_equal(given[0], axes)  # what may be drawn on the images
    assert [line[0].get_ylabel() for line in axes] == ["image", "p"]
    for line, images in zip(axes, (colour, maps)):
        for axis, image in zip(line, images):
            assert np.array_equal(axis.images[0].get_array(), image) and not len(axis.get_xticks())
    assert axes[1, 2].images[0].get_clim() == (0, 1) and axes[1, 2].images[0].get_cmap().name == "magma"
    assert (tmp_path / "grid.png").read_bytes().startswith(PNG)


def bars(figure, images):
    """Top and bottom of each colour bar, in rows of images from the top, and its range."""
    height = figure.axes[0].get_position().height
    top = figure.axes[0].get_position().y1
    found = []
    for axis in figure.axes[images:]:
        box = axis.get_position()
        assert box.x0 > max(other.get_position().x1 for other in figure.axes[:images])
        found.append((round((top - box.y1) / height, 1), round((top - box.y0) / height, 1), axis.get_ylim()))
    return found


def test_rows_of_probabilities_have_a_colour_bar(tmp_path, figures):
    p, pixels = np.random.default_rng(0).random((3, 4)), np.zeros((3, 8, 8, 3))
    rows = [("image", pixels, PIXELS), ("p", p, PROBABILITY), ("lit", pixels, PIXELS), *(("p", p, PROBABILITY),) * 2]
    grid(tmp_path / "grid.png", rows)
    assert bars(figures[0], 15) == [(1.0, 2.0, (0, 1)), (3.1, 5.2, (0, 1))]  # rows stand a little apart
    grid(tmp_path / "none.png", rows[:1])
    assert bars(figures[1], 3) == []


def test_a_grid_wastes_no_space(tmp_path, figures):
    """Images are square and fill the picture, titles stand left of them, and nothing is cut off."""
    rows = [("image", np.zeros((5, 8, 8, 3)), PIXELS), ("a title that is long", np.zeros((5, 4)), PROBABILITY)]
    grid(tmp_path / "grid.png", rows)
    width, height = figures[0].get_size_inches()
    boxes = [axis.get_position() for axis in figures[0].axes[:10]]
    assert all(box.width * width == pytest.approx(box.height * height, rel=0.02) for box in boxes)
    assert sum(box.width * box.height for box in boxes) > 0.6
    drawn = figures[0].get_tightbbox()  # inches
    assert (
        0 <= drawn.x0 < 0.5 and 0 <= drawn.y0 < 0.2 and width - 0.2 < drawn.x1 <= width and height - 0.2 < drawn.y1 <= height
    )


def test_a_line_of_one_point_is_seen(tmp_path, figures):
    rows = [EARLY | {"object_auc": 0.5}, EARLY | {"epoch": 2, "level2_loss": 0.7, "object_auc": 0.6}]
    for some in (rows, rows[:1]):
        curves(tmp_path / "curves.png", some)
    two, one = ({line.get_label(): line.get_marker() for axis in figure.axes for line in axis.lines} for figure in figures)
    assert two["level1_loss"] == "" and two["level2_loss"] == "o" and set(one.values()) == {"o"}
    assert "AUC of p against object patches" in two and len(figures[0].axes) == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_become_images_again(channels):
    """p*p*C of a patch are row, column, channel; the values that the mean and deviation of each channel took away return."""
    random = torch.Generator().manual_seed(0)
    images = torch.rand(2, 6, 6, channels, generator=random)  # [B, H, W, C]
    mean, std = [0.5, 0.4, 0.3][:channels], [0.2, 0.25, 0.3][:channels]
    normalised = (images - torch.tensor(mean)) / torch.tensor(std)
    patches = torch.stack([normalised[:, r : r + 2, c : c + 2].flatten(1) for r in (0, 2, 4) for c in (0, 2, 4)], 1)
    np.testing.assert_allclose(as_images(patches, 2, mean, std), images, atol=1e-6)
    extremes = as_images(100 * torch.sign(patches), 2, mean, std)
    assert set(np.unique(extremes)) == {0, 1}  # clipped


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="grid.png cannot be written"):
        grid(tmp_path / "nothing" / "grid.png", [("image", np.zeros((1, 2, 2)), {})])
