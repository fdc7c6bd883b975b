r"""Character models: a recurrent network reads the symbols of a sequence so far and gives the odds of the next.

.. math:: \log p(x_{1:T} \mid T) = \sum_{t=1}^{T} \log p(x_t \mid x_{<t})
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import pyro
from torch import Tensor

from ppl_gen.arguments import require_choice
from ppl_gen.data.inputs import active_steps, check_width, sequences
from ppl_gen.errors import require_whole
from ppl_gen.fits.result import require_fit
from ppl_gen.nn.recurrent import RNN_CELLS, AutoregressiveRows, CharacterNetwork, check_codes
from ppl_gen.program.program import Program, Recipe

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["bits_per_character", "char_rnn"]


def char_rnn(
    symbols: int | None = None,
    *,
    cell: Literal["rnn", "lstm", "gru"] = "rnn",
    hidden: int = 128,
    layers: int = 1,
    embedding: int | None = None,
) -> Recipe:
    r"""A recurrent network over sequences of symbols 0, 1, ... V - 1 (sequences x time, integers).

    .. math:: \log p(x_{1:T} \mid T) = \sum_{t=1}^{T} \log \mathrm{softmax}(W s_t + b)_{x_t}, \quad
              s_t = \mathrm{cell}(e_{x_{t-1}}, s_{t-1}), \quad x_0 = \text{start}

    All T symbols are predicted, the first from the start alone; the length is given, and no end is predicted. One
    observed site ``x`` holds whole sequences inside the plate ``data``; its density is exact (``fit.evidence``, nats
    per sequence; `bits_per_character`). Sequences of unequal lengths are padded at their ends with any integer
    (negative ones too) and passed as ``{"x": x, "lengths": lengths}``, which is what `ppl_gen.data.text_rows` makes.
    Train it with ``SVI(clip_norm=...)``: gradients through many steps may explode.

    ``fit.sample(n)`` draws sequences of the lengths learned from, or of ``given={"lengths": ...}`` up to the longest of
    them. The network is ``network``: ``fit.module("network").generate(rows, length, temperature=0.7, prompt=codes)``
    draws at a temperature, to any length, on from a prompt.

    Args:
        symbols: V, at least 2; None: one more than the largest in the data, so that rows seen later hold no larger one.
        cell: "rnn": s_t = tanh(W e + U s + b); "lstm"; "gru".
        hidden: width of each layer.
        layers: layers of cells.
        embedding: length of the learned vectors e; None: indicators of the symbols.

    Returns:
        A recipe; it raises ValueError or TypeError for data that are no such sequences.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Finding structure in time (Elman, 1990). Long short-term memory (Hochreiter and Schmidhuber, 1997), with forget
        gates (Gers, Schmidhuber and Cummins, 2000). Learning phrase representations using RNN encoder-decoder (Cho et
        al., 2014) for the GRU. Generating text with recurrent neural networks (Sutskever, Martens and Hinton, 2011).

    Example:
        >>> import ppl_gen as pg
        >>> from ppl_gen.data import decoded, encoded, text_rows
        >>> from ppl_gen.inference import SVI
        >>> rows = text_rows("tick tock " * 20, length=20, alphabet=" cikot")
        >>> fit = pg.fit(char_rnn(6, cell="gru", hidden=16), rows, SVI(steps=200, lr=0.03, clip_norm=1.0), seed=0)
        >>> round(bits_per_character(fit), 1)
        0.0
        >>> likeliest = fit.module("network").generate(1, 7, temperature=0, prompt=encoded("tic", " cikot"))
        >>> decoded(likeliest, alphabet=" cikot")
        ['k tock ']
    """
    for name, value in (("hidden", hidden), ("layers", layers)):
        require_whole(name, value)
    check_width("symbols", symbols, 2)
    require_choice("cell", cell, RNN_CELLS)
    if embedding is not None:
        require_whole("embedding", embedding)

    def build(data: Any) -> Program:
        found = _checked_symbols(*sequences(data, "char_rnn"), symbols)
        return _program(
            CharacterNetwork(found, cell, int(hidden), int(layers), None if embedding is None else int(embedding))
        )

    arguments = {"symbols": symbols, "cell": cell, "hidden": hidden, "layers": layers}
    return Recipe(build, name="char_rnn", arguments=arguments)


def _checked_symbols(x: Tensor, active: Tensor, symbols: int | None) -> int:
    """How many symbols there are: ``symbols``, or as many as ``x`` (sequences x time) needs where ``active``."""
    found = max(2, int(x[active].max()) + 1) if symbols is None else int(symbols)
    check_codes(f"data: char_rnn(symbols={symbols})", x[active], found)
    return found


def _program(network: CharacterNetwork) -> Program:
    def rows(x: Tensor, lengths: Tensor | None) -> AutoregressiveRows:
        ends = x.new_full((len(x),), x.shape[1]) if lengths is None else lengths
        return AutoregressiveRows(network, ends, x.shape[1])

    def char_rnn(x: Tensor, lengths: Tensor | None = None) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("x", rows(x, lengths), obs=x)

    def evidence(x: Tensor, lengths: Tensor | None = None) -> Tensor:
        sequences({"x": x, "lengths": lengths}, "char_rnn")
        _checked_symbols(x, active_steps(x, lengths), network.symbols)
        return rows(x, lengths).log_prob(x)

    return Program(char_rnn, evidence=evidence)


def bits_per_character(fit: Fit, data: Any = None) -> float:
    r"""Mean code length of a symbol in bits, each predicted once from those before it in its own sequence.

    .. math:: -\frac{\sum_i \log p(x_i)}{\log 2 \, \sum_i T_i}

    The sum runs over all T_i symbols of each sequence, the first ones too; padding, and an end of the sequence, are not
    counted. A sequence knows nothing of the one before it, so cutting a text shorter raises the figure. It holds for
    every program of symbols with a density, a categorical `hidden_markov` as well.

    Args:
        fit: a fit of such a program.
        data: sequences, as ``x`` with ``lengths`` or alone; the training data when None.

    Raises:
        ValueError: for data without an entry x of sequences x time.
        IncompatibleError: if the program has no density.

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> coins = torch.arange(64).reshape(8, 8) % 2
        >>> fit = pg.fit(char_rnn(2, hidden=4), coins, SVI(steps=1, lr=1e-8), seed=0)
        >>> 0.8 < bits_per_character(fit) < 1.2
        True
    """
    require_fit(fit)
    batch = fit.dataset(data).batch()
    entries = {**dict(zip(["x"], batch.args, strict=False)), **batch.kwargs}
    _, active = sequences(entries, "bits_per_character")
    return -float(fit.evidence(data).values.double().sum()) / (math.log(2) * int(active.sum()))
