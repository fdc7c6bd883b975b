"""Replays in NumPy's operations: every operation that is known beside torch, at ordinary and at extreme numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from ppl_gen.capture.array_operations import FUNCTIONS, TEXT
from ppl_gen.capture.arrays import array_recording
from ppl_gen.capture.recorder import record
from ppl_gen.capture.replay import agrees
from ppl_gen.capture.tape import RecordingRefused

DRAWN = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXTREME = torch.tensor([0.0, 1.0, -1.0, 1e-300, 1e300, -1e300, 700.0, -700.0, 30.0, math.inf, -math.inf, math.nan])
EXTREME = torch.cat([EXTREME, EXTREME.flip(0)]).double().reshape(6, 4)
ONE = torch.ones((), dtype=torch.float64)
WHERE = torch.tensor([[0, 2], [1, 1], [3, 0], [2, 2], [0, 0], [1, 3]])


def gradient(function):
    def both(u):
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            value = function(u).sum()
            return value.detach(), torch.autograd.grad(value, u)[0]

    return both


def changed(u):
    """In place, on what no view shares."""
    v = u.exp()
    v.clamp_(max=3.0)
    w = (u > 0.5).logical_and_(u < 2.0)
    return v + u.sin().masked_fill_(w, 7.0)


#: What gives one tensor or several; gradients are operations too.
CASES = {
    "sums": lambda u: (u.sum(), u.sum(0), u.sum((0, 1)), u.sum(-1, keepdim=True), u.mean(), u.mean(1), (u > 0).sum() * ONE),
    "arithmetic": lambda u: (u + u.T.reshape(6, 4), u - 2.0 * u, 3.0 - u, u / (1.0 + u * u), -u, u.square(), u.reciprocal()),
    "powers": lambda u: (u**2, u**1.0, u**3, u.abs() ** 0.5, u.abs().sqrt(), u.abs().rsqrt()),
    "nothing": lambda u: ((u.exp() * 1.0).sum(1) + 0.0, u.exp() / 1, u.sin() - 0),
    "exponentials": lambda u: (u.exp(), u.abs().log(), u.abs().log1p(), u.expm1(), u.sin(), u.cos(), u.tanh(), u.atan(), u.erf()),
    "gamma": lambda u: ((u.abs() + 0.5).lgamma(), (u.abs() + 0.5).digamma()),
    "comparisons": lambda u: tuple(
        functional.relu(u).where(m, u)
        for v in (0.5, u.flip(0)) for m in (u < v, u <= v, u > v, u >= v, u == v, u != v, (u < v) & (u > -1), ~(u < v))
    ),
    "logic": lambda u: tuple(
        torch.where(m, u, 1.0)
        for m in ((u < 1).logical_and(u > -1), (u < 1).logical_or(u > 2), (u > 1).logical_not(), u.isnan())
    ),
    "extremes": lambda u: (u.clamp(-1, 1), u.clamp(min=0.1), u.clamp(max=0.1), u.maximum(-u), u.minimum(-u), u.amax(1), u.sign(), u.sgn()),
    "least and most": lambda u: (torch.clamp_min(u, 0.2), torch.clamp_max(u, 0.2), u.max(1)[0], u.max(1)[1] * ONE, *u.max(0, keepdim=True)[:1]),
    "logsumexp": lambda u: (u.logsumexp(1), u.logsumexp((0, 1)), u.logsumexp(0, keepdim=True)),
    "sigmoids": lambda u: (u.sigmoid(), functional.logsigmoid(u), functional.softplus(u), functional.softplus(u, 2.0, 5.0)),
    "xlogy": lambda u: (torch.xlogy(u, u.abs()), torch.xlogy(u, 0.0 * u.abs())),
    "shapes": lambda u: (u.reshape(3, 8), u[:, 1], u[2], u[1:5:2], u.T, u.transpose(0, 1), u.permute(1, 0), u[:, None], u[0].expand(6, 4), u[:, :1].squeeze(-1)),
    "parts": lambda u: (*u.split([1, 2, 3]), *u.split(4), *u.unbind(1), torch.cat([u, u[:1]]), torch.stack([u, -u], 1)),
    "running": lambda u: (u.cumsum(0), u.cumprod(1)),
    "places": lambda u: (u[WHERE[:, 0]], u[:, WHERE[:4, 1]], u.gather(1, WHERE), u[WHERE[:, 0], WHERE[:, 1]]),
    "put": lambda u: (u.scatter_add(1, WHERE, u), u.index_put((WHERE[:, 0],), u), u.index_put((WHERE[:, 0],), u, accumulate=True)),
    "padding": lambda u: (functional.pad(u, (1, 2), value=3.0), functional.pad(u, (-1, 1, 2, -3)), u.clone()),
    "products": lambda u: (u @ u.T, u @ u[0], torch.mm(u.T, u), torch.bmm(u[None], u.T[None]), torch.dot(u[0], u[1]), u.t()),
    "entropy": lambda u: tuple(
        functional.binary_cross_entropy_with_logits(u, (DRAWN > 0).double(), reduction=r) for r in ("none", "mean", "sum")
    ),
    "numbers": lambda u: tuple(getattr(torch.ops.aten, n).Scalar(u, 3.0) for n in ("add", "sub", "mul", "div", "rsub")),
    "masks": lambda u: (u.masked_fill(u > 0, 2.0), u.sin().masked_fill(u < 0, 3.0)),
    "in place": changed,
    "tangents": gradient(lambda u: functional.relu(u) + u.tanh() + u.sigmoid() + functional.logsigmoid(u) + functional.softplus(u)),
    "slopes of parts": gradient(lambda u: u[1:5:2].exp().sum() + u[2].sin().sum() + u.logsumexp(1).sum() + u[WHERE[:, 0]].sin().sum()),
}  # fmt: skip


def taped(case):
    function = CASES[case]

    def results(u):
        found = function(u)
        return found if isinstance(found, tuple) else (found,)

    u = DRAWN.clone()
    return results, record(lambda: results(u), [u]), u


@pytest.mark.parametrize("case", CASES)
def test_every_operation_gives_torchs_numbers(case) -> None:
    results, tape, u = taped(case)
    replay = array_recording(tape, u).load()
    agrees(replay, results, [DRAWN, 3.0 * DRAWN.flip(0), torch.zeros_like(DRAWN)])
    if case in ("tangents", "slopes of parts", "gamma", "products", "running", "powers", "sums", "nothing"):
        return  # infinities meet in sums there, or overflow on the way; the numbers that count are compared above
    for ours, theirs in zip(replay(EXTREME), results(EXTREME), strict=True):
        np.testing.assert_allclose(ours.double(), theirs.double(), rtol=1e-12, atol=1e-300)


def test_every_known_operation_is_tested() -> None:
    tried = {call.operation.name() for case in CASES for call in taped(case)[1].calls}
    assert sorted((set(TEXT) | set(FUNCTIONS)) - tried) == []


def test_large_arrays_along_short_axes() -> None:
    u = torch.randn(2, 300, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def function(v):
        return v.sum(0), v.sum(2, keepdim=True), v[0].sum(0), v.logsumexp(-1), v.amax(0), (v > 0).sum(0) * ONE

    tape = record(lambda: function(u), [u])
    agrees(array_recording(tape, u).load(), function, [u, -u])


def test_what_is_not_known_is_refused() -> None:
    for function, reason in (
        (lambda u: torch.special.i0(u), "is not known"),
        (lambda u: u.float().exp(), "numbers of torch.float32"),
        (lambda u: torch.sub(u, u, alpha=2.0), "with alpha is not known"),
    ):
        with pytest.raises(RecordingRefused, match=reason):
            array_recording(record(lambda f=function: f(DRAWN), [DRAWN]), DRAWN)


def test_writing_where_a_view_sees_it_is_refused() -> None:
    def shared(u):
        v = u.exp()
        row = v[0]
        v.clamp_(max=1.0)
        return row

    with pytest.raises(RecordingRefused, match="writes into what has a view"):
        array_recording(record(lambda: shared(DRAWN), [DRAWN]), DRAWN)


def test_a_replay_changes_neither_its_input_nor_what_it_gave_before() -> None:
    u = DRAWN.clone()
    tape = record(lambda: (u * 1.0, changed(u)), [u])
    replay, given = array_recording(tape, u).load_arrays(), DRAWN.numpy().copy()
    first = [np.array(value) for value in replay(given)]
    again = replay(given)
    replay(2.0 * given)
    assert np.array_equal(given, DRAWN.numpy())
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
