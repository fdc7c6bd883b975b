r"""The density of a program over one flat vector without constraints: what Hamiltonian samplers move in.

.. math:: U(u) = -\log p(x, z(u)) - \log \left| \det \partial z / \partial u \right|,

where each latent site is z = T(u), T being torch's bijection onto the support of the site, and finite discrete sites
are summed out. Supports are read as the program runs, so that a bound may depend on another latent site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.enumeration.marginals import enumerated_trace, log_joint
from ppl_gen.errors import IncompatibleError
from ppl_gen.handlers.mapped import mapped
from ppl_gen.handlers.placed import Lifted, Placed
from ppl_gen.handlers.sites import is_subsample
from ppl_gen.program.info import ProgramInfo
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import validation_off

__all__ = ["NEAR", "NEEDS", "Unconstrained", "refuse_hidden_draws", "singular", "starting_point"]

#: What a program has to offer so that its posterior is a density over one vector.
NEEDS: Sequence[Need] = (("density",), ("latent sites",), ("differentiable latents",), ("no free parameters",))

TRIES = 100
EXACT = 10  # the last of them
REACH, NEAR = 2.0, 0.1  # how far from 0 chains begin, as in Stan; and from given values that must not be left


class Unconstrained:
    r"""A program at given data as a function of one flat vector.

    .. math:: U(u) = -\log p(x, T(u)) - \log | \det \partial T / \partial u |

    ``size`` is that of the vector, ``sites`` maps the latent sites, in their order in it, to the shapes of their
    unconstrained values; `potential` gives U, `potential_and_gradient` its slope too, `values` the sites T(u) and
    `split` their parts of u. Finite sites are summed out.

    Args:
        model: the program's model.
        batch: the data.
        info: the site table; it says which sites are summed out and how plates nest.

    Raises:
        IncompatibleError: if nothing continuous is latent, or if the support of a continuous
            site depends on a discrete one.

    Example:
        >>> import pyro, ppl_gen as pg
        >>> import pyro.distributions as dist
        >>> from ppl_gen.data.batching import as_dataset
        >>> def model(x):
        ...     scale = pyro.sample("scale", dist.Exponential(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, scale), obs=x)
        >>> x = torch.zeros(2)
        >>> density = Unconstrained(model, as_dataset(x, model).batch(), pg.check(model, x))
        >>> density.size, density.values(torch.zeros(1))  # the logarithm of the scale: U(0) = 1 + 2 log(2 pi) / 2
        (1, (tensor(1.),))
        >>> round(float(density.potential(torch.zeros(1))), 3)
        2.838
    """

    def __init__(self, model: Callable[..., Any], batch: Batch, info: ProgramInfo) -> None:
        self.model, self.batch = model, batch
        self.nesting, self.data_plate = info.plate_nesting, info.data_plate
        self.sites: dict[str, torch.Size] = {}
        self.sums = False
        with validation_off(), torch.no_grad():
            trace = poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
            for name, node in trace.nodes.items():
                if node["type"] == "sample" and not node["is_observed"]:
                    self._add(name, node)
        if not self.sites:
            raise IncompatibleError(
                f"only continuous latent sites have an unconstrained space, and {info.name!r} has none: "
                + (
                    f"{', '.join(info.finite_latents)} are finite and summed out, so that EM() or fit.posterior() with "
                    "any algorithm gives them exactly"
                    if info.finite_latents
                    else f"{', '.join(site.name for site in info.select())} are discrete"
                )
            )
        self.size = sum(shape.numel() for shape in self.sites.values())
        self._check_supports()

    def _add(self, name: str, node: Any) -> None:
        fn = node["fn"]
        if is_subsample(node):
            return
        if getattr(fn.support, "is_discrete", False):
            self.sums = True
        else:
            self.sites[name] = mapped(name, fn.support).inv(node["value"]).shape

    def _check_supports(self) -> None:
        if not self.sums:
            return
        u = torch.zeros(self.size)
        first, last = self._placed(u, 0).values, self._placed(u, -1).values
        moved = [n for n in first if first[n].shape != last[n].shape or not torch.equal(first[n], last[n])]
        if moved:
            raise IncompatibleError(
                f"the support of {', '.join(moved)} depends on a discrete latent site, which is summed out; give it a "
                "support that is the same for every value of that site"
            )

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """The part of each site of ``u`` (one flat vector), in the shape of its unconstrained value."""
        parts = u.split([shape.numel() for shape in self.sites.values()])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.sites.items(), parts, strict=True)}

    def _placed(self, u: Tensor, state: int = 0) -> Placed:
        placed = Placed(self.split(u), state)
        with validation_off(), placed:
            self.model(*self.batch.args, **self.batch.kwargs)
        return placed

    def values(self, u: Tensor) -> tuple[Tensor, ...]:
        """The latent sites at ``u``, in the order of ``sites``, each in its own shape."""
        values = self._placed(u).values
        return tuple(values[name] for name in self.sites)

    def potential(self, u: Tensor) -> Tensor:
        """U(u), a scalar in nats."""
        args, kwargs = self.batch.args, self.batch.kwargs
        with validation_off():
            if self.sums:
                placed = self._placed(u)
                trace = enumerated_trace(self.model, args, kwargs, values=placed.values, plate_nesting=self.nesting)
                return -(log_joint(trace, self.data_plate) + placed.log_det)
            placed = Placed(self.split(u))
            with placed:
                trace = poutine.trace(self.model).get_trace(*args, **kwargs)
            return -(trace.log_prob_sum() + placed.log_det)

    def potential_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """U(u) and dU/du, detached; NaN and zeros where a matrix of the program cannot be factorised."""
        try:
            with torch.enable_grad():
                u = u.detach().requires_grad_(True)
                value = self.potential(u)
                (gradient,) = torch.autograd.grad(value, u)
        except RuntimeError as error:
            if not singular(error):
                raise
            return u.new_tensor(float("nan")), torch.zeros_like(u.detach())
        return value.detach(), gradient

    def parts_of(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `values` for the sites given; those on the edge of their support or beyond are left out.

        Raises:
            ValueError: for a value whose shape is not that of its site.
        """
        lifted = Lifted({name: value for name, value in values.items() if name in self.sites})
        with validation_off(), torch.no_grad(), lifted:
            self.model(*self.batch.args, **self.batch.kwargs)
        return {name: part for name, part in lifted.parts.items() if bool(part.isfinite().all())}

    def trouble(self, u: Tensor) -> list[str]:
        """What is not finite at ``u``: one line per site."""
        lines = []
        try:
            lines = self._without_density(u)
        except RuntimeError as error:
            if not singular(error):
                raise
            return [f"a matrix cannot be factorised ({str(error).strip().splitlines()[0]})"]
        if not lines:
            gradients = self.split(self.potential_and_gradient(u)[1])
            lines = [f"site {n!r}: gradient {_brief(g)}" for n, g in gradients.items() if not bool(g.isfinite().all())]
        return lines

    def _without_density(self, u: Tensor) -> list[str]:
        lines = []
        with validation_off(), torch.no_grad(), Placed(self.split(u)):
            trace = poutine.trace(self.model).get_trace(*self.batch.args, **self.batch.kwargs)
            for name, node in trace.nodes.items():
                if node["type"] == "sample":
                    total = node["fn"].log_prob(node["value"]).sum()
                    if not bool(total.isfinite()):
                        lines.append(f"site {name!r}: log density {float(total):g} at {_brief(node['value'])}")
        return lines


