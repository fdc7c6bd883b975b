"""log p(x_i | theta_s) of rows, by row: how their latents, and what of them was not measured, are integrated out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.draws.predictive import amortised, run
from ppl_gen.enumeration.marginals import enumerated_trace, row_log_density
from ppl_gen.errors import IncompatibleError
from ppl_gen.handlers.local_particles import LocalParticles
from ppl_gen.handlers.sites import is_sample
from ppl_gen.inference.guides.resolved import point_sites
from ppl_gen.inference.objectives.base import require_per_row
from ppl_gen.program.unlearned import leaves
from ppl_gen.weights.chunks import Chunks
from ppl_gen.weights.densities import densities, of_each
from ppl_gen.weights.log_mean import LogMean
from ppl_gen.weights.particles import can_vectorise, of_particle
from ppl_gen.weights.weight_quality import WeightQuality
from ppl_gen.workspace.isolation import without_side_effects

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["RowIntegral", "row_integral", "warn_of_scales"]

Draws = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class RowIntegral:
    """What has to be done to the latents of rows like these to get the density of what was measured.

    ``fit`` is the fit with unmeasured sites among the latent ones; ``sums`` the finite sites that are summed out;
    ``drawn`` the continuous ones that particles stand for; ``missing`` the unmeasured sites, ``leaves`` those of them
    on which nothing depends: their density integrates to one, whatever value is put in.
    """

    fit: Fit
    offered: bool
    guide: Callable[..., Any] | None
    sums: tuple[str, ...]
    drawn: tuple[str, ...]
    missing: tuple[str, ...]
    leaves: tuple[str, ...]
    quality: WeightQuality = field(compare=False)
    chunks: list[Chunks] = field(compare=False, default_factory=list)  # made with the first batch

    @property
    def sampled(self) -> bool:
        """Whether particles take part."""
        return bool(self.drawn) and not self.offered

    def __call__(self, batch: Batch, thetas: Draws, particles: int) -> tuple[Tensor, Tensor]:
        """Row densities (draws x rows, nats), and the Monte Carlo variance (rows) that particles leave in the mean."""
        if self.offered:
            found = torch.stack([_closed_form(self.fit, batch, theta) for theta in thetas])
            return found, torch.zeros_like(found[0])
        if self.leaves:  # one value for all, as the density does not depend on it
            nodes = run(self.fit, batch, thetas[0]).nodes
            idle = {name: nodes[name]["value"] for name in self.leaves}
            thetas = [{**theta, **idle} for theta in thetas]
        if not self.drawn:
            per_draw, _ = densities(self.fit, batch, thetas)
            return per_draw, torch.zeros_like(per_draw[0])
        means: list[LogMean] = [LogMean() for _ in thetas]
        columns: list[Tensor] = []
        kept: Tensor | None = None
        for place, weights in self._weights(batch, thetas, particles):
            means[place].add(weights)
            kept = self.quality.kept(weights.shape[1]) if kept is None else kept
            columns.append(weights[:, kept.to(weights.device)])
        self.quality.take(LogMean().join(means), torch.cat(columns))
        per_draw = torch.stack([mean.value for mean in means])
        spread = torch.stack([mean.variance for mean in means])
        share = torch.softmax(per_draw, 0)
        return per_draw, (share**2 * spread).sum(0)

    def _weights(self, batch: Batch, thetas: Draws, particles: int) -> Iterator[tuple[int, Tensor]]:
        """The place of a draw of the globals, and log weights of particles of the latents, n x rows."""
        if self.guide is None and self.sums:
            return enumerate(_summed_particles(self, batch, thetas, particles))
        if not self.chunks or self.chunks[0].particles != particles:
            guided = set(self.fit.info.guide_sites or {}) if self.guide is not None else set()
            # Where the prior draws continuous sites beside a guide, it draws the finite ones too: their terms cancel.
            sums = self.sums if all(name in guided for name in self.drawn) else ()
            times = len(thetas) * max(1, self.quality.rows // (batch.rows or 1))
            self.chunks[:] = [Chunks(self.fit.joint, self.guide, self.fit.info, sums, particles, times)]
        return self.chunks[0](batch, thetas)


def row_integral(fit: Fit, batch: Batch, theta: Mapping[str, Tensor], rows: int) -> RowIntegral:
    """Look at one batch of the rows, at one draw of the globals; inside ``fit.bound()``.

    Raises:
        ValueError: if nothing is observed in them.
        IncompatibleError: for what was not measured in a program without a data plate, where something depends on it.
    """
    offered = fit.program.evidence is not None
    with without_side_effects():
        trace = run(fit, batch, theta)
        sites = [site.name for site in fit.info.sites.values() if site.kind in ("observed", "factor")]
        there = [name for name in sites if name in trace.nodes]
        if not any(trace.nodes[name]["is_observed"] for name in there):
            raise ValueError(
                f"data: none of the observed sites {sites} has a value in these data, so there is no evidence"
            )
        if fit.program.evidence is None:
            rest = {site.name for site in fit.info.sites.values() if site.local or site.kind == "observed"}
            warn_of_scales(fit, trace, "evidence", rest, stacklevel=4)
        missing = [name for name in there if not trace.nodes[name]["is_observed"]]
        idle = leaves(fit.joint, batch, missing, theta) if missing and not offered else []
    kinds = {
        name: "predicted" if name in idle else "latent" for name in missing
    }  # `Fit.joint` has no density of leaves
    unmeasured = {name: replace(fit.info.sites[name], kind=kind) for name, kind in kinds.items()}
    fit = replace(fit, info=replace(fit.info, sites={**fit.info.sites, **unmeasured}))
    free = [site for site in fit.info.select() if site.name not in idle and site.name not in theta]
    drawn = tuple(site.name for site in free if not site.finite and (site.local or site.name in missing))
    if drawn and fit.info.data_plate is None and not offered:
        raise IncompatibleError(
            f"data: {', '.join(drawn)} of {fit.program.name!r} was not measured, and the rest depends on it; the "
            "program has no data plate, so there are no rows to integrate it out of one by one"
        )
    guide = _proposal(fit) if drawn and not offered else None
    guided = set(fit.info.guide_sites or {}) if guide is not None else set()
    sums = tuple(site.name for site in free if site.finite and site.name not in guided)
    return RowIntegral(fit, offered, guide, sums, drawn, tuple(missing), tuple(idle), WeightQuality(rows))


def warn_of_scales(fit: Fit, trace: Any, asked: str, sites: Collection[str], *, stacklevel: int) -> None:
    """Plates are whole here: a scale that is left is one of the program's own."""
    nodes = [node for name, node in trace.nodes.items() if name in sites and is_sample(node)]
    scaled = [node["name"] for node in nodes if not bool((torch.as_tensor(node["scale"]) == 1).all())]
    if scaled:
        warnings.warn(
            f"{asked}: {fit.program.name!r} weighs {', '.join(scaled)} by a scale of its own (poutine.scale); what is "
            "given is that many times a log density, and no evidence to compare with that of other programs",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def _closed_form(fit: Fit, batch: Batch, theta: Mapping[str, Tensor]) -> Tensor:
    """The program's own log p(x), shape (rows,), nats, at values of its global sites where it has any."""
    assert fit.program.evidence is not None
    first = (theta,) if fit.info.select(local=False) else ()
    found: Any = fit.program.evidence(*first, *batch.args, **batch.kwargs)
    require_per_row("evidence: the function", found, batch.rows)
    value: Tensor = found
    return value


def _proposal(fit: Fit) -> Callable[..., Any] | None:
    """The guide where its local sites have densities and follow the rows; autoguides know training rows only."""
    points = point_sites(fit.info, local=True)
    return fit.guide if not points and amortised(fit) else None


def _summed_particles(integral: RowIntegral, batch: Batch, thetas: Draws, particles: int) -> Tensor:
    r"""log w, draws x particles x rows: continuous latents z drawn from the prior, finite ones summed on both sides.

    .. math:: w_i = \sum_k p(x_i, z_i, k) / \sum_k p(z_i, k),

    which has the right mean whichever of z and k depends on the other, and less spread than drawing k as well.
    """
    fit = integral.fit
    model, plate, nesting = fit.joint, fit.info.data_plate, fit.info.plate_nesting

    def weigh(values: Mapping[str, Tensor]) -> tuple[Tensor]:
        trace = enumerated_trace(
            model, batch.args, batch.kwargs, discrete=integral.sums, values=values, plate_nesting=nesting, varying=True
        )
        seen = [name for name, site in trace.nodes.items() if site["type"] == "sample" and site["is_observed"]]
        prior = row_log_density(trace, plate, without=[*seen, *integral.leaves])
        return (row_log_density(trace, plate, without=integral.leaves) - prior,)

    together = can_vectorise(model, None, fit.info, batch, ())
    places = [
        {**theta, **drawn}
        for theta in thetas
        for drawn in _from_prior(integral, batch, theta, particles, together=together)
    ]
    rows: Tensor = of_each(weigh, places, (batch.rows or 1) * 2 ** len(integral.sums))[0]
    return rows.reshape(len(thetas), particles, -1)


def _from_prior(
    integral: RowIntegral, batch: Batch, theta: Mapping[str, Tensor], particles: int, *, together: bool
) -> list[dict[str, Tensor]]:
    """Draws of the continuous latents of the rows, the finite ones that they may depend on drawn before them.

    One mapping for each particle, sites in the shapes that they have without particles.
    """
    fit, names = integral.fit, integral.drawn
    if not together:
        traces = (run(fit, batch, theta) for _ in range(particles))
        return [{name: trace.nodes[name]["value"] for name in names} for trace in traces]
    assert fit.info.data_plate is not None
    with LocalParticles(particles, fit.info.data_plate, fit.info.plate_nesting):
        nodes = run(fit, batch, theta).nodes
    return [{name: of_particle(nodes[name], k, fit.info) for name in names} for k in range(particles)]
