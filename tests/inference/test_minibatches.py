"""Minibatches: unbiased with global and local latents, from any source, and refused where they cannot be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from programs import (
    X8,
    both_noisy,
    both_noisy_guide,
    conjugate,
    conjugate_guide,
    gradient,
    local,
    losses,
    no_plate,
    playing,
)
from pyro import poutine

import ppl_gen as pg
from ppl_gen.data.batches import Batches
from ppl_gen.data.batching import as_dataset
from ppl_gen.handlers.rescale import RescalePlate
from ppl_gen.inference import ELBO, SVI

BATCH_SIZES = [8, 4, 3, 2, 1]  # 3 leaves an unequal last batch of 2


def epoch_average(game: Any, dataset: Any, size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient averaged over one pass, each batch weighed by its share of the rows, under one seed."""
    value, grads = 0.0, {}
    for index in torch.arange(dataset.rows).split(size):
        batch, share = dataset.batch(index), len(index) / dataset.rows
        torch.manual_seed(5)
        with torch.no_grad():
            value += share * float(game.loss("program", batch, game.init(batch))[0].value)
        torch.manual_seed(5)
        for name, grad in gradient(game, batch).items():
            grads[name] = grads.get(name, 0.0) + share * grad
    return value, grads


@pytest.mark.parametrize("size", BATCH_SIZES)
@pytest.mark.parametrize("kind", ["global", "global and local"])
def test_the_minibatch_loss_and_gradient_are_unbiased_for_the_full_ones(size: int, kind: str) -> None:
    # The same draws in every batch: one seed for the global one; for the local ones the noise is a column of the data.
    if kind == "global":
        model, guide, data = conjugate, conjugate_guide, X8
    else:
        model, guide = both_noisy, both_noisy_guide
        shared = pg.constant(torch.tensor(0.4, dtype=torch.float64))
        data = {"x": X8, "noise": torch.randn(8, 1, dtype=torch.float64), "shared": shared}
    with playing(model, guide, ELBO(), data) as (game, dataset):
        full, gradients = epoch_average(game, dataset, 8)
        value, averaged = epoch_average(game, dataset, size)
    # Sums of about 30 terms of order one in another order: 30 * 2e-16, with a margin.
    assert value == pytest.approx(full, abs=1e-13)
    assert all(torch.allclose(averaged[name], gradients[name], rtol=0, atol=1e-12) for name in gradients)
    assert max(float(g.abs()) for g in gradients.values()) > 0.01, "there is something to compare"


