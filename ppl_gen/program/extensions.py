"""What a program may offer beyond model and guide, each a plain record of functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["CAVIUpdates", "EMSteps", "Energy", "Tempering", "TimeSteps", "Transition"]

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
        site: the site whose density this is: an observed one, or a latent one below which the program draws the rows.
        tempering: ``tempering() -> Tempering`` at the present parameters: what annealed importance sampling and
            tempered chains walk along.
        bound: ``free_energy`` lies above that of the program (a variational one does), so that
            -free_energy - log Z is a lower bound of log p.
    """

    free_energy: Callable[[Tensor], Tensor]
    gibbs: Callable[[Tensor, int], Tensor]
    log_partition: Callable[[], Tensor] | None = None
    site: str = "x"
    tempering: Callable[[], Tempering] | None = None
    bound: bool = False


@dataclass(frozen=True)
class Tempering:
    r"""Unnormalised densities f_b of the states of a chain, 0 <= b <= 1, from one that can be drawn to the program's.

    At b = 0 states are drawn exactly and the normaliser is known; at b = 1 the normaliser is the Z of the energy. The
    states are rows, or hidden units that stand for them. b is a number, or one for each state (states x 1).

    Args:
        begin: ``begin(count) -> states``: exact draws at b = 0.
        log_base: log of the normaliser at b = 0, a scalar.
        log_density: ``log_density(states, b) -> log f_b`` per state, nats.
        move: ``move(states, b, steps) -> states``: leaves f_b invariant; without gradients.
        between: ``between(states, old, new) -> (states, log f_new - log f_old)``: the difference at the states given,
            in float64, and the states after one sweep at ``new``; None: made of the two before.
        of_rows: ``of_rows(x) -> states``: where chains that start at data begin; None: the states are rows.
        improper: ``improper() -> bool``: whether the normaliser at b = 1 is seen to be infinite; None: it is finite.
        elsewhere: ``elsewhere(count) -> states``: starts all over the space, which know nothing of the data.
        exact: ``exact() -> log Z`` where it is a sum over all states that takes two seconds at most; else None.
    """

    begin: Callable[[int], Tensor]
    log_base: Tensor
    log_density: Callable[[Tensor, Any], Tensor]
    move: Callable[[Tensor, Any, int], Tensor]
    between: Callable[[Tensor, float, float], tuple[Tensor, Tensor]] | None = None
    of_rows: Callable[[Tensor], Tensor] | None = None
    improper: Callable[[], bool] | None = None
    elsewhere: Callable[[int], Tensor] | None = None
    exact: Callable[[], Tensor] | None = None


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


@dataclass(frozen=True)
class Transition:
    """A Markov chain of rows that forgets a part of one and draws the row anew: x -> corrupted -> x'.

    Args:
        corrupt: ``corrupt(x) -> corrupted``: rows with a part of them lost, drawn without gradients.
        denoise: ``denoise(corrupted) -> distribution`` over the rows, one event each, as a Pyro distribution.
        site: the observed site whose rows these are.
    """

    corrupt: Callable[[Tensor], Tensor]
    denoise: Callable[[Tensor], Any]
    site: str = "x"
