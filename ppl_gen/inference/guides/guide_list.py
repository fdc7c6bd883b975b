"""An `AutoGuideList` of autoguides and functions of one's own: its parts share the plates that each of them opens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from pyro.infer.autoguide.guides import AutoCallable

from ppl_gen.handlers.opened import called_through
from ppl_gen.handlers.ordered import ordered
from ppl_gen.handlers.whole_plates import OnePlateEach
from ppl_gen.program.program import with_known_kwargs

__all__ = ["SharedPlates", "has_own_parts", "holds_rows", "sharing_plates"]


class SharedPlates(AutoGuideList):
    """An `AutoGuideList` whose parts may open the same plate.

    Pyro's own makes every plate of the model before its parts run, whether or not one of them needs it: a function
    among the parts that opens ``pyro.plate("data", len(x))`` then meets a second plate of the name, and on other rows
    one of another size.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.prototype_trace is None:
            self._setup(*args, **kwargs)
        with OnePlateEach():
            return super().forward(*args, **kwargs)

    def _setup(self, *args: Any, **kwargs: Any) -> None:
        """The prototypes of all parts, and of the plates those alone that autoguides among the parts stand in."""
        self._setup_prototype(*args, **kwargs)
        autos = [part for part in self if not isinstance(part, AutoCallable)]
        for part in autos:
            if part.prototype_trace is None:
                part._setup_prototype(*args, **kwargs)
        used = {name for part in autos for name in part._prototype_frames}
        for name in [*self._prototype_frames]:
            if name not in used:
                del self._prototype_frames[name]


def sharing_plates(guide: Any, order: Sequence[str] = ()) -> Any:
    """The same guide; a list with functions of the user's own among its parts lets these share plates.

    Each of them is called as a guide by itself would be: with those arguments of the model that it names, or, where it
    calls them otherwise, with the values of the data in their ``order``.
    """
    if type(guide) is AutoGuideList and has_own_parts(guide):
        for part in torch.nn.Module.children(guide):
            if isinstance(part, AutoCallable):
                part._guide, part.median = _called_by_name(part._guide, order), _called_by_name(part.median, order)
        guide.__class__ = SharedPlates  # a copy for this fit, which keeps its parts and the names of their parameters
    return guide


def _called_by_name(part: Any, order: Sequence[str]) -> Any:
    if not isinstance(part, torch.nn.Module):
        return with_known_kwargs(ordered(part, order))

    def handler(call: Callable[..., Any]) -> Callable[..., Any]:
        return with_known_kwargs(functools.wraps(part.forward)(lambda *args, **kwargs: call(*args, **kwargs)))

    return called_through(part, handler)


def has_own_parts(guide: Any) -> bool:
    """Whether some part of a list of guides is the user's own function, which may read the rows (be amortised)."""
    return isinstance(guide, AutoGuideList) and any(
        isinstance(part, AutoCallable) for part in torch.nn.Module.children(guide)
    )


def holds_rows(guide: Any) -> bool:
    """Whether a guide is sure to hold parameters for each row it was set up on: an autoguide with local sites does."""
    return isinstance(guide, AutoGuide) and not has_own_parts(guide)
