"""Exchangeable components: one order for all draws, so that averages over draws mean something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["matched_order", "permuted"]


def permuted(
    draws: Mapping[str, Tensor], order: Tensor, axes: Mapping[str, int | Sequence[int]], labels: Sequence[str] = ()
) -> dict[str, Tensor]:
    """``draws`` with their components rearranged: component k of the result is component ``order[..., k]``.

    Args:
        draws: site -> draws x shape of the site (chains x draws x shape is as good).
        order: draws x K.
        axes: site -> which of its axes, counted from the last, run over components.
        labels: sites whose values are components; they are renamed.

    Example:
        >>> draws = {"loc": torch.tensor([[2.0, 1.0]]), "z": torch.tensor([[0, 0, 1]])}
        >>> permuted(draws, torch.tensor([[1, 0]]), {"loc": -1}, labels=["z"])
        {'loc': tensor([[1., 2.]]), 'z': tensor([[1, 1, 0]])}
    """
    result = dict(draws)
    for name, places in axes.items():
        for axis in [places] if isinstance(places, int) else places:
            if name in result:
                value = result[name]
                lead = order.shape[:-1]
                shape = [1] * (value.dim() - len(lead))
                shape[axis] = order.shape[-1]
                result[name] = torch.take_along_dim(value, order.reshape(*lead, *shape), axis)
    renamed = order.argsort(-1)
    for name in labels:
        if name in result:
            value = result[name]
            table = renamed.reshape(*order.shape[:-1], *[1] * (value.dim() - order.dim()), order.shape[-1])
            result[name] = torch.take_along_dim(table, value.long(), -1).to(value.dtype)
    return result


def matched_order(features: Tensor, rounds: int = 20) -> Tensor:
    """The order of components that brings each draw nearest to the average of all draws.

    The average and the orders are found in turn, each draw by the Hungarian method, until nothing changes. The average
    is then sorted by its first feature.

    Args:
        features: draws x K x features, in comparable units.
        rounds: at most so many turns.

    Returns:
        draws x K.

    References:
        Dealing with label switching in mixture models (Stephens, 2000).

    Example:
        >>> features = torch.tensor([[[0.0, 1.0], [5.0, 0.0]], [[5.1, 0.0], [0.1, 1.0]]])
        >>> matched_order(features)
        tensor([[0, 1],
                [1, 0]])
    """
    from scipy.optimize import linear_sum_assignment

    lead, flat = features.shape[:-2], features.flatten(0, -3).double().cpu()
    reference, order = flat[0], torch.zeros(flat.shape[:-1], dtype=torch.long)
    for _ in range(rounds):
        costs = (reference.unsqueeze(-2) - flat.unsqueeze(-3)).square().sum(-1)
        found = torch.tensor([linear_sum_assignment(cost)[1].tolist() for cost in costs.numpy()])
        reference = torch.take_along_dim(flat, found.unsqueeze(-1), -2).mean(0)
        if torch.equal(found, order):
            break
        order = found
    order = order[:, reference[:, 0].argsort()]
    return order.reshape(*lead, -1).to(features.device)
