"""Fits by two processes, for `fits/test_together.py`: run by torchrun, each process writes what it came to as JSON.

Every case is learned together, and the curves also by the first process alone, under the same seed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import ppl_gen as pg
from ppl_gen.data.rows import Rows
from ppl_gen.fitting.stopping import Patience, Plateau
from ppl_gen.inference import ELBO, EM, IWAE, NUTS, SVI, Adversarial
from ppl_gen.models import gaussian_mixture, vae


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = numbers(11) + 2.0
ROWS = torch.cat([numbers(14, 2), numbers(13, 2, seed=1) + 4.0])
BITS = (numbers(27, 6, seed=2) > 0).float()


def binarised(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch | {"x": torch.bernoulli(batch["x"])}


GREY = Rows({"x": numbers(27, 6, seed=2).sigmoid()}, binarised)


def normal(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def coded(z: Any, q: Any) -> pg.Recipe:
    """Rows of bits from a code of the law ``z``; the guide's law is ``q`` of two numbers per row and unit."""

    def build(data: Any) -> pg.Program:
        decoder, encoder = nn.Linear(3, 6), nn.Linear(6, 6)

        def model(x: torch.Tensor) -> None:
            pyro.module("decoder", decoder)
            slope = pyro.sample("slope", dist.Normal(1.0, 1.0))
            with pyro.plate("data", len(x)):
                code = pyro.sample("z", z)
                pyro.sample("x", dist.Bernoulli(logits=slope * decoder(code)).to_event(1), obs=x)

        def guide(x: torch.Tensor) -> None:
            pyro.module("encoder", encoder)
            loc = pyro.param("slope_loc", torch.tensor(1.0))
            pyro.sample("slope", dist.Normal(loc, 0.2))
            with pyro.plate("data", len(x)):
                pyro.sample("z", q(*encoder(x).chunk(2, -1)))

        return pg.Program(model, guide)

    return pg.Recipe(build)


GAUSSIAN = coded(
    dist.Normal(torch.zeros(3), 1.0).to_event(1),
    lambda a, b: dist.Normal(a, torch.nn.functional.softplus(b)).to_event(1),
)
FLIPS = coded(dist.Bernoulli(0.5 * torch.ones(3)).to_event(1), lambda a, b: dist.Bernoulli(logits=a).to_event(1))


def digits(x: torch.Tensor) -> None:
    """A category per row, drawn by the guide."""
    weight = pyro.param("weight", numbers(4, 6, seed=3))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(4) / 4))
        pyro.sample("x", dist.Bernoulli(logits=weight[k]).to_event(1), obs=x)


def digits_guide(x: torch.Tensor) -> None:
    weight = pyro.param("guide_weight", numbers(6, 4, seed=4))
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(logits=x @ weight))


def generator() -> pg.Recipe:
    def build(data: Any) -> pg.Program:
        net = nn.Linear(2, 2)

        def model(x: torch.Tensor) -> None:
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(net(z), 0.1).to_event(1), obs=x)

        return pg.Program(model)

    return pg.Recipe(build)


def svi(objective: Any = None, **settings: Any) -> SVI:
    return SVI(objective if objective is not None else ELBO(), **{"steps": 30, "lr": 0.02, **settings})


