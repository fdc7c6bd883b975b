"""Recording a function as a tape of tensor operations.

Recording takes a few times as long as the function itself and imports nothing, unlike tracing by `torch.fx`.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from ppl_gen.capture.tape import WRITES_STATISTICS, Call, Constant, Leaf, Outside, RecordingRefused, Slot, Tape

__all__ = ["other_generators", "record"]

_aten = torch.ops.aten
#: These read the shape of their argument and not its numbers.
_SHAPE_ONLY = {
    _aten.zeros_like,
    _aten.ones_like,
    _aten.full_like,
    _aten.empty_like,
    _aten.new_zeros,
    _aten.new_ones,
    _aten.new_full,
    _aten.new_empty,
}
_LARGE = 2**20  # bytes that do not stay in a cache
_NOTHING = {_aten.detach, _aten.alias}


def record(
    function: Callable[[], Any], inputs: Sequence[Tensor], *, draws: bool = False, writable: Collection[int] = ()
) -> Tape:
    """Run ``function`` once and record what it computes from ``inputs``, which it uses through its closure.

    Control flow and every number read into Python are frozen as they are now. Reading a number that depends on the
    inputs, by ``.item()``, ``if``, ``.numpy()`` and the like, is refused. A replay serves inputs of the same shapes,
    dtypes and devices.

    Args:
        function: what to record; its result is any tree of tensors.
        inputs: the tensors that differ from replay to replay, as the very objects that the function uses.
        draws: whether random draws are recorded (made afresh in every replay, from the same generators) or refused.
        writable: places among the ``inputs`` of tensors that may be written into, such as buffers.

    Raises:
        RecordingRefused: for operations whose result cannot be replayed: shapes or Python numbers that depend on the
            inputs, draws from other generators than torch's, writing into tensors that are not the function's own.

    Example:
        >>> x = torch.tensor([1.0, 3.0])
        >>> tape = record(lambda: (x * 2.0).square().sum(), [x])
        >>> [call.operation.name() for call in tape.calls]
        ['aten::mul.Tensor', 'aten::pow.Tensor_Scalar', 'aten::sum']
    """
    others = other_generators()
    with _Readings() as readings, _Recorder(inputs, draws, writable) as recorder:
        readings.recorder = recorder
        results = function()
    if other_generators() != others:
        raise RecordingRefused("it draws from NumPy's or Python's random numbers, which a replay would repeat")
    return recorder.tape(results)


def other_generators() -> tuple[Any, ...]:
    """Where NumPy's and Python's generators stand."""
    name, keys, place, *_ = np.random.get_state(legacy=True)
    return name, bytes(np.asarray(keys)), place, random.getstate()


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        raise RecordingRefused(f"a tensor of layout {tensor.layout} takes part") from None


def _reader(func: Any) -> str:
    """Where a number is read, in the user's code or another library's: the innermost line that is not torch's."""
    for frame, line in traceback.walk_stack(None):
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("torch.", "ppl_gen.capture.")) and module != "torch":
            by = "if, float() or .item()" if "scalar" in str(func) else str(getattr(func, "__name__", func))
            where = Path(frame.f_code.co_filename).name if module == "__main__" else module
            return f"{by} in {where}, line {line}"
    return str(func)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class _Noted:
    operation: Any
    inputs: list[Any]
    structure: TreeSpec
    outputs: list[Any]


