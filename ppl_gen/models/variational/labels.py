"""Labels of which some are missing (-1): how they enter a model and its guide, and the classifier that guesses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_gen.data.inputs import entries
from ppl_gen.models.variational.vae import check_labels
from ppl_gen.nn.networks import standardised

__all__ = ["Classifier", "Labels", "labels_of"]

#: Stands for log 0 where a label rules a class out: exp of it is exactly zero, and zero times it is zero.
RULED_OUT = -1e4
LABELLED = 200  # labelled rows that the classifier sees at every step, at least (all, where there are fewer)


class Classifier(nn.Module):
    """q(y | x): calling it with rows gives a categorical distribution over the classes."""

    centre: Tensor
    spread: Tensor

    def __init__(self, network: nn.Module, centre: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("centre", centre.clone())
        self.register_buffer("spread", spread.clone())

    def logits(self, x: Tensor) -> Tensor:
        """Unnormalised log probabilities: ... x columns -> ... x classes."""
        odds: Tensor = self.network(standardised(x, self.centre, self.spread))
        return odds

    def forward(self, x: Tensor) -> Any:
        return dist.Categorical(logits=self.logits(x))


@dataclass(frozen=True)
class Labels:
    """How labels enter model and guide, and what the classifier pays for the labelled rows."""

    classes: int
    alpha: float
    x: Tensor | None = None  # the labelled rows of the training data, and their labels
    y: Tensor | None = None
    draw: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    def observe(self, y: Tensor, labels: Tensor | None) -> None:
        """In the model: a given label is an observation of ``y`` without error."""
        if labels is not None:
            wrong = (labels >= 0) & (labels != y)
            pyro.factor("label", torch.where(wrong, RULED_OUT, 0.0))

    def guess(self, logits: Tensor, labels: Tensor | None) -> Any:
        """In the guide: q(y | x), which puts everything on a label that is given."""
        if labels is not None:
            other = labels.unsqueeze(-1) != torch.arange(self.classes)
            logits = torch.where((labels >= 0).unsqueeze(-1), torch.where(other, RULED_OUT, 0.0), logits)
        return dist.Categorical(logits=logits)

    def loss(self, logits: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """alpha times the mean over the labelled rows of -log q(y | x), in nats, for every row of the batch.

        It is taken over the labelled rows of all the data, as many as the batch has rows at least: a batch of thousands
        of rows with a hundred labels seldom holds one, and a classifier that hears of labels now and then forgets them.
        """
        if self.x is None or self.y is None:
            return batch.new_zeros(len(batch))
        most = max(len(batch), LABELLED)
        chosen = torch.arange(len(self.y)) if len(self.y) <= most else torch.randint(len(self.y), (most,))
        x = self.x[chosen.cpu()].to(batch)
        x = x if self.draw is None else self.draw({"x": x})["x"]
        missed = nn.functional.cross_entropy(logits(x), self.y[chosen.cpu()].to(batch.device))
        return (self.alpha * missed).expand(len(batch))


def labels_of(data: Any, program: str, classes: int, alpha: float) -> Labels:
    """The labels of the training data and the rows that have one; raises ValueError for labels that do not fit."""
    y = check_labels(data, program, classes, missing=True)
    (x,) = entries(data, program, "x")
    assert x is not None
    if y is None or not bool((y >= 0).any()):
        return Labels(classes, alpha)
    if len(y) != len(x):
        raise ValueError(f"data: entries must share their rows (first dimension), got x: {len(x)}, y: {len(y)}")
    seen = (y >= 0).cpu()
    return Labels(classes, alpha, x.cpu()[seen], y.cpu()[seen].long(), getattr(data, "on_batch", None))
