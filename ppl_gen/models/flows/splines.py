r"""Spline flows: coupling layers of monotone rational-quadratic splines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_gen.errors import require_positive, require_whole
from ppl_gen.models.flows.base import Layer
from ppl_gen.models.flows.coupling import Coupling, coupling_orders
from ppl_gen.models.flows.recipe import checked_sizes, flow_recipe
from ppl_gen.program.program import Recipe

__all__ = ["IDENTITY", "checked_spline", "rational_quadratic", "spline_flow"]

_LEAST = 1e-3  # width and height of a bin (as shares), and derivative: keeps the inverse well conditioned
_MOST = 500  # bins, which then share half of the box freely

#: The raw derivative at which a spline of equal bins is the identity.
IDENTITY = math.log(math.expm1(1 - _LEAST))


def rational_quadratic(
    value: Tensor, raw: Sequence[Tensor], bound: float, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""A monotone spline on [-bound, bound] and the identity beyond, number by number.

    .. math:: g = y_k + h \frac{s \theta^2 + d_k \theta (1 - \theta)}{s + (d_k + d_{k+1} - 2 s) \theta (1 - \theta)},
              \quad \theta = \frac{x - x_k}{w}, \; s = \frac{h}{w}

    Pyro has the same spline, but looks for bins beside knots moved by 1e-6: in a steep bin a number just past its end
    has no inverse there, and Pyro's assertion stops the drawing of rows. It also ends with derivatives of 0.999.

    Args:
        value: the numbers, columns x rows.
        raw: widths, heights (columns x bins x rows, or x 1 where all rows share a spline) and inner derivatives
            (columns x bins - 1 x rows), before softmax and softplus.
        bound: where the identity begins.
        inverse: run it backwards.

    Returns:
        The numbers, and the logarithm of the derivative of that direction.

    References:
        Neural spline flows (Durkan, Bekasov, Murray and Papamakarios, 2019), equations 4 to 8.
    """
    inside = value.clamp(-bound, bound)
    knots_x, knots_y = _knots(raw[0], bound), _knots(raw[1], bound)
    slopes = nn.functional.pad(raw[2], (0, 0, 1, 1), value=IDENTITY)
    inner = (knots_y if inverse else knots_x)[:, 1:-1]
    found = (inside.unsqueeze(1) >= inner).sum(1, keepdim=True)
    ends = torch.cat([found, found + 1], 1)

    def around(table: Tensor) -> tuple[Tensor, Tensor]:
        """What stands before and after the bin of each number."""
        before, after = table.expand(*table.shape[:2], value.shape[1]).gather(1, ends).unbind(1)
        return before, after

    (x, x_end), (y, y_end) = around(knots_x), around(knots_y)
    first, last = (_LEAST + softplus(part) for part in around(slopes))
    width, height = x_end - x, y_end - y
    slope = height / width
    bend = first + last - 2 * slope
    place = _place(inside - y, height, first, slope, bend) if inverse else (inside - x) / width
    rest = 1 - place
    mixed, squared = place * rest, place * place
    below = slope + bend * mixed
    above = last * squared + 2 * slope * mixed + first * rest * rest
    ratio = slope / below
    log_slope = (ratio * (ratio * above)).log()
    made = x + width * place if inverse else y + height * (slope * squared + first * mixed) / below
    log_slope = torch.where(value == inside, -log_slope if inverse else log_slope, 0.0)
    return made + (value - inside), log_slope


def _knots(raw: Tensor, bound: float) -> Tensor:
    """The ends of the bins, columns x bins + 1 x rows, from raw sizes. One small product is quicker than a cumsum."""
    bins = raw.shape[1]
    below = torch.ones(bins + 1, bins, dtype=raw.dtype, device=raw.device).tril(-1)
    below[-1] = 0.0  # both ends are exact
    steps = torch.arange(bins + 1, dtype=raw.dtype, device=raw.device).unsqueeze(-1)
    least = (2 * bound * _LEAST * steps - bound).masked_fill(steps == bins, bound)
    share = 2 * bound * (1 - _LEAST * bins)
    return torch.baddbmm(least, below.expand(len(raw), -1, -1), raw.softmax(1), alpha=share)


