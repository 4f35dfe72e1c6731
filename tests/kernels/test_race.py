"""kernels/race.py: inputs and directions of a race; bench.py's tests run whole ones."""

import pytest
import torch

from kernels.race import Case, race

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def test_every_repeat_of_a_kernel_has_new_inputs():
    seen = []

    def watched(x, ids):
        seen.append((float(x.sum()), ids))
        return x * ids

    case = Case("watched", "", (torch.ones(4, 3), torch.arange(12).view(4, 3)), 1, watched, torch.mul, {"forward": (144, 0)})
    rows, error = race(case, "forward", False, 3, CPU)
    assert error is None and all(torch.equal(ids.sort(0).values, case.tensors[1]) for _, ids in seen)
    assert len({total for total, _ in seen}) == 1 + 3  # the check, and three repeats
    assert 12.0 not in {total for total, _ in seen}  # none with the inputs as they were given


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "backward", "jvp"])
def test_calls_in_a_row_run_every_direction(device, direction):
    device = torch.device(device)
    case = Case("twice", "", (torch.ones(4, 3, device=device),), 1, torch.square, torch.square, {direction: (96, 0)})
    rows, error = race(case, direction, False, 1, device)
    assert error is None and [row["implementation"] for row in rows] == ["ours", "eager", "copy"]
    assert all(row["seconds"] > 0 for row in rows)
