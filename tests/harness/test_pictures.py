"""Pictures: what is drawn where, and that a picture is never half written."""

import numpy as np
import pytest
import torch
from helpers import nothing_overlaps

from harness import UserError, pictures
from harness.pictures import GROUPS, PIXELS, as_images, curves, distinct, grid, overlaid, scale_of

PNG = b"\x89PNG"


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, real = [], pictures.save_figure
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: saved.append(figure) or real(figure, path))
    return saved


def lines_of(axis):
    """{label: (x, y)} of an axis, dotted lines of chance apart."""
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
    return {label: line for label, line in lines.items() if not label.startswith("_")}


EARLY = {"epoch": 1, "iteration": 1, "level1_loss": 0.9, "reconstruction_error": 0.9, "p_mean": 1.0}
LATE = {name: 0.1 * number for number, name in enumerate((word for group in GROUPS for word in group.words), 3)}


def test_curves_hold_losses_where_rows_have_them(tmp_path, figures):
    later = {"level2_loss": 0.7, "level3_loss": 0.8, "level3_chance": 0.75}
    rows = [EARLY, *(EARLY | {"epoch": epoch} | later for epoch in (2, 3)), EARLY | {"epoch": 4}]
    curves(tmp_path / "curves.png", {"run": rows}, "cross-entropy")
    shown = {axis.get_legend().get_title().get_text(): axis for axis in figures[0].axes}
    assert list(shown) == ["Level 1: reconstruction", "Levels 2 and 3: classifier", "Weights of patches"]  # no objects
    level1, labels, weights = shown.values()
    assert lines_of(level1)["L1, weighted reconstruction error"] == ([1, 2, 3, 4], [0.9] * 4)
    assert lines_of(labels)["L2, classifier on training images"] == ([2, 3], [0.7] * 2)
    assert labels.lines[-1].get_ydata()[0] == 0.75  # L3 of a head that sees nothing
    assert lines_of(weights) == {"mean of p": ([1, 2, 3, 4], [1.0] * 4)}
    assert [axis.get_ylabel() for axis in shown.values()] == [
        "squared error of pixels",
        "cross-entropy",
        "p, from 0 to 1",
    ]
    assert len({axis.get_xlim() for axis in shown.values()}) == 1  # when T learns is seen beside the whole run
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("runs", [1, 2, 12])
@pytest.mark.parametrize("row", [EARLY, EARLY | LATE], ids=["few", "all"])
def test_legends_and_captions_cover_nothing(tmp_path, figures, runs, row):
    rows = [row | {"epoch": epoch} for epoch in (1, 2, 3)]
    curves(tmp_path / "curves.png", {f"shapes-learned-of-some-kind-{number}": rows for number in range(runs)})
    nothing_overlaps(figures[0])
    assert len(figures[0].legends) == (runs > 1)


def test_several_runs_have_a_panel_a_measure_and_a_colour_each(tmp_path, figures):
    runs = {"a": [EARLY, EARLY | {"epoch": 2, "level3_loss": 0.5}], "b": [EARLY | {"level1_loss": 0.3, "object_auc": 0.7}]}
    curves(tmp_path / "curves.png", runs)
    shown = {axis.get_title(loc="left"): axis for axis in figures[0].axes if axis.axison}
    assert len(shown) == 5
    assert lines_of(shown["L1, weighted reconstruction error"]) == {"a": ([1, 2], [0.9, 0.9]), "b": ([1], [0.3])}
    assert lines_of(shown["L3, classifier on held-out images"]) == {"a": ([2], [0.5])}
    assert lines_of(shown["p tells objects from the rest (AUC)"]) == {"b": ([1], [0.7])}
    colours = {
        (line.get_label(), line.get_color()) for axis in shown.values() for line in axis.lines if line.get_label() in runs
    }
    assert len(colours) == 2 == len(dict(colours)) == len({colour for _, colour in colours})
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]


def test_what_to_look_for_is_said_of_what_is_there(tmp_path, figures):
    learning = EARLY | {"level3_loss": 1}
    for rows in ([EARLY], [learning], [learning | {"level3_chance": 1}], [EARLY | LATE]):
        curves(tmp_path / "curves.png", {"run": rows})
    mae, learned, known, objects = (figure.get_supxlabel().replace("\n", " ") for figure in figures)
    assert "No T learns" in mae and "L3" not in mae
    assert "L3 should fall" in learned and "objects" not in learned and ("dotted" in known) > ("dotted" in learned)
    assert "Of objects: above" in objects


