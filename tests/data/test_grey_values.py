"""Grey values under a Bernoulli: refused with what to do, and computed where the program itself asks for it."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.inference import SVI

GREY = torch.tensor([0.2, 0.9, 0.5, 0.0, 1.0])


def program(**settings: Any) -> Any:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3)), **settings), obs=x)

    return model


def test_grey_values_are_refused_with_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"torch.bernoulli\(x\).*ContinuousBernoulli.*Bernoulli\(..., validate_args=False\)"
    ):
        pg.fit(program(), GREY, SVI(steps=1))


def test_a_distribution_without_validation_takes_them() -> None:
    """Oracle: the cross-entropy of torch."""
    fit = pg.fit(program(validate_args=False), GREY, SVI(pyro.infer.Trace_ELBO(), steps=1))
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(torch.full((5,), 0.3), GREY)
    assert float(fit.history["program_loss"][0]) == pytest.approx(float(entropy), abs=1e-6)
    assert fit.predict(draws=2)["x"].shape == (2, 5)
