"""The importance-weighted bound in chunks of particles: the same numbers, in the memory of one chunk."""

from __future__ import annotations

import weakref
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X8, both, both_guide, gradient, local, local_evidence, local_guide, losses, network, playing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppl_gen.inference import IWAE

X16 = torch.cat([X8, X8 + 0.35])  # torch draws normals sixteen at a time: chunks of such rows get the same draws


@pytest.mark.parametrize("kind", ["local", "global and local", "unrolled"])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_give_the_value_and_gradient_of_all_particles_together(kind: str, chunk: int) -> None:
    model, guide = (both, both_guide) if kind == "global and local" else (local, local_guide)
    found = []
    for objective in (IWAE(particles=6), IWAE(particles=6, chunk=chunk)):
        with playing(model, guide, objective, X16) as (game, dataset):
            assert game.notes["particles"] == "vectorised"
            game.vectorise = kind != "unrolled"
            for batch in (dataset.batch(), dataset.batch(torch.arange(16).flip(0))):
                torch.manual_seed(8)
                value = float(losses(game, batch, 1))
                torch.manual_seed(8)
                found.append((value, gradient(game, batch)))
    for (value, grads), (other, others) in zip(found[:2], found[2:], strict=True):
        assert value == pytest.approx(other, abs=1e-10)
        assert all(torch.allclose(grads[n], others[n], rtol=0, atol=1e-10) and bool(grads[n] != 0) for n in grads)


def test_a_program_that_subsamples_keeps_to_its_rows_in_every_chunk() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 8, subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x: torch.Tensor) -> None:
        half = pyro.param("half", torch.tensor(0.5, dtype=x.dtype))
        with pyro.plate("data", 8, subsample_size=3) as index:
            pyro.sample("z", dist.Normal(half * x[index], half.sqrt()))

    triples = local_evidence(X8)[torch.combinations(torch.arange(8), 3)].mean(1)  # an exact guide: what they can be
    with playing(model, guide, IWAE(particles=6, chunk=2), X8) as (game, dataset):
        draws = -losses(game, dataset.batch(), 40)
    assert float((draws[:, None] - triples).abs().amin(1).max()) < 1e-10 and float(draws.std()) > 0.01


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made inside of it held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.most, self.known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                self.known.add(key)
                self.held += tensor.untyped_storage().nbytes()
                self.most = max(self.most, self.held)
                weakref.finalize(tensor.untyped_storage(), self._freed, key, tensor.untyped_storage().nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


def test_memory_is_that_of_one_chunk() -> None:
    net = network(nn.Linear(1, 128), nn.Tanh(), nn.Linear(128, 1)).double()

    def model(x: torch.Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z).squeeze(-1), 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.2, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((slope * x)[:, None], 1.0).to_event(1))

    most = {}
    for particles, chunk in ((4, None), (40, None), (40, 4)):
        with playing(model, guide, IWAE(particles=particles, chunk=chunk), X16.repeat(4)) as (game, dataset):
            with _Peak() as peak:
                gradient(game, dataset.batch())
        most[particles, chunk] = peak.most
    # Hidden layers of 128 numbers per particle and row; the weights themselves are one, and are all kept.
    assert most[40, None] > 7 * most[4, None] and most[40, 4] < 1.5 * most[4, None]
