"""A fit changes nothing it was given: global state and the user's modules are swapped out and put back."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ppl_gen.errors import IncompatibleError, require_seed
from ppl_gen.handlers.private import HANDLERS
from ppl_gen.nn.copies import computed_anew
from ppl_gen.workspace.memory import unremembered

__all__ = [
    "buffers_put_back",
    "copied",
    "generators",
    "isolated",
    "revived",
    "set_generators",
    "validation_off",
    "without_side_effects",
]


@contextlib.contextmanager
def isolated(seed: int | None = None, *, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Seed every generator inside and leave all of them, torch's default dtype and validation as they were.

    >>> before = torch.get_rng_state()
    >>> with isolated(3):
    ...     _ = torch.rand(2)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    seed = None if seed is None else require_seed(seed)
    kept, dtype_before = generators(), torch.get_default_dtype()
    validate = torch.distributions.Distribution._validate_args  # Pyro knows its own flag and overwrites torch's
    handlers = list(HANDLERS)
    try:
        with pyro.validation_enabled(True):
            if seed is not None:
                pyro.set_rng_seed(seed)
            if dtype is not None:
                torch.set_default_dtype(dtype)
            yield
    finally:
        HANDLERS[:] = handlers
        torch.distributions.Distribution._validate_args = validate
        torch.set_default_dtype(dtype_before)
        set_generators(kept)


def generators() -> dict[str, Any]:
    """The states of all generators that a program may draw from.

    >>> kept = generators()
    >>> first = torch.rand(3)
    >>> set_generators(kept)
    >>> torch.equal(first, torch.rand(3))
    True
    """
    found = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def set_generators(kept: Mapping[str, Any]) -> None:
    """Put all generators where they stood when `generators` gave ``kept``."""
    torch.set_rng_state(kept["torch"])
    np.random.set_state(kept["numpy"])
    random.setstate(kept["python"])
    if "cuda" in kept:
        torch.cuda.set_rng_state_all(kept["cuda"])


@contextlib.contextmanager
def without_side_effects() -> Iterator[None]:
    """Run a program only to look at it: no gradients; buffers, generators and what modules remember are put back."""
    with buffers_put_back(), isolated(), torch.no_grad(), unremembered():
        yield


@contextlib.contextmanager
def buffers_put_back() -> Iterator[None]:
    """The buffers of all modules called inside, as the running averages of batch norm, are on exit what they were.

    >>> norm = torch.nn.BatchNorm1d(1)
    >>> with buffers_put_back():
    ...     _ = norm(torch.ones(3, 1))
    >>> norm.running_mean
    tensor([0.])
    """
    kept: dict[int, tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]] = {}

    def keep(module: nn.Module, _inputs: object) -> None:
        if id(module) not in kept:
            kept[id(module)] = module, {k: (b, b.clone()) for k, b in module._buffers.items() if b is not None}

    hook = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()
        with torch.no_grad():
            for module, buffers in kept.values():
                for name, (buffer, value) in buffers.items():
                    module._buffers[name] = buffer.copy_(value)


def copied(module: nn.Module, *, shared: Iterable[nn.Module] = ()) -> nn.Module:
    """A deep copy, ``shared`` parts and models apart. Pyro's autoguides let go of their model: both get it back."""
    memo = {
        id(part): part for part in (*shared, *(vars(p).get("_model") for p in module.modules())) if part is not None
    }
    guides = [part for part in module.modules() if isinstance(part, AutoGuide)]
    # Only read once it is there; its values may hang on parameters, and such tensors cannot be copied.
    memo |= {id(part.prototype_trace): part.prototype_trace for part in guides if part.prototype_trace is not None}
    memo |= computed_anew(module)
    kept = [(part._model, part.master) for part in guides]
    try:
        made = copy.deepcopy(module, memo)
    finally:
        for part, (model, master) in zip(guides, kept, strict=True):
            part._model, part.master = model, master
    for part, (model, _) in zip((p for p in made.modules() if isinstance(p, AutoGuide)), kept, strict=True):
        part._model = model
    return made


def revived(guide: AutoGuide, model: Callable[..., Any]) -> AutoGuide:
    """An autoguide with a model again, if it has come from another process and lost it on the way."""
    if guide._model is None:
        start = getattr(guide, "init_loc_fn", None)
        guide._model = (model if start is None else InitMessenger(start)(model),)
    if any(part._model is None for part in guide.modules() if isinstance(part, AutoGuide)):
        raise IncompatibleError(
            f"guide: the parts of {type(guide).__name__} forget their models on the way to another process; make the "
            "guide in a Recipe, which is called there"
        )
    return guide


def validation_off() -> contextlib.AbstractContextManager[None]:
    """Validation off: it costs a quarter of a step (measured), and the dry run has checked the shapes."""
    return pyro.validation_enabled(False)
