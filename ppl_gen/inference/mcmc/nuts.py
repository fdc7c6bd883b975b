"""The No-U-Turn Sampler: several chains of nutpie's or Pyro's sampler on one program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ppl_gen.arguments import require_choice
from ppl_gen.capture.replay import Recording
from ppl_gen.errors import is_number, require_flag, require_whole
from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.fitting.checkpoint import Checkpoint
from ppl_gen.fitting.posteriors.chains import ChainPosterior
from ppl_gen.fitting.run import Ending, Outcome, Run
from ppl_gen.inference.mcmc import nutpie_chains
from ppl_gen.inference.mcmc.chains import run_chains, threads, workers
from ppl_gen.inference.mcmc.kernel import Chain, DrawTable
from ppl_gen.inference.mcmc.potential import Potential, captured
from ppl_gen.inference.mcmc.report import Report, counted
from ppl_gen.inference.mcmc.results import rectangle, relabelled, site_values, statistics
from ppl_gen.inference.mcmc.samplers import MASSES, SAMPLERS, Way, chosen
from ppl_gen.inference.mcmc.starts import beginnings
from ppl_gen.inference.unconstrained import NEEDS, Unconstrained
from ppl_gen.program.offers import Need
from ppl_gen.runtime.threads import torch_threads

__all__ = ["NUTS"]

_TREE_SECONDS = 3e-4  # the work of Pyro's kernel for each gradient (measured)
_TREE_STEPS = 10  # about so many gradients an iteration
_SHARED = 2e-3  # seconds of a gradient from which threads gain: of short ones, they wait for Python's lock (measured)
_DEEPEST = 20  # a million gradients for one draw


@dataclass(frozen=True)
class NUTS(Algorithm):
    r"""Draws from the posterior by Hamiltonian dynamics with self-tuned trajectories (Hoffman and Gelman 2014).

    .. math:: z^{(1)}, z^{(2)}, \ldots \to p(z \mid x)

    Moves in the density of the program over its unconstrained latent sites; finite discrete sites are summed out. The
    density is captured where the program allows it: replayed from a recording, or compiled where there is much to
    draw. nutpie draws the chains where it is installed, in threads; otherwise, or where the program cannot be captured,
    Pyro's kernel does, in worker processes. ``fit.cost`` says which ran, and why no faster one. The draws depend on the
    seed and the sampler alone, not on the number of threads or processes. Ctrl-C keeps what was drawn.

    Chains agree about a mode that all of them began in, so they begin dispersed. Of every two chains the first begins
    within 2 of the starting values of the program (or of ``start=``), in unconstrained units, or between 1 and 2 from 0
    without any; the second always does the latter, with another sign than the first in every number. Several modes
    then show as a large R-hat in `Fit.diagnose`; those that no chain comes near stay unseen. With exchangeable parts,
    let the program offer `relabel`.

    Args:
        draws: kept draws per chain.
        chains: how many chains; two or more are needed to see whether they agree.
        warmup: iterations that tune step size and mass matrix, then dropped.
        target_accept: the mean acceptance probability that the step size aims at; nearer 1 for fewer divergences.
        sampler: "nutpie", "pyro", or "auto": nutpie where it is installed and can be used.
        mass: the mass matrix: "diagonal"; "low_rank", a diagonal and the directions in which scales differ from it
            (nutpie alone); "dense" (Pyro's kernel alone); "auto": low-rank under nutpie, dense under Pyro's kernel.
        full_mass: True is ``mass="dense"``, False ``mass="diagonal"``.
        max_tree_depth: at most 2^depth - 1 gradients per iteration.
        jitter: None: dispersed, as said above. A number: all chains begin at most so far from the starting values, in
            unconstrained units. Below 1 they could hardly disagree, which ``fit.notes["starts"]`` then says.
        thin: keep one iteration in so many; ``draws`` are kept in any case.
        processes: chains that run at once, in threads under nutpie, in worker processes under Pyro's kernel; None: as
            many as there are cores where that gains: for large gradients in threads, for long runs in processes.

    Raises:
        ValueError: for settings out of range, or if 100 random starts have no finite density (the sites are named).
        MissingExtraError: for ``sampler="nutpie"`` where it is not installed.
        IncompatibleError: for ``sampler="nutpie"`` on a program that cannot be recorded.

    References:
        The No-U-Turn Sampler: adaptively setting path lengths in Hamiltonian Monte Carlo (Hoffman and Gelman, 2014).
        A conceptual introduction to Hamiltonian Monte Carlo (Betancourt, 2017).
        If only my posterior were normal: introducing Fisher HMC (Seyboldt et al., 2026), the warm-up of nutpie.

    Example:
        >>> import pyro, torch, ppl_gen as pg
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> fit = pg.fit(model, torch.tensor([1.0, 2.0, 3.0]), NUTS(draws=1000, warmup=200, chains=2), seed=0)
        >>> abs(float(fit.posterior()["loc"].mean()) - 2.0) < 0.2
        True
    """

    draws: int = 1000
    chains: int = 4
    warmup: int = 500
    target_accept: float = 0.9
    full_mass: bool | None = None
    max_tree_depth: int = 10
    jitter: float | None = None
    thin: int = 1
    processes: int | None = None
    sampler: str = "auto"
    mass: str = "auto"

    dtype: ClassVar[torch.dtype] = torch.float64
    vectors: ClassVar[bool] = True
    growing: ClassVar[Sequence[str]] = ("draws",)
    idle: ClassVar[Sequence[str]] = ("processes",)
    resumable: ClassVar[bool] = True
    needs: ClassVar[Sequence[Need]] = NEEDS

    def __post_init__(self) -> None:
        for name in ("draws", "chains", "warmup", "thin"):
            require_whole(name, getattr(self, name))
        require_whole("max_tree_depth", self.max_tree_depth, most=_DEEPEST)
        require_flag("full_mass", self.full_mass, optional=True)
        self._check_sampler()
        if self.processes is not None:
            require_whole("processes", self.processes)
        if not is_number(self.target_accept) or not 0.0 < self.target_accept < 1.0:
            raise ValueError(f"target_accept: expected a number between 0 and 1, got {self.target_accept!r}")
        if self.jitter is not None and not (is_number(self.jitter) and 0.0 <= self.jitter < math.inf):
            raise ValueError(f"jitter: expected a number of at least 0, or None, got {self.jitter!r}")
        for name in ("draws", "chains", "warmup", "max_tree_depth", "thin"):  # numpy's small integers would wrap round
            object.__setattr__(self, name, int(getattr(self, name)))

    def _check_sampler(self) -> None:
        for name, known in (("sampler", SAMPLERS), ("mass", MASSES)):
            require_choice(name, getattr(self, name), known)
        if self.full_mass is not None and self.mass not in ("auto", self.metric):
            raise ValueError(f"mass: expected {self.metric!r}, as full_mass={self.full_mass}, got {self.mass!r}")
        if {"nutpie": "dense", "pyro": "low_rank"}.get(self.sampler) == self.metric:
            raise ValueError(f"mass: {self.sampler} has no mass matrix {self.metric!r}; leave out mass or sampler")

    @property
    def metric(self) -> str:
        """The mass matrix that `mass` and `full_mass` ask for."""
        if self.full_mass is None:
            return self.mass
        return "dense" if self.full_mass else "diagonal"

    def run(self, run: Run) -> Outcome:
        """See `Algorithm.run`; raises KeyboardInterrupt if interrupted before anything was drawn."""
        saved, parts = self._begun(run)
        way = chosen(self.sampler, self.metric, run, saved)
        with torch_threads(1):
            density = Unconstrained(run.joint, run.data.batch(), run.info)
            starts, seeds = beginnings(run, density, self.chains, self.jitter)
            if parts and all(_steps_of(part) >= self.iterations for part in parts):
                potential = Potential(density.potential_and_gradient, way.path, way.path_reason)
            else:
                points = [*starts, 2.0 * starts[0], -starts[0]]
                # Pyro's kernel takes longer than any potential of few operations, and its processes cannot share code.
                gradients = self.chains * self.iterations * _TREE_STEPS if way.sampler == "nutpie" else 0
                potential = captured(run, density, points, gradients, way.path, threads=way.sampler == "nutpie")
                way = way.on(self.sampler, run, potential)
        if run.checkpoint is not None:
            run.checkpoint.write(0, {"draws": self.draws, **asdict(way)})
        chains = self._chains(run, way, potential, starts, seeds, parts)
        done = sum(chain.done for chain in chains if way.sampler == "pyro" or chain.done >= self.iterations)
        report = Report(run, self.chains, self.iterations, self.warmup, done)
        tables, interrupted = self._sampled(run, way, chains, potential, report)
        if run.checkpoint is not None:
            run.checkpoint.write(sum(table.done for table in tables), {"draws": self.draws, **asdict(way)})
        kept, length = rectangle(tables, self.draws)
        if not kept:
            raise KeyboardInterrupt
        return self._outcome(run, density, way.cost(potential), kept, length, tables, interrupted)

    @property
    def iterations(self) -> int:
        """Of one chain."""
        return self.warmup + self.draws * self.thin

    def _begun(self, run: Run) -> tuple[dict[str, Any], list[Checkpoint]]:
        """What the checkpoint says of the run, and that of each chain; empty without one.

        Raises:
            ValueError: where more draws were asked for before.
        """
        kept = run.checkpoint
        if kept is None:
            return {}, []
        saved = dict(kept.saved or {})
        draws = int(saved.get("draws", 0))
        if draws > self.draws:
            raise ValueError(
                f"checkpoint: it belongs to chains of {draws} draws, and now there are {self.draws}; give as many or "
                "more, or choose a new folder"
            )
        if not saved:
            kept.write(0, {"draws": self.draws})
        parts = [kept.part(f"chain {number}") for number in range(self.chains)]
        if saved:
            done = ", ".join(str(_steps_of(part)) for part in parts)
            run.notes["resumed"] = f"went on after {done} of {self.iterations} iterations"
        return saved, parts

    def _chains(
        self,
        run: Run,
        way: Way,
        potential: Potential,
        starts: list[Tensor],
        seeds: list[int],
        parts: list[Checkpoint],
    ) -> list[Chain]:
        program = not isinstance(potential.function, Recording)
        return [
            Chain(
                potential=potential.function,
                start=start,
                seed=seed,
                draws=self.draws,
                warmup=self.warmup,
                thin=self.thin,
                target_accept=self.target_accept,
                mass=way.mass,
                max_tree_depth=self.max_tree_depth,
                dtype=run.dtype,
                device=run.data.device,
                modules=tuple(run.workspace.modules.items()) if program else (),
                checkpoint=parts[number] if parts else None,
            )
            for number, (start, seed) in enumerate(zip(starts, seeds, strict=True))
        ]

    def _sampled(
        self, run: Run, way: Way, chains: list[Chain], potential: Potential, report: Report
    ) -> tuple[list[DrawTable], bool]:
        """What the chains drew, and whether they were interrupted."""
        if way.sampler == "nutpie":
            at_once = threads(self.chains) if potential.path == "c" or potential.each > _SHARED else 1
            return nutpie_chains.run_chains(chains, potential, self.processes or at_once, report)
        seconds = 0.0 if all(chain.done >= chain.iterations for chain in chains) else potential.seconds_each(chains[0])
        estimate = self.chains * self.iterations * _TREE_STEPS * (seconds + _TREE_SECONDS)
        processes = self.processes or workers(self.chains, estimate, run.data.device)
        if potential.path == "inductor":  # what is compiled stays in this process
            processes = 1
        tables, interrupted, here = run_chains(chains, processes, report)
        if here is not None:
            run.notes["processes"] = f"the chains ran one after another: {here}"
        return tables, interrupted

    def _outcome(
        self,
        run: Run,
        density: Unconstrained,
        cost: dict[str, float | str],
        kept: list[DrawTable],
        length: int,
        tables: list[DrawTable],
        interrupted: bool,
    ) -> Outcome:
        positions = np.concatenate([table.positions(length) for table in kept])
        draws = relabelled(run, site_values(run, density, positions))
        divergences = sum(table.divergences for table in tables)
        if run.validation is not None:
            run.notes["validation"] = (
                "not recorded, as NUTS draws after it has adapted; see fit.evidence(held_out_rows)"
            )
        return Outcome(
            ChainPosterior(
                {name: value.unflatten(0, (len(kept), length)) for name, value in draws.items()},
                statistics(kept, length, self.max_tree_depth),
            ),
            state=run.workspace.snapshot(),
            ending=Ending(
                "interrupted" if interrupted else "finished",
                f"{'interrupted; kept ' if interrupted else ''}{counted(len(kept), 'chain')} of "
                f"{counted(length, 'draw')} after {counted(self.warmup, 'warm-up iteration')}; "
                f"{counted(divergences, 'divergence')}",
            ),
            cost={
                "steps": sum(table.done for table in tables),
                "gradient_evaluations": sum(table.gradients for table in tables),
                "divergences": divergences,
                **cost,
            },
        )


def _steps_of(part: Checkpoint) -> int:
    return 0 if part.saved is None else int(part.saved["step"])
