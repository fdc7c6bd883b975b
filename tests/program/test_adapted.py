"""Plates without a size, vectors outside of plates, rows in another dimension than the first: as Pyro runs them."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoGuideList, AutoNormal

import ppl_gen as pg
from ppl_gen.inference import EM, NUTS, SVI

X = torch.randn(12, generator=torch.Generator().manual_seed(1)) + 1.0
SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
CHAIN = NUTS(draws=60, warmup=60, chains=1, processes=1)


def unsized(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("data"):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def sized(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def unsized_guide(x):
    pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.3))
    with pyro.plate("data"):
        pass


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_plate_without_a_size_takes_the_rows(batch_size) -> None:
    algorithm = SVI(steps=8, lr=0.05, batch_size=batch_size)
    one, two = (pg.fit(model, X, algorithm, seed=0) for model in (unsized, sized))
    assert one.records["program_loss"] == two.records["program_loss"]
    assert one.info.data_plate == "data" and one.data.rows == 12
    assert one.evidence(X[:5], particles=4).mean == two.evidence(X[:5], particles=4).mean
    assert one.sample(3)["x"].shape == (3,) and one.predict(X[:4], draws=2)["x"].shape == (2, 4)


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_a_plate_without_a_size_under_a_guide_and_chains(tmp_path) -> None:
    program = pg.Program(unsized, unsized_guide)
    fit = pg.fit(program, X, SVI(steps=400, lr=0.02), seed=0)
    assert abs(float(fit.params["m"]) - float(X.sum()) / (12 + 1 / 25)) < 0.15  # half of the posterior sd of 0.29
    assert pg.load(fit.save(tmp_path / "fit"), program=program).info.rows == 12
    draws = pg.fit(unsized, X, NUTS(draws=60, warmup=60, chains=1, processes=1), seed=0).posterior(draws=9)
    assert draws["loc"].shape == (9,)
    assert "data" in str(pg.check(unsized, X))


def test_a_guide_with_other_names_has_its_plate_sized_too() -> None:
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(rows):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(pyro.param("half", torch.tensor(0.1)) * rows, 0.7))

    fit = pg.fit(pg.Program(model, guide), X, SVI(steps=3), seed=0)
    assert fit.posterior(X[:4], draws=2)["z"].shape == (2, 4)
    assert fit.info.guide_sites["z"].plates == ("data",)


class Written(pyro.nn.PyroModule):
    """A module with a parameter and a buffer, whose plate has the ``size`` it says: any, or none."""

    def __init__(self, size=None, shift=0.0):
        super().__init__()
        self.size, self.shift = size, shift
        self.scale = pyro.nn.PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += 1
        loc = pyro.sample("loc", dist.Normal(self.shift, 5.0))
        with pyro.plate("data", self.size, None if self.size is None else len(x)):
            pyro.sample("x", dist.Normal(loc, self.scale), obs=x)


class Whole(Written):
    def forward(self, x):
        self.size = len(x)
        super().forward(x)


GUIDES = {
    "class": lambda model: AutoNormal,
    "class with options": lambda model: partial(AutoNormal, init_scale=0.2),
    "instance": AutoNormal,
    "list": lambda model: listed(model),
}


def listed(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["loc"])))
    return guide


@pytest.mark.parametrize(
    ("size", "guide", "batch_size"),
    [
        (None, "class", None),
        (None, "list", None),
        (1000, "class with options", 5),
        (1000, "instance", None),
        (12, "class", 5),
    ],
)
def test_the_plate_of_a_module_has_the_rows_it_is_given(tmp_path, size, guide, batch_size) -> None:
    """Whatever guide is made of it: as one that is written with len(x), in training, in questions, and from disk."""
    algorithm = SVI(steps=8, lr=0.05, batch_size=batch_size)
    programs = [pg.Program(model, GUIDES[guide](model), name="it") for model in (Written(size), Whole())]
    one, two = (pg.fit(program, X, algorithm, seed=0) for program in programs)
    assert one.records["program_loss"] == pytest.approx(two.records["program_loss"], rel=1e-6)
    assert one.params.keys() == two.params.keys() and float(one.params["scale"]) != 1
    for fit in (one, pg.load(one.save(tmp_path / "fit"), program=programs[0])):
        for rows in (X, X[:5], torch.cat([X, X])):
            ours, theirs = (each.evidence(rows, particles=4) for each in (fit, two))
            assert ours.rows == len(rows) and ours.mean == pytest.approx(theirs.mean, rel=1e-6)
        assert fit.sample(3)["x"].shape == (3,) and fit.predict(X[:4], draws=2)["x"].shape == (2, 4)
        assert float(fit.module("model").seen) == float(two.module("model").seen)


def test_a_module_stays_as_it_is_where_its_plate_is_given_a_size(tmp_path) -> None:
    module = Written(1000)
    before, kept = dict(vars(module)), {name: value.clone() for name, value in module.state_dict().items()}
    fit = pg.fit(module, X, SVI(steps=8, lr=0.05), seed=0)
    fit.evidence(X[:5])
    assert type(module) is Written and vars(module) == before
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
    path = fit.save(tmp_path / "fit")
    with pytest.warns(UserWarning, match="shift"):
        pg.load(path, program=Written(1000, shift=3.0))


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_vectors_of_a_module_are_one_draw_under_chains() -> None:
    class Schools(pyro.nn.PyroModule):
        def forward(self, y):
            vectors(y)

    one, two = (pg.fit(model, SCHOOLS, CHAIN, seed=0) for model in (Schools(), vectors))
    assert one.notes["vectors"] == two.notes["vectors"]
    for name, value in two.posterior(draws=20).items():
        assert torch.equal(one.posterior(draws=20)[name], value)


def vectors(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    eta = pyro.sample("eta", dist.Normal(torch.zeros(8), torch.ones(8)))
    pyro.sample("y", dist.Normal(mu + tau * eta, ERRORS), obs=y)


def events(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    eta = pyro.sample("eta", dist.Normal(torch.zeros(8), torch.ones(8)).to_event(1))
    pyro.sample("y", dist.Normal(mu + tau * eta, ERRORS).to_event(1), obs=y)


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_vectors_outside_of_plates_are_one_draw_under_chains(tmp_path) -> None:
    one, two = (pg.fit(model, SCHOOLS, CHAIN, seed=0) for model in (vectors, events))
    assert "eta, y" in one.notes["vectors"] and "vectors" not in two.notes
    for name, value in two.posterior(draws=20).items():
        assert torch.equal(one.posterior(draws=20)[name], value)
    assert one.evidence(particles=2).mean == two.evidence(particles=2).mean
    loaded = pg.load(one.save(tmp_path / "fit"), program=vectors)
    assert loaded.evidence(particles=2).mean == one.evidence(particles=2).mean


def mixed(x):
    centres = pyro.sample("centres", dist.Normal(torch.tensor([-2.0, 2.0]), torch.ones(2)).to_event(1))
    shift = pyro.sample("shift", dist.Normal(torch.zeros(3), torch.ones(3)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(centres[z] + shift.sum(), 1.0), obs=x)


def test_vectors_beside_finite_latents_under_em() -> None:
    fit = pg.fit(mixed, X, EM(steps=20), seed=0)
    first, *_, last = next(iter(fit.records.values()))
    assert last > first  # EM climbs
    assert fit.point["shift"].shape == (3,)


def test_svi_and_check_offer_an_event_first() -> None:
    with pytest.raises(ValueError, match=r"'eta'.*\n.*outside of every plate.*\n.*to_event\(1\)"):
        pg.fit(vectors, SCHOOLS, SVI(steps=2))


def test_two_plates_over_the_rows_are_named_with_their_sites() -> None:
    def model(x):
        with pyro.plate("units", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("readings", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"(?s)several plates.*'units': site\(s\) z.*'readings': site\(s\) x"):
        pg.fit(model, X, SVI(steps=2))


WORDS = torch.tensor([[0, 1, 2, 2, 5], [3, 3, 0, 1, 5], [4, 0, 0, 1, 5], [4, 4, 2, 1, 0]])


def topics(words):
    with pyro.plate("topics", 2):
        topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(6)))
    with pyro.plate("documents", words.shape[1]):
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("words", words.shape[0]):
            z = pyro.sample("z", dist.Categorical(shares))
            pyro.sample("w", dist.Categorical(topic_words[z]), obs=words)


def transposed(words):
    topics(words.T)


@pytest.mark.slow
def test_rows_may_be_another_dimension(tmp_path) -> None:
    """Documents as columns, and as rows of a transposed program: the same fit, the same answers."""
    program = pg.Program(topics, data_plate="documents", data_dim=1)
    one = pg.fit(program, WORDS, SVI(steps=6), seed=0)
    two = pg.fit(pg.Program(transposed, data_plate="documents"), WORDS.T.contiguous(), SVI(steps=6), seed=0)
    assert one.info.rows == 5 and one.records["program_loss"] == two.records["program_loss"]
    assert one.evidence(particles=3).mean == two.evidence(particles=3).mean
    few = one.evidence(WORDS[:, :2], particles=3)
    assert few.rows == 2 and few.mean == two.evidence(WORDS.T[:2].contiguous(), particles=3).mean
    loaded = pg.load(one.save(tmp_path / "fit"), program=program)
    assert torch.equal(loaded.data.batch().args[0], WORDS)
    assert torch.equal(one.data.subset(torch.tensor([4, 0])).original, WORDS[:, [4, 0]])


def test_rows_in_another_dimension_are_offered_where_the_plate_has_their_number() -> None:
    with pytest.raises(ValueError, match=r"has size 5, but the data has 4 rows.*data_dim=1"):
        pg.fit(pg.Program(topics, data_plate="documents"), WORDS, SVI(steps=2))


def test_batches_of_sequences_time_first() -> None:
    """Lengths have one dimension, their rows; a minibatch takes the same rows of both."""
    lengths = torch.tensor([3, 2, 1, 3, 2])
    steps = torch.arange(15.0).reshape(3, 5)

    def model(x, lengths):
        step = pyro.sample("step", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(lengths)):
            seen = torch.arange(3)[:, None] < lengths
            assert torch.equal(x[0] % 5 % 3 == 2, lengths == 1)
            pyro.sample("x", dist.Normal(step, 1.0).expand([len(lengths), 3]).mask(seen.T).to_event(1), obs=x.T)

    fit = pg.fit(pg.Program(model, data_dim=1), (steps, lengths), SVI(steps=4, batch_size=2), seed=0)
    assert fit.data.rows == 5


def chains_of_letters(sequences, lengths, size=None):
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    stay = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    for i in pyro.plate("sequences", len(sequences), size):
        state = 0
        for t in pyro.markov(range(int(lengths[i]))):
            state = pyro.sample(f"z_{i}_{t}", dist.Categorical(stay[state]), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{i}_{t}", dist.Normal(loc[state], 1.0), obs=sequences[i, t])


def one_value(sequences, lengths, size=None):
    pyro.sample("loc", dist.Delta(pyro.param("l", torch.tensor([-0.9, 1.2])), event_dim=1))


def test_an_iterated_plate_that_subsamples_is_whole_in_every_question() -> None:
    """Its sites differ from run to run: the table of sites, and the evidence at the same parameters, are those of all."""
    lengths, rows = torch.tensor([3, 2, 3, 1]), torch.linspace(-2.0, 2.0, 12).reshape(4, 3)
    still = SVI(TraceEnum_ELBO(max_plate_nesting=0), steps=1, lr=1e-12)
    program = pg.Program(chains_of_letters, one_value)
    whole, some = (pg.fit(program, (rows, lengths, size), still, seed=0) for size in (None, 2))
    assert some.info.sites.keys() == whole.info.sites.keys()
    assert some.evidence(particles=2).mean == pytest.approx(whole.evidence(particles=2).mean, rel=1e-6)
    assert len(some.posterior(draws=2)) == 1 + 9 and len(some.predict(draws=2)) == 9


def test_what_a_program_raises_as_it_generates_is_told_as_its_own() -> None:
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            drawn = pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        if drawn.max() > 100:
            raise RuntimeError("values this large are no temperatures")

    fit = pg.fit(model, X, SVI(steps=2), seed=0)
    assert fit.sample(3)["x"].shape == (3,)
    with pytest.raises(ValueError, match="sample: the program 'model' failed as it generated 3 rows .*: values this"):
        fit.sample(3, given={"loc": 1000.0})


def test_an_enumerated_guide_over_a_plate_without_a_size() -> None:
    def model(k, x):
        locs = pyro.param("locs", torch.linspace(0.0, 2.0, k))
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Categorical(torch.ones(k) / k).expand_by([len(x)]))
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    def guide(k, x):
        probs = pyro.param("probs", torch.ones(len(x), k) / k, constraint=dist.constraints.simplex)
        with pyro.plate("data"):
            pyro.sample("z", dist.Categorical(probs))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    fit = pg.fit(pg.Program(model, config_enumerate(guide)), (2, X), SVI(elbo, steps=3), seed=0)
    assert fit.params["probs"].shape == (12, 2)


def written_out(words, k=2):
    with pyro.plate("topics", k):
        topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(6)))
    with pyro.plate("documents", 5):
        assert words.shape == (4, 5)
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(k)))
        with pyro.plate("words", 4):
            z = pyro.sample("z", dist.Categorical(shares))
            pyro.sample("w", dist.Categorical(topic_words[z]), obs=words)


def test_a_program_that_asserts_its_shapes() -> None:
    """Its assertion fails on fewer rows, at which a dry run looks, and that is no answer to the user's data."""
    with pytest.raises(ValueError, match=r"plate 'words' has as many rows .*data_plate='documents', data_dim=1"):
        pg.fit(written_out, WORDS, SVI(steps=2))
    fit = pg.fit(pg.Program(written_out, data_plate="documents", data_dim=1), WORDS, SVI(steps=2), seed=0)
    assert fit.evidence(particles=2).rows == 5
    with pytest.raises(ValueError, match=r"its own assertion does not hold: assert .* == \(4, 5\)"):
        pg.fit(written_out, WORDS[:3], SVI(steps=2))


