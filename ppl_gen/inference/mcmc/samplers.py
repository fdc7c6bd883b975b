"""Which sampler runs the chains of a fit, on which potential, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ppl_gen.errors import IncompatibleError, MissingExtraError
from ppl_gen.fitting.run import Run
from ppl_gen.inference.mcmc.nutpie_chains import installed
from ppl_gen.inference.mcmc.potential import Potential

__all__ = ["MASSES", "SAMPLERS", "Way", "chosen"]

SAMPLERS = ("auto", "nutpie", "pyro")
MASSES = ("auto", "dense", "low_rank", "diagonal")

_INSTALL = "pip install 'ppl_gen[nutpie]'"


@dataclass(frozen=True)
class Way:
    """How a run draws: ``sampler`` is "nutpie" or "pyro", ``mass`` its mass matrix, ``path`` that of the potential."""

    sampler: str
    mass: str
    sampler_reason: str = ""
    path: str = ""
    path_reason: str = ""

    def on(self, asked: str, run: Run, potential: Potential) -> Way:
        """The same, once the potential is known.

        Raises:
            IncompatibleError: where nutpie is asked for and the program cannot be recorded.
        """
        known = replace(self, path=potential.path, path_reason=potential.reason)
        if self.sampler == "pyro" or potential.path != "eager":
            return known
        if asked == "nutpie" or self.mass == "low_rank":
            raise IncompatibleError(
                f"nutpie draws from a captured potential, and {run.program.name!r} cannot be recorded: "
                f'{potential.reason}; leave out sampler and mass, or take sampler="pyro"'
            )
        mass = "dense" if self.mass == "auto" else self.mass
        return replace(known, sampler="pyro", mass=mass, sampler_reason="nutpie needs a captured potential")

    def cost(self, potential: Potential) -> dict[str, float | str]:
        """What `Fit.cost` says of it."""
        reasons = {"sampler_reason": self.sampler_reason, "path_reason": self.path_reason}
        return {
            "sampler": self.sampler,
            "path": self.path,
            "capture_seconds": potential.seconds,
            **{name: reason for name, reason in reasons.items() if reason},
        }


def chosen(asked: str, mass: str, run: Run, saved: Mapping[str, Any]) -> Way:
    """The way of a run, as far as its settings tell; one that goes on from a checkpoint keeps to that of ``saved``.

    Raises:
        MissingExtraError: where nutpie is asked for, or was before, and is not installed.
        IncompatibleError: where nutpie is asked for and the program is to run at every step.
    """
    if "sampler" in saved:
        way = Way(**{name: str(saved[name]) for name in Way.__dataclass_fields__})
        if way.sampler == "nutpie" and not installed():
            raise MissingExtraError(f"checkpoint: its chains are drawn by nutpie, which is not installed: {_INSTALL}")
        return way
    wanted = asked == "nutpie" or mass == "low_rank"
    if asked == "pyro":
        reason = 'sampler="pyro"'
    elif mass == "dense":
        reason = "nutpie has no dense mass matrix"
    elif not installed():
        reason = f"nutpie is not installed: {_INSTALL}"
        if wanted:
            raise MissingExtraError(f"sampler and mass ask for nutpie, which is not installed: {_INSTALL}")
    elif run.compile is False:
        reason = "compile=False, and nutpie needs a captured potential"
        if wanted:
            raise IncompatibleError(f"{reason}; leave out one of them")
    else:
        return Way("nutpie", mass)
    return Way("pyro", "dense" if mass == "auto" else mass, reason)
