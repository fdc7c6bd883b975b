"""Adam on a guide in the units of a normal near the posterior, and the mean of its iterates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["WhitenedAdam"]

Place = Callable[[Sequence[Tensor]], list[Tensor]]

_RATE, _FALL_FROM = 0.05, 100  # in standard deviations a step; falls as 1 / sqrt(step) after so many
_POWER = 3  # iterate t counts as t^3: half of the weight lies in the last sixth of the steps
_EPS = 1e-12  # losses are per row, so that gradients are small


class WhitenedAdam(torch.optim.Optimizer):
    r"""Adam on free numbers that parameters are a function of, with iterates averaged.

    .. math:: \theta_t = f(\phi_t), \quad \phi_{t+1} = \phi_t - \mathrm{Adam}\big(J_f^\top \nabla_\theta\big), \quad
        \bar\phi_t = \bar\phi_{t-1} + \tfrac{\eta + 1}{t + \eta} (\phi_t - \bar\phi_{t-1})

    phi counts in standard deviations of a normal near the posterior, so that one rate fits every program: 0.05, which
    falls as 1 / sqrt(step) after 100 steps. ``averaged`` gives the parameters at the mean of the iterates, of which
    later ones count more (eta = 3; Shamir and Zhang 2013): it has less noise than the last (Dhaka et al. 2020).

    Args:
        params: what is moved, in the order that ``place`` gives their values in.
        place: f, differentiable.
        free: phi at the beginning; the parameters are put at f of it.
        held: the tensors that ``place`` reads beside; they are kept with the state, as another process may not find
            them again to the last bit.
    """

    def __init__(
        self, params: Sequence[Tensor], place: Place, free: Sequence[Tensor], held: Sequence[Tensor] = ()
    ) -> None:
        super().__init__(list(params), {})
        self.params, self.place, self.held = list(params), place, list(held)
        self.free = [value.detach().clone().requires_grad_() for value in free]
        self.inner = torch.optim.Adam(self.free, lr=_RATE, eps=_EPS)
        self.mean = [value.detach().clone() for value in free]
        self.count = 0
        self._put()

    def _put(self) -> None:
        """The parameters at f(phi), the way back kept for the next gradient."""
        with torch.enable_grad():
            self.placed = self.place(self.free)
        with torch.no_grad():
            for param, value in zip(self.params, self.placed, strict=True):
                param.copy_(value)

    @property
    def rate(self) -> float:
        """That of the next step."""
        return _RATE * min(1.0, _FALL_FROM / (self.count + 1)) ** 0.5

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update, from the gradients of the parameters."""
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        for leaf, slope in zip(self.free, torch.autograd.grad(self.placed, self.free, slopes), strict=True):
            leaf.grad = slope
        self.inner.param_groups[0]["lr"] = self.rate
        self.inner.step()
        self.count += 1
        weight = (_POWER + 1) / (self.count + _POWER)
        with torch.no_grad():
            for mean, leaf in zip(self.mean, self.free, strict=True):
                mean.lerp_(leaf.detach(), weight)
        self._put()

    def averaged(self) -> list[Tensor]:
        """The parameters at the mean of the iterates."""
        with torch.no_grad():
            return [value.clone() for value in self.place(self.mean)]

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step."""
        return {
            "free": [value.detach().clone() for value in self.free],
            "mean": [value.clone() for value in self.mean],
            "held": [value.clone() for value in self.held],
            "count": self.count,
            "inner": copy.deepcopy(self.inner.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the optimiser of the same run stood that gave ``state_dict``."""
        with torch.no_grad():
            for part, values in (("free", self.free), ("mean", self.mean), ("held", self.held)):
                for value, kept in zip(values, state_dict[part], strict=True):
                    value.copy_(kept)
        self.count = int(state_dict["count"])
        self.inner.load_state_dict(copy.deepcopy(state_dict["inner"]))
        self._put()
