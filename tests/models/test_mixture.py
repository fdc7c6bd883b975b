"""The mixture program and its M-steps: against scikit-learn step by step, the crabs' known values, and theorems.

Float64. A log-likelihood of some hundred rows is a sum of terms of order 1 to 10 with relative error near 1e-16 each,
and one EM step multiplies an error of the parameters by less than one: 1e-8 is generous for ten steps.
"""

from __future__ import annotations

import warnings

import pyro
import pytest
import torch
from pyro import poutine

import ppl_gen as pg
from ppl_gen.data.crabs import crab_ratios
from ppl_gen.enumeration.marginals import (
    discrete_marginals,
    enumerated_trace,
    expected_log_joint,
    factor_marginals,
    log_prior,
    row_log_density,
)
from ppl_gen.inference.em.em import EM
from ppl_gen.models import gaussian_mixture
from ppl_gen.workspace.isolation import isolated

FLOAT = torch.float64
KINDS = ["spherical", "diagonal", "full"]


@pytest.fixture(autouse=True)
def float64_and_seed():
    with isolated(11, dtype=FLOAT):
        yield


def groups(dims, rows=200):
    """Three overlapping groups of unequal size and shape, in units far from standard."""
    which = (torch.rand(rows) * 3).long().clamp(max=2)
    centres, scales = torch.tensor([-3.0, 0.0, 2.5]), torch.tensor([1.0, 0.7, 1.4])
    if dims == 0:
        return 40.0 + 5.0 * (centres[which] + scales[which] * torch.randn(rows))
    mixing = torch.eye(dims) + 0.4 * torch.randn(dims, dims)
    noise = scales[which].unsqueeze(-1) * torch.randn(rows, dims)
    return 40.0 + torch.arange(1.0, dims + 1) * ((noise @ mixing) + centres[which].unsqueeze(-1) * torch.ones(dims))


def traced(program, values, x):
    return enumerated_trace(program.model, (x,), values=values, plate_nesting=1)


def e_step(program, values, x):
    with pyro.validation_enabled(False), torch.no_grad():
        trace = traced(program, values, x)
        return float(row_log_density(trace).sum()), discrete_marginals(trace), float(log_prior(trace))


def em(program, x, steps, *, prior=False, values=None, tolerance=0.0):
    values = dict(program.start()) if values is None else values
    history = []
    for _ in range(steps):
        likelihood, weights, density = e_step(program, values, x)
        history.append(likelihood + (density if prior else 0.0))
        if len(history) > 1 and history[-1] - history[-2] < tolerance:
            break
        values = program.em.m_step(weights, values, prior, x)
    return torch.tensor(history), values


# ------------------------------------------------------------------------------------------------- maximum likelihood


def test_two_species_of_crabs_beat_one_by_the_known_amount():
    x = crab_ratios()
    one, _ = em(gaussian_mixture(components=1)(x), x, 5)
    two, values = em(gaussian_mixture(components=2)(x), x, 2500, tolerance=1e-9)
    assert two[0] < 2567 and len(two) < 2500
    # Slow linear convergence at rate 0.99: a step of 1e-9 leaves 1e-7.
    assert abs(float(two[-1]) - 2567.5789) < 1e-4
    assert abs(float(one[-1]) - 2540.975) < 1e-3
    assert abs(float(two[-1] - one[-1]) - 26.604) < 1e-3
    assert bool((two.diff() >= -1e-9).all())
    assert abs(float(values["weights"].min()) - 0.4328) < 1e-3


def test_equal_weights_stop_below_free_ones_on_the_crabs():
    x = crab_ratios()
    history, values = em(gaussian_mixture(components=2, weights="equal")(x), x, 2500, tolerance=1e-9)
    assert "weights" not in values
    assert abs(float(history[-1]) - 2567.469) < 2e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [0, 2, 3])
