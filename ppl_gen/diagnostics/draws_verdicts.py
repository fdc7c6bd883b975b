"""Verdicts on draws of which nothing but their values is known: neither chains, nor a guide with a density."""

from __future__ import annotations

from ppl_gen.diagnostics.grades import Verdict, elsewhere, graded
from ppl_gen.diagnostics.guide_verdicts import close_by, off_posterior
from ppl_gen.diagnostics.moments import Moments
from ppl_gen.diagnostics.trends import moving

__all__ = ["verdict_draws"]


def verdict_draws(
    moved: Moments | None,
    chains: int = 0,
    places: tuple[int, int, float, str] = (0, 0, 0.0, ""),
    *,
    unseen: str = "",
    trend: tuple[float, float] | None = None,
    rows: int = 1,
    networks: bool = False,
    noun: str = "draws",
) -> Verdict:
    """Judge draws by short chains that begin at them, as `verdict_variational` does; at best they are doubtful.

    Without a density of the draws there are no weights and no k-hat, which show what short chains cannot: a tail that
    the draws lack, or places that neither they nor the chains reached. ``moved``, ``chains``, ``places``, ``unseen``,
    ``trend`` and ``rows`` as there; ``networks`` as in `verdict_point`; ``noun``: what the draws are called.

    >>> print(verdict_draws(None, unseen="no short chains were run, as the program has no density"))
    doubtful: the draws were not judged: they have no density, so there is no k-hat, and no short chains were run, as \
the program has no density. Check against NUTS.
    """
    source = f"{chains} short chains from them"
    findings = off_posterior({source: moved}, "Check against NUTS", f"the distribution of the {noun}")
    findings += elsewhere(places, f"the {noun}") + moving(trend, rows, networks)
    if findings:
        return graded(findings, "")
    if moved is None:
        found = f"the {noun} were not judged: they have no density, so there is no k-hat, and {unseen}"
        return graded([(1, found, "Check against NUTS")], "")
    good = [close_by(moved, source)]
    if places[1]:
        good.append(f"none of {places[1]} started elsewhere found another mode")
    lacking = f"the {noun} have no density, so there is no k-hat"
    found = f"{lacking}; apart from that, no problem was found ({'; '.join(good)})"
    return graded([(1, found, "Check against NUTS")], "")
