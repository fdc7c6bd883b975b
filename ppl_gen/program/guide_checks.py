"""Checks of a traced guide against its model: the same latent sites, and auxiliary ones that become their values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pyro import poutine

from ppl_gen.errors import IncompatibleError
from ppl_gen.program.program import Program

if TYPE_CHECKING:
    from ppl_gen.program.info import ProgramInfo, Site

__all__ = ["check_auxiliary", "check_masked", "check_match"]


def check_match(program: Program, sites: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    latents = {site.name for site in sites.values() if site.latent}
    optional = {site.name for site in sites.values() if site.latent and site.finite}
    extra = sorted(set(guide_sites) - latents - {n for n, s in guide_sites.items() if s.kind == "deterministic"})
    observed = [name for name in extra if name in sites and sites[name].kind == "observed"]
    if observed:
        raise ValueError(
            f"model and guide of {program.name!r} do not match: site(s) {observed} are observed in the model and drawn "
            "in the guide, where they would enter the bound as if they were unknown; draw them only where they are not "
            "given, `if y is None:`"
        )
    missing = sorted(latents - optional - set(guide_sites))
    if extra or missing:
        raise ValueError(
            f"model and guide of {program.name!r} do not match: "
            + "; ".join(
                part
                for part in (
                    f"latent site(s) {missing} are in the model only" if missing else "",
                    f"site(s) {extra} are in the guide only" if extra else "",
                )
                if part
            )
            + ". Each latent site of the model needs a site of the same name in the guide (finite discrete ones may be "
            "left out: they are summed out)."
        )
    for name in sorted(set(guide_sites) & latents):
        model_site, guide_site = sites[name], guide_sites[name]
        if model_site.event_shape != guide_site.event_shape:
            raise ValueError(
                f"at site {name!r}: the model has event shape {model_site.event_shape}, the guide "
                f"{guide_site.event_shape}; use the same .to_event(...) on both sides"
            )
        if model_site.local != guide_site.local:
            inside, outside = ("model", "guide") if model_site.local else ("guide", "model")
            raise ValueError(
                f"at site {name!r}: inside the data plate in the {inside}, outside it in the {outside}; open "
                f"pyro.plate({program.data_plate!r}, len(x)) in both"
            )


def check_auxiliary(program: Program, trace: poutine.Trace, guide_sites: dict[str, Site], names: set[str]) -> None:
    """Raise ValueError for auxiliary sites of a guide whose numbers do not become the values of latent sites.

    Their density counts in q, which is right for the noise that a Delta at each latent site is made of, as in Pyro's
    autoguides. That of a mixture's label, say, would be counted against a model that knows nothing of it.
    """
    names = {name for name in names if not guide_sites[name].likelihood_free}  # a point has no density to count
    carried = [name for name, site in guide_sites.items() if site.likelihood_free and not site.point]
    sizes = [sum(torch.as_tensor(trace.nodes[n]["value"]).numel() for n in group) for group in (names, carried)]
    if sizes[0] > sizes[1]:
        raise ValueError(
            f"the guide of {program.name!r} draws {', '.join(sorted(names))} as auxiliary, and other sites from "
            "distributions that depend on it: its density would count in the bound, and the model has none to set "
            "against it. Sum it out in the guide (dist.MixtureSameFamily), or make the latent sites of its values, "
            "dist.Delta(f(u), log_density=...)"
        )


def check_masked(info: ProgramInfo, guide_sites: dict[str, Site] | None) -> None:
    """Raise IncompatibleError for latent sites under a mask that nothing on the side of the guide shares.

    Where a site is masked it has no density: chains run away, an autoguide's term stands alone, and a sum over a finite
    site counts each of its values as sure. A guide of the user's that draws it under the same mask is another matter.
    """
    halves = {f"{name}_unobserved" for name in info.partly_observed}
    drawn = guide_sites or {}
    bare = [s.name for s in info.select() if s.masked and not s.idle and s.name not in halves]
    bare = [name for name in bare if name not in drawn or not drawn[name].masked]
    if bare:
        raise IncompatibleError(
            f"the latent site(s) {', '.join(bare)} of {info.name!r} stand under a mask, and where it hides them they "
            "have no density: they are improper there, and summed out they count every value as sure. Put the observed "
            "statements alone under the mask: latent sites that nothing depends on there follow their prior, which "
            "integrates to one"
        )
