"""A mask changes the answers as it should, or is refused by name: over the whole catalogue, and in programs by hand."""

import functools
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import ppl_gen as pg
from ppl_gen.inference import (
    EM,
    NUTS,
    SVI,
    Adversarial,
    ConditionalAdversarial,
    ContrastiveDivergence,
    WakeSleep,
    Walkback,
)
from ppl_gen.models import ppca
from ppl_gen.models.catalogue import CATALOGUE

READ = {"ppca", "factor_analysis"}
LENGTHS = {"hidden_markov", "char_rnn"}
COMPLETED = {"denoising_diffusion", "binomial_diffusion"}  # `fit.predict` completes their rows by the entry 'mask'
FLAGS = {"bool": torch.bool, "float": torch.float32, "int": torch.long}
ASKED = ("evidence", "posterior", "predict")


def entries(name):
    data = CATALOGUE[name].data()
    return dict(data) if isinstance(data, dict) else {"x": data}


@functools.cache
def fitted(name):
    objectives = (Adversarial(), ContrastiveDivergence(), WakeSleep(), Walkback())
    for algorithm in (EM(steps=2), SVI(steps=1), *(SVI(objective, steps=1) for objective in objectives)):
        try:
            return pg.fit(CATALOGUE[name].recipe(), CATALOGUE[name].data(), algorithm, seed=0), algorithm
        except pg.IncompatibleError:
            continue
    raise AssertionError(f"no algorithm here trains {name!r}: add one")


def hidden(x, seed=0):
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.3


def alike(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    return torch.equal(one, other)


def answer(fit, question, data):
    found = getattr(fit, question)(data, draws=2)
    return found.values if question == "evidence" else found


# ------------------------------------------------------------------------------------------------ the catalogue
@pytest.mark.parametrize("program", sorted(set(CATALOGUE) - READ))
def test_a_mask_that_a_program_does_not_read_is_refused_by_name(program):
    fit, algorithm = fitted(program)
    data = entries(program)
    for name, dtype in (
        ("mask", "bool"),
        ("x_mask", "float"),
        ("mask", "int"),
        ("seen", "bool"),
        ("is_missing", "int"),
    ):
        for flags in (hidden(data["x"]), hidden(data["x"])[..., 0] if data["x"].dim() > 1 else hidden(data["x"])):
            masked = {**data, name: flags.to(FLAGS[dtype])}
            acts = [functools.partial(pg.fit, CATALOGUE[program].recipe(), masked, algorithm)]
            asked = [q for q in ASKED if q != "predict" or name != "mask" or program not in COMPLETED]
            acts += [functools.partial(getattr(fit, question), masked) for question in asked]
            for act in acts:
                with pytest.raises(pg.IncompatibleError) as caught:
                    act()
                text = str(caught.value)
                assert (name in text and "does not read it" in text) or act.func == fit.posterior and program in text


@pytest.mark.parametrize("program", sorted(CATALOGUE))
def test_no_question_passes_over_a_mask_without_a_word(program):
    """What is hidden is nonsense in one of two answers: they are equal where it is honoured, or both are refused."""
    fit, _ = fitted(program)
    data, seen = entries(program), ~hidden(entries(program)["x"])
    other = data["x"].flip(0)
    pair = [{**data, "x": torch.where(seen, data["x"], x), "mask": seen} for x in (data["x"], other)]
    honoured = {"ppca": ASKED, "factor_analysis": ASKED, **dict.fromkeys(COMPLETED, ("predict",))}.get(program, ())
    for question in ASKED:
        if question in honoured:
            first, second = (answer(fit, question, data) for data in pair)
            assert alike(first, second) and not alike(first, answer(fit, question, entries(program))), question
            continue
        for masked in pair:
            with pytest.raises(pg.IncompatibleError):
                answer(fit, question, masked)
    if program not in READ:
        with pytest.raises(ValueError, match="no site or input named .'mask'|samples"):
            fit.sample(len(data["x"]), given={"mask": seen})
        with pytest.raises(pg.IncompatibleError, match="'mask' looks like a mask|does not fit|improper"):
            pg.prior_predictive(CATALOGUE[program].recipe(), pair[0], draws=2)


def test_a_mask_in_the_shape_of_the_rows_needs_no_name_and_other_flags_are_let_be():
    fit, _ = fitted("vae")
    x = entries("vae")["x"]
    with pytest.raises(pg.IncompatibleError, match="'b' looks like a mask, and the program 'vae' does not read it"):
        fit.evidence({"x": x, "b": hidden(x)})
    assert fit.evidence({"x": x, "female": hidden(x[:, 0])}, particles=2).rows == len(x)


@pytest.mark.parametrize(
    "name", ["known", "unknown", "isObserved", "notMissing", "given", "visible_x", "hidden", "obs"]
)
def test_flags_by_other_names_are_masks_too(name):
    """Of one flag a row the name is all there is; flags in the shape of the rows that nothing reads need none."""
    fit, _ = fitted("rbm")
    x = entries("rbm")["x"]
    for key, flags in ((name, hidden(x[:, 0])), (name, hidden(x[:, 0]).long()), ("b", hidden(x).to(x))):
        masked = {"x": x, key: flags}
        for act in (
            lambda d: pg.fit(CATALOGUE["rbm"].recipe(), d, SVI(ContrastiveDivergence(), steps=1)),
            fit.evidence,
        ):
            with pytest.raises(pg.IncompatibleError, match=f"'{key}' looks like a mask.*does not read it"):
                act(masked)
    assert fit.evidence({"x": x, "b": hidden(x).to(x) + 1.0}).rows == len(x)
    assert fit.evidence({"x": x, "label": hidden(x[:, 0]).long()}).rows == len(x)


def test_an_argument_of_zeros_and_ones_is_no_mask():
    def shifted(x, b):
        w = pyro.param("w", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w * b, 1.0).to_event(1), obs=x)

    fit = pg.fit(shifted, {"x": X, "b": OK.float()}, SVI(steps=2), seed=0)
    assert fit.status == "finished" and "left out" not in fit.notes


