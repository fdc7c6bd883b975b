"""Small programs that several test files share, each with what is known exactly about it."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

import ppl_gen as pg
from ppl_gen.data.batching import Batch, Dataset, as_dataset
from ppl_gen.inference.objectives.game import Game, Setting
from ppl_gen.inference.objectives.plain import as_objective
from ppl_gen.program.dry_run import dry_run
from ppl_gen.workspace.isolation import isolated, validation_off
from ppl_gen.workspace.workspace import Workspace

#: Networks made by `network`, with the weights they were made with: the guard in conftest compares them after a test.
REGISTRY: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()

X8 = torch.tensor([0.3, -1.2, 0.8, 2.1, -0.4, 1.7, 0.1, 0.9], dtype=torch.float64)


def network(*layers: nn.Module) -> nn.Module:
    """A network under guard: a test fails if its weights, buffers, modes or gradients are not as they were made."""
    made = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
    REGISTRY[made] = looks(made)
    return made


def looks(module: nn.Module) -> dict[str, Any]:
    """All that a fit could change about a network."""
    return {
        "values": {name: value.clone() for name, value in module.state_dict().items()},
        "objects": {name: id(value) for name, value in [*module.named_parameters(), *module.named_buffers()]},
        "flags": {name: part.training for name, part in module.named_modules()},
        "trainable": {name: value.requires_grad for name, value in module.named_parameters()},
        "gradients": {
            name: None if value.grad is None else value.grad.clone() for name, value in module.named_parameters()
        },
    }


def changes(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """What differs between a network now and `looks` of it earlier."""
    now = looks(module)
    found = [key for key in ("objects", "flags", "trainable") if now[key] != before[key]]
    for key in ("values", "gradients"):
        for name, value in before[key].items():
            other = now[key].get(name)
            same = value is None and other is None
            if not same and (value is None or other is None or not torch.equal(value, other)):
                found.append(f"{key} of {name}")
    return found


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """The same names, and bit-for-bit identical values."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------------------------------ one global latent
def conjugate(x: Tensor) -> None:
    """theta ~ N(0, 1), x_i ~ N(theta, 1)."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def conjugate_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.3, dtype=x.dtype))
    scale = pyro.param("scale", torch.tensor(0.6, dtype=x.dtype), constraint=constraints.positive)
    pyro.sample("theta", dist.Normal(loc, scale))


def conjugate_posterior(x: Tensor) -> dist.Normal:
    return dist.Normal(x.sum() / (len(x) + 1), (len(x) + 1) ** -0.5)


def conjugate_evidence(x: Tensor) -> float:
    """log N(x; 0, I + 1 1')."""
    n = len(x)
    cov = torch.eye(n, dtype=torch.float64) + 1.0
    return float(dist.MultivariateNormal(torch.zeros(n, dtype=torch.float64), cov).log_prob(x.double()))


# -------------------------------------------------------------------------------- one latent for every row
def local(x: Tensor) -> None:
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1): log p(x_i) = log N(x_i; 0, 2), p(z_i | x_i) = N(x_i / 2, 1 / 2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x: Tensor) -> None:
    """Amortised: the same line for every row."""
    slope = pyro.param("slope", torch.tensor(0.2, dtype=x.dtype))
    scale = pyro.param("scale", torch.tensor(1.0, dtype=x.dtype), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, scale))


def local_exact_guide(x: Tensor) -> None:
    half = pyro.param("half", torch.tensor(0.5, dtype=x.dtype))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(half * x, half.sqrt()))


def local_evidence(x: Tensor) -> Tensor:
    return dist.Normal(torch.zeros((), dtype=x.dtype), math.sqrt(2.0)).log_prob(x)


# --------------------------------------------------------------------------------------- both kinds of latent
def both(x: Tensor) -> None:
    """theta ~ N(0, 1), z_i ~ N(theta, 1), x_i ~ N(z_i, 1): x ~ N(0, 2 I + 1 1')."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def both_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.3, dtype=x.dtype))
    scale = pyro.param("scale", torch.tensor(0.5, dtype=x.dtype), constraint=constraints.positive)
    slope = pyro.param("slope", torch.tensor(0.6, dtype=x.dtype))
    theta = pyro.sample("theta", dist.Normal(loc, scale))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x + 0.3 * theta, 0.8))


def both_exact_guide(x: Tensor) -> None:
    n = len(X8)
    precision = pyro.param("precision", torch.tensor(1.0 + n / 2, dtype=x.dtype))
    theta = pyro.sample("theta", dist.Normal(X8.sum().to(x.dtype) / 2 / precision, precision**-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + theta) / 2, math.sqrt(0.5)))


def both_evidence(x: Tensor) -> float:
    n = len(x)
    cov = 2.0 * torch.eye(n, dtype=torch.float64) + 1.0
    return float(dist.MultivariateNormal(torch.zeros(n, dtype=torch.float64), cov).log_prob(x.double()))


# ------------------------------------------------------------------------------------------- discrete latents
def switch(x: Tensor) -> None:
    """y_i ~ Bernoulli(0.3), x_i ~ N(2 y_i - 1, 1)."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.3, dtype=x.dtype)))
        pyro.sample("x", dist.Normal(2.0 * y - 1.0, 1.0), obs=x)


def switch_guide(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor(0.7, dtype=x.dtype))
    b = pyro.param("b", torch.tensor(-0.2, dtype=x.dtype))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=a * x + b))


def switch_joint(x: Tensor) -> Tensor:
    """log p(x_i, y), a column for each y."""
    prior = torch.tensor([0.7, 0.3], dtype=x.dtype).log()
    return prior + dist.Normal(torch.tensor([-1.0, 1.0], dtype=x.dtype), 1.0).log_prob(x[:, None])


