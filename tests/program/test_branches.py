"""Programs that run only enumerated, against the same programs written so that they broadcast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor
from torch.distributions import constraints

import ppl_gen as pg
from ppl_gen.enumeration.marginals import discrete_marginals, enumerated_trace, log_joint, row_log_density
from ppl_gen.handlers.branches import Branches
from ppl_gen.handlers.picked import Pick, Picked
from ppl_gen.inference import EM, SVI
from ppl_gen.program.checks import check_densities

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # short runs, on purpose

SEEDED = torch.Generator().manual_seed(0)
X = torch.cat([torch.randn(20, generator=SEEDED, dtype=torch.float64) + at for at in (-3.0, 3.0)])
SERIES = torch.randn(15, 5, generator=SEEDED, dtype=torch.float64)
TABLE = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.2, 0.7]], dtype=torch.float64)
CHAIN = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)


def mixture(strict: bool) -> Callable[[Tensor], None]:
    @config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            loc = locs[z.squeeze(-1)].unsqueeze(-1) if strict else locs[z]
            pyro.deterministic("loc", loc)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return model


def one_on_another(strict: bool) -> Callable[[Tensor], None]:
    """A finite site that follows another, one reading masked by a finite site, and a factor."""

    @config_enumerate
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2, 3), 3.0).to_event(2))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.4))
            b = pyro.sample("b", dist.Categorical(TABLE[a.long()]))
            if strict:
                assert a.shape == (2, 1) and b.shape == (3, 1, 1)
            with poutine.mask(mask=(a + b < 3) & (x > -3.0)):
                pyro.sample("x", dist.Normal(mu[a.long(), b], 0.5), obs=x)
            pyro.factor("more", 0.1 * a * b)

    return model


def chain(strict: bool) -> Callable[[Tensor], None]:
    @config_enumerate
    def model(s: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 1.0).to_event(1))
        with pyro.plate("data", len(s), dim=-1):
            z = torch.tensor(0)
            for t in pyro.markov(range(s.shape[1])):
                z = pyro.sample(f"z{t}", dist.Categorical(CHAIN[z]))
                if strict:
                    assert z.shape[0] == 3 and z.shape[-1] == 1
                pyro.sample(f"s{t}", dist.Normal(locs[z], 1.0), obs=s[:, t])

    return model


def moved(strict: bool) -> Callable[[Tensor], None]:
    """A continuous site between finite ones: drawn once, at the values that were drawn before it."""

    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.4))
            if strict:
                assert a.shape == (2, 1)
            u = pyro.sample("u", dist.Normal(4.0 * a, 1.0 + a))
            b = pyro.sample("b", dist.Bernoulli(logits=u - 2.0))
            pyro.sample("x", dist.Normal(u + a * b, 0.5), obs=x)

    return model


PROGRAMS = [(mixture, X), (one_on_another, X), (chain, SERIES), (moved, X)]
CASES = pytest.mark.parametrize(("make", "data"), PROGRAMS, ids=["mixture", "one_on_another", "chain", "moved"])


def values_of(model: Callable[[Tensor], None], data: Tensor) -> dict[str, Tensor]:
    with pyro.validation_enabled(False):
        nodes = poutine.trace(model).get_trace(data).nodes.items()
    return {n: v["value"] for n, v in nodes if v["type"] == "sample" and not v["is_observed"] and n != "data"}


@CASES
def test_a_program_that_runs_only_enumerated_fails_drawn(make, data):
    """What follows is about something."""
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        check_densities(poutine.trace(make(True)).get_trace(data))


@CASES
def test_densities_at_drawn_values_are_those_of_the_broadcasting_program(make, data):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    values = values_of(make(False), data)
    assert any(v.dim() == 1 and len(v.unique()) > 1 for n, v in values.items() if n[0] in "abz")
    names = [n for n in values if n[0] in "abz"]

    class Given(poutine.messenger.Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            if msg["name"] in values:
                msg["value"], msg["done"] = values[msg["name"]], True

    with Given():
        trace = poutine.trace(Branches(names, 1)(make(True))).get_trace(data)
    trace.compute_log_prob()
    with Given():
        expected = poutine.trace(make(False)).get_trace(data)
    expected.compute_log_prob()
    torch.set_default_dtype(torch.float32)
    for name, node in expected.nodes.items():
        if node["type"] == "sample" and not node["infer"].get("_deterministic"):
            torch.testing.assert_close(trace.nodes[name]["log_prob"], node["log_prob"], rtol=0.0, atol=1e-10)
        elif node["type"] == "sample":
            assert torch.equal(trace.nodes[name]["value"], node["value"])


def points(x: Tensor) -> None:
    """A guide for the mixture that draws nothing: what a fit comes to does not hang on random numbers."""
    weights = pyro.param("share", torch.tensor([0.3, 0.7]).double(), constraint=constraints.simplex)
    locs = pyro.param("at", torch.tensor([-2.5, 2.0]).double())
    pyro.sample("weights", dist.Delta(weights, event_dim=1))
    pyro.sample("locs", dist.Delta(locs, event_dim=1))


def means(s: Tensor) -> None:
    pyro.sample("mu", dist.Delta(pyro.param("at", torch.arange(6.0).double().reshape(2, 3)), event_dim=2))


def levels(s: Tensor) -> None:
    pyro.sample("locs", dist.Delta(pyro.param("at", torch.tensor([-1.5, 0.0, 1.0]).double()), event_dim=1))


@pytest.mark.parametrize(
    ("make", "guide", "data"),
    [(mixture, points, X), (one_on_another, means, X), (chain, levels, SERIES)],
    ids=["mixture", "one_on_another", "chain"],
)
def test_table_loss_evidence_and_posterior_are_those_of_the_broadcasting_program(make, guide, data):
    strict, plain = pg.Program(make(True), guide), pg.Program(make(False), guide)
    ours, theirs = pg.check(strict, data), pg.check(plain, data)
    assert ours.offers == theirs.offers
    for name, site in theirs.sites.items():
        mine = ours.sites[name]
        assert (mine.kind, mine.distribution, mine.plates) == (site.kind, site.distribution, site.plates)
        assert site.kind == "deterministic" or mine.batch_shape == site.batch_shape
    one, other = (pg.fit(program, data, SVI(steps=30, lr=0.05), seed=0) for program in (strict, plain))
    assert "enumerated" in one.notes and "enumerated" not in other.notes
    losses = [torch.tensor(fit.history["program_loss"].to_numpy()) for fit in (one, other)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.0, atol=1e-10)
    assert abs(float(losses[0][-1] - losses[0][0])) > 1e-3
    assert one.evidence(data).mean == pytest.approx(other.evidence(data).mean, abs=1e-10)
    _posterior_is_exact(one, other, data)
    observed = {site.name for site in one.info.select(kind="observed")}
    assert observed == one.predict(data, draws=2, seed=0).keys()
    if one.info.select(kind="factor"):
        with pytest.raises(pg.IncompatibleError, match="weighs what it draws by pyro.factor at 'more'"):
            one.sample(10, seed=0)
    else:
        assert observed <= one.sample(10, seed=0).keys()


def _posterior_is_exact(fit: pg.Fit, plain: pg.Fit, data: Tensor) -> None:
    """Frequencies of drawn values against the marginals of the broadcasting program."""
    count = 400
    draws = fit.posterior(draws=count, seed=1)
    finite = fit.info.finite_latents
    values = {name: draws[name][0] for name in draws if name in fit.info.sites and name not in (*finite, "loc")}
    with plain.bound(0):
        trace = enumerated_trace(plain.program.model, (data,), values=values, plate_nesting=1)
    exact = discrete_marginals(trace)
    assert finite and max(float((table.mean(0) - table).abs().max()) for table in exact.values()) > 0.1
    for name in finite:
        for k in range(exact[name].shape[-1]):
            found = (draws[name] == k).double().mean(0)
            # 5.5 standard errors, for up to 225 cells: false alarms below 1e-5
            assert float((found - exact[name][:, k]).abs().max()) < 5.5 * (0.25 / count) ** 0.5


def test_the_loss_is_that_of_pyro():
    """Of the strict program as it is; the guide begins at the same points."""
    strict = mixture(True)
    fit = pg.fit(pg.Program(strict, points), X, SVI(steps=1), seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(strict, points, X) / len(X)
    finally:
        torch.set_default_dtype(torch.float32)
        pyro.clear_param_store()
    assert float(fit.history["program_loss"][0]) == pytest.approx(loss, abs=1e-10)
    assert abs(loss) > 1.0


def test_new_rows_and_predictions_follow_the_branch_that_was_drawn():
    n = 4000
    fit = pg.fit(mixture(True), X, EM(), seed=0)
    rows = fit.sample(n, seed=1)
    locs = rows["locs"]
    assert torch.equal(rows["loc"], locs[rows["z"]])
    for k in (0, 1):
        part = rows["x"][rows["z"] == k]
        assert abs(float(part.mean() - locs[k])) < 5.0 / len(part) ** 0.5  # sd 1: false alarms below 1e-6
        assert abs(float(part.std() - 1.0)) < 5.0 / (2 * len(part)) ** 0.5
        assert abs(float(part.mean() - locs[1 - k])) > 1.0
    replicated = fit.predict(X, draws=200, seed=1)["x"]
    weights = fit.posterior(draws=400, seed=1)["z"].double().mean(0)
    expected = locs[0] + weights * (locs[1] - locs[0])
    assert float((replicated.mean(0) - expected).abs().max()) < 6.0 / 200**0.5 + 0.5


def test_a_continuous_site_is_drawn_at_the_finite_values_before_it():
    torch.manual_seed(0)
    x = torch.zeros(20000)
    values = values_of(Branches(["a", "b"], 1)(moved(True)), x)
    a, u, b = values["a"], values["u"], values["b"]
    for k, of in ((0.0, u[a == 0]), (1.0, u[a == 1])):
        assert abs(float(of.mean()) - 4.0 * k) < 5.0 * (1.0 + k) / len(of) ** 0.5  # false alarms below 1e-6
        assert abs(float(of.std()) / (1.0 + k) - 1.0) < 5.0 / (2 * len(of)) ** 0.5
    chance = torch.sigmoid(u - 2.0)
    assert abs(float((b - chance).mean())) < 5.0 * 0.5 / len(b) ** 0.5
    assert abs(float(((b - chance) * u).mean())) < 5.0 * 0.5 * float((u**2).mean() ** 0.5) / len(b) ** 0.5


def a_finite_global(strict: bool) -> Callable[[Tensor], None]:
    @config_enumerate
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.Categorical(torch.tensor([0.5, 0.2, 0.3])))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(share.clamp(0.1, 0.9) * (1.0 - 0.1 * scale)))
            if strict:
                assert scale.shape == (3, 1) and z.shape == (2, 1, 1)
            pyro.sample("x", dist.Normal((2.0 * z - 1.0) * (2.0 + 0.3 * scale), 1.0 + scale), obs=x)

    return model


@pytest.mark.slow
def test_a_finite_global_takes_its_value_while_the_rows_are_summed():
    fits = [pg.fit(a_finite_global(strict), X, EM(), seed=0) for strict in (True, False)]
    evidence = [fit.evidence(X).mean for fit in fits]
    assert "enumerated" in fits[0].notes and evidence[0] == pytest.approx(evidence[1], abs=1e-6)  # other starts
    one, other = (fit.posterior(draws=300, seed=1) for fit in fits)
    share = [(draws["scale"] == k).double().mean() for k in range(3) for draws in (one, other)]
    assert all(abs(float(a - b)) < 5.5 * (0.5 / 300) ** 0.5 for a, b in zip(share[::2], share[1::2], strict=True))
    apart = (one["z"].double().mean(0) - other["z"].double().mean(0)).abs().max()
    assert float(apart) < 5.5 * (0.5 / 300) ** 0.5  # of 40 rows: false alarms below 1e-5
    assert float(one["z"].double().mean(0).max() - one["z"].double().mean(0).min()) > 0.8
    assert fits[0].predict(X, draws=5, seed=1)["x"].shape == (5, 40)


def test_densities_with_one_site_given_and_one_enumerated():
    strict, plain = Branches(["scale", "z"], 1)(a_finite_global(True)), a_finite_global(False)
    for given in range(3):
        values = {"scale": torch.tensor(given), "share": torch.tensor(0.4)}
        one, other = (
            row_log_density(enumerated_trace(model, (X,), discrete=["z"], values=values, plate_nesting=1))
            for model in (strict, plain)
        )
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-6)
    z = (torch.arange(40) % 2).float()
    values = {"z": z, "share": torch.tensor(0.4)}
    one, other = (
        log_joint(enumerated_trace(model, (X,), discrete=["scale"], values=values, plate_nesting=1))
        for model in (strict, plain)
    )
    torch.testing.assert_close(one, other, rtol=0.0, atol=1e-4)


def test_a_prior_predictive_needs_no_fit():
    rows = pg.prior_predictive(mixture(True), X, draws=50, seed=0)
    assert torch.equal(rows["loc"], torch.gather(rows["locs"], 1, rows["z"]))


def test_a_saved_fit_is_loaded_with_its_program(tmp_path):
    program = mixture(True)
    fit = pg.fit(program, X, EM(), seed=0)
    fit.save(tmp_path / "fit")
    again = pg.load(tmp_path / "fit", program=program, data=X)
    assert again.evidence(X).mean == fit.evidence(X).mean
    assert torch.equal(again.sample(5, seed=0)["x"], fit.sample(5, seed=0)["x"])


def test_given_finite_values_are_taken():
    fit = pg.fit(mixture(True), X, EM(), seed=0)
    rows = fit.sample(50, given={"z": 1}, seed=0)
    assert torch.equal(rows["loc"], rows["locs"][1].expand(50))
    with pytest.raises(ValueError, match="outside"):
        fit.sample(50, given={"z": 2}, seed=0)


def test_code_that_mixes_the_values_is_not_summed():
    """Its enumerated density is no density at any value: the mean is over 0 and 1, whatever was drawn."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            assert z.shape == (2, 1)
            pyro.sample("x", dist.Normal(z - z.double().mean(), 1.0), obs=x)

    assert "differs from that with the values one by one" in pg.check(model, X).unenumerable


