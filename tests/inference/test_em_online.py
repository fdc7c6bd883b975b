"""EM from minibatches against EM on all rows.

Statistics averaged over the last third of a run that reads R rows differ from those of all N rows as a sample of R / 3 rows
does: by sqrt(3 N / R) standard errors of the estimates themselves, 0.4 at 20 passes. Five of these, and a factor 1.5 for
what assignments leave uncertain, are three standard errors.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ppl_gen as pg
from ppl_gen.inference import EM
from ppl_gen.inference.em.online import step_size
from ppl_gen.models import factor_analysis, gaussian_mixture, ppca

N, PASSES, BATCH = 20_000, 20, 500
STEPS = PASSES * N // BATCH


def rows(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    which = torch.rand(N, generator=generator) < 0.3
    noise = torch.randn(N, 2, generator=generator) @ torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    return (50 + torch.where(which[:, None], 4.0, 0.0) + noise).to(dtype)


def point(fit):
    found = {name: value[0] for name, value in fit.posterior(draws=1).items()}
    order = found["loc"][:, 0].argsort()
    return {name: found[name][order] for name in ("weights", "loc", "covariance")}


@pytest.fixture(scope="module")
def whole():
    return pg.fit(gaussian_mixture(components=2), rows(), EM(tolerance=1e-4), seed=0)


@pytest.mark.parametrize("decay", [0.6, 0.65])
def test_minibatches_end_at_the_fixed_point_of_all_rows(whole, decay):
    x = rows()
    few = pg.fit(gaussian_mixture(components=2), x, EM(steps=6, batch_size=BATCH, decay=decay), seed=0)
    fit = pg.fit(gaussian_mixture(components=2), x, EM(steps=STEPS, batch_size=BATCH, decay=decay), seed=0)
    expected, found, early = point(whole), point(fit), point(few)
    counts = N * expected["weights"]
    errors = {
        "weights": (0.3 * 0.7 / N) ** 0.5 * torch.ones(2),
        "loc": (expected["covariance"].diagonal(dim1=-2, dim2=-1) / counts[:, None]).sqrt(),
        "covariance": (2 / counts).sqrt()[:, None, None] * expected["covariance"].amax((-1, -2), keepdim=True),
    }
    for name, error in errors.items():
        assert float(((found[name] - expected[name]) / error).abs().max()) < 3, name
    assert any(float(((early[n] - expected[n]) / e).abs().max()) > 6 for n, e in errors.items())
    # Eleven parameters within 3 standard errors are within 11 * 9 / 2 nats, within 0.4 some 1.
    lost = (whole.evidence().mean - fit.evidence().mean) * N
    assert -1e-3 < lost < 10 and fit.status == "finished" and not fit.criterion


def test_a_run_is_the_same_with_the_same_seed_and_its_records_are_of_its_batches():
    fits = [pg.fit(gaussian_mixture(components=2), rows(), EM(steps=20, batch_size=BATCH), seed=s) for s in (0, 0, 1)]
    same, again, other = (fit.point["loc_standard"] for fit in fits)
    assert torch.equal(same, again) and not torch.equal(same, other)
    records = fits[0].history["batch_log_likelihood"].values
    assert len(records) == 20 and np.isfinite(records).all()
    # A batch of 500 rows, scaled to N: the standard deviation of a row's log density is near 1.2.
    assert abs(records[-1] / N - fits[0].evidence().mean) < 5 * 1.2 / BATCH**0.5


@pytest.mark.parametrize("recipe", [ppca, factor_analysis])
@pytest.mark.parametrize("gaps", [False, True])
def test_linear_programs_from_minibatches(recipe, gaps):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 2, generator=generator) @ (2 * torch.randn(2, 6, generator=generator))
    x = (x + torch.randn(4000, 6, generator=generator)).double()
    data = {"x": x, "mask": torch.rand(x.shape, generator=generator) < 0.9} if gaps else x
    made = recipe(latent=2, start="random")
    whole = pg.fit(made, data, EM(tolerance=1e-6), seed=0)
    fit = pg.fit(made, data, EM(steps=400, batch_size=200), seed=0)
    start = pg.fit(made, data, EM(steps=1, batch_size=200), seed=0)
    lost = [(whole.evidence().mean - f.evidence().mean) * len(x) for f in (fit, start)]
    # Some 24 parameters, each within 0.4 standard errors: 2 nats, and ten times that.
    assert -0.1 < lost[0] < 20 and lost[1] > 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_all_rows_with_step_size_one_is_a_step_of_em(dtype):
    """The first step only gathers: with all rows in each batch, statistics stay those of the start until it ends."""
    x = rows(dtype)[:2000]
    one = pg.fit(gaussian_mixture(components=2), x, EM(steps=1), seed=0)
    fit = pg.fit(gaussian_mixture(components=2), x, EM(steps=5, batch_size=2000), seed=0)
    for name, value in one.point.items():
        torch.testing.assert_close(fit.point[name], value, rtol=1e-10, atol=1e-10)


def test_step_sizes_sum_to_infinity_and_their_squares_do_not():
    sizes = np.array([step_size(t, 0.6) for t in range(10_000)])
    assert sizes[0] == 1.0 and (np.diff(sizes[5:]) < 0).all() and sizes.sum() > 90 and (sizes**2).sum() < 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
        ({"batch_size": 10, "decay": 0.5}, "decay: expected a number above 0.5 and at most 1, got 0.5"),
        ({"batch_size": 10, "decay": 1.5}, "decay: expected a number above 0.5 and at most 1, got 1.5"),
        ({"batch_size": 10, "m_step": "derived"}, "batch_size: minibatches are for the program's own steps"),
        ({"batch_size": 10, "restarts": 3}, "batch_size: minibatches are for the program's own steps"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EM(**settings)


def test_programs_without_statistics_that_add_up_are_refused():
    import pyro
    import pyro.distributions as dist

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            which = pyro.sample("which", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(loc[which], 1.0), obs=x)

    with pytest.raises(pg.IncompatibleError, match="sufficient statistics that add up over rows"):
        pg.fit(model, torch.randn(50), EM(batch_size=10))
