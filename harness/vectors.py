"""A level's parameters as ONE vector: an optimiser step, its Jacobian and a direction in parameter space are then one
line each, as in the equations. Modules keep the architecture alone, with parameters on the meta device."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from harness import UserError


@functools.lru_cache(maxsize=16)
def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """{name: shape} of a module's parameters: looked up once, since the walk through it takes as long as a small layer."""
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def unflatten(module: nn.Module, params: Tensor) -> dict[str, Tensor]:
    """The vector `params` as {name: view}, in the order of `module.named_parameters()`."""
    shapes = shapes_of(module)
    pieces = params.split([shape.numel() for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces)}


Params = Tensor | dict[str, Tensor]  # of a module: one vector, or what `unflatten` makes of it


def call(module: nn.Module, params: Params, *args) -> Tensor:
    """`module(*args)` with its parameters taken from `params`; differentiable in them to any order."""
    named_params = unflatten(module, params) if isinstance(params, Tensor) else params
    return functional_call(module, named_params, args, tie_weights=False)  # none is tied: looking for some walks the module


def size_of(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(shape.numel() for shape in shapes_of(module).values())


def named(modules: list[nn.Module], params: Tensor) -> dict[str, Tensor]:
    """The vector of several modules, one after the other, as {name: view}; their names do not clash."""
    pieces = zip(modules, params.split([size_of(module) for module in modules]))
    return {name: piece for module, some in pieces for name, piece in unflatten(module, some).items()}


def flatten(modules: list[nn.Module], tensors: dict[str, Tensor]) -> Tensor:
    """The opposite of `named`, for tensors out of a file. Raises UserError where names, shapes or kinds of tensors are not
    those of the modules, or a value is not finite."""
    if not isinstance(tensors, dict) or not all(map(ordinary, tensors.values())):
        raise UserError("its weights are not ordinary tensors")
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(p.shape) for module in modules for name, p in module.named_parameters()}
    if expected != found:
        wrong = next(name for name in expected | found if expected.get(name) != found.get(name))
        raise UserError(f"{wrong} is {found.get(wrong, 'missing')}, expected {expected.get(wrong, 'nothing')}")
    vector = torch.cat([tensors[name].reshape(-1) for name in expected])
    if not vector.isfinite().all():
        raise UserError("a weight is not finite")
    return vector


def ordinary(value: object, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> bool:
    """Whether this is a dense tensor on the CPU, of one of these types."""
    plain = type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu"
    return plain and value.dtype in dtypes


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: not on biases, norms, tokens and positions."""
    return name.endswith("weight") and parameter.ndim >= 2


def weight_decays(modules: list[nn.Module], weight_decay: float) -> Tensor:
    """The weight decay of each parameter of these modules, a vector."""
    pairs = [pair for module in modules for pair in module.named_parameters()]
    return torch.cat([torch.full((p.numel(),), weight_decay if decays(name, p) else 0.0) for name, p in pairs])


def inverse_fan_in(module: nn.Module) -> Tensor:
    """1/fan-in for each weight, 1 for each bias, a vector. AdamW moves every weight by about its learning rate, and a unit
    that sums fan-in of them by fan-in times that: at this scale a rate is the most that a unit moves in one step."""
    scales = [torch.full((p.numel(),), 1 / p[0].numel() if p.ndim > 1 else 1.0) for p in module.parameters()]
    return torch.cat(scales)
