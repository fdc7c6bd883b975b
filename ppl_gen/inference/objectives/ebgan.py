"""An energy-based model learned together with a program that draws from it: a game whose equilibrium has both right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppl_gen.data.batching import Batch
from ppl_gen.distances.mmd import squared_distance
from ppl_gen.errors import IncompatibleError, require_number, require_positive, require_whole
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.conditions import rows_compared, unseen
from ppl_gen.inference.objectives.critics import (
    check_critic,
    check_output,
    check_penalised,
    data_penalty,
    default_critic,
    ties_rows,
)
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Player, Setting
from ppl_gen.inference.objectives.observed import compared_sites, refuse_own_observation
from ppl_gen.nn.copies import own_copy
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["ALONE", "EBGAN"]

ALONE = 1.1  # rows that explain a row, itself counted, below which it has no neighbours within the noise
_HOLDS = 10.0  # on digits 1 left energies of some hundred and games that were lost


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
    B. There the game has no equilibrium that bounds the energy, and ``penalty_weight`` holds it. ``pulling_away`` keeps
    made rows apart in what the energy sees: with :math:`s_i` the inputs of its last linear layer, the program also pays
    for the squared cosines of all pairs,

    .. math:: \frac{\lambda}{B (B - 1)} \sum_{i \ne j} \left(\frac{s_i^\top s_j}{|s_i| |s_j|}\right)^2

    Neither density nor guide of the program is used. The energy is ``fit.module("energy")``, rows to one number each,
    known up to a constant; it is that of *smoothed* rows, and ``fit.sample`` gives them without the noise. Entries that
    a mask hides have no noise to be smoothed by, and no density: programs that hide some are refused.

    Losses are per row. The history keeps ``energy_real`` and ``energy_fake``, ``entropy``, ``spread``, the standard
    deviation of the made rows over that of the data, and, where they are paid for, ``penalty`` and ``squared_cosine``.

    Args:
        energy: a network from rows to one number each, called with the observed site's values (rows x event; several
            sites flattened and joined); the fit plays with a private copy. None: a small network on standardised rows.
        noise: epsilon, in units of the data's standard deviation (root mean square over columns).
        entropy: the weight of H; 1 is the game above, 0 the one without.
        energy_steps: updates of the energy for each of the program, each on a fresh batch.
        penalty_weight: of ``E |sd grad E|^2 / 2`` on the data in the loss of the energy, sd the standard deviations of
            columns (R1). It keeps energies finite and shifts the equilibrium. None: 10 where rows of the data have no
            neighbours within the noise, unless an energy of your own has batch norm, and else 0.
        pulling_away: lambda, nats per unit of a mean squared cosine; 0: none. For images and other rows of many
            columns; it is no entropy, and the energy is then no log density.
        damping: weight of the mean squared energies of both kinds of rows in the loss of the energy, which keeps it
            from running away and shifts the equilibrium; 0: none.
        averaging: decay of an exponential average of the program's parameters, which the fit keeps; 0: the last ones.
        site: the observed site; None: all of them, joined.

    Raises:
        ValueError, TypeError: for settings out of range, an energy that does not give one number per row, or one with
            batch norm under a penalty.
        IncompatibleError: if the program gives its observed sites no gradient, reads x in order to make x, or hides
            entries of x by a mask.

    Unless the algorithm names others, both players use Adam at 1e-3 with betas 0.5 and 0.9.

    Source: Kim and Bengio (2016); Dai, Almahairi, Bachman, Hovy and Courville (2017) for the equilibrium; Yin and Zhou
    (2018) for the bound of the entropy; Kumar, Ozair, Goyal, Courville and Bengio (2019) for the penalty. The
    energy-based network of Zhao, Mathieu and LeCun (2017), which the pulling away is from, has a margin and no entropy,
    and its energies are no log density.

    Example:
        >>> EBGAN(noise=0.2).noise
        0.2
    """

    energy: nn.Module | None = None
    noise: float = 0.1
    entropy: float = 1.0
    energy_steps: int = 1
    damping: float = 0.0
    penalty_weight: float | None = None
    pulling_away: float = 0.0
    averaging: float = 0.99
    site: str | None = None

    uses_guide = False

    def __post_init__(self) -> None:
        check_critic("energy", self.energy)
        require_positive("noise", self.noise)
        require_number("entropy", self.entropy)
        require_whole("energy_steps", self.energy_steps)
        require_number("damping", self.damping)
        if self.penalty_weight is not None:
            require_number("penalty_weight", self.penalty_weight)
        require_number("pulling_away", self.pulling_away)
        require_number("averaging", self.averaging, 0.0, 1.0)

    @property
    def needs(self) -> Sequence[Need]:
        return (("differentiable samples",), ("samples",))

    def optimiser(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of either player where the algorithm names none."""
        fused = all(p.device.type in ("cpu", "cuda", "mps") for p in params)
        return torch.optim.Adam(params, lr=1e-3, betas=(0.5, 0.9), fused=fused or None)

    def undivided(self, setting: Setting) -> str | None:
        pairs = "the entropy" if self.entropy else "the pulling away" if self.pulling_away else None
        return pairs and f"{pairs} of the program compares all pairs of rows of a batch"

    def build(self, setting: Setting) -> Game:
        return _EnergyGame(self, setting)


class _EnergyGame(Game):
    def __init__(self, objective: EBGAN, setting: Setting) -> None:
        self.objective = objective
        sites = compared_sites(setting.info, objective.site, None)
        self.rows = rows_compared(setting, sites)
        refuse_own_observation(setting, sites)
        with without_side_effects():
            some = setting.sample()
            (real, _), hidden = self.rows(some), self.rows.hidden(some)
        if hidden:
            raise IncompatibleError(
                f"the program {setting.program.name!r} hides entries of {', '.join(hidden)} by a mask: the noise of "
                "made rows would tell them from observed ones there, and the energy is a log density of whole rows. "
                "Take Adversarial(), for which they are zero on both sides, or rows that are whole"
            )
        flat = real.flatten(1)
        spread = (flat - flat.mean(0)).square().mean().sqrt()
        self.noise = objective.noise * torch.where(spread > 0, spread, torch.ones_like(spread))
        own = objective.energy
        energy = default_critic(real, rowwise=True) if own is None else own_copy("energy", own)
        self.energy = energy.to(device=real.device, dtype=real.dtype)
        check_output(self.energy, real, "energy")
        self.scale = real.std(0, correction=0)
        few = flat[: setting.probe.rows]
        alone = float(smoothed_entropy(few, few, self.noise)[1]) < ALONE
        self.penalty_weight = self._penalty_weight(alone)
        if self.penalty_weight:
            check_penalised(self.energy, real, f"penalty_weight={self.penalty_weight:g}", name="energy")
        self.modules: Mapping[str, nn.Module] = {"energy": self.energy}
        self.players = (
            Player("energy", objective.energy_steps, optimiser=objective.optimiser),
            Player("program", optimiser=objective.optimiser, averaging=objective.averaging or None),
        )
        last = last_linear(self.energy, real)
        self.last = last if objective.pulling_away else None
        if objective.pulling_away and last is None:
            raise ValueError(
                "pulling_away: expected an energy that calls a torch.nn.Linear last with one row for each row of x, "
                f"between whose inputs angles are taken, got {type(self.energy).__name__}, which does not; leave it at "
                "0"
            )
        self.advice = _advice(objective, alone and last is not None)
        made = "a small network on standardised rows (default)" if own is None else "as given"
        held = f"; held by R1 of weight {self.penalty_weight:g}" if self.penalty_weight else ""
        self.notes = {
            "energy": f"{made}; of rows with noise of standard deviation {float(self.noise):.3g}{held}",
            "gradients": self.rows.notes(),
            **unseen(setting, [site.name for site in sites]),
        }

    def _penalty_weight(self, alone: bool) -> float:
        if self.objective.penalty_weight is not None:
            return self.objective.penalty_weight
        return _HOLDS if alone and not ties_rows(self.energy) else 0.0

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
        parts = {"energy_real": on_real.detach().mean(), "energy_fake": on_fake.detach().mean()}
        if self.penalty_weight:
            penalty = data_penalty(self.energy, real, self.scale)
            value = value + self.penalty_weight * penalty
            parts["penalty"] = penalty.detach()
        return Loss(value, parts)

    def _program_loss(self, batch: Batch) -> Loss:
        real, made = self.rows(batch)
        fake = made + self.noise * torch.randn_like(made)
        entropy, effective = smoothed_entropy(fake.flatten(1), made.flatten(1), self.noise)
        deviation = real.std(0, correction=0).sum().clamp_min(torch.finfo(real.dtype).tiny)
        spread = made.detach().std(0, correction=0).sum() / deviation
        parts = {"entropy": entropy.detach(), "effective_rows": effective, "spread": spread}
        if self.last is None:
            return Loss(self.energy(fake).mean() - self.objective.entropy * entropy, parts)
        energies, features = _seen_by(self.energy, self.last, fake)
        alike = squared_cosine(features.flatten(1))
        value = energies.mean() - self.objective.entropy * entropy + self.objective.pulling_away * alike
        return Loss(value, {**parts, "squared_cosine": alike.detach()})


def _advice(objective: EBGAN, alone: bool) -> str:
    """What else to try, in settings that it does not have."""
    more = {} if objective.entropy else {"entropy": 1.0}
    if alone:
        more |= {} if objective.pulling_away else {"pulling_away": 1.0}
    elif not objective.damping:
        more["damping"] = 0.01
    more |= {} if objective.energy_steps > 1 else {"energy_steps": 2}
    call = f"EBGAN({', '.join(f'{name}={value}' for name, value in more.items())}), " if more else ""
    return f"Take {call}more steps, or a slower program; see docs/games.md"


def last_linear(network: nn.Module, rows: Tensor) -> nn.Module | None:
    """The affine layer that it calls last, whose inputs are what it has made of each row; None without one.

    In what order a network holds its layers says nothing of that in which it calls them.
    """
    called: list[tuple[nn.Module, int]] = []
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    hooks = [
        part.register_forward_pre_hook(lambda part, given: called.append((part, len(given[0])))) for part in linear
    ]
    try:
        with without_side_effects():
            network(rows)
    finally:
        for hook in hooks:
            hook.remove()
    return called[-1][0] if called and called[-1][1] == len(rows) else None


def _seen_by(energy: nn.Module, last: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The energies of rows, and what the layer ``last`` was called with."""
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        return energy(rows), seen[-1]
    finally:
        handle.remove()


def squared_cosine(features: Tensor) -> Tensor:
    """The mean squared cosine of the angles between two different rows (rows x numbers), a scalar in [0, 1].

    >>> float(squared_cosine(torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])))  # 0, 1/2 and 1/2
    0.333...
    """
    rows = len(features)
    if rows < 2:
        return features.sum() * 0.0
    unit = features / torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp_min(1e-12)
    cosines = (unit @ unit.mT).square()
    return (cosines.sum() - cosines.diagonal().sum()) / (rows * (rows - 1))


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
