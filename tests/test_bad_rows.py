"""Bad rows for every program of the catalogue, before a fit and after it; a new model is covered by being listed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from programs import same
from test_bad_input import unchanged
from torch import Tensor

import ppl_gen as pg
from ppl_gen.diagnostics.units import active_units, code_means
from ppl_gen.inference import SVI, Adversarial, Algorithm, ContrastiveDivergence, WakeSleep, Walkback
from ppl_gen.models import anomaly_scores, bits_per_character, codes, reconstructions
from ppl_gen.models.catalogue import CATALOGUE

Change = Callable[[Tensor], Any]


def _holed(value: float) -> Change:
    def change(x: Tensor) -> Tensor:
        changed = x.double().clone()
        changed.view(-1)[1] = value
        return changed

    return change


def _wider(x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :1]], 1) if x.dim() > 1 else torch.stack([x, x.flip(0)], 1)


#: No program takes these.
REFUSED: dict[str, Change] = {
    "NaN": _holed(float("nan")),
    "infinity": _holed(float("inf")),
    "a huge number": _holed(1e300),
    "no rows": lambda x: x[:0],
    "no columns": lambda x: x.new_zeros(len(x), 0),
    "a dimension before": lambda x: x[None],
    "a single row without its dimension": lambda x: x[0],
    "strings": lambda x: [["a", "b"]] * len(x),
    "objects": lambda x: np.array([object()] * len(x)),
    "dates": lambda x: np.zeros(len(x), "datetime64[s]"),
    "complex numbers": lambda x: x * 1j,
    "a sparse tensor": lambda x: x.to_sparse(),
    "a masked array": lambda x: np.ma.masked_array(x.numpy(), mask=x.numpy() == 0),
    "nothing": lambda x: None,
    "one number": lambda x: 3.0,
    "a file name": lambda x: "rows.csv",
    "ragged lists": lambda x: [[1.0, 2.0], [3.0]],
    "a generator": lambda x: (row for row in x),
    "a set": lambda x: {1, 2},
    "another name": lambda x: {"rows": x},
    "no entries": lambda x: {},
    "strings by name": lambda x: {"x": ["a"] * len(x)},
}

#: Some programs take these: then the fit has to be finite.
DOUBTFUL: dict[str, Change] = {
    "one row": lambda x: x[:1],
    "a dimension behind": lambda x: x[..., None],
    "one column more": _wider,
    "one column": lambda x: x[:, :1] if x.dim() > 1 else x[:, None],
    "booleans": lambda x: x > 0,
    "integers": lambda x: x.long(),
    "bytes": lambda x: x.to(torch.uint8),
    "half precision": lambda x: x.half(),
    "negative numbers": lambda x: -1 - x.abs(),
    "large numbers": lambda x: 100 * x + 7,
    "a constant": torch.ones_like,
}

#: Which programs are made for rows of any width (their data say which), written by hand.
ANY_WIDTH = {"gaussian_mixture", "hidden_markov", "char_rnn", "ppca", "factor_analysis", "autoencoder", "vae", "m1"}
ANY_WIDTH |= {
    "classifier",
    "m2",
    "gan",
    "rbm",
    "denoising_diffusion",
    "binomial_diffusion",
    "affine_flow",
    "real_nvp",
    "maf",
    "iaf",
    "spline_flow",
}
ANY_WIDTH |= {"nice", "naf", "glow", "ffjord"}
ANY_WIDTH |= {"dcgan", "lapgan", "gran"}
ANY_WIDTH |= {"gaussian_rbm", "dbm", "dbn", "helmholtz", "gsn"}

#: Vectors are numbers, a row each, to these.
VECTORS = {"gan"}

#: How the first line of an answer begins: with what is to be fixed.
ARGUMENT = r"^(data|lengths|components|features|latent|degrees|at site|the model|the fit)"


def _main(data: Any) -> Tensor:
    return data["x"] if isinstance(data, Mapping) else data


def _with(data: Any, x: Any) -> Any:
    if isinstance(x, dict):
        return x
    return {**data, "x": x} if isinstance(data, Mapping) else x


def _tensors(data: Any) -> list[Tensor]:
    return list(data.values()) if isinstance(data, Mapping) else [data]


@functools.cache
def _fit(program: str) -> tuple[pg.Fit, Algorithm]:
    """One step of the first algorithm that the program fits; and that algorithm."""
    entry = CATALOGUE[program]
    for objective in (None, Adversarial(), ContrastiveDivergence(), WakeSleep(), Walkback()):
        algorithm = SVI(steps=1) if objective is None else SVI(objective, steps=1)
        try:
            return pg.fit(entry.recipe(), entry.data(), algorithm, progress=False), algorithm
        except pg.IncompatibleError:
            continue
    raise AssertionError(f"no algorithm here trains {program!r}: add one")


def _never(step: int, info: object) -> None:
    raise AssertionError("training began")


@pytest.mark.parametrize("row", REFUSED)
@pytest.mark.parametrize("program", CATALOGUE)
def test_what_no_program_takes_is_refused_before_training(program: str, row: str) -> None:
    entry, algorithm = CATALOGUE[program], _fit(program)[1]
    data = entry.data()
    if program in VECTORS and row == "a single row without its dimension":
        assert pg.check(entry.recipe(), REFUSED[row](_main(data))).rows == len(_main(data)[0])
        return
    bad = functools.partial(REFUSED[row], _main(data))
    with unchanged(*_tensors(data)):
        for act in (
            lambda: pg.check(entry.recipe(), _with(data, bad())),
            lambda: pg.fit(entry.recipe(), _with(data, bad()), algorithm, progress=False, callbacks=[_never]),
            lambda: pg.prior_predictive(entry.recipe(), _with(data, bad()), draws=1),
        ):
            with pytest.raises((ValueError, TypeError), match=ARGUMENT) as caught:
                act()
            assert type(caught.value) in (ValueError, TypeError)


@pytest.mark.filterwarnings("ignore:.*repeated values")  # of integers many are the same
@pytest.mark.parametrize("row", DOUBTFUL)
@pytest.mark.parametrize("program", CATALOGUE)
def test_what_some_programs_take_is_fitted_or_refused(program: str, row: str) -> None:
    entry, algorithm = CATALOGUE[program], _fit(program)[1]
    data = entry.data()
    bad = _with(data, DOUBTFUL[row](_main(data)))
    steps: list[int] = []
    with unchanged(*_tensors(data)):
        try:
            fit = pg.fit(
                entry.recipe(), bad, algorithm, progress=False, callbacks=[lambda step, info: steps.append(step)]
            )
        except (ValueError, TypeError) as error:
            assert not steps, "training began"
            with pytest.raises(type(error), match=ARGUMENT):
                pg.check(entry.recipe(), bad)
            return
    assert all(bool(value.isfinite().all()) for value in fit.params.values())
    if row == "one column more":
        assert program in ANY_WIDTH, "columns beyond those it was made for went unnoticed"


def _questions(fit: pg.Fit) -> dict[str, Callable[[Any], Any]]:
    return {
        "evidence": lambda data: fit.evidence(data, particles=2, draws=2),
        "posterior": lambda data: fit.posterior(data, 2),
        "predict": lambda data: fit.predict(data, 2),
        "codes": lambda data: codes(fit, data),
        "reconstructions": lambda data: reconstructions(fit, data),
        "anomaly_scores": lambda data: anomaly_scores(fit, data),
        "active_units": lambda data: active_units(fit, data),
        "code_means": lambda data: code_means(fit, data),
        "bits_per_character": lambda data: bits_per_character(fit, data),
    }


#: None is left out: it means the training rows.
LATER = {row: change for row, change in REFUSED.items() if row not in ("nothing", "a huge number")}
LATER |= {row: DOUBTFUL[row] for row in ("a dimension behind", "one column more")}


@pytest.mark.filterwarnings("ignore:.*effective.*:UserWarning")
@pytest.mark.parametrize("program", CATALOGUE)
def test_a_fit_refuses_rows_unlike_its_own(program: str) -> None:
    """Most of all columns that torch would stretch: an answer to them would be a number like any other."""
    entry, fit = CATALOGUE[program], _fit(program)[0]
    data = entry.data()
    for row, change in LATER.items():
        if row == "one column more" and program == "char_rnn":
            continue  # sequences may be longer
        for name, ask in _questions(fit).items():
            with unchanged(*_tensors(data)), pytest.raises((ValueError, TypeError)) as caught:
                ask(_with(data, change(_main(data))))
                pytest.fail(f"{name} took {row}")
            assert type(caught.value) in (ValueError, TypeError, pg.IncompatibleError), (name, row)
            assert str(caught.value).strip(), (name, row)


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def _asking(x: Tensor) -> Tensor:
    return x.clone().requires_grad_() if x.is_floating_point() else x


def _read_only(x: Tensor) -> Any:
    array = np.asfortranarray(x.numpy().copy())
    array.setflags(write=False)
    return array


@pytest.mark.filterwarnings("ignore:.*effective.*:UserWarning")
@pytest.mark.parametrize("change", [_strided, _asking, _read_only])
@pytest.mark.parametrize("program", CATALOGUE)
def test_how_rows_are_stored_makes_no_difference(program: str, change: Change) -> None:
    entry, (fit, algorithm) = CATALOGUE[program], _fit(program)
    data = entry.data()
    other = {k: change(v) for k, v in data.items()} if isinstance(data, Mapping) else change(data)
    looked = [value for value in _tensors(other) if isinstance(value, Tensor)]
    with unchanged(*looked):
        again = pg.fit(entry.recipe(), other, algorithm, progress=False)
        drawn = fit.predict(other, 2), fit.predict(data, 2)
    assert same(again.params, fit.params) and again.records == fit.records
    assert same(*drawn)
    assert change is _read_only or change is _asking or not looked[0].is_contiguous()