def mixture(x: Tensor) -> None:
    """Two normals of the user's own: weight, means and the assignment of every row are latent."""
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    with pyro.plate("parts", 2):
        means = pyro.sample("means", dist.Normal(torch.zeros((), dtype=x.dtype), 3.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(weight)).long()
        pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)


def layered(x: Tensor) -> None:
    """y_i discrete, z_i ~ N(m[y_i], s[y_i]), x_i ~ N(z_i, 1): the prior of a guided site depends on one summed out."""
    loc, scale = torch.tensor([-1.0, 2.0], dtype=x.dtype), torch.tensor([0.5, 1.0], dtype=x.dtype)
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7], dtype=x.dtype)))
        z = pyro.sample("z", dist.Normal(loc[y], scale[y]))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def layered_prior(z: Tensor) -> Tensor:
    """log p(z_i) of `layered`, y summed out."""
    loc, scale = torch.tensor([-1.0, 2.0], dtype=z.dtype), torch.tensor([0.5, 1.0], dtype=z.dtype)
    parts = dist.Normal(loc, scale).log_prob(z[:, None]) + torch.tensor([0.3, 0.7], dtype=z.dtype).log()
    return torch.logsumexp(parts, -1)


# ------------------------------------------------------------------------------------------- other kinds
def no_plate(x: Tensor) -> None:
    """Rows that depend on each other: legal, whole data only."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    pyro.sample("x", dist.Normal(theta.expand(len(x)), 1.0).to_event(1), obs=x)


def eight_schools(sigma: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(sigma)):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * offset, sigma), obs=y)


SCHOOLS = {
    "sigma": torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]),
    "y": torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),
}


def generator() -> tuple[Any, nn.Module]:
    """A program without a density: x = G(z), with its network."""
    net = network(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

    def implicit(x: Tensor) -> None:
        pyro.module("generator", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(net(z), event_dim=1), obs=x)

    return implicit, net


def regression() -> tuple[Any, nn.Module]:
    """y = f(t) + noise with a network that has a buffer of running statistics and a frozen layer."""
    net = network(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    net[2].bias.requires_grad_(False)
    net[0].weight.grad = torch.full((4, 1), 7.0)
    REGISTRY[net] = looks(net)

    def sine(t: Tensor, y: Tensor | None = None) -> None:
        pyro.module("net", net)
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
        with pyro.plate("data", len(t)):
            pyro.sample("y", dist.Normal(net(t).squeeze(-1), noise), obs=y)

    return sine, net


def sine_rows(rows: int = 40) -> dict[str, Tensor]:
    t = torch.linspace(-2.0, 2.0, rows)[:, None]
    return {"t": t, "y": torch.sin(2 * t).squeeze(-1) + 0.1 * torch.randn(rows)}


# ---------------------------------------------------------------------------------------- playing one step
@contextlib.contextmanager
def playing(
    model: Any, guide: Any, objective: Any, data: Any, *, minibatches: bool = False
) -> Iterator[tuple[Game, Dataset]]:
    """An objective's game on a program, in a parameter store of its own: for looking at single losses."""
    program = pg.Program(model, guide)
    dataset = as_dataset(data, model)
    with isolated(0, dtype=dataset.dtype), Workspace(dtype=dataset.dtype):
        info = dry_run(program, dataset.batch(), guide=guide)
        setting = Setting(program, model, guide, info, dataset.batch(), minibatches)
        yield as_objective(objective).build(setting), dataset


def losses(game: Game, batch: Batch, count: int) -> Tensor:
    """Independent draws of the program's loss (nats per row)."""
    with torch.no_grad(), validation_off():
        return torch.stack([game.loss("program", batch, game.init(batch))[0].value for _ in range(count)]).double()


def gradient(game: Game, batch: Batch) -> dict[str, Tensor]:
    """One draw of the gradient with respect to the unconstrained parameters."""
    named = dict(pyro.get_param_store().named_parameters())
    with validation_off():
        found = torch.autograd.grad(
            game.loss("program", batch, game.init(batch))[0].value, list(named.values()), allow_unused=True
        )
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


class Noisy(dist.Normal):
    """A normal whose draws are given: loc + scale * noise, with ``noise`` of shape (rows, particles) or a scalar.

    Its name differs from Normal's, so no divergence is taken in closed form.
    """

    def __init__(self, loc: Tensor, scale: Tensor, noise: Tensor) -> None:
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, shape: Any, _instance: Any = None) -> Noisy:
        return Noisy(self.loc.expand(shape), self.scale.expand(shape), self.noise)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if self.noise.dim() < 2:
            return self.loc + self.scale * self.noise
        rows = self.noise.T[: self.loc.shape[0]] if self.loc.dim() == 2 else self.noise[:, 0]
        return self.loc + self.scale * rows


def both_noisy_guide(x: Tensor, noise: Tensor, shared: Tensor) -> None:
    """`both_guide` with its randomness as data: equal draws whatever the batch."""
    loc = pyro.param("loc", torch.tensor(0.3, dtype=x.dtype))
    scale = pyro.param("scale", torch.tensor(0.5, dtype=x.dtype), constraint=constraints.positive)
    slope = pyro.param("slope", torch.tensor(0.6, dtype=x.dtype))
    theta = pyro.sample("theta", Noisy(loc, scale, shared))
    with pyro.plate("data", len(x)):
        centre = slope * x + 0.3 * theta
        pyro.sample("z", Noisy(centre, torch.full_like(centre, 0.8), noise))


def both_noisy(x: Tensor, noise: Tensor, shared: Tensor) -> None:
    both(x)