def singular(error: BaseException) -> bool:
    """Whether torch says that a matrix cannot be factorised."""
    return isinstance(error, RuntimeError) and ("singular" in str(error) or "positive-definite" in str(error))


def _brief(value: Tensor) -> str:
    flat = value.detach().reshape(-1)
    shown = ", ".join(f"{float(v):.4g}" for v in flat[:4])
    return shown if flat.numel() == 1 else f"[{shown}{', ...' if flat.numel() > 4 else ''}]"


def refuse_hidden_draws(program: str, density: Unconstrained, u: Tensor) -> None:
    """A density that differs from one evaluation to the next would be explored without complaint, and wrongly.

    Raises:
        IncompatibleError: where two evaluations at ``u`` differ.
    """
    first, second = (float(density.potential_and_gradient(u)[0]) for _ in range(2))
    if not math.isclose(first, second, rel_tol=1e-6):
        raise IncompatibleError(
            f"the log density of {program!r} differs between two evaluations at one point ({-first:.6g} and "
            f"{-second:.6g}): the program draws random numbers that are not sample sites, which nothing here can see"
        )


def starting_point(
    density: Unconstrained, given: Mapping[str, Tensor], jitter: float | None, opposite: Tensor | None = None
) -> Tensor:
    """A point with finite density and gradient: within ``jitter`` of ``given`` parts, between 1 and 2 from 0 elsewhere.

    ``jitter=None`` means dispersed: within 2 of the given parts; or, with ``opposite``, the start of another chain,
    between 1 and 2 from 0 in every number and with another sign than there. (A chain that begins nearer 0 begins on the
    ridge between two modes of a symmetric posterior, and may roll to either side.) Where no density is finite so far
    away, nearer by and by, and at last at the given parts themselves.

    Raises:
        ValueError: if 100 tries fail; the message lists the sites at fault.
    """
    known = torch.cat([given.get(name, torch.zeros(shape)).reshape(-1) for name, shape in density.sites.items()])
    told = torch.cat([torch.full((shape.numel(),), name in given) for name, shape in density.sites.items()])
    for attempt in range(TRIES):
        third = 3 * attempt // TRIES
        noise = 2.0 * torch.rand(density.size) - 1.0
        away = torch.where(noise < 0, -1.0, 1.0) + noise if third < 2 else REACH * noise
        if jitter is None and opposite is not None and third == 0:
            u = torch.where(opposite < 0, 1.0, -1.0) * away.abs()
        else:
            wide = (REACH if third < 2 else NEAR) if jitter is None else jitter
            exact = jitter is None and attempt >= TRIES - EXACT
            u = torch.where(told, known if exact else known + wide * noise, away)
        value, gradient = density.potential_and_gradient(u)
        if bool(value.isfinite()) and bool(gradient.isfinite().all()):
            return u
    found = "\n  ".join(density.trouble(u) or [f"the log density is {-float(value):g}"])
    raise ValueError(
        f"no starting point has a finite log density and gradient after {TRIES} tries; at the last one\n"
        f"  {found}\n"
        "Look at the priors and the likelihood of these sites, or give plausible values: pg.Program(model, start=...)"
    )
