"""Our objectives inside plain Pyro scripts, and Pyro's own ELBO classes as our objectives."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.infer import RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, TraceTMC_ELBO
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError
from ppl_gen.handlers.ordered import ordered
from ppl_gen.handlers.rescale import RescalePlate
from ppl_gen.handlers.sites import nothing, parallel
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Setting
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import validation_off, without_side_effects

__all__ = ["LossFunction", "PyroObjective", "as_objective"]

_GUESSED = "max_plate_nesting"  # which Pyro writes back into the object


@dataclass(frozen=True)
class PyroObjective(Objective):
    """Any `pyro.infer.ELBO` as an objective; a private copy is made for every fit, since Pyro's objects keep state."""

    elbo: Any

    @property
    def label(self) -> str:
        return f"pyro.infer.{type(self.elbo).__name__}"

    @property
    def call(self) -> str:
        """With all of its settings: what its class begins with is not known here.

        >>> PyroObjective(Trace_ELBO(num_particles=3)).call
        'pyro.infer.Trace_ELBO(...num_particles=3...)'
        """
        plain = {k: v for k, v in vars(self.elbo).items() if isinstance(v, bool | int | float | str) and k != _GUESSED}
        return f"{self.label}({', '.join(f'{name}={plain[name]!r}' for name in sorted(plain))})"

    @property
    def needs(self) -> Sequence[Need]:
        return (("density",),)

    def undivided(self, setting: Setting) -> str | None:
        if type(self.elbo) in (Trace_ELBO, TraceMeanField_ELBO):
            return None
        return f"{self.label} may hold all rows inside one logarithm; take ELBO() of ppl_gen.inference, or Trace_ELBO"

    def build(self, setting: Setting) -> Game:
        guided = setting.info.guide_sites or {}
        sums = {name for name in setting.info.finite_latents if name not in guided}
        if sums and not isinstance(self.elbo, TraceEnum_ELBO | TraceTMC_ELBO):
            raise IncompatibleError(
                f"{self.label} cannot sum out the discrete site(s) {sorted(sums)}, which the guide does not draw; take "
                "TraceEnum_ELBO, or ELBO() of ppl_gen.inference"
            )
        stuck = [name for name, site in guided.items() if name in setting.info.sites and not site.reparameterised]
        if stuck and isinstance(self.elbo, RenyiELBO):
            raise IncompatibleError(
                f"{self.label} gives no gradient to the guide's site(s) {stuck}: not reparameterised; take ELBO()"
            )
        model = poutine.infer_config(setting.model, parallel(sums, own=True)) if sums else setting.model
        return _PyroGame(copy.deepcopy(self.elbo), replace(setting, model=model))


class _PyroGame(Game):
    """`differentiable_loss` where the class has one, else `loss_and_grads`, whose gradients are handed on."""

    def __init__(self, elbo: Any, setting: Setting) -> None:
        self.elbo, self.setting = elbo, setting
        self.surrogate = hasattr(type(elbo), "differentiable_loss")
        _count_plates(elbo, setting)
        if setting.minibatches and isinstance(elbo, RenyiELBO | ReweightedWakeSleep | TraceTMC_ELBO):
            self.notes = {"bound": "none: this class of Pyro's puts N / B inside its logsumexp; IWAE() does not"}

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        model, guide, plate = self.setting.model, self.setting.guide or nothing, self.setting.info.data_plate
        rows = batch.total or 1
        with RescalePlate(plate, batch.total):
            if self.surrogate:
                value = self.elbo.differentiable_loss(model, guide, *batch.args, **batch.kwargs)
                return Loss(torch.as_tensor(value) / rows), state
            return Loss(self._through_grads(model, guide, batch) / rows), state

    def _through_grads(self, model: Any, guide: Any, batch: Batch) -> Tensor:
        """Pyro writes into ``.grad``; a linear function with exactly these gradients carries them into autograd."""
        import pyro

        leaves = [p for _, p in pyro.get_param_store().named_parameters()]
        kept = [p.grad for p in leaves]
        for p in leaves:
            p.grad = None
        value = self.elbo.loss_and_grads(model, guide, *batch.args, **batch.kwargs)
        value = torch.as_tensor(value[0] if isinstance(value, tuple) else value)
        leaves = [p for _, p in pyro.get_param_store().named_parameters()]
        linear = sum(((p - p.detach()) * p.grad).sum() for p in leaves if p.grad is not None)
        for p, grad in zip(leaves, kept + [None] * (len(leaves) - len(kept)), strict=True):
            p.grad = grad
        return value + linear


