"""Hidden Markov models against the sum over all paths, Pyro's own DiscreteHMM, and theorems of EM.

Float64. A sum over at most 3^5 paths of products of ten factors, and recursions of as many steps: rounding stays near
1e-13.
"""

from __future__ import annotations

import itertools

import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.enumeration.marginals import (
    discrete_marginals,
    enumerated_trace,
    expected_log_joint,
    factor_marginals,
    log_prior,
    row_log_density,
)
from ppl_gen.inference.em.em import EM
from ppl_gen.models import hidden_markov
from ppl_gen.models.sequences.forward import _by_logarithms, expectations, pays
from ppl_gen.workspace.isolation import isolated


@pytest.fixture(autouse=True)
def float64_and_seed():
    with isolated(3, dtype=torch.float64):
        yield


def normal_data(lengths=True):
    x = 20.0 + 4.0 * torch.randn(4, 5)
    return {"x": x, "lengths": torch.tensor([5, 1, 3, 4])} if lengths else {"x": x}


def categorical_data(lengths=True):
    x = torch.randint(0, 3, (4, 5))
    x[0, 0] = 2
    return {"x": x, "lengths": torch.tensor([5, 1, 3, 4])} if lengths else {"x": x}


CASES = [("normal", normal_data), ("categorical", categorical_data)]


def made(states, emission, data, **settings):
    return hidden_markov(states=states, emission=emission, **settings)(data)


def traced(program, values, data):
    return enumerated_trace(program.model, (), data, values=values, plate_nesting=1)


def log_emissions(values, data, emission):
    x = data["x"]
    if emission == "categorical":
        return values["emission"].log().T[x]
    middle, unit = x[active(data)].mean(), x[active(data)].std(correction=0)
    loc, scale = middle + unit * values["loc_standard"], unit / values["precision"].sqrt()
    return dist.Normal(loc, scale).log_prob(x.unsqueeze(-1))


def active(data):
    lengths = data.get("lengths", torch.full((len(data["x"]),), data["x"].shape[1]))
    return torch.arange(data["x"].shape[1]) < lengths.unsqueeze(-1)


def over_paths(values, data, emission, states):
    """log p(x) of each sequence, by adding up every path of its own length."""
    emitted, result = log_emissions(values, data, emission), []
    for row, used in zip(emitted, active(data), strict=True):
        paths = []
        for path in itertools.product(range(states), repeat=int(used.sum())):
            score = values["initial"][path[0]].log() + row[0, path[0]]
            for t in range(1, len(path)):
                score = score + values["transition"][path[t - 1], path[t]].log() + row[t, path[t]]
            paths.append(score)
        result.append(torch.stack(paths).logsumexp(0))
    return torch.stack(result)


def random_values(program):
    values = dict(program.start())
    for name in ("initial", "transition"):
        values[name] = dist.Dirichlet(torch.ones_like(values[name])).sample()
    return values


@pytest.mark.parametrize(("emission", "data"), CASES)
@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("states", [1, 2, 3])
def test_evidence_is_the_sum_over_all_paths(emission, data, lengths, states):
    data = data(lengths)
    program = made(states, emission, data)
    values = random_values(program)
    exact = over_paths(values, data, emission, states)
    enumerated = row_log_density(traced(program, values, data))
    torch.testing.assert_close(enumerated, exact, rtol=0, atol=1e-10)
    total, _ = program.em.e_step(values, **data)
    assert abs(float(total - exact.sum())) < 1e-10


def test_evidence_is_that_of_pyros_parallel_scan():
    data = {"x": 20.0 + 4.0 * torch.randn(6, 40)}
    program = made(3, "normal", data)
    values = random_values(program)
    middle, unit = data["x"].mean(), data["x"].std(correction=0)
    emitted = dist.Normal(middle + unit * values["loc_standard"], unit / values["precision"].sqrt())
    # Its convention has a transition before the first value, so its initial law is the one that a step leads to ours.
    before = torch.linalg.solve(values["transition"].T, values["initial"])
    scan = torch.einsum("k,kj->j", before, values["transition"])
    torch.testing.assert_close(scan, values["initial"], rtol=0, atol=1e-10)
    first = dist.DiscreteHMM(values["initial"].log(), values["transition"].log(), emitted, duration=40)
    rolled = dict(values, initial=values["initial"] @ values["transition"])
    total, _ = program.em.e_step(rolled, **data)
    torch.testing.assert_close(total, first.log_prob(data["x"].unsqueeze(-1)[..., 0]).sum(), rtol=0, atol=1e-8)


