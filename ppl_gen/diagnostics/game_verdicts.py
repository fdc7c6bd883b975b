"""Verdicts on what a game learned: what its samples show of a collapse, and what nothing can vouch for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.diagnostics.grades import Finding, Verdict, graded
from ppl_gen.diagnostics.made_rows import FEWEST, RowsCompared, compare_rows
from ppl_gen.draws.observations import observed_rows
from ppl_gen.draws.sampling import sample_rows
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.inference.objectives.ebgan import ALONE

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["rows_compared", "unseen", "verdict_game"]

_ROWS = 1000
_NUMBERS = 20_000_000  # of rows that are compared, before fewer have to do
_SEARCHED = 30_000  # rows of the data at most among which copies are looked for,
_SEARCHED_NUMBERS = 3_000_000  # or as many as hold so many numbers, for a second or so
_CERTAIN = 5  # copies beyond those among the data's rows: from fewer nothing is said of rows not looked at
_PERHAPS = 3.0  # standard deviations from which chance is no good explanation any more
_UNSURE = "the losses of a game do not show whether its samples are like the data"
_LOOK = "Look at samples and at a yardstick computed on them"


def verdict_game(
    found: RowsCompared | str,
    records: Mapping[str, Sequence[float]],
    *,
    measured: bool = False,
    rescue: str = "",
    more: Sequence[Finding] = (),
) -> Verdict:
    """Judge what a game learned by its samples and its critic; no such fit is trusted without reservation.

    ``found`` compares its rows with those of the data, or says why that was not done; ``records`` is the history.
    ``measured``: the program has an evidence although the loss was none; ``rescue``: advice where modes are missing;
    ``more``: what was found besides.

    >>> alike = RowsCompared(1000, 0.51, 0.6, 0.96, 1.01, 0.0, 0.0)
    >>> print(verdict_game(alike, {}))
    doubtful: nearest neighbours do not tell 1000 made rows from the data's (51%, chance 50%), and these cover 96% of \
it; no density was learned, so neither evidence nor rare rows are vouched for. Look at samples and at a yardstick \
computed on them.
    """
    if isinstance(found, str):
        unsure = (1, f"{_UNSURE}{f', and {found}' if found else ''}", _LOOK)
        return graded([*more, unsure, *_of_critic(records, None), *_of_entropy(records)], "")
    faults = [
        *more,
        *_of_rows(found, rescue or _RESCUE),
        *_of_critic(records, found),
        *_of_entropy(records),
    ]
    if faults:
        return graded(faults, "")
    tell = "do not tell" if found.z < _PERHAPS else "may tell"
    alike = (
        f"nearest neighbours {tell} {found.count} made rows from the data's ({found.accuracy:.0%}, chance 50%), "
        f"and these cover {found.coverage:.0%} of it"
    )
    if found.labels is not None:
        alike += f", with all {found.labels} labels"
    beyond = "no density was learned, so neither evidence nor rare rows are vouched for"
    if measured:
        beyond = "the loss is no density, and what fit.evidence says of held-out rows was not looked at"
    return graded([(1, f"{alike}; {beyond}", _LOOK)], "")


def unseen(fit: Fit) -> list[Finding]:
    """Of a game whose program makes rows from others that its critic does not see: they need not belong together."""
    told, _, advice = fit.notes.get("inputs", "").partition(": ")
    return [(1, told, "Take ConditionalAdversarial(), which shows it to the critic")] if advice else []


def rows_compared(fit: Fit) -> RowsCompared | str:
    """Made rows beside those of the data that were learned from, kept with the fit; or why they were not compared."""
    if "rows compared" not in fit.computed:
        try:
            fit.computed["rows compared"] = _compared(fit)
        except (*PROGRAM_ERRORS, NotImplementedError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            fit.computed["rows compared"] = f"its samples could not be compared with the data ({said})"
    found: RowsCompared | str = fit.computed["rows compared"]
    return found


def _compared(fit: Fit) -> RowsCompared | str:
    rows = fit.data.rows or 0
    if fit.data.streamed is not None or rows < FEWEST or fit.info.data_plate is None:
        return ""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(fit.seed))
    with fit.bound():
        width = sum(value.numel() for value in observed_rows(fit, fit.data.subset(order[:1]).most()).values())
        affordable = max(FEWEST, _NUMBERS // max(width, 1))
        some = order[: min(_ROWS, affordable)]
        observed = observed_rows(fit, fit.data.subset(some).most())
    entries, conditional = _entries(fit, some, observed)
    # What a program reads besides decides what it makes: it makes other rows than those it is compared with.
    count = min(_ROWS, rows // 2 if conditional else rows, affordable)
    if count < FEWEST:
        return ""
    read, left = (order[:count], order[count:]) if conditional else (None, order)
    made = sample_rows(fit, count, {}, None, read=read)
    names = [name for name in observed if name in made]
    most = max(count, min(_SEARCHED, _SEARCHED_NUMBERS // max(width, 1)))
    index = left[: most if all(name in entries for name in names) else count].sort().values
    real = _observed(fit, index, entries, names)
    pairs = [(value, made[name]) for name, value in real.items()]
    if not pairs or any(
        len(one) != len(index) or len(other) != count or one.shape[1:] != other.shape[1:] for one, other in pairs
    ):
        return ""
    columns = [_flat([side[which] for side in pairs]) for which in (0, 1)]
    if not bool(columns[0].isfinite().all()):
        return "rows with hidden entries were not compared"
    found = compare_rows(columns[0], columns[1], labels=_labels(fit, index), seed=fit.seed)
    if found.copied * count < _CERTAIN:
        return found
    return replace(found, copied=min(1.0, found.copied * len(left) / len(index)))


def _entries(fit: Fit, index: Tensor, observed: Mapping[str, Tensor]) -> tuple[dict[str, int | str], bool]:
    """Which argument of the program each observed site is, where it is one; and whether there are other arguments."""
    batch = fit.data.batch(index)
    found: dict[str, int | str] = {}
    others = 0
    passed: list[tuple[int | str, Any]] = [*enumerate(batch.args), *batch.kwargs.items()]
    for place, value in passed:
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != len(index):
            continue
        same = [n for n, seen in observed.items() if seen.shape == value.shape and bool((seen == value).all())]
        found |= dict.fromkeys(same, place)
        others += not same
    return found, others > 0


def _observed(fit: Fit, index: Tensor, entries: Mapping[str, int | str], names: Sequence[str]) -> dict[str, Tensor]:
    """What was observed of these rows: read off the data, or by running the program on them."""
    if not all(name in entries for name in names):
        with fit.bound():
            real = observed_rows(fit, fit.data.subset(index).most())
        return {name: real[name] for name in names}
    batch = fit.data.batch(index)
    places = {name: entries[name] for name in names}
    return {name: batch.args[at] if isinstance(at, int) else batch.kwargs[at] for name, at in places.items()}


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.detach().cpu().reshape(len(value), -1).double() for value in values], 1)


def _labels(fit: Fit, index: Tensor) -> Tensor | None:
    """Labels that came with the data and that the program does not read: one column of few whole numbers."""
    original = fit.data.original if isinstance(fit.data.original, Mapping) else {}
    for name in fit.data.left_out:
        value = original.get(name)
        if isinstance(value, np.ndarray | Tensor) and len(value) == fit.data.rows:
            kinds = torch.as_tensor(value)
            whole = not kinds.is_floating_point() and kinds.dtype is not torch.bool
            if whole and kinds.dim() == 1 and 2 <= len(kinds.unique()) <= 100 and int(kinds.min()) >= 0:
                return kinds[index]
    return None


def _of_rows(found: RowsCompared, rescue: str) -> list[Finding]:
    findings: list[Finding] = []
    if found.spread < 0.3:
        told = f"made rows spread {found.spread:.2f} times as far as the data: the program has collapsed"
        findings.append((2, told, rescue))
    elif found.coverage < 0.5:
        # Rows like a share c of the data's, and none like the others, are told apart 1 / (1 + c) of the time: there are
        # 1 / c made rows for one of the data where they lie. What is told apart more often, or nearly always, may be
        # anything.
        lone = min(1 / (1 + found.coverage) + 0.05, 0.95)
        off = ", or made rows are unlike the data everywhere" if found.accuracy > lone else ""
        told = f"made rows come near {found.coverage:.0%} of the data's rows alone: modes are missing{off}"
        findings.append((2, told, rescue))
    if found.missed:
        named = ", ".join(map(str, found.missed[:5]))
        findings.append((2, f"made rows leave out the label(s) {named} of {found.labels}", rescue))
    # Of n rows with few values, the shares that repeat in two sets have standard errors up to 0.7 / sqrt(n) each.
    chance = 4.0 / found.count**0.5
    if found.repeated > max(0.2, min(chance, 0.8)):
        findings.append((2, f"{found.repeated:.0%} of the made rows repeat another made row", rescue))
    held_out = "Compare with rows that were held out: compare_rows(held_out, made)"
    if found.copied > 0.2:
        findings.append((1, f"{found.copied:.0%} of the made rows copy a row of the data", held_out))
    elif found.clinging:
        told = "made rows lie nearer to rows of the data than these to one another, as copies with a little noise do"
        findings.append((1, told, held_out))
    if found.z > 5:
        told = f"nearest neighbours tell {found.accuracy:.0%} of made and observed rows apart (chance 50%)"
        findings.append((2 if found.accuracy > 0.9 else 1, told, "Run more steps, and look at samples"))
    return findings


_RESCUE = "Take more steps, more updates of the other players for each of the program, or a slower program"


def _of_critic(records: Mapping[str, Sequence[float]], found: RowsCompared | None) -> list[Finding]:
    """What the critic's accuracy at the end says: that it has won, or that it sees less than nearest neighbours do."""
    real, fake = (_at_the_end(records, name) for name in ("critic_accuracy_real", "critic_accuracy_fake"))
    if real is None or fake is None:
        return []
    if min(real, fake) > 0.98:
        told = f"the critic was right on {min(real, fake):.1%} of the rows at the end, so it taught the program little"
        return [(1, told, "Weaken the critic: a lower rate, a smaller network, or a penalty on its slope")]
    if found is not None and found.z > 5 and found.accuracy > 0.6 and max(abs(real - 0.5), abs(fake - 0.5)) < 0.05:
        told = f"the critic was at chance ({real:.0%} and {fake:.0%} right) although the rows differ"
        return [(1, told, "Give the critic more steps or a larger network: it does not see what nearest neighbours do")]
    return []


def _of_entropy(records: Mapping[str, Sequence[float]]) -> list[Finding]:
    """Whether the entropy of a game with an energy pushed rows apart: among rows without neighbours it is flat."""
    rows = _at_the_end(records, "effective_rows")
    if rows is None or rows >= ALONE:
        return []
    told = (
        f"made rows had no neighbours within the noise ({rows:.2f} rows explain one), so the entropy pushed none apart"
    )
    return [
        (1, f"{told}: the energy is a critic's, no log density", "Take more noise and larger batches, or fewer columns")
    ]


def _at_the_end(records: Mapping[str, Sequence[float]], name: str) -> float | None:
    """The mean of the last tenth of a record; None for one that is too short to tell."""
    values = records.get(name, ())
    return None if len(values) < FEWEST else float(np.mean(values[-max(FEWEST, len(values) // 10) :]))