def _count_plates(elbo: Any, setting: Setting) -> None:
    """Now, and not in the first loss, which would draw random numbers for it: where a run goes on, once more."""
    vectorised = getattr(elbo, "vectorize_particles", False)  # EnergyDistance is no ELBO and has it
    if not vectorised and not isinstance(elbo, TraceEnum_ELBO | TraceTMC_ELBO):
        return
    if getattr(elbo, "max_plate_nesting", 0) == math.inf:
        probe = setting.probe
        with without_side_effects(), validation_off():
            PyroELBO._guess_max_plate_nesting(elbo, setting.model, setting.guide or nothing, probe.args, probe.kwargs)


@dataclass(frozen=True)
class LossFunction(Objective):
    """A user's own ``loss(model, guide, *data) -> tensor``, as `pyro.infer.SVI` takes it: a total over the rows.

    On a minibatch the plate of the rows is scaled by N / B while the function runs.
    """

    function: Callable[..., Any]

    @property
    def label(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def needs(self) -> Sequence[Need]:
        return ()

    def undivided(self, setting: Setting) -> str | None:
        return f"{self.label} is a function of its own, whose value on a batch need not be a sum over the rows"

    def build(self, setting: Setting) -> Game:
        try:
            batch = setting.probe
            function = ordered(self.function, batch.order, lead=2)
            inspect.signature(function).bind(setting.model, setting.guide, *batch.args, **batch.kwargs)
        except TypeError as error:
            raise TypeError(
                f"objective: {self.label} is called as {self.label}(model, guide, *data), and cannot be: {error}"
            ) from None
        own = copy.deepcopy(self.function)
        _count_plates(getattr(own, "__self__", own), setting)  # of `TraceEnum_ELBO().differentiable_loss`, say
        return _FunctionGame(ordered(own, batch.order, lead=2), setting, self.label)


class _FunctionGame(Game):
    def __init__(self, function: Callable[..., Any], setting: Setting, label: str) -> None:
        self.function, self.setting, self.label = function, setting, label

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        with RescalePlate(self.setting.info.data_plate, batch.total):
            value = self.function(self.setting.model, self.setting.guide or nothing, *batch.args, **batch.kwargs)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"objective: {self.label}(model, guide, *data) has to return one number as a tensor with gradients, "
                f"got {got}; of Pyro's ELBOs that is elbo.differentiable_loss, or the ELBO itself"
            )
        return Loss(value.reshape(()) / (batch.total or 1)), state


def as_objective(objective: Any) -> Objective:
    """An objective of ours from ours, an instance or class of `pyro.infer.ELBO`, or a function of model and guide.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, type) and issubclass(objective, PyroELBO):
        return PyroObjective(objective())
    if isinstance(objective, PyroELBO) or hasattr(type(objective), "loss_and_grads"):
        return PyroObjective(objective)
    if isinstance(objective, type) and issubclass(objective, Objective):
        return objective()
    if callable(objective) and not isinstance(objective, type):
        return LossFunction(objective)
    raise TypeError(
        "objective: expected an objective such as ELBO(), a pyro.infer.ELBO or a function loss(model, guide, *data), "
        f"got {type(objective).__name__}"
    )
