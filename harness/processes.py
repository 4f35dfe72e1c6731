"""Several processes: `torchrun --nproc_per_node=N mlo_mae.py ...` runs the script N times, on one machine or many.

Every process holds the same weights and works on its share of each batch. Below is all that they say to each other, so
that together they compute what one process computes with the joined batch. With one process, each function does nothing.
"""

import atexit
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from harness import UserError, first_line
from harness.signals import SIGNALS

Result = TypeVar("Result")


NUMBERS = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}  # torchrun's, and the least


def started() -> int:
    """How many processes the environment says that torchrun has started; 1 without it. A variable that is empty is absent.
    Raises UserError where the environment is not torchrun's."""
    given = {name: os.environ.get(name, "") for name in (*NUMBERS, "MASTER_ADDR")}
    remedy = "unset it, or start with torchrun, which sets all that several processes need"
    if given["WORLD_SIZE"] in ("", "1"):  # nothing else is read: Kubernetes sets MASTER_PORT=tcp://... for a service "master"
        return 1
    for name, least in NUMBERS.items():
        if given[name] and not (given[name].isdecimal() and int(given[name]) >= least):
            found = f"the environment variable {name} is {given[name]!r}, and no whole number of at least {least}"
            raise UserError(f"{found}; {remedy}")
    if not given["RANK"]:
        return 1
    count = int(given["WORLD_SIZE"])
    if absent := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not given[name]]:
        raise UserError(f"the environment variable WORLD_SIZE is {count}, but {' and '.join(absent)} absent; {remedy}")
    if int(given["RANK"]) >= count:
        raise UserError(f"the environment variable RANK is {given['RANK']}, but WORLD_SIZE is {count}; {remedy}")
    return count


def join(gpu: bool = True) -> None:
    """Join the processes that torchrun started, if it did; gpu: for work on GPUs, where there are some. Raises UserError where
    this machine has too few of them, and as `started` does."""
    if started() > 1:
        local_rank, gpus = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count() if gpu else 0
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"  # machines may count differently
        with exchange():
            store, number, count = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(life, store)  # else processes started again find the addresses of those before them
            backend = "cpu:gloo,cuda:nccl" if gpus and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=number, world_size=count)
        if gpus:
            if local_rank >= gpus:
                raise UserError(f"{gpus} GPUs here, but process number {local_rank} (from 0); lower --nproc_per_node")
            torch.cuda.set_device(local_rank)


def leave() -> None:
    """End what `join` began."""
    if joined():
        dist.destroy_process_group()


def after_parent(action: Callable[[], None]) -> None:
    """Call `action`, in a thread, when the process that started this one has ended: one that is killed cannot stop it."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        action()

    threading.Thread(target=watch, daemon=True).start()


def heed_parent_alone() -> None:
    """SIGTERM ends this process where the one that started it sends it. From elsewhere it is for both (timeout, systemd and
    Slurm send it to all processes of a job), and that one may want what this one does, to end well. (Not on macOS.)"""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def watch() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_children(seconds: float) -> None:
    """End the processes that this one has started by `multiprocessing`: they are asked to (SIGTERM), and those that are
    still there after so many seconds are killed."""
    children, deadline = multiprocessing.active_children(), time.monotonic() + seconds
    for child in children:
        child.terminate()
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        child.kill()


def end(status: int) -> NoReturn:
    """End this process. One of several that has finished ends at once: Python's own tear-down can meet a thread of the
    exchange that has not ended, and abort (seen in 1 of 24 restarted runs), whereupon torchrun calls the run failed. One that
    a signal has ended heeds no other, and does not wait for threads that decode."""
    if status > 128:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        atexit._run_exitfuncs()  # else semaphores of `multiprocessing` are called leaked
    if status > 128 or (status == 0 and started() > 1):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a terminal that is gone
                stream.flush()
        os._exit(status)
    sys.exit(status)


def joined() -> bool:
    """Whether this is one of several processes that have found each other; a torch may be built without what that takes."""
    return dist.is_available() and dist.is_initialized()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if joined() else 1


def rank() -> int:
    """Which of them this is. Number 0 writes all files, and shows how the run goes."""
    return dist.get_rank() if joined() else 0


def share(count: int) -> slice:
    """The slice of a batch of `count` that this process works on."""
    return slice(rank() * count // world(), (rank() + 1) * count // world())


exchanging = 0.0  # seconds in exchanges since `exchange_seconds` was last asked


def exchange_seconds() -> float:
    """How long this process has been held up by exchanges since this was last asked; those of a GPU hold up none."""
    global exchanging
    seconds, exchanging = exchanging, 0.0
    return seconds


@contextlib.contextmanager
def exchange() -> Iterator[None]:
    """Around whatever the processes do together. Raises UserError where one of them has ended or cannot be reached."""
    global exchanging
    began = time.monotonic()
    try:
        yield
        exchanging += time.monotonic() - began
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = first_line(error) or type(error).__name__
        raise UserError(f"the exchange with another process failed ({reason}); continue with --resume") from None


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over processes, in place."""
    if world() > 1:
        with exchange():
            dist.all_reduce(tensor)
    return tensor