def test_em_is_scikit_learns_step_by_step(kind, dims):
    from sklearn.mixture import GaussianMixture

    x = groups(dims)
    program = gaussian_mixture(components=3, covariance=kind)(x)
    start = program.start()
    history, values = em(program, x, 10, values=dict(start))
    rows = x.reshape(len(x), -1)
    located = exposed(program, start, x)
    precisions = 1 / located["variance"] if "variance" in located else torch.linalg.inv(located["covariance"])
    theirs = GaussianMixture(
        3,
        covariance_type={"spherical": "spherical", "diagonal": "diag", "full": "full"}[kind],
        weights_init=start["weights"].numpy(),
        means_init=located["loc"].reshape(3, -1).numpy(),
        precisions_init=(precisions.reshape(3, 1, 1) if kind == "full" and dims == 0 else precisions).numpy(),
        init_params="random_from_data",
        reg_covar=0.0,
        tol=0.0,
        max_iter=10,
        random_state=0,
    )
    if kind == "diagonal" and dims == 0:
        theirs.precisions_init = theirs.precisions_init.reshape(3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, as intended
        theirs.fit(rows.numpy())
    torch.testing.assert_close(history, torch.as_tensor(theirs.lower_bounds_) * len(x), rtol=0, atol=1e-8)
    assert history[-1] - history[0] > 1  # ten steps did something
    ours = exposed(program, values, x)
    torch.testing.assert_close(ours["loc"].reshape(3, -1), torch.as_tensor(theirs.means_), rtol=1e-8, atol=0)
    spread = ours["variance"] if "variance" in ours else ours["covariance"]
    torch.testing.assert_close(
        spread.reshape(-1), torch.as_tensor(theirs.covariances_).reshape(-1), rtol=1e-7, atol=1e-9
    )
    torch.testing.assert_close(values["weights"], torch.as_tensor(theirs.weights_), rtol=1e-8, atol=0)


def exposed(program, values, x):
    """Location and variance (or covariance) in the user's units."""
    trace = poutine.trace(poutine.condition(program.model, data=dict(values))).get_trace(x)
    sites = {name: node["value"] for name, node in trace.nodes.items() if name in ("loc", "scale", "covariance")}
    if "scale" in sites:
        sites["variance"] = sites["scale"].square()
    return sites


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_likelihood_changes_with_the_units_as_a_density_does(kind):
    x = groups(2)
    torch.manual_seed(3)
    first, _ = em(gaussian_mixture(components=2, covariance=kind)(x), x, 5)
    torch.manual_seed(3)
    moved = 100.0 - 7.0 * x
    second, _ = em(gaussian_mixture(components=2, covariance=kind)(moved), moved, 5)
    expected = first - 2 * len(x) * torch.tensor(7.0).log()
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-8)


# ----------------------------------------------------------------------------------------------- maximum a posteriori


@pytest.mark.parametrize(("kind", "dims"), [("full", 0), ("spherical", 2), ("diagonal", 2), ("full", 3)])
@pytest.mark.parametrize("prior", [True, False])
def test_an_m_step_makes_the_gradient_of_its_objective_zero(kind, dims, prior):
    x = groups(dims)
    program = gaussian_mixture(components=3, covariance=kind, concentration=3.0, strength=0.5)(x)
    values = program.start()
    with torch.no_grad():
        trace = traced(program, values, x)
        weights, rows = factor_marginals(trace).weights, discrete_marginals(trace)

    def gradients(values):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        trace = traced(program, leaves, x)
        objective = expected_log_joint(trace, weights) + (log_prior(trace) if prior else 0.0)
        found = dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))
        found["weights"] = found["weights"] - (found["weights"] * values["weights"]).sum()  # along the simplex
        if "scale_tril_standard" in found:
            found["scale_tril_standard"] = found["scale_tril_standard"].tril()
        return torch.cat([value.reshape(-1) for value in found.values()]).abs().max()

    assert gradients(values) > 1
    # Sums of 200 terms whose gradients are of order 1e2: rounding is near 1e-11.
    assert gradients(program.em.m_step(rows, values, prior, x)) < 1e-8


@pytest.mark.parametrize(("kind", "dims"), [("full", 0), ("spherical", 2), ("diagonal", 2), ("full", 2)])
def test_em_raises_the_joint_density_with_priors(kind, dims):
    x = groups(dims)
    history, _ = em(gaussian_mixture(components=3, covariance=kind)(x), x, 40, prior=True)
    assert history[-1] - history[0] > 1
    assert bool((history.diff() >= -1e-9).all())


@pytest.mark.parametrize(("kind", "dims"), [("full", 0), ("spherical", 2), ("diagonal", 2), ("full", 2)])
@pytest.mark.parametrize("prior", [True, False])
def test_the_closed_form_leads_where_gradients_lead(kind, dims, prior):
    x, name = groups(dims, 60), "log_posterior" if prior else "log_likelihood"
    recipe = gaussian_mixture(components=2, covariance=kind)
    fits = [pg.fit(recipe, x, EM(steps=6, prior=prior, m_step=m), seed=2) for m in ("offered", "gradient")]
    ours, theirs = (torch.as_tensor(fit.history[name].values) for fit in fits)
    assert ours[-1] - ours[0] > 0.1
    # L-BFGS takes twenty iterations per step, which leaves some 1e-5 nats of each.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_no_maximum_a_posteriori_where_the_prior_is_infinite_at_the_edge():
    x = groups(0)
    program = gaussian_mixture(components=2, concentration=0.5)(x)
    values = program.start()
    _, weights, _ = e_step(program, values, x)
    with pytest.raises(ValueError, match="concentration: 0.5 < 1 .* no maximum a posteriori"):
        program.em.m_step(weights, values, True, x)
    program.em.m_step(weights, values, False, x)  # maximum likelihood does not use it


