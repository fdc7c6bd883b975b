"""A parameter store and copies of the user's modules for one fit: nothing of the user's is changed."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ppl_gen.handlers.hidden_params import hidden_parameters
from ppl_gen.handlers.obs_masks import hidden_outcomes_unread
from ppl_gen.handlers.params import OwnInitialValues
from ppl_gen.handlers.read_sites import ReadSites
from ppl_gen.handlers.stable import batched_stable
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["ProgramState", "Workspace"]


_PYRO_MODULE = pyro.primitives.module


@dataclass(frozen=True)
class ProgramState:
    """The learned numbers of a program: unconstrained parameters, their constraints, and buffers of its modules."""

    unconstrained: Mapping[str, Tensor] = field(default_factory=dict)
    constraints: Mapping[str, Any] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def params(self) -> dict[str, Tensor]:
        """Parameters in the user's (constrained) units."""
        return {
            name: torch.distributions.transform_to(self.constraints.get(name, torch.distributions.constraints.real))(
                value
            )
            for name, value in self.unconstrained.items()
        }


class Workspace:
    """A parameter store of its own, and private copies of the data behind every module a program touches.

    Modules are found when `pyro.module` registers them or when they are called; from then on their parameters and
    buffers hold copies (moved to ``device`` and ``dtype``), and on exit they hold again the tensors they came with.
    """

    def __init__(
        self,
        state: ProgramState | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        training: bool | None = None,
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.device, self.dtype, self.training = device, dtype, training
        self.modules: dict[str, nn.Module] = {}
        self.called: dict[int, nn.Module] = {}
        self.others: list[nn.Module] = []  # trained by players that Pyro knows nothing of
        self.hidden: set[str] = set()  # parameters that the program keeps from inference
        self._given = dict(modules or {})
        self._state = state or ProgramState()
        self._adopted: dict[int, nn.Module] = {}
        self._guests: set[int] = set()  # of these, what only a question called
        self._owned: dict[int, nn.Parameter] = {}
        self._undo: list[Callable[[], None]] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Workspace:
        try:
            self._open()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _open(self) -> None:
        plain = {k: self._place(v).requires_grad_() for k, v in self._state.unconstrained.items() if "$$$" not in k}
        constraints = {k: self._state.constraints.get(k, torch.distributions.constraints.real) for k in plain}
        store = pyro.get_param_store()
        self._stack.enter_context(store.scope({"params": plain, "constraints": constraints}))
        self._stack.enter_context(self._patched_module_statement())
        self._stack.enter_context(pyro.settings.context(module_local_params=False))
        self._stack.enter_context(batched_stable())
        self._stack.enter_context(hidden_outcomes_unread())
        self._stack.enter_context(ReadSites())  # first: nothing else sees a statement after it
        self._stack.enter_context(OwnInitialValues(lambda parameter: self._own(parameter, None), self._place))
        self._stack.enter_context(warnings.catch_warnings())  # a frozen layer is meant to stay out of the store
        warnings.filterwarnings("ignore", r".* was not registered in the param store because requires_grad=False")
        if self.device is not None:
            self._stack.enter_context(torch.device(self.device))
        hook = register_module_forward_pre_hook(self._on_call)
        self._stack.callback(hook.remove)
        for name, module in self._given.items():
            self.adopt(module, name)

    def __exit__(self, *exception: Any) -> None:
        try:
            self._stack.__exit__(*(exception or (None, None, None)))
        finally:
            for undo in reversed(self._undo):
                undo()
            self._undo.clear()
            self._adopted.clear()
            self._owned.clear()

    @contextlib.contextmanager
    def _patched_module_statement(self) -> Iterator[None]:
        outer = pyro.primitives.module

        def module(name: str, nn_module: nn.Module, update_module_params: bool = False) -> nn.Module:
            if isinstance(nn_module, nn.Module):
                known = self.modules.get(name)
                if known is not None and known is not nn_module:
                    raise ValueError(
                        f"pyro.module({name!r}, ...) registers two different modules under one name; the second would "
                        "not be trained. Give each network its own name, and build networks outside model and guide."
                    )
                self.adopt(nn_module, name)
            return _PYRO_MODULE(name, nn_module, update_module_params)  # an outer workspace has its own networks

        pyro.module = pyro.primitives.module = module
        try:
            yield
        finally:
            pyro.module = pyro.primitives.module = outer

    def _on_call(self, module: nn.Module, _inputs: object) -> None:
        if id(module) not in self._adopted:
            self._swap(module, prefix=None)
            self.called[id(module)] = module

    def take_in(self, modules: Iterable[nn.Module]) -> None:
        """Networks of players that Pyro knows nothing of: private copies at once, and not when they are first called.

        What holds on to their parameters from the start, as optimisers and captured steps do, then holds what moves.
        """
        for module in modules:
            self.others.append(module)
            for part in module.modules():
                self._on_call(part, None)

    def adopt(self, module: nn.Module, name: str) -> None:
        """Swap private copies into ``module`` and all below it; values of the state are loaded by name."""
        if self.modules.get(name) is module:
            return
        self.modules[name] = module
        for path, part in module.named_modules():
            self._swap(part, prefix=f"{name}$$${path}." if path else f"{name}$$$")

    def _swap(self, module: nn.Module, prefix: str | None) -> None:
        first = id(module) not in self._adopted
        if first:
            self._adopted[id(module)] = module
            parameters, buffers, training = dict(module._parameters), dict(module._buffers), module.training

            def put_back() -> None:  # what an autoguide made when it was first called stays
                module._parameters.update(parameters)
                module._buffers.update(buffers)
                module.training = training

            self._undo.append(put_back)
            if self.training is not None:
                module.training = self.training
        for key, parameter in module._parameters.items():
            if parameter is not None:
                self._own(parameter, self._learned(module, prefix, key))
        for key, buffer in list(module._buffers.items()):
            value = self._state.buffers.get(f"{prefix}{key}") if prefix else None
            if buffer is not None and (first or value is not None):
                module._buffers[key] = self._place(buffer if value is None else value)

    def _learned(self, module: nn.Module, prefix: str | None, key: str) -> Tensor | None:
        """The state's value of a parameter: by `pyro.module`'s name or, in a PyroModule, by that of the attribute."""
        values = self._state.unconstrained
        if f"{prefix}{key}" in values or not isinstance(module, PyroModule):
            return values.get(f"{prefix}{key}")
        name = ".".join(part for part in (module._pyro_name, key.removesuffix("_unconstrained")) if part)
        if name in values and name in pyro.get_param_store():
            del pyro.get_param_store()[name]  # the module registers its own again when it is first read
        return values.get(name)

    def _own(self, parameter: nn.Parameter, value: Tensor | None) -> None:
        data = parameter.data
        if id(parameter) not in self._owned:  # a tied weight has one original
            self._owned[id(parameter)] = parameter
            gradient, parameter.grad = parameter.grad, None

            def put_back() -> None:
                parameter.grad = None
                parameter.data = data
                parameter.grad = gradient

            self._undo.append(put_back)
            parameter.data = self._place(data)
        if value is not None:
            if value.shape != data.shape:
                raise ValueError(f"a parameter of shape {tuple(data.shape)} was saved with shape {tuple(value.shape)}")
            parameter.data = self._place(value)

    def _place(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.detach().to(device=self.device, dtype=dtype, copy=True)

    def leaves(self) -> dict[str, Tensor]:
        """The unconstrained parameters that Pyro knows, by name, as the tensors an optimiser moves."""
        return dict(pyro.get_param_store().named_parameters())

    def collect(self, *runs: Callable[[], object]) -> dict[str, Tensor]:
        """Run the program once without changing buffers or generators, so that lazily made parameters exist."""
        self.hidden.clear()
        with without_side_effects(), hidden_parameters(self.hidden):
            for run in runs:
                run()
        return self.leaves()

    def trainable(self, leaves: Mapping[str, Tensor], notes: dict[str, Any]) -> dict[str, Tensor]:
        """Those of the collected ``leaves`` that gradients may move: `poutine.block` hides the others; noted."""
        fixed = [name for name in leaves if name in self.hidden]
        if fixed:
            notes["kept fixed"] = f"{', '.join(fixed)}: hidden from inference by poutine.block"
        return {name: leaf for name, leaf in leaves.items() if name not in self.hidden}

    def networks(self) -> list[nn.Module]:
        """Every module that the program registered or called, those inside of others each by itself."""
        return list(self._adopted.values())

    def buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Copies of all buffers as they are now: what a step that fails has to put back."""
        modules = self._adopted.values()
        return [(m, name, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]

    def _loose(self) -> dict[str, Tensor]:
        """Buffers of networks that are called and not registered, by the order in which they were met."""
        named = {id(part) for m in (*self.modules.values(), *self.others) for part in m.modules()} | self._guests
        loose = [module for key, module in self._adopted.items() if key not in named]
        return {
            f"{number} {type(module).__name__}.{name}": buffer
            for number, module in enumerate(loose)
            for name, buffer in module._buffers.items()
            if buffer is not None
        }

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Networks that are first called inside belong to a question about the run, and not to what is learned."""
        before = set(self._adopted)
        try:
            yield
        finally:
            self._guests |= set(self._adopted) - before

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Networks that are registered inside and were not before are not known by these names afterwards."""
        before = set(self.modules)
        try:
            yield
        finally:
            for name in set(self.modules) - before:
                del self.modules[name]

    def loose_buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers that a `snapshot` leaves out: of networks without a `pyro.module` statement."""
        return {name: buffer.detach().clone() for name, buffer in self._loose().items()}

    def restore(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], loose: Mapping[str, Tensor] | None = None
    ) -> None:
        """Put in place what a `snapshot` of the same program held: unconstrained parameters and buffers by name."""
        leaves = self.leaves()
        with torch.no_grad():
            for name, value in params.items():
                leaves[name].copy_(value)
            for name, module in self.modules.items():
                for key, buffer in module.named_buffers():
                    buffer.copy_(buffers[f"{name}$$${key}"])
            known = self._loose() if loose else {}
            for name, value in (loose or {}).items():
                known[name].copy_(value)

    def unregistered(self) -> list[str]:
        """Modules that were called and hold trainable parameters Pyro does not know: they would silently not train."""
        known = {id(p) for p in self.leaves().values()} | {id(p) for m in self.others for p in m.parameters()}
        return sorted(
            {
                type(module).__name__
                for module in self.called.values()
                if any(p.requires_grad and id(p) not in known for p in module._parameters.values() if p is not None)
            }
        )

    def snapshot(self) -> ProgramState:
        """A copy of all learned numbers as they are now."""
        store = pyro.get_param_store()
        params = {name: value.detach().clone() for name, value in store.named_parameters()}
        buffers = {
            f"{name}$$${key}": value.detach().clone()
            for name, module in self.modules.items()
            for key, value in module.named_buffers()
        }
        return ProgramState(params, {name: store._constraints[name] for name in params}, buffers)
