"""The evidence of a program with an energy: rows by the energy, log Z by annealing, other latents by the guide."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch, Dataset
from ppl_gen.errors import IncompatibleError
from ppl_gen.evidence.annealed import AIS, LogPartition, log_partition
from ppl_gen.evidence.estimates import Evidence, row_evidence
from ppl_gen.handlers.normalised import normalised

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit
    from ppl_gen.program.extensions import Energy
    from ppl_gen.program.program import Program

__all__ = ["energy_evidence", "has_energy"]


def has_energy(program: Program) -> bool:
    """Whether log Z can be enumerated, and stands between an energy and the evidence."""
    return program.evidence is None and program.energy is not None and program.energy.log_partition is not None


def energy_evidence(fit: Fit, data: Dataset, method: Any, *, seed: int | None = None, **settings: int) -> Evidence:
    """log p(x) per row with log Z by annealed importance sampling, or by enumeration where ``method`` is None.

    Raises:
        TypeError: for a method that is no `AIS`.
        IncompatibleError: for a program without an energy, or one that offers no tempering or has no finite normaliser.
    """
    energy = fit.program.energy
    if method is None:
        assert energy is not None and energy.log_partition is not None
        with fit.bound(seed):
            value = float(energy.log_partition())
        return _evidence(fit, data, energy, LogPartition(value, 0.0, None, None, exact=value), seed, settings)
    if not isinstance(method, AIS):
        raise TypeError(f"method: expected pg.AIS(...) or None, got {method!r}")
    if energy is None or energy.tempering is None:
        what = "no energy" if energy is None else "an energy without `tempering`, which says where annealing begins"
        raise IncompatibleError(
            f"method: the program {fit.program.name!r} has {what}; AIS estimates the normaliser of an energy. Leave "
            "method out"
        )
    with fit.bound(seed):
        path = energy.tempering()
        if path.improper is not None and path.improper():
            raise IncompatibleError(
                f"the energy of {fit.program.name!r} does not grow far from the data, so that its normaliser is "
                "infinite and it is no density; take tail= a number, or a network that grows in every direction"
            )
        found = log_partition(path, method, _training_rows(fit, energy, method.chains))
    return _evidence(fit, data, energy, found, seed, settings)


def _evidence(
    fit: Fit, data: Dataset, energy: Energy, found: LogPartition, seed: int | None, settings: dict[str, int]
) -> Evidence:
    model = normalised(fit.program.model, energy.site, energy.free_energy, found.value)
    program = replace(fit.program, model=model, energy=None, evidence=None)
    known = replace(fit, program=program, info=replace(fit.info, offers=fit.info.offers | {"density"}))
    rows = row_evidence(known, data, seed=seed, **settings)
    parts = ["variational lower bound"] if energy.bound else []
    parts += [] if rows.kind == "exact" else [rows.kind]
    if found.exact is not None and found.forward == found.exact:
        kind = "; ".join([*parts, "log Z by enumeration"])
        return replace(rows, kind=kind, log_partition=found)
    how = f"log Z {found.forward:.2f} +- {found.forward_stderr:.2g} by annealing"
    if found.reverse is not None and found.reverse_stderr is not None:
        how += f", {found.reverse:.2f} +- {found.reverse_stderr:.2g} in reverse"
    if found.doubt:
        how += f", not to be trusted: {found.doubt}"
        how += "" if found.exact is None else f"; log Z {found.exact:.2f} by enumeration is taken"
    mc = math.hypot(rows.mc_stderr, found.stderr)
    return replace(rows, kind="; ".join(["ais", *parts, how]), exact=False, mc_stderr=mc, log_partition=found)


def _training_rows(fit: Fit, energy: Energy, count: int) -> Tensor | None:
    """What the site of the energy holds for rows spread over the training data; inside ``fit.bound()``."""
    trace = poutine.trace(fit.program.model).get_trace
    batch = _some(fit.data, count)
    if fit.info.sites[energy.site].kind == "observed":
        value: Tensor = trace(*batch.args, **batch.kwargs).nodes[energy.site]["value"]
        return value
    if fit.guide is None:
        return None
    guided = poutine.trace(fit.guide).get_trace(*batch.args, **batch.kwargs)
    return guided.nodes[energy.site]["value"] if energy.site in guided.nodes else None


def _some(data: Dataset, count: int) -> Batch:
    if data.streamed or data.rows is None:
        return data.glimpse()
    return data.batch(torch.linspace(0, data.rows - 1, min(count, data.rows), device="cpu").long())
