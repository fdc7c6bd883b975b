"""Which M-step moves which site: offered by the program, else derived from its densities, else by gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ppl_gen.errors import IncompatibleError
from ppl_gen.inference.em.expectation import Expectation, Problem, responsibilities
from ppl_gen.inference.em.gradient import gradient_step
from ppl_gen.inference.em.matching import Derived, matched
from ppl_gen.inference.em.probe import DensityProbe, probed

__all__ = ["Maximiser"]

# L-BFGS started at the maximum of Q finds less than this (relative to Q): rounding, and the cycles' last digit.
_MISSED = 1e-8


class Maximiser:
    """The M-step of one problem. `prepare` decides, at an E-step, what moves each site; calling it moves them.

    Args:
        problem: the program on its data.
        mode: "auto" (offered, else derived, else gradient), or one of these three alone.
        seed: of the points at which densities are probed.
    """

    def __init__(self, problem: Problem, mode: str, seed: int) -> None:
        self.problem, self.mode, self.seed = problem, mode, seed
        self.offers = mode in ("auto", "offered") and problem.program.em is not None
        self.offered: tuple[str, ...] = ()
        self.matched = Derived({}, {})
        self.rest: tuple[str, ...] = ()

    def prepare(self, expectation: Expectation) -> None:
        """Decide, and verify closed forms of our own against L-BFGS at this E-step.

        Raises:
            IncompatibleError: if the only M-step asked for does not move every site, naming these.
            ValueError: if the program's own M-step returns other sites or shapes than it was given.
        """
        values = expectation.values
        if self.offers:
            found = self._offered(expectation)
            _check_offered(found, values, self.problem.program.name)
            self.offered = tuple(found)
            values = {**values, **found}
        rest = [name for name in self.problem.names if name not in self.offered]
        if (rest or self.problem.leaves) and self.mode == "offered":
            self._refuse(rest, "the program's own M-step leaves them out")
        if not rest and not self.problem.leaves:
            return
        expectation = self._by_site(expectation)
        self.matched = Derived({}, dict.fromkeys(rest, "as asked"))
        if rest and self.mode != "gradient":
            probe = probed(self.problem, values, set(expectation.weights), self.seed)
            self.matched = self._verified(matched(self.problem, probe, rest), probe, values, expectation.weights)
        self.rest = tuple(name for name in rest if name not in self.matched.kinds)
        if self.mode == "derived" and (self.rest or self.problem.leaves):
            self._refuse(self.rest, "; ".join(f"{name}: {self.matched.reasons[name]}" for name in self.rest))

    def _refuse(self, names: Iterable[str], why: str) -> None:
        left = sorted([*names, *self.problem.leaves])
        raise IncompatibleError(
            f"EM(m_step={self.mode!r}) does not fit the program {self.problem.program.name!r}: nothing would move "
            f"{', '.join(left)} ({why or 'parameters of pyro.param and networks need gradients'}). Use EM()."
        )

    def _verified(
        self, found: Derived, probe: DensityProbe | None, values: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> Derived:
        """Without the closed forms that L-BFGS can still improve on."""
        if not found.kinds or self._missed(found, found.kinds, values, weights) is None:
            return found
        gains = {name: self._missed(found, (name,), values, weights) for name in found.kinds}
        reasons = {name: f"its closed form misses {gain:.1e} nats" for name, gain in gains.items() if gain is not None}
        kept = matched(self.problem, probe, [name for name in found.kinds if name not in reasons])
        if kept.kinds and self._missed(kept, kept.kinds, values, weights) is None:
            return replace(kept, reasons={**found.reasons, **reasons, **kept.reasons})
        return Derived(
            {}, {**found.reasons, **dict.fromkeys(found.kinds, "its closed form misses the maximum"), **reasons}
        )

    def _missed(
        self, found: Derived, names: Iterable[str], values: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> float | None:
        """By how many nats of Q the closed forms miss the maximum over ``names``; None if they do not."""
        with torch.no_grad():
            try:
                new = {**values, **found(values, weights)}
            except FloatingPointError:  # there is no maximum, which the closed form found out
                return None
            before, after = (float(self.problem.surrogate(v, weights)) for v in (values, new))
        slack = _MISSED * (1 + abs(before))
        if not after >= before - slack:
            return before - after
        _, gain = gradient_step(self.problem, new, weights, names, leaves=False)
        return gain if gain > slack else None

    def __call__(self, expectation: Expectation) -> dict[str, Tensor]:
        """New values of all global sites; parameters that Pyro holds are moved in place."""
        values = expectation.values
        if self.offers:
            values = {**values, **self._offered(expectation)}
        if not self.matched.kinds and not self.rest and not self.problem.leaves:
            return values
        expectation = self._by_site(expectation)
        if self.matched.kinds:
            with torch.no_grad():
                values = {**values, **self.matched(values, expectation.weights)}
        if self.rest or self.problem.leaves:
            values, _ = gradient_step(self.problem, values, expectation.weights, self.rest)
        return values

    def by_gradient(self, expectation: Expectation) -> dict[str, Tensor]:
        """The M-step that cannot lower Q, whatever the others did."""
        expectation = self._by_site(expectation)
        return gradient_step(self.problem, expectation.values, expectation.weights, self.problem.names)[0]

    def _offered(self, expectation: Expectation) -> dict[str, Tensor]:
        em, problem = self.problem.program.em, self.problem
        assert em is not None
        with torch.no_grad():
            weights = responsibilities(expectation)
            args, kwargs = problem.read
            return em.m_step(weights, expectation.values, problem.prior, *args, **kwargs)

    def _by_site(self, expectation: Expectation) -> Expectation:
        """An E-step by enumeration, which weighs every density: the program's own weighs what its own M-step reads."""
        if expectation.trace is not None:
            return expectation
        if not self.problem.sums:
            raise IncompatibleError(
                f"the program {self.problem.program.name!r} offers EM steps that do not move all it has to learn, and "
                "its latent sites are not finite, so that no other M-step can be found. Move all sites in its m_step"
            )
        return self.problem.expect(expectation.values, offered=False)

    def describe(self) -> str:
        """One sentence: which M-step moves which site."""
        parts = []
        if self.offered:
            parts.append(f"{', '.join(self.offered)}: offered by the program")
        for kind in dict.fromkeys(self.matched.kinds.values()):
            names = [name for name, own in self.matched.kinds.items() if own == kind]
            parts.append(f"{', '.join(names)}: derived ({kind})")
        for reason in dict.fromkeys(self.matched.reasons.get(name, "") for name in self.rest):
            names = [name for name in self.rest if self.matched.reasons.get(name, "") == reason]
            parts.append(f"{', '.join(names)}: gradient (L-BFGS on the expected log-joint; {reason})")
        if self.problem.leaves:
            parts.append(f"{', '.join(self.problem.leaves)}: gradient (L-BFGS on the expected log-joint)")
        return "; ".join(parts)


def _check_offered(found: Mapping[str, Tensor], values: Mapping[str, Tensor], program: str) -> None:
    for name, value in found.items():
        if name not in values:
            raise ValueError(
                f"the M-step of {program!r} returned {name!r}, no global latent site; these are {sorted(values)}"
            )
        if value.shape != values[name].shape:
            raise ValueError(
                f"the M-step of {program!r}: site {name!r} has shape {tuple(values[name].shape)}, and the step "
                f"returned {tuple(value.shape)}"
            )