@pytest.mark.parametrize("program", sorted(READ | LENGTHS))
def test_what_a_mask_hides_does_not_matter_and_that_it_hides_does(program):
    data = entries(program)
    x = data["x"]
    if program in READ:
        out = hidden(x)
        more = {"mask": ~out}
    else:
        lengths = x.shape[1] - torch.arange(len(x)) % 3
        out, more = torch.arange(x.shape[1]) >= lengths[:, None], {"lengths": lengths}
    one, other = (torch.where(out, torch.as_tensor(value, dtype=x.dtype), x) for value in (2, 0))
    algorithm = fitted(program)[1]
    fits = [pg.fit(CATALOGUE[program].recipe(), {"x": values, **more}, algorithm, seed=0) for values in (one, other)]
    assert alike(fits[0].params, fits[1].params) and alike(fits[0].point or {}, fits[1].point or {})
    few = {name: value[:7] for name, value in more.items()}
    for question in ASKED if program != "char_rnn" else ("evidence",):
        found = [answer(fits[0], question, {"x": values[:7], **few}) for values in (one, other)]
        assert alike(*found), question
        assert not alike(found[0], answer(fits[0], question, {"x": one[:7]})), question


def test_a_mask_of_numbers_in_new_rows_is_refused_as_it_is_in_training():
    x = entries("ppca")["x"]
    for question in ASKED:
        with pytest.raises(ValueError, match="'mask': expected booleans, True where x is observed, got torch.float"):
            answer(fitted("ppca")[0], question, {"x": x, "mask": (~hidden(x)).float()})


