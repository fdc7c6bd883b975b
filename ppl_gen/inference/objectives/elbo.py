"""The evidence lower bound, with the gradient estimator of every site chosen from the dry run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.utils._pytree import tree_map

from ppl_gen.arguments import require_choice
from ppl_gen.capture.tape import RecordingRefused
from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError, require_flag, require_number, require_whole
from ppl_gen.handlers.private import HANDLERS
from ppl_gen.handlers.rank_noise import RankNoise
from ppl_gen.handlers.rescale import RescalePlate, Weigh
from ppl_gen.handlers.sites import in_plate, is_sample, log_density, own_scale, parallel, scaled
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.estimators import Estimators, choose_estimators, refuse_tied_rows
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Setting
from ppl_gen.inference.objectives.time_steps import TimeStepGame
from ppl_gen.inference.objectives.tracing import analytic_kl, traces, weighed_alike
from ppl_gen.program.offers import Need
from ppl_gen.weights.at_once import at_once, can_go_at_once
from ppl_gen.workspace.closures import functions_of
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["ELBO"]

#: Parts of the loss by name, and of each score-function site its cost and log q.
_Draw = tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class ELBO(Objective):
    r"""The evidence lower bound, E_q[log p(x, z) - log q(z | x)] <= log p(x).

    The loss is its negative in nats per row. For every latent site the estimator with the least variance is chosen
    from the dry run and reported in ``fit.notes``: finite discrete sites are summed out; the divergence of a
    reparameterised site is taken in closed form where torch registers one and the guide draws the sites in the
    model's order; what has no reparameterisation gets the score function with a running-mean baseline per site.
    A program that offers ``time steps`` is entered at one sampled step of its chain.

    The draws of a step are made at once where a trial shows that each comes to what it comes to alone, and one by one
    where it does not: numbers read into Python, buffers written (batch norm), draws of NumPy, anything that the program
    keeps from one run to the next. ``fit.notes["particles"]`` says "vectorised" or "unrolled". Where a guide's
    sites are summed out, at time steps, and in fits of several processes they are made one by one.

    With ``beta`` other than 1 the divergence of the latents is weighed, E_q[log p(x | z)] - beta KL(q || p): a bound
    for beta >= 1 only. The program's own density, and so `fit.evidence`, stays what it was.

    Args:
        particles: draws of the guide averaged in each step.
        enumerate: sum finite discrete sites out (True), or use the score function for them (False).
        time_step: "sampled" enters a chain at one random step; "all" runs the whole of model and guide.
        beta: weight of log q(z | x) - log p(z) at every latent site of the guide, at least 0.

    Raises:
        ValueError: if ``particles`` < 1, ``beta`` < 0 or ``time_step`` is neither of the two.
        IncompatibleError: when built with a ``beta`` for a program whose latents are summed out in the model, or
            entered at a sampled time step: no divergence is left there to weigh.

    Source: Jordan et al. (1999); Kingma and Welling (2014); Mnih and Gregor (2014) for the baseline; Higgins et al.
    (2017) for beta.

    Example:
        >>> ELBO(particles=2)
        ELBO(particles=2, enumerate=True, time_step='sampled', beta=1.0)
    """

    particles: int = 1
    enumerate: bool = True
    time_step: str = "sampled"
    beta: float = 1.0

    def __post_init__(self) -> None:
        require_whole("particles", self.particles)
        require_number("beta", self.beta)
        require_flag("enumerate", self.enumerate)
        require_choice("time_step", self.time_step, ("sampled", "all"))

    @property
    def needs(self) -> Sequence[Need]:
        return (("density",),)

    def build(self, setting: Setting) -> Game:
        if setting.program.time_steps is not None and self.time_step == "sampled":
            self._refuse_beta("its chain is entered at one time step", 'time_step="all" runs the whole chain')
            return TimeStepGame(setting, self.particles)
        estimators = choose_estimators(setting, self.enumerate)
        if estimators.model_sums:
            names = ", ".join(estimators.model_sums)
            self._refuse_beta(f"{names} are summed out in the model", "draw them in the guide")
        if self.beta != 1:
            setting = _weighed(setting, self.beta)
        refuse_tied_rows(setting, estimators.model_sums)
        if estimators.guide_sums:
            return _EnumeratedGuideGame(setting, estimators, self.particles)
        return _SampledGame(setting, estimators, self.particles)

    def undivided(self, setting: Setting) -> str | None:
        return None  # linear in the mean over rows: sums over global sites in the model are refused on minibatches

    def _refuse_beta(self, why: str, edit: str) -> None:
        if self.beta != 1:
            raise IncompatibleError(f"beta={self.beta}: {why}, so no divergence is left to weigh; {edit}")


def _weighed(setting: Setting, beta: float) -> Setting:
    """Both sides of the divergence: an autoguide's log q stands at auxiliary sites, which the model does not know."""
    latent = [site.name for site in setting.info.select()]
    guide = None if setting.guide is None else Weigh(None, beta)(setting.guide)
    return replace(setting, model=Weigh(latent, beta)(setting.model), guide=guide)


