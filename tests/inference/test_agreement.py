"""When a compiled step counts as the program's: up to rounding, and where rounding is all there is, up to that."""

import pytest
import torch
from torch import Tensor

from ppl_gen.inference.agreement import difference
from ppl_gen.inference.gradients import Step


def step(*gradients: Tensor) -> Step:
    return Step(torch.tensor(1.0), {}, list(gradients), {})


WEIGHTS, BIAS = torch.full((3,), 300.0), torch.tensor([1e-3, -2e-3])  # as of a bias before batch norm


def test_a_gradient_of_cancelled_numbers_is_compared_by_what_is_known_of_it():
    theirs, ours = step(WEIGHTS, BIAS), step(WEIGHTS, BIAS + 2e-4)
    assert difference(ours, theirs, compiled=True)
    assert not difference(ours, theirs, compiled=True, nudged=step(WEIGHTS, BIAS + 1e-5))
    # The last bits do not explain twenty times as much, nor what another tensor has.
    assert difference(step(WEIGHTS, BIAS + 4e-3), theirs, compiled=True, nudged=step(WEIGHTS, BIAS + 1e-5))
    assert difference(step(WEIGHTS + 1.0, BIAS), theirs, compiled=True, nudged=step(WEIGHTS, BIAS + 1e-5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_excuse(bad: float):
    theirs = step(WEIGHTS, BIAS)
    assert difference(step(WEIGHTS, BIAS + 1e-2), theirs, compiled=True, nudged=step(WEIGHTS, BIAS * bad))
