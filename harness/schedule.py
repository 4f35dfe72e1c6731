"""The learning rate over a training."""

import math


def schedule(step: int, total: float, warmup: float) -> float:
    """Share of the peak learning rate at `step` of `total`: linear warmup over `warmup` steps, then cosine to 0."""
    if step + 1 < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup) / (total - warmup)))
