"""What samples show of a game: told apart, modes, repeats; and what the verdict makes of it."""

from __future__ import annotations

import math
import re
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from memory import Largest
from torch import nn

import ppl_gen as pg
from ppl_gen.diagnostics.game_verdicts import verdict_game
from ppl_gen.diagnostics.made_rows import RowsCompared, compare_rows, modes_covered
from ppl_gen.inference import EBGAN, SVI, Adversarial, ConditionalAdversarial, Divergence, Objective
from ppl_gen.models import gan


def _rows(seed: int, count: int = 500, columns: int = 2) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [1, 2, 20])
def test_rows_of_one_distribution_are_not_told_apart(columns: int) -> None:
    # z is a standard normal for large numbers: beyond 5 in one of 3 million; the seeds are fixed.
    found = [compare_rows(_rows(2 * s, columns=columns), _rows(2 * s + 1, columns=columns)) for s in range(5)]
    assert max(abs(one.z) for one in found) < 5
    # Each data row is covered with probability 1 - 2^-5 = 0.97, sd of the share over 500 rows at most 0.01.
    assert all(0.9 < one.coverage <= 1 and 0.85 < one.spread < 1.15 for one in found)
    assert all(one.repeated < 0.05 and one.copied < 0.05 and one.missed is None for one in found)
    assert all(one.nearer < 0.4 and not one.clinging for one in found)


def test_what_each_fault_looks_like() -> None:
    data = _rows(0)
    shifted = compare_rows(data, _rows(1) + 3.0)
    assert shifted.accuracy > 0.9 and shifted.z > 5 and shifted.coverage < 0.3
    narrow = compare_rows(data, 0.05 * _rows(1))
    assert narrow.spread < 0.06 and narrow.coverage < 0.3 and narrow.z > 5
    point = compare_rows(data, torch.zeros(500, 2) + 0.3)
    assert point.repeated == 1.0
    copies = compare_rows(data, data.clone())
    assert copies.copied > 0.98 and copies.accuracy < 0.1 and copies.z < -5
    half = compare_rows(torch.cat([_rows(2) - 5, _rows(3) + 5]), _rows(4, 1000) - 5)
    assert 0.4 < half.coverage < 0.6 and half.z > 5


@pytest.mark.parametrize("columns", [1, 2, 20])
@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_copies_with_a_little_noise_are_seen_and_missing_modes_are_no_copies(columns: int, noise: float) -> None:
    data = _rows(0, columns=columns)
    nearest = torch.cdist(data, data).fill_diagonal_(math.inf).min(1).values.median() / columns**0.5
    found = compare_rows(data, data + noise * nearest * _rows(1, columns=columns))
    assert found.clinging and found.nearer > 0.6
    verdict = verdict_game(found, {})
    assert "nearer to rows of the data than these to one another" in str(verdict) and "held_out" in verdict.advice
    assert not compare_rows(data, 0.5 * _rows(1, columns=columns)).clinging


def test_copies_are_looked_for_among_all_rows_of_the_data() -> None:
    data = _rows(0, 20_000)
    made = data[torch.randperm(20_000, generator=torch.Generator().manual_seed(1))[:500]]
    found = compare_rows(data, made)
    assert found.copied > 0.9 and abs(found.z) < 5, "among 500 rows of 20000 a copy seldom meets its source"
    assert compare_rows(data, _rows(2)).copied < 0.05


def test_rows_far_from_zero_are_compared_as_others_are() -> None:
    data, made = _rows(0, 100).double(), _rows(1, 100).double()
    near, far = compare_rows(data, made), compare_rows(data + 1e8, made + 1e8)
    assert abs(near.accuracy - far.accuracy) < 0.02 and abs(near.nearer - far.nearer) < 0.02


def test_rows_of_zeros_and_ones_may_repeat_each_other() -> None:
    data, made = ((_rows(seed, columns=3) > 0).float() for seed in (0, 1))
    found = compare_rows(data, made)
    assert abs(found.z) < 5 and found.repeated == 0.0 and found.copied < 0.05
    assert compare_rows(data, torch.ones(500, 3)).z > 5


