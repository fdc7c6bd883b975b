"""Wake-sleep: the program learns from the guide's draws for the data, the guide from the program's own draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.arguments import require_choice
from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError, require_whole
from ppl_gen.handlers.normalised import normalised
from ppl_gen.handlers.sites import is_sample
from ppl_gen.handlers.substitute import Substitute
from ppl_gen.handlers.unobserved import unobserved
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Player, Setting
from ppl_gen.program.offers import Need
from ppl_gen.weights.log_weights import collected, sampled, traced, traced_together
from ppl_gen.weights.particles import can_vectorise
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["WakeSleep"]


@dataclass(frozen=True)
class WakeSleep(Objective):
    r"""Two players: the program pays in the wake phase, the guide in the sleep phase; no gradient goes through a draw.

    .. math:: L_{program} = -\mathbb{E}_{z \sim q(z | x)} \log p(x, z), \qquad
              L_{guide} = -\mathbb{E}_{(x, z) \sim p} \log q(z | x)

    With ``particles`` K > 1 the wake phase is reweighted: K draws z_k for each row, normalised weights
    :math:`w_k \propto p(x, z_k) / q(z_k | x)`, and :math:`-\sum_k w_k \log p(x, z_k)`, whose gradient is that of the
    importance-weighted bound for the program's parameters. The guide may then learn awake, too:
    ``guide="wake"`` pays :math:`-\sum_k w_k \log q(z_k | x)`, ``"both"`` the mean of both.

    Draws need no reparameterisation and no baseline, so discrete latents are as good as any. The sleep phase minimises
    KL(p(z | x) || q) on rows that the program dreams, not on the data: there is no function that both players descend,
    and ``program_loss`` is no bound of anything for K = 1. Compare fits by ``fit.evidence``.

    Every latent site must stand inside the data plate, be drawn by the guide, and the guide must read the rows: the
    observed values are replaced by dreams where the data hold them.

    Where the energy of a program is that of a latent site (a deep belief network), the wake phase pays its free energy
    at the guide's draw minus that at the end of ``steps`` Gibbs sweeps from there (contrastive divergence), and dreams
    begin at that end: the up-down algorithm.

    Args:
        particles: K.
        guide: in which phase the guide learns: "sleep", "wake" or "both".
        steps: Gibbs sweeps where a latent site has an energy.

    Raises:
        ValueError: for settings out of range, or a guide that learns awake from one particle alone.
        IncompatibleError: if the program or its guide is not of the kind described above, or both share a parameter.

    References:
        The wake-sleep algorithm for unsupervised neural networks (Hinton, Dayan, Frey and Neal, 1995).
        A fast learning algorithm for deep belief nets (Hinton, Osindero and Teh, 2006), for up-down.
        Reweighted wake-sleep (Bornschein and Bengio, 2015).

    Example:
        >>> WakeSleep(particles=10, guide="both")
        WakeSleep(particles=10, guide='both', steps=1)
    """

    particles: int = 1
    guide: str = "sleep"
    steps: int = 1

    def __post_init__(self) -> None:
        require_whole("particles", self.particles)
        require_whole("steps", self.steps)
        require_choice("guide", self.guide, ("sleep", "wake", "both"))
        if self.guide != "sleep" and self.particles < 2:
            raise ValueError(
                f"guide: {self.guide!r} weighs particles against each other, and one weighs one whatever it is; "
                "expected particles of at least 2"
            )

    @property
    def needs(self) -> Sequence[Need]:
        return (("density", "energy"), ("latent sites",), ("samples",), ("data plate",))

    def undivided(self, setting: Setting) -> str | None:
        return "the guide of wake-sleep learns from dreams, which are drawn by one process"

    def build(self, setting: Setting) -> Game:
        return _WakeSleepGame(self, setting)


class _WakeSleepGame(Game):
    def __init__(self, objective: WakeSleep, setting: Setting) -> None:
        _check_sites(setting)
        self.objective, self.setting, self.energy = objective, setting, setting.program.energy
        self.model = setting.model
        if self.energy is not None:
            self.model = normalised(setting.model, self.energy.site, self.energy.free_energy, 0.0)
        with without_side_effects():
            self.sources = _sources(setting)
            guided, generative = (_parameters(f, setting.probe) for f in (setting.guide, setting.model))
        if shared := sorted(guided & generative):
            raise IncompatibleError(
                f"wake-sleep moves model and guide by losses of their own, and both have the parameter(s) "
                f"{', '.join(shared)}; give each parameters of its own"
            )
        self.vectorise = objective.particles > 1 and can_vectorise(
            self.model, setting.guide, setting.info, setting.probe, ()
        )
        self.players = (
            Player("guide", owns=lambda name: name in guided),
            Player("program", owns=lambda name: name not in guided),
        )
        awake = f"{objective.particles} particle(s) for each row"
        self.notes = {"phases": f"the program learns awake from {awake}; the guide learns by: {objective.guide}"}

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        if player == "program":
            return self._wake(batch), state
        losses = []
        if self.objective.guide in ("wake", "both"):
            log_p, log_q, _ = self._awake(batch)
            shares = torch.softmax((log_p - log_q).detach(), 0)
            losses.append(-(shares * log_q).sum(0).mean())
        if self.objective.guide in ("sleep", "both"):
            losses.append(self._sleep(batch))
        return Loss(torch.stack(losses).mean()), state

    def _wake(self, batch: Batch) -> Loss:
        log_p, log_q, drawn = self._awake(batch)
        weights = (log_p - log_q).detach()
        value = -(torch.softmax(weights, 0) * log_p).sum(0).mean()
        bound = torch.logsumexp(weights, 0).mean() - math.log(len(weights))
        if self.energy is None:
            return Loss(value, {"bound": bound})
        top = drawn[self.energy.site]
        with torch.no_grad():
            made = self.energy.gibbs(top, self.objective.steps)
        chain = self.energy.free_energy(made).mean()
        return Loss(value - chain, {"chain_free_energy": chain.detach()})

    def _awake(self, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """log p(x, z) and log q(z | x), particles x rows, at draws of the guide that carry no gradient; the draws."""
        parts = [self._particles(batch, self.objective.particles)] if self.vectorise else []
        parts = parts or [self._particles(batch, 1) for _ in range(self.objective.particles)]
        log_p, log_q = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return log_p, log_q, parts[0][2]

    def _particles(self, batch: Batch, count: int) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        info, guide = self.setting.info, self.setting.guide
        with torch.no_grad():
            if count > 1:
                once = traced_together(self.model, guide, info, batch, count, {})[1]
            else:
                once = sampled(guide, batch)
        drawn = {name: site["value"].detach() for name, site in once.nodes.items() if is_sample(site)}
        if count > 1:
            p, q = traced_together(self.model, guide, info, batch, count, drawn)
        else:
            p, q = traced(self.model, guide, batch, drawn)
        # Each by itself: in a difference of both the guide's parameters would keep a gradient made of rounding.
        only_p, minus_q = collected(p, sampled(None, batch), info, count, drawn), collected(None, q, info, count, {})
        assert only_p.rows is not None and minus_q.rows is not None
        return only_p.rows + only_p.globals / (batch.total or 1), -minus_q.rows, drawn

    def _sleep(self, batch: Batch) -> Tensor:
        """-log q of the latents that the program drew with the rows, mean over rows."""
        with torch.no_grad():
            begun = {}
            if self.energy is not None:
                site = self.energy.site
                begun[site] = self.energy.gibbs(sampled(self.setting.guide, batch).nodes[site]["value"], self.steps)
            with Substitute(begun):
                dream = poutine.trace(unobserved(self.setting.model)).get_trace(*batch.args, **batch.kwargs)
        values = {name: site["value"].detach() for name, site in dream.nodes.items() if is_sample(site)}
        dreamt = _replaced(batch, {self.sources[name]: values[name] for name in self.sources})
        q = sampled(self.setting.guide, dreamt, values)
        minus_q = collected(None, q, self.setting.info, 1, {})
        assert minus_q.rows is not None
        return minus_q.rows[0].mean()

    @property
    def steps(self) -> int:
        return self.objective.steps


def _parameters(function: Callable[..., Any] | None, batch: Batch) -> set[str]:
    assert function is not None
    trace = poutine.trace(function).get_trace(*batch.args, **batch.kwargs)
    return {name for name, node in trace.nodes.items() if node["type"] == "param"}


def _check_sites(setting: Setting) -> None:
    info, name = setting.info, setting.program.name
    guided = set(info.guide_sites or {})
    if outside := [site.name for site in info.select(local=False)]:
        raise IncompatibleError(
            f"WakeSleep gives no gradient that leads to the posterior of {', '.join(outside)} of {name!r}: the guide "
            "learns from rows that the program dreams, and what these tell of a site outside the data plate is its "
            "prior. Take ELBO(), or write it as a parameter (pyro.param)"
        )
    if undrawn := [site.name for site in info.select() if site.name not in guided]:
        raise IncompatibleError(
            f"WakeSleep gives no gradient to the latent site(s) {', '.join(undrawn)} of {name!r}, which the guide does "
            "not draw; draw them in the guide, or take ELBO(), which sums finite ones out"
        )
    if more := [site for site in guided if site not in info.sites]:
        raise IncompatibleError(
            f"WakeSleep gives no gradient to a guide that draws {', '.join(more)} beside the sites of {name!r}, as an "
            "autoguide does: it holds numbers for each row and cannot read dreams. Write an amortised guide"
        )


#: Where an entry of the data stands in a call of the model: its place, or its name.
Place = int | str


def _sources(setting: Setting) -> dict[str, Place]:
    """Which entry of the data each observed site shows, found by its values on the probe.

    Raises:
        IncompatibleError: if a site shows no entry as it is, or several that are equal: dreams would have no place.
    """
    batch, found = setting.probe, dict[str, Place]()
    trace = poutine.trace(setting.model).get_trace(*batch.args, **batch.kwargs)
    places: dict[Place, Any] = dict(enumerate(batch.args))
    places.update(batch.kwargs.items())
    for site in (*setting.info.select(kind="observed"), *setting.info.select(kind="factor")):
        value = trace.nodes[site.name]["value"] if site.name in trace.nodes else None
        same = [place for place, entry in places.items() if value is not None and _shows(value, entry)]
        if site.kind == "factor" or site.name in setting.info.halves or len(same) != 1:
            why = "several entries of the data" if len(same) > 1 else "no entry of the data as it is"
            raise IncompatibleError(
                f"WakeSleep gives no gradient to the guide of {setting.program.name!r}: the site {site.name!r} shows "
                f"{why}, so there is no place to put a dream of it. Observe an argument of the model (obs=x)"
            )
        found[site.name] = same[0]
    return found


def _shows(value: Tensor, entry: Any) -> bool:
    if not isinstance(entry, Tensor) or entry.dim() == 0 or entry.numel() != value.numel():
        return False
    return len(entry) == len(value) and torch.equal(entry.reshape(value.shape).to(value.dtype), value)


def _replaced(batch: Batch, values: Mapping[Place, Tensor]) -> Batch:
    """The call with other values in these places, in their shapes and types."""
    args, kwargs = list(batch.args), dict(batch.kwargs)
    for place, value in values.items():
        if isinstance(place, int):
            args[place] = value.reshape(args[place].shape).to(args[place].dtype)
        else:
            kwargs[place] = value.reshape(kwargs[place].shape).to(kwargs[place].dtype)
    return replace(batch, args=tuple(args), kwargs=kwargs)
