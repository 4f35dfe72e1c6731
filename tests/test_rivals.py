"""The published way to the hypergradient, differences between two evaluations, beside the exact one."""

import functools

import pytest
from helpers import TINY, error_of_form

from bench import finite_difference
from harness.randomness import draw_dropout


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("jacobian", ["adamw", "identity"])
def test_finite_differences_agree_while_dropout_is_held(jacobian, crops):
    assert error_of_form(finite_difference, crops=crops, update_jacobian=jacobian) < 1e-3


@pytest.mark.parametrize("jacobian", ["adamw", "identity"])
def test_finite_differences_are_noise_when_dropout_is_redrawn(jacobian):
    redrawn = draw_dropout(0.5, (2, 6, TINY.width), 0, 2).double()
    assert error_of_form(functools.partial(finite_difference, redrawn=redrawn), update_jacobian=jacobian) > 0.3
