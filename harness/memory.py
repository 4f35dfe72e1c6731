"""Memory: whether a batch can fit, and less of it for the same result: a batch in parts, activations computed again."""

import ctypes
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from harness import UserError
from harness.vectors import call

try:
    import resource
except ImportError:  # Windows
    resource = None


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on this device; to a GPU it goes when that gets there, and nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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


def held_for_backward(function: Callable[[], object]) -> int:
    """Bytes that the graph of what function() returns keeps for its backward pass."""
    sizes, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()  # views share one
        alive.append(tensor)  # so that no other gets its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(sizes.values())


def foresee(function: Callable[[int], object], images: int, what: str, device: torch.device, remedy: str) -> None:
    """Raise UserError where what function(images) keeps for its backward pass cannot fit in the memory that is free.

    Measured on one and on two images: the rest is that much an image. A pass needs more than it keeps, so nothing that
    fits is refused."""
    one, two = (held_for_backward(lambda count=count: function(count)) for count in (1, 2))
    needed, free = one + (images - 1) * (two - one), free_memory(device)
    if needed > free:
        raise UserError(
            f"{what}: {images} images at a time need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free; {remedy}"
        )


PLACES = Path("/proc/meminfo"), Path("/proc/self/statm"), Path("/sys/fs/cgroup")  # where Linux says how much there is


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still get on this device, swap included; inf where the system does not say (macOS,
    Windows)."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    of_machine, of_process, of_group = PLACES
    if device.type != "cpu" or not of_machine.exists():
        return math.inf
    lines = (line.replace(":", "").split() for line in of_machine.read_text().splitlines())
    known = {name: int(value) * 1024 for name, value, *_ in lines}
    free = [known.get("MemAvailable", math.inf) + known.get("SwapFree", 0)]  # WSL 1 does not say
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free.append(limit - int(of_process.read_text().split()[0]) * resource.getpagesize())
    for most, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        if (of_group / most).exists() and (limit := (of_group / most).read_text().strip()) != "max":
            statistics = (line.split() for line in (of_group / most).with_name("memory.stat").read_text().splitlines())
            files = int(dict(statistics).get("inactive_file", 0))  # which are let go first
            free.append(int(limit) - int((of_group / used).read_text()) + files)
    return max(0, min(free))


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
            x = checkpoint(call, block, dict(block.named_parameters()), x, scale, use_reentrant=False)
        else:
            x = block(x, scale)
    return x
