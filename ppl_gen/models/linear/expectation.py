r"""The E-step of linear-Gaussian latent variables, in standardised units.

.. math:: E[z_i] = M^{-1} W^\top \Lambda (y_i - \mu), \qquad \mathrm{Cov}[z_i] = M^{-1}, \qquad M = I + W^\top \Lambda W

over the entries that are observed. Of complete rows, all that follows is a function of their mean and covariance. With
gaps, M is the same for rows that lack the same entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_gen.nn.row_moments import RowMoments

__all__ = ["Patterns", "blended", "complete", "masked", "sorted_patterns"]

Found = tuple[Tensor, dict[str, Tensor]]

_ELEMENTS = 2**22  # rows x latent x latent at a time


@dataclass(frozen=True, eq=False)
class Patterns:
    """Rows sorted by which of their entries are missing.

    Args:
        y: N x features, zero where missing.
        seen: patterns x features, true where observed.
        which: the pattern of each row, rising.
    """

    y: Tensor
    seen: Tensor
    which: Tensor

    def pieces(self, latent: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows, their patterns, and the number of each row's among these, so many that work fits into memory."""
        many = max(64, _ELEMENTS // (latent + 1) ** 2)
        for y, which in zip(self.y.split(many), self.which.split(many), strict=True):
            first, last = int(which[0]), int(which[-1]) + 1
            yield y, self.seen[first:last], which - first


def sorted_patterns(y: Tensor, mask: Tensor) -> Patterns:
    """Rows ``y`` (N x features, zero where missing) by their ``mask``, true where observed.

    Example:
        >>> mask = torch.tensor([[True, False], [True, True], [True, False]])
        >>> found = sorted_patterns(torch.tensor([[1.0, 0.0], [2.0, 5.0], [3.0, 0.0]]), mask)
        >>> len(found.seen), found.which.bincount().sort().values
        (2, tensor([1, 2]))
    """
    key = torch.randint(2**62, mask.shape[1:], generator=torch.Generator().manual_seed(0)).to(mask.device)
    hashed = torch.where(mask, key, 0).sum(1)  # equal masks have equal sums; that unequal ones differ is checked
    _, which = hashed.unique(return_inverse=True)
    seen = _representatives(mask, which)
    if not torch.equal(seen[which], mask):
        seen, which = mask.unique(dim=0, return_inverse=True)
    order = which.argsort(stable=True)
    return Patterns(y[order], seen, which[order])


def _representatives(mask: Tensor, which: Tensor) -> Tensor:
    """One row of the mask for each group."""
    index = which.new_zeros(int(which.max()) + 1).scatter_(0, which, torch.arange(len(which), device=which.device))
    return mask[index]


def complete(rows: RowMoments, w: Tensor, mu: Tensor, weight: Tensor, constant: Tensor) -> Found:
    """Log-likelihood (total nats) and moments per row, from the moments of complete rows.

    ``w``: features x latent; ``mu``, ``weight`` (Lambda) and ``constant`` (nats): features.
    """
    mean, pull = rows.mean.to(w), weight[:, None] * w
    offset = mean - mu
    precision = torch.eye(w.shape[1], dtype=w.dtype, device=w.device) + w.mT @ pull
    gain = torch.linalg.solve(precision, pull.mT)  # E[z | y] = gain (y - mu)
    crossed = _second(rows, offset, gain.mT)
    z, zz = gain @ offset, torch.linalg.inv(precision) + gain @ crossed
    yz = torch.cat([torch.outer(mu, z) + crossed, mean[:, None]], 1)
    variances = rows.variances.to(w)
    squares = (weight * (variances + offset.square())).sum() - (crossed * pull).sum()
    noise = (weight.log() + constant).sum()
    log_likelihood = 0.5 * rows.count * (noise - torch.linalg.slogdet(precision)[1] - squares)
    return log_likelihood, {
        "rows": w.new_tensor(rows.count),
        "count": w.new_full((1,), rows.count),
        "zz": augmented(zz, z)[None],
        "yz": yz,
        "yy": variances + mean.square(),
        "z_mean": z,
        "z_second": zz,
    }


def _second(rows: RowMoments, offset: Tensor, thin: Tensor) -> Tensor:
    """E[(y - mu)(y - mu)'] @ thin, features x columns."""
    return rows.times(thin.double()).to(thin) + torch.outer(offset, offset @ thin)


def masked(rows: Patterns, w: Tensor, mu: Tensor, weight: Tensor, constant: Tensor) -> Found:
    """As `complete`, of rows with gaps: a factorisation for each pattern, and memory for some rows at a time."""
    d, k = w.shape
    pairs, eye = (w[:, :, None] * w[:, None, :]).flatten(1), torch.eye(k, dtype=w.dtype, device=w.device)
    total = w.new_zeros(())
    zz, yz, yy = w.new_zeros(d, (k + 1) ** 2), w.new_zeros(d, k + 1), w.new_zeros(d)
    z_sum, z_square, count = w.new_zeros(k), w.new_zeros(k, k), w.new_zeros(d)
    for y, seen, which in rows.pieces(k):
        y, seen = y.to(w), seen.to(w)
        scaled = seen * weight
        precision = eye + (scaled @ pairs).unflatten(1, (k, k))
        factor = torch.linalg.cholesky(0.5 * (precision + precision.mT))
        covariance = torch.cholesky_inverse(factor)
        many = torch.bincount(which, minlength=len(seen)).to(w)
        pulled = scaled[which] * (y - mu)
        pull = pulled @ w
        z = _applied(covariance, pull, which)
        squares = _grouped(z, which, len(seen)) + many[:, None, None] * covariance
        sums = w.new_zeros(len(seen), k).index_add_(0, which, z)
        top = torch.cat([squares, sums[:, :, None]], 2)
        bottom = torch.cat([sums, many[:, None]], 1)
        zz += seen.mT @ torch.cat([top, bottom[:, None, :]], 1).flatten(1)
        yz += y.mT @ torch.cat([z, torch.ones_like(z[:, :1])], 1)
        yy += y.square().sum(0)
        z_sum, z_square = z_sum + sums.sum(0), z_square + squares.sum(0)
        count += many @ seen
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        fixed = seen @ (weight.log() + constant) - log_det
        total += 0.5 * ((many * fixed).sum() - (pulled * (y - mu)).sum() + (pull * z).sum())
    known = count.clamp_min(1.0)  # of a minibatch, a column may be missing in all rows
    return total, {
        "rows": w.new_tensor(len(rows.y)),
        "count": count,
        "zz": (zz / known[:, None]).unflatten(1, (k + 1, k + 1)),
        "yz": yz / known[:, None],
        "yy": yy / known,
        "z_mean": z_sum / len(rows.y),
        "z_second": z_square / len(rows.y),
    }


def _applied(matrices: Tensor, vectors: Tensor, which: Tensor) -> Tensor:
    """To each vector (rows x k) the symmetric matrix (patterns x k x k) of its pattern."""
    if 4 * len(matrices) > len(vectors):
        return torch.bmm(matrices[which], vectors[..., None]).squeeze(-1)
    sizes = torch.bincount(which, minlength=len(matrices)).tolist()
    return torch.cat([v @ matrix for v, matrix in zip(vectors.split(sizes), matrices, strict=True)])


def _grouped(z: Tensor, which: Tensor, patterns: int) -> Tensor:
    """The sum of z z' over the rows of each pattern: patterns x k x k."""
    if 4 * patterns > len(z):
        return z.new_zeros(patterns, *[z.shape[1]] * 2).index_add_(0, which, z[:, :, None] * z[:, None, :])
    sizes = torch.bincount(which, minlength=patterns).tolist()
    return torch.stack([part.mT @ part for part in z.split(sizes)])


def augmented(zz: Tensor, z: Tensor) -> Tensor:
    """E[(z, 1)(z, 1)'], (k + 1) x (k + 1), from E[zz'], k x k, and E[z], k."""
    top = torch.cat([zz, z[..., None]], -1)
    bottom = torch.cat([z, torch.ones_like(z[..., :1])], -1)
    return torch.cat([top, bottom[..., None, :]], -2)


def blended(old: Mapping[str, Tensor], new: Mapping[str, Tensor], shares: tuple[float, float]) -> dict[str, Tensor]:
    """The moments of two sets of rows together, whose rows count as often as ``shares`` say."""
    sizes = {name: (shares[0] * old[name], shares[1] * new[name]) for name in ("rows", "count")}

    def mixed(name: str, size: str) -> Tensor:
        mine, theirs = sizes[size]
        share = theirs / (mine + theirs).clamp_min(torch.finfo(theirs.dtype).tiny)
        share = share.reshape(*share.shape, *[1] * (old[name].dim() - share.dim()))
        return old[name] + share * (new[name] - old[name])

    by_column = {name: mixed(name, "count") for name in ("zz", "yz", "yy")}
    by_row = {name: mixed(name, "rows") for name in ("z_mean", "z_second")}
    return {**{name: mine + theirs for name, (mine, theirs) in sizes.items()}, **by_column, **by_row}
