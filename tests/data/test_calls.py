"""Data as Pyro's own users pass them: by order, by name, by column, with what has no rows beside them."""

from __future__ import annotations

import argparse
import warnings
from functools import partial

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import block_autoregressive, iterated
from pyro.infer.autoguide import AutoNormalizingFlow
from torch.utils.data import DataLoader, TensorDataset

import ppl_gen as pg
from ppl_gen.data.batching import as_dataset
from ppl_gen.errors import IncompatibleError
from ppl_gen.inference import EM, NUTS, SVI

X = torch.linspace(-2.0, 2.0, 12)
Y = 1.5 * X + 0.1 * torch.cos(7 * X)
FAST = SVI(steps=5)


def line(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


def guide_of_other_names(inputs, outputs=None):
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("slope", dist.Normal(loc, 0.1))


#: The exact posterior of the slope: precision 1 / 25 + sum x^2 / 0.25.
PRECISION = 1 / 25 + float((X**2).sum()) / 0.25
EXACT = float((X * Y).sum()) / 0.25 / PRECISION

FORMS = {
    "tuple": (X, Y),
    "arrays": (X.numpy(), Y.numpy()),
    "mapping": {"x": X, "y": Y},
    "tensor dataset": TensorDataset(X, Y),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=3),
    "data frame": pandas.DataFrame({"y": Y.numpy(), "x": X.numpy(), "colour": ["a", "b"] * 6}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_rows_gives_the_same_fit(form: str) -> None:
    fit = pg.fit(line, FORMS[form], SVI(steps=800, lr=0.02), seed=0)
    # The posterior mean is 13 posterior sd from where the guide starts; Adam's steps of 0.02 wander by 0.2 sd or so.
    assert abs(float(fit.params["AutoNormal.locs.slope"]) - EXACT) < 1.0 * PRECISION**-0.5
    assert abs(EXACT) > 10 * PRECISION**-0.5


@pytest.mark.parametrize("form", FORMS)
def test_minibatches_keep_rows_together(form: str) -> None:
    data = as_dataset(FORMS[form], line)
    batch = data.batch(torch.tensor([7, 2]))
    values = {**batch.kwargs, **dict(zip(data.positional, batch.args, strict=True))}
    assert torch.equal(values["x"].float(), X[[7, 2]]) and torch.equal(values["y"].float(), Y[[7, 2]])


def test_tuples_reach_a_guide_whose_arguments_have_other_names() -> None:
    fit = pg.fit(pg.Program(line, guide_of_other_names), (X, Y), SVI(steps=600, lr=0.05), seed=0)
    assert abs(float(fit.params["loc"]) - EXACT) < 0.05


def test_new_rows_by_order_without_an_outcome() -> None:
    fit = pg.fit(line, (X, Y), SVI(steps=600, lr=0.05), seed=0)
    for rows in [(torch.tensor([10.0, 20.0]), None), (torch.tensor([10.0, 20.0]),), {"x": torch.tensor([10.0, 20.0])}]:
        found = fit.predict(rows, draws=2000)["y"].mean(0)
        assert torch.allclose(found, EXACT * torch.tensor([10.0, 20.0]), atol=2.0)


def needed(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


def test_none_for_an_argument_without_a_default() -> None:
    fit = pg.fit(needed, (X, Y), FAST, seed=0)
    for rows in [(X[:3], None), {"x": X[:3], "y": None}]:
        assert fit.predict(rows, draws=3)["y"].shape == (3, 3)
    with pytest.raises(ValueError, match=r"the model needs the argument 'y', .*None if it is to be drawn"):
        fit.predict({"x": X[:3]})


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x):
        return self.linear(x[:, None])[:, 0]


def with_settings(x, y, settings, net, width=1, label="a", sizes=None):
    pyro.module("net", net)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(net(x) * settings.factor, 0.5 * width), obs=y)


@pytest.mark.parametrize("by_name", [False, True])
def test_what_has_no_rows_is_a_constant_and_noted(by_name: bool) -> None:
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    values = (X, Y, argparse.Namespace(factor=2.0), net, 1, "b", {"hidden": 3})
    data = dict(zip(["x", "y", "settings", "net", "width", "label", "sizes"], values, strict=True))
    fit = pg.fit(with_settings, data if by_name else values, SVI(steps=800, lr=0.05, batch_size=6), seed=0)
    assert fit.notes["constants"] == (
        "settings (Namespace), net (Net), sizes (dict): without rows, passed whole with every batch"
    )
    assert abs(2 * float(fit.params["net$$$linear.weight"]) - 1.5) < 0.2  # least squares: 1.5 within 0.05
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


def test_packed_sequences_are_passed_whole() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.zeros(2, 2)])

    def model(x, sequences):
        loc = pyro.sample("loc", dist.Normal(sequences.data.mean(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    assert "PackedSequence" in pg.fit(model, (X, packed), FAST, seed=0).notes["constants"]


def test_a_model_of_one_argument_leaves_labels_out_and_says_so() -> None:
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    fit = pg.fit(model, TensorDataset(X, torch.arange(12)), FAST, seed=0)
    assert "column 1 of the dataset" in fit.notes["left out"]
    assert pg.fit(model, (1.0, 2.0, 3.0), FAST, seed=0).data.rows == 3
    for dtype in (np.int64, np.float32, np.bool_):  # numpy's numbers are numbers too
        assert pg.fit(model, tuple(np.ones(3, dtype=dtype)), FAST, seed=0).data.rows == 3


def test_labels_are_no_setting() -> None:
    """A column fills what has no default, or None; never an argument that has a value of its own."""

    def model(x, scale=1.0, *, y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    data = as_dataset(TensorDataset(X, torch.arange(12)), model)
    assert list(data.entries) == ["x"] and data.left_out == ("column 1 of the dataset",)
    with pytest.raises(ValueError, match=r"a tuple of 3 values, and the model takes 2 \(x, scale\)"):
        as_dataset((X, 2.0, X), model)


def test_labels_are_no_mask() -> None:
    from ppl_gen.models import ppca

    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(rows, torch.arange(40))
    labelled, plain = (pg.fit(ppca(3, 1), given, EM(), seed=0).point for given in (data, rows))
    assert all(torch.equal(value, plain[name]) for name, value in labelled.items())
    assert plain


def test_a_frame_is_one_table_where_the_model_names_no_column() -> None:
    def model(table):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(table)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=table)

    frame = pandas.DataFrame({"a": X.numpy(), "b": Y.numpy()})
    assert pg.fit(model, frame, FAST, seed=0).data.entries["table"].shape == (12, 2)


def test_mistakes_are_answered_in_words() -> None:
    with pytest.raises(ValueError, match=r"a tuple of 3 values, and the model takes 2 \(x, y\)"):
        pg.fit(line, (X, Y, Y), FAST)
    with pytest.raises(ValueError, match=r"the table has columns x, which the model names, and lacks y"):
        pg.fit(needed, pandas.DataFrame({"x": X.numpy(), "z": Y.numpy()}), FAST)
    with pytest.raises(TypeError, match=r"data 'y': expected a tensor or an array of numbers, got ndarray"):
        pg.fit(line, pandas.DataFrame({"x": X.numpy(), "y": ["a"] * 12}), FAST)
    with pytest.raises(ValueError, match=r"the model needs the argument 'y'"):
        pg.fit(needed, (X,), FAST)
    with pytest.raises(ValueError, match="entries must share their rows"):
        pg.fit(needed, (X, Y[:5]), FAST)


@pytest.mark.parametrize("values", [(X, Y), (X, Y, pg.constant(3), None)], ids=["rows", "constants"])
def test_fits_of_tuples_are_saved_and_loaded(values, tmp_path) -> None:
    def model(x, y, k=2, extra=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 0.5 * k), obs=y)

    fit = pg.fit(model, values, FAST, seed=0)
    loaded = pg.load(fit.save(tmp_path / "fit"), program=model)
    assert loaded.data.positional == fit.data.positional
    assert loaded.evidence(particles=8).mean == fit.evidence(particles=8).mean


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_comparisons_and_chains_take_tuples() -> None:
    found = pg.compare(line, (X, Y), {"svi": SVI(steps=50)}, seeds=[0], holdout=0.25)
    assert len(found.table()) == 1
    fit = pg.fit(line, (X, Y), NUTS(draws=20, warmup=20, chains=1, processes=1), seed=0)
    assert np.isfinite(fit.evidence(particles=4).mean)


def test_models_without_arguments_take_an_empty_tuple() -> None:
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=X)

    assert torch.equal(pg.fit(model, (), FAST, seed=0).posterior(draws=2)["loc"],
                       pg.fit(model, {}, FAST, seed=0).posterior(draws=2)["loc"])  # fmt: skip


def test_settings_alone_are_no_data() -> None:
    """A density whose arguments are numbers and settings observes nothing, and that is no mistake."""

    def target(loc=1.0, settings=None):
        pyro.sample("t", dist.Normal(loc if settings is None else settings.loc, 0.5))

    def of_settings(settings):
        pyro.sample("t", dist.Normal(settings.loc, 0.5))

    chains = NUTS(draws=200, warmup=100, chains=2, processes=1)
    warnings.simplefilter("ignore", pg.FitWarning)  # so few draws are not trusted
    for program, values in [
        (target, (3.0,)),
        (target, {"settings": argparse.Namespace(loc=3.0)}),
        (of_settings, argparse.Namespace(loc=3.0)),
    ]:
        fit = pg.fit(program, values, chains, seed=0)
        assert abs(float(fit.posterior()["t"].mean()) - 3.0) < 5 * 0.5 / 40**0.5  # an effective size above 40
        assert set(fit.to_arviz().groups()) >= {"posterior", "sample_stats"}
        with pytest.raises(IncompatibleError, match="'(target|of_settings)' observes nothing"):
            fit.evidence()
    flow = partial(AutoNormalizingFlow, init_transform_fn=partial(iterated, 1, block_autoregressive))
    trained = pg.fit(pg.Program(target, flow), (3.0,), FAST, seed=0)
    assert "not trained" not in trained.notes  # the check of its Jacobian calls a copy of its networks
    exact = pg.fit(target, (3.0,), SVI(steps=400, lr=0.05), seed=0).marginal_likelihood()
    assert abs(exact.mean) < 0.01  # a normal density; its weights within 1 % at this guide
    for held in (X, [1.0, 2.0], argparse.Namespace(x=X), pg.constant({"loc": [1.0]})):
        with pytest.raises(ValueError, match="never reach the likelihood"):
            pg.fit(lambda held, loc=0.0: pyro.sample("t", dist.Normal(loc, 0.5)), {"held": held}, FAST)
    with pytest.raises(TypeError, match="got None; where the program is a density without data, pass an empty tuple"):
        pg.fit(target, None, FAST)
    assert pg.fit(lambda: pyro.sample("t", dist.Normal(0.0, 1.0)), None, FAST, seed=0).status == "finished"


@pytest.mark.filterwarnings("ignore:marginal_likelihood")  # a guide of few steps is not to be trusted
@pytest.mark.parametrize(
    "value",
    [pg.constant(2.0), pg.constant(torch.tensor(2.0)), pg.by_step(lambda step: 0.5 + step, final=2.0)],
    ids=["number", "tensor", "by step"],
)
def test_what_is_marked_as_without_rows_may_stand_alone(value, tmp_path) -> None:
    """As in a tuple and by name: the same losses at every step, and the same values in questions."""

    def tempered(weight):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("target", -weight * (z - 1.0) ** 2)

    fits = [pg.fit(tempered, data, FAST, seed=0) for data in (value, (value,), {"weight": value})]
    bounds = [fit.marginal_likelihood(draws=200, seed=1).mean for fit in fits]
    for fit, bound in zip(fits[1:], bounds[1:], strict=True):
        assert torch.equal(
            torch.as_tensor(fit.records["program_loss"]), torch.as_tensor(fits[0].records["program_loss"])
        )
        assert bound == bounds[0]
    assert pg.load(fits[0].save(tmp_path / "fit"), program=tempered).data.constants["weight"] == 2.0


def test_numbers_inside_constants_count_as_data() -> None:
    """What bounds the cost of evidence and verdicts looks at all numbers that a call of the model reads."""

    def model(x, settings):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(settings["loc"].mean(), 1.0), obs=x)

    data = as_dataset((X, {"loc": torch.zeros(7, 5), "names": ["a"], "more": [torch.zeros(3)]}), model)
    assert data.elements == 12 + 35 + 3


