r"""Semi-supervised learning with generative models: M1, M2 and M1+M2 (Kingma et al. 2014).

.. math:: y_i \sim \mathrm{Categorical}(1/K), \quad z_i \sim \mathrm{Normal}(0, I), \quad
          x_i \sim p(x \mid y_i, z_i); \qquad q(y, z \mid x) = q(y \mid x)\, q(z \mid x, y)

A label of -1 is missing: then y is latent and summed out. A label that is there enters as an observation of y without
error, so that labelled and unlabelled rows are one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_gen.data.inputs import check_width, row_width
from ppl_gen.diagnostics.units import active_units
from ppl_gen.errors import is_number, require_whole
from ppl_gen.models.variational.encoders import NormalEncoder
from ppl_gen.models.variational.labels import Classifier, labels_of
from ppl_gen.models.variational.vae import Decoder, check_classes, vae
from ppl_gen.nn.likelihoods import Kind, check_likelihood, check_rows, chosen_likelihood
from ppl_gen.nn.networks import Perceptron, Reading, Writing, checked_widths
from ppl_gen.program.program import Program, Recipe

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["m1", "m1_m2", "m2"]


def m1(
    features: int | None = None,
    *,
    latent: int = 50,
    hidden: Sequence[int] = (600, 600),
    likelihood: Kind = "auto",
    scale: float | None = None,
    activation: str = "tanh",
) -> Recipe:
    r"""M1, the latent-feature model: a variational autoencoder whose codes serve a classifier of one's own.

    .. math:: q(z \mid x) = \mathrm{Normal}(m(x), \mathrm{diag}\, s(x)^2), \quad \text{features } m(x)

    It never reads labels. ``fit.module("encoder")(x).mean`` (rows x latent) goes into any classifier of scikit-learn;
    `m1_m2` puts `m2` on top of it.

    Args:
        features: columns of the data; None: as many as they have.
        latent: numbers in each code.
        hidden: widths of the hidden layers of both networks.
        likelihood: "bernoulli", "normal" or "auto"; see `vae`.
        scale: standard deviation of the normal likelihood; None: learned.
        activation: between the layers.

    Returns:
        A recipe; it raises ValueError for data of another shape.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Semi-supervised learning with deep generative models (Kingma, Rezende, Mohamed and Welling, 2014).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> fit = pg.fit(m1(latent=2, hidden=(8,)), x, SVI(steps=20), seed=0)
        >>> fit.module("encoder")(x).mean.shape
        torch.Size([40, 2])
    """
    check_width("features", features)
    made = vae(features, latent=latent, hidden=hidden, likelihood=likelihood, scale=scale, activation=activation)

    def build(data: Any) -> Program:
        check_rows(data, "m1", (row_width(features, data, "m1"),))
        return replace(made.build(data), name="m1")

    return Recipe(
        build, name="m1", arguments={"features": features, "latent": latent, "hidden": made.arguments["hidden"]}
    )


def m2(
    features: int | None = None,
    *,
    classes: int,
    latent: int = 50,
    hidden: Sequence[int] = (500,),
    likelihood: Kind = "auto",
    scale: float | None = None,
    alpha: float = 0.1,
    activation: str = "relu",
) -> Recipe:
    r"""M2: a classifier trained with the labels there are and all rows, as part of a generative model.

    .. math:: \log p(x, y) &\ge \mathbb{E}_{q(z \mid x, y)}[\log p(x \mid y, z)] + \log p(y)
              - \mathrm{KL}(q(z \mid x, y) \,\|\, p(z)) = L(x, y) \\
              \log p(x) &\ge \sum_y q(y \mid x) L(x, y) + \mathrm{H}(q(y \mid x))

    To the loss of any objective it adds the term ``classifier``, alpha N times the mean over the labelled rows of
    -log q(y | x) (nats; per row in the history), without which the labels would never train q(y | x). Every step takes
    it over the labelled rows of all the data (200 of them at random where there are more), not over those of its batch.

    Data: ``x`` (rows x features) and labels ``y`` (rows, integers; -1 where missing, or left out where all are).
    Sites: ``y``, ``z``, ``x``, and the factor ``label``. Networks: ``classifier`` (q(y | x)), ``encoder``
    (q(z | x, y)), ``decoder`` (p(x | y, z)), which give distributions. ``fit.posterior({"x": x})["y"]`` draws labels,
    ``fit.sample(n, given={"y": 3, "z": style})`` rows of one class in one style. `SVI` with ``stratify="y"`` gives
    every batch its share of the labelled rows in the bound. With a hundred labels among tens of thousands of rows,
    repeat the labelled rows and take alpha near 1: the decoder learns from them what y stands for.

    Args:
        features: columns of the data; None: as many as they have.
        classes: how many values a label takes, at least 2.
        latent: numbers in each z (the style).
        hidden: widths of the hidden layers of all three networks.
        likelihood: "bernoulli", "normal" or "auto"; see `vae`.
        scale: standard deviation of the normal likelihood; None: learned.
        alpha: weight of the classifier's term, at least 0.
        activation: between the layers.

    Returns:
        A recipe; it raises ValueError for data of another shape and for labels that are no integers or out of range.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Semi-supervised learning with deep generative models (Kingma, Rezende, Mohamed and Welling, 2014), eq. 6 to 9.

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> y = torch.full((40,), -1)
        >>> y[:2] = torch.tensor([1, 0])
        >>> fit = pg.fit(m2(classes=2, latent=1, hidden=(8,)), {"x": x, "y": y}, SVI(steps=300, lr=0.02), seed=0)
        >>> fit.posterior({"x": x[:4]}, draws=100)["y"].mode(0).values
        tensor([1, 0, 1, 0])
    """
    widths = _checked(features, classes, latent, hidden, alpha, activation)
    check_likelihood(likelihood, scale, None)

    def build(data: Any) -> Program:
        columns = row_width(features, data, "m2")
        pixels = chosen_likelihood(likelihood, data, (columns,), scale=scale, levels=None, program="m2")
        labels = labels_of(data, "m2", classes, alpha)
        classifier = Classifier(
            Perceptron(columns, widths, classes, activation=activation), pixels.centre, pixels.spread
        )
        network = Perceptron(columns, widths, 2 * latent, activation=activation, classes=classes)
        encoder = NormalEncoder(network, pixels.centre, pixels.spread)
        network = Perceptron(latent, widths[::-1], pixels.outputs, activation=activation, classes=classes)
        decoder = Decoder(network, pixels)

        def model(x: Tensor, y: Tensor | None = None) -> None:
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                given, y = y, pyro.sample("y", dist.Categorical(torch.ones(classes) / classes))
                labels.observe(y, given)
                z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
                pyro.sample("x", decoder(z, y), obs=x)

        def guide(x: Tensor, y: Tensor | None = None) -> None:
            pyro.module("classifier", classifier)
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", labels.guess(classifier.logits(x), y))
                pyro.sample("z", encoder(x, y))

        def classifier_loss(x: Tensor) -> Tensor:
            return labels.loss(classifier.logits, x)

        return Program(model, guide, name="m2", terms={"classifier": classifier_loss})

    return Recipe(build, name="m2", arguments={"features": features, "classes": classes, "latent": latent})


def m1_m2(
    m1: Fit,
    *,
    classes: int,
    latent: int = 50,
    hidden: Sequence[int] = (500,),
    alpha: float = 0.1,
    activation: str = "relu",
) -> Recipe:
    r"""M1+M2: `m2` on the codes of a trained `m1`, which stays as it is; one program from labels to rows.

    .. math:: y_i \sim \mathrm{Categorical}(1/K), \; z_{2,i} \sim \mathrm{Normal}(0, I), \;
              z_{1,i} \sim p(z_1 \mid y_i, z_{2,i}), \; x_i \sim p(x \mid z_{1,i})

    Data, term and usage are those of `m2`. Sites: ``y``, ``z2``, ``z1``, ``x`` and the factor ``label``. Networks:
    ``features`` (q(z1 | x)) and ``pixels`` (p(x | z1)), copied from ``m1`` and not trained; ``classifier`` (q(y | z1)),
    ``encoder`` (q(z2 | z1, y)) and ``decoder`` (p(z1 | y, z2)). A step sees a fresh draw of z1 for every row. Units of
    z1 that M1 left inactive (`active_units`) keep their prior, and the three trained networks do not see them.

    Args:
        m1: a fit of `m1` (or of `vae`, with a perceptron and without classes).
        classes: how many values a label takes, at least 2.
        latent: numbers in each z2.
        hidden: widths of the hidden layers of the three trained networks.
        alpha: weight of the classifier's term, at least 0; see `m2`.
        activation: between the layers.

    Returns:
        A recipe; it raises ValueError for data of another shape and for labels that are no integers or out of range.

    Raises:
        TypeError: if ``m1`` is no fit with the networks of `m1`.
        ValueError: for an argument out of its range.

    References:
        Semi-supervised learning with deep generative models (Kingma, Rezende, Mohamed and Welling, 2014).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import m1
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> first = pg.fit(m1(latent=2, hidden=(8,)), x, SVI(steps=200, lr=0.01), seed=0)
        >>> y = torch.full((40,), -1)
        >>> y[:2] = torch.tensor([1, 0])
        >>> stacked = m1_m2(first, classes=2, latent=1, hidden=(8,))
        >>> fit = pg.fit(stacked, {"x": x, "y": y}, SVI(steps=300, lr=0.02), seed=0)
        >>> fit.posterior({"x": x[:4]}, draws=200)["y"].mode(0).values
        tensor([1, 0, 1, 0])
    """
    features, first, used = _frozen(m1)
    assert isinstance(first.network, Perceptron)  # as `_frozen` has made sure
    width, seen = first.network.inputs, len(used)
    widths = _checked(width, classes, latent, hidden, alpha, activation)

    def build(data: Any) -> Program:
        pixels = deepcopy(first)
        check_rows(data, "m1_m2", pixels.likelihood.shape)
        pixels.likelihood = pixels.likelihood.suited(data)
        labels = labels_of(data, "m1_m2", classes, alpha)
        centre, spread = torch.zeros(width), torch.ones(())  # codes are standardised by their prior
        classifier = Classifier(Reading(Perceptron(seen, widths, classes, activation=activation), used), centre, spread)
        network = Perceptron(seen, widths, 2 * latent, activation=activation, classes=classes)
        encoder = NormalEncoder(Reading(network, used), centre, spread)
        network = Perceptron(latent, widths[::-1], 2 * seen, activation=activation, classes=classes)
        # A mean and a logarithm of a scale that are left at zero are the prior.
        moments = Writing(network, torch.cat([used, width + used]), 2 * width)
        decoder = NormalEncoder(moments, torch.zeros(latent), spread)

        def model(x: Tensor, y: Tensor | None = None) -> None:
            pyro.module("decoder", decoder)
            pyro.module("pixels", pixels)
            with pyro.plate("data", len(x)):
                given, y = y, pyro.sample("y", dist.Categorical(torch.ones(classes) / classes))
                labels.observe(y, given)
                z2 = pyro.sample("z2", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
                z1 = pyro.sample("z1", decoder(z2, y))
                pyro.sample("x", pixels(z1), obs=x)

        def guide(x: Tensor, y: Tensor | None = None) -> None:
            pyro.module("classifier", classifier)
            pyro.module("encoder", encoder)
            pyro.module("features", features)
            with pyro.plate("data", len(x)):
                z1 = pyro.sample("z1", features(x))
                y = pyro.sample("y", labels.guess(classifier.logits(z1), y))
                pyro.sample("z2", encoder(z1, y))

        def classifier_loss(x: Tensor) -> Tensor:
            return labels.loss(lambda rows: classifier.logits(features(rows).sample()), x)

        return Program(model, guide, name="m1_m2", terms={"classifier": classifier_loss})

    return Recipe(build, name="m1_m2", arguments={"m1": m1.program.name, "classes": classes, "latent": latent})


def _frozen(m1: Any) -> tuple[NormalEncoder, Decoder, Tensor]:
    """Copies of the two networks of M1 that no fit trains, and the units of its code in use (all, where none is)."""
    try:
        found = m1.module("encoder"), m1.module("decoder")
    except (AttributeError, KeyError):
        found = (None, None)
    encoder, decoder = found
    plain = isinstance(encoder, NormalEncoder) and isinstance(decoder, Decoder)
    if not plain or not isinstance(decoder.network, Perceptron) or decoder.network.label is not None:
        got = f"a fit of {m1.program.name!r}" if hasattr(m1, "program") else type(m1).__name__
        raise TypeError(f"m1: expected a fit of m1 (or of vae, a perceptron without classes), got {got}")
    rows = m1.data.rows or 0
    active = active_units(m1).active if rows > 1 else torch.zeros(decoder.network.inputs)
    used = active.nonzero().squeeze(-1) if bool(active.any()) else torch.arange(decoder.network.inputs)
    return encoder.requires_grad_(False), decoder.requires_grad_(False), used


def _checked(
    features: int | None, classes: int, latent: int, hidden: Sequence[int], alpha: float, activation: str
) -> tuple[int, ...]:
    check_width("features", features)
    require_whole("classes", classes)
    check_classes(classes)
    require_whole("latent", latent)
    if not is_number(alpha) or not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha: expected a finite number of at least 0, got {alpha!r}")
    return checked_widths(hidden, activation)
