"""Functions of one tensor that use every operation known to replays in NumPy and in C."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from ppl_gen.capture.recorder import record

DRAWN = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXTREME = torch.tensor([0.0, 1.0, -1.0, 1e-300, 1e300, -1e300, 700.0, -700.0, 30.0, math.inf, -math.inf, math.nan])
EXTREME = torch.cat([EXTREME, EXTREME.flip(0)]).double().reshape(6, 4)
ONE = torch.ones((), dtype=torch.float64)
WHERE = torch.tensor([[0, 2], [1, 1], [3, 0], [2, 2], [0, 0], [1, 3]])


def gradient(function):
    def both(u):
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            value = function(u).sum()
            return value.detach(), torch.autograd.grad(value, u)[0]

    return both


def changed(u):
    """In place, on what no view shares."""
    v = u.exp()
    v.clamp_(max=3.0)
    w = (u > 0.5).logical_and_(u < 2.0)
    return v + u.sin().masked_fill_(w, 7.0)


#: What gives one tensor or several; gradients are operations too.
CASES = {
    "sums": lambda u: (u.sum(), u.sum(0), u.sum((0, 1)), u.sum(-1, keepdim=True), u.mean(), u.mean(1), (u > 0).sum() * ONE),
    "arithmetic": lambda u: (u + u.T.reshape(6, 4), u - 2.0 * u, 3.0 - u, u / (1.0 + u * u), -u, u.square(), u.reciprocal()),
    "powers": lambda u: (u**2, u**1.0, u**3, u.abs() ** 0.5, u.abs().sqrt(), u.abs().rsqrt()),
    "nothing": lambda u: ((u.exp() * 1.0).sum(1) + 0.0, u.exp() / 1, u.sin() - 0),
    "exponentials": lambda u: (u.exp(), u.abs().log(), u.abs().log1p(), u.expm1(), u.sin(), u.cos(), u.tanh(), u.atan(), u.erf()),
    "angles": lambda u: (u.tan(), (0.9 * u.tanh()).asin(), (0.9 * u.tanh()).acos(), torch.atan2(u, u.flip(0)), torch.hypot(u, u.flip(0))),
    "other bases": lambda u: (u.exp2(), u.abs().log2(), u.abs().log10(), u.sinh(), u.cosh(), u.erfc(), torch.logaddexp(u, u.flip(1)), torch.logaddexp(u, u)),
    "whole numbers": lambda u: (u.floor(), u.ceil(), u.trunc()),
    "norms": lambda u: (u.norm(), u.norm(dim=-1), u.norm(dim=0, keepdim=True), torch.linalg.vector_norm(u, 1, dim=1), u.T.norm(dim=1)),
    "gamma": lambda u: ((u.abs() + 0.5).lgamma(), (u.abs() + 0.5).digamma()),
    "comparisons": lambda u: tuple(
        functional.relu(u).where(m, u)
        for v in (0.5, u.flip(0)) for m in (u < v, u <= v, u > v, u >= v, u == v, u != v, (u < v) & (u > -1), ~(u < v))
    ),
    "logic": lambda u: tuple(
        torch.where(m, u, 1.0)
        for m in ((u < 1).logical_and(u > -1), (u < 1).logical_or(u > 2), (u > 1).logical_not(), u.isnan())
    ),
    "extremes": lambda u: (u.clamp(-1, 1), u.clamp(min=0.1), u.clamp(max=0.1), u.maximum(-u), u.minimum(-u), u.amax(1), u.sign(), u.sgn()),
    "least and most": lambda u: (torch.clamp_min(u, 0.2), torch.clamp_max(u, 0.2), u.max(1)[0], u.max(1)[1] * ONE, *u.max(0, keepdim=True)[:1]),
    "logsumexp": lambda u: (u.logsumexp(1), u.logsumexp((0, 1)), u.logsumexp(0, keepdim=True)),
    "sigmoids": lambda u: (u.sigmoid(), functional.logsigmoid(u), functional.softplus(u), functional.softplus(u, 2.0, 5.0)),
    "xlogy": lambda u: (torch.xlogy(u, u.abs()), torch.xlogy(u, 0.0 * u.abs())),
    "shapes": lambda u: (u.reshape(3, 8), u[:, 1], u[2], u[1:5:2], u.T, u.transpose(0, 1), u.permute(1, 0), u[:, None], u[0].expand(6, 4), u[:, :1].squeeze(-1)),
    "parts": lambda u: (*u.split([1, 2, 3]), *u.split(4), *u.unbind(1), torch.cat([u, u[:1]]), torch.stack([u, -u], 1)),
    "running": lambda u: (u.cumsum(0), u.cumprod(1)),
    "places": lambda u: (u[WHERE[:, 0]], u[:, WHERE[:4, 1]], u.gather(1, WHERE), u[WHERE[:, 0], WHERE[:, 1]]),
    "put": lambda u: (u.scatter_add(1, WHERE, u), u.index_put((WHERE[:, 0],), u), u.index_put((WHERE[:, 0],), u, accumulate=True)),
    "padding": lambda u: (functional.pad(u, (1, 2), value=3.0), functional.pad(u, (-1, 1, 2, -3)), u.clone()),
    "products": lambda u: (u @ u.T, u @ u[0], torch.mm(u.T, u), torch.bmm(u[None], u.T[None]), torch.dot(u[0], u[1]), u.t()),
    "entropy": lambda u: tuple(
        functional.binary_cross_entropy_with_logits(u, (DRAWN > 0).double(), reduction=r) for r in ("none", "mean", "sum")
    ),
    "numbers": lambda u: tuple(getattr(torch.ops.aten, n).Scalar(u, 3.0) for n in ("add", "sub", "mul", "div", "rsub")),
    "masks": lambda u: (u.masked_fill(u > 0, 2.0), u.sin().masked_fill(u < 0, 3.0)),
    "in place": changed,
    "tangents": gradient(lambda u: functional.relu(u) + u.tanh() + u.sigmoid() + functional.logsigmoid(u) + functional.softplus(u)),
    "tangents of pairs": gradient(lambda u: torch.logaddexp(u, u.flip(0)) + u.norm(dim=-1, keepdim=True) + u.erfc() + u.cosh()),
    "slopes of parts": gradient(lambda u: u[1:5:2].exp().sum() + u[2].sin().sum() + u.logsumexp(1).sum() + u[WHERE[:, 0]].sin().sum()),
}  # fmt: skip


def taped(case):
    function = CASES[case]

    def results(u):
        found = function(u)
        return found if isinstance(found, tuple) else (found,)

    u = DRAWN.clone()
    return results, record(lambda: results(u), [u]), u
