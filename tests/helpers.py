"""What several test files share: files of weights, damaged copies of files, and packages that may not be there."""

import argparse
import collections
import io

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.weights import write_safetensors

# ------------------------------------------------------------------------------------------------- public weights

Shapes = dict[str, tuple[int, ...]]


def public_shapes(
    width: int, depth: int, patch: int, patches: int, decoder_width: int, decoder_depth: int, channels: int = 3
) -> tuple[Shapes, Shapes]:
    """Names and shapes as timm 1.0.31's vit_base_patch16_224 (without its head) and facebookresearch/mae's models_mae.py
    have them, recorded as a rule: an encoder's and a decoder's."""

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def linear(name, outputs, inputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def block(name, width):
        attention = linear(f"{name}.attn.qkv", 3 * width, width) | linear(f"{name}.attn.proj", width, width)
        mlp = linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)
        return norm(f"{name}.norm1", width) | attention | norm(f"{name}.norm2", width) | mlp

    encoder = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + patches, width)}
    encoder |= {"patch_embed.proj.weight": (width, channels, patch, patch), "patch_embed.proj.bias": (width,)}
    for number in range(depth):
        encoder |= block(f"blocks.{number}", width)
    decoder = {"mask_token": (1, 1, decoder_width), "decoder_pos_embed": (1, 1 + patches, decoder_width)}
    decoder |= linear("decoder_embed", decoder_width, width)
    for number in range(decoder_depth):
        decoder |= block(f"decoder_blocks.{number}", decoder_width)
    decoder |= norm("decoder_norm", decoder_width) | linear("decoder_pred", patch * patch * channels, decoder_width)
    return encoder | norm("norm", width), decoder


def safetensors_bytes(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    write_safetensors(tensors, buffer, {})
    return buffer.getvalue()


def torch_bytes(content: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def public(tensors: dict[str, Tensor]) -> dict:
    """What facebookresearch/mae's training saves."""
    arguments = argparse.Namespace(model="mae_vit_base_patch16", blr=1.5e-4, batch_size=64, world_size=8, resume="")
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    scaler = {"scale": 65536.0, "_growth_tracker": 3}
    model = collections.OrderedDict(tensors)
    return {"model": model, "optimizer": optimizer.state_dict(), "epoch": 7, "scaler": scaler, "args": arguments}


def backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"net.backbone.{name}": tensor for name, tensor in tensors.items()} | {"neck.weight": torch.ones(2)}


WRAPPED = {  # kinds of files that hold weights by their public names: {name: tensor} -> the file's bytes
    "public .pth": lambda tensors: torch_bytes(public(tensors)),
    "legacy .pth": lambda tensors: torch_bytes(public(tensors), zipped=False),
    "state_dict of a wrapper": lambda tensors: torch_bytes({"state_dict": {f"module.{n}": t for n, t in tensors.items()}}),
    "encoder in a larger model": lambda tensors: torch_bytes(backbone(tensors)),
    "parameters": lambda tensors: torch_bytes({"model_ema": {n: torch.nn.Parameter(t) for n, t in tensors.items()}}),
    "safetensors": safetensors_bytes,
}


# --------------------------------------------------------------------------------------------------------- damage


def mutated(raw: bytes, rng: np.random.Generator) -> bytes:
    """A damaged copy: bytes changed, cut off, moved, doubled or put in; more often near either end, where headers are."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        near = min(len(raw), 160)
        at = int(rng.choice([rng.integers(0, near + 1), len(raw) - rng.integers(0, near + 1), rng.integers(0, len(raw) + 1)]))
        length = int(2 ** rng.uniform(0, 8))
        other = int(rng.integers(0, len(raw) + 1))
        match rng.integers(0, 8):
            case 0 | 1:
                for k in range(at, min(at + rng.integers(1, 5), len(raw))):
                    raw[k] = rng.choice([0, 1, 0x2E, 0x7F, 0x80, 0xFF, raw[k] ^ (1 << rng.integers(0, 8)), *rng.bytes(1)])
            case 2:
                del raw[at:]
            case 3:
                del raw[at : at + length]
            case 4:
                raw[at : at + length] = raw[other : other + length]
            case 5:
                raw[at:at] = raw[other : other + length]
            case 6:
                raw[at:at] = rng.bytes(length)
            case 7:
                raw[at : at + 4] = int(rng.choice([0, 2**31 - 1, 2**31, 2**32 - 1])).to_bytes(4, "little")
    return bytes(raw)


# ------------------------------------------------------------------------------------------------------- packages


def timm():
    """The package, or a skipped test."""
    try:
        return pytest.importorskip("timm")
    except Exception as error:  # a torchvision that was built for another torch, which timm imports
        pytest.skip(f"timm cannot be imported: {error}")