def chain(states, series, time, spread=3.0):
    initial, transition = torch.rand(states), torch.rand(states, states)
    log_probs = spread * torch.randn(series, time, states)
    ends = torch.randint(time // 2, time + 1, (series, 1))
    return initial / initial.sum(), transition / transition.sum(-1, keepdim=True), log_probs, torch.arange(time) < ends


@pytest.mark.parametrize(("states", "series", "time"), [(1, 2, 40), (3, 4, 200), (5, 1, 301), (2, 7, 64)])
def test_steps_and_scan_are_the_recursion_in_logarithms(states, series, time):
    case = chain(states, series, time)
    total, counts = _by_logarithms(*case)
    for scan in (False, True):
        ours, found = expectations(*case, scan=scan)
        assert abs(float(ours - total)) < 1e-10 * abs(float(total))
        for name, value in counts.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scan", [False, True])
def test_states_that_the_data_exclude_by_thousands_of_nats_do_not_underflow(scan):
    """A chain that can only move on, seen in a state that it cannot be in yet: its likelihood is exp(-4000) or so."""
    transition = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    log_probs = torch.zeros(1, 80, 3)
    log_probs[0, :40] = torch.tensor([-2000.0, -1000.0, 0.0])
    case = torch.tensor([1.0, 0.0, 0.0]), transition, log_probs, torch.ones(1, 80, dtype=torch.bool)
    total, counts = expectations(*case, scan=scan)
    expected, theirs = _by_logarithms(*case)
    assert float(expected) < -1000 and abs(float(total - expected)) < 1e-9
    torch.testing.assert_close(counts["states"], theirs["states"], rtol=0, atol=1e-10)


def test_a_scan_serves_long_series_of_few_states():
    assert pays(1, 10_000, 3) and not pays(1, 100, 3) and not pays(1000, 10_000, 3) and not pays(1, 10_000, 100)


@pytest.mark.parametrize(("emission", "data"), CASES)
def test_expected_counts_are_the_marginals_of_the_program(emission, data):
    data = data()
    program = made(3, emission, data)
    values = random_values(program)
    _, counts = program.em.e_step(values, **data)
    marginals = discrete_marginals(traced(program, values, data))
    used = active(data)
    for t in range(5):
        torch.testing.assert_close(
            counts["states"][used[:, t], t], marginals[f"state_{t}"][used[:, t]], rtol=0, atol=1e-10
        )
        assert bool((counts["states"][~used[:, t], t] == 0).all())
    torch.testing.assert_close(counts["initial"], marginals["state_0"].sum(0), rtol=0, atol=1e-10)
    assert abs(float(counts["transition"].sum() - (used.sum() - len(used)))) < 1e-10


@pytest.mark.parametrize(("emission", "data"), CASES)
@pytest.mark.parametrize("prior", [True, False])
def test_an_m_step_makes_the_gradient_of_its_objective_zero(emission, data, prior):
    data = data(
        lengths=False
    )  # past the end of a sequence the program's transitions would count, though they sum to one
    program = made(2, emission, data, concentration=2.0)
    values = random_values(program)
    with torch.no_grad():
        weights = factor_marginals(traced(program, values, data)).weights
        _, counts = program.em.e_step(values, **data)

    def gradients(values):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        trace = traced(program, leaves, data)
        objective = expected_log_joint(trace, weights) + (log_prior(trace) if prior else 0.0)
        found = dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))
        for name in {"initial", "transition", "emission"} & found.keys():  # along the simplex
            found[name] = found[name] - (found[name] * values[name]).sum(-1, keepdim=True)
        return torch.cat([value.reshape(-1) for value in found.values()]).abs().max()

    assert gradients(values) > 0.1
    assert gradients(program.em.m_step(counts, values, prior, **data)) < 1e-9


