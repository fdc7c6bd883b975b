"""Recording a function of one tensor as a tape of torch operations, and replaying it without the Python that made it.

A Pyro density spends nine tenths of its time in effect handlers and distribution objects. The tape keeps only the
operations that depend on the argument, gradients included; everything else becomes a constant. TorchScript replays it
in about a microsecond an operation and writes it as bytes, so that a worker process needs neither the program nor its
closures. Recording takes milliseconds and, unlike tracing by `torch.fx`, does not import the compiler (some seconds).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["Recording", "RecordingRefused", "record", "record_checked"]

Function = Callable[[Tensor], tuple[Tensor, ...]]

_aten = torch.ops.aten
#: These read the shape of their argument and not its numbers.
_SHAPE_ONLY = {_aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.new_zeros, _aten.new_ones, _aten.new_full}


class RecordingRefused(RuntimeError):
    """The function cannot be replayed from a tape; the message says which operation stands in the way."""


@dataclass(frozen=True)
class Recording:
    """A recorded function as bytes. `load` makes a fresh callable, in any process.

    ``constants`` are the results that do not depend on the argument, None in place of those that do.
    """

    content: bytes
    constants: tuple[Tensor | None, ...]

    def load(self) -> Function:
        """A new replay of the tape: tensor -> tensors."""
        with _no_deprecations():
            # The bare method: calling the module would run the forward hooks by which networks are found.
            replay: Function = torch.jit.load(io.BytesIO(self.content)).forward
        if all(constant is None for constant in self.constants):
            return replay

        def merged(x: Tensor) -> tuple[Tensor, ...]:
            dependent = iter(replay(x))
            return tuple(next(dependent) if constant is None else constant for constant in self.constants)

        return merged


def record(function: Function, example: Tensor) -> Recording:
    """Record what ``function`` does to ``example``; the replay serves arguments of the same shape, dtype and device.

    Control flow and every number read into Python are frozen as they were at ``example``. Reading a number that
    depends on the argument by ``.item()``, ``float()`` or ``if`` is refused; reading it through NumPy cannot be seen,
    so compare the replay with the function at other points (`record_checked`).

    Raises:
        RecordingRefused: for operations whose result cannot be replayed: random draws, shapes or Python numbers that
            depend on the argument, writing into tensors that the function did not make.

    Example:
        >>> def slope(x):
        ...     x = x.detach().requires_grad_()
        ...     y = x.square().sum()
        ...     return y.detach(), torch.autograd.grad(y, x)[0]
        >>> replay = record(slope, torch.zeros(2)).load()
        >>> replay(torch.tensor([1.0, 3.0]))
        (tensor(10.), tensor([2., 6.]))
    """
    with _Recorder(example) as recorder:
        results = function(example)
    tape = _Tape(recorder, example, results)
    script = getattr(torch, "jit", None)
    if script is None or not hasattr(script, "trace"):
        raise RecordingRefused("this torch has no TorchScript")
    with _no_deprecations():
        # TorchScript refuses results that do not depend on the argument, and functions without any result.
        traced = script.trace(lambda x: tape(x) or (x,), (example,), check_trace=False)
        buffer = io.BytesIO()
        script.save(traced, buffer)
    return Recording(buffer.getvalue(), tuple(constant for _, constant in tape.results))


def record_checked(function: Function, points: Sequence[Tensor]) -> Recording:
    """A recording made at the first of ``points`` that agrees with ``function`` at all of them.

    Raises:
        RecordingRefused: as `record` does, and where the replay gives other numbers.
    """
    recording = record(function, points[0])
    replay = recording.load()
    for point in [*points, *points]:  # TorchScript optimises what it runs at the second call, so look again
        for ours, theirs in zip(replay(point), function(point), strict=True):
            # Fused operations may round differently, by a few units in the last place of the largest entry.
            scale = 1.0 + float(theirs.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if theirs.numel() else 1.0
            close = torch.isclose(
                ours, theirs, rtol=0.0, atol=1e3 * torch.finfo(theirs.dtype).eps * scale, equal_nan=True
            )
            if not bool(close.all()):
                raise RecordingRefused("the replay gives other numbers than the program at another point")
    return recording


class _no_deprecations(warnings.catch_warnings):
    """Newer torch calls TorchScript deprecated, and its tracer warns of every constant; neither concerns the user."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class _Call:
    operation: Any
    inputs: list[Any]
    structure: Any
    outputs: list[Any]


