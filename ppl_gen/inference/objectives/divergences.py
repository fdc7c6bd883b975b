"""Divergences D_f between two densities as games: the five that f-GANs are known for, and one's own f."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ppl_gen.arguments import require_text
from ppl_gen.errors import require_callable

__all__ = ["DIVERGENCES", "Divergence"]

_RATIOS = torch.logspace(-3, 3, 61, dtype=torch.float64)  # where a divergence of one's own is held against theory
_OUTPUTS = torch.linspace(-6, 6, 49, dtype=torch.float64)
_FAR = 30.0  # outputs of a critic beyond which no activation is asked
_ROUNDING = 1e-8  # relative, in float64: formulas written with care lose a few digits of sixteen


@dataclass(frozen=True, repr=False)
class Divergence:
    r"""The f-divergence of a convex f with f(1) = 0, and how a critic bounds it from below.

    .. math:: D_f(p \Vert q) = \mathbb{E}_q f(p / q) = \sup_T \mathbb{E}_p T - \mathbb{E}_q f^*(T), \qquad
              f^*(t) = \sup_u \, u t - f(u)

    The supremum is reached at T* = f'(p/q); every other T gives less, so that the value of the game
    ``Adversarial(Divergence(...))`` never exceeds the divergence. The critic's output r is unbounded; T = activation(r)
    takes it into the domain of f*. Given f alone, r stands for log(p/q): then T = f'(exp r) and
    f*(T) = exp(r) T - f(exp r), by derivatives that torch finds, and no formula of f* is needed.

    Args:
        f: convex, of the ratio u = p/q > 0, with f(1) = 0, in operations of torch, element by element.
        conjugate: f*, of t in the range of ``activation``; None: by f alone.
        activation: from the reals into the domain of f*, rising, so that a large output means "like the data"; None:
            the identity, where there is a ``conjugate``.
        name: of the divergence, for the fit's notes.
        composed: f*(activation(r)), where computing one after the other loses digits or overflows.

    Raises:
        TypeError: for what is no function.
        ValueError: where f(1) is not 0, f is not convex, the activation falls, leaves the domain of f* or does not
            reach f'(u) for ratios from 1/10 to 10, or the pair breaks the Fenchel-Young inequality
            f(u) + f*(t) >= u t, with equality at t = f'(u), on a grid of ratios from 1e-3 to 1e3.

    Source: Nowozin, Cseke and Tomioka (2016), "f-GAN"; Nguyen, Wainwright and Jordan (2010) for the bound.

    Example:
        >>> total = Divergence(lambda u: (u - 1).abs() / 2, lambda t: t, lambda r: r.tanh() / 2, name="total variation")
        >>> total.border
        0.0
        >>> Divergence(lambda u: u * u.log(), lambda t: t.exp())
        Traceback (most recent call last):
        ...
        ValueError: conjugate: at t = f'(u), f(u) + f*(t) has to be u t; at u = 0.001 it is -0.004 and not -0.006
    """

    f: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor], Tensor] | None = None
    activation: Callable[[Tensor], Tensor] | None = None
    name: str = "a divergence of one's own"
    composed: Callable[[Tensor], Tensor] | None = None

    def __repr__(self) -> str:
        return f"Divergence({self.name!r})"

    @property
    def call(self) -> str:
        """What tells it from other divergences: its name, which several may have, and two values of f.

        >>> Divergence(lambda u: (u - 1).square(), name="mine").call
        "Divergence(name='mine', f(1/2)=0.25, f(2)=1)"
        """
        half, two = (float(value) for value in self.f(torch.tensor([0.5, 2.0], dtype=torch.float64)))
        return f"Divergence(name={self.name!r}, f(1/2)={half:.6g}, f(2)={two:.6g})"

    def __post_init__(self) -> None:
        require_callable("f", self.f)
        for name in ("conjugate", "activation", "composed"):
            if getattr(self, name) is not None:
                require_callable(name, getattr(self, name))
        require_text("name", self.name)
        if self.conjugate is None and (self.activation is not None or self.composed is not None):
            raise ValueError("conjugate: an activation leads into the domain of f*, so give f* too, or f alone")
        self._check_f()
        self._check_activation()
        if self.conjugate is not None:
            self._check_pair(self.conjugate)

    def slope(self, ratio: Tensor) -> Tensor:
        """f'(u): the best critic's T where data are ``ratio`` times as dense as made rows; of any shape.

        >>> DIVERGENCES["pearson"].slope(torch.tensor([1.0, 2.0]))  # 2 (u - 1)
        tensor([0., 2.])
        """
        with torch.enable_grad():
            u = ratio if ratio.requires_grad else ratio.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.f(u).sum(), u, create_graph=ratio.requires_grad)
        return found

    def on_data(self, output: Tensor) -> Tensor:
        """T, from the critic's output; of any shape."""
        if self.conjugate is None:
            return self.slope(output.exp())
        return output if self.activation is None else self.activation(output)

    def on_made(self, output: Tensor) -> Tensor:
        """f*(T), from the critic's output; of any shape."""
        if self.composed is not None:
            return self.composed(output)
        if self.conjugate is None:
            ratio = output.exp()
            return ratio * self.slope(ratio) - self.f(ratio)
        return self.conjugate(self.on_data(output))

    @property
    def border(self) -> float:
        """The output of the best critic where data and made rows are equally dense."""
        if self.conjugate is None:
            return 0.0
        even = float(self.slope(torch.ones((), dtype=torch.float64)))
        low, high = -_FAR, _FAR
        while high - low > 1e-9:
            middle = (low + high) / 2
            if float(self.on_data(torch.tensor(middle, dtype=torch.float64))) < even:
                low = middle
            else:
                high = middle
        return round((low + high) / 2, 6) + 0.0  # no minus zero

    def _check_f(self) -> None:
        values = self.f(_RATIOS)
        if not isinstance(values, Tensor) or values.shape != _RATIOS.shape or not bool(values.isfinite().all()):
            raise ValueError("f: expected one finite number for each ratio from 1e-3 to 1e3, in operations of torch")
        one = float(self.f(torch.ones((), dtype=torch.float64)))
        if abs(one) > _ROUNDING:
            raise ValueError(f"f: f(1) has to be 0, so that equal densities are no distance apart; got {one:g}")
        try:
            slopes = self.slope(_RATIOS)
        except RuntimeError as error:
            raise ValueError(f"f: torch finds no derivative of it ({error})") from error
        falls = slopes.diff() < -_ROUNDING * (1 + slopes[1:].abs())
        if bool(falls.any()):
            where = float(_RATIOS[1:][falls][0])
            raise ValueError(f"f: expected a convex function, and its slope falls at u = {where:.3g}")
        if self.conjugate is None and not bool((slopes.diff() > 0).all()):
            raise ValueError("f: it has straight parts, where its slope says nothing of the ratio; give its conjugate")

    def _check_activation(self) -> None:
        values = self.on_data(_OUTPUTS)
        if bool((values.diff() < 0).any()):
            raise ValueError("activation: expected a rising function, so that a large output means 'like the data'")
        if not bool(self.on_made(_OUTPUTS).isfinite().all()):
            raise ValueError("activation: it leads out of the domain of the conjugate, which is not finite there")
        ends = self.on_data(torch.tensor([-_FAR, _FAR], dtype=torch.float64)).tolist()
        wanted = self.slope(torch.tensor([0.1, 10.0], dtype=torch.float64)).tolist()
        slack = _ROUNDING * (1 + abs(wanted[0]) + abs(wanted[1]))
        if ends[0] > wanted[0] + slack or ends[1] < wanted[1] - slack:
            raise ValueError(
                f"activation: it reaches {ends[0]:.3g} to {ends[1]:.3g}, and the best critic takes values from "
                f"{wanted[0]:.3g} to {wanted[1]:.3g} for ratios from 0.1 to 10"
            )

    def _check_pair(self, conjugate: Callable[[Tensor], Tensor]) -> None:
        values, slopes = self.f(_RATIOS), self.slope(_RATIOS)
        both, product = values + conjugate(slopes), _RATIOS * slopes
        wrong = ~((both - product).abs() <= _ROUNDING * (1 + product.abs() + values.abs()))
        if bool(wrong.any()):
            u, got, right = (float(x[wrong][0]) for x in (_RATIOS, both, product))
            at = f"at u = {u:.3g} it is {got:.3f} and not {right:.3f}"
            raise ValueError(f"conjugate: at t = f'(u), f(u) + f*(t) has to be u t; {at}")
        t, made = self.on_data(_OUTPUTS).unsqueeze(1), self.on_made(_OUTPUTS).unsqueeze(1)
        lacking = _RATIOS * t - values - made
        if bool((lacking > _ROUNDING * (1 + (_RATIOS * t).abs() + values.abs() + made.abs())).any()):
            row, column = divmod(int(lacking.argmax()), len(_RATIOS))
            raise ValueError(
                f"conjugate: f(u) + f*(t) has to be u t at least; at u = {float(_RATIOS[column]):.3g}, "
                f"t = {float(t[row]):.3g} it is {float(lacking[row, column]):.3g} less"
            )


#: By name. Hellinger is the squared one; the value of "jensen-shannon" is twice that divergence.
DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence(lambda u: u * u.log(), lambda t: (t - 1).exp(), name="KL(data, program)"),
    "reverse-kl": Divergence(
        lambda u: -u.log(),
        lambda t: -1 - (-t).log(),
        lambda r: -(-r).exp(),
        name="KL(program, data)",
        composed=lambda r: r - 1,
    ),
    "hellinger": Divergence(
        lambda u: (u.sqrt() - 1).square(),
        lambda t: t / (1 - t),
        lambda r: -(-r).expm1(),
        name="squared Hellinger distance",
        composed=lambda r: r.expm1(),
    ),
    "jensen-shannon": Divergence(
        lambda u: u * u.log() - (u + 1) * (u + 1).log() + math.log(4),
        lambda t: -(-t.expm1()).log() - math.log(4),
        logsigmoid,
        name="twice the Jensen-Shannon divergence",
        composed=lambda r: softplus(r) - math.log(4),
    ),
    "pearson": Divergence(lambda u: (u - 1).square(), lambda t: t.square() / 4 + t, name="Pearson's chi-squared"),
}
