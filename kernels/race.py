"""Every kernel at the shapes of a ViT-B autoencoder, one direction of it as a call, and its race against what PyTorch offers:
what `bench.py kernels` and kernels/tune.py time."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from harness.measure import copier, in_a_row, input_sets, interleaved, largest_error, quartiles, repeats_of, to_double
from kernels.attention import attention_reference
from kernels.loss import patch_loss_reference
from kernels.patches import gather_patches_reference
from kernels.tokens import scatter_tokens_reference, select_patches_reference

GEOMETRY = {"tiny": (8, 2), "cifar": (32, 2), "imagenet": (224, 16)}  # image and patch size in pixels; the last: ViT-B/16's
KERNELS = "gather_patches", "select_patches", "scatter_tokens", "patch_loss", "attention"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Case(NamedTuple):
    """One kernel at one shape. The first `variables` of `tensors`, which the functions take, are differentiated; `work`
    is the least that each direction costs: bytes moved, and operations of matrix products."""

    kernel: str
    shape: str
    tensors: tuple[Tensor, ...]
    variables: int
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    work: dict[str, tuple[float, int]]


def cases(geometry: str, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every kernel: encoder 768 wide, decoder 512, a quarter of the patches visible."""
    size, patch = GEOMETRY[geometry]
    length, values = (size // patch) ** 2, 3 * patch**2
    visible = length // 4

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, device=device).to(dtype)

    images, prob = normal(batch, 3, size, size), torch.rand(batch, length, device=device)
    keep, restore, mask = select_patches_reference(prob, visible)
    shown = batch * visible * values * images.element_size()  # bytes of the visible patches
    yield Case(
        "gather_patches",
        f"{list(images.shape)} to {visible} of {values}",
        (images, keep),
        1,
        lambda x, ids: kernels.gather_patches(x, ids, patch),
        lambda x, ids: gather_patches_reference(x, ids, patch),
        {"forward": (2 * shown, 0), "backward": (shown + images.nbytes, 0), "jvp": (4 * shown, 0)},
    )
    yield Case(
        "select_patches",
        f"{list(prob.shape)} to {visible}",
        (prob,),
        0,
        lambda p: kernels.select_patches(p, visible),
        lambda p: select_patches_reference(p, visible),
        {"forward": (sum(x.nbytes for x in (prob, keep, restore, mask)), 0)},
    )
    tokens, single = normal(batch, 1 + visible, 512), torch.float32  # embeddings are parameters, so float32
    embeddings = (normal(1, 1, 512, dtype=single), normal(1, 1 + length, 512, dtype=single))
    moved = tokens.nbytes + restore.nbytes + embeddings[1].nbytes + batch * (1 + length) * 512 * single.itemsize
    yield Case(
        "scatter_tokens",
        f"{list(tokens.shape)} to {1 + length}",
        (tokens, *embeddings, restore),
        3,
        kernels.scatter_tokens,
        scatter_tokens_reference,
        {"forward": (moved, 0), "backward": (moved, 0), "jvp": (2 * moved - restore.nbytes, 0)},
    )
    pred, target = normal(batch, length, values), normal(batch, 3, size, size, dtype=single)
    hidden = (1 - visible / length) * pred.nbytes
    moved = hidden + (1 - visible / length) * target.nbytes + 2 * mask.nbytes
    yield Case(
        "patch_loss",
        str(list(pred.shape)),
        (pred, target, mask),
        1,
        kernels.patch_loss,
        patch_loss_reference,
        {"forward": (moved, 0), "backward": (moved + pred.nbytes, 0), "jvp": (moved + hidden + mask.nbytes, 0)},
    )
    encoder = [("encoder, visible", 1 + visible, 12, 64), ("encoder, all", 1 + length, 12, 64)]
    for where, n, heads, d in (*encoder, ("decoder", 1 + length, 16, 32)):
        product, qkv = 2 * batch * heads * n * n * d, normal(batch, n, 3, heads, d)
        once = qkv.nbytes // 3  # bytes of the output, or of one of queries, keys and values
        yield Case(
            "attention",
            f"{list(qkv.shape)} {where}",
            (qkv,),
            1,
            kernels.attention,
            attention_reference,
            {"forward": (4 * once, 2 * product), "backward": (7 * once, 5 * product), "jvp": (8 * once, 6 * product)},
        )


