"""Many launches as one: a small model's step is hundreds of kernels of a few microseconds each, which a GPU ends sooner than
Python has started them. A CUDA graph is recorded once, and starts them all."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


def recorded(function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
    """(a call that has the GPU do again what function() does, in the same memory; what function() returned there).
    RuntimeError where that cannot be recorded."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a first use makes (compiled kernels, workspaces) is made before
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = function()
    return graph.replay, results


def replayed(function: Callable[..., Tensors], kept: int, record=recorded) -> Callable[..., Tensors]:
    """`function`, of tensors of a GPU alone, as one launch; it changes the first `kept` of them in place and returns others.

    The call returns those `kept` after the change, in memory of its own that the next call overwrites, and then what
    function() returned. What it is given stays as it is. A number that is not among the tensors is recorded as it was at the
    first call. Where nothing can be recorded, a line on stderr says so, and function() is called each time."""
    held, replay, results = [], None, ()

    def again() -> None:
        nonlocal results
        results = function(*held)

    def call(*tensors: Tensor) -> Tensors:
        nonlocal held, replay, results
        if [place.shape for place in held] != [tensor.shape for tensor in tensors]:
            held = [tensor.clone() for tensor in tensors]
            try:
                with torch.cuda.device_of(held[0]):
                    replay, results = record(lambda: function(*held))
            except RuntimeError as error:
                reason = (str(error).splitlines() or [""])[0][:200]
                print(f"steps are not recorded, and take longer to start ({reason}); --graphs off", file=sys.stderr)
                replay = again
        for place, tensor in zip(held, tensors):
            if place is not tensor:
                place.copy_(tensor)
        replay()
        return *held[:kept], *(result.clone() for result in results)

    return call
