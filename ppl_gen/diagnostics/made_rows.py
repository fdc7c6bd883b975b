"""Rows that a program makes beside rows of the data: told apart, covered, repeated, copied, and in which modes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_gen.data.arrays import as_array
from ppl_gen.errors import require_positive, require_seed

__all__ = ["RowsCompared", "compare_rows", "modes_covered"]

FEWEST = 20  # rows of each kind below which nothing is said
_NEIGHBOURS = 5  # of a row of the data: its ball reaches to the fifth of them
_SAME = 0.01  # of the median distance of neighbours in the data: nearer rows are repeats
_SHUFFLES = 200
_MISSED = 0.1  # of a label's share in the data: made less often, it counts as missed
_CHUNK = 5000  # rows of the data at a time,
_NUMBERS = 8_000_000  # and distances
_ROUNDED = 1e-7  # of a row's length: its square is rounded to some 1e-16 of itself


@dataclass(frozen=True)
class RowsCompared:
    """How made rows differ from rows of the data, by nearest neighbours in units of the data's standard deviations.

    Attributes:
        count: rows of each kind.
        accuracy: of a classifier that calls a row what its nearest neighbour among all others is; 1/2 where both kinds
            are alike, near 1 where they are told apart, near 0 where made rows are copies of those of the data.
        z: how many standard deviations of shuffled labels the accuracy lies above 1/2.
        coverage: share of the data's rows with a made row nearer than their fifth neighbour in the data (0.97 where
            both are alike); what is low when modes are missing.
        spread: standard deviation of the made rows over that of the data, summed over columns.
        repeated: share of made rows that nearly repeat another made row, beyond that share within the data.
        copied: share of made rows that nearly repeat one of all rows of the data, beyond that share within the data.
        missed: labels that made rows show less than a tenth as often as the data do; None without labels.
        labels: how many labels there are; None without labels.
        nearer: the probability that a made row lies less than half as far from its nearest row of the data as one of
            the data's does, both over the distance from there to the next: below 1/2 where both are alike, near 1
            where made rows are rows of the data with a little noise.

    Source: Schilling (1986) and Lopez-Paz and Oquab (2017) for tests by classifiers, Naeem et al. (2020) for coverage,
    Meehan, Chaudhuri and Dasgupta (2020) for ranks of distances as a sign of copies.
    """

    count: int
    accuracy: float
    z: float
    coverage: float
    spread: float
    repeated: float
    copied: float
    missed: tuple[int, ...] | None = None
    labels: int | None = None
    nearer: float = 0.0

    @property
    def clinging(self) -> bool:
        """Whether made rows lie nearer to rows of the data than these to one another, by five standard deviations."""
        deviation = math.sqrt((2 * self.count + 1) / 12) / self.count  # of Mann and Whitney's statistic
        return self.z < -5 or self.nearer - 0.5 > 5 * deviation

    def __str__(self) -> str:
        modes = "" if self.missed is None else f", {(self.labels or 0) - len(self.missed)} of {self.labels} labels made"
        return (
            f"nearest neighbours tell {self.accuracy:.0%} of {self.count} made and {self.count} observed rows apart "
            f"(chance: 50%), made rows cover {self.coverage:.0%} of the data (alike: 97%), "
            f"spread {self.spread:.2f}{modes}"
        )


def compare_rows(data: Any, made: Any, *, labels: Any = None, seed: int = 0) -> RowsCompared:
    """Compare made rows with rows of the data.

    Both are rows x anything of the same shape; of the longer, as many are drawn as the shorter has, but copies are
    looked for among all rows of the data. Columns are divided by the data's standard deviations. Time goes as the
    square of the fewer rows: some thousand are enough.

    Args:
        data: rows of the data: such that the program has not seen, or those that it may have copied.
        made: rows of the program, as ``fit.sample(1000)["x"]``.
        labels: a whole number for each row of ``data``; made rows take that of the nearest.
        seed: of the rows drawn, and of shuffled labels.

    Raises:
        TypeError: for what holds no numbers.
        ValueError: for shapes that differ, fewer than 20 rows, numbers that are not finite, labels that do not match.

    Example:
        >>> numbers = torch.Generator().manual_seed(0)
        >>> data, made = torch.randn(2, 500, 3, generator=numbers)
        >>> found = compare_rows(data, made)
        >>> abs(found.z) < 5 and found.coverage > 0.9
        True
        >>> compare_rows(data, 0.1 * made).z > 5
        True
    """
    numbers = torch.Generator().manual_seed(require_seed(seed))
    every, others, kinds = _checked(data, made, labels)
    count = min(len(every), len(others))
    chosen = torch.randperm(len(every), generator=numbers)[:count]
    rows, others = every[chosen], others[torch.randperm(len(others), generator=numbers)[:count]]
    deviation = rows.std(0, correction=0)
    scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    spread = float(others.std(0, correction=0).sum() / deviation.sum().clamp_min(torch.finfo(torch.float64).tiny))
    # About the mean: far from zero, distances by matrix products lose their digits.
    every, rows, others = ((values - rows.mean(0)) / scale for values in (every, rows, others))
    near = _neighbours(rows, others, numbers)
    accuracy, z = _told_apart(near.nearest, numbers)
    kinds = None if kinds is None else kinds[chosen]
    copied, nearer = _copies(every, rows, others, chosen)
    return RowsCompared(
        count,
        accuracy,
        z,
        coverage=float((near.across <= near.ball).double().mean()),
        spread=spread,
        repeated=_repeated(near.own, near.within),
        copied=copied,
        nearer=nearer,
        missed=None if kinds is None else _missed(kinds, kinds[near.source]),
        labels=None if kinds is None else len(kinds.unique()),
    )


def modes_covered(rows: Any, modes: Any, within: float) -> tuple[int, float]:
    """How many of the modes have a row within a distance, and the share of rows within it of some mode.

    Args:
        rows: rows x numbers.
        modes: modes x numbers.
        within: the distance, three standard deviations of a mode, say.

    Raises:
        TypeError: for what holds no numbers.
        ValueError: for shapes that differ, or a distance that is not positive.

    Example:
        >>> modes_covered(torch.tensor([[0.0, 0.1], [5.0, 0.0]]), torch.tensor([[0.0, 0.0], [9.0, 0.0]]), within=0.5)
        (1, 0.5)
    """
    require_positive("within", within)
    points, centres = _numbers("rows", rows), _numbers("modes", modes)
    if points.dim() != 2:
        raise ValueError(f"rows: expected rows x numbers, got shape {tuple(points.shape)}")
    if centres.dim() != 2 or points.shape[1] != centres.shape[1]:
        wide = points.shape[1]
        raise ValueError(f"modes: expected modes x {wide} numbers, as in rows, got shape {tuple(centres.shape)}")
    distance, nearest = _nearest(points, centres)
    close = distance < within
    return int(nearest[close].unique().numel()), float(close.double().mean())


def _numbers(name: str, value: Any) -> Tensor:
    """Rows of finite numbers: rows x anything."""
    rows = torch.as_tensor(as_array(value, name)).detach().cpu().double()
    if rows.dim() < 1 or 0 in rows.shape:
        raise ValueError(f"{name}: expected rows of numbers, got shape {tuple(rows.shape)}")
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers")
    return rows


def _checked(data: Any, made: Any, labels: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, others = _numbers("data", data), _numbers("made", made)
    if rows.shape[1:] != others.shape[1:]:
        wanted, got = tuple(rows.shape[1:]), tuple(others.shape[1:])
        raise ValueError(f"made: expected rows of shape {wanted}, as those of data, got {got}")
    if min(len(rows), len(others)) < FEWEST:
        raise ValueError(f"made: expected at least {FEWEST} rows, as of data, got {len(others)} and {len(rows)}")
    flat = rows.reshape(len(rows), -1), others.reshape(len(others), -1)
    if labels is None:
        return *flat, None
    kinds = torch.as_tensor(as_array(labels, "labels")).detach().cpu()
    if kinds.shape != (len(rows),) or kinds.is_floating_point():
        shape = tuple(kinds.shape)
        raise ValueError(f"labels: expected a whole number for each of {len(rows)} rows, got shape {shape}")
    return *flat, kinds


@dataclass(frozen=True)
class _Neighbours:
    """Of as many rows of the data as of made ones.

    ``nearest``: of each row of the data and then of each made one, which other row of both is nearest, one at random
    of those at equal distances. ``within``, ``across`` and ``ball``: from each row of the data to the nearest other of
    the data, to the nearest made row, and to its fifth in the data; ``own`` and ``source``: from each made row to the
    nearest other made row, and which row of the data is nearest.
    """

    nearest: Tensor
    within: Tensor
    across: Tensor
    ball: Tensor
    own: Tensor
    source: Tensor


def _neighbours(rows: Tensor, others: Tensor, numbers: torch.Generator) -> _Neighbours:
    count, pooled = len(rows), torch.cat([rows, others])
    among = torch.rand(2 * count, generator=numbers, dtype=rows.dtype)
    nearest, source = torch.empty(2, 2 * count, dtype=torch.long)
    to_data, to_made, ball = torch.empty(3, 2 * count, dtype=rows.dtype)
    step = max(1, _NUMBERS // (2 * count))
    for begin in range(0, 2 * count, step):
        some = slice(begin, begin + step)
        distance = _distances(pooled[some], pooled)
        distance.diagonal(begin).fill_(math.inf)
        nearest[some] = _least(distance, among[some])
        to_data[some], source[some] = distance[:, :count].min(1)
        to_made[some] = distance[:, count:].min(1).values
        ball[some] = distance[:, :count].kthvalue(_NEIGHBOURS, dim=1).values
    return _Neighbours(
        nearest, to_data[:count], to_made[:count], ball[:count], own=to_made[count:], source=source[count:]
    )


def _distances(points: Tensor, rows: Tensor) -> Tensor:
    """Points x rows; what the rounding of products may leave of no distance is none, wherever a row stands."""
    distance = torch.cdist(points, rows)
    return distance.masked_fill_(distance <= _ROUNDED * points.norm(dim=1, keepdim=True), 0.0)


def _least(distance: Tensor, among: Tensor) -> Tensor:
    """Where each row has its least value; of several equal ones the one that ``among``, within [0, 1), points at."""
    least, at = distance.min(1)
    equal = distance == least[:, None]
    count = equal.sum(1)
    tied = count > 1
    if bool(tied.any()):
        which = (among[tied] * count[tied]).long() + 1
        at[tied] = (equal[tied].cumsum(1) >= which[:, None]).byte().argmax(1)
    return at


def _told_apart(nearest: Tensor, numbers: torch.Generator) -> tuple[float, float]:
    """The accuracy of nearest neighbours, and its distance from chance in standard deviations of shuffled labels."""
    kind = torch.arange(len(nearest)) >= len(nearest) // 2
    hits = []
    for _ in range(_SHUFFLES):
        shuffled = kind[torch.randperm(len(nearest), generator=numbers)]
        hits.append((shuffled == shuffled[nearest]).double().mean())
    chance = torch.stack(hits)
    accuracy = float((kind == kind[nearest]).double().mean())
    return accuracy, (accuracy - float(chance.mean())) / max(float(chance.std()), 1e-12)


def _repeated(made: Tensor, data: Tensor) -> float:
    """The share of made rows with next to no distance to their neighbour, beyond that share in the data."""
    near = _SAME * float(data.median())
    return max(0.0, float((made <= near).double().mean()) - float((data <= near).double().mean()))


def _copies(every: Tensor, rows: Tensor, others: Tensor, chosen: Tensor) -> tuple[float, float]:
    """`RowsCompared.copied` and ``nearer``, the rows of the data being rows ``chosen`` of ``every`` one of them."""
    made, source = _nearest(others, every)
    data, beside = _nearest(rows, every, chosen)
    # Each over the distance from there to the next, the row itself left out: dense and sparse places count alike.
    made_ratio = 2 * _over(made, _nearest(every[source], every, source)[0])
    data_ratio = _over(data, _nearest(every[beside], every, beside, chosen)[0])
    ranked = data_ratio.sort().values
    above = len(ranked) - torch.searchsorted(ranked, made_ratio, right=True)
    equal = len(ranked) - above - torch.searchsorted(ranked, made_ratio)
    return _repeated(made, data), float((above + equal / 2).double().mean() / len(ranked))


def _over(distance: Tensor, unit: Tensor) -> Tensor:
    """Their ratio; 1 where both are zero, as among rows of zeros and ones."""
    return torch.where((distance == 0) & (unit == 0), 1.0, distance / unit)


def _nearest(points: Tensor, rows: Tensor, *leaving_out: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to and number of the nearest of ``rows``; for each point the numbers ``leaving_out`` do not count."""
    best = torch.full((len(points),), math.inf, dtype=points.dtype)
    where = torch.zeros(len(points), dtype=torch.long)
    step = max(1, _NUMBERS // max(1, min(len(rows), _CHUNK)))
    for first in range(0, len(points), step):
        some = slice(first, first + step)
        for begin in range(0, len(rows), _CHUNK):
            distance = _distances(points[some], rows[begin : begin + _CHUNK])
            for numbers in (given[some] for given in leaving_out):
                held = (numbers >= begin) & (numbers < begin + distance.shape[1])
                distance[held.nonzero().squeeze(1), numbers[held] - begin] = math.inf
            least, at = distance.min(1)
            where[some] = torch.where(least < best[some], at + begin, where[some])
            best[some] = torch.minimum(least, best[some])
    return best, where


def _missed(kinds: Tensor, made: Tensor) -> tuple[int, ...]:
    shares: Mapping[int, float] = {int(kind): float((kinds == kind).double().mean()) for kind in kinds.unique()}
    return tuple(k for k, share in shares.items() if float((made == k).double().mean()) < _MISSED * share)
