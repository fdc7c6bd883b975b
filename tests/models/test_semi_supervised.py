"""M1, M2 and M1+M2: bounds summed by hand, the classifier's term, labels given and missing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from programs import gradient, losses
from torch import Tensor

import ppl_gen as pg
from ppl_gen.data.batches import Batches
from ppl_gen.data.batching import as_dataset
from ppl_gen.diagnostics import active_units
from ppl_gen.inference import ELBO, IWAE, SVI
from ppl_gen.inference.objectives.base import started
from ppl_gen.inference.objectives.game import Game, Setting
from ppl_gen.models import m1, m1_m2, m2, vae
from ppl_gen.program.dry_run import dry_run
from ppl_gen.workspace.isolation import isolated
from ppl_gen.workspace.workspace import Workspace

STILL = SVI(steps=1, lr=1e-30)  # one step too small to change anything


def clusters(rows: int = 60, labelled: int = 2) -> tuple[dict[str, Tensor], Tensor]:
    """Two kinds of six pixels, one in ten flipped; the first rows of each kind are labelled. The truth beside it."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(rows) % 2
    kind = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0.0, 0, 0, 1, 1, 1]], dtype=torch.float64)[truth]
    x = (kind - (torch.rand(kind.shape, generator=generator) < 0.1).double()).abs()
    return {"x": x, "y": torch.where(torch.arange(rows) < 2 * labelled, truth, -1)}, truth


class Played:
    """A program of the zoo at its starting weights, its networks made lively, and single losses of it."""

    def __init__(self, recipe: pg.Recipe, data: dict[str, Tensor], objective: Any = None) -> None:
        self.data = as_dataset(data, recipe(data).model)
        self.stack = isolated(3, dtype=self.data.dtype)
        self.workspace = Workspace(dtype=self.data.dtype)
        self.recipe, self.given, self.objective = recipe, data, objective or ELBO()

    def __enter__(self) -> tuple[Game, Any, Any]:
        self.stack.__enter__()
        self.workspace.__enter__()
        program = self.recipe(self.given)
        info = dry_run(program, self.data.batch(), guide=program.guide)
        with torch.no_grad():
            for module in self.workspace.modules.values():
                for parameter in module.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.4 * torch.randn_like(parameter))
        setting = Setting(program, program.model, program.guide, info, self.data.batch(), True)
        return started(self.objective, setting), self.data, self.workspace.modules

    def __exit__(self, *exception: Any) -> None:
        self.workspace.__exit__(*exception)
        self.stack.__exit__(*exception)


@torch.no_grad()
def by_hand(parts: Any, x: Tensor, y: Tensor, noise: Tensor, beta: float = 1.0) -> Tensor:
    """-sum_y q(y|x) [ log p(x|y,z) - beta (log q - log p)(y, z) ] of every row, z from ``noise``: labels x rows x 2."""
    encoder, decoder, classifier = parts["encoder"], parts["decoder"], parts["classifier"]
    one_hot = torch.nn.functional.one_hot(y.clamp(min=0), 2).to(x)
    q_y = torch.where((y >= 0)[:, None], one_hot, classifier(x).probs)
    total = torch.zeros(len(x), dtype=x.dtype)
    for label in range(2):
        told = torch.full((len(x),), label)
        q_z = encoder(x, told).base_dist
        z = q_z.mean + q_z.stddev * noise[label]
        prior = torch.distributions.Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(-1)
        divergence = q_z.log_prob(z).sum(-1) - prior + q_y[:, label].log() + math.log(2.0)
        bound = decoder(z, told).log_prob(x) - beta * divergence
        total -= torch.where(q_y[:, label] > 0, q_y[:, label] * bound, 0.0)
    return total


