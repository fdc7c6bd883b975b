"""A conditional adversarial game for every observed site of a program: each is made given those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import interpolate, softplus

from ppl_gen.arguments import require_choice
from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError, require_number, require_positive, require_whole
from ppl_gen.handlers.sites import is_sample
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.conditions import Conditions, as_numbers, categories, undecided
from ppl_gen.inference.objectives.critics import (
    check_output,
    check_penalised,
    data_penalty,
    default_critic,
    described_critic,
    ties_rows,
)
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Player, Setting
from ppl_gen.inference.objectives.observed import (
    compared_sites,
    hidden_as_zero,
    reached_from,
    refuse_own_observation,
    rows_first,
)
from ppl_gen.nn.copies import own_copy
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["ConditionalAdversarial"]

_PENALTIES = ("r1", "none")
_MORE = "more steps, more critic_steps, or a slower program; see docs/games.md"


@dataclass(frozen=True)
class ConditionalAdversarial(Objective):
    r"""One non-saturating game for each observed site: made given the observed sites before it, and judged beside them.

    With observed sites :math:`x_1, x_2, \ldots` in the order of the program, program q and data p,

    .. math:: \max_{T_s} \; \mathbb{E}_p \log D_s(x_s, x_{<s}) + \mathbb{E}_{p(x_{<s})} \mathbb{E}_{q(x_s \mid x_{<s})}
              \log(1 - D_s(x_s, x_{<s})), \qquad D_s = \mathrm{sigmoid}(T_s)

    and the program minimises the sum over sites of :math:`-\mathbb{E} \log D_s`. What a site is made from is observed,
    so no site learns from the mistakes of another, as in a pyramid of adversarial networks (`lapgan`) whose scales are
    trained each by itself; `fit.sample` makes each site from the made ones. By the chain rule, log odds of all critics
    add up to those of the whole row. A program with one observed site is played as by `Adversarial(averaging=0)`.
    What a mask hides is zero on both sides.

    Each critic sees the site and what it is made from: entries of the data that the program reads (in the order of its
    arguments, labels one-hot), then all observed values before it, flattened and joined. Where the site is an image,
    these stand beside it as channels: the last image before it, enlarged to its size, then each number. Observed sites
    that no parameter decides, labels with fixed shares say, have no game: they are only seen.

    Losses are per row. The history keeps ``critic_accuracy_real`` and ``critic_accuracy_fake`` over all sites, and
    the mean critic outputs ``critic_real`` and ``critic_fake``, and under a penalty ``penalty``, the sum over sites.

    Args:
        critics: for observed sites by name, networks from what is said above to one number each; the fit plays with
            private copies, ``fit.module("critic")[name]``. Sites that are not named have the default critic.
        critic_steps: updates of the critics for each of the program.
        penalty: ``"r1"`` adds ``penalty_weight E |sd grad T_s|^2 / 2`` on the data, as in `Adversarial`: each critic is
            flat in its site where it has nothing more to tell (in what the site is made from it is free). Its default
            networks then have no batch norm, and critics of your own must have none. ``"none"``: the game as published,
            which on digits left a pyramid at three times the Frechet distance. None: R1, unless a critic of your own
            has batch norm.
        penalty_weight: of ``"r1"``.
        averaging: decay of an exponential average of the program's parameters, which the fit keeps; 0: the last ones.

    Raises:
        ValueError, TypeError: for settings out of range, or critics that do not fit the observed sites.
        IncompatibleError: for draws without a gradient at an observed site that has parameters, or one latent site
            behind several observed ones, which is no draw of its prior once one of them is observed.

    Unless the algorithm names others, both players use Adam (1e-3, betas 0.5 and 0.99; without R1 2e-4, 0.5 and 0.999).

    Source: Mirza and Osindero (2014); Denton, Chintala, Szlam and Fergus (2015); Mescheder, Geiger and Nowozin (2018)
    for R1; Yazici et al. (2019) for averages of the program's parameters.

    Example:
        >>> import ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import lapgan
        >>> fit = pg.fit(lapgan(levels=1, filters=4), torch.rand(20, 1, 16, 16), SVI(ConditionalAdversarial(), steps=2))
        >>> sorted(fit.module("critic"))
        ['coarse', 'x']
    """

    critics: Mapping[str, nn.Module] | None = None
    critic_steps: int = 1
    penalty: str | None = None
    penalty_weight: float = 0.1
    averaging: float = 0.99

    uses_guide = False

    def __post_init__(self) -> None:
        given: Any = self.critics  # whatever was passed
        if given is not None:
            if not isinstance(given, Mapping):
                raise TypeError(f"critics: expected networks by the names of sites, or None, got {given!r}")
            for name, critic in given.items():
                if not isinstance(critic, nn.Module):
                    raise TypeError(f"critics: expected a torch network for {name!r}, got {critic!r}")
        require_whole("critic_steps", self.critic_steps)
        require_choice("penalty", self.penalty, _PENALTIES, optional=True)
        require_positive("penalty_weight", self.penalty_weight)
        require_number("averaging", self.averaging, 0.0, 1.0)

    @property
    def needs(self) -> Sequence[Need]:
        return (("differentiable samples",), ("samples",), ("data plate",))

    def optimiser(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of either player where the algorithm names none."""
        fused = all(p.device.type in ("cpu", "cuda", "mps") for p in params)
        rate, betas = (1e-3, (0.5, 0.99)) if self.flat else (2e-4, (0.5, 0.999))
        return torch.optim.Adam(params, lr=rate, betas=betas, fused=fused or None)

    @property
    def flat(self) -> bool:
        """Whether critics are kept flat on the data."""
        if self.penalty is not None:
            return self.penalty == "r1"
        return not any(ties_rows(critic) for critic in (self.critics or {}).values())

    def undivided(self, setting: Setting) -> str | None:
        return None  # both players' losses are means over rows

    def build(self, setting: Setting) -> Game:
        return _ConditionalGame(self, setting)


