"""What a site of a trace is, and what of its density counts: words of Pyro that are not public, read in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.errors import IncompatibleError

__all__ = [
    "in_plate",
    "is_deterministic",
    "is_sample",
    "is_subsample",
    "log_density",
    "nothing",
    "own_scale",
    "parallel",
    "sample_nodes",
    "scaled",
    "support",
    "transforms_of",
]


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


def is_subsample(site: Mapping[str, Any]) -> bool:
    """Whether a site, or a message of one, is a plate's own choice of rows."""
    return type(site["fn"]).__name__ == "_Subsample"


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a sample site merely names a value (`pyro.deterministic`)."""
    return bool(site["infer"].get("_deterministic"))


def is_sample(site: Mapping[str, Any]) -> bool:
    """A sample site with a density: not a deterministic value, not the plate's own subsample."""
    return site["type"] == "sample" and not is_subsample(site) and not is_deterministic(site)


def in_plate(site: Mapping[str, Any], plate: str | None) -> bool:
    """Whether a site stands inside the plate of that name."""
    return any(frame.name == plate for frame in site["cond_indep_stack"])


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


def parallel(names: set[str], *, own: bool = False) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Marks sites to be enumerated; with ``own`` those that the user marked stay as they are, samples and expansion."""

    def configure(site: dict[str, Any]) -> dict[str, Any]:
        marked = own and site["infer"].get("enumerate") == "parallel"
        return {"enumerate": "parallel", "expand": False} if site["name"] in names and not marked else {}

    return configure


def sample_nodes(trace: poutine.Trace) -> list[tuple[str, dict[str, Any]]]:
    """The sample sites of a trace by name, those that merely name a value among them."""
    return [(name, node) for name, node in trace.nodes.items() if node["type"] == "sample" and not is_subsample(node)]


def support(site: Any) -> Tensor:
    """The values that a discrete site was enumerated over, first dim."""
    event = tuple(site["fn"].event_shape)
    value: Tensor = site["value"]
    return value.reshape(-1, *event)
