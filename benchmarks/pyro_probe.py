"""One of Pyro's example scripts, run as it stands; every model it trains is also given to ppl_gen, untouched.

python benchmarks/pyro_probe.py RESULT.json SCRIPT [ARGUMENTS ...]

`pyro.infer.SVI.step` and `MCMC.run` are watched. At the first call for a pair of model and guide, the very same objects
and arguments go through `pg.fit` and the questions a user asks of the result; then Pyro goes on. What happened is
appended to RESULT.json, one JSON object a line. A notebook is a script of its code cells.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import runpy
import signal
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro_stand_ins import install

TOP = Path(__file__).resolve().parent.parent
STEPS = 3
LONGER = 10  # steps from equal starts, here and in Pyro
LOSSES = 20  # evaluations of each loss afterwards
SECONDS = 40  # for one question
PROGRAMS = 6  # of one script


class TooLong(BaseException):
    """A question took longer than it may."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def asked(question: Callable[[], Any]) -> tuple[Any, str]:
    """The answer, and "" or what went wrong: "refused: ..." where the library said it, "raw: ..." where it did not."""
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return question(), ""
    except TooLong:
        return None, f"raw: no answer in {SECONDS} s"
    except Exception as error:
        return None, wrong(error)


def wrong(error: Exception) -> str:
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    worded = str(TOP / "ppl_gen") in innermost and isinstance(error, ValueError | TypeError | RuntimeError)
    text = " ".join(str(error).split())[:400]
    return f"{'refused' if worded else 'raw'}: {type(error).__name__}: {text}"


