"""export.py: what other programs read of a run and of a fine-tuning, and what is no run."""

import dataclasses
import json
import math

import pytest
import torch
from helpers import checkpoint_of, copied, public_shapes, refused, timm, weights

import mlo_mae
from experiments import finetune
from experiments.export import Trained, mae_call, read_trained, timm_call
from harness import UserError
from harness.weights import read_weights, stated_heads
from mlo_mae import Config, main


@pytest.fixture
def run(whole_run, tmp_path):
    return copied(whole_run[0], tmp_path / "run")


@pytest.fixture
def tuned(run, tmp_path):
    return fine_tuning(run, tmp_path / "tuned", "mean")


def fine_tuning(run, out, pooling):
    """A folder with what finetune.py's checkpoint holds, as far as it is exported."""
    content, random = checkpoint_of(run), torch.Generator().manual_seed(0)
    encoder, _ = public_shapes(16, 1, 4, 16, 8, 1)
    shapes = encoder | {"head.weight": (2, 16), "head.bias": (2,)}
    if pooling == "mean":
        shapes = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: s for name, s in shapes.items()}
    model = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    kept = {name: content[name] for name in ("config", "data")}
    out.mkdir()
    content = {
        "format": finetune.FORMAT,
        "recipe": {"pooling": pooling},
        "best": {"val_top1": 0.5, "epoch": 1, "model": model},
    }
    torch.save(kept | content, out / "checkpoint.pt")
    return out


