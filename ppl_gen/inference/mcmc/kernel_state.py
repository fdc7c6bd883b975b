"""All that changes in Pyro's kernel from one iteration to the next, taken out and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["kernel_state", "load_kernel_state"]

#: By the object that holds them, as attributes: `tests/handlers/test_canaries.py` notices where Pyro has others.
KERNEL = (
    "_t",
    "_accept_cnt",
    "_mean_accept_prob",
    "_divergences",
    "_z_last",
    "_potential_energy_last",
    "_z_grads_last",
    "gradients",
    "energy",
    "taken",
)
ADAPTER = ("step_size", "_current_window")
STEP_SIZE = ("prox_center", "_x_avg", "_g_avg", "_t", "_x_t")
METRIC = ("estimated", "_inverse_mass_matrix", "_mass_matrix_sqrt", "_mass_matrix_sqrt_inverse")
COVARIANCE = ("_mean", "_m2", "n_samples")


def kernel_state(kernel: Any) -> dict[str, Any]:
    """Position, potential and gradient there, step size, mass matrix, and what the warm-up has gathered for them."""
    adapter, metric = kernel._adapter, kernel.metric
    return {
        "kernel": _taken(kernel, KERNEL),
        "adapter": _taken(adapter, ADAPTER),
        "step size": _taken(adapter._step_size_adapt_scheme, STEP_SIZE),
        "metric": _taken(metric, METRIC),
        "covariances": {names: _taken(scheme, COVARIANCE) for names, scheme in metric._adapt_scheme.items()},
    }


def load_kernel_state(kernel: Any, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Put into a kernel that was set up for the same chain what `kernel_state` gave; returns the position."""
    adapter, metric = kernel._adapter, kernel.metric
    for holder, part in (
        (kernel, "kernel"),
        (adapter, "adapter"),
        (adapter._step_size_adapt_scheme, "step size"),
        (metric, "metric"),
    ):
        _put(holder, saved[part])
    for names, scheme in metric._adapt_scheme.items():
        _put(scheme, saved["covariances"][names])
    position: dict[str, Tensor] = kernel._z_last
    return position


def _taken(holder: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(holder, name) for name in names if hasattr(holder, name)}  # _x_t comes with the first step


def _put(holder: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(holder, name, value)