def test_labels_that_made_rows_leave_out_are_named() -> None:
    labels = torch.arange(500) % 4
    data = _rows(0) * 0.1 + torch.stack([labels // 2, labels % 2], 1)
    made = data[labels != 2] + 0.05 * _rows(1)[labels != 2]
    found = compare_rows(data, made, labels=labels)
    assert found.missed == (2,) and found.labels == 4
    assert compare_rows(data, data + 0.05 * _rows(1), labels=labels).missed == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(30, 2), torch.zeros(30, 3)),
            r"made: expected rows of shape \(2,\), as those of data, got \(3,\)",
        ),
        ((torch.zeros(30, 2), torch.zeros(5, 2)), "made: expected at least 20 rows, as of data, got 5 and 30"),
        ((torch.zeros(30, 2), torch.full((30, 2), math.nan)), "made: expected finite numbers"),
        ((torch.zeros(30, 2), torch.zeros(30, 2), torch.zeros(3)), "labels: expected a whole number for each of 30"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    data, made, *labels = arguments
    with pytest.raises(ValueError, match=message):
        compare_rows(data, made, labels=labels[0] if labels else None)


def test_modes_within_a_distance() -> None:
    modes = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    rows = torch.tensor([[0.1, 0.0], [0.0, 0.3], [4.0, 0.9], [2.0, 2.0]])
    assert modes_covered(rows, modes, 0.5) == (1, 0.5)
    assert modes_covered(rows, modes, 1.0) == (2, 0.75)
    with pytest.raises(ValueError, match="within: expected a positive number"):
        modes_covered(rows, modes, 0.0)
    with pytest.raises(ValueError, match="modes: expected modes x 2 numbers"):
        modes_covered(rows, modes[:, :1], 1.0)


# ------------------------------------------------------------------------------------------------------------ verdicts

ALIKE = RowsCompared(1000, 0.51, 0.6, 0.96, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("found", "accuracies", "grade", "words"),
    [
        (ALIKE, (0.6, 0.6), "doubtful", "neither evidence nor rare rows are vouched for"),
        (RowsCompared(1000, 0.99, 30.0, 0.1, 0.05, 0.0, 0.0), None, "do not trust", "has collapsed"),
        (RowsCompared(1000, 0.8, 20.0, 0.3, 0.9, 0.0, 0.0), None, "do not trust", "modes are missing;"),
        (RowsCompared(1000, 0.97, 20.0, 0.1, 0.9, 0.0, 0.0), None, "do not trust", "missing, or made rows are unlike"),
        (
            RowsCompared(1000, 0.7, 9.0, 0.9, 0.9, 0.0, 0.0),
            None,
            "doubtful",
            "tell 70% of made and observed rows apart",
        ),
        (RowsCompared(1000, 0.96, 9.0, 0.9, 0.9, 0.0, 0.0), None, "do not trust", "96%"),
        (RowsCompared(1000, 0.52, 1.0, 0.9, 0.9, 0.6, 0.0), None, "do not trust", "repeat another made row"),
        (RowsCompared(1000, 0.1, -9.0, 1.0, 1.0, 0.0, 0.9), None, "doubtful", "copy a row of the data"),
        (RowsCompared(1000, 0.5, 0.0, 0.9, 1.0, 0.0, 0.0, (3, 7), 10), None, "do not trust", "label(s) 3, 7 of 10"),
        (ALIKE, (1.0, 0.995), "doubtful", "the critic was right on 99.5% of the rows"),
        (RowsCompared(1000, 0.7, 9.0, 0.9, 0.9, 0.0, 0.0), (0.51, 0.5), "doubtful", "the critic was at chance"),
        ("", None, "doubtful", "the losses of a game do not show whether its samples are like the data"),
        ("rows with hidden entries were not compared", None, "doubtful", "hidden entries"),
    ],
)
def test_each_rule_on_games(
    found: RowsCompared | str, accuracies: tuple[float, float] | None, grade: str, words: str
) -> None:
    names = ("critic_accuracy_real", "critic_accuracy_fake")
    records = {} if accuracies is None else {n: [0.7] * 300 + [a] * 100 for n, a in zip(names, accuracies, strict=True)}
    verdict = verdict_game(found, records)
    assert verdict.grade == grade and words in verdict.reason and verdict.advice


def test_missing_modes_are_told_from_rows_that_are_unlike_the_data() -> None:
    numbers = torch.Generator().manual_seed(0)
    data = torch.randn(1000, 2, generator=numbers) + 8.0 * (torch.arange(1000)[:, None] % 8)
    modes = torch.tensor([0.0, 3.0, 7.0])[torch.arange(1000) % 3]
    missing = compare_rows(data, torch.randn(1000, 2, generator=numbers) + 8.0 * modes[:, None])
    # Three of eight are made: told apart 1 / (1 + 3/8) = 73 % of the time; standard error sqrt(0.73 * 0.27 / 2000) = 1 %.
    assert missing.coverage == pytest.approx(0.375, abs=0.03) and missing.accuracy == pytest.approx(0.73, abs=0.04)
    assert "modes are missing;" in verdict_game(missing, {}).reason
    shifted = compare_rows(data, data + torch.tensor([6.0, -6.0]))
    assert shifted.coverage < 0.5 and "or made rows are unlike the data" in verdict_game(shifted, {}).reason


@pytest.mark.parametrize(("rows", "said"), [(1.0, True), (1.3, False), (20.0, False)])
def test_an_entropy_without_neighbours_is_named(rows: float, said: bool) -> None:
    for found in (ALIKE, ""):
        verdict = verdict_game(found, {"effective_rows": [30.0] * 300 + [rows] * 100})
        assert ("the entropy pushed none apart: the energy is a critic's, no log density" in verdict.reason) is said
        assert verdict.grade == "doubtful" and "no log density" not in verdict_game(found, {}).reason


def _affine(x: torch.Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Delta(loc + scale * z), obs=x)


def test_the_verdict_on_a_game_tells_a_start_from_a_fit() -> None:
    x = 3.0 + 0.5 * torch.randn(2000, generator=torch.Generator().manual_seed(0))
    algorithm = SVI(Adversarial(), steps=400, batch_size=128, lr={"critic": 5e-3, "program": 2e-2})
    first, last = (pg.fit(_affine, x, SVI(Adversarial(), steps=1), seed=0), pg.fit(_affine, x, algorithm, seed=0))
    assert first.verdict.grade == "do not trust" and "apart" in str(first.verdict)
    assert last.verdict.grade == "doubtful"
    found = last.diagnose().attrs["rows_compared"]
    assert found.accuracy < 0.65 < 0.9 < first.diagnose().attrs["rows_compared"].accuracy
    assert last.verdict == last.verdict and "made rows" in last.verdict.reason


def test_labels_that_the_program_does_not_read_are_its_modes() -> None:
    labels = torch.arange(400) % 2
    x = torch.where(labels == 1, 5.0, -5.0) + torch.randn(400, generator=torch.Generator().manual_seed(0))

    def one_sided(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(5.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Delta(loc + z), obs=x)

    fit = pg.fit(one_sided, {"x": x, "y": labels}, SVI(Adversarial(), steps=1, lr=1e-6), seed=0)
    found = fit.diagnose().attrs["rows_compared"]
    assert found.missed == (0,) and found.labels == 2
    assert fit.verdict.grade == "do not trust"


def test_a_program_that_hands_out_the_rows_it_was_given_is_seen_however_many_they_are() -> None:
    data = _rows(0, 20_000)

    def remembering(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            at = pyro.sample("at", dist.Uniform(0.0, 1.0))
            rows = data[(at * len(data)).long().clamp(max=len(data) - 1)]
            pyro.sample("x", dist.Delta(rows + 1e-9 * loc, event_dim=1), obs=x)

    fit = pg.fit(remembering, data, SVI(Adversarial(), steps=1, batch_size=64), seed=0)
    assert "of the made rows copy a row of the data" in str(fit.verdict)


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # that the critic does not see what is read
def test_what_a_program_reads_comes_from_other_rows_than_it_is_compared_with() -> None:
    """Sorted by what is read: the first rows are no sample of it. Read off the same rows, near copies are no fault."""
    labels = torch.arange(3).repeat_interleave(300)
    x = 4.0 * labels + torch.randn(900, generator=torch.Generator().manual_seed(7))  # other numbers than the fit draws

    def given(x: torch.Tensor, y: torch.Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Delta(4.0 * y + scale * z), obs=x)

    fit = pg.fit(given, {"x": x, "y": labels}, SVI(Adversarial(), steps=1, lr=1e-9), seed=0)
    found = fit.diagnose().attrs["rows_compared"]
    assert found.count == 450 and abs(found.z) < 5 and found.coverage > 0.9 and not found.clinging

    def told(x: torch.Tensor, y: torch.Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.01))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Delta(y + scale * z), obs=x)

    y = 10 * torch.randn(900, generator=torch.Generator().manual_seed(1))
    x = y + 0.01 * torch.randn(900, generator=torch.Generator().manual_seed(2))
    fit = pg.fit(told, {"x": x, "y": y}, SVI(Adversarial(), steps=1, lr=1e-9), seed=0)
    found = fit.diagnose().attrs["rows_compared"]
    assert not found.clinging and found.copied < 0.2


def test_rows_of_few_values_repeat_by_chance():
    """Of 32 possible rows; before, one set of twenty in eight passed for a collapsed program."""
    for count in (20, 40, 100):
        for seed in range(40):
            numbers = torch.Generator().manual_seed(seed)
            found = compare_rows(*(torch.rand(2, count, 5, generator=numbers) < 0.4).double(), seed=seed)
            assert "repeat another" not in str(verdict_game(found, {}))
    numbers = torch.Generator().manual_seed(0)
    data = torch.randn(40, 5, generator=numbers)
    assert "repeat another" in str(verdict_game(compare_rows(data, data[:8].repeat(5, 1)), {}))


def test_comparing_many_rows_takes_the_memory_of_a_block_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data, made = _rows(0, 900), torch.cat([_rows(1, 700) + 0.3, _rows(2, 100)[:1].expand(200, 2)])
    labels = (data[:, 0] > 0).long() + (data[:, 1] > 1.5).long()
    found = []
    for numbers in (10**8, 20_000):
        monkeypatch.setattr("ppl_gen.diagnostics.made_rows._NUMBERS", numbers)
        with Largest() as largest:
            found.append((compare_rows(data, made, labels=labels), modes_covered(data, made[:50], within=0.1)))
        # Beside distances, one number of a few for each of two times 900 rows.
        assert (largest.numbers <= 20_000) is (numbers == 20_000)
    assert found[0] == found[1]
    told = found[0][0]
    assert told.z > 5 and told.repeated > 0.1 and told.labels == 3 and found[0][1][1] > 0


def test_what_is_found_is_what_all_pairs_say() -> None:
    data, made = _rows(0, 60), 1.5 * _rows(1, 60)
    found = compare_rows(data, made)
    scale = data.double().std(0, correction=0)
    one, other = data.double() / scale, made.double() / scale
    pairs = torch.cdist(torch.cat([one, other]), torch.cat([one, other])).fill_diagonal_(math.inf)
    kind = torch.arange(120) >= 60
    assert found.accuracy == pytest.approx(float((kind[pairs.argmin(1)] == kind).double().mean()))
    ball = pairs[:60, :60].sort(1).values[:, 4]
    assert found.coverage == pytest.approx(float((pairs[:60, 60:].min(1).values <= ball).double().mean()))
    assert 0.5 < found.coverage < 1


@pytest.mark.parametrize(
    "objective",
    [
        Adversarial(),
        Adversarial("hinge"),
        Adversarial("kl", penalty="projection"),
        Adversarial(Divergence(lambda u: u * u.log(), name="mine")),
        Adversarial(penalty="r1"),
        Adversarial("wasserstein"),
        Adversarial("wasserstein", penalty="gradient"),
        ConditionalAdversarial(),
        ConditionalAdversarial(penalty="none"),
        EBGAN(),
        EBGAN(entropy=0.0),
        EBGAN(damping=0.1, energy_steps=3),
    ],
    ids=repr,
)
def test_where_modes_are_missing_the_advice_is_one_that_the_objective_accepts(objective: Objective) -> None:
    """Every call that it writes is one of the same objective, is no repetition of it, and plays."""
    data = _rows(0, 200) * 4
    program = gan(latent=2, hidden=(4,))
    fit = pg.fit(program, data, SVI(objective, steps=1, lr=1e-12), seed=0)
    fit.computed["rows compared"] = RowsCompared(200, 0.9, 20.0, 0.1, 0.1, 0.0, 0.0)
    advice = fit.verdict.advice
    assert fit.verdict.grade == "do not trust" and advice.startswith("Take ")
    name = type(objective).__name__
    written = re.findall(rf"\b{name}\([^()]*\)", advice)
    assert len(re.findall(r"\b[A-Z]\w+\(", advice)) == len(written), "calls of this objective alone"
    for call in written:
        other = eval(call, {name: type(objective)})  # what the library itself has written
        assert other != objective
        assert pg.fit(program, data, SVI(other, steps=1), seed=0).status == "finished"
    if "lr={" in advice:
        rates = eval(re.findall(r"lr=({.*?})", advice)[0])
        assert pg.fit(program, data, SVI(objective, steps=1, lr=rates), seed=0).status == "finished"


@pytest.mark.parametrize("kind", ["non-saturating", "wasserstein", Divergence(lambda u: u * u.log(), name="mine")])
def test_the_advice_for_a_critic_with_batch_norm_is_to_take_one_without(kind: Any) -> None:
    """A penalty refuses it."""
    critic = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    fit = pg.fit(gan(latent=2, hidden=(4,)), _rows(0, 200), SVI(Adversarial(kind, critic=critic), steps=1), seed=0)
    assert fit.notes["if modes are missing"].startswith("Take a critic without batch norm and ")
