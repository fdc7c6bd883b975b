r"""The E-step of EM, and what its M-steps maximise.

.. math:: Q(\theta) = E_{p(z \mid x, \theta_{\text{old}})}[\log p(x, z \mid \theta)]

plus log p(theta) where the posterior is maximised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Transform, biject_to, transform_to

from ppl_gen.data.batching import Batch, Dataset
from ppl_gen.enumeration.contraction import dims_of
from ppl_gen.enumeration.enumerated_trace import batch_shape, enumerated_trace, is_discrete, outer_plates, packed_sites
from ppl_gen.enumeration.marginals import expected_log_joint, factor_marginals, log_prior
from ppl_gen.fitting.run import Run
from ppl_gen.handlers.sites import support
from ppl_gen.program.program import Program
from ppl_gen.workspace.isolation import validation_off

__all__ = ["Expectation", "Problem", "responsibilities"]


@dataclass(frozen=True, eq=False)
class Expectation:
    """An E-step: the values it was made at, the log-likelihood there (total nats), and the weights of the factors.

    ``objective`` is the log-likelihood, plus the log prior density when the posterior is maximised. ``trace`` is None
    where the program offers the E-step; ``weights`` are then the program's own, else by site, packed as its log-prob.
    """

    values: dict[str, Tensor]
    log_likelihood: float
    objective: float
    weights: Mapping[str, Tensor]
    trace: Trace | None


@dataclass(frozen=True, eq=False)
class Problem:
    """One program on its whole data, as EM sees it: global sites to move, and parameters that Pyro holds.

    Args:
        few: a look at the first rows only, where the data are large.
        names: the global latent sites.
        leaves: unconstrained parameters of `pyro.param` and `pyro.module`, by name.
        prior: whether the log prior density of the global sites counts.
        offered: whether the program's own E-step is used where it has one.
    """

    program: Program
    data: Dataset
    few: bool
    plate: str | None
    nesting: int
    transforms: Mapping[str, Transform]
    leaves: Mapping[str, Tensor]
    prior: bool
    offered: bool
    sums: bool

    memory: dict[str, Batch] = field(default_factory=dict)

    @staticmethod
    def of(run: Run, *, prior: bool, offered: bool, few: bool = False) -> Problem:
        """The problem of a run; parameters that the program makes on its first call exist afterwards."""
        info = run.info
        names = [site.name for site in info.select(local=False) if not site.finite]
        transforms = {name: _transform(info.sites[name].support) for name in names}
        own = offered and run.program.em is not None and run.program.em.e_step is not None
        # Parameters may have the rows' shape: all rows, unless there are none and the steps do not call the model.
        batch = run.data.glimpse() if own and not info.params else run.data.batch()
        leaves = run.workspace.collect(lambda: run.program.model(*batch.args, **batch.kwargs))
        return Problem(
            program=replace(run.program, model=run.joint),
            data=run.data,
            few=few,
            plate=info.data_plate,
            nesting=info.plate_nesting,
            transforms=transforms,
            leaves=run.workspace.trainable(leaves, run.notes),
            prior=prior,
            offered=own,
            sums="finite local latents" in info.offers,
        )

    @cached_property
    def batch(self) -> Batch:
        """The rows in the dtype of the fit: what the model is called with."""
        return self.data.glimpse() if self.few else self.data.batch()

    @property
    def rows(self) -> int:
        return (self.batch.rows if self.few else self.data.rows) or 1

    @cached_property
    def read(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """What the program's own steps read of the data, as arguments: see `EMSteps.prepare`."""
        prepare = None if self.program.em is None else self.program.em.prepare
        if prepare is None:
            return self.batch.args, self.batch.kwargs
        given = replace(self.data, dtype=None)
        batch = given.glimpse() if self.few else given.batch()
        return tuple(prepare(*batch.args, **batch.kwargs)), {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.transforms)

    def trace(self, values: Mapping[str, Tensor]) -> Trace:
        """The program with its finite sites enumerated and its global sites at ``values``."""
        batch = self.batch
        return enumerated_trace(self.program.model, batch.args, batch.kwargs, values=values, plate_nesting=self.nesting)

    def expect(self, values: dict[str, Tensor], *, offered: bool = True) -> Expectation:
        """The E-step at ``values``: the program's own where it is offered (and wanted), else by enumeration."""
        with torch.no_grad():
            if self.offered and offered:
                assert self.program.em is not None and self.program.em.e_step is not None
                args, kwargs = self.read
                total, weights = self.program.em.e_step(values, *args, **kwargs)
                prior = self.log_prior(values) if self.prior else total.new_zeros(())
                return Expectation(values, float(total), float(total + prior), weights, None)
            trace = self.trace(values)
            found = factor_marginals(trace, self.plate)
            objective = found.log_density + log_prior(trace, self.plate) if self.prior else found.log_density
            return Expectation(values, float(found.log_density), float(objective), found.weights, trace)

    def log_prior(self, values: Mapping[str, Tensor]) -> Tensor:
        """Without enumeration, a scalar: the latent sites of a program that offers its E-step may be continuous.

        The model is run for its global sites alone. Where their densities are the same on half of the first rows, they
        do not depend on the rows, and the first rows do.
        """
        if "prior" not in self.memory:
            few = self.data.glimpse()
            half = self.data.head(max(1, (few.rows or 2) // 2))
            same = torch.equal(self._log_prior(values, few), self._log_prior(values, half))
            self.memory["prior"] = few if same else self.batch
        return self._log_prior(values, self.memory["prior"])

    def _log_prior(self, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        with validation_off():
            trace = poutine.trace(poutine.condition(self.program.model, dict(values))).get_trace(
                *batch.args, **batch.kwargs
            )
            nodes: Mapping[str, Any] = trace.nodes
            terms = [nodes[name]["fn"].log_prob(values[name]).sum() for name in self.names]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def surrogate(self, values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """Q in nats, a scalar, differentiable in ``values`` and in the parameters that Pyro holds."""
        trace = self.trace(values)
        total = expected_log_joint(trace, weights, self.plate)
        return total + log_prior(trace, self.plate) if self.prior else total

    def untouched(self, values: Mapping[str, Tensor]) -> list[str]:
        """Global sites that no density of the rows depends on."""
        with torch.enable_grad():
            leaves = {name: values[name].detach().clone().requires_grad_() for name in self.names}
            trace = self.trace(leaves)
            weights = factor_marginals(trace, self.plate).weights
            terms = [trace.nodes[name]["packed"]["unscaled_log_prob"].sum() for name in weights]
            total = torch.stack([term for term in terms if term.requires_grad] or [torch.zeros(())]).sum()
            if not total.requires_grad:
                return list(leaves)
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True) if leaves else ()
        return [name for name, gradient in zip(leaves, found, strict=True) if gradient is None]


def _transform(support: Any) -> Transform:
    try:
        return biject_to(support)
    except NotImplementedError:  # triangular matrices, for one, are known to the other registry only
        return transform_to(support)


def responsibilities(expectation: Expectation) -> Mapping[str, Tensor]:
    """What an offered M-step reads: by discrete site the weights of its values, batch shape of the site x values.

    Scales count here (a row of scale two weighs two): these are weights, not probabilities.
    """
    if expectation.trace is None:
        return expectation.weights
    trace, tables = expectation.trace, {}
    for name, site in packed_sites(trace):
        if not is_discrete(site):
            continue
        weight, own = expectation.weights[name], site["infer"]["_enumerate_symbol"]
        plates = [symbol for f in outer_plates(site) if (symbol := trace.plate_to_symbol[f.name]) in dims_of(weight)]
        dims = [d for d in dims_of(weight) if d == own or d in plates]
        others = [i for i, d in enumerate(dims_of(weight)) if d not in dims]
        table = weight.sum(others) if others else weight
        order = [*plates, own] if own in dims else plates
        table = table.permute([dims.index(d) for d in order])
        tables[name] = table.reshape(*batch_shape(site), len(support(site)))
    return tables
