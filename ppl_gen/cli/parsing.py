"""How the words of a command become objects: programs, algorithms, data, times."""

from __future__ import annotations

import ast
import csv
import dataclasses
import datetime
import inspect
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_gen.inference import Algorithm

__all__ = ["Misuse", "algorithm_of", "algorithms", "data_of", "interval_of", "program_of"]


class Misuse(Exception):
    """The command cannot be understood: exit code 2."""


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
    known = algorithms()
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


def algorithms() -> dict[str, type[Algorithm]]:
    """The algorithms that can be asked for, by name."""
    import ppl_gen.inference as inference

    found = {name: getattr(inference, name) for name in inference.__all__}
    kinds = {n: v for n, v in found.items() if inspect.isclass(v) and issubclass(v, inference.Algorithm)}
    return {name: kind for name, kind in kinds.items() if not inspect.isabstract(kind)}


def _made(maker: Callable[..., Any], name: str, options: Mapping[str, Any]) -> Any:
    try:
        return maker(**options)
    except (TypeError, ValueError) as error:
        raise Misuse(f"{name}: {error}") from error


def interval_of(text: str) -> int | datetime.timedelta:
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
