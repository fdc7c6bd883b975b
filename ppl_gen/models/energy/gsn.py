r"""The generative stochastic network: a chain that forgets a part of a row and draws the row anew from what is left.

.. math:: \tilde x \sim C(\tilde x \mid x), \quad x' \sim P_\theta(x' \mid \tilde x)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppl_gen.data.inputs import check_width, row_width
from ppl_gen.errors import require_number, require_whole
from ppl_gen.nn.chain_rows import ChainRows
from ppl_gen.nn.likelihoods import (
    BernoulliPixels,
    CategoricalPixels,
    Kind,
    Likelihood,
    NormalPixels,
    check_likelihood,
    chosen_likelihood,
)
from ppl_gen.nn.networks import Perceptron, checked_widths
from ppl_gen.program.extensions import Transition
from ppl_gen.program.program import Program, Recipe

__all__ = ["StochasticNetwork", "gsn"]

_ADVICE = "train them by SVI(objective=Walkback()); their stationary distribution is not known in closed form"


class StochasticNetwork(nn.Module):
    """Corruption and denoiser of rows of one kind.

    Args:
        network: from a corrupted row, flat (levels as one-hot codes), to the numbers of the likelihood.
        pixels: the likelihood.
        corruption: how much is lost.
    """

    def __init__(self, network: Perceptron, pixels: Likelihood, corruption: float) -> None:
        super().__init__()
        self.network, self.pixels, self.corruption = network, pixels, corruption
        self.row, self.support = torch.Size(pixels.shape), pixels(torch.zeros(pixels.outputs)).support

    def random(self, shape: Sequence[int]) -> Tensor:
        """Rows that know nothing: even coins or levels, or a normal as wide as the data."""
        place = self.pixels.centre.device
        if isinstance(self.pixels, CategoricalPixels):
            return torch.randint(self.pixels.levels, (*shape, *self.row), device=place)
        if isinstance(self.pixels, NormalPixels):
            return self.pixels.centre + self.pixels.spread * torch.randn((*shape, *self.row), device=place)
        return torch.randint(2, (*shape, *self.row), device=place).to(self.pixels.centre)

    @torch.no_grad()
    def corrupt(self, x: Tensor) -> Tensor:
        """Every number drawn anew with probability ``corruption``; numbers of a normal likelihood with noise added."""
        if isinstance(self.pixels, NormalPixels):
            return x + self.corruption * self.pixels.spread * torch.randn_like(x)
        lost = torch.rand(x.shape, device=x.device) < self.corruption
        return torch.where(lost, self.random(x.shape[: x.dim() - len(self.row)]).to(x), x)

    def denoise(self, corrupted: Tensor) -> Any:
        """P(x | corrupted), one event for each row."""
        lead = corrupted.shape[: corrupted.dim() - len(self.row)]
        if isinstance(self.pixels, CategoricalPixels):
            levels = torch.arange(self.pixels.levels, device=corrupted.device)
            wide = (corrupted.unsqueeze(-1) == levels).to(self.pixels.centre)
        else:
            wide = (corrupted - self.pixels.centre) / self.pixels.spread
        return self.pixels(self.network(wide.reshape(*lead, -1)))

    def begin(self, shape: torch.Size) -> Tensor:
        """Where chains of drawn rows begin: ``shape`` x shape of a row."""
        return self.random(shape)

    @torch.no_grad()
    def gibbs(self, x: Tensor, steps: int) -> Tensor:
        """The rows after ``steps`` transitions."""
        for _ in range(steps):
            x = self.denoise(self.corrupt(x)).sample()
        return x


def gsn(
    features: int | None = None,
    *,
    hidden: Sequence[int] = (128,),
    corruption: float = 0.3,
    likelihood: Kind = "auto",
    scale: float | None = None,
    levels: int | None = None,
    activation: str = "tanh",
    sweeps: int = 200,
) -> Recipe:
    r"""A generative stochastic network over rows of numbers (N x features): the chain is the model.

    .. math:: \tilde x \sim C(\tilde x \mid x), \quad x' \sim P_\theta(x' \mid \tilde x)

    If :math:`P_\theta(x | \tilde x)` is the conditional distribution of data and corruption, the chain's stationary
    distribution is that of the data. ``SVI(objective=Walkback(steps=k))`` learns it. A network that draws the numbers
    of a row apart from each other can only be right about them where little is lost at a time: small corruptions,
    long chains. There is a sampler and no density: compare samples. The network is ``machine``; ``fit.sample`` runs
    one chain of ``sweeps`` transitions for each row, from noise.

    Args:
        features: columns of the data; None: as many as they have.
        hidden: widths of the denoiser's hidden layers; empty: one affine map.
        corruption: the chance that a number is drawn anew (zeros and ones, levels); for a normal likelihood the
            standard deviation of the noise that is added, in units of the data's.
        likelihood: "bernoulli", "normal", "categorical", or "auto", as for `vae`.
        scale: standard deviation of the normal likelihood in the user's units; None: one number, learned.
        levels: how many levels categorical numbers have; the network reads them as one-hot codes.
        activation: between the layers: "tanh", "relu", "softplus", "elu" or "sigmoid".
        sweeps: transitions behind each drawn row.

    Returns:
        A recipe; it raises ValueError for data of another shape or outside of the likelihood's support, chances
        between 0 and 1 included, which `vae` takes.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Generalized denoising auto-encoders as generative models (Bengio, Yao, Alain and Vincent, 2013).
        Deep generative stochastic networks trainable by backprop (Bengio et al., 2014).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI, Walkback
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> fit = pg.fit(gsn(hidden=(8,), sweeps=20), x, SVI(Walkback(), steps=20), seed=0)
        >>> fit.sample(4)["x"].shape
        torch.Size([4, 3])
    """
    check_width("features", features)
    widths = checked_widths(hidden, activation)
    require_number("corruption", corruption)
    check_likelihood(likelihood, scale, levels)
    require_whole("sweeps", sweeps)
    if not corruption:
        raise ValueError(
            "corruption: expected a positive number, got 0: a chain that forgets nothing stays where it is"
        )

    def build(data: Any) -> Program:
        width = row_width(features, data, "gsn")
        pixels = chosen_likelihood(likelihood, data, (width,), scale=scale, levels=levels, program="gsn")
        if isinstance(pixels, BernoulliPixels) and pixels.grey:
            raise ValueError(
                "data: the chain of a gsn makes zeros and ones, and a denoiser of grey rows would never have seen any; "
                "threshold the data, (x > 0.5).float(), draw them as coins (torch.bernoulli), or take "
                'likelihood="normal"'
            )
        if not isinstance(pixels, NormalPixels) and corruption > 1:
            raise ValueError(
                f"corruption: expected a chance, at most 1, for zeros and ones or levels; got {corruption!r}"
            )
        inputs = prod(pixels.shape) * (pixels.levels if isinstance(pixels, CategoricalPixels) else 1)
        network = Perceptron(inputs, widths, pixels.outputs, activation=activation)
        start = pixels.starting_bias()
        if start is not None:
            with torch.no_grad():
                network.last.bias.copy_(start)
        machine = StochasticNetwork(network, pixels, corruption)

        def gsn(x: Tensor) -> None:
            pyro.module("machine", machine)
            with pyro.plate("data", len(x)):
                whole = isinstance(pixels, CategoricalPixels)
                pyro.sample("x", ChainRows(machine, sweeps, advice=_ADVICE), obs=x if whole else x.to(pixels.centre))

        return Program(gsn, transition=Transition(machine.corrupt, machine.denoise))

    arguments = {"features": features, "hidden": widths, "corruption": corruption, "likelihood": likelihood}
    return Recipe(build, name="gsn", arguments=arguments)
