"""Finite sites at all of their values at once, in dims of their own, and given values at the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from ppl_gen.handlers.sites import is_subsample

__all__ = ["EnumerateSites"]


# Several torch kernels (CUDA's among them) refuse tensors of more dims.
_MOST_DIMS = 25


class EnumerateSites(EnumMessenger):
    """Pyro's enumeration for chosen sites, and given values for others; a latent site in neither group is an error."""

    def __init__(self, discrete: Collection[str] | None, values: Mapping[str, Tensor], plate_nesting: int) -> None:
        super().__init__(first_available_dim=-1 - plate_nesting)
        self.discrete, self.values, self.plate_nesting = discrete, values, plate_nesting

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if is_subsample(msg):
            if name in self.values:
                msg["value"], msg["done"] = self.values[name], True
            return
        for frame in msg["cond_indep_stack"]:
            if frame.vectorized and -frame.dim > self.plate_nesting:
                raise ValueError(
                    f"site '{name}' lies in plate '{frame.name}' at dim {frame.dim}, which plate_nesting="
                    f"{self.plate_nesting} leaves to enumeration; pass plate_nesting={-frame.dim} or more."
                )
        if msg["is_observed"] or msg["done"]:
            super()._pyro_sample(msg)
        elif name in self.values:
            msg["infer"].update(enumerate=None, given=True)
            super()._pyro_sample(msg)
            _check_event(name, msg["fn"], self.values[name])
            msg["value"], msg["done"] = self.values[name], True
        else:
            self._enumerate(name, msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        """Pyro's bookkeeping of which enumerated dims a value carries, without ``.data``, which torch.vmap refuses."""
        name, infer = msg["name"], msg["infer"]
        if name not in self._param_dims:
            return
        batch = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
        ids = infer.setdefault("_dim_to_id", {})
        ids.update(self._param_dims[name])
        self._value_dims[name] = {dim: i for dim, i in ids.items() if len(batch) >= -dim and batch[dim] > 1}

    def _enumerate(self, name: str, msg: Any) -> None:
        chosen = self.discrete is None or name in self.discrete
        fn = msg["fn"]
        if not chosen or not fn.has_enumerate_support:
            kind = type(getattr(fn, "base_dist", fn)).__name__
            if not chosen:
                reason = "is latent, is not among the discrete sites, and has no value"
            elif fn.has_rsample:
                reason = f"is continuous ({kind}) and has no value"
            else:
                reason = f"({kind}) has no finite support that could be enumerated"
            raise ValueError(
                f"site '{name}' {reason}. Give it a value; or, if it is discrete, write it with finite support: "
                "Categorical (a truncated table of probabilities in place of a Poisson), Bernoulli, OneHotCategorical "
                "or Binomial, with independent ones in a pyro.plate rather than .to_event()."
            )
        msg["infer"].update(enumerate="parallel", expand=False, num_samples=None)
        try:
            super()._pyro_sample(msg)
        except NotImplementedError as error:
            raise ValueError(f"site '{name}' cannot be enumerated: {error}. Write it as a Categorical.") from error
        if -msg["infer"]["_enumerate_dim"] > _MOST_DIMS:
            raise ValueError(
                f"site '{name}' needs tensor dim {-msg['infer']['_enumerate_dim']}, more than {_MOST_DIMS}: each "
                "discrete site takes a dim of its own. Write a time loop as `for t in pyro.markov(range(T))`, which "
                "reuses dims (the value at t may then depend only on that at t - 1), and independent sites in a "
                "vectorised pyro.plate."
            )


def _check_event(name: str, fn: Any, value: Any) -> None:
    event = tuple(fn.event_shape)
    if not isinstance(value, Tensor):
        raise TypeError(f"values['{name}'] must be a tensor; got {type(value).__name__}.")
    if tuple(value.shape[value.dim() - len(event) :]) != event:
        expected = ", ".join(["...", *map(str, event)])
        raise ValueError(f"values['{name}'] has shape {tuple(value.shape)}; expected ({expected}).")
