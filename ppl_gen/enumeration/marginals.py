r"""Exact sums over the finite discrete latent sites of a program: row densities, responsibilities, EM's Q, joint draws.

A program is traced once with its discrete sites enumerated in parallel (`pyro.markov` respected) and its other latent
sites held at given values; every quantity is then a contraction of that trace:

.. math:: \log p(x_i \mid \theta) = \log \sum_{z_i} \prod_f f(x_i, z_i, \theta).

The gradient of the total with respect to each log-factor is that factor's posterior marginal (Darwiche, "A Differential
Approach to Inference in Bayesian Networks", 2003), pairwise marginals of a hidden Markov chain included, so that EM
needs no forward-backward pass of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.ops import packed
from pyro.poutine import Trace
from torch import Tensor

from ppl_gen.enumeration.contraction import Factor, Step, backward_draws, contract, dims_of, named
from ppl_gen.enumeration.enumerated_trace import (
    batch_shape,
    enumerated_trace,
    is_discrete,
    outer_plates,
    packed_sites,
    summed_symbols,
)
from ppl_gen.handlers.sites import in_plate, support

__all__ = [
    "FactorMarginals",
    "discrete_marginals",
    "drawn",
    "eliminated",
    "enumerated_trace",
    "expected_log_joint",
    "factor_marginals",
    "log_joint",
    "log_prior",
    "row_log_density",
    "sample_discrete",
]


class FactorMarginals(NamedTuple):
    """The E-step: log-density of all rows (a scalar), and by site the posterior marginals that weigh its log-prob.

    ``weights[site]`` is packed as the site's log-prob is; its attribute ``_pyro_dims`` holds the dim symbols.
    """

    log_density: Tensor
    weights: dict[str, Tensor]


def _plate_frame(trace: Trace, data_plate: str) -> Any:
    frames = {f.name: f for _, site in packed_sites(trace) for f in site["cond_indep_stack"]}
    if data_plate not in frames:
        raise ValueError(f"no site lies in a plate named '{data_plate}'; the plates are {sorted(frames)}.")
    if not frames[data_plate].vectorized:
        raise ValueError(
            f"plate '{data_plate}' is a for loop; write it vectorised: `with pyro.plate('{data_plate}', len(x)):`."
        )
    return frames[data_plate]


def _dims(site: Any) -> str:
    return dims_of(site["packed"]["unscaled_log_prob"])


def _local(trace: Trace, data_plate: str | None) -> dict[str, bool]:
    """By site: does it belong to the rows (inside the data plate, or touched by a discrete site), or to the prior?"""
    symbols = summed_symbols(trace)

    def belongs(site: Any) -> bool:
        if is_discrete(site) or not symbols.isdisjoint(_dims(site)):
            return True
        if data_plate is None:
            return bool(site["is_observed"])
        return in_plate(site, data_plate)

    return {name: belongs(site) for name, site in packed_sites(trace)}


def _factor(trace: Trace, name: str, data_plate: str | None, log_prob: Tensor | None = None) -> Factor:
    """The masked log-factor of a site; ``log_prob`` stands in for its packed log-prob.

    A mask is not applied to an enumerated site, as in Pyro: a masked table of zeros would sum to the number of states,
    where leaving the site out has to give one, which its prior does.
    """
    site = trace.nodes[name]
    value = site["packed"]["unscaled_log_prob"] if log_prob is None else log_prob
    if not is_discrete(site):
        value = packed.scale_and_mask(value, mask=site["packed"]["mask"])
    scale = site["packed"]["scale"]
    for frame in site["cond_indep_stack"]:
        if frame.name == data_plate and frame.full_size is not None and frame.full_size != frame.size:
            factor = frame.size / frame.full_size
            scale = named(scale * factor, dims_of(scale)) if isinstance(scale, Tensor) else scale * factor
    plates = (f for f in site["cond_indep_stack"] if f.vectorized and f.size > 1)
    return Factor(name, value, frozenset(trace.plate_to_symbol[f.name] for f in plates), scale)


def row_log_density(trace: Trace, data_plate: str | None = "data", *, without: Collection[str] = ()) -> Tensor:
    r"""The log-density of each row with its discrete sites summed out, given everything outside the data plate.

    .. math:: \log p(x_i \mid \theta) = s_i \log \sum_{z_i} p(z_i \mid \theta)\, p(x_i \mid z_i, \theta)

    Sites inside the data plate count, observed, discrete and given ones (leave some out by ``without``), masks applied.
    The scale of the data plate's own subsampling is left out; a `poutine.scale` ``s`` multiplies the row's logarithm.
    Shape ``(rows,)``, and ``(1,)`` for ``data_plate=None``: the log-density of all that is observed, given the latent
    sites with values. Raises ValueError for a discrete site outside the plate, which couples the rows.
    """
    frame = None if data_plate is None else _plate_frame(trace, data_plate)
    names = [name for name, local in _local(trace, data_plate).items() if local and name not in without]
    rows = 1 if frame is None else frame.size
    if frame is not None:
        _refuse_coupled_rows(trace, names, frame.name)
    if not names:
        raise ValueError("nothing is observed, enumerated or given inside the rows.")
    keep = trace.plate_to_symbol[frame.name] if frame is not None and rows > 1 else ""
    return contract([_factor(trace, n, data_plate) for n in names], summed_symbols(trace), keep).reshape(rows)


def _refuse_coupled_rows(trace: Trace, names: Sequence[str], data_plate: str) -> None:
    for name in names:
        site = trace.nodes[name]
        if not in_plate(site, data_plate):
            what = "is discrete" if is_discrete(site) else "depends on a discrete site"
            raise ValueError(
                f"site '{name}' {what} and lies outside plate '{data_plate}', so that the rows are not independent and "
                "have no densities of their own; give it a value, or use log_joint, which sums over it."
            )


def log_prior(trace: Trace, data_plate: str | None = "data", *, without: Collection[str] = ()) -> Tensor:
    """The summed log-probs outside the rows: global latent sites at their values, and factor statements beside them.

    With ``data_plate=None``: the latent sites with values (those whose density depends on a discrete site excepted).
    A scalar; zero where there are none.
    """
    names = [name for name, local in _local(trace, data_plate).items() if not local and name not in without]
    factors = [_factor(trace, name, data_plate) for name in names]
    return contract(factors, frozenset()) if factors else torch.zeros(())


def log_joint(trace: Trace, data_plate: str | None = "data") -> Tensor:
    """``log_prior`` plus the sum over the rows, a scalar; discrete sites outside the data plate are summed over too."""
    names = [name for name, local in _local(trace, data_plate).items() if local]
    prior = log_prior(trace, data_plate)
    return prior + contract([_factor(trace, n, data_plate) for n in names], summed_symbols(trace)) if names else prior


def factor_marginals(trace: Trace, data_plate: str | None = "data") -> FactorMarginals:
    r"""E-step: the log-density of all rows and, by site, the posterior marginals of its factor.

    .. math:: w_f(k) = \partial \log p(x) / \partial \log f(k) = p(z_f = k \mid x)

    Masks and scales are inside the weights: a masked entry weighs nothing. Everything is detached.
    """
    names = [name for name, local in _local(trace, data_plate).items() if local]
    return _marginals(trace, names, data_plate)


def _marginals(trace: Trace, names: Sequence[str], data_plate: str | None, *, scaled: bool = True) -> FactorMarginals:
    """As `factor_marginals`, over the sites ``names``; not ``scaled``: without the scales of their factors."""
    log_probs = {name: trace.nodes[name]["packed"]["unscaled_log_prob"] for name in names}
    with torch.enable_grad():
        leaves = {n: named(lp.detach().requires_grad_(), dims_of(lp)) for n, lp in log_probs.items()}
        factors = [_factor(trace, name, data_plate, leaf) for name, leaf in leaves.items()]
        if not scaled:
            factors = [Factor(f.site, f.value, f.plates) for f in factors]
        total = contract(factors, summed_symbols(trace))
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    weights = {
        name: named(torch.zeros_like(leaf) if gradient is None else gradient, dims_of(leaf))
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    return FactorMarginals(total.detach(), weights)


def expected_log_joint(trace: Trace, weights: Mapping[str, Tensor], data_plate: str | None = "data") -> Tensor:
    r"""EM's Q, a scalar: the expected complete log-joint of the rows under the weights of an earlier E-step.

    .. math:: Q(\theta) = \sum_f \langle w_f, \log f_\theta \rangle

    ``trace`` is one of the same program and data at other values; Q is differentiable with respect to these. At the
    values of the E-step its gradient is that of the log-density (Fisher's identity). Raises ValueError where weights
    and trace do not match.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def mixture(x, mean):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Bernoulli(0.25))
    ...         pyro.sample("x", dist.Normal(mean * z, 1.0), obs=x)
    >>> mean = torch.tensor(1.0, requires_grad=True)
    >>> trace = enumerated_trace(mixture, (torch.ones(3), mean), plate_nesting=1)
    >>> q = expected_log_joint(trace, factor_marginals(trace).weights)
    >>> by_q = torch.autograd.grad(q, mean, retain_graph=True)[0]
    >>> bool((by_q - torch.autograd.grad(row_log_density(trace).sum(), mean)[0]).abs() < 1e-6)
    True
    """
    names = [name for name, local in _local(trace, data_plate).items() if local]
    if set(names) != set(weights):
        raise ValueError(f"the weights are for sites {sorted(weights)}; the rows of this trace have {sorted(names)}.")
    total: Tensor | None = None
    for name in names:
        log_prob, weight = trace.nodes[name]["packed"]["unscaled_log_prob"], weights[name]
        if log_prob.shape != weight.shape:
            raise ValueError(
                f"site '{name}': the weights have shape {tuple(weight.shape)}, its log-prob {tuple(log_prob.shape)}; "
                "the E-step's trace must come from the same program and the same data."
            )
        # An impossible state has log-prob minus infinity and weight zero: its term is zero, and so is its gradient.
        used = weight != 0
        term = (weight * torch.where(used, log_prob, 0.0)).sum()
        total = term if total is None else total + term
    return torch.zeros(()) if total is None else total


def discrete_marginals(trace: Trace) -> dict[str, Tensor]:
    """Responsibilities: for each discrete site the posterior probabilities of its values, last dim.

    Shape: the site's own batch shape (the plates around it), then the number of its values. Rows sum to one.
    """
    symbols = summed_symbols(trace)
    touched = [name for name, site in packed_sites(trace) if is_discrete(site) or not symbols.isdisjoint(_dims(site))]
    weights = _marginals(trace, touched, None, scaled=False).weights if touched else {}
    marginals = {}
    for name, site in packed_sites(trace):
        if is_discrete(site):
            weight, own = weights[name], site["infer"]["_enumerate_symbol"]
            plates = [trace.plate_to_symbol[f.name] for f in outer_plates(site)]
            others = [i for i, d in enumerate(dims_of(weight)) if d != own and d not in plates]
            dims = "".join(d for d in dims_of(weight) if d == own or d in plates)
            table = weight.sum(others) if others else weight
            order = [d for d in plates if d in dims] + [d for d in own if d in dims]
            table = table.permute([dims.index(d) for d in order]).reshape(*batch_shape(site), len(support(site)))
            marginals[name] = table
    return marginals


def sample_discrete(
    trace: Trace,
    *,
    draws: int | None = None,
    generator: torch.Generator | None = None,
    sites: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Joint draws of all discrete sites (or of ``sites`` only) from their posterior given all else in the trace.

    On a hidden Markov chain: whole paths, by forward filtering and backward sampling. Values have the shape that the
    program sees (no enumeration dims), with ``draws`` in front if given. `poutine.scale` does not temper the posterior.
    Raises ValueError where the data has density zero, so that there is no posterior.
    """
    total, steps = eliminated(trace)
    if not torch.isfinite(total):
        raise ValueError("the data has density zero, or NaN, at these values: there is no posterior to draw from.")
    return drawn(trace, steps, sites=sites, draws=draws, generator=generator)


