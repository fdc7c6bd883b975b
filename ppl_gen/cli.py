"""The command line: every option is an argument of the library, and nothing is computed here."""

from __future__ import annotations

import ast
import csv
import dataclasses
import datetime
import inspect
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ppl_gen.runtime.interrupts import allowed, listening

if TYPE_CHECKING:
    import typer

    from ppl_gen.comparison.compare import Comparison
    from ppl_gen.inference import Algorithm
    from ppl_gen.program.program import Program

__all__ = ["algorithm_of", "data_of", "main", "program_of"]

GOOD = ("converged", "finished", "stopped")


class Misuse(Exception):
    """The command cannot be understood: exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ppl-gen`` and give its exit code: 0 done, 1 a fit or the run failed, 2 the command was not understood.

    Ctrl-C and SIGTERM end the fits under way; what they learned is shown and saved, and the code is 130 or 143.

    >>> main(["fit", "no_such_program", "crabs"])
    2
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with listening() as heard, allowed():
        code = _run([a for a in arguments if a != "--debug"], "--debug" in arguments)
    return 128 + heard.signal if heard.signal else code


def _run(arguments: Sequence[str], debug: bool) -> int:
    try:
        return int(_app()(args=list(arguments), prog_name="ppl-gen", standalone_mode=False) or 0)
    except Misuse as error:
        return _said(error, 2, debug)
    except KeyboardInterrupt:
        return _said("interrupted", 130, False)
    except Exception as error:  # shown without a traceback unless it was asked for
        if type(error).__name__ == "Abort":  # what typer makes of KeyboardInterrupt
            return _said("interrupted", 130, False)
        if debug:
            raise
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # what typer raises for the command line itself
            error.show()
            return int(error.exit_code)
        kind = "" if isinstance(error, ValueError | TypeError | ArithmeticError | ImportError) else type(error).__name__
        return _said(f"{kind}: {error}" if kind else error, 1, False)


def _said(error: object, code: int, debug: bool) -> int:
    if debug and isinstance(error, BaseException):
        raise error
    print(f"ppl-gen: {error}", file=sys.stderr)
    return code


def _app() -> typer.Typer:
    # The annotations below name typer; they are read here for the first time, so that nothing else imports it.
    global typer
    try:
        import typer
    except ModuleNotFoundError as error:
        from ppl_gen.errors import MissingExtraError

        raise MissingExtraError('the command line needs typer: pip install "ppl_gen[cli]"') from error
    app = typer.Typer(
        help="One generative program, every way to learn it, one honest yardstick.",
        epilog="Add --debug to any command for the traceback of an error.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command("demo")(demo)
    app.command("compare")(compare)
    app.command("fit")(fit)
    app.command("list")(list_)
    return app


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
    made, interval = program_of(program), None if every is None else _interval(every)
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
    _listed("Algorithms", {name: _about(kind) for name, kind in _algorithms().items()})
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


def program_of(text: str) -> Any:
    """A program from ``name``, ``name:option=value,...`` or ``file.py:name`` (a model, Program or Recipe, or a maker).

    >>> program_of("gaussian_mixture:components=3").arguments["components"]
    3
    """
    import ppl_gen.models
    from ppl_gen.models.catalogue import CATALOGUE

    name, _, rest = text.partition(":")
    if name.endswith(".py"):
        return _from_file(Path(name), rest)
    if name not in CATALOGUE:
        known = ", ".join(CATALOGUE)
        raise Misuse(f"PROGRAM: no program {name!r}; there is {known}, or a function of yours as file.py:name")
    if not rest:
        return CATALOGUE[name].recipe()
    return _made(getattr(ppl_gen.models, name), name, _options(rest))


def _from_file(path: Path, rest: str) -> Any:
    from ppl_gen.program.program import Program, Recipe

    name, _, options = rest.partition(":")
    if not path.is_file():
        raise Misuse(f"PROGRAM: no file {path}")
    # Under the name that run_path gives, its functions belong to no importable module, so processes receive them whole.
    found = {k: v for k, v in runpy.run_path(str(path)).items() if not k.startswith("_")}
    if name not in found or not (callable(found[name]) or isinstance(found[name], Program | Recipe)):
        known = ", ".join(k for k, v in found.items() if inspect.isfunction(v) or isinstance(v, Program | Recipe))
        raise Misuse(f"PROGRAM: expected {path}:name with one of: {known}; got {rest!r}")
    made = found[name]
    maker = inspect.isfunction(made) and not inspect.signature(made).parameters
    return _made(made, name, _options(options)) if options or maker else made


def algorithm_of(text: str, extra: Mapping[str, Any] | None = None) -> Algorithm:
    """An algorithm from ``NAME`` or ``NAME:option=value,...``; an objective is given by its name.

    >>> algorithm_of("SVI:steps=10,objective=IWAE").steps
    10
    """
    import ppl_gen.inference
    from ppl_gen.inference import Objective

    name, _, rest = text.partition(":")
    known = _algorithms()
    if name not in known:
        raise Misuse(f"--algorithm: no algorithm {name!r}; there is {', '.join(known)}")
    options = {**_options(rest), **(extra or {})}
    unknown = [key for key in options if key not in {f.name for f in dataclasses.fields(known[name])}]  # type: ignore[arg-type]
    if unknown:
        fields = ", ".join(f.name for f in dataclasses.fields(known[name]))  # type: ignore[arg-type]
        raise Misuse(f"--algorithm {name}: no setting {', '.join(unknown)}; it has: {fields or 'none'}")
    kind = getattr(ppl_gen.inference, str(options.get("objective", "")), None)
    if inspect.isclass(kind) and issubclass(kind, Objective):
        options["objective"] = kind()
    made: Algorithm = _made(known[name], f"--algorithm {name}", options)
    return made


def _algorithms() -> dict[str, type[Algorithm]]:
    import ppl_gen.inference as inference

    found = {name: getattr(inference, name) for name in inference.__all__}
    kinds = {n: v for n, v in found.items() if inspect.isclass(v) and issubclass(v, inference.Algorithm)}
    return {name: kind for name, kind in kinds.items() if not inspect.isabstract(kind)}


def _made(maker: Callable[..., Any], name: str, options: Mapping[str, Any]) -> Any:
    try:
        return maker(**options)
    except (TypeError, ValueError) as error:
        raise Misuse(f"{name}: {error}") from error


def _interval(text: str) -> int | datetime.timedelta:
    """500 is a number of steps, 30s and 5m are times."""
    number, unit = (text, "") if text.isdigit() else (text[:-1], text[-1:])
    if not number.isdigit() or int(number) < 1 or unit not in ("", "s", "m"):
        raise Misuse(f"--every: expected steps such as 500, or a time such as 30s or 5m, got {text!r}")
    if not unit:
        return int(number)
    return datetime.timedelta(**{"seconds" if unit == "s" else "minutes": int(number)})


def _options(text: str) -> dict[str, Any]:
    options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise Misuse(f"expected option=value, got {part!r} in {text!r}")
        try:
            options[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key.strip()] = value
    return options


def data_of(text: str, program: Any = None) -> Any:
    """A data set by name, or the numbers of a ``.npy`` or ``.csv`` file.

    A table of one column gives (rows,), of several (rows, columns); if its header holds every argument that the model
    needs, the columns are passed by name.
    """
    import numpy as np

    import ppl_gen as pg
    from ppl_gen.data.datasets import _NAMES

    if text in _NAMES:
        return pg.load_data(text)  # type: ignore[call-overload]
    path = Path(text)
    if path.suffix.lower() not in (".npy", ".csv"):
        raise Misuse(f"DATA: expected {', '.join(_NAMES)}, or a .npy or .csv file, got {text!r}")
    if not path.is_file():
        raise Misuse(f"DATA: no file {path}")
    if path.suffix.lower() == ".npy":
        return np.load(path, allow_pickle=False)
    return _table(path, program)


def _table(path: Path, program: Any) -> Any:
    import numpy as np

    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    header = None if not rows or all(_is_number(cell) for cell in rows[0]) else [cell.strip() for cell in rows.pop(0)]
    if not rows or len({len(row) for row in rows}) > 1 or not all(_is_number(cell) for row in rows for cell in row):
        raise Misuse(f"DATA: {path}: expected rows of numbers, all of one length, under at most one line of names")
    numbers = np.array(rows, dtype=np.float64)
    model = getattr(program, "model", program)
    if header is not None and inspect.isfunction(model):
        parameters = inspect.signature(model).parameters.values()
        if {p.name for p in parameters if p.default is p.empty} <= set(header):
            return {name: numbers[:, i] for i, name in enumerate(header)}
    return numbers[:, 0] if numbers.shape[1] == 1 else numbers


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
