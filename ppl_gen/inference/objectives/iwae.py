"""The importance-weighted bound: tighter than the ELBO with every particle, and a bound on every minibatch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError, require_whole
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.estimators import refuse_tied_rows
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Setting
from ppl_gen.program.checks import require_enumerable
from ppl_gen.program.offers import Need
from ppl_gen.weights.log_weights import global_draw
from ppl_gen.weights.particles import can_vectorise, local_log_weights

__all__ = ["IWAE"]


@dataclass(frozen=True)
class IWAE(Objective):
    r"""The importance-weighted bound, E log 1/K sum_k p(x, z_k) / q(z_k | x) <= log p(x).

    With local latents the logsumexp runs over K particles per row, and the plate scale N / B stands outside of it;
    global latents beside them are drawn once per step, outside. Without local latents it is the joint logsumexp over
    K draws of the globals; on a minibatch, where a joint weight would have to contain N / B and be no bound, the
    K draws are averaged instead (then it equals the ELBO with K particles; ``fit.notes`` says so).

    Particles are one more dimension on the left where the program allows it (a check on a dry run), and are drawn one
    by one where it does not (convolutions and batch norm refuse it, unless the network folds leading dimensions into
    its batch). The memory of a step grows linearly with K; with ``chunk`` it is that of ``chunk`` particles, and every
    chunk is computed twice, once more when its gradient is taken (running statistics of batch norm move twice).

    The joint logsumexp is no shortcut to the answer from far away: a guide that widens until one of its K draws comes
    near makes the bound almost tight, after which it narrows and moves slowly. Where the guide is the result, not the
    bound, start it with `ELBO`.

    Args:
        particles: K, at least 1 (1 is the ELBO).
        chunk: particles held in memory at a time; None: all of them.

    Raises:
        ValueError: if ``particles`` < 1 or ``chunk`` < 1.
        IncompatibleError: when built for a guide with a site that is not reparameterised: it would get no gradient.

    Source: Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders (2016).

    Example:
        >>> IWAE(particles=5)
        IWAE(particles=5, chunk=None)
    """

    particles: int = 5
    chunk: int | None = None

    def __post_init__(self) -> None:
        require_whole("particles", self.particles)
        if self.chunk is not None:
            require_whole("chunk", self.chunk)

    @property
    def needs(self) -> Sequence[Need]:
        return (("density",), ("latent sites",))

    def undivided(self, setting: Setting) -> str | None:
        if self.chunk is not None and self.chunk < self.particles:
            return "IWAE(chunk=...) draws every chunk twice, which needs the random numbers of one process"
        if not _draws_locals(setting) and not setting.minibatches:
            return "IWAE takes one logsumexp over draws of the global latents, with all rows inside of it"
        return None

    def build(self, setting: Setting) -> Game:
        sites = setting.info.guide_sites or {}
        stuck = [s for name, s in sites.items() if name in setting.info.sites and not s.reparameterised]
        if stuck:
            names = ", ".join(f"{site.name!r} ({site.distribution})" for site in stuck)
            raise IncompatibleError(
                f"IWAE gives no gradient to the guide's site(s) {names}: not reparameterised. Leave a finite discrete "
                "site out of the guide (it is summed out in the model), or use ELBO(), which sums it out in the guide "
                "or takes the score function."
            )
        game = _ImportanceGame(setting, self.particles, self.chunk or self.particles)
        refuse_tied_rows(setting, game.sums)
        return game


def _draws_locals(setting: Setting) -> bool:
    # A guide that maps one joint vector onto all sites (full rank, a flow) has no locals that could be drawn alone.
    return any(s.local and not s.likelihood_free for s in (setting.info.guide_sites or {}).values())


class _ImportanceGame(Game):
    def __init__(self, setting: Setting, particles: int, chunk: int) -> None:
        info = setting.info
        guided = set(info.guide_sites or {})
        self.setting, self.particles, self.chunk = setting, particles, min(chunk, particles)
        self.sums = tuple(n for n in info.finite_latents if n not in guided)
        require_enumerable(info, self.sums)
        self.local = _draws_locals(setting)
        self.globals = [site.name for site in info.select(local=False) if site.name in guided]
        self.vectorise = self.local and can_vectorise(setting.model, setting.guide, info, setting.probe, self.sums)
        inside = "per row, plate scale outside" if self.local else "joint over the global latents"
        if not self.local and setting.minibatches:
            inside = "none: global latents on minibatches are averaged (the ELBO with K particles)"
        self.notes = {"logsumexp": inside}
        if self.local:
            self.notes["particles"] = "vectorised" if self.vectorise else "unrolled"
        if self.sums:
            self.notes["gradients"] = f"summed out in the model: {', '.join(self.sums)}"

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        bound = self._per_row(batch) if self.local else self._joint(batch)
        return Loss(-bound / (batch.total or 1)), state

    def _per_row(self, batch: Batch) -> Tensor:
        """The bound of all rows, a scalar in nats, the logsumexp over particles taken row by row."""
        values: dict[str, Tensor] = {}
        log_q = torch.zeros(())
        if self.globals:
            values, log_q = global_draw(self.setting.guide, batch, self.setting.info)
        weights, outside, scale = self._weights(batch, values)
        rows = torch.logsumexp(weights, 0) - math.log(self.particles)
        return rows.sum() * (batch.rescale * scale) + outside - log_q

    def _weights(self, batch: Batch, values: dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        """log w, particles x rows; the globals' part, which no particle changes; N / B of a program that subsamples."""
        setting = self.setting

        def some(count: int, values: dict[str, Tensor]) -> tuple[Tensor, Tensor, float, Mapping[str, Tensor]]:
            weights = local_log_weights(
                setting.model,
                setting.guide,
                setting.info,
                batch,
                count,
                values=values,
                sums=self.sums,
                vectorise=self.vectorise,
            )
            assert weights.rows is not None
            return weights.rows, weights.globals, weights.scale, weights.subsample

        if self.chunk == self.particles:
            return some(self.particles, values)[:3]
        parts: list[Tensor] = []
        for first in range(0, self.particles, self.chunk):
            count = min(self.chunk, self.particles - first)
            rows, outside, scale, chosen = checkpoint(some, count, values, use_reentrant=False)
            parts.append(rows)
            values = {**values, **chosen}
        return torch.cat(parts), outside, scale

    def _joint(self, batch: Batch) -> Tensor:
        """The bound of all rows, a scalar in nats, from K joint weights."""
        model, guide, info = self.setting.model, self.setting.guide, self.setting.info
        joint = []
        for _ in range(self.particles):
            one = local_log_weights(model, guide, info, batch, 1, values={}, sums=self.sums, vectorise=False)
            rows = 0.0 if one.rows is None else one.rows.sum() * (batch.rescale * one.scale)
            joint.append(rows + one.globals)
        log_weights = torch.stack(joint)
        if batch.rows is not None and batch.total != batch.rows:
            return log_weights.mean()
        return torch.logsumexp(log_weights, 0) - math.log(self.particles)