class _SampledGame(Game):
    """Guide sites drawn; discrete sites that only the model has summed out exactly given them."""

    def __init__(self, setting: Setting, estimators: Estimators, particles: int) -> None:
        self.setting, self.estimators, self.particles = setting, estimators, particles
        self.notes = estimators.notes()
        self.vectorise = particles > 1 and can_go_at_once(
            partial(self._draw, setting.probe), functions_of(setting.program, setting.guide)
        )
        if particles > 1:
            self.notes["particles"] = "vectorised" if self.vectorise else "unrolled"

    def init(self, batch: Batch) -> GameState:
        """The baseline of each score-function site: a mean cost.

        Of a draw of its own: a baseline made of the very cost it is taken from would bias the first step.
        """
        if not self.estimators.score:
            return {}
        with torch.no_grad():
            return self._scored(self._draw(batch)[1], {}, batch)[1]

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        parts, scored = self._draws(batch)
        loss, reconstruction, kl = (parts[name].mean() for name in ("loss", "reconstruction", "kl"))
        terms = []
        for k in range(self.particles if scored else 0):
            one = {name: (cost[k], log_q[k]) for name, (cost, log_q) in scored.items()}
            term, state = self._scored(one, state, batch)
            terms.append(term)
        surrogate = loss + torch.stack(terms).mean() if terms else loss
        return Loss(surrogate, {"reconstruction": reconstruction.detach(), "kl": kl.detach()}), state

    def _draws(self, batch: Batch) -> _Draw:
        """`_draw` for every particle, first dim, all at once where the program was seen to allow it."""
        one = partial(self._draw, batch)
        # Where several processes share a batch, the noise of a row has its place in tensors of single particles.
        if self.vectorise and not any(isinstance(handler, RankNoise) for handler in HANDLERS):
            if is_validation_enabled():
                with without_side_effects():
                    one()  # the checks look at numbers, of one particle alone; what is drawn for them does not count
            try:
                together: _Draw = at_once(one, self.particles)
                return together
            except RecordingRefused:
                raise
            except PROGRAM_ERRORS:
                pass  # a way through the program that the trial did not take
        singles = [one() for _ in range(self.particles)]
        found: _Draw = tree_map(lambda *values: torch.stack(values), singles[0], *singles[1:])
        return found

    def _draw(self, batch: Batch) -> _Draw:
        """The parts of the loss at one draw, scalars in nats per row; of score-function sites the cost and log q."""
        guide, model = traces(self.setting, batch)
        rows = batch.total or 1
        touched, likelihood = self._log_likelihood(guide, model, batch)
        kl, reconstruction = self._kl(guide, model, touched), -likelihood
        loss = (reconstruction + kl) / rows
        scored = {}
        for name in self.estimators.score:
            cost = self._row_costs(guide, model) * (self._shown(name, batch) / rows) if self._by_rows(name) else loss
            log_q = log_density(guide.nodes[name])
            scored[name] = cost.detach(), self._by_row(log_q) if cost.dim() else log_q.sum()
        return {"loss": loss, "reconstruction": reconstruction / rows, "kl": kl / rows}, scored

    def _by_rows(self, name: str) -> bool:
        """Whether each row has a cost of its own at a score-function site."""
        return self.setting.info.sites[name].local and not self.estimators.model_sums

    def _shown(self, name: str, batch: Batch) -> int:
        """Costs of a row are in nats, whatever the size of the batch: a baseline stays one where batches differ."""
        return (batch.rows or 1) if self._by_rows(name) else 1

    def _scored(
        self, scored: Mapping[str, tuple[Tensor, Tensor]], baseline: GameState, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What one particle's score-function sites add to the surrogate, a scalar; and the baselines after it."""
        terms, after = [], dict[str, Tensor]()
        for name, (cost, log_q) in scored.items():
            term, after[name] = self._score_term(cost, log_q, baseline.get(name))
            terms.append(term / self._shown(name, batch))
        return torch.stack(terms).sum(), after

    def _row_costs(self, guide: poutine.Trace, model: poutine.Trace) -> Tensor:
        """The part of the loss that each row contributes, shape (rows,): all that a site of that row can influence."""
        total = torch.zeros(())
        for trace, sign in ((guide, 1.0), (model, -1.0)):
            for site in trace.nodes.values():
                if is_sample(site) and in_plate(site, self.setting.info.data_plate):
                    total = total + sign * self._by_row(scaled(log_density(site), site))
        return total

    def _by_row(self, value: Tensor) -> Tensor:
        """A log density of the batch shape of its site, summed over everything but the rows: shape (rows,)."""
        dim = self.setting.info.plate_dim or -1
        value = value.sum(tuple(range(dim + 1, 0))) if dim < -1 else value
        return value.flatten(0, -2).sum(0) if value.dim() > 1 else value

    def _kl(self, guide: poutine.Trace, model: poutine.Trace, touched: Collection[str]) -> Tensor:
        """Sum of log q - log p over the guide's sites, a scalar; priors of those ``touched`` are counted elsewhere."""
        total = torch.zeros(())
        for name, q in guide.nodes.items():
            if not is_sample(q):
                continue
            p = model.nodes.get(name)
            if name in self.estimators.analytic and name not in touched and weighed_alike(q, p):
                total = total + scaled(analytic_kl(q["fn"], p["fn"]), q).sum()
                continue
            total = total + scaled(log_density(q), q).sum()
            if p is not None and is_sample(p) and name not in touched:
                total = total - scaled(log_density(p), p).sum()
        return total

    def _log_likelihood(self, guide: poutine.Trace, model: poutine.Trace, batch: Batch) -> tuple[set[str], Tensor]:
        """What the guide does not draw: the data, factors, and sums over discrete sites (see `_summed`)."""
        if self.estimators.model_sums:
            return self._summed(guide, batch)
        total = torch.zeros(())
        for name, site in model.nodes.items():
            if is_sample(site) and name not in guide.nodes:
                total = total + scaled(log_density(site), site).sum()
        return set(), total

    def _summed(self, guide: poutine.Trace, batch: Batch) -> tuple[set[str], Tensor]:
        """The guide's sites whose priors depend on discrete sites; the log density of these, the data and factors."""
        from ppl_gen.enumeration.contraction import dims_of
        from ppl_gen.enumeration.enumerated_trace import packed_sites, summed_symbols
        from ppl_gen.enumeration.marginals import enumerated_trace, log_prior, row_log_density

        info = self.setting.info
        trace = enumerated_trace(
            self.setting.model,
            batch.args,
            batch.kwargs,
            discrete=self.estimators.model_sums,
            values={n: s["value"] for n, s in guide.nodes.items() if s["type"] == "sample"},
            plate_nesting=info.plate_nesting,
            varying=True,
        )
        symbols, drawn = summed_symbols(trace), [n for n, s in guide.nodes.items() if is_sample(s)]
        dims = {name: dims_of(site["packed"]["unscaled_log_prob"]) for name, site in packed_sites(trace)}
        touched = {name for name in drawn if not symbols.isdisjoint(dims.get(name, ""))}
        others = [name for name in drawn if name not in touched]
        plate = info.rows_plate(self.estimators.model_sums)
        rows = row_log_density(trace, plate, without=others).sum() * (batch.rescale * own_scale(trace, plate))
        return touched, rows + log_prior(trace, plate, without=others)

    def _score_term(self, cost: Tensor, log_q: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """(cost - baseline) grad log q, of value zero and with the score-function gradient; and the next baseline.

        ``cost`` and ``log_q`` have shape (rows,), or are scalars for all rows together; what is returned are scalars.
        """
        mean = cost.mean() if mean is None else mean
        return ((cost - mean) * (log_q - log_q.detach())).sum(), 0.9 * mean + 0.1 * cost.mean()


class _EnumeratedGuideGame(Game):
    """Discrete guide sites summed out through Pyro's contraction (TraceEnum), which weighs every cost by its q."""

    def __init__(self, setting: Setting, estimators: Estimators, particles: int) -> None:
        self.setting, self.particles = setting, particles
        drawn = (*estimators.analytic, *estimators.reparameterised)  # its divergences are all taken from draws
        self.notes = replace(estimators, analytic=(), reparameterised=drawn).notes()
        sums = {*estimators.model_sums, *estimators.guide_sums}
        self.model = poutine.infer_config(setting.model, parallel(sums))
        self.guide = poutine.infer_config(setting.guide, parallel(sums))

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        from pyro.infer import TraceEnum_ELBO

        from ppl_gen.handlers.expectation import expected_elbo

        total = torch.zeros(())
        elbo = TraceEnum_ELBO(max_plate_nesting=self.setting.info.plate_nesting)
        with RescalePlate(self.setting.info.data_plate, batch.total):
            for _ in range(self.particles):
                for model, guide in elbo._get_traces(self.model, self.guide, batch.args, batch.kwargs):
                    total = total - expected_elbo(model, guide) / self.particles
        return Loss(total / (batch.total or 1)), state
