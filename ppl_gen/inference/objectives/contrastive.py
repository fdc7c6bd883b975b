"""Contrastive divergence: an energy is pushed down at the data and up at the end of a short Markov chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import require_flag, require_whole
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Setting
from ppl_gen.program.offers import Need

__all__ = ["ContrastiveDivergence"]


@dataclass(frozen=True)
class ContrastiveDivergence(Objective):
    r"""Mean free energy of the data minus that of rows which a Gibbs chain made.

    .. math:: \frac{1}{B} \sum_i F(x_i) - \frac{1}{C} \sum_c F(\tilde x_c), \qquad
              \nabla (-\log p(x)) = \nabla F(x) - \mathbb{E}_{\tilde x \sim p} \nabla F(\tilde x)

    The chain is not differentiated. The value is a surrogate, not a bound and not a likelihood: only its gradient
    means anything, it hovers about zero, and it must not be compared between fits. The gradient is that of -log p(x)
    if the chain has reached p, and biased if it has not (CD-k is the gradient of no function at all).

    CD-k (``persistent=False``) starts its chains at the rows of every batch. Persistent CD starts them once, at the
    rows of the first batch, and moves on from where the last update left them; they belong to one fit, and a fit that
    continues another (``start=``) begins new ones. They follow the program only while it changes slowly: let the
    learning rate fall towards zero (``SVI(schedule=...)``), or the fit gets worse where CD-k would have settled.

    The history holds ``free_energy`` (data), ``chain_free_energy`` and ``reconstruction_error``: entries of a row that
    one sweep from it changes, squared and summed.

    Args:
        steps: k, sweeps of the chain for every update.
        persistent: whether the chains outlive an update.
        chains: how many persistent chains; as many as the first batch has rows when None.

    Raises:
        ValueError: if ``steps`` or ``chains`` < 1, or ``chains`` is given although they are not persistent.

    References:
        Training products of experts by minimizing contrastive divergence (Hinton, 2002).
        Training restricted Boltzmann machines using approximations to the likelihood gradient (Tieleman, 2008).

    Example:
        >>> ContrastiveDivergence(steps=5)
        ContrastiveDivergence(steps=5, persistent=False, chains=None)
    """

    steps: int = 1
    persistent: bool = False
    chains: int | None = None

    uses_guide = False

    def __post_init__(self) -> None:
        require_whole("steps", self.steps)
        require_flag("persistent", self.persistent)
        if self.chains is not None:
            require_whole("chains", self.chains)
        if self.chains is not None and not self.persistent:
            raise ValueError("chains: without persistent=True each row of the batch has its own chain; leave it out")

    @property
    def needs(self) -> Sequence[Need]:
        return (("energy",),)

    def undivided(self, setting: Setting) -> str | None:
        return "contrastive divergence compares a batch with one set of chains that all its rows share"

    def build(self, setting: Setting) -> Game:
        return _ContrastiveGame(setting, self)


class _ContrastiveGame(Game):
    """One player; its state are the persistent chains."""

    def __init__(self, setting: Setting, objective: ContrastiveDivergence) -> None:
        assert setting.program.energy is not None
        self.energy, self.setting, self.objective = setting.program.energy, setting, objective
        site = setting.info.sites.get(self.energy.site)
        if site is None or site.kind != "observed":
            observed = [s.name for s in setting.info.select(kind="observed")]
            raise ValueError(
                f"energy: it is the energy of the site {self.energy.site!r}, which {setting.program.name!r} does not "
                f"observe (it observes {', '.join(observed)}); say Energy(..., site={observed[0]!r})"
            )
        how = "persistent" if objective.persistent else "started at the rows of each batch"
        self.notes = {"chain": f"{objective.steps} Gibbs sweep(s) per update, {how}"}

    def init(self, batch: Batch) -> GameState:
        """Persistent chains begin at rows of the batch: chains x shape of a row."""
        if not self.objective.persistent:
            return {}
        x = self._observed(batch)
        return {"chains": x[torch.arange(self.objective.chains or len(x), device=x.device) % len(x)]}

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        x = self._observed(batch)
        with torch.no_grad():
            once = self.energy.gibbs(x, 1)
            if self.objective.persistent:
                made = self.energy.gibbs(state["chains"], self.objective.steps)
                state = {"chains": made}
            else:
                made = self._further(once)
        data, chain = self.energy.free_energy(x).mean(), self.energy.free_energy(made).mean()
        error = (once - x).square().flatten(1).sum(1).mean()
        parts = {"free_energy": data.detach(), "chain_free_energy": chain.detach(), "reconstruction_error": error}
        return Loss(data - chain, parts), state

    def _observed(self, batch: Batch) -> Tensor:
        """The rows as the program sees them: it may have cast or reshaped what it was given."""
        trace = poutine.trace(self.setting.model).get_trace(*batch.args, **batch.kwargs)
        value: Tensor = trace.nodes[self.energy.site]["value"]
        return value.detach()

    def _further(self, once: Tensor) -> Tensor:
        return self.energy.gibbs(once, self.objective.steps - 1) if self.objective.steps > 1 else once
