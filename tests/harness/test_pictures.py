"""Pictures: what is drawn where, and that a picture is never half written."""

import math

import numpy as np
import pytest
import torch

from harness import UserError, pictures
from harness.pictures import PROBABILITY, as_images, curves, grid

PNG = b"\x89PNG"


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, real = [], pictures.save_figure
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: saved.append(figure) or real(figure, path))
    return saved


EARLY = {"epoch": 1, "iteration": 1, "level1_loss": 0.9, "reconstruction_error": 0.9, "p_mean": 1.0}


def test_curves_hold_losses_from_their_first_row_on(tmp_path, figures):
    rows = [EARLY, EARLY | {"epoch": 2}, EARLY | {"epoch": 3, "level2_loss": 0.7, "level3_loss": 0.8}]
    curves(tmp_path / "curves.png", rows)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figures[0].axes[0].lines}
    assert lines["level1_loss"] == ([1, 2, 3], [0.9] * 3) and lines["level2_loss"] == ([3], [0.7])
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
    axes = np.array(figures[0].axes).reshape(2, 3)
    assert len(given) == 1 and np.array_equal(given[0], axes)  # what may be drawn on the images
    assert [line[0].get_ylabel() for line in axes] == ["image", "p"]
    for line, images in zip(axes, (colour, maps)):
        for axis, image in zip(line, images):
            assert np.array_equal(axis.images[0].get_array(), image) and not len(axis.get_xticks())
    assert axes[1, 2].images[0].get_clim() == (0, 1) and axes[1, 2].images[0].get_cmap().name == "magma"
    assert (tmp_path / "grid.png").read_bytes().startswith(PNG)


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
