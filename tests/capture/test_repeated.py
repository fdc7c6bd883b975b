"""Functions that are called many times: the replay gives what they give, or it is given up.

Replays run the same operations, so float64 agrees to a few units in the last place; 1e-12 allows for fused ones.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from fixtures import float64_under

import ppl_gen as pg
from ppl_gen.capture import repeated as repeated_file
from ppl_gen.capture.hoisted import hoisted
from ppl_gen.capture.recorder import record
from ppl_gen.capture.repeated import Repeated
from ppl_gen.inference import SVI
from ppl_gen.weights.log_mean import LogMean

float64_and_seed = float64_under(5)


def called(function, inputs, times=8, calls=100):
    """What so many calls give under seed 3, and the `Repeated`."""
    torch.manual_seed(3)
    made = Repeated(calls)
    return torch.stack([made(inputs, "kind", function) for _ in range(times)]), made


def alone(function, inputs, times=8):
    torch.manual_seed(3)
    return torch.stack([function(inputs) for _ in range(times)])


def written_into(given):
    h = (given[0] @ given[1]).relu_()  # no draw reaches it
    noise = torch.empty_like(h).normal_()
    return (h.view(-1).mul(2.0) + noise.view(-1)).add_(1.0)


def written_later(given):
    h = given[0].exp()
    before = h + torch.rand(3)  # reads what is written into afterwards
    h.mul_(torch.rand(()))
    return before + h


@pytest.mark.parametrize("function", [written_into, written_later, lambda given: given[0].exp() * torch.rand(3)])
def test_replays_draw_and_compute_what_the_function_does(function):
    inputs = [torch.randn(3, 3), torch.randn(3, 3)]
    if function is not written_into:
        inputs = [torch.randn(3)]
    found, made = called(function, inputs)
    assert made.path == "graph" and made.reason == ""
    torch.testing.assert_close(found, alone(function, inputs), rtol=0, atol=1e-12)
    assert float(found.std(0).min()) > 0, "every call draws anew"


def test_what_no_draw_reaches_is_computed_once():
    x = torch.randn(4, 4)
    first, rest = hoisted(record(lambda: written_into([x, x]), [x, x], draws=True))
    assert {call.operation.name() for call in first.calls} >= {"aten::mm", "aten::relu_"}
    assert "aten::mm" not in {call.operation.name() for call in rest.calls}
    y = torch.randn(3)
    late, all_of_it = hoisted(record(lambda: written_later([y]), [y], draws=True))
    assert len(late.calls) == 0 and len(all_of_it.calls) >= 5, "nothing of it may be computed once"


def test_new_inputs_are_computed_anew():
    made, seen = Repeated(100), []
    for value in (1.0, 2.0, 2.0, 3.0, 4.0):
        x = torch.full((2,), value)
        seen.append(made([x], 0, lambda given: given[0].square() + 0.0 * torch.rand(2)))
    assert made.path == "graph"
    torch.testing.assert_close(torch.stack(seen)[:, 0], torch.tensor([1.0, 4.0, 4.0, 9.0, 16.0]))


def test_what_cannot_be_recorded_runs_as_it_is():
    def reading(given):
        return given[0] * (2.0 if float(given[0].sum()) > 0 else 3.0) + torch.rand(2)

    x = [torch.ones(2)]
    found, made = called(reading, x)
    assert made.path == "eager" and "read into Python" in made.reason
    assert torch.equal(found, alone(reading, x))


def test_what_changes_in_python_is_seen_at_the_next_comparison():
    held = {"factor": 1.0}

    def function(given):
        return given[0] * held["factor"] + torch.rand(2)

    x = [torch.ones(2)]
    made = called(function, x)[1]
    held["factor"] = 2.0
    torch.manual_seed(1)
    right = made(x, "kind", function, new=True)
    torch.manual_seed(1)
    assert torch.equal(right, function(x)) and made.path == "eager" and "other numbers" in made.reason


def test_few_calls_are_not_recorded():
    assert called(lambda given: given[0] + torch.rand(2), [torch.ones(2)], calls=5)[1].path == "eager"


# ------------------------------------------------------------------------------------------------------ weights
def test_the_mean_of_weights_in_chunks_is_that_of_all():
    logs = 5 * torch.randn(100, 7) - 300
    logs[:, 1] = -torch.inf
    logs[:50, 2] = -torch.inf
    logs[:, 3] = 2.0
    mean = LogMean()
    for part in logs.split([1, 30, 69]):
        mean.add(part)
    torch.testing.assert_close(mean.value, torch.logsumexp(logs, 0) - math.log(100), rtol=0, atol=1e-12)
    w = (logs - logs.amax(0).nan_to_num(neginf=0.0)).exp()
    torch.testing.assert_close(mean.effective[1], torch.tensor(0.0))
    here = [0, 2, 3, 4, 5, 6]
    torch.testing.assert_close(mean.effective[here], (w.sum(0) ** 2 / w.square().sum(0))[here], rtol=1e-12, atol=0)
    expected = w.var(0) / 100 / w.mean(0) ** 2
    torch.testing.assert_close(mean.variance[here], expected[here], rtol=1e-10, atol=1e-30)
    both = LogMean()
    for part in (logs[:40], logs[40:]):
        one = LogMean()
        one.add(part)
        both.join([one])
    torch.testing.assert_close(both.value, mean.value, rtol=0, atol=1e-12)


def rows(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def wide(x):
    half = pyro.param("half", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(half * x, 0.8))


def looped(x):
    """Rows as columns: another dimension on the left is not understood, and particles go one by one."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        if z.dim() > 1:
            raise RuntimeError("one dimension only")
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("model", [rows, looped])
def test_evidence_is_the_same_on_either_path_and_right(model, monkeypatch):
    x = torch.linspace(-3.0, 3.0, 60)
    fit = pg.fit(pg.Program(model, wide), x, SVI(steps=1, lr=1e-30), seed=0)
    monkeypatch.setattr("ppl_gen.weights.chunks.CACHED", 60 * 25)  # 25 particles at a time
    made = []

    class Kept(Repeated):
        def __init__(self, calls):
            super().__init__(calls)
            made.append(self)

    monkeypatch.setattr("ppl_gen.weights.chunks.Repeated", Kept)
    captured = fit.evidence(particles=500, chunk=20)
    assert made[-1].path == "graph"
    monkeypatch.setattr(repeated_file, "FEW", 10**9)
    plain = fit.evidence(particles=500, chunk=20)
    assert made[-1].path == "eager"
    torch.testing.assert_close(captured.values, plain.values, rtol=0, atol=1e-11)
    torch.testing.assert_close(captured.effective_draws, plain.effective_draws, rtol=1e-9, atol=0)
    assert captured.pareto_k == pytest.approx(plain.pareto_k, abs=1e-7)
    exact = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).mean())
    assert abs(captured.mean - exact) < 5.5 * captured.mc_stderr + 1e-9 and captured.mc_stderr < 0.02
