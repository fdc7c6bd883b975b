"""Programs of unusual shapes: answered rightly, or refused by name."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoLaplaceApproximation, AutoNormal
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import NUTS, SVI, Patience, Plateau

X = torch.tensor([1.2, 0.3, -0.6, 0.9, 1.5, -0.2, 0.4, 0.8])
X2 = torch.stack([X, -X.flip(0)], 1)
SHORT = NUTS(draws=20, warmup=20, chains=1)


def plain(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


# ------------------------------------------------------------------------------------------------- observed sites
@pytest.mark.parametrize(
    "flow",
    [
        transforms.planar,
        transforms.radial,
        transforms.sylvester,
        transforms.polynomial,
        transforms.block_autoregressive,
    ],
)
def test_an_observation_through_a_flow_without_an_inverse_is_refused_by_name(flow):
    steps = [flow(2), transforms.AffineTransform(0.0, 2.0)]

    def model(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            pyro.sample("x", dist.TransformedDistribution(base, steps), obs=x)

    for act in (lambda: pg.check(model, X2), lambda: pg.fit(model, X2, SVI(steps=1))):
        with pytest.raises(ValueError, match="at site 'x': it goes through .*no inverse"):
            act()


@pytest.mark.parametrize("value", [0.5, 1, True, np.float64(0.5), np.int64(1), [0.5, 0.5], np.array([0.5, 0.5])])
def test_numbers_of_python_may_be_observed(value):
    sizes = np.shape(value)

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("two", 2):
            pyro.sample("c", dist.Normal(m, 1.0), obs=value)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def tensors(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("two", 2):
            pyro.sample("c", dist.Normal(m, 1.0), obs=torch.as_tensor(value).float().expand(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    assert sizes in ((), (2,))
    found = [pg.fit(program, X, SVI(steps=4), seed=0) for program in (model, tensors)]
    assert torch.equal(found[0].posterior(draws=3)["m"], found[1].posterior(draws=3)["m"])


# ------------------------------------------------------------------------------------------------------- stopping
def test_a_rule_on_a_record_that_never_appears_ends_with_an_error_that_names_those_there_are():
    for rule, text in (
        (Plateau(on="program_los"), r"Plateau\(on='program_los'\).*expected a record .*program_loss"),
        (Patience(on="evidence"), r"Patience\(on='evidence'\).*expected a record .*program_loss.*validation_evidence"),
    ):
        with pytest.raises(ValueError, match=text):
            pg.fit(plain, X, SVI(steps=60, stop_rule=rule), validation=X)
    with pytest.raises(
        ValueError, match="program_loss, reconstruction.*got 'validation_evidence'; give fit.*validation=rows"
    ):
        pg.fit(plain, X, SVI(steps=60, stop_rule=Patience()))
    with pytest.raises(ValueError, match="a record that this fit keeps"):  # also where it would not have been asked yet
        pg.fit(plain, X, SVI(steps=2, stop_rule=Plateau(on="elb")))
    for make in (lambda: Plateau(on="validation_evidence"), lambda: Patience(on="program_loss")):
        with pytest.raises(ValueError, match="on: "):
            make()


# --------------------------------------------------------------------------------------------------------- guides
def test_laplace_inside_a_list_of_guides_is_refused_by_name():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    guide = AutoGuideList(model)
    guide.append(AutoLaplaceApproximation(poutine.block(model, expose=["a"])))
    guide.append(AutoNormal(poutine.block(model, expose=["b"])))
    with pytest.raises(pg.IncompatibleError, match="AutoLaplaceApproximation inside AutoGuideList"):
        pg.fit(pg.Program(model, guide), X, SVI(steps=1))


def test_an_auxiliary_site_that_the_model_has_no_density_for_is_refused():
    def loc():
        return pyro.param("loc", torch.tensor(0.0))

    def label(x):
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
        pyro.sample("m", dist.Normal(loc() + 0.1 * k, 0.3))

    def noise(x):
        u = pyro.sample("u", dist.Normal(loc(), 0.3), infer={"is_auxiliary": True})
        pyro.sample("m", dist.Delta(u))

    with pytest.raises(ValueError, match="draws k as auxiliary"):
        pg.fit(pg.Program(plain, label), X, SVI(steps=1))
    fit = pg.fit(pg.Program(plain, noise), X, SVI(steps=300, lr=0.02), seed=0)
    n = len(X)
    right = -0.5 * (n * math.log(2 * math.pi) + math.log(n + 1) + float(X.square().sum() - X.sum().square() / (n + 1)))
    # weights p/q of N(m, 1/9) by N(m, 0.09) have a relative spread of about 0.15: five errors of 1000 draws
    assert abs(fit.marginal_likelihood(draws=1000).mean - right) < 0.03


# ------------------------------------------------------------------------------------------------- plates and rows
@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_latents_of_rows_in_an_outer_plate_get_their_evidence():
    s = 0.7

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 2, dim=-1):
                pyro.sample("x", dist.Normal(z, s), obs=x)

    cov = torch.ones(2, 2) + s**2 * torch.eye(2)
    right = dist.MultivariateNormal(torch.zeros(2), cov).log_prob(X2)
    for algorithm in (SVI(steps=1), SHORT):
        found = pg.fit(model, {"x": X2}, algorithm, seed=0).evidence(particles=4000)
        # of 4000 draws of the prior a row in the bulk keeps hundreds: an error of 0.06 at most, and a factor of five
        torch.testing.assert_close(found.values.float(), right, atol=0.3, rtol=0)


def finite_outside(x):
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    loc = torch.tensor([0.0, 3.0])[k] + m
    pyro.sample("x", dist.Normal(loc.unsqueeze(-1).expand(loc.shape + (len(x),)), 1.0).to_event(1), obs=x)


def own_rows(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Normal(m.expand(len(x)), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def series(x):
    z = torch.tensor(0.0)
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
        pyro.sample(f"x_{t}", dist.Normal(z, 0.01), obs=x[t])


@pytest.mark.parametrize("algorithm", [SVI(steps=2), SHORT])
@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_new_rows_of_a_program_without_a_data_plate_share_its_latents_or_are_refused(algorithm):
    fit = pg.fit(finite_outside, X, algorithm, seed=0)
    assert fit.evidence().rows == 1 and fit.evidence(X.clone()).mean == fit.evidence().mean
    with pytest.raises(pg.IncompatibleError, match="k of 'finite_outside' is summed out, and the program has no data"):
        fit.evidence(X[:3] + 0.1)
    assert set(fit.posterior(X[:3] + 0.1, draws=2)) == {"k", "m"}  # which are those of the training rows
    for model, name in ((own_rows, "z"), (series, "z_4, z_5, z_6 and 5 more")):
        fit = pg.fit(model, X, algorithm, seed=0)
        for rows in (X + 0.1, X[:3] + 0.1):
            for question in (fit.evidence, fit.predict, fit.posterior):
                with pytest.raises(pg.IncompatibleError, match=f"{name} of .* follow the number of rows"):
                    question(rows)
        sizes = {key: tuple(value.shape) for key, value in fit.sample(3).items()}
        assert sizes["z" if model is own_rows else "z_2"] == ((3,) if model is own_rows else ())
        assert len(sizes) == (3 if model is own_rows else 6)
    # a new series: its first state is a draw of the prior, and not the training series' 1.2 +- 0.01
    starts = torch.stack([fit.sample(3, seed=seed)["z_0"] for seed in range(30)])
    assert float(starts.std()) > 0.5  # of 30 draws of a normal: below half of its sd once in 10 million


def test_rows_of_a_program_without_a_data_plate_share_continuous_latents():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(m.expand(len(x)), 1.0).to_event(1), obs=x)

    fit = pg.fit(model, X, NUTS(draws=400, warmup=200, chains=1), seed=0)
    new, n = X[:3] + 0.5, len(X)
    mean, var = X.sum() / (n + 1), 1 / (n + 1)
    right = dist.MultivariateNormal(mean.expand(3), torch.eye(3) + var).log_prob(new)
    found = fit.evidence(new, draws=400)
    assert abs(found.mean - float(right)) < max(0.1, 5 * found.mc_stderr)
    assert found.rows == 1


def test_a_scale_of_the_programs_own_is_said_beside_the_evidence():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=2.0):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    fit = pg.fit(model, X, SVI(steps=1), seed=0)
    with pytest.warns(UserWarning, match="'model' weighs x by a scale of its own"):
        fit.evidence()


# -------------------------------------------------------------------------------------------------------- networks
def test_questions_run_networks_in_evaluation_mode_registered_or_not():
    for registered in (True, False):
        net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))

        def model(t, y=None, net=net, registered=registered):
            if registered:
                pyro.module("net", net)
            s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
            with pyro.plate("data", len(t)):
                pyro.sample("y", dist.Normal(net(t).squeeze(-1), s), obs=y)

        before = {name: value.clone() for name, value in net.state_dict().items()}
        fit = pg.fit(model, {"t": X[:, None], "y": X}, SVI(steps=3), seed=0)
        values = [fit.evidence(seed=seed).values for seed in (0, 1)]
        assert torch.equal(*values) and torch.equal(fit.evidence({"t": X[:, None], "y": X}, chunk=3).values, values[0])
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert all(part.training for part in net.modules())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("kind", [dist.Poisson, dist.Bernoulli])
def test_counts_of_any_dtype_are_the_same_counts(kind, dtype):
    def model(x):
        rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", kind(rate), obs=x)

    counts = X > 0.4
    fit, other = (pg.fit(model, values, SVI(steps=3), seed=0) for values in (counts.to(dtype), counts.float()))
    assert torch.equal(fit.evidence(draws=3).values, other.evidence(draws=3).values)
    assert torch.equal(fit.predict(draws=2)["x"], other.predict(draws=2)["x"])