def _wide(x: torch.Tensor) -> None:
    """A nested plate over columns, some entries masked away, half of the likelihood by the user's own scale."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("data", len(x), dim=-2):
        with pyro.plate("columns", x.shape[1], dim=-1), poutine.scale(scale=0.5), poutine.mask(mask=x > -1.0):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


@pytest.mark.parametrize("size", [5, 2, 1])
def test_nested_plates_masks_and_the_users_own_scale_are_rescaled_too(size: int) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    with playing(_wide, conjugate_guide, ELBO(), x) as (game, dataset):
        full, _ = epoch_average(game, dataset, 5)
        value, _ = epoch_average(game, dataset, size)
        torch.manual_seed(5)
        trace = poutine.trace(conjugate_guide).get_trace(x)
        theta = trace.nodes["theta"]["value"]
        prior = dist.Normal(torch.zeros((), dtype=x.dtype), 1.0)
        kept = 0.5 * dist.Normal(theta, 1.0).log_prob(x)[x > -1.0].sum()
        by_hand = (torch.distributions.kl_divergence(trace.nodes["theta"]["fn"], prior) - kept) / 5
    assert value == pytest.approx(full, abs=1e-13) and full == pytest.approx(float(by_hand.detach()), abs=1e-13)


def test_the_plate_factor_is_n_over_b_inside_the_plate_and_one_outside() -> None:
    with RescalePlate("data", 8):
        trace = poutine.trace(conjugate).get_trace(X8[:2])
    assert (trace.nodes["x"]["scale"], trace.nodes["theta"]["scale"]) == (4.0, 1.0)


def test_a_program_that_subsamples_by_itself_is_scaled_once() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x: torch.Tensor) -> None:
        half = pyro.param("half", torch.tensor(0.5, dtype=x.dtype))
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(half * x[rows], half.sqrt()))

    one = torch.full((8,), 0.7, dtype=torch.float64)  # equal rows: every subsample gives the same sum
    exact = float(dist.Normal(torch.zeros((), dtype=one.dtype), math.sqrt(2.0)).log_prob(one).mean())
    with playing(model, guide, pg.inference.IWAE(particles=3), one) as (game, dataset):
        assert losses(game, dataset.batch(), 3).tolist() == pytest.approx([-exact] * 3, abs=1e-12)


def test_stratified_batches_hold_their_share_of_every_stratum() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10)[torch.randperm(40)]
    data = as_dataset({"x": torch.arange(40.0), "y": labels}, lambda x, y: None)
    source = Batches(data, 8, seed=0, stratify="y")
    batches = [source.next() for _ in range(10)]
    # Evenly spaced places: a stratum of share s has floor or ceil of 8 s of its rows in a batch, and one more at most.
    assert all(1 <= int(batch.kwargs["y"].sum()) <= 3 for batch in batches)
    for epoch in (batches[:5], batches[5:]):
        assert sorted(torch.cat([batch.index for batch in epoch]).tolist()) == list(range(40))
    plain = Batches(data, 8, seed=0)
    assert any(not 1 <= int(plain.next().kwargs["y"].sum()) <= 3 for _ in range(30)), "chance alone does not do it"


def test_every_kind_of_source_gives_the_same_fit(tmp_path: Any) -> None:
    x = torch.randn(30, 2)
    file = np.memmap(tmp_path / "x.bin", dtype=np.float32, mode="w+", shape=(30, 2))
    file[:] = x.numpy()
    pairs = torch.utils.data.TensorDataset(x, torch.arange(30))

    class Items(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 30

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return x[i], i

    def model(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    loader = torch.utils.data.DataLoader(pairs, batch_size=7, shuffle=True)
    sources = {"tensor": x, "array": x.numpy(), "memmap": file, "dataset": pairs, "items": Items(), "loader": loader}
    svi = SVI(steps=6, batch_size=8, lr=0.1)
    fits = {name: pg.fit(model, source, svi, seed=2) for name, source in sources.items()}
    fits["mapping"] = pg.fit(model, {"x": x, "label": torch.arange(30)}, svi, seed=2)
    expected = fits["tensor"].params
    for name, fit in fits.items():
        assert all(torch.equal(fit.params[key], expected[key]) for key in expected), name
    assert not torch.equal(
        pg.fit(model, x.roll(1, 0), svi, seed=2).params["AutoNormal.locs.loc"], expected["AutoNormal.locs.loc"]
    )


def test_local_parameters_are_refused_on_minibatches() -> None:
    with pytest.raises(pg.IncompatibleError, match=r"\['z'\] stand inside the data plate.*batch_size"):
        pg.fit(local, X8, SVI(steps=2, batch_size=4))

    def by_row(x: torch.Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.zeros(len(x), dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    with pytest.raises(pg.IncompatibleError, match=r"\['z'\] cannot follow a batch of another size.*amortised"):
        pg.fit(pg.Program(local, by_row), X8, SVI(steps=2, batch_size=4))
    assert pg.fit(pg.Program(local, by_row), X8, SVI(steps=2)).status == "finished", "the whole data are no minibatch"

    def by_number(x: torch.Tensor, row: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(8, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[row], 1.0))

    rows = {"x": X8, "row": torch.arange(8)}
    fit = pg.fit(pg.Program(lambda x, row: local(x), by_number), rows, SVI(steps=200, batch_size=4, lr=0.1))
    # The optimum of row i is x_i / 2; Adam at 0.1 leaves noise of about 0.1. Misaligned rows would be off by 0.5.
    assert float((fit.params["loc"] - X8 / 2).abs().mean()) < 0.25 < float((X8 / 2).abs().mean())


def test_whole_data_only_is_legal_and_minibatches_are_refused() -> None:
    fit = pg.fit(no_plate, X8, SVI(steps=5))
    assert fit.status == "finished" and "data plate" not in fit.info.offers
    with pytest.raises(pg.IncompatibleError, match="(?s)SVI.* needs:.*data plate.*missing:.*data plate"):
        pg.fit(no_plate, X8, SVI(steps=5, batch_size=4))


def test_a_factor_outside_the_plate_counts_once_and_refuses_minibatches() -> None:
    def model(x: torch.Tensor) -> None:
        conjugate(x)
        pyro.factor("extra", torch.tensor(-3.0, dtype=torch.float64))

    values = []
    for program in (conjugate, model):
        with playing(program, conjugate_guide, ELBO(), X8) as (game, dataset):
            torch.manual_seed(5)
            values.append(8 * float(losses(game, dataset.batch(), 1)))
    assert values[1] - values[0] == pytest.approx(3.0, abs=1e-12)
    with pytest.raises(pg.IncompatibleError, match=r"\['extra'\] stand outside the data plate"):
        pg.fit(pg.Program(model, conjugate_guide), X8, SVI(steps=2, batch_size=4))
