"""Markov chains by Pyro's NUTS kernel, one after another or side by side in worker processes, with the same draws.

A chain is a function of its plan alone: its own seed, one thread, a potential that is loaded afresh. Each writes its
draws into a table as it goes (a memory-mapped file where it runs in a worker), so that progress is seen from outside and
an interrupted run keeps what was drawn.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from pickle import PicklingError
from typing import Any

import numpy as np
import torch
from pyro.infer.mcmc import NUTS as PyroNUTS
from pyro.infer.mcmc.adaptation import BlockMassMatrix
from torch import Tensor

from ppl_gen.inference.tape import Recording
from ppl_gen.isolation import Workspace, isolated, quiet

__all__ = ["STATISTICS", "Chain", "Table", "one_thread", "run_chains", "workers"]

#: What is kept of every draw beside its position.
STATISTICS = ("diverging", "energy", "lp", "acceptance_rate", "n_steps", "tree_depth", "step_size")

_LATENTS = "latents"
_EARLY_DEPTH = 8
_POLL = 0.2  # seconds between two looks at the workers
_IDLE = 60  # seconds that workers stay for the next fit
_WORTHWHILE = 6.0  # seconds: starting a worker costs about three, most of it importing torch and Pyro

Function = Callable[[Tensor], tuple[Tensor, ...]]
Report = Callable[["Sequence[Table]"], None]


@dataclass(frozen=True)
class Chain:
    """Everything that determines the draws of one chain.

    ``potential`` is a recording, or a function that needs ``modules`` swapped in around it.
    """

    potential: Recording | Function
    start: Tensor
    seed: int
    draws: int
    warmup: int
    thin: int
    target_accept: float
    full_mass: bool
    max_tree_depth: int
    dtype: torch.dtype
    device: torch.device | None = None
    modules: tuple[tuple[str, torch.nn.Module], ...] = ()

    @property
    def iterations(self) -> int:
        return self.warmup + self.draws * self.thin


class Table:
    """The draws of a chain: row 0 holds counters, every other row a position followed by its `STATISTICS`."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    @classmethod
    def of(cls, chain: Chain, path: Path | None = None, mode: str = "w+") -> Table:
        shape = (chain.draws + 1, len(chain.start) + len(STATISTICS))
        if path is None:
            return cls(np.zeros(shape))
        return cls(np.memmap(path, np.float64, mode, shape=shape))  # type: ignore[call-overload]

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


class _Evaluated(torch.autograd.Function):
    """The potential with its gradient already known, in the form in which Pyro asks for both."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, function: Function) -> Tensor:
        try:
            value, ctx.gradient = function(u.detach())  # TorchScript is slower on what requires a gradient
        except RuntimeError as error:
            if "singular" not in str(error) and "positive-definite" not in str(error):
                raise
            # A step too long has left the region where a matrix can be factorised: Pyro counts NaN as a divergence.
            value, ctx.gradient = u.new_tensor(float("nan")), torch.zeros_like(u)
        return value

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None  # of the potential itself, so the factor from outside is one


class _Metric(BlockMassMatrix):
    """Pyro's mass matrix with a regularisation that knows no units.

    Pyro (as Stan) shrinks the covariance of n draws towards 0.001 I, which swamps a posterior whose sd is 0.001 (a
    regression on many rows): its trajectories grow three times longer. Here it shrinks towards its own diagonal, by a
    weight that vanishes once there are many more draws than dimensions.
    """

    estimated = False

    def end_adaptation(self) -> None:
        estimates = {}
        for names, scheme in self._adapt_scheme.items():
            count, covariance = scheme.n_samples, scheme.get_covariance(regularize=False)
            variance = covariance if covariance.dim() == 1 else covariance.diagonal()
            weight = 5.0 / (count + 5.0) * min(1.0, len(variance) / count) ** 2
            own = weight * variance.clamp(min=torch.finfo(variance.dtype).tiny)
            shrunk = covariance * (count / (count + 5.0))
            estimates[names] = shrunk + (own if covariance.dim() == 1 else own.diag())
        self.inverse_mass_matrix = estimates
        self.estimated = True


class _Kernel(PyroNUTS):
    """Pyro's kernel, counting gradients and telling of each trajectory what ArviZ asks for."""

    def __init__(self, function: Function, chain: Chain) -> None:
        self.gradients, self.energy = 0, 0.0

        def potential(params: dict[str, Tensor]) -> Tensor:
            self.gradients += 1
            return _Evaluated.apply(params[_LATENTS], function)  # type: ignore[no-any-return,no-untyped-call]

        super().__init__(
            potential_fn=potential,
            full_mass=chain.full_mass,
            target_accept_prob=chain.target_accept,
            max_tree_depth=chain.max_tree_depth,
        )
        self.mass_matrix_adapter = self.metric = _Metric()
        self.depth = chain.max_tree_depth
        self.initial_params = {_LATENTS: chain.start}

    def _sample_r(self, name: str) -> Any:
        r, unscaled = super()._sample_r(name)
        self.energy = float(self._kinetic_energy(unscaled) + self._potential_energy_last)
        return r, unscaled

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        # Before the mass matrix has been estimated once, long trajectories cost most of a run and teach little.
        self._max_tree_depth = self.depth if self.metric.estimated else min(self.depth, _EARLY_DEPTH)
        return super().sample(params)  # type: ignore[no-any-return]

    @property
    def mean_acceptance(self) -> float:
        """Since warm-up began, or ended."""
        return float(self._mean_accept_prob)

    @property
    def log_density(self) -> float:
        return -float(self._potential_energy_last)


