"""An energy-based model learned together with a program that draws from it: a game whose equilibrium has both right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppl_gen.data.batching import Batch
from ppl_gen.distances.mmd import squared_distance
from ppl_gen.errors import require_number, require_positive, require_whole
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.critics import check_critic, check_output, default_critic
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Player, Setting
from ppl_gen.inference.objectives.observed import ObservedRows, compared_sites, refuse_own_observation
from ppl_gen.nn.copies import own_copy
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["EBGAN"]


@dataclass(frozen=True)
class EBGAN(Objective):
    r"""A game between an energy E, which is low at the data, and a program whose rows it learns from.

    .. math:: \max_E \min_g \; \mathbb{E}_{data}[-E(x)] + \mathbb{E}_{p_g}[E(x)] - H(p_g), \qquad
              p_g(x) = \mathbb{E}_{z}\, \mathrm{Normal}(x;\, g(z), \varepsilon^2 I)

    The program's best answer to E is p_g = exp(-E) / Z: then the second part is -log Z, the first player climbs the
    log likelihood of the data under exp(-E) / Z, and at the equilibrium both are the distribution of the data. The
    entropy H belongs to it: without, the program goes where the energy is lowest, a point, and E says nothing.

    The entropy of the smoothed program is estimated from its rows of one batch, x_i = g(z_i) + noise:

    .. math:: \hat H = -\frac{1}{B} \sum_i \log \frac{1}{B} \sum_j \mathrm{Normal}(x_i;\, g(z_j), \varepsilon^2 I)
              \le H \text{ in expectation}

    It is near H where every row lies within some epsilon of many others, and stops at log B plus the entropy of the
    noise where rows are far apart on that scale (images of many pixels, small batches): then it spreads them no
    further. ``effective_rows`` of the history tells: the number of rows that explain one, between 1 (no neighbours) and
    B.

    Neither density nor guide of the program is used. The energy is ``fit.module("energy")``, rows to one number each,
    known up to a constant; it is that of *smoothed* rows, and ``fit.sample`` gives them without the noise.

    Losses are per row. The history keeps ``energy_real`` and ``energy_fake``, ``entropy``, and ``spread``, the standard
    deviation of the made rows over that of the data.

    Args:
        energy: a network from rows to one number each, called with the observed site's values (rows x event; several
            sites flattened and joined); the fit plays with a private copy. None: a small network on standardised rows.
        noise: epsilon, in units of the data's standard deviation (root mean square over columns).
        entropy: the weight of H; 1 is the game above, 0 the one without.
        energy_steps: updates of the energy for each of the program, each on a fresh batch.
        damping: weight of the mean squared energies of both kinds of rows in the loss of the energy, which keeps it
            from running away and shifts the equilibrium; 0: none.
        site: the observed site; None: all of them, joined.

    Raises:
        ValueError, TypeError: for settings out of range, or an energy that does not give one number per row.
        IncompatibleError: if the program gives its observed sites no gradient, or reads x in order to make x.

    Unless the algorithm names others, both players use Adam at 1e-3 with betas 0.5 and 0.9.

    Source: Kim and Bengio (2016); Dai, Almahairi, Bachman, Hovy and Courville (2017) for the equilibrium; Yin and Zhou
    (2018) for the bound of the entropy. The energy-based network of Zhao, Mathieu and LeCun (2017) has a margin and no
    entropy, and its energies are no log density.

    Example:
        >>> EBGAN(noise=0.2).noise
        0.2
    """

    energy: nn.Module | None = None
    noise: float = 0.1
    entropy: float = 1.0
    energy_steps: int = 1
    damping: float = 0.0
    site: str | None = None

    uses_guide = False

    def __post_init__(self) -> None:
        check_critic("energy", self.energy)
        require_positive("noise", self.noise)
        require_number("entropy", self.entropy)
        require_whole("energy_steps", self.energy_steps)
        require_number("damping", self.damping)

    @property
    def needs(self) -> Sequence[Need]:
        return (("differentiable samples",), ("samples",))

    def optimiser(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of either player where the algorithm names none."""
        fused = all(p.device.type in ("cpu", "cuda", "mps") for p in params)
        return torch.optim.Adam(params, lr=1e-3, betas=(0.5, 0.9), fused=fused or None)

    def undivided(self, setting: Setting) -> str | None:
        return "the entropy of the program compares all pairs of rows of a batch" if self.entropy else None

    def build(self, setting: Setting) -> Game:
        return _EnergyGame(self, setting)