def data_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments as a user would pass them on: one value, a tuple, or a mapping from names."""
    import inspect

    if not kwargs:
        return args[0] if len(args) == 1 and not isinstance(args[0], dict) else args
    target = model.forward if isinstance(model, torch.nn.Module) else model
    names = [n for n, p in inspect.signature(target).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def with_constants(data: Any, plate: int | None) -> Any:
    import ppl_gen as pg

    def whole(value: Any) -> Any:
        rows = isinstance(value, torch.Tensor) and value.dim() and (plate is None or len(value) == plate)
        return value if rows or value is None else pg.constant(value)

    if isinstance(data, dict):
        return {name: whole(value) for name, value in data.items()}
    return tuple(whole(v) for v in data) if isinstance(data, tuple) else whole(data)


def plates_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    from ppl_gen.workspace.isolation import isolated

    with isolated(0), torch.no_grad():
        trace = pyro.poutine.trace(model).get_trace(*args, **kwargs)
    frames = [f for node in trace.nodes.values() for f in node.get("cond_indep_stack", ()) if f.vectorized]
    return {f.name: f.size for f in frames}


def attempts(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], start: Any) -> Iterator[tuple[str, Any, Any]]:
    """What a user may add, least first: nothing, constants, where the rows are, all of it."""
    data = data_of(model, args, kwargs)
    yield "untouched", data, {}
    if start:
        yield "start", data, {"start": lambda: start}
    with contextlib.suppress(Exception):
        yield "constants", with_constants(data, None), {}
    yield "data_dim", data, {"data_dim": 1}
    plates: dict[str, int] = {}
    with contextlib.suppress(Exception):
        plates = plates_of(model, args, kwargs)
    for name, size in plates.items():
        yield "data_plate", data, {"data_plate": name}
        yield "data_plate and data_dim", data, {"data_plate": name, "data_dim": 1}
        yield "data_plate and constants", with_constants(data, size), {"data_plate": name}


def algorithm(loss: Any) -> Any:
    from ppl_gen.inference import NUTS, SVI

    if loss is None:
        return NUTS(draws=5, warmup=5, chains=1, processes=1)
    return SVI(loss, steps=STEPS, lr=1e-3)


def probe(model: Any, guide: Any, loss: Any, args: Any, kwargs: Any, start: Any = None) -> dict[str, Any]:
    import ppl_gen as pg

    found: dict[str, Any] = {"model": getattr(model, "__name__", type(model).__name__)}
    found |= {"guide": getattr(guide, "__name__", type(guide).__name__), "loss": type(loss).__name__, "tried": {}}
    fit = None
    for what, data, settings in attempts(model, args, kwargs, start):
        program, said = asked(lambda s=settings: pg.Program(model, guide, **s))
        if not said:
            start = time.perf_counter()
            fit, said = asked(lambda p=program, d=data: pg.fit(p, d, algorithm(loss), seed=0, progress=False))
            found["seconds"] = round(time.perf_counter() - start, 2)
        if not said:
            found |= {"needed": what, "notes": {k: str(v)[:200] for k, v in fit.notes.items()}}
            break
        found["tried"].setdefault(f"{what} {settings.get('data_plate', '')}".strip(), said)
    if fit is not None and loss is not None:
        found["losses"], found["losses_failed"] = asked(lambda: beside_pyro(fit, loss, data, args, kwargs))
    if fit is not None:
        found["questions"] = {name: asked(question)[1] for name, question in questions(fit).items()}
    return found


def beside_pyro(fit: Any, loss: Any, data: Any, args: Any, kwargs: Any) -> dict[str, float]:
    """After `LONGER` steps of Adam from one start, here and by Pyro: losses (Pyro's own number, a mean of `LOSSES`) and
    the distance between the two sets of parameters, in units of how far Pyro's moved: rounding where all is well."""
    import ppl_gen as pg
    from ppl_gen.inference import SVI

    adam = functools.partial(torch.optim.Adam, lr=1e-3, eps=1e-8 / (fit.data.rows or 1))  # losses here are per row
    ours = pg.fit(fit.program, data, SVI(loss, steps=LONGER, optimiser=adam), start=fit, seed=1, progress=False)
    found: dict[str, float] = {}
    continued(found, "here", ours, 0, loss, args, kwargs)
    there = continued(found, "pyro", fit, LONGER, loss, args, kwargs)
    moved = distance(fit.params, there)
    return found | {"apart": distance(ours.params, there) / moved if moved else float("nan")}


def continued(found: dict[str, float], name: str, start: Any, steps: int, loss: Any, args: Any, kwargs: Any) -> Any:
    """The parameters after Pyro's own steps from a fit; its losses there go into `found`."""
    import copy

    import ppl_gen.fits.result

    # Questions see plates whole; Pyro trains on its own subsample of them.
    whole, ppl_gen.fits.result.whole_plates = ppl_gen.fits.result.whole_plates, contextlib.nullcontext
    try:
        with start.bound(seed=1) as workspace, torch.enable_grad():
            workspace.training = True  # as networks are when Pyro steps: dropout, statistics of the batch
            for module in workspace.modules.values():
                module.train()
            optimiser = pyro.optim.Adam({"lr": 1e-3})
            guide = start.guide or (lambda *args, **kwargs: None)  # where nothing is latent
            svi = pyro.infer.SVI(start.program.model, guide, optimiser, loss=copy.deepcopy(loss))
            for _ in range(steps):
                STEP(svi, *args, **kwargs)
            after = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
            pyro.set_rng_seed(2)  # other noise than the steps have learned from
            values = [float(svi.evaluate_loss(*args, **kwargs)) for _ in range(LOSSES)]
    finally:
        ppl_gen.fits.result.whole_plates = whole
    found |= {name: float(np.mean(values)), f"{name}_sd": float(np.std(values))}
    return after


def distance(one: Any, other: Any) -> float:
    return sum(float((one[name] - other[name]).double().pow(2).sum()) for name in one.keys() & other.keys()) ** 0.5


STEP = pyro.infer.SVI.step


def questions(fit: Any) -> dict[str, Callable[[], Any]]:
    import tempfile

    return {
        "posterior": lambda: fit.posterior(draws=5),
        "predict": lambda: fit.predict(draws=5),
        "sample": lambda: fit.sample(3),
        "evidence": lambda: fit.evidence(particles=5, draws=4),
        "verdict": lambda: fit.verdict,
        "diagnose": lambda: fit.diagnose(draws=100),
        "to_arviz": lambda: fit.to_arviz(draws=5),
        "save": lambda: fit.save(Path(tempfile.mkdtemp()) / "fit"),
    }


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """The example goes on as if nothing had happened."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])


def watch(result: Path) -> None:
    seen: set[Any] = set()
    busy: list[bool] = []  # ppl_gen itself calls what is watched

    def once(model: Any, guide: Any, loss: Any, args: Any, kwargs: Any, start: Any = None) -> None:
        key = (getattr(model, "__qualname__", id(model)), getattr(guide, "__qualname__", type(guide)), type(loss))
        if busy or key in seen or len(seen) >= PROGRAMS:
            return
        seen.add(key)
        busy.append(True)
        with as_before():
            found = probe(model, guide, loss, args, kwargs, start)
        busy.clear()
        with result.open("a") as file:
            file.write(json.dumps(found) + "\n")

    step, run = pyro.infer.SVI.step, pyro.infer.MCMC.run

    def watched_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(self.loss, "__self__", None)
        once(self.model, self.guide, self.loss if owner is None else owner, args, kwargs)
        return step(self, *args, **kwargs)

    def watched_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.kernel, "model", None) is not None:
            once(self.kernel.model, None, None, args, kwargs, starting(getattr(self.kernel, "_init_strategy", None)))
        return run(self, *args, **kwargs)

    pyro.infer.SVI.step, pyro.infer.MCMC.run = watched_step, watched_run
    for kind in (pyro.infer.Trace_ELBO, pyro.infer.TraceEnum_ELBO, pyro.infer.TraceMeanField_ELBO):
        kind.differentiable_loss = watched_loss(kind.differentiable_loss, once)


def starting(strategy: Any) -> Any:
    """The values of `init_to_value`, or of what `init_to_generated` makes; None for other strategies."""
    with as_before(), contextlib.suppress(Exception):
        made = strategy.generate() if hasattr(strategy, "generate") else strategy
        return made.keywords["values"]
    return None


def watched_loss(differentiable_loss: Any, once: Callable[..., None]) -> Any:
    """For loops written by hand with torch's optimisers, and Gaussian processes."""

    def watched(self: Any, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        once(model, guide, self, args, kwargs)
        return differentiable_loss(self, model, guide, *args, **kwargs)

    return watched


def code_of(notebook: Path) -> str:
    """The code cells of a notebook, without what only a notebook understands."""
    cells = [c["source"] for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    lines = [line for cell in cells for line in ["", *"".join(cell).splitlines()]]
    return "\n".join(re.sub(r"^(\s*)[%!?].*", r"\1pass", line) for line in lines)


def version_asked(script: Path) -> str:
    """The version a script asserts: examples of a checkout may be older or newer than the installed Pyro."""
    found = re.search(r"__version__\.startswith\(\\?[\"']([\d.]+)", script.read_text())
    return found.group(1) if found else str(pyro.__version__)


def main() -> None:
    result, script = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
    sys.argv = [str(script), *sys.argv[3:]]
    sys.path.insert(0, str(script.parent))
    os.environ["CI"] = "1"  # by which the notebooks run shortened
    pyro.__version__ = version_asked(script)
    install()
    watch(result)
    if script.suffix == ".ipynb":
        notebook = types.ModuleType("__main__")  # its names are not this script's: one is called `time`
        notebook.__file__ = str(script)
        sys.modules["__main__"] = notebook
        exec(compile(code_of(script), str(script), "exec"), notebook.__dict__)
    else:
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
