r"""What a decoder's numbers mean: p(x | z) for zeros and ones, shades of grey, real numbers, integer levels."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from math import prod
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppl_gen.arguments import require_choice
from ppl_gen.data.inputs import entries, seen_in_part
from ppl_gen.errors import require_positive, require_whole

__all__ = [
    "Kind",
    "Likelihood",
    "as_handed_out",
    "check_likelihood",
    "check_rows",
    "chosen_likelihood",
    "log_odds",
    "zeros_and_ones",
]

Kind = Literal["auto", "bernoulli", "normal", "categorical"]
_LOOKED_AT = 256  # rows of data that are redrawn for every batch
KINDS = ("auto", "bernoulli", "normal", "categorical")


class Likelihood(nn.Module):
    """p(x | z) over rows of one shape, from ``outputs`` numbers.

    Args:
        shape: shape of a row.
        centre: subtracted from x before an encoder sees it (and added to the mean of a normal), in the shape of a row.
        spread: x is divided by it; one number.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, shape: Sequence[int], centre: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.shape, self.outputs = tuple(shape), prod(shape)
        self.register_buffer("centre", centre)
        self.register_buffer("spread", spread)

    def starting_bias(self, channels: int | None = None) -> Tensor | None:
        """Outputs, flat, at which every row has the distribution of the whole data; None where zero is that.

        With ``channels`` those that the pixels of each share, as a convolution's biases are.
        """
        return None

    def suited(self, data: Any) -> Likelihood:
        """The same likelihood for rows of another kind: grey values instead of zeros and ones."""
        return self

    def forward(self, raw: Tensor) -> Any:
        """The distribution over x from ... x outputs numbers; its events have the shape of a row."""
        raise NotImplementedError


class Bernoulli(dist.Bernoulli):
    """A Bernoulli distribution that takes zeros and ones of any type: pixels are often kept as integers."""

    def log_prob(self, value: Tensor) -> Tensor:
        found: Tensor = super().log_prob(value.to(self.logits.dtype))
        return found


class Chances(Bernoulli):
    """Coins seen through grey values: log p at x in [0, 1] is its mean over coins that are 1 with chance x."""

    support = constraints.unit_interval


class BernoulliPixels(Likelihood):
    """Zeros and ones, from log odds; or, where ``grey``, numbers from 0 to 1 as the chances of zeros and ones.

    The log density at a grey row is the expectation over the rows that its chances draw. A bound, an evidence too, made
    of it is one of the expected evidence of such rows.
    """

    def __init__(self, shape: Sequence[int], rows: Tensor, *, grey: bool) -> None:
        super().__init__(shape, rows.mean(0), torch.ones(()))
        self.grey = grey
        # One row of fair coins more than there are: a pixel that never varies keeps finite log odds.
        self.chances = (rows.sum(0) + 0.5) / (len(rows) + 1)

    def suited(self, data: Any) -> Likelihood:
        if self.grey or not _is_grey(as_handed_out(data, check_rows(data, "this likelihood", self.shape))):
            return self
        other = copy(self)
        other.grey = True
        return other

    def starting_bias(self, channels: int | None = None) -> Tensor:
        chances = self.chances.flatten() if channels is None else self.chances.reshape(channels, -1).mean(1)
        return chances.logit()

    def forward(self, raw: Tensor) -> Any:
        coins = Chances if self.grey else Bernoulli
        return coins(logits=raw.reshape(*raw.shape[:-1], *self.shape)).to_event(len(self.shape))


class NormalPixels(Likelihood):
    """Real numbers with one standard deviation for all of them, learned or fixed (in the user's units).

    Columns are shifted by their means and all divided by the one overall standard deviation, so that noise that is the
    same in every direction stays so: a linear decoder is probabilistic principal component analysis.
    """

    def __init__(self, shape: Sequence[int], rows: Tensor, scale: float | None) -> None:
        centre = rows.mean(0)
        spread = (rows - centre).square().mean().sqrt()
        super().__init__(shape, centre, spread if spread > 0 else torch.ones(()))
        start = 0.0 if scale is None else float(torch.as_tensor(scale / self.spread).log())
        log_scale = torch.tensor(start)
        self.log_scale: Tensor
        if scale is None:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, raw: Tensor) -> Any:
        loc = self.centre + self.spread * raw.reshape(*raw.shape[:-1], *self.shape)
        return dist.Normal(loc, self.spread * self.log_scale.exp()).to_event(len(self.shape))