@pytest.mark.parametrize(("emission", "data"), CASES)
@pytest.mark.parametrize("prior", [True, False])
def test_baum_welch_never_lowers_its_objective(emission, data, prior):
    data = data()
    program = made(2, emission, data, concentration=1.5)
    values, history = program.start(), []
    for _ in range(40):
        total, counts = program.em.e_step(values, **data)
        history.append(float(total) + (float(log_prior(traced(program, values, data))) if prior else 0.0))
        values = program.em.m_step(counts, values, prior, **data)
    steps = torch.tensor(history)
    assert steps[-1] - steps[0] > 0.1
    assert bool((steps.diff() >= -1e-9).all()) and bool(steps.isfinite().all())


@pytest.mark.parametrize(("emission", "data"), CASES)
@pytest.mark.parametrize("prior", [True, False])
def test_the_closed_form_leads_where_gradients_lead(emission, data, prior):
    data, name = data(lengths=False), "log_posterior" if prior else "log_likelihood"
    recipe = hidden_markov(states=2, emission=emission, concentration=1.5)
    fits = [pg.fit(recipe, data, EM(steps=4, prior=prior, m_step=m), seed=2) for m in ("offered", "gradient")]
    ours, theirs = (torch.as_tensor(fit.history[name].values) for fit in fits)
    assert ours[-1] - ours[0] > 0.01
    # L-BFGS stops after some tens of steps: where a probability ends at zero it creeps.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_baum_welch_finds_the_regimes_of_long_sequences():
    transition = torch.tensor([[0.95, 0.05], [0.1, 0.9]])
    x = torch.empty(20, 100)
    for row in x:
        state = 0
        for t in range(100):
            row[t] = torch.tensor([3.0, 9.0])[state] + torch.randn(())
            state = int(torch.multinomial(transition[state], 1))
    program = made(2, "normal", x)
    values = program.start()

    def error(values):
        order = values["loc_standard"].argsort()
        loc = x.mean() + x.std(correction=0) * values["loc_standard"][order]
        moves = values["transition"][order][:, order]
        return (loc - torch.tensor([3.0, 9.0])).abs().max(), (moves - transition).abs().max()

    # Over 600 values in either state: standard errors 0.04 of a mean and 0.012 of a probability; six of them.
    assert error(values)[0] > 0.25 and error(values)[1] > 0.075
    for _ in range(50):
        _, counts = program.em.e_step(values, x)
        values = program.em.m_step(counts, values, False, x)
    assert error(values)[0] < 0.25 and error(values)[1] < 0.075


@pytest.mark.parametrize(("emission", "data"), CASES)
def test_what_stands_past_the_end_changes_nothing(emission, data):
    data = data()
    other = dict(data, x=torch.where(active(data), data["x"], data["x"][0, 0]))
    assert not torch.equal(other["x"], data["x"])
    first, second = (
        made(2, emission, d, **({"categories": 3} if emission == "categorical" else {})) for d in (data, other)
    )
    values, starts = first.start(), []
    for program in (first, second):
        torch.manual_seed(0)
        starts.append(program.start())
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())
    densities = [row_log_density(traced(p, values, d)) for p, d in ((first, data), (second, other))]
    torch.testing.assert_close(*densities, rtol=0, atol=0)
    steps = [p.em.m_step(p.em.e_step(values, **d)[1], values, True, **d) for p, d in ((first, data), (second, other))]
    for name, value in steps[0].items():
        torch.testing.assert_close(value, steps[1][name], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("emission", "data"), CASES)
