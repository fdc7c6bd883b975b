"""Rows that a program makes at its observed sites, beside those observed there: what implicit losses compare."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.handlers.carried import _base, _Carrier
from ppl_gen.handlers.substitute import Exchanged
from ppl_gen.handlers.unobserved import unobserved
from ppl_gen.inference.objectives.game import Setting
from ppl_gen.program.info import ProgramInfo, Site
from ppl_gen.workspace.isolation import without_side_effects

__all__ = [
    "ObservedRows",
    "compared_sites",
    "entries_read",
    "hidden_as_zero",
    "on_other_entries",
    "reached_from",
    "reads_own_observation",
    "refuse_own_observation",
    "rows_first",
]

_RELAXED = ("Bernoulli", "Categorical", "OneHotCategorical")


def compared_sites(info: ProgramInfo, site: str | None, temperature: float | None) -> list[Site]:
    """The observed sites to compare: the one named ``site``, or all of them.

    Raises:
        ValueError: if ``site`` is not observed in this program.
        IncompatibleError: if a `pyro.factor` makes draws of the program differ from what it describes, or a site has
            no relaxation although a ``temperature`` asks for one.
    """
    observed = [s for s in info.select(kind="observed") if s.distribution != "Unit"]
    factors = [s.name for s in info.sites.values() if s.distribution == "Unit"]
    if factors:
        raise IncompatibleError(
            f"the program {info.name!r} weighs its draws by pyro.factor at {', '.join(map(repr, factors))}, so running "
            "it forward does not sample what it describes; write the factor as sample statements"
        )
    chosen = [s for s in observed if site is None or (isinstance(site, str) and s.name == site)]
    if not chosen:
        raise ValueError(f"site: {site!r} is not observed in {info.name!r}; observed: {[s.name for s in observed]}")
    if temperature is not None:
        stuck = [s for s in chosen if not s.reparameterised and s.distribution not in _RELAXED]
        if stuck:
            raise IncompatibleError(
                f"relaxation: at site {stuck[0].name!r}, {stuck[0].distribution} has none (there is one for "
                f"{', '.join(_RELAXED)}); leave relaxation out to compare its mean"
            )
    return chosen


@dataclass(frozen=True)
class ObservedRows:
    """Observed and newly made rows of the same batch, as two tensors, rows first.

    The program runs with its observations removed. One site keeps the shape of its rows; several are flattened and
    joined. What a mask hides is zero in both. Gradients reach the parameters through reparameterised draws; a site
    without them is compared by its mean (categories by their probabilities against one-hot rows) or, at a
    ``temperature``, by straight-through relaxed draws (Maddison, Mnih and Teh 2017), or, where nothing is to be learned
    of it, as ``drawn``: a critic would tell means from draws at a glance. No log density is computed.

    Args:
        model: the program's model.
        info: the table of its sites.
        sites: the observed sites to compare, such as ``info.select(kind="observed")``.
        temperature: of relaxed draws.
        drawn: names of sites that need no gradient.

    Example:
        >>> import pyro, ppl_gen as pg
        >>> from ppl_gen.data.batching import as_dataset
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)
        >>> x = torch.ones(5, 2)
        >>> info = pg.check(model, x)
        >>> real, made = ObservedRows(model, info, info.select(kind="observed"))(as_dataset(x, model).batch())
        >>> torch.equal(real, x), made.shape
        (True, torch.Size([5, 2]))
    """

    model: Callable[..., Any]
    info: ProgramInfo
    sites: Sequence[Site]
    temperature: float | None = None
    drawn: Collection[str] = ()

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        carrier = _Carrier([site.name for site in self.sites if site.name not in self.drawn], self.temperature)
        with carrier:
            trace = poutine.trace(unobserved(self.model)).get_trace(*batch.args, **batch.kwargs)
        pairs = [self._pair(trace.nodes[site.name], carrier.values.get(site.name), batch) for site in self.sites]
        if len(pairs) == 1:
            return pairs[0]
        real, made = (torch.cat([rows.flatten(1) for rows in column], 1) for column in zip(*pairs, strict=True))
        return real, made

    def hidden(self, batch: Batch) -> list[str]:
        """The sites of which a mask hides some entries, in the order of the program."""
        trace = poutine.trace(unobserved(self.model)).get_trace(*batch.args, **batch.kwargs)
        masks = {site.name: _shown(trace.nodes[site.name]) for site in self.sites}
        found = [name for name, shown in masks.items() if shown is not None and not bool(shown.all())]
        return [name.removesuffix("_observed") for name in found]  # the part of a site with obs_mask that is seen

    def _pair(self, node: Mapping[str, Any], carried: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """Observed and made values of one site, rows x event each; x categories where these stand for draws."""
        made, real = node["value"] if carried is None else carried, torch.as_tensor(node["infer"]["obs"])
        fn, extra = node["fn"], 0
        if categories := _base(fn, dist.Categorical):
            states = torch.arange(categories.probs.shape[-1])
            real, extra = real.unsqueeze(-1) == states, 1
            made = (made.unsqueeze(-1) == states).to(categories.probs) if carried is None else made
        real, made = hidden_as_zero(node, real.to(made).expand_as(made), made, extra)
        frames = [f for f in node["cond_indep_stack"] if f.name == self.info.data_plate]
        axis = frames[0].dim - fn.event_dim - extra if frames else None
        return rows_first(real, axis, batch), rows_first(made, axis, batch)

    def notes(self) -> str:
        """How gradients reach the parameters, site by site."""
        return "; ".join(f"{site.name}: {self._how(site)}" for site in self.sites)

    def _how(self, site: Site) -> str:
        if site.reparameterised:
            return "reparameterised draws"
        if site.name in self.drawn:
            return "draws, which no parameter decides"
        if self.temperature is not None:
            return f"relaxed draws of {site.distribution} at temperature {self.temperature:g}, straight through"
        if site.distribution == "Categorical":
            return "probabilities of Categorical against one-hot rows"
        what = "a discrete draw carries no gradient" if site.discrete else "its draws are not reparameterised"
        return f"mean of {site.distribution} ({what})"


def hidden_as_zero(node: Mapping[str, Any], real: Tensor, made: Tensor, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Values of one site, zero in both where a mask hides them; ``extra`` dimensions stand behind those of the site."""
    shown = _shown(node)
    if shown is None:
        return real, made
    shown = shown.reshape(shown.shape + (1,) * extra)
    return torch.where(shown, real, torch.zeros_like(real)), torch.where(shown, made, torch.zeros_like(made))


