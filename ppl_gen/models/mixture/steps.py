"""Closed-form steps of Gaussian mixtures: EM's M-step and the coordinate updates of mean-field CAVI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, kl_divergence

from ppl_gen.nn.moments import Moments, moments, pooled
from ppl_gen.nn.quadratic import Quadratic, swept
from ppl_gen.program.extensions import CAVIUpdates, EMSteps

__all__ = ["Components", "Mixture", "Standard", "maximised", "proportions"]


class Components(Protocol):
    """What a mixture asks of its components: prior statements, and closed forms in the moments of their rows."""

    @property
    def components(self) -> int: ...
    @property
    def event(self) -> tuple[int, ...]: ...
    @property
    def full(self) -> bool: ...
    @property
    def axes(self) -> Mapping[str, int]: ...
    @property
    def constraints(self) -> Mapping[str, constraints.Constraint]: ...
    def sample(self, like: Tensor) -> dict[str, Tensor]: ...
    def guide(self) -> None: ...
    def expose(self, values: Mapping[str, Tensor], loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]: ...
    def observation(self, located: tuple[Tensor, Tensor], assignment: Tensor) -> dist.TorchDistribution: ...
    def start(self, means: Tensor) -> dict[str, Tensor]: ...
    def maximise(self, groups: Moments, prior: bool) -> dict[str, Tensor]: ...
    def update(self, groups: Moments) -> dict[str, Tensor]: ...
    def located(self, values: Mapping[str, Tensor]) -> Quadratic: ...
    def expected(self, parameters: Mapping[str, Tensor]) -> Quadratic: ...
    def kl(self, parameters: Mapping[str, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Standard:
    """Between the user's units and standardised ones: x = loc + scale * standardised, in ``size`` dimensions.

    ``loc``: of the shape of a row, (d,) or a number; ``scale``: the same, or one number for all dimensions.
    """

    loc: Tensor
    scale: Tensor
    size: int

    def on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc.to(like), self.scale.to(like)

    def scaled(self, x: Tensor) -> Tensor:
        """Rows in standardised units: N x d."""
        return self.scaling(x if x.is_floating_point() else x.new_empty((), dtype=torch.get_default_dtype()))(x)

    def scaling(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        """The function that takes rows to standardised units, N x d, in the dtype and on the device of ``like``."""
        loc, scale = self.on(like)
        return lambda x: ((x.to(like) - loc) / scale).reshape(len(x), -1)

    def log_volume(self, x: Tensor) -> Tensor:
        """What standardising adds to the log density of all rows: a scalar in nats."""
        return len(x) * self.scale.log().expand(self.size).sum()


@dataclass(frozen=True)
class Mixture:
    """The numbers that fix one mixture program, and its closed-form steps."""

    gaussian: Components
    standard: Standard
    free: bool
    concentration: float

    def equal(self, like: Tensor) -> Tensor:
        return like.new_full((self.gaussian.components,), 1 / self.gaussian.components)

    def em(self) -> EMSteps:
        r"""Steps to maximum likelihood, or a posteriori.

        .. math:: w_k = \frac{N_k + \alpha - 1}{N + K (\alpha - 1)}, \qquad N_k = \sum_i r_{ik}

        with alpha = 1 under maximum likelihood; means and covariances are the moments of the rows weighted by r, shrunk
        by their prior where it counts.
        """
        return EMSteps(self.m_step, self.e_step, prepare=lambda x: (x,), blend=_blended)

    def e_step(self, values: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The log-likelihood (total nats), and counts, means and scatter of the components' rows (K x ...)."""
        forms = self.gaussian.located(values)
        weights = values["weights"] if self.free else self.equal(forms.centre)
        total, groups = self._swept(forms.plus(weights.log()), x)
        assert groups is not None
        return total - self.standard.log_volume(x).to(total), _written(groups)

    def _swept(self, forms: Quadratic, x: Tensor, *, statistics: bool = True) -> tuple[Tensor, Moments | None]:
        """Total (nats) and moments of standardised rows, ``x`` (N or N x d) in the user's units."""
        return swept(x, self.standard.scaling(forms.centre), forms, statistics=statistics)

    def m_step(
        self, weights: Mapping[str, Tensor], values: Mapping[str, Tensor], prior: bool, x: Tensor | None = None
    ) -> dict[str, Tensor]:
        """New values of all global sites. A component without rows stays where it was.

        ``weights`` is what `e_step` gives, or the responsibilities of all rows: ``assignment``, N x K.
        """
        if "assignment" in weights:
            assert x is not None
            groups = moments(self.standard.scaled(x), weights["assignment"], full=self.gaussian.full)
        else:
            groups = Moments(weights["counts"], weights["means"], weights["scatter"])
        new = maximised(self.gaussian, groups, values, prior)
        if self.free:
            new["weights"] = proportions(groups.counts, self.concentration, prior)
        return {name: value.to(values[name]) for name, value in new.items()}

    def cavi(self, start: Callable[[], Mapping[str, Tensor]]) -> CAVIUpdates:
        """Coordinate updates of q(z) q(w) q(mu, Sigma), the conjugate mean field; z is at its optimum throughout."""

        def init(x: Tensor) -> dict[str, Tensor]:
            """As if each component had seen N / K rows that agree with the starting values."""
            rows = self.standard.scaled(x)
            means = start()["loc_standard"].to(rows).reshape(self.gaussian.components, -1)
            counts = self.equal(rows) * len(rows)
            squares = counts.unsqueeze(-1).expand_as(means)
            return self._update(Moments(counts, means, squares.diag_embed() if self.gaussian.full else squares))

        def step(parameters: Mapping[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            _, groups = self._swept(self._expected(parameters), x)
            assert groups is not None
            new = {name: value.to(parameters[name]) for name, value in self._update(groups).items()}
            return new, self._bound(new, x)

        def guide(x: Tensor) -> None:
            if self.free:
                pyro.sample("weights", dist.Dirichlet(pyro.param("weights_concentration")))
            self.gaussian.guide()

        free = {"weights_concentration": constraints.positive} if self.free else {}
        return CAVIUpdates(init, step, guide, {**free, **self.gaussian.constraints})

    def _update(self, groups: Moments) -> dict[str, Tensor]:
        """Parameters of q(w) and of the components from the moments of K groups."""
        free = {"weights_concentration": self.concentration + groups.counts} if self.free else {}
        return {**free, **self.gaussian.update(groups)}

    def _expected(self, parameters: Mapping[str, Tensor]) -> Quadratic:
        """E[log p(row, z = k)] under q of the globals, of standardised rows."""
        forms = self.gaussian.expected(parameters)
        if not self.free:
            return forms.plus(self.equal(forms.centre).log())
        concentration = parameters["weights_concentration"]
        return forms.plus(concentration.digamma() - concentration.sum().digamma())

    def _bound(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The evidence lower bound of ``x``, z at its optimum: a scalar in nats."""
        total, _ = self._swept(self._expected(parameters), x, statistics=False)
        bound = total - self.standard.log_volume(x).to(total) - self.gaussian.kl(parameters)
        if self.free:
            own = parameters["weights_concentration"]
            prior = torch.full_like(own, self.concentration)
            bound = bound - kl_divergence(torch.distributions.Dirichlet(own), torch.distributions.Dirichlet(prior))
        return bound


def _written(groups: Moments) -> dict[str, Tensor]:
    return {"counts": groups.counts, "means": groups.means, "scatter": groups.scatter}


def _blended(old: Mapping[str, Tensor], new: Mapping[str, Tensor], shares: tuple[float, float]) -> dict[str, Tensor]:
    return _written(pooled(Moments(**old), Moments(**new), shares))


def maximised(gaussian: Components, groups: Moments, values: Mapping[str, Tensor], prior: bool) -> dict[str, Tensor]:
    """`Components.maximise`, where a component without rows keeps its ``values`` (its likelihood is flat)."""
    least = torch.finfo(groups.counts.dtype).eps
    new = gaussian.maximise(Moments(groups.counts.clamp_min(least), groups.means, groups.scatter), prior)
    empty = groups.counts < least
    if prior or not bool(empty.any()):
        return new
    beside = {name: empty.reshape(-1, *[1] * (value.dim() - 1)) for name, value in new.items()}
    return {name: torch.where(beside[name], values[name].to(value), value) for name, value in new.items()}


def proportions(counts: Tensor, concentration: float, prior: bool) -> Tensor:
    """The most likely (or most probable) probabilities of categories with these counts, along the last dimension.

    Categories without counts keep a share at the rounding error, so that their logarithm is finite; a row without any
    count gets equal shares.

    Raises:
        ValueError: if the prior's density is infinite at the edge, so that it has no mode.

    Example:
        >>> proportions(torch.tensor([1.0, 3.0]), concentration=2.0, prior=True)
        tensor([0.3333, 0.6667])
    """
    if prior and concentration < 1:
        raise ValueError(
            f"concentration: {concentration} < 1 makes the prior density of probabilities infinite at their edge, so "
            "there is no maximum a posteriori; take concentration >= 1, or CAVI() or NUTS()"
        )
    least = torch.finfo(counts.dtype).eps
    total = counts + (concentration - 1 if prior else 0.0)
    total = torch.where(total.sum(-1, keepdim=True) < least, torch.ones_like(total), total)
    bounded = (total / total.sum(-1, keepdim=True)).clamp_min(least)
    return bounded / bounded.sum(-1, keepdim=True)
