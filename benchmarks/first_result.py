"""The first result: a mixture fitted to the crabs by EM, from the start of Python to the printed means.

.venv/bin/python benchmarks/first_result.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from timing import Result, alternate, run

OURS = """
import ppl_gen as pg
from ppl_gen.inference import EM
from ppl_gen.models import gaussian_mixture
fit = pg.fit(gaussian_mixture(2), pg.load_data("crabs"), EM(), seed=0, progress=False)
print(fit.posterior(draws=1)["loc"])
"""
SCIKIT = """
import numpy as np
from sklearn.mixture import GaussianMixture
x = np.load({path!r})
print(GaussianMixture(2, tol=1e-8, max_iter=2000, random_state=0).fit(x[:, None]).means_)
"""


def rows(quick: bool) -> list[Result]:
    """Seconds of a whole process; the scikit-learn script reads the same numbers from a file."""
    import tempfile

    import numpy as np

    import ppl_gen as pg

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "crabs.npy")
        np.save(path, np.asarray(pg.load_data("crabs")))
        scripts = {"ppl_gen": OURS, "scikit-learn": SCIKIT.format(path=path)}
        timed = alternate({name: partial(_process, script) for name, script in scripts.items()}, 2 if quick else 5, 1)
    note = "Whole processes; the import of torch is part of ours."
    return [Result("First result: crabs by EM, from a cold Python", timed, note=note)]


def _process(script: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    run("first_result", "The first result", rows, __doc__)
