"""Replays in NumPy's operations: every operation that is known beside torch, at ordinary and at extreme numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from capture_cases import CASES, DRAWN, EXTREME, ONE, changed, taped

from ppl_gen.capture.array_operations import FUNCTIONS, TEXT
from ppl_gen.capture.arrays import array_recording
from ppl_gen.capture.recorder import record
from ppl_gen.capture.replay import agrees
from ppl_gen.capture.tape import RecordingRefused


@pytest.mark.parametrize("case", CASES)
def test_every_operation_gives_torchs_numbers(case) -> None:
    results, tape, u = taped(case)
    replay = array_recording(tape, u).load()
    agrees(replay, results, [DRAWN, 3.0 * DRAWN.flip(0), torch.zeros_like(DRAWN)])
    if case in (
        "tangents",
        "tangents of pairs",
        "slopes of parts",
        "gamma",
        "products",
        "running",
        "powers",
        "sums",
        "nothing",
    ):
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


def test_a_norm_of_another_order_is_refused() -> None:
    tape = record(lambda: (DRAWN.norm(3, dim=1),), [DRAWN])
    with pytest.raises(RecordingRefused, match="a norm of order 3"):
        array_recording(tape, DRAWN).load()(DRAWN)
