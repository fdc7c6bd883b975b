"""Six posteriors of posteriordb as Pyro programs, with the reference means and sds of their parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import ppl_gen as pg

__all__ = ["POSTERIORS", "Posterior"]

_DATA = Path(__file__).parent / "data" / "posteriordb"

Draws = Mapping[str, Tensor]  # site -> chains x draws x shape


@dataclass(frozen=True)
class Posterior:
    """A program, its data, and the reference: parameter -> {"mean", "sd", quantiles}.

    ``parameters`` turns draws of the sites into draws of the reference's parameters, each chains x draws (x size).
    """

    name: str
    program: pg.Program
    data: Mapping[str, Any]
    parameters: Callable[[Draws], dict[str, Tensor]] = dict

    @property
    def reference(self) -> dict[str, dict[str, float]]:
        return json.loads((_DATA / f"{self.name}.reference.json").read_text())

    def draws(self, sites: Draws) -> dict[str, Tensor]:
        """Draws by the reference's names ("beta[1]", counted from one), chains x draws."""
        named = {}
        for name, value in self.parameters(sites).items():
            if value.dim() == 2:
                named[name] = value
            else:
                named |= {f"{name}[{i + 1}]": value[..., i] for i in range(value.shape[-1])}
        return {name: named[name] for name in self.reference}


def _data(name: str) -> dict[str, Any]:
    raw = json.loads((_DATA / f"{name}.data.json").read_text())
    return {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in raw.items()}


def _columns(value: Tensor, size: int) -> pyro.distributions.Distribution:
    return dist.Normal(value.new_zeros(size), 10.0).to_event(1)


def eight_schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta_trans, sigma), obs=y)


def _school_effects(draws):
    effects = draws["mu"][..., None] + draws["tau"][..., None] * draws["theta_trans"]
    return {"theta": effects, "mu": draws["mu"], "tau": draws["tau"]}


def gaussian_pair(y):
    """The reference orders mu; priors are exchangeable, so putting draws in order afterwards is the same posterior."""
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.stack([theta, 1 - theta])), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu[z], sigma[z]), obs=y)


def _ordered(draws):
    order = draws["mu"].argsort(-1)
    swapped = order[..., 0] == 1
    return {
        "theta": torch.where(swapped, 1 - draws["theta"], draws["theta"]),
        "mu": draws["mu"].gather(-1, order),
        "sigma": draws["sigma"].gather(-1, order),
    }


def hidden_markov(y):
    """Flat initial state: all rows of the first transition are equal. Swapped states weigh e^-41, by their priors."""
    theta = [pyro.sample(f"theta{k}", dist.Dirichlet(y.new_ones(2))) for k in (1, 2)]
    mu = pyro.sample("mu", dist.Normal(y.new_tensor([3.0, 10.0]), 1.0).to_event(1))
    steps = torch.stack(theta).log().expand(len(y) - 1, 2, 2)
    transitions = torch.cat([steps.new_zeros(1, 2, 2), steps])
    pyro.sample("y", dist.DiscreteHMM(y.new_zeros(2), transitions, dist.Normal(mu, 1.0)), obs=y)


def autoregression(lags, y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", _columns(y, lags.shape[1]))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def regression(X, y):
    beta = pyro.sample("beta", _columns(y, X.shape[1]))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def kid_scores(mom_hs, mom_iq, kid_score):
    """The reference has flat beta: a prior of sd 1000 moves the intercept (26, sd 6) by 26 * (6 / 1000)^2, 2e-4 sd."""
    beta = pyro.sample("beta", dist.Normal(kid_score.new_zeros(3), 1000.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(kid_score)):
        mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq
        pyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


def _lagged(data):
    y, k = data["y"], data["K"]
    return {"lags": torch.stack([y[k - i : len(y) - i] for i in range(1, k + 1)], -1), "y": y[k:]}


def _build() -> dict[str, Posterior]:
    schools, mixture, markov = _data("eight_schools"), _data("low_dim_gauss_mix"), _data("hmm_example")
    kids, linear = _data("kidiq"), _data("sblrc")
    posteriors = [
        Posterior(
            "eight_schools-eight_schools_noncentered",
            pg.Program(eight_schools),
            {"sigma": schools["sigma"], "y": schools["y"]},
            _school_effects,
        ),
        Posterior(
            "low_dim_gauss_mix-low_dim_gauss_mix",
            pg.Program(gaussian_pair, relabel=_ordered),
            {"y": mixture["y"]},
        ),
        Posterior(
            "hmm_example-hmm_example",
            pg.Program(hidden_markov, start=lambda: {"mu": torch.tensor([3.0, 10.0])}),
            {"y": markov["y"]},
        ),
        Posterior("arK-arK", pg.Program(autoregression), _lagged(_data("arK"))),
        Posterior("sblrc-blr", pg.Program(regression), {"X": linear["X"], "y": linear["y"]}),
        Posterior(
            "kidiq-kidscore_momhsiq",
            pg.Program(kid_scores),
            {name: kids[name] for name in ("mom_hs", "mom_iq", "kid_score")},
        ),
    ]
    return {posterior.name: posterior for posterior in posteriors}


POSTERIORS = _build()
