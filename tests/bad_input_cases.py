"""The table of mistakes: what a user writes, and what the toolkit answers. The tests and the site read the same list."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from bad_input_table import TABLE
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDelta, AutoDiscreteParallel, AutoNormal, AutoNormalizingFlow
from torch import Tensor, nn

import ppl_gen as pg
from ppl_gen import extending, inference, looking, models
from ppl_gen.diagnostics.units import active_units, code_means

__all__ = ["CASES", "Case", "names"]


@dataclass(frozen=True)
class Case:
    """One mistake.

    Args:
        part: the table it stands in.
        code: what is written; an expression over `names`.
        error: the class of the answer.
        words: what its first line begins with: the argument, or the program, that is to be fixed.
    """

    part: str
    code: str
    error: type[Exception]
    words: str

    def __str__(self) -> str:
        return self.code


# ------------------------------------------------------------------------------------------------- programs
def normal(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).expand([4]).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    pyro.sample("loc", dist.Normal(pyro.param("at", torch.tensor(0.0)), 1.0))


def guide_of_another_name(x: Tensor) -> None:
    pyro.sample("mean", dist.Normal(pyro.param("at", torch.tensor(0.0)), 1.0))


def guide_in_the_plate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("loc", dist.Normal(pyro.param("at", torch.tensor(0.0)), 1.0))


def guide_that_draws_x(x: Tensor) -> None:
    guide(x)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))


def guide_without_gradient(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("count", dist.Poisson(pyro.param("rate", torch.ones(()), constraint=constraints.positive)))


def counts(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        count = pyro.sample("count", dist.Poisson(2.0))
        pyro.sample("x", dist.Normal(count, 1.0), obs=x[:, 0])


def no_plate(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def plate_of_another_name(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).expand([4]).to_event(1), obs=x)


def forty_rows(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", 40):
        pyro.sample("x", dist.Normal(loc, 1.0).expand([4]).to_event(1), obs=x)


def keeps_a_name(x: Tensor) -> None:
    loc = pyro.sample("draw", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).expand([4]).to_event(1), obs=x)


def sums_everything(x: Tensor) -> None:
    on = pyro.sample("on", dist.Bernoulli(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(on.sum(), 1.0).expand([4]).to_event(1), obs=x)


def columns_in_the_plate(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def observes_nothing(x: Tensor) -> None:
    pyro.sample("loc", dist.Normal(0.0, 10.0))


def chances(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Beta(pyro.param("a", torch.ones(())), 1.0).expand([4]).to_event(1), obs=x)


def takes_nothing() -> None:
    pyro.sample("loc", dist.Normal(0.0, 10.0))


# ------------------------------------------------------------------------------------------------ what they read
@functools.cache
def fitted() -> pg.Fit:
    return pg.fit(models.ppca(4, 2), rows(), inference.SVI(steps=1), progress=False)


@functools.cache
def noising_fit() -> pg.Fit:
    return pg.fit(models.denoising_diffusion(4, steps=3, hidden=4), rows(), inference.SVI(steps=1), progress=False)


@functools.cache
def compared() -> pg.Comparison:
    """A comparison of nothing: what its methods refuse, they refuse before they look."""
    return pg.Comparison((), "nothing")


@functools.cache
def rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 2, generator=generator) @ torch.tensor([[2.0, 1, 0, -1], [0, 1, 1, 0.5]]) + torch.randn(
        40, 4, generator=generator
    )


@functools.cache
def network() -> nn.Module:
    """From images of 6 x 6 pixels to three scores."""
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer, without a trace in the generators."""
    with torch.random.fork_rng(devices=[]):
        return nn.Linear(inputs, outputs)


@functools.cache
def labels() -> Tensor:
    return torch.arange(40) % 2


def with_value(value: float) -> Tensor:
    """The rows with one entry of them replaced."""
    changed = rows().double().clone()
    changed[3, 1] = value
    return changed


def damaged(folder: Path, how: str) -> Path:
    """A copy of a saved fit of which one file is short, has one bit flipped, or is missing."""
    copy = folder.with_name(f"{folder.name}-{how}")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    file = copy / "fit.json" if how == "rewritten" else next(copy.glob("*/tensors.safetensors"))
    content = file.read_bytes()
    if how == "short":
        file.write_bytes(content[:-8])
    elif how == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "missing":
        file.unlink()
    else:
        file.write_bytes(content.replace(b"ppca", b"PPCA"))
    return copy


def names(folder: Path) -> dict[str, Any]:
    """What the expressions of `CASES` speak of; ``folder`` takes the files."""
    saved, text, kept = folder / "saved", folder / "notes.txt", folder / "kept"
    if not saved.exists():
        fitted().save(saved)
        text.write_text("no fit\n")
        pg.fit(normal, rows(), inference.SVI(steps=2), checkpoint=kept, progress=False)
    public = {
        name: getattr(module, name) for module in (models, inference, extending, looking) for name in module.__all__
    }
    programs = (normal, guide, guide_of_another_name, guide_in_the_plate, guide_that_draws_x, guide_without_gradient)
    programs += (counts, no_plate, plate_of_another_name, columns_in_the_plate, observes_nothing, chances)
    programs += (forty_rows, keeps_a_name, sums_everything)
    return {
        **public,
        **{program.__name__: program for program in (*programs, takes_nothing)},
        **{
            "pg": pg,
            "compared": compared,
            "torch": torch,
            "np": np,
            "nn": nn,
            "partial": functools.partial,
            "AutoNormal": AutoNormal,
            "AutoDelta": AutoDelta,
            "AutoDiscreteParallel": AutoDiscreteParallel,
            "AutoNormalizingFlow": AutoNormalizingFlow,
            "nan": float("nan"),
            "inf": float("inf"),
        },
        **{"x": rows(), "y": labels(), "fit": fitted(), "with_value": with_value},
        **{
            "net": network(),
            "linear": linear,
            "images": torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(0)),
        },
        "noising_fit": noising_fit(),
        **{"active_units": active_units, "code_means": code_means},
        **{"saved": saved, "text": text, "kept": kept, "damaged": functools.partial(damaged, saved)},
    }


# ---------------------------------------------------------------------------------------------------- the table
def _cases() -> Iterator[Case]:
    for part, answers in TABLE.items():
        for error, lines in answers.items():
            for line in lines.strip().splitlines():
                code, words = line.strip().rsplit("  ->  ", 1)
                yield Case(part, code, error, words)


CASES: tuple[Case, ...] = tuple(_cases())
