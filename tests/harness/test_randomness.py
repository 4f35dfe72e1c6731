"""Random numbers are functions of their keys."""

import numpy as np
import pytest
import torch

from harness import randomness
from harness.randomness import draw_dropout, numpy_generator, torch_generator


@pytest.mark.parametrize(
    "draw", [lambda *key: numpy_generator(*key).random(), lambda *key: torch_generator(*key).initial_seed()]
)
def test_a_generator_is_a_function_of_its_key(draw):
    keys = [(0,), (1,), (0, 1), (2, 1), (0, 1, 2), (0, 2, 1), (2**63 - 1, 5), (2**40, 5)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert [draw(*key) for key in keys] == [draw(*key) for key in keys]
    assert draw(1) == draw(1, 0)  # hence keys of one length


def test_the_streams_are_those_of_earlier_versions():
    """Numbers as recorded when they were first drawn: whoever changes them changes every result."""
    assert torch_generator(0, randomness.MASKS, 7).initial_seed() == 3542883155007454814
    assert numpy_generator(3, randomness.SPLIT).integers(0, 1000, 4).tolist() == [844, 25, 566, 743]
    numpys = "ORDER AUGMENT SPLIT LIMIT DRAW WATCHED LABELS".split()
    torchs = "MASKS DROPOUT REDRAWN LEVEL1_DATA LEVEL2_DATA LEVEL3_DATA PARTS".split()
    for names in (numpys, torchs):  # two families, each of which stays apart from what came later
        assert [getattr(randomness, name) for name in names] == list(range(7))
    assert (randomness.BATCHES, randomness.DROP_PATH, randomness.DISTORT) == (100, 101, 102)


def test_dropout_is_a_factor_with_mean_1():
    factors = draw_dropout(0.25, (100, 400), 3, 1)
    assert factors.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (factors == 0).double().mean().item() == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / 40_000))
    assert torch.equal(factors, draw_dropout(0.25, (100, 400), 3, 1))
    assert not torch.equal(factors, draw_dropout(0.25, (100, 400), 3, 2))
    assert draw_dropout(0.0, (5,), 0).tolist() == [1] * 5