def test_relabelling_undoes_permutations_and_changes_no_density(emission, data):
    data = data()
    program = made(3, emission, data)
    values = random_values(program)
    if emission == "categorical":
        values["emission"] = 0.8 * torch.eye(3) + 0.2 / 3
    path = torch.tensor([0, 2, 1, 1])
    draws = {name: [] for name in (*values, "state_0")}
    for _ in range(6):
        order = torch.randperm(3)
        for name, value in values.items():
            draws[name].append(value[order][:, order] if name == "transition" else value[order])
        draws["state_0"].append(order.argsort()[path])
    stacked = {name: torch.stack(value) for name, value in draws.items()}
    assert not torch.equal(stacked["transition"], stacked["transition"][:1].expand(6, 3, 3))
    result = program.relabel(stacked)
    for value in result.values():
        assert torch.equal(value, value[:1].expand(value.shape))
    before, after = ({name: d[name][4] for name in values} for d in (stacked, result))
    densities = [row_log_density(traced(program, v, data)) for v in (before, after)]
    torch.testing.assert_close(*densities, rtol=0, atol=1e-10)


def test_particles_of_the_globals_in_front_give_the_same_densities():
    import pyro
    from pyro import poutine

    x = normal_data(lengths=False)["x"]
    program = made(2, "normal", x)

    def many(x):
        with pyro.plate("particles", 3, dim=-2):
            program.model(x)

    together = poutine.trace(many).get_trace(x)
    together.compute_log_prob()
    names = [*program.start(), *(f"state_{t}" for t in range(5))]
    for particle in range(3):
        values = {n: together.nodes[n]["value"][particle] for n in names}
        values = {n: v if n.startswith("state") else v[0] for n, v in values.items()}
        alone = poutine.trace(poutine.condition(program.model, data=values)).get_trace(x)
        alone.compute_log_prob()
        for name in (*names, *(f"x_{t}" for t in range(5))):
            ours, theirs = together.nodes[name]["log_prob"][particle], alone.nodes[name]["log_prob"]
            torch.testing.assert_close(ours.reshape(-1), theirs.reshape(-1), rtol=1e-12, atol=1e-12)


def test_offers():
    offers = pg.check(hidden_markov(states=2), normal_data()).offers
    wanted = {"density", "finite local latents", "no free parameters", "differentiable latents", "data plate"}
    assert wanted | {"EM steps"} <= offers


@pytest.mark.parametrize(
    ("settings", "data", "error", "message"),
    [
        ({}, torch.arange(5.0), ValueError, r"sequences x time, got shape \(5,\); one sequence is x\[None\]"),
        ({}, torch.ones(2, 3), ValueError, "all values are constant"),
        ({}, {"y": torch.ones(2, 3)}, ValueError, "reads the entry 'x', got only y"),
        (
            {},
            {"x": torch.randn(2, 3), "lengths": torch.tensor([3, 4])},
            ValueError,
            "lengths: .* from 1 to 3, got 3 to 4",
        ),
        ({}, {"x": torch.randn(2, 3), "lengths": torch.tensor([3])}, ValueError, "lengths: expected 2 whole numbers"),
        ({"emission": "categorical"}, torch.randn(2, 3), TypeError, "categorical emissions are integers"),
        (
            {"emission": "categorical"},
            torch.tensor([[0, -1]]),
            ValueError,
            "categories from 0 to 0 .* got values -1 to 0",
        ),
        ({"emission": "categorical", "categories": 2}, torch.tensor([[0, 2]]), ValueError, "categories from 0 to 1"),
    ],
)
def test_data_that_do_not_fit_are_refused(settings, data, error, message):
    with pytest.raises(error, match=message):
        hidden_markov(states=2, **settings)(data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"states": 0}, "states: expected a whole number of at least 1, got 0"),
        ({"states": 2, "emission": "poisson"}, "emission: expected one of 'normal', 'categorical', got 'poisson'"),
        ({"states": 2, "categories": 3}, "categories: only categorical emissions have them"),
        ({"states": 2, "concentration": 0.0}, "concentration: expected a positive number, got 0.0"),
        ({"states": 2, "degrees": 1.0}, "degrees: expected more than 1, got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        hidden_markov(**settings)
