r"""NICE: additive coupling layers, which keep volumes, and one scale for each column at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_gen.arguments import require_choice
from ppl_gen.models.flows.base import Layer
from ppl_gen.models.flows.coupling import Coupling
from ppl_gen.models.flows.recipe import Pixels, checked_sizes, flow_recipe
from ppl_gen.program.program import Recipe

__all__ = ["nice"]

Prior = Literal["logistic", "normal"]


class _AdditiveCoupling(Coupling):
    """The second half is shifted."""

    def __init__(self, order: Tensor, hidden: Sequence[int]) -> None:
        super().__init__(order, hidden, lambda changed: [changed])

    def change(self, changed: Tensor, raw: Sequence[Tensor], inverse: bool) -> tuple[Tensor, Tensor]:
        return changed + (raw[0] if inverse else -raw[0]), torch.zeros_like(changed)


class _Diagonal(Layer):
    """z = e^s x, one s for each column."""

    def __init__(self, features: int, scale: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((features,), math.log(scale)))

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum()

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp(), -self.log_scale.sum()


def _logistic(zeros: Tensor) -> Any:
    return dist.Logistic(zeros, 1.0)


def nice(
    features: int | None = None,
    *,
    layers: int = 4,
    hidden: Sequence[int] = (64, 64),
    prior: Prior = "logistic",
    levels: int | None = None,
) -> Recipe:
    r"""A flow of additive coupling layers over rows of numbers (N x features).

    .. math:: h_A = x_A, \quad h_B = x_B + t(x_A), \qquad z = e^s \odot h^{(\mathrm{layers})}, \quad
              \log \left| \det \frac{\partial z}{\partial x} \right| = \sum_j s_j

    A and B are the columns at even and at odd places, and the other way round in every second layer; t is a perceptron.
    Couplings keep volumes, so that only the diagonal at the end stretches: the density is that of the codes times one
    number. Units, program and network are those of `real_nvp`; it starts at independent codes of mean and standard
    deviation of each column.

    With ``levels`` rows are pixels, 0, 1 / (levels - 1), ..., 1. Their program draws a number in the interval of each
    pixel (site ``dequantised``) from the flow, and its guide draws them evenly: the ELBO is the bound of Theis et al.
    on log p(x) in nats, `bits_per_dimension` tells it in bits, and `IWAE` and ``fit.evidence(particles=...)`` are
    closer to log p(x). One mean and one standard deviation serve all pixels.

    Args:
        features: columns of the data, at least 2; None: as many as they have.
        layers: coupling layers.
        hidden: widths of each layer's perceptron, with rectifiers.
        prior: of the codes: "logistic" or "normal", independent.
        levels: how many values pixels have (256 for bytes divided by 255); None: rows are real numbers.

    Returns:
        A recipe; it raises ValueError for data of another shape, not finite, with a constant column, or between levels.

    Raises:
        ValueError: for an argument out of its range.

    References:
        NICE: non-linear independent components estimation (Dinh, Krueger and Bengio, 2015).
        A note on the evaluation of generative models (Theis, van den Oord and Bethge, 2016).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.arange(40.0).reshape(20, 2)
        >>> fit = pg.fit(nice(layers=2, hidden=(8,)), x, SVI(steps=5), seed=0)
        >>> flow = fit.module("flow")
        >>> fit.evidence().exact, bool(flow.log_det(x).std() < 1e-6)
        (True, True)
    """
    widths = checked_sizes(features, layers, hidden)
    require_choice("prior", prior, get_args(Prior))
    scale = math.pi / math.sqrt(3) if prior == "logistic" else 1.0  # of a code: its standard deviation

    def made(columns: int) -> list[Layer]:
        checked_sizes(columns, layers, widths)
        place = torch.arange(columns)
        even, odd = place[place % 2 == 0], place[place % 2 == 1]
        orders = [torch.cat([even, odd]), torch.cat([odd, even])]  # the first half is kept
        couplings = [_AdditiveCoupling(orders[i % 2], widths) for i in range(layers)]
        return [*couplings, _Diagonal(columns, scale)]

    arguments = {"features": features, "layers": layers, "hidden": widths, "prior": prior, "levels": levels}
    base = _logistic if prior == "logistic" else None
    return flow_recipe("nice", features, made, arguments, base=base, pixels=Pixels(levels), bounded=True)
