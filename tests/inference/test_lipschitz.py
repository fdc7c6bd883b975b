"""What keeps a critic Lipschitz: clipping, projection onto weights of norm one; and distances that need none of it."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI, Adversarial
from ppl_gen.inference.objectives.adversarial import published_optimiser
from ppl_gen.inference.objectives.costs import COSTS
from ppl_gen.inference.objectives.critics import data_penalty, largest_singular_value, starting_vectors, weight_matrices
from ppl_gen.models import gan

#: Rows that all are alike get a warning.
pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")

NETWORK = nn.Sequential(
    nn.Linear(2, 128), nn.Conv2d(3, 8, 5), nn.ConvTranspose2d(6, 4, 3), nn.Linear(128, 128), nn.LayerNorm(4)
)


def test_weights_as_matrices_from_inputs_to_outputs() -> None:
    shapes = {name: tuple(matrix.shape) for name, matrix in weight_matrices(NETWORK).items()}
    assert shapes == {"0.weight": (128, 2), "1.weight": (8, 75), "2.weight": (4, 54), "3.weight": (128, 128)}
    frozen = nn.Sequential(nn.Linear(2, 3).requires_grad_(False), nn.Linear(3, 1))
    assert list(weight_matrices(frozen)) == ["1.weight"]
    # A matrix product on patches is the convolution, whichever way its weights are stored.
    x, up, down = torch.randn(1, 6, 1, 1), NETWORK[2], NETWORK[1]
    matrix = weight_matrices(NETWORK)["2.weight"]
    made = torch.einsum("oik,i->ok", matrix.reshape(4, 6, 9), x.flatten()) + up.bias.detach()[:, None]
    torch.testing.assert_close(up(x).detach().reshape(4, 9), made, rtol=1e-5, atol=1e-5)
    patch = torch.randn(1, 3, 5, 5)
    made = weight_matrices(NETWORK)["1.weight"] @ patch.flatten() + down.bias.detach()
    torch.testing.assert_close(down(patch).detach().flatten(), made, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_power_iteration_is_within_a_thousandth_after_thirty_steps(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Noise, as in a network that has not learned yet: its largest singular values lie closest together.
    for shape in ((128, 2), (1, 128), (64, 32), (128, 128), (32, 144)):
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
        exact = float(torch.linalg.matrix_norm(matrix, 2))
        begin = starting_vectors(matrix)
        found = float(largest_singular_value(matrix, begin, steps=30)[0])
        assert exact * (1 - 1e-3) < found <= exact * (1 + 1e-12)
        if min(shape) > 4:
            assert float(largest_singular_value(matrix, begin, steps=0)[0]) < 0.9 * exact


@pytest.mark.parametrize("convolutions", [False, True])
def test_a_projected_critic_has_weights_of_norm_one_at_most(convolutions: bool) -> None:
    torch.manual_seed(0)
    if convolutions:
        layers = [nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2), nn.Flatten()]
        critic = nn.Sequential(*layers, nn.Linear(27, 1))
    else:
        critic = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    with torch.no_grad():
        for weight in critic.parameters():
            weight.mul_(3.0)
    norms = [float(torch.linalg.matrix_norm(matrix, 2)) for matrix in weight_matrices(critic).values()]
    data = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    objective = Adversarial("wasserstein", critic=critic, penalty="projection", critic_steps=2)
    fit = pg.fit(gan(latent=2, hidden=(4,)), data, SVI(objective, steps=120, batch_size=10, lr=1e-3), seed=0)
    assert "constraint: projection" in fit.notes["critic"] and fit.cost["path"] == "graph"
    trained = weight_matrices(fit.module("critic"))
    for matrix in trained.values():
        assert float(torch.linalg.matrix_norm(matrix, 2)) <= 1 + 1e-3
    assert max(norms) > 2, "before, they were not"
    still = [float(torch.linalg.matrix_norm(m, 2)) for m in weight_matrices(critic).values()]
    assert still == norms, "the network that was given stays as it was"
    if not convolutions:  # norms of one make a perceptron of rectifiers 1-Lipschitz, which is what the distance needs
        x, y = torch.randn(2, 500, 16, generator=torch.Generator().manual_seed(2))
        net = fit.module("critic")
        with torch.no_grad():
            slopes = (net(x) - net(y)).squeeze(1).abs() / torch.linalg.vector_norm(x - y, dim=1)
        assert float(slopes.max()) <= (1 + 1e-3) ** 3


def test_a_projected_critic_at_first_steps_takes_weights_below_norm_one_as_they_are() -> None:
    critic = nn.Linear(16, 1)
    with torch.no_grad():
        critic.weight.mul_(0.1)
    data = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    fits = [
        pg.fit(
            gan(latent=2, hidden=(4,)),
            data,
            SVI(Adversarial("wasserstein", critic=critic, penalty=penalty, critic_steps=1), steps=3, lr=1e-4),
            seed=0,
        )
        for penalty in ("projection", "none")
    ]
    assert torch.equal(*(fit.module("critic").weight for fit in fits))


def test_r1_of_a_linear_critic_is_exact_and_pulls_its_slope_to_nothing() -> None:
    flat = nn.Linear(3, 1).double()
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    penalty = data_penalty(flat, torch.randn(7, 3, dtype=torch.float64), scale)
    weight = flat.weight.detach()
    assert abs(float(penalty.detach()) - 0.5 * float((scale * weight).square().sum())) < 1e-12
    (pull,) = torch.autograd.grad(penalty, [flat.weight])
    torch.testing.assert_close(pull, scale.square() * weight, rtol=1e-12, atol=0)
    critic = nn.Linear(16, 1)
    data = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    objective = Adversarial(critic=critic, penalty="r1", penalty_weight=2.0)
    fit = pg.fit(gan(latent=2, hidden=(4,)), data, SVI(objective, steps=1), seed=0)
    slope = data.std(0, correction=0) * critic.weight.detach()
    assert float(fit.records["penalty"][0]) == pytest.approx(0.5 * float(slope.square().sum()), rel=1e-5)
    bound = math.log(4) - (fit.records["critic_loss"][0] - 2.0 * fit.records["penalty"][0])
    assert fit.records["divergence_bound"][0] == pytest.approx(bound, rel=1e-4), "penalties are no part of the bound"


# Two parallel lines: data at (0, h), program at (theta, h), h uniform.


def _lines(theta: float) -> object:
    def lines(x: torch.Tensor) -> None:
        shift = pyro.param("theta", torch.tensor(theta))
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Delta(torch.stack([shift.expand_as(h), h], -1), event_dim=1), obs=x)

    return lines


def _rows(theta: float, count: int = 1000) -> torch.Tensor:
    h = torch.linspace(0.0, 1.0, count)
    return torch.stack([torch.full_like(h, theta), h], -1)


#: Distance -> what it is, whatever theta is but 0.
TABLE = {"W1": abs, "JS": lambda _: math.log(2), "KL": lambda _: math.inf, "TV": lambda _: 1.0}


@pytest.mark.parametrize("theta", [1.0, -0.25])
def test_the_table_of_the_parallel_lines_from_samples(theta: float) -> None:
    data = _rows(0.0)
    rates = {"critic": 1e-2, "program": 1e-12}  # the program stays where it is
    found = {}
    for name, objective in {
        "JS": Adversarial("jensen-shannon"),
        "KL": Adversarial("kl"),
        "TV": Adversarial("hinge"),
    }.items():
        fit = pg.fit(_lines(theta), data, SVI(objective, steps=300, batch_size=64, lr=rates), seed=0)  # type: ignore[arg-type]
        found[name] = np.array(fit.records["divergence_bound"])
    # Twice JS at a critic that is nearly sure; a bound that approaches from below.
    js = found["JS"][-20:] / 2
    assert 0.97 * math.log(2) < js.mean() <= math.log(2) and abs(found["JS"][0] / 2) < 0.3
    assert 0.97 < found["TV"][-20:].mean() <= 1.0 + 1e-6 and found["TV"][0] < 0.5
    # KL is infinite, and no bound too high. The critic's exponential pays for every error, so that at this rate it is
    # steady only on lines that are far apart.
    if theta == 1.0:
        assert found["KL"][-20:].mean() > 20 and found["KL"][0] < 1
    fit_rows = torch.sort(_rows(theta)[:, 0]).values - torch.sort(data[:, 0]).values
    assert float(fit_rows.abs().mean()) == pytest.approx(TABLE["W1"](theta))


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_a_projected_critic_estimates_w1_and_a_clipped_one_a_multiple_of_it(theta: float) -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    found = {}
    for penalty in ("projection", "clip"):
        objective = Adversarial("wasserstein", critic=critic, penalty=penalty, critic_steps=1, clip=0.1)
        algorithm = SVI(objective, steps=600, batch_size=64, lr={"critic": 5e-3, "program": 1e-12})
        fit = pg.fit(_lines(theta), _rows(0.0), algorithm, seed=0)  # type: ignore[arg-type]
        with torch.no_grad():
            found[penalty] = float((net := fit.module("critic"))(_rows(0.0)).mean() - net(_rows(theta)).mean())
    # Three layers of norm one at most: never more than W1, and nearly that, since one direction is all it takes.
    assert 0.85 * theta < found["projection"] <= theta * (1 + 1e-3) ** 3
    # Weights of 0.1 at most: a ReLU network of 2, 32, 32, 1 has slope K = 0.1 * 32 * 0.1 * 32 * 0.1 = 1.0 along one
    # axis where all of its units are open, in both directions at once about half of that.
    found_k = found["clip"] / theta
    assert 0.2 < found_k <= 1.024 + 1e-6


def test_a_clipped_critic_s_multiple_is_the_same_at_every_distance() -> None:
    multiples = []
    for theta in (0.5, 2.0):
        objective = Adversarial("wasserstein", critic=nn.Linear(2, 1), critic_steps=1, clip=0.01)
        algorithm = SVI(objective, steps=150, lr={"critic": 1e-3, "program": 1e-12})
        fit = pg.fit(_lines(theta), _rows(0.0, 200), algorithm, seed=0)  # type: ignore[arg-type]
        gap = fit.records["critic_real"][-1] - fit.records["critic_fake"][-1]
        multiples.append(gap / theta)
    assert multiples == pytest.approx([0.01, 0.01], rel=0.1)  # the largest slope along an axis: K = clip


def test_defaults_are_those_that_wgan_was_published_with() -> None:
    game = Adversarial("wasserstein")
    assert (game.constraint(torch.zeros(2, 2)), game.clip, game.critic_updates) == ("clip", 0.01, 5)
    optimiser = published_optimiser("clip", [torch.zeros(1, requires_grad=True)])
    assert isinstance(optimiser, torch.optim.RMSprop) and optimiser.defaults["lr"] == 5e-5
    assert COSTS["wasserstein"].border is None
