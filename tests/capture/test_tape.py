"""Recording and replay: the same numbers as the function, or a refusal that names the operation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ppl_gen.capture.recorder import record
from ppl_gen.capture.replay import record_checked, recording
from ppl_gen.capture.tape import RecordingRefused

X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
ELSEWHERE = torch.tensor([1.7, 0.4, -0.6], dtype=torch.float64)


def with_gradient(function):
    def both(x):
        x = x.detach().requires_grad_()
        value = function(x)
        return value.detach(), torch.autograd.grad(value, x)[0]

    return both


def replayed(function, x):
    return recording(record(lambda: function(x), [x])).load()


def _in_place(x):
    table = torch.zeros(3, 2, dtype=x.dtype)
    table[:, 0] = x.exp()
    table[1] += 2.0
    return (table.cumsum(0) * x[0]).masked_fill(x[:, None] < 0, 0.5).sum()


def _linear_algebra(x):
    matrix = torch.outer(x, x) + torch.eye(3, dtype=x.dtype) * 4.0
    return torch.linalg.cholesky(matrix).diagonal().log().sum() + torch.logsumexp(matrix[[0, 2]], (0, 1))


def _network(x):
    return NETWORK(x).square().sum()


NETWORK = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def _pieces(x):
    (whole,) = x.split(3)
    first, rest = x.split([1, 2])
    return whole.sum() * first.exp().sum() + rest.unbind()[1]


FUNCTIONS = {
    "pieces": _pieces,
    "in place": _in_place,
    "linear algebra": _linear_algebra,
    "network": _network,
    "data": lambda x: (x * x.data).sum(),
    "closed over": lambda x: (x * ELSEWHERE.log1p().nan_to_num()).sigmoid().prod(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replay_gives_value_and_gradient_at_other_points(name: str) -> None:
    function = with_gradient(FUNCTIONS[name])
    replay = replayed(function, X)
    for point in (X, ELSEWHERE, 3 * X):
        for ours, theirs in zip(replay(point), function(point), strict=True):
            # The same operations in the same order, but where torch chooses a formula by looking (the gradient of prod).
            assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-13)


def test_function_may_give_what_does_not_depend_on_the_argument() -> None:
    constant = torch.arange(2.0)
    replay = replayed(lambda x: (x, constant, x[:1]), X)
    first, second, third = replay(ELSEWHERE)
    assert torch.equal(first, ELSEWHERE) and torch.equal(second, constant) and torch.equal(third, ELSEWHERE[:1])


OUTSIDE = torch.zeros(3, dtype=torch.float64)


def _exchanged(x):
    x.data = 2 * x.detach()
    return (x,)


REFUSED = {
    "exchanged": (_exchanged, "data are exchanged, by .* in test_tape"),
    "item": (
        lambda x: (x * x[0].item(),),
        "a number that depends on the inputs is read into Python, by if, float\\(\\) or .item\\(\\) in test_tape, line",
    ),
    "if": (
        lambda x: (x if x.sum() > 0 else -x,),
        "a number that depends on the inputs is read into Python, by if, float\\(\\) or .item\\(\\) in test_tape, line",
    ),
    "numpy": (
        lambda x: (x * float(np.asarray(x.detach())[0]),),
        "numbers that depend on the inputs are read into Python, by .* in test_tape",
    ),
    "list": (
        lambda x: (x * x.tolist()[0],),
        "numbers that depend on the inputs are read into Python, by .* in test_tape",
    ),
    "NumPy's draws": (lambda x: (x * np.random.rand(),), "NumPy"),
    "random": (lambda x: (x + torch.randn(3, dtype=x.dtype),), "random"),
    "mask": (lambda x: (x[x > 0],), "shape"),
    "nonzero": (lambda x: (x.nonzero(),), "shape"),
    "outside": (lambda x: (OUTSIDE.copy_(x) + 1,), "made outside"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_a_replay_would_get_wrong(name: str) -> None:
    function, reason = REFUSED[name]
    before = OUTSIDE.clone()
    with pytest.raises(RecordingRefused, match=reason):
        replayed(function, X)
    assert torch.equal(OUTSIDE, before), "a refusal comes before the write"


def test_numbers_that_no_operation_shows_are_noticed_at_another_point() -> None:
    count = iter(range(100))

    def counting(x):
        return (x + next(count),)

    replayed(counting, X)  # nothing to see at one point
    with pytest.raises(RecordingRefused, match="other numbers"):
        record_checked(counting, [X])


def test_recording_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch, ppl_gen; from ppl_gen.capture.replay import record, recording; x = torch.zeros(2); "
        "recording(record(lambda: (x.exp(),), [x])).load()(torch.ones(2)); "
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_what_is_computed_twice_from_the_same_is_computed_once():
    tape = record(lambda: (X.exp() * 2.0, X.exp() * 2.0 + X.exp()), [X])
    names = [call.operation.name() for call in tape.calls]
    assert names.count("aten::exp") == 1 and names.count("aten::mul.Tensor") == 2  # the first of them is a result


def test_results_that_are_equal_keep_memory_of_their_own():
    replay = replayed(lambda x: (x.exp(), x.exp(), x.exp().view(3)), X)
    first, second, third = replay(ELSEWHERE)
    first.zero_()
    assert torch.equal(second, ELSEWHERE.exp()) and torch.equal(third, ELSEWHERE.exp())


def test_draws_and_what_is_written_into_are_not_merged():
    def twice(x):
        one, other = torch.zeros_like(x), torch.zeros_like(x)
        one += x
        return one * 1.0, other + x, torch.rand(3) * x, torch.rand(3) * x

    tape = record(lambda: twice(X), [X], draws=True)
    torch.manual_seed(0)
    one, other, noise, more = recording(tape).load()(ELSEWHERE)
    assert torch.equal(one, ELSEWHERE) and torch.equal(other, ELSEWHERE) and not torch.equal(noise, more)
