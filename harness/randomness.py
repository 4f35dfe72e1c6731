"""All randomness is a function of (seed, purpose, step): a resumed run needs no generator state, and draws the same
numbers on any device, with any number of workers or processes.

Two families, since images are cut by numpy and everything else is drawn by torch. The numbers below are part of every
result: never renumber them.
"""

import numpy as np
import torch

# What a random number is for, so that the streams of one seed stay apart.
ORDER, AUGMENT, SPLIT, LIMIT, DRAW, WATCHED, LABELS = range(7)  # numpy: the data's
MASKS, DROPOUT, REDRAWN, LEVEL1_DATA, LEVEL2_DATA, LEVEL3_DATA, PARTS = range(7)  # torch: pretraining's
BATCHES, DROP_PATH, DISTORT = range(100, 103)  # fine-tuning's: drop path torch's, the rest numpy's


def numpy_generator(*key: int) -> np.random.Generator:
    """A numpy generator that is a function of the integers in `key`, and independent for every other key.

    Zeros at the end of a key do not count: the keys of one purpose have one length."""
    return np.random.default_rng([k % 2**64 for k in key])


def torch_generator(*key: int) -> torch.Generator:
    """A CPU generator of torch that is a function of the integers in `key`; its `initial_seed()` serves as a seed."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def draw_dropout(rate: float | torch.Tensor, shape: tuple[int, ...], *key: int) -> torch.Tensor:
    """Inverted dropout as a factor, 0 or 1/(1-rate), on the CPU. An explicit tensor, so that a loss is a function of its
    arguments and differences between two of its values are differences of parameters, not of dropout."""
    return (torch.rand(shape, generator=torch_generator(*key)) >= rate).float() / (1 - rate)
