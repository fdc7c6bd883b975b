r"""M-steps in closed form, derived from a probe of the program.

* weighted counts, where rows of probability tables are rows of a global site: :math:`\pi_{rk} \propto \sum w`;
* weighted least squares, where locations of normal densities are affine in real sites;
* weighted residuals, events and successes, where scales, rates and odds are single coordinates, up to constants.

Locations and scales that weigh on each other are improved in turn until neither moves (Meng and Rubin, "Maximum
likelihood estimation via the ECM algorithm", 1993).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_gen.inference.em.coordinates import Affine
from ppl_gen.inference.em.density_form import Reading

__all__ = ["Locations", "ProbabilityTable", "Ratios", "newton_maximum", "unequal"]

Weights = Mapping[str, Tensor]

_NEWTON_STEPS = 60
_HALVINGS = 30
_HIDDEN = 1e-12


@dataclass(frozen=True, eq=False)
class ProbabilityTable:
    """Weighted counts of a simplex-valued site.

    Args:
        parts: at each categorical site, which rows of its table are which rows of ours: ours x its, one or zero.
        extra: what the prior adds to the counts, alpha - 1; None under maximum likelihood.
    """

    site: str
    parts: list[tuple[Reading, Tensor]]
    extra: Tensor | None

    def __call__(self, value: Tensor, weights: Weights) -> Tensor:
        """The site at its best, in the shape of ``value`` (... x categories); ``weights`` packed by site."""
        size = value.shape[-1]
        counts = torch.stack(
            [rows @ _counts(reading, weights[reading.site], size) for reading, rows in self.parts]
        ).sum(0)
        if self.extra is not None:
            counts = counts + self.extra.expand(value.shape).reshape(counts.shape)
        total = counts.sum(-1, keepdim=True)
        least = torch.finfo(counts.dtype).eps
        shares = (counts / total).clamp_min(least)
        shares = torch.where(total > 0, shares / shares.sum(-1, keepdim=True), value.reshape(counts.shape))
        return shares.reshape(value.shape)


def _counts(reading: Reading, weight: Tensor, size: int) -> Tensor:
    """Weights by position of the table and by category: positions x size."""
    probs = reading.parameters["probs"]
    table = probs.shape[:-1]
    wide = reading.spread(weight).sum_to_size(torch.broadcast_shapes(table, reading.value.shape))
    categories = torch.arange(size, device=wide.device)
    if wide.numel() * size <= 1_000_000:  # at once where it fits in a cache; the time is all in the calls
        chosen = reading.value == categories.reshape(-1, *[1] * reading.value.dim())
        return (wide * chosen).sum_to_size(size, *table).reshape(size, -1).T
    return torch.stack([(wide * (reading.value == k)).sum_to_size(table).reshape(-1) for k in categories], -1)


@dataclass(frozen=True, eq=False)
class Ratios:
    """Scales, rates or odds, each a single coordinate to a power, times a constant.

    Args:
        role: "scale", "rate" or "odds".
        parts: at each row site, the parameter, and which of its positions are ours: coordinates x positions, 1 or 0.
        power: of each coordinate; the parameter's own coordinate is constant + power * ours.
        offset: that constant, where it is one for all positions of a coordinate (odds).
        located: locations of normal sites, by name.
        prior: the prior distribution of one entry, the transform and the shape of our site; None under maximum
            likelihood.
    """

    site: str
    units: slice
    role: str
    parts: list[tuple[Reading, Affine, Tensor]]
    power: Tensor
    offset: Tensor
    located: Mapping[str, Affine]
    prior: tuple[Any, Any, torch.Size] | None

    def __call__(self, vector: Tensor, weights: Weights) -> Tensor:
        """The whole vector with our coordinates at their best, all others fixed."""
        above, below = self._sums(vector, weights)
        old = vector[self.units]
        known = above + below > 0 if self.role == "odds" else below > 0
        if self.role == "scale" and bool((known & (above <= 0)).any()):
            raise FloatingPointError(
                f"the scale {self.site!r} fell to zero: rows that coincide have a likelihood without bound. Start "
                "elsewhere (another seed, Program(start=...)), or let the prior hold the scale up: EM(prior=True)"
            )
        least = torch.finfo(above.dtype).eps
        ratio = above.clamp_min(least * (above + below)) / below.clamp_min(least * (above + below))
        best = (ratio.log() / (2 if self.role == "scale" else 1) - self.offset) / self.power
        new = torch.where(known, best, old)
        if self.prior is not None:
            new = self._with_prior(new, old, above, below)
        return torch.cat([vector[: self.units.start], new, vector[self.units.stop :]])

    def _sums(self, vector: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Weighted sums above and below the line of each ratio: one of each for every coordinate."""
        above = below = torch.zeros_like(self.power)
        for reading, affine, chosen in self.parts:
            weight, x = reading.spread(weights[reading.site]), reading.value.to(vector)
            constant = affine.constant.reshape(affine.shape)
            if self.role == "scale":
                distance = x - self.located[reading.site].at(vector)
                top, bottom = weight * (distance * torch.exp(-constant)).square(), weight
            elif self.role == "odds":
                top, bottom = weight * x, weight * ((1 if reading.trials is None else reading.trials) - x)
            elif reading.family == "poisson":
                top, bottom = weight * x, weight * constant.exp()
            else:
                top, bottom = weight, weight * x * constant.exp()
            above = above + chosen @ top.sum_to_size(affine.shape).reshape(-1)
            below = below + chosen @ bottom.sum_to_size(affine.shape).reshape(-1)
        return above, below

    def _with_prior(self, best: Tensor, old: Tensor, above: Tensor, below: Tensor) -> Tensor:
        """Maxima of the expected log-likelihood, which the sums determine, plus the log prior: one per coordinate."""
        assert self.prior is not None
        fn, transform, shape = self.prior

        def objective(free: Tensor) -> Tensor:
            own = self.offset + self.power * free
            if self.role == "scale":
                rows = -below * own - above / 2 * torch.exp(-2 * own)
            elif self.role == "rate":
                rows = above * own - below * own.exp()
            else:
                rows = above * own - (above + below) * torch.nn.functional.softplus(own)
            return rows + fn.log_prob(transform(free.reshape(shape))).reshape(-1)

        with torch.no_grad():
            start = torch.where(objective(best) > objective(old), best, old)
        return newton_maximum(objective, start)


