"""Programs that run only with their finite sites enumerated: they assert on the shapes of that, or squeeze an axis off.

A fit needs more than the sum: the table of sites, predictions and new rows are runs of the program with every site
drawn. What such a run trips over looks like a mistake of plates or shapes, and is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from pyro import poutine
from pyro.infer import config_enumerate
from pyro.poutine.messenger import Messenger
from pyro.util import check_site_shape

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.isolation import looking, quiet
from ppl_gen.program import Program
from ppl_gen.sitechecks import OutsideSupportError, sample_nodes

__all__ = ["drawn_too"]

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
        names = _enumerated(program.model, batch)
        if not names:
            raise
        listed, said = ", ".join(map(repr, names)), (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IncompatibleError(
            f"the model of {program.name!r} runs with {listed} enumerated, and not with them drawn, as fit.sample, "
            "fit.predict and the table of sites run it. Write it for both: probs[z] or Vindex(probs)[..., z] broadcast "
            "over any shape of z; leave out z.squeeze(-1), assertions on the shape that enumeration gives and indices "
            f"from the left. Drawn it says: {said}"
        ) from error


def _enumerated(model: Callable[..., Any], batch: Batch) -> list[str]:
    """Names of the finite latent sites of a program that runs with them enumerated; none where it does not."""
    with looking(), quiet():
        opened = _Deepest()
        with contextlib.suppress(*PROGRAM_ERRORS), opened:
            model(*batch.args, **batch.kwargs)
        for nesting in range(opened.nesting, opened.nesting + BEYOND + 1):
            with contextlib.suppress(*PROGRAM_ERRORS):
                return _run(model, batch, nesting)
    return []


def _run(model: Callable[..., Any], batch: Batch, nesting: int) -> list[str]:
    summed = poutine.enum(config_enumerate(model), first_available_dim=-1 - nesting)
    trace = poutine.trace(summed).get_trace(*batch.args, **batch.kwargs)
    trace.compute_log_prob(lambda name, site: not site["infer"].get("_deterministic"))
    for _, site in sample_nodes(trace):
        if "log_prob" in site:
            check_site_shape(site, nesting)
    trace.pack_tensors()  # which finds axes that belong neither to a plate nor to an enumerated site
    return [name for name, site in sample_nodes(trace) if "_enumerate_dim" in site["infer"]]


class _Deepest(Messenger):
    """How many plates stand inside of each other, as far as a run comes."""

    nesting = 0

    def _pyro_sample(self, msg: Any) -> None:
        dims = [-frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized]
        self.nesting = max([self.nesting, *dims])