def _place(rise: Tensor, height: Tensor, first: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
    """theta in its bin from how far y is above the bin's lower end: the stable root of a quadratic."""
    a, b, c = height * (slope - first) + rise * bend, height * first - rise * bend, -slope * rise
    # Not negative but for rounding; not zero, where the root has no derivative.
    root = (b**2 - 4 * a * c).clamp(min=torch.finfo(rise.dtype).tiny).sqrt()
    return (2 * c / (-b - root)).clamp(0.0, 1.0)


def checked_spline(bins: int, bound: float) -> None:
    """Raise ValueError for a number of bins or a bound out of its range."""
    require_whole("bins", bins)
    if not 2 <= bins <= _MOST:
        raise ValueError(f"bins: expected 2 to {_MOST}, got {bins}")
    require_positive("bound", bound)


class _SplineCoupling(Coupling):
    """The second half goes through splines."""

    def __init__(self, order: Tensor, hidden: Sequence[int], bins: int, bound: float) -> None:
        super().__init__(order, hidden, lambda changed: [changed * bins, changed * bins, changed * (bins - 1)])
        self.bound = bound
        nn.init.constant_(self.network.layers[-1].bias.data[sum(self.sizes[:2]) :], IDENTITY)

    def change(self, changed: Tensor, raw: Sequence[Tensor], inverse: bool) -> tuple[Tensor, Tensor]:
        bins = [part.unflatten(0, (len(changed), -1)) for part in raw]
        return rational_quadratic(changed, bins, self.bound, inverse=inverse)

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, inverse=False)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(z, inverse=True)


def spline_flow(
    features: int | None = None,
    *,
    layers: int = 4,
    hidden: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 4.0,
) -> Recipe:
    r"""A flow of spline coupling layers over rows of numbers (N x features).

    .. math:: z_{1:d} = x_{1:d}, \quad z_j = g_j(x_j; x_{1:d}), \; j > d, \quad
              \log \left| \det \frac{\partial z}{\partial x} \right| = \sum_{j > d} \log g_j'(x_j; x_{1:d})

    Each g is a monotone rational-quadratic spline on [-bound, bound], in standard deviations, and the identity
    beyond; a perceptron of the first half of the columns gives widths, heights and derivatives of its bins.
    More supple than `real_nvp` per layer, about as fast in both directions, and several times its cost. Orders of the
    columns, units, program and network are those of `real_nvp`.

    Args:
        features: columns of the data, at least 2; None: as many as they have.
        layers: coupling layers; with fewer than 2 half of the columns stay normal.
        hidden: widths of each layer's perceptron, with rectifiers.
        bins: of each spline, 2 to 500.
        bound: half the width of the box that the splines act in.

    Returns:
        A recipe; it raises ValueError for data of another shape, not finite, with a constant column, or with
        a value that many rows share exactly.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Neural spline flows (Durkan, Bekasov, Murray and Papamakarios, 2019).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.arange(40.0).reshape(20, 2)
        >>> fit = pg.fit(spline_flow(layers=2, hidden=(8,), bins=4), x, SVI(steps=5), seed=0)
        >>> fit.evidence().exact, fit.sample(3)["x"].shape
        (True, torch.Size([3, 2]))
    """
    widths = checked_sizes(features, layers, hidden)
    checked_spline(bins, bound)

    def made(columns: int) -> list[Layer]:
        checked_sizes(columns, layers, widths)
        return [_SplineCoupling(order, widths, bins, bound) for order in coupling_orders(columns, layers)]

    arguments = {"features": features, "layers": layers, "hidden": widths, "bins": bins, "bound": bound}
    return flow_recipe("spline_flow", features, made, arguments)
