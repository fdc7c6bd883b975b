r"""Rows of which some entries are seen, completed by a chain that knows nothing of masks.

Every step back is followed by putting the seen entries where noise would have taken them, a draw of q(x_t | x_0). What
is drawn beside them then hears of them only through noisy copies that change from step to step: the completions agree
with what is seen, but too little, as the two ways to mend it (``resamples``, ``particles``) show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["NOTES", "RESAMPLES", "Chain", "completed", "filtered", "imputes"]

RESAMPLES = 10  #: passes over each step, unless said otherwise

#: What every fit of a diffusion says of its completions.
NOTES = {
    "completion": "fit.predict with a mask is approximate: what is seen is put back after each of several passes over "
    "a step, which is no exact draw given it; inpaint(particles=...) is another way, and tells what is right when"
}


class Chain(Protocol):
    """What completing rows asks of a diffusion: see `Diffusion`, whose methods these are."""

    @property
    def steps(self) -> int: ...

    @property
    def event(self) -> int: ...

    def standard(self, x: Tensor) -> Tensor: ...

    def rows(self, start: Tensor) -> Tensor: ...

    def pure(self, like: Tensor) -> Tensor: ...

    def noised(self, start: Tensor, s: int, t: int) -> Tensor: ...

    def back(self, state: Tensor, t: int) -> Tensor: ...

    def log_back(self, value: Tensor, state: Tensor, t: int) -> Tensor: ...


def completed(chain: Chain, start: Tensor, seen: Tensor, resamples: int = RESAMPLES, jump: int = 1) -> Tensor:
    """x_0 with the entries ``seen`` as in ``start``, the others drawn; rows x shape of a row.

    Each stretch of ``jump`` steps is gone back ``resamples`` times, noised again in between (Lugmayr et al. 2022): what
    is drawn and what is put beside it then come to terms before there is less noise.
    """
    t = chain.steps
    state = torch.where(seen, chain.noised(start, 0, t), chain.pure(start))
    while t:
        low = max(t - jump, 0)
        for again in range(resamples):
            if again:
                state = chain.noised(state, low, t)
            for s in range(t, low, -1):
                state = chain.back(state, s)
                state = torch.where(seen, chain.noised(start, 0, s - 1) if s > 1 else start, state)
        t = low
    return state


def filtered(chain: Chain, start: Tensor, seen: Tensor, particles: int) -> Tensor:
    """As `completed`, by a particle filter along one noisy path of the seen entries (Trippe et al. 2023).

    Each row has ``particles`` chains that share a path drawn from q(x_1, ..., x_T | x_0); at every step those survive
    that make the path's next place likely. Exact as their number grows where the chain back is the reverse of q; in
    many dimensions one chain soon has all of the weight.
    """
    path = [start]
    for t in range(1, chain.steps + 1):
        path.append(chain.noised(path[-1], t - 1, t))
    state = torch.where(seen, path[-1], chain.pure(start.expand(particles, *start.shape)))
    places = torch.arange(len(start), device=start.device)
    for t in range(chain.steps, 0, -1):
        told = torch.where(seen, chain.log_back(path[t - 1].expand_as(state), state, t), 0.0)
        weight = told.flatten(-chain.event).sum(-1).T.softmax(-1)  # rows x particles
        chosen = torch.multinomial(weight, particles, replacement=True).T
        state = torch.where(seen, path[t - 1], chain.back(state[chosen, places], t))
    return state[0]


def imputes(chain: Chain) -> Callable[..., Mapping[str, Tensor]]:
    """What `Program.imputes` is for a chain: rows as they are where seen, drawn elsewhere."""

    def draw(values: Mapping[str, Tensor], seen: Tensor, x: Tensor) -> dict[str, Tensor]:
        made = chain.rows(completed(chain, chain.standard(x), seen))
        return {"x": torch.where(seen, x.to(made), made)}

    return draw