def newton_maximum(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Maxima of functions of one coordinate each, all at once, by Newton steps that are halved until they climb.

    Example:
        >>> x = newton_maximum(lambda x: torch.tensor([1.0, 4.0]) * x - x.exp(), torch.zeros(2))
        >>> x.exp()
        tensor([1., 4.])
    """
    here = start.detach()
    for _ in range(_NEWTON_STEPS):
        with torch.enable_grad():
            free = here.clone().requires_grad_()
            value = objective(free)
            (slope,) = torch.autograd.grad(value.sum(), free, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), free)
        value, slope = value.detach(), slope.detach()
        step = torch.where(bend < 0, -slope / bend, slope.sign()).nan_to_num().clamp(-2.0, 2.0)
        # So near the top that rounding hides the climb, Newton's step is trusted, and it is the last.
        near = slope * step <= _HIDDEN * (1 + value.abs())
        with torch.no_grad():
            for _ in range(_HALVINGS):
                lower = ~near & ~(objective(here + step) >= value)
                if not bool(lower.any()):
                    break
                step = torch.where(lower, step / 2, step)
            here = here + torch.where(near | (objective(here + step) >= value), step, 0.0)
        if bool(near.all()):
            break
    return here


@dataclass(frozen=True, eq=False)
class Locations:
    """Weighted least squares for all real coordinates that locations of normal sites are affine in.

    Args:
        units: the coordinates, as positions in the whole vector.
        parts: at each normal site, the location, the logarithm of its scale, and positions x units: its slopes.
        prior: mean and precision of the normal prior of each of ``units``; None under maximum likelihood.
        separate: whether no location has more than one of ``units`` in it: then each has an equation of its own.
    """

    units: Tensor
    parts: list[tuple[Reading, Affine, Affine, Tensor]]
    prior: tuple[Tensor, Tensor] | None
    separate: bool

    def __call__(self, vector: Tensor, weights: Weights) -> Tensor:
        """The whole vector with our coordinates at their best, all others fixed."""
        own = vector[self.units]
        slope = torch.zeros_like(own)
        matrix = slope if self.separate else own.new_zeros(len(own), len(own))
        for reading, loc, scale, columns in self.parts:
            precision = reading.spread(weights[reading.site]) * torch.exp(-2 * scale.at(vector))
            pull = precision * (reading.value.to(vector) - loc.at(vector))
            summed = precision.sum_to_size(loc.shape).reshape(-1)
            matrix = matrix + (
                columns.T.square() @ summed if self.separate else columns.T @ (summed[:, None] * columns)
            )
            slope = slope + columns.T @ pull.sum_to_size(loc.shape).reshape(-1)
        if self.prior is not None:
            mean, precision = self.prior
            matrix = matrix + (precision if self.separate else precision.diag())
            slope = slope + precision * (mean - own)
        return vector.index_copy(0, self.units, own + _solved(matrix, slope))


def _solved(matrix: Tensor, slope: Tensor) -> Tensor:
    """The shortest step (units) that solves the normal equations: a direction without weight does not move.

    ``matrix``: units x units, or its diagonal where each unit has an equation of its own.
    """
    if matrix.dim() == 1:
        return torch.where(matrix > 0, slope / matrix, 0.0)
    diagonal = matrix.diagonal()
    unit = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    scaled = unit.unsqueeze(-1) * matrix * unit
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if not bool(failed) and bool((factor.diagonal() > 1e-6).all()):
        return unit * torch.cholesky_solve((unit * slope).unsqueeze(-1), factor).squeeze(-1)
    return unit * (torch.linalg.pinv(scaled, hermitian=True, rtol=1e-12) @ (unit * slope))


def unequal(reading: Reading, loc: Affine, scale: Affine, columns: Tensor, vector: Tensor) -> bool:
    """Whether one location coordinate lies under scales that can differ: at a random point they do, where they can.

    ``columns``: positions x units.
    """
    scales = scale.at(vector).expand(torch.broadcast_shapes(scale.shape, loc.shape))
    for column in columns.T:
        touched = (column != 0).reshape(loc.shape).expand(scales.shape)
        found = scales[touched]
        if len(found) and bool((found != found[0]).any()):
            return True
    return False
