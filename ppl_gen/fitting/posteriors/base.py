"""What a kind of posterior answers: all that fits, verdicts, evidence, export and files ask of what was learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ppl_gen.data.batching import Batch

__all__ = ["JudgedBy", "Parts", "Posterior", "check_sites", "checked", "spread"]

#: What tells whether draws are right: importance weights of the guide, R-hat and effective sizes of chains, short
#: chains that begin at the draws, or nothing (points have no draws to judge; how the run ended is all there is).
JudgedBy = Literal["weights", "chains", "draws"] | None

#: Tensors of a posterior in a file: part -> name -> tensor.
Parts = Mapping[str, Mapping[str, Tensor]]


class Posterior(ABC):
    """What was learned of the latent sites: derive from it what is neither points, a guide, chains, nor plain draws.

    `draw` alone makes a posterior: short chains that begin at its draws judge it, and a saved fit keeps 1000 of them.
    The rest is for kinds that know more. What derives from it is code, and comes back from a file only if it has a
    ``kind`` of its own, names its ``parts`` and gives and takes them by `tensors` and `rebuilt`; or else if the
    algorithm has an `outline`. All is called inside the fit's workspace, draws under a seed.

    >>> class Uniform(Posterior):
    ...     def draw(self, count, batch):
    ...         return [{"share": torch.rand(())} for _ in range(count)]
    >>> len(Uniform().draw(3, None)), Uniform().judged_by
    (3, 'draws')
    """

    #: What the kind is called in files and in ArviZ's ``attrs``: one word, of this class alone.
    kind: str = "own"

    #: What draws come from, in messages; in the plural where short chains judge it.
    noun: str = "draws"

    #: Whether ``draw(1, batch)``, called many times, is as good as one call for many; if not, one call asks for all.
    independent: bool = False

    #: The parts that `tensors` gives.
    parts: ClassVar[tuple[str, ...]] = ()

    #: A sampler's own numbers of each draw, chains x draws; "diverging" and "reached_max_treedepth" count in a verdict.
    stats: Mapping[str, Tensor] = MappingProxyType({})

    @abstractmethod
    def draw(self, count: int, batch: Batch) -> list[dict[str, Tensor]]:
        """``count`` joint draws of the sites it knows, each a mapping site -> value, given ``batch``.

        A kind that holds draws gives those it has, and no more of them.
        """

    @property
    def point(self) -> Mapping[str, Tensor] | None:
        """The one value of each site, where that is what was learned; None where draws differ."""
        return None

    @property
    def proposal(self) -> Callable[..., Any] | None:
        """A guide that makes the draws and has a density: they are weighed by it, for k-hats and evidence."""
        return None

    def centre(self, batch: Batch) -> Mapping[str, Tensor] | None:
        """One value of each site in the middle of the draws, where another algorithm can begin; None: none is known.

        Called within the workspace of that other run, which holds the parameters of this fit.
        """
        return self.point

    def by_chain(self) -> Mapping[str, Tensor] | None:
        """All draws that are held, chains x draws x shape of the site; None where draws are made when asked for.

        Draws that are not of chains count as one.
        """
        return None

    @property
    def sites(self) -> Collection[str]:
        """Names of the sites that it holds values of; those of a guide are known from the dry run."""
        return {*(self.point or ()), *(self.by_chain() or ())}

    @property
    def judged_by(self) -> JudgedBy:
        """What tells whether the draws are right. Chains have to be `by_chain`, weights are those of `proposal`."""
        if self.point is not None:
            return None
        return "draws" if self.proposal is None else "weights"

    def tensors(self) -> Parts:
        """All that has to be kept to make it again, by part and name."""
        return {}

    @classmethod
    def rebuilt(cls, parts: Parts, guide: Callable[..., Any] | None) -> Self:
        """The posterior of these tensors and the guide of the fit.

        Raises:
            NotImplementedError: for a kind that is code.
        """
        raise NotImplementedError(f"{cls.__name__} is not made of tensors")

    @classmethod
    def check(cls, parts: Parts, sites: Mapping[str, Sequence[Any]]) -> None:
        """Refuse parts of a file that are not of this kind.

        ``sites``: what the file says of each site of the program, [kind, distribution, event shape, plates].

        Raises:
            ValueError: saying what is wrong. Of a kind that says nothing of it, where there is NaN.
        """
        for part, values in parts.items():
            check_sites(part, values, {}, known=False)


def checked(posterior: Any) -> Posterior:
    """What an algorithm hands back as its posterior, refused where its answers do not go together.

    >>> checked({"loc": torch.zeros(())})
    Traceback (most recent call last):
    ...
    TypeError: posterior: expected what was learned, such as PointPosterior({"loc": ...}), got dict
    """
    if not isinstance(posterior, Posterior):
        given = posterior.__name__ if isinstance(posterior, type) else type(posterior).__name__
        said = f'posterior: expected what was learned, such as PointPosterior({{"loc": ...}}), got {given}'
        raise TypeError(f"{said}, a class" if isinstance(posterior, type) else said)
    name, by, held = type(posterior).__name__, posterior.judged_by, posterior.by_chain()
    if by not in ("weights", "chains", "draws", None):
        raise ValueError(f"posterior: {name}.judged_by has to be 'weights', 'chains', 'draws' or None, got {by!r}")
    if by == "chains" and not held:
        raise ValueError(f"posterior: {name} is judged by chains, and its by_chain() gives none")
    sizes = {tuple(value.shape[:2]) for value in (held or {}).values()}
    sizes |= {tuple(value.shape[:2]) for value in posterior.stats.values()}
    if held and (len(sizes) > 1 or len(size := next(iter(sizes))) < 2 or not size[0] * size[1]):
        raise ValueError(
            f"posterior: what {name}.by_chain() and its stats give has to be chains x draws x shape, as many chains "
            f"and draws of all, got {sorted(sizes)}"
        )
    return posterior


def check_sites(part: str, values: Mapping[str, Tensor], sites: Mapping[str, Sequence[Any]], *, known: bool) -> None:
    """Refuse values of sites (in shapes that end in the site's event shape) with NaN or of another shape.

    ``known``: every name has to be that of a site of the program that is not observed.

    >>> check_sites("draws", {"loc": torch.zeros(5, 3)}, {"loc": ["latent", "Normal", [2], []]}, known=True)
    Traceback (most recent call last):
    ...
    ValueError: 'draws/loc' has shape (5, 3), the site events of shape (2,)
    """
    for name, value in values.items():
        if value.is_floating_point() and bool(value.isnan().any()):
            raise ValueError(f"'{part}/{name}' holds NaN")
        kind, _, event, *_ = sites.get(name, ("observed", "", ()))
        if known and kind == "observed":
            raise ValueError(f"'{part}/{name}' is not a latent site of the program")
        if tuple(value.shape[value.dim() - len(event) :]) != tuple(event):
            raise ValueError(f"'{part}/{name}' has shape {tuple(value.shape)}, the site events of shape {tuple(event)}")


def spread(total: int, count: int) -> Tensor:
    """``count`` places out of ``total``, evenly from first to last; all of them, where ``count`` is as large.

    >>> spread(9, 3).tolist(), spread(2, 5).tolist()
    ([0, 4, 8], [0, 1])
    """
    return torch.arange(total) if count >= total else torch.linspace(0, total - 1, count).round().long()
