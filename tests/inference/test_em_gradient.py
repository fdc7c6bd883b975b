"""EM's M-steps by gradients against scipy, networks, and maxima a posteriori of both kinds of M-step.

Float64. What L-BFGS finds, which stops at gradients of 1e-9 per row, is held to 1e-5.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from em_cases import (
    F64,
    NORMALS_START,
    REGRESSIONS_START,
    close,
    hierarchical,
    last,
    lines,
    normals,
    normals_log_density,
    normals_log_prior,
    regressions,
    rises,
    rng,
    started,
    tensor,
    two_groups,
)
from pyro import poutine

import ppl_gen as pg
from ppl_gen.inference import EM

# ---------------------------------------------------------------------------------------------------- gradient M-steps


def test_zero_inflated_regression_reaches_scipys_maximum():
    """Counts that are zero for a second reason; the rate bends in its parameters, so no closed form: 1e-5."""
    from scipy.optimize import minimize

    a = torch.linspace(-1.5, 1.5, 120, dtype=F64)
    count = torch.poisson((0.8 + 0.9 * a).exp(), generator=rng(5)) * (torch.rand(120, generator=rng(6)) > 0.3)

    def model(a, count):
        absent = pyro.sample("absent", dist.Beta(1.0, 1.0))
        line = pyro.sample("line", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Bernoulli(absent))
            rate = (line[0] + line[1] * a).exp()
            pyro.sample("count", dist.Poisson(torch.where(z == 1, 1e-12, rate)), obs=count)

    def log_density(free):
        absent, rate = torch.sigmoid(free[0]), (free[1] + free[2] * a).exp()
        table = torch.stack(
            [
                absent.log() + dist.Poisson(1e-12 + 0 * a).log_prob(count),
                (1 - absent).log() + dist.Poisson(rate).log_prob(count),
            ]
        )
        return table.logsumexp(0).sum()

    def loss(free):
        free = torch.as_tensor(free).requires_grad_()
        value = -log_density(free)
        return value.item(), torch.autograd.grad(value, free)[0].numpy()

    best = minimize(loss, [0.0, 0.0, 0.0], jac=True, method="BFGS", options={"gtol": 1e-8})
    fit = pg.fit(model, {"a": a, "count": count}, EM(tolerance=1e-11), seed=0)
    assert "absent: derived (weighted successes)" in fit.notes["M-step"]
    assert "line: gradient (L-BFGS on the expected log-joint; the rate of 'count' mixes it" in fit.notes["M-step"]
    assert rises(fit) and fit.status is pg.Status.CONVERGED
    close(last(fit), -best.fun, 1e-5)
    close(fit.point["absent"], torch.sigmoid(tensor(*best.x[:1])).squeeze(), 1e-5)
    close(fit.point["line"], tensor(*best.x[1:]), 1e-5)
    assert float(fit.history["log_likelihood"][0]) < -best.fun - 1e-3


def test_networks_learn_by_generalised_em():
    """A gate that depends on the input (mixture of experts): the network moves, the user's own does not."""
    data = lines()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gate = torch.nn.Linear(1, 2).double()
    before = [p.detach().clone() for p in gate.parameters()]

    def experts(a, y):
        pyro.module("gate", gate)
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Categorical(logits=gate(a[:, None])))
            pyro.sample("y", dist.Normal(loc[z], scale), obs=y)

    fit = pg.fit(started(experts, {"loc": tensor(-1.0, 1.0)}), data, EM(steps=60, tolerance=1e-9), seed=0)
    assert rises(fit) and last(fit) > float(fit.history["log_likelihood"][0]) + 1
    assert "loc: derived (weighted least squares)" not in fit.notes["M-step"] and "gate$$$weight" in fit.notes["M-step"]
    assert all(torch.equal(p, kept) for p, kept in zip(gate.parameters(), before, strict=True))
    trained = fit.module("gate")
    assert not torch.allclose(trained.weight, before[0], atol=1e-2)
    # At the maximum of the likelihood its gradient vanishes: recomputed here without any of the machinery.
    leaves = [trained.weight, trained.bias, fit.point["loc"].clone(), fit.params["scale"].clone()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    logits = torch.nn.functional.linear(data["a"][:, None], leaves[0], leaves[1]).log_softmax(-1)
    rows = (logits + dist.Normal(leaves[2], leaves[3]).log_prob(data["y"][:, None])).logsumexp(-1)
    close(last(fit), rows.sum().item(), 1e-8)
    slopes = torch.cat([g.reshape(-1) for g in torch.autograd.grad(rows.sum(), leaves)])
    assert float(slopes.abs().max()) < 0.05, "of terms that sum to some 80"


def test_parameters_without_any_global_site():
    x = two_groups()

    def model(x):
        loc = pyro.param("loc", torch.tensor([-0.5, 1.0]))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    fit = pg.fit(model, x, EM(steps=200), seed=0)
    assert rises(fit) and fit.point == {} and fit.cost["restarts"] == 1
    params = {name: value.requires_grad_() for name, value in fit.params.items()}
    log_weights = tensor(0.4, 0.6).log()
    total = (log_weights + dist.Normal(params["loc"], params["scale"]).log_prob(x[:, None])).logsumexp(-1).sum()
    close(last(fit), total.item(), 1e-9)
    assert all(float(g.abs().max()) < 1e-2 for g in torch.autograd.grad(total, list(params.values())))


# --------------------------------------------------------------------------------------------------- a posteriori


@pytest.mark.parametrize("m_step", ["derived", "gradient"])
def test_maximum_a_posteriori_is_stationary(m_step):
    """The gradient of log-likelihood plus log prior, written out here, vanishes: in the weights, along the simplex."""
    x = two_groups()
    fit = pg.fit(started(normals, NORMALS_START), x, EM(prior=True, tolerance=1e-12, m_step=m_step), seed=0)
    assert m_step in fit.notes["M-step"] and rises(fit, "log_posterior")
    values = {name: value.clone().requires_grad_() for name, value in fit.point.items()}
    likely, prior = normals_log_density(values, x).sum(), normals_log_prior(values)
    close(last(fit), likely.item(), 1e-9)
    close(last(fit, "log_posterior"), (likely + prior).item(), 1e-9)
    slopes = dict(zip(values, torch.autograd.grad(likely + prior, list(values.values())), strict=True))
    slopes["weights"] = slopes["weights"] - slopes["weights"].mean()
    assert max(float(s.abs().max()) for s in slopes.values()) < 1e-4
    without = torch.autograd.grad(normals_log_density(values, x).sum(), values["scale"])[0]
    assert float(without.abs().max()) > 1e-2, "the prior counts"


def test_maximum_a_posteriori_of_regressions_by_closed_forms_and_by_gradients():
    program = started(regressions, REGRESSIONS_START)
    fits = [pg.fit(program, lines(), EM(prior=True, tolerance=1e-11, m_step=m), seed=0) for m in ("auto", "gradient")]
    assert "gradient" not in fits[0].notes["M-step"] and rises(fits[0], "log_posterior")
    for name, value in fits[1].point.items():
        close(fits[0].point[name], value, 1e-5)
    close(last(fits[0], "log_posterior"), last(fits[1], "log_posterior"), 1e-8)


def test_a_site_that_only_priors_depend_on_needs_the_prior():
    x = two_groups()
    with pytest.raises(pg.IncompatibleError, match=r"no density of the data depends on centre\. Use EM\(prior=True\)"):
        pg.fit(hierarchical, x, EM(), seed=0)
    fit = pg.fit(hierarchical, x, EM(prior=True), seed=0)
    assert "centre, loc: gradient" in fit.notes["M-step"] and rises(fit, "log_posterior")
    # d/dcentre of log prior: (sum of loc - 2 centre) - centre / 25 = 0.
    close(fit.point["centre"], fit.point["loc"].sum() / (2 + 1 / 25), 1e-5)


def test_a_closed_form_that_misses_the_maximum_is_found_out():
    """A prior that counts three times is no conjugate prior any more: L-BFGS climbs on, and takes over."""
    x = two_groups()

    def tempered(x):
        with poutine.scale(scale=3.0), pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(loc[z], 0.9), obs=x)

    program = started(tempered, {"loc": tensor(-0.5, 1.0)})
    fit = pg.fit(program, x, EM(prior=True, tolerance=1e-11), seed=0)
    assert "its closed form misses" in fit.notes["M-step"] and rises(fit, "log_posterior")
    loc = fit.point["loc"].clone().requires_grad_()
    rows = (tensor(0.4, 0.6).log() + dist.Normal(loc, tensor(0.9)).log_prob(x[:, None])).logsumexp(-1)
    total = rows.sum() + 3 * dist.Normal(tensor(0.0), tensor(0.3)).log_prob(loc).sum()
    assert float(torch.autograd.grad(total, loc)[0].abs().max()) < 1e-4
    likely = pg.fit(program, x, EM(), seed=0)
    assert likely.notes["M-step"] == "loc: derived (weighted least squares)", "its prior does not count here"
