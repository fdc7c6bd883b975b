"""Two regimes of a series: EM's most likely parameters, and the posterior path of the hidden states."""

import os

import torch
from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.inference import EM
from ppl_gen.models import hidden_markov

quick = bool(os.environ.get("PPL_GEN_QUICK"))
noise = torch.Generator().manual_seed(0)
regime = torch.zeros(100, dtype=torch.long)
for t in range(1, 100):
    regime[t] = regime[t - 1] if torch.rand((), generator=noise) < 0.95 else 1 - regime[t - 1]
series = torch.where(regime == 1, 2.0, 0.0) + torch.randn(100, generator=noise)

fit = pg.fit(hidden_markov(states=2), series[None], EM(steps=3 if quick else 60), seed=0)
draws = fit.posterior(draws=3 if quick else 50)
path = torch.stack([value[:, 0] for name, value in draws.items() if name.startswith("state_")], -1)
share = path.double().mean(0)
print(fit, {name: value for name, value in fit.point.items()})
recovered = float(((share > 0.5).long() == regime).float().mean())
print("states recovered:", recovered)

figure = Figure(figsize=(10, 3.5), layout="constrained")
panel = figure.subplots()
panel.plot(series, ".", color="0.6", label="series")
panel.step(range(100), 2 * regime, where="mid", color="0.8", label="true regime")
panel.plot(2 * share, color="tab:red", label="2 x posterior probability of state 1")
panel.set(xlabel="time")
panel.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.15))
figure.savefig("regimes.png", dpi=120)
assert recovered > 0.9, "the path of the hidden states is recovered"