#: One process's curve: a program, its rows and how it is learned. 11 and 27 rows leave smaller last batches.
CURVES: dict[str, tuple[Any, Any, SVI]] = {
    "all rows": (normal, X, svi()),
    "a smaller last batch": (normal, X, svi(batch_size=4)),
    "a last batch of one row": (normal, X, svi(batch_size=5)),
    "float64": (normal, X.double(), svi(batch_size=4)),
    "enumerated mixture": (gaussian_mixture(2), ROWS, svi(batch_size=10)),
    "summed in the guide": (pg.Program(digits, digits_guide), BITS, svi(batch_size=10)),
    "vae": (vae(latent=2, hidden=16), BITS, svi(batch_size=10)),
    "rows drawn anew": (vae(latent=2, hidden=16), GREY, svi(batch_size=10)),
    "local noise beside globals": (GAUSSIAN, BITS, svi(batch_size=7, clip_norm=1.0)),
    "iwae": (GAUSSIAN, BITS, svi(IWAE(particles=3), batch_size=10)),
    "score function": (FLIPS, BITS, svi(batch_size=10)),
    "Pyro's own": (GAUSSIAN, BITS, svi(pyro.infer.TraceMeanField_ELBO(), batch_size=10)),
    "two players": (generator(), ROWS, svi(Adversarial("wasserstein", clip=0.1), batch_size=10, optimiser="sgd")),
    "two players at once": (
        generator(),
        ROWS,
        svi(
            Adversarial("least-squares", penalty="projection", schedule="simultaneous", averaging=0.9),
            batch_size=10,
            optimiser="sgd",
        ),
    ),
}


def kept(fit: pg.Fit) -> dict[str, Any]:
    """What is compared, floats written so that they come back bit for bit."""
    return {
        "records": {name: list(map(float, values)) for name, values in fit.records.items()},
        "checks": {name: list(map(float, values)) for name, values in fit.checks.items()},
        "params": {name: value.double().flatten().tolist() for name, value in fit.params.items()},
        "buffers": {name: value.double().flatten().tolist() for name, value in fit.state.buffers.items()},
        "status": str(fit.status),
        "message": fit.message,
        "steps": int(fit.cost["steps"]),
        "notes": dict(fit.notes),
    }


def caught(call: Callable[[], pg.Fit]) -> dict[str, Any]:
    """What ``call`` came to, or the error that it raised."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            found = kept(call())
        except Exception as error:
            found = {"error": type(error).__name__, "said": str(error)}
            if isinstance(error, pg.NonFiniteError) and error.fit is not None:
                found["fit"] = kept(error.fit)
    return found | {"warned": [str(warning.message) for warning in heard if warning.category is pg.FitWarning]}


def curves(fabric: Any) -> dict[str, Any]:
    found = {}
    for name, (program, data, algorithm) in CURVES.items():
        found[name] = {"together": caught(lambda: pg.fit(program, data, algorithm, seed=3, fabric=fabric))}  # noqa: B023
        if fabric.global_rank == 0:
            found[name]["alone"] = caught(lambda: pg.fit(program, data, algorithm, seed=3))  # noqa: B023
    return found


def normed() -> pg.Recipe:
    def build(data: Any) -> pg.Program:
        net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

        def model(x: torch.Tensor) -> None:
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(net(x).squeeze(-1), 1.0), obs=x[:, 0])

        return pg.Program(model)

    return pg.Recipe(build)


def unseeded() -> pg.Program:
    """A network with other weights in every process."""
    torch.seed()
    net = nn.Linear(2, 1)

    def model(x: torch.Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x).squeeze(-1), 1.0), obs=x[:, 0])

    return pg.Program(model)


def frozen() -> pg.Program:
    """The same, with weights that no fit learns."""
    torch.seed()
    net = nn.Sequential(nn.Linear(2, 3).requires_grad_(False), nn.Linear(3, 1))

    def model(x: torch.Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x).squeeze(-1), 1.0), obs=x[:, 0])

    return pg.Program(model)


def dropping() -> pg.Recipe:
    """Noise outside of sites, and draws that reject and try again: other random numbers than one process has."""

    def build(data: Any) -> pg.Program:
        net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))

        def model(x: torch.Tensor) -> None:
            pyro.module("net", net)
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
                pyro.sample("x", dist.Normal(net(x).squeeze(-1) + slope, rate), obs=x[:, 0])

        def guide(x: torch.Tensor) -> None:
            loc, shape = pyro.param("loc", torch.tensor(0.0)), pyro.param("shape", torch.tensor(1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("rate", dist.Gamma(shape.exp() * torch.ones(len(x)), 2.0))
            pyro.sample("slope", dist.Normal(loc, 0.1))

        return pg.Program(model, guide)

    return pg.Recipe(build)


def cracked(x: torch.Tensor) -> None:
    """Not finite once ``loc`` is below 1, at a row that only the last process holds."""
    loc = pyro.param("loc", torch.tensor(1.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.where(x > 50, x + (loc - 1.0).sqrt(), loc), 1.0), obs=x)


def deaf(x: torch.Tensor) -> None:
    """Fails at a row that only the last process holds."""
    loc = pyro.param("loc", torch.tensor(0.0))
    if len(x) < 11 and bool((x > 50).any()):
        raise RuntimeError("the last row is of another kind")
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def rowwise(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def chained(x: torch.Tensor) -> None:
    """No plate over its rows."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    for i in pyro.markov(range(len(x))):
        pyro.sample(f"x{i}", dist.Normal(loc, 1.0), obs=x[i])


