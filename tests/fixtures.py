"""Fixtures that several files of tests ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch


def float64_under(seed: int) -> Any:
    """Every test of the file in float64, under its seed, with a parameter store of its own."""

    @pytest.fixture(autouse=True)
    def float64_and_seed() -> Iterator[None]:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
            torch.manual_seed(seed)
            yield
        torch.set_default_dtype(default)

    return float64_and_seed