# ------------------------------------------------------------------- what is called with the data beside model and guide
def with_penalty(x, y=None):
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def test_terms_and_offers_get_tuples_by_name() -> None:
    """A term of y alone must not be given x, the first of the values."""
    program = pg.Program(
        with_penalty,
        terms={"penalty": lambda y: 0.01 * y**2},
        evidence=lambda y, x: dist.Normal(pyro.param("slope") * x, 1.0).log_prob(y),
    )
    algorithm = SVI(steps=3, lr=0.1)
    one, two = (pg.fit(program, data, algorithm, seed=0) for data in ((X, Y), {"x": X, "y": Y}))
    assert one.records["penalty"] == two.records["penalty"]
    assert one.records["penalty"][0] == pytest.approx(float((0.01 * Y**2).mean()), rel=1e-5)
    assert one.evidence((X[:3], Y[:3])).mean == two.evidence({"x": X[:3], "y": Y[:3]}).mean


def test_a_loss_and_a_guide_may_name_their_arguments_otherwise() -> None:
    def loss(model, guide, inputs, outputs):
        q = pyro.poutine.trace(guide).get_trace(inputs, outputs)
        p = pyro.poutine.trace(pyro.poutine.replay(model, trace=q)).get_trace(inputs, outputs)
        return q.log_prob_sum() - p.log_prob_sum()

    fit = pg.fit(pg.Program(line, guide_of_other_names), (X, Y), SVI(loss, steps=600, lr=0.05), seed=0)
    assert abs(float(fit.params["loc"]) - EXACT) < 0.1  # from 0; the guide's sd is 0.1
    assert fit.predict((X[:2],), draws=3)["y"].shape == (3, 2)
    assert pg.check(pg.Program(line, guide_of_other_names), (X, Y)).guide_sites.keys() == {"slope"}