class _Readings(TorchFunctionMode):
    """Ways from a tensor to its numbers that no operation shows: refused for what depends on the inputs."""

    recorder: _Recorder | None = None
    _HIDDEN = frozenset(
        {
            torch.Tensor.numpy,
            torch.Tensor.tolist,
            torch.Tensor.__array__,
            torch.Tensor.__dlpack__,
            torch.Tensor.data_ptr,
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func == torch.Tensor.data.__set__ and self.recorder is not None:  # type: ignore[attr-defined]
            raise RecordingRefused(f"a tensor's data are exchanged, by {_reader(func)}")
        if func in self._HIDDEN and self.recorder is not None:
            self.recorder.refuse_reading(func, args[0])
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Notes every operation; knows which memory was made inside, depends on the inputs, or was written into."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import the compiler to switch it off

    def __init__(self, inputs: Sequence[Tensor], draws: bool, writable: Collection[int]) -> None:
        super().__init__()
        self.inputs, self.draws = list(inputs), draws
        self.noted: list[_Noted] = []
        self.made: set[int] = set()
        self.dependent = {_storage(tensor) for tensor in inputs}
        self.writable = {_storage(inputs[place]) for place in writable}
        self.written: set[int] = set()
        self.known = {id(tensor) for tensor in inputs}
        self.outside: dict[int, Tensor] = {}
        self.reshaped = False  # in place: then a tensor and its alias are two

    def refuse_reading(self, func: Any, tensor: Tensor) -> None:
        """Numbers that differ from replay to replay must not be read into Python."""
        if isinstance(tensor, Tensor) and _storage(tensor) in self.dependent:
            raise RecordingRefused(f"numbers that depend on the inputs are read into Python, by {_reader(func)}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        dependent = drawn or any(_storage(t) in self.dependent for t in tensors)
        self._refuse(func, tensors, dependent, drawn)
        if func._schema.is_mutable:
            self._note_writes(func, args, kwargs, dependent)
        elif func.overloadpacket in WRITES_STATISTICS and args[5]:
            for tensor in _tensors(args[3:5]):
                self._note_write(func, tensor, True)
        for tensor in tensors:
            if id(tensor) not in self.known and _storage(tensor) not in self.made:
                self.outside.setdefault(id(tensor), tensor)
        result = func(*args, **kwargs)
        outputs = tree_leaves(result)
        made = {_storage(t) for t in _tensors(outputs)}
        self.made |= made - {_storage(t) for t in tensors}
        self.known |= {id(t) for t in _tensors(outputs)}
        if dependent and func.overloadpacket not in _SHAPE_ONLY:
            self.dependent |= made
        self.noted.append(_Noted(func, inputs, structure, outputs))  # holds the tensors, so that no id is used twice
        return result

    def _refuse(self, func: Any, tensors: list[Tensor], dependent: bool, drawn: bool) -> None:
        if drawn and not self.draws:
            raise RecordingRefused(f"{func} draws random numbers")
        if not dependent:
            return
        returns = func._schema.returns
        if len(returns) > 1 and any(isinstance(part.type, torch.ListType) for part in returns):
            raise RecordingRefused(f"{func} returns lists beside tensors")
        if torch.Tag.data_dependent_output in func.tags:
            raise RecordingRefused(f"a number that depends on the inputs is read into Python, by {_reader(func)}")
        # Indexing by integers has the shape of the indices; only masks make the shape depend on values.
        mask = func is not _aten.index.Tensor or any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if torch.Tag.dynamic_output_shape in func.tags and mask:
            raise RecordingRefused(f"the shape of the result of {func} depends on the inputs")
        if torch.Tag.inplace_view in func.tags:
            self.reshaped = True
            if any(_storage(t) not in self.made for t in tensors[:1]):
                raise RecordingRefused(f"{func} changes the shape of a tensor that was made outside")
        if any(_storage(t) in self.dependent and id(t) not in self.known for t in tensors):
            raise RecordingRefused(f"{func} sees an input through a tensor of unknown origin")

    def _note_writes(self, func: Any, args: Any, kwargs: Any, dependent: bool) -> None:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in _tensors(args[place] if place < len(args) else kwargs.get(argument.name)):
                self._note_write(func, tensor, dependent)

    def _note_write(self, func: Any, tensor: Tensor, dependent: bool) -> None:
        storage = _storage(tensor)
        if storage not in self.made and storage not in self.writable:
            raise RecordingRefused(f"{func} writes into a tensor that was made outside")
        self.written.add(storage)
        if dependent:
            self.dependent.add(storage)

    def tape(self, results: Any) -> Tape:
        """The operations that matter, tensors numbered."""
        leaves, structure = tree_flatten(results)
        live, slots = self.dependent | self.written, _Slots(self.inputs)
        # Two results must not share memory that they did not share: whoever has one may change it.
        single = self.written | {_storage(t) for t in _tensors(leaves)}
        calls: list[Call] = []
        known: dict[Any, tuple[Slot | None, ...]] = {}  # what was computed before, from the same arguments
        large = numbers = 0
        for noted in self.noted:
            packet = noted.operation.overloadpacket
            looked_at = noted.outputs if packet in _SHAPE_ONLY else [noted.inputs, noted.outputs]
            if not any(_storage(t) in live for t in _tensors(looked_at)):
                continue
            if packet in _NOTHING and not self.reshaped and slots.stands_for(noted.outputs[0], noted.inputs[0]):
                continue
            inputs = slots.read(noted.inputs)
            key = _key(noted, inputs) if self._repeats(noted, single) else None
            if key in known:
                slots.same(noted.outputs, known[key])
                continue
            given = {_storage(t) for t in _tensors(noted.inputs)}
            large += sum(t.nbytes for t in _tensors(noted.outputs) if t.nbytes >= _LARGE and _storage(t) not in given)
            numbers += sum(t.numel() for t in _tensors(noted.outputs) if _storage(t) not in given)
            calls.append(Call(noted.operation, inputs, noted.structure, slots.write(noted.outputs)))
            if key is not None:
                known[key] = calls[-1].outputs
        found = slots.read(leaves)
        frozen = tuple(Outside(tensor) for tensor in self.outside.values() if _storage(tensor) not in self.dependent)
        return Tape(len(self.inputs), tuple(_needed(calls, found)), found, structure, frozen, large, numbers)

    def _repeats(self, noted: _Noted, single: Collection[int]) -> bool:
        """Whether the same operation on the same arguments would give the same numbers, which nobody changes."""
        if self.reshaped or torch.Tag.nondeterministic_seeded in noted.operation.tags:
            return False
        return not any(_storage(t) in single for t in _tensors([noted.inputs, noted.outputs]))


def _key(noted: _Noted, inputs: Sequence[Leaf]) -> Any:
    """What tells an operation on some arguments from others."""
    leaves = (
        leaf if isinstance(leaf, Slot) else id(given) if isinstance(given, Tensor) else (type(given), repr(given))
        for leaf, given in zip(inputs, noted.inputs, strict=True)
    )
    return noted.operation, repr(noted.structure), tuple(leaves)


class _Slots:
    """Numbers of tensors, in the order in which they came up."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.numbers = {id(tensor): Slot(place) for place, tensor in enumerate(inputs)}
        self.following = len(inputs)

    def stands_for(self, alias: Tensor, tensor: Tensor) -> bool:
        """Give ``alias`` the slot of ``tensor``, if it has one."""
        if id(tensor) not in self.numbers:
            return False
        self.numbers[id(alias)] = self.numbers[id(tensor)]
        return True

    def same(self, leaves: list[Any], slots: Sequence[Slot | None]) -> None:
        """Give tensors the slots of others that hold the same numbers."""
        for leaf, slot in zip(leaves, slots, strict=True):
            if slot is not None:
                self.numbers[id(leaf)] = slot

    def read(self, leaves: list[Any]) -> tuple[Leaf, ...]:
        """Slot or constant of each leaf; constants carry no gradient, as the tape holds its own."""
        found: list[Leaf] = []
        for leaf in leaves:
            slot = self.numbers.get(id(leaf)) if isinstance(leaf, Tensor) else None
            found.append(slot or Constant(leaf.detach() if isinstance(leaf, Tensor) else leaf))
        return tuple(found)

    def write(self, leaves: list[Any]) -> tuple[Slot | None, ...]:
        found: list[Slot | None] = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                found.append(None)
                continue
            if id(leaf) not in self.numbers:
                self.numbers[id(leaf)] = Slot(self.following)
                self.following += 1
            found.append(self.numbers[id(leaf)])
        return tuple(found)


def _needed(calls: Sequence[Call], results: Sequence[Leaf]) -> Iterator[Call]:
    """Those that the results need, that change something, or that draw: a draw less would shift all after it."""
    needed = {leaf for leaf in results if isinstance(leaf, Slot)}
    kept: list[Call] = []
    for call in reversed(calls):
        if call.writes or call.draws or not needed.isdisjoint(call.outputs):
            kept.append(call)
            needed |= {leaf for leaf in call.inputs if isinstance(leaf, Slot)}
    return reversed(kept)
