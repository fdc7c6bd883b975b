"""Expansions put off: the same numbers at other points, from fewer computed ones."""

from __future__ import annotations

import pytest
import torch
from test_arrays import CASES, DRAWN, taped
from test_tape import ELSEWHERE, FUNCTIONS, X, with_gradient

from ppl_gen.capture.arrays import array_recording
from ppl_gen.capture.narrow import narrowed
from ppl_gen.capture.recorder import record
from ppl_gen.capture.replay import agrees, recording

ROWS = torch.linspace(-1.0, 2.0, 50, dtype=torch.float64)


def _shared_scale(u):
    return torch.distributions.Normal(u[0], u[1].exp(), validate_args=False).expand([50]).log_prob(ROWS).sum()


def _groups(u):
    """Two normals in columns, weights turned and reshaped on the way, as enumeration does."""
    weights = (
        (u[:2] - u[:2].logsumexp(0)).expand(50, 2)[:, :].reshape(1, 50, 2).transpose(-3, -1).reshape(2, 50).squeeze()
    )
    each = -0.5 * ((ROWS - u[:2].unsqueeze(-1)) / u[2].exp().expand(2, 50)).square() - u[2].expand(2, 50)
    return (weights + each).permute(1, 0).logsumexp(1).sum()


def _sliced(u):
    return (u[:1].expand(50)[10:20].exp() * ROWS[:10]).sum() + u[0].expand(7, 50)[:, 3:5].sin().sum()


def _summed(u):
    return u[:2].expand(50, 2).exp().sum() + u[0].expand(4, 50).exp().cumsum(1).sum()


def _written(u):
    spread = u[:1].expand(50).exp() * 1.0
    spread[3] = 7.0
    return (spread * ROWS).sum() + spread.view(5, 10).sum(0).prod()


def _repeated_ones(u):
    return (torch.ones((), dtype=u.dtype).expand(50) * u[0] * ROWS).sum()


SPREAD = {
    "shared scale": _shared_scale,
    "groups": _groups,
    "sliced": _sliced,
    "summed": _summed,
    "written": _written,
    "ones": _repeated_ones,
}


@pytest.mark.parametrize("name", [*FUNCTIONS, *SPREAD])
def test_the_same_values_and_gradients_elsewhere(name: str) -> None:
    function = with_gradient({**FUNCTIONS, **SPREAD}[name])
    tape = record(lambda: function(X), [X])
    made = narrowed(tape, [X])
    assert made.numbers <= tape.numbers
    replay = recording(made).load()
    for point in (X, ELSEWHERE, 3 * X):
        for ours, theirs in zip(replay(point), function(point), strict=True):
            assert ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_every_operation_is_what_it_was(name: str) -> None:
    results, tape, u = taped(name)
    agrees(recording(narrowed(tape, [u])).load(), results, [u, DRAWN.flip(0)])


@pytest.mark.parametrize("name", ["shared scale", "sliced", "ones", "groups"])
def test_less_is_computed(name: str) -> None:
    function = with_gradient(SPREAD[name])
    tape = record(lambda: function(X), [X])
    made = narrowed(tape, [X])
    # The groups' spread logarithms are all that there is to save: calls, and no numbers.
    assert made.numbers < tape.numbers if name != "groups" else len(made.calls) < len(tape.calls)
    assert not [call for call in made.calls if call.operation.name() == "aten::expand"] or name == "sliced"
    agrees(array_recording(made, X).load(), function, [X, ELSEWHERE])


def test_numbers_that_would_be_weaker_than_tensors_are_expanded_first() -> None:
    places = torch.arange(3)

    def mixed(u):
        return u[0].expand(3) + places, u[0].to(torch.float32).expand(3) * places

    replay = recording(narrowed(record(lambda: mixed(X), [X]), [X])).load()
    for ours, theirs in zip(replay(ELSEWHERE), mixed(ELSEWHERE), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
