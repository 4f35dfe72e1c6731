"""The learning rate over a training."""

import pytest

from harness.schedule import schedule


def test_schedule_rises_then_falls_to_zero():
    rates = [schedule(step, 1000, 100) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99] == 1.0 and rates[100] == 1.0
    assert rates[550] == pytest.approx(0.5) and rates[-1] < 1e-5
    assert all(a >= b for a, b in zip(rates[100:], rates[101:]))
    assert schedule(0, 10, 0) == 1.0


@pytest.mark.parametrize("total", [4, 11, 22, 113])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_the_rate_never_exceeds_its_peak(total, share):
    """Warmups are a share of a run, and so no whole number of steps."""
    rates = [schedule(step, total, share * total) for step in range(total)]
    assert max(rates) <= 1 and min(rates) > 0
