r"""Hidden Markov models of sequences, with normal or categorical emissions.

.. math:: p(x_{1:T}, s_{1:T}) = \pi_{s_1} \prod_{t=2}^T A_{s_{t-1} s_t} \prod_{t=1}^T p(x_t \mid s_t)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor

from ppl_gen.arguments import require_choice
from ppl_gen.data.inputs import active_steps, sequences
from ppl_gen.errors import require_positive, require_whole
from ppl_gen.models.mixture.gaussian import spread_means
from ppl_gen.models.mixture.steps import Standard, maximised, proportions
from ppl_gen.models.relabelling import matched_order, permuted
from ppl_gen.models.sequences.forward import expectations
from ppl_gen.nn.moments import moments
from ppl_gen.nn.normal_gamma import NormalGamma
from ppl_gen.program.extensions import EMSteps
from ppl_gen.program.program import Program, Recipe

__all__ = ["hidden_markov"]


def hidden_markov(
    states: int,
    *,
    emission: Literal["normal", "categorical"] = "normal",
    categories: int | None = None,
    concentration: float = 1.0,
    strength: float = 0.01,
    degrees: float = 3.0,
    spread: float | None = None,
    floor: float = 1e-6,
) -> Recipe:
    r"""A hidden Markov model of sequences x (sequences x time), all independent given the global parameters.

    .. math:: \pi \sim \mathrm{Dirichlet}(\alpha), \quad A_k \sim \mathrm{Dirichlet}(\alpha), \quad
              x_t \mid s_t = k \sim \mathrm{Normal}(\mu_k, \sigma_k^2) \;\text{or}\; \mathrm{Categorical}(\theta_k)

    The data plate runs over sequences; one sequence is data of shape (1, T). Sequences of unequal lengths are padded at
    their ends with any finite number (a valid category) and passed as ``{"x": x, "lengths": lengths}``.

    Sites: ``initial`` (K), ``transition`` (K x K, rows sum to one), ``state_0``, ``x_0``, ``state_1``, ``x_1`` ... for
    each sequence; for normal emissions ``precision`` and ``loc_standard`` (K, in units of the mean and standard
    deviation of all values) with ``loc`` and ``scale`` in the user's units, and priors as in `gaussian_mixture`; for
    categorical ones ``emission`` (K x C).

    Args:
        states: K.
        emission: "normal" for real values, "categorical" for integers 0, 1, ... C - 1.
        categories: C; one more than the largest value in the data unless given.
        concentration: alpha of all Dirichlet priors; 1 is uniform.
        strength: kappa, how many values the prior of a mean is worth.
        degrees: nu, how many values the prior of a variance is worth.
        spread: the prior scale of a variance in units of the variance of the data; 1 / K^2 unless given.
        floor: the least variance under maximum likelihood, in the same units.

    Returns:
        A recipe; it raises ValueError or TypeError for data that are no such sequences.

    Raises:
        ValueError: for an argument out of its range.

    References:
        A maximization technique occurring in the statistical analysis of probabilistic functions of Markov chains
        (Baum, Petrie, Soules and Weiss, 1970).

    Example:
        >>> import torch, ppl_gen as pg
        >>> x = torch.tensor([[0.1, 0.2, 4.0], [3.9, 4.2, 0.0]])
        >>> info = pg.check(hidden_markov(states=2), x)
        >>> info.data_plate, info.finite_latents
        ('data', ['state_0', 'state_1', 'state_2'])
    """
    _check_arguments(states, emission, categories)
    numbers = {
        "concentration": concentration,
        "strength": strength,
        "degrees": degrees,
        "spread": spread,
        "floor": floor,
    }
    for name, value in numbers.items():
        if value is not None or name != "spread":
            require_positive(name, value)
    if not degrees > 1:
        raise ValueError(f"degrees: expected more than 1, got {degrees}")

    def build(data: Any) -> Program:
        x, active = sequences(data, "hidden_markov")
        emits: _Emission
        if emission == "categorical":
            emits = _Categorical(states, _categories(x, active, categories), concentration)
        else:
            wide = states**-2.0 if spread is None else float(spread)
            emits = _Normal(NormalGamma(states, (), False, strength, degrees, wide, floor), x.double()[active])
        return _program(states, emits, concentration)

    arguments = {"states": states, "emission": emission}
    return Recipe(build, name="hidden_markov", arguments=arguments)


class _Emission(Protocol):
    """What the chain asks of its emissions.

    ``x`` is sequences x time; ``log_probs`` (nats) and the ``weights`` of `maximise` are sequences x time x K; `order`
    gives draws x K.
    """

    @property
    def axes(self) -> Mapping[str, int]: ...

    def sample(self, like: Tensor) -> Any: ...
    def distribution(self, sampled: Any, state: Tensor) -> dist.TorchDistribution: ...
    def log_probs(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor: ...
    def start(self) -> dict[str, Tensor]: ...
    def order(self, draws: Mapping[str, Tensor]) -> Tensor: ...
    def maximise(self, weights: Tensor, values: Mapping[str, Tensor], prior: bool, x: Tensor) -> dict[str, Tensor]: ...


class _Normal:
    """Normal emissions; ``values`` are those of all active steps, in one vector."""

    def __init__(self, gaussian: NormalGamma, values: Tensor) -> None:
        if bool((values == values[0]).all()):
            raise ValueError("data: all values are constant, so their density does not exist")
        self.gaussian, self.axes = gaussian, gaussian.axes
        self.standard = Standard(values.mean(), values.std(correction=0), 1)
        self.rows = self.standard.scaled(values)

    def sample(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.gaussian.expose(self.gaussian.sample(like), *self.standard.on(like))

    def distribution(self, sampled: tuple[Tensor, Tensor], state: Tensor) -> dist.TorchDistribution:
        return self.gaussian.observation(sampled, state)

    def log_probs(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        middle, unit = self.standard.on(values["loc_standard"])
        normal = dist.Normal(middle + unit * values["loc_standard"], unit * values["precision"].rsqrt())
        return normal.log_prob(x.to(middle).unsqueeze(-1))

    def start(self) -> dict[str, Tensor]:
        return self.gaussian.start(spread_means(self.rows, self.gaussian.components))

    def order(self, draws: Mapping[str, Tensor]) -> Tensor:
        return draws["loc_standard"].argsort(-1)

    def maximise(self, weights: Tensor, values: Mapping[str, Tensor], prior: bool, x: Tensor) -> dict[str, Tensor]:
        rows = self.standard.scaled(x.reshape(-1)).to(weights)
        groups = moments(rows, weights.reshape(len(rows), -1), full=False)
        return maximised(self.gaussian, groups, values, prior)


class _Categorical:
    """Categorical emissions: ``emission`` is K x C, ``frequencies`` has the share of each category in the data."""

    axes: Mapping[str, int] = {"emission": -2}

    def __init__(self, states: int, frequencies: Tensor, concentration: float) -> None:
        self.states, self.frequencies, self.concentration = states, frequencies, concentration

    def sample(self, like: Tensor) -> Tensor:
        prior = dist.Dirichlet(like.new_full((self.states, len(self.frequencies)), self.concentration))
        return pyro.sample("emission", prior.to_event(1))

    def distribution(self, sampled: Tensor, state: Tensor) -> dist.TorchDistribution:
        return dist.Categorical(Vindex(sampled)[..., state, :])

    def log_probs(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        table = values["emission"].clamp_min(torch.finfo(values["emission"].dtype).tiny).log()
        return table.T[x.long()]

    def start(self) -> dict[str, Tensor]:
        """Half the frequencies in the data, half a random draw: states must differ for EM to tell them apart."""
        common = self.frequencies.expand(self.states, -1)
        return {"emission": (common + dist.Dirichlet(torch.ones_like(common)).sample()) / 2}

    def order(self, draws: Mapping[str, Tensor]) -> Tensor:
        return matched_order(draws["emission"])

    def maximise(self, weights: Tensor, values: Mapping[str, Tensor], prior: bool, x: Tensor) -> dict[str, Tensor]:
        seen = x.unsqueeze(-1) == torch.arange(len(self.frequencies), device=x.device)
        counts = torch.einsum("ntk,ntc->kc", weights, seen.to(weights))
        return {"emission": proportions(counts, self.concentration, prior)}


def _program(states: int, emits: _Emission, concentration: float) -> Program:
    def hidden_markov(x: Tensor, lengths: Tensor | None = None) -> None:
        x = x.long() if x.dtype is torch.bool else x
        like = x if x.is_floating_point() else torch.empty((), device=x.device)
        alpha = like.new_full((states, states), concentration)
        initial = pyro.sample("initial", dist.Dirichlet(alpha[0]))
        transition = pyro.sample("transition", dist.Dirichlet(alpha).to_event(1))
        sampled = emits.sample(like)
        active = active_steps(x, lengths)
        with pyro.plate("data", len(x)):
            probs = initial
            for t in pyro.markov(range(x.shape[1])):
                state = pyro.sample(f"state_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
                # States go on past the end, where they sum to one: masking them too would count every state as sure.
                with poutine.mask(mask=active[:, t]):
                    pyro.sample(f"x_{t}", emits.distribution(sampled, state), obs=x[:, t])
                probs = Vindex(transition)[..., state, :]

    def start() -> dict[str, Tensor]:
        """Emissions that differ, and chains that stay for some time."""
        equal = torch.full((states, states), 1 / states, dtype=torch.float64)
        staying = torch.eye(states, dtype=torch.float64)
        return {"initial": equal[0], "transition": (equal + staying) / 2, **emits.start()}

    def relabel(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """States by their mean, or matched by their emissions to their average over the draws."""
        axes: dict[str, int | Sequence[int]] = {"initial": -1, "transition": (-2, -1), **emits.axes}
        return permuted(draws, emits.order(draws), axes, labels=[name for name in draws if name.startswith("state_")])

    def e_step(
        values: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs, active = emits.log_probs(values, x), active_steps(x, lengths)
        return expectations(values["initial"], values["transition"], log_probs, active)

    def m_step(
        weights: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        prior: bool,
        x: Tensor,
        lengths: Tensor | None = None,
    ) -> dict[str, Tensor]:
        chain = {name: proportions(weights[name], concentration, prior) for name in ("initial", "transition")}
        return chain | emits.maximise(weights["states"], values, prior, x)

    return Program(
        hidden_markov, start=start, relabel=relabel if states > 1 else None, em=EMSteps(m_step=m_step, e_step=e_step)
    )


def _check_arguments(states: int, emission: str, categories: int | None) -> None:
    require_whole("states", states)
    require_choice("emission", emission, ("normal", "categorical"))
    if categories is not None and emission == "normal":
        raise ValueError(
            "categories: only categorical emissions have them; expected None with emission='normal', "
            f"got {categories!r}"
        )
    if categories is not None:
        require_whole("categories", categories)


def _categories(x: Tensor, active: Tensor, categories: int | None) -> Tensor:
    """How often each of the C categories occurs, as shares; ``x`` and ``active`` are sequences x time."""
    if x.is_floating_point():
        raise TypeError(f"data: categorical emissions are integers 0, 1, ..., got {x.dtype}; convert with .long()")
    low, high = int(x.min()), int(x.max())
    count = high + 1 if categories is None else categories
    if low < 0 or high >= count:
        raise ValueError(f"data: expected categories from 0 to {count - 1} (padding too), got values {low} to {high}")
    return torch.bincount(x[active].long(), minlength=count).double() / active.sum()
