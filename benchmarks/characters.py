"""Bits per character of Alice's Adventures in Wonderland: plain RNN, LSTM and GRU with equally many parameters.

Each run is kept in benchmarks/.work, so that a run that was interrupted goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from functools import partial

import torch
from stages import WORK
from versions import table, write

import ppl_gen as pg
from ppl_gen.data.text import ALPHABET
from ppl_gen.inference import SVI
from ppl_gen.models import bits_per_character, char_rnn

CELLS = ("rnn", "lstm", "gru")
#: learning rates and steps: a long run at a high rate overfits the gated cells, a low rate leaves them unfinished
SETTINGS = ((1e-2, 1500), (3e-3, 1500), (1e-2, 600), (5e-3, 600))
SYMBOLS, PARAMETERS, BATCH, VALIDATION = len(ALPHABET), 120_000, 32, 0.1


def parameters(cell, hidden):
    """Of one layer on indicators (two biases for each gate, as torch has them), and of the output."""
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[cell]
    return gates * hidden * (SYMBOLS + 1 + hidden + 2) + SYMBOLS * (hidden + 1)


def width(cell, wanted):
    return min(range(1, 1000), key=lambda hidden: abs(parameters(cell, hidden) - wanted))


def parts():
    """Rows to train on, to choose the rate on, and to report: consecutive stretches of the text."""
    whole, test = pg.load_data("alice", split="train"), pg.load_data("alice", split="test")
    cut = round((1 - VALIDATION) * len(whole["x"]))
    return {n: v[:cut] for n, v in whole.items()}, {n: v[cut:] for n, v in whole.items()}, test


def run(cell, rate, wanted, steps):
    """One fit, from its file if there is one of the same settings."""
    file = WORK / f"characters-{cell}-{rate:g}-{wanted}-{steps}.json"
    if file.exists():
        return json.loads(file.read_text())
    train, validation, test = parts()
    decay = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=steps)
    algorithm = SVI(steps=steps, batch_size=BATCH, lr=rate, clip_norm=1.0, schedule=decay)
    hidden = width(cell, wanted)
    began = time.perf_counter()
    fit = pg.fit(char_rnn(SYMBOLS, cell=cell, hidden=hidden), train, algorithm, seed=0)
    result = {
        "cell": cell,
        "rate": rate,
        "steps": steps,
        "hidden": hidden,
        "parameters": sum(value.numel() for value in fit.params.values()),
        "seconds": time.perf_counter() - began,
        "train": bits_per_character(fit),
        "validation": bits_per_character(fit, validation),
        "test": bits_per_character(fit, test),
    }
    assert result["parameters"] == parameters(cell, hidden)
    WORK.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_suffix(".tmp")
    partial_file.write_text(json.dumps(result))
    os.replace(partial_file, file)
    print(result, flush=True)
    return result


def counts():
    """Bits per character of the test part under letter frequencies and letter pairs of the training part."""
    (train, _, test), result = parts(), []
    active = [torch.arange(rows["x"].shape[1]) < rows["lengths"][:, None] for rows in (train, test)]
    single = torch.bincount(train["x"][active[0]], minlength=SYMBOLS) + 1.0
    result.append(-float((single / single.sum()).log2()[test["x"][active[1]]].mean()))
    before, after = ([], [])
    for rows, mask in ((train, active[0]), (test, active[1])):
        start = torch.full((len(rows["x"]), 1), SYMBOLS)
        before.append(torch.cat([start, rows["x"][:, :-1]], 1)[mask])
        after.append(rows["x"][mask])
    pairs = torch.bincount(before[0] * SYMBOLS + after[0], minlength=(SYMBOLS + 1) * SYMBOLS) + 0.1
    odds = pairs.reshape(-1, SYMBOLS) / pairs.reshape(-1, SYMBOLS).sum(-1, keepdim=True)
    return [*result, -float(odds.log2()[before[1], after[1]].mean())]


def report(chosen, runs, wanted, seconds):
    single, pairs = counts()
    rows = [["uniform over the alphabet", "", "", "", "", f"{math.log2(SYMBOLS):.3f}", ""]]
    rows += [["frequencies of the characters", "", "", "", "", f"{single:.3f}", ""]]
    rows += [["frequencies of pairs of characters", "", "", "", "", f"{pairs:.3f}", ""]]
    for cell, best in chosen.items():
        figures = [f"{best[part]:.3f}" for part in ("train", "validation", "test")]
        named = [f"{cell}, {best['hidden']} units", str(best["parameters"]), f"{best['rate']:g}, {best['steps']}"]
        rows.append([*named, *figures, f"{best['seconds']:.0f}"])
    tried = [
        [r["cell"], f"{r['rate']:g}", str(r["steps"]), *(f"{r[p]:.3f}" for p in ("train", "validation", "test"))]
        for r in runs
    ]
    plain, gated = chosen["rnn"]["test"], {cell: chosen[cell]["test"] for cell in ("lstm", "gru")}
    words = [
        f"the {cell} is {abs(plain - bits):.3f} bits {'below' if bits < plain else 'ABOVE'} the plain RNN"
        for cell, bits in gated.items()
    ]
    body = f"""
Alice's Adventures in Wonderland, {SYMBOLS} symbols, cut into sequences of at most 128 characters that know nothing of
the ones before; all characters of a sequence are predicted, the first from the start alone, and no end. Test: the last
tenth of the text. Validation: the last tenth of the rest, not trained on.

One layer on indicators of the symbols, about {wanted} parameters each; `SVI(batch_size={BATCH}, clip_norm=1.0)`, Adam,
the learning rate falling linearly to a tenth; seed 0. Rate and steps of each cell are those with the least validation
bits among the {len(SETTINGS)} settings tried, the same for all cells.

{table(["model", "parameters", "rate, steps", "train", "validation", "test", "seconds"], rows)}

On the test part, {" and ".join(words)}.

Every run, in bits per character:

{table(["cell", "rate", "steps", "train", "validation", "test"], tried)}

One seed: differences of a few hundredths of a bit mean nothing. Seconds depend on what else the machine is doing.
"""
    write("characters", "Character models: RNN, LSTM, GRU", body, seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps of small networks; prints, writes no result")
    quick = parser.parse_args().quick
    wanted, settings = (20_000, ((1e-2, 20),)) if quick else (PARAMETERS, SETTINGS)
    runs = [run(cell, rate, wanted, steps) for rate, steps in settings for cell in CELLS]
    chosen = {cell: min((r for r in runs if r["cell"] == cell), key=lambda r: r["validation"]) for cell in CELLS}
    sizes = [best["parameters"] for best in chosen.values()]
    assert max(sizes) < 1.02 * min(sizes), sizes
    if quick:
        print({cell: round(best["test"], 3) for cell, best in chosen.items()}, counts())
    else:
        report(chosen, runs, wanted, sum(r["seconds"] for r in runs))


if __name__ == "__main__":
    main()
