"""Labelled draws through ArviZ: exact round trips, the same table under both versions, verdicts on chains."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ppl_gen.bridge.versions as bridge
from ppl_gen.bridge import GROUPS, group, group_names, read_tree, to_tree, write_tree
from ppl_gen.diagnostics.verdicts import Verdict, verdict_chains

OLD = bridge._legacy()
ROOT = Path(bridge.__file__).parents[2]


@pytest.fixture(params=["InferenceData", "DataTree"] if OLD else ["DataTree"])
def container(request, monkeypatch):
    """The containers need only xarray, so the newer one is tested under the older ArviZ too."""
    monkeypatch.setattr(bridge, "_legacy", lambda: request.param == "InferenceData")
    return request.param


def full_tree():
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(2, 5, 3, 2)).astype(np.float32)
    loadings[0, 0, 0] = [math.nan, -math.inf]
    groups = {
        "posterior": {
            "loadings": loadings,
            "assignment": rng.integers(0, 4, size=(2, 5, 3)),
            "scale": rng.random((2, 5)),
        },
        "prior": {"scale": rng.random((1, 7))},
        "posterior_predictive": {"x": rng.normal(size=(2, 5, 3, 4))},
        "log_likelihood": {"x": rng.normal(size=(2, 5, 3))},
        "observed_data": {"x": rng.normal(size=(3, 4)), "who": np.array(["ann", "bo", "cé"])},
        "constant_data": {"n": np.int32(4), "empty": np.zeros((0, 2))},
        "sample_stats": {"diverging": rng.random((2, 5)) > 0.5, "loss": rng.normal(size=11)},
    }
    tree = to_tree(
        groups,
        dims={
            "loadings": ["data"],
            "assignment": ["data"],
            "x": ["data", "feature"],
            "who": ["data"],
            "loss": ["step"],
        },
        coords={"data": ["r0", "r1", "r2"], "feature": [10, 20, 30, 40], "step": np.arange(11) * 0.5},
        attrs={
            "seed": 3,
            "lr": 0.1,
            "note": "",
            "none": None,
            "flag": True,
            "big": 2**70,
            "list": [1, "a"],
            "nested": {"algorithm": np.float32(0.5), "set": {1}},
            "label": "données",
        },
        unsampled=["loss"],
    )
    return groups, tree


def test_tree_holds_what_it_was_given(container):
    groups, tree = full_tree()
    assert type(tree).__name__ == container
    assert group_names(tree) == [name for name in GROUPS if name in groups]
    for name, variables in groups.items():
        for variable, value in variables.items():
            stored = group(tree, name)[variable]
            assert stored.dtype == np.asarray(value).dtype
            np.testing.assert_array_equal(stored.values, value)
    assert group(tree, "posterior")["loadings"].dims == ("chain", "draw", "data", "loadings_dim_1")
    assert group(tree, "log_likelihood")["x"].dims == ("chain", "draw", "data"), "its event axes are summed away"
    assert group(tree, "observed_data")["x"].dims == ("data", "feature")
    assert group(tree, "sample_stats")["loss"].dims == ("step",)
    assert list(group(tree, "posterior")["data"].values) == ["r0", "r1", "r2"]
    assert list(group(tree, "posterior")["draw"].values) == [0, 1, 2, 3, 4]
    assert group(tree, "prior_predictive") is None
    assert tree.attrs["nested"] == '{"algorithm": 0.5, "set": [1]}' and tree.attrs["flag"] == "true"


def test_netcdf_round_trip_is_exact_and_leaves_no_file_open(container, tmp_path):
    _, tree = full_tree()
    path = tmp_path / "draws.nc"
    write_tree(tree, path)
    back = read_tree(path)
    write_tree(back, path)  # the file is not held open: it can be written again, and removed
    again = read_tree(path)
    path.unlink()
    for other in (back, again):
        assert type(other) is type(tree)
        assert group_names(other) == group_names(tree)
        assert dict(other.attrs) == dict(tree.attrs)
        assert {key: type(value) for key, value in other.attrs.items()} == {k: type(v) for k, v in tree.attrs.items()}
        for name in group_names(tree):
            before, after = group(tree, name), group(other, name)
            assert before.identical(after), name
            for variable in before.variables:
                # Text of fixed width comes back with a width (or as objects): its values are what is kept.
                if before[variable].dtype.kind != "U":
                    assert before[variable].dtype == after[variable].dtype, (name, variable)
                    assert before[variable].values.tobytes() == after[variable].values.tobytes(), (name, variable)


def test_empty_tree_and_attributes_alone_survive(container, tmp_path):
    write_tree(to_tree({"posterior": {}}, attrs={"why": "an implicit program"}), tmp_path / "draws.nc")
    back = read_tree(tmp_path / "draws.nc")
    assert group_names(back) == [] and back.attrs["why"] == "an implicit program"


def test_arviz_itself_reads_the_file_and_works_on_the_tree(tmp_path):
    rng = np.random.default_rng(1)
    tree = to_tree(
        {
            "posterior": {"mu": rng.normal(size=(4, 200))},
            "log_likelihood": {"x": rng.normal(-1, 0.1, size=(4, 200, 6))},
        },
        dims={"x": ["data"]},
    )
    write_tree(tree, tmp_path / "draws.nc")
    arviz = bridge._arviz()
    with contextlib.closing(arviz.from_netcdf(tmp_path / "draws.nc")) as own:
        np.testing.assert_array_equal(own["posterior"]["mu"].values, group(tree, "posterior")["mu"].values)
    loo = arviz.loo(tree)
    elpd = loo.elpd_loo if OLD else loo.elpd
    # Nearly constant log-likelihoods: leaving a row out changes little, so elpd is the sum of the row means.
    assert abs(elpd - float(group(tree, "log_likelihood")["x"].mean(("chain", "draw")).sum())) < 0.1


def test_names_that_netcdf_and_xarray_refuse_are_replaced(container, tmp_path):
    tree = to_tree(
        {"posterior": {"a/z": np.zeros((1, 3, 2))}, "observed_data": {"data": np.arange(8.0).reshape(2, 4)}},
        dims={"a/z": ["data"], "data": ["data"]},
        coords={"data": ["u", "v"]},
    )
    assert group(tree, "posterior")["a.z"].dims == ("chain", "draw", "data_dim")
    assert group(tree, "observed_data")["data"].dims == ("data_dim", "data_dim_1")
    assert list(group(tree, "posterior")["data_dim"].values) == ["u", "v"]
    write_tree(tree, tmp_path / "draws.nc")
    assert group(read_tree(tmp_path / "draws.nc"), "posterior").identical(group(tree, "posterior"))


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ({"posteriors": {"z": np.zeros((1, 2))}}, {}, r"unknown \['posteriors'\]"),
        ({"posterior": {"z": np.zeros(5)}}, {}, r"posterior\['z'\].*\(chain, draw\).*\(5,\)"),
        ({"posterior": {"chain": np.zeros((1, 2))}}, {}, "'chain'.*rename the sample site"),
        ({"posterior": {"z": np.zeros((1, 2, 3))}}, {"dims": {"z": ["draw"]}}, "'draw'.*rename the plate"),
        ({"posterior": {"z": np.zeros((1, 2, 3))}}, {"dims": {"z": ["a", "b"]}}, r"\['a', 'b'\].*1 axes after"),
        ({"posterior": {"z": np.zeros((1, 2, 3, 3))}}, {"dims": {"z": ["a", "a"]}}, "two axes"),
        (
            {"posterior": {"z": np.zeros((1, 2, 3)), "w": np.zeros((1, 2, 4))}},
            {"dims": {"z": ["data"], "w": ["data"]}},
            "'data' has size 3 in 'z' but 4 in 'w'",
        ),
        ({"posterior": {"z": np.zeros((1, 2)), "w": np.zeros((1, 3))}}, {}, "'draw' has size 2 in 'z' but 3 in 'w'"),
        (
            {"prior": {"z": np.zeros((1, 2, 3))}},
            {"dims": {"z": ["data"]}, "coords": {"data": ["a"]}},
            r"coords\['data'\]: expected 3 labels",
        ),
        ({"prior": {"a/b": np.zeros((1, 2)), "a.b": np.zeros((1, 2))}}, {}, "clash"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(groups, options, message):
    with pytest.raises(ValueError, match=message):
        to_tree(groups, **options)


def test_python_objects_and_missing_files_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"constant_data\['f'\].*Python objects"):
        to_tree({"constant_data": {"f": np.array([len], dtype=object)}})
    with pytest.raises(FileNotFoundError, match="no draws at"):
        read_tree(tmp_path / "nothing.nc")


# ------------------------------------------------------------------------------------------------ the summary table
def test_summary_agrees_with_the_definitions():
    rng = np.random.default_rng(2)
    draws = rng.gamma(2.0, size=(4, 500, 3))
    tree = to_tree(
        {"posterior": {"z": draws, "up": draws[..., 0] > 2}}, dims={"z": ["data"]}, coords={"data": list("abc")}
    )
    for chains in (False, True):
        frame = bridge.az_summary(tree, chains=chains)
        assert list(frame.index) == ["z[a]", "z[b]", "z[c]", "up"]
        for i, row in enumerate(["z[a]", "z[b]", "z[c]"]):
            values = np.sort(draws[..., i].ravel())
            # Unrounded: equal to rounding error of double precision.
            assert frame.loc[row, "mean"] == pytest.approx(values.mean(), rel=1e-12)
            assert frame.loc[row, "sd"] == pytest.approx(values.std(ddof=1), rel=1e-12)
            widths = values[int(0.94 * values.size) :] - values[: values.size - int(0.94 * values.size)]
            narrowest = int(widths.argmin())
            interval = values[narrowest], values[narrowest + int(0.94 * values.size)]
            assert tuple(frame.loc[row, ["hdi_3%", "hdi_97%"]]) == pytest.approx(interval, rel=1e-12)
    assert list(bridge.az_summary(tree, ["up"], chains=True).index) == ["up"]


def test_columns_do_not_depend_on_the_version_and_guides_get_no_r_hat():
    tree = to_tree({"posterior": {"z": np.random.default_rng(3).normal(size=(2, 100))}})
    moments = ["mean", "sd", "hdi_3%", "hdi_97%"]
    assert list(bridge.az_summary(tree, chains=False).columns) == moments
    assert list(bridge.az_summary(tree, chains=True).columns) == [
        *moments, "mcse_mean", "mcse_sd", "ess_bulk", "ess_tail", "r_hat",
    ]  # fmt: skip


def test_diagnostics_of_chains_against_known_values():
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(4, 4000))
    slow = np.empty_like(noise)
    slow[:, 0] = noise[:, 0]
    for t in range(1, 4000):
        slow[:, t] = 0.5 * slow[:, t - 1] + math.sqrt(0.75) * noise[:, t]
    apart = noise + np.array([1.0, 0, 0, 0])[:, None]
    frame = bridge.az_summary(to_tree({"posterior": {"iid": noise, "slow": slow, "apart": apart}}), chains=True)
    # AR(1) with coefficient 1/2: ESS = S (1 - 1/2) / (1 + 1/2). The correlation time summed over a window of W lags has
    # a relative error of sqrt(2 (2 W + 1) / S) (Madras and Sokal 1988): 0.04 for W = 6, so 0.2 is five of them.
    assert frame.loc["slow", "ess_bulk"] == pytest.approx(16000 / 3, rel=0.2)
    assert frame.loc["iid", "ess_bulk"] == pytest.approx(16000, rel=0.2)
    assert frame.loc["iid", "mcse_mean"] == pytest.approx(1 / math.sqrt(16000), rel=0.1)
    # One chain of four moved by d = 1: variance of the chain means d^2/4, R-hat = sqrt(1 + d^2/4) = 1.118; ranks shrink
    # the move slightly. Independent draws: excess of order 1/S.
    assert frame.loc["apart", "r_hat"] == pytest.approx(math.sqrt(1.25), abs=0.02)
    assert frame.loc["iid", "r_hat"] < 1.003


def test_single_and_short_chains_give_nan_without_noise(capfd):
    rng = np.random.default_rng(5)
    one = bridge.az_summary(to_tree({"posterior": {"z": rng.normal(size=(1, 200))}}), chains=True)
    assert math.isnan(one.loc["z", "r_hat"]) and one.loc["z", "ess_bulk"] > 100
    short = bridge.az_summary(to_tree({"posterior": {"z": rng.normal(size=(4, 3))}}), chains=True)
    assert math.isnan(short.loc["z", "r_hat"]) and math.isfinite(short.loc["z", "mean"])
    assert capfd.readouterr() == ("", "")


def test_summary_of_what_is_not_there_is_refused():
    tree = to_tree({"posterior": {"z": np.zeros((1, 50))}})
    with pytest.raises(ValueError, match=r"no \['w'\]; it has \['z'\]"):
        bridge.az_summary(tree, ["w"], chains=False)
    with pytest.raises(ValueError, match=r"no posterior.*\['prior'\]"):
        bridge.az_summary(to_tree({"prior": {"z": np.zeros((1, 50))}}), chains=False)
    with pytest.raises(ValueError, match="at least one variable"):
        bridge.az_summary(tree, [], chains=False)


@pytest.mark.slow
@pytest.mark.skipif(not OLD, reason="only ArviZ 0.23 announces ArviZ 1 on import")
def test_arviz_notice_is_silenced_where_it_is_due(tmp_path):
    """The notice comes once a day and user: a fresh cache folder makes it due. The control shows that it was."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "a"), "PYTHONPATH": str(ROOT)}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    code = (
        "import warnings, ppl_gen.bridge.versions as b; warnings.simplefilter('error', FutureWarning); b._arviz();"
        "warnings.warn('other', FutureWarning)"
    )
    ours = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ArviZ" not in ours.stderr and "FutureWarning: other" in ours.stderr, "only the notice is silenced"
    environment["XDG_CACHE_HOME"] = str(tmp_path / "b")
    control = [sys.executable, "-W", "error::FutureWarning", "-c", "import arviz"]
    assert (
        "undergoing a major refactor" in subprocess.run(control, env=environment, capture_output=True, text=True).stderr
    )


