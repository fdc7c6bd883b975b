"""Values that carry the gradient of sites whose draws carry none."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError

__all__ = ["carried_values"]


def carried_values(
    model: Callable[..., Any], batch: Batch, names: Collection[str], temperature: float | None = None
) -> tuple[poutine.Trace, list[Tensor]]:
    """A trace of a ``model`` without observations, and what carries the gradient of the sites ``names`` there."""
    carrier = _Carrier(names, temperature)
    with carrier:
        trace = poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
    return trace, [carrier.values.get(name, trace.nodes[name]["value"]) for name in names]


class _Carrier(Messenger):
    """For named sites without reparameterised draws, keeps a value that carries their gradient."""

    def __init__(self, names: Collection[str], temperature: float | None) -> None:
        super().__init__()
        self.names, self.temperature = set(names), temperature
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self.names or msg["is_observed"] or fn.has_rsample:
            return
        if self.temperature is None:
            # The site itself is drawn as written, so that statements below it see values of their own kind.
            self.values[name] = _mean(name, fn)
            return
        self.values[name] = drawn = _relaxed(fn, self.temperature)
        msg["value"] = drawn.detach().argmax(-1) if _base(fn, dist.Categorical) else drawn
        msg["done"] = True


def _base(fn: Any, kind: type | tuple[type, ...]) -> Any:
    """The ``kind`` inside wrappers such as Independent and Masked; None if it is something else."""
    while hasattr(fn, "base_dist") and not isinstance(fn, kind):
        fn = fn.base_dist
    return fn if isinstance(fn, kind) else None


def _mean(name: str, fn: Any) -> Tensor:
    categories = _base(fn, dist.Categorical)
    if categories is not None:
        return categories.probs.expand(*fn.shape(), categories.probs.shape[-1])
    try:
        mean = fn.mean
    except (NotImplementedError, AttributeError) as error:
        raise IncompatibleError(
            f"the observed site {name!r} ({type(fn).__name__}) has neither reparameterised draws nor a mean, so no "
            "gradient reaches its parameters"
        ) from error
    return mean.expand(fn.shape())


def _relaxed(fn: Any, temperature: float) -> Tensor:
    inner = _base(fn, (dist.Bernoulli, dist.Categorical, dist.OneHotCategorical))
    heat = inner.logits.new_tensor(temperature)
    if isinstance(inner, dist.Bernoulli):
        return dist.RelaxedBernoulliStraightThrough(heat, logits=inner.logits.expand(fn.shape())).rsample()
    states = inner.logits.shape[-1:] if isinstance(inner, dist.Categorical) else ()
    logits = inner.logits.expand(*fn.shape(), *states)
    return dist.RelaxedOneHotCategoricalStraightThrough(heat, logits=logits).rsample()
