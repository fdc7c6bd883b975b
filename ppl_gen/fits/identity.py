"""What a checkpoint belongs to: program, data, algorithm, seed, dtype, device and versions, and how two of them differ.

A run may go on only as the run that it was. Numbers that are computed in a program are compared as
`ppl_gen.fits.fingerprint` compares them, all else exactly. Weights that a fit learns do not count: they are in the
checkpoint.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ppl_gen.data.batching import Dataset
from ppl_gen.data.calls import ByStep
from ppl_gen.data.on_disk import is_on_disk, on_disk
from ppl_gen.fits.fingerprint import described, differences, learned_of, settings_of
from ppl_gen.fitting.algorithm import Algorithm, Iterative
from ppl_gen.fitting.run import Run
from ppl_gen.program.program import Program, Recipe
from ppl_gen.version import __version__
from ppl_gen.workspace.isolation import without_side_effects
from ppl_gen.workspace.workspace import Workspace

__all__ = ["differing", "hash_of", "identity", "of_algorithm", "of_data", "of_program", "plain_parts", "versions"]

Identity = dict[str, Any]

_WHOLE = 2**30  # bytes of one entry that are hashed; of more, so many in blocks spread over all of it
_BLOCK = 2**20
_ALSO = ("em", "start", "relabel")  # of a program, what decides how it is learned


def identity(run: Run, recipe: Recipe, algorithm: Algorithm) -> Identity:
    """All that two runs must share for one to go on where the other stopped. JSON."""
    entries: dict[str, Any] = {"seed": run.seed, "dtype": _word(run.dtype), "device": str(run.data.device or "cpu")}
    entries |= of_algorithm(algorithm)
    entries |= of_data("data", run.data)
    if run.validation is not None:
        entries |= of_data("validation", run.validation.data)
        limit = algorithm.limit(run) if isinstance(algorithm, Iterative) else 0
        entries["validate_every (a tenth of all steps unless given)"] = run.validation.interval(limit)
    if run.start is not None:
        start = {**run.start.state.unconstrained, **run.start.state.buffers, **(run.start.point or {})}
        entries |= {f"start: {name}": hash_of(value) for name, value in start.items()}
    return {
        "program": of_program(run.program, recipe, run.data, run.workspace),
        "entries": entries,
        "versions": versions(),
    }


def of_program(program: Program, recipe: Recipe | None, data: Dataset, workspace: Workspace) -> Identity:
    """The program described, inside the workspace of a run."""
    batch = data.glimpse()
    # In a parameter store of its own: what begins at random values must not begin here, from other rows.
    with without_side_effects(), pyro.get_param_store().scope(), workspace.looking():
        learned = learned_of(plain_parts(program), batch, workspace.modules.values())
    return described(program, recipe, learned, also=_ALSO)


def plain_parts(program: Program) -> list[Callable[..., Any]]:
    """The model, and a guide that is a function: an autoguide or its class is set up by the algorithm."""
    guide = program.guide
    kind = guide.func if isinstance(guide, partial) else guide
    made = guide is None or isinstance(kind, type) or any(isinstance(part, AutoGuide) for part in _parts(guide))
    return [program.model] if made else [program.model, guide]


def _parts(guide: Any) -> Iterable[Any]:
    return guide.modules() if isinstance(guide, torch.nn.Module) else ()


def of_algorithm(algorithm: Algorithm, *, growing: bool = False) -> dict[str, Any]:
    """Its settings one by one, without those that change no number and (unless asked) that may be raised."""
    left_out = {*algorithm.idle, *(() if growing else algorithm.growing)}
    own: Any = algorithm
    parts = {f.name: getattr(own, f.name) for f in fields(own)} if is_dataclass(own) else {}
    described = settings_of({f"algorithm.{name}": value for name, value in parts.items() if name not in left_out})
    return {"algorithm": type(algorithm).__name__, **described} if parts else settings_of({"algorithm": algorithm})


def of_data(kind: str, data: Dataset) -> dict[str, Any]:
    """The entries and constants of a data set, by hashes of their numbers."""
    rest = data.original if isinstance(data.original, Mapping) else {}
    arrays = {k: v for k, v in rest.items() if isinstance(v, Tensor | np.ndarray) and k in data.read}
    arrays |= data.entries  # of a stream, of its first batch
    found: dict[str, Any] = {f"{kind}: {name}": hash_of(value) for name, value in arrays.items()}
    for name, value in data.constants.items():
        settled = value.at(None) if isinstance(value, ByStep) else value
        if isinstance(settled, Tensor | np.ndarray):
            found[f"{kind}: {name}"] = hash_of(settled)
        found |= settings_of({f"{kind}: {name} (constant)": value})
    if data.on_batch is not None:
        found |= settings_of({f"{kind}: on_batch": data.on_batch})
    return found


def hash_of(value: Tensor | np.ndarray) -> str:
    """Type, shape and numbers of an array in a line; of a very large one, the numbers of blocks all over it.

    >>> hash_of(torch.zeros(2)) == hash_of(np.zeros(2, dtype=np.float32))
    True
    >>> hash_of(torch.zeros(2)) == hash_of(torch.ones(2))
    False
    """
    if is_on_disk(value):
        rows = on_disk(value)
        return f"{list(rows.shape)} {rows.dtype} of {hash_of(rows.probe())}"
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        word, shape = _word(value.dtype), tuple(value.shape)
        raw = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else np.zeros(0, np.uint8)
    else:
        word, shape = str(value.dtype), value.shape
        raw = value.reshape(-1).view(np.uint8) if value.size else np.zeros(0, np.uint8)
    digest = hashlib.blake2b(digest_size=8)
    for begin in _places(raw.size):
        digest.update(np.ascontiguousarray(raw[begin : begin + _BLOCK]).data)
    return f"{list(shape)} {word} #{digest.hexdigest()}"


def _places(size: int) -> Iterable[int]:
    """Where blocks begin: one after another, or spread evenly."""
    if size <= _WHOLE:
        return range(0, size, _BLOCK)
    return (int(place) for place in np.linspace(0, size - _BLOCK, _WHOLE // _BLOCK))


def differing(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, a few words each.

    >>> one = {"program": {"python": "3", "entries": {}}, "entries": {"seed": 0, "data: x": "[3] float32 #a"}}
    >>> other = {"program": {"python": "3", "entries": {}}, "entries": {"seed": 1, "data: x": "[3] float32 #b"}}
    >>> differing(one, other)
    ['seed was 0, is 1', 'other numbers in data: x']
    """
    found = [
        f"{name} {_words(kept.get(part, {}).get(name), now.get(part, {}).get(name))}"
        if not _same_shape(kept.get(part, {}).get(name), now.get(part, {}).get(name))
        else f"other numbers in {name}"
        for part in ("entries", "versions")
        for name in {**kept.get(part, {}), **now.get(part, {})}
        if kept.get(part, {}).get(name) != now.get(part, {}).get(name)
    ]
    before, after = kept["program"]["entries"], now["program"]["entries"]
    found += differences(kept["program"], now["program"])
    found += [f"the program has no {name}" for name in before if name not in after]
    found += [f"the program has a new {name}" for name in after if name not in before]
    return found


def _same_shape(before: Any, after: Any) -> bool:
    """Whether both are hashes of arrays of one type and shape."""
    one, other = (str(value).partition(" #") for value in (before, after))
    return bool(one[1]) and one[0] == other[0]


def _words(before: Any, after: Any) -> str:
    if before is None or after is None:
        return "is new" if before is None else "is not given"
    was, is_ = (_shown(value) for value in (before, after))
    return f"was {was}, is {is_}" if was != is_ else "changed"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        kind = value[0]
        return "a function" if kind == "code" else "a tensor" if kind == "tensor" else str(value[1])
    return str(value).partition(" #")[0]


@cache
def versions() -> dict[str, str]:
    """The versions that decide the numbers."""
    return {
        "ppl_gen": __version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "pyro-ppl": pyro.__version__,
        "numpy": np.__version__,
    }


def _word(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
