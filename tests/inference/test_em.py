"""EM as a whole: published values, scikit-learn step by step, offered steps, guards, and what a fit can be asked.

Float64 throughout. One step in closed form is a handful of sums over at most 1000 rows, so that two right programs
differ by some 1e-13 relative; ten steps of a contraction do not enlarge that. 1e-8 (asked for) leaves five digits.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from em_cases import (
    F64,
    NORMALS_START,
    close,
    hierarchical,
    last,
    normals,
    normals_log_density,
    rises,
    rng,
    started,
    tensor,
    two_groups,
)

import ppl_gen as pg
from ppl_gen.inference import EM
from ppl_gen.models import gaussian_mixture
from ppl_gen.program.extensions import EMSteps

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

# ------------------------------------------------------------------------------------------------------------- crabs


def test_crabs_reach_the_maximum_of_the_likelihood():
    """2567.5789 and the gain of 26.604 over one normal are published values."""
    crabs = pg.load_data("crabs")
    first = pg.fit(gaussian_mixture(components=2), crabs, EM(steps=1), seed=0)
    assert last(first) < 2567.0, "one step does not do it"
    fit = pg.fit(gaussian_mixture(components=2), crabs, EM(), seed=0)
    assert fit.status is pg.Status.CONVERGED and fit.history["log_likelihood"].dims == ("step",)
    assert rises(fit) and abs(last(fit) - 2567.5789) < 1e-4
    assert fit.notes["M-step"] == "loc_standard, precision, weights: offered by the program"
    one = pg.fit(gaussian_mixture(components=1), crabs, EM(), seed=0)
    assert abs(last(fit) - last(one) - 26.604) < 2e-3 and one.status is pg.Status.CONVERGED


def test_crabs_by_a_derived_m_step_from_a_vague_prior():
    """The prior is centred far from the data: the start is found from five kicks off the saddle at 2540.97."""

    def crabs_of_two_kinds(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
            scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    fit = pg.fit(crabs_of_two_kinds, pg.load_data("crabs"), EM(), seed=0)
    assert rises(fit) and abs(last(fit) - 2567.5789) < 1e-4
    assert float(fit.history["log_likelihood"][0]) < 2567.0
    assert fit.notes["M-step"] == (
        "weights: derived (weighted counts); loc: derived (weighted least squares); scale: derived (weighted residuals)"
    )
    assert fit.cost["restarts"] == 5 and fit.cost["trial_steps"] == 50
    assert fit.status is pg.Status.CONVERGED and "converged after" in fit.message


# ------------------------------------------------------------------------------------------- scikit-learn, step by step


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("own", [False, True], ids=["offered", "derived"])
def test_steps_are_those_of_scikit_learn(steps, own):
    """The same start, no regularisation: parameters after so many steps, diagonal covariances in two dimensions."""
    from sklearn.mixture import GaussianMixture

    x = torch.stack([two_groups(), two_groups().flip(0) * 0.7], -1)
    loc, scale = tensor([-0.5, 0.3], [1.0, -0.2]), tensor([0.8, 1.0], [1.3, 0.6])
    if own:

        def diagonal(x):
            weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
            loc = pyro.sample("loc", dist.Normal(torch.zeros(2, 2), 5.0).to_event(2))
            scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2, 2), 1.0).to_event(2))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Categorical(weights))
                pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)

        program = started(diagonal, {"weights": tensor(0.4, 0.6), "loc": loc, "scale": scale})
    else:
        built = gaussian_mixture(components=2, covariance="diagonal")(x)
        middle, unit = x.mean(0), x.std(0, correction=0)
        values = {"weights": tensor(0.4, 0.6), "loc_standard": (loc - middle) / unit, "precision": (unit / scale) ** 2}
        program = replace(built, start=lambda: values)
    fit = pg.fit(program, x, EM(steps=steps), seed=0)
    assert ("derived" if own else "offered") in fit.notes["M-step"]
    theirs = GaussianMixture(
        2,
        covariance_type="diag",
        weights_init=[0.4, 0.6],
        means_init=loc.numpy(),
        precisions_init=(scale**-2).numpy(),
        reg_covar=0.0,
        tol=0.0,
        max_iter=steps,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, as intended
        theirs.fit(x.numpy())
    found = {name: draws[0] for name, draws in fit.posterior(draws=1).items()}
    close(found["weights"], theirs.weights_, 1e-8)
    close(found["loc"], theirs.means_, 1e-8)
    close(found["scale"] ** 2, theirs.covariances_, 1e-8)
    close(last(fit), theirs.score(x.numpy()) * len(x), 1e-8)
    assert not torch.allclose(found["loc"], loc, atol=1e-2), "the first step moves"


# ------------------------------------------------------------------------------------------------ offered steps


def ppca(x):
    """Two columns of loadings, isotropic noise; the latent of each row is continuous, so the E-step must be offered."""
    loading = pyro.sample("loading", dist.Normal(torch.zeros(x.shape[1], 2), 3.0).to_event(2))
    noise = pyro.sample("noise", dist.HalfNormal(3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading.T, noise).to_event(1), obs=x)


def ppca_e_step(values, x):
    loading, noise = values["loading"], values["noise"]
    cover = loading @ loading.T + noise**2 * torch.eye(len(loading), dtype=F64)
    total = dist.MultivariateNormal(torch.zeros(len(loading), dtype=F64), cover).log_prob(x).sum()
    inner = torch.linalg.inv(loading.T @ loading + noise**2 * torch.eye(2, dtype=F64))
    mean = x @ loading @ inner
    return total, {"mean": mean, "square": mean.T @ mean + len(x) * noise**2 * inner}


def ppca_m_step(weights, values, prior, x):
    loading = torch.linalg.solve(weights["square"], weights["mean"].T @ x).T
    left = (
        (x**2).sum() - 2 * (weights["mean"] * (x @ loading)).sum() + (weights["square"] * (loading.T @ loading)).sum()
    )
    return {"loading": loading, "noise": (left / x.numel()).sqrt()}


def ppca_data():
    z = torch.randn(200, 2, generator=rng(7), dtype=F64)
    return z @ tensor([2.0, 0.0, 1.0, 0.5], [0.0, 1.5, -1.0, 0.2]) + 0.4 * torch.randn(
        200, 4, generator=rng(8), dtype=F64
    )


PPCA_START = {"loading": tensor([1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.1, -0.2]), "noise": tensor(1.0).squeeze()}


def test_offered_steps_serve_continuous_latents():
    """Probabilistic PCA by EM reaches its closed form (Tipping and Bishop 1999): noise is the mean lost eigenvalue."""
    x = ppca_data() - ppca_data().mean(0)
    program = started(ppca, PPCA_START, em=EMSteps(m_step=ppca_m_step, e_step=ppca_e_step))
    fit = pg.fit(program, x, EM(), seed=0)
    lost = torch.linalg.eigvalsh(x.T @ x / len(x))[:2].mean().sqrt()
    assert rises(fit) and fit.status is pg.Status.CONVERGED
    close(fit.point["noise"], lost, 1e-5)
    assert abs(float(PPCA_START["noise"] - lost)) > 0.1
    assert fit.notes["M-step"] == "loading, noise: offered by the program"


def test_an_m_step_without_an_e_step_needs_finite_latents():
    program = started(ppca, PPCA_START, em=EMSteps(m_step=ppca_m_step))
    with pytest.raises(pg.IncompatibleError, match=r"cannot sum out\s+z.*e_step"):
        pg.fit(program, ppca_data(), EM(), seed=0)


def test_a_wrong_m_step_is_mended_or_reported_never_hidden():
    def overshoot(step):
        return lambda weights, values, prior, x: {**step(weights, values, prior, x), **_moved(values)}

    def _moved(values):
        name = "loc" if "loc" in values else "noise"
        return {name: values[name] * 1.5}

    x = two_groups()
    own = EMSteps(m_step=lambda weights, values, prior, x: {"loc": values["loc"] * 1.5})
    fit = pg.fit(started(normals, NORMALS_START, em=own), x, EM(steps=5), seed=0)
    assert rises(fit) and fit.notes["replaced M-steps"].startswith(("1 ", "2 ", "3 ", "4 ", "5 "))
    wrong = EMSteps(m_step=overshoot(ppca_m_step), e_step=ppca_e_step)
    fit = pg.fit(started(ppca, PPCA_START, em=wrong), ppca_data(), EM(steps=50), seed=0)
    assert fit.status is pg.Status.FAILED and "the objective fell from" in fit.message and rises(fit)


def test_an_e_step_of_another_model_is_an_error():
    def e_step(values, x):
        return normals_log_density(values, x).sum() + 1.0, {}

    program = started(normals, NORMALS_START, em=EMSteps(m_step=lambda *_: {}, e_step=e_step))
    with pytest.raises(ValueError, match=r"summing the states of its model gives"):
        pg.fit(program, two_groups(), EM(), seed=0)


@pytest.mark.parametrize(
    ("returned", "message"),
    [({"mean": torch.zeros(2)}, "'mean', no global latent site"), ({"loc": torch.zeros(3)}, r"'loc' has shape \(2,\)")],
)
def test_what_an_offered_m_step_returns_is_checked(returned, message):
    program = started(normals, NORMALS_START, em=EMSteps(m_step=lambda *_: returned))
    with pytest.raises(ValueError, match=message):
        pg.fit(program, two_groups(), EM(), seed=0)


# ------------------------------------------------------------------------------------------------ what does not fit


def test_incompatible_programs_are_told_both_sides():
    def continuous(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(pg.IncompatibleError) as caught:
        pg.fit(continuous, torch.zeros(3), EM(), seed=0)
    text = str(caught.value)
    assert "EM needs:" in text and "continuous offers:" in text
    assert "missing:" in text and "finite local latents or EM steps" in text and "gaussian_mixture" in text


def test_the_m_step_asked_for_must_exist():
    x = two_groups()
    with pytest.raises(pg.IncompatibleError, match="offers no EM steps"):
        pg.fit(normals, x, EM(m_step="offered"), seed=0)
    with pytest.raises(pg.IncompatibleError, match=r"nothing would move centre, loc \(centre: .*its prior depends"):
        pg.fit(hierarchical, x, EM(prior=True, m_step="derived"), seed=0)
    partial = EMSteps(m_step=lambda weights, values, prior, x: {"weights": values["weights"]})
    with pytest.raises(pg.IncompatibleError, match="nothing would move loc, scale"):
        pg.fit(started(normals, NORMALS_START, em=partial), x, EM(m_step="offered"), seed=0)


def test_unbounded_likelihood_is_an_error_that_keeps_the_last_finite_fit():
    """Two equal rows under a component of their own: its scale falls to zero."""
    start = {"weights": tensor(0.5, 0.5), "loc": tensor(0.0, 2.0), "scale": tensor(0.01, 1.0)}
    x = tensor(0.0, 0.0, 1.0, 2.0, 3.0)
    with pytest.raises(pg.NonFiniteError, match=r"the scale 'scale' fell to zero.*EM\(prior=True\)") as caught:
        pg.fit(started(normals, start), x, EM(), seed=0)
    assert all(bool(value.isfinite().all()) for value in caught.value.fit.point.values())
    fit = pg.fit(started(normals, start), x, EM(prior=True), seed=0)
    assert fit.status is pg.Status.CONVERGED and float(fit.point["scale"].min()) > 0.01


def test_an_impossible_start_is_an_error():
    def bounded(x):
        edge = pyro.sample("edge", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Uniform(z - 1, edge + z, validate_args=False), obs=x)

    with pytest.raises(ValueError, match=r"at the start of EM.*Program\(model, start="):
        pg.fit(started(bounded, {"edge": tensor(1.0).squeeze()}), tensor(0.5, 9.0), EM(), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number"),
        ({"steps": True}, "steps: expected a whole number"),
        ({"restarts": 0}, "restarts: expected"),
        ({"tolerance": -1.0}, "tolerance: expected"),
        ({"tolerance": math.nan}, "tolerance: expected"),
        ({"prior": 1}, "prior: expected True or False"),
        ({"m_step": "exact"}, "m_step: expected one of 'auto', 'offered'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        EM(**settings)


# ------------------------------------------------------------------------------------------- the run and its result


def test_stopping_is_a_function_of_the_history():
    em = EM(tolerance=0.5)
    assert em.stop({"log_likelihood": [1.0]}) is None
    assert em.stop({"log_likelihood": [1.0, 2.0]}) is None
    assert em.stop({"log_likelihood": [1.0, 2.0, 2.5]}) == "converged after 3 steps: the last gained 5.0e-01 nats"
    assert EM(prior=True).stop({"log_likelihood": [1.0, 1.0], "log_posterior": [1.0, 2.0]}) is None
    fit = pg.fit(started(normals, NORMALS_START), two_groups(), EM(steps=3), seed=0)
    assert fit.status is pg.Status.FINISHED and len(fit.history["step"]) == 3


def test_a_fit_continues_where_another_ended():
    x = two_groups()
    program = started(normals, NORMALS_START)
    whole = pg.fit(program, x, EM(steps=7), seed=0)
    part = pg.fit(program, x, EM(steps=3), seed=0)
    rest = pg.fit(program, x, EM(steps=4), seed=0, start=part)
    for name in NORMALS_START:
        close(rest.point[name], whole.point[name], 1e-12)


def test_same_seed_same_bits_and_starts_are_compared():
    x = two_groups()
    state = torch.get_rng_state()
    one, two = (pg.fit(normals, x, EM(steps=4), seed=5) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one.point[name], two.point[name]) for name in NORMALS_START)
    best, other = (pg.fit(normals, x, EM(steps=10, restarts=n), seed=5) for n in (None, 1))
    assert other.cost["restarts"] == 1 and one.cost["restarts"] == best.cost["restarts"] == 5
    assert last(best) >= last(other), "the other start is the first of the five"
    zoo = pg.fit(gaussian_mixture(components=3), x, EM(steps=12, restarts=4), seed=0)
    assert zoo.cost["restarts"] == 4
    same = pg.fit(started(normals, NORMALS_START), x, EM(steps=2, restarts=4), seed=0)
    assert same.cost["restarts"] == 1, "a start that is always the same is tried once"


def test_history_is_the_whole_path_of_the_winning_start():
    """The trial steps of the start that is chosen are run again and recorded."""
    fit = pg.fit(normals, two_groups(), EM(steps=10), seed=1)
    start = float(fit.notes["start"].split()[1])
    assert float(fit.history["log_likelihood"][0]) >= start and len(fit.history["step"]) == 10


@pytest.mark.parametrize("prior", [False, True])
def test_everything_that_can_be_asked_of_a_fit(prior, tmp_path):
    x = two_groups()
    fit = pg.fit(gaussian_mixture(components=2), x, EM(prior=prior), seed=0)
    assert fit.point.keys() == {"weights", "precision", "loc_standard"}
    draws = fit.posterior(draws=5)
    assert draws["assignment"].shape == (5, len(x)) and torch.equal(draws["loc"][0], draws["loc"][4])
    evidence = fit.evidence()
    assert evidence.exact
    close(evidence.mean * len(x), last(fit), 1e-9)
    assert math.isfinite(fit.evidence(x[:7] + 0.1).mean)
    assert fit.predict(draws=3)["x"].shape == (3, len(x)) and len(fit.sample(9)["x"]) == 9
    tree = fit.to_arviz(draws=10)
    close(float(tree.posterior["loc"].mean()), float(draws["loc"].mean()), 1e-9)
    assert "verdict" in fit.diagnose(draws=10).attrs and repr(fit).startswith(
        "Fit(gaussian_mixture, EM, seed=0: converged"
    )
    loaded = pg.load(fit.save(tmp_path / "fit"), program=gaussian_mixture(components=2))
    close(loaded.evidence().mean, evidence.mean, 1e-12)
    assert last(loaded) == last(fit) and loaded.notes["M-step"] == fit.notes["M-step"]
    checked = pg.fit(gaussian_mixture(components=2), x, EM(steps=4), seed=0, validation=x, validate_every=2)
    assert len(checked.history["validation_evidence"]) == 2
