"""A recurrent network over symbols, and the distribution of sequences that it defines: one pass, or step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

from ppl_gen.errors import is_number, require_whole

__all__ = ["RNN_CELLS", "AutoregressiveRows", "CharacterNetwork", "check_codes"]

RNN_CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class CharacterNetwork(nn.Module):
    """Recurrent cells between a table of inputs, a row for each symbol and one for the start, and logits of the next.

    Weights start as torch draws them, but an LSTM's forget gates with bias 1 (Jozefowicz, Zaremba and Sutskever 2015).

    Args:
        symbols: V; codes are 0, 1, ... V - 1, and V stands for the start of a sequence.
        cell: "rnn" (tanh), "lstm" or "gru".
        hidden: width of each layer.
        layers: layers of cells, each reading the states of the one below.
        embedding: length of a learned vector for each symbol; None: indicators of the symbols, V + 1 long.
    """

    table: Tensor

    def __init__(self, symbols: int, cell: str, hidden: int, layers: int, embedding: int | None) -> None:
        super().__init__()
        self.symbols = symbols
        if embedding is None:
            self.register_buffer("table", torch.eye(symbols + 1))
        else:
            self.table = nn.Parameter(torch.randn(symbols + 1, embedding))
        self.cell = RNN_CELLS[cell](self.table.shape[1], hidden, layers, batch_first=True)
        self.output = nn.Linear(hidden, symbols)
        if cell == "lstm":
            for layer in range(layers):  # its two biases are added up; the gates' order: input, forget, cell, output
                nn.init.ones_(getattr(self.cell, f"bias_ih_l{layer}").data[hidden : 2 * hidden])
                nn.init.zeros_(getattr(self.cell, f"bias_hh_l{layer}").data[hidden : 2 * hidden])

    def forward(self, codes: Tensor) -> Tensor:
        """Logits of every symbol given those before it: ... x time -> ... x time x V."""
        flat = codes.reshape(-1, codes.shape[-1])
        before = torch.cat([self.start(len(flat)), flat[:, :-1]], 1)
        states, _ = self.cell(embedding(before, self.table))
        logits: Tensor = self.output(states)
        return logits.reshape(*codes.shape, self.symbols)

    def start(self, rows: int) -> Tensor:
        """The code of the start of a sequence: rows x 1."""
        return torch.full((rows, 1), self.symbols, dtype=torch.int64, device=self.output.weight.device)

    def step(self, codes: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Read codes (rows x time) and go on from ``state``: logits of the symbol that follows, rows x V, and state."""
        states, state = self.cell(embedding(codes, self.table), state)
        return self.output(states[:, -1]), state

    @torch.no_grad()
    def draw(
        self,
        rows: int,
        length: int,
        temperature: float = 1.0,
        prompt: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Rows x length by ancestral sampling; see `generate`. Draws from the global generator unless given one."""
        read, state, drawn = self.start(rows), None, []
        if prompt is not None:
            read = torch.cat([read, prompt.to(read).expand(rows, -1)], 1)
        for _ in range(length):
            logits, state = self.step(read, state)
            read = _chosen(logits, temperature, generator)
            drawn.append(read)
        return torch.cat(drawn, 1)

    def generate(
        self,
        rows: int,
        length: int,
        *,
        temperature: float = 1.0,
        prompt: Tensor | Sequence[int] | None = None,
        seed: int = 0,
    ) -> Tensor:
        r"""Sequences from the model, or ways to go on from a prompt: rows x length, the prompt not repeated.

        .. math:: x_t \sim \mathrm{softmax}(\mathrm{logits}(x_{<t}) / \tau)

        Args:
            rows: how many.
            length: symbols of each; may exceed the length of the sequences learned from.
            temperature: tau; 1 samples the model, less sharpens each choice, 0 takes the likeliest symbol.
            prompt: codes that all rows begin with, (time,).
            seed: of the draws; the global generators are left alone.

        Raises:
            ValueError: for an argument out of its range, or a prompt that is not a row of codes 0 ... V - 1.
        """
        require_whole("rows", rows)
        require_whole("length", length)
        if not is_number(temperature) or not 0 <= temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature!r}")
        if prompt is not None:
            prompt = torch.as_tensor(prompt)
            if prompt.dim() != 1 or (len(prompt) and prompt.is_floating_point()):
                raise ValueError(f"prompt: expected whole numbers, (time,), got {prompt.dtype}, {tuple(prompt.shape)}")
            check_codes("prompt", prompt, self.symbols)
        generator = torch.Generator(self.output.weight.device).manual_seed(seed)
        return self.draw(rows, length, temperature, prompt, generator)


def _chosen(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One symbol of each row, rows x 1, from logits rows x V."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # The largest logit is zero first, so that a tiny temperature leaves no difference of infinities.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)


class AutoregressiveRows(dist.TorchDistribution):
    """Sequences of given lengths, each a whole event: their density by one pass, draws symbol after symbol.

    Args:
        network: gives ``network(codes) -> logits`` of every symbol given those before it, and ``network.draw``.
        lengths: how many symbols of each sequence count; whatever stands beyond is ignored, and drawn as 0.
        time: size of the event, at least the largest length.

    Raises:
        ValueError: by ``log_prob`` (where Pyro's validation is on) for codes outside 0 ... V - 1; by ``sample`` for
            lengths beyond ``time``.

    Example:
        >>> network = CharacterNetwork(3, "gru", 4, 1, None)
        >>> rows = AutoregressiveRows(network, torch.tensor([2, 4]), 4)
        >>> rows.log_prob(rows.sample()).shape
        torch.Size([2])
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(self, network: CharacterNetwork, lengths: Tensor, time: int) -> None:
        self.network, self.lengths = network, lengths
        super().__init__(lengths.shape, torch.Size((time,)))

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.network.symbols - 1), 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> AutoregressiveRows:
        return AutoregressiveRows(self.network, self.lengths.expand(torch.Size(batch_shape)), self.event_shape[0])

    @property
    def active(self) -> Tensor:
        """Which places of the event count: batch shape x time."""
        return torch.arange(self.event_shape[0], device=self.lengths.device) < self.lengths.unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        active, top = self.active, self.network.symbols - 1
        if self._validate_args:
            check_codes("x", value.expand(torch.broadcast_shapes(value.shape, active.shape))[active], top + 1)
        codes = value.clamp(0, top)  # no state that counts reads what pads the end
        negative = cross_entropy(self.network(codes).flatten(0, -2), codes.flatten(), reduction="none")
        return -torch.where(active, negative.reshape(codes.shape), 0.0).sum(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape, time = torch.Size(sample_shape) + self.batch_shape, self.event_shape[0]
        longest = int(self.lengths.max())
        if longest > time:
            raise ValueError(
                f"lengths: expected at most {time}, the length of the sequences learned from, got {longest}; "
                'fit.module("network").generate(rows, length) draws as many symbols as you like'
            )
        drawn = self.network.draw(shape.numel(), time)
        return torch.where(self.active, drawn.reshape(*shape, time), 0)


def check_codes(name: str, codes: Tensor, symbols: int) -> None:
    """Raise TypeError, naming the argument, for no integers, and ValueError for codes not from 0 to ``symbols`` - 1."""
    if len(codes) and (codes.is_floating_point() or codes.dtype == torch.bool):
        raise TypeError(f"{name}: expected integer codes of symbols, got {codes.dtype}; see ppl_gen.data.text_rows")
    wrong = codes[(codes < 0) | (codes >= symbols)]
    if len(wrong):
        raise ValueError(f"{name}: expected codes from 0 to {symbols - 1}, got {int(wrong[0])}")
