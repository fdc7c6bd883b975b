"""What a sample statement means where Pyro leaves it open: values that are no observations, and labels as integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from ppl_gen.handlers.sites import is_subsample

__all__ = ["ReadSites", "innermost", "is_flat"]

_INNER = ("base_dist", "component_distribution", "_component_distribution", "observation_dist")


class ReadSites(Messenger):
    """Marks deterministic sites as such, and gives observed integers the dtype of the site's own draws.

    * ``pyro.sample(name, Delta(v), obs=v)``, masked or not, observes nothing: it is `pyro.deterministic`. Every
      handler of `pyro.infer.reparam` leaves such a site in place of the one that it has taken apart.
    * ``obs=0.5``, a number of Python or numpy, is the tensor that it stands for, in the shape of the site.
    * A draw from a distribution that was made outside the program, in single precision, is one in the fit's dtype:
      chains and guides put values of that dtype in its place in any case.
    * A latent site with the flat prior `ImproperUniform`, which has no draws, takes the image of zero in its support.
    * Labels are integers or booleans as a rule, and torch's Bernoulli computes with floats alone. A site draws values
      of one dtype (integers where they are indices, as of a Categorical), and the program has to cope with that one in
      any case: observed values are cast to it. Floats stay as they are.

    Entered before all other handlers, it is the last to see a statement on its way in.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["done"] or msg["is_observed"] or msg["value"] is not None) and _undrawn(msg["fn"]):
            msg["value"], msg["done"] = _plausible(msg["fn"]), True
        if is_subsample(msg) or not (msg["is_observed"] or msg["infer"].get("was_observed")):
            return
        if _is_deterministic(msg["fn"], msg["value"]):
            msg["infer"]["_deterministic"] = True
        value = msg["value"]
        if msg["is_observed"] and isinstance(value, bool | int | float | list | tuple | np.generic | np.ndarray):
            value = msg["value"] = _as_tensor(value, msg["fn"])
        if msg["is_observed"] and isinstance(value, Tensor) and not value.dtype.is_floating_point:
            dtype = _drawn_dtype(msg["fn"])
            msg["value"] = value if dtype is None else value.to(dtype)

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor) and value.dtype is torch.float32 and not msg["is_observed"]:
            msg["value"] = value.to(torch.get_default_dtype())


def innermost(fn: Any) -> Any:
    """The distribution inside all wrappers: independent, masked, expanded, mixture, hidden Markov."""
    for name in _INNER:
        inner = getattr(fn, name, None)
        if inner is not None:
            return innermost(inner)
    return fn


def is_flat(fn: Any) -> bool:
    """Whether a distribution is flat, wrapped or transformed: it has no draws, whatever value is put in their place."""
    return isinstance(innermost(fn), dist.ImproperUniform)


def _undrawn(fn: Any) -> bool:
    return is_flat(fn) and type(innermost(fn)).sample is dist.ImproperUniform.sample


def _plausible(fn: Any) -> Tensor:
    """Where algorithms begin; what would pass such values off as draws refuses them."""
    transform = biject_to(fn.support)
    value: Tensor = transform(torch.zeros(transform.inverse_shape(fn.shape())))
    return value


def _is_deterministic(fn: Any, value: Any) -> bool:
    masked = False
    while not isinstance(fn, dist.Delta):
        masked = masked or (isinstance(fn, dist.MaskedDistribution) and fn._mask is False)
        fn = getattr(fn, "base_dist", None)
        if fn is None:
            return False
    return masked or (isinstance(value, Tensor) and _same_memory(fn.v, value))


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether one is the other, perhaps expanded by a plate; equal numbers may be an observation that fits exactly."""
    if one is other:
        return True
    try:
        return one.data_ptr() == other.data_ptr() and one.numel() > 0
    except RuntimeError:  # inside torch.vmap, where a Delta at its own value counts nothing either way
        return False


def _as_tensor(value: Any, fn: Any) -> Tensor:
    """A constant is observed at every row of its site; arrays keep their shape, which is checked."""
    tensor = torch.as_tensor(value)
    if tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    return tensor if tensor.dim() or fn.event_dim else tensor.expand(fn.batch_shape)


def _drawn_dtype(fn: Any) -> torch.dtype | None:
    """None for a distribution of the user's own, which knows what it takes."""
    inner = innermost(fn)
    if type(inner).__module__.split(".")[0] not in ("torch", "pyro"):
        return None
    if isinstance(inner, dist.Delta):
        return inner.v.dtype
    return torch.long if isinstance(inner, torch.distributions.Categorical) else torch.get_default_dtype()
