"""Runs in processes of their own, for tests that kill them: what lives on, what lies about, what was said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAM = '''
import sys, time, pyro, torch, ppl_gen as pg
from dataclasses import dataclass
import pyro.distributions as dist
from ppl_gen.inference import EM, NUTS, SVI
from ppl_gen.fitting.algorithm import Iterative
from ppl_gen.fitting.run import Outcome
from ppl_gen.models import gaussian_mixture
from ppl_gen.fitting.posteriors.points import PointPosterior

def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

@dataclass(frozen=True)
class Steps(Iterative):
    # Steps that take time but no processor, so that many such runs fit into a test.
    steps: int = 1_000_000
    needs = (("data plate",),)
    def init(self, run):
        return torch.zeros(())
    def step(self, state, source):
        time.sleep(0.002)
        if float(state) == 10.0:
            print("STEPPING", flush=True)
        return state + 1.0, {"count": state}
    def limit(self, run):
        return self.steps
    def outcome(self, state, run):
        return Outcome(PointPosterior({"loc": state}))

ROWS = torch.randn(40, generator=torch.Generator().manual_seed(0))
LONG = Steps()

def said(result):
    """One line per row of a comparison, or one for a fit: what the tests read."""
    for line in getattr(result, "lines", [result]):
        fit = getattr(line, "fit", line)
        print("ROW", line.status, "-" if fit is None else int(fit.cost["steps"]), line.message, flush=True)

def begun():
    print("BEGUN", flush=True)

def state():
    import random, signal
    import numpy as np
    from pyro.poutine.runtime import _PYRO_STACK
    return (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), len(_PYRO_STACK),
            torch.get_default_dtype(), dict(pyro.get_param_store()), signal.getsignal(signal.SIGTERM),
            signal.getsignal(signal.SIGINT), len(torch.nn.modules.module._global_forward_pre_hooks),
            torch.distributions.Distribution._validate_args, pyro.module.__module__)

before = state()
begun()
try:
{body}
except KeyboardInterrupt:
    print("INTERRUPT", flush=True)
print("AS BEFORE" if state() == before else "CHANGED", flush=True)
'''

BODIES = {
    "steps": "said(pg.fit(model, ROWS, LONG))",
    "chain": "said(pg.fit(model, ROWS, NUTS(draws=100000, warmup=100, chains=2, processes=1)))",
    "chains": "said(pg.fit(model, ROWS, NUTS(draws=100000, warmup=100, chains=2, processes=2, sampler='pyro')))",
    "compare": 'said(pg.compare(model, ROWS, {"quick": Steps(5), "long": LONG, "longer": LONG, "last": LONG}, n_jobs=2))',
    "one by one": 'said(pg.compare(model, ROWS, {"quick": Steps(5), "long": LONG, "last": LONG}))',
    "nested": 'said(pg.compare(model, ROWS, {"a": NUTS(draws=100000, warmup=100, chains=2, processes=2, sampler="pyro"), "b": LONG}, n_jobs=2))',
}


@dataclass
class Ended:
    """How a run ended."""

    code: int
    out: list[str]
    err: str
    orphans: int
    folders: list[str]

    @property
    def rows(self) -> list[str]:
        return [line.split()[1] for line in self.out if line.startswith("ROW")]

    @property
    def steps(self) -> list[str]:
        return [line.split()[2] for line in self.out if line.startswith("ROW")]


def of_session(session: int) -> list[int]:
    """The living processes of a session (those that are only waited for are dead)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(sid) == session and state not in "ZX":
                found.append(int(entry.name))
    return found


def ended(
    body: str, signals: list[tuple[float, int]], *, after: str = "BEGUN", group: bool = False, patience: float = 60.0
) -> Ended:
    """Run the program, send ``signals`` (seconds after it said ``after``, number), and look what is left.

    ``group``: to all processes of its group, as a terminal does.
    """
    # The name of a body, or the body itself.
    text = PROGRAM.replace("{body}", "\n".join("    " + line for line in BODIES.get(body, body).splitlines()))
    with tempfile.TemporaryDirectory(prefix="killed-", ignore_cleanup_errors=True) as folder:
        script = Path(folder, "script.py")
        script.write_text(text)
        temporary = Path(folder, "temporary")
        temporary.mkdir()
        environment = os.environ | {
            "TMPDIR": str(temporary),
            "JOBLIB_TEMP_FOLDER": str(temporary),
            "OMP_NUM_THREADS": "1",
        }
        with Path(folder, "errors").open("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, str(script)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                env=environment,
            )
            assert process.stdout is not None
            out = []
            for line in process.stdout:
                out.append(line.strip())
                if line.startswith(after):
                    break
            began = time.monotonic()
            for seconds, number in signals:
                time.sleep(max(0.0, began + seconds - time.monotonic()))
                (os.killpg if group else os.kill)(process.pid, number)
            try:
                out += process.communicate(timeout=patience)[0].split("\n") if not _killed(signals) else []
                code = process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                code = -1
            left = _left(process.pid, 10.0)
            folders = sorted(entry.name for entry in temporary.iterdir())
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
            errors.seek(0)
            return Ended(code, [line for line in out if line], errors.read(), len(left), folders)


def _killed(signals: list[tuple[float, int]]) -> bool:
    return bool(signals) and signals[-1][1] == signal.SIGKILL  # what lives on would hold the pipe open


def _left(session: int, patience: float) -> list[int]:
    until = time.monotonic() + patience
    while (left := of_session(session)) and time.monotonic() < until:
        time.sleep(0.1)
    return left
