"""Whether a captured step gives the numbers of the program, as far as rounding lets one tell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ppl_gen.inference.gradients import Step

__all__ = ["close", "difference", "nudged"]

#: Of the change of a gradient where parameters change by their last bit: rounding within the step adds up to more.
ROUNDING = 30.0
#: Of the norm of a tensor. A compiler sums in another order and has other exponentials: a logsumexp of log densities of
#: some hundred nats is then off by 2e-5 in float32 (seen), of which nothing is left in float64.
EXACT, COMPILED, DOUBLE = 1e-5, 1e-4, 1e-10


def difference(ours: Step, theirs: Step, *, compiled: bool = False, nudged: Step | None = None) -> str:
    """The first of loss, parts, next state and gradients that differs from the program's, in words; "" for none.

    ``nudged`` is the program's step at parameters whose last bits are others: of gradients that are small differences
    of large numbers, as those of a bias before batch norm, no more is known than they differ by there.
    """
    said = "from the program's under the same random numbers"
    if not bool(theirs.value.isfinite()):
        return "" if not bool(ours.value.isfinite()) else f"its loss differs {said}"
    pairs = [("loss", ours.value, theirs.value)]
    pairs += [(name, ours.parts[name], value) for name, value in theirs.parts.items()]
    pairs += [(f"next {name}", ours.state[name], value) for name, value in theirs.state.items()]
    for name, one, other in pairs:
        if not close(one, other, compiled=compiled):
            return f"its {name} differs {said}"
    largest = max((float(grad.abs().max()) for grad in theirs.gradients if grad.numel()), default=0.0)
    unsure = [0.0] * len(theirs.gradients)
    if nudged is not None:
        both = zip(nudged.gradients, theirs.gradients, strict=True)
        unsure = [
            ROUNDING * float(torch.linalg.vector_norm(one - other).nan_to_num(0.0, 0.0, 0.0)) for one, other in both
        ]
    three = zip(ours.gradients, theirs.gradients, unsure, strict=True)
    if not all(close(one, other, largest, compiled=compiled, unsure=noise) for one, other, noise in three):
        return f"its gradients differ {said}"
    return ""


def close(one: Tensor, other: Tensor, largest: float = 0.0, *, compiled: bool = False, unsure: float = 0.0) -> bool:
    """Equal up to a small part of the norm, or of a thousandth of the ``largest`` entry of its like, or to ``unsure``.

    >>> close(torch.ones(3), torch.ones(3) + 1e-6), close(torch.ones(3), torch.ones(3) + 1e-4)
    (True, False)
    """
    if one.shape != other.shape or one.dtype != other.dtype or one.stride() != other.stride():
        return False
    if not other.is_floating_point():
        return torch.equal(one, other)
    tolerance = DOUBLE if other.dtype is torch.float64 else COMPILED if compiled else EXACT
    same = (one == other) | (one.isnan() & other.isnan())
    apart = torch.linalg.vector_norm(torch.where(same, torch.zeros_like(one), one - other))
    bound = torch.linalg.vector_norm(other.nan_to_num(0.0, 0.0, 0.0)) + 1e-3 * largest + 1e-3
    return bool(apart <= (tolerance * bound).clamp(min=unsure))


@contextlib.contextmanager
def nudged(params: Sequence[Tensor]) -> Iterator[None]:
    """Parameters whose last bits are others; on exit they are as they were.

    >>> value = torch.ones(3)
    >>> with nudged([value]):
    ...     bool((value == 1).any()), torch.allclose(value, torch.ones(3))
    (False, True)
    """
    signs = torch.Generator().manual_seed(0)
    kept = [param.clone() for param in params]
    try:
        for param in params:
            if param.is_floating_point():
                up = torch.rand(param.shape, generator=signs).to(param) < 0.5
                param.mul_(1 + torch.finfo(param.dtype).eps * (2 * up - 1).to(param))
        yield
    finally:
        for param, value in zip(params, kept, strict=True):
            param.copy_(value)
