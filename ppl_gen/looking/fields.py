"""Receptive fields, computed and not guessed: which pixels a place of a layer can depend on at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ppl_gen.looking.asking import evaluating, scores
from ppl_gen.nn.copies import plain_copy

__all__ = ["field_boxes"]

Box = tuple[int, int, int, int]

#: What acts on single numbers, without a maximum over several: left out, it lets everything through.
_BY_NAME = {"relu", "relu_", "relu6", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "leaky_relu", "prelu"}
_BY_NAME |= {"hardtanh", "hardswish", "hardsigmoid", "logsigmoid", "sigmoid", "tanh", "threshold", "rrelu", "dropout"}
_BY_NAME |= {"batch_norm"}  # in evaluation mode
_BY_NAME |= {"clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_", "clip", "clip_"}
_ADAPTIVE = {"adaptive_max_pool2d", "_adaptive_max_pool2d", "adaptive_max_pool2d_with_indices"}


class _Spreading(TorchFunctionMode):
    """Runs a network as sums of positive numbers, in which nothing cancels and nothing is cut off.

    Filters are averages, the maximum of a pool its mean, and what acts on single numbers is left out; so the gradient
    of one place of a layer is positive at exactly the pixels of its receptive field, whatever the weights are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("conv2d", "conv_transpose2d", "linear"):
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            weight = torch.full_like(given["weight"], 1.0 / given["weight"][0].numel())
            return func(given["input"], weight, None, *args[3:], **_without(kwargs, "input", "weight", "bias"))
        if name in ("max_pool2d", "_max_pool2d", "max_pool2d_with_indices"):
            return _mean_pool(*args, **kwargs)
        if name in _ADAPTIVE:
            return _mean_adaptive(*args, **kwargs)
        if name in ("amax", "amin"):
            return torch.mean(*args, **kwargs)
        if name in ("maximum", "minimum"):
            return torch.add(*args, **kwargs)
        if name in _BY_NAME:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def _without(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}


def _mean_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    if return_indices or dilation not in (1, (1, 1), [1, 1]):
        raise ValueError(
            "network: the receptive field behind pools that are dilated, or that give indices, is not known"
        )
    return functional.avg_pool2d(x, kernel_size, stride or kernel_size, padding, ceil_mode)


def _mean_adaptive(x: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
    if return_indices:
        raise ValueError("network: the receptive field behind pools that give indices is not known")
    return functional.adaptive_avg_pool2d(x, output_size)


def field_boxes(network: nn.Module, layer: str, shape: Sequence[int], places: Sequence[tuple[int, int]]) -> list[Box]:
    """For each place (line, column) of a layer the pixels that it can depend on: top, bottom, left, right.

    ``bottom`` and ``right`` are the first pixels beyond. Fields end at the border of the image.

    Raises:
        ValueError: if a place depends on no pixel at all, or not in a way that can be followed.
    """
    generator = torch.Generator().manual_seed(0)
    # No constant: what compares neighbours (a softmax over places) would see no difference.
    x = (1 + torch.rand(1, *shape, generator=generator, dtype=torch.float64)).requires_grad_()
    kept: list[Tensor] = []
    own = _doubled(network)
    hook = own.get_submodule(layer).register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        with evaluating(own), torch.enable_grad(), _Spreading():
            scores(own, x)
    finally:
        hook.remove()
    boxes = []
    for line, column in places:
        (slope,) = torch.autograd.grad(kept[0][0, :, line, column].sum(), x, retain_graph=True, allow_unused=True)
        if slope is None or not bool(slope.any()):
            raise ValueError(f"layer: {layer!r} depends on no pixel in a way that can be followed")
        lines, columns = slope[0].abs().amax(0).nonzero(as_tuple=True)
        boxes.append((int(lines.min()), int(lines.max()) + 1, int(columns.min()), int(columns.max()) + 1))
    return boxes


def _doubled(network: nn.Module) -> nn.Module:
    """A copy in double precision, in which a mean over many pixels is no zero; nor is a gain that starts at zero."""
    own = plain_copy(network).to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in own.parameters():
            value.copy_(0.25 + 0.5 * torch.rand(value.shape, generator=generator, dtype=torch.float64))
    return own
