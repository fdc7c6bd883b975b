"""Eight schools, written by hand: NUTS and SVI on one program, and what k-hat says about the guide."""

import os

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoMultivariateNormal

import ppl_gen as pg
from ppl_gen.inference import NUTS, SVI

quick = bool(os.environ.get("PPL_GEN_QUICK"))


def eight_schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(sigma)):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * offset, sigma), obs=y)


data = {
    "sigma": torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]),
    "y": torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),
}
print(pg.check(eight_schools, data))
nuts = pg.fit(eight_schools, data, NUTS(draws=50 if quick else 1000, warmup=50 if quick else 500, chains=2), seed=0)
guided = pg.Program(eight_schools, guide=AutoMultivariateNormal)
svi = pg.fit(guided, data, SVI(steps=50 if quick else 3000, lr=0.01), seed=0)
for fit in (nuts, svi):
    print(fit.algorithm, "->", fit.diagnose().attrs["verdict"])

figure = Figure(figsize=(10, 3.5), layout="constrained")
for panel, name in zip(figure.subplots(1, 2), ("mu", "tau"), strict=True):
    for fit in (nuts, svi):
        panel.hist(fit.posterior(draws=1000)[name], bins=40, density=True, histtype="step", label=fit.algorithm)
    panel.set(xlabel=name, ylabel="density")
    panel.legend(frameon=False)
figure.savefig("own_program.png", dpi=120)
if not quick:
    draws = nuts.posterior()["mu"]
    assert abs(float(draws.mean()) - 4.4) < 1.0, "the posterior mean of mu that is known of eight schools"
    tau = nuts.posterior()["tau"]
    assert float(svi.posterior(draws=1000)["tau"].std()) < 0.9 * float(tau.std()), "the guide is too narrow in tau"
    assert svi.verdict.grade != "trust", "and its verdict says so"
    assert abs(float(svi.posterior(draws=1000)["mu"].mean() - draws.mean())) < float(draws.std()) / 2, (
        "both agree on mu"
    )
