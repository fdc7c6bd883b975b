"""Features that do not tell domains apart: another objective, and a critic on them that is to fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ppl_gen.arguments import require_text
from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError, require_number, require_whole
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.critics import check_critic, check_output
from ppl_gen.inference.objectives.elbo import ELBO
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Player, Setting
from ppl_gen.inference.objectives.observed import reached_from, rows_first
from ppl_gen.inference.objectives.plain import as_objective
from ppl_gen.inference.objectives.robust import entry_of
from ppl_gen.nn.copies import own_copy
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["DomainAdversarial"]

_WIDTH = 64


@dataclass(frozen=True)
class DomainAdversarial(Objective):
    r"""Another objective and, against it, a critic that reads the domain of a row off its features.

    .. math:: \min_\theta \max_\phi \; L_\theta + \lambda \, \mathbb{E} \log D_\phi(d \mid h_\theta(x))

    The program names its features by ``pyro.deterministic("features", h)``, made from the data or from latent sites
    that the guide draws, and takes the domain of each row, an integer, as an argument; it may leave rows of one domain
    without labels by a mask. The critic predicts the domain from the features; the program pays the other objective's
    loss, and what the critic gains. Where the features of all domains have one distribution the critic can do no better
    than the shares of the domains: with two of equal size, a loss of log 2 and an accuracy of a half. That classes are
    matched to the same classes is not implied.

    Losses are per row. The history keeps the parts of the other objective's loss, ``own_loss`` (it alone) and
    ``critic_accuracy``.

    Args:
        weight: lambda, in nats; 0 trains the critic beside a program that does not hear of it.
        domains: how many there are.
        site: the name of the features.
        domain: the entry of the data that holds the domain of each row, from 0 to ``domains`` - 1.
        critic: a network from features (rows x event) to ``domains`` scores; the fit plays with a private copy,
            ``fit.module("critic")``. None: a perceptron.
        critic_steps: updates of the critic for each of the program.
        objective: the other objective, with one player.

    Raises:
        ValueError, TypeError: for settings out of range, features or domains that are not there, rows of one domain
            alone, or a critic of other widths.
        IncompatibleError: for an objective of several players, or features made from what no guide draws.

    Source: Ganin et al. (2016), whose reversed gradient this game spells out.

    Example:
        >>> DomainAdversarial(weight=0.3).label
        'DomainAdversarial(ELBO)'
    """

    weight: float = 1.0
    domains: int = 2
    site: str = "features"
    domain: str = "domain"
    critic: nn.Module | None = None
    critic_steps: int = 1
    objective: Any = field(default_factory=ELBO)

    def __post_init__(self) -> None:
        require_number("weight", self.weight)
        require_whole("domains", self.domains, 2)
        require_text("site", self.site)
        require_text("domain", self.domain)
        check_critic("critic", self.critic)
        require_whole("critic_steps", self.critic_steps)
        object.__setattr__(self, "objective", as_objective(self.objective))

    @property
    def label(self) -> str:
        return f"DomainAdversarial({self.objective.label})"

    @property
    def needs(self) -> Sequence[Need]:
        return (*self.objective.needs, ("data plate",))

    @property
    def uses_guide(self) -> bool:  # type: ignore[override]
        """As the other objective does."""
        return bool(self.objective.uses_guide)

    @property
    def pays_terms(self) -> bool:  # type: ignore[override]
        """As the other objective does."""
        return bool(self.objective.pays_terms)

    def undivided(self, setting: Setting) -> str | None:
        why: str | None = self.objective.undivided(setting)
        return why

    def build(self, setting: Setting) -> Game:
        return _DomainGame(self, setting)


class _DomainGame(Game):
    def __init__(self, objective: DomainAdversarial, setting: Setting) -> None:
        self.objective, self.setting = objective, setting
        self.game = objective.objective.build(setting)
        if len(self.game.players) > 1:
            raise IncompatibleError(f"objective: {objective.objective.label} has a critic of its own; give one player")
        self.place = entry_of(setting, "domain", objective.domain)
        self._check_domains()
        self._refuse_prior_draws()
        with without_side_effects(), torch.no_grad():
            features = self._features(setting.probe)
        own = objective.critic
        critic = _perceptron(features, int(objective.domains)) if own is None else own_copy("critic", own)
        self.critic = critic.to(device=features.device, dtype=features.dtype)
        check_output(self.critic, features, outputs=int(objective.domains))
        self.modules: Mapping[str, nn.Module] = {**self.game.modules, "critic": self.critic}
        (program,) = self.game.players
        self.players = (Player("critic", objective.critic_steps), program)
        made = f"perceptron on {features[0].numel()} feature(s) (default)" if own is None else "as given"
        self.notes = {**self.game.notes, "critic": f"{made}, of {objective.domains} domains"}

    def _check_domains(self) -> None:
        """Of all rows at hand: those of later batches are not looked at again."""
        data, name = self.setting.data, self.objective.domain
        every = data is not None and data.streamed is None and isinstance(data.entries.get(name), Tensor)
        d: Any = data.entries[name] if every and data is not None else self._domain(self.setting.probe)
        most = int(self.objective.domains) - 1
        whole = isinstance(d, Tensor) and not d.is_floating_point() and d.dim() == 1
        if not whole or bool((d < 0).any()) or bool((d > most).any()):
            got = type(d).__name__ if not isinstance(d, Tensor) else f"{d.dtype} of shape {tuple(d.shape)}"
            got = f"values from {int(d.min())} to {int(d.max())}" if whole else got
            raise ValueError(f"domain: expected one integer from 0 to {most} for each row in {name!r}, got {got}")
        if every and len(d) > 1 and bool((d == d[0]).all()):
            raise ValueError(
                f"domain: expected rows of two domains at least in {name!r}, got {int(d[0])} for all {len(d)}: their "
                "features have nothing to hide"
            )

    def _refuse_prior_draws(self) -> None:
        """Features that hang on what the guide does not draw would be those of the prior, whatever the row."""
        batch, drawn = self.setting.probe, self.setting.info.guide_sites or {}
        left = [site.name for site in self.setting.info.select() if site.name not in drawn]
        if not left:
            return
        with without_side_effects():
            model = self._at_guide(batch)
        if reached_from(model, batch, left, [self.objective.site]):
            raise IncompatibleError(
                f"site: the features {self.objective.site!r} are made from {', '.join(left)}, which "
                f"{'the guide does not draw' if drawn else 'no guide draws'}: they would come from the prior and tell "
                "nothing of the row. Make them from the data, or from what the guide draws"
            )

    def _at_guide(self, batch: Batch) -> Callable[..., Any]:
        """The model at new draws of the guide, where there is one."""
        if self.setting.guide is None:
            return self.setting.model
        guide = poutine.trace(self.setting.guide).get_trace(*batch.args, **batch.kwargs)
        held: Callable[..., Any] = poutine.replay(self.setting.model, trace=guide)
        return held

    def _domain(self, batch: Batch) -> Any:
        return batch.args[self.place] if isinstance(self.place, int) else batch.kwargs[self.place]

    def _features(self, batch: Batch) -> Tensor:
        """Of each row, at draws of the guide where there is one: rows x event."""
        trace = poutine.trace(self._at_guide(batch)).get_trace(*batch.args, **batch.kwargs)
        if self.objective.site not in trace.nodes:
            names = [name for name, node in trace.nodes.items() if node["type"] == "sample"]
            raise ValueError(
                f"site: there is no {self.objective.site!r} in {self.setting.program.name!r}, which has "
                f"{', '.join(names)}; name the features by pyro.deterministic({self.objective.site!r}, h)"
            )
        node = trace.nodes[self.objective.site]
        value: Tensor = node["value"]
        if value.dim() == 0 or len(value) != batch.rows:
            raise ValueError(
                f"site: expected features of each of {batch.rows} rows at {self.objective.site!r}, rows first, got "
                f"shape {tuple(value.shape)}"
            )
        return rows_first(value, 0, batch)

    def init(self, batch: Batch) -> GameState:
        return self.game.init(batch)

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        if player == "critic":
            with torch.no_grad():
                features = self._features(batch)
            scores = self.critic(features)
            accuracy = (scores.detach().argmax(1) == self._domain(batch)).to(scores.dtype).mean()
            return Loss(self._missed(scores, batch), {"critic_accuracy": accuracy}), state
        own, state = self.game.loss(player, batch, state)
        gained = self._missed(self.critic(self._features(batch)), batch)
        value = own.value - self.objective.weight * gained
        return Loss(value, {**own.parts, "own_loss": own.value.detach()}), state

    def _missed(self, scores: Tensor, batch: Batch) -> Tensor:
        # No domain is left out, as -100 is by default: one out of range has to fail.
        return cross_entropy(scores, self._domain(batch).long(), ignore_index=torch.iinfo(torch.long).min)


def _perceptron(features: Tensor, domains: int) -> nn.Module:
    width = features[0].numel()
    layers = [nn.Linear(width, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(_WIDTH, domains))
