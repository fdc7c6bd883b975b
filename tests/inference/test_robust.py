"""Adversarial and domain-adversarial training against closed forms of linear scores, and on data made for them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, softplus

import ppl_gen as pg
from ppl_gen.inference import ELBO, SVI, Adversarial, AdversarialTraining, DomainAdversarial
from ppl_gen.inference.objectives.robust import _RobustGame
from ppl_gen.models import gan, vae

W, B = torch.tensor([1.5, -0.5, 0.25], dtype=torch.float64), 0.3


def _logistic(x, y):
    w, b = pyro.param("w", W), pyro.param("b", torch.tensor(B))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)


def _rows(rows=200):
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"x": x, "y": (x @ W > 0).double()}


def _first(objective, data=None, program=_logistic):
    fit = pg.fit(program, data or _rows(), SVI(objective, steps=1, lr=1e-12), seed=0)
    return {name: float(fit.history[name][0]) for name in fit.history.data_vars}


@pytest.mark.parametrize(("norm", "dual"), [("inf", 1), ("2", 2)])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_worst_rows_of_logistic_regression_are_the_closed_form(norm, dual, steps):
    """max over |r| <= eps of softplus(-s (w r + w x + b)) = softplus(eps |w|_dual - s (w x + b)), s = +-1."""
    data = _rows()
    margin = (2 * data["y"] - 1) * (data["x"] @ W + B)
    for radius in (0.1, 1.0):
        found = _first(AdversarialTraining(radius, norm, steps=steps))
        worst = float(softplus(radius * W.norm(dual) - margin).mean())
        assert abs(found["program_loss"] - worst) < 1e-12
        assert abs(found["clean_loss"] - float(softplus(-margin).mean())) < 1e-12 < worst - found["clean_loss"]
    half = _first(AdversarialTraining(1.0, norm, steps=steps, clean=0.25))
    assert abs(half["program_loss"] - (0.75 * worst + 0.25 * found["clean_loss"])) < 1e-12


def test_bounds_are_kept_and_rows_that_stand_at_them_do_not_move():
    data = _rows()
    data["x"] = data["x"].clamp(-1.0, 1.0)
    margin = (2 * data["y"] - 1) * (data["x"] @ W + B)
    sign = -(2 * data["y"] - 1)[:, None] * W.sign()
    moved = (data["x"] + 0.5 * sign).clamp(-1.0, 1.0)
    exact = softplus(-(2 * data["y"] - 1) * (moved @ W + B)).mean()
    found = _first(AdversarialTraining(0.5, steps=1, bounds=(-1, 1)), data)
    assert abs(found["program_loss"] - float(exact)) < 1e-12
    assert float(exact) < float(softplus(0.5 * W.norm(1) - margin).mean()) - 0.01


def test_bounds_that_do_not_hold_the_rows_are_refused():
    """To get there a row would have to leave the ball: an adversary of next to no radius would double the loss."""
    with pytest.raises(ValueError, match=r"bounds: expected \(-0.1, 0.1\) to hold all values of 'x', which go from"):
        _first(AdversarialTraining(1e-9, bounds=(-0.1, 0.1)))
    game = object.__new__(_RobustGame)  # a stream's later rows are not looked at: whatever comes, the ball is kept
    game.objective = AdversarialTraining(0.5, bounds=(-1, 1))
    x = _rows()["x"]
    moved = game._moved(x, x, torch.ones_like(x))
    assert (moved - x).abs().max() <= 0.5 and (x.abs() > 1.5).any()
    inside = x.abs().amax(1) <= 1
    assert moved[inside].abs().max() == 1.0


def test_what_was_observed_of_discrete_rows_cannot_be_moved():
    bits = (torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    with pytest.raises(pg.IncompatibleError, match="entry: the program takes 'x' as it is, and not as an adversary"):
        pg.fit(vae(latent=2, hidden=(4,)), bits, SVI(AdversarialTraining(0.1), steps=1), seed=0)


@pytest.mark.parametrize("path", [False, "graph"])
def test_an_adversary_leaves_running_averages_to_the_rows_that_are_learned_from(path):
    torch.manual_seed(0)
    norm, line = nn.BatchNorm1d(3, momentum=None).double(), nn.Linear(3, 1).double()  # momentum None: a plain mean

    def program(x, y):
        pyro.module("norm", norm)
        pyro.module("line", line)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=line(norm(x)).squeeze(-1)), obs=y)

    def kept(radius, bounds=None):
        objective = ELBO() if radius is None else AdversarialTraining(radius, steps=3, bounds=bounds)
        fit = pg.fit(program, _rows(), SVI(objective, steps=20, lr=1e-9), seed=0, compile=path)
        return fit.module("norm")

    plain, near, far = kept(None), kept(1e-12), kept(1.0)
    assert int(near.num_batches_tracked) == int(far.num_batches_tracked) == int(plain.num_batches_tracked) == 20
    torch.testing.assert_close(near.running_var, plain.running_var, rtol=1e-9, atol=0.0)
    # What is learned from are the moved rows alone, 1 away in each column, which spread on one side or the other.
    assert ((far.running_var - plain.running_var).abs() > 0.05).any()


def test_an_adversary_raises_the_program_s_own_terms_too():
    """A term |x - 10|^2 is highest at the side away from 10; the adversary moves there although y hardly minds."""
    program = pg.Program(_logistic, terms={"far": lambda x, y: 100 * (x - 10.0).square().sum(1)})
    x = _rows()["x"]
    found = _first(AdversarialTraining(1.0, steps=1), program=program)
    assert abs(found["far"] - float(100 * (x - 1.0 - 10.0).square().sum(1).mean())) < 1e-9 * found["far"]
    assert abs(found["clean_loss"] - float(100 * (x - 10.0).square().sum(1).mean())) < 1.0
    assert found["program_loss"] > found["far"] > found["clean_loss"]

    def named(x, y, domain):
        pyro.deterministic("features", x, event_dim=1)
        _logistic(x, y)

    program = pg.Program(named, terms={"far": lambda x, y, domain: (x - 10.0).square().sum(1)})
    data = {**_rows(), "domain": torch.arange(200) % 2}
    both = DomainAdversarial(weight=0.0, objective=AdversarialTraining(1e-12, steps=1))
    once = _first(ELBO(), data, program)["program_loss"]
    assert abs(_first(both, data, program)["program_loss"] - once) < 1e-9 * once, "and they are paid once"


def test_more_steps_go_further_where_the_loss_bends():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def bent(x, y):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=4 * net(x)), obs=y)

    data = {**_rows(), "y": _rows()["y"].long()}
    losses = [_first(AdversarialTraining(1.0, "2", steps=steps), data, bent)["program_loss"] for steps in (1, 3, 20)]
    clean = _first(ELBO(), data, bent)["program_loss"]
    assert clean < losses[0] < losses[2] and losses[1] < losses[2]


def test_robust_weights_rest_on_the_column_that_an_adversary_cannot_turn():
    """One column of +-1 that is right in 90 % of the rows, and one of +-0.1 that is always right (Tsipras et al. 2019)."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(2000, generator=generator) < 0.5).float()
    sign = 2 * y - 1
    strong = torch.where(torch.rand(2000, generator=generator) < 0.9, sign, -sign)
    data = {"x": torch.stack([strong, 0.1 * sign], 1), "y": y}

    def program(x, y):
        w = pyro.param("w", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    weights = {}
    for name, objective in (("plain", ELBO()), ("robust", AdversarialTraining(0.3, steps=1))):
        weights[name] = pg.fit(program, data, SVI(objective, steps=400, lr=0.05), seed=0).params["w"]
    # An adversary of 0.3 turns the second column around, and cannot turn the first.
    assert float(weights["robust"][1].abs()) < 0.3 < 1.0 < float(weights["plain"][1])
    assert float(weights["robust"][0]) > 0.5

    def accuracy(w, radius):
        margin = sign * (data["x"] @ w) - radius * w.abs().sum()
        return float((margin > 0).float().mean())

    assert accuracy(weights["plain"], 0.3) < 0.6 < 0.85 < accuracy(weights["robust"], 0.3)


def test_what_an_adversary_cannot_move_is_refused():
    def without(x, y):
        b = pyro.param("b", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=b), obs=y)

    with pytest.raises(pg.IncompatibleError, match="gives no gradient to the entry 'x'"):
        _first(AdversarialTraining(), program=without)
    whole = {**_rows(), "x": _rows()["x"].long()}
    with pytest.raises(ValueError, match="entry: expected rows of real numbers in 'x', got torch.int64"):
        _first(AdversarialTraining(), whole, lambda x, y: _logistic(x.double(), y))
    with pytest.raises(pg.IncompatibleError, match="objective: Adversarial is a game of several players"):
        played = AdversarialTraining(objective=Adversarial())
        pg.fit(gan(2, latent=2, hidden=(3,)), torch.randn(10, 2), SVI(played, steps=1))
    assert not AdversarialTraining(objective=Adversarial()).uses_guide and AdversarialTraining().uses_guide