def test_a_density_without_data_needs_no_observation() -> None:
    def target():
        pyro.sample("z", dist.Normal(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.5])).to_event(1))

    fit = pg.fit(target, (), NUTS(draws=300, warmup=200, chains=2, processes=1), seed=0)
    # 600 draws of a normal, at least 150 effective: five errors of the mean are 0.4 sd.
    assert torch.allclose(fit.posterior(draws=600)["z"].mean(0).float(), torch.tensor([3.0, -1.0]), atol=0.4)
    with pytest.raises(ValueError, match="no site of '<lambda>' is observed"):
        pg.fit(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), X, SVI(steps=2))


def handed_out(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("data", 12, len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_plate_written_for_minibatches_has_the_rows_it_is_given(batch_size) -> None:
    algorithm = SVI(steps=8, lr=0.05, batch_size=batch_size)
    one, two = (pg.fit(model, X, algorithm, seed=0) for model in (handed_out, sized))
    assert one.records["program_loss"] == pytest.approx(two.records["program_loss"], rel=1e-6)
    for rows in (X, X[:5], torch.cat([X, X])):
        ours, theirs = (fit.evidence(rows, particles=4) for fit in (one, two))
        assert ours.rows == len(rows) and ours.mean == pytest.approx(theirs.mean, rel=1e-6)
    assert one.sample(3)["x"].shape == (3,) and one.predict(X[:4], draws=2)["x"].shape == (2, 4)


def restated(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("twice", dist.Delta(2 * loc * torch.ones(len(x))), obs=2 * loc * torch.ones(len(x)))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def named(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.deterministic("twice", 2 * loc * torch.ones(len(x)))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize("algorithm", [SVI(steps=20), NUTS(draws=20, warmup=20, chains=1)])
@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_a_delta_that_observes_its_own_value_computed_anew_is_deterministic(algorithm):
    """Its two statements of one value are two tensors; it was taken for an observation without a density."""
    x = torch.linspace(0.0, 2.0, 8)
    assert pg.check(restated, x).sites["twice"].kind == "deterministic"
    found, expected = (pg.fit(model, x, algorithm, seed=0) for model in (restated, named))
    torch.testing.assert_close(found.posterior(draws=10, seed=1), expected.posterior(draws=10, seed=1))
    assert found.predict(x[:3], draws=4).keys() == expected.predict(x[:3], draws=4).keys() == {"x"}


def test_a_delta_at_the_data_is_an_observation():
    def exact(x):
        pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Delta(torch.zeros(len(x))), obs=x)

    assert pg.check(exact, torch.zeros(8)).sites["x"].kind == "observed"


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_check_shows_vectors_that_only_some_algorithms_read() -> None:
    def schools(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        theta = pyro.sample("theta", dist.Normal(mu * torch.ones(8), 1.0))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=y)

    found = pg.check(schools, torch.arange(8.0))
    assert found.vectors == "theta, y" and found.sites["theta"].event_shape == (8,)
    assert "vectors outside of every plate: theta, y (one draw each for NUTS and EM; end them in .to_event(1)" in str(
        found
    )
    assert pg.fit(schools, torch.arange(8.0), NUTS(draws=10, warmup=10, chains=1, processes=1), seed=0).notes["vectors"]
    with pytest.raises(ValueError, match=r"to_event\(1\)"):
        pg.fit(schools, torch.arange(8.0), SVI(steps=2))

    def wrong(y):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(5), 1.0))
        pyro.sample("y", dist.Normal(theta.sum(), torch.ones(8)), obs=y[:3])

    with pytest.raises(ValueError, match="site 'theta'"):
        pg.check(wrong, torch.arange(8.0))
