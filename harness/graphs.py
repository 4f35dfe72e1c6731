"""Many launches as one: a small model's step is hundreds of kernels of a few microseconds each, which a GPU ends sooner than
Python has started them. A CUDA graph is recorded once, and starts them all."""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from harness import first_line

Tensors = tuple[Tensor, ...]
Recording = tuple[Callable[[], None], Tensors]

GAIN = 1.1  # time until the GPU has ended, over the time to start it, from which on Python is not what is waited for


def recorded(function: Callable[[], Tensors]) -> Recording | None:
    """(a call that has the GPU do again what function() does, in the same memory; what function() returned there). None where
    the GPU takes longer than Python, so that nothing would be gained. RuntimeError where it cannot be recorded."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a first use makes (compiled kernels, workspaces) is made before
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            function()
            started = time.perf_counter() - began
            torch.cuda.synchronize()
            ended = time.perf_counter() - began
    torch.cuda.current_stream().wait_stream(stream)
    if ended > GAIN * started:
        torch.cuda.empty_cache()  # no other stream can use what this one's three calls took
        return None
    with torch.cuda.stream(torch.cuda.current_stream()):  # which a capture that fails would not give back
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = function()
    return graph.replay, results


def replayed(
    function: Callable[..., Tensors],
    kept: int,
    facts: Callable[[], tuple] = tuple,
    record: Callable[..., Recording | None] = recorded,
) -> Callable[..., Tensors]:
    """`function`, of tensors of a GPU alone, as one launch; it changes the first `kept` of them in place and returns others.

    The call returns those `kept` after the change, and then what function() returned. The former are in the memory of those
    that were given, or in memory that the next call overwrites. What is not among the tensors is recorded as it was at the
    first call; facts() names of it what may change, and where they do, or the shapes, it is recorded anew. Where nothing is
    gained function() is called each time; and where nothing can be recorded, which a line on stderr says."""
    held, recording, of = [], None, None

    def call(*tensors: Tensor) -> Tensors:
        nonlocal held, recording, of
        if of != (now := (*facts(), *(tensor.shape for tensor in tensors))):
            of, held = now, [tensor.clone() for tensor in tensors]
            try:
                with torch.cuda.device_of(held[0]):
                    recording = record(lambda: function(*held))
            except RuntimeError as error:
                about = f"steps are not recorded, and take longer to start ({first_line(error)})"
                print(f"{about}; --graphs off", file=sys.stderr)
                recording = None
        if recording is None:
            held = []
            return *tensors[:kept], *function(*tensors)
        for place, tensor in zip(held, tensors):
            if place is not tensor:
                place.copy_(tensor)
        replay, results = recording
        replay()
        return *held[:kept], *(result.clone() for result in results)

    return call
