"""Make the project's modules importable however pytest is started, and runs repeatable: one thread, here and in
subprocesses (tiny tensors gain nothing from more)."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch  # after the number of threads is set

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on the CPU; read when they are first imported


@pytest.fixture(autouse=True)
def same_draws():
    """Each test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)
