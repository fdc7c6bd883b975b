"""What the players of an adversarial game pay for each row, by the name of the game."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from ppl_gen.arguments import require_choice
from ppl_gen.inference.objectives.divergences import DIVERGENCES, Divergence

__all__ = ["COSTS", "Costs", "costs_of"]

Rowwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Costs:
    """What both players pay for each row, as functions of the critic's output on it.

    The critic minimises E ``real`` over observed rows plus E ``fake`` over made ones; the program E ``program`` over
    made ones. ``classifier``: the output is the log odds of "observed". ``border``: the best critic's output where
    both kinds of rows are equally dense; None where that says nothing. ``bound``: from the critic's mean cost, a lower
    bound of the divergence ``of`` (whatever the critic; at the best one it is the divergence). ``zero_sum``: the
    program minimises what the critic maximises.

    Example:
        >>> import torch
        >>> odds = torch.tensor([0.0, 2.0])
        >>> COSTS["minimax"].real(odds)
        tensor([0.6931, 0.1269])
    """

    real: Rowwise
    fake: Rowwise
    program: Rowwise
    classifier: bool = False
    border: float | None = None
    bound: Rowwise | None = None
    of: str = ""
    zero_sum: bool = False


def _log_odds(program: Rowwise, *, zero_sum: bool) -> Costs:
    # At the optimum minus the critic's cost is 2 JS - log 4.
    of = "twice the Jensen-Shannon divergence"
    return Costs(
        real=lambda t: -logsigmoid(t),
        fake=lambda t: -logsigmoid(-t),
        program=program,
        classifier=True,
        border=0.0,
        bound=lambda cost: math.log(4) - cost,
        of=of,
        zero_sum=zero_sum,
    )


def _divergence(chosen: Divergence) -> Costs:
    return Costs(
        real=lambda t: -chosen.on_data(t),
        fake=chosen.on_made,
        program=lambda t: -chosen.on_made(t),
        border=chosen.border,
        bound=lambda cost: -cost,
        of=chosen.name,
        zero_sum=True,
    )


#: The games by name; with classifiers, minus the critic's cost at its optimum is 2 JS(data, program) - log 4.
COSTS: dict[str, Costs] = {
    "non-saturating": _log_odds(lambda t: -logsigmoid(t), zero_sum=False),
    "minimax": _log_odds(lambda t: logsigmoid(-t), zero_sum=True),
    "wasserstein": Costs(lambda t: -t, lambda t: t, lambda t: -t, zero_sum=True),
    # Targets 1 for data, 0 for made rows; at best T = p / (p + q), and the cost is half the integral of p q / (p + q).
    "least-squares": Costs(
        real=lambda t: (t - 1).square() / 2,
        fake=lambda t: t.square() / 2,
        program=lambda t: (t - 1).square() / 2,
        border=0.5,
        bound=lambda cost: 2 - 8 * cost,
        of="triangular discrimination, the integral of (p - q)^2 / (p + q)",
    ),
    # At best T = sign(p - q), and the cost is twice the integral of min(p, q).
    "hinge": Costs(
        real=lambda t: relu(1 - t),
        fake=lambda t: relu(1 + t),
        program=lambda t: -t,
        border=0.0,
        bound=lambda cost: 1 - cost / 2,
        of="total variation",
    ),
    **{name: _divergence(chosen) for name, chosen in DIVERGENCES.items()},
}


def costs_of(kind: str | Divergence) -> Costs:
    """The costs of a game by its name, or by the divergence that it bounds.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> costs_of("kl").of
        'KL(data, program)'
    """
    if isinstance(kind, Divergence):
        return _divergence(kind)
    name: Any = kind
    require_choice("kind", name, COSTS)
    return COSTS[kind]
