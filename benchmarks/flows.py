"""Flows beside zuko, nflows and normflows: a step of training, the density of rows, and new rows.

.venv/bin/python benchmarks/flows.py

A peer that does not import is left out. All have the same layers and widths; the networks of zuko, nflows and normflows
are made of torch's own layers. Ours trains through the captured step, as fits do. `--quick` runs two short blocks.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from timing import Block, Ends, Result, alternate, run
from torch import Tensor, nn

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import real_nvp, spline_flow

FEATURES, LAYERS, HIDDEN, BATCH, BINS, ROWS = 63, 8, (256, 256), 512, 8, 5120
Kinds = dict[str, Callable[[], object]]


class Timed(Ends, SVI):
    """With the time of each step."""


class Ours:
    """A fit of a recipe; training goes on from it, what is recorded and compiled at first is not timed."""

    def __init__(self, recipe: Any, x: Tensor, path: str) -> None:
        self.recipe, self.x, self.path = recipe, x, path
        self.fit: Any = None
        self.train(2)

    def train(self, steps: int = 10) -> float:
        Timed.ends.clear()
        algorithm = Timed(steps=steps + 4, batch_size=BATCH, lr=1e-3)
        self.fit = pg.fit(self.recipe, self.x, algorithm, seed=0, start=self.fit, compile=self.path, progress=False)
        return (Timed.ends[-1] - Timed.ends[3]) / steps

    def flow(self) -> Any:
        return self.fit.module("flow")


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    sizes, layers = [inputs, *HIDDEN], []
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class Network(nn.Module):
    """A perceptron that takes the context that nflows passes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = mlp(inputs, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        found: Tensor = self.layers(x)
        return found


def _zuko(splines: bool) -> Any:
    import zuko

    settings: dict[str, Any] = {"transforms": LAYERS, "hidden_features": HIDDEN}
    if splines:
        settings |= {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(BINS,), (BINS,), (BINS - 1,)]}
    flow = zuko.flows.NICE(FEATURES, **settings) if splines else zuko.flows.RealNVP(FEATURES, **settings)
    return flow, lambda x: flow().log_prob(x), lambda: flow().sample((BATCH,))


def _nflows(splines: bool) -> Any:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import (
        AffineCouplingTransform,
        CompositeTransform,
        PiecewiseRationalQuadraticCouplingTransform,
    )

    def layer(number: int) -> Any:
        mask = torch.ones(FEATURES)
        mask[number % 2 :: 2] = -1
        if not splines:
            return AffineCouplingTransform(mask, Network)
        return PiecewiseRationalQuadraticCouplingTransform(mask, Network, num_bins=BINS, tails="linear", tail_bound=4.0)

    flow = Flow(CompositeTransform([layer(number) for number in range(LAYERS)]), StandardNormal([FEATURES]))
    return flow, flow.log_prob, lambda: flow.sample(BATCH)


def _normflows(splines: bool) -> Any:
    import normflows

    layers: list[Any] = []
    for number in range(LAYERS):
        if splines:
            made = normflows.flows.CoupledRationalQuadraticSpline(
                FEATURES, len(HIDDEN), HIDDEN[0], num_bins=BINS, tail_bound=4.0, reverse_mask=bool(number % 2)
            )
            layers.append(made)
        else:
            mask = torch.zeros(FEATURES)
            mask[number % 2 :: 2] = 1
            layers.append(normflows.flows.MaskedAffineFlow(mask, mlp(FEATURES, FEATURES), mlp(FEATURES, FEATURES)))
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(FEATURES, trainable=False), layers)
    return flow, flow.log_prob, lambda: flow.sample(BATCH)


def peers(splines: bool) -> dict[str, Any]:
    """By name: the module, its log density and its sampler."""
    validate = torch.distributions.Distribution._validate_args
    found = {}
    for name, make in (("zuko", _zuko), ("nflows", _nflows), ("normflows", _normflows)):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            found[name] = make(splines)
        except (ImportError, AttributeError) as error:
            print(f"{name} is left out: {error}", flush=True)
    torch.distributions.Distribution.set_default_validate_args(validate)  # importing zuko switches it off for all
    return found


def _trained(flow: nn.Module, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    adam = torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        adam.zero_grad()
        (-log_prob(x[torch.randint(len(x), (BATCH,))]).mean()).backward()
        adam.step()

    return step


def _without_gradients(call: Callable[[], object]) -> Callable[[], object]:
    def quiet() -> object:
        with torch.no_grad():
            return call()

    return quiet


def measured(name: str, recipe: Any, splines: bool, target: float, quick: bool) -> list[Result]:
    x, others = torch.randn(ROWS, FEATURES), peers(splines)
    batch, blocks, calls = x[:BATCH], 2 if quick else 6, 2 if quick else 10
    ours = {path: Ours(recipe, x, path) for path in (("graph",) if quick else ("inductor", "graph"))}
    flow = next(iter(ours.values())).flow()
    steps: Kinds = {f"ppl_gen, {path}": lambda one=one: one.train(2 if quick else 20) for path, one in ours.items()}
    for other, (module, log_prob, _) in others.items():
        # as many steps as a call of ours makes
        step = _trained(module, log_prob, x)
        steps[other] = lambda step=step: _seconds(step, 2 if quick else 20)
    densities: Kinds = {"ppl_gen": _without_gradients(lambda: flow.log_prob(batch))}
    samples: Kinds = {"ppl_gen": _without_gradients(lambda: flow.rows().sample((BATCH,)))}
    for other, (_, log_prob, sample) in others.items():
        densities[other] = _without_gradients(lambda log_prob=log_prob: log_prob(batch))
        samples[other] = _without_gradients(sample)
    found = []
    with pyro.validation_enabled(False):  # for all: zuko's import has switched it off for zuko's
        for title, kinds, times in (("train", steps, 1), ("log_prob", densities, calls), ("sample", samples, calls)):
            result = alternate(kinds, blocks, times)
            found.append(Result(f"{name}, {title}", result, _best(result, target)))
    return found


def _seconds(step: Callable[[], object], steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def _best(found: dict[str, Block], target: float) -> dict[str, float]:
    """The target holds against the quickest peer."""
    others = [name for name in found if not name.startswith("ppl_gen")]
    return {min(others, key=lambda name: found[name].median): target} if others else {}


def rows(quick: bool) -> list[Result]:
    """RealNVP and splines of rational quadratics, d = 63, 8 layers, 2 x 256, batches of 512."""
    torch.manual_seed(0)
    shape = f"d = {FEATURES}, {LAYERS} layers, {len(HIDDEN)} x {HIDDEN[0]}, batch {BATCH}"
    return [
        *measured(f"RealNVP, {shape}", real_nvp(layers=LAYERS, hidden=HIDDEN), False, 0.75, quick),
        *measured(f"RQ coupling, {shape}", spline_flow(layers=LAYERS, hidden=HIDDEN, bins=BINS), True, 0.5, quick),
    ]


if __name__ == "__main__":
    run("flows", "What flows cost", rows, __doc__)
