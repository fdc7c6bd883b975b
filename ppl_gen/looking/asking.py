"""What all the views share: rows as a network takes them, its scores, its layers, and what layers give."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.data.arrays import as_array
from ppl_gen.data.on_disk import RowsOnDisk
from ppl_gen.errors import PROGRAM_ERRORS, MissingExtraError, is_number

__all__ = [
    "COARSE",
    "Target",
    "as_rows",
    "captum_attr",
    "checked_network",
    "checked_target",
    "chosen_layer",
    "evaluating",
    "in_pieces",
    "layers_of",
    "pick",
    "recorded",
    "require_precision",
    "scores",
    "slope",
]

Target = int | Sequence[int] | Tensor | None
COARSE = (torch.float16, torch.bfloat16)  # types of three digits
CHUNK = 256  # rows that a network sees at once


def captum_attr() -> Any:
    """The module `captum.attr`, loaded when first needed.

    Raises:
        MissingExtraError: where captum is not installed.
    """
    try:
        import captum.attr
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            'saliency, deconvnets and occlusion are computed by captum: pip install "ppl_gen[looking]"'
        ) from error
    return captum.attr


def checked_network(network: Any) -> nn.Module:
    """Raises TypeError for what is no module of torch."""
    if isinstance(network, type) or not isinstance(network, nn.Module):
        got = "the class itself" if isinstance(network, type) else type(network).__name__
        raise TypeError(f'network: expected a torch.nn.Module, such as fit.module("encoder"), got {got}')
    return network


def require_precision(network: nn.Module) -> None:
    """Raise ValueError for networks in half precision, in which an optimiser of rows sees no small changes."""
    coarse = next((p.dtype for p in (*network.parameters(), *network.buffers()) if p.dtype in COARSE), None)
    if coarse is not None:
        raise ValueError(
            f"network: expected one in single or double precision, whose scores follow small changes of a row, got "
            f"{coarse}; pass copy.deepcopy(network).float()"
        )


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """The network in evaluation mode, no layer working in place; afterwards every part of it is as it was.

    A layer that works in place changes what the one before it gave, which is looked at here.
    """
    modes = {part: part.training for part in network.modules()}
    hasty: list[Any] = [part for part in modes if getattr(part, "inplace", False) is True]
    network.eval()
    for part in hasty:
        part.inplace = False
    try:
        yield network
    finally:
        for part in hasty:
            part.inplace = True
        for part, mode in modes.items():
            part.training = mode


def as_rows(x: Any, network: nn.Module, name: str = "x", *, images: bool = False) -> Tensor:
    """Rows as floating numbers of the network's type on its device, without a gradient.

    Raises:
        TypeError: for what holds no real numbers.
        ValueError: for no rows, numbers that are not finite, or (where ``images``) rows without height and width.
    """
    try:
        rows = as_array(x, name)
    except TypeError as error:
        got = str(error).rsplit(", got ", 1)[-1].split(";")[0]
        raise TypeError(f"{name}: expected rows as a tensor or an array of real numbers, got {got}") from error
    if isinstance(rows, RowsOnDisk):
        rows = rows.whole("what a network sees")
    like = next(network.parameters(), next(network.buffers(), torch.zeros(())))
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    rows = rows.detach().to(like.device, dtype)
    if rows.dim() < 2 or not rows.numel():
        raise ValueError(f"{name}: expected rows x features or rows x channels x height x width, got {_shape(rows)}")
    if images and rows.dim() != 4:
        hint = "; one image is x[None], and x.unsqueeze(1) adds a channel" if rows.dim() == 3 else ""
        raise ValueError(f"{name}: expected images, rows x channels x height x width, got {_shape(rows)}{hint}")
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return rows


def _shape(rows: Tensor) -> str:
    return f"shape {tuple(rows.shape)}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def output(network: nn.Module, x: Tensor) -> Any:
    """What the network gives; a first layer that works in place changes a copy of the rows."""
    return network(x.clone())


def scores(network: nn.Module, x: Tensor) -> Tensor:
    """What the network says about each row, rows x numbers: scores before a softmax, or the mean of a code.

    Networks that give a distribution over real numbers (encoders) are read by its mean; those over classes by their
    method ``logits``, since a distribution has normalised its scores.

    Raises:
        ValueError: for rows that the network cannot read.
        TypeError: for networks that give something else.
    """
    try:
        found: Any = output(network, x)
        logits: Any = getattr(network, "logits", None)
        if not isinstance(found, Tensor) and hasattr(found, "logits") and callable(logits):
            found = logits(x.clone())
    except PROGRAM_ERRORS as error:
        hint = "; one image is x[None]" if x.dim() == 3 else ""
        raise ValueError(
            f"x: the network cannot read rows of shape {tuple(x.shape[1:])}: {_first_line(error)}{hint}"
        ) from error
    if not isinstance(found, Tensor):
        if hasattr(found, "logits"):
            raise TypeError(
                "network: it gives a distribution over classes, which no longer has the scores before the softmax; "
                "pass a network that gives scores"
            )
        found = _mean(found)
    if not isinstance(found, Tensor) or not found.is_floating_point() or not found.dim():
        raise TypeError(f"network: expected one that gives rows x numbers, got {type(found).__name__}")
    if len(found) != len(x):
        raise ValueError(f"network: expected one output for each of {len(x)} rows, got {_shape(found)}")
    return found.reshape(len(x), -1)


def _mean(found: Any) -> Any:
    """Of a distribution; anything else as it is."""
    try:
        return getattr(found, "mean", found)
    except NotImplementedError as error:
        raise TypeError(
            f"network: it gives a {type(found).__name__}, whose mean is not known in closed form (the code of a flow "
            "posterior has none); pass a module that gives numbers"
        ) from error


class Scoring(nn.Module):
    """A network whose output is its `scores`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return scores(self.network, x)


