"""The library against answers known from elsewhere: closed forms, sums over all states, other libraries.

Float64 where exactness is claimed; every seed is fixed. Exits with the number of failed checks.
"""

from __future__ import annotations

import time

import torch
from oracles_of_linear import linear_autoencoder, linear_gaussian, linear_variational_autoencoder
from oracles_of_models import boltzmann, cavi, crabs_by_em, em_against_scikit_learn, markov, noising
from oracles_of_normals import gaussian_posterior, logistic_maximum, mode_shares
from oracles_of_objectives import (
    any_critic,
    bounds_on_minibatches,
    divergences,
    evidence_by_importance,
    optimal_critic,
    parallel_lines,
    players_in_turn_and_at_once,
    singular_values,
    unbiased_minibatches,
)
from versions import table, write

from ppl_gen.workspace.isolation import isolated

ORACLES = (
    crabs_by_em,
    em_against_scikit_learn,
    cavi,
    markov,
    boltzmann,
    noising,
    linear_gaussian,
    linear_variational_autoencoder,
    linear_autoencoder,
    optimal_critic,
    divergences,
    any_critic,
    singular_values,
    players_in_turn_and_at_once,
    parallel_lines,
    bounds_on_minibatches,
    unbiased_minibatches,
    evidence_by_importance,
    gaussian_posterior,
    logistic_maximum,
    mode_shares,
)
ABOUT = """
A bound's error is the bound minus what it must not exceed (negative: below it), its tolerance five standard errors; in
brackets, standard errors. All other errors are absolute, the largest where several numbers are compared.
"""


def main():
    began, checks = time.perf_counter(), []
    for oracle in ORACLES:
        with isolated(0, dtype=torch.float32 if oracle is parallel_lines else torch.float64):
            checks += list(oracle())
        print(f"{oracle.__name__}: {time.perf_counter() - began:.0f} s", flush=True)
    failed = [check for check in checks if not check.passed]
    passed = f"{len(checks) - len(failed)} of {len(checks)} pass."
    body = table(["oracle", "what is compared", "error", "tolerance", "pass"], [check.row() for check in checks])
    write("oracles", "Oracles", f"{ABOUT.strip()}\n\n{passed}\n\n{body}", time.perf_counter() - began)
    raise SystemExit(len(failed))


if __name__ == "__main__":
    main()
