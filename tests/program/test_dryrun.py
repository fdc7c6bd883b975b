"""The dry run: what it says about the usual mistakes, the table it prints, and the offers it derives."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import (
    SCHOOLS,
    X8,
    both,
    both_guide,
    conjugate,
    eight_schools,
    generator,
    layered,
    local,
    mixture,
    network,
    no_plate,
    regression,
    sine_rows,
    switch,
    switch_guide,
)
from torch import Tensor, nn

import ppl_gen as pg
from ppl_gen.inference import CAVI, ELBO, EM, IWAE, NUTS, SVI

X5 = torch.arange(5.0)
X53 = torch.ones(5, 3)
ONE_STEP = SVI(steps=1)


# ------------------------------------------------------------------------------------------ plates and shapes
def named_otherwise(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def rows_without_data(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def plate_of_seven(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 7):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def latent_plate_of_seven(x: Tensor) -> None:
    with pyro.plate("data", 7):
        pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1), obs=x)


def outside_the_plate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def event_outside_the_plate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def no_plate_at_all(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def without_to_event(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0), obs=x)


def column_of_means(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=x[:, 0])


def column_of_data(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=x[:, :1])


def outside_the_support(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("share", dist.Beta(1.0, 1.0), obs=x)


SHAPES: list[tuple[Callable[..., None], Tensor, list[str]]] = [
    (rows_without_data, X5, ["'rows' has as many rows as the data (5)", "Name it 'data'", "data_plate='rows'"]),
    (plate_of_seven, X5, ["at site 'x'", "batch shape (7,)", "size is written out", "pyro.plate('data', len(x))"]),
    (latent_plate_of_seven, X5, ["pyro.plate('data') has size 7", "the data has 5 rows", "plate('data', len(x))"]),
    (outside_the_plate, X5, ["at site 'x'", "expected [] (its plates), actual [5]", "put it under `with pyro.plate"]),
    (no_plate_at_all, X5, ["at site 'x'", "outside of every plate", "`with pyro.plate('data', len(x)):`"]),
    (without_to_event, X53, ["at site x", "5 vs 3", "belong to the event", ".to_event(1)"]),
    (column_of_means, X53, ["at site 'y'", "expected [5] (its plates), actual [5, 5]", "(N, 1)", ".squeeze(-1)"]),
    (column_of_data, X53, ["at site 'y'", "value (5, 1)", "(N, 1) against a vector (N,)", ".squeeze(-1)"]),
    (outside_the_support, X5, ["at site 'share'", "within the support", "observed values lie outside"]),
]


def assert_says(error: BaseException, parts: list[str]) -> None:
    missing = [part for part in parts if part not in str(error)]
    assert not missing, f"{missing} not said in: {error}"


@pytest.mark.parametrize(("model", "data", "said"), SHAPES, ids=[model.__name__ for model, _, _ in SHAPES])
@pytest.mark.parametrize("call", ["check", "fit"])
def test_plate_and_shape_mistakes(call: str, model: Callable[..., None], data: Tensor, said: list[str]) -> None:
    before = data.clone()
    with pytest.raises(ValueError, match="plate|site") as caught:
        pg.check(model, data) if call == "check" else pg.fit(model, data, ONE_STEP)
    assert_says(caught.value, said)
    assert torch.equal(data, before) and not list(pyro.get_param_store().keys())


def test_a_likelihood_over_rows_outside_the_plate_is_one_of_whole_data() -> None:
    """Oracle: the rows are independent here all the same, x ~ N(0, 2); the exact guide gives -log p(x) as the loss."""

    def guide(x: Tensor) -> None:
        spread = pyro.param("spread", torch.tensor(0.5**0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, spread))

    program = pg.Program(event_outside_the_plate, guide)
    info = pg.check(program, X5)
    assert (
        info.data_plate is None and "no data plate: whole data only" in str(info) and "'x' stand outside" in str(info)
    )
    fit = pg.fit(program, X5, SVI(pyro.infer.Trace_ELBO(), steps=1))
    exact = float(dist.Normal(0.0, 2.0**0.5).log_prob(X5).sum())
    assert float(fit.history["program_loss"][0]) * len(X5) == pytest.approx(-exact, abs=1e-4)
    assert "site(s) 'x' stand outside" in fit.notes["data plate"]
    assert fit.evidence(particles=5).rows == 1
    assert fit.evidence(particles=5, chunk=2).mean == fit.evidence(particles=5).mean  # not in pieces
    assert float(fit.marginal_likelihood(draws=50).mean) == pytest.approx(exact, abs=1e-3)
    assert fit.predict(draws=3)["x"].shape == (3, 5) and fit.posterior(draws=3)["z"].shape == (3, 5)
    with pytest.raises(
        pg.IncompatibleError, match=r"because: +the observed site\(s\) 'x' stand outside the data plate"
    ):
        pg.fit(program, X5, SVI(steps=1, batch_size=2))
    with pytest.raises(pg.IncompatibleError, match="z of 'event_outside_the_plate' follow the number of rows"):
        fit.evidence(X5 + 1.0)


def test_the_mends_mend() -> None:
    def to_event(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    def squeezed(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ w).squeeze(-1), 1.0), obs=x[:, 0])

    assert pg.check(pg.Program(named_otherwise, data_plate="rows"), X5).data_plate == "rows"
    assert pg.check(to_event, X53).sites["x"].event_shape == (3,)
    assert pg.check(squeezed, X53).sites["y"].batch_shape == (5,)


def test_two_sites_of_one_name_and_a_plate_made_twice() -> None:
    def twice(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.sample("x", dist.Normal(1.0, 1.0), obs=x)

    def reopened(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for model, name in ((twice, "x"), (reopened, "data")):
        with pytest.raises(ValueError, match=f"'{name}'.*name of its own.*`rows = pyro.plate.*then `with rows:`"):
            pg.check(model, X5)


def test_a_plate_of_the_training_rows_is_refused_on_minibatches() -> None:
    def five(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    assert pg.check(five, X5).rows == 5, "legal on the whole data"
    with pytest.raises(ValueError, match=r"at site 'x'[\s\S]*size is written out: use pyro.plate\('data', len\(x\)\)"):
        pg.fit(five, X5, SVI(steps=1, batch_size=2))


# ------------------------------------------------------------------------------------------ guides and models
def wide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def empty_guide(x: Tensor) -> None:
    pyro.param("unused", torch.zeros(()))


def guide_of_another(x: Tensor) -> None:
    pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("other", dist.Normal(0.0, 1.0))


def guide_drawing_the_data(x: Tensor) -> None:
    pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def wider_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def local_theta(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("theta", dist.Normal(0.0, 1.0))


def global_z(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def column_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, None], 1.0))


PAIRS: list[tuple[Callable[..., None], Callable[..., None], list[str]]] = [
    (
        conjugate,
        empty_guide,
        ["latent site(s) ['theta'] are in the model only", "a site of the same name in the guide"],
    ),
    (conjugate, guide_of_another, ["site(s) ['other'] are in the guide only", "a site of the same name"]),
    (conjugate, guide_drawing_the_data, ["site(s) ['x'] are observed in the model and drawn", "`if y is None:`"]),
    (wide, wider_guide, ["at site 'z'", "event shape (2,), the guide (3,)", "the same .to_event(...) on both sides"]),
    (conjugate, local_theta, ["at site 'theta'", "in the guide, outside it in the model", "len(x)) in both"]),
    (local, global_z, ["at site 'z'", "in the model, outside it in the guide", "len(x)) in both"]),
    (local, column_guide, ["the guide of 'local'", "at site 'z'", "(N, 1)", ".squeeze(-1)"]),
]


@pytest.mark.parametrize(("model", "guide", "said"), PAIRS, ids=[guide.__name__ for _, guide, _ in PAIRS])
@pytest.mark.parametrize("call", ["check", "fit"])
def test_guides_that_do_not_match(
    call: str, model: Callable[..., None], guide: Callable[..., None], said: list[str]
) -> None:
    program = pg.Program(model, guide)
    with pytest.raises(ValueError, match="site") as caught:
        pg.check(program, X5) if call == "check" else pg.fit(program, X5, ONE_STEP)
    assert_says(caught.value, said)
    assert not list(pyro.get_param_store().keys())


def test_finite_sites_may_be_left_to_the_sum() -> None:
    assert pg.check(pg.Program(switch, empty_guide), X5).finite_latents == ["y"]


def test_a_program_without_observed_sites_cannot_be_fitted() -> None:
    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    assert [site.kind for site in pg.check(prior, X5).sites.values()] == ["latent"]
    with pytest.raises(ValueError, match="no site of 'prior' is observed.*obs=x"):
        pg.fit(prior, X5, ONE_STEP)


@pytest.mark.parametrize("data", [X5, {"x": X5}])
def test_a_model_without_arguments(data: Any) -> None:
    def closed() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(1), obs=X5)

    with pytest.raises(
        ValueError, match=r"takes no arguments, so data cannot reach it; give it one.*`def model\(x\):`"
    ):
        pg.check(closed, data)


# ----------------------------------------------------------------------------------------------------- the data
def pair(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


NAN, INF = float("nan"), float("inf")
_HOLED = torch.tensor([[0.0, 1.0], [2.0, NAN], [INF, 1.0]])
_MASKED = np.ma.masked_array([1.0, 2.0], [False, True])

DATA: dict[str, tuple[Any, type[Exception], str]] = {
    "missing entry": ({"x": X5}, ValueError, r"needs the argument 'y'.*holds x\).*add the entry.*`y=None`"),
    "one tensor for two": (X5, ValueError, "needs the argument 'y'.*add the entry"),
    "other names": ({"X": X5, "Y": X5}, ValueError, r"needs the argument 'x'.*holds X, Y\)"),
    "nan": ({"x": _HOLED, "y": X5[:3]}, ValueError, r"data 'x': 2 value\(s\) are NaN.*first at index \(1, 1\); drop"),
    "inf": (
        {"x": X5, "y": np.array([0, 1, INF, 3, 4])},
        ValueError,
        r"'y': 1 value\(s\).*infinite.*index \(2,\).*mask",
    ),
    "nan in a constant": ({"x": X5, "y": pg.constant(_HOLED[1])}, ValueError, r"'y': 1 value\(s\).*index \(1,\)"),
    "nan as a scalar": ({"x": X5, "y": NAN}, ValueError, "'y': expected a finite number, got nan"),
    "inf of half precision": ({"x": torch.tensor([1.0, INF]).half(), "y": X5[:2]}, ValueError, "'x': 1 value"),
    "no rows": ({"x": X5[:0], "y": X5[:0]}, ValueError, r"'x': expected at least one row.*got \(0,\)"),
    "no columns": ({"x": X53[:, :0], "y": X5}, ValueError, r"'x': expected.*one column, got \(5, 0\)"),
    "no entries": ({}, ValueError, "needs the argument 'x'"),
    "rows that differ": ({"x": X5, "y": X5[:3]}, ValueError, r"share their rows.*x: 5, y: 3.*pg.constant\(\.\.\.\)"),
    "strings": ({"x": ["a", "b"], "y": X5[:2]}, TypeError, r"'x': expected.*numbers, got list.*pg.constant\(\.\.\.\)"),
    "objects": ({"x": np.array([1.0, None]), "y": X5[:2]}, TypeError, "'x': expected.*numbers, got ndarray"),
    "an object": ({"x": object(), "y": X5}, TypeError, "'x': expected.*numbers, got object"),
    "ragged rows": ({"x": [[1.0, 2.0], [3.0]], "y": X5[:2]}, TypeError, "'x': expected.*numbers, got list"),
    "ragged tensors": ({"x": [X5, X5[:2]], "y": X5[:2]}, TypeError, "'x': expected.*numbers, got list"),
    "dates": ({"x": np.array(["2020-01-01"], "M8[D]"), "y": X5[:1]}, TypeError, "'x': expected.*numbers, got ndarray"),
    "complex": ({"x": X5 * 1j, "y": X5}, TypeError, "'x': expected.*real numbers, got complex"),
    "complex array": ({"x": np.array([1j]), "y": X5[:1]}, TypeError, "'x': expected.*numbers, got ndarray"),
    "sparse": ({"x": torch.eye(5).to_sparse(), "y": X5}, TypeError, r"'x': expected.*sparse.*\.to_dense\(\)"),
    "masked": ({"x": _MASKED, "y": X5[:2]}, TypeError, "'x': expected.*masked array.*poutine.mask"),
    "a tuple": ((X5, X5, X5), ValueError, r"a tuple of 3 values, and the model takes 2 \(x, y\)"),
}


@pytest.mark.parametrize("mistake", DATA)
@pytest.mark.parametrize("call", ["check", "fit"])
def test_mistakes_in_the_data(call: str, mistake: str) -> None:
    data, error, said = DATA[mistake]
    with pytest.raises(error, match=said):
        pg.check(pair, data) if call == "check" else pg.fit(pair, data, ONE_STEP)
    assert not list(pyro.get_param_store().keys())


def test_entries_that_all_miss_the_arguments_are_not_left_out_in_silence() -> None:
    def model(x: Tensor | None = None) -> None:
        with pyro.plate("data", 5 if x is None else len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"none of its entries \(X, Y\) is an argument of the model \(x\); give them"):
        pg.check(model, {"X": X5, "Y": X5})


@pytest.mark.parametrize("data", [3.0, 3, torch.tensor(3.0), np.array(3.0), np.float32(3.0)])
def test_a_single_number_is_no_row(data: Any) -> None:
    with pytest.raises(ValueError, match="data 'x': expected rows along the first dimension, got a single number"):
        pg.check(conjugate, data)


@pytest.mark.parametrize(("data", "got"), [(None, "NoneType"), ("abc", "str"), ({1.0, 2.0}, "set")])
def test_what_is_no_array_is_named(data: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"data 'x': expected a tensor or an array of numbers, got {got}"):
        pg.check(conjugate, data)


def test_numbers_beyond_float32_do_not_become_infinite_in_silence() -> None:
    data = np.array([1.0, 1e300])
    with pytest.raises(ValueError, match=r"'x': 1 value\(s\).*too large for torch.float32.*first at index \(1,\)"):
        pg.fit(conjugate, data, ONE_STEP, dtype=torch.float32)
    assert pg.check(conjugate, data).rows == 2, "float64 holds them"


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter([1.0])


def test_iterable_data_has_no_number_of_rows() -> None:
    for data in (Endless(), torch.utils.data.DataLoader(Endless())):
        with pytest.raises(
            TypeError, match="no known number of rows; pass pg.stream.*, a map-style Dataset or a tensor"
        ):
            pg.fit(conjugate, data, ONE_STEP)


# -------------------------------------------------------------------------------------------- the other arguments
@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (SVI, r"expected an instance such as SVI\(\) \(with brackets\), got SVI"),
        (NUTS, r"NUTS\(\) \(with brackets\), got NUTS"),
        (ELBO(), r"expected an instance such as SVI\(\), EM\(\) or NUTS\(\), got ELBO"),
        ("svi", "expected an instance.*got str"),
        (None, "expected an instance.*got NoneType"),
    ],
)
def test_an_algorithm_is_an_instance(algorithm: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"algorithm: .*{said}"):
        pg.fit(conjugate, X5, algorithm)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "1", None])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    said = re.escape(f"seed: expected a whole number of at least 0 and below 2**32, got {seed!r}")
    with pytest.raises(ValueError, match=said):
        pg.fit(conjugate, X5, ONE_STEP, seed=seed)


def test_numpys_whole_numbers_are_seeds() -> None:
    assert pg.fit(conjugate, X5, ONE_STEP, seed=np.int64(3)).seed == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (3, "expected a model function, a Program or a Recipe, got int"),
        (pg.Program, "got the class Program; pass a model function, a Program or a Recipe"),
        (pg.Recipe(lambda data: conjugate, name="bare"), "'bare' must return a Program, got function"),
    ],
)
def test_what_is_no_program(program: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        pg.check(program, X5)


_COUNTS = {
    SVI: ["steps", "epochs", "batch_size"],
    ELBO: ["particles"],
    IWAE: ["particles"],
    EM: ["steps", "restarts"],
    CAVI: ["steps"],
    NUTS: ["draws", "chains", "warmup", "max_tree_depth", "thin", "processes"],
}


@pytest.mark.parametrize("bad", [-1, 0, 1.5, 2.0, True, "3"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in _COUNTS.items() for name in names])
def test_counts_are_whole_numbers(kind: Any, name: str, bad: Any) -> None:
    expected = rf"{name}: expected a whole number of at least 1( and at most 20)?, got {re.escape(repr(bad))}"
    with pytest.raises(ValueError, match=expected):
        kind(**{name: bad})


@pytest.mark.parametrize(
    ("kind", "name", "values", "said"),
    [
        (SVI, "lr", [0.0, -0.1, NAN, INF, True, "fast", {"program": -1.0}], "expected a positive number"),
        (SVI, "clip_norm", [0.0, -1.0, NAN, INF, True], "expected a positive number"),
        (EM, "tolerance", [-1e-9, NAN, INF, True], "expected a number of nats of at least 0"),
        (EM, "prior", [1, "yes", None], "expected True or False"),
        (EM, "m_step", ["derive", None, True], "expected one of 'auto'"),
        (CAVI, "tolerance", [-1e-9, 1.0, NAN], "expected a number from 0 up to 1"),
        (NUTS, "target_accept", [0.0, 1.0, -0.5, 1.5, NAN], "expected a number between 0 and 1"),
        (NUTS, "jitter", [-0.1, NAN], "expected a number of at least 0"),
    ],
)
def test_settings_out_of_range(kind: Any, name: str, values: list[Any], said: str) -> None:
    for bad in values:
        with pytest.raises(ValueError, match=f"{name}: {said}"):
            kind(**{name: bad})


# -------------------------------------------------------------------------------------------------- networks
def test_two_networks_under_one_name() -> None:
    first, second = network(nn.Linear(1, 1)), network(nn.Linear(1, 1))

    def model(x: Tensor) -> None:
        pyro.module("net", first)
        pyro.module("net", second)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal((first(x[:, None]) + second(x[:, None])).squeeze(-1), 1.0), obs=x)

    def half(x: Tensor) -> None:
        pyro.module("net", first)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(first(z[:, None]).squeeze(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", second)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(second(x[:, None]).squeeze(-1), 1.0))

    for program in (pg.Program(model), pg.Program(half, guide)):
        for call in (lambda p: pg.check(p, X5), lambda p: pg.fit(p, X5, ONE_STEP)):
            with pytest.raises(
                ValueError, match=r"pyro.module\('net'.*two different modules under one name.*its own name"
            ):
                call(program)


@pytest.mark.parametrize("registered", [True, False])
def test_a_network_that_pyro_does_not_know_is_noted(registered: bool) -> None:
    net = network(nn.Linear(1, 1))

    def model(x: Tensor) -> None:
        if registered:
            pyro.module("net", net)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(torch.ones(len(x), 1)).squeeze(-1), scale), obs=x)

    notes = pg.fit(model, X5, SVI(steps=2)).notes
    assert ("not trained" in notes) is not registered
    if not registered:
        assert_says(
            ValueError(notes["not trained"]), ["Linear", 'pyro.module("name", network)', "requires_grad_(False)"]
        )


# ------------------------------------------------------------------------------------------------- the table
def nested(x: Tensor, weight: Tensor) -> None:
    shift = pyro.param("shift", torch.zeros(2, 3))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("columns", 3, dim=-2):
        loc = pyro.sample("loc", dist.Normal(shift.sum(), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(torch.ones(4)))
            pyro.sample("x", dist.Normal(loc + k, scale).mask(weight[:, None] > 0), obs=x.T)
    pyro.deterministic("twice", 2 * scale)
    pyro.factor("extra", -scale)


TABLES: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "one global": (
        lambda: (conjugate, X5),
        """
