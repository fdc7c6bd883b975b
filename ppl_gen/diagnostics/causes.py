"""What is known of a run that a verdict is about, for advice that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Cause"]


@dataclass(frozen=True)
class Cause:
    """What is known of a run, for advice that fits: its updates, whether on minibatches, what guide, what networks.

    ``networks``: whether it has some, or nothing to learn but the latents of rows: its loss is judged by the row then;
    ``converged``: the algorithm's own criterion was met; ``given``: it brings a guide of its own (CAVI).
    """

    steps: int = 0
    minibatches: bool = False
    guide: str = ""
    networks: bool = False
    amortised: bool = False
    converged: bool = False
    given: bool = False

    def advice(self, moving: bool, trend: tuple[float, float] | None) -> str:
        """More steps for what has not converged, a richer guide for what has."""
        if moving and trend is not None and trend[1] < 0:
            return "Run more steps; judge the guide when the loss has settled"
        if self.given and self.converged:
            return "Use SVI with a richer guide (full covariance, a flow), or check against NUTS"
        if self.steps and not self.converged and (trend is None or math.isnan(trend[1])):
            return "Run more steps: so few do not show whether the loss has settled"
        if self.minibatches:
            return "Let the learning rate fall to zero (schedule=) or use larger batches; then a richer guide"
        if self.guide == "AutoMultivariateNormal":
            return "Let the learning rate fall to zero (schedule=), use a flow as guide, or check against NUTS"
        if self.amortised:
            return "Use a richer guide for the local latents, or correct it by importance weighting (IWAE)"
        return "Use a richer guide (full covariance, a flow) or check against NUTS"
