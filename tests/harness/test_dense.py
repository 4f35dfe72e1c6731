"""harness/dense.py: masks and boxes follow their images, and whatever is wrong with a folder of them ends in one line.

MLO_MAE_FUZZ sets how many damaged files are tried.
"""

import json
import math
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    FUZZ,
    coco_content,
    memory_is_bounded,
    mutated,
    oriented,
    said,
    turned_photo,
    write_coco,
    write_masked,
)
from PIL import Image

import data
from harness import UserError, dense
from harness.dense import IGNORED, Boxed, Masked, load_dense, tightest_boxes

pytestmark = pytest.mark.usefixtures("no_hang", "drawn_once")


# ------------------------------------------------------------------------------------------------- labels follow images


@pytest.mark.parametrize("name", data.DRAWN)
@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_shapes_are_split_as_for_pretraining(name, kind):
    plain, dense = data.load(name, "", limit=300, seed=3), load_dense(name, kind, limit=300, seed=3)
    for part in ("train", "val", "test"):
        a, b = getattr(plain, part), getattr(dense, part)
        assert torch.equal(a.images, b.images) and torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)
        if kind == "masks":
            assert torch.equal(b.labels > 0, a.objects)
            assert torch.equal(b.labels.amax((1, 2)).long(), a.labels + 1)
        else:
            assert torch.equal(b.labels[:, 0, 4].long(), a.labels)
    assert dense.class_names == (["background"] if kind == "masks" else []) + data.SHAPES


def test_masks_move_with_their_images():
    """Images that hold their own labels, so any move that the two do not share shows."""
    masks = torch.randint(0, 200, (6, 16, 16), dtype=torch.uint8)
    split = Masked(masks[:, None].repeat(1, 3, 1, 1), masks, (0.0,) * 3, (1.0,) * 3)
    moves = set()
    for images, labels in (batch for batch, _ in zip(split.stream(6, 0), range(8))):
        there = labels != IGNORED
        assert labels.dtype == torch.uint8 and torch.equal((images[:, 0] * 255).round().byte()[there], labels[there])
        assert not images[:, 0][~there].any()  # black around the image has no class
        moves.add(int(there.sum()))
    assert len(moves) > 3
    plain = next(split.ordered(6))
    assert torch.equal(plain.labels, masks)


def test_boxes_move_with_their_images():
    """The box of an object's pixels after a move is its box, moved."""
    shapes = load_dense("shapes", "masks", limit=200).train, load_dense("shapes", "boxes", limit=200).train
    seen = 0
    for masks, boxes in zip(*(split.stream(40, 5) for split in shapes)):
        inside = ((masks.labels > 0) & (masks.labels < IGNORED)).numpy()
        whole = (masks.labels != IGNORED).float().mean((1, 2)) == 1  # not moved but perhaps mirrored: nothing was cut off
        found = tightest_boxes(inside, boxes.labels[:, 0, 4].numpy())[:, 0, :4]
        low, high = boxes.labels[:, 0, :2].numpy(), boxes.labels[:, 0, 2:4].numpy()
        assert np.all(low <= found[:, :2]) and np.all(high >= found[:, 2:])  # a cut object may fill less than its cut box
        assert np.array_equal(found[whole], boxes.labels[whole, 0, :4].numpy())
        assert (np.abs(found - boxes.labels[:, 0, :4].numpy()).max(1) == 0).mean() > 0.8
        seen += 1
        if seen == 6:
            break


def test_a_box_that_is_moved_out_of_the_image_is_none():
    box = torch.tensor([[[0, 0, 2, 2, 3], [4, 4, 16, 16, 1], [0, 0, 0, 0, -1]]], dtype=torch.float32)
    split = Boxed(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), box, (0.0,) * 3, (1.0,) * 3)

    def moved(top, left, flip):  # 0 to 4: by 2 pixels down or right, to 2 up or left
        return split.moved_labels(box, *map(torch.tensor, ([top], [left], [flip]))).tolist()[0]

    none = [0, 0, 0, 0, -1]
    assert moved(4, 4, False) == [none, [2, 2, 14, 14, 1], none]
    assert moved(4, 4, True)[1] == [2, 2, 14, 14, 1]
    assert moved(0, 2, False)[:2] == [[0, 2, 2, 4, 3], [4, 6, 16, 16, 1]]
    assert moved(0, 2, True)[:2] == [[14, 2, 16, 4, 3], [0, 6, 12, 16, 1]]
    assert moved(3, 2, False)[0] == [0, 0, 2, 1, 3]  # a pixel's breadth is left


