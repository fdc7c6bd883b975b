"""The table of sites that a dry run makes, and what follows from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

__all__ = ["ProgramInfo", "Site"]


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

    >>> import torch, ppl_gen as pg, pyro, pyro.distributions as dist
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