def slope(value: Tensor, x: Tensor) -> Tensor:
    """The gradient of a number with respect to x.

    Raises:
        ValueError: where the network cuts it off.
    """
    found = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise ValueError(
            "network: what it gives does not follow x by a gradient; is it run under torch.no_grad, or x detached?"
        )
    return found


def checked_target(target: Target, found: Tensor) -> Tensor:
    """Which score of each row is looked at; the largest where ``target`` is None.

    Raises:
        ValueError: unless it is one of the numbers 0 ... outputs - 1, or as many of them as there are rows.
    """
    if target is None:
        return found.argmax(1)
    rows, outputs = found.shape
    wanted = f"a whole number from 0 to {outputs - 1}, or one for each of the {rows} rows"
    try:
        given = torch.as_tensor(target)
    except Exception as error:
        raise ValueError(f"target: expected {wanted}, got {target!r}") from error
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if not whole or given.device.type == "meta" or given.shape not in ((), (rows,)):
        raise ValueError(f"target: expected {wanted}, got {target!r}")
    if bool(((given < 0) | (given >= outputs)).any()):
        raise ValueError(f"target: expected {wanted}, got {target!r}")
    return given.to(found.device).long().expand(rows)


def pick(found: Tensor, target: Tensor) -> Tensor:
    """The score of each row that ``target`` names."""
    return found.gather(1, target.unsqueeze(1)).squeeze(1)


def in_pieces(x: Tensor, size: int = CHUNK) -> Iterator[Tensor]:
    """Rows in pieces that fit into memory."""
    return iter(x.split(size))


def layers_of(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """Layers of some kinds by name, in the order of their definition."""
    return {name: part for name, part in network.named_modules() if isinstance(part, kinds)}


def chosen_layer(
    network: nn.Module, layer: Any, kinds: tuple[type[nn.Module], ...], what: str, *, argument: str = "layer"
) -> str:
    """The name of a layer: ``layer``, or where it is None the first of these kinds.

    Raises:
        ValueError: if there is none of the kind, or none of that name.
        TypeError: if ``layer`` is no name.
    """
    if layer is None:
        found = layers_of(network, kinds)
        if not found:
            raise ValueError(
                f"network: expected one with {what}, got {type(network).__name__} without any; name a layer of it: "
                f"{_leaves(network)}"
            )
        return next(iter(found))
    if not isinstance(layer, str):
        raise TypeError(f"{argument}: expected the name of a layer, got {type(layer).__name__}")
    names = [name for name, _ in network.named_modules()]
    if layer not in names:
        raise ValueError(f"{argument}: there is no {layer!r}; it has {_leaves(network)}")
    return layer


def _leaves(network: nn.Module) -> str:
    """Names of the layers that have no parts."""
    return ", ".join(repr(name) for name, part in network.named_modules() if not list(part.children()))


def recorded(network: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What layers give for each row, on the processor, without a gradient; "" is the network itself (its `scores`).

    Raises:
        ValueError: for a layer that is not called, is called more than once, or gives no tensor of as many rows.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    parts = dict(network.named_modules())
    for piece in in_pieces(x):
        for name, value in _once(network, parts, piece, [name for name in names if name]).items():
            kept[name].append(value.cpu())
        if "" in kept:
            kept[""].append(_own(network, piece).cpu())
    return {name: torch.cat(values) for name, values in kept.items()}


def _own(network: nn.Module, x: Tensor) -> Tensor:
    """What the network itself gives: a tensor as it is (a convolution alone gives maps), else its `scores`."""
    with evaluating(network), torch.no_grad():
        found = scores(network, x)
        whole = output(network, x)
    return whole if isinstance(whole, Tensor) else found


def _once(network: nn.Module, parts: dict[str, nn.Module], x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    calls: dict[str, list[Any]] = {name: [] for name in names}

    def keep(name: str, given: Any) -> None:
        # A copy: a function that works in place would change it behind the layer's back.
        calls[name].append(given.clone() if isinstance(given, Tensor) else given)

    hooks = [parts[name].register_forward_hook(lambda _, __, given, name=name: keep(name, given)) for name in names]
    try:
        with evaluating(network), torch.no_grad():
            scores(network, x)
    finally:
        for hook in hooks:
            hook.remove()
    for name, outputs in calls.items():
        if len(outputs) != 1:
            often = f"{len(outputs)} times" if outputs else "not at all"
            raise ValueError(f"layer: {name!r} is called {often} for a row; name one that is called once")
        if not isinstance(outputs[0], Tensor) or len(outputs[0]) != len(x):
            raise ValueError(f"layer: {name!r} gives no tensor with one row for each row of x")
    return {name: outputs[0] for name, outputs in calls.items()}


def require_share(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` lies between 0 and 1, both left out."""
    if not is_number(value) or not 0 < float(value) < 1:
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}")
