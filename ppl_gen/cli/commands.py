"""The commands, and what they print. Imported when one is asked for: their options are written in terms of typer."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppl_gen.cli.parsing import Misuse, algorithm_of, algorithms, data_of, interval_of, program_of

if TYPE_CHECKING:
    from ppl_gen.comparison.compare import Comparison
    from ppl_gen.inference import Algorithm
    from ppl_gen.program.program import Program

__all__ = ["compare", "demo", "fit", "list_"]

GOOD = ("converged", "finished", "stopped")


def demo(
    out: Annotated[Path, typer.Option(help="The report to write.")] = Path("crabs.html"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and draws: seconds instead of a minute.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes; the numbers do not depend on it.")] = 1,
) -> int:
    """Pearson's crabs, 1894: EM, CAVI, SVI and NUTS on one mixture of two normals."""
    import ppl_gen as pg
    from ppl_gen.inference import CAVI, EM, NUTS, SVI

    if quick:
        algorithms = {"EM": EM(), "CAVI": CAVI(), "SVI": SVI(steps=300, lr=0.03), "NUTS": NUTS(draws=100, chains=2)}
    else:
        algorithms = {
            "EM": EM(),
            "CAVI": CAVI(),
            "SVI": SVI(),
            "NUTS": NUTS(draws=1000, chains=4, target_accept=0.95),
        }
    result = pg.compare(pg.Recipe(_crabs, name="gaussian_mixture"), pg.load_data("crabs"), algorithms, n_jobs=jobs)
    return _shown(result, out)


def _crabs(data: Any) -> Program:
    """Two components, and for SVI a guide with all correlations: without them it is too narrow, as CAVI is."""
    from pyro.infer.autoguide import AutoMultivariateNormal

    from ppl_gen.models import gaussian_mixture

    return dataclasses.replace(gaussian_mixture(components=2)(data), guide=AutoMultivariateNormal)


def compare(
    program: Annotated[
        str,
        typer.Argument(metavar="PROGRAM", help="A program of the catalogue (name:option=value,...) or file.py:name."),
    ],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data set by name, or a .npy or .csv file.")],
    algorithm: Annotated[list[str], typer.Option(help="EM, SVI:steps=500,lr=0.01 ...; once for each.")],
    holdout: Annotated[float, typer.Option(min=0.0, max=0.99, help="Share of the rows held out; 0: in-sample.")] = 0.2,
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "0",
    jobs: Annotated[int, typer.Option(help="Processes; the numbers do not depend on it.")] = 1,
    out: Annotated[Path | None, typer.Option(help="An .html report, or a folder for table, fits and report.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Keep rows and runs here, and go on from what is there.")] = None,
) -> int:
    """Fit a program with several algorithms and judge them on the same held-out rows."""
    import ppl_gen as pg

    chosen = {text: algorithm_of(text) for text in algorithm}
    if not all(seed.strip().isdigit() for seed in seeds.split(",")):
        raise Misuse(f"--seeds: expected whole numbers such as 0,1,2, got {seeds!r}")
    numbers = [int(seed) for seed in seeds.split(",")]
    made = program_of(program)
    result = pg.compare(made, data_of(data, made), chosen, holdout=holdout, seeds=numbers, n_jobs=jobs, folder=folder)
    return _shown(result, out)


def fit(
    program: Annotated[
        str,
        typer.Argument(metavar="PROGRAM", help="A program of the catalogue (name:option=value,...) or file.py:name."),
    ],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data set by name, or a .npy or .csv file.")],
    algorithm: Annotated[str, typer.Option(help="EM, NUTS, SVI:steps=500 ...")] = "SVI",
    seed: Annotated[int, typer.Option(min=0, help="The only source of randomness.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps, for algorithms that have them.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, for algorithms that have one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to save the fit in.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Keep the run here, and go on from what is there.")] = None,
    every: Annotated[str | None, typer.Option(help="How often: steps (500) or a time (30s, 5m); a minute.")] = None,
    compile: Annotated[str, typer.Option(help="How steps are computed: auto, graph, inductor, no.")] = "auto",
) -> int:
    """Fit a program with one algorithm, and say whether to trust it."""
    import ppl_gen as pg

    chosen = algorithm_of(algorithm, {k: v for k, v in {"steps": steps, "lr": lr}.items() if v is not None})
    made, interval = program_of(program), None if every is None else interval_of(every)
    path: str | bool = False if compile == "no" else compile
    result = pg.fit(made, data_of(data, made), chosen, seed=seed, checkpoint=checkpoint, every=interval, compile=path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pg.FitWarning)  # the line below says it
        summary = result.diagnose()  # before the fit is printed, which then shows its verdict
    print(summary.to_string(float_format=lambda v: f"{v:.4g}"))
    print(result)
    if out is not None:
        print(f"saved in {result.save(out)}")
    return 0 if str(result.status) in GOOD else 1


def list_() -> None:
    """Programs, algorithms and data sets, with what they offer and need."""
    from ppl_gen.data.datasets import _NAMES
    from ppl_gen.models.catalogue import CATALOGUE, programs_offering
    from ppl_gen.program.offers import OFFERS

    offers = {offer: programs_offering(offer) for offer in OFFERS}
    _listed("Programs", {name: (entry.about, _offered(name, offers)) for name, entry in CATALOGUE.items()})
    _listed("Algorithms", {name: _about(kind) for name, kind in algorithms().items()})
    kept = {True: "read from disk, where PPL_GEN_DATA says", False: "comes with a package, nothing to download"}
    _listed("Data sets", {name: (kept[on_disk],) for name, on_disk in _NAMES.items()})


def _offered(program: str, offers: Mapping[str, Sequence[str]]) -> str:
    return "offers " + ", ".join(offer for offer, who in offers.items() if program in who)


def _about(kind: type[Algorithm]) -> tuple[str, str]:
    first = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    return first, "needs " + (", ".join(" or ".join(need) for need in kind().needs) or "nothing")


def _listed(title: str, rows: Mapping[str, Sequence[str]]) -> None:
    print(title)
    for name, texts in rows.items():
        print(f"  {name}")
        for text in texts:
            print(f"      {text}")


def _shown(result: Comparison, out: Path | None) -> int:
    print(result)
    bad = [line for line in result.lines if line.status not in GOOD]
    for line in bad:
        print(f"\n{line.label}, seed {line.seed}: {line.status}\n{line.message}", file=sys.stderr)
    if out is not None and out.suffix.lower() in (".html", ".htm"):
        print(f"\nreport: {result.report(out)}")
    elif out is not None:
        folder = result.save(out)
        print(f"\ntable, fits and report: {result.report(folder / 'report.html').parent}")
    return 1 if bad else 0