conjugate: data plate 'data' over 5 rows
site   kind      distribution  batch  event  plates  guide
theta  latent    Normal        []     []     -       -
x      observed  Normal        [5]    []     data    -
offers: data plate, density, differentiable latents, differentiable samples, latent sites, no free parameters, samples
""",
    ),
    "eight schools": (
        lambda: (eight_schools, SCHOOLS),
        """
eight_schools: data plate 'data' over 8 rows
site    kind      distribution  batch  event  plates  guide
mu      latent    Normal        []     []     -       -
tau     latent    HalfCauchy    []     []     -       -
offset  latent    Normal        [8]    []     data    -
y       observed  Normal        [8]    []     data    -
offers: data plate, density, differentiable latents, differentiable samples, latent sites, no free parameters, samples
""",
    ),
    "whole data only": (
        lambda: (no_plate, X5),
        """
no_plate: no data plate: whole data only
site   kind      distribution  batch  event  plates  guide
theta  latent    Normal        []     []     -       -
x      observed  Normal        []     [5]    -       -
offers: density, differentiable latents, differentiable samples, latent sites, no free parameters, samples
""",
    ),
    "a mixture": (
        lambda: (mixture, X5),
        """
mixture: data plate 'data' over 5 rows
site    kind                 distribution  batch  event  plates  guide
weight  latent               Beta          []     []     -       -
means   latent               Normal        [2]    []     parts   -
k       latent (summed out)  Bernoulli     [5]    []     data    -
x       observed             Normal        [5]    []     data    -
offers: data plate, density, differentiable latents, finite local latents, latent sites, no free parameters, samples
""",
    ),
    "nested plates": (
        lambda: (nested, {"x": X53, "weight": pg.constant(torch.ones(3))}),
        """
