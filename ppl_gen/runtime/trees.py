"""Nested values of tensors, numbers and words as tensors by name and JSON, and back, bit for bit."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["decode", "encode", "packed", "unpacked"]

_DEEPEST = 60
_TAGS = ("tensor", "array", "float", "tuple", "map", "counter")
_NATIVE = frozenset(
    "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64".split()
)  # dtypes that every reader of the format knows; others are written as bytes


def encode(tree: Any, where: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """``tree`` as a value of JSON, and the tensors that it names.

    Tensors (dtype, shape, memory layout and device), numpy arrays and numbers, numbers of Python, words, None, lists,
    tuples, and mappings whose keys are any of these but tensors. Tensors are copied.

    Raises:
        TypeError: for anything else, with the place where it stands below ``where``.

    >>> encode({"mean": torch.zeros(2), 3: [1, float("nan"), None]})[0]["map"][1]
    [3, [1, {'float': 'nan'}, None]]
    """
    tensors: dict[str, Tensor] = {}
    return _encoded(tree, where, tensors, 0), tensors


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `encode` gave ``value`` and ``tensors`` for.

    Raises:
        ValueError: for what `encode` does not write.

    >>> decode(*encode(({1: torch.ones(2)}, -0.0, "word")))
    ({1: tensor([1., 1.])}, -0.0, 'word')
    """
    try:
        return _decoded(value, tensors, 0)
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"it holds what is never written ({type(error).__name__}: {error})") from error


def packed(tree: Any) -> bytes:
    """``tree`` as bytes, without pickle: the length of its JSON, that, and its tensors.

    >>> unpacked(packed({1: torch.ones(2), "step": 3}))
    {1: tensor([1., 1.]), 'step': 3}
    """
    from safetensors.torch import save

    value, tensors = encode(tree)
    text = json.dumps(value, allow_nan=False).encode()
    return len(text).to_bytes(8, "big") + text + save(tensors)


def unpacked(raw: bytes) -> Any:
    """The tree that `packed` gave ``raw`` for."""
    from safetensors.torch import load

    end = 8 + int.from_bytes(raw[:8], "big")
    return decode(json.loads(raw[8:end]), load(raw[end:]))


def _encoded(value: Any, where: str, tensors: dict[str, Tensor], depth: int) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if depth > _DEEPEST:
        raise TypeError(f"{where}: nested deeper than {_DEEPEST} levels, which a checkpoint cannot hold")
    if isinstance(value, Tensor):
        return _encoded_tensor(value, where, tensors)
    if isinstance(value, np.ndarray | np.generic):
        return _encoded_array(value, where, tensors)
    if kind is list:
        return [_encoded(part, f"{where}[{i}]", tensors, depth + 1) for i, part in enumerate(value)]
    if kind is tuple:
        return {"tuple": [_encoded(part, f"{where}[{i}]", tensors, depth + 1) for i, part in enumerate(value)]}
    if isinstance(value, Mapping):
        pairs = [
            [_encoded_key(key, where, depth), _encoded(part, f"{where}[{key!r}]", tensors, depth + 1)]
            for key, part in value.items()
        ]
        return {"counter" if kind is collections.Counter else "map": pairs}
    raise TypeError(
        f"{where}: a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; it holds tensors, numbers, "
        "words, None, and lists, tuples and mappings of these"
    )


def _encoded_key(key: Any, where: str, depth: int) -> Any:
    if isinstance(key, Tensor | np.ndarray):
        raise TypeError(f"{where}: a key that is a {type(key).__name__}; expected numbers or words")
    return _encoded(key, f"{where}: the key {key!r}", {}, depth + 1)


def _encoded_tensor(value: Tensor, where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise TypeError(f"{where}: a tensor of layout {value.layout}, which a checkpoint cannot hold; only dense ones")
    flat = value.detach().resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)
    word = str(value.dtype).removeprefix("torch.")
    name = _named(where, tensors, flat if word in _NATIVE else flat.reshape(-1).view(torch.uint8))
    entry: dict[str, Any] = {"tensor": name, "dtype": word, "shape": list(value.shape)}
    if value.stride() != flat.stride() and _is_dense(value):
        entry["stride"] = list(value.stride())  # products of a matrix and of its transpose differ in their last bits
    if value.device.type != "cpu":
        entry["device"] = str(value.device)
    return entry