# ---------------------------------------------------------------------------------------------------- degenerate data


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_one_row_meet_the_floor_and_never_nan(kind):
    x = torch.cat([torch.full((20, 2), 3.0), torch.randn(20, 2)])
    program = gaussian_mixture(components=3, covariance=kind, floor=1e-4)(x)
    start = dict(program.start())
    start["loc_standard"][0] = (torch.tensor([3.0, 3.0]) - x.mean(0)) / x.std(0, correction=0)
    history, values = em(program, x, 200, values=start)
    assert bool(history.isfinite().all()) and bool((history.diff() >= -1e-8).all())
    variance = 1 / values["precision"] if kind != "full" else torch.linalg.svdvals(values["scale_tril_standard"]) ** 2
    assert variance.min() >= 1e-4 * (1 - 1e-9)
    assert variance.min() < 1.01e-4  # the floor was needed


def test_a_component_without_rows_stays_where_it_was():
    x = groups(2)
    program = gaussian_mixture(components=3)(x)
    values = program.start()
    weights = torch.zeros(len(x), 3)
    weights[:, 1] = 1.0
    new = program.em.m_step({"assignment": weights}, values, False, x)
    for name in ("loc_standard", "scale_tril_standard"):
        assert torch.equal(new[name][[0, 2]], values[name][[0, 2]])
        assert not torch.equal(new[name][1], values[name][1])
    assert abs(float(new["weights"][1]) - 1) < 1e-12
    assert e_step(program, new, x)[0] > -1e6


@pytest.mark.parametrize("components", [1, 3])
def test_as_many_components_as_rows(components):
    x = torch.tensor([[0.0, 1.0], [2.0, 0.5], [1.0, 3.0]])
    history, _ = em(gaussian_mixture(components=components, covariance="diagonal")(x), x, 30)
    assert bool(history.isfinite().all()) and bool((history.diff() >= -1e-8).all())


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"components": 5}, torch.arange(4.0), "components: 5 of them need at least as many rows, and the data has 4"),
        ({"components": 1}, torch.ones(4), "all values of the data are constant"),
        ({"components": 1}, torch.tensor([[1.0, 2.0], [1.0, 3.0]]), r"column\(s\) 0 of the data are constant"),
        ({"components": 1}, torch.randn(4, 2, 2), r"numbers \(N\) or vectors \(N x d\), got shape \(4, 2, 2\)"),
        ({"components": 1}, {"y": torch.arange(4.0)}, "reads the entry 'x', got only y"),
        ({"components": 1, "degrees": 2.0}, torch.randn(9, 3), "degrees: expected more than 2 for 3-dimensional rows"),
    ],
)
def test_data_that_do_not_fit_are_refused(settings, data, message):
    with pytest.raises(ValueError, match=message):
        gaussian_mixture(**settings)(data)


def test_a_constant_column_is_no_harm_where_all_columns_share_one_variance():
    x = torch.stack([torch.randn(20), torch.ones(20)], -1)
    history, _ = em(gaussian_mixture(components=1, covariance="spherical")(x), x, 3)
    assert bool(history.isfinite().all())


