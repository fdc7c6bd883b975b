"""An objective of one's own, a bound from above: log evidence between ELBO and CUBO, and the guide that each finds."""

import math
import os
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoNormal

import ppl_gen as pg
from ppl_gen.extending import traces
from ppl_gen.inference import ELBO, SVI, Game, Loss, Objective

quick = bool(os.environ.get("PPL_GEN_QUICK"))


@dataclass(frozen=True)
class CUBO(Objective):
    """Half of log E_q (p(x, z) / q(z))^2, never below log p(x) (Dieng et al. 2017), for programs that broadcast."""

    particles: int = 256

    needs = (("density",), ("differentiable latents",))

    def build(self, setting):
        if setting.minibatches or setting.info.finite_latents:
            raise pg.IncompatibleError("CUBO takes all rows at once, and sums out no finite sites")
        return UpperBound(setting, self.particles)


class UpperBound(Game):
    def __init__(self, setting, particles):
        self.setting, self.particles, self.dim = setting, particles, -1 - setting.info.plate_nesting

    def log_weights(self, batch):
        with pyro.plate("particles", self.particles, dim=self.dim):
            guide, model = traces(self.setting, batch)
        return self.per_particle(model) - self.per_particle(guide)

    def per_particle(self, trace):
        trace.compute_log_prob()
        terms = [site["log_prob"] for site in trace.nodes.values() if "log_prob" in site]
        return sum(term.reshape(self.particles, -1).sum(1) for term in terms if term.dim())

    def init(self, batch):
        with torch.no_grad():
            return {"largest": self.log_weights(batch).max()}

    def loss(self, player, batch, state):
        log_w = self.log_weights(batch)
        largest = torch.maximum(state["largest"] - 0.01, log_w.detach().max())
        second = (2.0 * (log_w - state["largest"])).exp().mean()
        bound = state["largest"] + second.detach().log() / 2.0
        # The value is the bound, in nats; the gradient is that of the second moment.
        return Loss((bound + second - second.detach()) / (batch.total or 1)), {"largest": largest}


def line(t, y):
    level = pyro.sample("level", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(t)):
        pyro.sample("y", dist.Normal(level + slope * t, 1.0), obs=y)


t = torch.linspace(0.0, 2.0, 20)
y = 1.0 + 0.5 * t + torch.randn(20, generator=torch.Generator().manual_seed(0))
design = torch.stack([torch.ones(20), t], 1)
evidence = dist.MultivariateNormal(torch.zeros(20), 25.0 * design @ design.T + torch.eye(20)).log_prob(y).item()
covariance = torch.linalg.inv(design.T @ design + torch.eye(2) / 25.0)
posterior = dist.MultivariateNormal(covariance @ design.T @ y, covariance)
sd = covariance.diagonal().sqrt()

axes = [torch.linspace(-8.0, 8.0, 801) * s + m for s, m in zip(sd, posterior.mean, strict=True)]
grid, cell = torch.cartesian_prod(*axes), float(0.02 * sd[0] * 0.02 * sd[1])
figure = Figure(figsize=(10, 4), layout="constrained")
left, right = figure.subplots(1, 2)


def outline(log_density, colour):
    heights = (log_density - log_density.max()).reshape(801, 801).T
    right.contour(*axes, heights, levels=[-4.5, -2.0, -0.5], colors=colour, linestyles="solid")


outline(posterior.log_prob(grid), "black")
program = pg.Program(line, guide=partial(AutoNormal, init_scale=1.0))
bounds, ratios = {}, {}
for name, objective, sign, colour in (("CUBO", CUBO(), 1, "C1"), ("ELBO", ELBO(), -1, "C0")):
    fit = pg.fit(program, {"t": t, "y": y}, SVI(objective=objective, steps=100 if quick else 2000, lr=0.01), seed=0)
    loc = torch.stack([fit.params["AutoNormal.locs.level"], fit.params["AutoNormal.locs.slope"]])
    scale = torch.stack([fit.params["AutoNormal.scales.level"], fit.params["AutoNormal.scales.slope"]])
    log_q = dist.Normal(loc, scale).to_event(1).log_prob(grid)
    log_w = evidence + posterior.log_prob(grid) - log_q
    elbo, second = float((log_q.exp() * log_w).sum() * cell), float((log_q + 2.0 * log_w).logsumexp(0)) + math.log(cell)
    bounds[name], ratios[name] = (elbo if name == "ELBO" else second / 2.0), scale / sd
    nats = sign * len(t) * fit.history["program_loss"].rolling(step=50).mean()
    left.plot(fit.history["step"], nats, color=colour, label=f"{name}, mean of 50 steps")
    outline(log_q, colour)
    print(f"{name} {bounds[name]:.3f}, log evidence {evidence:.3f}, sds of guide / posterior {ratios[name].tolist()}")
left.axhline(evidence, color="black", label="log evidence")
left.set(xlabel="step", ylabel="nats", ylim=(evidence - 5.0, evidence + 3.0))
left.legend(frameon=False)
right.set(xlabel="level", ylabel="slope", xlim=(axes[0][200], axes[0][600]), ylim=(axes[1][200], axes[1][600]))
figure.savefig("own_objective.png", dpi=120)
if not quick:
    assert bounds["ELBO"] < evidence < bounds["CUBO"], "the evidence lies between the bounds"
    assert bool((ratios["ELBO"] < 0.7).all()), "the guide of the ELBO is too narrow where level and slope go together"
    assert bool((ratios["CUBO"] > 1.0).all()), "the guide of the CUBO covers the posterior"