def _sample(chain: Chain, function: Function, table: Table, tick: Callable[[], None]) -> None:
    """Fill the table, one iteration of the kernel after another."""
    kernel = _Kernel(function, chain)
    kernel.setup(chain.warmup)
    position = kernel.initial_params
    kept = divergences = 0
    for step in range(1, chain.iterations + 1):
        before, acceptance = kernel.gradients, kernel.mean_acceptance
        position = kernel.sample(position)
        after_warmup = step - chain.warmup
        if after_warmup > 0:
            known, divergences = divergences, len(kernel.diagnostics()["divergences"])
            if after_warmup % chain.thin == 0:
                kept += 1
                steps = kernel.gradients - before
                # The kernel keeps a running mean only; its last term is this trajectory's own.
                own = after_warmup * kernel.mean_acceptance - (after_warmup - 1) * acceptance
                table.rows[kept, : -len(STATISTICS)] = position[_LATENTS].detach().cpu().numpy()
                table.rows[kept, -len(STATISTICS) :] = (
                    divergences - known, kernel.energy, kernel.log_density, own, steps, steps.bit_length(), kernel.step_size
                )  # fmt: skip
        table.count(kept, step, kernel.gradients, divergences)
        tick()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Chains share the cores, and sums split over threads would round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(chain: Chain, table: Table, tick: Callable[[], None]) -> None:
    with one_thread(), isolated(chain.seed, dtype=chain.dtype), quiet():
        if isinstance(chain.potential, Recording):
            _sample(chain, chain.potential.load(), table, tick)
        else:
            _sample(chain, chain.potential, table, tick)


def _work(chain: Chain, path: str) -> None:
    """What a worker does: one chain into one file."""
    with Workspace(device=chain.device, dtype=chain.dtype, modules=dict(chain.modules)):
        _run(chain, Table.of(chain, Path(path), "r+"), lambda: None)


def workers(chains: int, seconds: float, device: torch.device | None) -> int:
    """How many processes to use when the user leaves it open; the draws do not depend on it."""
    if chains == 1 or seconds < _WORTHWHILE or (device is not None and device.type != "cpu"):
        return 1
    from joblib import cpu_count
    from joblib.parallel import get_active_backend

    nested = get_active_backend()[0].nesting_level or multiprocessing.current_process().daemon
    return 1 if nested else min(chains, cpu_count())


def run_chains(chains: Sequence[Chain], processes: int, report: Report) -> tuple[list[Table], bool, str | None]:
    """Run all chains; ``report(tables)`` is called as they grow.

    Returns the tables, whether a KeyboardInterrupt ended the run, and why it ran in this process although more were asked
    for (None if it did not).
    """
    why = None
    if processes > 1:
        try:
            return *_side_by_side(chains, processes, report), None
        except _CannotTravel as error:
            why = f"the program cannot be sent to another process: {error}"
    return *_here(chains, report), why


class _CannotTravel(Exception):
    """A chain could not be written in this process, or read in another."""


def _here(chains: Sequence[Chain], report: Report) -> tuple[list[Table], bool]:
    tables = [Table.of(chain) for chain in chains]
    try:
        for chain, table in zip(chains, tables, strict=True):
            _run(chain, table, lambda: report(tables))
    except KeyboardInterrupt:
        return tables, True
    return tables, False


def _side_by_side(chains: Sequence[Chain], processes: int, report: Report) -> tuple[list[Table], bool]:
    # loky starts fresh interpreters that do not import the user's script, so that no __main__ guard is needed; forking a
    # process whose torch has used threads can hang.
    from joblib.externals.loky import get_reusable_executor

    with tempfile.TemporaryDirectory(prefix="ppl_gen-chains-", ignore_cleanup_errors=True) as folder:
        paths = [Path(folder) / f"chain{i}" for i in range(len(chains))]
        tables = [Table.of(chain, path) for chain, path in zip(chains, paths, strict=True)]
        executor = get_reusable_executor(max_workers=processes, timeout=_IDLE)
        interrupted = False
        try:
            _wait([executor.submit(_work, c, str(p)) for c, p in zip(chains, paths, strict=True)], tables, report)
        except BaseException as error:
            executor.shutdown(wait=True, kill_workers=True)
            if not isinstance(error, KeyboardInterrupt):
                raise
            interrupted = True
        return [Table(np.array(table.rows)) for table in tables], interrupted  # copies, as the files go


def _wait(futures: Sequence[Future[None]], tables: Sequence[Table], report: Report) -> None:
    from joblib.externals.loky import BrokenProcessPool
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    pending = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=_POLL, return_when="FIRST_COMPLETED")
        for future in finished:
            error = future.exception()
            if isinstance(error, TerminatedWorkerError):
                raise RuntimeError(
                    "a worker process that ran a chain has ended by itself, perhaps for lack of memory; try processes=1"
                ) from error
            if isinstance(error, PicklingError | BrokenProcessPool):
                raise _CannotTravel(str(error.__cause__ or error).strip().splitlines()[-1]) from error
            future.result()
        report(tables)