def average(tensor: Tensor) -> Tensor:
    """The mean of a tensor over processes, in place."""
    return summed(tensor).div_(world()) if world() > 1 else tensor


BUCKET = 2**20  # how many numbers of a gradient are exchanged at a time, at least


def averaged_gradient(loss: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """The mean over processes of d loss / d leaves, as one vector.

    The exchange runs beside the backward pass, which comes to the last leaves first. From the last leaf to the first, those
    that are there are sent as soon as they fill a bucket: what a bucket holds, and when its turn is, depends on the leaves'
    sizes alone, so all processes send the same."""
    sizes = [leaf.numel() for leaf in leaves]
    begins = [0, *itertools.accumulate(sizes)]
    if world() == 1 or begins[-1] <= BUCKET:  # nothing runs beside
        return average(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, leaves)]))
    vector = leaves[0].new_empty(begins[-1])
    absent = {n: part.view_as(leaf) for n, (part, leaf) in enumerate(zip(vector.split(sizes), leaves))}
    first = sent = len(leaves)  # all leaves from `first` on are there; those from `sent` on are sent
    sending = []

    def put(gradient: Tensor, n: int) -> Tensor:
        nonlocal first, sent
        place = absent.pop(n).copy_(gradient)
        while first > 0 and first - 1 not in absent:
            first -= 1
            if first == 0 or begins[sent] - begins[first] >= BUCKET:
                with exchange():
                    sending.append(dist.all_reduce(vector[begins[first] : begins[sent]], async_op=True))
                sent = first
        return place  # instead of the gradient, which is free then

    hooks = [leaf.register_hook(functools.partial(put, n=n)) for n, leaf in enumerate(leaves)]
    torch.autograd.grad(loss, leaves)  # raises where a leaf gets no gradient
    for hook in hooks:
        hook.remove()
    with exchange():
        for each in sending:
            each.wait()
    return vector.div_(world())


def gather(rows: Tensor) -> Tensor:
    """The rows [B, ...] of all processes, in order, [world * B, ...]; derivatives reach this process's own alone."""
    if world() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world())]
    with exchange():
        dist.all_gather(parts, rows.detach().contiguous())
    parts[rank()] = rows
    return torch.cat(parts)


def agree(*flags: int) -> list[int]:
    """The largest value of each flag over processes, so that all look, save and stop after the same iteration."""
    values = torch.tensor(flags, dtype=torch.int64)  # on the CPU: a GPU would have to be waited for
    if world() > 1:
        with exchange():
            dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def told(value):
    """What process 0 has, of plain types, in every process."""
    values = [value]
    if world() > 1:
        with exchange():
            dist.broadcast_object_list(values, 0)
    return values[0]


def alike(value) -> bool:
    """Whether this, of plain types, is the same in all processes."""
    return not agree(told(value) != value)[0]


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Around what one of several processes does when the others, which had their share of the machine's cores, are done."""
    threads = torch.get_num_threads()
    if started() > 1:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def as_first(tree: Result) -> Result:
    """A tree (of tuples and the like) of whole numbers and tensors as process 0 has it, tensors in place."""
    leaves, shape = tree_flatten(tree)
    counts = torch.tensor([leaf for leaf in leaves if isinstance(leaf, int)])
    if world() > 1:
        with exchange():
            for tensor in (counts, *(leaf for leaf in leaves if isinstance(leaf, Tensor))):
                dist.broadcast(tensor, 0)
    counts = iter(counts.tolist())
    return tree_unflatten([next(counts) if isinstance(leaf, int) else leaf for leaf in leaves], shape)


def first_before_others(function: Callable[[], Result]) -> Result:
    """function(), in process 0 before the others: it may download what they then find."""
    if rank() > 0:
        agree(0)
    result = function()
    if rank() == 0:
        agree(0)
    return result


def first_to_fail() -> bool:
    """Whether no other process has failed before this one, and said why."""
    try:
        return world() == 1 or dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # process 0, which keeps the count, is gone
        return True