def _shown(node: Mapping[str, Any]) -> Tensor | None:
    """Which entries of a site no mask hides, in the shape of its value; None where nothing is masked."""
    fn, masks = node["fn"], []
    if node["mask"] is not None:
        masks.append((node["mask"], fn))
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, fn))
        fn = fn.base_dist
    shape, total = node["fn"].shape(), None
    for mask, layer in masks:
        mask = torch.as_tensor(mask)
        aligned = mask.reshape(mask.shape + (1,) * layer.event_dim).expand(shape)
        total = aligned if total is None else total & aligned
    return total


def rows_first(value: Tensor, axis: int | None, batch: Batch) -> Tensor:
    """Rows in front, at least rows x 1: without a data plate the first dimension, where it counts the rows."""
    if axis is not None:
        value = value.movedim(axis, 0)
    elif not (value.dim() and value.shape[0] == batch.rows):
        value = value.unsqueeze(0)
    return value.unsqueeze(-1) if value.dim() == 1 else value


def refuse_own_observation(setting: Setting, sites: Sequence[Site]) -> None:
    """Raise IncompatibleError where the program makes one of the sites by reading its observation."""
    traced = poutine.trace(unobserved(setting.model))
    reads = reads_own_observation(
        lambda b: traced.get_trace(*b.args, **b.kwargs), setting.probe, [site.name for site in sites]
    )
    if reads:
        raise IncompatibleError(
            f"the program {setting.program.name!r} reads its own observation of {', '.join(reads)} to make it, so "
            "its rows would be compared with copies of themselves; generate step by step inside the model"
        )


