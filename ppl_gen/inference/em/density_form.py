"""The density at one traced site, in coordinates in which closed-form M-steps can be recognised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch import distributions as td

__all__ = ["Key", "Reading", "read"]


class Key(NamedTuple):
    """One parameter of the density at one site: ``probs``, ``odds``, ``rate``, ``loc`` or ``scale``.

    ``other`` stands for the whole log density of a row, ``prior`` for that of a site outside the rows.
    """

    site: str
    role: str


@dataclass(frozen=True, eq=False)
class Reading:
    """A site inside the rows: its family, its value, and the parameters of its density in their coordinates.

    ``shape`` is that of the log-prob, ``event`` that of one draw. Parameters and value keep dims of size one where they
    do not vary: they broadcast to shape x event, ``probs`` to shape x event x categories. ``mask`` is a mask on the
    distribution itself (masks of the site are in the weights already), and ``trials`` are those of a binomial.
    """

    site: str
    family: str
    shape: torch.Size
    event: torch.Size
    value: Tensor
    mask: Tensor | None
    parameters: dict[str, Tensor]
    trials: Tensor | None = None

    def spread(self, weight: Tensor) -> Tensor:
        """Packed weights of this site, over all its positions: shape x event."""
        wide = weight.reshape(*self.shape, *[1] * len(self.event)).expand(self.shape + self.event)
        return wide if self.mask is None else wide * self.mask

    def alike(self, other: Reading) -> bool:
        """Whether both hold the same data: else weighted sums of these could not be taken once and for all."""
        pairs = ((self.value, other.value), (self.mask, other.mask), (self.trials, other.trials))
        return (
            self.family == other.family
            and self.shape == other.shape
            and all(parameter.shape == other.parameters[role].shape for role, parameter in self.parameters.items())
            and all(
                one is two is None or (one is not None and two is not None and torch.equal(one, two))
                for one, two in pairs
            )
        )


def compact(value: Tensor) -> Tensor:
    """Without the dims along which it was only expanded."""
    for dim, (stride, size) in enumerate(zip(value.stride(), value.shape, strict=True)):
        if stride == 0 and size > 1:
            value = value.narrow(dim, 0, 1)
    return value


def padded(value: Tensor, dims: int) -> Tensor:
    """With dims of size one in front, ``dims`` in all."""
    return value.reshape(*[1] * (dims - value.dim()), *value.shape)


def read(name: str, site: Mapping[str, Any], *, inside: bool) -> Reading:
    """The reading of one traced site; ``inside`` the rows, or the prior of a global site."""
    fn, value, log_prob = site["fn"], site["value"], site["packed"]["unscaled_log_prob"]
    shape = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
    event, mask = torch.Size(fn.event_shape), None
    if not inside:
        return Reading(name, "prior", shape, event, value.new_zeros(()), None, {"prior": log_prob})
    if isinstance(fn, MaskedDistribution) and isinstance(fn._mask, Tensor):
        mask, fn = fn._mask, fn.base_dist
    while isinstance(fn, td.Independent | ExpandedDistribution):
        fn = fn.base_dist
    family, parameters = _family(fn)
    if not parameters or shape.numel() != log_prob.numel():
        return Reading(name, "other", shape, event, value, None, {"other": log_prob})
    if family == "categories" and isinstance(fn, td.OneHotCategorical):
        value, event = value.argmax(-1), event[:-1]
    if isinstance(fn, td.LogNormal):
        value = value.log()
    dims = len(shape) + len(event)
    if mask is not None:
        mask = mask.to(log_prob.dtype).reshape(*mask.shape, *[1] * len(event))
    sized = {role: padded(compact(v), dims + (role == "probs")) for role, v in parameters.items()}
    trials = padded(compact(fn.total_count), dims) if isinstance(fn, td.Binomial) else None
    return Reading(name, family, shape, event, padded(compact(value), dims), mask, sized, trials)


def _family(fn: Any) -> tuple[str, dict[str, Tensor]]:
    if isinstance(fn, td.Normal | td.LogNormal):
        return "normal", {"loc": fn.loc, "scale": compact(fn.scale).log()}
    if isinstance(fn, td.Poisson):
        return "poisson", {"rate": compact(fn.rate).log()}
    if isinstance(fn, td.Exponential):
        return "exponential", {"rate": compact(fn.rate).log()}
    if isinstance(fn, td.Bernoulli | td.Binomial):
        return "successes", {"odds": _parameter(fn, of_probs=torch.special.logit, of_logits=lambda v: v)}
    if isinstance(fn, td.OneHotCategorical):
        fn = fn._categorical
    if isinstance(fn, td.Categorical):
        return "categories", {"probs": _parameter(fn, of_probs=lambda p: p, of_logits=lambda v: v.softmax(-1))}
    return "other", {}


def _parameter(fn: Any, *, of_probs: Callable[[Tensor], Tensor], of_logits: Callable[[Tensor], Tensor]) -> Tensor:
    """From the one that the distribution was made with: the other would be worked out at full size."""
    return of_probs(compact(fn.probs)) if "probs" in fn.__dict__ else of_logits(compact(fn.logits))
