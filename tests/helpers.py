"""What several test files share: damaged copies of files, and packages that may not be there."""

import numpy as np
import pytest


def mutated(raw: bytes, rng: np.random.Generator) -> bytes:
    """A damaged copy: bytes changed, cut off, moved, doubled or put in; more often near either end, where headers are."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        near = min(len(raw), 160)
        at = int(rng.choice([rng.integers(0, near + 1), len(raw) - rng.integers(0, near + 1), rng.integers(0, len(raw) + 1)]))
        length = int(2 ** rng.uniform(0, 8))
        other = int(rng.integers(0, len(raw) + 1))
        match rng.integers(0, 8):
            case 0 | 1:
                for k in range(at, min(at + rng.integers(1, 5), len(raw))):
                    raw[k] = rng.choice([0, 1, 0x2E, 0x7F, 0x80, 0xFF, raw[k] ^ (1 << rng.integers(0, 8)), *rng.bytes(1)])
            case 2:
                del raw[at:]
            case 3:
                del raw[at : at + length]
            case 4:
                raw[at : at + length] = raw[other : other + length]
            case 5:
                raw[at:at] = raw[other : other + length]
            case 6:
                raw[at:at] = rng.bytes(length)
            case 7:
                raw[at : at + 4] = int(rng.choice([0, 2**31 - 1, 2**31, 2**32 - 1])).to_bytes(4, "little")
    return bytes(raw)


def timm():
    """The package, or a skipped test."""
    try:
        return pytest.importorskip("timm")
    except Exception as error:  # a torchvision that was built for another torch, which timm imports
        pytest.skip(f"timm cannot be imported: {error}")
