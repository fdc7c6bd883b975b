r"""A Gaussian chain into noise as the guide and a learned chain back as the model, with every term of the bound.

.. math:: p(x_T) = \mathrm{Normal}(0, I), \quad
          p(x_{t-1} \mid x_t) = \mathrm{Normal}(\mu(x_t, t), \sigma_t^2), \quad
          q(x_t \mid x_{t-1}) = \mathrm{Normal}(\sqrt{1 - \beta_t} \, x_{t-1}, \beta_t I)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_gen.models.diffusion.imputing import NOTES, imputes
from ppl_gen.models.diffusion.learned_noising import LearnedNoising
from ppl_gen.models.diffusion.noising import Noising, at
from ppl_gen.program.extensions import TimeSteps
from ppl_gen.program.program import Program

__all__ = ["Diffusion"]


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A noising chain and a chain back, in standardised units, with rows x = middle + spread * x_0.

    Args:
        noising: the chain into noise, fixed or learned.
        reverse: ``reverse(x_t, t) -> (mean, standard deviation)`` of p(x_{t-1} | x_t), rows x shape of a row.
        middle: of the data, in the shape of a row.
        spread: of the data, in the shape of a row.
    """

    noising: Noising | LearnedNoising
    reverse: Callable[[Tensor, int | Tensor], tuple[Tensor, Tensor]]
    middle: Tensor
    spread: Tensor

    @property
    def steps(self) -> int:
        """T."""
        return self.noising.steps

    @property
    def event(self) -> int:
        """Dimensions of a row."""
        return self.middle.dim()

    def model(self, x: Tensor) -> None:
        """x_T, ..., x_1, and the rows."""
        x, middle, spread = self._on(x)
        if isinstance(self.reverse, nn.Module):
            pyro.module("denoiser", self.reverse)
        with pyro.plate("data", len(x)):
            noise = dist.Normal(torch.zeros_like(middle), 1.0).to_event(self.event)
            state = pyro.sample(f"x_{self.steps}", noise)
            for t in range(self.steps, 1, -1):
                mean, scale = self.reverse(state, t)
                state = pyro.sample(f"x_{t - 1}", dist.Normal(mean, scale).to_event(self.event))
            mean, scale = self.reverse(state, 1)
            pyro.sample("x", dist.Normal(middle + spread * mean, spread * scale).to_event(self.event), obs=x)

    def guide(self, x: Tensor) -> None:
        """x_1, ..., x_T given the rows; nothing in it is learned but the variances of a learned chain."""
        x, middle, spread = self._on(x)
        if isinstance(self.noising, nn.Module):
            pyro.module("noising", self.noising)
        noising, state = self.noising.current(), (x - middle) / spread
        with pyro.plate("data", len(x)):
            for t in range(1, self.steps + 1):
                mean, scale = noising.step(state, t)
                state = pyro.sample(f"x_{t}", dist.Normal(mean, scale).to_event(self.event))

    # ------------------------------------------------------------------------------------------- terms of the bound
    def term(self, t: Tensor, x: Tensor) -> Tensor:
        """The term of time step ``t`` at one draw of x_t given the rows: rows."""
        x, middle, spread = self._on(x)
        start = (x - middle) / spread
        mean, scale = self.noising.current().marginal(start, t)
        return self.cost(t, start, mean + scale * torch.randn_like(mean))

    def cost(self, t: int | Tensor, start: Tensor, state: Tensor) -> Tensor:
        r"""KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) at given x_0 and x_t; -log p(x | x_1) at t = 1: rows.

        Both are E_q[-log p(x_{t-1} | x_t)] minus a constant of the step: the entropy of q(x_{t-1} | x_t, x_0), or, at
        t = 1, where that has no width, the logarithm of the change of units.
        """
        return self._cost(t, start, state, *self.reverse(state, t))

    def _cost(self, t: int | Tensor, start: Tensor, state: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        noising = self.noising.current()
        target, _ = noising.posterior(start, state, t)
        left = at(noising.posterior_variance, t, state, first=1)  # the root has no gradient where it is zero, at t = 1
        cross = scale.log() + 0.5 * math.log(2 * math.pi) + (left + (target - mean) ** 2) / (2 * scale**2)
        units = self.spread.to(start).log().sum()
        later = 0.5 * self.spread.numel() * (noising.posterior_variance[1:].log() + math.log(2 * math.pi * math.e))
        entropy = torch.cat([-units.reshape(1), later.to(start)])
        return self._summed(cross) - entropy[t - 1]

    def constant(self, x: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || Normal(0, I)): rows."""
        x, middle, spread = self._on(x)
        mean, scale = self.noising.current().marginal((x - middle) / spread, self.steps)
        return self._summed(0.5 * (mean**2 + scale**2 - 1) - scale.log())

    def error(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Two numbers of one draw of x_t, each for every row: :math:`|\epsilon - \epsilon(x_t, t)|^2`, and the term.

        The means in the term have no gradient: it is there for the widths, of which the error knows nothing.
        """
        start = self.standard(x)
        at_t, width = self.noising.current().marginal(start, t)
        noise = torch.randn_like(start)
        state = at_t + width * noise
        mean, scale = self.reverse(state, t)
        wrong = self._summed((noise - self._noise_of(mean, state, t)) ** 2)
        return wrong, self._cost(t, start, state, mean.detach(), scale)

    def noise_in(self, state: Tensor, t: int | Tensor) -> Tensor:
        r"""The noise that the mean of p(x_{t-1} | x_t) stands for.

        .. math:: \epsilon(x_t, t) = \frac{\sqrt{1 - \bar\alpha_t}}{\beta_t} \bigl( x_t - \sqrt{1 - \beta_t}
                  \, \mu(x_t, t) \bigr)
        """
        return self._noise_of(self.reverse(state, t)[0], state, t)

    def _noise_of(self, mean: Tensor, state: Tensor, t: int | Tensor) -> Tensor:
        noising = self.noising.current()
        beta, noise = at(noising.betas, t, state, first=1), at(noising.noise, t, state)
        return noise.sqrt() / beta * (state - (1 - beta).sqrt() * mean)

    def start_in(self, state: Tensor, t: int | Tensor) -> Tensor:
        r"""The x_0 that the predicted noise leaves; of the best chain back it is E[x_0 | x_t].

        .. math:: \hat x_0 = (x_t - \sqrt{1 - \bar\alpha_t} \, \epsilon(x_t, t)) / \sqrt{\bar\alpha_t}
        """
        noising = self.noising.current()
        noise = at(noising.noise, t, state).sqrt() * self.noise_in(state, t)
        return (state - noise) / at(noising.kept, t, state).sqrt()

    # ------------------------------------------------------------------------------- draws, in standardised units
    def standard(self, x: Tensor) -> Tensor:
        """x_0 of rows in the user's units."""
        x, middle, spread = self._on(x)
        return (x - middle) / spread

    def rows(self, start: Tensor) -> Tensor:
        """Rows in the user's units of x_0."""
        _, middle, spread = self._on(start)
        return middle + spread * start

    def pure(self, like: Tensor) -> Tensor:
        """A draw of x_T, as many rows as ``like`` has."""
        return torch.randn_like(like)

    def noised(self, start: Tensor, s: int, t: int) -> Tensor:
        """A draw of q(x_t | x_s = start), 0 <= s < t."""
        mean, scale = self.noising.current().between(start, s, t)
        return mean + scale * torch.randn_like(start)

    def back(self, state: Tensor, t: int) -> Tensor:
        """A draw of p(x_{t-1} | x_t)."""
        mean, scale = self.reverse(state, t)
        return mean + scale * torch.randn_like(state)

    def log_back(self, value: Tensor, state: Tensor, t: int) -> Tensor:
        """log p(x_{t-1} | x_t) of each number of ``value``."""
        return dist.Normal(*self.reverse(state, t)).log_prob(value)

    def _summed(self, value: Tensor) -> Tensor:
        return value.flatten(-self.event).sum(-1)

    def _on(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        return x, self.middle.to(x), self.spread.to(x)

    def program(self, name: str = "diffusion") -> Program:
        """Model, guide, the ELBO's terms step by step, and draws of what is missing."""
        fixed = isinstance(self.noising, Noising)  # the error of the noise is least where there is nothing but noise
        steps = TimeSteps(self.steps, self.term, self.constant, self.error if fixed else None)
        return Program(self.model, self.guide, name=name, time_steps=steps, imputes=imputes(self), notes=NOTES)
