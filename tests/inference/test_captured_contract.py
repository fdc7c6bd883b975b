"""Every objective on every program of the contract: captured steps are the program's, or the reason is told."""

from __future__ import annotations

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_contract import ALGORITHMS, FITS

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models.catalogue import CATALOGUE

PAIRS = [(program, name) for program in CATALOGUE for name in sorted(FITS[program]) if name.startswith("SVI")]


@pytest.mark.parametrize(("program", "name"), PAIRS)
@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_captured_is_eager_or_refused(program: str, name: str) -> None:
    entry, algorithm = CATALOGUE[program], ALGORITHMS[name]()
    assert isinstance(algorithm, SVI)
    algorithm = replace(algorithm, steps=4)
    own, captured = (
        pg.fit(entry.recipe(), entry.data(), algorithm, seed=1, compile=how, progress=False) for how in (False, "graph")
    )
    assert own.records == captured.records
    assert all(torch.equal(own.params[key], captured.params[key]) for key in own.params)
    if name == "SVI(Trace_ELBO)":  # Pyro's own objects keep their losses as Python numbers
        assert captured.cost["path"] == "eager"
        assert "read into Python, by if, float() or .item() in pyro." in str(captured.cost["path_reason"])
    else:
        assert captured.cost["path"] == "graph" and "path_reason" not in captured.cost


def _normal(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def _compiled() -> list[pg.Fit]:
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    algorithm = SVI(steps=8, batch_size=12, lr=0.05)
    return [pg.fit(_normal, x, algorithm, seed=3, compile=how, progress=False) for how in (False, "inductor")]


def test_compiled_steps_are_the_program_s_up_to_rounding() -> None:
    own, compiled = _compiled()
    assert compiled.cost["path"] == "inductor", compiled.cost
    one, other = (torch.tensor(fit.records["program_loss"]) for fit in (own, compiled))
    # The same noise: losses of order 1 differ by rounding, 1e-7 at each of 8 steps; other noise would move them by 0.1.
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5) and float(one.std()) > 0.01


def test_without_a_compiler_the_graph_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    own, compiled = _compiled()
    assert own.records == compiled.records and compiled.cost["path"] == "graph"
    assert "compiler" in str(compiled.cost["path_reason"])
