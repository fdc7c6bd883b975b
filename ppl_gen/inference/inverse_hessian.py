r"""The normal that a path of L-BFGS implies at one of its points (Zhang, Carpenter, Gelman and Vehtari 2022).

.. math:: \Sigma = \operatorname{diag}(\alpha) + \beta \gamma \beta^\top, \quad \mu = u - \Sigma \nabla U(u)

alpha is a diagonal that follows the path (Gilbert and Lemarechal 1989); beta and gamma are the compact form of the
BFGS updates by the remembered pairs (Byrd, Nocedal and Schnabel 1994).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_gen.inference.lbfgs import Path

__all__ = ["ImpliedNormal", "implied_normal", "next_diagonal"]


def next_diagonal(alpha: Tensor, step: Tensor, change: Tensor) -> Tensor:
    r"""The diagonal after one more pair (s, y), each of shape (size,), as Gilbert and Lemarechal (1989) update it.

    .. math:: \alpha_i' = \Big(\frac{a}{b \alpha_i} + \frac{y_i^2}{b} - \frac{a s_i^2}{b c \alpha_i^2}\Big)^{-1},
        \quad a = \sum y_i^2 \alpha_i,\ b = s^\top y,\ c = \sum s_i^2 / \alpha_i

    >>> next_diagonal(torch.ones(2), torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0]))  # curvature 4 along the first
    tensor([0.2500, 0.2500])
    """
    a, b, c = (change.square() * alpha).sum(), step @ change, (step.square() / alpha).sum()
    inverse = a / (b * alpha) + change.square() / b - a * step.square() / (b * c * alpha.square())
    return torch.where((inverse > 0) & inverse.isfinite(), 1.0 / inverse, alpha)


@dataclass(frozen=True)
class ImpliedNormal:
    r"""N(loc, diag(root) (I + Q (M M' - I) Q') diag(root)): root (size,), Q (size, r) orthonormal, M (r, r).

    Draws and densities take O(size r) operations.
    """

    loc: Tensor
    root: Tensor
    basis: Tensor
    factor: Tensor

    def draw(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draws from standard normal ``noise`` (draws, size), and their log densities (draws,)."""
        inside = noise @ self.basis
        white = noise + (inside @ self.factor.T - inside) @ self.basis.T
        log_det = self.root.log().sum() + self.factor.diagonal().log().sum()
        constant = 0.5 * noise.shape[1] * torch.tensor(2 * torch.pi, dtype=noise.dtype).log()
        return self.loc + white * self.root, -0.5 * noise.square().sum(1) - constant - log_det

    def covariance(self) -> Tensor:
        """The whole matrix, (size, size)."""
        middle = self.factor @ self.factor.T - torch.eye(len(self.factor), dtype=self.loc.dtype, device=self.loc.device)
        white = torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        return self.root[:, None] * (white + self.basis @ middle @ self.basis.T) * self.root


def implied_normal(path: Path, alpha: Tensor) -> ImpliedNormal | None:
    """The normal at the last point of the path; None where the estimate is not positive definite.

    Args:
        path: of at least one pair.
        alpha: the diagonal of the first estimate, (size,), all positive.
    """
    s, y = path.steps.T, path.slopes.T  # size x pairs, oldest first
    products = s.T @ y
    upper = torch.triu(products)
    eye = torch.eye(len(upper), dtype=s.dtype, device=s.device)
    inverse, failed = torch.linalg.inv_ex(upper)
    if int(failed) or not bool(inverse.isfinite().all()):
        return None
    inner = inverse.T @ (torch.diag(products.diagonal()) + y.T @ (alpha[:, None] * y)) @ inverse
    gamma = torch.cat([torch.cat([0 * eye, -inverse], 1), torch.cat([-inverse.T, inner], 1)])
    beta = torch.cat([alpha[:, None] * y, s], 1)
    root = alpha.sqrt()
    basis, right = torch.linalg.qr(beta / root[:, None])
    middle = right @ gamma @ right.T
    middle = (middle + middle.T) / 2 + torch.eye(len(right), dtype=s.dtype, device=s.device)
    factor, failed = torch.linalg.cholesky_ex(middle)
    if int(failed) or not bool(factor.isfinite().all()):
        return None
    made = ImpliedNormal(path.u, root, basis, factor)
    white = root * path.slope
    inside = basis.T @ white
    shift = root * (white + basis @ (factor @ (factor.T @ inside) - inside))
    return ImpliedNormal(path.u - shift, root, basis, factor) if bool(shift.isfinite().all()) else made
