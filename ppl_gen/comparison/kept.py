"""A comparison kept in a folder: a row that is finished is not made again, one under way goes on."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ppl_gen.comparison.lines import Line, Setup
from ppl_gen.data.batching import as_dataset
from ppl_gen.diagnostics.verdicts import Verdict
from ppl_gen.errors import IncompatibleError
from ppl_gen.evidence.estimates import Evidence
from ppl_gen.fits.checkpoints import refuse_memory
from ppl_gen.fits.identity import differing, of_algorithm, of_data, of_program, versions
from ppl_gen.fits.preparing import prepared
from ppl_gen.fits.result import Status
from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.runtime.interrupts import allowed
from ppl_gen.runtime.numbered import Numbered
from ppl_gen.runtime.threads import torch_threads

if TYPE_CHECKING:
    import pandas

__all__ = ["keep", "kept_line", "opened", "place_of"]

_CELLS = re.compile(r"fit-[A-Za-z0-9-]*-seed\d+-[0-9a-f]{6}")
_RUN = re.compile(r"run")
_KIND, _ROW = "comparison", "row of a comparison"


def place_of(folder: Path, label: str, seed: int) -> Path:
    """The folder of one row.

    >>> place_of(Path("kept"), "SVI, slow", 3).name
    'fit-SVI-slow-seed3-ecd586'
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")[:40]
    return folder / f"fit-{name}-seed{seed}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


@contextlib.contextmanager
def opened(setup: Setup, algorithms: Mapping[str, Algorithm]) -> Iterator[None]:
    """Nobody else writes in the setup's folder meanwhile; nothing is done for a setup without one.

    Raises:
        ValueError: where another comparison stands there; what differs is named.
        IncompatibleError: for an algorithm whose runs cannot be kept, or a program that cannot be gone on with.
    """
    if setup.folder is None:
        yield
        return
    for label, algorithm in algorithms.items():
        if not algorithm.resumable:
            raise IncompatibleError(
                f"folder: {label!r} cannot be kept and gone on with, as {type(algorithm).__name__} does not implement "
                "state_dict(state) and load_state_dict(state, saved); leave folder out"
            )
    records = Numbered(setup.folder, "folder", "comparison", _CELLS)
    now, settings = _identity(setup), {label: _settings(algorithm) for label, algorithm in algorithms.items()}
    with records.claimed():
        known: dict[str, Any] = {}
        if (record := records.read()) is not None:
            known = _compared(records, record.facts, now, settings)
        if record is None or not known.keys() >= settings.keys():
            records.write({"kind": _KIND, "identity": now, "algorithms": {**known, **settings}}, None)
        yield


def _identity(setup: Setup) -> dict[str, Any]:
    place = None if setup.device is None else torch.device(setup.device)
    entries: dict[str, Any] = {name: getattr(setup, name) for name in ("particles", "draws", "threads")} | {
        "device": str(place or "cpu"),
        "dtype": str(setup.dtype),
    }
    made = prepared(setup.recipe, setup.train, dtype=setup.dtype, device=place, training=False)
    with torch_threads(setup.threads), allowed(), made as (built, dataset, workspace):
        refuse_memory(built, dataset, workspace, "folder")
        held = as_dataset(setup.test, built.model, read=dataset.read, data_dim=dataset.data_dim, missing=True)
        entries |= of_data("training rows", dataset) | of_data("held-out rows", held)
        program = of_program(built, setup.recipe, dataset, workspace)
    return {"program": program, "entries": entries, "versions": versions()}


def _settings(algorithm: Algorithm) -> dict[str, Any]:
    """All that makes a row: also what a single fit may be given more of."""
    return of_algorithm(algorithm, growing=True)


def _compared(
    records: Numbered, facts: Mapping[str, Any], now: dict[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The algorithms that are known there; raises ValueError where these or the comparison are others."""
    try:
        known: dict[str, Any] = facts["algorithms"]
        found = [] if facts["kind"] == _KIND else ["it is no comparison"]
        found += differing(facts["identity"], now)
        for label in settings:
            if label in known:
                found += [f"{label!r}: {text}" for text in _different_settings(known[label], settings[label])]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"folder: {records.path} holds no comparison") from error
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"folder: {records.path} belongs to another comparison: {'; '.join(found[:5])}{more}. Choose a new folder, "
            "or another label for another algorithm"
        )
    return known


def _different_settings(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    same: dict[str, Any] = {"program": {"python": "", "entries": {}}}
    return differing({**same, "entries": kept}, {**same, "entries": now})


def kept_line(setup: Setup, label: str, seed: int) -> tuple[Line, bool] | None:
    """A finished row, without its fit, and whether there is one; None where the row is not finished."""
    assert setup.folder is not None
    record = Numbered(place_of(setup.folder, label, seed), "folder", _ROW, _RUN).read()
    if record is None:
        return None
    try:
        return _line(record.tree), bool(record.tree["fit"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"folder: {setup.folder} holds no row of {label!r}, seed {seed}") from error


def keep(setup: Setup, line: Line) -> None:
    """Write a row that would come out the same if it were made again; its fit is in its own checkpoint."""
    broken = line.fit is None and line.status == Status.FAILED  # an error that may have been the machine's
    if setup.folder is None or broken or line.status == Status.INTERRUPTED:
        return
    Numbered(place_of(setup.folder, line.label, line.seed), "folder", _ROW, _RUN).write({"kind": _ROW}, _tree(line))


def _tree(line: Line) -> dict[str, Any]:
    plain = ("label", "seed", "status", "message", "seconds", "pareto_k", "traceback", "undiagnosed")
    evidence = line.evidence
    return {
        **{name: getattr(line, name) for name in plain},
        "status": str(line.status),
        "fit": line.fit is not None,
        "verdict": None if line.verdict is None else asdict(line.verdict),
        "evidence": None if evidence is None else {f.name: getattr(evidence, f.name) for f in fields(evidence)},
        "summary": None if line.summary is None else _table(line.summary),
    }


def _line(tree: Mapping[str, Any]) -> Line:
    rest = {name: value for name, value in tree.items() if name != "fit"}
    return replace(
        Line(**rest),
        verdict=None if tree["verdict"] is None else Verdict(**tree["verdict"]),
        evidence=None if tree["evidence"] is None else Evidence(**tree["evidence"]),
        summary=None if tree["summary"] is None else _frame(tree["summary"]),
    )


def _table(frame: pandas.DataFrame) -> dict[str, Any]:
    columns = {str(name): _column(frame[name].to_numpy()) for name in frame.columns}
    return {"index": [str(name) for name in frame.index], "columns": columns, "attrs": dict(frame.attrs)}


def _column(values: np.ndarray) -> Any:
    return values if values.dtype.kind in "biuf" else [v.item() if isinstance(v, np.generic) else v for v in values]


def _frame(tree: Mapping[str, Any]) -> pandas.DataFrame:
    import pandas

    frame = pandas.DataFrame(tree["columns"], index=tree["index"])
    frame.attrs.update(tree["attrs"])
    return frame
