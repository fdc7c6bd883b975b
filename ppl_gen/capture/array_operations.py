"""Operations of torch in NumPy, for small tensors: what costs torch 2 us of dispatch costs NumPy 0.3.

`TEXT` holds those that are an expression of Python, `FUNCTIONS` the others, with torch's arguments in torch's order.
Both work in float64, with the same numbers as torch up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from ppl_gen.capture.tape import RecordingRefused

__all__ = ["FUNCTIONS", "TEXT"]

Array = Any  # an array, or one of NumPy's numbers

#: By name; the arguments go into the braces.
TEXT: dict[str, str] = {
    "aten::add.Tensor": "{0} + {1}",
    "aten::add.Scalar": "{0} + {1}",
    "aten::sub.Tensor": "{0} - {1}",
    "aten::sub.Scalar": "{0} - {1}",
    "aten::rsub.Scalar": "{1} - {0}",
    "aten::mul.Tensor": "{0} * {1}",
    "aten::mul.Scalar": "{0} * {1}",
    "aten::div.Tensor": "{0} / {1}",
    "aten::div.Scalar": "{0} / {1}",
    "aten::neg": "-{0}",
    "aten::reciprocal": "1.0 / {0}",
    "aten::lt.Scalar": "{0} < {1}",
    "aten::lt.Tensor": "{0} < {1}",
    "aten::le.Scalar": "{0} <= {1}",
    "aten::le.Tensor": "{0} <= {1}",
    "aten::gt.Scalar": "{0} > {1}",
    "aten::gt.Tensor": "{0} > {1}",
    "aten::ge.Scalar": "{0} >= {1}",
    "aten::ge.Tensor": "{0} >= {1}",
    "aten::eq.Scalar": "{0} == {1}",
    "aten::eq.Tensor": "{0} == {1}",
    "aten::ne.Scalar": "{0} != {1}",
    "aten::ne.Tensor": "{0} != {1}",
    "aten::mm": "{0} @ {1}",
    "aten::mv": "{0} @ {1}",
    "aten::bmm": "{0} @ {1}",
    "aten::dot": "{0} @ {1}",
    "aten::t": "{0}.T",
    "aten::transpose.int": "{0}.swapaxes({1}, {2})",
    "aten::permute": "{0}.transpose({1})",
    "aten::sigmoid_backward": "{0} * (1.0 - {1}) * {1}",
    "aten::tanh_backward": "{0} * (1.0 - {1} * {1})",
}


_MANY, _SHORT = 256, 8  # numbers of an array; numbers along an axis
_ADD, _MAXIMUM = cast(Any, np.add), cast(Any, np.maximum)  # their stubs ask for literals


def _total(a: Array, axes: Sequence[int] | None = None, keep: bool = False) -> Array:
    if axes is None or len(axes) != 1 or np.size(a) < _MANY or a.dtype != np.float64:
        return _ADD.reduce(a, axis=tuple(axes) if axes else None, keepdims=keep)
    return _reduced(_ADD, a, axes[0], keep)


def _reduced(operation: Any, a: np.ndarray, axis: int, keep: bool) -> Array:
    """Along one axis of a large array. NumPy's own loop is slow where it would be short: then slice by slice."""
    axis %= a.ndim
    if a.shape[axis] <= _SHORT:
        total = functools.reduce(operation, [a[(slice(None),) * axis + (k,)] for k in range(a.shape[axis])])
        return np.expand_dims(total, axis) if keep else total
    if axis == 0 and a.ndim == 2 and a.shape[1] <= _SHORT:
        total = np.array([operation.reduce(a[:, k]) for k in range(a.shape[1])])
        return total[None] if keep else total
    return operation.reduce(a, axis=axis, keepdims=keep)


def _mean(a: Array, axes: Sequence[int] | None = None, keep: bool = False) -> Array:
    total = _total(a, axes, keep)
    return total * (np.size(total) / np.size(a))


def _max(a: Array, axis: int, keep: bool = False) -> tuple[Array, Array]:
    return np.max(a, axis=axis, keepdims=keep), np.argmax(a, axis=axis, keepdims=keep)


def _amax(a: Array, axes: Sequence[int] = (), keep: bool = False) -> Array:
    if len(axes) != 1 or np.size(a) < _MANY or a.dtype != np.float64:
        return _MAXIMUM.reduce(a, axis=tuple(axes) or None, keepdims=keep)
    return _reduced(_MAXIMUM, a, axes[0], keep)


def _norm(a: Array, order: float = 2, axes: Sequence[int] | None = None, keep: bool = False) -> Array:
    if order not in (1, 2):
        raise RecordingRefused(f"a norm of order {order} in NumPy")
    return _total(np.abs(a), axes, keep) if order == 1 else np.sqrt(_total(a * a, axes, keep))


