"""Adversarial objectives: a critic tells the rows of the data from rows that the program makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.arguments import require_choice
from ppl_gen.data.batching import Batch
from ppl_gen.errors import require_number, require_positive, require_whole
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.conditions import rows_compared, unseen
from ppl_gen.inference.objectives.costs import COSTS, Costs, costs_of
from ppl_gen.inference.objectives.critics import (
    check_output,
    check_penalised,
    data_penalty,
    default_critic,
    described_critic,
    gradient_penalty,
    largest_singular_value,
    starting_vectors,
    ties_rows,
    weight_matrices,
)
from ppl_gen.inference.objectives.divergences import Divergence
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Player, Setting
from ppl_gen.inference.objectives.observed import compared_sites, refuse_own_observation
from ppl_gen.nn.copies import own_copy
from ppl_gen.nn.images import is_image
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["COSTS", "Adversarial", "Costs", "published_optimiser"]

_CONSTRAINTS = ("gradient", "r1", "clip", "projection", "none")
_WEIGHTS = {"gradient": 10.0, "r1": 0.1}  # of the penalties, unless given
_SCHEDULES = ("alternating", "simultaneous")
_SETTLED = 30  # steps of a power iteration that begins anywhere; from where the last one ended one is enough


@dataclass(frozen=True)
class Adversarial(Objective):
    r"""A game between a critic T and the program's samples; neither density nor guide is used.

    With D = sigmoid(T), data p and program q:

    - ``"minimax"``: min over the program, max over T of E_p log D + E_q log(1 - D);
    - ``"non-saturating"``: the same critic; the program minimises -E_q log D, whose gradient does not vanish where
      the critic is sure;
    - ``"wasserstein"``: max over 1-Lipschitz T of E_p T - E_q T, the distance W1(p, q). A clipped critic estimates a
      multiple K of it;
    - ``"kl"``, ``"reverse-kl"``, ``"hellinger"``, ``"jensen-shannon"``, ``"pearson"``, or a `Divergence` of your own:
      min over the program, max over T of E_p T - E_q f*(T), the f-divergence that T = f'(p/q) attains;
    - ``"least-squares"``: the critic regresses on 1 for data and 0 for made rows, the program on 1;
    - ``"hinge"``: the critic minimises E_p max(0, 1 - T) + E_q max(0, 1 + T), the program -E_q T.

    Losses are per row. The history keeps the critic's mean output on both kinds of rows (``critic_real``,
    ``critic_fake``), ``penalty``, and ``divergence_bound``, what the critic's cost on that batch makes of the
    divergence that its game bounds (``fit.notes["divergence_bound"]`` names it): in the mean over batches never more
    than the divergence. What warns of a collapse: ``spread``, the standard deviation of the made rows over that of the
    data, and (except for Wasserstein) the shares judged rightly, ``critic_accuracy_real`` and ``critic_accuracy_fake``
    (both near 1: the critic has won and the program learns little; near 1/2: balance).

    Args:
        kind: which game, by name, or a `Divergence`.
        critic: a network from rows to one number each, called with the observed site's values (rows x event;
            several sites flattened and joined). The fit plays with a private copy, ``fit.module("critic")``. None:
            a small perceptron on standardised rows, or `ConvolutionalCritic` where they are images (without batch
            norm under a penalty on gradients or projection), made under the fit's seed.
        penalty: ``"gradient"`` adds ``penalty_weight E (|grad T| - 1)^2`` between the two kinds of rows; ``"r1"`` adds
            ``penalty_weight E |sd grad T|^2 / 2`` on the data, sd the standard deviations of its columns, so that the
            critic is flat where it has nothing more to tell; ``"clip"`` clamps the critic's parameters to
            [-clip, clip] after each of its updates; ``"projection"`` then divides each of its weight matrices
            (convolutions as output x the rest) by max(1, its largest singular value), which a power iteration carries
            along; ``"none"`` leaves it free, or trusts it to be Lipschitz by construction (spectral normalisation).
            None: clip for Wasserstein; for the other games R1, but none on images by the default critic and for a
            critic with batch norm, as deep convolutional games were published. Without R1 a ring of eight modes is
            lost at the default rate.
        critic_steps: updates of the critic for each of the program, each on a fresh batch; None: 5 for Wasserstein
            (1 where players move at once), otherwise 1.
        schedule: ``"alternating"``: the program answers the critic that has just moved; ``"simultaneous"``: both
            players' gradients are taken at the same point and on the same batch, and then both move.
        averaging: decay of an exponential average of the program's parameters, which the fit keeps; 0: the last ones.
            On a ring of eight modes 92 to 93 % of the average's samples lay in a mode, and 39 to 43 % of the last
            ones', with ``penalty="r1"``.
        weight: what taking a made row for an observed one costs, relative to the opposite mistake (classifiers).
        clip: bound of the parameters under ``"clip"``.
        penalty_weight: of either gradient penalty; None: 10 for ``"gradient"``, 0.1 for ``"r1"``.
        site: the observed site to compare; None: all of them, joined.
        relaxation: temperature of straight-through draws of discrete observed sites; None: they are compared by mean,
            or as drawn where no parameter decides them, such as labels with fixed shares.

    Raises:
        ValueError, TypeError: for settings out of range, a critic that does not give one number per row, or one with
            batch norm under a penalty on gradients or projection.
        IncompatibleError: if the program gives its observed sites no gradient, or reads x in order to make x.

    Unless the algorithm names others, both players use the optimiser their game was published with: Adam (2e-4,
    betas 0.5 and 0.999), RMSProp (5e-5) under clipping; under a gradient penalty Adam (betas 0.5 and 0.99) at 1e-3,
    which suits some thousand steps (published: 1e-4, and 0.9 for a hundred thousand of them).

    Source: Goodfellow et al. (2014); Radford, Metz and Chintala (2016) for Adam's settings; Arjovsky, Chintala and
    Bottou (2017), whose clip is 0.01 on batches of 64; Gulrajani et al. (2017) for the gradient penalty; Mescheder,
    Geiger and Nowozin (2018) for R1; Nowozin, Cseke and Tomioka (2016) for f-divergences; Mao et al. (2017) for least
    squares; Lim and Ye (2017) for the hinge; Yazici et al. (2019) for averages of the program's parameters.

    Example:
        >>> Adversarial("wasserstein", penalty="gradient").critic_updates
        5
    """

    kind: str | Divergence = "non-saturating"
    critic: nn.Module | None = None
    penalty: str | None = None
    critic_steps: int | None = None
    schedule: str = "alternating"
    averaging: float = 0.99
    weight: float = 1.0
    clip: float = 0.01
    penalty_weight: float | None = None
    site: str | None = None
    relaxation: float | None = None

    uses_guide = False

    def __post_init__(self) -> None:
        costs = costs_of(self.kind)
        critic: Any = self.critic  # whatever was passed
        if critic is not None and not isinstance(critic, nn.Module):
            hint = f"{critic.__name__}(...) (an instance)" if isinstance(critic, type) else "a torch network"
            raise TypeError(f"critic: expected {hint} or None, got {critic!r}")
        require_choice("penalty", self.penalty, _CONSTRAINTS, optional=True)
        require_choice("schedule", self.schedule, _SCHEDULES)
        if self.critic_steps is not None:
            require_whole("critic_steps", self.critic_steps)
            if self.schedule == "simultaneous" and self.critic_steps > 1:
                raise ValueError(f"critic_steps: players that move at once move once each, got {self.critic_steps}")
        require_number("averaging", self.averaging, 0.0, 1.0)
        for name in ("weight", "clip", "penalty_weight"):
            if name != "penalty_weight" or self.penalty_weight is not None:
                require_positive(name, getattr(self, name))
        if self.relaxation is not None:
            require_positive("relaxation", self.relaxation)
        if self.weight != 1 and not costs.classifier:
            raise ValueError(f"weight: the {self._game} game weighs both kinds of rows alike, got {self.weight!r}")
        if self.critic is None and self.kind == "wasserstein" and self.penalty in ("none", "r1"):
            raise ValueError(
                "penalty: the default critic is not Lipschitz by construction; take 'gradient', 'clip' or 'projection'"
            )

    @property
    def needs(self) -> Sequence[Need]:
        return (("differentiable samples",), ("samples",))

    @property
    def critic_updates(self) -> int:
        """Updates of the critic for each update of the program."""
        return self.critic_steps or (5 if self.kind == "wasserstein" and self.schedule == "alternating" else 1)

    def constraint(self, rows: Tensor, critic: nn.Module | None = None) -> str:
        """What keeps the critic of such rows in bounds: "gradient", "r1", "clip", "projection" or "none".

        ``critic`` is the one that plays; None: the default one.
        """
        if self.penalty is not None or self.kind == "wasserstein":
            return self.penalty or "clip"
        if critic is None:
            return "none" if is_image(rows.shape[1:]) else "r1"
        try:
            check_penalised(critic, rows, "r1")
        except ValueError:
            return "none"
        return "r1"

    @property
    def _game(self) -> str:
        return self.kind.name if isinstance(self.kind, Divergence) else self.kind

    def undivided(self, setting: Setting) -> str | None:
        return None  # both players' losses are means over rows; of the records, ``spread`` is one of each part

    def build(self, setting: Setting) -> Game:
        return _AdversarialGame(self, setting)


def published_optimiser(constraint: str, params: list[Tensor]) -> torch.optim.Optimizer:
    """The optimiser of either player where the algorithm names none: the one its game was published with."""
    if constraint == "clip":
        return torch.optim.RMSprop(params, lr=5e-5)
    # The penalty was published with 1e-4, second beta 0.9, and a hundred thousand steps. At 1e-3 a ring of eight
    # modes takes three thousand, but with 0.9 one start in four kept losing modes; with 0.99 that one held 8 of 8.
    rate, betas = (1e-3, (0.5, 0.99)) if constraint in _WEIGHTS else (2e-4, (0.5, 0.999))
    fused = all(p.device.type in ("cpu", "cuda", "mps") for p in params)
    return torch.optim.Adam(params, lr=rate, betas=betas, fused=fused or None)


class _AdversarialGame(Game):
    def __init__(self, objective: Adversarial, setting: Setting) -> None:
        self.objective, self.costs = objective, costs_of(objective.kind)
        self.simultaneous = objective.schedule == "simultaneous"
        sites = compared_sites(setting.info, objective.site, objective.relaxation)
        self.rows = rows_compared(setting, sites, objective.relaxation)
        refuse_own_observation(setting, sites)
        with without_side_effects():
            real, _ = self.rows(setting.sample())
        own = None if objective.critic is None else own_copy("critic", objective.critic)
        if own is not None:
            check_output(own.to(device=real.device, dtype=real.dtype), real)
        self.constraint = constraint = objective.constraint(real, own)
        rowwise = constraint not in ("none", "clip")
        self.critic = default_critic(real, rowwise=rowwise).to(real) if own is None else own
        if rowwise:
            check_penalised(self.critic, real, f"penalty={constraint!r}", by_slope=constraint in _WEIGHTS)
        self.scale = real.std(0, correction=0)  # once, of some hundred rows: batches may be small
        if not any(p.requires_grad for p in self.critic.parameters()):
            raise ValueError("critic: none of its parameters requires a gradient, so it cannot learn; unfreeze some")
        self.modules: Mapping[str, nn.Module] = {"critic": self.critic}
        after = self._clamp if constraint == "clip" else None
        optimiser = partial(published_optimiser, constraint)
        self.players = (
            Player("critic", objective.critic_updates, optimiser=optimiser, after=after),
            Player("program", optimiser=optimiser, averaging=objective.averaging or None),
        )
        made = described_critic(real, rowwise=rowwise) if own is None else "as given"
        self.notes = {"critic": f"{made}; constraint: {constraint}", "gradients": self.rows.notes()}
        self.notes = {**self.notes, **unseen(setting, [site.name for site in sites])}
        self.advice = _advice(objective, constraint, normed=ties_rows(self.critic) is not None and own is not None)
        self.bound = self.costs.bound if objective.weight == 1 else None
        if self.bound is not None:
            self.notes = {**self.notes, "divergence_bound": f"of {self.costs.of}, never more in the mean over batches"}

    def init(self, batch: Batch) -> GameState:
        if self.constraint != "projection":
            return {}
        return {
            f"singular vectors of {name}": largest_singular_value(matrix, starting_vectors(matrix), _SETTLED)[1]
            for name, matrix in weight_matrices(self.critic).items()
        }

    def settle(self, player: str, state: GameState) -> GameState:
        if player != "critic" or not state:
            return state
        after, weights = {}, dict(self.critic.named_parameters())
        for name, matrix in weight_matrices(self.critic).items():
            key = f"singular vectors of {name}"
            largest, after[key] = largest_singular_value(matrix, state[key])
            weights[name].detach().div_(largest.clamp_min(1.0))
        return after

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        return self._critic_loss(batch) if player == "critic" else self._program_loss(batch), state

    def _critic_loss(self, batch: Batch) -> Loss:
        with torch.no_grad():
            real, fake = self.rows(batch)
        on_real, on_fake = self.critic(real), self.critic(fake)
        value = self.costs.real(on_real).mean() + self.objective.weight * self.costs.fake(on_fake).mean()
        parts = {"critic_real": on_real.detach().mean(), "critic_fake": on_fake.detach().mean()}
        if self.bound is not None:
            parts["divergence_bound"] = self.bound(value.detach())
        if (border := self.costs.border) is not None:
            parts["critic_accuracy_real"] = (on_real > border).to(value.dtype).mean()
            parts["critic_accuracy_fake"] = (on_fake < border).to(value.dtype).mean()
        if self.constraint in _WEIGHTS:
            flat = self.constraint == "r1"
            penalty = data_penalty(self.critic, real, self.scale) if flat else gradient_penalty(self.critic, real, fake)
            value = value + (self.objective.penalty_weight or _WEIGHTS[self.constraint]) * penalty
            parts["penalty"] = penalty.detach()
        return Loss(value, parts)

    def _program_loss(self, batch: Batch) -> Loss:
        real, fake = self.rows(batch)
        value = self.costs.program(self.critic(fake)).mean()
        if self.objective.kind == "minimax":  # what the critic gains, the program loses
            value = self.objective.weight * value
        deviation = real.std(0, correction=0).sum().clamp_min(torch.finfo(real.dtype).tiny)
        return Loss(value, {"spread": fake.detach().std(0, correction=0).sum() / deviation})

    def _clamp(self) -> None:
        bound = self.objective.clip
        with torch.no_grad():
            for parameter in self.critic.parameters():
                if parameter.requires_grad:
                    parameter.clamp_(-bound, bound)


def _advice(objective: Adversarial, constraint: str, *, normed: bool) -> str:
    """What else to try, in settings that go with those it has; ``normed``: its own critic has batch norm."""
    slower = "a slower program (lr={'critic': 1e-3, 'program': 2e-4}); see docs/games.md"
    if objective.schedule == "alternating":
        slower = f"more critic_steps, or {slower}"
    if constraint in _WEIGHTS:
        return f"Take {slower}"
    take = "Take a critic without batch norm and" if normed else "Take"
    if objective.kind == "wasserstein":
        return f"{take} Adversarial('wasserstein', penalty='gradient'), {slower}"
    if isinstance(objective.kind, Divergence):
        return f"{take} penalty='r1', {slower}"
    kind = "" if objective.kind == "non-saturating" else f"{objective.kind!r}, "
    return f"{take} Adversarial({kind}penalty='r1'), {slower}"
