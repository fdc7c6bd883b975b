"""log Z of an energy by annealed importance sampling, forward and back, and the evidence that follows from it."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_gen.errors import require_flag, require_whole
from ppl_gen.program.extensions import Tempering

__all__ = ["AIS", "LogPartition", "log_partition"]

SLACK = 0.1  # nats by which forward and reverse may differ beyond their errors
NOTABLE = 1.0  # nats that chains from all over may give beyond the others: of a few of them the error is not known
FEW = 30  # chains below which their spread tells little
_SHARES = ((0.5, 0.05), (0.9, 0.25), (1.0, 0.7))  # where an inverse temperature ends, and the share of steps up to it


@dataclass(frozen=True)
class AIS:
    r"""How log Z is estimated by annealed importance sampling: ``fit.evidence(method=AIS())``.

    Chains walk from a density f_0 whose normaliser is known to the program's f_1 along f_b, 0 = b_0 < ... < b_T = 1:

    .. math:: \log w = \sum_{t=1}^{T} \log f_{b_t}(x_{t-1}) - \log f_{b_{t-1}}(x_{t-1}), \quad \mathbb{E}\, w = Z / Z_0

    so that forward, log Z_0 + log of the mean of w, lies below log Z on average. Reverse chains walk back from f_1, and
    log Z_0 - log of the mean of their weights lies above log Z on average, if they began at draws of f_1. They begin at
    rows of the training data, moved by ``burn`` sweeps: where forward chains miss what the data show, the two disagree.

    The forward value is what the evidence takes. Where both differ by more than three of their errors and 0.1 nat, or
    few weights carry either, the error is infinite and a UserWarning says so.

    That both agree is no proof. A mode that forward chains do not find and that the data do not hold (an energy may
    have learned one far from them) is seen by neither, and both agree on a log Z that is too small, by any amount.
    Two more looks are made. Where log Z of a machine is a short sum over all states (2^27 terms, as of 17 hidden units
    below 784 visible ones or 20 below 100) it stands in for a forward value that differs from it. And a third set of
    chains begins all over the space, with no regard to the data, moves ``burn`` sweeps and walks back: where some find
    rows of higher density than all others met, and say that these hold a nat or more beyond the others' log Z, the
    answer is not trusted. A mode that none of the three sets reaches is still missed.

    Args:
        temperatures: T, of which a twentieth lies below b = 0.5 and 0.7 above 0.9; or all b, rising from 0 to 1.
        chains: how many walk each way.
        burn: sweeps of the reverse chains at b = 1 before they walk.
        reverse: whether to walk back as well, from the data and from all over; without it nothing but a sum is checked.

    Raises:
        ValueError: for settings out of range.

    References:
        Annealed importance sampling (Neal, 2001).
        On the quantitative analysis of deep belief networks (Salakhutdinov and Murray, 2008).
        Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse, Ghahramani and Adams, 2015).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI, ContrastiveDivergence
        >>> from ppl_gen.models import rbm
        >>> x = torch.bernoulli(torch.full((50, 20), 0.3))
        >>> fit = pg.fit(rbm(hidden=17), x, SVI(ContrastiveDivergence(), steps=20), seed=0)
        >>> found = fit.evidence(method=pg.AIS(temperatures=200, chains=50))
        >>> found.exact, found.log_partition.agrees
        (False, True)
    """

    temperatures: int | Sequence[float] = 10_000
    chains: int = 100
    burn: int = 100
    reverse: bool = True

    def __post_init__(self) -> None:
        for name, least in (("chains", 2), ("burn", 0)):
            require_whole(name, getattr(self, name), least)
        require_flag("reverse", self.reverse)
        if isinstance(self.temperatures, numbers.Integral):
            require_whole("temperatures", self.temperatures)
        else:
            self._check_ladder()

    def _check_ladder(self) -> None:
        given: Any = self.temperatures  # whatever was passed
        try:
            ladder = None if isinstance(given, str | bytes | bool) else torch.as_tensor(given, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            ladder = None
        rising = ladder is not None and ladder.dim() == 1 and len(ladder) > 1 and bool((ladder.diff() > 0).all())
        if ladder is None or not rising or float(ladder[0]) != 0 or float(ladder[-1]) != 1:
            raise ValueError(
                "temperatures: expected a whole number of at least 1, or inverse temperatures that rise from 0 to 1, "
                f"got {given!r}"
            )

    def ladder(self) -> list[float]:
        """b_0 ... b_T.

        >>> AIS(temperatures=[0.0, 0.5, 1.0]).ladder(), len(AIS(temperatures=40).ladder())
        ([0.0, 0.5, 1.0], 41)
        """
        given: Any = self.temperatures
        if not isinstance(given, numbers.Integral):
            return [float(b) for b in given]
        total, found, place, share = int(given), [0.0], 0.0, 0.0
        for end, part in _SHARES:
            share += part
            count = round(total * share) - (len(found) - 1)
            found += [place + (end - place) * (k + 1) / count for k in range(count)]
            place = end if count else place
        return [*found[:-1], 1.0]


@dataclass(frozen=True)
class LogPartition:
    """log Z in nats: ``forward`` (below it on average) and ``reverse`` (above it), each with its standard error.

    ``agrees`` says whether both are the same within their errors, and those errors are to be trusted; ``doubt`` is the
    sentence where they are not. Without reverse chains ``reverse`` is None and ``agrees`` is about the forward weights.
    ``elsewhere`` is what chains say that began all over the space and found rows of higher density than the others met,
    None where none did; ``exact`` the sum over all states where it is short.
    ``value`` is what the evidence takes: ``forward``, or where that is in doubt ``exact``.
    """

    forward: float
    forward_stderr: float
    reverse: float | None
    reverse_stderr: float | None
    doubt: str = ""
    elsewhere: float | None = None
    exact: float | None = None

    @property
    def value(self) -> float:
        """log Z: the sum over all states where there is doubt and it is known, else the forward value."""
        return self.exact if self.doubt and self.exact is not None else self.forward

    @property
    def agrees(self) -> bool:
        """Whether there is no doubt."""
        return not self.doubt

    @property
    def stderr(self) -> float:
        """The error of ``value``: none of a sum over all states, infinite where there is doubt and no such sum."""
        if self.doubt:
            return math.inf if self.exact is None else 0.0
        return self.forward_stderr


def log_partition(tempering: Tempering, method: AIS, rows: Tensor | None) -> LogPartition:
    """log Z by chains under the present generators; the reverse ones begin at ``rows``, taken in turn.

    Warns:
        UserWarning: where the estimate is not to be trusted.
    """
    ladder = method.ladder()
    base = float(tempering.log_base)
    with torch.no_grad():
        ends, forward = _walk(tempering, tempering.begin(method.chains), ladder)
        walks, beyond = [_Walk(tempering, ends, forward, 1)], None
        if method.reverse and rows is not None:
            starts = rows[torch.arange(method.chains, device=rows.device) % len(rows)]
            states = starts if tempering.of_rows is None else tempering.of_rows(starts)
            walks.append(_walk_back(tempering, states, method, ladder))
        if method.reverse and tempering.elsewhere is not None:
            beyond = _walk_back(tempering, tempering.elsewhere(method.chains), method, ladder)
        exact = None if tempering.exact is None else float(tempering.exact())
    found = _compared(walks, base, beyond, exact)
    if found.doubt:
        known = (
            "Ask for more temperatures or chains, or a longer burn"
            if exact is None
            else f"the sum over all states, {exact:.2f}, is taken"
        )
        warnings.warn(
            f"annealed importance sampling: {found.doubt}; {'log Z is not known. ' if exact is None else ''}{known}",
            UserWarning,
            stacklevel=4,
        )
    return found


class _Walk:
    """What chains said of log Z - log Z_0: log w of each (of those back, with the other sign), and log f_1 at b = 1."""

    def __init__(self, tempering: Tempering, states: Tensor, log_weights: Tensor, sign: int) -> None:
        value, self.error, self.doubt = _log_mean(log_weights)
        self.value, self.log_weights = sign * value, log_weights
        self.density = tempering.log_density(states, 1.0).double()


def _walk_back(tempering: Tempering, states: Tensor, method: AIS, ladder: Sequence[float]) -> _Walk:
    states = tempering.move(states, 1.0, method.burn)
    return _Walk(tempering, states, _walk(tempering, states, ladder[::-1])[1], -1)


def _compared(walks: Sequence[_Walk], base: float, beyond: _Walk | None, exact: float | None) -> LogPartition:
    """The estimates side by side: ``walks`` forward and back from the data, and ``beyond``, from all over."""
    forward, back = walks[0], walks[1] if len(walks) > 1 else None
    said = _in("forward", forward.doubt) or ("" if back is None else _in("reverse", back.doubt))
    if not said and back is not None:
        gap, allowed = back.value - forward.value, 3 * math.hypot(forward.error, back.error) + SLACK
        if not abs(gap) <= allowed:
            said = f"forward and reverse differ by {gap:+.2f} nats, more than the {allowed:.2f} that their errors allow"
    count = len(forward.log_weights)
    if not said and back is None and exact is None and count < FEW:
        said = f"{count} chains, all in one direction, say little of their error (take {FEW}, or reverse=True)"
    found = None if beyond is None else _denser(walks, beyond)
    if not said and found is not None:
        gain = found - max(walk.value for walk in walks)
        if gain > NOTABLE:
            said = (
                "chains that began far from the data found rows of higher density, which may hold "
                f"{gain:.2f} nats more: a mode that forward chains and data miss"
            )
    if not said and exact is not None and not abs(base + forward.value - exact) <= 3 * forward.error + SLACK:
        said = f"it gives {base + forward.value:.2f}, and the sum over all states {exact:.2f}: chains miss a mode"
    return LogPartition(
        base + forward.value,
        forward.error,
        None if back is None else base + back.value,
        None if back is None else back.error,
        said,
        None if found is None else base + found,
        exact,
    )


def _denser(walks: Sequence[_Walk], beyond: _Walk) -> float | None:
    """log Z - log Z_0 by those chains of ``beyond`` that began at rows of higher density than all others met.

    In a lesser mode a chain may say anything above what the mode holds. One that counts has rows that stand out.
    """
    above = beyond.density > max(float(walk.density.max()) for walk in walks)
    if not bool(above.any()):
        return None
    return math.log(int(above.sum())) - float(torch.logsumexp(beyond.log_weights[above], 0))


def _in(way: str, doubt: str) -> str:
    return f"{doubt} {way}" if doubt else ""


def _walk(tempering: Tempering, states: Tensor, ladder: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The states where the chains end, and log w of each, float64 nats."""
    step = tempering.between or _stepped(tempering)
    total = torch.zeros(len(states), dtype=torch.float64, device=states.device)
    for old, new in zip(ladder[:-1], ladder[1:], strict=True):
        states, gain = step(states, old, new)
        total += gain
    return states, total


def _stepped(tempering: Tempering) -> Callable[[Tensor, float, float], tuple[Tensor, Tensor]]:
    def step(states: Tensor, old: float, new: float) -> tuple[Tensor, Tensor]:
        gain = tempering.log_density(states, new).double() - tempering.log_density(states, old).double()
        return tempering.move(states, new, 1), gain

    return step


def _log_mean(log_weights: Tensor) -> tuple[float, float, str]:
    """log of the mean weight, its standard error (delta method), and why that is not to be trusted."""
    count = len(log_weights)
    value = float(torch.logsumexp(log_weights, 0)) - math.log(count)
    if not math.isfinite(value):
        return value, math.inf, "weights are not finite"
    shares = torch.softmax(log_weights, 0)
    error = float((count * shares).std()) / math.sqrt(count)
    effective = float(1 / shares.square().sum())
    if count >= FEW and effective < max(5.0, 0.02 * count):
        return value, error, f"{effective:.1f} of {count} chains carry the weights"
    return value, error, ""
