"""Chains that were stopped go on to the same draws, wherever in warm-up or sampling they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from resumable_runs import same

import ppl_gen as pg
from ppl_gen.inference import NUTS
from ppl_gen.inference.mcmc import kernel_state as kept
from ppl_gen.inference.mcmc.kernel import Chain, _Kernel
from ppl_gen.runtime.numbered import Numbered
from ppl_gen.workspace.isolation import isolated

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.errors.FitWarning")

ROWS = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


CHAINS = NUTS(draws=12, warmup=30, chains=2, processes=1, thin=2, sampler="pyro")


def learned(algorithm: NUTS = CHAINS, **settings: Any) -> pg.Fit:
    return pg.fit(model, ROWS, algorithm, seed=2, progress=False, **settings)


def stopped(after: int, algorithm: NUTS = CHAINS, **settings: Any) -> None:
    """A run that ends after so many iterations of all chains, before or after a first draw."""

    def stop(step: int, info: Any) -> None:
        if step >= after:
            raise KeyboardInterrupt

    try:
        part = learned(algorithm, callbacks=[stop], **settings)
        assert part.status is pg.Status.INTERRUPTED
    except KeyboardInterrupt:
        pass


def all_of(fit: pg.Fit) -> dict[str, Any]:
    cost = {name: value for name, value in fit.cost.items() if name not in ("seconds", "capture_seconds")}
    return {"draws": dict(fit.learned.draws), "stats": dict(fit.learned.stats), "cost": cost, "told": fit.message}


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return all_of(learned())


#: In the windows of the warm-up (0 to 3, 4 to 26, 27 to 29), at their ends, and in both chains.
MOMENTS = (1, 3, 4, 5, 15, 26, 27, 28, 29, 30, 31, 40, 53, 54, 55, 70, 84, 85, 107)


@pytest.mark.parametrize(
    ("full_mass", "moments"),
    [(True, MOMENTS[4:13:2]), (False, MOMENTS[1:8:2]), pytest.param(True, MOMENTS, marks=pytest.mark.slow)],
)
def test_a_chain_can_end_after_any_iteration(full_mass: bool, moments: tuple[int, ...], tmp_path: Path) -> None:
    algorithm = replace(CHAINS, full_mass=full_mass)
    for after in moments:
        stopped(after, algorithm, checkpoint=tmp_path, every=1000)
    resumed = learned(algorithm, checkpoint=tmp_path)
    assert f"of {CHAINS.iterations} iterations" in resumed.notes["resumed"]
    assert same(all_of(learned(algorithm)), all_of(resumed))


@pytest.mark.parametrize("after", [20, 47, 90])
def test_what_was_drawn_after_the_last_checkpoint_is_drawn_again(
    after: int, tmp_path: Path, whole: dict[str, Any]
) -> None:
    def killed(step: int, info: Any) -> None:
        if step >= after:
            raise SystemExit

    with pytest.raises(SystemExit):
        learned(checkpoint=tmp_path, every=8, callbacks=[killed])
    resumed = learned(checkpoint=tmp_path, every=8)
    assert same(whole, all_of(resumed)) and "resumed" in resumed.notes


def test_finished_chains_are_returned_without_an_iteration(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned(checkpoint=tmp_path)
    monkeypatch.setattr(_Kernel, "sample", lambda *_: pytest.fail("an iteration"))
    monkeypatch.setattr(_Kernel, "setup", lambda *_: pytest.fail("a kernel"))
    assert same(whole, all_of(learned(checkpoint=tmp_path)))


def test_more_draws_continue_the_chains_and_fewer_are_refused(tmp_path: Path) -> None:
    learned(checkpoint=tmp_path)
    more = replace(CHAINS, draws=20)
    assert same(all_of(learned(more)), all_of(learned(more, checkpoint=tmp_path)))
    with pytest.raises(ValueError, match="belongs to chains of 20 draws, and now there are 12"):
        learned(checkpoint=tmp_path)
    with pytest.raises(ValueError, match="algorithm.warmup was 30, is 31"):
        learned(replace(more, warmup=31), checkpoint=tmp_path)


def test_workers_and_one_process_go_on_with_each_others_chains(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Started in worker processes, which write what they have when they are stopped; ended here."""
    side_by_side = replace(CHAINS, processes=2)
    stopped(1, side_by_side, checkpoint=tmp_path, every=1)
    steps = [Numbered(tmp_path / f"chain {chain}").read().facts["step"] for chain in range(2)]
    assert 0 < sum(steps) < 2 * CHAINS.iterations
    assert same(whole, all_of(learned(checkpoint=tmp_path)))


def test_a_chain_of_another_run_is_refused(tmp_path: Path) -> None:
    stopped(20, checkpoint=tmp_path / "one")
    stopped(20, checkpoint=tmp_path / "two")
    for file in (tmp_path / "one" / "chain 0").iterdir():
        file.unlink()
    for file in (tmp_path / "two" / "chain 0").iterdir():
        file.rename(tmp_path / "one" / "chain 0" / file.name)
    with pytest.raises(ValueError, match=r"chain 0 belongs to another run"):
        learned(checkpoint=tmp_path / "one")


def _changing(holder: Any) -> dict[str, str]:
    return {name: str(value) for name, value in vars(holder).items()}


def test_all_that_changes_in_pyros_kernel_is_kept() -> None:
    """What an upgrade of Pyro adds to its state is noticed here."""

    def function(u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return 0.5 * (u**2).sum(), u

    chain = Chain(function, torch.ones(2), 0, 100, 60, 1, 0.8, "dense", 10, torch.float64)
    with isolated(0):
        kernel = _Kernel(function, chain)
        kernel.setup(60)
        parts = {
            "kernel": (kernel, kept.KERNEL),
            "adapter": (kernel._adapter, kept.ADAPTER),
            "step size": (kernel._adapter._step_size_adapt_scheme, kept.STEP_SIZE),
            "metric": (kernel.metric, kept.METRIC),
            "covariance": (next(iter(kernel.metric._adapt_scheme.values())), kept.COVARIANCE),
        }
        position, seen = kernel.initial_params, {name: _changing(holder) for name, (holder, _) in parts.items()}
        moved: dict[str, set[str]] = {name: set() for name in parts}
        for _ in range(80):
            position = kernel.sample(position)
            for name, (holder, _) in parts.items():
                now = _changing(holder)
                moved[name] |= {key for key, value in now.items() if value != seen[name].get(key)}
                seen[name] = now
    inner = {"_adapter", "metric", "_step_size_adapt_scheme", "_mass_matrix_adapter", "_adapt_scheme"}
    of_chain = {"_max_tree_depth"}  # follows from `taken` before every iteration
    for name, (_, names) in parts.items():
        assert moved[name] - inner - of_chain <= set(names), name
        assert set(names) - moved[name] <= {"_accept_cnt", "_divergences"}, "what never moves would show nothing"
    assert np.isfinite(kernel.step_size)
