"""Several draws of a program in one run (`torch.vmap`), where each comes to what it comes to alone.

Inside, the program sees one draw: shapes, dimensions and plates are those of a run alone, and what needs a number in
Python raises. What a run could not show is tried: whether each draw has random numbers of its own, and whether
anything is kept from one run to the next, which would then move once instead of once for each draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppl_gen.capture.recorder import other_generators
from ppl_gen.capture.tape import WRITES_STATISTICS
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.weights.fresh_noise import FreshNoise
from ppl_gen.workspace.closures import Remembered
from ppl_gen.workspace.isolation import validation_off, without_side_effects
from ppl_gen.workspace.watch import Watch

__all__ = ["at_once", "can_go_at_once"]

_TRIED = 3  # runs; a number that few dimensions of a program have


def at_once(one: Callable[[], Any], count: int) -> Any:
    """``count`` runs of ``one``, each with random numbers of its own: its tree of tensors, with one dimension in front.

    >>> draws = at_once(lambda: {"z": torch.randn(2)}, 3)
    >>> draws["z"].shape, bool((draws["z"][0] != draws["z"][1]).all())
    (torch.Size([3, 2]), True)
    """
    with warnings.catch_warnings(), FreshNoise(learning=True), validation_off():
        # That an operation has no rule of its own for several runs costs time, no more.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        return torch.vmap(lambda _: one(), randomness="different")(torch.zeros(count))


def can_go_at_once(one: Callable[[], Any], functions: Sequence[Callable[..., Any]]) -> bool:
    """Whether `at_once` gives of ``one``, which calls ``functions`` of the user's, what as many runs of it give.

    Three runs are made at once, and two of them again alone with the random numbers that they had. It is False where
    they differ, where a number is read into Python, where anything is drawn once for all runs or by NumPy or Python,
    and where something stays behind: a buffer written (batch norm), a counter, an attribute of a network.

    >>> can_go_at_once(lambda: torch.randn(2).sum(), [])
    True
    >>> can_go_at_once(lambda: torch.randn(2) if torch.randn(()) > 0 else torch.zeros(2), [])
    False
    """
    before = Remembered(functions)
    try:
        with without_side_effects(), validation_off(), torch.enable_grad():
            with _called() as modules:
                one()  # what is set up when it is first run is no change
            watch, numbers = Watch(functions, modules), other_generators()
            with _Noted() as noted:
                together = tree_leaves(at_once(one, _TRIED))
            if other_generators() != numbers:
                return False
            same = all(_comes_to(one, noted, k, [part[k] for part in together]) for k in (0, _TRIED - 1))
            return same and not watch.changed()
    except PROGRAM_ERRORS:
        return False
    finally:
        before.put_back()


def _comes_to(one: Callable[[], Any], noted: _Noted, k: int, expected: Sequence[Tensor]) -> bool:
    """Whether a run alone, with the random numbers of the one at place ``k``, comes to the same numbers."""
    with _Again(noted, k) as again, FreshNoise(learning=True):
        alone = tree_leaves(one())
    return not again.draws and all(map(_near, alone, expected)) and len(alone) == len(expected)


def _near(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    slack = 10 * torch.finfo(one.dtype).eps ** 0.5  # 3e-3 in float32, 1e-7 in float64: sums of many terms
    return torch.allclose(one, other.to(one.dtype), rtol=slack, atol=slack, equal_nan=True)


@contextmanager
def _called() -> Iterator[list[nn.Module]]:
    """The modules that are called inside."""
    found: dict[int, nn.Module] = {}
    hook = register_module_forward_pre_hook(lambda module, _: found.update({id(module): module}))
    modules: list[nn.Module] = []
    try:
        yield modules
    finally:
        hook.remove()
        modules.extend(found.values())


class _Draws(TorchDispatchMode):
    """Sees every operation, below `torch.vmap`: a draw of several runs is one tensor, these in front."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import the compiler to switch it off

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self.seen(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn(func, _tensors(result))
        return result

    def seen(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def drawn(self, func: Any, values: Sequence[Tensor]) -> None:
        raise NotImplementedError


class _Noted(_Draws):
    """Notes what is drawn; refuses to write into what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[list[Tensor]] = []
        self._held: list[Tensor] = []  # so that no memory is used twice
        self._made: set[int] = set()

    def seen(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = {_storage(t) for t in _tensors((args, kwargs))}
        writes = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        statistics = args[3:5] if func.overloadpacket in WRITES_STATISTICS and args[5] else ()
        if any(_storage(t) not in self._made for t in _tensors((writes, statistics))):
            raise RuntimeError(f"{func} writes into a tensor that was there before")
        result = func(*args, **kwargs)
        self._held += _tensors(result)
        self._made |= {_storage(t) for t in _tensors(result)} - given
        return result

    def drawn(self, func: Any, values: Sequence[Tensor]) -> None:
        self.draws.append([value.clone() for value in values])


class _Again(_Draws):
    """Every draw gets the numbers that one of several runs had."""

    def __init__(self, noted: _Noted, k: int) -> None:
        super().__init__()
        self.draws, self.k = list(noted.draws), k

    def drawn(self, func: Any, values: Sequence[Tensor]) -> None:
        numbers = self.draws.pop(0) if self.draws else []
        if [n.numel() for n in numbers] != [_TRIED * v.numel() for v in values]:
            raise RuntimeError(f"{func} does not draw for each run what it draws for one alone")
        for value, number in zip(values, numbers, strict=True):
            value.copy_(number.reshape(_TRIED, *value.shape)[self.k])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
