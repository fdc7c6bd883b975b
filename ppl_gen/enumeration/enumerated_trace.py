"""Tracing a program with its finite discrete sites enumerated, its other latent sites given, its log-probs packed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import pyro
from pyro import poutine
from pyro.ops import packed
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions.utils import probs_to_logits

from ppl_gen.handlers.enumerate_sites import EnumerateSites
from ppl_gen.handlers.sites import is_deterministic, is_subsample

__all__ = ["batch_shape", "enumerated_trace", "is_discrete", "outer_plates", "packed_sites", "summed_symbols"]


def enumerated_trace(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    discrete: Collection[str] | None = None,
    values: Mapping[str, Tensor] | None = None,
    plate_nesting: int,
    varying: bool = False,
) -> Trace:
    """Trace a program with its ``discrete`` sites enumerated and its other latent sites at the given ``values``.

    ``discrete=None`` enumerates every latent site without a value. Sites with values stay latent, marked by
    ``site["infer"]["given"]``. ``plate_nesting`` is the greatest number of nested vectorised plates. Log-probs are left
    packed in ``site["packed"]["unscaled_log_prob"]``, differentiable with respect to values, parameters and data.
    Nothing is drawn, unless a plate subsamples (give its indices as ``values[plate_name]`` to fix them). Many values at
    once: ``torch.vmap`` of a function that makes a trace and returns a density.

    Names in ``values`` that are no latent sites of the program (a guide's auxiliary ones, say) are passed over. Raises
    ValueError for a latent site that is neither given nor enumerable, for ``discrete`` names that the program lacks,
    for a wrong ``plate_nesting``, and where a loop without `pyro.markov` needs too many dims. ``varying`` passes over
    ``discrete`` names of sites that the program does not come to with these rows, as steps beyond the longest of them.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def mixture(x):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Bernoulli(0.25))
    ...         pyro.sample("x", dist.Normal(mean * z, 1.0), obs=x)
    >>> trace = enumerated_trace(mixture, (torch.zeros(3),), values={"mean": torch.tensor(1.0)}, plate_nesting=1)
    >>> from ppl_gen.enumeration.marginals import row_log_density
    >>> row_log_density(trace, "data")
    tensor([-1.0225, -1.0225, -1.0225])
    """
    values, discrete_sites = dict(values or {}), None if discrete is None else frozenset(discrete)
    both = sorted(set(values) & (discrete_sites or frozenset()))
    if both:
        raise ValueError(f"sites {both} are both in `discrete` and in `values`; a site is either summed over or given.")
    with pyro.validation_enabled(False):
        messenger = EnumerateSites(discrete_sites, values, plate_nesting)
        trace: Trace = poutine.trace(messenger(model)).get_trace(*args, **(kwargs or {}))
        for name, site in list(trace.nodes.items()):
            if site["type"] == "sample" and is_subsample(site):
                trace.remove_node(name)
        named = discrete_sites or frozenset()
        _check_discrete(trace, named & frozenset(trace.nodes) if varying else named)
        _pack(trace)
        _check_plates(trace)
    return trace


def _check_discrete(trace: Trace, discrete: Collection[str]) -> None:
    nodes: Mapping[str, Any] = trace.nodes
    latent = {n: s["infer"] for n, s in nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    unknown = sorted(name for name in discrete if "_enumerate_dim" not in latent.get(name, {}))
    if unknown:
        raise ValueError(
            f"`discrete` names {unknown}, but with this data the program has no such latent site; it has "
            f"{sorted(latent)}."
        )


def _pack(trace: Trace) -> None:
    """As Trace.compute_log_prob and pack_tensors, without the scaled copies and sums that nothing here reads."""
    trace.symbolize_dims()
    nodes: Mapping[str, Any] = trace.nodes
    for name, site in nodes.items():
        if site["type"] != "sample" or is_deterministic(site):
            continue
        symbols = site["infer"]["_dim_to_symbol"]
        log_prob = None
        try:
            _share_logits(site["fn"])
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            scale = site["scale"]
            site["packed"] = {
                "unscaled_log_prob": packed.pack(log_prob, symbols),
                "mask": packed.pack(site["mask"], symbols),
                "scale": packed.pack(scale, symbols) if isinstance(scale, Tensor) else scale,
            }
        except ValueError as error:
            said = str(error)
            if isinstance(log_prob, Tensor) and said.startswith("Invalid tensor shape"):
                said = _misplaced(trace, site, log_prob)
            raise ValueError(f"the log-prob of site '{name}' cannot be evaluated: {said}") from error


def _misplaced(trace: Trace, site: Any, log_prob: Tensor) -> str:
    """Which dims of a log-prob hold more than one number, and which of them stand for something."""
    symbols = site["infer"]["_dim_to_symbol"]
    names = {symbol: f"plate '{plate}'" for plate, symbol in trace.plate_to_symbol.items()}
    for name, other in trace.nodes.items():
        if other["type"] == "sample" and "_enumerate_symbol" in other["infer"]:
            names[other["infer"]["_enumerate_symbol"]] = f"'{name}' enumerated"
    shape = tuple(log_prob.shape)
    wide = [dim for dim in range(-len(shape), 0) if shape[dim] > 1]
    extra = [dim for dim in wide if dim not in symbols]
    known = ", ".join(f"{dim} ({names.get(s, 'of another site')})" for dim, s in sorted(symbols.items(), reverse=True))
    return (
        f"it has shape {shape}, where dim {', '.join(map(str, extra))} belongs to no plate and no enumerated site; "
        f"those are on dim {known or 'none'}. A value that was indexed or reshaped with a dim of its own, as by "
        "m.unsqueeze(-1) or m[:, None], has moved the enumerated one to the left: index by m itself, as in "
        "Vindex(p)[m, :]"
    )


def _share_logits(fn: Any) -> None:
    """A table of probabilities that a plate repeats for each of its members gets its logarithms once, not for each."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    held = vars(fn)
    if not isinstance(fn, Categorical) or "logits" in held:
        return
    probs = fn.probs
    single = probs
    for dim, stride in enumerate(probs.stride()):
        if stride == 0:
            single = single.narrow(dim, 0, 1)
    if single.numel() < probs.numel():
        fn.logits = probs_to_logits(single).expand(probs.shape)


