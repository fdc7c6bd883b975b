"""One Markov chain: Pyro's NUTS kernel on a flat vector, its draws written into a table as they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer.mcmc import NUTS as PyroNUTS
from pyro.infer.mcmc.adaptation import BlockMassMatrix
from torch import Tensor

from ppl_gen.capture.replay import Recording
from ppl_gen.fitting.checkpoint import Checkpoint
from ppl_gen.inference.mcmc.kernel_state import kernel_state, load_kernel_state
from ppl_gen.inference.unconstrained import singular
from ppl_gen.workspace.isolation import generators, set_generators

__all__ = ["STATISTICS", "Chain", "DrawTable", "Function", "Metric", "sample_chain"]

#: What is kept of every draw beside its position.
STATISTICS = ("diverging", "energy", "lp", "acceptance_rate", "n_steps", "tree_depth", "step_size")

_LATENTS = "latents"
_EARLY_DEPTH = 8

Function = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Chain:
    """Everything that determines the draws of one chain.

    ``potential`` is a recording, or a function that needs ``modules`` swapped in around it. ``checkpoint`` is where it
    is kept as it goes, and may hold how far it has come.
    """

    potential: Recording | Function
    start: Tensor
    seed: int
    draws: int
    warmup: int
    thin: int
    target_accept: float
    mass: str
    max_tree_depth: int
    dtype: torch.dtype
    device: torch.device | None = None
    modules: tuple[tuple[str, torch.nn.Module], ...] = ()
    checkpoint: Checkpoint | None = None

    @property
    def done(self) -> int:
        """Iterations that its checkpoint holds."""
        return 0 if self.checkpoint is None or self.checkpoint.saved is None else int(self.checkpoint.saved["step"])

    @property
    def iterations(self) -> int:
        return self.warmup + self.draws * self.thin


class DrawTable:
    """The draws of a chain: row 0 holds counters, every other row a position followed by its `STATISTICS`."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    @classmethod
    def of(cls, chain: Chain, path: Path | None = None, mode: str = "w+") -> DrawTable:
        shape = (chain.draws + 1, len(chain.start) + len(STATISTICS))
        table = cls(np.zeros(shape) if path is None else np.memmap(path, np.float64, mode, shape=shape))  # type: ignore[call-overload]
        if chain.done and mode == "w+":
            assert chain.checkpoint is not None
            rows = chain.checkpoint.saved["rows"]
            table.rows[: len(rows)] = rows
        return table

    def count(self, kept: int, done: int, gradients: int, divergences: int) -> None:
        self.rows[0, :4] = kept, done, gradients, divergences

    @property
    def kept(self) -> int:
        return int(self.rows[0, 0])

    @property
    def done(self) -> int:
        return int(self.rows[0, 1])

    @property
    def gradients(self) -> int:
        return int(self.rows[0, 2])

    @property
    def divergences(self) -> int:
        return int(self.rows[0, 3])

    def positions(self, draws: int) -> np.ndarray:
        """draws x size of the unconstrained vector."""
        return np.array(self.rows[1 : draws + 1, : -len(STATISTICS)])

    def statistics(self, draws: int) -> dict[str, np.ndarray]:
        columns = np.array(self.rows[1 : draws + 1, -len(STATISTICS) :]).T
        return dict(zip(STATISTICS, columns, strict=True))


def _evaluated(u: Tensor, function: Function) -> Tensor:
    """The potential in the form in which Pyro asks for it: a scalar whose gradient autograd gives.

    Value and gradient g are known already, so the graph is that of u . g, with the value written over it.
    """
    try:
        value, gradient = function(u.detach())
    except RuntimeError as error:
        if not singular(error):
            raise
        # A step too long has left the region where a matrix can be factorised: Pyro counts NaN as a divergence.
        value, gradient = u.new_tensor(float("nan")), torch.zeros_like(u)
    result = torch.dot(u, gradient)
    result.detach().copy_(value)
    return result


class Metric(BlockMassMatrix):
    """Pyro's mass matrix with a regularisation that knows no units.

    Pyro (as Stan) shrinks the covariance of n draws towards 0.001 I, which swamps a posterior whose sd is 0.001 (a
    regression on many rows): its trajectories grow three times longer. Here it shrinks towards 0.001 of its own
    diagonal, and towards all of it while there are fewer draws than dimensions.
    """

    estimated = False

    def end_adaptation(self) -> None:
        estimates = {}
        for names, scheme in self._adapt_scheme.items():
            count, covariance = scheme.n_samples, scheme.get_covariance(regularize=False)
            variance = covariance if covariance.dim() == 1 else covariance.diagonal()
            if not bool((variance > 0).all()):  # a chain that has not moved has no units of its own
                estimates[names] = scheme.get_covariance(regularize=True)
                continue
            own = variance * max(1e-3, min(1.0, len(variance) / count) ** 2)
            own = own if covariance.dim() == 1 else own.diag()
            estimates[names] = (count * covariance + 5.0 * own) / (count + 5.0)
        self.inverse_mass_matrix = estimates
        self.estimated = True


