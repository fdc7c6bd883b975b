r"""A Gaussian Markov chain that turns rows into noise, and everything about it that has a closed form.

.. math:: q(x_t \mid x_{t-1}) = \mathrm{Normal}(\sqrt{1 - \beta_t} \, x_{t-1}, \beta_t I), \quad t = 1, \dots, T
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from ppl_gen.arguments import require_choice
from ppl_gen.errors import require_whole

__all__ = ["Noising", "Schedule", "noise_schedule"]

Schedule = Literal["linear", "cosine"]


@dataclass(frozen=True, eq=False)
class Noising:
    r"""The chain with variances ``betas`` (T, each in (0, 1)); :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)`.

    Every method takes a time step ``t`` in 1..T, one integer or one for each row, and returns mean and standard
    deviation, ready to broadcast against rows x the shape of a row.

    Args:
        betas: the variance that each step adds.

    Raises:
        ValueError: if there is no step, or a variance is not strictly between 0 and 1.

    Example:
        >>> chain = Noising(torch.tensor([0.5, 0.5]))
        >>> mean, scale = chain.marginal(torch.tensor([[1.0]]), 2)
        >>> float(mean), float(scale**2)
        (0.5, 0.75)
    """

    betas: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", self.betas.detach().double())
        if self.betas.dim() != 1 or not len(self.betas):
            raise ValueError(f"betas: expected one variance for each of T steps, got shape {tuple(self.betas.shape)}")
        if not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise ValueError(f"betas: expected variances strictly between 0 and 1, got {self.betas.tolist()}")

    @classmethod
    def unchecked(cls, betas: Tensor) -> Noising:
        """The chain of variances that hold a gradient and are not looked at, so that a step can be recorded."""
        made = object.__new__(cls)
        object.__setattr__(made, "betas", betas)
        return made

    def current(self) -> Noising:
        """The chain itself; of a learned one (`LearnedNoising`), the chain at its present parameters."""
        return self

    @property
    def steps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def _log_kept(self) -> Tensor:
        """log abar_t for t = 0..T; sums of log1p lose nothing where the betas are tiny."""
        return torch.cat([self.betas.new_zeros(1), torch.log1p(-self.betas).cumsum(0)])

    @cached_property
    def kept(self) -> Tensor:
        """abar_t, the share of the variance of x_0 that is left: indexed t = 0..T."""
        return self._log_kept.exp()

    @cached_property
    def noise(self) -> Tensor:
        """1 - abar_t, the variance of the noise in x_t: indexed t = 0..T."""
        return -torch.expm1(self._log_kept)

    @cached_property
    def posterior_variance(self) -> Tensor:
        """beta_t (1 - abar_{t-1}) / (1 - abar_t), zero at t = 1: indexed t = 1..T at 0..T-1."""
        return self.betas * self.noise[:-1] / self.noise[1:]

    @cached_property
    def log_variances(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the variances of q(x_{t-1} | x_t, x_0) and of q(x_t | x_{t-1}): each T.

        Between them lies that of the best p(x_{t-1} | x_t) of rows with unit variance. The former is zero at t = 1;
        that of the second step stands in for it.
        """
        lower = self.posterior_variance[1:].log()
        return torch.cat([lower[:1], lower]), self.betas.log()

    def step(self, x: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_t | x_{t-1} = x)."""
        beta = at(self.betas, t, x, first=1)
        return (1 - beta).sqrt() * x, beta.sqrt()

    def marginal(self, start: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        r"""q(x_t | x_0 = start) = Normal(sqrt(abar_t) x_0, 1 - abar_t)."""
        return at(self.kept, t, start).sqrt() * start, at(self.noise, t, start).sqrt()

    def between(self, x: Tensor, s: int, t: int) -> tuple[Tensor, Tensor]:
        """q(x_t | x_s = x) of two single steps, 0 <= s < t."""
        log_kept = self._log_kept[t] - self._log_kept[s]
        return (0.5 * log_kept).exp().to(x) * x, (-torch.expm1(log_kept)).sqrt().to(x)

    def posterior(self, start: Tensor, x: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        r"""q(x_{t-1} | x_t = x, x_0 = start); at t = 1 all mass is at x_0.

        .. math:: \frac{\sqrt{\bar\alpha_{t-1}} \beta_t}{1 - \bar\alpha_t} x_0
                  + \frac{\sqrt{1 - \beta_t} (1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t} x_t
        """
        of_start = self.kept[:-1].sqrt() * self.betas / self.noise[1:]
        of_x = (1 - self.betas).sqrt() * self.noise[:-1] / self.noise[1:]
        mean = at(of_start, t, x, first=1) * start + at(of_x, t, x, first=1) * x
        return mean, at(self.posterior_variance, t, x, first=1).sqrt()


def at(table: Tensor, t: int | Tensor, like: Tensor, first: int = 0) -> Tensor:
    """Entries of ``table`` (indexed from ``first``) at the steps ``t``, ready to broadcast against ``like``.

    One entry for each row where ``t`` is a step for each: the dimensions of a row follow as ones.
    """
    found = table.to(like)[t - first]
    return found.reshape(*found.shape, *[1] * (like.dim() - found.dim() if found.dim() else 1))


def noise_schedule(kind: Schedule, steps: int) -> Noising:
    r"""A noising chain of ``steps`` steps whose end is close to Normal(0, I).

    "linear": a rate that rises from 0.1 to 20 over the unit interval, integrated over each step; for T = 1000 these are
    the betas from 1e-4 to 0.02 of Ho et al. (2020), and other T keep the same end. "cosine": the square of a cosine for
    abar_t, gentler at both ends, with no beta above 0.999.

    Raises:
        ValueError: for another kind, or fewer than two steps.

    References:
        Denoising diffusion probabilistic models (Ho, Jain and Abbeel, 2020).
        Improved denoising diffusion probabilistic models (Nichol and Dhariwal, 2021).

    Example:
        >>> noise_schedule("linear", 1000).betas[[0, -1]].numpy().round(4)
        array([0.0001, 0.0199])
    """
    require_whole("steps", steps, 2)
    require_choice("schedule", kind, get_args(Schedule))
    time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if kind == "linear":
        log_kept = -(0.1 * time + 0.5 * (20 - 0.1) * time**2)
        return Noising(-torch.expm1(log_kept.diff()))
    offset = 0.008  # keeps the first step from vanishing
    kept = ((time + offset) / (1 + offset) * math.pi / 2).cos().square()
    return Noising((1 - kept[1:] / kept[:-1]).clamp(max=0.999))