def reads_own_observation(run: Callable[[Batch], poutine.Trace], batch: Batch, names: Sequence[str]) -> list[str]:
    """Those of the sites ``names`` whose draws change with the very rows that they replace.

    Such a program (an autoregressive one under teacher forcing, say) reads x in order to make x, so taking its
    observation away does not make new rows. ``run`` traces it with its observations removed. The entries of the batch
    are blanked one after the other: where both the removed observation and the draw change, the program reads it.
    """
    with without_side_effects():
        first = run(batch)
    found = set()
    for _, second in on_other_entries(run, batch):
        for name in names:
            if name in first.nodes and name in second.nodes:
                one, two = first.nodes[name], second.nodes[name]
                if _differ(one["infer"].get("obs"), two["infer"].get("obs")) and _differ(one["value"], two["value"]):
                    found.add(name)
    return [name for name in names if name in found]


def entries_read(run: Callable[[Batch], poutine.Trace], batch: Batch, names: Collection[str]) -> list[int | str]:
    """Places of the entries of a batch that decide what is drawn at the sites ``names``, beside observations.

    ``run`` traces the program with its observations removed; each entry is blanked, as in `reads_own_observation`.
    """
    with without_side_effects():
        first = run(batch)
    found: list[int | str] = []
    for place, second in on_other_entries(run, batch):
        held = [name for name in names if name in first.nodes and name in second.nodes]
        pairs = [(first.nodes[name], second.nodes[name]) for name in held]
        if any(_differ(one["value"], two["value"]) for one, two in pairs) and not any(
            _differ(one["infer"].get("obs"), two["infer"].get("obs")) for one, two in pairs
        ):
            found.append(place)
    return found


def _run_on(run: Callable[[Batch], poutine.Trace], batch: Batch) -> poutine.Trace | None:
    """A trace on other entries; None where the program has no place for these values (an index, say)."""
    try:
        with without_side_effects():
            return run(batch)
    except PROGRAM_ERRORS:
        return None


def reached_from(model: Callable[..., Any], batch: Batch, latents: Sequence[str], names: Sequence[str]) -> list[str]:
    """Those of the sites ``names`` whose draws, or values where nothing is drawn, change with those of ``latents``.

    All else meets the same random numbers, and observed values stay what they are.
    """
    with without_side_effects():
        for _ in range(2):  # the second time by other random numbers than those below
            other = poutine.trace(model).get_trace(*batch.args, **batch.kwargs).nodes
    found: list[dict[str, Tensor]] = []
    for values in ({}, {name: other[name]["value"] for name in latents if name in other}):
        with without_side_effects(), Exchanged(values):
            nodes = poutine.trace(model).get_trace(*batch.args, **batch.kwargs).nodes
            here = {name: nodes[name] for name in names if name in nodes}
            found.append({n: v["fn"].sample() if v["is_observed"] else v["value"] for n, v in here.items()})
    first, second = found
    return [name for name in first if name in second and _differ(first[name], second[name])]


def on_other_entries(run: Callable[[Batch], poutine.Trace], batch: Batch) -> Iterator[tuple[int | str, poutine.Trace]]:
    """Traces in which one entry is another: blanked, or values that occur in it where the program needs such."""
    entries: list[tuple[int | str, Any]] = [*enumerate(batch.args), *batch.kwargs.items()]
    for place, value in entries:
        if isinstance(value, Tensor):
            for other in (_blanked(value), _exchanged(value)):
                trace = _run_on(run, _with_entry(batch, place, other))
                if trace is not None:
                    yield place, trace
                    break


def _with_entry(batch: Batch, place: int | str, value: Tensor) -> Batch:
    if isinstance(place, int):
        return replace(batch, args=(*batch.args[:place], value, *batch.args[place + 1 :]))
    return replace(batch, kwargs={**batch.kwargs, place: value})


def _differ(one: Any, two: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(two, Tensor) and not torch.equal(one, two)


def _blanked(value: Tensor) -> Tensor:
    """Other values of the same kind, different in every entry: one for zero, zero for the rest."""
    return (value == 0).to(value.dtype)


def _exchanged(value: Tensor) -> Tensor:
    """Each value for the next larger one that occurs, the largest for the smallest: labels that count from one, say."""
    known, which = value.unique(return_inverse=True)
    return known.roll(-1)[which]
