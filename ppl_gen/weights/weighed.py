"""Draws of a guide, each weighed against the posterior in the call that drew it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ppl_gen.data.batching import Batch, Dataset
from ppl_gen.enumeration.finite_globals import combinations, summed_globals
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.weights.densities import joint_densities
from ppl_gen.weights.fresh_noise import FreshNoise
from ppl_gen.weights.log_weights import global_draw
from ppl_gen.weights.particles import can_vectorise, log_weights_in_chunks
from ppl_gen.weights.sizes import Largest
from ppl_gen.weights.summed_particles import can_sum_together
from ppl_gen.weights.work import alone, density_work

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["WeighedDraws", "affordable", "joint_draws", "many", "weighed_draws"]

ALONE = 1000  # draws of a program that takes one at a time only
MAX_ELEMENTS = 2_000_000  # numbers of data, times particles, times draws held at once
HELD = 20_000_000  # numbers of one tensor: a table of words by topics is much larger than the data
COST = 200_000_000  # numbers of data, times particles, times draws that a judgement may cost
FREE = 10_000_000  # of these however short the fit; beyond, no more than half of what its steps have seen


@dataclass(frozen=True)
class WeighedDraws:
    r"""Draws theta_s of a guide, and how the posterior weighs them.

    ``values``: the model's global sites that the guide draws, draws x shape of the site. ``log_weights``: log p(x,
    theta_s) - log q(theta_s) in nats, shape (draws,), local latents integrated out; float64 on the CPU.
    """

    values: dict[str, Tensor]
    log_weights: Tensor


def weighed_draws(fit: Fit, draws: int, particles: int = 1, *, more: int = 0) -> WeighedDraws:
    """``draws`` draws of the guide with their log weights; call inside ``fit.bound()``.

    Local latents that the guide draws are integrated by importance weighting, ``particles`` of them per row and draw;
    finite ones that it leaves out are summed. All draws go through guide and model at once (`torch.vmap`) where these
    allow it, and then there are ``more`` of them if that is more; one at a time they are fewer, at most `ALONE`.
    """
    info, batch = fit.info, fit.data.batch()
    guided = set(info.guide_sites or {})
    local = any(site.local and site.name in guided for site in info.select())
    most = alone(fit, ALONE // (5 if local else 1))
    outside, log_q = _drawn(fit, batch, draws, most, more)
    count = len(log_q)
    values = {site.name: outside[site.name] for site in info.select(local=False) if site.name in outside}
    if not local:
        known = [{name: value[i] for name, value in values.items()} for i in range(count)]
        log_p = joint_densities(fit, batch, known, alone=most)
        values = {name: value[: len(log_p)] for name, value in values.items()}
        return WeighedDraws(values, (log_p - log_q[: len(log_p)]).double().cpu())
    inside = _integrated(fit, batch, outside, particles, count)
    return WeighedDraws(values, (inside.double() - log_q).cpu())


def numbers(fit: Fit, data: Dataset, table: int = 1) -> int:
    """Numbers that one density of the program reads at ``data``: passed to it, or observed in a closure's data.

    A sum over finite sites reads them ``table`` times; arithmetic beyond that of a simple density counts too.
    """
    observed = sum(math.prod((*s.batch_shape, *s.event_shape)) for s in fit.info.select(kind="observed"))
    share = data.rows / fit.data.rows if data.rows and fit.data.rows else 1.0
    return max(1, data.elements * table, int(observed * share) * table, int(density_work(fit).numbers * share))


def affordable(
    fit: Fit, wanted: int, particles: int = 1, *, rows: Dataset | None = None, free: int = FREE, most: int = COST
) -> int:
    """How many draws can be weighed for less than the fit has cost: ``wanted``, and 100 of them at least.

    Weighed on all data, or on some ``rows``. A density costs less than half of a step on the same rows, which has a
    gradient too. Numbers up to ``free`` may be read however short the fit, and never more than ``most``.
    """
    cells = numbers(fit, rows or fit.data) * particles
    seen = int(fit.cost.get("steps", 0)) * (numbers(fit, fit.data) // 2)
    return max(min(wanted, max(free, min(most, seen)) // cells), min(wanted, 100))


def joint_draws(fit: Fit, count: int, batch: Batch) -> list[dict[str, Tensor]]:
    """What ``fit.learned.draw`` gives, by other random numbers: all draws of a guide at once where it allows it."""
    if fit.learned.independent and fit.learned.point is None and count > 1:
        together = many(lambda _: fit.learned.draw(1, batch)[0], torch.zeros(count), batch)
        if together is not None:
            return [{name: value[i] for name, value in together.items()} for i in range(count)]
    return fit.learned.draw(count, batch)


def _drawn(fit: Fit, batch: Batch, draws: int, alone: int, more: int) -> tuple[dict[str, Tensor], Tensor]:
    """Draws of the guide's sites outside the data plate, draws x shape, and log q of each (draws, nats)."""

    def one(_: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return global_draw(fit.guide, batch, fit.info)

    together = many(one, torch.zeros(max(draws, more)), batch)
    if together is not None:
        values, log_q = together
        return {name: value.detach() for name, value in values.items()}, log_q.detach()
    singles = [one(torch.zeros(())) for _ in range(min(draws, alone))]
    names = singles[0][0]
    return (
        {name: torch.stack([torch.as_tensor(values[name]).detach() for values, _ in singles]) for name in names},
        torch.stack([log_q for _, log_q in singles]).detach(),
    )


def _integrated(fit: Fit, batch: Batch, outside: dict[str, Tensor], particles: int, count: int) -> Tensor:
    """log p(x, theta_s) in nats, shape (draws,), at draws of the sites outside the data plate (draws x shape).

    The sites inside are integrated, by ``particles`` of each row.
    """
    info = fit.info
    guided = set(info.guide_sites or {})
    coupling = summed_globals(fit, guided)  # rows are independent given these: a sum over all their values is outermost
    states = combinations(fit, batch, coupling) if coupling else [{}]
    sums = tuple(name for name in info.finite_latents if name not in guided and name not in coupling)
    model, guide = fit.joint, fit.guide
    vectorise = can_vectorise(model, guide, info, batch, sums) or can_sum_together(model, guide, info, batch, sums)

    def one(values: dict[str, Tensor]) -> Tensor:
        terms = []
        for state in states:
            known = {**values, **state}
            w = log_weights_in_chunks(
                model, guide, info, batch, particles, values=known, sums=sums, vectorise=vectorise
            )
            inside = 0.0 if w.rows is None else (torch.logsumexp(w.rows, 0) - math.log(particles)).sum()
            terms.append(torch.as_tensor(w.globals + inside).double())
        return torch.logsumexp(torch.stack(terms), 0)

    together = many(one, outside, batch, particles)
    if together is not None:
        return together
    return torch.stack([one({name: value[i] for name, value in outside.items()}) for i in range(count)])


def many(one: Callable[[Any], Any], inputs: Any, batch: Batch, particles: int = 1) -> Any | None:
    """``one`` of many inputs at once, each with random numbers of its own; None where the program does not allow it.

    ``inputs`` are tensors whose first dimension counts them, and so are those that come back.

    Of the first input alone it has to give, from the same random numbers, what it gives without `torch.vmap`.
    """
    first = tree_map(lambda value: value[:1], inputs)
    cells = sum(v.numel() for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)) * particles
    state = torch.get_rng_state()
    try:
        with warnings.catch_warnings(), FreshNoise():
            warnings.simplefilter("ignore", UserWarning)  # that an operation has no batching rule costs time, no more
            trial = torch.vmap(one, randomness="different")(first)
            torch.set_rng_state(state)
            with Largest() as largest:
                alone = one(tree_map(lambda value: value[0], first))
            if not all(_near(a[0], b) for a, b in zip(tree_leaves(trial), tree_leaves(alone), strict=True)):
                torch.set_rng_state(state)
                return None
            most = max(1, min(MAX_ELEMENTS // max(1, cells), HELD // largest.numbers))
            return torch.vmap(one, randomness="different", chunk_size=most)(inputs)
    except PROGRAM_ERRORS:
        torch.set_rng_state(state)
        return None  # indexing by a drawn value, data-dependent Python: one draw at a time then


def _near(one: Tensor, other: Any) -> bool:
    return torch.allclose(one, torch.as_tensor(other), rtol=1e-3, atol=1e-3, equal_nan=True)