# ---------------------------------------------------------------------------------------------------------- own folders


@pytest.mark.parametrize("names", [{}, {"masks": "annotations", "train": "training", "val": "validation"}])
def test_a_folder_of_masks(tmp_path, names):
    root = write_masked(tmp_path, **names)
    splits = load_dense(root, "masks", image_size=16, ignored=7, val_fraction=0.34)
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [4, 2, 3]
    assert splits.class_names == ["3", "200"] and splits.train.labels.shape == (4, 16, 16)
    with Image.open(root / names.get("masks", "masks") / names.get("val", "val") / "1.png") as mask:
        values = np.asarray(mask.resize((16, 16), Image.Resampling.NEAREST))
    assert np.array_equal(splits.test.labels[1], np.select([values == 3, values == 200], [0, 1], IGNORED))


def test_folders_are_told_apart_by_labels_and_names(tmp_path):
    roots = {"masks": write_masked(tmp_path / "masked"), "boxes": write_coco(tmp_path / "boxed")}
    for kind, root in roots.items():
        first = load_dense(root, kind, image_size=16).digest
        root = root.rename(tmp_path / f"moved-{kind}")
        assert load_dense(root, kind, image_size=16).digest == first
        if kind == "masks":
            for path in (root / "images/train/0.jpg", root / "masks/train/0.png"):
                path.rename(path.with_stem("00"))
        else:
            name, file = (
                next(path.name for path in (root / "train2017").iterdir()),
                root / "annotations/instances_train2017.json",
            )
            (root / "train2017" / name).rename(root / "train2017" / f"x{name}")
            file.write_text(file.read_text().replace(f'"{name}"', f'"x{name}"'))
        assert load_dense(root, kind, image_size=16).digest != first