def test_import_of_the_bridge_loads_nothing_heavy():
    code = "import sys; before = set(sys.modules); import ppl_gen.bridge, ppl_gen.weights.psis, " + (
        "ppl_gen.diagnostics.verdicts; print(sorted({'arviz', 'xarray', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ verdicts on chains
def table(**changes):
    good = {"mean": 0.0, "sd": 1.0, "r_hat": 1.002, "ess_bulk": 900.0, "ess_tail": 800.0}
    return pd.DataFrame([good, {**good, **changes}], index=["mu", "tau"])


@pytest.mark.parametrize(
    ("changes", "counts", "start", "words"),
    [
        ({}, {}, "trust", "4 chains agree"),
        ({"sd": 0.0, "r_hat": math.nan, "ess_bulk": math.nan}, {}, "trust", "4 chains agree"),
        ({"r_hat": 1.01}, {}, "trust", "4 chains agree"),
        ({"r_hat": 1.02}, {}, "doubtful", "disagree on tau"),
        ({"r_hat": 1.2}, {}, "do not trust", "disagree on tau"),
        ({"r_hat": math.nan}, {}, "do not trust", "too short to judge tau"),
        ({"ess_bulk": 390.0}, {}, "doubtful", "tau has an effective sample size of 390"),
        ({"ess_tail": 390.0}, {}, "doubtful", "tau has an effective sample size of 390"),
        ({"ess_bulk": 500.0}, {"chains": 8}, "doubtful", "expected at least 800"),
        ({"ess_bulk": 390.0}, {"chains": 2}, "doubtful", "expected at least 400"),
        ({"ess_bulk": 20.0}, {}, "do not trust", "20"),
        ({"ess_tail": math.nan}, {}, "do not trust", "tau has an effective sample size of 0"),
        ({"mean": math.nan}, {}, "do not trust", "tau is not finite"),
        ({}, {"divergences": 1}, "doubtful", "1 of 4000 draws diverged"),
        ({}, {"divergences": 41}, "do not trust", "41 of 4000"),
        ({}, {"saturated": 3}, "doubtful", "largest tree depth"),
        ({}, {"chains": 1}, "doubtful", "single chain"),
        ({"r_hat": math.nan}, {"chains": 1}, "doubtful", "single chain"),
    ],
)
def test_each_rule_on_chains(changes, counts, start, words):
    counts = {"divergences": 0, "chains": 4, **counts}
    said = str(verdict_chains(table(**changes), counts.pop("divergences"), 4000, **counts))
    assert said.startswith(start + ": ") and words in said and said.endswith(".")


def test_the_worst_finding_speaks_first():
    said = str(verdict_chains(table(r_hat=1.3, ess_bulk=200.0), 2, 4000, chains=4, saturated=1))
    assert said.startswith("do not trust: the chains disagree on tau (r_hat 1.30")
    assert "and 2 more. Run a longer warm-up" in said


def test_chains_that_stand_still_are_not_trusted():
    """All at one point (nothing varies), or each at a point of its own (no spread within a chain)."""
    for place in (np.zeros(4), np.arange(4.0)):
        tree = to_tree({"posterior": {"z": np.repeat(place[:, None], 200, axis=1)}})
        said = str(verdict_chains(bridge.az_summary(tree, chains=True), 0, 800, chains=4))
        assert said.startswith("do not trust: "), said


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match=r"no columns \['r_hat'\]"):
        verdict_chains(table().drop(columns="r_hat"), 0, 10, chains=1)
    with pytest.raises(ValueError, match="divergences=11"):
        verdict_chains(table(), 11, 10, chains=1)


