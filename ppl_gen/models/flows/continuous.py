r"""FFJORD: a flow in continuous time, whose log determinant is the integral of a trace.

.. math:: \frac{dx_t}{dt} = h(x_t, t), \quad x_0 = x, \; z = x_1, \quad
          \log p(x) = \log p_Z(x_1) + \int_0^1 \operatorname{tr} \frac{\partial h}{\partial x_t} \, dt
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.arguments import require_choice
from ppl_gen.data.inputs import check_width
from ppl_gen.errors import MissingExtraError, require_positive, require_whole
from ppl_gen.models.flows.base import Layer
from ppl_gen.models.flows.recipe import flow_recipe
from ppl_gen.program.program import Recipe

__all__ = ["Continuous", "Field", "ffjord"]

_ADAPTIVE, _FIXED = ("dopri5", "bosh3"), ("rk4", "midpoint")


def _solvers() -> Any:
    try:
        import torchdiffeq
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "ffjord solves its equation by torchdiffeq, which is not installed: pip install 'ppl_gen[flows]'"
        ) from error
    return torchdiffeq


class Field(nn.Module):
    r"""h(x, t): a perceptron of the point and the time, which carries a direction along: h and (dh/dx) e in one pass.

    Args:
        features: numbers of a point.
        hidden: widths, with hyperbolic tangents; none: h is linear in x.
    """

    def __init__(self, features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [features, *hidden, features]
        self.layers = nn.ModuleList(nn.Linear(a + 1, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        for value in self.layers[-1].parameters():
            nn.init.zeros_(value)  # the flow starts at the identity

    def forward(self, t: Tensor, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """h(x, t) and (dh/dx) direction; ``direction`` has dimensions before those of x, for several of them."""
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            weight, times = layer.weight[:, :-1], layer.weight[:, -1]
            x = x @ weight.T + (times * t + layer.bias)
            direction = direction @ weight.T
            if number < len(self.layers) - 1:
                x = x.tanh()
                direction = direction * (1 - x * x)
        return x, direction


class Continuous(Layer):
    """The solution from time 0 (rows) to time 1 (codes) of the equation of a field.

    In training the trace is estimated by one random direction for each row, drawn anew for each call (Hutchinson): the
    loss has the right mean. Outside of training it is exact, one direction for each column.

    Args:
        field: ``field(t, x, direction)`` gives h(x, t) and (dh/dx) direction; see `Field`.
        method: of torchdiffeq.
        tolerance: relative and absolute, of methods that choose their steps.
        steps: of methods with fixed ones.
    """

    def __init__(self, field: nn.Module, method: str, tolerance: float, steps: int) -> None:
        super().__init__()
        self.field = field
        self.method, self.tolerance, self.steps = method, tolerance, steps

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._solved(x, 0.0, 1.0)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._solved(z, 1.0, 0.0)

    def _solved(self, start: Tensor, begin: float, end: float) -> tuple[Tensor, Tensor]:
        trace = self._trace(start)
        times = torch.tensor([begin, end], dtype=start.dtype, device=start.device)
        options: dict[str, Any] = {"options": {"step_size": 1 / self.steps}} if self.method in _FIXED else {}

        def moving(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return trace(t, state[0])

        try:
            made, log_det = _solvers().odeint(
                moving,
                (start, start.new_zeros(start.shape[:-1])),
                times,
                rtol=self.tolerance,
                atol=self.tolerance,
                method=self.method,
                **options,
            )
        except AssertionError as error:
            raise ValueError(
                f"ffjord: torchdiffeq gave up ({str(error).splitlines()[0]}), because the field has become too steep, "
                "a number is not finite, or the tolerance is too small for the precision; train with a smaller rate, "
                'or take method="rk4"'
            ) from error
        return made[-1], log_det[-1]

    def _trace(self, like: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The function (t, x) -> h and the trace of its derivative, exact or estimated."""
        if self.training:
            noise = torch.randn_like(like).sign()

            def estimated(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
                h, moved = self.field(t, x, noise)
                return h, (moved * noise).sum(-1)

            return estimated
        unit = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        each = unit.reshape(-1, *(1 for _ in like.shape[:-1]), like.shape[-1])

        def exact(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h, moved = self.field(t, x, each)
            return h, (moved * each).sum((0, -1)).expand(x.shape[:-1])  # of a linear field, alike for all rows

        return exact


def ffjord(
    features: int | None = None,
    *,
    layers: int = 1,
    hidden: Sequence[int] = (64, 64),
    method: str = "dopri5",
    tolerance: float = 1e-5,
    steps: int = 8,
) -> Recipe:
    r"""A continuous-time flow over rows of numbers (N x features), without any constraint on its network.

    .. math:: \frac{dx_t}{dt} = h(x_t, t), \quad
              \log p(x) = \log p_Z(x_1) + \int_0^1 \operatorname{tr} \frac{\partial h}{\partial x_t} \, dt

    h is a perceptron of x and t. The equation is solved by torchdiffeq (the extra ``flows``), forwards for densities
    and backwards for rows. Training estimates the trace by one random direction for each row and step, without bias;
    ``fit.evidence()`` has the exact trace, and errors of the solver's ``tolerance``. Methods that choose their steps
    read numbers on the way, so that their training steps are not captured; "rk4" and "midpoint" take a fixed number of
    steps, which is quicker and captured. Units, program and network are those of `real_nvp`; it starts at independent
    normals.

    Args:
        features: columns of the data; None: as many as they have.
        layers: equations, one after another.
        hidden: widths of each perceptron.
        method: "dopri5", "bosh3" (which choose their steps), "rk4" or "midpoint".
        tolerance: relative and absolute, of methods that choose their steps.
        steps: of methods that do not.

    Returns:
        A recipe; it raises ValueError for data of another shape, not finite, with a constant column, or with
        a value that many rows share exactly.

    Raises:
        ValueError: for an argument out of its range.
        MissingExtraError: where torchdiffeq is not installed.

    References:
        FFJORD: free-form continuous dynamics for scalable reversible generative models (Grathwohl et al., 2019).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.arange(40.0).reshape(20, 2) ** 0.5
        >>> fit = pg.fit(ffjord(hidden=(8,), method="rk4", steps=4), x, SVI(steps=5), seed=0)
        >>> flow = fit.module("flow")
        >>> fit.evidence().exact, torch.allclose(flow.decode(flow.encode(x)), x, atol=1e-4)
        (True, True)
    """
    check_width("features", features)
    require_whole("layers", layers)
    widths = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
    for width in widths:
        require_whole("hidden", width)
    if not widths:
        raise ValueError("hidden: expected the width of at least one layer, got none")
    require_choice("method", method, (*_ADAPTIVE, *_FIXED))
    require_positive("tolerance", tolerance)
    require_whole("steps", steps)
    _solvers()

    def made(columns: int) -> list[Layer]:
        return [Continuous(Field(columns, widths), method, float(tolerance), int(steps)) for _ in range(layers)]

    arguments = {"features": features, "layers": layers, "hidden": widths, "method": method}
    return flow_recipe("ffjord", features, made, arguments)