class _ConditionalGame(Game):
    def __init__(self, objective: ConditionalAdversarial, setting: Setting) -> None:
        self.setting, self.objective = setting, objective
        self.flat = objective.flat
        self.sites = compared_sites(setting.info, None, None)
        self.fixed = undecided(setting, self.sites, observed=True)
        self.given = Conditions.of(setting, [site.name for site in self.sites])
        stuck = [site.name for site in self.sites if not site.reparameterised]
        if stuck and (len(stuck) == len(self.sites) or self.fixed != set(stuck)):
            raise IncompatibleError(
                f"the program {setting.program.name!r} gives no gradient to its draws of {', '.join(stuck)}: they are "
                "not reparameterised"
            )
        refuse_own_observation(setting, self.sites)
        self._refuse_shared_draws()
        with without_side_effects(), torch.no_grad():
            pairs = self._pairs(setting.sample())
        given = objective.critics or {}
        unknown = [name for name in given if name not in pairs]
        if unknown:
            raise ValueError(f"critics: {unknown} are not observed in {setting.program.name!r}; it has {list(pairs)}")
        networks, self.scales = {}, {}
        for name, (real, made) in pairs.items():
            own = given.get(name)
            networks[name] = (default_critic(real, rowwise=self.flat) if own is None else own_copy("critics", own)).to(
                real
            )
            check_output(networks[name], real, f"critics: {name}{self._beside(name)}")
            if self.flat and own is not None:
                check_penalised(networks[name], real, "penalty='r1'")
            # What both kinds of rows have in common is what they are given: there a critic may be as steep as it likes.
            self.scales[name] = real.std(0, correction=0) * (real != made).any(0)
        self.keys = {name: name.replace(".", "_") for name in networks}  # torch has no full stops in names
        self.critics = nn.ModuleDict({self.keys[name]: network for name, network in networks.items()})
        self.modules: Mapping[str, nn.Module] = {"critic": self.critics}
        self.players = (
            Player("critic", objective.critic_steps, optimiser=objective.optimiser),
            Player("program", optimiser=objective.optimiser, averaging=objective.averaging or None),
        )
        how = {
            name: "as given" if name in given else described_critic(real, rowwise=self.flat)
            for name, (real, _) in pairs.items()
        }
        bounds = "r1" if self.flat else "none"
        self.notes = {"critic": f"{'; '.join(f'{name}: {said}' for name, said in how.items())}; constraint: {bounds}"}
        if beside := [*self.given.names, *(site.name for site in self.sites if site.name in self.fixed)]:
            self.notes = {**self.notes, "critics see": f"{' and '.join(beside)} beside what is made"}
        self.advice = f"Take {_MORE}"
        if not self.flat:
            normed = any(ties_rows(own) for own in given.values())
            self.advice = f"Take {'critics without batch norm and ' if normed else ''}penalty='r1', {_MORE}"

    def _beside(self, name: str) -> str:
        """In words: what a critic sees beside the rows of its site."""
        names = [site.name for site in self.sites]
        seen = [*self.given.names, *names[: names.index(name)]]
        return f" (joined with {', '.join(seen)}, which {name} may be made from)" if seen else ""

    def _refuse_shared_draws(self) -> None:
        """What is drawn for one site and used at another is not drawn from its prior, once the first is observed."""
        names = [site.name for site in self.sites]
        for latent in (site.name for site in self.setting.info.select()):
            used = reached_from(self.setting.model, self.setting.probe, [latent], names)
            if len(used) > 1:
                raise IncompatibleError(
                    f"the program {self.setting.program.name!r} makes both {' and '.join(used[:2])} from {latent!r}: "
                    f"given the first, {latent!r} has another distribution than that it is drawn from. Draw noise for "
                    "each observed site, or take Adversarial(), which compares them together"
                )

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        if player == "critic":
            with torch.no_grad():
                pairs = self._pairs(batch)
            return self._critic_loss(pairs), state
        scores = [self.critics[self.keys[name]](made) for name, (_, made) in self._pairs(batch).items()]
        return Loss(torch.stack([softplus(-score).mean() for score in scores]).sum()), state

    def _critic_loss(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Loss:
        scores = [
            (self.critics[self.keys[name]](real), self.critics[self.keys[name]](made))
            for name, (real, made) in pairs.items()
        ]
        value = torch.stack([softplus(-real).mean() + softplus(made).mean() for real, made in scores]).sum()
        real, made = (torch.cat([score.detach().flatten() for score in column]) for column in zip(*scores, strict=True))
        parts = {"critic_real": real.mean(), "critic_fake": made.mean()}
        parts["critic_accuracy_real"] = (real > 0).to(value.dtype).mean()
        parts["critic_accuracy_fake"] = (made < 0).to(value.dtype).mean()
        if self.flat:
            each = [data_penalty(self.critics[self.keys[n]], rows, self.scales[n]) for n, (rows, _) in pairs.items()]
            penalty = torch.stack(each).sum()
            value = value + self.objective.penalty_weight * penalty
            parts["penalty"] = penalty.detach()
        return Loss(value, parts)

    def _pairs(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """What each critic sees of observed and of made rows: rows x event, what comes before it joined to both."""
        trace = poutine.trace(self.setting.model).get_trace(*batch.args, **batch.kwargs)
        nodes = [(site, trace.nodes[site.name]) for site in self.sites]
        seen = self.given(batch)
        found = {}
        for site, node in nodes:
            assert is_sample(node)
            if site.name in self.fixed:
                seen.append(as_numbers(self._rows(node, node["value"], batch), categories(node["fn"])))
                continue
            real, made = hidden_as_zero(node, node["value"], node["fn"].rsample())
            real, made = (self._rows(node, value, batch) for value in (real, made))
            found[site.name] = (_joined(real, seen), _joined(made, seen))
            seen.append(real)
        return found

    def _rows(self, node: Mapping[str, Any], value: Tensor, batch: Batch) -> Tensor:
        frames = [f for f in node["cond_indep_stack"] if f.name == self.setting.info.data_plate]
        axis = frames[0].dim - node["fn"].event_dim if frames else None
        return rows_first(value, axis, batch)


def _joined(rows: Tensor, before: Sequence[Tensor]) -> Tensor:
    """Rows beside what they are made from: for images the last image and numbers as channels, else all flattened."""
    if not before:
        return rows
    before = [value.to(rows) for value in before]
    if rows.dim() != 4:
        return torch.cat([rows.flatten(1), *(value.flatten(1) for value in before)], 1)
    images = [value for value in before if value.dim() == 4][-1:]
    planes = [interpolate(image, size=rows.shape[2:], mode="nearest") for image in images]
    numbers = [value.flatten(1)[:, :, None, None] for value in before if value.dim() != 4]
    return torch.cat([rows, *planes, *(value.expand(-1, -1, *rows.shape[2:]) for value in numbers)], 1)