# Domain-adversarial features.


def _two_domains(rows=2000):
    """Column 0 tells the class in both domains; column 1 does in the first, and is shifted in the second, unlabelled."""
    generator = torch.Generator().manual_seed(0)
    y, domain = torch.randint(2, (2, rows), generator=generator)
    sign = 2.0 * y - 1
    noise = torch.randn(rows, 2, generator=generator)
    first = sign + 0.8 * noise[:, 0]
    second = torch.where(domain == 0, 2 * sign, torch.full_like(sign, -4.0)) + 0.5 * noise[:, 1]
    return {"x": torch.stack([first, second], 1), "y": torch.where(domain == 0, y, -1), "domain": domain}, y


def _features(net, head):
    def program(x, y, domain):
        pyro.module("net", net)
        pyro.module("head", head)
        with pyro.plate("data", len(x)):
            h = pyro.deterministic("features", net(x), event_dim=1)
            with pyro.poutine.mask(mask=y >= 0):
                pyro.sample("y", dist.Categorical(logits=head(h)), obs=y.clamp(min=0))

    return program


def _adapted(weight, steps=600):
    torch.manual_seed(0)
    net, head = nn.Linear(2, 1), nn.Linear(1, 2)
    data, y = _two_domains()
    algorithm = SVI(DomainAdversarial(weight=weight), steps=steps, batch_size=250, lr=1e-2)
    fit = pg.fit(_features(net, head), data, algorithm, seed=0)
    with torch.no_grad():
        guessed = fit.module("head")(fit.module("net")(data["x"])).argmax(1)
    target = data["domain"] == 1
    return fit, float((guessed == y)[target].float().mean())