class CategoricalPixels(Likelihood):
    """Integers 0 ... levels - 1, each level with a log weight of its own; ``chances`` are pixels of a row x levels."""

    def __init__(self, shape: Sequence[int], rows: Tensor, levels: int) -> None:
        wide = rows.to(torch.get_default_dtype())
        super().__init__(shape, wide.mean(0), torch.tensor(levels / 2.0))
        self.levels, self.outputs = levels, prod(shape) * levels
        flat = rows.flatten(1).long()
        # One row more, shared evenly by all levels: a level never seen keeps a finite log weight.
        counts = torch.zeros(flat.shape[1], levels).scatter_add_(1, flat.T, torch.ones(flat.shape).T.contiguous())
        self.chances = (counts + 1 / levels) / (len(flat) + 1)

    def starting_bias(self, channels: int | None = None) -> Tensor:
        chances = self.chances
        if channels is not None:
            chances = chances.reshape(channels, -1, self.levels).mean(1)
        return chances.log().flatten()

    def forward(self, raw: Tensor) -> Any:
        logits = raw.reshape(*raw.shape[:-1], *self.shape, self.levels)
        return dist.Categorical(logits=logits).to_event(len(self.shape))


def check_rows(data: Any, program: str, shape: Sequence[int]) -> Tensor:
    """The entry x of ``data``, rows x ``shape``; raises ValueError for rows of another shape than ``shape``."""
    (rows,) = entries(data, program, "x", few=True)
    assert rows is not None  # the first entry
    if tuple(rows.shape[1:]) != tuple(shape):
        raise ValueError(
            f"data: {program} was made for rows of shape {tuple(shape)}, got data of shape {tuple(rows.shape)}"
        )
    return rows


def chosen_likelihood(
    kind: Kind, data: Any, shape: Sequence[int], *, scale: float | None, levels: int | None, program: str
) -> Likelihood:
    """The likelihood ``kind`` for the entry x of ``data``; see `vae` for what "auto" takes.

    Of a file too large for memory it sees rows from all over it, and starts from these.

    Raises:
        ValueError: for rows of another shape, or outside of the support.
    """
    rows, shape = check_rows(data, program, shape), tuple(shape)
    if kind == "categorical":
        assert levels is not None
        whole = not rows.is_floating_point()
        if not whole or bool((rows < 0).any()) or bool((rows >= levels).any()):
            got = f"{rows.dtype}" if not whole else f"values from {int(rows.min())} to {int(rows.max())}"
            raise ValueError(f"data: categorical pixels are integers from 0 to {levels - 1} (levels), got {got}")
        return CategoricalPixels(shape, rows, levels)
    wide = rows if rows.is_floating_point() else rows.to(torch.get_default_dtype())
    wide = wide.to(torch.get_default_dtype())
    seen = as_handed_out(data, wide)
    outside = (seen < 0) | (seen > 1)
    if kind == "auto" and seen_in_part(data):
        raise ValueError(
            f'likelihood: "auto" looks at all of the data, and these lie in a file too large for that; say which '
            f'{program} is to have, such as likelihood="normal"'
        )
    if kind == "auto":
        kind = "normal" if scale is not None or bool(outside.any()) else "bernoulli"
    if kind == "bernoulli":
        if bool(outside.any()):
            first = tuple(int(i) for i in outside.nonzero()[0])
            raise ValueError(
                "data: likelihood='bernoulli' takes zeros and ones, or chances from 0 to 1, got "
                f'{float(seen[first]):g} at index {first}; rescale the data, or take likelihood="normal"'
            )
        return BernoulliPixels(shape, wide, grey=_is_grey(seen))
    return NormalPixels(shape, wide, scale)


def check_likelihood(kind: str, scale: float | None, levels: int | None) -> None:
    """Raise ValueError for an unknown kind, or for settings that the kind does not have."""
    require_choice("likelihood", kind, KINDS)
    if scale is not None:
        require_positive("scale", scale)
        if kind not in ("normal", "auto"):
            raise ValueError(f"scale: is the noise of likelihood='normal'; {kind!r} has none, leave it out")
    if (levels is not None) != (kind == "categorical"):
        raise ValueError(f"levels: expected a number of levels with likelihood='categorical' alone, got {levels!r}")
    if levels is not None:
        require_whole("levels", levels)


def _is_grey(rows: Tensor) -> bool:
    return bool(((rows != 0) & (rows != 1)).any())


def as_handed_out(data: Any, rows: Tensor) -> Tensor:
    """Data that are redrawn for every batch show by a first draw what their rows are like."""
    draw = getattr(data, "on_batch", None)
    return rows if draw is None else torch.as_tensor(draw({"x": rows[:_LOOKED_AT]}).get("x", rows))


def log_odds(rows: Tensor) -> Tensor:
    """Of each column; one row of fair coins more than there are: a column that never varies keeps finite log odds."""
    return ((rows.sum(0, dtype=torch.float64) + 0.5) / (len(rows) + 1)).logit()


def zeros_and_ones(rows: Tensor, program: str) -> Tensor:
    """The rows; raises ValueError where one holds anything but zeros and ones."""
    other = (rows != 0) & (rows != 1)
    if bool(other.any()):
        first = tuple(int(i) for i in other.nonzero()[0])
        article = "an" if program == "rbm" else "a"
        raise ValueError(
            f"data: {article} {program} takes zeros and ones, got {float(rows[first]):g} at index {first}; threshold "
            "the data, or draw them as coins (torch.bernoulli)"
        )
    return rows
