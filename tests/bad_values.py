"""Values that no call should take, by the kind of the parameter; the kind is read from its annotation and its name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

__all__ = ["KINDS", "Bad", "drawn", "kind_of", "numpy_of", "optional", "values"]

#: What a value is called in reports, and the function that makes it (made new for every call: nothing is shared).
Bad = tuple[str, Callable[[], Any]]

_NAMED = {"seed": "seed", "seeds": "seeds", "device": "device", "dtype": "dtype", "path": "path", "root": "path"}
_NAMED |= {"checkpoint": "path", "folder": "path"}
_ROWS = {"data", "validation", "test", "labels", "x"}
_CHOICES = ("Kind", "Schedule", "Guide", "Covariance", "Weights", "Codes", "Method")


def kind_of(parameter: inspect.Parameter) -> str:
    """One of `KINDS`: by name where a name tells more than its type, else by the type."""
    text = str(parameter.annotation).removesuffix(" | None").strip()
    if parameter.name in _NAMED:
        return _NAMED[parameter.name]
    if text in ("Tensor", "Any") and parameter.name in _ROWS:
        return "rows"
    if text in ("int", "bool", "float"):
        return {"int": "whole", "bool": "flag", "float": "number"}[text]
    if text == "str" or text.startswith("Literal") or text in _CHOICES:
        return "text"
    for start, kind in _STARTS.items():
        if text.startswith(start):
            return kind
    return "other"


_STARTS = {
    "int | Sequence[int]": "shape",
    "Sequence[int]": "widths",
    "Sequence[float]": "widths",
    "float | Mapping": "number",
    "Sequence[Callable": "other",
    "Callable": "function",
    "Mapping": "mapping",
    "Tensor": "rows",
}


def optional(parameter: inspect.Parameter) -> bool:
    """Whether None may be given."""
    return parameter.default is None or "None" in str(parameter.annotation).split(" | ")


def _plain(*items: Any) -> list[Bad]:
    return [(repr(item), lambda item=item: item) for item in items]


def _rows() -> list[Bad]:
    def filled(value: float) -> torch.Tensor:
        return torch.tensor([[1.0, 2.0], [value, 0.0], [3.0, 4.0]])

    return [
        *_plain(3.0, "rows.csv", "", math.nan, True, b"rows", 2**70, [], {}, set(), print, 1j, [[1.0, 2.0], [3.0]]),
        *_plain({"x": None}, {"x": 3.0}, {3: [[1.0, 2.0]]}, {"x": "rows"}, [["a", "b"]], [None, 1.0], [[1.0], "b"]),
        ("object()", object),
        ("a generator", lambda: iter([1.0, 2.0])),
        ("zeros(0, 2)", lambda: torch.zeros(0, 2)),
        ("zeros(3, 0)", lambda: torch.zeros(3, 0)),
        ("a scalar tensor", lambda: torch.tensor(1.0)),
        ("a meta tensor", lambda: torch.zeros(3, 2, device="meta")),
        ("a mapping of a meta tensor", lambda: {"x": torch.zeros(3, 2, device="meta")}),
        ("a complex tensor", lambda: torch.zeros(3, 2, dtype=torch.complex64)),
        ("a sparse tensor", lambda: torch.eye(2).to_sparse()),
        ("a quantised tensor", lambda: torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8)),
        ("NaN in a row", lambda: filled(math.nan)),
        ("infinity in a row", lambda: filled(math.inf)),
        ("NaN in an array", lambda: filled(math.nan).numpy()),
        ("four dimensions too many", lambda: torch.zeros(3, 2, 1, 1, 1, 1)),
        ("an object array", lambda: np.array([None, 1.0], dtype=object)),
        ("an array of text", lambda: np.array(["1.0", "2.0"])),
        ("an array of dates", lambda: np.array(["2020-01-01"], dtype="datetime64[D]")),
        ("a structured array", lambda: np.zeros(3, dtype=[("x", float)])),
        ("a masked array", lambda: np.ma.masked_array([[1.0, 2.0]], [[True, False]])),
        ("a complex array", lambda: np.zeros((3, 2), dtype=complex)),
    ]


_WRONG = (object, [], {}, 1j, print)
_DTYPES = (torch.float16, torch.bfloat16, torch.int64, torch.complex64, torch.bool, float, "float64", np.float64, 64)
_TABLE: dict[str, Callable[[], list[Bad]]] = {
    "whole": lambda: [*_plain(-1, 0, 2.5, math.nan, math.inf, "3", "", True, [2], -(2**70), *_WRONG), *_arrays()],
    "number": lambda: [*_plain(-1.0, math.nan, math.inf, -math.inf, "0.5", "", True, [0.5], *_WRONG), *_arrays()],
    "flag": lambda: [*_plain("yes", "", 2, 0.5, math.nan, *_WRONG), *_arrays()],
    "text": lambda: [*_plain("no-such-name", "", 3, math.nan, True, b"x", ["x"], object, {}, 1j), *_arrays()],
    "seed": lambda: [*_plain(-1, 2**32, 2**40, 2**70, 0.5, math.nan, math.inf, "0", True, [0], *_WRONG), *_arrays()],
    "seeds": lambda: _plain([], 3, "01", [-1], [2**40], [0.5], [math.nan], ["0"], [True], [None], [0, 0], [[0]], 1j),
    "device": lambda: _plain("abacus", "", "meta", "cuda:99", 3.5, -1, 99, math.nan, b"cpu", *_WRONG),
    "dtype": lambda: [(repr(item), lambda item=item: item) for item in (*_DTYPES, "", [], 3.5, object)],
    "path": lambda: _plain("", "\0", 3, 0.5, True, [], {}, object, b"folder", "a" * 300, 1j),
    "widths": lambda: _plain("8", [0], [-1], [2.5], ["8"], [None], [True], [math.nan], [math.inf], 1j, object, [[2]]),
    "shape": lambda: _plain(0, -1, 2.5, math.nan, "4", True, (), (0,), (2.5,), ("4",), (True,), 1j, object),
    "function": lambda: _plain(3, "cosine", 0.5, True, [], {}, [print], math.nan),
    "mapping": lambda: _plain(3, "z", 0.5, [1.0], {"no_such_site": 1.0}, {3: 1.0}, True, math.nan, object),
    "rows": _rows,
    "other": lambda: [*_plain(3, "no-such-thing", 0.5, True, math.nan, [3], {}, {"x": 3}, object, 1j), *_arrays()],
}
KINDS = tuple(_TABLE)


def _arrays() -> list[Bad]:
    return [
        ("a tensor of two", lambda: torch.tensor([1.0, 2.0])),
        ("a meta number", lambda: torch.zeros((), device="meta")),
        ("an object array", lambda: np.array([None, "x"], dtype=object)),
    ]


def values(parameter: inspect.Parameter) -> Iterator[Bad]:
    """All fixed bad values of a parameter; None among them where it may not be given."""
    yield from _TABLE[kind_of(parameter)]()
    if not optional(parameter):
        yield "None", lambda: None


_JUNK = st.one_of(
    st.text(max_size=5), st.binary(max_size=3), st.complex_numbers(), st.lists(st.text(max_size=2), max_size=2)
)
_BELOW = st.integers(max_value=-1)
_UNREAL = st.sampled_from([math.nan, math.inf, -math.inf])
_FRACTIONS = st.floats(allow_nan=False, allow_infinity=False).filter(lambda value: value != int(value))
_CELLS = st.one_of(st.none(), st.text(min_size=1, max_size=3), st.complex_numbers(), _UNREAL)
_DRAWN: dict[str, st.SearchStrategy[Any]] = {
    "whole": st.one_of(st.integers(max_value=0), _FRACTIONS, _UNREAL, st.booleans(), _JUNK),
    "number": st.one_of(st.floats(max_value=-1e-9, allow_nan=False), _UNREAL, st.booleans(), _JUNK),
    "flag": st.one_of(st.integers(min_value=2), st.floats(), _JUNK),
    "text": st.one_of(st.text(min_size=1, max_size=5).map("?".__add__), st.integers(), st.floats(), st.booleans()),
    "seed": st.one_of(_BELOW, st.integers(min_value=2**32), _FRACTIONS, _UNREAL, st.booleans(), _JUNK),
    "seeds": st.lists(st.one_of(_BELOW, st.integers(min_value=2**32), _FRACTIONS, _UNREAL), min_size=1, max_size=3),
    "device": st.one_of(st.text(max_size=5).map("?".__add__), st.floats(), _BELOW),
    "dtype": st.one_of(st.integers(), _JUNK),
    "path": st.one_of(st.integers(), st.floats(), st.booleans(), st.binary(max_size=4), st.complex_numbers()),
    "widths": st.lists(st.one_of(_BELOW, _UNREAL, st.text(max_size=2), st.booleans()), min_size=1, max_size=3),
    "shape": st.one_of(_BELOW, _FRACTIONS, _UNREAL, st.booleans(), st.text(max_size=3), st.complex_numbers()),
    "function": st.one_of(st.integers(), st.floats(), st.booleans(), _JUNK),
    "mapping": st.one_of(
        st.integers(), st.floats(), st.text(min_size=1, max_size=3), st.lists(st.floats(), min_size=1)
    ),
    "rows": st.one_of(
        st.floats(), st.text(), st.lists(_CELLS, min_size=1, max_size=4), st.dictionaries(st.text(), st.floats())
    ),
    "other": st.one_of(st.integers(), st.floats(), st.booleans(), _JUNK),
}


def drawn(parameter: inspect.Parameter) -> st.SearchStrategy[Any]:
    """Bad values of a parameter, drawn."""
    return _DRAWN[kind_of(parameter)]


def numpy_of(value: Any) -> list[Any]:
    """The same value in numpy's types, which serve wherever Python's do."""
    if isinstance(value, bool):
        return [np.bool_(value)]
    if isinstance(value, int):
        return [np.int64(value), np.int32(value), *([np.uint8(value)] if 0 <= value < 256 else [])]
    return [np.float64(value), np.float32(value)] if isinstance(value, float) else []
