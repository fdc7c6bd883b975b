"""The No-U-Turn Sampler: several chains of Pyro's kernel on one program."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ppl_gen.capture.replay import Recording, record_checked
from ppl_gen.capture.tape import RecordingRefused
from ppl_gen.errors import IncompatibleError, is_number, require_flag, require_whole
from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.fitting.checkpoint import Checkpoint
from ppl_gen.fitting.posteriors.chains import ChainPosterior
from ppl_gen.fitting.run import Ending, Outcome, Run
from ppl_gen.inference.mcmc.chains import run_chains, workers
from ppl_gen.inference.mcmc.kernel import Chain, DrawTable
from ppl_gen.inference.unconstrained import NEAR, Unconstrained, starting_point
from ppl_gen.program.offers import Need
from ppl_gen.runtime.progress import Part
from ppl_gen.runtime.threads import torch_threads
from ppl_gen.workspace.isolation import isolated

__all__ = ["NUTS"]

_TREE_SECONDS = 3e-4  # Pyro's own work per gradient (measured), and about so many gradients an iteration
_TREE_STEPS = 10
_DEEPEST = 20  # a million gradients for one draw
_BARS = 16  # chains beyond that are shown together
_DISPERSED = 1.0  # in unconstrained units: logs of scales, logits of shares


@dataclass(frozen=True)
class NUTS(Algorithm):
    r"""Draws from the posterior by Hamiltonian dynamics with self-tuned trajectories (Hoffman and Gelman 2014).

    .. math:: z^{(1)}, z^{(2)}, \ldots \to p(z \mid x)

    Runs `pyro.infer.NUTS` on the density of the program over its unconstrained latent sites; finite discrete sites are
    summed out. Unlike Pyro's, it is a frozen specification that `pg.fit` runs: several chains side by side in worker
    processes, the density replayed from a recording where the program allows it. The draws depend on the seed alone,
    not on the number of processes. Ctrl-C keeps what was drawn.

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
        full_mass: a dense mass matrix over all sites; False for a diagonal one (better beyond some hundred numbers).
        max_tree_depth: at most 2^depth - 1 gradients per iteration.
        jitter: None: dispersed, as said above. A number: all chains begin at most so far from the starting values, in
            unconstrained units. Below 1 they could hardly disagree, which ``fit.notes["starts"]`` then says.
        thin: keep one iteration in so many; ``draws`` are kept in any case.
        processes: worker processes; None: as many as there are cores, where the run is long enough to gain.

    Raises:
        ValueError: for settings out of range, or if 100 random starts have no finite density (the sites are named).

    References:
        The No-U-Turn Sampler: adaptively setting path lengths in Hamiltonian Monte Carlo (Hoffman and Gelman, 2014).
        A conceptual introduction to Hamiltonian Monte Carlo (Betancourt, 2017).

    Example:
        >>> import pyro, torch, ppl_gen as pg
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> fit = pg.fit(model, torch.tensor([1.0, 2.0, 3.0]), NUTS(draws=300, warmup=100, chains=2), seed=0)
        >>> abs(float(fit.posterior()["loc"].mean()) - 2.0) < 0.2
        True
    """

    draws: int = 1000
    chains: int = 4
    warmup: int = 500
    target_accept: float = 0.8
    full_mass: bool = True
    max_tree_depth: int = 10
    jitter: float | None = None
    thin: int = 1
    processes: int | None = None

    dtype: ClassVar[torch.dtype] = torch.float64
    vectors: ClassVar[bool] = True
    growing: ClassVar[Sequence[str]] = ("draws",)
    idle: ClassVar[Sequence[str]] = ("processes",)
    resumable: ClassVar[bool] = True
    needs: ClassVar[Sequence[Need]] = (
        ("density",),
        ("latent sites",),
        ("differentiable latents",),
        ("no free parameters",),
    )

    def __post_init__(self) -> None:
        for name in ("draws", "chains", "warmup", "thin"):
            require_whole(name, getattr(self, name))
        require_whole("max_tree_depth", self.max_tree_depth, most=_DEEPEST)
        require_flag("full_mass", self.full_mass)
        if self.processes is not None:
            require_whole("processes", self.processes)
        if not is_number(self.target_accept) or not 0.0 < self.target_accept < 1.0:
            raise ValueError(f"target_accept: expected a number between 0 and 1, got {self.target_accept!r}")
        if self.jitter is not None and not (is_number(self.jitter) and 0.0 <= self.jitter < math.inf):
            raise ValueError(f"jitter: expected a number of at least 0, or None, got {self.jitter!r}")
        for name in ("draws", "chains", "warmup", "max_tree_depth", "thin"):  # numpy's small integers would wrap round
            object.__setattr__(self, name, int(getattr(self, name)))
        object.__setattr__(self, "full_mass", bool(self.full_mass))

    def run(self, run: Run) -> Outcome:
        """See `Algorithm.run`; raises KeyboardInterrupt if interrupted before anything was drawn."""
        kept_in = self._begun(run)
        drawn = all(part is not None and _steps_of(part) >= self.iterations for part in kept_in)
        with torch_threads(1):
            density = Unconstrained(run.joint, run.data.batch(), run.info)
            starts, seeds = self._starts(run, density)
            potential, seconds = (density.potential_and_gradient, 0.0) if drawn else _potential(run, density, starts)
        estimate = self.chains * self.iterations * _TREE_STEPS * (seconds + _TREE_SECONDS)
        processes = self.processes or workers(self.chains, estimate, run.data.device)
        modules = () if isinstance(potential, Recording) else tuple(run.workspace.modules.items())
        chains = [
            replace(self._chain(run, potential, start, seed, modules), checkpoint=part)
            for start, seed, part in zip(starts, seeds, kept_in, strict=True)
        ]
        report = _Report(run, self.chains, chains[0].iterations, self.warmup)
        tables, interrupted, here = run_chains(chains, processes, report)
        if run.checkpoint is not None and not drawn:
            run.checkpoint.write(sum(table.done for table in tables), {"draws": self.draws})
        if here is not None:
            run.notes["processes"] = f"the chains ran one after another: {here}"
        kept, length = _rectangle(tables, self.draws)
        if not kept:
            raise KeyboardInterrupt
        return self._outcome(run, density, kept, length, tables, interrupted)

    @property
    def iterations(self) -> int:
        """Of one chain."""
        return self.warmup + self.draws * self.thin

    def _begun(self, run: Run) -> list[Checkpoint | None]:
        """The checkpoint of each chain, if there are any.

        Raises:
            ValueError: where more draws were asked for before.
        """
        kept = run.checkpoint
        if kept is None:
            return [None] * self.chains
        draws = 0 if kept.saved is None else int(kept.saved["draws"])
        if draws > self.draws:
            raise ValueError(
                f"checkpoint: it belongs to chains of {draws} draws, and now there are {self.draws}; give as many or "
                "more, or choose a new folder"
            )
        if draws < self.draws:
            kept.write(0, {"draws": self.draws})
        parts = [kept.part(f"chain {number}") for number in range(self.chains)]
        if done := [_steps_of(part) for part in parts if part.saved is not None]:
            run.notes["resumed"] = f"went on after {', '.join(map(str, done))} of {self.iterations} iterations"
        return list(parts)

    def _starts(self, run: Run, density: Unconstrained) -> tuple[list[Tensor], list[int]]:
        """A starting point and a seed per chain; both follow from the fit's seed and the chain's number alone."""
        given = run.starting_values()
        parts = density.parts_of(given)
        edge = [name for name in given if name in density.sites and name not in parts]
        if edge:
            run.notes["starting values"] = f"{', '.join(edge)}: on the edge of the support or beyond, and not used"
        seeds = np.random.SeedSequence(run.seed).generate_state(2 * self.chains)
        starts: list[Tensor] = []
        for chain, seed in enumerate(seeds[::2]):
            with isolated(int(seed)):
                starts.append(starting_point(density, parts, self.jitter, starts[-1] if chain % 2 else None))
        if parts and self.chains > 1:
            self._note_close(run, [density.split(start) for start in starts], list(parts))
        _refuse_hidden_draws(run, density, starts[0])
        return starts, [int(seed) for seed in seeds[1::2]]

    def _note_close(self, run: Run, starts: list[dict[str, Tensor]], known: list[str]) -> None:
        """Chains that begin at one point agree by construction; the verdict reads this note."""
        apart = max(
            float((at.amax(0) - at.amin(0)).max()) for at in (torch.stack([s[n] for s in starts]) for n in known)
        )
        if apart <= 2 * NEAR or (self.jitter is not None and self.jitter < _DISPERSED):
            advice = (
                "no density was finite farther away" if self.jitter is None else "leave out jitter to disperse them"
            )
            run.notes["starts"] = (
                f"all {self.chains} chains began within {apart:.2g} of each other in {', '.join(known)} (unconstrained "
                f"units), so they could not disagree about modes farther away; {advice}"
            )

    def _chain(
        self,
        run: Run,
        potential: Recording | Callable[[Tensor], tuple[Tensor, ...]],
        start: Tensor,
        seed: int,
        modules: tuple[tuple[str, nn.Module], ...],
    ) -> Chain:
        return Chain(
            potential=potential,
            start=start,
            seed=seed,
            draws=self.draws,
            warmup=self.warmup,
            thin=self.thin,
            target_accept=self.target_accept,
            full_mass=self.full_mass,
            max_tree_depth=self.max_tree_depth,
            dtype=run.dtype,
            device=run.data.device,
            modules=modules,
        )

    def _outcome(
        self,
        run: Run,
        density: Unconstrained,
        kept: list[DrawTable],
        length: int,
        tables: list[DrawTable],
        interrupted: bool,
    ) -> Outcome:
        stats = {
            name: torch.as_tensor(np.stack([table.statistics(length)[name] for table in kept]))
            for name in kept[0].statistics(length)
        }
        stats["diverging"] = stats["diverging"].bool()
        for name in ("n_steps", "tree_depth"):
            stats[name] = stats[name].long()
        stats["reached_max_treedepth"] = stats["n_steps"] >= 2**self.max_tree_depth - 1
        positions = np.concatenate([table.positions(length) for table in kept])
        draws = _relabelled(run, _site_values(run, density, positions))
        divergences = sum(table.divergences for table in tables)
        if run.validation is not None:
            run.notes["validation"] = (
                "not recorded, as NUTS draws after it has adapted; see fit.evidence(held_out_rows)"
            )
        return Outcome(
            ChainPosterior({name: value.unflatten(0, (len(kept), length)) for name, value in draws.items()}, stats),
            state=run.workspace.snapshot(),
            ending=Ending(
                "interrupted" if interrupted else "finished",
                f"{'interrupted; kept ' if interrupted else ''}{_counted(len(kept), 'chain')} of "
                f"{_counted(length, 'draw')} after {_counted(self.warmup, 'warm-up iteration')}; "
                f"{_counted(divergences, 'divergence')}",
            ),
            cost={
                "steps": sum(table.done for table in tables),
                "gradient_evaluations": sum(table.gradients for table in tables),
                "divergences": divergences,
            },
        )


def _steps_of(part: Checkpoint) -> int:
    return 0 if part.saved is None else int(part.saved["step"])


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _refuse_hidden_draws(run: Run, density: Unconstrained, u: Tensor) -> None:
    """A density that differs from one evaluation to the next would be sampled without complaint, and wrongly."""
    first, second = (float(density.potential_and_gradient(u)[0]) for _ in range(2))
    if not math.isclose(first, second, rel_tol=1e-6):
        raise IncompatibleError(
            f"the log density of {run.program.name!r} differs between two evaluations at one point ({-first:.6g} and "
            f"{-second:.6g}): the program draws random numbers that are not sample sites, which NUTS cannot see"
        )


def _potential(
    run: Run, density: Unconstrained, starts: list[Tensor]
) -> tuple[Recording | Callable[[Tensor], tuple[Tensor, ...]], float]:
    """The potential as a recording where that is faithful, else the program itself; and the seconds per gradient."""
    points = [*starts, 2.0 * starts[0], -starts[0]]
    try:
        recording = record_checked(density.potential_and_gradient, points)
    except RecordingRefused as refused:
        reason = str(refused).splitlines()[0]  # below it stand the shapes that Pyro adds to what goes through a program
        run.notes["potential"] = f"evaluated by running the program each time, as it cannot be recorded: {reason}"
        return density.potential_and_gradient, _seconds(density.potential_and_gradient, starts[0])
    return recording, _seconds(recording.load(), starts[0])


def _seconds(function: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        function(u)
        times.append(time.perf_counter() - began)
    return min(times)


def _rectangle(tables: list[DrawTable], draws: int) -> tuple[list[DrawTable], int]:
    """The chains and the common length that keep most draws: all of them unless the run was interrupted."""
    lengths = {min(table.kept, draws) for table in tables} - {0}
    if not lengths:
        return [], 0
    best = max(lengths, key=lambda n: n * sum(table.kept >= n for table in tables))
    return [table for table in tables if table.kept >= best], best


def _site_values(run: Run, density: Unconstrained, positions: np.ndarray) -> dict[str, Tensor]:
    """Positions -> site -> draws x shape, in the user's space."""
    points = torch.as_tensor(positions, dtype=run.dtype, device=run.data.device)
    function: Callable[[Tensor], tuple[Tensor, ...]] = density.values
    with torch.no_grad():
        try:
            function = record_checked(density.values, [points[0], points[-1], points[len(points) // 2]]).load()
        except RecordingRefused:
            pass  # the program itself gives the same numbers, if more slowly
        rows = [function(point) for point in points]
        return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(density.sites)}


def _relabelled(run: Run, draws: dict[str, Tensor]) -> dict[str, Tensor]:
    if run.program.relabel is None:
        return draws
    relabelled = run.program.relabel(draws)
    for name, value in draws.items():
        if name not in relabelled or relabelled[name].shape != value.shape:
            found = tuple(relabelled[name].shape) if name in relabelled else "nothing"
            raise ValueError(f"relabel: expected {name!r} of shape {tuple(value.shape)} (draws x site), got {found}")
    return {name: relabelled[name] for name in draws}


class _Report:
    """Progress and callbacks from the tables of the chains."""

    def __init__(self, run: Run, chains: int, iterations: int, warmup: int) -> None:
        self.run, self.total = run, chains * iterations
        self.iterations, self.warmup = iterations, warmup
        self.shown = 0.0

    def __call__(self, tables: Sequence[DrawTable]) -> None:
        if self.run.progress is None and not self.run.hooks:
            return
        done = sum(table.done for table in tables)
        divergences = sum(table.divergences for table in tables)
        info: Mapping[str, float] = {"divergences": float(divergences)}
        for hook in self.run.hooks:
            hook(done, info)
        now = time.monotonic()
        if self.run.progress is not None and (now - self.shown > 0.1 or done == self.total):
            self.shown = now
            self.run.progress(done, self.total, _counted(divergences, "divergence"))
            if 1 < len(tables) <= _BARS and (parts := getattr(self.run.progress, "parts", None)):
                parts([self._part(i, table) for i, table in enumerate(tables, 1)])

    def _part(self, number: int, table: DrawTable) -> Part:
        if table.done < self.warmup:
            return Part(f"chain {number} warm-up", table.done, self.warmup)
        return Part(f"chain {number} sampling", table.done - self.warmup, self.iterations - self.warmup)
