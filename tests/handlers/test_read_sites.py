"""What a sample statement means: reparameterised sites, labels as integers, observations at two levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam, NeuTraReparam, StudentTReparam, TransformReparam
from torch import Tensor

import ppl_gen as pg
from ppl_gen.inference import CAVI, EM, IWAE, NUTS, SVI
from ppl_gen.workspace.isolation import isolated
from ppl_gen.workspace.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

X = torch.tensor([0.3, 1.2, -0.4, 2.0, 0.9, 1.1])
ONE = {"chains": 1, "processes": 1}


def centred(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 0.7))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


#: m | x in closed form: x_i ~ N(m, 0.7^2 + 0.5^2), m ~ N(0, 2^2).
V = 0.49 + 0.25
MEAN, SD = float(X.sum()) / V / (0.25 + len(X) / V), (0.25 + len(X) / V) ** -0.5
EVIDENCE = dist.MultivariateNormal(torch.zeros(6), V * torch.eye(6) + 4 * torch.ones(6, 6)).log_prob(X)


def scale(x: Tensor) -> None:
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, s), obs=x)


def heavy(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.StudentT(4.0, m, 1.0), obs=x)


def grid_mean(log_density: Callable[[Tensor], Tensor], u: Tensor) -> tuple[float, float]:
    """Mean and sd by quadrature on an even grid."""
    w = torch.softmax(log_density(u), 0)
    mean = float((w * u).sum())
    return mean, float((w * (u - mean) ** 2).sum()) ** 0.5


def test_kinds_of_reparameterised_sites() -> None:
    info = pg.check(poutine.reparam(centred, config={"z": LocScaleReparam(0.0)}), X)
    kinds = {name: site.kind for name, site in info.sites.items()}
    assert kinds == {"m": "latent", "z_decentered": "latent", "z": "deterministic", "x": "observed"}
    assert "density" in info.offers and "differentiable latents" in info.offers


@pytest.mark.parametrize("centered", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_a_non_centred_program_has_the_posterior_of_the_centred_one(centered: float) -> None:
    model = poutine.reparam(centred, config={"z": LocScaleReparam(centered)})
    fit = pg.fit(model, X, NUTS(draws=300, warmup=150, **ONE), seed=1)
    draws = fit.posterior(draws=300)
    # At least 100 effective draws of 300: the mean within 4.5 sd / sqrt(100) = 0.45 sd, the sd within 4.5 / sqrt(200).
    assert abs(float(draws["m"].mean()) - MEAN) < 0.45 * SD
    assert abs(float(draws["m"].std()) / SD - 1) < 0.32
    rows = (X / 0.25 + MEAN / 0.49) / (1 / 0.25 + 1 / 0.49)
    assert torch.allclose(draws["z"].mean(0).float(), rows, atol=0.2)  # sd of a row 0.45, 100 effective draws
    assert fit.predict(draws=3)["x"].shape == (3, 6) and fit.sample(4)["z"].shape == (4,)
    assert {"m", "z_decentered"} <= set(fit.to_arviz().posterior.data_vars)
    assert len(fit.diagnose())


@pytest.mark.slow
def test_the_marginal_likelihood_of_a_non_centred_program_is_that_of_the_centred_one() -> None:
    model = poutine.reparam(centred, config={"z": LocScaleReparam(0.0)})
    fit = pg.fit(pg.Program(model, guide=pyro.infer.autoguide.AutoMultivariateNormal), X, SVI(steps=1500, lr=0.02))
    found = fit.marginal_likelihood()
    assert found.mc_stderr < 0.1 and abs(found.mean - float(EVIDENCE)) < 4.5 * found.mc_stderr + 0.01


@pytest.mark.slow
def test_a_transformed_global_and_a_mixed_likelihood() -> None:
    fits = [
        (poutine.reparam(scale, config={"s": TransformReparam()}), "s"),
        (poutine.reparam(heavy, config={"x": StudentTReparam()}), "m"),
    ]
    u = torch.linspace(-6.0, 6.0, 4001, dtype=torch.float64)
    x = X.double()[:, None]
    s = u[u > 0]
    truth = {
        "s": grid_mean(lambda s: dist.LogNormal(0.0, 1.0).log_prob(s) + dist.Normal(0.0, s).log_prob(x).sum(0), s),
        "m": grid_mean(lambda m: dist.Normal(0.0, 2.0).log_prob(m) + dist.StudentT(4.0, m, 1.0).log_prob(x).sum(0), u),
    }
    for model, name in fits:
        draws = pg.fit(model, X, NUTS(draws=1000, warmup=300, **ONE), seed=0).posterior()[name]
        mean, sd = truth[name]
        assert abs(float(draws.mean()) - mean) < 0.28 * sd and abs(float(draws.std()) / sd - 1) < 0.25


def test_a_value_that_observes_itself_is_deterministic_everywhere() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        v = 2 * m
        pyro.sample("v", dist.Delta(v), obs=v)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("r", dist.Delta(m), obs=m)
            pyro.sample("w", dist.Delta(k), obs=k)
            pyro.sample("x", dist.Normal(m + k, 1.0), obs=x)

    info = pg.check(model, X)
    assert [info.sites[name].kind for name in ("v", "r", "w")] == ["deterministic"] * 3
    for algorithm in (SVI(steps=3), SVI(IWAE(3), steps=3), NUTS(draws=5, warmup=5, **ONE)):
        fit = pg.fit(model, X, algorithm)
        draws = fit.posterior(draws=5)
        assert torch.equal(draws["v"], 2 * draws["m"]) and torch.equal(draws["w"], draws["k"])
        assert fit.evidence().rows == 6 and set(fit.predict(draws=2)) == {"x"}


def test_an_implicit_likelihood_is_none_the_less_an_observation() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Delta(z), obs=x)

    info = pg.check(model, X)
    assert info.sites["x"].kind == "observed" and "density" not in info.offers


def test_a_reparameterised_observation_is_refused() -> None:
    for config, model in (({"x": LocScaleReparam(0.0)}, scale), ({"x": TransformReparam()}, positive)):
        with pytest.raises(ValueError, match="at site 'x': an observed site is reparameterised"):
            pg.check(poutine.reparam(model, config=config), X.abs())


def positive(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.LogNormal(m, 1.0), obs=x)


def test_neutra_runs() -> None:
    with pyro.get_param_store().scope(), isolated(0):
        guide = pyro.infer.autoguide.AutoDiagonalNormal(positive)
        guide(X.abs())
        model = NeuTraReparam(guide).reparam(positive)
        info = pg.check(model, X.abs())
    assert info.sites["m"].kind == "deterministic" and len(info.select()) == 1


@pytest.mark.parametrize("algorithm", [EM(), CAVI()])
def test_what_does_not_fit_a_non_centred_program_says_so(algorithm: Any) -> None:
    with pytest.raises(pg.IncompatibleError, match="does not fit the program 'centred'"):
        pg.fit(poutine.reparam(centred, config={"z": LocScaleReparam(0.0)}), X, algorithm)


# ---------------------------------------------------------------------------------------------- labels as integers
LABELS = torch.tensor([0, 1, 1, 0, 1, 1])
STORED: dict[str, Any] = {
    "long": LABELS,
    "int8": LABELS.to(torch.int8),
    "uint8": LABELS.to(torch.uint8),
    "bool": LABELS.bool(),
    "half": LABELS.half(),
    "numpy int32": LABELS.numpy().astype(np.int32),
    "numpy uint16": LABELS.numpy().astype(np.uint16),
    "numpy bool": LABELS.numpy().astype(bool),
    "list": LABELS.tolist(),
}
FAMILIES: dict[str, Callable[[Tensor], Any]] = {
    "logits": lambda w: dist.Bernoulli(logits=w),
    "probs": lambda w: dist.Bernoulli(w.sigmoid()),
    "normal": lambda w: dist.Normal(w, 1.0),
    "poisson": lambda w: dist.Poisson(w.exp()),
    "binomial": lambda w: dist.Binomial(3, w.sigmoid()),
    "negative binomial": lambda w: dist.NegativeBinomial(2.0, logits=w),
    "zero inflated": lambda w: dist.ZeroInflatedPoisson(w.exp(), gate=torch.tensor(0.2)),
    "continuous bernoulli": lambda w: dist.ContinuousBernoulli(logits=w),
    "categorical": lambda w: dist.Categorical(logits=torch.stack([torch.zeros(()), w])),
    "event": lambda w: dist.Bernoulli(logits=w).expand([6]).to_event(1).mask(True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_label_is_a_label_however_it_is_stored(family: str) -> None:
    def model(y: Any) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", FAMILIES[family](w), obs=y if family != "event" else y[:, None].expand(6, 6))

    expected = pg.fit(model, {"y": LABELS.float()}, SVI(steps=3))
    for name, stored in STORED.items():
        fit = pg.fit(model, {"y": stored}, SVI(steps=3), dtype=torch.float32)
        assert fit.history["program_loss"].values.tolist() == expected.history["program_loss"].values.tolist(), name
        assert torch.equal(fit.evidence(draws=5).values, expected.evidence(draws=5).values), name


@pytest.mark.parametrize("stored", [torch.long, torch.int32, torch.uint8, torch.bool])
def test_integers_that_the_program_computes_with_are_named(stored: torch.dtype) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    x = torch.ones(6, 2).to(stored)
    for call in (lambda: pg.check(model, {"x": x, "y": LABELS}), lambda: pg.fit(model, {"x": x, "y": LABELS}, SVI())):
        with pytest.raises(
            TypeError,
            match=rf"dry run \(after site 'w', before the next\): [^;]*; the data hold x \({stored}\).*\.float\(\)",
        ):
            call()


def test_observed_categories_stay_indices() -> None:
    means = torch.tensor([-1.0, 2.0])

    def model(y: Tensor, x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])), obs=y)
            pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)

    for stored in (LABELS, LABELS.to(torch.int32)):
        got = pg.fit(model, {"y": stored, "x": X}, SVI(steps=1)).evidence().values
        assert torch.allclose(got, dist.Normal(means[LABELS], 1.0).log_prob(X).double() - np.log(2.0), atol=1e-5)


def test_a_distribution_of_the_users_own_gets_what_was_observed() -> None:
    class Codes(dist.TorchDistribution):
        arg_constraints: dict[str, Any] = {}
        support = dist.constraints.nonnegative_integer

        def log_prob(self, value: Tensor) -> Tensor:
            if value.is_floating_point():
                raise RuntimeError("codes, not numbers")
            return -value.double()

        def sample(self, sample_shape: Any = ()) -> Tensor:
            return torch.zeros(self.batch_shape, dtype=torch.long)

        def expand(self, batch_shape: Any, _instance: Any = None) -> Codes:
            return Codes(torch.Size(batch_shape))

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", Codes(), obs=y)

    with Workspace(), pyro.validation_enabled(False):
        trace = poutine.trace(model).get_trace(LABELS)
    assert trace.nodes["y"]["value"].dtype is torch.long


# ------------------------------------------------------------------------------------------------- two levels
G = torch.arange(40) % 5
U = torch.linspace(-1, 1, 5)
Y = U[G] + 0.1
PRECISION = 1 + 8 / 0.25 + 1 / 0.04
RIGHT = (Y.reshape(8, 5).sum(0) / 0.25 + U / 0.04) / PRECISION
LEVELS = {"g": G, "u": pg.constant(U), "y": Y}


def two_levels(plate: str, soft: bool = False) -> Callable[..., None]:
    def model(g: Tensor, u: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("groups", 5):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            if not soft:
                pyro.sample("u", dist.Normal(a, 0.2), obs=u)
        if soft:
            pyro.sample("zero", dist.Normal(a.sum(-1), 0.01), obs=torch.tensor(0.0))
        with pyro.plate(plate, len(g)):
            pyro.sample("y", dist.Normal(a[g], 0.5), obs=y)

    return model


@pytest.mark.parametrize(("plate", "soft"), [("data", False), ("rows", True)])
def test_observations_at_two_levels(plate: str, soft: bool) -> None:
    fit = pg.fit(two_levels(plate, soft), LEVELS, NUTS(draws=200, warmup=150, **ONE), seed=0)
    prior = torch.eye(5) + (torch.ones(5, 5) / 1e-4 if soft else torch.eye(5) / 0.04)
    precision = prior + torch.eye(5) * 32
    right = torch.linalg.solve(precision, Y.reshape(8, 5).sum(0) / 0.25 + (0.0 if soft else U / 0.04))
    if not soft:
        assert torch.allclose(right, RIGHT, atol=1e-5)
    # sd 0.13 to 0.17 each; 60 effective draws or more: 4.5 * 0.17 / sqrt(60) = 0.1.
    assert torch.allclose(fit.posterior(draws=200)["a"].mean(0).float(), right, atol=0.1)
    assert ("data plate" in fit.notes) == (plate == "rows")
    assert fit.info.data_plate == plate and fit.sample(3)["y"].shape == (3,)


def test_the_marginal_likelihood_counts_both_levels() -> None:
    fit = pg.fit(two_levels("data"), LEVELS, SVI(steps=1500, lr=0.02), seed=0)
    design = torch.cat([torch.eye(5), torch.eye(5)[G]])
    noise = torch.diag(torch.cat([torch.full((5,), 0.04), torch.full((40,), 0.25)]))
    exact = dist.MultivariateNormal(torch.zeros(45), design @ design.T + noise).log_prob(torch.cat([U, Y]))
    found = fit.marginal_likelihood()
    assert abs(found.mean - float(exact)) < 4.5 * found.mc_stderr + 0.01 and found.mc_stderr < 0.1


@pytest.mark.slow
def test_groups_count_once_on_minibatches() -> None:
    fit = pg.fit(two_levels("data"), LEVELS, SVI(steps=3000, lr=0.01, batch_size=10), seed=0)
    # Gradient noise of batches of 10: seen to move means by less than 0.05; were u rescaled, they would miss by more
    # than 0.1 at the ends (weight of u a half in place of a seventh).
    assert torch.allclose(fit.posterior()["a"].mean(0), RIGHT, atol=0.08)


def test_as_many_groups_as_rows() -> None:
    data = {"g": torch.arange(5), "u": pg.constant(U), "y": U + 0.1}
    for algorithm in (SVI(steps=2), NUTS(draws=5, warmup=5, **ONE)):
        assert pg.fit(two_levels("rows"), data, algorithm).info.data_plate == "rows"


def sum_of_rows(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("s", dist.Normal(w * x.sum(), 1.0), obs=torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def mean_of_rows(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("s", dist.Normal(w, 1.0), obs=x.mean())
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def sum_of_latents(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.sample("s", dist.Normal(z.sum(), 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize("model", [sum_of_rows, mean_of_rows, sum_of_latents])
def test_what_depends_on_the_rows_of_a_batch_is_refused_on_minibatches(model: Callable[..., None]) -> None:
    pg.fit(model, Y, SVI(steps=2))
    with pytest.raises(pg.IncompatibleError, match=r"\['s'\] stand outside the data plate 'data', and their density"):
        pg.fit(model, Y, SVI(steps=2, batch_size=5))


def test_em_drops_no_observation_with_the_priors() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        pyro.sample("s", dist.Normal(w[0], 0.1), obs=torch.tensor(-3.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(w[k], 1.0), obs=x)

    with pytest.raises(pg.IncompatibleError, match=r"would be lost[\s\S]*EM\(prior=True\)"):
        pg.fit(model, Y, EM())
    w = pg.fit(model, Y, EM(prior=True)).point["w"].requires_grad_()
    log_rows = torch.logsumexp(dist.Normal(w, 1.0).log_prob(Y[:, None].double()) - np.log(2.0), -1).sum()
    rest = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).log_prob(w).sum() + dist.Normal(w[0], 0.1).log_prob(
        torch.tensor(-3.0)
    )
    # A maximum of the posterior density, the observation outside the plate among it: the gradient vanishes.
    assert torch.autograd.grad(log_rows + rest, w)[0].abs().max() < 1e-3
