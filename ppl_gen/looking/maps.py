"""What a layer looks for, and where it finds it: filters and activation maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.looking.alone import read_alone
from ppl_gen.looking.asking import checked_network, chosen_layer, evaluating, recorded

__all__ = ["CONVOLUTIONS", "activation_maps", "filters"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def filters(network: nn.Module, layer: str | None = None) -> Tensor:
    r"""The weights of a convolution, one small picture for each output and input channel; of a linear layer, its rows.

    .. math:: a_{k} = \sum_c W_{kc} * x_c + b_k \quad\mapsto\quad W

    Args:
        network: any module; `ppl_gen.looking` says how a fit gives its networks.
        layer: name of a convolution or a linear layer; None: the first convolution.

    Returns:
        A copy: outputs x inputs x height x width, or outputs x inputs for a linear layer.

    Raises:
        TypeError: for what is no module.
        ValueError: for networks without a convolution, or a layer that has no such weights.

    References:
        ImageNet classification with deep convolutional neural networks (Krizhevsky, Sutskever and Hinton, 2012).

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 5), torch.nn.ReLU())
        >>> filters(net).shape
        torch.Size([8, 1, 5, 5])
    """
    checked_network(network)
    name = chosen_layer(network, layer, CONVOLUTIONS, "convolutions")
    part = network.get_submodule(name)
    if not isinstance(part, (*CONVOLUTIONS, nn.Linear)):
        raise ValueError(f"layer: expected a convolution or a linear layer, {name!r} is {type(part).__name__}")
    with evaluating(network), torch.no_grad():  # a normed weight is computed, and in training moves its buffers
        return part.weight.detach().cpu().clone()


def activation_maps(network: nn.Module, x: Any, layer: str | None = None) -> Tensor:
    r"""What a layer gives for each row: one map for each channel of a convolution.

    .. math:: x \mapsto a_k(x), \quad k = 1 \dots \text{channels}

    Args:
        network: any module.
        x: rows x channels x height x width (or what else the network reads).
        layer: the name of any layer that is called once for a row; None: the first convolution, before its rectifier.

    Returns:
        Rows x channels x height x width for a convolution, else what the layer gives.

    Raises:
        TypeError: for what is no module.
        ValueError: for rows that it cannot read, networks without a convolution, and layers called twice or not at all.

    References:
        Understanding neural networks through deep visualization (Yosinski, Clune, Nguyen, Fuchs and Lipson, 2015).

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 5), torch.nn.ReLU())
        >>> activation_maps(net, torch.rand(3, 1, 12, 12)).shape
        torch.Size([3, 8, 8, 8])
        >>> bool((activation_maps(net, torch.rand(3, 1, 12, 12), "1") >= 0).all())
        True
    """
    checked_network(network)
    rows = read_alone(x, network)
    name = chosen_layer(network, layer, CONVOLUTIONS, "convolutions")
    return recorded(network, rows, [name])[name]
