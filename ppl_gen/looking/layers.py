"""What every layer of a network sees of the same rows, in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ppl_gen.arguments import require_choice
from ppl_gen.errors import require_seed
from ppl_gen.looking.alone import read_alone
from ppl_gen.looking.asking import checked_network, chosen_layer, evaluating, recorded, scores
from ppl_gen.looking.flattening import Embedding, mds, som, tsne

__all__ = ["embed_layers"]

_CHANGES_NOTHING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def embed_layers(
    network: nn.Module,
    x: Any,
    method: Literal["tsne", "mds", "som"] = "tsne",
    *,
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Embedding]:
    r"""The same rows in two dimensions as each layer of a network sees them, the rows themselves first.

    .. math:: x_i \mapsto h_l(x_i) \mapsto y_i^{(l)} \in \mathbb{R}^2, \quad l = 0, 1, \dots, L

    Groups that are mixed in the rows and apart in the last layer are what the network has learned. Compare the scores
    of the layers before the pictures.

    Args:
        network: any module.
        x: the rows.
        method: `tsne`, `mds` or `som`.
        layers: names of layers; "" is the network's own output. None: every layer without parts of its own that is
            called once and does something to its input, in their order.
        seed: of each embedding.

    Returns:
        Name of the layer -> its embedding; that of the rows is ``"x"``.

    Raises:
        TypeError: for what is no module.
        ValueError: for rows that it cannot read, layers that it does not have, or whose outputs are all equal.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> list(embed_layers(net, torch.randn(20, 4), "mds"))
        ['x', '0', '1', '2']
    """
    checked_network(network)
    rows = read_alone(x, network)
    require_choice("method", method, _METHODS)
    seed = require_seed(seed)
    if layers is None:
        names = _every_layer(network, rows[:2])
    else:
        if isinstance(layers, str | bytes) or not isinstance(layers, Sequence):
            raise TypeError(f"layers: expected names of layers in a list, got {type(layers).__name__}")
        names = [chosen_layer(network, name, (nn.Module,), "layers", argument="layers") for name in layers]
    given = {"x": rows.cpu(), **recorded(network, rows, names)}
    return {name: _named(name, _METHODS[method], value, seed) for name, value in given.items()}


_METHODS: dict[str, Any] = {"tsne": tsne, "mds": mds, "som": som}


def _named(name: str, method: Any, codes: Tensor, seed: int) -> Embedding:
    try:
        found: Embedding = method(codes, seed=seed)
    except ValueError as error:
        raise ValueError(f"layers: {name!r} cannot be shown: {error}") from error
    return found


def _every_layer(network: nn.Module, rows: Tensor) -> list[str]:
    calls: dict[str, int] = {}
    order: list[str] = []

    def note(name: str, output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        if isinstance(output, Tensor) and output.dim() > 1 and len(output) == len(rows):
            order.append(name)

    leaves = {
        name: part
        for name, part in network.named_modules()
        if name and not list(part.children()) and not isinstance(part, _CHANGES_NOTHING)
    }
    hooks = [
        part.register_forward_hook(lambda _, __, output, name=name: note(name, output)) for name, part in leaves.items()
    ]
    try:
        with evaluating(network), torch.no_grad():
            scores(network, rows)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in order if calls[name] == 1] or [""]
