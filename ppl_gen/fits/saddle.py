"""Whether the players of a fitted game stand at a saddle point: what each could still win by moving alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ppl_gen.errors import FitWarning, require_whole
from ppl_gen.fits.driver import fit as learn
from ppl_gen.fits.result import Fit, require_fit
from ppl_gen.inference.responses import Responses
from ppl_gen.inference.svi import SVI

if TYPE_CHECKING:
    import pandas

__all__ = ["Exploitability", "exploitability"]


@dataclass(frozen=True)
class Exploitability:
    r"""What each player of a game gains by moving alone, in the units of its own loss (nats per row for most).

    At a saddle point of a value L that the program minimises and the critic maximises,

    .. math:: L(\theta^*, \phi) \le L(\theta^*, \phi^*) \le L(\theta, \phi^*)

    for all other :math:`\theta` and :math:`\phi`: nobody gains, and the sum of the gains, the duality gap
    :math:`\max_\phi L(\theta^*, \phi) - \min_\theta L(\theta, \phi^*)`, is zero. What players find in some steps is
    less than the best answer, so a gap here is one for certain, and none is no proof of a saddle point.

    >>> gap = Exploitability({"critic": 0.5, "program": 0.01}, {"critic": 0.02, "program": 0.02}, steps=200)
    >>> print(gap)
    no saddle point: moved alone for 200 steps, critic gains 0.5 (its standard error 0.02)
    >>> gap.total
    0.51
    """

    gains: Mapping[str, float]
    stderr: Mapping[str, float]
    steps: int

    @property
    def total(self) -> float:
        """The sum of the gains: an estimate of the duality gap from below."""
        return math.fsum(self.gains.values())

    @property
    def winners(self) -> list[str]:
        """The players whose gain is more than five of its standard errors."""
        return [name for name, gain in self.gains.items() if gain > 5 * self.stderr[name] and gain > 1e-9]

    def table(self) -> pandas.DataFrame:
        """A row for each player: its gain and the standard error of that."""
        import pandas

        return pandas.DataFrame({"gain": self.gains, "stderr": self.stderr})

    def __str__(self) -> str:
        if not self.winners:
            return f"no player gains by moving alone for {self.steps} steps: nothing speaks against a saddle point"
        said = [
            f"{name} gains {self.gains[name]:.3g} (its standard error {self.stderr[name]:.2g})" for name in self.winners
        ]
        return f"no saddle point: moved alone for {self.steps} steps, {'; '.join(said)}"


def exploitability(
    fit: Fit, algorithm: SVI, data: Any = None, *, steps: int = 200, looks: int = 20, seed: int | None = None
) -> Exploitability:
    """Move each player of a fitted game alone, from where the fit stands, and see what it gains.

    The gain is the fall of the player's own loss on the same batches and noise; `Exploitability` says what the sum is.
    The fit stays as it is.

    Args:
        fit: of a game of several players.
        algorithm: the `SVI` that played it, or another with the same objective (its rates and optimisers are used).
        data: rows to look at; None: those of the fit.
        steps: updates of each player.
        looks: batches on which losses are compared.
        seed: of batches and noise; None: the fit's own.

    Raises:
        TypeError: for what is no fit, or an algorithm other than SVI.
        ValueError: for numbers out of range, a fit that holds no rows, or another objective than it was made with.

    Source: the gap of Nikaido and Isoda (1955), a measure of games in Lanctot et al. (2017), Grnarova et al. (2019).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI, Adversarial
        >>> from ppl_gen.models import gan
        >>> algorithm = SVI(Adversarial(), steps=20, batch_size=32)
        >>> fit = pg.fit(gan(latent=2, hidden=(8,)), torch.randn(200, 2), algorithm, seed=0)
        >>> pg.exploitability(fit, algorithm, steps=50).winners  # twenty steps leave the critic much to learn
        ['critic', 'program']
    """
    require_fit(fit)
    if not isinstance(algorithm, SVI):
        raise TypeError(f"algorithm: expected the SVI that played the game, got {type(algorithm).__name__}")
    if algorithm.label != fit.algorithm:
        raise ValueError(f"algorithm: expected one of the game that was played, {fit.algorithm}, got {algorithm.label}")
    played = fit.notes.get("objective")
    if played is not None and played != algorithm.objective.call:
        raise ValueError(
            f"algorithm: expected the game that was played, {played}, got {algorithm.objective.call}; gains are those "
            "in one and the same game"
        )
    require_whole("steps", steps)
    require_whole("looks", looks, 2)
    found: dict[str, list[tuple[float, float]]] = {}
    if data is not None:
        fit.dataset(data)  # refuses rows of another kind than those of the fit
    rows = fit.data.original if data is None else data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        learn(
            fit.recipe or fit.program,
            rows,
            Responses(algorithm, steps, looks, found),
            seed=fit.seed if seed is None else seed,
            start=fit,
            progress=False,
        )
    gains, errors = {}, {}
    for name, pairs in found.items():
        falls = [before - after for before, after in pairs]
        gains[name] = math.fsum(falls) / len(falls)
        spread = math.fsum((fall - gains[name]) ** 2 for fall in falls) / (len(falls) - 1)
        errors[name] = math.sqrt(spread / len(falls))
    return Exploitability(gains, errors, steps)
