"""What a notebook shows of a fit: how it ended, what it cost, its course and its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_gen.runtime.notebook import box, grid, mark, note, pairs

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["fit_html"]


_CURVES = ("program_loss", "log_likelihood", "elbo")  # what a history is known by, in this order
_WIDTH, _HEIGHT = 180, 36  # of the curve, in pixels
_SHOWN = 6  # numbers of a parameter written out; a larger one is summed up
_ROWS = 40  # parameters listed at most
_ENDINGS = {"converged": "good", "finished": "good", "stopped": "fair", "interrupted": "fair"}


def fit_html(fit: Fit) -> str:
    """A fit: how it ended, what it cost, how the history went, and its parameters."""
    cost = [_counted(name, value) for name, value in fit.cost.items()]
    facts = {
        "status": f"{mark(_ENDINGS.get(str(fit.status), 'bad'))}<b>{escape(str(fit.status))}</b>: "
        f"{escape(fit.message) or 'no message'}",
        "verdict": _judged(fit),
        "algorithm": f"{escape(fit.algorithm)}, seed {fit.seed}",
        "cost": escape(", ".join(cost)) or "not recorded",
        "history": _history(fit.records),
        **{escape(name): escape(str(text)) for name, text in fit.notes.items()},
    }
    return box(f"Fit of {escape(fit.program.name)}", pairs(facts), _values(fit))


def _judged(fit: Fit) -> str:
    """The verdict where it is known already: showing a fit does not judge it."""
    found = fit.computed.get("verdict")
    if found is None:
        return "not diagnosed yet: <code>fit.verdict</code> says whether to trust it"
    tone = {"trust": "good", "doubtful": "fair"}.get(found.grade, "bad")
    advice = f" {escape(found.advice)}." if found.advice else ""
    return f"{mark(tone)}<b>{escape(found.grade)}</b>: {escape(found.reason)}.{advice}"


def _counted(name: str, value: float | str) -> str:
    words = name.replace("_", " ")
    if isinstance(value, str):
        return f"{words}: {value}"
    if words.endswith("seconds"):
        return f"{value:.1f} s{f' for {kind}' if (kind := words.removesuffix('seconds').strip()) else ''}"
    return f"{value:.6g} {words.removesuffix('s') if value == 1 else words}"


def _history(records: Mapping[str, Sequence[float]]) -> str:
    """The last value of the loss, and its whole course as a line."""
    name = next((name for name in _CURVES if records.get(name)), next((n for n, v in records.items() if v), None))
    if name is None:
        return "none was kept"
    values = [float(value) for value in records[name]]
    last = f"{escape(name)} {values[-1]:.5g} after {len(values)} steps"
    return f"{last} {_curve(name, values)}"


def _curve(name: str, values: Sequence[float]) -> str:
    """An SVG line; long histories are averaged in as many bins as there are pixels."""
    width = -(-len(values) // _WIDTH)
    bins = [[v for v in values[i : i + width] if math.isfinite(v)] for i in range(0, len(values), width)]
    points = [(i, math.fsum(part) / len(part)) for i, part in enumerate(bins) if part]
    if len(points) < 2:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    across, up = (_WIDTH - 4) / max(1, len(bins) - 1), (_HEIGHT - 4) / ((high - low) or 1.0)
    path = " ".join(f"{2 + x * across:.1f},{_HEIGHT - 2 - (y - low) * up:.1f}" for x, y in points)
    label = escape(f"{name} over {len(values)} steps, between {low:.4g} and {high:.4g}")
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" '
        f'style="vertical-align:middle;overflow:visible"><title>{label}</title><polyline points="{path}" fill="none" '
        'stroke="currentColor" stroke-width="1.3" stroke-linejoin="round" /></svg>'
    )


def _values(fit: Fit) -> str:
    """Parameters by name; for points and chains the latent sites too, which are what was learned."""
    rows: list[Sequence[str]] = []
    if (chains := fit.learned.by_chain()) is not None:
        kind = "mean ± sd of the draws"
        rows = [(name, str(list(v.shape[2:])), _spread(v)) for name, v in chains.items()]
    else:
        kind = "values; large ones as mean ± sd of their entries"
        points = fit.point or {}
        rows = [(name, str(list(value.shape)), _summed(value)) for name, value in points.items()]
    rows += [(name, str(list(v.shape)), _summed(v)) for name, v in fit.state.params.items()]
    if not rows:
        return note("No parameters.")
    hidden = f"; the first {_ROWS} of {len(rows)}" if len(rows) > _ROWS else ""
    return grid(("name", "shape", "value"), rows[:_ROWS], f"Parameters: {kind}{hidden}")


def _summed(value: Tensor) -> str:
    flat = value.detach().double().flatten()
    if flat.numel() <= _SHOWN:
        return ", ".join(f"{number:.4g}" for number in flat.tolist())
    return _plus_minus(flat.mean(), flat.std())


def _spread(draws: Tensor) -> str:
    """``draws`` is chains x draws x shape."""
    flat = draws.detach().double().flatten(0, 1).flatten(1) if draws.dim() > 2 else draws.double().reshape(-1, 1)
    if flat.shape[1] > _SHOWN:
        return f"{_plus_minus(flat.mean(), flat.std(0).mean())} (averaged over {flat.shape[1]} entries)"
    spread = flat.std(0) if len(flat) > 1 else torch.zeros(flat.shape[1])
    return ", ".join(_plus_minus(mean, sd) for mean, sd in zip(flat.mean(0), spread, strict=True))


def _plus_minus(mean: Any, sd: Any) -> str:
    return f"{float(mean):.4g} ± {float(sd):.2g}"
