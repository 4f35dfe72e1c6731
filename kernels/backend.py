"""Which implementation runs, how a Triton kernel is started, and where derivatives beyond a kernel's own come from."""

import functools
import inspect
import os
import types

import torch
import torch.autograd.forward_ad as fwAD
from torch.utils._pytree import tree_map

# Matrix products on Hopper by mma, not wgmma. With wgmma, Triton 3.6 and 3.7 prefetch into a tile that a product in flight
# still reads, and their ptxas (12.8) reads a register that nothing wrote: on an H100, gradients that differed from run to
# run, and illegal addresses (docs/kernels.md). Triton reads this when it compiles.
os.environ.setdefault("DISABLE_MMA_V3", "1")

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the names below are all that reading the kernels' signatures asks for
    triton, tl = None, types.SimpleNamespace(constexpr=None)

BACKENDS = ("auto", "triton", "reference")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels read; they compute in float32
BYTES = {"gather_patches": [torch.uint8]}  # and what some read besides, as their first tensor
DEVICES = {"cuda"}  # AMD's too: torch calls them so
if triton is not None and triton.knobs.runtime.interpret:  # TRITON_INTERPRET=1: on the CPU, slowly, for tests
    DEVICES.add("cpu")
_chosen = None  # None until the first use: then the environment variable MLO_MAE_KERNELS decides


def jit(function):
    """triton.jit, or the bare function where triton is absent (nothing will call it)."""
    return function if triton is None else triton.jit(function)


def _checked(backend, source):
    if backend not in BACKENDS:
        raise ValueError(f"{source}: {backend!r} is not one of {', '.join(BACKENDS)}")
    return backend


def current():
    """The backend in force. ValueError where the environment variable MLO_MAE_KERNELS names no backend."""
    global _chosen
    if _chosen is None:
        _chosen = _checked(os.environ.get("MLO_MAE_KERNELS", "auto"), "environment variable MLO_MAE_KERNELS")
    return _chosen


class use:
    """Choose the backend of the whole process, `kernels.use("triton")`, or of a block, `with kernels.use("reference"):`.

    "auto" runs Triton on tensors of float32, float16 and bfloat16 on a GPU that Triton knows, and the reference elsewhere
    (on a CPU, attention by torch's tiles); "triton" raises where Triton cannot run; "reference" is plain PyTorch,
    differentiable to any order. ValueError for other names.
    """

    def __init__(self, backend):
        global _chosen
        _checked(backend, "kernels.use")
        self.former, _chosen = current(), backend

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _chosen
        _chosen = self.former


def runs_triton(operation, *tensors, limit=None):
    """Whether `operation` runs its Triton kernels on these tensors. `limit` says what else is in the way, if anything.

    Raises RuntimeError where "triton" was asked for and cannot be had.
    """
    backend = current()
    if backend == "reference":
        return False
    values = [tensors[0].dtype, *(t.dtype for t in tensors[1:] if t.is_floating_point())]  # the others are ids, masks, bytes
    odd = [dtype for dtype in values if dtype not in (*FLOATS, *BYTES.get(operation, ()))]
    devices = {t.device for t in tensors}
    if triton is None:
        obstacle = "triton is not installed (pip install triton, on Linux)"
    elif len(devices) > 1:
        obstacle = f"the tensors are on several devices, {', '.join(sorted(map(str, devices)))} (move them to one)"
    elif tensors[0].device.type not in DEVICES:
        obstacle = (
            f"the tensors are on {tensors[0].device} (move them to a GPU, "
            "or set TRITON_INTERPRET=1 before the first import, to run slowly on the CPU)"
        )
    elif odd:
        obstacle = f"{odd[0]} is not supported (cast to float32, float16 or bfloat16)"
    else:
        obstacle = too_old(tensors[0].device) or cannot_start(tensors[0].device) or limit
    if backend == "triton" and obstacle:
        raise RuntimeError(f'{operation}: Triton was asked for, but {obstacle}; kernels.use("auto") picks what can run')
    return not obstacle and (backend == "triton" or tensors[0].is_cuda)


