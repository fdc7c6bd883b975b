r"""Autoencoders: a code for each row from which the row can be told, without a distribution over codes.

.. math:: z_i = f(x_i), \quad x_i \sim p(x \mid g(z_i))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_gen.arguments import require_choice
from ppl_gen.data.inputs import check_width, entries, row_width
from ppl_gen.errors import is_number, require_flag, require_whole
from ppl_gen.models.autoencoders.networks import MirrorDecoder, MirrorEncoder, Units
from ppl_gen.models.improper import Flat
from ppl_gen.nn.likelihoods import Kind, Likelihood, chosen_likelihood
from ppl_gen.nn.networks import checked_widths
from ppl_gen.program.program import Program, Recipe

__all__ = ["autoencoder"]

_HIDDEN = {"dense": (128,), "convolutional": (16, 32)}


def autoencoder(
    features: int | None = None,
    code: int = 2,
    *,
    hidden: Sequence[int] | None = None,
    kind: Literal["dense", "convolutional"] = "dense",
    tied: bool = False,
    corruption: float = 0.0,
    noise: Literal["masking", "normal"] = "masking",
    sparsity: float = 0.0,
    penalty: Literal["l1", "kl"] = "l1",
    target: float = 0.05,
    top_k: int | None = None,
    likelihood: Literal["normal", "bernoulli"] = "normal",
    activation: str = "relu",
) -> Recipe:
    r"""A deep, convolutional, tied, denoising, sparse or k-sparse autoencoder of rows of numbers or images.

    .. math:: \min_{f, g} \; \frac{1}{N} \sum_i \left[ -\log p(x_i \mid g(f(\tilde x_i))) \right]
              + \lambda \, \Omega(f(x_i))

    As a program: ``z`` has a flat, improper prior and the guide is a point, Delta(f(x)), with x corrupted while it is
    trained (``corruption``). So ``ELBO()`` is the reconstruction error in nats, ``fit.posterior({"x": x}, 1)["z"]`` are
    codes, ``fit.sample(n, given={"z": codes})`` draws rows for codes, and what would need a distribution over codes is
    refused: ``fit.evidence``, and ``fit.sample(n)`` alone. `codes`, `reconstructions` and `anomaly_scores` take a fit
    and data. The networks are ``fit.module("encoder")``, rows to codes, and ``"decoder"``, codes to means of rows.

    With ``likelihood="normal"`` the error is the squared one in units of the overall variance of the data, over 2: a
    linear autoencoder (``hidden=()``) then finds the subspace of the principal components.

    Args:
        features: numbers in each row of ``x`` (the product of its shape); None: as many as the data have.
        code: numbers in each code.
        hidden: widths of the hidden layers of the encoder, the decoder's in reverse; channels of the convolutions,
            each of which halves height and width. None: (128,), or (16, 32) for convolutions.
        kind: "dense", or "convolutional" for rows of shape channels x height x width.
        tied: the decoder's weights are the encoder's, transposed (a convolution's adjoint).
        corruption: how much of a row the encoder does not see while it is trained: the share of entries that are
            replaced by their column's mean, or with ``noise="normal"`` the standard deviation of what is added, in
            units of the data's. What it has to reconstruct is the whole row.
        noise: "masking" or "normal".
        sparsity: lambda, nats for each unit of the penalty; recorded as ``sparsity`` in the history.
        penalty: "l1", the sum of ``|z_j|`` times the norm of what unit j adds to the decoder's first layer (so that
            small codes and large weights do not pass for sparse ones); or "kl", the divergence of a coin of
            probability ``target`` from one of the unit's mean activity over the batch, with sigmoid units.
        target: mean activity under "kl".
        top_k: all but the ``top_k`` largest numbers of each code are zero.
        likelihood: "normal"; "bernoulli" for zeros and ones, or chances of them.
        activation: of the hidden layers: relu, tanh, elu, softplus or sigmoid.

    Returns:
        A recipe; it raises ValueError for rows of another size, or values outside of the likelihood's support.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Reducing the dimensionality of data with neural networks (Hinton and Salakhutdinov, 2006).
        Extracting and composing robust features with denoising autoencoders (Vincent et al., 2008).
        Sparse autoencoder, lecture notes (Ng, 2011). k-Sparse autoencoders (Makhzani and Frey, 2014).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.randn(50, 1) * torch.tensor([1.0, -2.0, 3.0])
        >>> fit = pg.fit(autoencoder(code=1, hidden=()), x, SVI(steps=300, lr=0.03), seed=0)
        >>> fit.posterior({"x": x[:4]}, draws=1)["z"].shape
        torch.Size([1, 4, 1])
        >>> bool((fit.module("decoder")(fit.module("encoder")(x)) - x).abs().max() < 0.1)
        True
    """
    widths = _checked(features, code, hidden, kind, activation)
    require_flag("tied", tied)
    _check_sparsity(code, sparsity, penalty, target, top_k)
    _check_corruption(corruption, noise)
    require_choice("likelihood", likelihood, ("normal", "bernoulli"))
    units: Units = "sigmoid" if sparsity and penalty == "kl" else "linear"

    def build(data: Any) -> Program:
        outputs = _likelihood(data, row_width(features, data, "autoencoder"), kind, likelihood)
        encoder = MirrorEncoder(
            outputs,
            widths,
            code,
            convolutional=kind == "convolutional",
            activation=activation,
            units=units,
            top_k=top_k,
            corruption=float(corruption),
            noise=noise,
        )
        decoder = MirrorDecoder(encoder, outputs, tied=tied)
        cost = _l1(encoder, decoder) if penalty == "l1" else _divergence(encoder, target)
        return _program(encoder, decoder, {"sparsity": lambda x: sparsity * cost(x)} if sparsity else {})

    return Recipe(build, name="autoencoder", arguments={"features": features, "code": code, "kind": kind})


def _checked(
    features: int | None, code: int, hidden: Sequence[int] | None, kind: str, activation: str
) -> tuple[int, ...]:
    check_width("features", features)
    require_whole("code", code)
    require_choice("kind", kind, _HIDDEN)
    widths = checked_widths(_HIDDEN[kind] if hidden is None else hidden, activation)
    if kind == "convolutional" and not widths:
        raise ValueError("hidden: a convolutional autoencoder needs the channels of one convolution at least")
    return widths


def _check_sparsity(code: int, sparsity: float, penalty: str, target: float, top_k: int | None) -> None:
    if not is_number(sparsity) or not 0 <= sparsity < float("inf"):
        raise ValueError(f"sparsity: expected a weight of at least 0, got {sparsity!r}")
    require_choice("penalty", penalty, ("l1", "kl"))
    if not is_number(target) or not 0 < target < 1:
        raise ValueError(f"target: expected a mean activity between 0 and 1, got {target!r}")
    if top_k is not None:
        require_whole("top_k", top_k)
        if top_k > code:
            raise ValueError(f"top_k: expected at most the {code} numbers of a code, got {top_k}")
        if sparsity and penalty == "kl":
            raise ValueError("top_k: a mean activity (penalty='kl') and a number of active units contradict each other")


def _check_corruption(corruption: float, noise: str) -> None:
    require_choice("noise", noise, ("masking", "normal"))
    most = 1.0 if noise == "masking" else float("inf")
    if not is_number(corruption) or not 0 <= corruption < most:
        raise ValueError(f"corruption: expected at least 0 and less than {most:g}, got {corruption!r}")


def _likelihood(data: Any, features: int, kind: str, likelihood: Kind) -> Likelihood:
    (x,) = entries(data, "autoencoder", "x")
    assert x is not None  # the first entry
    if x.dim() < 2 or x[:1].numel() != features:
        raise ValueError(f"features: autoencoder was made for {features} number(s) per row, got shape {tuple(x.shape)}")
    if kind == "convolutional" and x.dim() != 4:
        raise ValueError(
            f"data: kind='convolutional' takes rows of shape channels x height x width, got {tuple(x.shape[1:])}; "
            "load_data(..., images=True) gives them, and x.unsqueeze(1) adds one channel"
        )
    rows = x.to(torch.get_default_dtype())
    spread = float((rows - rows.mean(0)).square().mean().sqrt())
    scale = (spread or 1.0) if likelihood == "normal" else None
    return chosen_likelihood(likelihood, data, x.shape[1:], scale=scale, levels=None, program="autoencoder")


def _program(encoder: MirrorEncoder, decoder: MirrorDecoder, terms: dict[str, Callable[[Tensor], Tensor]]) -> Program:
    def autoencoder(x: Tensor) -> None:
        if decoder.weights is None:
            pyro.module("encoder", encoder)  # whose weights the decoder reads
        pyro.module("decoder", decoder)
        like = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Flat(event_shape=encoder.layers[-1].bias.shape))  # type: ignore[arg-type]
            pyro.sample("x", decoder.distribution(z), obs=like)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(encoder(x), event_dim=1))

    return Program(autoencoder, guide, terms=terms)


def _l1(encoder: MirrorEncoder, decoder: MirrorDecoder) -> Callable[[Tensor], Tensor]:
    def cost(x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(decoder.weight(len(encoder.layers) - 1), dim=1)
        return (encoder(x).abs() * norms).sum(-1)

    return cost


def _divergence(encoder: MirrorEncoder, target: float) -> Callable[[Tensor], Tensor]:
    def cost(x: Tensor) -> Tensor:
        wanted, mean = dist.Bernoulli(torch.tensor(target)), dist.Bernoulli(encoder(x).mean(0))
        return torch.distributions.kl_divergence(wanted, mean).sum().expand(len(x))

    return cost
