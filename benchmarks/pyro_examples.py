"""Pyro's own examples, untouched, under ppl_gen: which run, which need a word more, which are refused and why.

git clone https://github.com/pyro-ppl/pyro FOLDER; python benchmarks/pyro_examples.py FOLDER

Every command of the checkout's tests/test_examples.py and every tutorial notebook is run shortened, each in a process
of its own (`pyro_probe.py`); nothing of the checkout is kept. Results go on where they stopped;
`--only TEXT` runs a part.
Writes `results/pyro_examples.md`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SECONDS = 300  # for one script


def commands(folder: Path) -> list[list[str]]:
    """Script and arguments of every example, one command of those that differ in a switch Pyro's own test varies."""
    tree = ast.parse((folder / "tests" / "test_examples.py").read_text())
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "CPU_EXAMPLES"]
    texts = [e.value for e in lists[0].elts if isinstance(e, ast.Constant)]
    found = [[f"examples/{text.split()[0]}", *text.split()[1:]] for text in texts if "funsor" not in text]
    found.sort(key=lambda command: "air/" in command[0])  # makes its images first, for minutes
    return [*found, *([str(p.relative_to(folder))] for p in sorted((folder / "tutorial" / "source").glob("*.ipynb")))]


def run(folder: Path, command: list[str]) -> dict[str, Any]:
    """What one script's models came to, and how the script itself ended."""
    with tempfile.TemporaryDirectory() as work:
        result = Path(work) / "result.json"
        env = {**os.environ, "PYTHONPATH": f"{folder}:{HERE.parent}", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
        call = [sys.executable, str(HERE / "pyro_probe.py"), str(result), str(folder / command[0]), *command[1:]]
        try:
            done = subprocess.run(call, capture_output=True, text=True, timeout=SECONDS, env=env, cwd=work)
            ended = "" if not done.returncode else (done.stderr.strip().splitlines() or ["killed"])[-1][:200]
        except subprocess.TimeoutExpired:
            ended = f"stopped after {SECONDS} s"
        programs = [json.loads(line) for line in result.read_text().splitlines()] if result.exists() else []
    return {"command": " ".join(command), "ended": ended, "programs": programs}


def outcome(program: dict[str, Any]) -> str:
    if "needed" in program:
        return str(program["needed"])
    return "refused" if all(said.startswith("refused") for said in program["tried"].values()) else "raw error"


def cell(text: str) -> str:
    return text.replace("|", "/")


def table(rows: list[dict[str, Any]]) -> list[str]:
    numbers = ("loss here", "loss in Pyro", "parameters apart")
    head = ("example", "program", "outcome", "what was said", *numbers, "questions not answered")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        if not row["programs"]:
            lines.append(f"| {row['command']} | | no program trained | {cell(row['ended'])} | | | | |")
        for program in row["programs"]:
            said = next(iter(program["tried"].values()), "")
            open_ = [f"{name}: {text[:120]}" for name, text in program.get("questions", {}).items() if text]
            name = f"{program['model']} / {program['guide']} ({program['loss']})"
            what = cell(said[:200])
            both = [row["command"], name, outcome(program), what, *losses(program), cell("; ".join(open_))]
            lines.append(f"| {' | '.join(both)} |")
    return lines


def losses(program: dict[str, Any]) -> list[str]:
    """Loss and spread of one evaluation after the same steps from the same start; how far the parameters are apart."""
    found = program.get("losses")
    if not found:
        return ["", cell(program.get("losses_failed", "")[:120]), ""]
    both = [f"{found[name]:.6g} ({found[f'{name}_sd']:.2g})" for name in ("here", "pyro")]
    return [*both, f"{found['apart']:.2g}"]


def summary(rows: list[dict[str, Any]]) -> list[str]:
    programs = [program for row in rows for program in row["programs"]]
    counts = Counter(map(outcome, programs))
    questions = [text for program in programs for text in program.get("questions", {}).values()]
    answers = Counter("answered" if not text else text.split(":")[0] for text in questions)
    lines = ["| outcome | programs |", "|---|---|", *(f"| {name} | {n} |" for name, n in counts.most_common())]
    return [*lines, "", f"{len(questions)} questions: " + ", ".join(f"{n} {name}" for name, n in answers.most_common())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="run the commands that hold this text, and write no results")
    parser.add_argument("--without", nargs="*", default=[], help="leave out the commands that hold such a text; say so")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pyro_examples.json")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    rows = json.loads(chosen.work.read_text()) if chosen.work.exists() else {}
    for command in commands(folder):
        name = " ".join(command)
        if chosen.only in name and not any(text in name for text in chosen.without) and name not in rows:
            rows[name] = run(folder, command)
            chosen.work.write_text(json.dumps(rows))
            print("\n".join(table([rows[name]])[2:]), flush=True)
    if not chosen.only:
        made = (
            "Made by `python benchmarks/pyro_examples.py FOLDER` (a checkout of Pyro). Parameters apart: the "
            "distance between the parameters after ten steps of Adam from one start, here and by Pyro's own "
            "`SVI.step` with the same random numbers, over how far Pyro's moved. Losses are per row here, so "
            "that an eps of 1e-8 / N is Pyro's 1e-8. Where a parameter has no gradient (a bias before a batch "
            "normalisation), Adam makes full steps of rounding errors, here as there. Loss here, loss in Pyro: "
            "mean and spread of 20 evaluations at those parameters, by the same random numbers here and there, other "
            "ones than the steps'."
        )
        for text in chosen.without:
            made += f" Left out: {sum(text in ' '.join(command) for command in commands(folder))} with {text!r}."
        lines = ["# Pyro's own examples", "", made, "", *summary([*rows.values()]), "", *table([*rows.values()])]
        (HERE / "results" / "pyro_examples.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