class _EnergyGame(Game):
    def __init__(self, objective: EBGAN, setting: Setting) -> None:
        self.objective = objective
        sites = compared_sites(setting.info, objective.site, None)
        self.rows = ObservedRows(setting.model, setting.info, sites)
        refuse_own_observation(setting, sites)
        with without_side_effects():
            real, _ = self.rows(setting.sample())
        flat = real.flatten(1)
        spread = (flat - flat.mean(0)).square().mean().sqrt()
        self.noise = objective.noise * torch.where(spread > 0, spread, torch.ones_like(spread))
        own = objective.energy
        energy = default_critic(real, rowwise=True) if own is None else own_copy("energy", own)
        self.energy = energy.to(device=real.device, dtype=real.dtype)
        check_output(self.energy, real, "energy")
        self.modules: Mapping[str, nn.Module] = {"energy": self.energy}
        self.players = (
            Player("energy", objective.energy_steps, optimiser=objective.optimiser),
            Player("program", optimiser=objective.optimiser),
        )
        self.advice = "Take more steps, EBGAN(damping=0.01, energy_steps=2), or a slower program; see docs/games.md"
        if not objective.entropy:
            self.advice = f"Take EBGAN(entropy=1.0), {self.advice[5:]}"
        made = "a small network on standardised rows (default)" if own is None else "as given"
        self.notes = {
            "energy": f"{made}; of rows with noise of standard deviation {float(self.noise):.3g}",
            "gradients": self.rows.notes(),
        }

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        return self._energy_loss(batch) if player == "energy" else self._program_loss(batch), state

    def _energy_loss(self, batch: Batch) -> Loss:
        with torch.no_grad():
            real, made = self.rows(batch)
            fake = made + self.noise * torch.randn_like(made)
        on_real, on_fake = self.energy(real), self.energy(fake)
        value = on_real.mean() - on_fake.mean()
        if self.objective.damping:
            value = value + self.objective.damping * (on_real.square().mean() + on_fake.square().mean())
        return Loss(value, {"energy_real": on_real.detach().mean(), "energy_fake": on_fake.detach().mean()})

    def _program_loss(self, batch: Batch) -> Loss:
        real, made = self.rows(batch)
        fake = made + self.noise * torch.randn_like(made)
        entropy, effective = smoothed_entropy(fake.flatten(1), made.flatten(1), self.noise)
        value = self.energy(fake).mean() - self.objective.entropy * entropy
        deviation = real.std(0, correction=0).sum().clamp_min(torch.finfo(real.dtype).tiny)
        spread = made.detach().std(0, correction=0).sum() / deviation
        return Loss(value, {"entropy": entropy.detach(), "effective_rows": effective, "spread": spread})


def smoothed_entropy(x: Tensor, centres: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The lower bound of the entropy of a mixture from rows of it, in nats, and how many centres explain a row.

    ``x`` and ``centres`` are rows x numbers, row i of x drawn about centre i; ``noise`` is a standard deviation.

    >>> one = torch.zeros(1, 2)
    >>> float(smoothed_entropy(one, one, torch.ones(()))[0])  # log 2 pi
    1.8378...
    """
    rows, width = x.shape
    log_each = -0.5 * squared_distance(x, centres) / noise.square()
    log_mean = log_each.logsumexp(1) - math.log(rows)
    normal = 0.5 * width * (math.log(2 * math.pi) + 2 * noise.log())
    weights = log_each.detach().softmax(1)
    return normal - log_mean.mean(), 1.0 / weights.square().sum(1).mean()
