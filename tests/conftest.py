"""The guard: every test starts from the same seed and fails if it leaves anything global changed."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import REGISTRY, changes
from pyro import infer, poutine

import ppl_gen

SEED = 1234
_GUARDED = ("fit", "check", "prior_predictive")
_METHODS = (
    "posterior",
    "predict",
    "sample",
    "evidence",
    "marginal_likelihood",
    "to_arviz",
    "diagnose",
    "module",
    "save",
)


def generators() -> dict[str, Any]:
    """The states of the three generators that a library may touch."""
    kind, keys, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state().tolist(), "numpy": (kind, keys.tolist(), *rest), "python": random.getstate()}


def settings() -> dict[str, Any]:
    """Process-wide switches."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients enabled": torch.is_grad_enabled(),
        "torch's validation": torch.distributions.Distribution._validate_args,
        "Pyro's validation of distributions": dist.is_validation_enabled(),
        "Pyro's validation of inference": infer.is_validation_enabled(),
        "Pyro's validation of handlers": poutine.is_validation_enabled(),
        "module-local parameters": pyro.settings.get("module_local_params"),
        "pyro.module": pyro.module,
        "handlers": len(poutine.runtime._PYRO_STACK),
        "forward hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
    }


def store() -> dict[str, tuple[int, list[Any]]]:
    """Pyro's parameter store: names, identities and values."""
    return {n: (id(p), p.detach().flatten().tolist()) for n, p in pyro.get_param_store().named_parameters()}


def _steady(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = generators()
        try:
            return function(*args, **kwargs)
        finally:
            moved = [kind for kind, state in generators().items() if state != before[kind]]
            assert not moved, f"{name} moved the global generator of {', '.join(moved)}"

    return call


@pytest.fixture(autouse=True)
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that leaks, and repairs the leak, so that it does not spread to the next one."""
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)
    pyro.clear_param_store()
    for name in _GUARDED:
        monkeypatch.setattr(ppl_gen, name, _steady(getattr(ppl_gen, name), f"ppl_gen.{name}"))
    for name in _METHODS:
        monkeypatch.setattr(ppl_gen.Fit, name, _steady(getattr(ppl_gen.Fit, name), f"Fit.{name}"))
    before = settings()
    yield
    after, left = settings(), store()
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["gradients enabled"])
    pyro.enable_validation(before["Pyro's validation of distributions"])
    torch.distributions.Distribution._validate_args = before["torch's validation"]
    pyro.clear_param_store()
    leaks = [f"{name}: {before[name]} became {after[name]}" for name in before if after[name] != before[name]]
    if left:
        leaks.append(f"the parameter store holds {sorted(left)}")
    for module, looked in list(REGISTRY.items()):
        leaks += [f"network {type(module).__name__}: {change}" for change in changes(module, looked)]
    REGISTRY.clear()
    assert not leaks, "this test leaks: " + "; ".join(leaks)