nested: data plate 'data' over 5 rows
site   kind                 distribution  batch   event   plates         guide
scale  latent               LogNormal     []      []      -              -
loc    latent               Normal        [3, 1]  []      columns        -
k      latent (summed out)  Categorical   [3, 5]  []      columns, data  -
x      observed             Normal        [3, 5]  []      columns, data  -
twice  deterministic        Delta         []      []      -              -
extra  factor               Unit          []      [0]     -              -
shift  parameter                                  [2, 3]
offers: data plate, density, differentiable latents, finite local latents, latent sites, samples
""",
    ),
    "a guide": (
        lambda: (pg.Program(both, both_guide), X5),
        """
both: data plate 'data' over 5 rows
site   kind      distribution  batch  event  plates  guide
theta  latent    Normal        []     []     -       Normal
z      latent    Normal        [5]    []     data    Normal
x      observed  Normal        [5]    []     data    -
offers: data plate, density, differentiable latents, differentiable samples, latent sites, no free parameters, samples
""",
    ),
    "a guide that draws the discrete site": (
        lambda: (pg.Program(switch, switch_guide), X5),
        """
switch: data plate 'data' over 5 rows
site  kind      distribution  batch  event  plates  guide
y     latent    Bernoulli     [5]    []     data    Bernoulli
x     observed  Normal        [5]    []     data    -
offers: data plate, density, differentiable latents, finite local latents, latent sites, no free parameters, samples
""",
    ),
    "a network": (
        lambda: (regression()[0], sine_rows(6)),
        """