def test_chance_is_drawn_where_runs_have_one(tmp_path, figures):
    """Over L3 alone, where each measure has a panel of its own."""
    row = EARLY | {"level2_loss": 0.7, "level3_loss": 0.8}
    for other in (0.751, 2.07):
        runs = {"a": [row | {"level3_chance": 0.75}], "b": [row | {"level3_chance": other}]}
        curves(tmp_path / "curves.png", runs)
    for figure, expected in zip(figures, (["L3, classifier on held-out images"], [])):
        dotted = [axis.get_title("left") for axis in figure.axes for line in axis.lines if line.get_linestyle() == ":"]
        assert [title for title in dotted if "classifier" in title] == expected
        assert ("below chance (dotted)" in figure.get_supxlabel().replace("\n", " ")) == bool(expected)


def test_noise_does_not_fill_an_axis(tmp_path, figures):
    rows = [EARLY | {"epoch": n, "mask_overlap": 0.75 + n / 1e4, "object_weight": 2.0 * n} for n in (1, 2)]
    curves(tmp_path / "curves.png", {"run": rows})
    _, _, overlap, ratio = figures[0].axes[:4]
    assert np.diff(overlap.get_ylim()) == pytest.approx(0.2) and sum(overlap.get_ylim()) / 2 == pytest.approx(0.75, abs=1e-3)
    assert ratio.get_ylim()[0] < 1 and ratio.get_ylim()[1] > 4


@pytest.mark.parametrize("rows", [[], [{}], [{"epoch": 1}]])
def test_what_is_no_metrics_is_refused(tmp_path, rows):
    with pytest.raises(UserError, match="curves.png cannot be drawn: metrics.jsonl of bad is empty or damaged"):
        curves(tmp_path / "curves.png", {"good": [EARLY], "bad": rows})
    assert not list(tmp_path.iterdir())


HEAT = {"cmap": "magma", "vmin": 0, "vmax": 0.5, "bar": "p"}


def test_a_grid_has_a_row_for_each_title(tmp_path, figures):
    random = np.random.default_rng(0)
    colour, maps = random.random((3, 8, 8, 3)), random.random((3, 4, 4))
    rows, given = [("image", colour, PIXELS), ("p", torch.tensor(maps).flatten(1), HEAT)], []
    names = ["a.png", "a_very_long_name.png", "$x^2.png"]  # the last is no formula
    grid(tmp_path / "grid.png", rows, "Look here.", annotate=given.append, columns=names)
    axes = np.array(figures[0].axes[:6]).reshape(2, 3)
    assert len(given) == 1 and np.array_equal(given[0], axes)  # what may be drawn on the images
    assert [line[0].get_ylabel() for line in axes] == ["image", "p"] and figures[0].get_supxlabel() == "Look here."
    assert [axis.get_title() for axis in axes[0]] == ["a.png", "a_very…ame.png", "$x^2.png"]
    nothing_overlaps(figures[0])
    for line, images in zip(axes, (colour, maps)):
        for axis, image in zip(line, images):
            assert np.array_equal(axis.images[0].get_array(), image) and not len(axis.get_xticks())
    assert axes[1, 2].images[0].get_clim() == (0, 0.5) and axes[1, 2].images[0].get_cmap().name == "magma"
    assert (tmp_path / "grid.png").read_bytes().startswith(PNG)


def test_a_film_goes_from_left_to_right(tmp_path, figures):
    images = np.random.default_rng(0).random((3, 8, 8, 3))
    grid(tmp_path / "film.png", [("image", images, PIXELS), ("epoch 1", images / 2, HEAT)], "Look.", film=True)
    axes = np.array(figures[0].axes[:6]).reshape(3, 2)
    assert [axis.get_title() for axis in axes[0]] == ["image", "epoch 1"]
    for line, image in zip(axes, images):
        assert all(np.array_equal(axis.images[0].get_array(), some) for axis, some in zip(line, (image, image / 2)))
    places = [[(axis.get_position().x0, -axis.get_position().y0) for axis in line] for line in axes]
    assert places == sorted(places, key=lambda line: line[0][1]) and all(left < right for left, right in places)
    beside = figures[0].axes[6].get_position()
    assert (beside.y0, beside.y1) == pytest.approx((axes[2, 0].get_position().y0, axes[0, 0].get_position().y1))
    nothing_overlaps(figures[0])


def bars(figure, images):
    """Top and bottom of each colour bar, in rows of images from the top, its range, and what stands above it."""
    height = figure.axes[0].get_position().height
    top = figure.axes[0].get_position().y1
    found = []
    for axis in figure.axes[images:]:
        box = axis.get_position()
        assert box.x0 > max(other.get_position().x1 for other in figure.axes[:images])
        found.append((round((top - box.y1) / height, 1), round((top - box.y0) / height, 1), axis.get_ylim(), axis.get_title()))
    return found


