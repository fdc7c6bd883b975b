"""Checks of a traced program: its densities, its data plate, and whether guide and model match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import broadcast_shape

from ppl_gen.data.batching import Batch
from ppl_gen.data.calls import may_be_data
from ppl_gen.errors import IncompatibleError
from ppl_gen.handlers.read_sites import innermost
from ppl_gen.handlers.sites import is_deterministic, sample_nodes
from ppl_gen.program.mixed import speaks_of_dtypes

if TYPE_CHECKING:
    from ppl_gen.program.info import ProgramInfo, Site

__all__ = ["OutsideSupportError", "check_densities", "check_observed", "check_reparameterised", "require_enumerable"]


class OutsideSupportError(ValueError):
    """An observed value is impossible at the values of the latent sites that were drawn."""


def check_densities(trace: poutine.Trace) -> None:
    """Evaluate every site by itself, so that an error names it; raises ValueError or TypeError."""
    for _, node in sample_nodes(trace):
        _check_log_prob_shape(node)


def _check_log_prob_shape(node: dict[str, Any]) -> None:
    """Implicit programs have no log density to check."""
    fn, value = node["fn"], node["value"]
    if is_deterministic(node):
        return
    if isinstance(fn, dist.Delta) or "Delta" in type(getattr(fn, "base_dist", fn)).__name__:
        if tuple(fn.shape()) != tuple(value.shape):
            raise ValueError(f"at site {node['name']!r}: value {tuple(value.shape)}, distribution {tuple(fn.shape())}")
        return
    sizes = {f.dim: f.size for f in node["cond_indep_stack"] if f.vectorized}
    expected = [sizes.get(-k, 1) for k in range(max((-d for d in sizes), default=0), 0, -1)]
    weights = [w.shape for w in (node["mask"], node["scale"]) if isinstance(w, torch.Tensor)]
    try:
        actual = list(broadcast_shape(fn.batch_shape, value.shape[: value.dim() - fn.event_dim], *weights))
    except ValueError as error:
        raise ValueError(
            f"at site {node['name']!r}: shape mismatch: the value has shape {tuple(value.shape)}, but the distribution "
            f"has batch shape {tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}"
            + "".join(f", and a mask or scale has shape {tuple(shape)}" for shape in weights)
        ) from error
    while len(actual) > len(expected) and actual[0] == 1:
        actual = actual[1:]
    padded = [1] * (len(expected) - len(actual)) + actual
    expected = [a if e == -1 else e for a, e in zip(padded, expected, strict=False)]  # a plate without a size
    if any(a not in (1, e) for a, e in zip(padded, expected, strict=False)) or len(actual) > len(expected):
        raise ValueError(
            f"at site {node['name']!r}: invalid log_prob shape: expected {expected} (its plates), actual {actual}; "
            f"value {tuple(value.shape)}, batch shape {tuple(fn.batch_shape)}, event shape {tuple(fn.event_shape)}"
        )
    if node["is_observed"]:
        _check_support(node)
    else:
        _check_dtypes(node)


def _check_dtypes(node: dict[str, Any]) -> None:
    """A prior made outside in another dtype draws, and has no density at the values that algorithms try."""
    parts = [part for part in vars(innermost(node["fn"])).values() if isinstance(part, torch.Tensor)]
    if any(part.is_floating_point() and part.dtype is not node["value"].dtype for part in parts):
        try:
            node["fn"].log_prob(node["value"])
        except RuntimeError as error:
            if speaks_of_dtypes(error):
                raise RuntimeError(f"at site {node['name']!r}: {error}") from error


def _check_support(node: dict[str, Any]) -> None:
    """Torch checks observed values when a density is taken, and does not know the name of the site."""
    try:
        node["fn"].log_prob(node["value"])
    except IncompatibleError:  # a distribution without a normalised density says so by itself when one is asked for
        return
    except ValueError as error:
        text = str(error).splitlines()[0].removesuffix(", but found invalid values:")
        said = f"at site {node['name']!r}: {text}; observed values lie outside{_of_grey(node)}"
        raise OutsideSupportError(said) from error
    except (KeyError, NotImplementedError, RuntimeError) as error:
        _refuse_one_way(node, error)
        dtype = node["value"].dtype
        if dtype.is_floating_point or not str(error):  # torch's own for no density at all has no words
            raise
        raise TypeError(
            f"at site {node['name']!r}: observed values are {_spoken(dtype)}, with which its distribution cannot "
            "compute; pass numbers, x.float()"
        ) from error


def _of_grey(node: dict[str, Any]) -> str:
    """What to do with grey values, which Pyro gives a Bernoulli without a word once its validation is off."""
    value, kind = node["value"], type(innermost(node["fn"])).__name__
    if not bool(((value >= 0) & (value <= 1)).all()):
        return ""
    if kind == "ChainRows":
        return ": make them zeros and ones, (x > 0.5).float() or torch.bernoulli(x)"
    if "Bernoulli" not in kind:
        return ""
    return (
        ": make them zeros and ones, (x > 0.5).float() or torch.bernoulli(x); or take dist.ContinuousBernoulli, a "
        f"density of grey values; or say dist.{kind}(..., validate_args=False) for the cross-entropy as it is"
    )


def _refuse_one_way(node: dict[str, Any], error: Exception) -> None:
    """A flow that knows the density of its own last draw alone has none for a value that was observed."""
    from ppl_gen.handlers.sites import transforms_of

    flows = ", ".join(dict.fromkeys(type(t).__name__ for t in transforms_of(node["fn"])))
    if flows and isinstance(error, KeyError | NotImplementedError):
        raise ValueError(
            f"at site {node['name']!r}: it goes through {flows}, which has no inverse, so that an observed value has "
            "no density; take a flow with an inverse (affine_coupling, affine_autoregressive, spline), or leave this "
            "one to a guide"
        ) from error


def _spoken(dtype: torch.dtype) -> str:
    return "booleans" if dtype is torch.bool else f"integers ({dtype})"


#: The trace of a program on fewer rows and how many these are, made when first asked for; None where it does not run.


def check_reparameterised(sites: dict[str, Site]) -> None:
    """Raise ValueError for a reparameterised observation whose density would lack the Jacobian of its transform.

    `pyro.infer.reparam` then observes T^-1(y) at ``<name>_decentered`` or ``<name>_base`` and counts that alone.
    """
    for name, site in sites.items():
        inner = [sites[n] for suffix in ("decentered", "base") if (n := f"{name}_{suffix}") in sites]
        if site.kind == "deterministic" and any(part.kind == "observed" for part in inner):
            raise ValueError(
                f"at site {name!r}: an observed site is reparameterised, and Pyro leaves the Jacobian of that out of "
                f"its density; take {name!r} out of the config of poutine.reparam, which is for latent sites"
            )


def require_enumerable(info: ProgramInfo, names: Sequence[str]) -> None:
    """Raise IncompatibleError, saying why, if the finite sites ``names`` cannot be summed out."""
    if names and info.unenumerable:
        raise IncompatibleError(
            f"{info.name!r}: nothing draws {', '.join(names)}, and they cannot be summed out: {info.unenumerable}. Or "
            "draw them in a guide"
        )


def check_observed(info: ProgramInfo, batch: Batch) -> None:
    """Raise ValueError if there are data and no site is observed: then they never reach the likelihood."""
    given = any(map(may_be_data, [*batch.args, *batch.kwargs.values()]))  # without data, the sites are the target
    if given and not info.select(kind="observed") and not info.select(kind="factor"):
        raise ValueError(
            f"no site of {info.name!r} is observed, so the data never reach the likelihood: write "
            "pyro.sample(..., obs=x) at the site that generates the data"
        )
