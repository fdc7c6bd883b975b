"""Diffusion chains whose bound and density are sums of normals, for the tests of diffusion models."""

from __future__ import annotations

import itertools
import math

import pyro.distributions as dist
import torch
from torch import nn

from ppl_gen.data.batching import Batch
from ppl_gen.inference.objectives.game import Setting
from ppl_gen.models.diffusion.chain import Diffusion
from ppl_gen.models.diffusion.noising import noise_schedule
from ppl_gen.program.dry_run import dry_run


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


class Linear(nn.Module):
    """A chain back whose means are affine: x_{t-1} given x_t is Normal(slope_t x_t + shift_t, scale_t^2)."""

    def __init__(self, slope, shift, scale):
        super().__init__()
        self.slope, self.shift, self.scale = (nn.Parameter(torch.as_tensor(v)) for v in (slope, shift, scale))

    def forward(self, x, t):
        return self.slope[t - 1] * x + self.shift[t - 1], self.scale[t - 1].expand_as(x)


def some_linear(steps, features=2):
    """A chain back near enough to the best one for bounds to be finite numbers of nats, and not equal to it."""
    noising = noise_schedule("linear", steps)
    kept = (1 - noising.betas).sqrt()[:, None] * (1 + 0.1 * torch.randn(steps, features))
    spread = noising.betas.sqrt()[:, None] * (1 + 0.3 * torch.rand(steps, features))
    reverse = Linear(kept, 0.1 * torch.randn(steps, features), spread)
    return Diffusion(noising, reverse, torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5]))


def log_density(chain, x):
    """log p(x) of a chain with a linear way back: mean and variance carried from x_T down to x_0."""
    back = chain.reverse
    mean, variance = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    for t in range(chain.noising.steps, 0, -1):
        mean = back.slope[t - 1] * mean + back.shift[t - 1]
        variance = back.slope[t - 1] ** 2 * variance + back.scale[t - 1] ** 2
    units = dist.Normal(chain.middle + chain.spread * mean, chain.spread * variance.sqrt())
    return units.log_prob(x).sum(-1).detach()


def exact_elbo(chain, x):
    """The bound of a linear chain per row: moments of q(x_{t-1}, x_t | x_0) give E_q[log p], and q has its entropy."""
    noising, back = chain.noising, chain.reverse
    start = (x - chain.middle) / chain.spread
    total = -chain.spread.log().expand_as(x)
    for t in range(1, noising.steps + 1):
        kept = (1 - noising.betas[t - 1]).sqrt()
        means = noising.kept[t - 1].sqrt() * start, noising.kept[t].sqrt() * start
        error = means[0] - back.slope[t - 1] * means[1] - back.shift[t - 1]
        residual = noising.noise[t - 1] + back.slope[t - 1] ** 2 * noising.noise[t]
        residual = residual - 2 * back.slope[t - 1] * kept * noising.noise[t - 1] + error**2
        total = total - back.scale[t - 1].log() - residual / (2 * back.scale[t - 1] ** 2)
        total = total + 0.5 * (noising.betas[t - 1].log() + 1)  # entropy of a step, less the constants that cancel
    ends = noising.kept[-1] * start**2 + noising.noise[-1]
    return (total - 0.5 * ends - 0.5 * math.log(2 * math.pi)).sum(-1).detach()


def quadrature(chain, x):
    """Minus the bound per row from its terms, every time step and the expectation over each x_t exact."""
    start = (x - chain.middle) / chain.spread
    nodes, weights = torch.tensor([-(3**0.5), 0.0, 3**0.5]), torch.tensor([1 / 6, 2 / 3, 1 / 6])
    total = chain.constant(x)
    for t in range(1, chain.noising.steps + 1):
        mean, scale = chain.noising.current().marginal(start, t)
        for place in itertools.product(range(3), repeat=x.shape[1]):
            index = torch.tensor(place)
            total = total + weights[index].prod() * chain.cost(t, start, mean + scale * nodes[index])
    return total.detach()


def losses(chain, x, objective, count, total):
    """``count`` losses of an objective on one batch that stands for ``total`` rows."""
    program, batch = chain.program(), Batch((x,), {}, len(x), total)
    info = dry_run(program, Batch((x,), {}, len(x), len(x)), guide=program.guide)
    game = objective.build(Setting(program, program.model, program.guide, info, batch))
    with torch.no_grad():
        return torch.stack([game.loss("program", batch, game.init(batch))[0].value for _ in range(count)])


def z_score(draws, expected):
    return abs(float((draws.mean() - expected) / (draws.std() / len(draws) ** 0.5)))


def best_chain(variance, steps, optimal):
    """The exact way back from noise to Normal(0, variance) rows; with the noising chain's own widths if not optimal."""
    noising = noise_schedule("linear", steps)
    carried = noising.kept[:, None] * variance + noising.noise[:, None]  # variance of x_t, t = 0..T
    slope = (1 - noising.betas).sqrt()[:, None] * carried[:-1] / carried[1:]
    exact = noising.betas[:, None] * carried[:-1] / carried[1:]
    scale = (exact if optimal else noising.betas[:, None].expand_as(exact)).sqrt()
    units = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])
    return Diffusion(noising, Linear(slope, torch.zeros_like(slope), scale), *units)