# ------------------------------------------------------------------------------------------------- the bound
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_the_bound_of_m2_is_the_sum_over_labels_by_hand(beta: float) -> None:
    """Labelled and unlabelled rows alone and mixed, at equal draws of z: one for each label of each row."""
    data, _ = clusters(12)
    recipe = m2(6, classes=2, latent=2, hidden=(5,), alpha=0.0, activation="tanh")
    with Played(recipe, data, ELBO(beta=beta)) as (game, dataset, parts):
        for chosen in (range(12), range(4), range(4, 9)):
            rows = torch.tensor(list(chosen))
            torch.manual_seed(5)
            found = float(losses(game, dataset.subset(rows).batch(), 1))
            torch.manual_seed(5)
            noise = torch.normal(torch.zeros(2, len(rows), 2), torch.ones(()))
            expected = by_hand(parts, data["x"][rows], data["y"][rows], noise, beta).mean()
            assert found == pytest.approx(float(expected), abs=1e-10)
            other = by_hand(parts, data["x"][rows], 1 - data["y"][rows].clamp(min=0), noise, beta).mean()
            assert abs(found - float(other)) > 0.1, "labels matter"


def test_a_labelled_row_contributes_its_label_and_the_bound_given_it() -> None:
    """Evidence by quadrature over the one latent: log p(x, y) for labelled rows, log p(x) for the others."""
    data, _ = clusters(10)
    fit = pg.fit(m2(6, classes=2, latent=1, hidden=(5,)), data, SVI(steps=60, lr=0.02), seed=0)
    z = torch.linspace(-9.0, 9.0, 2001, dtype=torch.float64)[:, None, None]
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z[..., 0])
    decoder = fit.module("decoder")
    joint = torch.stack(
        [
            torch.logsumexp(decoder(z, torch.full((10,), k)).log_prob(data["x"]).detach() + prior, 0)
            + math.log(18.0 / 2000 / 2)
            for k in range(2)
        ],
        -1,
    )
    known = data["y"] >= 0
    exact = torch.where(known, joint.gather(1, data["y"].clamp(min=0)[:, None])[:, 0], joint.logsumexp(1))
    found = fit.evidence(particles=1500)
    assert abs(found.mean - float(exact.mean())) < 5 * found.mc_stderr < 0.05
    alone = fit.evidence({"x": data["x"]}, particles=1500)
    assert abs(alone.mean - float(joint.logsumexp(1).mean())) < 5 * alone.mc_stderr < 0.05


# ------------------------------------------------------------------------------------- the classifier's term
def test_the_classifiers_term_is_alpha_times_the_mean_over_labelled_rows() -> None:
    """As the paper has it: the objective of all N rows gets alpha N times the mean; the loss is per row."""
    data, _ = clusters(20, labelled=3)
    with Played(m2(6, classes=2, latent=2, hidden=(5,), alpha=0.7), data) as (game, dataset, parts):
        with torch.no_grad():
            log_q = parts["classifier"](data["x"][:6]).logits
            expected = -0.7 * float(log_q.gather(1, data["y"][:6, None]).mean())
            loss = game.loss("program", dataset.batch(), game.init(dataset.batch()))[0]
            assert float(loss.parts["classifier"]) == pytest.approx(expected, abs=1e-12)
            plain = float(loss.value) - float(loss.parts["classifier"])
            torch.manual_seed(1)
            with_term = losses(game, dataset.batch(), 1)
            torch.manual_seed(1)
            without = losses(game.game, dataset.batch(), 1)
        assert float(with_term - without) == pytest.approx(expected, abs=1e-12) and math.isfinite(plain)
        for size, stratify in ((4, None), (7, None), (1, None), (5, "y")):
            source = Batches(dataset, size, 0, stratify)
            shares = [source.next() for _ in range(source.per_epoch)]
            with torch.no_grad():
                value = sum(
                    len(b.index) / 20 * float(game.loss("program", b, game.init(b))[0].parts["classifier"])
                    for b in shares
                )
            assert value == pytest.approx(expected, abs=1e-12), (size, stratify)
        assert "classifier" in game.notes["terms"]


def test_only_the_term_and_unlabelled_rows_train_the_classifier() -> None:
    data, _ = clusters(8, labelled=4)
    assert bool((data["y"] >= 0).all())
    for alpha in (0.0, 0.5):
        with Played(m2(6, classes=2, latent=2, hidden=(5,), alpha=alpha), data) as (game, dataset, _):
            found = gradient(game, dataset.batch())
            moved = max(float(g.abs().max()) for name, g in found.items() if name.startswith("classifier"))
            assert (moved > 1e-3) == (alpha > 0) and (alpha > 0 or moved < 1e-12)