@pytest.mark.parametrize("kind, place", [("masks", "images/train"), ("boxes", "train2017")])
def test_images_are_held_out_by_their_names(tmp_path, kind, place):
    """The split does not depend on where the folder lies; an image that goes changes the side of one other at most."""
    random, root = np.random.default_rng(0), tmp_path / "a"
    root.mkdir()
    write_masked(root) if kind == "masks" else write_coco(root, **coco_content(24))
    for i in range(24):
        Image.fromarray(random.integers(0, 255, (20, 40, 3), dtype=np.uint8)).save(root / place / f"{i}.jpg")
        if kind == "masks":
            mask = random.choice([3, 7, 200], (20, 40)).astype(np.uint8)
            Image.fromarray(mask).save(root / "masks" / "train" / f"{i}.png")

    def sides(root):
        splits = load_dense(root, kind, image_size=16)
        return tuple({image.numpy().tobytes() for image in split.images} for split in (splits.train, splits.val))

    train, val = sides(root)
    assert (len(train), len(val)) == (19, 5) and sides(shutil.copytree(root, tmp_path / "b" / "c")) == (train, val)
    for gone in range(0, 24, 3):
        if kind == "masks":
            file = root / place / f"{gone}.jpg"
            file.rename(tmp_path / file.name)
            others, held = sides(root)
            (tmp_path / file.name).rename(file)
        else:
            content = coco_content(24)
            del content["images"][gone]
            content["annotations"] = [some for some in content["annotations"] if some["image_id"] != 10 + gone]
            (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
            others, held = sides(root)
        assert len(others | held) == 23 and len(train & held | val & others) <= 1


def test_palette_masks_and_a_val_folder_of_its_own(tmp_path):
    root = write_masked(tmp_path, values=(0, 1))
    for top, suffix in (("images", ".jpg"), ("masks", ".png")):
        (root / top / "test").mkdir()
        (root / top / "test" / f"a{suffix}").write_bytes((root / top / "val" / f"0{suffix}").read_bytes())
    path = root / "masks" / "test" / "a.png"
    with Image.open(path) as mask:
        palette = Image.fromarray(np.asarray(mask), mode="P")
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.save(path)
    splits = load_dense(root, "masks", image_size=16)
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [6, 3, 1]
    assert torch.equal(splits.test.labels[0], splits.val.labels[0])


def test_a_folder_of_boxes(tmp_path):
    splits = load_dense(write_coco(tmp_path / "a"), "boxes", image_size=64, val_fraction=0.25)
    assert splits.class_names == ["cat", "dog"] and len(splits.test) == 4
    assert splits.test.images[2, 0].float().mean() == pytest.approx(80, abs=2)  # in the order of the file
    scale = torch.tensor([64 / 40, 64 / 20, 64 / 40, 64 / 20])
    assert torch.equal(splits.test.labels[0, :, :4], torch.tensor([[0, 2, 8, 12], [4, 2, 12, 12]]) * scale)  # no crowd
    assert splits.test.labels[0, :, 4].tolist() == [0, 1]
    assert splits.test.labels[3].tolist() == [pytest.approx([24 * 1.6, 2 * 3.2, 32 * 1.6, 12 * 3.2, 0]), [-1] * 5]


def test_boxes_that_reach_out_of_their_images_are_counted(tmp_path, capsys):
    """As most do whose bbox gives two corners."""
    boxes = [[0, 0, 40, 20], [-1, 0, 42, 20], [30, 2, 12, 10], [0, -2, 8, 8], [1, 15, 8, 19]]
    annotations = [annotation | {"id": 5 + i, "bbox": box} for i, box in enumerate(boxes)]
    load_dense(write_coco(tmp_path, annotations=annotations), "boxes", image_size=40, val_fraction=0.25)
    (line,) = (line for line in said(capsys) if "cut off" in line)
    source = tmp_path / "annotations" / "instances_train2017.json"
    assert line.startswith(f"data {source}: 3 boxes outside of the image, as annotation 7: 3 partly, cut off at the border; 0")
    assert "left out; a bbox is left, top, width and height in pixels" in line


def rewritten(root, **changes):
    """The folder of `write_coco`, after these changes in what it says about the images for the test."""
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(coco_content(**changes)))
    return root


