"""Adam's fused kernel, called directly: torch's own `step` gathers and groups the same lists again every time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["FusedAdam"]


class FusedAdam:
    """The steps of an optimiser of torch after its first, with its own state and to the same bits.

    The optimiser stays the owner of moments, counts and rates, so that schedules and checkpoints work on it as ever.
    """

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        (self.group,) = optimiser.param_groups
        held = [optimiser.state[param] for param in self.group["params"]]
        self.params = [param.detach() for param in self.group["params"]]
        self.first, self.second, self.counts = ([s[n] for s in held] for n in ("exp_avg", "exp_avg_sq", "step"))
        self.kernel = torch._fused_adamw_ if self.group.get("decoupled_weight_decay") else torch._fused_adam_

    @staticmethod
    def serves(optimiser: torch.optim.Optimizer) -> bool:
        """Whether it is Adam or AdamW, fused, as torch makes them, with all parameters of one kind, and has begun."""
        if type(optimiser) not in (torch.optim.Adam, torch.optim.AdamW) or len(optimiser.param_groups) != 1:
            return False
        group = optimiser.param_groups[0]
        plain = group["fused"] and not (group["amsgrad"] or group["maximize"] or group["capturable"])
        kinds = {(param.device, param.dtype) for param in group["params"]}
        begun = all("step" in optimiser.state.get(param, {}) for param in group["params"])
        hooks = optimiser._optimizer_step_pre_hooks or optimiser._optimizer_step_post_hooks
        return bool(plain and len(kinds) == 1 and begun and not hooks)

    def step(self, grads: Sequence[Tensor]) -> None:
        """One update, in place."""
        group = self.group
        beta1, beta2 = group["betas"]
        with torch.no_grad():
            torch._foreach_add_(self.counts, 1)
            self.kernel(
                self.params,
                list(grads),
                self.first,
                self.second,
                [],
                self.counts,
                amsgrad=False,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                grad_scale=None,
                found_inf=None,
            )
