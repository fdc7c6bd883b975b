"""The confusion table of verdicts over the test bed: what was right, what was said. Writes `results/verdicts.md`.

python benchmarks/verdicts.py --seeds 10
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
GRADES = ("trust", "doubtful", "do not trust")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    sys.path.insert(0, str(TOP / "tests"))
    from verdict_cases import CASES

    lines = [
        "# Verdicts on fits with known truth",
        "",
        f"Made by `python benchmarks/verdicts.py --seeds {len(seeds)}`: every fit of `tests/verdict_cases.py` with "
        f"seeds 0 to {len(seeds) - 1}, each with data of its own. A fit is *right* if its posterior is the exact one "
        "or close to it, *wrong* if a mean is off by 0.5 sd or more or an sd by a factor of 1.6 or more; *neither* is "
        "what has to be said in words (labels that swapped).",
        "",
        "| fit | truth | trust | doubtful | do not trust |",
        "|---|---|---|---|---|",
    ]
    totals: dict[str, Counter[str]] = {}
    for case in CASES:
        said = Counter(case.make(seed).verdict.grade for seed in seeds)
        truth = {True: "right", False: "wrong", None: "neither"}[case.good]
        totals.setdefault(truth, Counter()).update(said)
        lines.append(f"| {case.name} | {truth} | " + " | ".join(str(said[grade]) for grade in GRADES) + " |")
        print(lines[-1], flush=True)
    lines += ["", "| truth | fits | trust | doubtful | do not trust |", "|---|---|---|---|---|"]
    lines += [f"| {t} | {n.total()} | " + " | ".join(str(n[g]) for g in GRADES) + " |" for t, n in totals.items()]
    (TOP / "benchmarks" / "results" / "verdicts.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