def centred(x: torch.Tensor) -> None:
    """What a row adds depends on the others."""
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc + x.mean(), 1.0), obs=x)


def tied(x: torch.Tensor) -> None:
    """One finite latent of all rows, summed out in the model."""
    loc = pyro.param("loc", torch.tensor([0.0, 1.0]))
    k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.where(k > 0, loc[0], loc[1]), 1.0), obs=x)


def at(step: int, act: Callable[[], None], rank: int, here: int) -> list[Callable[..., None]]:
    """A callback of one process only."""
    return [lambda now, info: act() if now == step else None] if rank == here else []


def failing() -> None:
    raise OSError("no space left")


def interrupting() -> None:
    raise KeyboardInterrupt


def endings(fabric: Any) -> dict[str, Any]:
    """How runs end that end early, each after the others in the same two processes."""
    rank = fabric.global_rank
    far = torch.cat([X[:-1] - 4.0, torch.tensor([100.0])])
    short, two = svi(batch_size=4), dict(fabric=fabric, seed=3)
    long = svi(batch_size=7, steps=30, stop_rule=Plateau(window=100))
    folder = {**two, "checkpoint": Path(sys.argv[1]) / "kept", "every": 5}
    quick = {"steps": 400, "batch_size": 5, "lr": 0.05}
    signalled = at(7, lambda: os.kill(os.getpid(), signal.SIGINT), rank, 1)
    clock = svi(steps=400, stop_rule=lambda history: "time is up" if rank == 0 else None)
    first = pg.fit(normal, X, short, **two)
    unscaled = ROWS * torch.tensor([1.0, 1e4])
    runs: dict[str, Callable[[], pg.Fit]] = {
        "batch norm": lambda: pg.fit(normed(), ROWS, svi(batch_size=10), **two),
        "warned": lambda: pg.fit(unseeded(), unscaled, svi(), **two),
        "unseeded": lambda: pg.fit(unseeded(), ROWS, svi(batch_size=10), **two),
        "frozen, unseeded": lambda: pg.fit(frozen(), ROWS, svi(batch_size=10), **two),
        "other noise": lambda: pg.fit(dropping(), ROWS, svi(batch_size=10, steps=60), **two),
        "not finite": lambda: pg.fit(cracked, far, svi(lr=0.1, steps=40), **two),
        "not finite at first": lambda: pg.fit(cracked, far * float("1e30"), svi(), **two),
        "fails on one": lambda: pg.fit(deaf, far, svi(), **two),
        "a callback fails": lambda: pg.fit(normal, X, short, callbacks=at(5, failing, rank, 1), **two),
        "a callback ends it": lambda: pg.fit(normal, X, short, callbacks=at(5, interrupting, rank, 1), **two),
        "a signal": lambda: pg.fit(normal, X, short, callbacks=signalled, **two),
        "a rule of one clock": lambda: pg.fit(normal, X, clock, **two),
        "a rule that converges": lambda: pg.fit(normal, X, svi(stop_rule=Plateau(window=20), steps=400), **two),
        "a rule on held-out rows": lambda: pg.fit(
            normal, X, svi(**quick, stop_rule=Patience(2)), validation=X[:4], validate_every=10, **two
        ),
        "other data": lambda: pg.fit(normal, X + rank, short, **two),
        "other rows": lambda: pg.fit(normal, X[rank:], short, **two),
        "another seed": lambda: pg.fit(normal, X, short, fabric=fabric, seed=rank),
        "other settings": lambda: pg.fit(normal, X, svi(lr=0.01 + rank), **two),
        "checkpoints of one": lambda: pg.fit(
            normal, X, short, checkpoint=folder["checkpoint"] if rank else None, **two
        ),
        "bad data on one": lambda: pg.fit(normal, X if rank == 0 else X.log(), short, **two),
        "continued": lambda: pg.fit(normal, X, short, start=first, **two),
        "EM": lambda: pg.fit(gaussian_mixture(2), ROWS, EM(), **two),
        "NUTS": lambda: pg.fit(normal, X, NUTS(), **two),
        "local points": lambda: pg.fit(rowwise, X, svi(), **two),
        "no plate": lambda: pg.fit(chained, X[:4], svi(), **two),
        "a stream": lambda: pg.fit(normal, pg.stream(list(X[:10].split(5)), rows=10), svi(), **two),
        "one row": lambda: pg.fit(normal, X, svi(batch_size=1), **two),
        "kept, interrupted": lambda: pg.fit(GAUSSIAN, BITS, long, callbacks=at(13, interrupting, rank, 1), **folder),
        "kept, gone on": lambda: pg.fit(GAUSSIAN, BITS, long, **folder),
        "kept, finished": lambda: pg.fit(GAUSSIAN, BITS, long, **folder),
        "kept, in one go": lambda: pg.fit(GAUSSIAN, BITS, long, **two),
        "kept, another fit": lambda: pg.fit(GAUSSIAN, BITS, svi(batch_size=10), checkpoint=folder["checkpoint"], **two),
        "coupled rows": lambda: pg.fit(centred, X, svi(), **two),
        "tied rows": lambda: pg.fit(pg.Program(tied, lambda x: None), X, svi(), **two),
        "joint logsumexp": lambda: pg.fit(normal, X, svi(IWAE(particles=3)), **two),
        "chunks": lambda: pg.fit(GAUSSIAN, BITS, svi(IWAE(particles=4, chunk=2)), **two),
        "Renyi": lambda: pg.fit(GAUSSIAN, BITS, svi(pyro.infer.RenyiELBO(num_particles=2)), **two),
        "a function": lambda: pg.fit(normal, X, svi(pyro.infer.Trace_ELBO().differentiable_loss), **two),
        "captured": lambda: pg.fit(normal, X, short, compile="graph", **two),
        "after all that": lambda: pg.fit(normal, X, short, **two),
    }
    found = {name: caught(run) for name, run in runs.items()}
    found["evidence"] = {"mean": first.evidence(X, draws=8).mean}
    return found


def dying(fabric: Any) -> dict[str, Any]:
    """The second process is gone in the middle of a run, without a word."""
    rank = fabric.global_rank
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends those that live on, and this one has to say something
    gone = at(5, lambda: os._exit(3), rank, 1)
    return {"gone": caught(lambda: pg.fit(normal, X, svi(batch_size=4), callbacks=gone, fabric=fabric, seed=3))}


if __name__ == "__main__":
    from lightning_fabric import Fabric

    shared = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
    shared.launch()
    folder = Path(sys.argv[1])
    for wanted in sys.argv[2:]:
        found = {"curves": curves, "endings": endings, "dying": dying}[wanted](shared)
        (folder / f"{wanted}-{shared.global_rank}.json").write_text(json.dumps(found))
    if wanted != "dying":
        torch.distributed.destroy_process_group()