@pytest.mark.parametrize("program", [name for name in CATALOGUE if entries(name)["x"].is_floating_point()])
def test_missing_values_written_as_nan_are_refused_by_name(program):
    fit, algorithm = fitted(program)
    data = entries(program)
    x = data["x"].clone()
    x.view(-1)[3] = torch.nan
    for act in (
        lambda: pg.fit(CATALOGUE[program].recipe(), {**data, "x": x}, algorithm),
        *(functools.partial(getattr(fit, question), {**data, "x": x}) for question in ("evidence", "predict")),
    ):
        with pytest.raises(ValueError, match="'x': 1 value.* NaN or infinite.* mask"):
            act()


# ------------------------------------------------------------------------------------------------ programs by hand
X = torch.tensor([[1.2, 0.4], [0.3, -0.8], [-0.6, 1.1], [0.9, 0.2], [1.5, -1.0], [-0.2, 0.1]])
OK = torch.tensor([[True, False], [True, True], [False, False], [True, True], [False, True], [True, True]])


def idle(x, mask=None):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0).expand([2]).to_event(1), obs=x)


def in_event(x, mask):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0).expand([len(x), 2]).mask(mask).to_event(1), obs=x)


def test_a_mask_that_a_program_takes_and_does_nothing_with_is_refused():
    fit = pg.fit(idle, {"x": X}, SVI(steps=1), seed=0)
    acts = [lambda: pg.fit(idle, {"x": X, "mask": OK}, SVI(steps=1))]
    acts += [functools.partial(getattr(fit, question), {"x": X, "mask": OK}) for question in ASKED]
    for act in acts:
        with pytest.raises(pg.IncompatibleError, match="'mask'.*'idle' accepts it but does not use it"):
            act()
    assert fit.evidence({"x": X}).rows == len(X)


@pytest.mark.parametrize("objective", [Adversarial(), ConditionalAdversarial()], ids=lambda o: o.label)
def test_a_mask_over_point_masses_is_read(objective):
    """Their log density is zero with the mask and without: it is the mask itself that differs."""

    def program(x, y, seen):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z, e = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("z", "e"))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Delta(scale * z), obs=x)
            pyro.sample("y", dist.Delta(scale * e), obs=y)

    def unread(x, y, seen):
        program(x, y, torch.tensor(True))

    data = {"x": torch.arange(6.0), "y": torch.arange(6.0), "seen": torch.arange(6) % 2 == 0}
    assert pg.fit(program, data, SVI(objective, steps=1), seed=0).status == "finished"
    with pytest.raises(pg.IncompatibleError, match="'seen'.*'unread' accepts it but does not use it"):
        pg.fit(unread, data, SVI(objective, steps=1), seed=0)


def test_entries_inside_events_may_be_masked():
    def fixed(x, mask):
        m = pyro.param("m", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0).expand([len(x), 2]).mask(mask).to_event(1), obs=x)

    fit = pg.fit(fixed, {"x": X, "mask": OK}, SVI(steps=1, lr=1e-9), seed=0)
    right = torch.where(OK, dist.Normal(0.5, 1.0).log_prob(X), 0.0).sum(-1)
    torch.testing.assert_close(fit.evidence().values.float(), right, atol=1e-5, rtol=0)
    garbage = torch.where(OK, X, 1e3)
    assert torch.equal(fit.evidence({"x": garbage, "mask": OK}).values, fit.evidence().values)


def test_masked_entries_are_missing_in_exports_and_rows_keep_their_numbers():
    def rows(x, ok):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=ok):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def halves(ok, y=None):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 2, dim=-2):
            s = pyro.sample("s", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(ok), dim=-1):
                pyro.sample("y", dist.Normal(m + s, 1.0), obs=y, obs_mask=ok)

    ok = OK[:, 0]
    seen = [0, 1, 3, 5]
    for model, name, data in (
        (rows, "x", {"x": X[:, 0], "ok": ok}),
        (in_event, "x", {"x": X, "mask": OK}),
        (halves, "y", {"ok": ok, "y": pg.constant(X.T.contiguous())}),
    ):
        tree = pg.fit(model, data, SVI(steps=1), seed=0).to_arviz(draws=3)
        found = tree["log_likelihood"][name]
        assert found.dims == ("chain", "draw", "data")
        assert found["data"].values.tolist() == ([0, 1, 3, 4, 5] if model is in_event else seen)
        mask = OK if model is in_event else ok
        assert torch.equal(
            torch.as_tensor(tree["observed_data"][name].values).isnan(), (~mask).expand(_shape(tree, name))
        )
    tree = pg.fit(
        ppca(4, 2), {"x": entries("ppca")["x"], "mask": ~hidden(entries("ppca")["x"])}, EM(steps=1)
    ).to_arviz()
    assert torch.equal(torch.as_tensor(tree["observed_data"]["x"].values).isnan(), hidden(entries("ppca")["x"]))


