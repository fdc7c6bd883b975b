r"""The picture that a unit likes best, within bounds.

.. math:: \arg\max_x \; S_k(x) - \lambda \lVert x \rVert^2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppl_gen.errors import is_number, require_seed, require_whole
from ppl_gen.looking.asking import checked_network, checked_target, evaluating, pick, require_precision, scores, slope
from ppl_gen.looking.gradients import require_penalty

__all__ = ["activation_maximisation"]

_START = 1e-2  # standard deviation of the first picture: at zero, dead rectifiers may give no gradient


def activation_maximisation(
    network: nn.Module,
    shape: Sequence[int],
    target: int | Sequence[int] = 0,
    *,
    penalty: float = 0.1,
    low: float | None = None,
    high: float | None = None,
    steps: int = 200,
    seed: int = 0,
) -> Tensor:
    r"""The row of numbers, or the image, at which a score is highest for its size.

    .. math:: x^* = \arg\max_x \; S_k(x) - \lambda \lVert x \rVert_2^2, \quad \text{low} \le x \le \text{high}

    By L-BFGS-B from a nearly empty picture: a local maximum, of which other seeds may find others. Without the penalty,
    and without bounds, a network of rectifiers has none: its score grows along some direction for ever.

    Args:
        network: as for `saliency`.
        shape: of one row: (channels, height, width), or (features,).
        target: k, which score; several: one picture for each.
        penalty: lambda, in units of the score per squared unit of x; 0 only between bounds.
        low: least value of a number; None: no bound.
        high: largest value of a number; None: no bound.
        steps: of the optimiser, at most.
        seed: of the first picture.

    Returns:
        The shape of a row, or targets x that.

    Raises:
        TypeError: for what is no module, or gives no numbers.
        ValueError: for a shape that it cannot read, a target that it does not have, no penalty and no bounds, and
            networks in half precision.

    References:
        Visualizing higher-layer features of a deep network (Erhan, Bengio, Courville and Vincent, 2009). Deep inside
        convolutional networks (Simonyan, Vedaldi and Zisserman, 2014).

    Example:
        >>> import torch
        >>> line = torch.nn.Linear(3, 2)
        >>> best = activation_maximisation(line, (3,), 1, penalty=0.5)  # of w x - |x|^2 / 2: w itself
        >>> bool((best - line.weight[1]).abs().max() < 1e-4)
        True
    """
    checked_network(network)
    require_precision(network)
    size = _checked_shape(shape)
    weight = require_penalty("penalty", penalty)
    bounds = _checked_bounds(low, high)
    if weight == 0 and None in bounds:
        raise ValueError("penalty: 0 takes both bounds, low and high; without them the score may grow for ever")
    require_whole("steps", steps)
    seed = require_seed(seed)
    like = next(network.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(seed)
    start = (_START * torch.randn(size, generator=generator, dtype=torch.float64)).numpy()
    with evaluating(network):
        with torch.no_grad():
            found = scores(network, torch.from_numpy(start).to(like)[None])
        several = not isinstance(target, int | np.integer)
        wanted = list(target) if several and isinstance(target, Sequence | Tensor | np.ndarray) else [target]
        if any(one is None for one in wanted):
            raise ValueError(f"target: expected the number of a score, 0 to {found.shape[1] - 1}, or several; got None")
        picked = [int(checked_target(one, found)[0]) for one in wanted]
        if not picked:
            raise ValueError("target: expected at least one")
        pictures = [_climbed(network, start, k, weight, bounds, int(steps), like) for k in picked]
    return torch.stack(pictures) if several else pictures[0]


def _climbed(
    network: nn.Module,
    start: np.ndarray,
    target: int,
    penalty: float,
    bounds: tuple[float | None, float | None],
    steps: int,
    like: Tensor,
) -> Tensor:
    from scipy.optimize import minimize

    which = torch.tensor([target], device=like.device)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(flat.reshape(start.shape)).to(like)[None].requires_grad_()
        with torch.enable_grad():
            score = pick(scores(network, x), which).sum()
        value, steep = penalty * x.detach().square().sum() - score.detach(), 2 * penalty * x.detach() - slope(score, x)
        return float(value), steep.double().cpu().numpy().ravel()

    least, most = (sign * np.inf if b is None else b for b, sign in zip(bounds, (-1, 1), strict=True))
    first = np.clip(start, least, most)
    found = minimize(
        loss, first.ravel(), jac=True, method="L-BFGS-B", bounds=[bounds] * start.size, options={"maxiter": steps}
    )
    return torch.from_numpy(found.x.reshape(start.shape)).to(like).cpu()


def _checked_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes) or not len(shape):
        raise ValueError(f"shape: expected that of a row, such as (1, 28, 28), got {shape!r}")
    for size in shape:
        require_whole("shape", size)
    return tuple(int(size) for size in shape)


def _checked_bounds(low: Any, high: Any) -> tuple[float | None, float | None]:
    for name, value in (("low", low), ("high", high)):
        if value is not None and (not is_number(value) or not abs(float(value)) < float("inf")):
            raise ValueError(f"{name}: expected a finite number or None, got {value!r}")
    if low is not None and high is not None and not low < high:
        raise ValueError(f"high: expected more than low={low!r}, got {high!r}")
    return None if low is None else float(low), None if high is None else float(high)
