"""Programs that run only with their finite sites enumerated: they assert on the shapes of that, or squeeze an axis off.

A fit needs more than the sum: the table of sites, predictions and new rows are runs of the program with every site
drawn. `by_branches` gives such runs the shapes of enumeration. Where that does not do, what the run trips over looks
like a mistake of plates or shapes, and is none: `drawn_too` says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pyro import poutine
from pyro.infer import config_enumerate
from pyro.util import check_site_shape

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.handlers.branches import Branches, PlateNesting
from ppl_gen.handlers.opened import within
from ppl_gen.handlers.sites import is_deterministic, sample_nodes
from ppl_gen.program.checks import OutsideSupportError, check_densities
from ppl_gen.program.program import Program
from ppl_gen.workspace.isolation import validation_off, without_side_effects

__all__ = ["by_branches", "drawn_too", "tried"]

BEYOND = 2  # plates that the run may have failed before it opened


@contextlib.contextmanager
def drawn_too(program: Program, batch: Batch) -> Iterator[None]:
    """Inside, a failure of a program that runs when enumerated is explained as such.

    Raises:
        IncompatibleError: naming the sites that have to be enumerated for it to run.
    """
    try:
        yield
    except OutsideSupportError:
        raise
    except PROGRAM_ERRORS as error:
        names, _ = _enumerated(program.model, batch)
        if not names:
            raise
        listed, said = ", ".join(map(repr, names)), (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IncompatibleError(
            f"the model of {program.name!r} runs with {listed} enumerated, and not with them drawn, as fit.sample, "
            "fit.predict and the table of sites run it. Write it for both: probs[z] or Vindex(probs)[..., z] broadcast "
            "over any shape of z; leave out z.squeeze(-1), assertions on the shape that enumeration gives and indices "
            f"from the left. Drawn it says: {said}"
        ) from error


def by_branches(program: Program, batch: Batch, trace: poutine.Trace | None) -> tuple[Program, dict[str, str]]:
    """The program so that it runs with every site drawn, and a note of it, where as it is written it does not.

    ``trace`` is of such a run, None where that failed. A program that runs either way, or neither way, stays as it is.
    """
    if trace is not None and not (_finite(trace) and _fails(trace)):
        return program, {}
    names, nesting = _enumerated(program.model, batch)
    if not names:
        return program, {}
    model = within(program.model, lambda args, kwargs: Branches(names, nesting, program.name))
    drawn = tried(model, batch)
    if drawn is None or _fails(drawn) or _depth(drawn) != nesting:
        return program, {}
    listed = ", ".join(names)
    note = f"{listed}: the program runs only with them enumerated; its other runs look the same to it"
    return replace(program, model=model), {"enumerated": note}


def tried(model: Callable[..., Any], batch: Batch) -> poutine.Trace | None:
    """A run with every site drawn; None where it fails."""
    with contextlib.suppress(*PROGRAM_ERRORS), without_side_effects(), validation_off():
        trace: poutine.Trace = poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
        return trace
    return None


def _finite(trace: poutine.Trace) -> bool:
    return any(node["fn"].has_enumerate_support and not node["is_observed"] for _, node in sample_nodes(trace))


def _fails(trace: poutine.Trace) -> bool:
    try:
        with without_side_effects():
            check_densities(trace)
    except OutsideSupportError:
        return False
    except PROGRAM_ERRORS:
        return True
    return False


def _depth(trace: poutine.Trace) -> int:
    return max((-f.dim for _, node in sample_nodes(trace) for f in node["cond_indep_stack"] if f.vectorized), default=0)


def _enumerated(model: Callable[..., Any], batch: Batch) -> tuple[list[str], int]:
    """Names of the finite latent sites of a program that runs with them enumerated, and how deep its plates are.

    No names where it does not.
    """
    with without_side_effects(), validation_off():
        opened = PlateNesting()
        with contextlib.suppress(*PROGRAM_ERRORS), opened:
            model(*batch.args, **batch.kwargs)
        for nesting in range(opened.nesting, opened.nesting + BEYOND + 1):
            with contextlib.suppress(*PROGRAM_ERRORS):
                return _run(model, batch, nesting), nesting
    return [], 0


def _run(model: Callable[..., Any], batch: Batch, nesting: int) -> list[str]:
    summed = poutine.enum(config_enumerate(model), first_available_dim=-1 - nesting)
    trace = poutine.trace(summed).get_trace(*batch.args, **batch.kwargs)
    trace.compute_log_prob(lambda name, site: not is_deterministic(site))
    for _, site in sample_nodes(trace):
        if "log_prob" in site:
            check_site_shape(site, nesting)
    trace.pack_tensors()  # which finds axes that belong neither to a plate nor to an enumerated site
    return [name for name, site in sample_nodes(trace) if "_enumerate_dim" in site["infer"]]
