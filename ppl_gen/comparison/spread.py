"""Where the fits of a comparison run: in this process, in others of this machine, or on a cluster that joblib knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppl_gen.runtime.workers import initializer

__all__ = ["Spread", "spread_over"]


@dataclass(frozen=True)
class Spread:
    """How many fits run at once, and through which backend of joblib: ``chosen`` is the user's by name, else loky."""

    n_jobs: int
    chosen: str = ""

    @property
    def text(self) -> str:
        """For the facts of a comparison."""
        return f"{self.n_jobs} of joblib's {self.chosen} backend" if self.chosen else str(self.n_jobs)

    def pool(self, jobs: int) -> Any:
        """joblib's `Parallel` for so many jobs."""
        from joblib import Parallel

        # Bytes go and come, so that joblib neither maps arrays into read-only memory nor fails on a result.
        settings: dict[str, Any] = {"return_as": "generator_unordered", "batch_size": 1, "pre_dispatch": "all"}
        if self.chosen:
            try:
                return Parallel(n_jobs=self.n_jobs, **settings)
            except ValueError:  # ray's hands out nothing before all is done
                return Parallel(n_jobs=self.n_jobs, **settings | {"return_as": "list"})
        return Parallel(n_jobs=max(2, min(self.n_jobs, jobs)), **settings, **initializer())

    def sendable(self, content: bytes, file: Path) -> Any:
        """What is sent for ``content``, which every process needs: nothing where all of them can read the ``file``."""
        if not self.chosen:
            return b""
        import numpy as np

        return np.frombuffer(content, np.uint8)  # dask and ray keep one copy of an array for all who are sent it


def spread_over(n_jobs: int | None) -> Spread | None:
    """What ``n_jobs`` means where ``joblib.parallel_config`` may say more; None: one fit after another, here.

    None, as everywhere in joblib, is one unless a surrounding ``parallel_config`` gives a number. One that names a
    backend of another kind than loky stands for all of that: its cluster knows how many it can take.

    Raises:
        ValueError: inside ``parallel_config("multiprocessing")``, which forks.

    >>> import joblib
    >>> spread_over(None), spread_over(1), spread_over(2)
    (None, None, Spread(n_jobs=2, chosen=''))
    >>> with joblib.parallel_config(n_jobs=3):
    ...     spread_over(None)
    Spread(n_jobs=3, chosen='')
    >>> with joblib.parallel_config("threading", n_jobs=3):
    ...     spread_over(None)
    Spread(n_jobs=3, chosen='threading')
    """
    from joblib import effective_n_jobs

    name, configured = _configured()
    if n_jobs == 1:
        return None
    if name == "multiprocessing":
        raise ValueError(
            "n_jobs: joblib is set to its multiprocessing backend, which forks this process, and torch's threads do "
            'not survive that; use joblib.parallel_config(backend="loky")'
        )
    if not name:
        count = int(effective_n_jobs(n_jobs))
        return Spread(count) if count > 1 else None
    count = n_jobs if n_jobs is not None else configured if configured is not None else -1
    return Spread(int(effective_n_jobs(count)), name)


def _configured() -> tuple[str, int | None]:
    """The backend that a surrounding `joblib.parallel_config` names (empty: loky), and its number of jobs."""
    from joblib import ParallelBackendBase, parallel_config

    with parallel_config() as settings:  # of nothing: what it gives are the settings around it
        found: Mapping[str, Any] = settings or {}
    backend, count = found.get("backend"), found.get("n_jobs")
    number = int(count) if isinstance(count, int) else None
    if not isinstance(backend, ParallelBackendBase):
        threads = found.get("prefer") == "threads" or found.get("require") == "sharedmem"
        return ("threading" if threads else ""), number
    name = type(backend).__name__.removesuffix("Backend").removesuffix("Distributed").lower()
    return ("" if name == "loky" else name), number
