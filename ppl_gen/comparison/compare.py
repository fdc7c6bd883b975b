"""compare(): algorithms on one program, judged on the same held-out rows."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ppl_gen.comparison.kept import opened
from ppl_gen.comparison.processes import side_by_side
from ppl_gen.comparison.runner import Line, Setup, finished_lines, inspected, one_by_one
from ppl_gen.comparison.split import frozen_draws, split_rows
from ppl_gen.comparison.spread import spread_over
from ppl_gen.data.sources import collected
from ppl_gen.data.streams import Stream
from ppl_gen.errors import (
    is_number,
    require_device,
    require_dtype,
    require_flag,
    require_number,
    require_path,
    require_seed,
    require_whole,
)
from ppl_gen.fits.result import Fit, Status
from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.program.program import Program, Recipe, as_recipe
from ppl_gen.runtime.atomic import as_path
from ppl_gen.runtime.interrupts import allowed, listening

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` found: one line per algorithm and seed, every one judged on the same rows.

    ``lines`` in the order given; ``in_sample`` is True where no rows were held out, and then the values favour maximum
    likelihood by construction; ``facts`` says what was compared (data, split, versions, the call); ``test_rows`` are
    those that all fits were judged on.

    Example:
        >>> import pyro, torch, ppl_gen as pg
        >>> import pyro.distributions as dist
        >>> from ppl_gen.inference import SVI
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> x = torch.linspace(-1.0, 1.0, 20)
        >>> result = pg.compare(model, x, {"short": SVI(steps=5), "long": SVI(steps=500, lr=0.05)})
        >>> result.table()["status"].tolist(), result["long"].seed
        (['finished', 'finished'], 0)
    """

    lines: tuple[Line, ...]
    program: str
    in_sample: bool = False
    facts: Mapping[str, str] = field(default_factory=dict)
    test_rows: Any = field(default=None, compare=False)
    computed: dict[Any, Any] = field(init=False, default_factory=dict, compare=False)  # draws of globals, made once

    def __getitem__(self, key: str | tuple[str, int]) -> Fit:
        """The fit of a label for the first seed, or of ``(label, seed)``.

        Raises:
            KeyError: for a label or seed that was not compared; the message lists those that were.
            RuntimeError: if that algorithm left no fit; the message says why.
        """
        label, seed = key if isinstance(key, tuple) else (key, None)
        found = [line for line in self.lines if line.label == label and seed in (None, line.seed)]
        if not found:
            labels = ", ".join(dict.fromkeys(repr(line.label) for line in self.lines))
            seeds = ", ".join(dict.fromkeys(str(line.seed) for line in self.lines))
            raise KeyError(f"no fit {key!r} in this comparison; labels: {labels}; seeds: {seeds}")
        if found[0].fit is None:
            raise RuntimeError(
                f"{label!r} left no fit with seed {found[0].seed} ({found[0].status}): {found[0].message}"
            )
        return found[0].fit

    def __repr__(self) -> str:
        import shutil

        from ppl_gen.report.table import as_text

        # Lines that a narrow terminal would break again are hard to read; elsewhere the text is always the same.
        return as_text(self, max(60, min(100, shutil.get_terminal_size((100, 24)).columns)))

    def _repr_html_(self) -> str:
        from ppl_gen.report.display import comparison_html

        return comparison_html(self)

    def table(self, reference: str | None = None) -> pandas.DataFrame:
        """One row per algorithm and seed, in the order given.

        ``heldout`` is the mean log predictive density in nats per held-out row (``in_sample`` where none were held
        out), ``heldout_se`` its spread over rows / sqrt(rows), ``mc_se`` its Monte Carlo error. ``difference`` is
        ``heldout`` less that of the best algorithm at the same seed, and ``difference_se`` the standard error of that
        difference, paired over rows: it decides whether two algorithms differ, ``heldout_se`` does not. ``shift_sd``
        and ``sd_ratio`` are the worst of `posteriors`: how far a mean is from the reference's, in its sds, and how wide
        a posterior is beside it (a point has no ratio). ``message`` is one line of at most 60 characters; the whole
        texts are in `messages` and in the report.

        Raises:
            ValueError: if ``reference`` is no label of a fit whose posterior has a width.
        """
        from ppl_gen.report.table import frame

        return frame(self, reference)

    def posteriors(self, reference: str | None = None) -> pandas.DataFrame:
        r"""Where the posteriors differ, which held-out density hardly tells: one row per fit and global number.

        .. math:: \mathrm{shift} = (\bar\theta - \bar\theta_0) / s_0, \qquad \mathrm{ratio} = s / s_0

        ``mean`` and ``sd`` of 500 draws (sd 0: a point), ``shift_sd`` and ``sd_ratio`` against the reference (mean
        :math:`\bar\theta_0`, sd :math:`s_0`): the label given, else the most trusted chains of the comparison. Without
        any they are NaN and ``reference`` is empty. Exchangeable components are brought into one order first, where the
        program offers ``relabel``.

        Raises:
            ValueError: if ``reference`` is no label of a fit whose posterior has a width.

        Example:
            >>> import pyro, torch, ppl_gen as pg
            >>> import pyro.distributions as dist
            >>> from ppl_gen.inference import SVI
            >>> def model(x):
            ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
            >>> x = torch.linspace(-1.0, 1.0, 20)
            >>> result = pg.compare(model, x, {"short": SVI(steps=5), "long": SVI(steps=2000, lr=0.05)})
            >>> frame = result.posteriors(reference="long").set_index("algorithm")
            >>> bool(frame.loc["short", "sd_ratio"] < 0.6), float(frame.loc["long", "sd_ratio"])
            (True, 1.0)
        """
        from ppl_gen.report.posteriors import frame_of_posteriors

        return frame_of_posteriors(self, reference)

    @property
    def messages(self) -> dict[tuple[str, int], str]:
        """What every fit said as it ended, whole, by label and seed: why one failed or did not fit the program.

        >>> import pyro, torch, ppl_gen as pg
        >>> import pyro.distributions as dist
        >>> from ppl_gen.inference import CAVI
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> result = pg.compare(model, torch.linspace(-1.0, 1.0, 20), {"CAVI": CAVI()})
        >>> len(result.table()["message"][0]) <= 60 < len(result.messages["CAVI", 0])
        True
        """
        return {(line.label, line.seed): line.message for line in self.lines}

    def best(self) -> str | None:
        """The label with the highest mean over its seeds; None where nothing could be compared."""
        from ppl_gen.report.table import best_label

        return best_label(self)

    def plot(self) -> Figure:
        """Held-out values with paired errors, and a training curve per algorithm: a matplotlib Figure."""
        from ppl_gen.report.plots import overview

        return overview(self)

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML file, in one step; gives its absolute path."""
        from ppl_gen.report.html import write

        return write(self, require_path("path", path, file=True))

    def save(self, path: str | Path) -> Path:
        """Write a folder: ``comparison.json``, which says where every fit is, ``table.csv`` and ``rows.csv``.

        In one step: until it is done ``comparison.json`` speaks of what was there before, which is there.

        Raises:
            ValueError: if ``path`` exists and is not a saved comparison.
        """
        from ppl_gen.comparison.save import save

        return save(self, as_path(path))


def compare(
    program: Program | Recipe | Callable[..., Any],
    data: Any,
    algorithms: Mapping[str, Algorithm],
    *,
    holdout: float = 0.2,
    test: Any = None,
    seeds: Sequence[int] = (0,),
    n_jobs: int | None = None,
    particles: int = 100,
    draws: int = 500,
    threads: int = 1,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    folder: str | Path | None = None,
) -> Comparison:
    r"""Fit ``program`` with every algorithm under every seed, and judge all fits by log p(x) of the same held-out rows.

    .. math:: \frac1n \sum_i \log \frac1S \sum_s p(x_i \mid \theta_s), \qquad \theta_s \sim q(\theta)

    A fit that fails, diverges or is refused is a row of the table with that status and message. Ctrl-C, or SIGTERM
    where the process has no handler of its own for it, ends the fits under way, also those in other processes: their
    rows and those done before are kept, and those not begun say so. A second one waits for no process.

    Args:
        program: a Pyro model function, a `Program`, or a `Recipe` (built once per fit, on the training rows).
        data: as for `pg.fit`; rows are the first dimension, and ``pg.constant`` entries are kept whole.
        algorithms: label -> algorithm.
        holdout: share of rows held out, drawn at random under a seed of its own (0), the same for all fits. 0: none;
            values are then in-sample, which maximum likelihood wins by construction, and the table says so.
        test: held-out rows of the user's choice; ``data`` is then used whole.
        seeds: one fit per algorithm and seed.
        n_jobs: fits at once, each in a process of its own, so that one that dies is a failed row (-1: one per core; 1:
            one after another, in this process; starting processes takes a few seconds). None is 1 unless a surrounding
            ``joblib.parallel_config`` says otherwise, such as ``parallel_config("dask")``; see `Fits on many machines`
            in the documentation. The numbers do not depend on it.
        particles, draws: importance samples of local latents and posterior draws of globals, as in `Fit.evidence`.
        threads: of each fit, whatever ``n_jobs``, since sums in another order differ in their last bits. `pg.fit`
            gives the same bits under ``torch.set_num_threads(threads)``.
        device, dtype: as for `pg.fit`.
        progress: progress bars; None: in terminals and notebooks only.
        folder: where the comparison is kept as it goes. Called again, it makes no finished row again (but those that
            ended with an error), and goes on with those that were under way, to the same numbers. Algorithms and seeds
            may be added; another comparison is refused. See ``checkpoint`` of `pg.fit`.

    Raises:
        ValueError, TypeError: before anything runs, for a mistake in program, data or settings.

    References:
        Strictly proper scoring rules, prediction, and estimation (Gneiting and Raftery, 2007).
        Practical Bayesian model evaluation using leave-one-out cross-validation (Vehtari, Gelman and Gabry, 2017):
        the paired standard error of a difference.

    Example: see `Comparison`.
    """
    seeds = _checked_seeds(seeds)
    _check(algorithms, holdout, n_jobs)
    for name, value in {"particles": particles, "draws": draws, "threads": threads}.items():
        require_whole(name, value)
    require_device(device)
    require_dtype(dtype)
    require_flag("progress", progress, optional=True)
    place = None if folder is None else as_path(folder, "folder").absolute()
    jobs = [(label, algorithm, seed) for label, algorithm in algorithms.items() for seed in seeds]
    recipe = as_recipe(program)
    with listening():
        with allowed():
            data, test = collected(data), collected(test)
            if isinstance(data if test is None and not holdout else test, Stream):
                raise ValueError("test: evidence is of rows, and a stream hands out batches; pass an array as test=...")
            train, held = (data, test) if test is not None or not holdout else split_rows(data, holdout, program)
            rows = frozen_draws(data if held is None else held)
            setup = Setup(recipe, train, rows, particles, draws, threads, device, dtype, folder=place)
        info, fingerprint = inspected(setup)
        if info.data_plate is None and held is not None and test is None:
            raise ValueError(
                f"holdout: the program {recipe.name!r} has no data plate, so its rows cannot be separated and held "
                "out; give test=..., or holdout=0 for in-sample values"
            )
        setup = replace(setup, fingerprint=fingerprint)
        spread = spread_over(n_jobs)
        with opened(setup, algorithms):
            known = finished_lines(setup, jobs)
            if spread is None:
                done = one_by_one(setup, jobs, progress, known)
            else:
                done = side_by_side(setup, jobs, spread, progress, known)
    lines = [done[i] if i in done else _not_done(label, seed) for i, (label, _, seed) in enumerate(jobs)]
    from ppl_gen.comparison.provenance import facts_of

    settings = {"holdout": holdout, "seeds": seeds, "n_jobs": n_jobs, "particles": particles, "draws": draws}
    settings |= {"threads": threads, "device": device, "dtype": dtype}
    shared_out = f"{'1' if spread is None else spread.text}, each fit on {threads} thread(s)"
    facts = facts_of(setup, info, algorithms, settings, given_test=test is not None, processes=shared_out)
    if place is not None:
        facts["rows kept"] = f"{len(known)} of {len(jobs)} were finished before, and not made again"
    return Comparison(tuple(lines), recipe.name, held is None, facts, setup.test)


def _check(algorithms: Any, holdout: Any, n_jobs: Any) -> None:
    if not isinstance(algorithms, Mapping):
        raise TypeError(f'algorithms: expected a mapping such as {{"EM": EM()}}, got {type(algorithms).__name__}')
    if not algorithms:
        raise ValueError('algorithms: expected at least one, such as {"EM": EM()}, got an empty mapping')
    for label, algorithm in algorithms.items():
        if not isinstance(label, str) or not label.strip():
            raise TypeError(f"algorithms: expected labels that are text, got {label!r}")
        if not isinstance(algorithm, Algorithm):
            kind = isinstance(algorithm, type)
            hint = f"; write {algorithm.__name__}() with brackets" if kind else ", such as SVI(steps=1000)"
            got = f"the class {algorithm.__name__}" if kind else f"{algorithm!r}"
            raise TypeError(f"algorithms[{label!r}]: expected an algorithm, got {got}{hint}")
    require_number("holdout", holdout, 0.0, 1.0, "a share of the rows in [0, 1)")
    if n_jobs is None:
        return
    count = 0 if isinstance(n_jobs, bool) or not isinstance(n_jobs, numbers.Integral) else int(n_jobs)
    if count == 0 or count < -(os.cpu_count() or 1):  # joblib: -2 is all cores but one, and so on
        raise ValueError(f"n_jobs: expected a number of processes, or -1 for one per core, got {n_jobs!r}")


def _checked_seeds(seeds: Any) -> tuple[int, ...]:
    if isinstance(seeds, numbers.Number | str) or not hasattr(seeds, "__iter__"):
        raise TypeError(f"seeds: expected several whole numbers, such as [0] or range(3), got {seeds!r}")
    result = tuple(seeds)
    if not result or not all(is_number(s) and isinstance(s, numbers.Integral) and int(s) >= 0 for s in result):
        raise ValueError(f"seeds: expected at least one whole number, none below 0, got {list(result)!r}")
    result = tuple(require_seed(s, "seeds") for s in result)
    if len(set(result)) < len(result):
        raise ValueError(f"seeds: expected each of them once, got {list(result)!r}")
    return result


def _not_done(label: str, seed: int) -> Line:
    return Line(label, seed, str(Status.INTERRUPTED), "not done: the comparison was interrupted before")