def test_features_that_do_not_tell_domains_apart_carry_over_to_the_other_domain():
    deaf, kept = _adapted(0.0)
    heard, carried = _adapted(1.0)
    last = slice(-100, None)
    # The critic of a program that does not hear of it tells domains apart; the other's is near chance: a loss of log 2.
    assert float(deaf.history["critic_accuracy"][last].mean()) > 0.75
    assert float(heard.history["critic_accuracy"][last].mean()) < 0.62
    assert abs(float(heard.history["critic_loss"][last].mean()) - math.log(2)) < 0.06
    # Column 0 alone is right in Phi(1 / 0.8) = 89 % of the rows.
    assert kept < 0.65 < 0.8 < carried
    (of_heard,), (of_deaf,) = (fit.module("net").weight.detach().abs() for fit in (heard, deaf))
    assert float(of_heard[1] / of_heard[0]) < 0.15 < float(of_deaf[1] / of_deaf[0])


def test_the_losses_of_both_players():
    torch.manual_seed(0)
    net, head = nn.Linear(2, 3), nn.Linear(3, 2)
    critic = nn.Linear(3, 2)
    data, _ = _two_domains(300)
    objective = DomainAdversarial(weight=0.7, critic=critic)
    fit = pg.fit(_features(net, head), data, SVI(objective, steps=1, lr=1e-12), seed=0)
    with torch.no_grad():
        h = net(data["x"])
        missed = cross_entropy(critic(h), data["domain"])
        labelled = data["y"] >= 0
        # Per row of all rows: those without a label pay nothing.
        own = cross_entropy(head(h)[labelled], data["y"][labelled], reduction="sum") / 300
    assert abs(float(fit.history["critic_loss"][0]) - float(missed)) < 1e-5
    assert abs(float(fit.history["own_loss"][0]) - float(own)) < 1e-5
    assert abs(float(fit.history["program_loss"][0]) - float(own - 0.7 * missed)) < 1e-5


