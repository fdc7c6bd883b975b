"""What the files of a saved fit have to hold: each is read once, checked here, and refused by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_gen.program.info import ProgramInfo

import json
from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
from torch import Tensor

from ppl_gen.fits.json_values import columns_of, list_of, number, numeral, one_of, optional, table_of, text
from ppl_gen.fitting.posteriors.base import Posterior
from ppl_gen.fitting.posteriors.kinds import CODE, OTHERS, held_whole, kind_named
from ppl_gen.runtime.atomic import is_contents

__all__ = [
    "FILES",
    "FORMAT",
    "check_diagnosis",
    "check_meta",
    "check_tensors",
    "check_tree",
    "digest",
    "judged_by",
    "positional",
    "posterior_class",
    "read_json",
    "refuse",
    "site_table",
    "tensors_of",
]

FILES = ("tensors.safetensors", "draws.nc", "diagnosis.json")  # the last one may lack
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_LARGEST = 2**53


def refuse(file: Path, what: str) -> NoReturn:
    """Raise the ValueError of a file whose contents are wrong."""
    raise ValueError(f"path: {file} is not a file of a saved fit as this version writes it: {what}; it is not loaded")


def read_json(file: Path, text: str) -> Any:
    """JSON without NaN and infinity, not nested without end."""

    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        refuse(file, f"it is no JSON ({error})")


def _site(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and value[0] in ("latent", "predicted", "observed", "deterministic", "factor")
        and text(value[1])
        and list_of(lambda size: isinstance(size, int) and size >= 0)(value[2])
        and list_of(text)(value[3])
    )


def _seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


_COUNTED = ("seconds", "steps", "gradient_evaluations")  # what a comparison adds up


def _costs(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(
        text(v) if isinstance(v, str) and n not in _COUNTED else number(v) and 0 <= v < _LARGEST
        for n, v in value.items()
    )


def _fingerprint(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and text(value.get("python"))
        and table_of(lambda e: isinstance(e, list) and len(e) in _LENGTHS.get(e[0] if e else None, ()))(
            value.get("entries")
        )
        and all(_entry(entry) for entry in value["entries"].values())
    )


_LENGTHS: dict[Any, tuple[int, ...]] = {"code": (3,), "number": (2,), "value": (2,), "tensor": (4,)}


def _entry(entry: list[Any]) -> bool:
    if entry[0] == "tensor":
        return text(entry[1]) and list_of(_seed)(entry[2]) and (text(entry[3]) or list_of(number)(entry[3]))
    if entry[0] == "number":
        return number(entry[1]) or text(entry[1])
    return all(part is None or text(part) for part in entry[1:])


_STATUS = ("converged", "finished", "stopped", "interrupted", "diverged", "failed")

#: Every field of fit.json: what it has to be, in words and as a check.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "version": ("text", text),
    "program": ("text", text),
    "algorithm": ("text", text),
    "settings": ("text", text),
    "kind": ("a word", lambda v: text(v) and v.isidentifier()),
    "status": (f"one of {', '.join(_STATUS)}", one_of(*_STATUS)),
    "message": ("text", text),
    "seed": ("a whole number of at least 0 and below 2**32", _seed),
    "cost": ("numbers of at least 0, or words, by name", _costs),
    "notes": ("texts by name", table_of(text)),
    "records": ("columns of numerals, equally long, by name", columns_of(numeral)),
    "checks": ("columns of numerals, equally long, by name", columns_of(numeral)),
    "dtype": (f"one of {', '.join(_DTYPES)}", one_of(*_DTYPES)),
    "positional": ("names, text or null", lambda v: v is None or text(v) or list_of(text)(v)),
    "data": ("text or null", optional(text)),
    "plate": ("text or null", optional(text)),
    "sites": ("[kind, distribution, event shape, plates] by name of site", table_of(_site)),
    "constants": (
        "numbers and texts by name",
        table_of(lambda v: v is None or isinstance(v, bool | str) or number(v)),
    ),
    "guide": ("svi, cavi, normal, own, lost or null", one_of("svi", "cavi", "normal", "own", "lost", None)),
    "fingerprint": ("a Python and entries by name", _fingerprint),
    "files": ("hashes by name of file", table_of(lambda v: text(v) and len(v) == 64)),
}


def check_meta(file: Path, meta: Any) -> dict[str, Any]:
    """The fields of fit.json; raises ValueError naming the first that is missing or not what it has to be."""
    if not isinstance(meta, dict):
        refuse(file, "expected fields by name")
    for name, (expected, good) in _FIELDS.items():
        if name not in meta:
            refuse(file, f"the field {name!r} is missing")
        if not good(meta[name]):
            refuse(file, f"the field {name!r} has to be {expected}, got {repr(meta[name])[:80]}")
    if meta.get("judged_by") not in ("chains", "weights", "draws", None):  # files of before have none
        refuse(file, f"the field 'judged_by' has to be chains, weights, draws or null, got {meta['judged_by']!r:.80}")
    if not isinstance(meta.get("criterion", False), bool):  # files of before have none
        refuse(file, f"the field 'criterion' has to be true or false, got {repr(meta['criterion'])[:80]}")
    if meta["checks"] and not all(float(v).is_integer() for v in meta["checks"].get("step", ["nan"])):
        refuse(file, "the field 'checks' lacks a column 'step' of whole numbers")
    folders = {name.partition("/")[0] for name in meta["files"]}
    inside = {name.partition("/")[2] for name in meta["files"]}
    if len(folders) != 1 or not is_contents(next(iter(folders))) or not set(FILES[:2]) <= inside <= set(FILES):
        refuse(file, f"the field 'files' names {sorted(meta['files'])}")
    return meta


def check_tensors(file: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Names, numbers and rows of the tensors; whether they belong to the program is asked where it runs."""
    learned = posterior_class(file, meta)
    own = () if learned is None else learned.parts
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in (*OTHERS, *own)}
    for name, value in tensors.items():
        prefix, _, rest = name.partition("/")
        if prefix not in parts or not rest:
            refuse(file, f"a tensor is named {name!r}")
        parts[prefix][rest] = value
        if prefix == "param" and value.is_floating_point() and bool(value.isnan().any()):
            refuse(file, f"{name!r} holds NaN")
        if prefix == "param" and not (value.is_floating_point() or value.is_complex()):
            refuse(file, f"{name!r} is of dtype {value.dtype}, expected {meta['dtype']}")
    if learned is not None:
        try:
            learned.check({name: parts[name] for name in own}, meta["sites"])
        except ValueError as error:
            refuse(file, f"of a fit of kind {meta['kind']!r}, {error}")
    there = {*parts["data"], *parts["constant"], *meta["constants"]}
    if meta["data"] is None and (named := positional(meta)) and there != set(named):
        refuse(file, f"the data {sorted(there)} are not the model's argument(s) {', '.join(map(repr, named))}")


