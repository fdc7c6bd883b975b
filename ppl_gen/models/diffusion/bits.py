r"""A chain that flips bits until they are fair coins as the guide, and a learned chain back as the model.

.. math:: q(b_t \mid b_{t-1}) = \mathrm{Bernoulli}((1 - \beta_t) b_{t-1} + \beta_t / 2), \quad
          p(b_T) = \mathrm{Bernoulli}(1/2), \quad p(b_{t-1} \mid b_t) = \mathrm{Bernoulli}(f(b_t, t))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_gen.errors import require_whole
from ppl_gen.models.diffusion.imputing import NOTES, imputes
from ppl_gen.models.diffusion.networks import time_waves
from ppl_gen.models.diffusion.noising import at
from ppl_gen.program.extensions import TimeSteps
from ppl_gen.program.program import Program

__all__ = ["BitDenoiser", "BitDiffusion", "BitNoising", "erasing_schedule"]


@dataclass(frozen=True, eq=False)
class BitNoising:
    r"""The chain where a bit becomes a coin with chance beta_t; :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)`.

    Every method takes a time step in 1..T, one integer or one for each row, and returns the chance of a one.

    Args:
        betas: the chance of a fair coin in place of the bit, at each step.

    Raises:
        ValueError: if there is no step, or a chance is not above 0 and at most 1, or the first is 1.

    Example:
        >>> chain = BitNoising(torch.tensor([0.5, 0.5]))
        >>> float(chain.marginal(torch.ones(1, 1), 2)), float(chain.posterior(torch.ones(1, 1), torch.zeros(1, 1), 2))
        (0.625, 0.5)
    """

    betas: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", self.betas.detach().double())
        if self.betas.dim() != 1 or not len(self.betas):
            raise ValueError(f"betas: expected one chance for each of T steps, got shape {tuple(self.betas.shape)}")
        if not bool(((self.betas > 0) & (self.betas <= 1)).all()) or float(self.betas[0]) == 1:
            raise ValueError(
                f"betas: expected chances above 0 and at most 1, the first below, got {self.betas.tolist()}"
            )

    @property
    def steps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def kept(self) -> Tensor:
        """abar_t, the chance that no coin has been tossed yet: indexed t = 0..T."""
        return torch.cat([self.betas.new_ones(1), (1 - self.betas).cumprod(0)])

    @cached_property
    def told(self) -> Tensor:
        """How much a one at t speaks for a one at 0, the log odds log (1 + abar_t) / (1 - abar_t): at t = 1..T."""
        return 2 * torch.atanh(self.kept[1:])

    def step(self, x: Tensor, t: int | Tensor) -> Tensor:
        """q(b_t = 1 | b_{t-1} = x)."""
        beta = at(self.betas, t, x, first=1)
        return (1 - beta) * x + 0.5 * beta

    def marginal(self, start: Tensor, t: int | Tensor) -> Tensor:
        """q(b_t = 1 | b_0 = start)."""
        kept = at(self.kept, t, start)
        return kept * start + 0.5 * (1 - kept)

    def between(self, x: Tensor, s: int, t: int) -> Tensor:
        """q(b_t = 1 | b_s = x), 0 <= s < t."""
        kept = float((1 - self.betas[s:t]).prod())
        return kept * x + 0.5 * (1 - kept)

    def posterior(self, start: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
        r"""q(b_{t-1} = 1 | b_t = x, b_0 = start), by Bayes' rule; at t = 1 the bit of ``start``."""
        before = at(self.kept, t - 1, x)
        one = before * start + 0.5 * (1 - before)
        stays = 1 - 0.5 * at(self.betas, t, x, first=1)
        one_then = one * (x * stays + (1 - x) * (1 - stays))
        zero_then = (1 - one) * (x * (1 - stays) + (1 - x) * stays)
        return one_then / (one_then + zero_then)


def erasing_schedule(steps: int) -> BitNoising:
    r"""The chain that erases one T-th of the bits at each step: :math:`\beta_t = 1 / (T - t + 1)`.

    Raises:
        ValueError: for fewer than two steps.

    References:
        Deep unsupervised learning using nonequilibrium thermodynamics (Sohl-Dickstein et al., 2015).

    Example:
        >>> erasing_schedule(4).kept
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """
    require_whole("steps", steps, 2)
    return BitNoising(1 / torch.arange(steps, 0, -1, dtype=torch.float64))


class BitDenoiser(nn.Module):
    r"""p(b_{t-1} = 1 | b_t) from a network that guesses b_0.

    .. math:: p(b_{t-1} \mid b_t) = \sum_{b_0} q(b_{t-1} \mid b_t, b_0) \, \hat p(b_0 \mid b_t)

    The network's output starts at zero and is added to the log odds of b_0 given b_t for independent bits with the
    ``chances``: so the untrained chain generates exactly those.

    Args:
        chances: of a one, in the shape of a row.
        noising: the chain into noise.
        network: ``network(x, clock)``, of the shape of x.
    """

    def __init__(self, chances: Tensor, noising: BitNoising, network: nn.Module) -> None:
        super().__init__()
        self.noising = noising
        self.register_buffer("clock", time_waves(noising.steps))
        self.register_buffer("odds", chances.logit().to(torch.get_default_dtype()))
        self.network = network

    def forward(self, x: Tensor, t: int | Tensor) -> Tensor:
        signs = 2 * x - 1
        odds = self.get_buffer("odds") + signs * at(self.noising.told, t, x, first=1)
        guess = (odds + self.network(signs, self.get_buffer("clock")[t])).sigmoid()
        one, zero = (self.noising.posterior(torch.full_like(x, bit), x, t) for bit in (1.0, 0.0))
        return guess * one + (1 - guess) * zero


@dataclass(frozen=True, eq=False)
class BitDiffusion:
    """A noising chain of bits and a chain back.

    Args:
        noising: the fixed chain.
        reverse: ``reverse(b_t, t)``: the chance of each one at t - 1, rows x shape of a row.
        shape: of a row.
    """

    noising: BitNoising
    reverse: Callable[[Tensor, int | Tensor], Tensor]
    shape: tuple[int, ...]

    @property
    def steps(self) -> int:
        """T."""
        return self.noising.steps

    @property
    def event(self) -> int:
        """Dimensions of a row."""
        return len(self.shape)

    def model(self, x: Tensor) -> None:
        """x_T, ..., x_1, and the rows, all of zeros and ones."""
        x = self.standard(x)
        if isinstance(self.reverse, nn.Module):
            pyro.module("denoiser", self.reverse)
        with pyro.plate("data", len(x)):
            coins = dist.Bernoulli(x.new_full(self.shape, 0.5)).to_event(self.event)
            state = pyro.sample(f"x_{self.steps}", coins)
            for t in range(self.steps, 1, -1):
                state = pyro.sample(f"x_{t - 1}", dist.Bernoulli(self.reverse(state, t)).to_event(self.event))
            pyro.sample("x", dist.Bernoulli(self.reverse(state, 1)).to_event(self.event), obs=x)

    def guide(self, x: Tensor) -> None:
        """x_1, ..., x_T given the rows; nothing in it is learned."""
        state = self.standard(x)
        with pyro.plate("data", len(state)):
            for t in range(1, self.steps + 1):
                chance = self.noising.step(state, t)
                state = pyro.sample(f"x_{t}", dist.Bernoulli(chance).to_event(self.event))

    def term(self, t: Tensor, x: Tensor) -> Tensor:
        """The term of time step ``t`` at one draw of b_t given the rows: rows."""
        start = self.standard(x)
        return self.cost(t, start, torch.bernoulli(self.noising.marginal(start, t)))

    def cost(self, t: int | Tensor, start: Tensor, state: Tensor) -> Tensor:
        r"""KL(q(b_{t-1} | b_t, b_0) || p(b_{t-1} | b_t)) at given b_0 and b_t; -log p(b_0 | b_1) at t = 1: rows."""
        return self._summed(_divergence(self.noising.posterior(start, state, t), self.reverse(state, t)))

    def constant(self, x: Tensor) -> Tensor:
        """KL(q(b_T | b_0) || Bernoulli(1/2)): rows."""
        chance = self.noising.marginal(self.standard(x), self.steps)
        return self._summed(_divergence(chance, torch.full_like(chance, 0.5)))

    def standard(self, x: Tensor) -> Tensor:
        """Rows as floating numbers."""
        return x if x.is_floating_point() else x.to(torch.get_default_dtype())

    def rows(self, start: Tensor) -> Tensor:
        """Rows as they are."""
        return start

    def pure(self, like: Tensor) -> Tensor:
        """A draw of b_T, as many rows as ``like`` has."""
        return torch.bernoulli(torch.full_like(like, 0.5))

    def noised(self, start: Tensor, s: int, t: int) -> Tensor:
        """A draw of q(b_t | b_s = start), 0 <= s < t."""
        return torch.bernoulli(self.noising.between(start, s, t))

    def back(self, state: Tensor, t: int) -> Tensor:
        """A draw of p(b_{t-1} | b_t)."""
        return torch.bernoulli(self.reverse(state, t))

    def log_back(self, value: Tensor, state: Tensor, t: int) -> Tensor:
        """log p(b_{t-1} | b_t) of each bit of ``value``."""
        return dist.Bernoulli(self.reverse(state, t)).log_prob(value)

    def _summed(self, value: Tensor) -> Tensor:
        return value.flatten(-self.event).sum(-1)

    def program(self, name: str = "bit_diffusion") -> Program:
        """Model, guide, the ELBO's terms step by step, and draws of what is missing."""
        steps = TimeSteps(self.steps, self.term, self.constant)
        return Program(self.model, self.guide, name=name, time_steps=steps, imputes=imputes(self), notes=NOTES)


def _divergence(q: Tensor, p: Tensor) -> Tensor:
    """KL between coins; a chance of p that rounds to 0 or 1 counts as the nearest number that has a logarithm."""
    least = torch.finfo(p.dtype).eps
    p = p.clamp(least, 1 - least)
    cross = q * p.log() + (1 - q) * torch.log1p(-p)
    return torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q) - cross
