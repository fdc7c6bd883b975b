"""What programs remember in Python: no question changes the next, and a fit says that its program remembers."""

import collections
import random
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.workspace.closures import Remembered

X = torch.tensor([1.2, 0.3, -0.6, 0.9, 1.5, -0.2])
COUNTS = {"calls": 0}


def body(x, shift):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m + 0.1 * shift, 1.0), obs=x)


def in_list():
    seen = []

    def model(x):
        seen.append(len(x))
        body(x, len(seen))

    return model, "seen"


def in_variable():
    calls = 0

    def model(x):
        nonlocal calls
        calls += 1
        body(x, calls)

    return model, "calls"


def in_nested_cache():
    cache = {"inner": collections.Counter(), "last": collections.deque(maxlen=3)}

    def model(x):
        cache["inner"]["calls"] += 1
        cache["last"].append(x)
        body(x, cache["inner"]["calls"])

    return model, "cache"


def in_object():
    class Model:
        def __init__(self):
            self.calls = 0

        def __call__(self, x):
            self.calls += 1
            body(x, self.calls)

    return Model(), "Model"


def in_method():
    class Holder:
        calls = 0

        def model(self, x):
            self.calls += 1
            body(x, self.calls)

    return Holder().model, "self"


def in_namespace():
    state = types.SimpleNamespace(calls=0)

    def model(x):
        state.calls += 1
        body(x, state.calls)

    return model, "state"


def in_default():
    def model(x, seen=[]):  # noqa: B006
        seen.append(1)
        body(x, len(seen))

    return model, "seen"


def in_global():
    def model(x):
        COUNTS["calls"] += 1
        body(x, COUNTS["calls"])

    return model, "COUNTS"


def in_function():
    def model(x):
        model.calls = getattr(model, "calls", 0) + 1
        body(x, model.calls)

    return model, "model"


def in_tensor():
    calls = torch.zeros(())

    def model(x):
        calls.add_(1)
        body(x, calls.clone())

    return model, "calls"


def in_array():
    calls = np.zeros(1)

    def model(x):
        calls[0] += 1
        body(x, float(calls[0]))

    return model, "calls"


def in_helper():
    calls = [0]

    def count():
        calls[0] += 1
        return calls[0]

    def model(x):
        body(x, count())

    return model, "calls"


def in_generators():
    one, two, three = torch.Generator().manual_seed(0), np.random.default_rng(0), random.Random(0)

    def model(x):
        body(x, torch.randn((), generator=one) + float(two.normal()) + three.random())

    return model, "one"


KINDS = {
    make.__name__: make
    for make in (
        in_list,
        in_variable,
        in_nested_cache,
        in_object,
        in_method,
        in_namespace,
        in_default,
        in_global,
        in_function,
        in_tensor,
        in_array,
        in_helper,
        in_generators,
    )
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_question_changes_the_next(kind, tmp_path):
    model, name = KINDS[kind]()
    fit = pg.fit(model, X, SVI(steps=3), seed=0)
    assert name in fit.notes["remembers"]
    questions = {
        "evidence": lambda: fit.evidence(draws=3).values.tolist(),
        "evidence of rows": lambda: fit.evidence(X[:2], draws=3).values.tolist(),
        "posterior": lambda: fit.posterior(draws=2)["m"].tolist(),
        "predict": lambda: fit.predict(draws=2)["x"].tolist(),
        "export": lambda: fit.to_arviz(draws=3)["log_likelihood"]["x"].values.tolist(),
        "check": lambda: str(pg.check(model, X)),
        "prior": lambda: pg.prior_predictive(model, X, draws=2)["x"].tolist(),
    }
    first = {question: ask() for question, ask in questions.items()}
    fit.save(tmp_path / "fit")
    with pytest.warns(UserWarning) if kind in () else _quiet():
        pg.load(tmp_path / "fit", program=model)
    for question, ask in reversed(questions.items()):
        assert ask() == first[question], question


def _quiet():
    import contextlib
    import warnings

    stack = contextlib.ExitStack()
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")  # that a constant of the program is not what was saved
    return stack


def test_a_program_that_remembers_nothing_has_no_note():
    table, net = {"scale": torch.ones(3), "names": ["a"]}, nn.Linear(1, 1)

    def model(x):
        pyro.module("net", net)
        body(x, net(torch.ones(1)).sum() * table["scale"][0])

    assert "remembers" not in pg.fit(model, X, SVI(steps=2), seed=0).notes


def test_networks_made_at_the_first_call_are_kept():
    made = {}

    def model(x):
        if "net" not in made:
            made["net"] = nn.Linear(1, 1)
        pyro.module("net", made["net"])
        body(x, made["net"](torch.ones(1)).sum())

    pg.check(model, X)
    assert "net" in made
    fit = pg.fit(model, X, SVI(steps=3), seed=0)
    assert fit.evidence(draws=2).values.tolist() == fit.evidence(draws=2).values.tolist()


def test_what_is_put_back_is_the_same_object():
    def make():
        kept = {"a": [1], "s": {1}, "d": collections.defaultdict(list)}

        def run():
            kept["a"].append(2)
            kept["s"].add(3)
            kept["d"]["x"].append(1)
            kept["new"] = 1

        return run, kept

    run, kept = make()
    lists = kept["a"]
    before = Remembered([run])
    assert before.changed() == []
    run()
    assert before.changed() == ["kept"]
    before.put_back()
    assert kept == {"a": [1], "s": {1}, "d": {}} and kept["a"] is lists and before.changed() == []


def test_a_variable_of_many_objects_is_looked_at_in_part_and_hides_no_other():
    table, seen = [[[i, j] for j in range(200)] for i in range(100)], []

    def count():
        table[0].append(len(table))
        table[0][0][0] += 1
        seen.append(1)
        return len(seen)

    before = Remembered([count])
    assert len(before._known) < 11_000  # of 20_101
    count()
    assert before.changed() == ["seen", "table"]
    before.put_back()
    assert table[0][0][0] == 0 and len(table[0]) == 200 and not seen