def test_features_and_domains_that_are_not_there_are_refused():
    net, head = nn.Linear(2, 1), nn.Linear(1, 2)
    data, _ = _two_domains(30)

    def played(program=None, rows=data, **settings):
        pg.fit(program or _features(net, head), rows, SVI(DomainAdversarial(**settings), steps=1), seed=0)

    with pytest.raises(ValueError, match=r"site: there is no 'codes' in 'program', which has .*features"):
        played(site="codes")
    with pytest.raises(
        ValueError, match="domain: expected one integer from 0 to 1 for each row in 'domain', got values"
    ):
        played(rows={**data, "domain": data["domain"] + 1})
    with pytest.raises(ValueError, match="critic: expected 2 numbers for each of 30 rows"):
        played(critic=nn.Linear(1, 3))
    with pytest.raises(ValueError, match="domain: the model of '_logistic' takes no 'domain' from the data"):
        played(_logistic, _rows())


def test_rows_of_one_domain_alone_are_refused():
    """The critic would be right about all of them, and features be said to hide nothing."""
    data, _ = _two_domains(30)
    with pytest.raises(ValueError, match="domain: expected rows of two domains at least in 'domain', got 1 for all 30"):
        alone = {**data, "domain": torch.ones(30, dtype=torch.long)}
        pg.fit(_features(nn.Linear(2, 1), nn.Linear(1, 2)), alone, SVI(DomainAdversarial(), steps=1), seed=0)


@pytest.mark.parametrize("wrong", [-100, -1, 2])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_domain_out_of_range_is_refused_wherever_it_stands(wrong, batch_size):
    """-100 is what torch's cross entropy leaves out without a word."""
    data, _ = _two_domains(200)
    data["domain"] = data["domain"].clone()
    data["domain"][177] = wrong
    algorithm = SVI(DomainAdversarial(), steps=1, batch_size=batch_size)
    with pytest.raises(ValueError, match="domain: expected one integer from 0 to 1 for each row in 'domain', got val"):
        pg.fit(_features(nn.Linear(2, 1), nn.Linear(1, 2)), data, algorithm, seed=0)


def _coded(made_by):
    """Rows 6 apart by domain, of a program with codes; the features are the codes."""
    generator = torch.Generator().manual_seed(0)
    domain = torch.arange(200) % 2
    x = torch.randn(200, 2, generator=generator) + 6.0 * domain[:, None]

    def program(x, domain):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            other = pyro.sample("other", dist.Categorical(torch.ones(2)))
            pyro.deterministic("features", z if made_by == "z" else other[:, None].float(), event_dim=1)
            pyro.sample("x", dist.Normal(z + loc + other[:, None], 1.0).to_event(1), obs=x)

    def guide(x, domain):
        share = pyro.param("share", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(share * x, 0.1).to_event(1))

    return pg.Program(program, guide), {"x": x, "domain": domain}


def test_features_of_latent_sites_are_those_that_the_guide_draws():
    program, data = _coded("z")
    rates = {"program": 1e-12, "critic": 1e-2}
    fit = pg.fit(program, data, SVI(DomainAdversarial(weight=0.0), steps=150, lr=rates), seed=0)
    assert float(fit.history["critic_accuracy"][-1]) > 0.99, "draws of the prior would leave the critic at a half"
    program, data = _coded("other")
    with pytest.raises(pg.IncompatibleError, match="features 'features' are made from other, which the guide does not"):
        pg.fit(program, data, SVI(DomainAdversarial(), steps=1), seed=0)


def test_without_weight_the_program_learns_as_it_does_alone():
    data, _ = _two_domains(200)

    def weights(objective):
        torch.manual_seed(0)
        net, head = nn.Linear(2, 1), nn.Linear(1, 2)
        fit = pg.fit(_features(net, head), data, SVI(objective, steps=20, lr=0.01), seed=0)
        return fit.module("net").weight

    assert torch.equal(weights(DomainAdversarial(weight=0.0)), weights(ELBO()))
    assert not torch.equal(weights(DomainAdversarial(weight=1.0)), weights(ELBO()))