def test_models_with_arguments_by_position_only() -> None:
    def model(x, y, /):
        slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)

    one, two = (pg.fit(m, (X, Y), FAST, seed=0) for m in (model, line))
    assert one.records["program_loss"] == two.records["program_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tuple", "dataset"])
def test_recipes_and_comparisons_take_labelled_rows(form: str) -> None:
    from ppl_gen.models import m2, ppca

    rows = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 2
    data = (rows, labels) if form == "tuple" else TensorDataset(rows, labels)
    by_name = {"x": rows, "y": labels}
    one, two = (pg.fit(m2(classes=2), given, SVI(steps=3), seed=0) for given in (data, by_name))
    assert one.records["program_loss"] == two.records["program_loss"]
    few = data[:9] if form == "dataset" else (rows[:9], labels[:9])
    held = TensorDataset(*few) if form == "dataset" else few
    tables = [
        pg.compare(m2(classes=2), given, {"SVI": SVI(steps=3)}, seeds=[0], test=test).table()
        for given, test in ((data, held), (by_name, {"x": rows[:9], "y": labels[:9]}), (data, None), (by_name, None))
    ]
    values = [float(table["heldout"].iloc[0]) for table in tables]
    assert values[0] == values[1] and values[2] == values[3]
    if form == "dataset":  # whose labels a program of rows alone leaves out
        scored = [pg.compare(ppca(latent=1), d, {"EM": EM(steps=3)}, seeds=[0]).table() for d in (data, rows)]
        assert float(scored[0]["heldout"].iloc[0]) == float(scored[1]["heldout"].iloc[0])