def positional(meta: Mapping[str, Any]) -> list[str]:
    """The arguments that the data fill in order; one of them was written as text, and none as null, before."""
    named = meta["positional"]
    return [named] if isinstance(named, str) else list(named or ())


def posterior_class(file: Path, meta: Mapping[str, Any]) -> type[Posterior] | None:
    """The class of the posterior that was saved; None where it is code.

    Raises:
        ValueError: if no class of this kind is loaded.
    """
    if meta["kind"] == CODE:
        return None
    found = kind_named(meta["kind"])
    if found is None or not held_whole(found):
        raise ValueError(
            f"path: {file} holds a posterior of the kind {meta['kind']!r}, and no class of this kind is loaded, or "
            "more than one; import the module that defines it (derived from ppl_gen.extending.Posterior). Without "
            "program=, pg.load(path) reads draws and history"
        )
    return found


def judged_by(meta: Mapping[str, Any]) -> str | None:
    """What tells whether the draws are right; files of before say it of chains only, by their kind."""
    said: str | None = meta.get("judged_by", "chains" if meta["kind"] == "chains" else None)
    return said


def check_tree(file: Path, meta: Mapping[str, Any], read: Callable[[Path], Any]) -> Any:
    """The draws that are read without a program: a netCDF file whose posterior is of the sites of the program."""
    from ppl_gen.bridge import GROUPS, group, group_names

    try:
        tree = read(file)
        names = group_names(tree)
        posterior = group(tree, "posterior") if "posterior" in names else None
    except ImportError:
        raise
    except Exception as error:  # whatever the libraries underneath say of a file of another kind
        refuse(file, f"it cannot be read as netCDF ({type(error).__name__}: {str(error)[:120]})")
    if unknown := sorted(set(names) - set(GROUPS)):
        refuse(file, f"it has groups {unknown}")
    known = {name.replace("/", ".") for name in meta["sites"]}
    for name, value in () if posterior is None else posterior.data_vars.items():
        if name not in known:
            refuse(file, f"its posterior holds {name!r}, which is not a site of the program")
        if value.dims[:2] != ("chain", "draw") or value.dtype.kind not in "fiub":
            refuse(file, f"its posterior holds {name!r} over {value.dims}, of dtype {value.dtype}")
    if judged_by(meta) == "chains" and posterior is None:
        refuse(file, "it holds no posterior, and the fit is one of chains")
    return tree


def check_diagnosis(file: Path, value: Any) -> Any:
    """The table as `pandas.DataFrame.to_json(orient="split")` writes it, and its attributes."""
    frame, attrs = (value.get("frame"), value.get("attrs")) if isinstance(value, dict) else (None, None)
    if not isinstance(frame, dict) or not isinstance(attrs, dict) or not text(attrs.get("verdict")):
        refuse(file, "expected a frame and attrs with a verdict")
    columns, index, data = frame.get("columns"), frame.get("index"), frame.get("data")
    if not (
        isinstance(columns, list) and list_of(text)(columns) and isinstance(index, list) and isinstance(data, list)
    ):
        refuse(file, "the frame has to hold columns, index and data")
    numbers = list_of(lambda cell: cell is None or number(cell) or text(cell))
    if len(data) != len(index) or not all(numbers(row) and len(row) == len(columns) for row in data):
        refuse(file, f"the frame has {len(columns)} columns and {len(index)} rows, and data of another size")
    return value


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, ValueError, RuntimeError, KeyError, OSError) as error:
        refuse(file, f"it cannot be read as safetensors ({str(error)[:120]})")
    return loaded


def site_table(info: ProgramInfo) -> dict[str, list[Any]]:
    """What a program has to have in common with the one that was fitted, whatever its data."""
    return {n: [s.kind, s.distribution, list(s.event_shape), list(s.plates)] for n, s in info.sites.items()}


FORMAT = 2


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
