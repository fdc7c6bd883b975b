"""The expected cost of a guide whose discrete sites are summed out, without reading a number on the way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import traceenum_elbo
from pyro.infer.util import Dice
from pyro.ops import packed
from pyro.ops.rings import MarginalRing
from torch import Tensor

from ppl_gen.handlers.private import dice_elbo, require_backward, shared_intermediates

__all__ = ["expected_elbo"]


def expected_elbo(model: poutine.Trace, guide: poutine.Trace) -> Tensor:
    """The ELBO of a pair of enumerated traces, a scalar in nats: every cost weighed by the probability of its values.

    Pyro's own asks whether any probability is zero, which a captured step cannot.

    Source: Foerster et al. (2018), DiCE, for the factors; Obermeyer et al. (2019) for the elimination.
    """
    with _in_place_of_pyros():
        return torch.as_tensor(dice_elbo(model, guide))


@contextlib.contextmanager
def _in_place_of_pyros() -> Iterator[None]:
    outer = traceenum_elbo.Dice
    traceenum_elbo.Dice = _Expectation
    try:
        yield
    finally:
        traceenum_elbo.Dice = outer


class _Expectation(Dice):
    def compute_expectation(self, costs: Mapping[Any, Sequence[Any]]) -> Tensor:
        """The sum over ordinals of sum_z q(z) cost(z), a scalar."""
        total = torch.zeros(())
        with shared_intermediates() as cache:
            ring = MarginalRing(cache=cache)
            for ordinal, terms in costs.items():
                parts = self._get_log_factors(ordinal)
                factors = [part for part in parts if isinstance(part, Tensor)]
                scale = math.exp(sum(part for part in parts if not isinstance(part, Tensor)))
                weights = _marginals(factors, terms, ordinal, ring)
                for term in terms:
                    total = total + scale * _weighed(term, weights[frozenset(term._pyro_dims)])
        return total


def _marginals(factors: list[Any], terms: Sequence[Any], ordinal: Any, ring: MarginalRing) -> dict[frozenset[str], Any]:
    """For the dims of each cost, the probabilities of the values along them."""
    asked: dict[frozenset[str], Any] = {}
    wanted = {frozenset(term._pyro_dims): term for term in terms}
    for factor in factors:
        key = frozenset(factor._pyro_dims)
        if key in wanted:
            asked.setdefault(key, factor)
    for key, term in wanted.items():
        if key not in asked:  # nothing is drawn there: weights of 1, whose gradient is what is asked for
            one: Any = torch.zeros_like(term)
            one._pyro_dims = term._pyro_dims
            factors.append(one)
            asked[key] = one
    summed = set().union(*(factor._pyro_dims for factor in factors)) - ordinal
    for query in asked.values():
        require_backward(query)
    ring.sumproduct(factors, summed)._pyro_backward()
    found: dict[frozenset[str], Any] = {}
    for key, query in asked.items():
        found[key] = query._pyro_backward_result.exp()
        found[key]._pyro_dims = query._pyro_dims
    return found


def _weighed(cost: Tensor, weight: Tensor) -> Tensor:
    """sum_z q(z) cost(z), a scalar; what has no probability costs nothing, even where its cost is infinite."""
    if is_identically_zero(cost):
        return torch.zeros(())
    cost, weight = packed.broadcast_all(cost, weight)
    return (weight * torch.where(weight > 0, cost, torch.zeros_like(cost))).sum()
