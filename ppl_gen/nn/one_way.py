r"""Flows that are easy in one direction: planar, radial, Sylvester and inverse autoregressive maps of vectors.

.. math:: \log q(z_K) = \log q(z_0) - \sum_k \log \left| \det \frac{\partial z_k}{\partial z_{k-1}} \right|

Each Jacobian is taken at the input of its map. What is drawn through them has a density; any other value has none, as
nobody knows where it came from. That is all that a guide needs: it weighs what it draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform
from torch.nn.functional import softplus

__all__ = ["OneWay", "Step", "inverse_autoregressive", "planar", "radial", "sylvester"]

#: A map of vectors, with the log determinant of its Jacobian at its input: ... x size -> (... x size, ...).
Step = Callable[[Tensor], tuple[Tensor, Tensor]]
_MOST = 8.0  # log scale of an autoregressive map


class OneWay(Transform):
    """Maps one after another, for the draws of one call: only of the last of these is the density known.

    Args:
        steps: the maps, from the noise to the draws.

    Example:
        >>> import pyro.distributions as dist
        >>> doubled = OneWay([lambda z: (2 * z, z.new_tensor(2.0).log() * z.shape[-1])])
        >>> wide = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [doubled])
        >>> z = wide.rsample()
        >>> torch.allclose(wide.log_prob(z), dist.Normal(torch.zeros(3), 2.0).to_event(1).log_prob(z))
        True
        >>> wide.log_prob(torch.zeros(3))
        Traceback (most recent call last):
        ...
        NotImplementedError: this flow knows the density of its own last draw alone
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__(cache_size=1)
        self.steps = steps
        self._log_det = torch.zeros(())

    def _call(self, x: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[:-1])
        for step in self.steps:
            x, log_det = step(x)
            total = total + log_det
        self._log_det = total
        return x

    def _inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError("this flow knows the density of its own last draw alone")

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        known: tuple[Any, Any] = self._cached_x_y
        if known[0] is not x or known[1] is not y:
            self(x)
        return self._log_det


def planar(z: Tensor, direction: Tensor, weight: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    r"""Stretches or presses space along one direction, around a plane.

    .. math:: z' = z + \hat u \tanh(w^\top z + b), \quad \hat u = u + (m(w^\top u) - w^\top u) \frac{w}{|w|^2}, \quad
              m(a) = \log(1 + e^a) - 1

    so that w'u > -1, without which it would fold space over. Arguments have one vector, or one for each row.

    Args:
        z: ... x size.
        direction: u, ... x size.
        weight: w, ... x size.
        shift: b, ... .

    References:
        Variational inference with normalizing flows (Rezende and Mohamed, 2015), section 4.1 and appendix A.1.
    """
    along = (weight * direction).sum(-1, keepdim=True)
    square = weight.square().sum(-1, keepdim=True) + torch.finfo(z.dtype).tiny
    direction = direction + (softplus(along) - 1 - along) * weight / square
    wave = ((weight * z).sum(-1, keepdim=True) + shift.unsqueeze(-1)).tanh()
    slope = (1 - wave.square()) * (weight * direction).sum(-1, keepdim=True)
    return z + direction * wave, torch.log1p(slope.squeeze(-1))


def radial(z: Tensor, centre: Tensor, width: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    r"""Draws space towards a point, or pushes it away.

    .. math:: z' = z + \beta h \, (z - c), \quad h = \frac{1}{\alpha + |z - c|}, \quad
              \alpha = e^{\mathrm{width}}, \; \beta = \log(1 + e^{\mathrm{strength}}) - \alpha > -\alpha

    .. math:: \log | \det | = (D - 1) \log(1 + \beta h) + \log \Bigl( 1 + \beta \frac{\alpha}{(\alpha + r)^2} \Bigr)

    Args:
        z: ... x size.
        centre: c, ... x size.
        width: logarithm of alpha, ... .
        strength: before softplus, ... .

    References:
        Variational inference with normalizing flows (Rezende and Mohamed, 2015), section 4.1 and appendix A.2.
    """
    away = z - centre
    # The root has no slope at zero: a draw at the very centre would have no gradient.
    distance = (away.square().sum(-1) + torch.finfo(z.dtype).tiny).sqrt()
    alpha = width.exp()
    beta = softplus(strength) - alpha
    bend = beta / (alpha + distance)
    log_det = (z.shape[-1] - 1) * torch.log1p(bend) + torch.log1p(bend * alpha / (alpha + distance))
    return z + bend.unsqueeze(-1) * away, log_det


def sylvester(z: Tensor, frame: Tensor, outer: Tensor, inner: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    r"""Several planar maps at once, in an orthogonal frame.

    .. math:: z' = z + Q R \tanh(\tilde R Q^\top z + b), \quad
              \log | \det | = \sum_i \log \bigl( 1 + h'_i \, R_{ii} \tilde R_{ii} \bigr)

    Q has orthonormal columns, made of reflections; R and its partner are upper triangular, with tanh of what is given
    on their diagonals: products stay above -1. (Pyro's `Sylvester` has a wrong determinant.)

    Args:
        z: ... x size.
        frame: one reflection for each column of Q, ... x columns x size.
        outer: R, ... x columns x columns; what lies below the diagonal is not read.
        inner: its partner.
        shift: b, ... x columns.

    References:
        Sylvester normalizing flows for variational inference (van den Berg, Hasenclever, Tomczak and Welling, 2018).
    """
    columns = _orthonormal(frame)
    outer, inner = (part.triu(1) + part.diagonal(dim1=-2, dim2=-1).tanh().diag_embed() for part in (outer, inner))
    seen = (columns.mT @ z.unsqueeze(-1)).squeeze(-1)
    wave = ((inner @ seen.unsqueeze(-1)).squeeze(-1) + shift).tanh()
    moved = (columns @ (outer @ wave.unsqueeze(-1))).squeeze(-1)
    product = outer.diagonal(dim1=-2, dim2=-1) * inner.diagonal(dim1=-2, dim2=-1)
    return z + moved, torch.log1p((1 - wave.square()) * product).sum(-1)


def _orthonormal(frame: Tensor) -> Tensor:
    """The first columns of the product of the reflections, ... x size x columns."""
    count, size = frame.shape[-2:]
    made = torch.eye(size, dtype=frame.dtype, device=frame.device)[:, :count].expand(*frame.shape[:-2], size, count)
    for vector in reversed(frame.unbind(-2)):
        normal = vector / (vector.square().sum(-1, keepdim=True) + torch.finfo(frame.dtype).tiny).sqrt()
        made = made - 2 * normal.unsqueeze(-1) * (normal.unsqueeze(-2) @ made)
    return made


def inverse_autoregressive(z: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    r"""Scales and shifts each number as a masked network of those before it says.

    .. math:: z'_i = e^{s_i(z_{<i})} z_i + m_i(z_{<i}), \quad \log | \det | = \sum_i s_i

    Args:
        z: ... x size.
        shift: m, ... x size.
        log_scale: s, ... x size; held within -8 to 8.

    References:
        Improving variational inference with inverse autoregressive flow (Kingma et al., 2016).
    """
    log_scale = _MOST * (log_scale / _MOST).tanh()
    return log_scale.exp() * z + shift, log_scale.sum(-1)
