r"""Which numbers of a row a score depends on: the gradient of the score, as it is or sent back by other rules.

.. math:: M_{ij} = \max_c \left| \frac{\partial S}{\partial x_{ijc}} \right|
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_gen.errors import is_number
from ppl_gen.looking.alone import read_alone
from ppl_gen.looking.asking import (
    Scoring,
    Target,
    captum_attr,
    checked_network,
    checked_target,
    chosen_layer,
    evaluating,
    in_pieces,
    layers_of,
    recorded,
    scores,
    slope,
)
from ppl_gen.nn.copies import plain_copy

__all__ = ["deconvnet", "guided_backprop", "saliency"]

_RECTIFIERS = {"relu", "relu_", "threshold", "threshold_"}
_CLAMPS = {"clamp", "clamp_", "clamp_min", "clamp_min_"}  # rectifiers where they clamp at zero from below alone

_WITH_TOP = {"hardtanh", "hardtanh_"}  # ReLU6, where they begin at zero
_TELLING = 8  # numbers, and rows, by which an operation is known that cuts off what is negative


def saliency(network: nn.Module, x: Any, target: Target = None) -> Tensor:
    r"""How strongly one score of each row depends on each of its pixels (or columns).

    .. math:: M_{ij} = \max_c \left| \frac{\partial S_k(x)}{\partial x_{ijc}} \right|

    S_k is the score before the softmax: after it, a pixel could stand out because it speaks against the other classes.
    Computed by `captum.attr.Saliency`.

    Args:
        network: any module from rows to scores, or to a code (`ppl_gen.looking` says what it may give).
        x: rows x channels x height x width, or rows x features.
        target: k, one for all rows or one for each; None: the largest score of each row.

    Returns:
        Rows x height x width for images (the largest over the channels), else the shape of ``x``; not negative, in
        units of the score per unit of x.

    Raises:
        TypeError: for what is no module, or gives no numbers.
        ValueError: for rows that it cannot read, or a target that is no output of it.
        MissingExtraError: without captum (``ppl_gen[looking]``).

    References:
        Deep inside convolutional networks (Simonyan, Vedaldi and Zisserman, 2014).

    Example:
        >>> import torch
        >>> line = torch.nn.Linear(3, 1)
        >>> found = saliency(line, torch.randn(4, 3))
        >>> torch.equal(found, line.weight.abs().expand(4, 3))  # of a linear score: the sizes of its weights
        True
    """
    rows, picked = _asked(network, x, target)
    captum = captum_attr()
    _require_slope(network, rows[:1])
    with evaluating(network), torch.enable_grad():
        found = torch.cat(
            [
                captum.Saliency(Scoring(network)).attribute(piece.requires_grad_(), target=which, abs=True)
                for piece, which in zip(map(torch.clone, in_pieces(rows)), in_pieces(picked), strict=True)
            ]
        ).detach()
    return found.amax(1) if found.dim() == 4 else found


def deconvnet(network: nn.Module, x: Any, target: Target = None, *, layer: str | None = None) -> Tensor:
    r"""A score, or a unit of a layer, sent back to the pixels by a deconvolutional network.

    .. math:: R^{(l)} = \mathbf{1}[R^{(l+1)} > 0] \; R^{(l+1)} \quad \text{at each rectifier}

    Convolutions are transposed, and pooling puts each signal back where its maximum was (the switches), as in the
    gradient. What differs is the rectifier: the signal on its way back is rectified itself, whatever went forward.
    Computed by `captum.attr.Deconvolution`.

    Args:
        network: as for `saliency`; all its rectifiers have to be `torch.nn.ReLU` modules.
        x: rows x channels x height x width, or rows x features.
        target: which score, as for `saliency`; with ``layer`` which channel (or unit) of it, None: the most active one.
        layer: the name of a layer (as in ``network.named_modules()``) whose channel is sent back from the place where
            it is strongest, all else in the layer left out; the signal starts at 1. None: scores are sent back.

    Returns:
        A tensor of the shape of ``x``: what, shown beside the row, the score was found in.

    Raises:
        TypeError: for what is no module, or gives no numbers.
        ValueError: for rows that it cannot read, for a target or a layer that it does not have, and for networks in
            which rectifiers are missing or are functions, of which the rule cannot be changed.
        MissingExtraError: without captum (``ppl_gen[looking]``).

    References:
        Visualizing and understanding convolutional networks (Zeiler and Fergus, 2014).

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> for p, w in zip(net.parameters(), ([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0], [[1.0, -1.0]], [0.0])):
        ...     p.data = torch.tensor(w)
        >>> deconvnet(net, torch.tensor([[-1.0, 1.0]]))  # the first unit is off, and is shown; the negative one is not
        tensor([[1., 0.]])
        >>> guided_backprop(net, torch.tensor([[-1.0, 1.0]]))
        tensor([[0., 0.]])
    """
    return _sent_back(network, x, target, layer, "Deconvolution")


def guided_backprop(network: nn.Module, x: Any, target: Target = None, *, layer: str | None = None) -> Tensor:
    r"""A score, or a unit of a layer, sent back to the pixels by guided backpropagation.

    .. math:: R^{(l)} = \mathbf{1}[f^{(l)} > 0] \; \mathbf{1}[R^{(l+1)} > 0] \; R^{(l+1)} \quad
              \text{at each rectifier}

    The signal passes a rectifier only where it is positive itself (as in `deconvnet`) and where the rectifier let
    something through on the way forward (as in the gradient). Computed by `captum.attr.GuidedBackprop`.

    Arguments, result and errors are those of `deconvnet`.

    References:
        Striving for simplicity: the all convolutional net (Springenberg, Dosovitskiy, Brox and Riedmiller, 2015).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        >>> guided_backprop(net, torch.rand(5, 1, 4, 4), target=2).shape
        torch.Size([5, 1, 4, 4])
    """
    return _sent_back(network, x, target, layer, "GuidedBackprop")


def _asked(network: nn.Module, x: Any, target: Target) -> tuple[Tensor, Tensor]:
    checked_network(network)
    rows = read_alone(x, network)
    with evaluating(network), torch.no_grad():
        found = torch.cat([scores(network, piece) for piece in in_pieces(rows)])
    return rows, checked_target(target, found)


def _sent_back(
    network: nn.Module,
    x: Any,
    target: Target,
    layer: str | None,
    rule: Literal["Deconvolution", "GuidedBackprop"],
) -> Tensor:
    checked_network(network)
    rows = read_alone(x, network)
    if layer is None:
        rows, picked = _asked(network, rows, target)
    else:
        layer = chosen_layer(network, layer, (nn.Module,), "layers")
        picked = _channels(network, rows, target, layer)
    captum = captum_attr()
    own = _without_inplace(network)
    _require_rectifiers(own, rows[:_TELLING])
    _require_slope(own, rows[:1], layer)
    found = []
    for piece, which in zip(map(torch.clone, in_pieces(rows)), in_pieces(picked), strict=True):
        with evaluating(own), torch.enable_grad(), warnings.catch_warnings():
            # It announces that it hooks the rectifiers, of a copy here.
            warnings.filterwarnings("ignore", message="Setting backward hooks on ReLU")
            asked = piece.requires_grad_()
            if layer is None:
                found.append(getattr(captum, rule)(Scoring(own)).attribute(asked, target=which))
            else:
                neuron = getattr(captum, f"Neuron{rule}")(Scoring(own), dict(own.named_modules())[layer])
                found.append(neuron.attribute(asked, neuron_selector=_strongest(which)))
    return torch.cat(found).detach()


def _strongest(channels: Tensor) -> Any:
    """Of what a layer gives, each row's channel at the place where it is strongest."""

    def select(output: Tensor) -> Tensor:
        flat = output.flatten(2) if output.dim() > 2 else output.unsqueeze(-1)
        return flat[torch.arange(len(flat), device=flat.device), channels].amax(-1)

    return select


