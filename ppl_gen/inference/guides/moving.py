"""Supports that move with another site, and the guides that keep the supports of their first look."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from pyro.infer.autoguide.guides import AutoCallable
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.handlers.sites import is_subsample
from ppl_gen.workspace.isolation import validation_off, without_side_effects

__all__ = ["MOVED_REMEDY", "moving_supports", "refuse_fixed_supports", "said_to_move"]

MOVED_REMEDY = (
    "SVI without a guide of your own follows it (by AutoNormalMessenger), and NUTS() does. Or write the site over a "
    "support that stays, and derive the value: u ~ Uniform(0, 1), then pyro.deterministic('y', x + (1 - x) * u) for y "
    "between x and 1"
)
_PLACES = (0.3, -0.7)


class _Supports(Messenger):
    """Continuous latent sites at places of their supports, as leaves; what a fixed vector becomes in each support."""

    def __init__(self, elsewhere: Collection[str], everywhere: bool = False) -> None:
        super().__init__()
        self.elsewhere, self.everywhere = elsewhere, everywhere
        self.leaves: dict[str, Tensor] = {}
        self.bounds: dict[str, Tensor] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor) and msg["value"].requires_grad:
            self.leaves[f"the parameter {msg['name']}"] = msg["value"]

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        away = self.everywhere or name in self.elsewhere
        try:
            discrete = bool(getattr(fn.support, "is_discrete", False))
            if discrete:
                value = fn.enumerate_support(expand=True)[-1 if away else 0]
            else:
                transform = biject_to(fn.support)
                u = torch.linspace(0.5, 1.0, transform.inverse_shape(fn.shape()).numel())
                u = u.reshape(transform.inverse_shape(fn.shape()))
                self.bounds[name] = transform(_PLACES[0] * u)
                value = transform(_PLACES[1] * u) if away else self.bounds[name]
        except NotImplementedError:  # no bijection, or no list of values: left to be drawn
            return
        value = value.detach()
        if value.is_floating_point():
            value = self.leaves[name] = value.requires_grad_()
        msg["value"], msg["done"] = value, True


def moving_supports(model: Callable[..., Any], batch: Batch) -> dict[str, list[str]]:
    """By continuous latent site whose support is not always the same: the sites and parameters that move it.

    The program runs twice, with its latent sites at two places; what moves a support is told by its slope, or, where
    that goes through a comparison, by moving one site at a time. A program that cannot run there has none.
    """
    try:
        first, other = _looked(model, batch), _looked(model, batch, everywhere=True)
        moved = {name: _slopes(name, first) for name in first.bounds}
        moved = {name: by for name, by in moved.items() if by or _differs(first, other, name)}
        for name in [name for name, by in moved.items() if not by]:
            alone = {site: _looked(model, batch, [site]) for site in _before(name, model, batch)}
            moved[name] = [site for site, run in alone.items() if _differs(first, run, name)]
    except PROGRAM_ERRORS:
        return {}
    return moved


def _looked(
    model: Callable[..., Any], batch: Batch, elsewhere: Collection[str] = (), *, everywhere: bool = False
) -> _Supports:
    found = _Supports(elsewhere, everywhere)
    with without_side_effects(), validation_off(), torch.enable_grad(), warnings.catch_warnings(), found:
        warnings.simplefilter("ignore", UserWarning)  # that a value with a gradient is read into Python, say
        torch.manual_seed(0)
        model(*batch.args, **batch.kwargs)
    return found


def _slopes(name: str, found: _Supports) -> list[str]:
    bound = found.bounds[name]
    if not bound.requires_grad:
        return []
    leaves = {site: leaf for site, leaf in found.leaves.items() if site != name}
    slopes = torch.autograd.grad(bound.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
    return [site for site, slope in zip(leaves, slopes, strict=True) if slope is not None] or ["a parameter"]


def _differs(one: _Supports, other: _Supports, name: str) -> bool:
    before, after = one.bounds[name].detach(), other.bounds.get(name)
    if after is None:  # not reached in the other run
        return False
    return before.shape != after.shape or not torch.allclose(before, after.detach(), rtol=1e-5, atol=1e-7)


def _before(name: str, model: Callable[..., Any], batch: Batch) -> list[str]:
    class _Names(Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            if not msg["is_observed"] and not is_subsample(msg):
                names.append(msg["name"])

    names: list[str] = []
    with _Names():
        _looked(model, batch)
    return names[: names.index(name)]


def said_to_move(moved: Mapping[str, Collection[str]]) -> str:
    """In words: which supports move, and with what."""
    return "; ".join(
        f"the support of {name} depends on {', '.join(by) if by else 'the value of another latent site'}"
        for name, by in moved.items()
    )


def _held(guide: Any, computed: Collection[str]) -> set[str]:
    """The sites that parts of the guide map into the supports of their first look.

    Messengers (`AutoNormalMessenger`) run the model, and read every support as it is there.
    """
    parts = list(guide.modules()) if isinstance(guide, torch.nn.Module) else []
    if any(isinstance(part, EasyGuide) for part in parts):  # what it saw is forgotten after a look
        return set(computed)
    kept = [
        part for part in parts if isinstance(part, AutoGuide) and not isinstance(part, AutoCallable | AutoGuideList)
    ]
    traces = [part.prototype_trace for part in kept]
    return {name for trace in traces if trace is not None for name in trace.nodes} & set(computed)


def refuse_fixed_supports(
    guide: Any, model: Callable[..., Any], batch: Batch, computed: Collection[str], program: str
) -> None:
    """Pyro's autoguides map into the supports of their first look, and a bound that moves would be read wrongly.

    ``computed`` names the sites whose values the guide computes (its Deltas): those it draws itself are its own matter.

    Raises:
        IncompatibleError: naming the site and what moves its support.
    """
    held = _held(guide, computed)
    moved = moving_supports(model, batch) if held else {}
    moved = {name: by for name, by in moved.items() if name in held}
    if moved:
        raise IncompatibleError(
            f"{said_to_move(moved)} in {program!r}, and {type(guide).__name__} keeps the supports that it first saw. "
            f"{MOVED_REMEDY}"
        )
