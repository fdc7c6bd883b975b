"""Every algorithm on every program that it fits goes on from a checkpoint to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from resumable_runs import numbers, same
from test_contract import ALGORITHMS, FITS

import ppl_gen as pg
from ppl_gen.models.catalogue import CATALOGUE

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

FAST = {
    ("hidden_markov", "EM"),
    ("gan", "SVI(Adversarial)"),
    ("m2", "SVI(Trace_ELBO)"),
    ("real_nvp", "SVI(ELBO)"),
    ("char_rnn", "SVI(ELBO)"),
    ("ppca", "NUTS"),
}
PAIRS = [
    pytest.param(program, algorithm, marks=() if (program, algorithm) in FAST else pytest.mark.slow)
    for program in CATALOGUE
    for algorithm in sorted(FITS[program])
]


def all_of(fit: pg.Fit) -> dict[str, Any]:
    cost = {name: value for name, value in fit.cost.items() if name not in ("seconds", "capture_seconds")}
    draws = dict(getattr(fit.learned, "draws", {}))
    return {**numbers(fit), "records": fit.records, "cost": cost, "message": fit.message, "draws": draws}


@pytest.mark.parametrize(("program", "algorithm"), PAIRS)
def test_every_pair_goes_on(program: str, algorithm: str, tmp_path: Path) -> None:
    entry, chosen = CATALOGUE[program], ALGORITHMS[algorithm]()

    def learned(**settings: Any) -> pg.Fit:
        return pg.fit(entry.recipe(), entry.data(), chosen, seed=1, progress=False, **settings)

    whole = learned()
    # The closed form of ppca is there after one step.
    last = 13 if algorithm == "NUTS" else min(3, int(whole.cost["steps"]))

    def stop(step: int, info: Any) -> None:
        if step == last:
            raise SystemExit

    with pytest.raises(SystemExit):
        learned(checkpoint=tmp_path, every=2, callbacks=[stop])
    resumed = learned(checkpoint=tmp_path, every=2)
    assert last < 3 or algorithm == "NUTS" or "after 2 of" in resumed.notes["resumed"]
    assert same(all_of(whole), all_of(resumed))
