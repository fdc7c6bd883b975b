r"""Variational autoencoders: a network of normal latents, and a network that guesses them back.

.. math:: z_i \sim \mathrm{Normal}(0, I), \quad x_i \sim p(x \mid f(z_i)), \quad
          q(z_i \mid x_i) = \mathrm{Normal}(m(x_i), \mathrm{diag}\, s(x_i)^2)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_gen.arguments import require_choice
from ppl_gen.data.inputs import checked_shape, entries, row_shape
from ppl_gen.errors import require_whole
from ppl_gen.models.variational.encoders import Encoder, FlowEncoder, NormalEncoder, flow_maps
from ppl_gen.nn.flow_maps import FlowMap
from ppl_gen.nn.likelihoods import Kind, Likelihood, check_likelihood, chosen_likelihood
from ppl_gen.nn.networks import (
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    Perceptron,
    checked_widths,
)
from ppl_gen.program.program import Program, Recipe

__all__ = ["Decoder", "check_classes", "check_labels", "vae"]


class Decoder(nn.Module):
    """p(x | z): calling it with codes (and labels, where it was made for them) gives a distribution over rows."""

    def __init__(self, network: Perceptron | ConvolutionalDecoder, likelihood: Likelihood) -> None:
        super().__init__()
        self.network, self.likelihood = network, likelihood
        # At zero weights every row has the distribution of the whole data: nothing about the mean is left to learn.
        start = likelihood.starting_bias(network.channels if isinstance(network, ConvolutionalDecoder) else None)
        if start is not None and network.last.bias is not None:
            network.last.bias.data.copy_(start)

    def forward(self, z: Tensor, *label: Tensor) -> Any:
        return self.likelihood(self.network(z, *label))


def vae(
    features: int | Sequence[int] | None = None,
    *,
    latent: int = 50,
    hidden: Sequence[int] = (200, 200),
    likelihood: Kind = "auto",
    scale: float | None = None,
    levels: int | None = None,
    network: str = "perceptron",
    activation: str = "tanh",
    classes: int | None = None,
    posterior: str = "normal",
    posterior_layers: int = 4,
) -> Recipe:
    r"""A variational autoencoder of rows or images, with an amortised normal guide, or one of flows.

    .. math:: \log p(x) \ge \mathbb{E}_{q(z \mid x)} [\log p(x \mid z)] - \mathrm{KL}(q(z \mid x) \,\|\, p(z)),
              \quad q(z \mid x) = \mathrm{Normal}(m(x), \mathrm{diag}\, s(x)^2)

    `SVI` trains it with `ELBO` (``ELBO(beta=4)`` is the beta-VAE) or `IWAE`. Sites: ``z`` and ``x``. Networks:
    ``fit.module("encoder")(x)`` is q(z | x) and ``fit.module("decoder")(z)`` is p(x | z), both distributions:
    ``.mean`` of the first are codes, of the second pictures. Without hidden layers and with the normal likelihood it is
    the linear VAE, whose best bound is the evidence of probabilistic principal component analysis.

    Args:
        features: columns of the data, or the shape of a row: (channels, height, width) for images. None: the shape of
            the rows of the data.
        latent: numbers in each z.
        hidden: widths of the hidden layers of both networks (the encoder's order); for convolutions the last one is the
            width of the layer between images and codes.
        likelihood: "bernoulli" for zeros and ones, or grey values from 0 to 1 read as the chances of them (their log
            density is the expectation over such draws, not a density of grey values); "normal" for real numbers;
            "categorical" for integer levels. "auto" is "normal" where a ``scale`` is given or a value lies outside of
            0 to 1, else "bernoulli".
        scale: standard deviation of the normal likelihood in the user's units; None: one number, learned.
        levels: how many levels categorical pixels have.
        network: "perceptron", or "convolutional" for images.
        activation: between the layers of a perceptron: "tanh", "relu", "softplus", "elu" or "sigmoid".
        classes: a conditional VAE, p(x | y): the data hold labels ``y`` in 0 ... classes - 1 beside ``x``, and both
            networks see them; ``fit.sample(n, given={"y": 3})`` draws rows of one class.
        posterior: "normal", or a flow behind the normal whose weights the encoder moves for each row: "planar",
            "radial", "sylvester" or "iaf" (see `ppl_gen.inference.flow_guide`). Such a q(z | x) knows the density of
            its own draws, and has no mean: codes are drawn by ``fit.posterior(data)``.
        posterior_layers: maps of that flow.

    Returns:
        A recipe; it raises ValueError for data of another shape or outside of the likelihood's support.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Auto-encoding variational Bayes (Kingma and Welling, 2014); beta-VAE (Higgins et al., 2017).
        Learning structured output representation using deep conditional generative models (Sohn et al., 2015).
        Variational inference with normalizing flows (Rezende and Mohamed, 2015).
        Sylvester normalizing flows for variational inference (van den Berg et al., 2018).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> fit = pg.fit(vae(latent=2, hidden=(8,)), x, SVI(steps=20), seed=0)
        >>> fit.module("encoder")(x[:4]).mean.shape, fit.sample(5)["x"].shape
        (torch.Size([4, 2]), torch.Size([5, 3]))
    """
    given = None if features is None else checked_shape(features)
    require_whole("latent", latent)
    widths = checked_widths(hidden, activation)
    check_likelihood(likelihood, scale, levels)
    check_classes(classes)
    flow_maps(posterior, posterior_layers, latent)
    require_choice("network", network, ("perceptron", "convolutional"))
    if network == "convolutional":
        _check_images(given or (1, 1, 1), widths, classes)

    def build(data: Any) -> Program:
        shape = row_shape(data, "vae") if given is None else given
        if network == "convolutional":
            _check_images(shape, widths, classes)
        pixels = chosen_likelihood(likelihood, data, shape, scale=scale, levels=levels, program="vae")
        if classes is not None:
            check_labels(data, "vae", classes)
        coders: tuple[nn.Module, Perceptron | ConvolutionalDecoder]
        maps = flow_maps(posterior, posterior_layers, latent)
        numbers = 2 * latent + sum(part.numbers for part in maps)
        if network == "convolutional":
            coders = _convolutional(shape, latent, numbers, widths[-1], pixels)
        else:
            coders = (
                Perceptron(prod(shape), widths, numbers, activation=activation, classes=classes),
                Perceptron(latent, widths[::-1], pixels.outputs, activation=activation, classes=classes),
            )
        encoder = _encoder(coders[0], pixels, maps, latent)
        program = _conditional if classes is not None else _plain
        return program(encoder, Decoder(coders[1], pixels), latent)

    arguments: dict[str, Any] = {"features": features, "latent": latent, "hidden": widths, "likelihood": likelihood}
    if posterior != "normal":
        arguments["posterior"] = posterior
    return Recipe(build, name="vae", arguments=arguments)


def _encoder(network: nn.Module, pixels: Likelihood, maps: list[FlowMap], latent: int) -> Encoder:
    if not maps:
        return NormalEncoder(network, pixels.centre, pixels.spread)
    return FlowEncoder(network, pixels.centre, pixels.spread, maps, latent)


def _convolutional(
    shape: Sequence[int], latent: int, numbers: int, hidden: int, pixels: Likelihood
) -> tuple[ConvolutionalEncoder, ConvolutionalDecoder]:
    depth = pixels.outputs // prod(shape)
    filters = (32, 64)
    return (
        ConvolutionalEncoder(shape, filters, hidden, numbers),
        ConvolutionalDecoder(shape, filters, hidden, latent, depth),
    )


def _plain(encoder: Encoder, decoder: Decoder, latent: int) -> Program:
    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", decoder(z), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", encoder(x))

    return Program(model, guide, name="vae")


def _conditional(encoder: Encoder, decoder: Decoder, latent: int) -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", decoder(z, y), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", encoder(x, y))

    return Program(model, guide, name="vae")


def _check_images(shape: tuple[int, ...], widths: tuple[int, ...], classes: int | None) -> None:
    if len(shape) != 3 or not widths or classes is not None:
        raise ValueError(
            "network: 'convolutional' takes images, features=(channels, height, width), at least one hidden width and "
            f"no classes; got features={shape}, hidden={widths}, classes={classes}"
        )


def check_classes(classes: int | None) -> None:
    """Raise ValueError unless ``classes`` is None or at least 2."""
    if classes is not None:
        require_whole("classes", classes)
        if classes < 2:
            raise ValueError(f"classes: expected at least 2, got {classes}")


def check_labels(data: Any, program: str, classes: int, *, missing: bool = False) -> Tensor | None:
    """The labels of the data, None where there are none and they may be ``missing`` (then -1 is one, too).

    Raises:
        ValueError: for labels that are absent, no integers, or out of range.
    """
    _, y = entries(data, program, "x", "y")
    least = -1 if missing else 0
    if y is None:
        if missing:
            return None
        raise ValueError(f"data: {program} reads labels from the entry 'y', got none; pass {{'x': x, 'y': labels}}")
    if y.is_floating_point() or y.dtype == torch.bool or y.dim() != 1:
        raise ValueError(f"data 'y': expected one integer label per row, got {y.dtype} of shape {tuple(y.shape)}")
    wrong = (y < least) | (y >= classes)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"data 'y': expected labels from 0 to {classes - 1}{' (-1: missing)' if missing else ''}, got "
            f"{int(y[first])} at row {first}"
        )
    return y
