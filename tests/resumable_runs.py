"""Runs that are stopped and gone on with: what the tests of states and of checkpoints share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from programs import X8, both, both_guide, switch, switch_guide
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import (
    CAVI,
    EBGAN,
    ELBO,
    EM,
    SVI,
    WAE,
    Adversarial,
    AdversarialTraining,
    ConditionalAdversarial,
    ContrastiveDivergence,
    DomainAdversarial,
    Laplace,
    Pathfinder,
    WakeSleep,
    Walkback,
)
from ppl_gen.models import dcgan, gan, gaussian_mixture, gsn, helmholtz, lapgan, rbm, real_nvp, vae

BITS = (torch.rand(20, 6, generator=torch.Generator().manual_seed(1)) < 0.4).double()
ROWS = torch.randn(30, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
IMAGES = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
DOMAINS = {"x": ROWS, "y": (ROWS[:, 0] > 0).long(), "domain": torch.arange(30) % 2}
PAIRS = torch.cat([ROWS[:15, 0] - 2.0, ROWS[15:, 0] + 2.0])


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit, whatever they are made of."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) or bool(torch.equal(torch.isnan(one), torch.isnan(other)) and one.isnan().all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _batch_norm() -> Any:
    net = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2)).double()

    def model(x: torch.Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * x, 1.0).to_event(1))

    return pg.Program(model, guide)


_FEATURES, _SCORES = nn.Linear(2, 3), nn.Linear(3, 2)


def in_domains(x: torch.Tensor, y: torch.Tensor, domain: torch.Tensor) -> None:
    """A classifier that names its features, of rows of two domains."""
    pyro.module("features", _FEATURES)
    pyro.module("scores", _SCORES)
    with pyro.plate("data", len(x)):
        features = pyro.deterministic("features", _FEATURES(x).tanh(), event_dim=1)
        pyro.sample("y", dist.Categorical(logits=_SCORES(features)), obs=y)


def _decaying(optimiser: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.9)


#: Program (made anew for each run), algorithm, data.
RUNS: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    "one player, minibatches, schedule": (
        lambda: pg.Program(both, both_guide),
        SVI(steps=9, lr=0.05, batch_size=3, schedule=_decaying),
        X8,
    ),
    "baselines": (lambda: pg.Program(switch, switch_guide), SVI(ELBO(enumerate=False), steps=9, lr=0.05), X8),
    "batch normalisation and dropout": (_batch_norm, SVI(steps=9, lr=0.01, batch_size=7), ROWS),
    "batch norm of a flow of images": (
        lambda: real_nvp(channels=3, blocks=1, scales=2),
        SVI(steps=9, lr=0.01, batch_size=7),
        BITS[:, :4].reshape(20, 1, 2, 2) + ROWS[:20, :1, None, None],
    ),
    "two players": (
        lambda: gan(latent=2, hidden=(4,)),
        SVI(Adversarial("wasserstein", critic_steps=2), steps=9, batch_size=8),
        ROWS,
    ),
    "players at once, projected, averaged": (
        lambda: gan(latent=2, hidden=(4,)),
        SVI(
            Adversarial("wasserstein", penalty="projection", schedule="simultaneous", averaging=0.9),
            steps=9,
            batch_size=8,
            lr=0.01,
        ),
        ROWS,
    ),
    "two players, batch normalisation in both": (
        lambda: dcgan(latent=2, filters=2),
        SVI(Adversarial(), steps=9, batch_size=8),
        IMAGES,
    ),
    "a critic for every site": (
        lambda: lapgan(levels=1, latent=2, filters=2, hidden=(3,)),
        SVI(ConditionalAdversarial(), steps=9, batch_size=8),
        IMAGES,
    ),
    "an energy": (lambda: gan(latent=2, hidden=(4,)), SVI(EBGAN(energy_steps=2), steps=9, batch_size=8), ROWS),
    "matched codes": (lambda: vae(latent=2, hidden=(4,)), SVI(WAE("mmd"), steps=9, batch_size=8), ROWS),
    "a critic of codes": (lambda: vae(latent=2, hidden=(4,)), SVI(WAE("gan"), steps=9, batch_size=8), ROWS),
    "worst rows": (lambda: in_domains, SVI(AdversarialTraining(steps=2), steps=9, batch_size=8), DOMAINS),
    "a critic of domains": (lambda: in_domains, SVI(DomainAdversarial(), steps=9, batch_size=8), DOMAINS),
    "persistent chains": (
        lambda: rbm(hidden=3),
        SVI(ContrastiveDivergence(persistent=True), steps=9, batch_size=6, lr=0.05, optimiser="sgd"),
        BITS,
    ),
    "tempered chains": (
        lambda: rbm(hidden=3),
        SVI(ContrastiveDivergence(persistent=True, temperatures=3), steps=9, batch_size=6, lr=0.05),
        BITS,
    ),
    "wake and sleep": (
        lambda: helmholtz(hidden=(3, 2)),
        SVI(WakeSleep(particles=2, guide="both"), steps=9, batch_size=6, lr=0.05),
        BITS,
    ),
    "walkback": (lambda: gsn(hidden=(4,)), SVI(Walkback(), steps=9, batch_size=6, lr=0.05), BITS),
    "EM": (lambda: gaussian_mixture(components=2), EM(steps=9, tolerance=0.0), PAIRS),
    "EM by gradients": (lambda: gaussian_mixture(components=2), EM(steps=9, tolerance=0.0, m_step="gradient"), PAIRS),
    "EM from minibatches": (lambda: gaussian_mixture(components=2), EM(steps=9, batch_size=7), PAIRS),
    "Laplace": (lambda: gaussian_mixture(components=2), Laplace(steps=9), PAIRS),
    "Pathfinder": (lambda: gaussian_mixture(components=2), Pathfinder(paths=2, steps=9, draws=100, memory=1), PAIRS),
    "CAVI": (lambda: gaussian_mixture(components=2), CAVI(steps=9, tolerance=0.0), PAIRS),
}


def numbers(fit: pg.Fit) -> dict[str, torch.Tensor]:
    """All that a fit learned, by name."""
    networks = {f"{n}/{k}": v for n, m in fit.extra_modules.items() for k, v in m.state_dict().items()}
    return {**fit.state.unconstrained, **fit.state.buffers, **networks, **(fit.point or {})}