def _shape(tree, name):
    return tree["observed_data"][name].shape


def test_samples_hold_a_partly_observed_site_once():
    def model(ok, y=None):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(ok)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y, obs_mask=ok)

    data = {"ok": OK[:, 0], "y": X[:, 0]}
    fit = pg.fit(model, data, SVI(steps=1), seed=0)
    assert set(fit.sample(4)) == {"m", "y"} and fit.sample(4)["y"].shape == (4,)
    assert bool((fit.sample(4, given={"y": 3.0})["y"] == 3.0).all())
    assert set(pg.prior_predictive(model, data, draws=2)) == {"m", "y"}


@pytest.mark.parametrize("algorithm", [SVI(steps=1), NUTS(draws=2, warmup=2, chains=1), EM(steps=1)])
def test_latent_sites_under_a_mask_are_refused_unless_a_guide_shares_it(algorithm):
    def model(x, ok):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=ok):
                z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(s + 2 * z, 1.0), obs=x)

    def guide(x, ok):
        pyro.sample("s", dist.Normal(pyro.param("l", torch.tensor(0.0)), 0.5))
        with pyro.plate("data", len(x)), poutine.mask(mask=ok):
            pyro.sample("z", dist.Bernoulli(torch.sigmoid(x)))

    data = {"x": X[:, 0], "ok": OK[:, 0]}
    with pytest.raises(pg.IncompatibleError, match="latent site.s. z of 'model' stand under a mask"):
        pg.fit(model, data, algorithm)
    assert pg.fit(pg.Program(model, guide), data, SVI(steps=1)).info.sites["z"].masked


def test_masks_are_known_however_the_data_are_passed():
    x, flags = X, OK
    data = torch.utils.data.TensorDataset(x, flags)
    with pytest.raises(pg.IncompatibleError, match="'column 1 of the dataset' looks like a mask"):
        pg.fit(lambda x: idle(x), data, SVI(steps=1))
    with pytest.raises(pg.IncompatibleError, match="'mask'.*'idle' accepts it but does not use it"):
        pg.fit(idle, (x, flags), SVI(steps=1))
    fit = pg.fit(in_event, (x, flags), SVI(steps=1), seed=0)
    garbage = torch.where(flags, x, 77.0)
    assert torch.equal(fit.evidence((garbage, flags)).values, fit.evidence((x.clone(), flags)).values)

    def shifted(data):
        shift = data["x"][data["mask"]].mean()  # read once, of the training rows

        def model(x):
            idle(x - shift)

        return pg.Program(model, name="shifted")

    fit = pg.fit(pg.Recipe(shifted, name="shifted"), {"x": x, "mask": flags}, SVI(steps=1))
    with pytest.raises(pg.IncompatibleError, match="'mask' looks like a mask, and the program 'shifted'"):
        fit.evidence({"x": x, "mask": flags})


def test_a_read_only_array_is_looked_at_without_a_warning_of_torch():
    """pandas hands out columns that must not be written to; torch warns of each such array it shares, once."""
    script = (
        "import warnings, numpy as np; from ppl_gen.data.masks import looks_like_mask; warnings.simplefilter('error');"
        "a = np.zeros(4); a.flags.writeable = False; print(looks_like_mask('mask', a, {}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
