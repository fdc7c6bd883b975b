r"""What all flows share: layers between rows and codes, the units of the data, and the program around them.

.. math:: \log p(x) = \log p_Z(f(x)) + \log \left| \det \frac{\partial f}{\partial x}(x) \right|, \quad z = f(x)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Transform
from torch.nn.functional import logsigmoid

__all__ = ["Base", "Flow", "Layer", "run_through", "through"]

#: Zeros in the shape of a code -> the distribution of as many independent numbers.
Base = Callable[[Tensor], Any]


class Layer(nn.Module):
    """One invertible map; each direction returns its value and the log determinant of its own Jacobian, per row."""

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Towards the codes: ... x the shape of a row -> (the same, ...)."""
        raise NotImplementedError

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Towards the rows, the inverse of `to_code`."""
        raise NotImplementedError


def run_through(layers: Iterable[Any], value: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor | float]:
    """Several layers in their order (towards the rows: the layers are given in reverse), and their log determinants."""
    total: Tensor | float = 0.0
    for layer in layers:
        value, log_det = layer.to_data(value) if inverse else layer.to_code(value)
        total = total + log_det
    return value, total


def through(transform: Any, value: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """A Pyro transform (or its inverse) at ``value``, and the log determinant of that direction.

    Pyro's transforms keep their last input, output and scale: what they keep goes stale when the weights move, and can
    be neither copied nor saved. So layers hold networks only, and make a new transform for each call.
    """
    if not inverse:
        made = transform(value)
        return made, transform.log_abs_det_jacobian(value, made)
    # `transform.inv` would tie the two into a cycle, which holds the graph until the garbage collector comes.
    made = transform._inv_call(value)
    return made, -transform.log_abs_det_jacobian(made, value)


class Flow(nn.Module):
    r"""An invertible network between rows in the user's units and codes.

    .. math:: z = f\Bigl(\frac{x - m}{s}\Bigr), \quad
              \log p(x) = \log p_Z(z) + \log \left| \det \frac{\partial z}{\partial x} \right|

    m and s are mean and standard deviation of each column of the training data, of each channel of images, fixed
    (buffers). With ``margin`` rows lie in [0, 1], and their logits stand in the place of x.

    Args:
        layers: from the rows to the codes, in standardised units.
        rows: the training data, N x features or N x channels x height x width; or N, and then a row is a single number.
        base: makes the distribution of independent numbers of a code from zeros of their shape.
        margin: a of the logit log(y / (1 - y)), y = a + (1 - 2 a) x, for rows in [0, 1]; None: x as it is.
        together: one m and s for all columns.

    Example:
        >>> flow = Flow([], torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
        >>> flow.encode(torch.tensor([1.0, 7.0])), flow.decode(torch.tensor([0.0, 2.0]))
        (tensor([0., 2.]), tensor([1., 7.]))
        >>> flow.log_det(torch.tensor([1.0, 7.0])).exp()  # in units half as large
        tensor(0.5000)
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        layers: Sequence[Layer],
        rows: Tensor,
        base: Base | None = None,
        *,
        margin: float | None = None,
        together: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.make_codes = base or _normal
        self.margin = margin
        self.single = rows.dim() == 1
        columns = (rows.unsqueeze(-1) if self.single else rows).double()
        self.shape = tuple(columns.shape[1:])
        if margin is not None:
            columns = _logit(columns, margin)[0]
        if together:
            loc, scale = (value.expand(self.shape) for value in (columns.mean(), columns.std(correction=0)))
        else:
            over = (0, 2, 3) if len(self.shape) == 3 else (0,)
            loc = columns.mean(over, keepdim=len(self.shape) == 3)
            scale = columns.std(over, correction=0, keepdim=len(self.shape) == 3)
            loc, scale = (v.squeeze(0) if len(self.shape) == 3 else v for v in (loc, scale))
        precision = torch.get_default_dtype()
        self.register_buffer("loc", loc.to(precision).clone())
        self.register_buffer("scale", scale.to(precision).clone())

    def forward(self, x: Tensor) -> Tensor:
        """The codes z of rows x: `encode`."""
        return self.encode(x)

    def encode(self, x: Tensor) -> Tensor:
        """The codes z of rows x, of the same shape."""
        return self.to_code(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """The rows x of codes z, of the same shape: the inverse of `encode`."""
        return self.to_data(z)[0]

    def log_det(self, x: Tensor) -> Tensor:
        """log |det dz/dx| at each row."""
        return self.to_code(x)[1]

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of each row, exact."""
        z, log_det = self.to_code(x)
        return self.codes().log_prob(z) + log_det

    def codes(self) -> Any:
        """p_Z: the distribution of one code."""
        zeros = self.loc.new_zeros(self.shape)
        return self.make_codes(zeros[0]) if self.single else self.make_codes(zeros).to_event(len(self.shape))

    def rows(self) -> Any:
        """p(x): the distribution of one row."""
        return dist.TransformedDistribution(self.codes(), [_FlowTransform(self)])

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z, and log |det dz/dx|."""
        value = self._columns(x, "x")
        total: Any = -self.scale.log().expand(self.shape).sum()
        if self.margin is not None:
            value, slopes = _logit(value, self.margin)
            total = total + slopes.flatten(-len(self.shape)).sum(-1)
        value, log_det = run_through(self._layers(), (value - self.loc) / self.scale)
        return self._shaped(value), self._each(total + log_det, value)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x, and log |det dx/dz|."""
        value, total = run_through(reversed(self._layers()), self._columns(z, "z"), inverse=True)
        total = total + self.scale.log().expand(self.shape).sum()
        value = self.loc + self.scale * value
        if self.margin is not None:
            value, slopes = _unlogit(value, self.margin)
            total = total + slopes.flatten(-len(self.shape)).sum(-1)
        return self._shaped(value), self._each(total, value)

    def _each(self, total: Tensor, value: Tensor) -> Tensor:
        return total.expand(value.shape[: value.dim() - len(self.shape)])

    def _layers(self) -> list[Layer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _columns(self, value: Tensor, name: str) -> Tensor:
        value = value.to(self.loc)
        if self.single:
            return value.unsqueeze(-1)
        if tuple(value.shape[-len(self.shape) :]) != self.shape:
            wanted = f"{self.shape[0]} columns" if len(self.shape) == 1 else f"shape {self.shape}"
            raise ValueError(f"{name}: this flow takes rows of {wanted}, got {tuple(value.shape)}")
        return value

    def _shaped(self, value: Tensor) -> Tensor:
        return value.squeeze(-1) if self.single else value


def _logit(x: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Numbers of [0, 1] on the line, and the logarithm of the slope of each."""
    inside = margin + (1 - 2 * margin) * x
    below, above = inside.log(), torch.log1p(-inside)
    return below - above, math.log(1 - 2 * margin) - below - above


def _unlogit(y: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    made = ((y.sigmoid() - margin) / (1 - 2 * margin)).clamp(*_reach(margin))
    return made, logsigmoid(y) + logsigmoid(-y) - math.log(1 - 2 * margin)


def _reach(margin: float) -> tuple[float, float]:
    """How far beyond [0, 1] the logits reach."""
    beyond = margin / (1 - 2 * margin)
    return -beyond, 1 + beyond


class _FlowTransform(Transform):
    """A flow from codes to rows, for one call of the program: what it remembers is gone before the weights move."""

    bijective = True

    def __init__(self, flow: Flow) -> None:
        super().__init__(cache_size=1)
        self.flow = flow
        self._log_det = torch.zeros(())

    @property
    def domain(self) -> Any:  # type: ignore[override]
        return self.flow.codes().support

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        margin = self.flow.margin
        bound = constraints.real if margin is None else constraints.interval(*_reach(margin))
        return bound if self.flow.single else constraints.independent(bound, len(self.flow.shape))

    def _call(self, x: Tensor) -> Tensor:
        made, self._log_det = self.flow.to_data(x)
        return made

    def _inverse(self, y: Tensor) -> Tensor:
        made, log_det = self.flow.to_code(y)
        self._log_det = -log_det
        return made

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        known: tuple[Any, Any] = self._cached_x_y
        if known[0] is x and known[1] is y:
            return self._log_det
        return self.flow.to_data(x)[1]


def _normal(zeros: Tensor) -> Any:
    return dist.Normal(zeros, 1.0)