def drawn(case: Case, direction: str) -> tuple[tuple[Tensor, ...], Any]:
    """New inputs of a case (the variables drawn anew, the images of the rest shuffled), and what goes with them: the
    cotangent of the result, or the tangents of the variables."""
    variables, fixed = case.tensors[: case.variables], case.tensors[case.variables :]
    tensors = *map(torch.randn_like, variables), *(x[torch.randperm(len(x))] for x in fixed)
    if direction == "backward":
        return tensors, torch.randn_like(case.eager(*tensors))
    return tensors, tuple(map(torch.randn_like, variables))


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is."""
    return function


def maker(
    direction: str, function: Callable[..., Any], count: int, wrap: Callable[..., Any] = eager
) -> Callable[..., Callable[[], Any]]:
    """A function of what `drawn` returns: it makes a call that runs one direction and returns its results; for a backward,
    it makes the forward. `count` of the tensors are variables. `wrap` compiles, or does nothing."""
    if direction == "jvp":
        pushed = wrap(lambda moving, fixed, tangents: torch.func.jvp(lambda *x: function(*x, *fixed), moving, tangents))
        return lambda tensors, tangents: torch.no_grad()(lambda: pushed(tensors[:count], tensors[count:], tangents))
    function = wrap(function)
    if direction == "forward":
        return lambda tensors, _: torch.no_grad()(lambda: function(*tensors))

    def backward(tensors, cotangent):
        moving = [x.detach().requires_grad_() for x in tensors[:count]]
        result = function(*moving, *tensors[count:])
        return lambda: torch.autograd.grad(result, moving, cotangent.to(result.dtype), retain_graph=True)

    return backward


# --------------------------------------------------------------------------------------------------------- rivals

SDPA = {  # PyTorch's own attention, by its backends
    "SDPA math": SDPBackend.MATH,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
COMPILED = set(KERNELS) - {"select_patches"}  # what torch.compile may fuse better than eager; that one sorts


def pinned(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
    """Attention by one of PyTorch's own backends, which refuses rather than fall back."""

    def rival(qkv):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)

    return rival


def compiled(function: Callable) -> Callable:
    """torch.compile of a function, as new."""
    functorch.donated_buffer = False  # a compiled backward is run several times
    torch._dynamo.reset()  # its limit on recompilation counts over all cases
    return torch.compile(function, dynamic=False)


def race(case: Case, direction: str, compiles: bool, repeats: int, device: torch.device) -> tuple[list[dict], str | None]:
    """([one row an implementation, ours first and a plain copy of as many bytes last], what is wrong with ours or None)."""
    candidates = {"ours": case.ours, "eager": case.eager}
    candidates |= {"compile": case.eager} if compiles and case.kernel in COMPILED else {}
    if case.kernel == "attention":
        candidates |= {name: pinned(SDPA[name]) for name in (["SDPA math"] if direction == "jvp" else SDPA)}
    inputs = drawn(case, direction)
    judge = maker(direction, case.eager, case.variables)(*to_double(inputs))()
    errors, makers, counts = {}, {}, {}
    for name, function in candidates.items():
        try:
            make = maker(direction, function, case.variables, compiled if name == "compile" else eager)
            call = make(*inputs)
            errors[name] = largest_error(call(), judge)
            count = repeats_of(in_a_row(make, [inputs], 1, device), device)
        except Exception:
            if name in ("ours", "eager"):
                raise
            continue  # rivals refuse, or run out of memory, in many ways
        makers[name], counts[name] = make, count
    makers["copy"], counts["copy"] = copier(case.work[direction][0], device), counts["ours"]

    def fresh():
        inputs = input_sets(functools.partial(drawn, case, direction), counts["ours"], device)
        return {name: in_a_row(make, inputs, counts[name], device) for name, make in makers.items()}

    times = interleaved(fresh, repeats, device)
    rows = []
    for name in [*candidates, "copy"]:
        each = [t / counts[name] for t in times[name]] if name in times else [math.nan]
        rows.append({"implementation": name, "error": errors.get(name, math.nan), **quartiles(each)})
    if errors["ours"] <= 2 * errors["eager"]:
        return rows, None
    return rows, f"relative error {errors['ours']:.1e}, more than twice eager's {errors['eager']:.1e}"
