"""Contrastive divergence: an energy is pushed down at the data and up at the end of a short Markov chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError, require_flag, require_number, require_whole
from ppl_gen.inference.objectives.base import Objective, require_per_row
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Setting
from ppl_gen.program.extensions import Energy
from ppl_gen.program.offers import Need, require
from ppl_gen.workspace.isolation import without_side_effects

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

    Chains of one temperature stay in the mode they are in. With ``temperatures`` K every persistent chain is a ladder
    of K, at inverse temperatures 0 = b_1 < ... < b_K = 1 of the energy's `Tempering`; after every update neighbours
    swap states with probability min(1, f_b(x') f_b'(x) / f_b(x) f_b'(x')), and those at b = 1 stand for the program.
    It costs K times the sweeps. The history then holds ``swaps``, the share of swaps that were made; near zero, the
    ladder wants more steps.

    The history holds ``free_energy`` (data) and ``chain_free_energy``; where chains start at the rows of every batch,
    also ``reconstruction_error``: entries of a row that one sweep from it changes, squared and summed.

    Args:
        steps: k, sweeps of the chain for every update.
        persistent: whether the chains outlive an update.
        chains: how many persistent chains; as many as the first batch has rows when None.
        temperatures: K, at least 2, for persistent chains; None: one temperature.
        restart: probability with which a persistent chain begins anew, at b = 0 of the `Tempering`, at each update.

    Raises:
        ValueError: if ``steps`` or ``chains`` < 1, or what belongs to persistent chains is given although they are not.
        IncompatibleError: if the energy is that of a latent site, or has no `Tempering` although that is asked for.

    References:
        Training products of experts by minimizing contrastive divergence (Hinton, 2002).
        Training restricted Boltzmann machines using approximations to the likelihood gradient (Tieleman, 2008).
        Tempered Markov chain Monte Carlo for training of restricted Boltzmann machines (Desjardins et al., 2010).
        Implicit generation and modeling with energy-based models (Du and Mordatch, 2019), for restarts.

    Example:
        >>> ContrastiveDivergence(steps=5, persistent=True, temperatures=10).chains is None
        True
    """

    steps: int = 1
    persistent: bool = False
    chains: int | None = None
    temperatures: int | None = None
    restart: float = 0.0

    uses_guide = False

    def __post_init__(self) -> None:
        require_whole("steps", self.steps)
        require_flag("persistent", self.persistent)
        if self.chains is not None:
            require_whole("chains", self.chains)
        if self.chains is not None and not self.persistent:
            raise ValueError("chains: without persistent=True each row of the batch has its own chain; leave it out")
        if self.temperatures is not None:
            require_whole("temperatures", self.temperatures, 2)
        require_number("restart", self.restart, below=1.0)
        for name, given in (("temperatures", self.temperatures is not None), ("restart", self.restart > 0)):
            if given and not self.persistent:
                raise ValueError(f"{name}: chains that start at the rows of every batch have none; say persistent=True")

    @property
    def needs(self) -> Sequence[Need]:
        return (("energy",),)

    def undivided(self, setting: Setting) -> str | None:
        return "contrastive divergence compares a batch with one set of chains that all its rows share"

    def build(self, setting: Setting) -> Game:
        return _ContrastiveGame(setting, self)


class _ContrastiveGame(Game):
    """One player; its state are the persistent chains: chains x state, or temperatures x chains x state."""

    def __init__(self, setting: Setting, objective: ContrastiveDivergence) -> None:
        assert setting.program.energy is not None
        self.energy, self.setting, self.objective = setting.program.energy, setting, objective
        self._check_site(setting)
        self._check_tempering(setting)
        self._check_energy(setting.probe)
        how = "persistent" if objective.persistent else "started at the rows of each batch"
        if objective.temperatures is not None:
            how += f", each a ladder of {objective.temperatures} temperatures"
        self.notes = {"chain": f"{objective.steps} Gibbs sweep(s) per update, {how}"}

    def _check_site(self, setting: Setting) -> None:
        site = setting.info.sites.get(self.energy.site)
        if site is not None and site.kind == "latent":
            require(
                f"SVI({self.objective.label})",
                self.objective.needs,
                setting.program.name,
                setting.info.offers - {"energy"},
                why=f"its energy is that of the latent site {self.energy.site!r}, which the data do not give; take "
                "WakeSleep()",
            )
        if site is None or site.kind != "observed":
            observed = [s.name for s in setting.info.select(kind="observed")]
            raise ValueError(
                f"energy: it is the energy of the site {self.energy.site!r}, which {setting.program.name!r} does not "
                f"observe (it observes {', '.join(observed)}); say Energy(..., site={observed[0]!r})"
            )

    def _check_energy(self, batch: Batch) -> None:
        """Numbers of other shapes would be averaged all the same, and rows of other shapes be spread over the rest."""
        with without_side_effects():
            x = self._observed(batch)
            made = self.energy.gibbs(x, 1)
            require_per_row("energy: `free_energy`", self.energy.free_energy(x), len(x))
        if not isinstance(made, Tensor) or made.shape != x.shape:
            got = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(f"energy: `gibbs` has to give rows of the shape it takes, {tuple(x.shape)}, got {got}")

    def _check_tempering(self, setting: Setting) -> None:
        asked = self.objective.temperatures is not None or self.objective.restart > 0
        if asked and self.energy.tempering is None:
            raise IncompatibleError(
                f"the energy of {setting.program.name!r} has no `tempering`, which says what its chains are at other "
                "temperatures and where they restart; leave temperatures= and restart= out, or give "
                "Energy(..., tempering=...)"
            )

    def init(self, batch: Batch) -> GameState:
        """Persistent chains begin at rows of the batch, those of a ladder at draws of b = 0 below b = 1."""
        if not self.objective.persistent:
            return {}
        x = self._observed(batch)
        x = x[torch.arange(self.objective.chains or len(x), device=x.device) % len(x)]
        chains = _Chains(self.energy)
        states = chains.of_rows(x)
        if self.objective.temperatures is not None:
            return {"chains": chains.ladder(states, self.objective.temperatures)}
        return {"chains": states}

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        x, objective = self._observed(batch), self.objective
        chains, parts = _Chains(self.energy), {}
        with torch.no_grad():
            if not objective.persistent:
                once = self.energy.gibbs(x, 1)
                made = self._further(chains, x, once)
                parts["reconstruction_error"] = (once - x).square().flatten(1).sum(1).mean()
            else:
                states = state["chains"]
                if objective.restart:
                    states = chains.restarted(states, objective.restart, ladder=objective.temperatures is not None)
                if objective.temperatures is None:
                    made = states = chains.move(states, objective.steps)
                else:
                    states, parts["swaps"] = chains.tempered(states, objective.steps)
                    made = states[-1]
                state = {"chains": states}
        data, chain = self.energy.free_energy(x).mean(), chains.energy(made).mean()
        parts |= {"free_energy": data.detach(), "chain_free_energy": chain.detach()}
        return Loss(data - chain, parts), state

    def _observed(self, batch: Batch) -> Tensor:
        """The rows as the program sees them: it may have cast or reshaped what it was given."""
        trace = poutine.trace(self.setting.model).get_trace(*batch.args, **batch.kwargs)
        value: Tensor = trace.nodes[self.energy.site]["value"]
        return value.detach()

    def _further(self, chains: _Chains, x: Tensor, once: Tensor) -> Tensor:
        if not chains.hidden:
            return self.energy.gibbs(once, self.objective.steps - 1) if self.objective.steps > 1 else once
        return chains.move(chains.of_rows(x), self.objective.steps)