@functools.cache
def too_old(device):
    """What is in the way of Triton on this GPU, in words, or None."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    return "the GPU's compute capability is {}.{}, and Triton needs 8.0".format(*torch.cuda.get_device_capability(device))


@functools.cache
def cannot_start(device):
    """Why Triton cannot build what starts its kernels on this GPU, in words, or None: it wants a C compiler, Python's headers
    and a folder to keep it in."""
    if device.type != "cuda":
        return None
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # of many kinds
        return f"Triton cannot start here ({type(error).__name__}: {str(error)[:200]})"


@functools.cache
def architecture(device):
    """ "cuda:90" for a Hopper GPU, say, and "hip" for AMD's. A CPU, where Triton's interpreter runs, counts as Hopper."""
    if device.type != "cuda":
        return "cuda:90"
    return "hip" if torch.version.hip else "cuda:{}{}".format(*torch.cuda.get_device_capability(device))


def tile(rows, columns, widest):
    """Shape of one program's tile: at most `widest` columns and about 4096 elements, 32 a thread of 4 warps."""
    COLS = min(widest, triton.next_power_of_2(columns))
    return min(triton.next_power_of_2(max(rows, 1)), max(1, 4096 // COLS)), COLS


def launch(kernel, programs, *arguments, **configuration):
    """Start `programs` programs of a kernel on the GPU that holds the first argument; an empty tensor starts none."""
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **configuration)


def pushforward(formula, primals, tangents):
    """(output, its tangent) of a plain formula, by reverse mode alone: forward-mode levels of autograd do not nest."""
    output, pull = torch.func.vjp(formula, *primals)
    _, push = torch.func.vjp(pull, tree_map(torch.zeros_like, output))
    return output, push(tuple(tangents))[0]


def in_turn(function, info, in_dims, *inputs):
    """What a Function's `vmap` returns: the results of function(*inputs) for one element of the batch after the other."""
    results = [
        function(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(inputs, in_dims)))
        for i in range(info.batch_size)
    ]
    several = isinstance(results[0], tuple)
    return (tuple(map(torch.stack, zip(*results))), (0,) * len(results[0])) if several else (torch.stack(results), 0)


class Function(torch.autograd.Function):
    """A Function whose signature is at hand: autograd asks for it in each call, and to find it takes longer than a launch."""

    def __init_subclass__(cls, **arguments):
        super().__init_subclass__(**arguments)
        cls.forward.__signature__ = inspect.signature(cls.forward)


class ByFormula(Function):
    """kernel(*constants, *variables), with the derivatives of a plain formula of equal value.

    Backward and jvp start their kernels through this class, so derivatives of derivatives are right to any order: they
    go through the formula, at its cost in time and memory. The first `constants` tensors have no derivative.
    """

    @staticmethod
    def forward(kernel, formula, constants, *tensors):
        return kernel(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.formula, ctx.constants, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        formula, variables = _fix(ctx.formula, ctx.constants, ctx.saved_tensors)
        output, pull = torch.func.vjp(formula, *variables)
        return *[None] * (3 + ctx.constants), *pull(cotangents if isinstance(output, tuple) else cotangents[0])

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return in_turn(ByFormula.apply, info, in_dims, *inputs)

    @staticmethod
    def jvp(ctx, *tangents):
        with fwAD._set_fwd_grad_enabled(True):  # autograd turns it off here, which would cut an enclosing jvp's tangents
            primals = [fwAD.unpack_dual(t).primal for t in ctx.saved_tensors]
            formula, variables = _fix(ctx.formula, ctx.constants, primals)
            tangents = tangents[3 + ctx.constants :]
            tangents = [torch.zeros_like(x) if t is None else t for x, t in zip(variables, tangents)]
            return pushforward(formula, variables, tangents)[1]


def _fix(formula, constants, tensors):
    fixed, variables = tensors[:constants], tensors[constants:]
    return lambda *values: formula(*fixed, *values), variables


def apply_fused(function, with_tangent, variable, *constants):
    """function(variable, *constants), which applies a Function, or where output and tangent can come from one launch,
    with_tangent(variable, tangent, *constants).

    Autograd calls a Function's jvp only after its forward, so that launch has to be chosen before. A dual that also
    requires grad, or is hidden under a level of torch.func, goes through the Function, whose own jvp is right too and
    merely computes the output twice.
    """
    primal, tangent = fwAD.unpack_dual(variable)
    if tangent is None or primal.requires_grad:
        return function(variable, *constants)
    return fwAD.make_dual(*with_tangent(primal, tangent, *constants))