sine: data plate 'data' over 6 rows
site            kind       distribution  batch  event   plates  guide
noise           latent     LogNormal     []     []      -       -
y               observed   Normal        [6]    []      data    -
net$$$0.weight  parameter                       [4, 1]
net$$$0.bias    parameter                       [4]
net$$$1.weight  parameter                       [4]
net$$$1.bias    parameter                       [4]
net$$$2.weight  parameter                       [1, 4]
offers: data plate, density, differentiable latents, differentiable samples, latent sites, samples
""",
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_the_printed_table(kind: str) -> None:
    made, expected = TABLES[kind]
    program, data = made()
    assert str(pg.check(program, data)) == expected.strip()


# ------------------------------------------------------------------------------------------------- the offers
_USUAL = {"density", "latent sites", "samples", "data plate", "differentiable latents"}


def test_offers_follow_from_the_dry_run() -> None:
    def offers(program: Any, data: Any) -> set[str]:
        return set(pg.check(program, data).offers)

    assert offers(conjugate, X8) == _USUAL | {"differentiable samples", "no free parameters"}
    assert offers(mixture, X8) == _USUAL | {"finite local latents", "no free parameters"}
    assert offers(layered, X8) == _USUAL | {"no free parameters"}, "one of the two local sites cannot be summed out"
    assert offers(no_plate, X8) == _USUAL - {"data plate"} | {"differentiable samples", "no free parameters"}
    assert offers(regression()[0], sine_rows(6)) == _USUAL | {"differentiable samples"}
    implicit = generator()[0]
    assert offers(implicit, torch.zeros(4, 1)) == _USUAL - {"density"} | {"differentiable samples", "codes"}


def test_offers_of_sites_without_gradients_or_observations() -> None:
    def counts(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Poisson(3.0))
            pyro.sample("x", dist.Normal(n, 1.0), obs=x)

    def weighed(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.factor("x", -((x / scale) ** 2))

    assert set(pg.check(counts, X5).offers) == _USUAL - {"differentiable latents"} | {"no free parameters"}
    assert set(pg.check(weighed, X5).offers) == {"density", "data plate"}


def test_a_frozen_network_leaves_no_free_parameters() -> None:
    net = nn.Linear(1, 1).requires_grad_(False)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(z.expand(len(x), 1)).squeeze(-1), 1.0), obs=x)

    assert "no free parameters" in pg.check(model, X5).offers
    net.requires_grad_(True)
    assert "no free parameters" not in pg.check(model, X5).offers


def test_sites_are_selected_by_kind_place_and_support() -> None:
    info = pg.check(nested, {"x": X53, "weight": pg.constant(torch.ones(3))})

    def names(**options: Any) -> list[str]:
        return [site.name for site in info.select(**options)]

    assert names() == ["scale", "loc", "k"] and names(local=True) == ["k"] and names(local=False) == ["scale", "loc"]
    assert names(discrete=False) == ["scale", "loc"] and names(kind="observed") == ["x"]
    assert names(kind="deterministic") == ["twice"] and names(kind="factor") == ["extra"]
    assert info.finite_latents == ["k"] and info.plate_dim == -1 and info.plate_nesting == 2
    assert info.params == {"shift": (2, 3)} and info.data_plate == "data"


def test_an_index_that_is_no_integer_and_a_product_of_the_wrong_shape_are_told() -> None:
    def index(x):
        i = pyro.sample("i", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3)[i], 1.0), obs=x)

    def product(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.ones(len(x), 2) @ w, 1.0), obs=x)

    with pytest.raises(TypeError, match=r"an index is an integer: i.long\(\)"):
        pg.check(index, X5)
    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        pg.check(product, X5)
    assert (
        "'product' failed on a dry run (after site 'w', before the next): it was given argument 0 of shape (5,)"
        in caught.value.__notes__[-1]
    )
