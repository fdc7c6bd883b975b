"""The VAE of `steps.py` in NumPyro: one jitted scan over the batches of a block."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, TraceMeanField_ELBO


def _dense(name: str, inputs: int, outputs: int, x: Any) -> Any:
    bound = 1.0 / np.sqrt(inputs)
    weights = numpyro.param(
        f"{name}.weight", lambda key: jax.random.uniform(key, (inputs, outputs), minval=-bound, maxval=bound)
    )
    return x @ weights + numpyro.param(f"{name}.bias", jnp.zeros(outputs))


def scanned(rows: np.ndarray, hidden: int, latent: int, batch: int) -> Callable[[int], float]:
    """Blocks of so many steps, each one scan; seconds per step."""
    pixels, x = rows.shape[1], jnp.asarray(rows)

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent), jnp.ones(latent)).to_event(1))
            h = jax.nn.relu(_dense("d1", latent, hidden, z))
            numpyro.sample("x", dist.Bernoulli(logits=_dense("d2", hidden, pixels, h)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        h = jax.nn.relu(_dense("e1", pixels, hidden, x))
        loc, log_scale = _dense("loc", hidden, latent, h), _dense("scale", hidden, latent, h)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), TraceMeanField_ELBO())
    state = svi.init(jax.random.PRNGKey(0), x[:batch])

    @jax.jit
    def run(state: Any, order: Any) -> Any:
        return jax.lax.scan(lambda s, index: svi.update(s, x[index]), state, order)

    draws = np.random.default_rng(0)

    def order(steps: int) -> Any:
        return jnp.asarray(draws.permutation(len(rows) // batch * batch).reshape(-1, batch)[np.arange(steps) % 100])

    made: set[int] = set()

    def block(steps: int) -> float:
        nonlocal state
        if steps not in made:  # compiled for this length
            made.add(steps)
            jax.block_until_ready(run(state, order(steps)))
        chosen = order(steps)
        began = time.perf_counter()
        state, losses = run(state, chosen)
        jax.block_until_ready(losses)
        return (time.perf_counter() - began) / steps

    return block
