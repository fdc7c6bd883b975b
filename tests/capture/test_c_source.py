"""Replays in C: every operation that is known beside torch, at ordinary and at extreme numbers, in views and in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from capture_cases import CASES, DRAWN, EXTREME, taped
from scipy.special import psi

from ppl_gen.capture import c_library
from ppl_gen.capture.c_library import CFunction, compiler
from ppl_gen.capture.c_operations import EXPRESSIONS
from ppl_gen.capture.c_source import c_source
from ppl_gen.capture.c_special import SPECIAL
from ppl_gen.capture.recorder import record
from ppl_gen.capture.replay import agrees
from ppl_gen.capture.tape import RecordingRefused

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler")


def replayed(tape, u):
    compiled = CFunction(c_source(tape, u))

    def function(v):
        return tuple(torch.from_numpy(np.asarray(result)) for result in compiled(v.numpy()))

    return function


def doubles(function):
    return lambda u: tuple(result.double() for result in function(u))


NARROW = DRAWN.flip(0).float()

#: What only C knows, and memory that torch lays out in other ways than row by row.
MORE = {
    "powers of arrays": lambda u: (u.abs() ** u, 2.0**u, (u * u + 1.0) ** -1),
    "conversions": lambda u: ((u > 0).double() + u, (u > 0) * u, u.T.contiguous() * 1.5, (u > 0) | (u < -1)),
    "turned": lambda u: (u.T.exp() + 1.0, u.T.exp()[1], u.T.exp().sum(0), u.T.logsumexp(1), u.T @ u.T.exp().T),
    "flipped": lambda u: (u.flip(0), u.flip((0, 1)).exp(), u.T.flip(1)),
    "views of what was made": lambda u: (u.exp()[:, 1:3].sum(1), u.exp().expand(5, 6, 4).sum(0), u.exp()[2].log()),
    "all of it": lambda u: (u.amax(), u.max(), u.sum((0, 1), keepdim=True), u[None].mean((0, 2))),
    "writing into a view": lambda u: _written(u),
    "constants of fewer bits": lambda u: (u + NARROW, u * NARROW[0, 0], torch.where(u > 0, u, NARROW.int())),
    "far places": lambda u: (u[torch.tensor([-1, -6, 2])], u.gather(0, torch.tensor([[5, 0, 3, 2]]))),
}


def _written(u):
    v = u.exp()
    row = v[1:4]
    row.mul_(2.0)
    row.add_(u[:3])
    return v, row


CASES_OF_C = CASES | MORE


def case_of(name):
    if name in CASES:
        return taped(name)

    def results(u):
        return MORE[name](u)

    return results, record(lambda: results(DRAWN), [DRAWN]), DRAWN


@pytest.mark.parametrize("name", CASES_OF_C)
def test_every_operation_gives_torchs_numbers(name) -> None:
    results, tape, u = case_of(name)
    if name == "least and most":  # where the largest entry is, which C does not tell
        with pytest.raises(RecordingRefused, match="more than one result"):
            c_source(tape, u)
        return
    replay = replayed(tape, u)
    agrees(replay, doubles(results), [DRAWN, 3.0 * DRAWN.flip(0), torch.zeros_like(DRAWN)])
    if name in (
        "tangents",
        "tangents of pairs",
        "slopes of parts",
        "gamma",
        "products",
        "running",
        "powers",
        "sums",
        "nothing",
        *MORE,
    ):
        return  # infinities meet in sums there, or overflow on the way; the numbers that count are compared above
    for ours, theirs in zip(replay(EXTREME), results(EXTREME), strict=True):
        np.testing.assert_allclose(ours, theirs.double(), rtol=1e-12, atol=1e-300)


def test_every_known_operation_is_tested() -> None:
    tried = set()
    for name in CASES_OF_C:
        for call in case_of(name)[1].calls:
            packet, dot, overload = call.operation.name().partition(".")
            tried.add(packet.rstrip("_") + dot + overload)
    never_alone = {  # views where torch can, other spellings of what is tried, second forms
        "aten::contiguous", "aten::reshape", "aten::_unsafe_view", "aten::copy", "aten::masked_fill.Tensor",
    }  # fmt: skip
    assert sorted((set(EXPRESSIONS) | set(SPECIAL)) - tried - never_alone) == []


def test_large_arrays_along_short_and_long_axes() -> None:
    u = torch.randn(2, 300, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def function(v):
        return (
            v.sum(0), v.sum(2, keepdim=True), v[0].sum(0), v.logsumexp(-1), v.amax(0), v.sum(1), v.amax(1), v.logsumexp(1),
            v[0] @ v[1].T, v[0].T @ v[1], v[0] @ v[1, 0], v[0].T @ v[1, :, 0], torch.bmm(v, v.transpose(1, 2)),
        )  # fmt: skip

    agrees(replayed(record(lambda: function(u), [u]), u), function, [u, -u])


def test_the_digamma_function_beside_scipy() -> None:
    u = torch.tensor([1e-8, 0.1, 1.0, 2.5, 9.99, 10.0, 1e6, -0.5, -3.7, -20.25], dtype=torch.float64)
    (ours,) = replayed(record(lambda: (torch.digamma(u),), [u]), u)(u)
    np.testing.assert_allclose(ours, psi(u.numpy()), rtol=1e-13)


def test_the_logarithm_of_one_and_a_little() -> None:
    u = torch.tensor([1e-300, 1e-17, 1e-8, -1e-9, 0.5, 3.0, 1e20, 0.0, -0.5, -1.0, -2.0, float("inf")]).double()
    (ours,) = replayed(record(lambda: (u.log1p(),), [u]), u)(u)
    np.testing.assert_allclose(ours, u.log1p(), rtol=4e-16 * 4)


def test_the_text_does_not_hold_the_data() -> None:
    data = torch.arange(5.0).double()
    texts = set()
    for shift in (0.0, 1.0):
        there = data + shift
        texts.add(c_source(record(lambda there=there: ((DRAWN[0, 0] + there).sum(),), [DRAWN]), DRAWN).text)
    assert len(texts) == 1


def test_what_is_not_known_is_refused() -> None:
    for function, reason in (
        (lambda u: torch.special.i0(u), "is not known"),
        (lambda u: u.norm(3, dim=1), "a norm of order 3"),
        (lambda u: u.float().exp(), "torch.float32"),
        (lambda u: torch.sub(u, u, alpha=2.0), "with alpha"),
        (lambda u: u[(u.sum(1) * 0).long()], "places that are computed"),
        (lambda u: torch.linalg.cholesky(u.T @ u), "torch.int32"),
        (lambda u: ~(u > 0).long() * u, "bits of whole numbers"),
        (lambda u: u.exp()[:0].sum(), "without entries"),
    ):
        with pytest.raises(RecordingRefused, match=reason):
            c_source(record(lambda f=function: f(DRAWN), [DRAWN]), DRAWN)


def test_without_a_compiler_or_with_a_broken_one_it_is_refused(monkeypatch) -> None:
    source = c_source(record(lambda: (DRAWN.exp() + 1.25,), [DRAWN]), DRAWN)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(RecordingRefused, match="the compiler failed: status 1"):
        CFunction(source)
    monkeypatch.setenv("CC", "no-such-compiler-anywhere")
    assert compiler() is None
    with pytest.raises(RecordingRefused, match="there is no compiler"):
        CFunction(source)
    c_library._library.cache_clear()
