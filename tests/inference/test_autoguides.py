"""Every automatic guide of Pyro, asked every question about a posterior that is known in closed form."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.infer.autoguide as auto
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions import transforms
from pyro.distributions.transforms import iterated
from pyro.infer.reparam import LocScaleReparam

import ppl_gen as pg
from ppl_gen.inference import IWAE, SVI

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

XS = torch.tensor([1.6, 0.4, 0.9, 2.1, 1.1, 0.2, 1.8, 1.3])
YS = torch.tensor([-0.8, -1.4, -0.6, -1.1, -0.2, -1.3, -0.9, -1.5])
DATA = {"x": XS, "y": YS}
N = len(XS)


def model(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)
        pyro.sample("y", dist.Normal(b, 0.5), obs=y)


def exact():
    """Mean and sd of (a, b), and log p(x, y): a Gaussian in two dimensions."""
    precision = torch.tensor([[2.0 + N, -1.0], [-1.0, 1.0 + 4.0 * N]]).double()
    pull = torch.stack([XS.sum(), 4.0 * YS.sum()]).double()
    mean, cov = torch.linalg.solve(precision, pull), torch.inverse(precision)
    a, b = mean
    joint = dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(a, 1.0).log_prob(b)
    joint = joint + dist.Normal(a, 1.0).log_prob(XS.double()).sum()
    joint = joint + dist.Normal(b, 0.5).log_prob(YS.double()).sum()
    return mean, cov.diagonal().sqrt(), float(joint - dist.MultivariateNormal(mean, cov).log_prob(mean))


def in_a_list(model):
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoNormal(pyro.poutine.block(model, expose=["a"])))
    guide.append(auto.AutoDiagonalNormal(pyro.poutine.block(model, expose=["b"])))
    return guide


def by_hand(x, y):
    for name in "ab":
        loc = pyro.param(f"{name}_loc", torch.tensor(0.0))
        scale = pyro.param(f"{name}_scale", torch.tensor(0.3), constraint=dist.constraints.positive)
        pyro.sample(name, dist.Normal(loc, scale))


class Easy(EasyGuide):
    def guide(self, x, y):
        group = self.group("[ab]")
        loc = pyro.param("loc", torch.zeros(group.event_shape))
        scale = pyro.param("scale", torch.full(group.event_shape, 0.3), constraint=dist.constraints.positive)
        group.sample("both", dist.Normal(loc, scale).to_event(1))


def flow(kind):
    return lambda model: auto.AutoNormalizingFlow(model, partial(iterated, 2, getattr(transforms, kind)))


def structured(model):
    return auto.AutoStructured(model, conditionals={"a": "mvn", "b": "normal"}, dependencies={"b": {"a": "linear"}})


NORMAL = {
    "AutoNormal": auto.AutoNormal,
    "AutoDiagonalNormal": auto.AutoDiagonalNormal,
    "AutoMultivariateNormal": auto.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": auto.AutoLowRankMultivariateNormal,
    "AutoLaplaceApproximation": auto.AutoLaplaceApproximation,
    "AutoGaussian": auto.AutoGaussian,
    "AutoNormalMessenger": auto.AutoNormalMessenger,
    "AutoHierarchicalNormalMessenger": auto.AutoHierarchicalNormalMessenger,
    "AutoRegressiveMessenger": auto.AutoRegressiveMessenger,
    "AutoNormalMessenger instance": lambda model: auto.AutoNormalMessenger(model),
    "AutoGuideList": in_a_list,
    "AutoStructured": structured,
    "AutoCallable": lambda model: auto.AutoCallable(model, by_hand),
    "EasyGuide": Easy,
    "EasyGuide instance": lambda model: Easy(model),
}
FLOWS = ["planar", "radial", "block_autoregressive", "affine_autoregressive", "affine_coupling", "spline"]
FLOWING = {"AutoIAFNormal": auto.AutoIAFNormal, **{kind: flow(kind) for kind in FLOWS}}
QUICK = {"AutoLaplaceApproximation", "AutoNormalMessenger", "EasyGuide"}


def named(table):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in table]


def program_of(guide):
    if isinstance(guide, type):
        return pg.Program(model, guide)
    return pg.Recipe(lambda data: pg.Program(model, guide(model)), name="model")


def answers_agree(fit, program, tmp_path):
    """What has to be right whatever the guide: the weights, the export and the copy on disk."""
    _, _, evidence = exact()
    found = fit.marginal_likelihood(draws=400)
    # Unbiased on the scale of densities; the logarithm lies low by half the squared error.
    assert abs(found.mean - evidence) < 5 * found.mc_stderr + found.mc_stderr**2 + 1e-3
    assert math.isfinite(fit.diagnose(draws=200).attrs["pareto_k"])
    statistics = fit.to_arviz(draws=50)["sample_stats"]
    assert float((statistics["log_p"] - statistics["log_q"]).mean()) < evidence + 0.5
    assert fit.sample(3)["x"].shape == (3,) and fit.predict(draws=4)["y"].shape == (4, N)
    loaded = pg.load(fit.save(tmp_path / "fit"), program=program)
    before, after = fit.posterior(draws=3, seed=1), loaded.posterior(draws=3, seed=1)
    assert all(torch.equal(before[name], after[name]) for name in "ab")
    assert loaded.marginal_likelihood(draws=400).mean == found.mean


@pytest.mark.parametrize("name", named(NORMAL))
def test_normal_guides_find_the_exact_posterior(name, tmp_path):
    program = program_of(NORMAL[name])
    fit = pg.fit(program, DATA, SVI(steps=800, lr=0.02))
    mean, sd, _ = exact()
    drawn = fit.posterior(draws=2000)
    for i, site in enumerate("ab"):
        # The optimiser's own noise at this rate is about a tenth of an sd in the mean, and a tenth of the sd.
        assert abs(float(drawn[site].mean()) - mean[i]) < 0.4 * sd[i]
        assert float(drawn[site].std()) == pytest.approx(float(sd[i]), rel=0.35)
    answers_agree(fit, program, tmp_path)


@pytest.mark.filterwarnings("ignore:marginal_likelihood")  # some are far from the posterior, and say so
@pytest.mark.parametrize("name", named(FLOWING))
def test_flows_weigh_their_draws(name, tmp_path):
    program = program_of(FLOWING[name])
    answers_agree(pg.fit(program, DATA, SVI(steps=600, lr=0.02)), program, tmp_path)
    assert math.isfinite(pg.fit(program, DATA, SVI(IWAE(particles=2), steps=2)).records["program_loss"][-1])


def test_the_second_stage_of_a_laplace_approximation_is_the_exact_normal():
    program = pg.Program(model, auto.AutoLaplaceApproximation)
    fit = pg.fit(program, DATA, SVI(steps=800, lr=0.02))
    _, sd, evidence = exact()
    drawn = fit.posterior(draws=4000)
    for i, site in enumerate("ab"):
        # The sd of 4000 draws is known to 1 / sqrt(8000) = 1.1 %; five of these.
        assert float(drawn[site].std()) == pytest.approx(float(sd[i]), rel=0.056)
    # The guide is the posterior but for the last steps of the optimiser: every draw has the same weight.
    assert fit.marginal_likelihood(draws=50).mean == pytest.approx(evidence, abs=1e-3)
    assert "inverse Hessian" in fit.notes["second stage"]
    again = pg.fit(program, DATA, SVI(steps=5, lr=1e-4), start=fit)
    assert float(again.posterior(draws=4000)["a"].std()) == pytest.approx(float(sd[0]), rel=0.056)


def test_a_second_stage_sums_finite_latents_out():
    def switch(x):
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(m + k, 1.0), obs=x)

    fit = pg.fit(pg.Program(switch, auto.AutoLaplaceApproximation), XS, SVI(steps=600, lr=0.02))

    def minus_log_joint(m):
        low, high = dist.Normal(m, 1.0).log_prob(XS), dist.Normal(m + 1, 1.0).log_prob(XS)
        mixed = torch.logaddexp(math.log(0.7) + low, math.log(0.3) + high)
        return -(mixed.sum() + dist.Normal(0.0, 3.0).log_prob(m))

    at = fit.params["AutoLaplaceApproximation.loc"][0]
    curvature = torch.autograd.functional.hessian(minus_log_joint, at)
    assert float(fit.posterior(draws=4000)["m"].std()) == pytest.approx(float(curvature) ** -0.5, rel=0.056)


def test_a_second_stage_without_a_maximum_fails_in_words_and_keeps_the_point(tmp_path):
    def saddle(x):
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m**2, 0.5), obs=x)

    program = pg.Program(
        saddle, auto.AutoLaplaceApproximation(saddle, init_loc_fn=auto.init_to_value(values={"m": torch.tensor(0.0)}))
    )
    fit = pg.fit(program, XS, SVI(steps=2, lr=1e-5))
    assert fit.status == "failed" and "second stage" in fit.message and "AutoMultivariateNormal" in fit.message
    assert "m at one value" in fit.diagnose().attrs["verdict"]
    loaded = pg.load(fit.save(tmp_path / "fit"), program=program)
    assert torch.equal(loaded.posterior(draws=1)["m"], fit.posterior(draws=1)["m"])


def test_discrete_guides_are_for_finite_sites_alone():
    def finite(x):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    few = torch.tensor([1.0, 2.0, 0.5, 1.4])
    fit = pg.fit(pg.Program(finite, auto.AutoDiscreteParallel), few, SVI(steps=300, lr=0.05))
    parts = [math.log(0.5) + float(dist.Normal(m, 1.0).log_prob(few).sum()) for m in (0.0, 2.0)]
    assert fit.marginal_likelihood(draws=200).mean == pytest.approx(math.log(sum(map(math.exp, parts))), abs=0.05)
    with pytest.raises(pg.IncompatibleError, match="AutoDiscreteParallel guides finite latent sites only.*a, b"):
        pg.fit(pg.Program(model, auto.AutoDiscreteParallel), DATA, SVI(steps=2))
    with pytest.raises(TypeError, match="AutoNormalizingFlow cannot be made of a model alone"):
        pg.fit(pg.Program(model, auto.AutoNormalizingFlow), DATA, SVI(steps=2))


def test_a_guide_in_use_whose_first_values_hang_on_parameters_is_copied():
    """Its prototype holds tensors with a history, which torch refuses to copy; oracle: the fit of a fresh guide."""

    def centred(x):
        with pyro.poutine.reparam(config={"loc": LocScaleReparam()}):
            loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.randn(6, generator=torch.Generator().manual_seed(0))
    with pyro.get_param_store().scope():
        used, fresh = (auto.AutoNormal(centred) for _ in range(2))
        pyro.set_rng_seed(0)
        used(x)
        assert any(n["value"].grad_fn is not None for n in used.prototype_trace.nodes.values() if "value" in n)
        with torch.no_grad():
            used.locs.loc_decentered.zero_()
        before = used.locs.loc_decentered.clone()
    fits = [pg.fit(pg.Program(centred, guide), x, SVI(steps=500, lr=0.02), seed=0) for guide in (used, fresh)]
    one, two = (f.params["AutoNormal.locs.loc_decentered"] for f in fits)
    assert abs(float(one - two)) < 0.1 and torch.equal(used.locs.loc_decentered, before)


@pytest.mark.parametrize("made", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["class", "instance"])
@pytest.mark.parametrize("kind", [auto.AutoGaussian, pytest.param(auto.AutoStructured, marks=pytest.mark.slow)])
def test_guides_by_dependencies_see_what_observations_tie_together(kind, made):
    """Of two standard normals, whose sum four rows see with unit noise, the posterior has precision I + 4 (1, 1)(1, 1)'.

    So their correlation is -4/5; a guide that sees the prior's dependencies alone has 0, to 0.09 (5.5 sd of 4000 draws).
    """

    def both(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def correlation(fit):
        draws = fit.posterior(draws=4000, seed=1)
        return float(torch.corrcoef(torch.stack([draws["a"], draws["b"]]))[0, 1])

    program = pg.Recipe(lambda data: pg.Program(both, kind(both) if made else kind), name="both")
    x = torch.tensor([0.2, 1.4, -0.7, 0.9])
    assert abs(correlation(pg.fit(program, x, SVI(steps=1), seed=0))) < 0.4  # not yet learned
    assert correlation(pg.fit(program, x, SVI(steps=700, lr=0.05), seed=0)) == pytest.approx(-0.8, abs=0.1)
