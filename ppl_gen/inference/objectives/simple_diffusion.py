"""The plain error of the predicted noise: what most diffusion models of images are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppl_gen.data.batching import Batch
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Setting
from ppl_gen.inference.objectives.time_steps import check_steps, dealt_steps
from ppl_gen.program.offers import Need

__all__ = ["SimpleDiffusion"]


@dataclass(frozen=True)
class SimpleDiffusion(Objective):
    r"""Mean squared error of the noise that a diffusion model predicts, all time steps weighed alike.

    .. math:: \mathbb{E}_{t, \epsilon} \bigl| \epsilon - \epsilon(\sqrt{\bar\alpha_t} x_0 +
              \sqrt{1 - \bar\alpha_t} \epsilon, t) \bigr|^2, \quad t \text{ uniform on } 1, \dots, T

    It is no bound and is not in nats: the terms of the ELBO are these errors with other weights, which are large where
    there is little noise. Pictures drawn of it look better, and the evidence is worse; ``fit.evidence`` and the part
    ``bound`` of the history (the negative ELBO of the same draws, in nats) stay what they are.

    The widths of the chain back, of which the error knows nothing, are moved by their gradient in the bound (Nichol and
    Dhariwal 2021); the value of the loss is the error alone, summed over the numbers of a row.

    References:
        Denoising diffusion probabilistic models (Ho, Jain and Abbeel, 2020), equation 14.
        Improved denoising diffusion probabilistic models (Nichol and Dhariwal, 2021).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import denoising_diffusion
        >>> x = torch.arange(40.0).reshape(20, 2)
        >>> fit = pg.fit(denoising_diffusion(steps=10, hidden=16), x, SVI(SimpleDiffusion(), steps=5), seed=0)
        >>> sorted(fit.history)
        ['bound', 'program_loss']
    """

    @property
    def needs(self) -> Sequence[Need]:
        return (("noise prediction",),)

    def build(self, setting: Setting) -> Game:
        return _SimpleGame(setting)

    def undivided(self, setting: Setting) -> str | None:
        return "the time steps of a batch are spread over all of its rows together"


class _SimpleGame(Game):
    def __init__(self, setting: Setting) -> None:
        chain = setting.program.time_steps
        assert chain is not None and chain.error is not None
        check_steps(chain, setting.probe)
        self.chain, self.error = chain, chain.error
        self.notes = {
            "gradients": f"one of {chain.steps} time steps sampled per row",
            "loss": "the squared error of the predicted noise: no bound, and not in nats",
        }

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        t = dealt_steps(batch.rows or 1, self.chain.steps)
        error, term = (value.mean() for value in self.error(t, *batch.args, **batch.kwargs))
        widths = term * self.chain.steps
        constant = self.chain.constant(*batch.args, **batch.kwargs).mean()
        # Of value zero, with the gradient of the bound in the widths: no other parameter is reached by both.
        return Loss(error + (widths - widths.detach()), {"bound": (widths + constant).detach()}), state
