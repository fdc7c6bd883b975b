"""Log densities of images in the unit of the literature: bits per dimension."""

from __future__ import annotations

import math
from typing import Any

from ppl_gen.errors import is_number, require_whole
from ppl_gen.evidence.estimates import Evidence

__all__ = ["bits_per_dimension"]


def bits_per_dimension(evidence: Evidence | float, dimensions: int, *, levels: int | None = None) -> float:
    r"""The nats of a row as bits for each of its numbers: what a model of images is judged by.

    .. math:: b = -\frac{\log p(x)}{D \log 2} \quad \Bigl( + \log_2 L \text{ where } p \text{ is a density on } [0, 1]^D
              \Bigr)

    Of a flow of pixels (``real_nvp(levels=256)``) the evidence is that of the integers already, and ``levels`` is left
    out. ``fit.evidence(x, particles=1)`` gives the bound that papers print, more particles a tighter one.

    Args:
        evidence: of `pg.Fit.evidence`, or log p(x) of a row in nats.
        dimensions: D, the numbers in a row: 784 for MNIST, 3072 for CIFAR-10.
        levels: L, where log p is the density of pixels in [0, 1] (with noise that fills their intervals).

    Raises:
        ValueError: for nats that are no finite number, or sizes that are no whole numbers.

    References:
        A note on the evaluation of generative models (Theis, van den Oord and Bethge, 2016), section 3.1.

    Example:
        >>> round(bits_per_dimension(1980.50, 784, levels=256), 2)  # NICE on MNIST, as published
        4.36
        >>> round(bits_per_dimension(-784 * math.log(2), 784), 12)  # a fair coin for each pixel
        1.0
    """
    nats: Any = evidence.mean if isinstance(evidence, Evidence) else evidence
    if not is_number(nats) or not math.isfinite(nats):
        raise ValueError(f"evidence: expected an Evidence or a finite number of nats, got {evidence!r}")
    require_whole("dimensions", dimensions)
    bits = -float(nats) / (int(dimensions) * math.log(2))
    if levels is None:
        return bits
    require_whole("levels", levels, 2)
    return bits + math.log2(int(levels))