# ------------------------------------------------------------------------------------------------- labels
def test_missing_labels_may_be_marked_left_out_or_none() -> None:
    data, _ = clusters(20)
    recipe, x = m2(6, classes=2, latent=2, hidden=(5,)), data["x"]
    missing = torch.full((20,), -1)
    fits = [
        pg.fit(recipe, given, SVI(steps=5), seed=0)
        for given in ({"x": x, "y": missing}, {"x": x, "y": None}, {"x": x}, x)
    ]
    for fit in fits[1:]:
        assert fit.records["program_loss"] == pytest.approx(fits[0].records["program_loss"], abs=1e-12)
    assert set(fits[0].records["classifier"]) == {0.0}


def test_a_labelled_row_keeps_its_label_and_classes_are_drawn_as_asked() -> None:
    data, truth = clusters(40, labelled=5)
    fit = pg.fit(m2(6, classes=2, latent=1, hidden=(8,)), data, SVI(steps=400, lr=0.02, stratify="y"), seed=0)
    drawn = fit.posterior(draws=50)["y"]
    assert torch.equal(drawn[:, :10], truth[:10].expand(50, 10))
    swapped = fit.posterior({"x": data["x"], "y": 1 - truth}, draws=5)["y"]
    assert torch.equal(swapped, (1 - truth).expand(5, 40)), "a label is taken at its word"
    for label in (0, 1):
        rows = fit.sample(300, given={"y": label})
        assert set(rows["y"].tolist()) == {label}
        left, right = rows["x"][:, :3].mean(), rows["x"][:, 3:].mean()
        assert (left - right if label == 0 else right - left) > 0.4  # 0.8 in truth, known to 0.02
    style = torch.tensor([0.7], dtype=torch.float64)
    pair = fit.sample(4, given={"y": torch.tensor([0, 1, 0, 1]), "z": style})
    assert pair["y"].tolist() == [0, 1, 0, 1] and torch.equal(pair["z"], style.expand(4, 1))
    assert pair["x"].shape == (4, 6)


def errors(fit: pg.Fit, data: dict[str, Tensor], truth: Tensor) -> float:
    guess = fit.posterior({"x": data["x"]}, draws=50)["y"].double().mean(0).round().long()
    return float((guess != truth).double().mean())