def test_several_draws_at_once_are_refused():
    """Their dim is one of enumeration here: two of them would be taken for two values."""

    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            assert z.shape == (2, 1)
            pyro.sample("x", dist.Normal(z.float(), 1.0))

    with pyro.plate("draws", 2, dim=-2), pytest.raises(pg.IncompatibleError, match="several draws at once"):
        Branches(["z"], 1)(model)()


def test_another_plate_of_the_same_size_is_refused():
    def model() -> None:
        with pyro.plate("groups", 3):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z.float(), 1.0))

    torch.manual_seed(1)
    with pytest.raises(ValueError, match="neither to a plate nor to a finite site"):
        poutine.trace(Branches(["z"], 1)(model)).get_trace()


def test_a_picked_distribution_is_the_one_of_its_slot():
    torch.manual_seed(0)
    slot = torch.tensor([0, 1, 1])
    low, wide = torch.tensor([[0.0], [10.0]]), torch.tensor([[1.0], [2.0]])
    picked = Picked(dist.Uniform(low, low + wide).expand([2, 3]), Pick({-2: slot}, nesting=1, depth=1))
    alone = dist.Uniform(low[slot, 0], (low + wide)[slot, 0])
    values = picked.sample((5,))
    assert values.shape == (5, 3) and bool(alone.support.check(values).all())
    for inner in (values, values[0]):
        assert torch.equal(picked.log_prob(inner), alone.log_prob(inner))
    assert torch.equal(picked.mean, alone.mean) and torch.equal(picked.variance, alone.variance)
    assert torch.equal(picked.support.check(torch.tensor([0.5, 0.5, 11.0])), torch.tensor([True, False, True]))
    draws = picked.expand([4, 3]).sample()
    assert draws.shape == (4, 3) and len(draws[:, 0].unique()) == 4
