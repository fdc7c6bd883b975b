r"""A classifier as a program: labels given rows, p(y | x), by a perceptron, a small convolutional network or one's own.

.. math:: y_i \sim \mathrm{Categorical}(\mathrm{softmax}(S(x_i)))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_gen.data.inputs import entries, row_shape
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.models.variational.vae import check_classes, check_labels
from ppl_gen.nn.copies import own_copy
from ppl_gen.nn.networks import Perceptron, checked_widths, standardised
from ppl_gen.program.program import Program, Recipe

__all__ = ["classifier"]

_HIDDEN = {1: (128,), 3: (16, 32, 128)}  # by the dimensions of a row
_FIELD = 5  # height and width of a filter
_LOOKED_AT = 2  # rows that a network of one's own is tried on
_SUM = 1e-4  # how near to 1 chances sum


def classifier(
    classes: int | None = None, network: nn.Module | None = None, *, hidden: Sequence[int] | None = None
) -> Recipe:
    r"""Labels given rows of numbers or images: the program whose maximum likelihood is cross-entropy training.

    .. math:: y_i \sim \mathrm{Categorical}(\mathrm{softmax}(S(x_i))), \quad
              -\frac{1}{N} \sum_i \log p(y_i \mid x_i) \text{ is the loss of } \mathrm{ELBO()}

    Data: ``x`` (rows x features, or rows x channels x height x width) and labels ``y`` (integers from 0). The rows
    are inputs: nothing is said about where they come from. Site: ``y``. ``fit.module("network")(x)`` gives the scores S
    before the softmax, rows x classes; ``.argmax(-1)`` of them are the likeliest labels. ``fit.predict({"x": x}, 10)``
    draws labels, and ``fit.evidence`` is the mean log p(y | x) in nats.

    The networks are made of modules (convolution, rectifier, pooling), as `ppl_gen.looking` wants them. They work in
    standardised units: each column less its mean (each channel of images), all divided by one overall standard
    deviation, so columns in very different units are better standardised before.

    Args:
        classes: how many values a label takes, at least 2; None: one more than the largest in the data.
        network: one's own, from rows in the user's units to scores, rows x classes; a copy of it is trained, from the
            weights that it has. None: a perceptron for rows of numbers, a convolutional network for images.
        hidden: widths of the layers between. For images the last one is the width of the layer before the scores, and
            those before it are the channels of convolutions of 5 x 5 pixels, each of which is rectified and pooled (the
            maximum of 2 x 2 pixels). None: (128,), or (16, 32, 128) for images; () for rows of numbers is logistic
            regression.

    Returns:
        A recipe; it raises ValueError for rows of another kind, or labels that are no integers or out of range.

    Raises:
        ValueError: for an argument out of its range, or both a network and widths.
        TypeError: for a network that is no `torch.nn.Module`.

    References:
        Gradient-based learning applied to document recognition (LeCun, Bottou, Bengio and Haffner, 1998).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> data = {"x": x, "y": torch.arange(40) % 2}
        >>> fit = pg.fit(classifier(hidden=()), data, SVI(steps=50, lr=0.1), seed=0)
        >>> fit.module("network")(x[:4]).argmax(-1), fit.evidence().mean > -0.1
        (tensor([0, 1, 0, 1]), True)
    """
    if classes is not None:
        check_classes(classes)
    if network is not None and not isinstance(network, nn.Module):
        raise TypeError(f"network: expected a torch.nn.Module or None, got {type(network).__name__}")
    if network is not None and hidden is not None:
        raise ValueError(f"hidden: are the widths of the built-in networks; leave out {hidden!r} or the network")
    widths = None if hidden is None else checked_widths(hidden, "relu")

    def build(data: Any) -> Program:
        shape = row_shape(data, "classifier")
        known = _known_classes(data, classes)
        if network is None:
            return _program(_built_in(data, shape, widths, known))
        own = own_copy("network", network)
        _try_out(own, data, known)
        return _program(_Checked(own, shape))

    named = None if network is None else type(network).__name__
    return Recipe(build, name="classifier", arguments={"classes": classes, "network": named, "hidden": widths})


class _Checked(nn.Module):
    """Scores of rows of one shape: a network that would stretch or fold others is not asked about them."""

    def __init__(self, network: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.network, self.shape = network, tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"data: classifier was made for rows of shape {self.shape}, got {tuple(x.shape)}")
        parameter = next(self.network.parameters(), None)
        dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
        scores: Tensor = self.network(x.to(dtype))
        return scores


class _Standardised(nn.Module):
    centre: Tensor
    spread: Tensor

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        rows = x.to(torch.get_default_dtype())
        over = (0,) if x.dim() == 2 else (0, 2, 3)
        centre = rows.mean(over, keepdim=True)[0]
        spread = (rows - centre).square().mean().sqrt()
        self.register_buffer("centre", centre)
        self.register_buffer("spread", spread if spread > 0 else torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return standardised(x, self.centre, self.spread)


def _built_in(data: Any, shape: Sequence[int], hidden: tuple[int, ...] | None, classes: int) -> nn.Module:
    if len(shape) not in _HIDDEN:
        raise ValueError(
            f"data: classifier takes rows x features or rows x channels x height x width, got rows of shape "
            f"{tuple(shape)}; x.unsqueeze(1) adds one channel, and a network of your own may take any shape"
        )
    (x,) = entries(data, "classifier", "x", few=True)
    assert x is not None  # the first entry
    widths = _HIDDEN[len(shape)] if hidden is None else hidden
    if len(shape) == 1:
        layers: nn.Module = Perceptron(shape[0], widths, classes, activation="relu")
    else:
        layers = _convolutional(shape, widths, classes)
    return _Checked(nn.Sequential(_Standardised(x), layers), shape)


def _convolutional(shape: Sequence[int], widths: tuple[int, ...], classes: int) -> nn.Sequential:
    if not widths:
        raise ValueError("hidden: images need the width of the layer before the scores at least, such as (16, 32, 128)")
    channels, height, width = shape
    layers: list[nn.Module] = []
    for after in widths[:-1]:
        layers += [nn.Conv2d(channels, after, _FIELD, padding=_FIELD // 2), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
        channels, height, width = after, math.ceil(height / 2), math.ceil(width / 2)
    layers += [nn.Flatten(), nn.Linear(channels * height * width, widths[-1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def _known_classes(data: Any, classes: int | None) -> int:
    if classes is not None:
        check_labels(data, "classifier", classes)
        return int(classes)
    y = check_labels(data, "classifier", 2**31)  # any whole number of at least 0
    assert y is not None  # they are not allowed to be missing
    most = int(y.max()) + 1
    if most > max(1000, len(y)):
        raise ValueError(f"classes: the labels 'y' reach {most - 1}; number them from 0, or say how many there are")
    return max(2, most)


def _try_out(network: nn.Module, data: Any, classes: int) -> None:
    """Raise ValueError unless the network gives one score for each class."""
    (x,) = entries(data, "classifier", "x", few=True)
    assert x is not None  # the first entry
    parameters = next(network.parameters(), None)
    rows = x[:_LOOKED_AT].to(torch.get_default_dtype() if parameters is None else parameters.dtype, copy=True)
    was = network.training
    try:
        with torch.no_grad():
            scores = network.eval()(rows)
    except PROGRAM_ERRORS as error:
        raise ValueError(f"network: it cannot read rows of shape {tuple(x.shape[1:])}: {error}") from error
    finally:
        network.train(was)
    if not isinstance(scores, Tensor) or scores.shape != (len(rows), classes):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"network: expected scores of shape {(len(rows), classes)} for {len(rows)} rows, got {got}")
    if bool((scores >= 0).all()) and bool(((scores.sum(-1) - 1).abs() < _SUM).all()):
        raise ValueError(
            "network: expected scores before the softmax, got chances (none is negative, and those of a row sum to 1); "
            "a second softmax would be taken of them: leave out the network's own (its logarithm may stay)"
        )


def _program(network: nn.Module) -> Program:
    def classifier(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=network(x)), obs=y)

    return Program(classifier)
