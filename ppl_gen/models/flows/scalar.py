r"""Flows of single numbers: to a uniform code (which learns the distribution function), a Beta or a normal one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineTransform, SigmoidTransform
from torch import Tensor, nn

from ppl_gen.arguments import require_choice
from ppl_gen.errors import require_positive
from ppl_gen.models.flows.base import Layer, through
from ppl_gen.models.flows.recipe import flow_recipe
from ppl_gen.models.flows.splines import IDENTITY, checked_spline, rational_quadratic
from ppl_gen.program.program import Recipe

__all__ = ["scalar_flow"]

Codes = Literal["uniform", "beta", "normal"]


class _Spline(Layer):
    """One spline for all numbers."""

    def __init__(self, bins: int, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.widths, self.heights = nn.Parameter(torch.zeros(1, bins)), nn.Parameter(torch.zeros(1, bins))
        self.derivatives = nn.Parameter(torch.full((1, bins - 1), IDENTITY))

    def _run(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raw = [part.unsqueeze(-1) for part in (self.widths, self.heights, self.derivatives)]
        made, log_slope = rational_quadratic(value.reshape(1, -1), raw, self.bound, inverse=inverse)
        return made.reshape(value.shape), log_slope.reshape(value.shape[:-1])

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, inverse=False)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(z, inverse=True)


class _Line(Layer):
    """v = a y + b with a > 0: how fast the tails fall."""

    def __init__(self, slope: float, shift: float) -> None:
        super().__init__()
        self.log_slope = nn.Parameter(torch.tensor([math.log(slope)]))
        self.shift = nn.Parameter(torch.tensor([shift]))

    def _run(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        line = AffineTransform(self.shift, self.log_slope.exp())
        made, log_slope = through(line, value, inverse=inverse)
        return made, log_slope.sum(-1)

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, inverse=False)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(z, inverse=True)


class _Squash(Layer):
    """All numbers into (0, 1)."""

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made, log_slope = through(SigmoidTransform(), x)
        return made, log_slope.sum(-1)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        made, log_slope = through(SigmoidTransform(), z, inverse=True)
        return made, log_slope.sum(-1)


class _Codes:
    """The base distribution, and the mean and standard deviation of the logit of a draw, from which the flow starts."""

    def __init__(self, base: Codes, concentrations: tuple[float, float]) -> None:
        self.base = base
        self.concentrations = concentrations if base == "beta" else (1.0, 1.0)

    def __call__(self, zeros: Tensor) -> Any:
        if self.base == "normal":
            return dist.Normal(zeros, 1.0)
        if self.base == "uniform":
            return dist.Uniform(zeros, 1.0)
        first, second = self.concentrations
        return dist.Beta(zeros + first, zeros + second)

    def line(self) -> _Line:
        """A map of standardised numbers to the first two moments of a code, or of its logit."""
        if self.base == "normal":
            return _Line(1.0, 0.0)
        first, second = torch.tensor(self.concentrations, dtype=torch.float64)
        spread = (torch.polygamma(1, first) + torch.polygamma(1, second)).sqrt()
        return _Line(float(spread), float(torch.digamma(first) - torch.digamma(second)))


def scalar_flow(
    base: Codes = "uniform",
    *,
    bins: int = 16,
    bound: float = 4.0,
    concentrations: Sequence[float] = (5.0, 5.0),
) -> Recipe:
    r"""A flow of single numbers (N, or N x 1) to codes of a given distribution.

    .. math:: z = \sigma(a \, g(x) + b) \in (0, 1), \quad \log p(x) = \log p_Z(z) + \log \frac{dz}{dx}

    g is a monotone rational-quadratic spline on [-bound, bound] in standard deviations and the identity beyond, a > 0
    and b are learned (they set the tails), and the sigmoid takes every real number into (0, 1); normal codes have none.
    To uniform codes z is the distribution function of x: ``fit.module("flow").encode(x)`` is the learned one, and
    ``decode`` its inverse, the quantiles. ``SVI()`` is maximum likelihood,
    ``fit.evidence()`` exact.

    Codes in (0, 1) are floating-point numbers: within 1e-16 of 1 (6e-8 in float32) they are all one number, so rows so
    far in the upper tail are not found again by ``decode``, and a Beta's log density is that of this number there.

    Args:
        base: "uniform", "beta" or "normal".
        bins: of the spline, 2 to 500.
        bound: half the width of the interval that the spline acts on, in standard deviations.
        concentrations: of the Beta distribution.

    Returns:
        A recipe; it raises ValueError for data of another shape, not finite, or constant.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Neural spline flows (Durkan, Bekasov, Murray and Papamakarios, 2019).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.cat([torch.linspace(-3.0, -2.0, 50), torch.linspace(2.0, 3.0, 50)])
        >>> fit = pg.fit(scalar_flow("uniform"), x, SVI(steps=200, lr=0.05), seed=0)
        >>> fit.module("flow").encode(torch.tensor([-10.0, 0.0, 10.0])).detach().numpy().round(1)
        array([0. , 0.5, 1. ], dtype=float32)
    """
    require_choice("base", base, get_args(Codes))
    checked_spline(bins, bound)
    if not isinstance(concentrations, Sequence) or len(concentrations) != 2:
        raise ValueError(f"concentrations: expected two positive numbers, got {concentrations!r}")
    for value in concentrations:
        require_positive("concentrations", value)
    codes = _Codes(base, (float(concentrations[0]), float(concentrations[1])))

    def made(columns: int) -> list[Layer]:
        return [_Spline(bins, bound), codes.line(), *([] if base == "normal" else [_Squash()])]

    arguments: dict[str, Any] = {"base": base, "bins": bins, "bound": bound}
    if base == "beta":
        arguments["concentrations"] = codes.concentrations
    return flow_recipe("scalar_flow", 1, made, arguments, base=codes, single=True)
