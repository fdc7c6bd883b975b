"""Which kinds of posterior a file can hold whole, the library's own and those of classes that are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ppl_gen.fitting.posteriors.base import Posterior
from ppl_gen.fitting.posteriors.chains import ChainPosterior
from ppl_gen.fitting.posteriors.draws import DrawsPosterior
from ppl_gen.fitting.posteriors.guides import GuidePosterior
from ppl_gen.fitting.posteriors.points import PointPosterior

__all__ = ["CODE", "OTHERS", "held_whole", "kind_named"]

CODE = "code"  # what a file calls a posterior that it does not hold whole
OTHERS = ("param", "buffer", "data", "constant", "module")  # parts of the file that are not the posterior's
_BUILT_IN = (PointPosterior, GuidePosterior, ChainPosterior, DrawsPosterior)


def kind_named(name: str) -> type[Posterior] | None:
    """The class of this kind, of those that are loaded; None where there is none, or more than one.

    A class that was defined again, as in a notebook, is the last one.

    >>> kind_named("chains")
    <class 'ppl_gen.fitting.posteriors.chains.ChainPosterior'>
    """
    found: list[type[Posterior]] = [cls for cls in _below(Posterior) if vars(cls).get("kind") == name]
    found = [cls for cls in found if cls in _BUILT_IN] or found
    one = len({(cls.__module__, cls.__qualname__) for cls in found}) == 1
    return found[-1] if one else None


def _below(cls: Any) -> Iterator[Any]:
    for child in cls.__subclasses__():
        yield child
        yield from _below(child)


def held_whole(cls: type[Posterior]) -> bool:
    """Whether a file holds all of a posterior of this class, so that it comes back without its algorithm.

    >>> class Uniform(Posterior):
    ...     def draw(self, count, batch):
    ...         return [{"share": torch.rand(())} for _ in range(count)]
    >>> import torch
    >>> held_whole(Uniform), held_whole(DrawsPosterior)
    (False, True)
    """
    made = getattr(cls.rebuilt, "__func__", None) is not getattr(Posterior.rebuilt, "__func__", None)
    named = "kind" in vars(cls) and cls.kind.isidentifier() and cls.kind != CODE
    return made and named and kind_named(cls.kind) is cls and not {*cls.parts} & {*OTHERS}
