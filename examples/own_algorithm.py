"""An algorithm of one's own: Stein's particles beside NUTS and a normal guide, on a posterior that bends."""

import math
import os
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.extending import DrawsPosterior, Outcome, Unconstrained
from ppl_gen.inference import NUTS, SVI, Iterative

quick = bool(os.environ.get("PPL_GEN_QUICK"))


class Particles(DrawsPosterior):
    """A kind of posterior of one's own: draws that are neither chains nor a guide's, by a name of their own."""

    kind = noun = "particles"


@dataclass
class State:
    density: Unconstrained
    particles: torch.Tensor
    squares: torch.Tensor


@dataclass(frozen=True)
class SVGD(Iterative):
    """Particles that climb the log density and push each other apart (Liu and Wang 2016)."""

    particles: int = 100
    steps: int = 1000
    lr: float = 0.5

    needs = (("density",), ("differentiable latents",), ("no free parameters",))

    def init(self, run):
        density = Unconstrained(run.joint, run.data.batch(), run.info)
        particles = torch.randn(self.particles, density.size, dtype=run.dtype)
        return State(density, particles, torch.zeros_like(particles))

    def step(self, state, source):
        u = state.particles
        slope = torch.func.vmap(torch.func.grad(state.density.potential))(u)
        apart = u[:, None] - u
        distance = apart.square().sum(-1)
        width = distance.median() / math.log(len(u))
        kernel = (-distance / width).exp()
        force = (2.0 / width * (kernel[..., None] * apart).sum(1) - kernel @ slope) / len(u)
        squares = state.squares + force.square()
        moved = u + self.lr * force / (1e-6 + squares.sqrt())
        return State(state.density, moved, squares), {"force": force.norm(dim=1).mean()}

    def limit(self, run):
        return self.steps

    def outcome(self, state, run):
        sites = [state.density.values(u) for u in state.particles]
        draws = {n: torch.stack(v) for n, v in zip(state.density.sites, zip(*sites, strict=True), strict=True)}
        return Outcome(Particles(draws))

    def state_dict(self, state):
        return {"particles": state.particles.clone(), "squares": state.squares.clone()}

    def load_state_dict(self, state, saved):
        return State(state.density, saved["particles"].clone(), saved["squares"].clone())


def bioassay(dose, animals, deaths):
    level = pyro.sample("level", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.LogNormal(2.0, 1.0))
    with pyro.plate("data", len(dose)):
        pyro.sample("deaths", dist.Binomial(animals, logits=level + slope * dose), obs=deaths)


data = {
    "dose": torch.tensor([-0.86, -0.30, -0.05, 0.73]),
    "animals": torch.tensor([5.0, 5.0, 5.0, 5.0]),
    "deaths": torch.tensor([0.0, 1.0, 3.0, 5.0]),
}
algorithms = {
    "NUTS": NUTS(draws=50 if quick else 1000, warmup=50 if quick else 500, chains=2),
    "SVGD": SVGD(particles=30 if quick else 200, steps=20 if quick else 1000),
    "SVI": SVI(steps=50 if quick else 2000, lr=0.01),
}
comparison = pg.compare(bioassay, data, algorithms, holdout=0)
print(comparison)
apart = comparison.posteriors(reference="NUTS").set_index("algorithm")
print(apart[["quantity", "mean", "sd", "shift_sd", "sd_ratio"]])

figure = Figure(figsize=(10, 4), layout="constrained")
together = {}
draws = {name: comparison[name].posterior(draws=1000) for name in algorithms}
for name, found in draws.items():
    together[name] = float(torch.corrcoef(torch.stack([found["level"], found["slope"].log()]))[0, 1])
for panel, name in zip(figure.subplots(1, 2, sharex=True, sharey=True), ("SVGD", "SVI"), strict=True):
    panel.scatter(draws["NUTS"]["level"], draws["NUTS"]["slope"], s=4, color="lightgrey", label="NUTS")
    panel.scatter(draws[name]["level"][:200], draws[name]["slope"][:200], s=8, label=name)
    panel.set(xlabel="level", ylabel="slope", ylim=(0.0, 30.0))
    panel.legend(frameon=False)
figure.savefig("own_algorithm.png", dpi=120)
print("correlation of level and log slope", together)
verdict = comparison["SVGD"].verdict
print("SVGD:", verdict)
assert "the particles" in verdict.reason and "no k-hat" in verdict.reason and "chain" not in verdict.advice
assert "r_hat" not in comparison["SVGD"].diagnose().columns, "particles are no chains"
if not quick:
    assert verdict.grade == "doubtful" and "apart from that, no problem was found" in verdict.reason
    stein = apart.loc["SVGD"]
    assert bool((stein["shift_sd"].abs() < 0.15).all()), "the means of the particles are those of NUTS"
    assert bool((stein["sd_ratio"] - 1.0).abs().max() < 0.15), "and so are their standard deviations"
    assert abs(together["SVGD"] - together["NUTS"]) < 0.15 and abs(together["SVI"]) < 0.15, (
        "particles bend as the posterior does, and a mean field does not"
    )
