"""Three posteriors as programs of each library, for `chains.py`; in float64 everywhere.

A sampler takes the posterior's name, its data and the lengths, builds the model once, and gives a function of the seed:
draws by name (chains x draws x shape; "means" of a mixture) and the seconds of compilation that the library tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Data = Mapping[str, np.ndarray]
Sample = Callable[[int], tuple[dict[str, np.ndarray], float]]

NU, SPREAD, KAPPA, ALPHA = 3.0, 0.25, 0.01, 2.0  # the priors of `pg.models.gaussian_mixture(2)` on numbers


def _torch_models(data: Data) -> dict[str, Any]:
    import pyro
    import pyro.distributions as dist
    import torch

    given = {name: torch.as_tensor(value) for name, value in data.items()}

    def schools(y: Any, sigma: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("data", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)

    def logistic(x: Any, y: Any) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=intercept + x @ beta), obs=y)

    def mixture(x: Any) -> None:
        two = x.new_ones(2)
        weights = pyro.sample("weights", dist.Dirichlet(ALPHA * two))
        precision = pyro.sample("precision", dist.Gamma(NU / 2 * two, SPREAD / 2 * two).to_event(1))
        means = pyro.sample("means", dist.Normal(0.0 * two, (KAPPA * precision).rsqrt()).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(means[z], precision[z].rsqrt()), obs=x)

    models = {"eight schools": schools, "logistic regression 1000 x 25": logistic, "crabs": mixture}
    return {"models": models, "given": given}


def ours(posterior: str, data: Data, chains: int, warmup: int, draws: int) -> Sample:
    import pyro

    import ppl_gen as pg
    from ppl_gen.inference import NUTS

    built = _torch_models(data)
    sites = {"eight schools": ("mu", "tau", "theta"), "crabs": ("weights", "precision", "means")}
    names = sites.get(posterior, ("intercept", "beta"))

    def sample(seed: int) -> tuple[dict[str, np.ndarray], float]:
        pyro.clear_param_store()
        algorithm = NUTS(draws=draws, warmup=warmup, chains=chains)
        fit = pg.fit(built["models"][posterior], built["given"], algorithm, seed=seed, progress=False)
        kept = fit.to_arviz().posterior
        return {name: kept[name].values for name in names}, float(fit.cost.get("capture_seconds", 0.0))

    return sample


def pyros(posterior: str, data: Data, chains: int, warmup: int, draws: int) -> Sample:
    import pyro
    import torch
    from pyro.infer import MCMC, NUTS

    torch.set_default_dtype(torch.float64)
    built = _torch_models(data)

    def sample(seed: int) -> tuple[dict[str, np.ndarray], float]:
        pyro.set_rng_seed(seed)
        kept: list[dict[str, np.ndarray]] = []
        for _ in range(chains):  # one after another: on two cores Pyro runs them so itself
            mcmc = MCMC(NUTS(built["models"][posterior]), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
            mcmc.run(**built["given"])
            kept.append({name: value.numpy() for name, value in mcmc.get_samples().items()})
        return {name: np.stack([one[name] for one in kept]) for name in kept[0]}, 0.0

    return sample


def numpyros(posterior: str, data: Data, chains: int, warmup: int, draws: int) -> Sample:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS

    numpyro.set_host_device_count(chains)  # before JAX begins: each chain is a device

    def schools(y: Any, sigma: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("data", len(y)):
            theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)

    def logistic(x: Any, y: Any) -> None:
        intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
        beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ beta), obs=y)

    def mixture(x: Any) -> None:
        two = jnp.ones(2)
        weights = numpyro.sample("weights", dist.Dirichlet(ALPHA * two))
        precision = numpyro.sample("precision", dist.Gamma(NU / 2 * two, SPREAD / 2 * two).to_event(1))
        means = numpyro.sample("means", dist.Normal(0.0 * two, (KAPPA * precision) ** -0.5).to_event(1))
        parts = dist.Normal(means, precision**-0.5)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=x)

    models = {"eight schools": schools, "logistic regression 1000 x 25": logistic, "crabs": mixture}
    mcmc = MCMC(
        NUTS(models[posterior]),
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="parallel",
        progress_bar=False,
    )

    given = {name: jnp.asarray(value) for name, value in data.items()}  # the same objects, or it is compiled anew

    def sample(seed: int) -> tuple[dict[str, np.ndarray], float]:
        mcmc.run(jax.random.PRNGKey(seed), **given)
        return {name: np.asarray(value) for name, value in mcmc.get_samples(group_by_chain=True).items()}, 0.0

    return sample


def pymcs(posterior: str, data: Data, chains: int, warmup: int, draws: int) -> Sample:
    import nutpie
    import pymc as pm

    with pm.Model() as model:
        if posterior == "eight schools":
            mu, tau = pm.Normal("mu", 0.0, 5.0), pm.HalfCauchy("tau", 5.0)
            theta = pm.Normal("theta", 0.0, 1.0, shape=len(data["y"]))
            pm.Normal("y", mu + tau * theta, data["sigma"], observed=data["y"])
            names = ["mu", "tau", "theta"]
        elif posterior == "crabs":
            weights = pm.Dirichlet("weights", ALPHA * np.ones(2))
            precision = pm.Gamma("precision", NU / 2, SPREAD / 2, shape=2)
            means = pm.Normal("means", 0.0, (KAPPA * precision) ** -0.5, shape=2)
            pm.NormalMixture("x", weights, means, precision**-0.5, observed=data["x"])
            names = ["weights", "precision", "means"]
        else:
            intercept, beta = pm.Normal("intercept", 0.0, 5.0), pm.Normal("beta", 0.0, 1.0, shape=data["x"].shape[1])
            pm.Bernoulli("y", logit_p=intercept + data["x"] @ beta, observed=data["y"])
            names = ["intercept", "beta"]
    compiled: list[Any] = []

    def sample(seed: int) -> tuple[dict[str, np.ndarray], float]:
        if not compiled:  # a part of the first run
            compiled.append(nutpie.compile_pymc_model(model))
        lengths = {"draws": draws, "tune": warmup, "chains": chains}
        kept = nutpie.sample(compiled[0], **lengths, seed=seed, progress_bar=False).posterior
        return {name: kept[name].values for name in names}, 0.0

    return sample


SAMPLERS: dict[str, Callable[[str, Data, int, int, int], Sample]] = {
    "ppl_gen": ours,
    "Pyro": pyros,
    "NumPyro": numpyros,
    "PyMC, nutpie": pymcs,
}