def _check_plates(trace: Trace) -> None:
    """All members of a plate are enumerated at once, on one dim: nothing outside the plate may look at them together.

    Summed as if it could, a density would have them all take the same value, and be wrong without a word.
    """
    plates = {name: {f.name for f in outer_plates(site) if f.size > 1} for name, site in packed_sites(trace)}
    for name, site in packed_sites(trace):
        if not (is_discrete(site) and plates[name]):
            continue
        own = site["infer"]["_enumerate_symbol"]
        for other, reader in packed_sites(trace):
            outside = plates[name] - plates[other]
            if outside and own in getattr(reader["packed"]["unscaled_log_prob"], "_pyro_dims", ""):
                plate = next(f for f in outer_plates(site) if f.name in outside)
                raise ValueError(
                    f"site '{other}' depends on the {plate.size} discrete values '{name}' of plate '{plate.name}' and "
                    "stands outside of that plate. The values of a plate are summed out one by one, which is right "
                    "only where they are independent given all else, and they are not. Write them as sites of their "
                    f'own, `[pyro.sample(f"{name}_{{j}}", ...) for j in range({plate.size})]`, or as one Categorical '
                    "over their combinations"
                )


def packed_sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    return ((name, site) for name, site in trace.nodes.items() if site["type"] == "sample" and "packed" in site)


def is_discrete(site: Any) -> bool:
    return "_enumerate_dim" in site["infer"] and not site["is_observed"]


def summed_symbols(trace: Trace) -> frozenset[str]:
    return frozenset(site["infer"]["_enumerate_symbol"] for _, site in packed_sites(trace) if is_discrete(site))


def outer_plates(site: Any) -> list[Any]:
    return sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda f: f.dim)


def batch_shape(site: Any) -> list[int]:
    """The shape that the plates around a site make, from the leftmost on; 1 on dims where none of them stands."""
    sizes = {f.dim: f.size for f in outer_plates(site)}
    return [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]
