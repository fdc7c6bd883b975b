"""Two regimes of a series: EM's most likely parameters, and the posterior path of the hidden states."""

import torch
from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.inference import EM
from ppl_gen.models import hidden_markov

noise = torch.Generator().manual_seed(0)
regime = torch.zeros(200, dtype=torch.long)
for t in range(1, 200):
    regime[t] = regime[t - 1] if torch.rand((), generator=noise) < 0.95 else 1 - regime[t - 1]
series = torch.where(regime == 1, 2.0, 0.0) + torch.randn(200, generator=noise)

fit = pg.fit(hidden_markov(states=2), series[None], EM(), seed=0)
draws = fit.posterior(draws=100)
path = torch.stack([value[:, 0] for name, value in draws.items() if name.startswith("state_")], -1)
share = path.double().mean(0)
print(fit, {name: value for name, value in fit.point.items()})
print("states recovered:", float(((share > 0.5).long() == regime).float().mean()))

figure = Figure(figsize=(10, 3.5), layout="constrained")
panel = figure.subplots()
panel.plot(series, ".", color="0.6", label="series")
panel.step(range(200), 2 * regime, where="mid", color="0.8", label="true regime")
panel.plot(2 * share, color="tab:red", label="2 x posterior probability of state 1")
panel.set(xlabel="time")
panel.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.15))
figure.savefig("regimes.png", dpi=120)