def test_verdict_reads_the_real_table():
    """From draws to the sentence: four equal chains are trusted, the same with one chain moved by 1 sd are not."""
    rng = np.random.default_rng(6)
    draws = rng.normal(size=(4, 1000))
    good = str(verdict_chains(bridge.az_summary(to_tree({"posterior": {"z": draws}}), chains=True), 0, 4000, chains=4))
    draws[0] += 1.0
    bad = str(verdict_chains(bridge.az_summary(to_tree({"posterior": {"z": draws}}), chains=True), 0, 4000, chains=4))
    assert good.startswith("trust: ") and bad.startswith("do not trust: ")


def test_version_switch_matches_what_is_installed():
    assert OLD == bridge._arviz().__version__.startswith("0.")
    name = type(to_tree({"prior": {"z": np.zeros((1, 2))}})).__name__
    assert name == ("InferenceData" if OLD else "DataTree")


def test_a_verdict_is_a_value():
    """Grade, reason and advice are fields, and the text is made of them."""
    said = verdict_chains(table(r_hat=1.3), 0, 4000, chains=4)
    assert said.grade == "do not trust" and not said.trusted
    assert str(said) == f"do not trust: {said.reason}. {said.advice}."
    assert said.reason.startswith("the chains disagree on tau (r_hat 1.30") and said.advice.startswith("Run a longer")
    fine = verdict_chains(table(), 0, 4000, chains=4)
    assert fine.trusted and fine.advice == "" and str(fine) == f"trust: {fine.reason}."
    with pytest.raises(ValueError, match="grade: expected one of trust, doubtful, do not trust, got 'good'"):
        Verdict("good", "it is")