def _channels(network: nn.Module, rows: Tensor, target: Target, layer: str) -> Tensor:
    found = recorded(network, rows, [layer])[layer]
    if found.dim() < 2:
        raise ValueError(f"layer: {layer!r} gives one number for each row, which is no layer of units")
    most = found.flatten(2).amax(-1) if found.dim() > 2 else found
    return checked_target(target, most).to(rows.device)


def _without_inplace(network: nn.Module) -> nn.Module:
    """A copy whose layers leave their inputs alone: a hook cannot stand between a tensor and itself."""
    own = plain_copy(network)
    hasty: list[Any] = [part for part in own.modules() if getattr(part, "inplace", False) is True]
    for part in hasty:
        part.inplace = False
    return own


def _require_slope(network: nn.Module, row: Tensor, layer: str | None = None) -> None:
    """Raise ValueError unless the scores, or what a layer gives, have a gradient by the row."""
    x = row.clone().requires_grad_()
    kept: list[Any] = []
    part = None if layer is None else network.get_submodule(layer)
    hook = None if part is None else part.register_forward_hook(lambda _, __, given: kept.append(given))
    try:
        with evaluating(network), torch.enable_grad():
            found = scores(network, x)
            slope((kept[0] if kept else found).sum(), x)
    finally:
        if hook is not None:
            hook.remove()


