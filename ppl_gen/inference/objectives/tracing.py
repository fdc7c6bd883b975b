"""Traces of guide and model on a batch, and what objectives read off their sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError
from ppl_gen.inference.objectives.base import RescalePlate, Setting

__all__ = [
    "divergence",
    "is_sample",
    "log_density",
    "nothing",
    "own_scale",
    "parallel",
    "scaled",
    "traces",
    "transforms_of",
    "weighed_alike",
]


def traces(setting: Setting, batch: Batch) -> tuple[poutine.Trace, poutine.Trace]:
    """Traces of the guide and of the model at its draws, on one batch, with the data plate rescaled by N / B.

    Log densities are computed when asked for: ``model.log_prob_sum()`` estimates that of all rows. Objectives are per
    row, so divide by ``batch.total``.
    """
    with RescalePlate(setting.info.data_plate, batch.total):
        guide = poutine.trace(setting.guide or nothing).get_trace(*batch.args, **batch.kwargs)
        model = poutine.trace(poutine.replay(setting.model, trace=guide)).get_trace(*batch.args, **batch.kwargs)
    return guide, model


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


def is_sample(site: dict[str, Any]) -> bool:
    """A sample site with a density: not a deterministic value, not the plate's own subsample."""
    return (
        site["type"] == "sample"
        and type(site["fn"]).__name__ != "_Subsample"
        and not site["infer"].get("_deterministic")
    )


def log_density(site: dict[str, Any]) -> Tensor:
    """The log density of a site at its value, in its batch shape.

    Raises:
        IncompatibleError: for a flow without an inverse (planar, radial, Sylvester, block-autoregressive, polynomial),
            which knows the density of the value that it drew last and of no other.
    """
    try:
        value: Tensor = site["fn"].log_prob(site["value"])
        return value
    except (KeyError, NotImplementedError) as error:
        flows = ", ".join(dict.fromkeys(type(t).__name__ for t in transforms_of(site["fn"])))
        if not flows:
            raise
        raise IncompatibleError(
            f"the site {site['name']!r} goes through {flows}, which has no inverse: it knows the density of the value "
            "that it drew last, and of no other. Give every site transforms of its own, each used once, and those that "
            "follow such a one cache_size=1; or take transforms with an inverse (affine_coupling, spline)"
        ) from error


def transforms_of(fn: Any) -> list[Any]:
    """The transforms of a distribution, those of its wrapped parts included."""
    found: list[Any] = []
    while fn is not None:
        for transform in getattr(fn, "transforms", ()):
            found += getattr(transform, "parts", [transform])
        fn = getattr(fn, "base_dist", None)
    return found


def own_scale(trace: poutine.Trace, plate: str | None) -> float:
    """N / B of a data plate that the program itself subsamples; 1 where it does not."""
    frames = (f for site in trace.nodes.values() for f in site.get("cond_indep_stack", ()) if f.name == plate)
    return next((f.full_size / f.size for f in frames if f.full_size), 1.0)


def scaled(value: Tensor, site: dict[str, Any]) -> Tensor:
    mask = site["mask"]
    if mask is not None:
        value = torch.where(torch.as_tensor(mask), value, value.new_zeros(())) if mask is not False else value * 0
    return value * site["scale"]


def divergence(q: Any, p: Any) -> Tensor:
    """KL(q || p) with event dimensions summed, in the broadcast batch shape."""
    reinterpreted = 0
    while isinstance(q, dist.Independent) and isinstance(p, dist.Independent):
        reinterpreted += q.reinterpreted_batch_ndims
        q, p = q.base_dist, p.base_dist
    return sum_rightmost(kl_divergence(q, p), reinterpreted)


def weighed_alike(q: dict[str, Any], p: dict[str, Any]) -> bool:
    """Same mask and scale on both sides: only then does one divergence stand for the difference of two densities."""
    scales = q["scale"], p["scale"]
    same = scales[0] is scales[1] or (all(isinstance(s, float | int) for s in scales) and scales[0] == scales[1])
    return same and q["mask"] is p["mask"]


def parallel(names: set[str], *, own: bool = False) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Marks sites to be enumerated; with ``own`` those that the user marked stay as they are, samples and expansion."""

    def configure(site: dict[str, Any]) -> dict[str, Any]:
        marked = own and site["infer"].get("enumerate") == "parallel"
        return {"enumerate": "parallel", "expand": False} if site["name"] in names and not marked else {}

    return configure