def report_of(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------- a run


@pytest.mark.slow
def test_export_to_timm(run, capsys):
    assert main(["export", str(run), "--to", "timm"]) == 0
    report = report_of(capsys)
    assert report["file"] == str(run / "encoder-timm.safetensors") and len(report["mean"]) == len(report["std"]) == 3
    assert report["call"] == (
        "timm.models.VisionTransformer(img_size=16, patch_size=4, in_chans=3, embed_dim=16, depth=1, "
        "num_heads=2, num_classes=2)"
    )
    assert report["head"] == "zeros: a pretrained encoder has no classifier"
    found, trained = read_weights(report["file"]), weights(run)
    written = found.weights
    assert found.heads == {"heads": 2}
    expected, _ = public_shapes(16, 1, 4, 16, 8, 1)
    assert {name: tuple(t.shape) for name, t in written.items()} == expected | {"head.weight": (2, 16), "head.bias": (2,)}
    assert not written["head.weight"].any() and all(torch.equal(written[name], trained["model", name]) for name in expected)
    before = (run / "encoder-timm.safetensors").read_bytes()
    refused(["export", run, "--to", "timm"], capsys, "encoder-timm.safetensors exists already", "--file")
    assert (run / "encoder-timm.safetensors").read_bytes() == before


@pytest.mark.slow
def test_timm_loads_the_export_by_the_call_that_is_printed(run, tmp_path, capsys):
    package = timm()
    assert main(["export", str(run), "--to", "timm", "--file", str(tmp_path / "vit")]) == 0
    report = report_of(capsys)
    vit = eval(report["call"], {"timm": package})
    vit.load_state_dict(read_weights(report["file"]).weights, strict=True)


def test_export_to_mae(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", "mae", "--file", str(tmp_path / "mae.pth")]) == 0
    report = report_of(capsys)
    assert report["call"] == (
        "MaskedAutoencoderViT(img_size=16, patch_size=4, in_chans=3, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=8, "
        "decoder_depth=1, decoder_num_heads=2, norm_layer=partial(nn.LayerNorm, eps=1e-6), norm_pix_loss=True)"
    )
    content = torch.load(tmp_path / "mae.pth", weights_only=True)
    encoder, decoder = public_shapes(16, 1, 4, 16, 8, 1)
    assert all(content.pop(name) == report[name] for name in ("call", "mean", "std"))
    assert read_weights(tmp_path / "mae.pth").heads == {"heads": 2, "decoder_heads": 2}
    assert set(content) == {"model"} and {n: tuple(t.shape) for n, t in content["model"].items()} == encoder | decoder
    assert all(torch.equal(tensor, weights(run)["model", name]) for name, tensor in content["model"].items())
    refused(["export", run, "--to", "mae", "--file", tmp_path / "mae.pth"], capsys, "mae.pth exists already")


@pytest.mark.parametrize("sizes", [(768, 12, 12), (1024, 24, 16), (768, 12, 6), (16, 1, 2)])
@pytest.mark.parametrize("call", [timm_call, mae_call])
def test_every_call_states_the_heads(sizes, call):
    width, depth, heads = sizes
    cfg = Config(patch_size=16, width=width, depth=depth, heads=heads, decoder_heads=4)
    stated = stated_heads({"call": call(Trained(cfg, 224, 3, 2, [0.5] * 3, [0.2] * 3, {}, None))})
    assert stated == {"heads": heads} | ({"decoder_heads": 4} if call is mae_call else {})


def test_standard_sizes_are_called_by_their_names():
    base = Trained(Config(patch_size=16, width=768, depth=12, heads=12), 224, 3, 2, [0.5] * 3, [0.2] * 3, {}, None)
    assert timm_call(base) == "timm.create_model('vit_base_patch16_224', num_classes=2)"
    assert timm_call(base._replace(pooling="cls")) == "timm.create_model('vit_base_patch16_224', num_classes=2)"
    assert timm_call(base._replace(pooling="mean")).endswith("num_classes=2, global_pool='avg')")
    large = base._replace(cfg=Config(patch_size=16, width=1024, depth=24, heads=16))
    assert timm_call(large) == "timm.create_model('vit_large_patch16_224', num_classes=2)"
    assert "img_size=32, patch_size=16" in timm_call(base._replace(image_size=32))
    assert "in_chans=1" in timm_call(base._replace(channels=1))
    assert "num_heads=6" in timm_call(base._replace(cfg=dataclasses.replace(base.cfg, heads=6)))


# ---------------------------------------------------------------------------------------------------- a fine-tuning


@pytest.mark.parametrize("pooling, ending", [("cls", "num_classes=2)"), ("mean", "num_classes=2, global_pool='avg')")])
def test_a_fine_tuning_is_exported_with_its_classifier(run, tmp_path, capsys, pooling, ending):
    tuned = fine_tuning(run, tmp_path / "tuned", pooling)
    assert main(["export", str(tuned), "--to", "timm"]) == 0
    report = report_of(capsys)
    assert report["head"] == "the fine-tuned classifier" and report["call"].endswith(ending)
    written, model = read_weights(report["file"]).weights, read_trained(tuned).model
    assert written.keys() == model.keys() and all(torch.equal(written[name], model[name]) for name in model)
    assert ("fc_norm.weight" in written) == (pooling == "mean") == ("norm.weight" not in written)


def test_a_fine_tuning_has_no_decoder_and_at_first_nothing_at_all(tuned, capsys):
    refused(["export", tuned, "--to", "mae"], capsys, "is a fine-tuning, which has no decoder")
    content = torch.load(tuned / "checkpoint.pt", weights_only=True)
    torch.save(content | {"best": {"val_top1": -1.0}}, tuned / "checkpoint.pt")
    refused(["export", tuned, "--to", "timm"], capsys, "has no finished epoch yet")
    assert {path.name for path in tuned.iterdir()} == {"checkpoint.pt"}


# ------------------------------------------------------------------------------------------------------ bad input


def change(content, *path_and_value):
    """A copy of nested dicts with one value changed, or left out where it is "absent"."""
    name, *rest = path_and_value
    if len(rest) == 1 and isinstance(rest[0], str) and rest[0] == "absent":
        return {key: value for key, value in content.items() if key != name}
    return content | {name: rest[0] if len(rest) == 1 else change(content[name], *rest)}


@pytest.mark.parametrize("value", ["absent", 7, {}, None, math.nan, "7"], ids=str)
@pytest.mark.parametrize("field", ["config", "data", "model"])
def test_a_forged_checkpoint_ends_in_one_line(run, capsys, field, value):
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(change(content, field, value), run / "checkpoint.pt")
    for to in ("timm", "mae"):
        refused(["export", run, "--to", to], capsys, run / "checkpoint.pt")
    assert not list(run.glob("*.safetensors")) + list(run.glob("*.pth"))


@pytest.mark.parametrize("value", ["absent", 7, {}], ids=str)
@pytest.mark.parametrize("field", ["config", "data", "recipe", "best"])
def test_a_forged_fine_tuning_ends_in_one_line(tuned, capsys, field, value):
    content = torch.load(tuned / "checkpoint.pt", weights_only=True)
    torch.save(change(content, field, value), tuned / "checkpoint.pt")
    refused(["export", tuned, "--to", "timm"], capsys, tuned)
    assert {path.name for path in tuned.iterdir()} == {"checkpoint.pt"}


@pytest.mark.parametrize(
    "forged",
    [
        ("config", "width", 32),
        ("config", "width", 10**9),
        ("config", "depth", 10**9),
        ("config", "depth", "absent"),
        ("config", "heads", 3),
        ("data", "image_size", 20),
        ("data", "image_size", 16.5),
        ("data", "channels", 1),
        ("data", "class_names", 3),
        ("data", "mean", [0.5]),
        ("data", "std", ["a", "b", "c"]),
        ("model", "cls_token", "absent"),
        ("model", "cls_token", torch.zeros(1, 1, 24)),
        ("model", "cls_token", torch.full((1, 1, 16), math.nan)),
        ("model", "cls_token", torch.zeros(1, 1, 16).half()),
        ("model", "more", torch.zeros(2)),
    ],
    ids=lambda forged: " ".join(map(str, forged))[:40],
)
def test_a_value_that_does_not_fit_is_found(run, tuned, capsys, forged):
    for folder, place in ((run, ()), (tuned, ("best",) if forged[0] == "model" else ())):
        content = torch.load(folder / "checkpoint.pt", weights_only=True)
        torch.save(change(content, *place, *forged), folder / "checkpoint.pt")
        refused(["export", folder, "--to", "timm"], capsys, folder / "checkpoint.pt")
        assert not list(folder.glob("*.safetensors"))


def test_a_classifier_of_another_kind_is_refused(tuned):
    content = torch.load(tuned / "checkpoint.pt", weights_only=True)
    torch.save(change(content, "recipe", "pooling", "max"), tuned / "checkpoint.pt")
    with pytest.raises(UserError, match="a classifier of 'max'"):
        read_trained(tuned)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, capsys):
    (run / "checkpoint.previous.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    expected = read_trained(run)
    (run / "checkpoint.pt").write_bytes(b"damaged")
    found = read_trained(run)
    assert "checkpoint.previous.pt" in capsys.readouterr().err and found.cfg == expected.cfg
    assert all(torch.equal(found.model[name], tensor) for name, tensor in expected.model.items())


def test_what_is_no_run_is_named(tmp_path, capsys):
    refused(["export", tmp_path / "nothing", "--to", "timm"], capsys, tmp_path / "nothing", "does not exist")
    refused(["export", tmp_path], capsys, "--to")
    refused(["export", tmp_path, "--to", "keras"], capsys, "--to", "keras", "timm")
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    refused(["export", tmp_path, "--to", "timm"], capsys, "checkpoint.pt", mlo_mae.FORMAT, finetune.FORMAT)
