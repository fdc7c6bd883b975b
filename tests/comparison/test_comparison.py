"""compare(): one split, one yardstick, failures as rows, the same numbers in one process and in two."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import ppl_gen as pg
from ppl_gen.comparison.provenance import written
from ppl_gen.comparison.split import SPLIT_SEED, frozen_draws, split_rows
from ppl_gen.data import Rows
from ppl_gen.data.batching import as_dataset
from ppl_gen.evidence.estimates import Evidence
from ppl_gen.inference import SVI
from ppl_gen.report.table import answer, paired, rounded, standings, trust

GOOD, SHORT = SVI(steps=400, lr=0.05), SVI(steps=2)


def normal_mean(x):
    """loc ~ Normal(0, 10), x_i ~ Normal(loc, 1): the predictive density of new rows is known in closed form."""
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def rows(count=50):
    return torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3.0


@dataclass(frozen=True)
class Broken(SVI):
    error: BaseException = RuntimeError("it gives up")

    def run(self, run):
        raise self.error


@pytest.fixture(scope="module")
def result():
    algorithms = {"good": GOOD, "short": SHORT, "wild": SVI(steps=300, lr=1e30), "broken": Broken()}
    return pg.compare(normal_mean, rows(), algorithms, seeds=[3, 5])


# The yardstick.


def test_heldout_is_the_closed_form_predictive_density() -> None:
    x = rows(200)
    train, test = split_rows(x, 0.25)
    comparison = pg.compare(normal_mean, x, {"good": SVI(steps=800, lr=0.03), "short": SHORT}, holdout=0.25)
    precision = 1 / 100 + len(train)
    predictive = dist.Normal(train.sum() / precision, math.sqrt(1 + 1 / precision))
    exact = float(predictive.log_prob(test).mean())
    table = comparison.table().set_index("algorithm")
    # AutoNormal holds the true posterior. A mean off by e posterior standard deviations shifts log p of a row by about
    # e / sqrt(150) / sqrt(50) on average over 50 rows; Adam's jitter at lr 0.03 is below 1, so 0.02 is generous; the
    # Monte Carlo error (5 s.e., a false alarm in 2 million) comes on top.
    tolerance = 0.02 + 5 * table.loc["good", "mc_se"]
    assert abs(table.loc["good", "heldout"] - exact) < tolerance
    assert abs(table.loc["short", "heldout"] - exact) > tolerance, "an untrained fit must miss"


def test_the_value_of_a_row_is_the_evidence_of_its_fit(result) -> None:
    _, test = split_rows(rows(), 0.2)
    evidence = result["good", 5].evidence(test, draws=500)
    row = result.table().query("algorithm == 'good' and seed == 5").iloc[0]
    assert (row["heldout"], row["heldout_se"], row["mc_se"]) == (evidence.mean, evidence.stderr, evidence.mc_stderr)
    assert result["good", 5].data.rows == 40, "held-out rows are not trained on"


def test_difference_is_paired_and_relative_to_the_best_at_the_same_seed(result) -> None:
    table = result.table().set_index(["algorithm", "seed"])
    assert result.best() == "good"
    lines = {(line.label, line.seed): line for line in result.lines}
    for seed in (3, 5):
        good, short = lines["good", seed].evidence, lines["short", seed].evidence
        d = (short.values - good.values).numpy()
        error = math.sqrt(d.var(ddof=1) / len(d) + good.mc_stderr**2 + short.mc_stderr**2)
        assert table.loc[("short", seed), "difference"] == pytest.approx(d.mean(), abs=1e-12)
        assert table.loc[("short", seed), "difference_se"] == pytest.approx(error, rel=1e-12)
        assert tuple(table.loc[("good", seed), ["difference", "difference_se"]]) == (0.0, 0.0)


def _evidence(values, mc=0.0):
    values = torch.as_tensor(values, dtype=torch.float64)
    return Evidence(float(values.mean()), float(values.std() / len(values) ** 0.5), mc, len(values), "", True, values)


def test_paired_error_ignores_what_is_hard_for_both() -> None:
    hard = torch.linspace(-100.0, 0.0, 30, dtype=torch.float64)
    difference, error = paired(_evidence(hard + 0.1), _evidence(hard))
    assert difference == pytest.approx(0.1, abs=1e-12) and error < 1e-12
    assert _evidence(hard).stderr > 5, "unpaired errors would drown it"
    assert paired(_evidence(hard, 0.3), _evidence(hard, 0.4))[1] == pytest.approx(0.5, abs=1e-12)
    assert math.isnan(paired(None, _evidence(hard))[0])


def test_in_sample_values_are_called_so() -> None:
    comparison = pg.compare(normal_mean, rows(), {"good": GOOD, "short": SHORT}, holdout=0)
    table = comparison.table()
    assert comparison.in_sample and "in_sample" in table and "heldout" not in table
    assert table["in_sample"][0] == comparison["good"].evidence(draws=500).mean
    assert comparison["good"].data.rows == 50
    assert "In-sample" in answer(comparison) and "in-sample" in comparison.facts["rows"]


def test_test_rows_of_the_users_own_leave_the_data_whole() -> None:
    test = torch.tensor([2.5, 3.5], dtype=torch.float64)
    comparison = pg.compare(normal_mean, rows(), {"good": GOOD}, test=test)
    assert comparison["good"].data.rows == 50 and comparison.lines[0].evidence.rows == 2
    assert "test=test" in comparison.facts["call"] and not comparison.in_sample


# Rows.


def test_table_is_in_the_order_given(result) -> None:
    table = result.table()
    assert list(zip(table["algorithm"], table["seed"], strict=True)) == [
        (label, seed) for label in ("good", "short", "wild", "broken") for seed in (3, 5)
    ]
    expected = "algorithm seed status heldout heldout_se mc_se difference difference_se shift_sd sd_ratio pareto_k verdict seconds steps"
    assert list(table.columns) == [*expected.split(), "gradient_evaluations", "message"]
    assert table["steps"][0] == 400 and table["seconds"].gt(0).all()
    assert table["verdict"][0].split(":")[0] in ("trust", "doubtful", "do not trust")


def test_failures_are_rows_with_their_message(result) -> None:
    table = result.table().set_index(["algorithm", "seed"])
    assert table.loc[("broken", 3), "status"] == "failed"
    assert table.loc[("broken", 3), "message"] == "RuntimeError: it gives up"
    assert table.loc[("wild", 3), "status"] == "diverged" and "not finite" in result.messages["wild", 3]
    assert table["message"].str.len().max() <= 60 and not table["message"].str.contains("\n").any()
    assert math.isnan(table.loc[("wild", 3), "heldout"])
    assert result["wild", 3].status == "diverged", "the last finite state is kept"
    with pytest.raises(RuntimeError, match="'broken' left no fit with seed 3 .*it gives up"):
        result["broken"]
    assert trust(result)["no fit"] == ["broken"]


def test_an_algorithm_that_does_not_fit_is_a_row() -> None:
    class Needy(SVI):
        needs = (("exact evidence",),)

    comparison = pg.compare(normal_mean, rows(), {"needy": Needy(), "good": GOOD})
    row = comparison.table().iloc[0]
    assert row["status"] == "incompatible" and "exact evidence" in comparison.messages["needy", 0]
    assert comparison.best() == "good"


def test_a_class_of_guides_with_options_is_compared() -> None:
    program = pg.Program(normal_mean, guide=partial(AutoNormal, init_scale=1.0))
    result = pg.compare(program, rows(), {"wide": SVI(steps=1, lr=1e-6)})
    scale = result["wide"].params["AutoNormal.scales.loc"]
    assert float(scale) == pytest.approx(1.0, abs=1e-3) and math.isfinite(result.table()["heldout"][0])


def test_a_program_without_density_has_no_value_but_a_row() -> None:
    scale = nn.Linear(1, 1)

    def implicit(x):
        pyro.module("scale", scale)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(scale(z), event_dim=1), obs=x)

    from ppl_gen.inference import Adversarial

    critic = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    x = rows().float()[:, None]
    comparison = pg.compare(implicit, x, {"gan": SVI(Adversarial(critic=critic), steps=3)})
    row = comparison.table().iloc[0]
    assert row["status"] == "finished" and math.isnan(row["heldout"]) and "density" in comparison.messages["gan", 0]
    assert comparison["gan"].data.rows == 40


def test_keys(result) -> None:
    assert result["good"].seed == 3 and result["good", 5].seed == 5
    with pytest.raises(KeyError, match="'good', 'short', 'wild', 'broken'; seeds: 3, 5"):
        result["other"]
    with pytest.raises(KeyError, match="seeds: 3, 5"):
        result["good", 4]


def test_ctrl_c_keeps_what_is_done_and_ends_the_rest() -> None:
    algorithms = {"good": GOOD, "stop": Broken(error=KeyboardInterrupt()), "later": GOOD}
    table = pg.compare(normal_mean, rows(), algorithms).table()
    assert table["status"].tolist() == ["finished", "interrupted", "interrupted"]
    assert math.isfinite(table["heldout"][0]) and table["message"][2].startswith("not done")


# One process and two.


@pytest.mark.slow
@pytest.mark.timeout(600)  # two interpreters start
def test_two_processes_give_the_same_bits() -> None:
    net = nn.Linear(1, 1)

    def model(t, y=None):  # networks of the caller's own travel with their weights
        pyro.module("net", net)
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
        with pyro.plate("data", len(t)):
            pyro.sample("y", dist.Normal(net(t).squeeze(-1), noise), obs=y)

    t = torch.linspace(-2, 2, 40)[:, None]
    data = {"t": t, "y": 2 * t.squeeze(-1) + 0.1 * torch.randn(40, generator=torch.Generator().manual_seed(0))}
    algorithms = {"a": SVI(steps=30, lr=0.05), "b": SVI(steps=30, batch_size=8, lr=0.05), "broken": Broken()}
    threads = torch.get_num_threads()
    one = pg.compare(model, data, algorithms, seeds=[0, 1])
    two = pg.compare(model, data, algorithms, seeds=[0, 1], n_jobs=2)
    assert torch.get_num_threads() == threads
    pandas.testing.assert_frame_equal(
        one.table().drop(columns="seconds"), two.table().drop(columns="seconds"), rtol=0, atol=0
    )
    for label in ("a", "b"):
        for name, value in one[label, 1].params.items():
            assert torch.equal(value, two[label, 1].params[name])
    again = {k: v[:3] for k, v in data.items()}
    assert torch.equal(one["a"].predict(again, draws=5)["y"], two["a"].predict(again, draws=5)["y"])
    assert not torch.equal(one["a", 0].params["net$$$weight"], one["a", 1].params["net$$$weight"])


def test_pg_fit_gives_the_same_bits(result) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = pg.fit(normal_mean, split_rows(rows(), 0.2)[0], GOOD, seed=5)
    finally:
        torch.set_num_threads(before)
    for name, value in alone.params.items():
        assert torch.equal(value, result["good", 5].params[name])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_with_other_weights_is_found_out(tmp_path, monkeypatch) -> None:
    """A module is imported again in the other process; weights that it draws at random differ there."""
    (tmp_path / "nets_of_mine.py").write_text(
        "import pyro, pyro.distributions as dist, torch\n"
        "net = torch.nn.Linear(1, 1)\n"
        "def model(x):\n"
        "    pyro.module('net', net)\n"
        "    with pyro.plate('data', len(x)):\n"
        "        pyro.sample('x', dist.Normal(net(torch.ones(1)), 1.0), obs=x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module("nets_of_mine").model
    try:
        said = pg.compare(model, rows(), {"a": SHORT, "b": SHORT}, n_jobs=2).messages.values()
    finally:
        sys.modules.pop("nets_of_mine")
    assert all("draws other values in another process" in text for text in said), said


def test_a_comparison_leaves_everything_as_it_was() -> None:
    net = nn.Linear(1, 1)
    kept = {name: value.clone() for name, value in net.state_dict().items()}

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(torch.ones(1)), 1.0), obs=x)

    x = rows()
    before = (
        torch.get_rng_state(),
        np.random.get_state()[1].tolist(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
    )
    comparison = pg.compare(model, x, {"a": SVI(steps=20, lr=0.1), "broken": Broken()})
    comparison.plot()
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), torch.get_num_threads(), torch.get_default_dtype()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert torch.equal(x, rows()) and all(torch.equal(net.state_dict()[k], v) for k, v in kept.items())
    assert not torch.equal(comparison["a"].params["net$$$bias"].to(kept["bias"]), kept["bias"]), "something was learned"


def test_what_cannot_travel_is_refused_before_anything_runs() -> None:
    lock = __import__("threading").Lock()

    def model(x):
        with lock:
            normal_mean(x)

    with pytest.raises(TypeError, match="n_jobs: the program or the data cannot be sent.*use n_jobs=1"):
        pg.compare(model, rows(), {"a": SHORT}, n_jobs=2)


# The split.


@pytest.mark.parametrize("kind", ["tensor", "array", "list", "mapping", "rows", "dataset", "loader"])
def test_split_keeps_every_row_once_and_in_order(kind) -> None:
    x = torch.arange(20.0)
    data = {
        "tensor": x,
        "array": x.numpy(),
        "list": x.tolist(),
        "mapping": {"x": x, "labels": [str(i) for i in range(20)], "k": pg.constant(torch.ones(3)), "one": 1.0},
        "rows": Rows({"x": x}),
        "dataset": as_dataset(x, normal_mean),
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=7),
    }[kind]
    parts = split_rows(data, 0.3)
    values = [p["x"] if kind in ("mapping", "rows") else p.entries["x"] if kind == "dataset" else p for p in parts]
    train, test = (np.asarray(v) for v in values)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(SPLIT_SEED)).numpy()
    assert test.tolist() == np.sort(order[:6]).tolist() and train.tolist() == np.sort(order[6:]).tolist()
    if kind == "mapping":
        assert parts[1]["labels"].tolist() == [str(int(v)) for v in test], "entries stay together"
        assert parts[1]["k"] is data["k"] and parts[1]["one"] == 1.0, "constants stay whole"


def test_entries_the_model_does_not_name_need_no_rows() -> None:
    comparison = pg.compare(normal_mean, {"x": rows(), "notes": ["a", "b"]}, {"short": SHORT})
    assert comparison["short"].data.rows == 40


def test_fresh_draws_become_one_draw_for_the_yardstick() -> None:
    def coin(x):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    grey = Rows({"x": torch.full((40,), 0.5)}, on_batch=lambda batch: {"x": torch.bernoulli(batch["x"])})
    comparison = pg.compare(coin, grey, {"a": SVI(steps=5), "b": SVI(steps=6)}, seeds=[0])
    held = frozen_draws(split_rows(grey, 0.2)[1])
    assert set(held["x"].tolist()) == {0.0, 1.0}
    for line in comparison.lines:
        # Rows of equal bits have equal values: both fits saw the bits of ``held``.
        values = [{round(v, 9) for v in line.evidence.values[held["x"] == bit].tolist()} for bit in (0.0, 1.0)]
        assert [len(v) for v in values] == [1, 1]


# Mistakes.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"algorithms": {}}, ValueError, "algorithms: expected at least one"),
        ({"algorithms": [SHORT]}, TypeError, "algorithms: expected a mapping"),
        ({"algorithms": {"svi": SVI}}, TypeError, r"algorithms\['svi'\].*the class SVI; write SVI\(\)"),
        ({"algorithms": {"em": "EM"}}, TypeError, r"algorithms\['em'\]: expected an algorithm, got 'EM'"),
        ({"algorithms": {1: SHORT}}, TypeError, "labels that are text, got 1"),
        ({"holdout": 1.0}, ValueError, r"holdout: expected a share of the rows in \[0, 1\), got 1.0"),
        ({"holdout": -0.1}, ValueError, "holdout: .* got -0.1"),
        ({"holdout": True}, ValueError, "holdout: .* got True"),
        ({"holdout": 0.01}, ValueError, "0.01 of 50 rows is 0 held out and 50 to train on"),
        ({"seeds": []}, ValueError, "seeds: expected at least one"),
        ({"seeds": 3}, TypeError, r"seeds: .*range\(3\), got 3"),
        ({"seeds": [1, 1]}, ValueError, "seeds: expected each of them once"),
        ({"seeds": [-1]}, ValueError, "seeds: .* none below 0"),
        ({"n_jobs": 0}, ValueError, "n_jobs"),
        ({"draws": 0}, ValueError, "draws: expected a whole number of at least 1, got 0"),
        ({"data": {"y": rows()}}, ValueError, "the model needs the argument 'x', which the data does not hold"),
        ({"data": {"x": rows(), "y": rows(3)}, "program": lambda x, y: None}, ValueError, "x: 50, y: 3"),
        (
            {"test": torch.zeros(4, 2)},
            ValueError,
            r"test: expected 'x' of shape \('rows',\) as in training, got \(4, 2\)",
        ),
    ],
)
def test_mistakes_are_named_before_anything_runs(change, error, message) -> None:
    arguments = {
        "program": normal_mean,
        "data": rows(),
        "algorithms": {"never": Broken(error=AssertionError())},
        **change,
    }
    with pytest.raises(error, match=message):
        pg.compare(arguments.pop("program"), arguments.pop("data"), arguments.pop("algorithms"), **arguments)


def test_rows_without_a_plate_are_not_held_out() -> None:
    def series(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        pyro.sample("x", dist.Normal(loc.expand(len(x)), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="holdout: the program 'series' has no data plate"):
        pg.compare(series, rows(), {"good": GOOD})
    assert pg.compare(series, rows(), {"good": GOOD}, holdout=0).in_sample


# Words.


def test_the_answer_says_who_is_worse_and_by_how_much(result) -> None:
    text = answer(result)
    assert text.startswith("good predicts best (\N{MINUS SIGN}") and "short is worse by" in text
    by_label = {s.label: s for s in standings(result)}
    assert list(by_label) == ["good", "short"] and not by_label["short"].equal
    assert rounded(-by_label["short"].difference, by_label["short"].difference_se) in text


def test_equals_are_called_equal() -> None:
    comparison = pg.compare(normal_mean, rows(), {"a": GOOD, "b": SVI(steps=500, lr=0.05)})
    assert answer(comparison).startswith("Both algorithms predict equally well as far as 10 held-out rows can tell")


def test_repr_and_html_show_the_answer(result) -> None:
    assert answer(result) in " ".join(repr(result).split()) and "broken" in repr(result)
    assert "<table" in result._repr_html_() and "good predicts best" in result._repr_html_()


def test_the_call_is_written_as_one_would_write_it(result) -> None:
    call = result.facts["call"]
    assert "'good': SVI(steps=400, lr=0.05)," in call and "seeds=(3, 5)" in call and "n_jobs" not in call
    assert written(SVI()) == "SVI()"


def test_save_writes_table_values_and_fits(result, tmp_path) -> None:
    small = pg.Comparison(
        tuple(line for line in result.lines if line.seed == 3 and line.label in ("good", "broken")),
        result.program,
        result.in_sample,
        result.facts,
    )
    folder = small.save(tmp_path / "kept")
    table = pandas.read_csv(folder / "table.csv")
    assert table["algorithm"].tolist() == ["good", "broken"]
    values = pandas.read_csv(folder / "rows.csv", index_col="row")
    assert values["good, seed 3"].mean() == pytest.approx(table["heldout"][0], rel=1e-12)
    content = json.loads((folder / "comparison.json").read_text())
    assert content["table"][1]["heldout"] is None and content["fits"][1]["why"] == "RuntimeError: it gives up"
    again = pg.load(folder / content["fits"][0]["folder"], program=normal_mean)
    assert torch.equal(again.params["AutoNormal.locs.loc"], small["good"].params["AutoNormal.locs.loc"])
    assert small.save(folder) == folder, "a saved comparison may be replaced"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept"], "nothing half-made is left behind"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="exists and is not a saved comparison"):
        small.save(tmp_path / "other")