def _named(where: str, tensors: dict[str, Tensor], value: Tensor) -> str:
    name = where if where not in tensors else f"{where} {len(tensors)}"
    tensors[name] = value
    return name


def _is_dense(value: Tensor) -> bool:
    """Whether its numbers fill their memory without gaps or repetitions, in whatever order of the axes."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _encoded_array(value: np.ndarray | np.generic, where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    array = np.ascontiguousarray(value)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{where}: a numpy array of dtype {array.dtype}, which a checkpoint cannot hold; only numbers")
    raw = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.size else torch.empty(0).byte()
    entry: dict[str, Any] = {
        "array": _named(where, tensors, raw),
        "dtype": array.dtype.str,
        "shape": list(np.shape(value)),
    }
    return entry | ({"scalar": True} if isinstance(value, np.generic) else {})


def _decoded(value: Any, tensors: Mapping[str, Tensor], depth: int) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth > _DEEPEST + 1:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    if isinstance(value, list):
        return [_decoded(part, tensors, depth + 1) for part in value]
    tag = next((tag for tag in _TAGS if tag in value), None)
    if tag is None:
        raise ValueError(f"it holds an object without a kind: {str(value)[:60]}")
    return _READERS[tag](value, tensors, depth)


def _tensor(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], _depth: int) -> Tensor:
    dtype, shape = getattr(torch, entry["dtype"]), _sizes(entry["shape"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{entry['dtype']!r} is no dtype")
    if entry["dtype"] in _NATIVE:
        value = tensors[entry["tensor"]]
        if value.dtype is not dtype or list(value.shape) != shape:
            raise ValueError(
                f"{entry['tensor']} is {value.dtype} of shape {list(value.shape)}, and not {dtype}, {shape}"
            )
    else:
        raw = _raw(entry["tensor"], tensors, math.prod(shape) * dtype.itemsize)
        value = raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
    if "stride" in entry:
        value = torch.empty_strided(shape, _strides(entry["stride"], shape), dtype=dtype).copy_(value)
    else:
        value = value.clone()
    return value.to(entry["device"]) if "device" in entry else value


def _strides(value: Any, shape: list[int]) -> list[int]:
    """Strides that stay inside the memory of so many numbers."""
    strides = _sizes(value)
    if len(strides) != len(shape) or not _is_dense(torch.empty(shape, device="meta").as_strided(shape, strides)):
        raise ValueError(f"strides {strides} do not belong to a tensor of shape {shape}")
    return strides


def _array(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], _depth: int) -> Any:
    dtype, shape = np.dtype(entry["dtype"]), _sizes(entry["shape"])
    if dtype.kind not in "biufc":
        raise ValueError(f"{entry['dtype']!r} is no dtype of numbers")
    raw = _raw(entry["array"], tensors, math.prod(shape) * dtype.itemsize)
    array = np.frombuffer(bytes(raw.numpy()), dtype=dtype).reshape(shape).copy()
    return array[()] if entry.get("scalar") is True else array


def _raw(name: str, tensors: Mapping[str, Tensor], size: int) -> Tensor:
    raw = tensors[name]
    if raw.dtype is not torch.uint8 or raw.dim() != 1 or raw.numel() != size:
        raise ValueError(f"the tensor {name} has {raw.numel()} bytes, and its entry says {size}")
    return raw.clone()  # aligned, and nobody else's


def _sizes(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**48 for n in value):
        raise ValueError(f"{str(value)[:60]} are no sizes")
    return value


def _float(entry: Mapping[str, Any], _tensors: Mapping[str, Tensor], _depth: int) -> float:
    if entry["float"] not in ("nan", "inf", "-inf"):
        raise ValueError(f"{str(entry['float'])[:60]!r} is written as a number")
    return float(entry["float"])


def _pairs(kind: Callable[[Any], Any], tag: str) -> Callable[..., Any]:
    def read(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], depth: int) -> Any:
        return kind(
            {_decoded(key, {}, depth + 1): _decoded(part, tensors, depth + 1) for key, part in entry[tag]}  # no tensors
        )

    return read


_READERS: dict[str, Callable[..., Any]] = {
    "tensor": _tensor,
    "array": _array,
    "float": _float,
    "tuple": lambda entry, tensors, depth: tuple(_decoded(part, tensors, depth + 1) for part in entry["tuple"]),
    "map": _pairs(dict, "map"),
    "counter": _pairs(collections.Counter, "counter"),
}