class _Recorder(TorchDispatchMode):
    """Notes every operation; knows which memory was made inside, depends on the argument, or was written into."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import the compiler to switch it off

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.made: set[int] = set()
        self.dependent = {_storage(example)}
        self.written: set[int] = set()
        self.known = {id(example)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        dependent = any(_storage(t) in self.dependent for t in tensors)
        self._refuse(func, tensors, dependent)
        if func._schema.is_mutable:
            self._note_writes(func, args, kwargs, dependent)
        result = func(*args, **kwargs)
        outputs = tree_leaves(result)
        made = {_storage(t) for t in _tensors(outputs)}
        self.made |= made - {_storage(t) for t in tensors}
        self.known |= {id(t) for t in _tensors(outputs)}
        if dependent and func.overloadpacket not in _SHAPE_ONLY:
            self.dependent |= made
        self.calls.append(_Call(func, inputs, structure, outputs))  # holds the tensors, so that no id is used twice
        return result

    def _refuse(self, func: Any, tensors: list[Tensor], dependent: bool) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RecordingRefused(f"{func} draws random numbers")
        if not dependent:
            return
        if torch.Tag.data_dependent_output in func.tags:
            raise RecordingRefused(f"{func} reads a number that depends on the argument")
        # Indexing by integers has the shape of the indices; only masks make the shape depend on values.
        mask = func is not torch.ops.aten.index.Tensor or any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if torch.Tag.dynamic_output_shape in func.tags and mask:
            raise RecordingRefused(f"the shape of the result of {func} depends on the argument")
        if any(_storage(t) in self.dependent and id(t) not in self.known for t in tensors):
            raise RecordingRefused(f"{func} sees the argument through a tensor of unknown origin")

    def _note_writes(self, func: Any, args: Any, kwargs: Any, dependent: bool) -> None:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in _tensors(args[place] if place < len(args) else kwargs.get(argument.name)):
                storage = _storage(tensor)
                if storage not in self.made:
                    raise RecordingRefused(f"{func} writes into a tensor that was made outside")
                self.written.add(storage)
                if dependent:
                    self.dependent.add(storage)


class _Tape:
    """The recorded operations that matter; tensors are numbered slots, all else is a constant."""

    def __init__(self, recorder: _Recorder, example: Tensor, results: tuple[Tensor, ...]) -> None:
        live = recorder.dependent | recorder.written
        self._slots = {id(example): 0}
        steps = [
            (call.operation, self._read(call.inputs), call.structure, self._write(call.outputs))
            for call in recorder.calls
            if any(_storage(t) in live for t in _tensors([call.inputs, call.outputs]))
        ]
        self.results = self._read(list(results))
        needed = {slot for slot, _ in self.results}
        kept = []
        for step in reversed(steps):
            operation, inputs, _, outputs = step
            if operation._schema.is_mutable or not needed.isdisjoint(s for s in outputs if s is not None):
                kept.append(step)
                needed |= {slot for slot, _ in inputs}
        self.steps = kept[::-1]

    def _read(self, leaves: list[Any]) -> list[tuple[int | None, Any]]:
        """Slot and constant of each leaf, one of them None; constants carry no gradient, as the tape holds its own."""
        slots = [self._slots.get(id(leaf)) if isinstance(leaf, Tensor) else None for leaf in leaves]
        return [
            (slot, None) if slot is not None else (None, leaf.detach() if isinstance(leaf, Tensor) else leaf)
            for slot, leaf in zip(slots, leaves, strict=True)
        ]

    def _write(self, leaves: list[Any]) -> list[int | None]:
        return [self._slots.setdefault(id(t), len(self._slots)) if isinstance(t, Tensor) else None for t in leaves]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        slots: dict[int | None, Any] = {0: x}

        def filled(leaves: list[tuple[int | None, Any]]) -> Iterator[Any]:
            return (constant if slot is None else slots[slot] for slot, constant in leaves)

        for operation, inputs, structure, outputs in self.steps:
            args, kwargs = tree_unflatten(list(filled(inputs)), structure)
            slots.update(zip(outputs, tree_leaves(operation(*args, **kwargs)), strict=True))
        return tuple(slots[slot] for slot, _ in self.results if slot is not None)
