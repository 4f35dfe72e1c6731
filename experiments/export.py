"""A run's weights for other programs: timm's VisionTransformer, or facebookresearch/mae.

    python mlo_mae.py export RUN --to timm                        # the encoder, as RUN/encoder-timm.safetensors
    python mlo_mae.py export RUN/finetune-short-0 --to timm       # and the classifier that was trained with it
    python mlo_mae.py export RUN --to mae                         # encoder and decoder, as RUN/autoencoder-mae.pth

The last line holds the call that builds the network there, and the mean and deviation that images need.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mlo_mae
from experiments import finetune
from harness import UserError, cli
from harness.checkpoints import fitting, newest, whole_number
from harness.files import check_free, write_whole
from harness.vectors import flatten
from harness.weights import STANDARD, is_decoder, write_safetensors
from mlo_mae import Config, Decoder, Encoder

EXPORTS = {"timm": "encoder-timm.safetensors", "mae": "autoencoder-mae.pth"}  # kinds, and their files in a run's folder
SIZES = "patch_size", "width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads"


class Trained(NamedTuple):
    """What a checkpoint holds, as far as others can use it."""

    cfg: Config  # of which SIZES are the run's
    image_size: int
    channels: int
    classes: int
    mean: list[float]  # of each channel of the images
    std: list[float]
    model: dict[str, Tensor]  # by public names
    pooling: str | None  # what the classifier reads, "cls" or "mean"; None: there is none


def export(run: Path, to: str, file: Path | None = None) -> dict:
    """Write a run's weights for other programs, to `file` or into the run's folder; returns what the command reports.

    to="timm": safetensors of the encoder, which timm's VisionTransformer loads strictly. It wants a classifier as well:
    that of a fine-tuning, if `run` is the folder of one; an encoder that was only pretrained has none, and head.weight
    and head.bias, for the run's classes, are zeros.
    to="mae": a .pth of {"model": encoder and decoder, as facebookresearch/mae names them, "call", "mean", "std"}.
    Raises UserError where the file exists already, or where a fine-tuning does not have what is asked for."""
    trained = read_trained(run)
    if trained.pooling and to == "mae":
        raise UserError(f"{run} is a fine-tuning, which has no decoder; export it --to timm, or the run that it started from")
    file = run / EXPORTS[to] if file is None else file
    check_free(file, "--file")
    report = {"command": "export", "run": str(run), "file": str(file), "mean": trained.mean, "std": trained.std}
    if to == "mae":
        facts = {"call": mae_call(trained), "mean": trained.mean, "std": trained.std}  # `read_weights` takes the heads of it
        write_whole(file, lambda opened: torch.save({"model": trained.model} | facts, opened))
        grey = {"note": "its patchify is written for 3 channels: the loss needs changing there"}
        return report | {"call": facts["call"]} | (grey if trained.channels != 3 else {})
    encoder, call = {name: tensor for name, tensor in trained.model.items() if not is_decoder(name)}, timm_call(trained)
    if trained.classes and not trained.pooling:
        encoder["head.weight"] = torch.zeros(trained.classes, trained.cfg.width)
        encoder["head.bias"] = torch.zeros(trained.classes)
    metadata = {"call": call, "mean": json.dumps(trained.mean), "std": json.dumps(trained.std)}
    write_whole(file, lambda opened: write_safetensors(encoder, opened, metadata))
    fresh = "zeros: a pretrained encoder has no classifier" if trained.classes else "none: its data have no classes"
    head = "the fine-tuned classifier" if trained.pooling else fresh
    return report | {"call": call, "head": head}


def read_trained(run: Path) -> Trained:
    """What the checkpoint of a run or of a fine-tuning holds. Raises UserError where it is absent, damaged or has no
    finished epoch yet."""
    path = run / "checkpoint.pt"
    content = newest(run, mlo_mae.FORMAT, finetune.FORMAT)
    with fitting(path):
        tuned = content["format"] == finetune.FORMAT
        found = content["best"] if tuned else content
        unfinished = tuned and "model" not in found
    if unfinished:
        raise UserError(f"{run} has no finished epoch yet; continue it with --resume")
    with fitting(path):
        cfg, facts, model = Config(**{name: content["config"][name] for name in SIZES}), content["data"], found["model"]
        mlo_mae.check(cfg)  # a damaged file must not ask for networks without end
        image_size, channels = whole_number(facts["image_size"]), whole_number(facts["channels"])
        classes = len(facts["class_names"])
        mean, std = ([float(value) for value in facts[name]] for name in ("mean", "std"))
        if not len(mean) == len(std) == channels:
            raise UserError(f"{len(mean)} means and {len(std)} deviations for {channels} channels")
        pooling = str(content["recipe"]["pooling"]) if tuned else None
        flatten(architecture(cfg, image_size, channels, classes, pooling), model)  # the one check of names, shapes and values
    return Trained(cfg, image_size, channels, classes, mean, std, model, pooling)


def architecture(cfg: Config, image_size: int, channels: int, classes: int, pooling: str | None) -> list[nn.Module]:
    """Encoder and decoder, or encoder and a classifier that reads `pooling`; without weights, which might be too many.

    Raises UserError where there is no such classifier."""
    with torch.device("meta"):
        encoder = Encoder(image_size, cfg.patch_size, channels, cfg.width, cfg.depth, cfg.heads)
        if pooling is None:
            sizes = cfg.width, cfg.decoder_width, cfg.decoder_depth, cfg.decoder_heads
            return [encoder, Decoder(image_size, cfg.patch_size, channels, *sizes)]
        classifier = nn.ModuleDict({"head": nn.Linear(cfg.width, classes)})
        if pooling == "mean":  # the mean is normalised, not the tokens
            classifier["fc_norm"], encoder.norm = encoder.norm, nn.Identity()
        elif pooling != "cls":
            raise UserError(f"a classifier of {pooling!r}")
        return [encoder, classifier]


def timm_call(trained: Trained) -> str:
    """The call that builds this encoder and classifier in timm, by a standard name where it has one."""
    cfg = trained.cfg
    classifier = f"num_classes={trained.classes}" + (", global_pool='avg'" if trained.pooling == "mean" else "")
    name = STANDARD.get((cfg.width, cfg.depth, cfg.heads))
    if name and (trained.image_size, trained.channels, cfg.patch_size) == (224, 3, 16):
        return f"timm.create_model('{name}', {classifier})"
    return f"timm.models.VisionTransformer({sizes_of(trained)}, {classifier})"


def mae_call(trained: Trained) -> str:
    """The call that builds this autoencoder in facebookresearch/mae."""
    cfg = trained.cfg
    decoder = (
        f"decoder_embed_dim={cfg.decoder_width}, decoder_depth={cfg.decoder_depth}, decoder_num_heads={cfg.decoder_heads}"
    )
    return (
        f"MaskedAutoencoderViT({sizes_of(trained)}, {decoder}, norm_layer=partial(nn.LayerNorm, eps=1e-6), norm_pix_loss=True)"
    )


def sizes_of(trained: Trained) -> str:
    """The encoder's sizes, as both packages name them."""
    cfg = trained.cfg
    return (
        f"img_size={trained.image_size}, patch_size={cfg.patch_size}, in_chans={trained.channels}, "
        f"embed_dim={cfg.width}, depth={cfg.depth}, num_heads={cfg.heads}"
    )


def run_command(argv: list[str] | None) -> dict:
    """Run `export` with these flags; returns what its last line reports."""
    parser = cli.Parser(prog="mlo_mae.py export", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, or of its fine-tuning")
    parser.add_argument("--to", choices=list(EXPORTS), required=True, help="timm: the encoder; mae: the decoder too")
    parser.add_argument("--file", type=Path, help=f"where to (default in RUN: {', '.join(EXPORTS.values())})")
    return export(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
