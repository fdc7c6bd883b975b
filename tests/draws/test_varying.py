"""Rows of different lengths: sites that vary by batch, masked states of a chain, marks of enumeration as written."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, TraceTMC_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal

import ppl_gen as pg
from ppl_gen.errors import IncompatibleError
from ppl_gen.inference import EM, NUTS, SVI

GENERATOR = torch.Generator().manual_seed(3)
LENGTHS = torch.randint(2, 7, (24,), generator=GENERATOR)
ROWS = torch.randn(24, 6, generator=GENERATOR)
DATA = {"seq": ROWS, "lengths": LENGTHS}
SHORT = {"seq": ROWS[LENGTHS <= 3], "lengths": LENGTHS[LENGTHS <= 3]}
TURN, LOCS = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([-1.0, 1.0])


def chain(seq, lengths, *, states_masked, last=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(seq)):
        state = 0
        for t in pyro.markov(range(int(lengths.max()))):
            mask = (t < lengths) if last is None else (t < lengths) & (t != last)
            with poutine.mask(mask=mask if states_masked else torch.tensor(True)):
                state = pyro.sample(f"s_{t}", dist.Categorical(TURN[state]))
            with poutine.mask(mask=mask):
                pyro.sample(f"y_{t}", dist.Normal(loc + LOCS[state], 1.0), obs=seq[:, t])


def masked(seq, lengths):
    """As Pyro's tutorial on hidden Markov models writes it: states and observations under one mask."""
    chain(seq, lengths, states_masked=True)


def whole(seq, lengths):
    chain(seq, lengths, states_masked=False)


def forward(data, loc):
    """log p(row) of each row by the forward recursion."""
    found = []
    for row, length in zip(data["seq"].double(), data["lengths"], strict=True):
        weights = TURN[0].double()
        total = torch.zeros((), dtype=torch.float64)
        for t in range(int(length)):
            joint = weights * dist.Normal(loc + LOCS.double(), 1.0).log_prob(row[t]).exp()
            total, weights = total + joint.sum().log(), (joint / joint.sum()) @ TURN.double()
        found.append(total)
    return torch.stack(found)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_masked_states_are_those_of_a_mask_on_the_observations(batch_size) -> None:
    svi = SVI(steps=10, lr=0.02, batch_size=batch_size)
    one, two = (pg.fit(model, DATA, svi, seed=0) for model in (masked, whole))
    assert one.records["program_loss"] == pytest.approx(two.records["program_loss"], rel=1e-5)
    assert one.evidence(SHORT, particles=4).mean == pytest.approx(two.evidence(SHORT, particles=4).mean, rel=1e-5)
    assert one.predict(SHORT, draws=2)["y_0"].shape == (2, len(SHORT["seq"]))


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_the_evidence_of_rows_of_any_length_is_that_of_the_forward_recursion() -> None:
    fit = pg.fit(masked, DATA, EM(steps=3), seed=0)
    for rows in (DATA, SHORT):
        assert fit.evidence(rows).mean == pytest.approx(float(forward(rows, fit.point["loc"]).mean()), rel=1e-6)
    chains = pg.fit(masked, DATA, NUTS(draws=20, warmup=20, chains=1, processes=1), seed=0)
    assert chains.posterior(draws=5)["loc"].shape == (5,)


def test_a_gap_on_which_the_next_state_depends_is_refused() -> None:
    def gap(seq, lengths):
        chain(seq, lengths, states_masked=True, last=1)

    with pytest.raises(IncompatibleError, match="stand under a mask"):
        pg.fit(gap, DATA, SVI(steps=2))


def test_longer_rows_are_refused_by_the_names_of_their_sites() -> None:
    fit = pg.fit(masked, DATA, SVI(steps=2), seed=0)
    longer = {"seq": torch.zeros(3, 8), "lengths": torch.tensor([8, 2, 3])}
    with pytest.raises(ValueError, match="other latent sites: s_6"):
        fit.evidence(longer)


SEEN: list[tuple[int, ...]] = []


def mixture(x):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        SEEN.append(tuple(z.shape))
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.0, 1.0])[z], 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "elbo", "shape"),
    [
        (config_enumerate(mixture, expand=True), TraceEnum_ELBO(max_plate_nesting=1), (3, 24)),
        (config_enumerate(mixture, expand=False), TraceEnum_ELBO(max_plate_nesting=1), (3, 1)),
        (mixture, TraceEnum_ELBO(max_plate_nesting=1), (3, 1)),
        (config_enumerate(mixture, num_samples=5, expand=False), TraceTMC_ELBO(max_plate_nesting=1), (5, 24)),
    ],
)
def test_marks_of_enumeration_stay_as_they_are_written(model, elbo, shape) -> None:
    SEEN.clear()
    pg.fit(model, ROWS[:, 0], SVI(elbo, steps=2), seed=0)
    assert (SEEN[-1][0], SEEN[-1][-1]) == shape


def sums(x):
    a, b = (pyro.sample(n, dist.Normal(0.0, 1.0)) for n in ("a", "b"))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def test_a_class_of_guides_with_options() -> None:
    """By symmetry the posterior correlation of a and b is -n / (n + 1), which a full covariance finds."""
    guide = functools.partial(AutoMultivariateNormal, init_scale=0.5)
    program = pg.Program(sums, guide)
    assert repr(program) == "Program(sums, guide=AutoMultivariateNormal)" and pg.check(program, ROWS[:, 0]).rows == 24
    fit = pg.fit(program, ROWS[:, 0], SVI(steps=1500, lr=0.02), seed=0)
    draws = fit.posterior(draws=2000)
    both = torch.corrcoef(torch.stack([draws["a"], draws["b"]]))[0, 1]
    assert float(both) == pytest.approx(-24 / 25, abs=0.03) and "AutoMultivariateNormal" in fit.notes["guide"]
    with pytest.raises(TypeError, match="give its options by name"):
        pg.Program(sums, functools.partial(AutoMultivariateNormal, sums))
    with pytest.raises(TypeError, match="AutoMultivariateNormal does not take width"):
        pg.fit(pg.Program(sums, functools.partial(AutoMultivariateNormal, width=2)), ROWS[:, 0], SVI(steps=2))


def test_a_guide_that_has_an_attribute_func_is_no_class_with_options() -> None:
    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.func, self.loc = dict, torch.nn.Parameter(torch.zeros(2))

        def forward(self, x):
            pyro.module("guide", self)
            for name, loc in zip("ab", self.loc, strict=True):
                pyro.sample(name, dist.Normal(loc, 0.1))

    program = pg.Program(sums, Guide())
    assert repr(program) == "Program(sums, guide=Guide)"
    assert "guide$$$loc" in pg.fit(program, ROWS[:, 0], SVI(steps=2), seed=0).params
