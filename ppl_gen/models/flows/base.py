r"""What all flows share: layers between rows and codes, the units of the data, and the program around them.

.. math:: \log p(x) = \log p_Z(f(x)) + \log \left| \det \frac{\partial f}{\partial x}(x) \right|, \quad z = f(x)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Transform

from ppl_gen.data.inputs import check_width, entries, row_width
from ppl_gen.errors import require_whole
from ppl_gen.program.program import Program, Recipe

__all__ = ["Flow", "Layer", "checked_sizes", "flow_recipe", "through"]

#: Zeros in the shape of a code -> the distribution of as many independent numbers.
Base = Callable[[Tensor], Any]


class Layer(nn.Module):
    """One invertible map; each direction returns its value and the log determinant of its own Jacobian, per row."""

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Towards the codes: ... x features -> (... x features, ...)."""
        raise NotImplementedError

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Towards the rows, the inverse of `to_code`."""
        raise NotImplementedError


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

    m and s are mean and standard deviation of each column of the training data, fixed (buffers).

    Args:
        layers: from the rows to the codes, in standardised units.
        rows: the training data, N x features; or N, and then a row is a single number.
        base: makes the distribution of independent numbers of a code from zeros of their shape.

    Example:
        >>> flow = Flow([], torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
        >>> flow.encode(torch.tensor([1.0, 7.0])), flow.decode(torch.tensor([0.0, 2.0]))
        (tensor([0., 2.]), tensor([1., 7.]))
        >>> flow.log_det(torch.tensor([1.0, 7.0])).exp()  # in units half as large
        tensor(0.5000)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, layers: Sequence[Layer], rows: Tensor, base: Base | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.make_codes = base or _normal
        self.single = rows.dim() == 1
        columns = (rows.unsqueeze(-1) if self.single else rows).double()
        precision = torch.get_default_dtype()
        self.register_buffer("loc", columns.mean(0).to(precision))
        self.register_buffer("scale", columns.std(0, correction=0).to(precision))

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
        zeros = torch.zeros_like(self.loc)
        return self.make_codes(zeros[0]) if self.single else self.make_codes(zeros).to_event(1)

    def rows(self) -> Any:
        """p(x): the distribution of one row."""
        return dist.TransformedDistribution(self.codes(), [_FlowTransform(self)])

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z, and log |det dz/dx|."""
        value = (self._columns(x, "x") - self.loc) / self.scale
        total = -self.scale.log().sum()
        for layer in self._layers():
            value, log_det = layer.to_code(value)
            total = total + log_det
        return self._shaped(value), total.expand(value.shape[:-1])

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x, and log |det dx/dz|."""
        value, total = self._columns(z, "z"), self.scale.log().sum()
        for layer in reversed(self._layers()):
            value, log_det = layer.to_data(value)
            total = total + log_det
        return self._shaped(self.loc + self.scale * value), total.expand(value.shape[:-1])

    def _layers(self) -> list[Layer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _columns(self, value: Tensor, name: str) -> Tensor:
        value = value.to(self.loc)
        if self.single:
            return value.unsqueeze(-1)
        if value.dim() == 0 or value.shape[-1] != len(self.loc):
            raise ValueError(f"{name}: this flow takes rows of {len(self.loc)} columns, got {tuple(value.shape)}")
        return value

    def _shaped(self, value: Tensor) -> Tensor:
        return value.squeeze(-1) if self.single else value


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
        return constraints.real if self.flow.single else constraints.real_vector

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


def flow_recipe(
    name: str,
    features: int | None,
    layers: Callable[[int], Sequence[Layer]],
    arguments: Mapping[str, Any],
    *,
    base: Base | None = None,
    single: bool = False,
) -> Recipe:
    """The recipe of a flow: ``layers(features)`` is called once per fit, after the data have been looked at.

    Args:
        name: of the recipe.
        features: columns of the data; None: as many as they have.
        layers: makes the layers, from the rows to the codes.
        arguments: for the recipe's repr.
        base: see `Flow`.
        single: data of N numbers, without columns, are taken too.
    """

    def build(data: Any) -> Program:
        columns = row_width(features, data, name)
        rows = _rows(data, name, columns, single)
        flow = Flow(layers(columns), rows, base)

        def model(x: Tensor) -> None:
            pyro.module("flow", flow)
            with pyro.plate("data", len(x)):
                pyro.sample("x", flow.rows(), obs=x.to(flow.loc))

        return Program(model, name=name, evidence=flow.log_prob)

    return Recipe(build, name=name, arguments=arguments)


def _rows(data: Any, name: str, features: int, single: bool) -> Tensor:
    (rows,) = entries(data, name, "x")
    assert rows is not None  # the first entry
    rows = rows.double()
    if not (single and rows.dim() == 1) and (rows.dim() != 2 or rows.shape[1] != features):
        wanted = "single numbers (N, or N x 1)" if single else f"rows of {features} columns"
        raise ValueError(f"data: {name} takes {wanted}, got shape {tuple(rows.shape)}")
    columns = rows.reshape(len(rows), -1)
    constant = (columns == columns[:1]).all(0) | (columns.std(0, correction=0).to(torch.get_default_dtype()) == 0)
    if bool(constant.any()):
        which = ", ".join(map(str, constant.nonzero().squeeze(-1).tolist()))
        raise ValueError(f"data: column(s) {which} are constant: no density exists in that direction; leave them out")
    return rows


def checked_sizes(features: int | None, layers: int, hidden: Sequence[int], *, smallest: int = 1) -> tuple[int, ...]:
    """The hidden widths as a tuple, once all sizes that are known have been looked at.

    Raises:
        ValueError: naming the size that is out of its range.
    """
    check_width("features", features)
    if features is not None and features < 2:
        raise ValueError("features: one column depends on no other; take scalar_flow() or affine_flow(1)")
    require_whole("layers", layers)
    widths = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
    if not widths:
        raise ValueError("hidden: expected the width of at least one layer, got none")
    for width in widths:
        require_whole("hidden", width)
        if width < smallest:
            raise ValueError(f"hidden: expected widths of at least {smallest} (one for each column), got {width}")
    return widths