def _logsumexp(a: Array, axes: Sequence[int], keep: bool = False) -> Array:
    highest = _amax(a, axes, True)
    finite = np.where(np.isinf(highest), 0.0, highest)
    total: Array = np.log(_total(np.exp(a - finite), axes, True)) + finite
    return total if keep else total.squeeze(tuple(axes))


def _sign(a: Array) -> Array:
    return np.where(np.isnan(a), 0.0, np.sign(a))  # as torch has it


def _xlogy(a: Array, b: Array) -> Array:
    return np.where((a == 0) & ~np.isnan(b), 0.0, a * np.log(b))


def _sigmoid(a: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-a))


def _log_sigmoid(a: Array) -> tuple[Array, Array]:
    return -np.logaddexp(0.0, -a), a  # torch's second result is scratch for the gradient


def _log_sigmoid_backward(gradient: Array, a: Array, scratch: Array) -> Array:
    return gradient / (1.0 + np.exp(a))


def _softplus(a: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    return np.where(a * beta > threshold, a, np.log1p(np.exp(a * beta)) / beta)


def _softplus_backward(gradient: Array, a: Array, beta: float, threshold: float) -> Array:
    return np.where(a * beta > threshold, gradient, gradient / (1.0 + np.exp(-a * beta)))


def _cross_entropy(
    logits: Array, target: Array, weight: Array | None = None, positive: Array | None = None, reduction: int = 1
) -> Array:
    """Of zeros and ones, from logits; reduction 0 is none, 1 the mean, 2 the sum."""
    scale = 1.0 if positive is None else 1.0 + (positive - 1.0) * target
    loss = (1.0 - target) * logits + scale * (np.log1p(np.exp(-np.abs(logits))) + np.maximum(-logits, 0.0))
    loss = loss if weight is None else loss * weight
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


def _select_backward(gradient: Array, shape: Sequence[int], axis: int, index: int) -> Array:
    whole = np.zeros(shape)
    whole[(slice(None),) * (axis % len(shape)) + (index,)] = gradient
    return whole


def _slice_backward(gradient: Array, shape: Sequence[int], axis: int, start: int, end: int, step: int) -> Array:
    whole = np.zeros(shape)
    whole[(slice(None),) * (axis % len(shape)) + (slice(start, end, step),)] = gradient
    return whole


def _pad(a: Array, widths: Sequence[int], value: float = 0.0) -> Array:
    """Pairs of widths from the last axis on; negative ones cut."""
    shape, into, out = _padding(np.shape(a), tuple(widths))
    if shape is None:
        return a[out]
    whole = np.empty(shape)
    whole.fill(value)
    whole[into] = a[out]
    return whole


@functools.lru_cache(1024)
def _padding(shape: tuple[int, ...], widths: tuple[int, ...]) -> tuple[tuple[int, ...] | None, Any, Any]:
    """The padded shape (None where nothing is added), and the places that are filled, and by which."""
    wide, into, out = list(shape), [slice(None)] * len(shape), [slice(None)] * len(shape)
    for axis, (low, high) in enumerate(zip(widths[::2], widths[1::2], strict=True), 1):
        size = wide[-axis]
        wide[-axis] = size + low + high
        out[-axis] = slice(max(-low, 0), size - max(-high, 0))
        into[-axis] = slice(max(low, 0), wide[-axis] - max(high, 0))
    return tuple(wide) if max(widths) > 0 else None, tuple(into), tuple(out)


def _index(a: Array, places: Sequence[Array | None]) -> Array:
    return a[tuple(slice(None) if place is None else place for place in places)]


def _index_put(a: Array, places: Sequence[Array | None], values: Array, accumulate: bool = False) -> Array:
    whole: Array = np.array(a)
    where: Any = tuple(slice(None) if place is None else place for place in places)
    if accumulate:
        np.add.at(whole, where, values)
    else:
        whole[where] = values
    return whole


def _grid(places: np.ndarray, axis: int) -> tuple[Any, ...]:
    """Places along one axis as an index of the whole."""
    grid: list[Any] = list(np.ogrid[tuple(slice(size) for size in places.shape)])
    grid[axis] = places
    return tuple(grid)


def _gather(a: Array, axis: int, places: np.ndarray) -> Array:
    return a[_grid(places, axis)]


def _scatter_add(a: Array, axis: int, places: np.ndarray, values: Array) -> Array:
    whole = np.array(a)
    np.add.at(whole, _grid(places, axis), values[tuple(slice(size) for size in places.shape)])
    return whole


def _masked_fill(a: Array, mask: Array, value: float) -> Array:
    return np.where(mask, value, a)


def _cumprod(a: Array, axis: int) -> Array:
    return np.cumprod(a, axis=axis)


def _cumsum(a: Array, axis: int) -> Array:
    return np.cumsum(a, axis=axis)


def _cat(parts: Sequence[Array], axis: int = 0) -> Array:
    return np.concatenate(parts, axis=axis)


def _stack(parts: Sequence[Array], axis: int = 0) -> Array:
    return np.stack(parts, axis=axis)


def _relu(a: Array) -> Array:
    return np.maximum(a, 0.0)


def _threshold_backward(gradient: Array, a: Array, threshold: float) -> Array:
    return np.where(a <= threshold, 0.0, gradient)


def _rsqrt(a: Array) -> Array:
    return 1.0 / np.sqrt(a)


def _lgamma(a: Array) -> Array:
    from scipy.special import gammaln

    return gammaln(a)


def _digamma(a: Array) -> Array:
    from scipy.special import psi

    return psi(a)


def _erf(a: Array) -> Array:
    from scipy.special import erf

    return erf(a)


def _erfc(a: Array) -> Array:
    from scipy.special import erfc

    return erfc(a)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "aten::sum": _total,
    "aten::sum.dim_IntList": _total,
    "aten::mean": _mean,
    "aten::mean.dim": _mean,
    "aten::pow.Tensor_Scalar": np.power,
    "aten::exp": np.exp,
    "aten::log": np.log,
    "aten::log1p": np.log1p,
    "aten::expm1": np.expm1,
    "aten::exp2": np.exp2,
    "aten::log2": np.log2,
    "aten::log10": np.log10,
    "aten::logaddexp": np.logaddexp,
    "aten::sqrt": np.sqrt,
    "aten::rsqrt": _rsqrt,
    "aten::abs": np.abs,
    "aten::sgn": _sign,
    "aten::sign": _sign,
    "aten::sin": np.sin,
    "aten::cos": np.cos,
    "aten::tan": np.tan,
    "aten::sinh": np.sinh,
    "aten::cosh": np.cosh,
    "aten::tanh": np.tanh,
    "aten::asin": np.arcsin,
    "aten::acos": np.arccos,
    "aten::atan": np.arctan,
    "aten::atan2": np.arctan2,
    "aten::hypot": np.hypot,
    "aten::floor": np.floor,
    "aten::ceil": np.ceil,
    "aten::trunc": np.trunc,
    "aten::erf": _erf,
    "aten::erfc": _erfc,
    "aten::lgamma": _lgamma,
    "aten::digamma": _digamma,
    "aten::maximum": np.maximum,
    "aten::minimum": np.minimum,
    "aten::logical_and": np.logical_and,
    "aten::logical_or": np.logical_or,
    "aten::logical_not": np.logical_not,
    "aten::bitwise_and.Tensor": np.bitwise_and,
    "aten::bitwise_not": np.invert,
    "aten::isnan": np.isnan,
    "aten::where.self": np.where,
    "aten::clamp_min": np.maximum,
    "aten::clamp_max": np.minimum,
    "aten::max.dim": _max,
    "aten::amax": _amax,
    "aten::logsumexp": _logsumexp,
    "aten::linalg_vector_norm": _norm,
    "aten::xlogy.Tensor": _xlogy,
    "aten::sigmoid": _sigmoid,
    "aten::log_sigmoid_forward": _log_sigmoid,
    "aten::log_sigmoid_backward": _log_sigmoid_backward,
    "aten::softplus": _softplus,
    "aten::softplus_backward": _softplus_backward,
    "aten::binary_cross_entropy_with_logits": _cross_entropy,
    "aten::select_backward": _select_backward,
    "aten::slice_backward": _slice_backward,
    "aten::constant_pad_nd": _pad,
    "aten::index.Tensor": _index,
    "aten::index_put": _index_put,
    "aten::gather": _gather,
    "aten::scatter_add": _scatter_add,
    "aten::masked_fill.Scalar": _masked_fill,
    "aten::cumprod": _cumprod,
    "aten::cumsum": _cumsum,
    "aten::flip": np.flip,
    "aten::relu": _relu,
    "aten::threshold_backward": _threshold_backward,
    "aten::cat": _cat,
    "aten::stack": _stack,
    "aten::clone": np.array,
    # In place: `ppl_gen.capture.arrays` gives the result a name of its own, where no view could see the difference.
    "aten::clamp_": np.maximum,  # or the minimum: `ppl_gen.capture.arrays` writes clamping out
    "aten::masked_fill_.Scalar": _masked_fill,
    "aten::logical_and_": np.logical_and,
}
