"""Walkback: a chain that corrupts and restores rows learns to come back to the data from wherever it strays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import require_whole
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Setting
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["Walkback"]


@dataclass(frozen=True)
class Walkback(Objective):
    r"""The cost of restoring a row of the data from where its chain has gone, in k steps.

    .. math:: -\frac{1}{k} \sum_{t=1}^{k} \log P_\theta(x \mid \tilde x_t), \quad \tilde x_t \sim C(\cdot \mid x_{t-1}),
              \quad x_t \sim P_\theta(\cdot \mid \tilde x_t), \quad x_0 = x

    With one step it is the cost of a denoising autoencoder, and at its minimum the chain's stationary distribution is
    that of the data. Further steps (walkback) corrupt rows by the chain itself, which takes away modes that the chain
    finds between the data. No gradient goes through a draw. The cost is a conditional log likelihood in nats per row,
    and no bound of log p(x).

    Args:
        steps: k.

    Raises:
        ValueError: if ``steps`` < 1.

    References:
        Generalized denoising auto-encoders as generative models (Bengio, Yao, Alain and Vincent, 2013).

    Example:
        >>> Walkback(steps=4)
        Walkback(steps=4)
    """

    steps: int = 3

    uses_guide = False

    def __post_init__(self) -> None:
        require_whole("steps", self.steps)

    @property
    def needs(self) -> Sequence[Need]:
        return (("transition",),)

    def undivided(self, setting: Setting) -> str | None:
        return "walkback draws chains of every batch, which one process does"

    def build(self, setting: Setting) -> Game:
        return _WalkbackGame(setting, self.steps)


class _WalkbackGame(Game):
    def __init__(self, setting: Setting, steps: int) -> None:
        assert setting.program.transition is not None
        self.chain, self.setting, self.steps = setting.program.transition, setting, steps
        observed = [site.name for site in setting.info.select(kind="observed")]
        if self.chain.site not in observed:
            raise ValueError(
                f"transition: its rows are those of the site {self.chain.site!r}, which {setting.program.name!r} does "
                f"not observe (it observes {', '.join(observed)}); say Transition(..., site={observed[0]!r})"
            )
        self._check_chain(setting.probe)
        self.notes = {"chain": f"{steps} step(s) away from the data"}

    def _check_chain(self, batch: Batch) -> None:
        """One transition: other shapes would spread over rows or columns, and their costs be summed or averaged."""
        with without_side_effects():
            x = self._rows(batch)
            corrupted = self.chain.corrupt(x)
            if not isinstance(corrupted, Tensor) or corrupted.dim() == 0 or len(corrupted) != len(x):
                got = f"shape {tuple(corrupted.shape)}" if isinstance(corrupted, Tensor) else type(corrupted).__name__
                raise ValueError(f"transition: `corrupt` has to give one of each of {len(x)} rows, got {got}")
            restored: Any = self.chain.denoise(corrupted)
            shape, event = tuple(restored.shape()), tuple(restored.event_shape)
        if shape != tuple(x.shape) or len(event) != x.dim() - 1:
            raise ValueError(
                f"transition: `denoise` has to give a distribution over rows of shape {tuple(x.shape)}, one event for "
                f"each (`.to_event({x.dim() - 1})`), got shape {shape} with events of shape {event}"
            )

    def _rows(self, batch: Batch) -> Tensor:
        trace = poutine.trace(self.setting.model).get_trace(*batch.args, **batch.kwargs)
        value: Tensor = trace.nodes[self.chain.site]["value"]
        return value.detach()

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        x = at = self._rows(batch)
        costs = []
        for step in range(self.steps):
            restored = self.chain.denoise(self.chain.corrupt(at))
            costs.append(-restored.log_prob(x).mean())
            if step + 1 < self.steps:
                with torch.no_grad():
                    at = restored.sample()
        return Loss(torch.stack(costs).mean(), {"reconstruction": costs[0].detach()}), state
