r"""Denoising diffusion: a fixed chain that noises the rows as the guide, a learned chain back as the model.

.. math:: p(x_T) = \mathrm{Normal}(0, I), \quad
          p(x_{t-1} \mid x_t) = \mathrm{Normal}(\mu(x_t, t), \sigma_t^2), \quad
          q(x_t \mid x_{t-1}) = \mathrm{Normal}(\sqrt{1 - \beta_t} \, x_{t-1}, \beta_t I)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_gen.data.inputs import check_width, entries, row_width
from ppl_gen.errors import require_whole
from ppl_gen.models.diffusion.noising import Noising, Schedule, at, noise_schedule
from ppl_gen.program.extensions import TimeSteps
from ppl_gen.program.program import Program, Recipe

__all__ = ["Denoiser", "Diffusion", "denoising_diffusion"]


class Denoiser(nn.Module):
    r"""p(x_{t-1} | x_t) from a network that predicts the noise in x_t (Ho et al. 2020).

    .. math:: \mu(x_t, t) = \frac{x_t - \beta_t \epsilon(x_t, t) / \sqrt{1 - \bar\alpha_t}}{\sqrt{1 - \beta_t}}

    The network's last layer starts at zero and adds to sqrt(1 - abar_t) x_t, the best prediction for standard normal
    rows: so the untrained chain generates exactly those. The log variance of each step and feature lies on the line
    through those of q(x_{t-1} | x_t, x_0) and of q(x_t | x_{t-1}), at a learned place that starts at the latter (Nichol
    and Dhariwal 2021). Called with rows and a time step, it returns mean and standard deviation.
    """

    def __init__(self, features: int, noising: Noising, hidden: int, layers: int) -> None:
        super().__init__()
        self.noising = noising
        waves = 2.0 ** torch.arange(4) * torch.arange(noising.steps + 1)[:, None] * (math.pi / noising.steps)
        self.register_buffer("clock", torch.cat([waves.sin(), waves.cos()], 1).to(torch.get_default_dtype()))
        widths = [features + self.get_buffer("clock").shape[1], *[hidden] * layers]
        parts: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            # Smooth units stay on a plateau at the normal distribution for a thousand steps (measured on a ring).
            parts += [nn.Linear(before, after), nn.ReLU()]
        last = nn.Linear(hidden, features)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*parts, last)
        self.place = nn.Parameter(torch.ones(noising.steps, features))
        # The posterior variance is zero at t = 1; that of the second step stands in for it.
        upper, lower = noising.betas.log(), noising.posterior_variance[1:].log()
        self.bounds = torch.cat([lower[:1], lower]), upper

    def forward(self, x: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        chain, clock = self.noising, self.get_buffer("clock")[t]
        noise = at(chain.noise, t, x).sqrt()
        predicted = noise * x + self.network(torch.cat([x, clock.expand(*x.shape[:-1], -1)], -1))
        beta = at(chain.betas, t, x, first=1)
        mean = (x - beta / noise * predicted) / (1 - beta).sqrt()
        lower, upper = (at(bound, t, x, first=1) for bound in self.bounds)
        return mean, (0.5 * torch.lerp(lower, upper, self.place[t - 1])).exp()


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A noising chain and a chain back, in standardised units, with rows x = middle + spread * x_0.

    Args:
        noising: the fixed chain.
        reverse: ``reverse(x_t, t) -> (mean, standard deviation)`` of p(x_{t-1} | x_t), rows x features.
        middle: of the data, one number for each feature.
        spread: of the data, one number for each feature.
    """

    noising: Noising
    reverse: Callable[[Tensor, int | Tensor], tuple[Tensor, Tensor]]
    middle: Tensor
    spread: Tensor

    def model(self, x: Tensor) -> None:
        """x_T, ..., x_1, and the rows."""
        x, middle, spread = self._on(x)
        if isinstance(self.reverse, nn.Module):
            pyro.module("denoiser", self.reverse)
        with pyro.plate("data", len(x)):
            noise = dist.Normal(torch.zeros_like(middle), 1.0).to_event(1)
            state = pyro.sample(f"x_{self.noising.steps}", noise)
            for t in range(self.noising.steps, 1, -1):
                mean, scale = self.reverse(state, t)
                state = pyro.sample(f"x_{t - 1}", dist.Normal(mean, scale).to_event(1))
            mean, scale = self.reverse(state, 1)
            pyro.sample("x", dist.Normal(middle + spread * mean, spread * scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """x_1, ..., x_T given the rows; nothing in it is learned."""
        x, middle, spread = self._on(x)
        state = (x - middle) / spread
        with pyro.plate("data", len(x)):
            for t in range(1, self.noising.steps + 1):
                mean, scale = self.noising.step(state, t)
                state = pyro.sample(f"x_{t}", dist.Normal(mean, scale).to_event(1))

    def term(self, t: Tensor, x: Tensor) -> Tensor:
        """The term of time step ``t`` at one draw of x_t given the rows: rows."""
        x, middle, spread = self._on(x)
        start = (x - middle) / spread
        mean, scale = self.noising.marginal(start, t)
        return self.cost(t, start, mean + scale * torch.randn_like(mean))

    def cost(self, t: int | Tensor, start: Tensor, state: Tensor) -> Tensor:
        r"""KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) at given x_0 and x_t; -log p(x | x_1) at t = 1: rows.

        Both are E_q[-log p(x_{t-1} | x_t)] minus a constant of the step: the entropy of q(x_{t-1} | x_t, x_0), or, at
        t = 1, where that has no width, the logarithm of the change of units.
        """
        mean, scale = self.reverse(state, t)
        target, width = self.noising.posterior(start, state, t)
        cross = scale.log() + 0.5 * math.log(2 * math.pi) + (width**2 + (target - mean) ** 2) / (2 * scale**2)
        units = self.spread.to(start).log().sum()
        later = 0.5 * len(self.spread) * (self.noising.posterior_variance[1:].log() + math.log(2 * math.pi * math.e))
        entropy = torch.cat([-units.reshape(1), later.to(start)])
        return cross.sum(-1) - entropy[t - 1]

    def constant(self, x: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || Normal(0, I)): rows."""
        x, middle, spread = self._on(x)
        mean, scale = self.noising.marginal((x - middle) / spread, self.noising.steps)
        return (0.5 * (mean**2 + scale**2 - 1) - scale.log()).sum(-1)

    def _on(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        return x, self.middle.to(x), self.spread.to(x)

    def program(self, name: str = "diffusion") -> Program:
        """Model, guide, and the ELBO's terms step by step."""
        steps = TimeSteps(self.noising.steps, self.term, self.constant)
        return Program(self.model, self.guide, name=name, time_steps=steps)


def denoising_diffusion(
    features: int | None = None,
    *,
    steps: int = 50,
    hidden: int = 64,
    layers: int = 3,
    schedule: Schedule = "linear",
) -> Recipe:
    r"""A diffusion model of rows of numbers (N x features).

    .. math:: \log p(x) \ge \mathbb{E}_q \Bigl[ \log p(x \mid x_1)
              - \sum_{t=2}^{T} \mathrm{KL}(q(x_{t-1} \mid x_t, x_0) \,\|\, p(x_{t-1} \mid x_t)) \Bigr]
              - \mathrm{KL}(q(x_T \mid x_0) \,\|\, p(x_T))

    Model and guide are ordinary Pyro programs over the sites ``x_T`` ... ``x_1`` (in standardised units: every column
    shifted by its mean and divided by its standard deviation) and ``x`` (in the user's, its density too). ``ELBO()``
    takes one sampled time step for each row at each update, with the divergences in closed form; ``ELBO(time_step=
    "all")`` and ``IWAE`` run both chains. The guide is fixed. ``fit.sample`` runs the chain back; ``fit.evidence``
    weighs whole chains, a bound that tightens with ``particles``. The network is ``denoiser``.

    Args:
        features: columns of the data; None: as many as they have.
        steps: T, at least 2.
        hidden: width of the network.
        layers: hidden layers of the network.
        schedule: how the noise grows, "linear" or "cosine"; see `noise_schedule`.

    Returns:
        A recipe; it raises ValueError for data of another shape, or with a constant column.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Deep unsupervised learning using nonequilibrium thermodynamics (Sohl-Dickstein et al., 2015).
        Denoising diffusion probabilistic models (Ho, Jain and Abbeel, 2020).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.arange(40.0).reshape(20, 2)
        >>> fit = pg.fit(denoising_diffusion(steps=10, hidden=16), x, SVI(steps=5), seed=0)
        >>> fit.sample(3)["x"].shape, fit.notes["gradients"]
        (torch.Size([3, 2]), 'one of 10 time steps sampled per row')
    """
    check_width("features", features)
    for name, value in (("hidden", hidden), ("layers", layers)):
        require_whole(name, value)
    noise_schedule(schedule, steps)

    def build(data: Any) -> Program:
        rows = _rows(data, row_width(features, data, "denoising_diffusion"))
        noising = noise_schedule(schedule, steps)
        denoiser = Denoiser(rows.shape[1], noising, hidden, layers)
        return Diffusion(noising, denoiser, rows.mean(0), rows.std(0, correction=0)).program("denoising_diffusion")

    arguments = {"features": features, "steps": steps, "schedule": schedule}
    return Recipe(build, name="denoising_diffusion", arguments=arguments)


def _rows(data: Any, features: int) -> Tensor:
    (rows,) = entries(data, "denoising_diffusion", "x")
    assert rows is not None
    rows = rows.double()
    if rows.dim() != 2 or rows.shape[1] != features:
        raise ValueError(
            f"data: denoising_diffusion(features={features}) takes rows of {features} columns, got {tuple(rows.shape)}"
        )
    constant = (rows == rows[:1]).all(0)
    if bool(constant.any()):
        columns = ", ".join(map(str, constant.nonzero().squeeze(-1).tolist()))
        raise ValueError(f"data: column(s) {columns} are constant: no density exists in that direction; leave them out")
    return rows
