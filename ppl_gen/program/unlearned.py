r"""Latent sites that no other density depends on: predictions rather than unknowns.

.. math:: \int p(x, z, \tilde y) \, d\tilde y = p(x, z) \int p(\tilde y \mid z) \, d\tilde y = p(x, z):

no algorithm has to learn such a site, and its posterior is its own distribution at each draw of the others. The rows
that `obs_mask` leaves out of an outcome are of this kind, unless something else depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.ops.provenance import get_provenance
from torch import Tensor
from torch.distributions import biject_to

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.handlers.followed import Followed
from ppl_gen.handlers.hidden import Hidden, Unmasked
from ppl_gen.handlers.sites import is_deterministic, is_subsample
from ppl_gen.handlers.substitute import Substitute
from ppl_gen.program.idle import idle_where_masked
from ppl_gen.workspace.isolation import validation_off

if TYPE_CHECKING:
    from ppl_gen.program.info import ProgramInfo

__all__ = ["joint", "leaves", "predictions", "read_whole", "responds"]

_STATES = 16  # values of a finite site that are all tried; of more, two


def predictions(model: Callable[..., Any], batch: Batch, info: ProgramInfo) -> list[str]:
    """The latent sites of a program that nothing needs to learn; none where that cannot be determined."""
    names = [site.name for site in info.select() if not site.improper]
    informed = info.select(kind="observed") or info.select(kind="factor")
    if not names or not informed or "density" not in info.offers or "time steps" in info.offers:
        return []
    found = leaves(model, batch, names, sure=True)
    nothing_else = len(found) == len(info.select()) and "no free parameters" in info.offers
    return [] if nothing_else else found  # a fit of such a program is one of its prior


def joint(model: Callable[..., Any], info: ProgramInfo) -> Callable[..., Any]:
    """``model`` as a density of what is to be learned: predictions left out, each latent site with its whole density.

    Raises nothing; where there is nothing to change it is ``model`` itself.
    """
    if info.predicted:
        model = Hidden(info.predicted)(model)
    partly = [f"{name}_unobserved" for name in info.partly_observed]
    latent = [name for name in partly if info.sites[name].latent]
    guided = info.guide_sites or {}
    latent += [s.name for s in info.select() if s.idle and not (s.name in guided and guided[s.name].under_mask)]
    return Unmasked(latent)(model) if latent else model


def read_whole(
    model: Callable[..., Any], batch: Batch, info: ProgramInfo, values: Mapping[str, Tensor]
) -> Callable[..., Any]:
    """``model`` with whole densities at sites that are idle under the masks of these rows, as `joint` for its own."""
    if not any(site.under_mask for site in info.select()):
        return model
    with Substitute(values):
        trace = poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
    idle = idle_where_masked(model, batch, trace)
    return Unmasked(idle)(model) if idle else model


def leaves(
    model: Callable[..., Any],
    batch: Batch,
    names: Sequence[str],
    values: Mapping[str, Tensor] | None = None,
    *,
    sure: bool = False,
) -> list[str]:
    """Those of the latent sites ``names`` on whose values no density depends, other such sites apart.

    Two tests, and a leaf passes both. Values are followed through the operations of the program: a density that is
    computed from a site's value depends on it, even where it is level. And the program is run with the site's value
    changed, which shows what branches on it. ``values`` fixes what is known; ``sure`` finds nothing where values
    cannot be followed.
    """
    followed = _unread(model, batch, names, values or {})
    candidates = ([] if sure else list(names)) if followed is None else followed
    if not candidates:
        return []
    found: list[str] = []
    base = _trace(model, batch, values or {})
    candidates = [name for name in candidates if name in base.nodes and not base.nodes[name]["is_observed"]]
    while True:
        more = [n for n in candidates if n not in found and not _matters(model, batch, base, n, found)]
        if not more:
            return [name for name in candidates if name in found]
        found += more


def _unread(
    model: Callable[..., Any], batch: Batch, names: Sequence[str], values: Mapping[str, Tensor]
) -> list[str] | None:
    """Those of ``names`` that no density is computed from, others of them apart; None where values are not followed."""
    try:
        with Followed():
            trace = _trace(model, batch, values)
        reads = {name: _read(node) for name, node in trace.nodes.items() if _counts(node)}
    except PROGRAM_ERRORS:
        return None
    found: set[str] = set()
    while more := {n for n in names if n not in found and not any(n in reads[m] for m in reads.keys() - found - {n})}:
        found |= more
    return [name for name in names if name in found]


def _counts(node: Any) -> bool:
    own = node["type"] == "sample" and not is_subsample(node)
    return own and not is_deterministic(node)


def _read(node: Any) -> frozenset[str]:
    """Names of the sites that a site's density is computed from."""
    found: frozenset[str] = get_provenance(node["fn"].log_prob(node["value"]))
    for part in _parameters(node["fn"]).values():
        found |= get_provenance(part)
    return found | get_provenance(node["mask"]) | get_provenance(node["scale"])


