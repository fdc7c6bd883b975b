"""Mean and covariance of rows in one pass over chunks of them, summed in float64 and without a copy of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["RowMoments", "column_moments", "row_moments"]

_ELEMENTS = 2**22  # of a chunk: large enough for a matrix product at full speed, small enough for the cache
_LEAST_ROWS = 256
_NEAR = 2.0  # standard deviations


@dataclass(frozen=True, eq=False)
class RowMoments:
    """How many rows, their mean (features) and their covariance, divided by the count; in float64.

    The covariance C is ``matrix`` (features x features), or, of fewer rows than features, known by a ``factor`` F (rows
    x features) with C = F'F. ``single``: products of rows were rounded to float32 before they were summed.
    """

    count: int
    mean: Tensor
    matrix: Tensor | None
    factor: Tensor | None = None
    single: bool = False

    @property
    def variances(self) -> Tensor:
        """The diagonal of C."""
        if self.matrix is not None:
            return self.matrix.diagonal()
        assert self.factor is not None
        return self.factor.square().sum(0)

    def times(self, other: Tensor) -> Tensor:
        """C @ other, features x columns."""
        if self.matrix is not None:
            return self.matrix @ other
        assert self.factor is not None
        return self.factor.mT @ (self.factor @ other)

    def scaled(self, loc: Tensor, scale: Tensor) -> RowMoments:
        """Those of (x - loc) / scale, for a scale of each feature."""
        matrix = None if self.matrix is None else self.matrix / torch.outer(scale, scale)
        factor = None if self.factor is None else self.factor / scale
        return RowMoments(self.count, (self.mean - loc) / scale, matrix, factor, self.single)

    def leading(self, many: int) -> tuple[Tensor, Tensor, Tensor]:
        """The largest eigenvalues of C, falling, their vectors (features x many), and the mean of all others.

        One eigendecomposition of the smaller of C and F F', never a randomised one: on images that leaves the leading
        eigenvalues wrong in the third digit.
        """
        if self.matrix is not None:
            values, vectors = _leading(self.matrix, many)
        else:
            assert self.factor is not None
            values, found = _leading(self.factor @ self.factor.mT, min(many, self.count))
            vectors = torch.linalg.qr(self.factor.mT @ found).Q
            values = torch.cat([values, values.new_zeros(many - len(values))])
            vectors = _completed(vectors, many)
        rest = (self.variances.sum() - values.sum()) / (len(self.mean) - many)
        return values, vectors, rest.clamp_min(0.0)


def row_moments(x: Tensor, *, single: bool = False) -> RowMoments:
    r"""Mean and covariance of complete rows.

    .. math:: C = \frac{1}{N} \sum_i (x_i - s)(x_i - s)^\top - (\bar x - s)(\bar x - s)^\top

    about a shift s near the mean, so that nothing cancels. In float64 by default. ``single``: rows in float32 stay so
    within a chunk of B rows, which takes half of the time; sums of chunks are in float64. The error of an entry
    is then at most :math:`B \epsilon \sqrt{C_{ii} C_{jj}}` with epsilon = 6e-8, and as errors have either sign about
    :math:`\epsilon \sqrt{C_{ii} C_{jj}}`: relative to the largest eigenvalue, and not to small ones.

    Args:
        x: N x features, any real dtype.
        single: allow products in float32 where the rows are in float32.

    Example:
        >>> found = row_moments(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        >>> found.mean, found.matrix
        (tensor([2., 4.], dtype=torch.float64), tensor([[1., 2.],
                [2., 4.]], dtype=torch.float64))
    """
    single = single and x.dtype is torch.float32
    if len(x) < x.shape[1]:
        mean = x.to(torch.float64).mean(0)
        return RowMoments(len(x), mean, None, (x.to(torch.float64) - mean) / len(x) ** 0.5)
    working = torch.float32 if single else torch.float64
    first = x[:_LEAST_ROWS].to(torch.float64)
    spread, mean = torch.std_mean(first, 0, correction=0)
    # Chunks need not be copied where means are no larger than what is spread about them: then little cancels.
    near = x.dtype is working and bool((mean.abs() <= _NEAR * spread).all())
    found = _about(x, None if near else mean.to(working), single)
    if near and bool((found.mean.square() > 10 * _NEAR**2 * found.variances).any()):  # other rows lie elsewhere
        found = _about(x, found.mean.to(working), single)
    return found


def _about(x: Tensor, shift: Tensor | None, single: bool) -> RowMoments:
    total, gram = x.new_zeros(x.shape[1], dtype=torch.float64), None
    for chunk in x.split(_rows_of(x)) if shift is None else _shifted(x, shift):
        total += chunk.sum(0)
        product = _gram(chunk)
        gram = product.double() if gram is None else gram.add_(product)
    assert gram is not None
    offset = total / len(x)
    covariance = gram.div_(len(x)).sub_(torch.outer(offset, offset))
    mean = offset if shift is None else shift.double() + offset
    return RowMoments(len(x), mean, covariance, single=single)


def column_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each column in float64: mean, variance (divided by N), and whether all of its values are equal.

    Args:
        x: N, or N x features; the results have the shape of a row.
    """
    shift = x[: _rows_of(x)].to(torch.float64).mean(0)
    total, squares = torch.zeros_like(shift), torch.zeros_like(shift)
    for chunk in _shifted(x, shift):
        total += chunk.sum(0)
        squares += chunk.square_().sum(0)
    low, high = torch.aminmax(x, dim=0)
    offset = total / len(x)
    return shift + offset, (squares / len(x) - offset.square()).clamp_min(0.0), low == high


def _rows_of(x: Tensor) -> int:
    return max(_LEAST_ROWS, _ELEMENTS // max(1, x[0].numel()))


def _shifted(x: Tensor, shift: Tensor) -> Iterator[Tensor]:
    """Chunks of ``x - shift`` in the dtype of the shift, one after the other in the same memory."""
    rows = min(len(x), _rows_of(x))
    buffer = shift.new_empty((rows, *x.shape[1:]))
    for chunk in x.split(rows):
        out = buffer[: len(chunk)]
        if x.dtype is shift.dtype:
            torch.sub(chunk, shift, out=out)
        else:
            out.copy_(chunk).sub_(shift)
        yield out


def _gram(chunk: Tensor) -> Tensor:
    """chunk' chunk: numpy notices that it is symmetric, and computes half of it."""
    if chunk.device.type != "cpu":
        return chunk.mT @ chunk
    rows = chunk.numpy()
    return torch.from_numpy(rows.T @ rows)


def _leading(matrix: Tensor, many: int) -> tuple[Tensor, Tensor]:
    """The ``many`` largest eigenvalues of a symmetric matrix, falling, and their vectors."""
    if matrix.device.type == "cpu":  # numpy's library takes two thirds of the time of torch's
        values, vectors = map(torch.from_numpy, np.linalg.eigh(matrix.numpy()))
    else:
        values, vectors = torch.linalg.eigh(matrix)
    return values[-many:].flip(0), vectors[:, -many:].flip(1)


def _completed(vectors: Tensor, many: int) -> Tensor:
    """Orthonormal columns, and as many more as it takes."""
    lacking = many - vectors.shape[1]
    if lacking <= 0:
        return vectors
    more = torch.eye(len(vectors), many + 1, dtype=vectors.dtype, device=vectors.device)
    return torch.linalg.qr(torch.cat([vectors, more], 1)).Q[:, :many]
