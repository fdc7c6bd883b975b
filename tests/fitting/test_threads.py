"""Small steps take one thread, large ones all that torch is set to, which is put back; sizes decide, so a run that goes on
takes as many, to the same bits."""

from __future__ import annotations

import contextlib

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.runtime.threads import torch_threads


def located(x):
    loc = pyro.param("loc", torch.zeros(x.shape[1]))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


SMALL, LARGE = torch.randn(50, 2), torch.randn(4000, 500)


@pytest.mark.parametrize(("x", "threads"), [(SMALL, 1), (LARGE, 2)])
def test_the_size_of_a_step_decides(x, threads):
    inside = []
    with torch_threads(2):
        fit = pg.fit(located, x, SVI(steps=4), callbacks=[lambda *_: inside.append(torch.get_num_threads())])
        assert torch.get_num_threads() == 2
    assert fit.cost["threads"] == threads
    assert set(inside) == {2}, "functions of the user have all threads"
    with torch_threads(1):
        assert pg.fit(located, x, SVI(steps=3)).cost["threads"] == 1, "what the user sets is the most"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_threads_are_put_back_after_an_error_and_an_interrupt(error):
    calls = []

    def failing(x):
        calls.append(torch.get_num_threads())
        if calls[-1] == 1:
            raise error("inside a step of one thread")
        located(x)

    with torch_threads(2):
        with contextlib.suppress(RuntimeError, KeyboardInterrupt):
            pg.fit(failing, SMALL, SVI(steps=10), compile=False)
        assert torch.get_num_threads() == 2
    assert calls[-1] == 1, "the step was made on one thread"


def test_a_run_that_goes_on_takes_as_many_threads(tmp_path):
    def stop(step, info):
        if step == 3:
            raise KeyboardInterrupt

    with torch_threads(2):
        whole = pg.fit(located, SMALL, SVI(steps=6))
        pg.fit(located, SMALL, SVI(steps=6), checkpoint=tmp_path, every=1, callbacks=[stop])
        parted = pg.fit(located, SMALL, SVI(steps=6), checkpoint=tmp_path, every=1)
    assert parted.cost["threads"] == whole.cost["threads"] == 1
    assert torch.equal(parted.params["loc"], whole.params["loc"])
