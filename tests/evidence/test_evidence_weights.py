"""Importance-weighted evidence: against quadrature, and what it says of the draws that carry it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X8, local, local_evidence, local_exact_guide, local_guide
from torch import Tensor

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import vae
from ppl_gen.weights import chunks as chunks_file
from ppl_gen.weights import particles as particles_file
from ppl_gen.weights.weight_quality import FEW, WeightQuality

STILL = SVI(steps=1, lr=1e-30)  # one step too small to change anything


def pixels(rows: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    kind = torch.tensor([[1.0, 1, 1, 0, 0], [0.0, 0, 1, 1, 1]]).repeat(rows // 2, 1)
    return (kind - (torch.rand(kind.shape, generator=generator) < 0.15).float()).abs().double()


@pytest.fixture(scope="module")
def tiny() -> pg.Fit:
    """One latent, so that quadrature knows the answer."""
    return pg.fit(vae(5, latent=1, hidden=(4,)), pixels(), SVI(steps=150, lr=0.03), seed=0)


def by_quadrature(fit: pg.Fit, x: Tensor) -> Tensor:
    """log of the integral of N(z; 0, 1) p(x | z), trapezia on [-9, 9]: far below 1e-9 for such smooth functions."""
    z = torch.linspace(-9.0, 9.0, 2001, dtype=torch.float64)
    joint = fit.module("decoder")(z[:, None, None]).log_prob(x).detach() + dist.Normal(0.0, 1.0).log_prob(z)[:, None]
    return torch.logsumexp(joint, 0) + math.log(18.0 / 2000)


# ------------------------------------------------------------------------------------------ the right number
def test_the_evidence_of_a_tiny_vae_is_that_of_quadrature(tiny: pg.Fit) -> None:
    x = pixels()
    exact = by_quadrature(tiny, x)
    found = tiny.evidence(particles=2000)
    # Bias of log of a mean is about -variance / 2, far below the error at 2000 particles. 5 errors: 6e-7.
    assert abs(found.mean - float(exact.mean())) < 5 * found.mc_stderr < 0.05
    assert not found.exact and found.rows == 40 and float((found.values - exact).abs().median()) < 0.02
    assert abs(tiny.evidence(particles=1).mean - float(exact.mean())) > 5 * found.mc_stderr, "a bound, with one"
    spread = float(exact.std()) / math.sqrt(40)
    assert found.stderr == pytest.approx(spread, rel=0.1)


def test_the_bias_shrinks_with_the_particles(tiny: pg.Fit) -> None:
    x = pixels(400)
    exact = by_quadrature(tiny, x)
    short = []
    for particles in (1, 4, 16):
        gap = exact - tiny.evidence(x, particles=particles, seed=3).values
        short.append((float(gap.mean()), float(gap.std()) / math.sqrt(400)))
    assert short[0][0] > 5 * short[0][1]
    # One particle falls short by KL(q || p); every fourfold more at least halves it, errors of both counted.
    for (fewer, error), (more, other) in zip(short, short[1:], strict=False):
        assert more + 5 * other > 0
        assert more < fewer / 2 + 5 * math.hypot(error / 2, other)


def test_memory_chunks_change_nothing_but_the_draws(tiny: pg.Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.evidence(particles=300)
    rows = tiny.evidence(particles=300, chunk=7)
    monkeypatch.setattr(particles_file, "MAX_ELEMENTS", 11 * 40 * 5)  # 11 particles of 40 rows of 5 numbers
    few = tiny.evidence(particles=300)
    assert torch.equal(tiny.evidence(particles=300).values, few.values), "same seed, same chunks: the same draws"
    for other in (rows, few):
        assert abs(other.mean - whole.mean) < 5 * math.hypot(other.mc_stderr, whole.mc_stderr)  # 6e-7
        assert other.mc_stderr == pytest.approx(whole.mc_stderr, rel=0.5)
        assert other.effective_draws is not None and other.effective_draws.shape == (40,)
        assert bool((other.effective_draws <= 300).all())


def test_no_more_particles_are_held_at_a_time_than_memory_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    genuine = chunks_file.local_log_weights

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[4])
        return genuine(*args, **kwargs)

    monkeypatch.setattr(chunks_file, "local_log_weights", watched)
    monkeypatch.setattr(particles_file, "MAX_ELEMENTS", 4 * 8)
    fit = pg.fit(pg.Program(local, local_exact_guide), X8, STILL)
    assert torch.allclose(fit.evidence(particles=10).values, local_evidence(X8))
    assert seen == [4, 4, 2]


def test_a_program_that_subsamples_keeps_to_its_rows_from_chunk_to_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from programs import playing

    from ppl_gen.inference import IWAE
    from ppl_gen.program.dry_run import dry_run

    def model(x: Tensor) -> None:
        with pyro.plate("data", 8, subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x: Tensor) -> None:
        half = pyro.param("half", torch.tensor(0.5, dtype=x.dtype))
        with pyro.plate("data", 8, subsample_size=3) as index:
            pyro.sample("z", dist.Normal(half * x[index], half.sqrt()))

    monkeypatch.setattr(particles_file, "MAX_ELEMENTS", 8)  # one particle at a time
    exact = local_evidence(X8)
    with playing(model, guide, IWAE(particles=2), X8) as (_, dataset):
        info = dry_run(pg.Program(model, guide), dataset.batch(), guide=guide)
        weights = particles_file.log_weights_in_chunks(
            model, guide, info, dataset.batch(), 6, values={}, vectorise=True
        )
    # The guide is exact: each row's weights are all its evidence, which tells the rows apart.
    assert weights.rows is not None and weights.rows.shape == (6, 3)
    assert float(weights.rows.detach().var(0).max()) < 1e-20
    distance = (weights.rows.detach()[0][:, None] - exact).abs().amin(1)
    assert float(distance.max()) < 1e-10


# --------------------------------------------------------------------------- how many draws carry it
def test_equal_weights_are_all_effective_and_have_no_tail() -> None:
    fit = pg.fit(pg.Program(local, local_exact_guide), X8, STILL)
    found = fit.evidence(particles=400)
    assert found.effective_draws is not None and found.effective_draws.tolist() == pytest.approx([400.0] * 8)
    assert found.pareto_k is not None and found.pareto_k_rows is not None
    assert found.pareto_k < 0.1 and len(found.pareto_k_rows) == 8 and found.mc_stderr < 1e-10
    assert "400 effective" in repr(found)


def test_effective_draws_of_a_wide_guide_are_what_the_integrals_say() -> None:
    """E[w]^2 / E[w^2] of normals: posterior N(x/2, 1/2), proposal N(0.2 x, 1)."""
    fit = pg.fit(pg.Program(local, local_guide), X8, STILL)
    found = fit.evidence(particles=20000)
    z = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)[:, None]
    posterior = dist.Normal(X8 / 2, math.sqrt(0.5)).log_prob(z)
    second = torch.logsumexp(2 * posterior - dist.Normal(0.2 * X8, 1.0).log_prob(z), 0) + math.log(24.0 / 4000)
    expected = 20000 * torch.exp(-second)
    assert found.effective_draws is not None
    # Relative weights have a bounded fourth moment here; their mean square is known to about 1 % in 20000 draws.
    assert torch.allclose(found.effective_draws, expected, rtol=0.06)


def off_by(distance: float, scale: float) -> Any:
    def guide(x: Tensor) -> None:
        half = pyro.param("half", torch.tensor(0.5, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(half * x + distance, scale))

    return guide


def test_a_bad_guide_warns_and_a_good_one_does_not() -> None:
    bad = pg.fit(pg.Program(local, off_by(6.0, 0.2)), X8, STILL)
    with pytest.warns(UserWarning, match=r"evidence: in half of the rows at most .* of 200 draws carry the estimate"):
        found = bad.evidence(particles=200)
    assert found.effective_draws is not None and float(found.effective_draws.median()) < FEW
    assert found.mean < float(local_evidence(X8).mean()) - 1.0, "and it is far too low"
    assert found.pareto_k is not None and found.pareto_k > 0.7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = pg.fit(pg.Program(local, off_by(0.3, 0.9)), X8, STILL).evidence(particles=200)
        assert good.pareto_k is not None and good.pareto_k < 0.7
        handful = bad.evidence(particles=10)  # asked for no more: nothing to complain of, nor a tail to fit
    assert handful.pareto_k is None and handful.effective_draws is not None


def test_closed_forms_and_sums_have_no_weights() -> None:
    from programs import switch

    def named(x: Tensor) -> None:
        switch(x + pyro.param("shift", torch.zeros((), dtype=x.dtype)))

    found = pg.fit(named, X8, STILL).evidence()
    assert found.exact and found.effective_draws is None and found.pareto_k is None and found.mc_stderr == 0


def test_rows_that_no_draw_explains_have_no_effective_draws() -> None:
    quality = WeightQuality(3)
    logs = torch.zeros(40, 3)
    logs[:, 1] = -torch.inf
    logs[20:, 2] = -torch.inf
    quality.add(logs)
    assert quality.effective_draws is not None and quality.effective_draws.tolist() == [40.0, 0.0, 20.0]


def test_weights_are_gathered_over_chunks_and_kept_for_two_hundred_rows() -> None:
    quality, whole = WeightQuality(1000), WeightQuality(1000)
    logs = torch.randn(50, 1000, generator=torch.Generator().manual_seed(2))
    for part in logs.split(130, 1):
        quality.add(part)
    whole.add(logs)
    ks, same = quality.k_hats(), whole.k_hats()
    assert ks is not None and same is not None and len(ks) == 200 and np.array_equal(ks, same)
    assert quality.effective_draws is not None and whole.effective_draws is not None
    assert torch.allclose(quality.effective_draws, whole.effective_draws, rtol=1e-12)
    weights = logs[:, 0].double().exp()
    assert float(whole.effective_draws[0]) == pytest.approx(float(weights.sum() ** 2 / (weights**2).sum()))
