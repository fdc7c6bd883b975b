"""A guide of one's own: Student's t beside a normal guide, on a posterior with heavy tails."""

import os

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoContinuous, AutoNormal, init_to_feasible
from pyro.nn import PyroParam

import ppl_gen as pg
from ppl_gen.inference import SVI

quick = bool(os.environ.get("PPL_GEN_QUICK"))


class AutoStudentT(AutoContinuous):
    """Independent t factors in the unconstrained space, each with a location and a scale; ``df`` is given."""

    def __init__(self, model, init_loc_fn=init_to_feasible, df=3.0):
        self.df = df
        super().__init__(model, init_loc_fn=init_loc_fn)

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        self.loc = torch.nn.Parameter(self._init_loc())
        self.scale = PyroParam(torch.full_like(self.loc, 0.1).detach(), dist.constraints.softplus_positive)

    def get_posterior(self, *args, **kwargs):
        return dist.StudentT(self.df, self.loc, self.scale).to_event(1)


def location(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 100.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Cauchy(loc, 1.0), obs=x)


x = torch.tensor([-0.5, 1.0])
at = torch.linspace(-500.0, 500.0, 100_001)
log_joint = dist.Normal(0.0, 100.0).log_prob(at) + dist.Cauchy(at[:, None], 1.0).log_prob(x).sum(1)
exact = (log_joint - log_joint.logsumexp(0)).exp()
beyond = {"posterior": float(exact[(at - 0.25).abs() > 5.0].sum())}

figure = Figure(figsize=(10, 4), layout="constrained")
left, right = figure.subplots(1, 2)
shown = (at - 0.25).abs() < 12.0
left.semilogy(at[shown], exact[shown] / 0.01, color="black", label="posterior")
seeds = range(1 if quick else 5)
k, grades = {}, {}
for kind in (AutoNormal, AutoStudentT):
    program = pg.Program(location, guide=kind)
    fits = [pg.fit(program, x, SVI(steps=100 if quick else 1500, lr=0.02), seed=seed) for seed in seeds]
    name = kind.__name__
    k[name] = [fit.diagnose().attrs["pareto_k"] for fit in fits]
    grades[name] = [fit.verdict.grade for fit in fits]
    draws = torch.stack([fit.posterior(draws=4000)["loc"] for fit in fits])
    beyond[name] = float(((draws - 0.25).abs() > 5.0).float().mean())
    loc, scale = (value.reshape(()) for value in fits[0].params.values())
    factor = dist.Normal(loc, scale) if kind is AutoNormal else dist.StudentT(3.0, loc, scale)
    left.semilogy(at[shown], factor.log_prob(at[shown]).exp(), label=name)
    right.plot(seeds, k[name], "o", label=name)
    print(f"{name}: k-hat {[round(found, 2) for found in k[name]]}, {grades[name]}")
print("mass farther than 5 from the middle", beyond)
left.set(xlabel="loc", ylabel="density", ylim=(1e-7, 1.0), title="Seed 0")
right.axhline(0.7, color="black", lw=1, label="limit of trust")
right.set(xlabel="seed", ylabel="k-hat", xticks=seeds)
left.legend(frameon=False)
right.legend(frameon=False)
figure.savefig("own_guide.png", dpi=120)
if not quick:
    assert min(k["AutoNormal"]) > 0.7 > max(k["AutoStudentT"]), "weights of the normal guide have no finite variance"
    assert beyond["AutoNormal"] < 0.01 * beyond["posterior"], "the normal guide knows nothing of the tails"
    assert 0.5 < beyond["AutoStudentT"] / beyond["posterior"] < 2.0, "Student's t has their mass"
    assert set(grades["AutoStudentT"]) == {"trust"}, "and its verdict says so"
