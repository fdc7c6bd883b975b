"""What rows are made given: entries of the data that a program reads, and observed sites that no parameter decides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.handlers.carried import _base
from ppl_gen.handlers.unobserved import unobserved
from ppl_gen.inference.objectives.game import Setting
from ppl_gen.inference.objectives.observed import ObservedRows, entries_read
from ppl_gen.program.info import Site
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["Conditions", "as_numbers", "rows_compared", "undecided", "unseen"]

_KINDS = 100  # whole numbers in a column, up to which each is a label of its own


def undecided(setting: Setting, sites: Sequence[Site], *, observed: bool) -> frozenset[str]:
    """Those of the ``sites`` without reparameterised draws whose distributions no parameter decides, labels say.

    With the program's observations in place, or without them: then it also counts what a learned draw decides.
    """
    model = setting.model if observed else unobserved(setting.model)
    with without_side_effects(), torch.enable_grad():
        nodes = poutine.trace(model).get_trace(*setting.probe.args, **setting.probe.kwargs).nodes
        stuck = [site.name for site in sites if not site.reparameterised]
        return frozenset(n for n in stuck if not nodes[n]["fn"].log_prob(nodes[n]["value"]).requires_grad)


def rows_compared(setting: Setting, sites: Sequence[Site], temperature: float | None = None) -> ObservedRows:
    """Observed and made rows of these sites; what no parameter decides needs no gradient, and is compared as drawn."""
    drawn = frozenset[str]() if temperature is not None else undecided(setting, sites, observed=False)
    return ObservedRows(setting.model, setting.info, sites, temperature, drawn)


def unseen(setting: Setting, names: Sequence[str]) -> dict[str, str]:
    """A note, where the sites ``names`` are made from entries of the data that a critic of these sites does not see."""
    read = Conditions.of(setting, names).names
    if not read:
        return {}
    made, given = " and ".join(names), " and ".join(read)
    return {
        "inputs": f"{made} is made from {given}, which the critic does not see, so made rows need not go with their "
        f"{given}: ConditionalAdversarial() shows it to the critic"
    }


@dataclass(frozen=True)
class Conditions:
    """Entries of the data that rows are made from, as numbers beside them: labels one-hot, images as they are.

    Args:
        names: of the entries.
        places: of each in a batch: a position among the arguments, or a name.
        dims: of each, the dimension of its rows.
        kinds: of each, how many labels it holds; 0: they are numbers.
    """

    names: tuple[str, ...]
    places: tuple[int | str, ...]
    dims: tuple[int, ...]
    kinds: tuple[int, ...]

    @classmethod
    def of(cls, setting: Setting, names: Collection[str]) -> Conditions:
        """What the sites ``names`` of a program are made from, beside what it observes."""
        traced = poutine.trace(unobserved(setting.model))
        run: Callable[[Batch], poutine.Trace] = lambda b: traced.get_trace(*b.args, **b.kwargs)  # noqa: E731
        places = entries_read(run, setting.probe, names)
        data = setting.data
        called = [data.positional[at] if data and isinstance(at, int) else str(at) for at in places]
        dims = [data.dim(name) if data and name in data.entries else 0 for name in called]
        kinds = [_kinds(data.entries.get(name)) if data else 0 for name in called]
        return cls(tuple(called), tuple(places), tuple(dims), tuple(kinds))

    def __call__(self, batch: Batch) -> list[Tensor]:
        """Their values in a batch: rows x numbers each, images rows x channels x height x width."""
        found = []
        for at, dim, kinds in zip(self.places, self.dims, self.kinds, strict=True):
            value = batch.args[at] if isinstance(at, int) else batch.kwargs[at]
            found.append(as_numbers(value.movedim(dim, 0), kinds))
        return found


def as_numbers(value: Tensor, kinds: int = 0) -> Tensor:
    """Values, rows first, as floating-point numbers: labels (rows) one-hot, where there are ``kinds`` of them.

    >>> as_numbers(torch.tensor([2, 0]), 3)
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """
    if kinds:
        value = value.unsqueeze(-1) == torch.arange(kinds, device=value.device)
    value = value.to(torch.get_default_dtype()) if not value.is_floating_point() else value
    return value.unsqueeze(-1) if value.dim() == 1 else value


def categories(fn: dist.TorchDistribution) -> int:
    """How many categories a site has whose values are their numbers; 0 for any other."""
    inner = _base(fn, dist.Categorical)
    return 0 if inner is None else int(inner.probs.shape[-1])


def _kinds(column: object) -> int:
    """How many labels a column of the data holds; 0 where its numbers are no labels, or it is not at hand."""
    if not isinstance(column, Tensor | np.ndarray) or column.ndim != 1:
        return 0
    labels = torch.as_tensor(column)
    if labels.is_floating_point() or labels.dtype is torch.bool:
        return 0
    most = int(labels.max()) + 1
    return most if 2 <= most <= _KINDS else 0
