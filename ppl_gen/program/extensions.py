"""What a program may offer beyond model and guide, each a plain record of functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["CAVIUpdates", "EMSteps", "Energy", "TimeSteps"]

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class EMSteps:
    """Closed-form steps of expectation-maximisation (Dempster, Laird and Rubin 1977).

    Args:
        m_step: ``m_step(weights, values, prior, *data) -> values``: new values of the global sites from the
            responsibilities ``weights`` (site name -> rows x states) at the present ``values``; ``prior`` tells
            whether to maximise the posterior (True) or the likelihood.
        e_step: ``e_step(values, *data) -> (log_likelihood, weights)``; derived by enumeration when None. It may give
            any sufficient statistics as ``weights``, which ``m_step`` then gets: latent sites need not be finite.
        prepare: ``prepare(*data) -> data``, once in a run: a tuple that ``e_step`` and ``m_step`` get in place of the
            data, such as moments that are all they need. It sees the rows in the dtype that the user gave, and not
            that of the fit: large data in float32 need not be copied. None: they get the data, in the fit's dtype.
        blend: ``blend(old, new, shares) -> weights``: the statistics of two sets of rows together, whose rows count as
            often as the two numbers ``shares`` say. With it the program can be learned from minibatches
            (``EM(batch_size=...)``), where ``m_step`` is called without data: the statistics are all that it needs.
    """

    m_step: Callable[..., dict[str, Tensor]]
    e_step: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None
    prepare: Callable[..., tuple[Any, ...]] | None = None
    blend: Callable[[Values, Values, tuple[float, float]], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class CAVIUpdates:
    """Coordinate ascent in a conjugate exponential family (Bishop 2006, chapter 10).

    Args:
        init: ``init(*data) -> variational parameters`` (a mapping of named tensors).
        step: ``step(parameters, *data) -> (parameters, elbo)``; the ELBO is total nats and never falls.
        guide: a Pyro guide over the global sites that reads the parameters with ``pyro.param``, by their names.
        constraints: the constraint of each variational parameter; real unless named.
    """

    init: Callable[..., dict[str, Tensor]]
    step: Callable[..., tuple[dict[str, Tensor], Tensor]]
    guide: Callable[..., Any]
    constraints: Mapping[str, Any]


@dataclass(frozen=True)
class Energy:
    """An unnormalised density exp(-free_energy(x)) and a Markov chain that leaves it invariant.

    Args:
        free_energy: ``free_energy(x) -> rows``, in nats.
        gibbs: ``gibbs(x, steps) -> x``: moves each row by ``steps`` sweeps, without gradients.
        log_partition: ``log_partition() -> log Z`` where it can be computed exactly, else None.
        site: the observed site whose density this is.
    """

    free_energy: Callable[[Tensor], Tensor]
    gibbs: Callable[[Tensor, int], Tensor]
    log_partition: Callable[[], Tensor] | None = None
    site: str = "x"


@dataclass(frozen=True)
class TimeSteps:
    """A chain x_T -> ... -> x_1 -> x_0 whose ELBO is a sum over time steps that can be entered anywhere.

    Args:
        steps: T.
        term: ``term(t, *data) -> rows``: an unbiased draw of the term of time step ``t`` (rows of integers in 1..T)
            of the negative ELBO, in nats.
        constant: ``constant(*data) -> rows``: what remains, the same for every step (the divergence at T).
        error: ``error(t, *data) -> (rows, rows)``: the squared error of the noise predicted at step ``t``, and the term
            of the same draw with a gradient for what the error does not depend on (the widths), for `SimpleDiffusion`.
    """

    steps: int
    term: Callable[..., Tensor]
    constant: Callable[..., Tensor]
    error: Callable[..., tuple[Tensor, Tensor]] | None = None