def test_unlabelled_rows_help() -> None:
    """Twelve pixels, one in five flipped; the two labelled rows differ in four of them and tell nothing of the rest."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(200) % 2
    kind = torch.tensor([[1.0] * 6 + [0.0] * 6, [0.0] * 6 + [1.0] * 6], dtype=torch.float64)
    x = (kind[truth] - (torch.rand(200, 12, generator=generator) < 0.2).double()).abs()
    x[0] = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0])
    x[1] = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1])
    data = {"x": x, "y": torch.where(torch.arange(200) < 2, truth, -1)}
    recipe = m2(12, classes=2, latent=1, hidden=(16,), alpha=1.0, activation="softplus")
    algorithm = SVI(steps=300, lr=0.02)
    assert errors(pg.fit(recipe, data, STILL, seed=0), data, truth) > 0.3, "nothing is known before training"
    few = {name: value[:2] for name, value in data.items()}
    alone = errors(pg.fit(recipe, few, algorithm, seed=0), data, truth)
    together = errors(pg.fit(recipe, data, algorithm, seed=0), data, truth)
    # Twelve pixels err in 1.2 % of rows (7 or more flips, half of those with 6), four in 10 %, each known to 2 %.
    assert together < 0.05 < 0.07 < alone


# -------------------------------------------------------------------------------------------- M1 and M1+M2
@pytest.fixture(scope="module")
def stage() -> pg.Fit:
    data, _ = clusters(60)
    return pg.fit(m1(6, latent=2, hidden=(8,)), data["x"], SVI(steps=400, lr=0.02), seed=0)


def test_codes_of_m1_feed_a_classifier_of_scikit_learn(stage: pg.Fit) -> None:
    from sklearn.linear_model import LogisticRegression

    data, truth = clusters(60, labelled=5)
    assert stage.program.name == "m1"
    codes = stage.module("encoder")(data["x"]).mean.detach()
    assert codes.shape == (60, 2)
    learned = LogisticRegression(C=100.0).fit(codes[:10].numpy(), truth[:10].numpy())
    blank = pg.fit(m1(6, latent=2, hidden=(8,)), data["x"], STILL, seed=0).module("encoder")(data["x"]).mean.detach()
    assert float(blank.var(0).max()) < 0.3 * float(codes.var(0).max()), "codes before training are near each other"
    # In 60 rows about one has three pixels of six flipped.
    assert float((learned.predict(codes.numpy()) == truth.numpy()).mean()) > 0.9


def test_m1_m2_leaves_m1_as_it_was(stage: pg.Fit, tmp_path: Any) -> None:
    data, truth = clusters(60, labelled=3)
    before = {name: value.clone() for name, value in stage.params.items()}
    recipe = m1_m2(stage, classes=2, latent=1, hidden=(8,), alpha=0.5)
    assert errors(pg.fit(recipe, data, STILL, seed=0), data, truth) > 0.3
    fit = pg.fit(recipe, data, SVI(steps=250, lr=0.02), seed=0)
    assert errors(fit, data, truth) < 0.1
    for name, own in (("features", "encoder"), ("pixels", "decoder")):
        ours, theirs = fit.module(name).state_dict(), stage.module(own).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert not [key for key in fit.params if key.startswith(name)], "not trained"
    assert all(torch.equal(stage.params[name], value) for name, value in before.items())
    assert {"y", "z1", "z2"} <= fit.posterior(draws=2).keys()
    rows = fit.sample(300, given={"y": 0})["x"]
    assert rows[:, :3].mean() - rows[:, 3:].mean() > 0.3
    assert fit.sample(3, given={"y": 1, "z2": torch.zeros(1)})["z1"].shape == (3, 2)
    fit.save(tmp_path / "fit")
    again = pg.load(tmp_path / "fit", program=recipe)
    assert torch.equal(again.evidence(particles=5).values, fit.evidence(particles=5).values)


def test_units_that_m1_left_inactive_keep_their_prior() -> None:
    data, truth = clusters(60, labelled=3)
    first = pg.fit(m1(6, latent=4, hidden=(8,)), data["x"], SVI(steps=600, lr=0.02), seed=0)
    active = active_units(first).active
    assert 0 < int(active.sum()) < 4, "two clusters take one unit or two"
    fit = pg.fit(m1_m2(first, classes=2, latent=1, hidden=(8,), alpha=0.5), data, SVI(steps=250, lr=0.02), seed=0)
    assert errors(fit, data, truth) < 0.1
    z2, y = torch.linspace(-2, 2, 5).double()[:, None], torch.tensor([0, 1, 0, 1, 0])
    codes = fit.module("decoder")(z2, y)
    assert bool((codes.mean[:, ~active] == 0).all()) and bool((codes.stddev[:, ~active] == 1).all())
    assert bool((codes.mean[:, active] != 0).all())
    z1 = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).double()
    for unit in range(4):
        moved = z1 + 3.0 * (torch.arange(4) == unit)
        for name, labels in (("classifier", ()), ("encoder", (torch.arange(20) % 2,))):
            network = fit.module(name)
            before, after = (
                q.logits if name == "classifier" else q.mean for q in (network(z1, *labels), network(moved, *labels))
            )
            assert torch.equal(before, after) != bool(active[unit]), (name, unit)


def test_grey_rows_are_taken_where_m1_was_trained_on_zeros_and_ones(stage: pg.Fit) -> None:
    data, truth = clusters(60, labelled=3)
    grey = {"x": 0.1 + 0.8 * data["x"], "y": data["y"]}
    recipe = m1_m2(stage, classes=2, latent=1, hidden=(8,), alpha=0.5)
    fit = pg.fit(recipe, grey, SVI(steps=250, lr=0.02), seed=0)
    assert errors(fit, grey, truth) < 0.1
    with pytest.raises(ValueError, match="at site 'x'"):
        pg.fit(recipe, {"x": 2 * data["x"], "y": data["y"]}, STILL)
    assert pg.fit(recipe, data, STILL, seed=0).info.sites["x"].distribution == "Bernoulli", "unchanged by grey rows"


# ------------------------------------------------------------------------------------------------ refusals
def test_settings_and_labels_out_of_range_are_refused(stage: pg.Fit) -> None:
    x = torch.zeros(4, 6)
    for arguments, message in (
        ({"classes": 1}, "classes: expected at least 2"),
        ({"classes": 2, "alpha": -0.1}, "alpha: expected a finite number of at least 0"),
        ({"classes": 2, "alpha": True}, "alpha"),
        ({"classes": 2, "latent": 0}, "latent"),
        ({"classes": 2, "hidden": (0,)}, "hidden"),
        ({"classes": 2, "activation": "step"}, "activation"),
    ):
        for made in (lambda a: m2(6, **a), lambda a: m1_m2(stage, **a)):
            with pytest.raises(ValueError, match=message):
                made(arguments)
    with pytest.raises(ValueError, match="features: expected a whole number"):
        m2((6,), classes=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="likelihood: expected one of"):
        m1(6, likelihood="poisson")  # type: ignore[arg-type]
    for recipe in (m2(6, classes=2, hidden=(4,)), m1_m2(stage, classes=2, hidden=(4,))):
        for labels, message in (
            (torch.tensor([0, 1, 2, -1]), "from 0 to 1 .-1: missing., got 2 at row 2"),
            (torch.tensor([0, -2, 1, -1]), "got -2 at row 1"),
            (torch.tensor([0.0, 1.0, 0.0, 1.0]), "one integer label per row, got torch.float32"),
            (torch.zeros(4, 2).long(), r"of shape \(4, 2\)"),
        ):
            with pytest.raises(ValueError, match=message):
                pg.fit(recipe, {"x": x, "y": labels}, STILL)
        with pytest.raises(ValueError, match=r"made for rows of shape \(6,\)"):
            pg.fit(recipe, {"x": x[:, :5]}, STILL)
    with pytest.raises(ValueError, match="m1 was made for rows of shape"):
        pg.fit(m1(6, hidden=(4,)), x[:, :5], STILL)
    with pytest.raises(pg.IncompatibleError, match="no gradient to the guide's site.s. 'y'"):
        pg.fit(m2(6, classes=2, hidden=(4,)), x, SVI(IWAE(), steps=1))


def test_labels_given_out_of_range_are_refused_by_name(stage: pg.Fit) -> None:
    data, _ = clusters(20)
    fit = pg.fit(m2(6, classes=2, latent=1, hidden=(4,)), data, STILL, seed=0)
    assert fit.sample(3, given={"y": 1})["y"].tolist() == [1, 1, 1]
    for wrong in (2, -1, 0.5, torch.tensor([0, 1, 2])):
        with pytest.raises(
            ValueError, match="^given: 'y': got a value outside of the support of its Categorical"
        ) as caught:
            fit.sample(3, given={"y": wrong})
        assert "\n" not in str(caught.value)
    told = pg.fit(vae(6, latent=1, hidden=(4,), classes=2), {"x": data["x"], "y": torch.arange(20) % 2}, STILL, seed=0)
    with pytest.raises(ValueError, match="given: the program 'vae' cannot be run on the values of y"):
        told.sample(3, given={"y": 2})


def test_m1_m2_takes_fits_of_m1_alone(stage: pg.Fit) -> None:
    images = torch.zeros(4, 1, 2, 3)
    folded = pg.fit(vae((1, 2, 3), latent=1, hidden=(4,), network="convolutional"), images, STILL)
    labelled = {"x": torch.zeros(4, 6), "y": torch.tensor([0, 1, 0, 1])}
    given = pg.fit(vae(6, latent=1, hidden=(4,), classes=2), labelled, STILL)
    for wrong, got in ((folded, "a fit of 'vae'"), (given, "a fit of 'vae'"), (3, "int")):
        with pytest.raises(TypeError, match=f"m1: expected a fit of m1 .*, got {got}"):
            m1_m2(wrong, classes=2)  # type: ignore[arg-type]
    plain = pg.fit(vae(6, latent=1, hidden=(4,)), torch.zeros(4, 6), STILL)
    assert repr(m1_m2(plain, classes=2, latent=3)) == "Recipe(m1_m2, m1='vae', classes=2, latent=3)"
