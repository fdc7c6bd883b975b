"""The games' values at their best critics against closed forms, and what any other critic makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ppl_gen as pg
from ppl_gen.inference import SVI, Adversarial, Divergence
from ppl_gen.inference.objectives.costs import COSTS, costs_of
from ppl_gen.inference.objectives.divergences import DIVERGENCES
from ppl_gen.models import gan

GRID = torch.linspace(-30.0, 30.0, 20_001, dtype=torch.float64)
SCALE = 1.5  # of the made rows, Normal(1, 1.5); data are Normal(0, 1)
LOG_P = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double()).log_prob(GRID)
LOG_Q = torch.distributions.Normal(torch.tensor(1.0).double(), torch.tensor(SCALE).double()).log_prob(GRID)


def _integral(values: Tensor) -> float:
    return float(torch.trapezoid(values, GRID))


def _cost(kind: str | Divergence, output: Tensor) -> float:
    costs = costs_of(kind)
    return _integral(LOG_P.exp() * costs.real(output) + LOG_Q.exp() * costs.fake(output))


def _js() -> float:
    log_m = torch.logaddexp(LOG_P, LOG_Q) - math.log(2)
    return 0.5 * _integral(LOG_P.exp() * (LOG_P - log_m)) + 0.5 * _integral(LOG_Q.exp() * (LOG_Q - log_m))


#: In closed form for two normals, Jensen-Shannon by its definition (it has none).
EXACT = {
    "kl": math.log(SCALE) + 2 / (2 * SCALE**2) - 0.5,
    "reverse-kl": -math.log(SCALE) + (SCALE**2 + 1) / 2 - 0.5,
    "hellinger": 2 - 2 * math.sqrt(2 * SCALE / (1 + SCALE**2)) * math.exp(-0.25 / (1 + SCALE**2)),
    "jensen-shannon": 2 * _js(),
    "pearson": SCALE**2 / math.sqrt(2 * SCALE**2 - 1) * math.exp(1 / (2 * SCALE**2 - 1)) - 1,
}
RATIO = LOG_P - LOG_Q
#: The outputs r at which activation(r) = f'(p/q).
BEST = {
    "kl": RATIO + 1,
    "reverse-kl": RATIO,
    "hellinger": RATIO / 2,
    "jensen-shannon": RATIO,
    "pearson": 2 * (RATIO.exp() - 1),
}


@pytest.mark.parametrize("kind", list(EXACT))
def test_the_value_at_the_best_critic_is_the_divergence(kind: str) -> None:
    # Smooth integrands that vanish at the ends of a grid of 3e-3: the rule is exact to rounding.
    assert abs(-_cost(kind, BEST[kind]) - EXACT[kind]) < 1e-6
    assert abs(-_cost(kind, torch.full_like(GRID, costs_of(kind).border))) < 1e-6, "a critic at chance sees no distance"
    assert EXACT[kind] > 0.1


@pytest.mark.parametrize("kind", list(EXACT))
def test_fenchel_and_young_meet_at_the_best_critic_and_nowhere_else(kind: str) -> None:
    chosen = DIVERGENCES[kind]
    assert chosen.conjugate is not None
    u = torch.logspace(-4, 4, 81, dtype=torch.float64)
    t = chosen.slope(u)
    both, product = chosen.f(u) + chosen.conjugate(t), u * t
    assert float(((both - product).abs() / (1 + product.abs())).max()) < 1e-10
    u = torch.logspace(-1, 1, 21, dtype=torch.float64)
    other = chosen.slope(u * 1.1)
    assert bool((chosen.f(u) + chosen.conjugate(other) - u * other > 1e-5).all())


@pytest.mark.parametrize("kind", list(EXACT))
def test_no_critic_makes_more_of_it(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    bounds = []
    for _ in range(100):
        size, pitch, phase = torch.rand(3, 5, generator=generator, dtype=torch.float64)
        wave = (size[:, None] * torch.sin(4 * pitch[:, None] * GRID + 6.3 * phase[:, None])).sum(0)
        share = float(torch.rand((), generator=generator)) * 1.2  # of the way to the best critic, and beyond
        bounds.append(-_cost(kind, share * BEST[kind] + (1 - share) * costs_of(kind).border + wave * (1 - share)))
    # The critics differ: some see next to nothing, some nearly all of it, and none more than there is.
    assert max(bounds) < EXACT[kind] and min(bounds) < 0.5 * EXACT[kind] and max(bounds) > 0.8 * EXACT[kind]


def test_jensen_shannon_is_half_the_optimum_of_minimax_plus_log_4() -> None:
    assert abs((-_cost("minimax", RATIO) + math.log(4)) / 2 - EXACT["jensen-shannon"] / 2) < 1e-10
    for kind in ("minimax", "non-saturating"):
        bound = COSTS[kind].bound
        assert bound is not None
        assert abs(float(bound(torch.tensor(_cost(kind, RATIO)))) - EXACT["jensen-shannon"]) < 1e-6


@pytest.mark.parametrize("kind", ["least-squares", "hinge"])
def test_what_least_squares_and_hinge_bound(kind: str) -> None:
    p, q = LOG_P.exp(), LOG_Q.exp()
    best = {"least-squares": RATIO.sigmoid(), "hinge": RATIO.sign()}[kind]
    exact = {
        "least-squares": _integral((p - q).square() / (p + q).clamp_min(1e-300)),
        "hinge": 0.5 * _integral((p - q).abs()),
    }[kind]
    bound = COSTS[kind].bound
    assert bound is not None
    # The hinge has kinks where the densities cross, which the rule meets to a step of the grid squared, 1e-5.
    assert abs(float(bound(torch.tensor(_cost(kind, best)))) - exact) < 1e-5
    for other in (best * 0.8, best + 0.1, best + 0.2 * GRID.sin()):
        assert float(bound(torch.tensor(_cost(kind, other)))) < exact - 1e-3


def test_the_program_descends_what_the_critic_ascends() -> None:
    output = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    for name, costs in COSTS.items():
        opposed = bool((costs.program(output) + costs.fake(output)).abs().max() < 1e-12)
        assert opposed is (costs.zero_sum and name != "hinge"), name
        assert bool((costs.program(output).diff() < 0).all()) or name in ("pearson", "least-squares"), name


def test_one_s_own_f_alone_is_as_good_as_with_its_conjugate() -> None:
    alone = Divergence(lambda u: u * u.log())
    assert abs(-_cost(alone, RATIO) - EXACT["kl"]) < 1e-6
    output = RATIO[9000:11000].clone().requires_grad_()
    costs = costs_of(alone)
    costs.fake(output).sum().backward()  # d/dr of u f'(u) - f(u) = u at u = exp r
    assert output.grad is not None
    torch.testing.assert_close(output.grad, output.detach().exp(), rtol=1e-10, atol=0)
    assert alone.border == 0.0


def test_total_variation_as_a_divergence_of_one_s_own() -> None:
    total = Divergence(lambda u: (u - 1).abs() / 2, lambda t: t, lambda r: r.tanh() / 2)
    exact = 0.5 * _integral((LOG_P.exp() - LOG_Q.exp()).abs())
    assert abs(-_cost(total, 40.0 * RATIO.sign()) - exact) < 1e-5
    assert -_cost(total, RATIO) < exact - 1e-3


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (("u log u",), TypeError, "f: expected a function, got str"),
        ((lambda u: u * u.log() + 1,), ValueError, r"f: f\(1\) has to be 0"),
        ((lambda u: -((u - 1) ** 2),), ValueError, "f: expected a convex function"),
        ((lambda u: (u - 1).log(),), ValueError, "f: expected one finite number for each ratio"),
        ((lambda u: (u - 1).abs(),), ValueError, "f: it has straight parts"),
        ((lambda u: (u - 1).detach().square(),), ValueError, "f: torch finds no derivative"),
        ((lambda u: u * u.log(), lambda t: t.exp()), ValueError, "conjugate: at t = f'"),
        ((lambda u: u * u.log(), 3), TypeError, "conjugate: expected a function, got int"),
        ((lambda u: u * u.log(), None, torch.tanh), ValueError, "conjugate: an activation leads"),
        ((lambda u: -u.log(), lambda t: -1 - (-t).log()), ValueError, "activation: it leads out of the domain"),
        (
            (lambda u: u * u.log(), lambda t: (t - 1).exp(), torch.sigmoid),
            ValueError,
            "activation: it reaches 9.36e-14 to 1, and the best critic takes values from -1.3",
        ),
        ((lambda u: u * u.log(), lambda t: (t - 1).exp(), torch.neg), ValueError, "activation: expected a rising"),
        (
            # Right at every t = f'(u), and too small where no u has that slope: for t < -2 the supremum is at u = 0.
            (lambda u: (u - 1) ** 2, lambda t: torch.where(t < -2, t, t.square() / 4 + t)),
            ValueError,
            r"conjugate: f\(u\) \+ f\*\(t\) has to be u t at least",
        ),
    ],
)
def test_a_divergence_that_is_none_is_refused(parts: tuple[object, ...], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Divergence(*parts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", [*DIVERGENCES, "least-squares", "hinge", Divergence(lambda u: u * u.log(), name="mine")]
)
def test_a_fit_records_the_bound_and_what_it_bounds(kind: str | Divergence) -> None:
    data = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    algorithm = SVI(Adversarial(kind, penalty="none"), steps=4, batch_size=16)
    fit = pg.fit(gan(latent=2, hidden=(4,)), data, algorithm, seed=0)
    costs = costs_of(kind)
    assert costs.bound is not None and costs.of in fit.notes["divergence_bound"]
    bound = costs.bound(torch.tensor(fit.records["critic_loss"]))
    torch.testing.assert_close(bound, torch.tensor(fit.records["divergence_bound"]), rtol=1e-5, atol=1e-5)
    assert {"critic_accuracy_real", "critic_accuracy_fake", "spread"} <= set(fit.history.data_vars)
    assert fit.sample(3)["x"].shape == (3, 2)


def test_weights_belong_to_classifiers_alone() -> None:
    with pytest.raises(ValueError, match=r"weight: the KL\(data, program\) game weighs both kinds of rows alike"):
        Adversarial(DIVERGENCES["kl"], weight=2.0)
    data = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    weighed = pg.fit(gan(latent=2, hidden=(4,)), data, SVI(Adversarial(weight=2.0), steps=2), seed=0)
    assert "divergence_bound" not in weighed.records, "with another weight the value is that of no divergence"
