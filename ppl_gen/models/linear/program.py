"""The Pyro statements of linear-Gaussian latent variables: model, guides, and what is offered beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from ppl_gen.models.improper import Flat
from ppl_gen.models.linear.steps import LinearGaussian
from ppl_gen.program.program import Program

__all__ = ["LinearProgram", "aligned"]

_WIDTH = 0.05  # standard deviation at which the guide of a global site starts, in standardised units


@dataclass(frozen=True, eq=False)
class LinearProgram:
    """Model and guide over one `LinearGaussian`.

    Args:
        steps: the closed forms.
        kind: of the guide over ``z``: "exact", "full" or "diagonal".
        first: where algorithms begin; drawn when None.
    """

    steps: LinearGaussian
    kind: str
    first: Mapping[str, Tensor] | None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the global sites."""
        d, k = self.steps.features, self.steps.latent
        return {"loadings_standard": (d, k), "loc_standard": (d,), "precision": () if self.steps.isotropic else (d,)}

    def program(self, name: str) -> Program:
        begin = self.start()

        def model(x: Tensor, mask: Tensor | None = None) -> None:
            self.model(x, mask)

        def guide(x: Tensor, mask: Tensor | None = None) -> None:
            self.guide(begin, x, mask)

        def local_posterior(values: Mapping[str, Tensor], x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
            return {"z": self.steps.conditional(values, x, mask).distribution()}

        return Program(
            model,
            guide,
            name=name,
            start=self.start,
            relabel=aligned,
            evidence=self.steps.evidence,
            local_posterior=local_posterior,
            em=self.steps.em(),
        )

    def start(self) -> dict[str, Tensor]:
        """The values given; else half of the variance is noise, and W is drawn to explain the other half."""
        if self.first is not None:
            return {name: value.to(torch.get_default_dtype()) for name, value in self.first.items()}
        shapes, latent = self.shapes, self.steps.latent
        return {
            "loadings_standard": torch.randn(shapes["loadings_standard"]) * (2 * latent) ** -0.5,
            "loc_standard": torch.zeros(shapes["loc_standard"]),
            "precision": torch.full(shapes["precision"], 2.0),
        }

    def priors(self, like: Tensor) -> dict[str, Any]:
        prior = self.steps.prior
        if prior is None:
            positive = {"precision": constraints.positive}
            return {name: Flat(positive.get(name, constraints.real), shape) for name, shape in self.shapes.items()}
        normal, rate = dist.Normal(like.new_zeros(()), prior.spread), dist.Exponential(like.new_tensor(prior.rate))
        bases = {"precision": rate}
        shapes = self.shapes.items()
        return {name: bases.get(name, normal).expand(shape).to_event(len(shape)) for name, shape in shapes}

    def model(self, x: Tensor, mask: Tensor | None = None) -> None:
        if mask is not None and mask.dtype is not torch.bool:  # new rows do not pass through the recipe
            raise ValueError(f"'mask': expected booleans, True where x is observed, got {mask.dtype}")
        like = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        shift, unit = self.steps.loc.to(like), self.steps.scale.to(like)
        w, mu, precision = (pyro.sample(name, prior) for name, prior in self.priors(like).items())
        loadings = pyro.deterministic("loadings", unit[..., None] * w, event_dim=2)
        loc = pyro.deterministic("loc", shift + unit * mu, event_dim=1)
        noise = pyro.deterministic("noise", unit * precision**-0.5, event_dim=len(self.shapes["precision"]))
        scale = noise[..., None] if self.steps.isotropic else noise
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(like.new_zeros(self.steps.latent), 1.0).to_event(1))
            explained = z @ loadings.mT if loadings.dim() == 2 else (loadings @ z[..., None]).squeeze(-1)
            rows = dist.Normal(loc + explained, scale)
            pyro.sample("x", (rows if mask is None else rows.mask(mask)).to_event(1), obs=like)

    def guide(self, begin: Mapping[str, Tensor], x: Tensor, mask: Tensor | None = None) -> None:
        like = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        values = self.points(begin) if self.steps.prior is None else self.draws(begin)
        local: Any
        if self.kind == "exact":
            local = self.steps.conditional(values, x, mask).distribution()
        else:
            local = self.linear(self.steps.standardised(like, mask))
        with pyro.plate("data", len(x)):
            pyro.sample("z", local)

    def points(self, begin: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One value for each global site."""
        values = {}
        for name, value in begin.items():
            support = constraints.positive if name == "precision" else constraints.real
            point = pyro.param(f"{name}_point", value, constraint=support)
            values[name] = pyro.sample(name, dist.Delta(point, event_dim=value.dim()))
        return values

    def draws(self, begin: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Independent normals over the global sites, over the logarithm of a precision."""
        values = {}
        for name, value in begin.items():
            positive = name == "precision"
            loc = pyro.param(f"{name}_loc", value.log() if positive else value)
            width = torch.full_like(value, _WIDTH)
            scale = pyro.param(f"{name}_scale", width, constraint=constraints.softplus_positive)
            kind = dist.LogNormal if positive else dist.Normal
            values[name] = pyro.sample(name, kind(loc, scale).to_event(value.dim()))
        return values

    def linear(self, y: Tensor) -> Any:
        """Normal(V y + c, one covariance for all rows): the posterior has this form where no entry is missing.

        ``y``: rows x features; the distribution: batch rows, event latent.
        """
        k = self.steps.latent
        gain = pyro.param("gain", y.new_zeros(k, self.steps.features))
        centre = y @ gain.mT + pyro.param("offset", y.new_zeros(k))
        if self.kind == "diagonal":
            scale = pyro.param("z_scale", y.new_ones(k), constraint=constraints.softplus_positive)
            return dist.Normal(centre, scale).to_event(1)
        tril = pyro.param("z_tril", torch.eye(k).to(y), constraint=constraints.softplus_lower_cholesky)
        return dist.MultivariateNormal(centre, scale_tril=tril)


def aligned(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Draws whose latents are rotated so that all W lie as near as can be to the mean W W' (Procrustes).

    ``loadings_standard`` is draws x features x latent, ``z`` draws x rows x latent; both come back in their shapes.
    The prior of W and that of z do not change under rotations, so this chooses among equally probable values.

    References:
        A generalized solution of the orthogonal Procrustes problem (Schoenemann, 1966).

    Example:
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0]])
        >>> turned = torch.stack([w, w @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])])
        >>> one, two = aligned({"loadings_standard": turned})["loadings_standard"]
        >>> torch.allclose(one, two, atol=1e-5)
        True
    """
    w = draws["loadings_standard"]
    values, vectors = torch.linalg.eigh((w @ w.mT).mean(0))
    k = w.shape[-1]
    target = (vectors[:, -k:] * values[-k:].clamp(min=0.0).sqrt()).flip(1)
    left, _, right = torch.linalg.svd(w.mT @ target)
    turn = left @ right
    result = {**draws, "loadings_standard": w @ turn}
    return {**result, "z": draws["z"] @ turn} if "z" in draws else result
