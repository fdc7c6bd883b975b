"""Character models against the cells' equations written out, sums over all sequences, and known bits per character."""

import itertools
import math

import pyro
import pytest
import torch
from scipy import stats

import ppl_gen as pg
from ppl_gen.data import decoded, encoded, text_rows
from ppl_gen.data.text import ALPHABET
from ppl_gen.inference import SVI, Adversarial
from ppl_gen.models import bits_per_character, char_rnn, hidden_markov
from ppl_gen.nn.recurrent import AutoregressiveRows, CharacterNetwork

RNN_CELLS = ("rnn", "lstm", "gru")
SHAPES = [(cell, layers, embedding) for cell in RNN_CELLS for layers, embedding in ((1, None), (2, 3))]


def made(symbols=4, cell="gru", hidden=5, layers=1, embedding=None, spread=1.0):
    """A network in float64 with weights large enough that all gates matter."""
    network = CharacterNetwork(symbols, cell, hidden, layers, embedding).double()
    for parameter in network.parameters():
        parameter.data = spread * torch.randn_like(parameter)
    return network


def every_sequence(symbols, time):
    return torch.tensor(list(itertools.product(range(symbols), repeat=time)))


def by_hand(network, kind, codes):
    """log p of one sequence: the equations of the cells, one symbol and one layer after the other."""
    weights, hidden = dict(network.cell.named_parameters()), network.cell.hidden_size
    states = [(torch.zeros(hidden, dtype=torch.float64),) * 2 for _ in range(network.cell.num_layers)]
    before, total = network.symbols, 0.0
    for code in codes:
        x = network.table[before]
        for layer, (h, c) in enumerate(states):
            read = weights[f"weight_ih_l{layer}"] @ x + weights[f"bias_ih_l{layer}"]
            kept = weights[f"weight_hh_l{layer}"] @ h + weights[f"bias_hh_l{layer}"]
            if kind == "rnn":
                h = torch.tanh(read + kept)
            elif kind == "lstm":
                i, f, g, o = (read + kept).split(hidden)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (r1, z1, n1), (r2, z2, n2) = read.split(hidden), kept.split(hidden)
                z = (z1 + z2).sigmoid()
                h = (1 - z) * torch.tanh(n1 + (r1 + r2).sigmoid() * n2) + z * h
            states[layer], x = (h, c), h
        total += (network.output.weight @ x + network.output.bias).log_softmax(0)[code]
        before = code
    return total


