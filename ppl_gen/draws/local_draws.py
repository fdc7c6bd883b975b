"""Local latents of given rows: drawn from what was learned, or from p(z | x, theta) at each draw of the globals."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.draws.row_chains import run_chains
from ppl_gen.draws.row_density import MAX_ELEMENTS, RowDensity
from ppl_gen.errors import IncompatibleError
from ppl_gen.handlers.sites import is_sample
from ppl_gen.handlers.substitute import Substitute
from ppl_gen.program.checks import require_enumerable
from ppl_gen.program.unlearned import leaves, read_whole

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["local_draws"]

POOL = 256  # draws of the prior that starting points are chosen from
COUNTS = 2000  # the same for latent counts, which no chain can move
WORK = 40_000_000  # rows times numbers that may be weighed for starting points
PAIRS = 64  # of chains at least: fewer say little of how a row mixes
ENOUGH = 50.0  # effective draws of the prior: modes then have their weights
FEW = 10.0  # effective draws below which weighed draws alone are no posterior
SHOWN = 5

Values = Mapping[str, Tensor]


def local_draws(fit: Fit, batch: Batch, draws: Sequence[Values]) -> list[dict[str, Tensor]]:
    r"""Each draw with its missing local latents added, :math:`z \sim p(z \mid x, \theta_s)`; inside ``fit.bound()``.

    By the first that applies: the program's own ``local_posterior``; the prior, where nothing of the rows is observed
    (or nothing observed depends on the site), which is then the posterior; exact enumeration of finite sites; for
    continuous ones, Hamiltonian chains in all rows at once, begun at weighed draws of the prior. Observed sites that
    are missing here and that others depend on are drawn likewise.

    Raises:
        IncompatibleError: naming the sites, for a program without a density, rows that are not independent, rows that
            no latents explain, and counts that too few draws of the prior explain.

    Warns:
        UserWarning: naming the site and the worst rows, where the chains of a row have not settled and few draws of
            the prior carry its weights.
    """
    result = [dict(draw) for draw in draws]
    unknown = _unknown(fit, batch, result[0])
    if unknown and fit.program.local_posterior is not None:
        for values in result:
            exact = fit.program.local_posterior(values, *batch.args, **batch.kwargs)
            values.update({name: exact[name].sample() for name in unknown if name in exact})
        unknown = {name: node for name, node in unknown.items() if name not in result[0]}
    if not unknown:
        return result
    unread = {*fit.info.predicted, *leaves(fit.program.model, batch, list(unknown), result[0])}
    free = [name for name in unknown if name in unread]
    asked = {name: node for name, node in unknown.items() if name not in free}
    finite = [name for name, node in asked.items() if _finite(node["fn"])]
    moved = [name for name in asked if name not in finite]
    require_enumerable(fit.info, finite)
    if moved:
        _require_density(fit, moved)
        for values, found in zip(result, _moved(fit, batch, result, moved, finite, free), strict=True):
            values.update(found)
    if finite:
        for values in result:
            values.update(_enumerated(fit, batch, values, finite, free))
    drawn = {site.name for site in fit.info.select()}.union(fit.info.predicted)
    if wanted := [name for name in free if name in drawn]:
        for values in result:
            trace = _run(fit, batch, values)
            values.update({name: trace.nodes[name]["value"] for name in wanted})
    return result


def _run(fit: Fit, batch: Batch, values: Values) -> poutine.Trace:
    with Substitute(values):
        return poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)


def _unknown(fit: Fit, batch: Batch, values: Values) -> dict[str, Any]:
    """Sites that this batch leaves without a value: latent ones, and observed ones that are missing here."""
    nodes = _run(fit, batch, values).nodes.items()
    return {n: node for n, node in nodes if is_sample(node) and not node["is_observed"] and n not in values}


def _finite(fn: Any) -> bool:
    return bool(getattr(fn.support, "is_discrete", False)) and bool(fn.has_enumerate_support)


def _require_density(fit: Fit, names: Sequence[str]) -> None:
    if "density" not in fit.info.offers:
        raise IncompatibleError(
            f"the latent site(s) {', '.join(names)} of {fit.program.name!r} cannot be drawn given rows: the program "
            "has no density to weigh them by, and nothing that was learned follows new rows (an amortised guide would)"
        )


def _enumerated(
    fit: Fit, batch: Batch, values: Values, finite: Sequence[str], hidden: Sequence[str]
) -> dict[str, Tensor]:
    """One joint draw of the finite sites given all else, each in the shape that it has in the program."""
    from ppl_gen.enumeration.marginals import enumerated_trace, sample_discrete
    from ppl_gen.handlers.hidden import Hidden

    trace = enumerated_trace(
        Hidden(hidden)(read_whole(fit.program.model, batch, fit.info, values)),
        batch.args,
        batch.kwargs,
        discrete=finite,
        values=values,
        plate_nesting=fit.info.plate_nesting,
        varying=True,
    )
    return sample_discrete(trace)


def _moved(
    fit: Fit, batch: Batch, draws: Sequence[Values], moved: list[str], finite: list[str], hidden: list[str]
) -> list[dict[str, Tensor]]:
    """The sites ``moved`` given the rows, in their shapes, a mapping for each draw; the ``finite`` ones summed out."""
    outside = [n for n in moved if n in fit.info.sites and not fit.info.sites[n].local]
    if outside:
        raise IncompatibleError(
            f"{fit.algorithm} learned no posterior of {', '.join(outside)} in {fit.program.name!r}, which stand "
            "outside its data plate"
        )
    enough = [draws[s % len(draws)] for s in range(max(len(draws), PAIRS))]
    model = read_whole(fit.program.model, batch, fit.info, draws[0])
    density = RowDensity(model, batch, fit.info, enough, moved=moved, sums=finite, hidden=hidden)
    if not density.together:
        raise IncompatibleError(
            f"the latent site(s) {', '.join(moved)} of {fit.program.name!r} cannot be drawn given new rows in any "
            f"reasonable time, as the program does not run on many draws at once ({density.why}). Give it a "
            "`local_posterior` or an amortised guide, or write it without Python that looks at drawn values"
        )
    target = torch.arange(len(enough)).repeat_interleave(2)
    counts = any(place.discrete for place in density.places.values())
    start, width, effective = _started(density, target, COUNTS if counts else POOL)
    if counts:
        _check_weighed(fit, moved, effective)
        return density.values(start[0 : 2 * len(draws) : 2])
    chains = run_chains(lambda u, chains: density.log_density(u, target[chains]), start, width)
    lost = ~chains.log_density.isfinite().all(0)
    if bool(lost.any()):
        raise IncompatibleError(
            f"no latents were found that explain {_rows(lost)} of the data: the density of {', '.join(moved)} given "
            f"these rows is zero wherever {fit.program.name!r} was tried"
        )
    if bool((far := ~chains.ends.isfinite().all(-1).all(0)).any()):
        raise IncompatibleError(
            f"the latent site(s) {', '.join(moved)} of {fit.program.name!r} have no posterior in {_rows(far)} of the "
            "data: their density there does not fall off, as under a mask that hides the prior and what is observed"
        )
    poor = ~chains.settled & (effective < ENOUGH)
    if bool(poor.any()):
        names, worst = ", ".join(moved), _rows(poor, chains.forgetting)
        warnings.warn(
            f"latent site(s) {names}: the draws of {worst} are not to be trusted as a posterior: the chains of these "
            f"rows had not settled ({float(chains.acceptance[poor].min()):.2f} of the moves accepted at worst), and "
            f"{float(effective[poor].min()):.1f} of {POOL} draws of the prior carry their weights. An amortised guide, "
            "or a `local_posterior` of the program, would do it better",
            UserWarning,
            stacklevel=6,
        )
    return density.values(chains.ends[0 : 2 * len(draws) : 2])


def _started(density: RowDensity, target: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Points of the prior chosen by their weights, one for each chain and row; its width; how many carry each row.

    Chains x rows x numbers; rows x numbers; rows. ``target``: for each chain the number of its draw of the globals.
    A pool of prior draws serves all chains: drawn at theta_j, a point u weighs p(x, u | theta_s) / p(u | theta_j).
    """
    own = torch.arange(most) % len(density.draws)
    pool = torch.stack([density.prior_point(j) for j in own.tolist()])
    log_q = density.log_density(pool, own, prior=True)
    size = min(most // 4, max(8, WORK // (len(target) * density.cells)))
    points, effective = [], []
    for chains in target.split(max(1, MAX_ELEMENTS // (size * density.cells))):
        chosen = torch.rand(len(chains), len(pool)).argsort(1)[:, :size]  # others for each chain: no two begin as one
        each = chosen.flatten()
        log_w = density.log_density(pool[each], chains.repeat_interleave(size)) - log_q[each]
        log_w = log_w.nan_to_num(-torch.inf, torch.inf, -torch.inf).unflatten(0, (len(chains), size))
        best = (log_w - torch.empty_like(log_w).exponential_().log()).argmax(1)  # Gumbel's trick: a draw by weight
        points.append(pool[chosen.gather(1, best), torch.arange(pool.shape[1])])
        effective.append(torch.exp(2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).nan_to_num(0.0))
    return torch.cat(points), pool.std(0), torch.cat(effective).quantile(0.1, 0)


def _check_weighed(fit: Fit, names: Sequence[str], effective: Tensor) -> None:
    few = effective < FEW
    if bool(few.any()):
        raise IncompatibleError(
            f"latent site(s) {', '.join(names)} of {fit.program.name!r} hold counts without a bound, which are drawn "
            f"by weighing {COUNTS} draws of the prior; for {_rows(few, -effective)} fewer than {FEW:.0f} of these "
            "have most of the weight. Write the counts with finite support, or give an amortised guide"
        )


def _rows(chosen: Tensor, badness: Tensor | None = None) -> str:
    """Rows by number, the worst first."""
    found = chosen.nonzero().squeeze(-1)
    if badness is not None:
        found = found[badness[found].argsort(descending=True)]
    shown = ", ".join(map(str, found[:SHOWN].tolist()))
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"row{'s' if len(found) > 1 else ''} {shown}{more} (of {len(chosen)})"
