"""What a notebook shows of a program, before and after it has met data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ppl_gen.program.offers import OFFERS
from ppl_gen.runtime.notebook import box, grid, note, pairs

if TYPE_CHECKING:
    from ppl_gen.program.info import ProgramInfo
    from ppl_gen.program.program import Program

__all__ = ["info_html", "meanings", "program_html"]


def program_html(program: Program) -> str:
    """A program before it has met data: what it declares, and what it does not.

    >>> from ppl_gen import Program
    >>> "EM steps" in program_html(Program(lambda x: None, name="mine"))
    True
    """
    fields = program.offer_fields()
    declared = [offer for name, offer in fields.items() if getattr(program, name) is not None]
    lacking = [offer for offer in fields.values() if offer not in declared]
    known = {"model", "name", "data_plate", *fields}
    others = [field.name for field in dataclasses.fields(program) if field.name not in known]
    brings = [name for name in others if not _absent(getattr(program, name))]
    if program.guide is not None:
        brings[brings.index("guide")] = f"guide ({getattr(program.guide, '__name__', type(program.guide).__name__)})"
    facts = {
        "declares": meanings(declared) or "nothing beyond its model",
        "does not declare": meanings(lacking) or "nothing: it declares all there is",
        "also brings": escape(", ".join(brings)) or "nothing",
        "rows in": f"the plate {escape(repr(program.data_plate))}",
    }
    text = "What else it offers is known once it has data: <code>pg.check(program, data)</code>."
    return box(f"Program {escape(program.name)}", pairs(facts), note(text))


def info_html(info: ProgramInfo) -> str:
    """What `pg.check` found: the site table, the offers and what is missing."""
    header = ("site", "kind", "distribution", "batch", "event", "plates", "guide")
    rows: list[Sequence[str]] = []
    for site in info.sites.values():
        partner = (info.guide_sites or {}).get(site.name) if site.latent else None
        summed = site.latent and site.finite and partner is None
        rows.append(
            (
                site.name,
                site.kind + (" (summed out)" if summed else ""),
                site.distribution,
                str(list(site.batch_shape)),
                str(list(site.event_shape)),
                ", ".join(site.plates) or "-",
                partner.distribution if partner is not None else "-",
            )
        )
    rows += [(name, "parameter", "", "", str(list(shape)), "", "") for name, shape in info.params.items()]
    plate = f"data plate {info.data_plate!r} over {info.rows} rows" if info.data_plate else "no data plate"
    facts = {
        "offers": meanings(offer for offer in OFFERS if offer in info.offers) or "nothing",
        "lacks": meanings(offer for offer in OFFERS if offer not in info.offers) or "nothing",
    }
    lost = {"not enumerable": info.unenumerable, "not differentiable": info.undifferentiable}
    warnings = "".join(note(escape(f"{what}: {why}")) for what, why in lost.items() if why)
    return box(escape(info.name), grid(header, rows, f"Sites; {plate}"), pairs(facts), warnings)


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and not value)


def meanings(offers: Iterable[str]) -> str:
    return ", ".join(f'<span title="{escape(OFFERS[offer])}">{escape(offer)}</span>' for offer in offers)
