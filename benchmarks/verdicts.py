"""The confusion table of verdicts over the test bed: what was right, what was said. Writes `results/verdicts.md`.

python benchmarks/verdicts.py --seeds 10 --processes 2

Seed after seed, and the page is written after each: a run that is ended early leaves the page of the seeds it finished.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from joblib.externals.loky import ProcessPoolExecutor

from ppl_gen.runtime.workers import initializer

TOP = Path(__file__).resolve().parent.parent
GRADES = ("trust", "doubtful", "do not trust")
TRUTHS = {True: "right", False: "wrong", None: "neither"}


def cases() -> list:
    sys.path.insert(0, str(TOP / "tests"))
    from verdict_cases import CASES

    return CASES


def grade(place: tuple[int, int]) -> str:
    case, seed = cases()[place[0]], place[1]
    return case.make(seed).verdict.grade


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    asked = parser.parse_args()
    bed = cases()
    said: list[Counter[str]] = [Counter() for _ in bed]
    with ProcessPoolExecutor(asked.processes, **initializer()) as pool:
        for seed in range(asked.seeds):
            for i, found in enumerate(pool.map(grade, [(i, seed) for i in range(len(bed))])):
                said[i][found] += 1
                print(f"seed {seed}: {bed[i].name}, {TRUTHS[bed[i].good]}: {found}", flush=True)
            page = "\n".join(written(bed, said, seed + 1)) + "\n"
            (TOP / "benchmarks" / "results" / "verdicts.md").write_text(page)


def written(bed: list, said: list[Counter[str]], seeds: int) -> Iterator[str]:
    """The page: what was said of every fit, then by truth."""
    yield "# Verdicts on fits with known truth\n"
    yield (
        f"Made by `python benchmarks/verdicts.py --seeds {seeds}`: every fit of `tests/verdict_cases.py` with seeds 0 "
        f"to {seeds - 1}, each with data of its own. A fit is *right* if its posterior is the exact one or close to "
        "it, *wrong* if a mean is off by 0.5 sd or more or an sd by a factor of 1.6 or more (of rows: in three of ten "
        "or more); *neither* is what has to be said in words (labels that swapped) or lies at the limits.\n"
    )
    yield "| fit | truth | trust | doubtful | do not trust |"
    yield "|---|---|---|---|---|"
    totals: dict[str, Counter[str]] = {}
    for case, found in zip(bed, said, strict=True):
        totals.setdefault(TRUTHS[case.good], Counter()).update(found)
        yield f"| {case.name} | {TRUTHS[case.good]} | " + " | ".join(str(found[name]) for name in GRADES) + " |"
    yield "\n| truth | fits | trust | doubtful | do not trust |"
    yield "|---|---|---|---|---|"
    for truth, found in totals.items():
        yield f"| {truth} | {found.total()} | " + " | ".join(str(found[name]) for name in GRADES) + " |"


if __name__ == "__main__":
    main()
