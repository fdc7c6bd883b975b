"""Wasserstein autoencoders: the program of a variational autoencoder, its codes matched to the prior all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_gen.arguments import require_choice
from ppl_gen.data.batching import Batch
from ppl_gen.distances.mmd import KERNELS, SCALES, mean_squared_distance, unbiased
from ppl_gen.errors import IncompatibleError, require_number, require_positive, require_whole
from ppl_gen.handlers.sites import is_sample, log_density, scaled
from ppl_gen.handlers.unobserved import unobserved
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.critics import (
    check_critic,
    check_output,
    check_penalised,
    default_critic,
    gradient_penalty,
)
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Player, Setting
from ppl_gen.inference.objectives.observed import rows_first
from ppl_gen.inference.objectives.tracing import traces
from ppl_gen.nn.copies import own_copy
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["WAE"]


@dataclass(frozen=True)
class WAE(Objective):
    r"""A Wasserstein autoencoder over model p(x | z) p(z) and guide q(z | x), both left as they are.

    .. math:: \min_{p, q} \; \mathbb{E}_x \mathbb{E}_{q(z \mid x)}[-\log p(x \mid z)]
              + \lambda \, \mathrm{Div}(\bar q, p(z)), \qquad \bar q(z) = \mathbb{E}_x\, q(z \mid x)

    The evidence lower bound draws each q(z | x) to the prior, so that codes of different rows overlap; here only their
    mixture over all rows is drawn to it. The divergence is that of a batch of codes from as many draws of the prior:

    - ``"mmd"``: the unbiased squared maximum mean discrepancy (`ppl_gen.distances.mmd`) of kernels of seven lengths,
      whose squares are 0.1 to 10 times the mean squared distance of two draws of the prior;
    - ``"gan"``: a critic T tells draws of the prior from codes; the codes pay -log sigmoid(T), which at the best critic
      leads to where Jensen-Shannon vanishes;
    - ``"energy"``: max over T of E_codes T - E_prior T, T an energy whose slope is held near 1 by a gradient penalty.

    The loss is in nats per row, and no bound of anything: the guide is not the posterior of the program, its variances
    shrink as far as the network lets them, and neither does a small loss say that the evidence is large.
    `fit.evidence` and `fit.diagnose` judge model and guide as they do after any other objective; expect k-hats that
    say so. The history keeps ``reconstruction`` and ``divergence``.

    Args:
        kind: which divergence.
        weight: lambda, in nats. The published 10 is for squared errors of a picture; log densities of many pixels need
            more.
        kernel: of "mmd": "imq" (inverse multiquadratic, as published) or "rbf".
        critic: of "gan" and "energy": a network from codes (all latent sites of a row, flattened and joined) to one
            number each; the fit plays with a private copy, ``fit.module("critic")``. None: a perceptron.
        critic_steps: updates of the critic for each of the program.
        penalty_weight: of the gradient penalty of "energy".

    Raises:
        ValueError, TypeError: for settings out of range, or a critic that does not give one number per row.
        IncompatibleError: for a program that has latent sites outside the data plate, or without a gradient.

    Unless the algorithm names others, the program moves by Adam at 1e-3, the critic by Adam at 5e-4 with a first beta
    of 0.5.

    Source: Tolstikhin, Bousquet, Gelly and Schoelkopf (2018), algorithms 1 and 2.

    Example:
        >>> import ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import vae
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> fit = pg.fit(vae(latent=2, hidden=(8,)), x, SVI(WAE("mmd"), steps=20), seed=0)
        >>> sorted(fit.history.data_vars)
        ['divergence', 'program_loss', 'reconstruction']
    """

    kind: str = "mmd"
    weight: float = 10.0
    kernel: str = "imq"
    critic: nn.Module | None = None
    critic_steps: int = 1
    penalty_weight: float = 10.0

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, ("mmd", "gan", "energy"))
        require_number("weight", self.weight)
        require_choice("kernel", self.kernel, KERNELS)
        check_critic("critic", self.critic)
        if self.kind == "mmd" and self.critic is not None:
            raise ValueError("critic: 'mmd' has none; take 'gan' or 'energy', or leave it out")
        require_whole("critic_steps", self.critic_steps)
        require_positive("penalty_weight", self.penalty_weight)

    @property
    def label(self) -> str:
        return f"WAE-{self.kind}"

    @property
    def needs(self) -> Sequence[Need]:
        return (("density",), ("data plate",), ("codes",))

    def undivided(self, setting: Setting) -> str | None:
        # The losses of games with a critic are means over rows.
        return "the maximum mean discrepancy compares all pairs of rows of a batch" if self.kind == "mmd" else None

    def build(self, setting: Setting) -> Game:
        return _WAEGame(self, setting)


def _adam(rate: float, first: float) -> Any:
    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        fused = all(p.device.type in ("cpu", "cuda", "mps") for p in params)
        return torch.optim.Adam(params, lr=rate, betas=(first, 0.999), fused=fused or None)

    return build


class _WAEGame(Game):
    def __init__(self, objective: WAE, setting: Setting) -> None:
        self.objective, self.setting = objective, setting
        self.names = [site.name for site in setting.info.select()]
        self._refuse_stuck()
        with without_side_effects(), torch.no_grad():
            prior = self._prior(setting.sample())
        program = Player("program", optimiser=_adam(1e-3, 0.9))
        if objective.kind == "mmd":
            if setting.probe.rows == 1:
                raise ValueError("batch_size: 'mmd' compares pairs of rows, expected at least 2 rows in a batch, got 1")
            mean = mean_squared_distance(prior)
            self.squares = mean * torch.tensor(SCALES, dtype=mean.dtype, device=mean.device)
            self.players = (program,)
            self.notes = {
                "divergence": f"kernels {objective.kernel!r} of {len(SCALES)} lengths about {mean.sqrt():.3g}"
            }
            return
        own = objective.critic
        critic = default_critic(prior, rowwise=True) if own is None else own_copy("critic", own)
        self.critic = critic.to(device=prior.device, dtype=prior.dtype)
        check_output(self.critic, prior)
        if objective.kind == "energy":
            check_penalised(self.critic, prior, "the penalty of 'energy'")
        self.modules: Mapping[str, nn.Module] = {"critic": self.critic}
        self.players = (Player("critic", objective.critic_steps, optimiser=_adam(5e-4, 0.5)), program)
        self.notes = {"critic": f"{'perceptron (default)' if own is None else 'as given'} on {prior.shape[1]} code(s)"}

    def _refuse_stuck(self) -> None:
        drawn = self.setting.info.guide_sites or {}
        missing = [name for name in self.names if name not in drawn]
        if missing:
            raise IncompatibleError(f"the guide draws no {', '.join(missing)}, so these codes cannot be matched")
        stuck = [name for name in self.names if not drawn[name].reparameterised]
        if stuck:
            raise IncompatibleError(
                f"the guide gives no gradient to {', '.join(stuck)}: its draws there are not reparameterised"
            )

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        return self._critic_loss(batch) if player == "critic" else self._program_loss(batch), state

    def _program_loss(self, batch: Batch) -> Loss:
        guide, model = traces(self.setting, batch)
        likelihood = torch.zeros(())
        for name, site in model.nodes.items():
            if is_sample(site) and name not in guide.nodes:
                likelihood = likelihood + scaled(log_density(site), site).sum()
        reconstruction = -likelihood / (batch.total or 1)
        codes = self._joined(guide, batch)
        if self.objective.kind == "mmd":
            pairs = len(codes) > 1  # what is left over at the end of an epoch may be one row, and says nothing of it
            divergence = codes.new_zeros(())
            if pairs:
                divergence = unbiased(codes, self._prior(batch, model), self.objective.kernel, self.squares)
        else:
            score = self.critic(codes)
            divergence = (softplus(-score) if self.objective.kind == "gan" else score).mean()
        parts = {"reconstruction": reconstruction.detach(), "divergence": divergence.detach()}
        return Loss(reconstruction + self.objective.weight * divergence, parts)

    def _critic_loss(self, batch: Batch) -> Loss:
        with torch.no_grad():
            guide = poutine.trace(self.setting.guide).get_trace(*batch.args, **batch.kwargs)
            codes, prior = self._joined(guide, batch), self._prior(batch)
        on_codes, on_prior = self.critic(codes), self.critic(prior)
        parts = {"critic_prior": on_prior.detach().mean(), "critic_codes": on_codes.detach().mean()}
        if self.objective.kind == "gan":
            return Loss(softplus(-on_prior).mean() + softplus(on_codes).mean(), parts)
        penalty = gradient_penalty(self.critic, prior, codes)
        value = on_prior.mean() - on_codes.mean() + self.objective.penalty_weight * penalty
        return Loss(value, {**parts, "penalty": penalty.detach()})

    def _prior(self, batch: Batch, model: poutine.Trace | None = None) -> Tensor:
        """New draws of the prior, as many as the batch has rows: rows x numbers.

        Of one latent site they come from where it stood in ``model``: nothing that was drawn moves its prior.
        """
        if model is not None and len(self.names) == 1:
            site = model.nodes[self.names[0]]
            return self._flat(site, site["fn"].rsample(), batch)
        return self._joined(poutine.trace(unobserved(self.setting.model)).get_trace(*batch.args, **batch.kwargs), batch)

    def _joined(self, trace: poutine.Trace, batch: Batch) -> Tensor:
        """All latent values of each row: rows x numbers."""
        sites = [trace.nodes[name] for name in self.names]
        return torch.cat([self._flat(site, site["value"], batch) for site in sites], 1)

    def _flat(self, site: Mapping[str, Any], value: Tensor, batch: Batch) -> Tensor:
        frames = [f for f in site["cond_indep_stack"] if f.name == self.setting.info.data_plate]
        axis = frames[0].dim - site["fn"].event_dim if frames else None
        return rows_first(value, axis, batch).flatten(1)