def _matters(model: Callable[..., Any], batch: Batch, base: poutine.Trace, name: str, ignored: Collection[str]) -> bool:
    fixed = {n: node["value"] for n, node in base.nodes.items() if node["type"] == "sample" and not node["is_observed"]}
    skipped = {name, *ignored}
    for other in _others(base.nodes[name]["fn"], base.nodes[name]["value"]):
        try:
            moved = _trace(model, batch, {**fixed, name: other})
        except PROGRAM_ERRORS:
            return True
        if _changed(base, moved, skipped):
            return True
    return False


def _changed(base: poutine.Trace, moved: poutine.Trace, skipped: Collection[str]) -> bool:
    if {n for n in moved.nodes if n not in skipped} != {n for n in base.nodes if n not in skipped}:
        return True
    return any(
        not _same(base.nodes[n], moved.nodes[n])
        for n, node in base.nodes.items()
        if n not in skipped and node["type"] == "sample" and not is_deterministic(node)
    )


def responds(model: Callable[..., Any], one: Batch, two: Batch) -> bool:
    """Whether any density of a program is another on ``two`` than on ``one``, latent sites at the same values."""
    base = _trace(model, one, {})
    fixed = {n: node["value"] for n, node in base.nodes.items() if node["type"] == "sample" and not node["is_observed"]}
    try:
        other = _trace(model, two, fixed)
    except PROGRAM_ERRORS:
        return True
    sites = [n for n, node in base.nodes.items() if _counts(node)]
    return sites != [n for n, node in other.nodes.items() if _counts(node)] or any(
        base.nodes[n]["is_observed"] != other.nodes[n]["is_observed"] or not _same(base.nodes[n], other.nodes[n])
        for n in sites
    )


def _same(one: Any, two: Any) -> bool:
    if is_subsample(one):
        return True
    value = one["value"]
    if one["is_observed"] and not torch.equal(torch.as_tensor(value), torch.as_tensor(two["value"])):
        return False
    if not _alike(_parameters(one["fn"]), _parameters(two["fn"])) or not _masked_alike(one["mask"], two["mask"]):
        return False
    first, second = _density(one, value), _density(two, value)
    return first.shape == second.shape and bool(torch.allclose(first, second, rtol=1e-5, atol=1e-6, equal_nan=True))


def _parameters(fn: Any) -> dict[str, Tensor]:
    """All tensors of a distribution: a density may be level at one value and yet depend on another site."""
    found: dict[str, Tensor] = {}
    for name, part in vars(fn).items():
        if isinstance(part, Tensor):
            found[name] = part
        elif isinstance(part, torch.distributions.Distribution):
            found |= {f"{name}.{inner}": value for inner, value in _parameters(part).items()}
    return found


def _alike(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether tensors that both hold are the same: logits and the like are there once they were asked for."""
    return all(
        one[n].shape == two[n].shape
        and bool(torch.allclose(one[n].double(), two[n].double(), rtol=1e-5, atol=1e-7, equal_nan=True))
        for n in one.keys() & two.keys()
    )


def _masked_alike(one: Any, two: Any) -> bool:
    """Densities may be level under a mask: a point mass has log density zero where its value is followed."""
    if one is None or two is None:
        return one is two
    return torch.equal(torch.as_tensor(one), torch.as_tensor(two))


def _density(node: Any, value: Any) -> Tensor:
    with validation_off():  # values that are impossible where the prior happened to be drawn
        found: Tensor = node["fn"].log_prob(value)
    mask = node["mask"]
    return found if mask is None else torch.where(torch.as_tensor(mask), found, torch.zeros_like(found))


def _others(fn: Any, value: Tensor) -> Iterator[Tensor]:
    """Other values of the support, different in every entry where there is another; what branches may look at any."""
    if getattr(fn.support, "is_discrete", False):
        if not fn.has_enumerate_support:
            yield from (value + 1, value + 10)
            return
        states = fn.enumerate_support(expand=True)
        event = tuple(range(value.dim() - len(fn.event_shape), value.dim()))
        for state, following in zip(states[-1:] if len(states) > _STATES else states, states.roll(1, 0), strict=False):
            here = (value == state).all(event, keepdim=True) if event else value == state
            yield torch.where(here, following, state)
        return
    transform = biject_to(fn.support)
    part = transform.inv(value).nan_to_num(0.0, 3.0, -3.0)
    by = 0.5 + torch.rand_like(part)
    yield from (transform(moved) for moved in (part + by, part - by, -part - by.copysign(part), part + 5 * by))


def _trace(model: Callable[..., Any], batch: Batch, values: Mapping[str, Tensor]) -> poutine.Trace:
    with Substitute(values):
        return poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
