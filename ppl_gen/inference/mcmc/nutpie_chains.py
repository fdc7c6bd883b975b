"""Chains by nutpie: its sampler, written in Rust, on a potential that was captured; in threads of this process.

Every chain has a sampler of its own, so that its draws follow from its start and its seed alone, whatever else runs.
Positions are noted as they are drawn: that is what progress counts and what an interrupt keeps. nutpie's extension is
loaded without its package, which would import ArviZ, pandas, PyArrow and Zarr, for seconds, to do what is done here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppl_gen.inference.mcmc.c_potential import FLAT, CPotential, Session
from ppl_gen.inference.mcmc.kernel import STATISTICS, Chain, DrawTable
from ppl_gen.inference.mcmc.potential import Potential
from ppl_gen.inference.unconstrained import singular
from ppl_gen.runtime.interrupts import check, hold
from ppl_gen.runtime.threads import torch_threads
from ppl_gen.workspace.isolation import isolated

__all__ = ["installed", "run_chains"]

_POLL = 0.02  # seconds between two looks at the chains
_VARIABLE = "drawn"  # nutpie wants to keep a variable for every draw: this one is always 0

Report = Callable[[Sequence[DrawTable]], None]
Logp = Callable[[np.ndarray], tuple[float, np.ndarray]]


def installed() -> bool:
    """Whether nutpie can be loaded."""
    try:
        _extension()
    except (ImportError, OSError):
        return False
    return True


@functools.cache
def _extension() -> Any:
    """nutpie's extension module, under the name that its package would give it.

    Raises:
        ImportError: where nutpie is not installed.
    """
    name = "nutpie._lib"
    if name in sys.modules:
        return sys.modules[name]
    package = importlib.util.find_spec("nutpie")
    places = [] if package is None else list(package.submodule_search_locations or ())
    found = sorted(path for place in places for path in Path(place).glob("_lib*") if path.suffix in (".so", ".pyd"))
    if not found:
        raise ImportError("nutpie is not installed")
    spec = importlib.util.spec_from_file_location(name, found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@dataclass(eq=False)
class _Running:
    """A chain under way. ``done`` counts its iterations, ``gradients`` its evaluations; ``error`` ended it."""

    chain: Chain
    table: DrawTable
    sampler: Any = None
    done: int = 0
    gradients: int = 0
    error: BaseException | None = None
    finished: bool = False
    session: Session | None = None

    def start(self, potential: Potential) -> None:
        lib, chain = _extension(), self.chain
        settings = lib.PyNutsSettings.Diag(chain.seed) if chain.mass == "diagonal" else _low_rank(lib, chain.seed)
        settings.num_tune, settings.num_draws, settings.num_chains = chain.warmup, chain.draws * chain.thin, 1
        settings.target_accept, settings.maxdepth = chain.target_accept, chain.max_tree_depth
        variables = lib.PyVariable.new_variables([_VARIABLE], ["float64"], [()], {}, {})
        begin = chain.start.detach().cpu().double().numpy()
        none, arrow = lib.ProgressType.none(), lib.PyStorage.arrow()
        if isinstance(potential.function, CPotential):
            made = self._of_addresses(lib, potential.function, variables, begin)
            self.sampler = lib.PySampler.from_pymc(settings, 1, made, none, arrow)
        else:
            made = self._of_functions(lib, potential.logp(chain), variables, begin)
            self.sampler = lib.PySampler.from_pyfunc(settings, 1, made, none, arrow)

    def _of_addresses(self, lib: Any, potential: CPotential, variables: Any, begin: np.ndarray) -> Any:
        """For functions in C, which count in a session."""
        chain, (density, drawn) = self.chain, potential.addresses
        self.session = Session(potential, self.table.rows, chain.warmup, chain.thin, chain.draws)
        place = ctypes.addressof(self.session)
        kept = (self.session, potential)
        called = lib.LogpFunc(density, place, kept), lib.ExpandFunc(len(begin), 1, drawn, place, kept)
        return lib.PyMcModel(*called, variables, len(begin), {}, {}, lambda seed: begin, None)

    def _of_functions(self, lib: Any, logp: Logp, variables: Any, begin: np.ndarray) -> Any:
        return lib.PyModel(
            lambda: functools.partial(self._logp, logp),
            lambda *seeds: self._draw,
            variables,
            len(begin),
            dim_sizes={},
            coords={},
            init_point_func=lambda seed: begin,
            transform_adapter=None,
        )

    def _logp(self, logp: Logp, u: np.ndarray) -> tuple[float, np.ndarray]:
        """An error in here, or no number at a point where there was one, would abort the Rust thread with a panic.

        So an error is kept for the main thread, which ends the chain; until then every point is out of reach.
        """
        self.gradients += 1
        if self.error is None:
            try:
                value, gradient = logp(u)
                return value, gradient if gradient.all() else np.where(gradient == 0.0, FLAT, gradient)
            except BaseException as error:
                if singular(error):  # a step too long, out of the region where a matrix can be factorised: a divergence
                    return float("nan"), np.zeros_like(u)
                self.error = error
        return _OUT_OF_REACH, np.ones_like(u)

    def _draw(self, u: np.ndarray) -> dict[str, np.ndarray]:
        self.done += 1
        after = self.done - self.chain.warmup
        if after > 0 and after % self.chain.thin == 0 and after // self.chain.thin <= self.chain.draws:
            kept = after // self.chain.thin
            self.table.rows[kept, : -len(STATISTICS)] = u
            self.table.count(kept, self.done, self.gradients, 0)
        else:
            self.table.rows[0, 1:3] = self.done, self.gradients
        return {_VARIABLE: _ZERO}

    def ended(self, seconds: float) -> bool:
        """Wait so long for its end; raises what ended it early."""
        try:
            self.sampler.wait(seconds)
            self.finished = True
        except TimeoutError:
            pass
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust's is no Exception
            self.finished = True
            told = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise self.error or RuntimeError(f'nutpie ended a chain: {told}; try sampler="pyro"') from None
        if self.error is not None:
            raise self.error
        if self.finished:
            self.collect()
        return self.finished

    def stop(self) -> None:
        """End it now; what it has drawn stays in the table."""
        self.sampler.abort()
        if self.error is None:
            self.collect()

    def collect(self) -> None:
        """Put the statistics of the draws beside their positions."""
        if self.session is not None:
            self.done, self.gradients = self.session.done, self.session.gradients
        _, statistics = self.sampler.take_results().get_arrow_trace()
        if not statistics:  # stopped before its first draw
            return
        found = statistics[0]
        chain, length = self.chain, min(found.num_rows, self.done)
        column = {name: found.column(name).to_numpy()[:length] for name in _COLUMNS}
        rows = slice(chain.warmup + chain.thin - 1, length, chain.thin)
        steps = column["n_steps"].astype(np.int64)
        values = {
            "diverging": column["diverging"],
            "energy": column["energy"] - column["energy_error"],  # when the trajectory began
            "lp": column["logp"],
            "acceptance_rate": column["mean_tree_accept"],
            "n_steps": steps,
            "tree_depth": np.frexp(steps.astype(float))[1],
            "step_size": column["step_size_bar"],
        }
        kept = len(range(*rows.indices(length)))
        for place, name in enumerate(STATISTICS, -len(STATISTICS)):
            self.table.rows[1 : kept + 1, place] = values[name][rows]
        divergences = int(column["diverging"][chain.warmup :].sum())
        self.table.count(kept, length, self.gradients, divergences)


_ZERO, _OUT_OF_REACH = np.zeros(()), -1e300
_COLUMNS = ("diverging", "energy", "energy_error", "logp", "mean_tree_accept", "n_steps", "step_size_bar")


def _low_rank(lib: Any, seed: int) -> Any:
    """A mass matrix of a diagonal and all directions whose variance differs from it by a factor of 2."""
    settings = lib.PyNutsSettings.LowRank(seed)
    settings.mass_matrix_eigval_cutoff = 2.0
    return settings


def run_chains(
    chains: Sequence[Chain], potential: Potential, threads: int, report: Report
) -> tuple[list[DrawTable], bool]:
    """Run all chains, so many at once; ``report(tables)`` is called as they grow.

    Returns the tables, and whether Ctrl-C, SIGTERM or a KeyboardInterrupt of ``report`` ended the run. A chain with a
    checkpoint is kept there when it has ended, and taken from there.
    """
    hold()  # from here on a signal ends the run between two looks, and what was drawn is kept
    tables = [DrawTable.of(chain) for chain in chains]
    waiting = [
        _Running(chain, table) for chain, table in zip(chains, tables, strict=True) if chain.done < chain.iterations
    ]
    for run in waiting:
        run.table.rows[:] = 0.0  # fewer draws than now were asked for: it begins again
    with torch_threads(1), isolated(chains[0].seed, dtype=chains[0].dtype):
        try:
            with _ending(waiting) as running:
                while running or any(not run.finished for run in waiting):
                    for run in [run for run in waiting if run.sampler is None][: threads - len(running)]:
                        run.start(potential)
                        running.append(run)
                    for run in [run for run in running if run.ended(_POLL / len(running))]:
                        running.remove(run)
                        _keep(run)
                    report(tables)
                    check()
        except KeyboardInterrupt:
            return tables, True
    return tables, False


@contextlib.contextmanager
def _ending(waiting: Sequence[_Running]) -> Iterator[list[_Running]]:
    """The chains that run; however the block is left, none runs on."""
    running: list[_Running] = []
    try:
        yield running
    finally:
        with contextlib.ExitStack() as stops:
            for run in running:
                if not run.finished:
                    stops.callback(run.stop)


def _keep(run: _Running) -> None:
    """Write a finished chain into its checkpoint."""
    if run.chain.checkpoint is not None:
        steps = run.chain.iterations
        run.chain.checkpoint.keep(steps, {"step": steps, "rows": np.array(run.table.rows)})
