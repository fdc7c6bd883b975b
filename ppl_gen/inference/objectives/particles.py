"""Importance-weighted particles of local latents, vectorised where the program allows it, unrolled where not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.plate_messenger import PlateMessenger
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.dryrun import ProgramInfo
from ppl_gen.inference.objectives.elbo import is_sample

__all__ = ["LocalParticles", "LogWeights", "can_vectorise", "local_log_weights", "sampled"]


class LocalParticles(PlateMessenger):
    """A plate of particles left of all others, around those sites only that stand inside the data plate."""

    def __init__(self, count: int, data_plate: str, nesting: int) -> None:
        super().__init__("_particles", count, dim=-1 - nesting)
        self.data_plate = data_plate

    def _process_message(self, msg: Any) -> None:
        if any(frame.name == self.data_plate for frame in msg["cond_indep_stack"]):
            super()._process_message(msg)


class Substitute(Messenger):
    """Latent sites take the given values and stay latent: their prior terms can be counted or left out."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


@dataclass(frozen=True)
class LogWeights:
    """log w of one batch: ``rows`` particles x rows (None without a data plate), ``globals`` a scalar."""

    rows: Tensor | None
    globals: Tensor


def sampled(
    guide: Callable[..., Any] | None, batch: Batch, values: Mapping[str, Tensor] | None = None
) -> poutine.Trace:
    """A trace of the guide with some sites at given values."""
    if guide is None:
        return poutine.trace(lambda *a, **k: None).get_trace(*batch.args, **batch.kwargs)
    with Substitute(values or {}):
        return poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)


def can_vectorise(
    model: Callable[..., Any], guide: Callable[..., Any] | None, info: ProgramInfo, batch: Batch, sums: tuple[str, ...]
) -> bool:
    """Whether particles as one more dimension on the left go through networks and shapes of this program."""
    if sums or info.data_plate is None:
        return False
    try:
        with torch.no_grad():
            weights = _vectorised(model, guide, info, batch, 2, {})
            return tuple(weights.rows.shape) == (2, batch.rows) if weights.rows is not None else False
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return False  # convolutions and batch norm refuse the extra dimension: unroll instead


def local_log_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    info: ProgramInfo,
    batch: Batch,
    particles: int,
    *,
    values: Mapping[str, Tensor],
    sums: tuple[str, ...] = (),
    vectorise: bool,
) -> LogWeights:
    r"""log w_ki = log p(x_i, z_ki | theta) - log q(z_ki | x_i) per particle and row, at global values ``values``.

    Latent sites that the guide does not draw come from the model's own prior (their terms cancel) or, named in
    ``sums``, are summed out. No plate scale enters: it belongs outside every logsumexp.
    """
    if vectorise:
        return _vectorised(model, guide, info, batch, particles, values)
    drawn = [_single(model, guide, info, batch, values, sums) for _ in range(particles)]
    rows = None if drawn[0].rows is None else torch.stack([w.rows for w in drawn if w.rows is not None])
    return LogWeights(rows, torch.stack([w.globals for w in drawn]).mean(0))


def _vectorised(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    info: ProgramInfo,
    batch: Batch,
    count: int,
    values: Mapping[str, Tensor],
) -> LogWeights:
    assert info.data_plate is not None
    with LocalParticles(count, info.data_plate, info.plate_nesting):
        q = sampled(guide, batch, values)
        p = poutine.trace(poutine.replay(_substituted(model, values), trace=q)).get_trace(*batch.args, **batch.kwargs)
    return _collect(p, q, info, count, values)


def _single(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    info: ProgramInfo,
    batch: Batch,
    values: Mapping[str, Tensor],
    sums: tuple[str, ...],
) -> LogWeights:
    q = sampled(guide, batch, values)
    if not sums:
        p = poutine.trace(poutine.replay(_substituted(model, values), trace=q)).get_trace(*batch.args, **batch.kwargs)
        weights = _collect(p, q, info, 1, values)
        return LogWeights(None if weights.rows is None else weights.rows[0], weights.globals)
    from ppl_gen.inference.enumeration import enumerated_trace, log_prior, row_log_density

    drawn = {name: site["value"] for name, site in q.nodes.items() if is_sample(site)}
    known = {name: value for name, value in {**drawn, **values}.items() if name in info.sites}
    p = enumerated_trace(model, batch.args, batch.kwargs, discrete=sums, values=known, plate_nesting=info.plate_nesting)
    rows = row_log_density(p, info.data_plate)
    minus_q = _collect(None, q, info, 1, values)
    local = rows if minus_q.rows is None else rows + minus_q.rows[0]
    return LogWeights(local, log_prior(p, info.data_plate) + minus_q.globals)


def _substituted(model: Callable[..., Any], values: Mapping[str, Tensor]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with Substitute(values):
            return model(*args, **kwargs)

    return run if values else model


def _collect(
    p: poutine.Trace | None, q: poutine.Trace, info: ProgramInfo, count: int, values: Mapping[str, Tensor]
) -> LogWeights:
    rows: Tensor | None = None
    total = torch.zeros(())
    for trace, sign in ((p, 1.0), (q, -1.0)):
        for name, site in trace.nodes.items() if trace is not None else ():
            if not is_sample(site):
                continue
            if trace is p and not site["is_observed"] and name not in q.nodes and name not in values:
                continue  # drawn from the prior: the term and the proposal cancel
            value = _unplated(site, info)
            if any(frame.name == info.data_plate for frame in site["cond_indep_stack"]):
                value = _by_particle(value, info, count)
                rows = sign * value if rows is None else rows + sign * value
            else:
                total = total + sign * value.sum()
    return LogWeights(rows, total)


def _unplated(site: dict[str, Any], info: ProgramInfo) -> Tensor:
    """The log density with the user's own scale and mask, without the data plate's N / B."""
    value = site["fn"].log_prob(site["value"])
    scale = site["scale"]
    for frame in site["cond_indep_stack"]:
        if frame.name == info.data_plate and frame.full_size and frame.full_size != frame.size:
            scale = scale * frame.size / frame.full_size
    if site["mask"] is not None:
        value = torch.where(torch.as_tensor(site["mask"]), value, value.new_zeros(()))
    return value * scale


def _by_particle(value: Tensor, info: ProgramInfo, count: int) -> Tensor:
    """Reduce a site's log density to particles x rows: sum what lies right of the rows and between."""
    dim = info.plate_dim if info.plate_dim is not None else -1
    if dim < -1:
        value = value.sum(tuple(range(dim + 1, 0)))
    lead = info.plate_nesting + dim  # vectorised plates left of the data plate
    value = value[(None,) * max(0, lead + 2 - value.dim())]
    if lead:
        value = value.sum(tuple(range(-1 - lead, -1)))
    return value.expand(count, value.shape[-1])