def test_rows_of_numbers_have_a_colour_bar(tmp_path, figures):
    p, pixels = np.random.default_rng(0).random((3, 4)), np.zeros((3, 8, 8, 3))
    rows = [("image", pixels, PIXELS), ("p", p, HEAT), ("lit", pixels, PIXELS), *(("p", p, HEAT),) * 2]
    grid(tmp_path / "grid.png", rows, "")
    assert bars(figures[0], 15) == [(1.0, 2.0, (0, 0.5), "p"), (3.1, 5.2, (0, 0.5), "p")]  # rows stand a little apart
    grid(tmp_path / "none.png", rows[:1], "")
    assert bars(figures[1], 3) == []


@pytest.mark.parametrize("images", [1, 2, 8])
@pytest.mark.parametrize("classes", [0, 1, 9, 60])
def test_a_grid_keeps_its_texts_apart_and_inside(tmp_path, figures, images, classes):
    """However few images there are, and however many classes."""
    rows = [("image", np.zeros((images, 8, 8, 3)), PIXELS), ("p, weight of\neach patch", np.zeros((images, 4)), HEAT)]
    key = distinct([f"class number {number}" for number in range(classes)])
    grid(tmp_path / "grid.png", rows, "Bright patches count more. If T works, they lie on objects." * 2, key)
    nothing_overlaps(figures[0])
    found = {text.get_text() for legend in figures[0].legends for text in legend.get_texts()}
    assert found == set(key)


def test_names_have_colours_of_their_own():
    for count in (1, 10, 20, 150):
        colours = distinct(range(count))
        assert len({tuple(colour) for colour in colours.values()}) == count == len(colours)


def test_a_grid_wastes_no_space(tmp_path, figures):
    """Images are square and fill the picture, titles stand left of them, and nothing is cut off."""
    rows = [("image", np.zeros((5, 8, 8, 3)), PIXELS), ("a title that is long", np.zeros((5, 4)), HEAT)]
    grid(tmp_path / "grid.png", rows, "Look.")
    width, height = figures[0].get_size_inches()
    boxes = [axis.get_position() for axis in figures[0].axes[:10]]
    assert all(box.width * width == pytest.approx(box.height * height, rel=0.02) for box in boxes)
    assert sum(box.width * box.height for box in boxes) > 0.5
    drawn = figures[0].get_tightbbox()  # inches
    assert (
        0 <= drawn.x0 < 0.5 and 0 <= drawn.y0 < 0.2 and width - 0.2 < drawn.x1 <= width and height - 0.2 < drawn.y1 <= height
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_an_overlay_has_the_scales_colours_over_the_image_in_grey(channels):
    from matplotlib import colormaps

    p = np.random.default_rng(0).random((2, 4)) / 2
    p[1, 3] = 0.5
    scale, images = scale_of(p), np.random.default_rng(1).random((2, 8, 8, channels))
    assert scale["vmax"] == 0.5 and scale_of(torch.zeros(2, 4))["vmax"] > 0
    shown = overlaid(images, p, scale)
    assert shown.shape == (2, 8, 8, 3)
    for image in range(2):
        for row, column in ((0, 0), (3, 4), (7, 7)):
            wanted = np.array(colormaps["magma"](p[image, 2 * (row // 4) + column // 4] / 0.5)[:3])
            grey = images[image, row, column].mean()
            np.testing.assert_allclose(shown[image, row, column], np.minimum(0.8 * wanted + 0.3 * grey, 1))


def test_a_line_of_one_point_is_seen(tmp_path, figures):
    rows = [EARLY | {"object_auc": 0.5}, EARLY | {"epoch": 2, "level2_loss": 0.7, "object_auc": 0.6}]
    for some in (rows, rows[:1]):
        curves(tmp_path / "curves.png", {"run": some})
    two, one = (
        {line.get_label(): line.get_marker() for axis in figure.axes for line in axis.lines if line.get_label()[0] != "_"}
        for figure in figures
    )
    assert two["L1, weighted reconstruction error"] == "" and two["L2, classifier on training images"] == "o"
    assert set(one.values()) == {"o"} and "p tells objects from the rest (AUC)" in one


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    rows = [("image", np.random.default_rng(0).random((2, 8, 8, 3)), PIXELS), ("p", np.eye(2, 4), HEAT)]
    for name in ("one.png", "two.png"):
        grid(tmp_path / name, rows, "Look.", {"some": (1, 0, 0)})
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one == two and b"tIME" not in one and b"Time" not in one  # nor do they say when


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
        grid(tmp_path / "nothing" / "grid.png", [("image", np.zeros((1, 2, 2)), PIXELS)], "Look.")
