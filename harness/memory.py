"""Less memory for the same result: a batch in parts, and activations that the backward pass computes again."""

import ctypes
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


def in_parts(function: Callable[..., tuple[Tensor, ...]], count: int, *batch: Tensor) -> tuple[Tensor, ...]:
    """function(*batch), tensors [B, ...] in and out, in `count` parts of the batch. The backward pass makes the activations
    of each part again, so that one part's are held at a time."""
    if count == 1:
        return function(*batch)
    parts = zip(*(tensor.chunk(count) for tensor in batch))
    if torch.is_grad_enabled():
        results = [checkpoint(function, *part, use_reentrant=False) for part in parts]
    else:
        results = [function(*part) for part in parts]
    return tuple(map(torch.cat, zip(*results)))


def keep_freed() -> None:
    """Have this process keep the memory that it frees, and use it again (Linux, GNU's C library). By default each large tensor
    is fetched from the system and given back, and clearing its pages costs a quarter of a pass over 512 images."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        largest, trim_threshold, mmap_max = 2**31 - 1, -1, -4  # names and numbers of <malloc.h>
        mallopt(trim_threshold, largest)
        mallopt(mmap_max, 0)


def through(blocks: Iterable[nn.Module], x: Tensor, recompute: bool, scales: Tensor | None = None) -> Tensor:
    """x [B, tokens, D] through the blocks; with `recompute`, a block keeps its input alone for the backward pass.

    scales [depth, 2, B, 1, 1]: factors of the blocks' branches (None: 1)."""
    for block, scale in zip(blocks, [None] * len(blocks) if scales is None else scales):
        if recompute and torch.is_grad_enabled():
            # Its parameters are arguments, since `call` has taken them out of the module by the time of the backward pass.
            x = checkpoint(functional_call, block, dict(block.named_parameters()), (x, scale), use_reentrant=False)
        else:
            x = block(x, scale)
    return x
