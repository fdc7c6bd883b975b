"""Names that a fit could be made of and not be exported with: refused before anything is learned."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ppl_gen.program.info import Site

__all__ = ["check_names"]

_KEPT = ("chain", "draw")  # dimensions of every sampled variable, in ArviZ and in netCDF files


def check_names(sites: Mapping[str, Site], entries: Collection[str]) -> None:
    """Raise ValueError for a site, a plate or an entry of the data whose name `Fit.to_arviz` and `Fit.save` cannot use.

    Names of ArviZ's own dimensions; two that become one when ``/``, which netCDF keeps for groups, is written ``.``;
    one that an axis of another variable bears (``z_dim_0``); what is no name.
    """
    plates = {plate for site in sites.values() for plate in site.plates}
    named = [*(("site", n) for n in sites), *(("plate", n) for n in sorted(plates)), *(("entry", n) for n in entries)]
    for kind, name in named:
        if name in _KEPT:
            raise ValueError(
                f"the {kind} {name!r} has a name that ArviZ reserves for the draws, so the fit could not be exported "
                f"or saved; rename the {kind}"
            )
        if not name.strip(" .") or "\0" in name:
            raise ValueError(f"the {kind} {name!r} has no name that a fit can be saved under; rename the {kind}")
    _check_written_alike([*dict.fromkeys([*sites, *entries])])
    axes = {axis: name for name, site in sites.items() for axis in _axes(name, site)}
    for name in (*sites, *entries):
        if (other := axes.get(name.replace("/", "."))) is not None:
            raise ValueError(
                f"the site {name!r} has the name that an axis of {other!r} gets when the fit is exported; rename it"
            )


def _check_written_alike(names: Collection[str]) -> None:
    written: dict[str, str] = {}
    for name in names:
        other = written.setdefault(name.replace("/", "."), name)
        if other != name:
            raise ValueError(
                f"the sites {other!r} and {name!r} become one name in a file, where '/' is written '.'; rename either"
            )


def _axes(name: str, site: Site) -> list[str]:
    """The names of those axes of a site that no plate names."""
    axes = range(len(site.plates), len(site.batch_shape) + len(site.event_shape))
    return [f"{name.replace('/', '.')}_dim_{i}" for i in axes]
