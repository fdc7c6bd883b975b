"""Whether the transforms of a guide know their own Jacobians: one that does not makes every density wrong, silently."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.handlers.sites import is_sample, transforms_of
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["check_jacobians"]

_LARGEST = 16  # dimensions: a determinant of that size costs nothing, and a wrong formula shows in few already
_TRIALS = 3  # a right formula fails at single points, where its transform is extreme; a wrong one at all
_TOLERANCE = 1e-4  # nats, in float64: a right formula agrees to rounding


def check_jacobians(guide: Callable[..., Any], batch: Batch, seed: int = 0) -> None:
    """Compare log |det dy/dx| of every transform of vectors with that of automatic differentiation.

    At parameters drawn at random, on copies: as they come, transforms lie near the identity, where a wrong formula is
    right. Those of more than 16 dimensions, and those that are no modules, are not looked at.

    Raises:
        IncompatibleError: naming site and transform, where the two differ (Pyro's Sylvester, say).
    """
    with without_side_effects():
        trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
        torch.manual_seed(seed)
        for name, site in trace.nodes.items():
            size = site["fn"].event_shape[-1] if is_sample(site) and site["fn"].event_dim else 0
            for transform in transforms_of(site["fn"]) if 0 < size <= _LARGEST else ():
                if isinstance(transform, nn.Module):
                    _refuse_wrong(name, type(transform).__name__, [_compared(transform, size) for _ in range(_TRIALS)])


def _refuse_wrong(site: str, transform: str, trials: Sequence[tuple[float, float] | None]) -> None:
    if any(trial is None or abs(trial[0] - trial[1]) <= _TOLERANCE * (1 + abs(trial[1])) for trial in trials):
        return
    said, right = max((trial for trial in trials if trial is not None), key=lambda trial: abs(trial[0] - trial[1]))
    raise IncompatibleError(
        f"the guide's site {site!r} goes through {transform}, whose log_abs_det_jacobian is wrong: it says {said:.4f} "
        f"where differentiating the transform gives {right:.4f} (at parameters drawn at random), so every density "
        "under it would be wrong. Use another transform: planar, affine_autoregressive, affine_coupling, spline"
    )


def _compared(transform: Any, size: int) -> tuple[float, float] | None:
    """What the transform says and what is right at one random point, or None where it cannot be tried."""
    try:
        tried = copy.deepcopy(transform).double().eval().requires_grad_(False)  # no network that is to be trained
        for parameter in tried.parameters():
            parameter.normal_(0.0, size**-0.5)  # matrices of about unit norm, whatever their size
        x = torch.randn(size, dtype=torch.float64)

        def forward(value: Tensor) -> Tensor:
            result: Tensor = tried(value)
            return result

        with torch.enable_grad():
            slope = torch.autograd.functional.jacobian(forward, x)
        said = tried.log_abs_det_jacobian(x, tried(x)).sum()
        right = torch.linalg.slogdet(slope)[1]
    except PROGRAM_ERRORS:
        return None  # of another shape than the site, or no map of one vector
    return (float(said), float(right)) if bool(torch.isfinite(said) & torch.isfinite(right)) else None