class _Kernel(PyroNUTS):
    """Pyro's kernel, counting gradients and telling of each trajectory what ArviZ asks for."""

    def __init__(self, function: Function, chain: Chain) -> None:
        self.gradients, self.energy = 0, 0.0

        def potential(params: dict[str, Tensor]) -> Tensor:
            self.gradients += 1
            return _evaluated(params[_LATENTS], function)

        super().__init__(
            potential_fn=potential,
            full_mass=chain.mass == "dense",
            target_accept_prob=chain.target_accept,
            max_tree_depth=chain.max_tree_depth,
        )
        self.mass_matrix_adapter = self.metric = Metric()
        self.depth, self.warmup, self.taken = chain.max_tree_depth, chain.warmup, 0
        self.initial_params = {_LATENTS: chain.start}

    def _sample_r(self, name: str) -> Any:
        r, unscaled = super()._sample_r(name)
        self.energy = float(self._kinetic_energy(unscaled) + self._potential_energy_last)
        return r, unscaled

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        # Before the mass matrix has been estimated once, long trajectories cost most of a run and teach little.
        early = not self.metric.estimated and self.taken < self.warmup
        self._max_tree_depth = min(self.depth, _EARLY_DEPTH) if early else self.depth
        self.taken += 1
        return super().sample(params)

    @property
    def mean_acceptance(self) -> float:
        """Since warm-up began, or ended."""
        return float(self._mean_accept_prob)

    @property
    def log_density(self) -> float:
        return -float(self._potential_energy_last)


def sample_chain(chain: Chain, function: Function, table: DrawTable, tick: Callable[[], None]) -> None:
    """Fill the table, one iteration of the kernel after another; go on where the chain's checkpoint stands.

    ``tick()`` may raise KeyboardInterrupt: what was drawn is kept.
    """
    if chain.done >= chain.iterations:
        return
    kernel, kept = _Kernel(function, chain), chain.checkpoint
    kernel.setup(chain.warmup)
    position = kernel.initial_params
    if kept is not None and kept.saved is not None:
        position = load_kernel_state(kernel, kept.saved["kernel"])
        set_generators(kept.saved["generators"])
    elif kept is not None:
        _write(kept, 0, kernel, table)
    for step in range(chain.done + 1, chain.iterations + 1):
        position = _advance(kernel, chain, position, step, table)
        try:
            tick()
        except KeyboardInterrupt:
            if kept is not None:
                _write(kept, step, kernel, table)
            raise
        if kept is not None and (step == chain.iterations or kept.due(step)):
            _write(kept, step, kernel, table)


def _advance(
    kernel: _Kernel, chain: Chain, position: dict[str, Tensor], step: int, table: DrawTable
) -> dict[str, Tensor]:
    """One iteration, its draw and its counts in the table."""
    before, acceptance, kept, known = kernel.gradients, kernel.mean_acceptance, table.kept, table.divergences
    position = kernel.sample(position)
    after_warmup, divergences = step - chain.warmup, known
    if after_warmup > 0:
        divergences = len(kernel.diagnostics()["divergences"])
        if after_warmup % chain.thin == 0:
            kept += 1
            steps = kernel.gradients - before
            # The kernel keeps a running mean only; its last term is this trajectory's own.
            own = after_warmup * kernel.mean_acceptance - (after_warmup - 1) * acceptance
            own = min(1.0, max(0.0, own))
            depth = steps.bit_length()
            statistics = divergences - known, kernel.energy, kernel.log_density, own, steps, depth, kernel.step_size
            table.rows[kept, : -len(STATISTICS)] = position[_LATENTS].detach().cpu().numpy()
            table.rows[kept, -len(STATISTICS) :] = statistics
    table.count(kept, step, kernel.gradients, divergences)
    return position


def _write(kept: Checkpoint, step: int, kernel: _Kernel, table: DrawTable) -> None:
    rows = np.array(table.rows[: table.kept + 1])
    write = kept.keep if step else kept.write
    write(step, {"step": step, "kernel": kernel_state(kernel), "generators": generators(), "rows": rows})
