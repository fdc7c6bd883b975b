"""One traced dry run: sites, shapes, kinds, the data plate, and what the program offers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.handlers.picked import Picked
from ppl_gen.handlers.read_sites import is_flat
from ppl_gen.handlers.sites import is_deterministic, sample_nodes
from ppl_gen.handlers.whole_plates import whole_plates
from ppl_gen.program.checks import (
    check_plate,
    check_reparameterised,
    check_sizes,
    data_plate,
    explained,
    rows_outside,
    vectorised,
)
from ppl_gen.program.guide_checks import check_auxiliary, check_match
from ppl_gen.program.idle import idle_where_masked
from ppl_gen.program.only_summed import drawn_too
from ppl_gen.program.possible import checked_trace
from ppl_gen.program.program import Program, with_known_kwargs

__all__ = ["ProgramInfo", "Site", "dry_run"]


@dataclass(frozen=True)
class Site:
    """What the dry run saw of one sample site."""

    name: str
    kind: str  # latent | predicted (a latent site that nothing depends on) | observed | deterministic | factor
    distribution: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    plates: tuple[str, ...]
    local: bool
    discrete: bool
    finite: bool
    reparameterised: bool
    likelihood_free: bool
    support: Any
    improper: bool = False
    averaged: bool = True  # has a mean, which carries gradients where draws do not
    masked: bool = False  # by its statement, in some places and not in others
    under_mask: bool = False  # by its statement, whatever that hides
    idle: bool = False  # under a mask, and no density that counts depends on it where that hides it
    point: bool = False  # of a guide: always the same value, whatever else the guide draws
    plate_dims: tuple[int, ...] = ()  # of ``plates``, in their order

    @property
    def latent(self) -> bool:
        return self.kind == "latent"


@dataclass(frozen=True)
class ProgramInfo:
    """The site table of a program, and what follows from it.

    ``str(info)`` is the table that `pg.check` prints. ``sites`` by name, of which `select` gives some; ``data_plate``
    is the plate over the rows, at dimension ``plate_dim``; ``plate_nesting`` counts the dimensions that plates take,
    so that ``-1 - plate_nesting`` is free; ``finite_latents`` are summed out.

    >>> import ppl_gen as pg, pyro, pyro.distributions as dist
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> info = pg.check(model, torch.zeros(3))
    >>> [site.name for site in info.select(kind="observed", local=True)], info.data_plate, info.plate_nesting
    (['x'], 'data', 1)
    """

    name: str
    sites: dict[str, Site]
    guide_sites: dict[str, Site] | None
    params: dict[str, tuple[int, ...]]
    data_plate: str | None
    plate_dim: int | None
    plate_nesting: int
    rows: int | None
    offers: frozenset[str]
    unenumerable: str = ""  # why the finite latents cannot be summed out
    vectors: str = ""  # sites outside of every plate whose batch only some algorithms read as one draw
    undifferentiable: str = ""  # why no gradient flows from draws, although the types of the sites promise it
    coupled: str = ""  # why a plate over the rows is not the data plate
    inside: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)  # where the data are possible

    def select(self, *, kind: str = "latent", local: bool | None = None, discrete: bool | None = None) -> list[Site]:
        """Sites of one kind, optionally only those inside (outside) the data plate or (not) discrete."""
        return [
            site
            for site in self.sites.values()
            if site.kind == kind
            and (local is None or site.local == local)
            and (discrete is None or site.discrete == discrete)
        ]

    def refusing_sums(self, reason: str) -> ProgramInfo:
        """The same, if its finite latents cannot be summed out for a ``reason`` (with none, they can)."""
        if not reason:
            return self
        lost = {"finite local latents", "differentiable latents"}
        return replace(self, unenumerable=reason, offers=self.offers - lost)

    def refusing_gradients(self, reason: str) -> ProgramInfo:
        """The same, if draws carry no gradient for a ``reason`` (with none, they do as far as is known)."""
        if not reason:
            return self
        return replace(self, undifferentiable=reason, offers=self.offers - {"differentiable samples"})

    def rows_plate(self, sums: Sequence[str]) -> str | None:
        """The plate whose rows stay apart when ``sums`` are summed out; None where a global one ties them together."""
        return self.data_plate if all(self.sites[name].local for name in sums) else None

    def as_tried(self, earlier: ProgramInfo) -> ProgramInfo:
        """The same without the offers that were tried on an ``earlier`` look at the program, and did not hold."""
        return self.refusing_sums(earlier.unenumerable).refusing_gradients(earlier.undifferentiable)

    def lost(self, needs: Iterable[Collection[str]]) -> str:
        """Why the ``needs`` are not met, where an offer was tried and did not hold."""
        asked = {offer for need in needs for offer in need} - self.offers
        sums = self.unenumerable if asked & {"finite local latents", "differentiable latents"} else ""
        draws = self.undifferentiable if "differentiable samples" in asked else ""
        plate = self.coupled if asked & {"data plate", "finite local latents"} else ""
        return "; ".join(reason for reason in (sums, draws, plate) if reason)

    @property
    def predicted(self) -> list[str]:
        """Names of the latent sites that no other density depends on: drawn when they are asked for, never learned."""
        return [site.name for site in self.select(kind="predicted")]

    @property
    def partly_observed(self) -> list[str]:
        """Names of the sites that `obs_mask` splits into ``<name>_observed`` and ``<name>_unobserved``."""
        return [
            site.name
            for site in self.select(kind="deterministic")
            if (seen := self.sites.get(f"{site.name}_observed")) and seen.kind == "observed"
            if (rest := self.sites.get(f"{site.name}_unobserved")) and rest.kind in ("latent", "predicted")
        ]

    @property
    def halves(self) -> frozenset[str]:
        """Names of both halves of these: where nothing is observed they are draws of which the site takes one."""
        return frozenset(f"{name}_{half}" for name in self.partly_observed for half in ("observed", "unobserved"))

    def shown(self, name: str) -> str:
        """What the user calls an observed site: ``y`` for the half of it that `obs_mask` names ``y_observed``."""
        whole = name.removesuffix("_observed")
        return whole if whole in self.partly_observed else name

    @property
    def finite_latents(self) -> list[str]:
        """Names of the latent sites that can be summed out."""
        return [site.name for site in self.select(discrete=True) if site.finite]

    def __str__(self) -> str:
        header = ("site", "kind", "distribution", "batch", "event", "plates", "guide")
        rows = [header]
        for site in self.sites.values():
            in_guide = "" if self.guide_sites is None or not site.latent else _guide_cell(self.guide_sites, site)
            rows.append(
                (
                    site.name,
                    site.kind + (" (summed out)" if site.latent and site.finite and in_guide in ("", "-") else ""),
                    site.distribution,
                    str(list(site.batch_shape)),
                    str(list(site.event_shape)),
                    ", ".join(site.plates) or "-",
                    in_guide or "-",
                )
            )
        rows += [(name, "parameter", "", "", str(list(shape)), "", "") for name, shape in self.params.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        plate = (
            f"data plate {self.data_plate!r}{'' if self.rows is None else f' over {self.rows} rows'}"
            if self.data_plate
            else "no data plate: whole data only"
        )
        lines.append("offers: " + ", ".join(sorted(self.offers)))
        only = "one draw each for NUTS and EM; end them in .to_event(1) for SVI and CAVI"
        lines += [f"vectors outside of every plate: {self.vectors} ({only})"] if self.vectors else []
        lines += [f"not enumerable: {self.unenumerable}"] if self.unenumerable else []
        lines += [f"one row: {self.coupled}"] if self.coupled else []
        lines += [f"not differentiable: {self.undifferentiable}"] if self.undifferentiable else []
        return "\n".join([f"{self.name}: {plate}", *lines])

    def _repr_html_(self) -> str:
        from ppl_gen.program.display import info_html

        return info_html(self)


def _guide_cell(guide_sites: dict[str, Site], site: Site) -> str:
    return guide_sites[site.name].distribution if site.name in guide_sites else "-"


def dry_run(
    program: Program,
    batch: Batch,
    *,
    guide: Callable[..., Any] | None = None,
    fewer: Callable[[], Batch] | None = None,
    predicted: Collection[str] = (),
) -> ProgramInfo:
    """Run model (and guide) once on ``batch`` with full validation and describe what happened.

    ``fewer`` gives fewer rows of the same data, on which the program runs again where its shapes alone do not tell
    what follows the rows. ``predicted`` names latent sites that need not be learned: those that the guide draws
    nevertheless are latent sites like others.

    Raises:
        ValueError: for the usual plate and shape mistakes, naming the site and the edit that fixes it.
    """
    with drawn_too(program, batch), explained(program, batch, "model"), torch.no_grad():
        trace, inside = checked_trace(program.model, batch, program.start)
    if _sites_subsampled(trace):
        with whole_plates():
            return dry_run(program, batch, guide=guide, fewer=fewer, predicted=predicted)
    few = _on_fewer(program, fewer)
    plate, frames = data_plate(program, batch, trace, few), vectorised(trace)
    sites = {name: _site(name, node, plate) for name, node in sample_nodes(trace)}
    idle = idle_where_masked(program.model, batch, trace)
    sites = {name: replace(site, idle=name in idle) for name, site in sites.items()}
    frame = frames.get(plate)
    nesting = max((-f.dim for f in frames.values()), default=0)
    check_plate(batch, frame)
    check_sizes(batch, trace)
    if coupled := rows_outside(batch, sites, frame, few):
        plate, frame, sites = "", None, {name: replace(site, local=False) for name, site in sites.items()}
    check_reparameterised(sites)
    guide_sites = None
    if guide is None:
        sites = _predicting(sites, predicted)
    else:
        guide_trace = _traced(with_known_kwargs(guide), batch, program, what="guide")
        guide_sites = {name: _site(name, node, plate) for name, node in sample_nodes(guide_trace)}
        guide_sites = _with_points(
            guide_sites, guide_trace, lambda: _traced(with_known_kwargs(guide), batch, program, "guide")
        )
        auxiliary = {name for name, node in sample_nodes(guide_trace) if node["infer"].get("is_auxiliary")}
        sites = _predicting(sites, set(predicted) - set(guide_sites))
        check_match(program, sites, {k: v for k, v in guide_sites.items() if k not in auxiliary})
        check_auxiliary(program, guide_trace, guide_sites, auxiliary)
        guide_frames = [f for _, node in sample_nodes(guide_trace) for f in node["cond_indep_stack"] if f.vectorized]
        nesting = max([nesting, *(-f.dim for f in guide_frames)])
    params = {name: tuple(node["value"].shape) for name, node in trace.nodes.items() if node["type"] == "param"}
    free = [name for name in params if f"{name.removesuffix('_centered')}_decentered" not in sites]
    offers = _derived_offers(program, sites, frame is not None, bool(free))
    return ProgramInfo(
        program.name,
        sites,
        guide_sites,
        params,
        plate if frame is not None else None,
        None if frame is None else frame.dim,
        nesting,
        batch.rows,
        offers,
        coupled=coupled,
        inside=inside,
    )


def _sites_subsampled(trace: poutine.Trace) -> bool:
    """Whether a plate that is iterated over takes some of its rows: then each run has sites of its own."""
    frames = (frame for _, node in sample_nodes(trace) for frame in node["cond_indep_stack"])
    return any(not frame.vectorized and frame.full_size and frame.full_size != frame.size for frame in frames)


def _predicting(sites: dict[str, Site], names: Collection[str]) -> dict[str, Site]:
    return {n: replace(site, kind="predicted") if n in names and site.latent else site for n, site in sites.items()}


def _on_fewer(program: Program, fewer: Callable[[], Batch] | None) -> Callable[[], tuple[poutine.Trace, int] | None]:
    @cache
    def run() -> tuple[poutine.Trace, int] | None:
        if fewer is None or not (batch := fewer()).rows:
            return None
        try:
            with torch.no_grad():
                return poutine.trace(program.model).get_trace(*batch.args, **batch.kwargs), batch.rows
        except PROGRAM_ERRORS:
            return None

    return run


def _site(name: str, node: dict[str, Any], data_plate: str) -> Site:
    fn = node["fn"]
    base = fn
    while isinstance(base, dist.Independent | dist.MaskedDistribution | ExpandedDistribution | Picked):
        base = base.base_dist  # wrappers around what the user wrote
    deterministic = is_deterministic(node)
    kind = "deterministic" if deterministic else "observed" if node["is_observed"] else "latent"
    kind = "factor" if isinstance(base, dist.Unit) else kind
    frames = [f for f in sorted(node["cond_indep_stack"], key=lambda f: f.dim or 0) if f.vectorized]
    plates = tuple(f.name for f in frames)
    discrete = bool(getattr(fn.support, "is_discrete", False)) if _has_support(fn) else False
    return Site(
        name=name,
        kind=kind,
        distribution=type(base).__name__,
        batch_shape=tuple(fn.batch_shape),
        event_shape=tuple(fn.event_shape),
        plates=plates,
        local=data_plate in plates,
        discrete=discrete,
        finite=discrete and bool(fn.has_enumerate_support),
        reparameterised=bool(fn.has_rsample),
        likelihood_free=isinstance(base, dist.Delta) and not deterministic,
        support=fn.support if _has_support(fn) else None,
        improper=is_flat(fn) and kind == "latent",
        averaged=type(base).mean is not torch.distributions.Distribution.mean,
        under_mask=isinstance(node["mask"], torch.Tensor),
        masked=isinstance(node["mask"], torch.Tensor) and bool(node["mask"].any()) and not bool(node["mask"].all()),
        plate_dims=tuple(f.dim for f in frames),
    )


def _with_points(sites: dict[str, Site], first: poutine.Trace, again: Callable[[], poutine.Trace]) -> dict[str, Site]:
    """Mark the Deltas of a guide that are point masses: those at a value that no other run of the guide changes.

    Autoguides put a Delta at every site whose value they made of a draw at an auxiliary site; these move with it.
    """
    still = {name for name, site in sites.items() if site.likelihood_free}
    drawn = [site for name, site in sites.items() if name not in still]
    # Two runs tell continuous draws apart; draws of finite sites often coincide.
    for _ in range((5 if any(site.discrete for site in drawn) else 1) if drawn and still else 0):
        other = again()
        still = {n for n in still if n in other and _same(first.nodes[n]["value"], other.nodes[n]["value"])}
    return {name: replace(site, point=name in still) for name, site in sites.items()}


def _same(one: Any, other: Any) -> bool:
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return one.shape == other.shape and bool(torch.equal(one, other))


def _has_support(fn: Any) -> bool:
    try:
        return fn.support is not None
    except (NotImplementedError, AttributeError):
        return False


def _traced(function: Callable[..., Any], batch: Batch, program: Program, what: str = "model") -> poutine.Trace:
    with explained(program, batch, what), torch.no_grad():
        return checked_trace(function, batch)[0]


def _derived_offers(program: Program, sites: dict[str, Site], plate: bool, free: bool) -> frozenset[str]:
    latents = [site for site in sites.values() if site.latent]
    observed = [site for site in sites.values() if site.kind == "observed"]
    local = [site for site in latents if site.local]
    offers = {
        "density": program.energy is None and not any(site.likelihood_free for site in observed),
        "latent sites": bool(latents),
        "samples": bool(observed) and not any(site.improper for site in local),
        "differentiable samples": program.energy is None
        and bool(observed)
        and all(site.reparameterised for site in latents)
        and all(site.reparameterised or not site.discrete or site.support is not None for site in observed)
        and all(site.reparameterised or site.averaged for site in observed),
        "finite local latents": bool(local) and all(site.finite for site in local),
        "no free parameters": not free,
        "differentiable latents": bool(latents) and all(site.finite or not site.discrete for site in latents),
        "data plate": plate,
        **{offer: getattr(program, name) is not None for name, offer in program.offer_fields().items()},
    }
    return frozenset(name for name, held in offers.items() if held)