def test_a_category_is_its_name(tmp_path):
    alike = load_dense(write_coco(tmp_path / "a"), "boxes", image_size=16)
    content = coco_content()
    for row in content["annotations"]:
        row["category_id"] = {5: 9, 9: 5}[row["category_id"]]
    swapped = {"annotations": content["annotations"], "categories": [{"id": 5, "name": "dog"}, {"id": 9, "name": "cat"}]}
    other = load_dense(rewritten(tmp_path / "a", **swapped), "boxes", image_size=16)
    assert other.class_names == alike.class_names == ["cat", "dog"]
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(other, part).labels, getattr(alike, part).labels)

    unused = {"categories": [*content["categories"], {"id": 1, "name": "cow"}]}  # and so in nobody's way
    assert load_dense(rewritten(tmp_path / "a", **unused), "boxes", image_size=16).class_names == ["cat", "dog"]
    strange = {"categories": [{"id": 5, "name": "cow"}, {"id": 9, "name": "dog"}]}
    with pytest.raises(
        UserError, match=r"instances_val2017.json: it has boxes of cow, categories that train's .*\(cat, dog\)"
    ):
        load_dense(rewritten(tmp_path / "a", **strange), "boxes", image_size=16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_they_say(tmp_path, orientation):
    """Pixels, boxes and masks are of one frame: that of the photo once it is turned."""
    boxes, masks = write_coco(tmp_path / "boxes"), write_masked(tmp_path / "masks", values=(0, 1))
    wanted = load_dense(boxes, "boxes", image_size=16), load_dense(masks, "masks", image_size=16)
    for path in tmp_path.rglob("*.jpg"):  # saved so that nothing is lost, whatever their suffix
        with Image.open(path) as image:
            turned_photo(image, orientation).save(path, "png", exif=oriented(orientation))
    for path in masks.glob("masks/val/*.png"):  # those of train are upright as they are
        with Image.open(path) as mask:
            turned_photo(mask, orientation).save(path, exif=oriented(orientation))
    for before, after in zip(wanted, (load_dense(boxes, "boxes", image_size=16), load_dense(masks, "masks", image_size=16))):
        for a, b in ((before.train, after.train), (before.test, after.test)):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_sizes_that_are_stated_are_those_that_are_there(tmp_path):
    def stating(width, height):
        images = [row | {"width": width, "height": height} for row in coco_content()["images"]]
        return rewritten(tmp_path / "a", images=images)

    write_coco(tmp_path / "a")  # 40 x 20
    for width, height in ((20, 40), (40, 30), (1e300, 1e300)):
        words = f"val2017/0.jpg: instances_val2017.json says that it has {width:g} x {height:g} pixels, but it has 40 x 20;"
        with pytest.raises(UserError, match=words.replace("+", r"\+")):
            load_dense(stating(width, height), "boxes", image_size=16)
    for width, height in ((40, 20), (640, 320), (643, 315), (20, 10), (7, 4), ("40", "20")):  # scaled, sides rounded
        load_dense(stating(width, height), "boxes", image_size=16)
    path = tmp_path / "a" / "val2017" / "2.jpg"
    Image.new("RGB", (40, 20)).save(path, exif=oriented(6))
    with pytest.raises(UserError, match="2.jpg: .* but it has 20 x 40 once turned as its EXIF says"):
        load_dense(stating(40, 20), "boxes", image_size=16)


def test_masks_with_palettes_of_their_own(tmp_path):
    """A value stands for its colour, so files in which it has different ones do not go together."""
    root = write_masked(tmp_path, values=(0, 1))

    def save(part, *colours):
        path = root / "masks" / part / "1.png"
        with Image.open(path) as mask:
            palette = Image.fromarray(np.asarray(mask), mode="P")
        palette.putpalette(sum(colours, ()))
        palette.save(path)

    save("train", (0, 0, 0), (200, 0, 0), (0, 200, 0))
    for same in ([(0, 0, 0), (200, 0, 0), (9, 9, 0)], [(0, 0, 0), (1, 1, 1)]):  # a value not in use, or grey: no colours
        save("val", *same)
        load_dense(root, "masks", image_size=16)
    save("val", (0, 0, 0), (0, 200, 0), (200, 0, 0))
    with pytest.raises(
        UserError, match=r"val/1.png: .* \[0, 200, 0\] for the value 1, that of .*train/1.png has \[200, 0, 0\]"
    ):
        load_dense(root, "masks", image_size=16)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_masks_of_few_bits_have_their_own_values(tmp_path, bits):
    """PIL spreads them over 0 to 255."""
    values = np.arange(30 * 21).reshape(21, 30) % 2**bits
    raw = np.zeros((21, -(-30 * bits // 8)), np.uint8)
    for x in range(30):
        raw[:, x * bits // 8] |= (values[:, x] << (8 - bits - x * bits % 8)).astype(np.uint8)

    def chunk(name, content):
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    header = (30).to_bytes(4, "big") + (21).to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    lines = zlib.compress(b"".join(b"\0" + line.tobytes() for line in raw))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    (tmp_path / "mask.png").write_bytes(png)
    Image.new("RGB", (30, 21)).save(tmp_path / "image.png")
    found = dense.read_mask({}, (tmp_path / "mask.png", tmp_path / "image.png"), 8)
    same = np.asarray(Image.fromarray(values.astype(np.uint8)).resize((8, 8), Image.Resampling.NEAREST))
    assert np.array_equal(found, same) and set(np.unique(found)) <= set(range(2**bits))


def test_dark_images_beside_masks_are_refused_where_the_folder_is_named_relatively(tmp_path, monkeypatch):
    root = write_masked(tmp_path / "data")
    for path in (root / "images").rglob("*.jpg"):
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L")).astype(np.uint16)
        Image.fromarray(grey).save(path.with_suffix(".png"))
        path.unlink()
    monkeypatch.chdir(tmp_path)
    for name in ("data", root):
        with pytest.raises(UserError, match="65535 is taken for white: at most 1 of 256 levels"):
            load_dense(Path(name), "masks", image_size=16)


def test_ignored_pixels_are_counted_and_may_be_kept(tmp_path, capsys):
    root = write_masked(tmp_path, values=(0, 128, 255))
    splits = load_dense(root, "masks", image_size=16)
    labels = torch.cat([split.labels for split in (splits.train, splits.val, splits.test)])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "--ignore" in line]
    share = 100 * (labels == IGNORED).float().mean().item()
    assert 30 < share < 36 and line.startswith(
        f"data {root}: {share:.3g} % of the masks' pixels have the value 255, which is ignored"
    )
    assert splits.class_names == ["0", "128"]

    splits = load_dense(root, "masks", image_size=16, ignored=None)
    kept = torch.cat([split.labels for split in (splits.train, splits.val, splits.test)])
    assert splits.class_names == ["0", "128", "255"] and "--ignore" not in capsys.readouterr().err
    assert torch.equal(kept, labels.where(labels != IGNORED, 2))
    moved = next(splits.train.stream(4, 0)).labels
    assert (moved == IGNORED).any() and moved[moved != IGNORED].max() == 2  # beside the image there is no class still

    load_dense(write_masked(tmp_path / "none", values=(0, 128)), "masks", image_size=16)
    assert "--ignore" not in capsys.readouterr().err
    with pytest.raises(UserError, match="show 1 class; .* have the value 255, which is ignored; --ignore none keeps it"):
        load_dense(write_masked(tmp_path / "binary", values=(0, 255)), "masks", image_size=16)
    assert load_dense(tmp_path / "binary", "masks", image_size=16, ignored=None).class_names == ["0", "255"]


def replaced(name, change):
    def damage(root):
        path = root / name
        change(path)

    return damage


MASK_FAULTS = {
    "no mask": (replaced("masks/train/0.png", Path.unlink), "masks/train/0.png"),
    "an image that is none": (replaced("images/val/1.jpg", lambda p: p.write_bytes(b"no")), "images/val/1.jpg"),
    "a mask that is none": (replaced("masks/val/1.png", lambda p: p.write_bytes(b"no")), "masks/val/1.png"),
    "a cut mask": (replaced("masks/val/1.png", lambda p: p.write_bytes(p.read_bytes()[:60])), "masks/val/1.png"),
    "colours": (replaced("masks/val/1.png", lambda p: Image.new("RGB", (30, 21)).save(p)), "its mode is RGB"),
    "another size": (replaced("masks/val/1.png", lambda p: Image.new("L", (30, 30)).save(p)), "30 x 30 pixels, but"),
    "an unknown class": (
        replaced("masks/val/1.png", lambda p: Image.new("L", (30, 21), 9).save(p)),
        "masks/val/1.png: the value 9, which no mask for training has",
    ),
    "no images": (replaced("images/val", lambda p: [file.unlink() for file in p.iterdir()]), "no images"),
    "no training": (replaced("masks/train", shutil.rmtree), "expected images/train/*.jpg"),
    "no test": (replaced("masks/val", shutil.rmtree), "expected images/train/*.jpg"),
}


@pytest.mark.parametrize("fault", MASK_FAULTS)
def test_masks_that_cannot_be_used(tmp_path, fault):
    damage, words = MASK_FAULTS[fault]
    damage(write_masked(tmp_path))
    with pytest.raises(UserError) as caught:
        load_dense(tmp_path, "masks", image_size=16)
    assert words in str(caught.value) and str(caught.value).isprintable()


def test_masks_of_one_class_teach_nothing(tmp_path):
    with pytest.raises(UserError, match="show 1 class;"):
        load_dense(write_masked(tmp_path, values=(4, 255)), "masks", image_size=16)


annotation, small = coco_content()["annotations"][0], {"id": 10, "file_name": "0.jpg", "width": 4, "height": 4}
BOX_FAULTS = {
    "a category": ({"annotations": [annotation | {"category_id": 6}]}, "annotation number 1 is of category 6, which the file"),
    "an image": ({"annotations": [annotation | {"image_id": 999, "id": 7}]}, "annotation 7 is of image 999, which the file"),
    "no box": ({"annotations": [{"image_id": 10, "category_id": 5, "id": 7}]}, "annotation 7 has the bbox None"),
    "of no image": ({"annotations": [{"category_id": 5, "bbox": [1, 2, 3, 4], "id": 7}]}, "annotation 7 has no image_id"),
    "three numbers": ({"annotations": [annotation | {"bbox": [1, 2, 3]}]}, "has the bbox [1, 2, 3]; it must be"),
    "a negative breadth": ({"annotations": [annotation | {"bbox": [1, 2, -3, 4]}]}, "has the bbox [1, 2, -3, 4]"),
    "shares": ({"annotations": [annotation | {"bbox": [0.1, 0.2, 0.5, 1]}]}, "no number in its boxes is above 1; a bbox is"),
    "shares, rounded up": (
        {"annotations": [annotation | {"bbox": [0.1, 0.2, 0.5, 0.3]}, annotation | {"bbox": [-0.001, 0, 1.002, 1]}]},
        "no number in its boxes is above 1.002; a bbox is",
    ),
    "all outside": (
        {"annotations": [annotation | {"bbox": [500, 2, 3, 4], "id": 7}]},
        "all its boxes are outside of their images, as annotation 7; a bbox is",
    ),
    "not a number": ({"annotations": [annotation | {"bbox": [1, math.nan, 3, 4]}]}, "has the bbox"),
    "infinite": ({"annotations": [annotation | {"bbox": [1, 2, 3, math.inf]}]}, "has the bbox"),
    "a width of 0": ({"images": [small | {"width": 0}], "annotations": [annotation]}, "image 10 the width 0 and height 4"),
    "no width": ({"images": [{"id": 10, "file_name": "0.jpg"}], "annotations": [annotation]}, "the width None"),
    "no boxes": ({"annotations": []}, "up to 0 boxes"),
    "no categories": ({"categories": []}, "0 categories"),
    "doubled categories": ({"categories": [{"id": 5, "name": "a"}, {"id": 5, "name": "b"}]}, "categories have the id 5"),
    "doubled names": ({"categories": [{"id": 5, "name": "a"}, {"id": 6, "name": "a"}]}, "categories have the name 'a'"),
    "a nameless category": ({"categories": [{"id": 5}]}, "it has no 'name'"),
    "doubled images": ({"images": [small, small]}, "2 images with 1 id;"),
    "a way out": ({"images": [small | {"file_name": "../0.jpg"}], "annotations": [annotation]}, "out of its folder"),
    "another root": ({"images": [small | {"file_name": "/0.jpg"}], "annotations": [annotation]}, "out of its folder"),
    "an absent image": ({"images": [small | {"file_name": "9.jpg"}], "annotations": [annotation]}, "9.jpg"),
    "no list": ({"images": {"a": 1}}, "cannot be used"),
}


@pytest.mark.parametrize("fault", BOX_FAULTS)
def test_boxes_that_cannot_be_used(tmp_path, fault):
    changes, words = BOX_FAULTS[fault]
    with pytest.raises(UserError) as caught:
        load_dense(write_coco(tmp_path / "a", **changes), "boxes", image_size=16)
    assert words in str(caught.value) and str(caught.value).isprintable()
    assert "KeyError" not in str(caught.value) and "source" not in str(caught.value)  # a file of one's own has none


def test_folders_of_boxes_that_cannot_be_used(tmp_path):
    root = write_coco(tmp_path / "a")
    path = root / "annotations" / "instances_val2017.json"
    for content, words in (
        (b"{", "JSONDecodeError"),
        (b"[" * 10**5, "RecursionError"),
        (b"\xff" * 9, "cannot be used"),
        (b"[]", "no object"),
        (b"{}", "no 'categories'"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            load_dense(root, "boxes", image_size=16)
    path.unlink()
    with pytest.raises(UserError, match="expected annotations/instances_train"):
        load_dense(root, "boxes", image_size=16)
    (root / "annotations" / "instances_train.json").write_text("{}")
    with pytest.raises(UserError, match="leave one of them"):
        load_dense(root, "boxes", image_size=16)


def test_what_is_left_out_is_counted(tmp_path, capsys):
    masked, coco = write_masked(tmp_path / "a"), write_coco(tmp_path / "b")
    for stray in ("images/train/.DS_Store", "images/val/notes.txt", "masks/train/99.png"):
        (masked / stray).write_bytes(b"")
    (coco / "train2017" / "99.jpg").write_bytes(b"")
    splits = load_dense(masked, "masks", image_size=16), load_dense(coco, "boxes", image_size=16)
    first, second = said(capsys)
    left_out = "3 files left out: 1 with a dot in front, 1 masks without an image, 1 *.txt"
    assert first == f"data {masked}: train 5 images, val 1 image, test 3 images, 3 classes; {left_out}"
    counts = f"train {len(splits[1].train)} images, val {len(splits[1].val)} image, test 4 images, 2 classes"
    assert second == f"data {coco}: {counts}; 1 file left out: 1 that instances_train2017.json does not list"


@pytest.mark.slow
@pytest.mark.parametrize("kind, write", [("masks", write_masked), ("boxes", write_coco)])
def test_fuzz(tmp_path, kind, write):
    """Damaged files give valid splits or one line, as in test_readers.py."""
    root = write(tmp_path / "a")
    paths, accepted = sorted(path for path in root.rglob("*.*") if path.is_file()), 0
    described = [path for path in paths if path.suffix in (".png", ".json")]
    for number in range(FUZZ):
        rng = np.random.default_rng([number, *kind.encode()])
        path = (described if number % 3 else paths)[rng.integers(len(described if number % 3 else paths))]
        whole = path.read_bytes()
        path.write_bytes(mutated(whole, rng))
        try:
            splits = load_dense(root, kind, image_size=8)
            for split in (splits.train, splits.val, splits.test):
                images, labels = next(split.stream(3, 0))
                assert images.shape == (3, 3, 8, 8) and images.isfinite().all() and labels.isfinite().all()
                classes = labels[labels != IGNORED].int() if kind == "masks" else labels[..., 4]
                assert classes.numel() == 0 or -1 <= classes.min() and classes.max() < len(splits.class_names)
                assert kind == "masks" or 0 <= labels[..., :4].min() and labels[..., :4].max() <= 8
            accepted += 1
        except UserError as error:
            assert str(error).isprintable()
        except BaseException:
            print(f"{kind} number {number}: {path}")
            raise
        path.write_bytes(whole)
    load_dense(root, kind, image_size=8)  # it was the damage
    assert 0 < accepted < FUZZ
    memory_is_bounded()


@pytest.mark.parametrize(
    "option, value", [("image_size", -1), ("image_size", 10**6), ("limit", -1), ("val_fraction", 1.0), ("ignored", 256)]
)
def test_options_out_of_range(option, value):
    with pytest.raises(UserError, match="out of range"):
        load_dense("shapes", "masks", **{option: value})


def test_one_image_that_fails_ends_the_reading_of_all():
    def reader(number, size):
        if number == 0:
            raise UserError("it cannot be read")
        time.sleep(0.05)
        return np.zeros(1, np.uint8)

    began = time.monotonic()
    with pytest.raises(UserError, match="it cannot be read"):
        dense.read_all(reader, range(1000), 1, (1,), "images")
    assert time.monotonic() - began < 1


def test_boxes_outside_of_their_image_are_cut_off_or_left_out(tmp_path, capsys):
    boxes = [[-5, 2, 10, 4], [40, 2, 5, 5], [2, 2, 5, 5], [0, 0, 20.4, 10]]  # partly, wholly, within, and rounded
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 10}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": n, "image_id": 1, "category_id": 1, "bbox": box} for n, box in enumerate(boxes)],
    }
    labels = dense.coco_boxes(content, ["cat"], 20, tmp_path / "instances_train.json")[2]
    assert labels[0, :, :4].tolist() == [[0, 4, 5, 12], [2, 4, 7, 14], [0, 0, 20, 20]]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data ") and "2 boxes outside of the image, as annotation " in line
    assert ": 1 partly, cut off at the border; 1 wholly, left out; a bbox is" in line
