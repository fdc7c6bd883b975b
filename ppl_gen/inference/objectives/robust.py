"""Adversarial training: the loss of another objective at the worst rows within reach of the given ones."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ppl_gen.arguments import require_choice, require_text
from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError, is_number, require_number, require_positive, require_whole
from ppl_gen.inference.objectives.base import Objective, started
from ppl_gen.inference.objectives.elbo import ELBO
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Setting
from ppl_gen.inference.objectives.plain import as_objective
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import buffers_put_back, without_side_effects

__all__ = ["AdversarialTraining", "entry_of", "with_entry"]


@dataclass(frozen=True)
class AdversarialTraining(Objective):
    r"""Another objective against an adversary who may move every row a little.

    .. math:: \min_\theta \; \mathbb{E} \max_{\lVert r \rVert \le \epsilon} L_\theta(x + r, y)

    The adversary answers every batch anew: from r = 0, ``steps`` steps uphill of length ``step``, each followed by a
    projection to the ball (and to ``bounds``); along the sign of the slope for the norm "inf", along the slope for "2".
    With one step of length epsilon and the norm "inf" it is the fast gradient sign method. Where the loss of a row is a
    falling function of one linear score, as in logistic regression, one step is the exact maximum, and the score falls
    by :math:`\epsilon \lVert w \rVert_1` (norm "inf") or :math:`\epsilon \lVert w \rVert_2` (norm "2"); elsewhere it is
    a lower bound of it, so that a small loss is no proof of robustness. The adversary keeps nothing from batch to batch
    and so has no parameters in the fit; it meets networks as they are in training, dropout drawn anew at every step,
    and leaves the running averages of batch norm alone.

    Losses are those of the other objective at the moved rows, the program's own terms with it. The history keeps its
    parts, and ``clean_loss``, its loss at the rows as given.

    Args:
        radius: epsilon, in the units of the entry.
        norm: "inf", the largest change of a number; "2", the length of the change of a row.
        steps: steps of the adversary.
        step: their length; None: epsilon for one step, else 2.5 epsilon / steps.
        clean: share of the loss at the rows as given, from 0 to below 1.
        bounds: (least, largest) value that a moved number may have, such as (0, 1) for pixels, and that all rows keep;
            None: any.
        entry: the entry of the data that is moved.
        objective: whose loss it is.

    Raises:
        ValueError, TypeError: for settings out of range.
        IncompatibleError: where the loss gives no gradient to the entry, or is one of several players.

    Source: Goodfellow, Shlens and Szegedy (2015), with ``clean=0.5``; Madry, Makelov, Schmidt, Tsipras, Vladu (2018).

    Example:
        >>> AdversarialTraining(0.1, steps=1).step_length
        0.1
    """

    radius: float = 0.1
    norm: str = "inf"
    steps: int = 7
    step: float | None = None
    clean: float = 0.0
    bounds: Sequence[float] | None = None
    entry: str = "x"
    objective: Any = field(default_factory=ELBO)

    def __post_init__(self) -> None:
        require_positive("radius", self.radius)
        require_choice("norm", self.norm, ("inf", "2"))
        require_whole("steps", self.steps)
        if self.step is not None:
            require_positive("step", self.step)
        require_number("clean", self.clean, below=1.0)
        bounds: Any = self.bounds  # whatever was passed
        if bounds is not None and not (
            isinstance(bounds, Sequence) and len(bounds) == 2 and all(map(is_number, bounds)) and bounds[0] < bounds[1]
        ):
            raise ValueError(f"bounds: expected two numbers, the smaller first, or None, got {bounds!r}")
        require_text("entry", self.entry)
        object.__setattr__(self, "objective", as_objective(self.objective))

    @property
    def label(self) -> str:
        return f"AdversarialTraining({self.objective.label})"

    @property
    def needs(self) -> Sequence[Need]:
        return tuple(self.objective.needs)

    @property
    def uses_guide(self) -> bool:  # type: ignore[override]
        """As the other objective does."""
        return bool(self.objective.uses_guide)

    @property
    def pays_terms(self) -> bool:  # type: ignore[override]
        """Yes: the adversary raises the program's own terms too."""
        return True

    @property
    def step_length(self) -> float:
        """Of one step of the adversary."""
        return float(self.step or (self.radius if self.steps == 1 else 2.5 * self.radius / self.steps))

    def undivided(self, setting: Setting) -> str | None:
        why: str | None = self.objective.undivided(setting)
        return why

    def build(self, setting: Setting) -> Game:
        return _RobustGame(self, setting)