@pytest.mark.parametrize(("cell", "layers", "embedding"), SHAPES)
def test_density_is_the_product_of_the_conditionals(cell, layers, embedding) -> None:
    network = made(cell=cell, layers=layers, embedding=embedding)
    x, lengths = torch.randint(4, (6, 9)), torch.tensor([9, 1, 5, 9, 3, 8])
    rows = AutoregressiveRows(network, lengths, 9).log_prob(x)
    hand = torch.stack([by_hand(network, cell, row[:end]) for row, end in zip(x.tolist(), lengths, strict=True)])
    torch.testing.assert_close(rows, hand, rtol=0, atol=1e-10)  # 9 steps of sums of ten terms: 1e-14 and its growth
    logits, state, stepped = None, None, torch.zeros(6, dtype=torch.float64)
    read = network.start(6)
    for t in range(9):
        logits, state = network.step(read, state)
        read = x[:, t : t + 1]
        stepped += torch.where(t < lengths, logits.log_softmax(-1).gather(1, read)[:, 0], 0.0)
    torch.testing.assert_close(rows, stepped, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cell", RNN_CELLS)
@pytest.mark.parametrize("length", [1, 3, 4])
def test_probabilities_of_all_sequences_sum_to_one(cell, length) -> None:
    network = made(symbols=3, cell=cell)
    x = every_sequence(3, length)
    rows = AutoregressiveRows(network, torch.full((len(x),), length), length).log_prob(x)
    assert rows.std() > 0.1, "the sequences are not all alike"
    assert abs(float(rows.detach().logsumexp(0))) < 1e-12


@pytest.mark.parametrize("cell", RNN_CELLS)
def test_padding_changes_nothing(cell) -> None:
    network = made(cell=cell)
    x, lengths = torch.randint(4, (5, 6)), torch.tensor([6, 2, 4, 1, 3])
    rows = AutoregressiveRows(network, lengths, 6)
    value = rows.log_prob(x)
    gradients = torch.autograd.grad(value.sum(), list(network.parameters()))
    longer = torch.cat([x, torch.randint(4, (5, 3))], 1)
    for filled, time in (
        (torch.where(rows.active, x, -1), 6),
        (torch.where(rows.active, x, 999), 6),
        (torch.where(rows.active, x, (x + 1) % 4), 6),
        (longer, 9),
    ):
        again = AutoregressiveRows(network, lengths, time).log_prob(filled)
        torch.testing.assert_close(again, value, rtol=0, atol=1e-12)
        for one, two in zip(torch.autograd.grad(again.sum(), list(network.parameters())), gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    full = AutoregressiveRows(network, torch.full((5,), 6), 6).log_prob(x)
    assert (full[1:] < value[1:] - 0.1).all() and torch.equal(full[0], value[0]), "lengths do count"


def test_particles_in_front_share_the_value() -> None:
    network, x = made(), torch.randint(4, (5, 6))
    rows = AutoregressiveRows(network, torch.tensor([6, 2, 4, 1, 3]), 6)
    wide = rows.expand((7, 5))
    assert wide.sample().shape == (7, 5, 6) and wide.sample((2,)).shape == (2, 7, 5, 6)
    torch.testing.assert_close(wide.log_prob(x), rows.log_prob(x).expand(7, 5), rtol=0, atol=0)
    drawn = wide.sample()
    torch.testing.assert_close(wide.log_prob(drawn)[3], rows.log_prob(drawn[3]), rtol=0, atol=1e-12)


def frequencies_fit(drawn: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Pearson's chi-square of counts of cells, at a false-alarm rate of 1e-6; each cell expects at least 20."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    expected = len(drawn) * probabilities
    assert expected.min() > 20
    return float(((counts - expected) ** 2 / expected).sum()) < stats.chi2.isf(1e-6, len(probabilities) - 1)


@pytest.mark.parametrize("cell", RNN_CELLS)
def test_frequencies_of_samples_follow_the_density(cell) -> None:
    network = made(symbols=3, cell=cell, spread=0.3)
    every, places = every_sequence(3, 3), torch.tensor([9, 3, 1])
    rows = AutoregressiveRows(network, torch.full((20_000,), 3), 3)
    with torch.no_grad():
        exact = AutoregressiveRows(network, torch.full((27,), 3), 3).log_prob(every).exp()
    assert frequencies_fit((rows.sample() * places).sum(-1), exact)
    assert frequencies_fit((network.generate(20_000, 3, seed=1) * places).sum(-1), exact)
    assert not frequencies_fit((network.generate(20_000, 3, seed=1).flip(-1) * places).sum(-1), exact)
    shorter = AutoregressiveRows(network, torch.full((20_000,), 2), 3).sample()
    assert (shorter[:, 2] == 0).all()
    assert frequencies_fit((shorter[:, :2] * places[1:]).sum(-1), exact.reshape(9, 3).sum(-1))


def test_temperature_sharpens_each_choice_down_to_the_likeliest() -> None:
    network, prompt = made(spread=0.7), torch.tensor([2, 0, 3])
    with torch.no_grad():
        logits = network(torch.tensor([[2, 0, 3, 0]]))[0, -1]
    for temperature in (0.5, 1.0, 2.0):
        drawn = network.generate(20_000, 1, temperature=temperature, prompt=prompt, seed=4)[:, 0]
        assert frequencies_fit(drawn, (logits / temperature).softmax(-1))
        assert not frequencies_fit(drawn, (logits / (1.3 * temperature)).softmax(-1))
    best = network.generate(2, 12, temperature=0, prompt=prompt)
    whole = torch.cat([prompt.expand(2, -1), best], 1)
    assert torch.equal(network(whole).argmax(-1)[:, 3:], best), "each symbol is the likeliest after those before it"
    for temperature in (1e-4, 1e-30, 1e-320):
        assert torch.equal(network.generate(2, 12, temperature=temperature, prompt=prompt), best)
    assert not torch.equal(network.generate(2, 12, prompt=prompt), best)


def test_generating_repeats_from_its_seed_and_leaves_the_global_generator_alone() -> None:
    network, before = made(), torch.get_rng_state()
    first, again, other = (network.generate(3, 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    assert not network.generate(3, 20, seed=1).requires_grad


def test_forget_gates_start_open() -> None:
    network = CharacterNetwork(3, "lstm", 4, 2, None)
    for layer in (0, 1):
        both = getattr(network.cell, f"bias_ih_l{layer}") + getattr(network.cell, f"bias_hh_l{layer}")
        assert (both[4:8] == 1).all() and (both[:4] != 1).all() and (both[8:] != 1).all()


def uniform(symbols):
    """A program whose network is zero: every symbol is as likely as any other."""
    network = CharacterNetwork(symbols, "gru", 3, 1, None)
    for parameter in network.parameters():
        parameter.data.zero_()

    def model(x, lengths):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("x", AutoregressiveRows(network, lengths, x.shape[1]), obs=x)

    return model


def test_zero_weights_cost_the_logarithm_of_the_alphabet() -> None:
    rows = text_rows("So she sat on, with closed eyes.", length=9)
    # A step of 1e-30 leaves the weights zero to all digits of any sum.
    fit = pg.fit(uniform(len(ALPHABET)), rows, SVI(steps=1, lr=1e-30), dtype=torch.float64)
    assert abs(bits_per_character(fit) - math.log2(70)) < 1e-12
    assert abs(bits_per_character(fit, text_rows("Alice!", length=4)) - math.log2(70)) < 1e-12


@pytest.mark.parametrize("cell", RNN_CELLS)
def test_one_batch_is_learned_by_heart(cell) -> None:
    train = pg.load_data("alice", length=60)
    rows = {name: value[20:22] for name, value in train.items()}
    recipe = char_rnn(70, cell=cell, hidden=48)
    fresh = pg.fit(recipe, rows, SVI(steps=1, lr=1e-8), seed=0)
    rate = {"rnn": 0.01, "lstm": 0.03, "gru": 0.02}[cell]
    fit = pg.fit(recipe, rows, SVI(steps=200, lr=rate, clip_norm=1.0), seed=0)
    # No model of two different rows is below one bit a row: which of them it is has to be said.
    least = 2 / int(rows["lengths"].sum())
    assert least < 0.02
    assert bits_per_character(fresh) > 5
    assert least - 1e-4 < bits_per_character(fit) < 0.05


def test_bits_are_those_of_all_characters_of_the_rows() -> None:
    rows = text_rows("the cat sat on the mat; the rat sat on the cat", length=12)
    fit = pg.fit(char_rnn(70, hidden=6), rows, SVI(steps=3), seed=1)
    network = fit.module("network").double()
    nats = [-by_hand(network, "rnn", encoded(text).tolist()).item() for text in decoded(rows["x"], rows["lengths"])]
    # The fit works in float32: 46 terms of about 4 nats, each with a relative error of some 1e-6.
    assert abs(bits_per_character(fit) - sum(nats) / math.log(2) / 46) < 1e-4
    evidence = fit.evidence(rows)
    assert evidence.exact and evidence.kind == "exact"
    assert torch.allclose(-evidence.values, torch.tensor(nats).double(), atol=1e-3)


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_bits_of_another_program_of_symbols() -> None:
    rows = text_rows("abab" * 8, length=8, alphabet="ab")
    from ppl_gen.inference import EM

    fit = pg.fit(hidden_markov(2, emission="categorical"), rows, EM(), seed=0)
    total = float(fit.evidence().values.sum())
    assert bits_per_character(fit) == pytest.approx(-total / math.log(2) / 32, rel=1e-12)
    # Alternation is certain for two states, so four sequences cost at most the choice of a first state.
    assert bits_per_character(fit) < 0.2
    plain = {"x": rows["x"]}
    assert bits_per_character(fit, plain) == pytest.approx(bits_per_character(fit), rel=1e-12)


@pytest.fixture(scope="module")
def chained() -> pg.Fit:
    """A fit to texts that go round a, b, c, with lengths 3, 5 and 8."""
    rows = text_rows("abcabcab" * 3, length=8, alphabet="abc")
    lengths = torch.tensor([3, 5, 8])
    return pg.fit(char_rnn(3, cell="gru", hidden=8), {"x": rows["x"], "lengths": lengths}, SVI(steps=150, lr=0.05))


def test_new_rows_have_the_lengths_learned_from_or_those_given(chained: pg.Fit) -> None:
    drawn = chained.sample(60, seed=3)["x"]
    assert drawn.shape == (60, 8) and drawn.dtype == torch.int64
    assert (drawn[0::3, 3:] == 0).all() and (drawn[1::3, 5:] == 0).all() and drawn[2::3, 5:].any()
    # 150 steps leave every transition with far less than one in a thousand of another one.
    assert decoded(drawn[2::3], alphabet="abc").count("abcabcab") >= 19
    short = chained.sample(5, given={"lengths": 4})["x"]
    assert (short[:, 4:] == 0).all() and short[:, 1].any()
    each = chained.sample(2, given={"lengths": torch.tensor([1, 7])})["x"]
    assert (each[0, 1:] == 0).all() and each[1, 5:7].tolist() == [2, 0]
    with pytest.raises(ValueError, match="expected at most 8.*generate"):
        chained.sample(2, given={"lengths": 9})
    assert chained.predict(draws=2)["x"].shape == (2, 3, 8)


def test_text_goes_on_from_a_prompt(chained: pg.Fit) -> None:
    network = chained.module("network")
    longer = network.generate(2, 6, temperature=0, prompt=encoded("ab", "abc"))
    assert decoded(longer, alphabet="abc") == ["cabcab"] * 2
    assert decoded(network.generate(1, 5, temperature=0), alphabet="abc") == ["abcab"]
    assert decoded(network.generate(1, 5, temperature=0, prompt=[]), alphabet="abc") == ["abcab"]


def test_minibatches_and_saving(chained: pg.Fit, tmp_path) -> None:
    rows = text_rows("what is the use of a book without pictures", length=8)
    algorithm = SVI(steps=4, batch_size=2, clip_norm=1.0)
    first, again = (pg.fit(char_rnn(70, cell="lstm", hidden=4), rows, algorithm, seed=2) for _ in range(2))
    assert first.records == again.records
    loaded = pg.load(chained.save(tmp_path / "fit"), program=char_rnn(3, cell="gru", hidden=8))
    assert bits_per_character(loaded, chained.data.original) == bits_per_character(chained)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"symbols": 1}, "symbols: expected a whole number of at least 2, got 1"),
        ({"symbols": 2.0}, "symbols: expected a whole number"),
        ({"cell": "elman"}, "cell: expected one of 'rnn', 'lstm', 'gru', got 'elman'"),
        ({"hidden": 0}, "hidden: expected a whole number of at least 1, got 0"),
        ({"layers": True}, "layers: expected"),
        ({"embedding": 0}, "embedding: expected"),
    ],
)
def test_wrong_arguments_are_named(arguments, said) -> None:
    with pytest.raises(ValueError, match=said):
        char_rnn(**{"symbols": 3, **arguments})


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ({"x": torch.rand(3, 4)}, TypeError, "integer codes.*float32.*text_rows"),
        ({"x": torch.ones(3, 4, dtype=torch.bool)}, TypeError, "integer codes.*bool"),
        ({"x": torch.tensor([[0, 3]])}, ValueError, "symbols=3.*codes from 0 to 2, got 3"),
        ({"x": torch.tensor([[0, -1]])}, ValueError, "codes from 0 to 2, got -1"),
        ({"x": torch.tensor([0, 1])}, ValueError, "char_rnn takes sequences x time"),
        ({"x": torch.zeros(2, 3).long(), "lengths": torch.tensor([1, 4])}, ValueError, "lengths: .* from 1 to 3"),
        ({"x": torch.zeros(2, 3).long(), "lengths": torch.tensor([1])}, ValueError, "lengths: expected 2"),
        ({"text": torch.zeros(2, 3)}, ValueError, "reads the entry 'x'"),
    ],
)
def test_wrong_data_are_refused(chained: pg.Fit, data, error, said) -> None:
    with pytest.raises(error, match=said):
        pg.fit(char_rnn(3), data, SVI(steps=1))
    if "x" in data and "symbols" not in said and "expected 2" not in said and data["x"].dim() == 2:
        with pytest.raises(error, match=said):
            chained.evidence(data)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rows": 0}, "rows: expected"),
        ({"length": 0}, "length: expected"),
        ({"temperature": -1.0}, "temperature: expected a finite number of at least 0, got -1.0"),
        ({"temperature": math.nan}, "temperature: expected"),
        ({"prompt": [[1]]}, "prompt: expected whole numbers"),
        ({"prompt": [0.5]}, "prompt: expected whole numbers"),
        ({"prompt": [4]}, "prompt: expected codes from 0 to 3, got 4"),
    ],
)
def test_wrong_wishes_for_text_are_named(arguments, said) -> None:
    with pytest.raises(ValueError, match=said):
        made().generate(**{"rows": 1, "length": 2, **arguments})


def test_symbols_carry_no_gradient_so_there_is_no_game_of_samples() -> None:
    rows = text_rows("abcabc", length=3, alphabet="abc")
    with pytest.raises(pg.IncompatibleError, match="missing: .*differentiable samples"):
        pg.fit(char_rnn(3), rows, SVI(Adversarial("non-saturating"), steps=1))