def test_words_are_no_data():
    with pytest.raises(TypeError, match="data 'x': expected a tensor or an array of numbers, got str"):
        gaussian_mixture(components=1)("crabs")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": 0}, "components: expected a whole number of at least 1, got 0"),
        (
            {"components": 2, "covariance": "tied"},
            "covariance: expected one of 'spherical', 'diagonal', 'full', got 'tied'",
        ),
        ({"components": 2, "weights": "none"}, "weights: expected one of 'free', 'equal', got 'none'"),
        ({"components": 2, "strength": 0.0}, "strength: expected a positive number, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        gaussian_mixture(**settings)


# ------------------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize(("kind", "dims"), [("full", 0), ("spherical", 2), ("diagonal", 2), ("full", 2)])
def test_particles_of_the_globals_in_front_give_the_same_densities(kind, dims):
    x = groups(dims, rows=7)
    program = gaussian_mixture(components=3, covariance=kind)(x)

    def many(x):
        with pyro.plate("particles", 4, dim=-2):
            program.model(x)

    together = poutine.trace(many).get_trace(x)
    together.compute_log_prob()
    latent = {name: together.nodes[name]["value"] for name in (*program.start(), "assignment")}
    for particle in range(4):
        values = {
            name: value[particle] if name == "assignment" else value[particle, 0] for name, value in latent.items()
        }
        alone = poutine.trace(poutine.condition(program.model, data=values)).get_trace(x)
        alone.compute_log_prob()
        for name in (*latent, "x"):
            ours, theirs = together.nodes[name]["log_prob"][particle], alone.nodes[name]["log_prob"]
            torch.testing.assert_close(ours.reshape(-1), theirs.reshape(-1), rtol=1e-12, atol=1e-12)


def test_minibatches_and_new_rows_use_the_constants_of_the_training_data():
    x = groups(2)
    program = gaussian_mixture(components=2)(x)
    values = program.start()
    whole = row_log_density(traced(program, values, x))
    part = row_log_density(traced(program, values, x[10:15]))
    torch.testing.assert_close(part, whole[10:15], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_rows_of_other_types_serve(dtype):
    x = (10 * groups(0)).to(dtype)
    program = gaussian_mixture(components=2)(x)
    values = {name: value.to(torch.get_default_dtype()) for name, value in program.start().items()}
    density = row_log_density(traced(program, values, x))
    exact = row_log_density(traced(gaussian_mixture(components=2)(x.double()), values, x.double()))
    torch.testing.assert_close(density.double(), exact, rtol=1e-4, atol=1e-4)


def test_offers():
    x = groups(2)
    offers = pg.check(gaussian_mixture(components=2), x).offers
    wanted = {"density", "finite local latents", "no free parameters", "differentiable latents", "data plate"}
    assert wanted | {"EM steps", "CAVI updates"} <= offers


def test_starts_follow_the_seed_and_differ_from_each_other():
    for dims in (0, 2):
        x = groups(dims)
        program = gaussian_mixture(components=3)(x)
        torch.manual_seed(1)
        first, second = program.start(), program.start()
        torch.manual_seed(1)
        again = program.start()
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["loc_standard"], second["loc_standard"])
        assert len(first["loc_standard"].unique(dim=0)) == 3


@pytest.mark.parametrize(("kind", "dims"), [("full", 0), ("spherical", 2), ("diagonal", 2), ("full", 2)])
def test_relabelling_undoes_permutations_and_changes_no_density(kind, dims):
    centres = torch.tensor([[0.0, 9.0], [5.0, 1.0], [9.0, 5.0]])
    labels = torch.arange(60) % 3
    x = (centres[labels] + torch.randn(60, 2))[:, : max(dims, 1)].reshape(60, *[2] * (dims > 0))
    program = gaussian_mixture(components=3, covariance=kind)(x)
    _, values = em(program, x, 50)
    event = {name: value.dim() for name, value in values.items()}
    draws = {name: [] for name in (*values, "assignment")}
    for _ in range(8):
        order = torch.randperm(3)
        for name, value in values.items():
            jittered = value * (1 + 0.01 * torch.randn(())) if name != "weights" else value
            draws[name].append(jittered[order])
        draws["assignment"].append(order.argsort()[labels])
    stacked = {name: torch.stack(value).reshape(2, 4, *value[0].shape) for name, value in draws.items()}
    assert stacked["loc_standard"].std((0, 1)).max() > 0.3  # permuted
    sorted_ = program.relabel(stacked)
    assert sorted_["loc_standard"].std((0, 1)).max() < 0.1
    assert torch.equal(sorted_["assignment"], sorted_["assignment"][:1, :1].expand(2, 4, 60))
    first = sorted_["loc_standard"].reshape(2, 4, 3, -1).mean((0, 1))[:, 0]
    assert bool((first.diff() > 0).all())
    for before, after in ((stacked, sorted_), (sorted_, stacked)):
        for name, dim in event.items():
            assert before[name].shape == after[name].shape and before[name].dim() == dim + 2
    for index in ((0, 0), (1, 3)):
        pair = [row_log_density(traced(program, {n: d[n][index] for n in values}, x)) for d in (stacked, sorted_)]
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


def test_one_component_needs_no_weights_and_no_relabelling():
    x = groups(0)
    program = gaussian_mixture(components=1)(x)
    assert program.relabel is None and "weights" not in program.start()
    assert (
        repr(gaussian_mixture(components=1))
        == "Recipe(gaussian_mixture, components=1, covariance='full', weights='free')"
    )


def test_the_catalogue_knows_what_its_models_offer():
    from ppl_gen.models.catalogue import CATALOGUE, programs_offering

    state = torch.get_rng_state()
    assert "gaussian_mixture" in programs_offering("CAVI updates")
    assert "hidden_markov" not in programs_offering("CAVI updates")
    assert programs_offering("no such offer") == []
    assert torch.equal(state, torch.get_rng_state())
    for name, entry in CATALOGUE.items():
        assert entry.name == name and entry.about
        assert pg.check(entry.recipe(), entry.data()).offers