def eliminated(trace: Trace) -> tuple[Tensor, list[Step]]:
    """The log-density (a scalar) of what depends on discrete sites, summed out, and the eliminations `drawn` undoes."""
    symbols = summed_symbols(trace)
    steps: list[Step] = []
    with torch.no_grad():
        every = [_factor(trace, name, None) for name, _ in packed_sites(trace)]
        factors = [Factor(f.site, f.value, f.plates) for f in every if not symbols.isdisjoint(f.dims)]
        return (contract(factors, symbols, steps=steps) if factors else torch.zeros(())), steps


def drawn(
    trace: Trace,
    steps: Sequence[Step],
    *,
    sites: Collection[str] | None = None,
    draws: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """What `sample_discrete` gives of the discrete sites (of those in ``sites`` only, where given), after `eliminated`.

    Without a check, and so fit for ``torch.vmap(..., randomness="different")``.
    """
    chosen = {n: s for n, s in packed_sites(trace) if is_discrete(s) and (sites is None or n in sites)}
    count = 1 if draws is None else draws
    wanted = frozenset(site["infer"]["_enumerate_symbol"] for site in chosen.values())
    with torch.no_grad():
        indices = backward_draws(steps, count, generator, wanted)
        return {name: _values(trace, site, indices, draws, count) for name, site in chosen.items()}


def _values(trace: Trace, site: Any, indices: Mapping[str, Tensor], draws: int | None, count: int) -> Tensor:
    """The values of one site at packed indices: draws x batch shape x event, without draws where these are None."""
    values, shape = support(site), (count, *batch_shape(site))
    index = indices.get(site["infer"]["_enumerate_symbol"])
    if index is None:  # one value only
        index = torch.zeros(shape, dtype=torch.long, device=values.device)
    else:
        dims = dims_of(index)
        order = dims[0] + "".join(s for f in outer_plates(site) if (s := trace.plate_to_symbol[f.name]) in dims)
        index = index.permute([dims.index(d) for d in order]).reshape(shape)
    value = values[index]
    return value[0] if draws is None else value