class _Chains:
    """Chains of an energy at its present parameters: of rows, or of the states that its tempering moves instead."""

    def __init__(self, energy: Energy) -> None:
        self.gibbs, self.free_energy = energy.gibbs, energy.free_energy
        self.path = None if energy.tempering is None else energy.tempering()
        self.hidden = self.path is not None and self.path.of_rows is not None

    def of_rows(self, x: Tensor) -> Tensor:
        if self.path is None or self.path.of_rows is None:
            return x
        with torch.no_grad():
            return self.path.of_rows(x)

    def move(self, states: Tensor, steps: int) -> Tensor:
        if self.path is None or not self.hidden:
            return self.gibbs(states, steps)
        return self.path.move(states, 1.0, steps)

    def energy(self, states: Tensor) -> Tensor:
        if self.path is None or not self.hidden:
            return self.free_energy(states)
        return -self.path.log_density(states, 1.0)

    def ladder(self, states: Tensor, count: int) -> Tensor:
        """temperatures x chains x state, the last at ``states``."""
        assert self.path is not None
        with torch.no_grad():
            below = [self.path.begin(len(states)).to(states) for _ in range(count - 1)]
        return torch.stack([*below, states])

    def restarted(self, states: Tensor, chance: float, *, ladder: bool) -> Tensor:
        """Some chains at draws of b = 0; of a ladder those of the last temperature."""
        assert self.path is not None
        last = states[-1] if ladder else states
        fresh = self.path.begin(len(last)).to(last)
        shape = (len(last),) + (1,) * (last.dim() - 1)
        anew = torch.where(torch.rand(shape, device=last.device) < chance, fresh, last)
        return torch.cat([states[:-1], anew[None]]) if ladder else anew

    def tempered(self, states: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Sweeps at every temperature, then swaps of even and of odd pairs; and the share of swaps that were made."""
        assert self.path is not None
        count, chains = states.shape[:2]
        b = torch.linspace(0.0, 1.0, count, dtype=states.dtype, device=states.device)
        each = b.repeat_interleave(chains).unsqueeze(-1)
        states = self.path.move(states.flatten(0, 1), each, steps).reshape(states.shape)
        made = []
        for first in range(min(2, count - 1)):
            states, taken = self._swapped(states, b, first)
            made.append(taken)
        return states, torch.cat(made).mean()

    def _swapped(self, states: Tensor, b: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Neighbours first and first + 1, first + 2 and first + 3 ... exchange states, or stay."""
        assert self.path is not None
        count, chains = states.shape[:2]
        lows = range(first, count - 1, 2)
        places, lower = list(range(count)), list(range(count))
        for low in lows:
            places[low], places[low + 1], lower[low + 1] = low + 1, low, low
        partner, lead = (torch.tensor(order, device=states.device) for order in (places, lower))
        flat = states.flatten(0, 1)
        own = self.path.log_density(flat, b.repeat_interleave(chains).unsqueeze(-1)).reshape(count, chains)
        other = self.path.log_density(flat, b[partner].repeat_interleave(chains).unsqueeze(-1)).reshape(count, chains)
        gain = other - own
        # One coin for both of a pair; whoever has no partner gains nothing and stays what it is.
        taken = torch.rand_like(gain).log()[lead] < gain + gain[partner]
        shape = (count, chains) + (1,) * (states.dim() - 2)
        moved = torch.where(taken.reshape(shape), states[partner], states)
        return moved, taken[list(lows)].to(states.dtype).flatten()
