"""All timed rows in one table: ppl_gen beside what a user would take instead.

make bench

Every group runs in a process of its own, one after another; within a group the kinds take turns. Writes
`results/bench.md`, `bench.csv` and `bench.png`. `--only GROUP ...` runs some groups anew and keeps what the file of the
others holds; `--quick` runs everything shortly and writes nothing.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timing import Block, Result, shown
from versions import write

#: Threads and cached bytecode as a user has them.
_OURS = ("OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE")
GROUPS = ("steps", "mixtures", "enumerated", "components", "flows", "evidence", "chains", "first_result")
RESULTS = Path(__file__).parent / "results"
KEPT = RESULTS / "bench.csv"
FIELDS = ("group", "row", "what", "ms", "blocks", "target", "ratio", "megabytes", "note")


def written(results: Sequence[Result]) -> str:
    return json.dumps([dataclasses.asdict(result) for result in results])


def read(text: str) -> list[Result]:
    found: list[dict[str, Any]] = json.loads(text)
    return [
        Result(**{**one, "blocks": {name: Block(tuple(block["ms"])) for name, block in one["blocks"].items()}})
        for one in found
    ]


def group(name: str, quick: bool) -> list[Result]:
    """The rows of one group, by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--one", name, str(path), *(["--quick"] if quick else [])]
        environment = {k: v for k, v in os.environ.items() if k not in _OURS}
        subprocess.run(command, check=True, env=environment)
        return read(path.read_text())


def lines(name: str, results: Sequence[Result]) -> list[dict[str, str]]:
    """One per row and kind; the ratio is ours over this kind's."""
    return [
        {
            "group": name,
            "row": result.title,
            "what": kind,
            "ms": f"{block.median:.5g}",
            "blocks": " ".join(f"{ms:.5g}" for ms in block.ms),
            "target": f"{result.targets[kind]:.3g}" if kind in result.targets else "",
            "ratio": f"{result.ratio(kind):.4g}",
            "megabytes": f"{result.memory[kind]:.0f}" if kind in result.memory else "",
            "note": result.note if kind == result.own else "",
        }
        for result in results
        for kind, block in result.blocks.items()
    ]


def results_of(kept: Sequence[dict[str, str]]) -> list[Result]:
    titles = list(dict.fromkeys(line["row"] for line in kept))
    return [_result(title, [line for line in kept if line["row"] == title]) for title in titles]


def _result(title: str, kinds: Sequence[dict[str, str]]) -> Result:
    return Result(
        title,
        {line["what"]: Block(tuple(map(float, line["blocks"].split()))) for line in kinds},
        {line["what"]: float(line["target"]) for line in kinds if line["target"]},
        {line["what"]: float(line["megabytes"]) for line in kinds if line["megabytes"]},
        kinds[0]["note"],
    )


def draw(results: Sequence[Result], path: Path) -> None:
    """Ratios to every peer on a logarithmic axis, left of 1 is faster; a mark where the target is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{result.title}: {peer}", result.ratio(peer), result.targets.get(peer), result.met(peer))
        for result in results
        for peer in result.blocks
        if peer != result.own
    ]
    figure, axis = pyplot.subplots(figsize=(10, 1 + 0.24 * len(bars)), constrained_layout=True)
    for place, (_, ratio, target, met) in enumerate(bars):
        colour = "tab:green" if met else "tab:grey" if met is None else "tab:red"
        axis.barh(place, ratio - 1, left=1, color=colour, height=0.7)
        if target is not None:
            axis.plot([target, target], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="time of ppl_gen over the peer's\n(line: target; green: met, red: missed)")
    axis.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=7)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--one", nargs=2, metavar=("GROUP", "FILE"), help="the rows of one group, as JSON into a file")
    given = parser.parse_args()
    if given.one:
        warnings.simplefilter("ignore")
        Path(given.one[1]).write_text(written(importlib.import_module(given.one[0]).rows(given.quick)))
        return
    began = time.perf_counter()
    kept = list(csv.DictReader(KEPT.open())) if KEPT.exists() and not given.quick else []
    for name in GROUPS:
        if name not in given.only:
            continue
        results = group(name, given.quick)
        print("\n".join(map(shown, results)), flush=True)
        kept = [line for line in kept if line["group"] != name] + lines(name, results)
        if not given.quick:
            _write(kept, time.perf_counter() - began)


def _write(kept: list[dict[str, str]], seconds: float) -> None:
    kept.sort(key=lambda line: GROUPS.index(line["group"]))
    with KEPT.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(kept)
    results = results_of(kept)
    draw(results, RESULTS / "bench.png")
    aims = [met for result in results for peer in result.targets if (met := result.met(peer)) is not None]
    absent = [name for name in GROUPS if name not in {line["group"] for line in kept}]
    about = (
        f"{sum(aims)} of {len(aims)} targets are met. "
        + (f"Not in this table yet: {', '.join(absent)}. " if absent else "")
        + "A figure is the median of blocks that take turns; a ratio is our "
        "median over the peer's. Set-up and compilation are left out where a row does not say that they count.\n\n"
        "![ratios](bench.png)"
    )
    write("bench", "ppl_gen beside its peers", "\n\n".join([about, *map(shown, results)]), seconds)


if __name__ == "__main__":
    main()
