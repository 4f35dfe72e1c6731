"""The learning rate over a training."""

import pytest

from harness.schedule import schedule


def test_schedule_rises_then_falls_to_zero():
    rates = [schedule(step, 1000, 100) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99] == 1.0 and rates[100] == 1.0
    assert rates[550] == pytest.approx(0.5) and rates[-1] < 1e-5
    assert all(a >= b for a, b in zip(rates[100:], rates[101:]))
    assert schedule(0, 10, 0) == 1.0
