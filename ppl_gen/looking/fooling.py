r"""Adversarial examples: the smallest change of a row after which a network says something else of one's choice.

.. math:: \min_r \; c \lVert r \rVert_2 + \mathrm{loss}(f(x + r), y^*), \quad x + r \in [0, 1]^m
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ppl_gen.errors import is_number, require_whole
from ppl_gen.looking.alone import read_alone
from ppl_gen.looking.asking import (
    checked_network,
    checked_target,
    evaluating,
    in_pieces,
    require_precision,
    require_share,
    scores,
    slope,
)

__all__ = ["AdversarialExamples", "adversarial_example"]

_LARGEST, _SMALLEST = 1e4, 1e-5  # of c, where the search for it ends
_HALVINGS = 10  # of the factor ten between a c that fools and one that does not
_BACK = 12  # halvings of the way back: nearer to the border, rounding would decide
#: |r| is sqrt(|r|^2 + smooth^2), in units of the largest number of the row: L-BFGS wants a slope at r = 0, too, and
#: takes a sharp bend there for curvature everywhere, unless it comes to it by degrees.
_SMOOTH = (1e-1, 1e-3, 1e-7)


@dataclass(frozen=True)
class AdversarialExamples:
    """Rows that were changed a little, and what came of it.

    Args:
        x: the changed rows, in the shape of the originals.
        change: r, what was added.
        norm: ``|r|`` of each row, Euclidean, in the units of x.
        fooled: whether the network says of a changed row what it was to say.
        c: of each row, the largest weight of ``|r|`` at which the network was still fooled; NaN where none was found.

    Example:
        >>> import torch
        >>> line = torch.nn.Linear(2, 2)
        >>> line.weight.data, line.bias.data = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.zeros(2)
        >>> found = adversarial_example(line, torch.tensor([[0.5, 0.5]]), 1, low=None, high=None)
        >>> found.norm.round(decimals=2), found.fooled  # the boundary lies at x_1 = 0, half a unit away
        (tensor([0.5000]), tensor([True]))
    """

    x: Tensor
    change: Tensor
    norm: Tensor
    fooled: Tensor
    c: Tensor

    def __repr__(self) -> str:
        done = int(self.fooled.sum())
        typical = f", median norm {float(self.norm[self.fooled].median()):.3g}" if done else ""
        return f"AdversarialExamples({done} of {len(self.norm)} fool the network{typical})"


def adversarial_example(
    network: nn.Module,
    x: Any,
    target: Any,
    *,
    c: float | None = None,
    low: float | None = 0.0,
    high: float | None = 1.0,
    within: float = 0.1,
    steps: int = 100,
) -> AdversarialExamples:
    r"""Changes each row as little as possible, so that a classifier gives it another label, or an encoder another code.

    .. math:: \min_r \; c \lVert r \rVert_2 + \mathrm{loss}(f(x + r), y^*), \quad
              \text{low} \le x + r \le \text{high}

    By L-BFGS-B for one c, and by bisection for the largest c whose minimiser still fools the network: the larger c, the
    smaller the change. (The paper says the smallest c, which would leave r unpunished.) Then the change is drawn back
    as far as it still fools. For two classes, a linear classifier and no bounds that is the foot of the perpendicular
    on the hyperplane between them; for a network, a local answer. With a ``c`` of one's own it is the minimiser itself.
    Rows of which the network says y* already stay as they are.

    Args:
        network: any module from rows to scores, or one number that is the log odds of label 1; or an encoder.
        x: rows x features, or rows x channels x height x width.
        target: labels y*, an integer for all rows or one for each: the loss is -log softmax(f(x + r))_y*, and the
            network is fooled where y* gets the largest score. Or codes, floating numbers, rows x code (or one code):
            the loss is half the squared distance from it, and the network is fooled where at most ``within`` of the
            distance at x is left.
        c: one weight for all rows; None: the bisection, about 20 to 30 minimisations a row.
        low: least value of a number of x + r; None: no bound.
        high: largest value of it; None: no bound.
        within: share of the distance between codes that may remain.
        steps: of each minimisation, at most.

    Raises:
        TypeError: for what is no module, or gives no numbers.
        ValueError: for rows that it cannot read or outside of the bounds, targets that are no output of it, and
            networks in half precision.

    References:
        Intriguing properties of neural networks (Szegedy et al., 2014). Adversarial images for variational autoencoders
        (Tabacof, Tavares and Valle, 2016) for codes.

    Example:
        >>> import torch
        >>> odds = torch.nn.Linear(2, 1)  # logistic regression
        >>> odds.weight.data, odds.bias.data = torch.tensor([[3.0, 4.0]]), torch.tensor([-6.0])
        >>> found = adversarial_example(odds, torch.tensor([[0.6, 0.3]]), 1)
        >>> found.norm.round(decimals=2)  # |3 * 0.6 + 4 * 0.3 - 6| / 5
        tensor([0.6000])
    """
    checked_network(network)
    require_precision(network)
    rows = read_alone(x, network)
    bounds = _checked_bounds(rows, low, high)
    require_share("within", within)
    require_whole("steps", steps)
    if c is not None and (not is_number(c) or not 0 < float(c) < math.inf):
        raise ValueError(f"c: expected a positive number or None, got {c!r}")
    with evaluating(network):
        with torch.no_grad():
            first = torch.cat([scores(network, piece) for piece in in_pieces(rows)])
        aims = _aims(first, target, float(within))
        found = [
            _smallest(network, row[None], aim, None if c is None else float(c), bounds, int(steps))
            for row, aim in zip(rows, aims, strict=True)
        ]
        changed = torch.cat([one for one, _ in found])
        with torch.no_grad():
            fooled = [aim.hit(scores(network, one[None])) for aim, one in zip(aims, changed, strict=True)]
    change = changed - rows
    return AdversarialExamples(
        changed.cpu(),
        change.cpu(),
        change.flatten(1).norm(dim=1).cpu(),
        torch.tensor(fooled),
        torch.tensor([weight for _, weight in found]),
    )


@dataclass(frozen=True)
class _Aim:
    """What one row is to look like: its loss, and whether it is there."""

    loss: Callable[[Tensor], Tensor]
    hit: Callable[[Tensor], bool]


def _aims(first: Tensor, target: Any, within: float) -> list[_Aim]:
    given = target if isinstance(target, Tensor) else _tensor(target)
    if given.is_floating_point():
        fits = given.shape in ((first.shape[1],), first.shape) and given.device.type != "meta"
        if not fits or not bool(given.isfinite().all()):
            raise ValueError(
                f"target: expected finite codes of shape {tuple(first.shape)}, or one of {first.shape[1]} numbers, "
                f"got shape {tuple(given.shape)}; labels are integers"
            )
        codes = given.detach().to(first)
        return [
            _code_aim(code, within * float((start - code).norm()))
            for code, start in zip(codes.expand_as(first), first, strict=True)
        ]
    wide = _two_sided(first)
    return [_label_aim(int(label)) for label in checked_target(given, wide)]


def _tensor(target: Any) -> Tensor:
    try:
        return torch.as_tensor(target)
    except Exception as error:
        raise ValueError(f"target: expected labels (integers) or codes (floating numbers), got {target!r}") from error


def _two_sided(found: Tensor) -> Tensor:
    """One number is the log odds of label 1 against label 0."""
    return torch.cat([torch.zeros_like(found), found], 1) if found.shape[1] == 1 else found


def _label_aim(label: int) -> _Aim:
    def loss(found: Tensor) -> Tensor:
        return functional.cross_entropy(_two_sided(found), torch.tensor([label], device=found.device))

    return _Aim(loss, lambda found: int(_two_sided(found).argmax()) == label)


def _code_aim(code: Tensor, most: float) -> _Aim:
    return _Aim(
        lambda found: 0.5 * (found[0] - code).square().sum(), lambda found: float((found[0] - code).norm()) <= most
    )


def _smallest(
    network: nn.Module, row: Tensor, aim: _Aim, c: float | None, bounds: tuple[Any, Any], steps: int
) -> tuple[Tensor, float]:
    """The changed row, and the weight that gave it: NaN where none fools the network."""

    def tried(weight: float) -> tuple[Tensor, bool]:
        changed = _minimised(network, row, aim, weight, bounds, steps)
        with torch.no_grad():
            return changed, aim.hit(scores(network, changed))

    with torch.no_grad():
        if aim.hit(scores(network, row)):
            return row, math.inf
    if c is not None:
        return tried(c)[0], c
    weight, step = 1.0, 10.0
    best, fooled = tried(weight)
    if fooled:
        while fooled and weight < _LARGEST:
            good, weight = weight, weight * step
            changed, fooled = tried(weight)
            best = changed if fooled else best
        low, high = (weight, weight) if fooled else (good, weight)
    else:
        while not fooled and weight > _SMALLEST:
            high, weight = weight, weight / step
            best, fooled = tried(weight)
        if not fooled:
            return best, math.nan
        low = weight
    for _ in range(_HALVINGS if high > low else 0):
        middle = math.sqrt(low * high)
        changed, fooled = tried(middle)
        if fooled:
            best, low = changed, middle
        else:
            high = middle
    return _drawn_back(network, row, best, aim), low


def _drawn_back(network: nn.Module, row: Tensor, changed: Tensor, aim: _Aim) -> Tensor:
    """As far back towards the row as it still fools: c is only known to a thousandth."""
    least, most, change = 0.0, 1.0, changed - row
    with torch.no_grad():
        for _ in range(_BACK):
            middle = (least + most) / 2
            if aim.hit(scores(network, row + middle * change)):
                most = middle
            else:
                least = middle
    return row + most * change if most < 1 else changed


def _minimised(network: nn.Module, row: Tensor, aim: _Aim, c: float, bounds: tuple[Any, Any], steps: int) -> Tensor:
    from scipy.optimize import minimize

    start = row.double().cpu().numpy().ravel()
    unit = float(np.abs(start).max()) or 1.0

    def loss(flat: np.ndarray, smooth: float) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(flat).to(row).reshape(row.shape).requires_grad_()
        with torch.enable_grad():
            value = aim.loss(scores(network, x))
        steep = slope(value, x)
        # The norm in double precision: what float32 loses of a small change would be noise to L-BFGS.
        change = flat - start
        norm = math.sqrt(float(change @ change) + smooth**2)
        return float(value.detach()) + c * norm, steep.double().cpu().numpy().ravel() + c * change / norm

    found, options = start, {"maxiter": steps, "maxcor": 20, "ftol": 100 * torch.finfo(row.dtype).eps}
    for smooth in _SMOOTH:
        found = minimize(
            loss, found, (smooth * unit,), "L-BFGS-B", jac=True, bounds=[bounds] * start.size, options=options
        ).x
    return torch.from_numpy(found).to(row).reshape(row.shape)


def _checked_bounds(rows: Tensor, low: Any, high: Any) -> tuple[float | None, float | None]:
    for name, value in (("low", low), ("high", high)):
        if value is not None and (not is_number(value) or not abs(float(value)) < math.inf):
            raise ValueError(f"{name}: expected a finite number or None, got {value!r}")
    if low is not None and high is not None and not low < high:
        raise ValueError(f"high: expected more than low={low!r}, got {high!r}")
    least, most = float(rows.min()), float(rows.max())
    if (low is not None and least < low) or (high is not None and most > high):
        raise ValueError(
            f"x: expected numbers from {low} to {high} (low and high), got {least:g} to {most:g}; give the bounds of "
            "x, or None for none"
        )
    return None if low is None else float(low), None if high is None else float(high)