class _Rectified(TorchDispatchMode):
    """Counts rectifiers that are computed, by modules or otherwise: known by name, or by what they give."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.split(".")[-1]
        floats = [one.clone() for one in args if isinstance(one, Tensor) and one.is_floating_point()]
        given = func(*args, **(kwargs or {}))
        known = name in _RECTIFIERS or (name in _CLAMPS and _at_zero(*args[1:], **(kwargs or {})))
        self.count += known or (name in _WITH_TOP and args[1:2] == (0,)) or _cut_at_zero(given, floats)
        return given


def _at_zero(min: Any = None, max: Any = None) -> bool:
    return is_number(min) and float(min) == 0.0 and max is None


def _cut_at_zero(given: Any, floats: Sequence[Tensor]) -> bool:
    """Whether it is max(a, 0) of one of the tensors, as of torch.maximum, torch.where or a product with a > 0."""
    if not isinstance(given, Tensor) or given.numel() < _TELLING:
        return False
    alike = [one for one in floats if one.shape == given.shape and one.dtype == given.dtype]
    return any(
        int((one < 0).sum()) > 1 and bool((one > 0).any()) and torch.equal(given, one.clamp(min=0)) for one in alike
    )


def _require_rectifiers(network: nn.Module, rows: Tensor) -> None:
    """Raise ValueError unless every rectifier is a module: the rule for the others would stay that of the gradient."""
    modules = list(layers_of(network, (nn.ReLU,)).values())
    called: list[int] = []
    hooks = [part.register_forward_hook(lambda *_: called.append(1)) for part in modules]
    try:
        # With a gradient, as it is asked for later: without one a transformer runs as a single operation.
        with evaluating(network), torch.enable_grad(), _Rectified() as counted:
            scores(network, rows.clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    if not counted.count:
        raise ValueError("network: it has no rectifier (torch.nn.ReLU), where this rule would differ from the gradient")
    if counted.count != len(called):
        raise ValueError(
            f"network: {counted.count - len(called)} of its {counted.count} rectifiers are functions, or of another "
            "kind (ReLU6), whose rule cannot be changed; write them as torch.nn.ReLU modules"
        )


def require_penalty(name: str, value: Any) -> float:
    """The value as a float; raises ValueError unless it is a finite number of at least 0."""
    if not is_number(value) or not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    return float(value)