class _RobustGame(Game):
    def __init__(self, objective: AdversarialTraining, setting: Setting) -> None:
        self.objective, self.game = objective, started(objective.objective, setting)
        self.place = entry_of(setting, "entry", objective.entry)
        if len(self.game.players) > 1:
            raise IncompatibleError(
                f"objective: {objective.objective.label} is a game of several players, without one loss to raise"
            )
        self.players, self.modules = self.game.players, self.game.modules
        ball = f"|r|_{objective.norm} <= {objective.radius:g}"
        self.notes = {**self.game.notes, "adversary": f"{objective.steps} step(s) uphill in {objective.entry}, {ball}"}
        self._check(setting.probe)
        self._check_bounds(setting)

    def _check(self, batch: Batch) -> None:
        x = _value(batch, self.place)
        if not isinstance(x, Tensor) or not x.is_floating_point() or len(x) != batch.rows:
            got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"entry: expected rows of real numbers in {self.objective.entry!r}, got {got}")
        with without_side_effects(), torch.enable_grad():
            state = self.game.init(batch)
            _, slope = self._slope(batch, x, state)
        if slope is None:
            raise IncompatibleError(
                f"the loss of {self.objective.objective.label} gives no gradient to the entry "
                f"{self.objective.entry!r}: there is nothing that an adversary could do"
            )
        try:
            with without_side_effects(), torch.enable_grad():
                self._slope(batch, self._moved(x, x, slope), state)
        except PROGRAM_ERRORS as error:
            said = str(error).splitlines()[0]
            raise IncompatibleError(
                f"entry: the program takes {self.objective.entry!r} as it is, and not as an adversary leaves it, moved "
                f"by up to {self.objective.radius:g} ({said})"
            ) from error

    def _check_bounds(self, setting: Setting) -> None:
        """Of all rows at hand: a row out of bounds would be moved beyond the ball to get there."""
        bounds, data, name = self.objective.bounds, setting.data, self.objective.entry
        if bounds is None:
            return
        every = data is not None and data.streamed is None and isinstance(data.entries.get(name), Tensor)
        x: Any = data.entries[name] if every and data is not None else _value(setting.probe, self.place)
        low, high = float(x.min()), float(x.max())
        if low < bounds[0] or high > bounds[1]:
            raise ValueError(
                f"bounds: expected ({bounds[0]:g}, {bounds[1]:g}) to hold all values of {name!r}, which go from "
                f"{low:g} to {high:g}"
            )

    def init(self, batch: Batch) -> GameState:
        return self.game.init(batch)

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        moved, clean = self._worst(batch, state)
        share = self.objective.clean
        loss, after = self.game.loss(player, moved, state)
        value = loss.value
        if share:
            value = (1.0 - share) * value + share * self.game.loss(player, batch, state)[0].value
        return Loss(value, {**loss.parts, "clean_loss": clean}), after

    def _worst(self, batch: Batch, state: GameState) -> tuple[Batch, Tensor]:
        """The batch as the adversary leaves it, and the loss before that."""
        x = _value(batch, self.place)
        at, clean = x, x.new_zeros(())
        with buffers_put_back():  # running averages are of the rows that are learned from
            for turn in range(self.objective.steps):
                value, slope = self._slope(batch, at, state)
                clean = value if turn == 0 else clean
                at = self._moved(x, at, slope)
        return with_entry(batch, self.place, at), clean

    def _moved(self, x: Tensor, at: Tensor, slope: Tensor) -> Tensor:
        """One step uphill from ``at``, back into the ball about ``x`` and into the bounds."""
        at = x + self._projected(at - x + self.objective.step_length * self._direction(slope))
        if self.objective.bounds is None:
            return at
        low, high = map(float, self.objective.bounds)
        return torch.minimum(torch.maximum(at, x.clamp(max=low)), x.clamp(min=high))  # x itself, should it lie outside

    def _slope(self, batch: Batch, at: Tensor, state: GameState) -> tuple[Tensor, Any]:
        leaf = at.detach().requires_grad_()
        value = self.game.loss("program", with_entry(batch, self.place, leaf), state)[0].value
        if not value.requires_grad:
            return value.detach(), None
        (slope,) = torch.autograd.grad(value, leaf, allow_unused=True)
        return value.detach(), slope

    def _direction(self, slope: Tensor) -> Tensor:
        if self.objective.norm == "inf":
            return slope.sign()
        return slope / _lengths(slope).clamp_min(torch.finfo(slope.dtype).tiny)

    def _projected(self, r: Tensor) -> Tensor:
        radius = float(self.objective.radius)
        if self.objective.norm == "inf":
            return r.clamp(-radius, radius)
        return r * (radius / _lengths(r).clamp_min(radius))


def _lengths(rows: Tensor) -> Tensor:
    """Of each row, with as many dimensions as the rows."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1).reshape(-1, *[1] * (rows.dim() - 1))


def entry_of(setting: Setting, argument: str, entry: str) -> int | str:
    """Where a batch holds an entry of the data: its place among the arguments, or its name.

    Raises:
        ValueError: naming the argument, if the model does not take it from the data.
    """
    if entry in setting.probe.kwargs:
        return entry
    model = setting.program.model
    target = model.forward if isinstance(model, torch.nn.Module) else model
    names = list(inspect.signature(target).parameters)[: len(setting.probe.args)]
    if entry in names:
        return names.index(entry)
    held = [*names, *setting.probe.kwargs]
    raise ValueError(
        f"{argument}: the model of {setting.program.name!r} takes no {entry!r} from the data, expected one of {held}; "
        "an entry that the model's signature does not name is left out"
    )


def _value(batch: Batch, place: int | str) -> Any:
    return batch.args[place] if isinstance(place, int) else batch.kwargs[place]


def with_entry(batch: Batch, place: int | str, value: Tensor) -> Batch:
    """The batch with another value where `entry_of` found an entry."""
    if isinstance(place, int):
        return replace(batch, args=(*batch.args[:place], value, *batch.args[place + 1 :]))
    return replace(batch, kwargs={**batch.kwargs, place: value})
