"""What works in place on the data is refused, and single rows in batch norm; networks that cannot be copied, too."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import ppl_gen as pg
from ppl_gen.inference import ELBO, SVI, Adversarial
from ppl_gen.looking import deconvnet
from ppl_gen.models import classifier, energy_model, gan, real_nvp

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # runs are short on purpose


def _hasty(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(()))
    x.mul_(2.0)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class Late:
    """A program that works in place from its fiftieth call on, when all looks at it are over."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        self.calls += 1
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x if self.calls < 50 else x.add_(1.0))


def test_a_program_that_changes_the_data_is_refused_and_the_data_are_put_back() -> None:
    x = torch.randn(20)
    kept = x.clone()
    for ask in (lambda: pg.check(_hasty, x), lambda: pg.fit(_hasty, x, SVI(steps=3), seed=0)):
        with pytest.raises(ValueError, match=r"data 'x': the program changes it in place.*x\.clone\(\)"):
            ask()
        assert torch.equal(x, kept)
    pg.fit(lambda x: _hasty(x.clone()), x, SVI(steps=3), seed=0)
    assert torch.equal(x, kept)


def test_of_large_data_programs_see_copies_of_some_rows() -> None:
    x = torch.randn(1_000_001)
    kept = x.clone()
    pg.fit(_hasty, x, SVI(steps=3, batch_size=10), seed=0)
    assert torch.equal(x, kept)


def test_what_begins_to_change_the_data_in_the_run_is_told_at_its_end() -> None:
    with pytest.raises(ValueError, match="The rows that were passed are changed"):
        pg.fit(Late(), torch.randn(20), SVI(steps=200), seed=0, compile=False)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_a_network_whose_first_layer_works_in_place_is_trained_on_copies(batch_size: int | None) -> None:
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    kept = x.clone()
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        own = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(3, 2))
        fit = pg.fit(classifier(2, own), {"x": x, "y": y}, SVI(steps=5, batch_size=batch_size), seed=0)
        found.append(fit.evidence().values)
        assert torch.equal(x, kept)
    assert torch.equal(*found)


def test_a_critic_whose_first_layer_works_in_place_changes_no_row() -> None:
    x = torch.randn(20, 3)
    kept = x.clone()
    critic = nn.Sequential(nn.LeakyReLU(0.2, inplace=True), nn.Linear(3, 1))
    pg.fit(gan(latent=2, hidden=(4,)), x, SVI(Adversarial(critic=critic), steps=3), seed=0)
    assert torch.equal(x, kept)


# ------------------------------------------------------------------------------------------------------ batch norm
def test_a_batch_of_one_row_in_batch_norm_is_told_by_the_size_of_the_batches() -> None:
    own = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    data = {"x": torch.randn(21, 3), "y": torch.arange(21) % 2}
    with pytest.raises(ValueError, match=r"batch_size: batch norm .* has none \(21 rows in batches of 5\)"):
        pg.fit(classifier(2, own), data, SVI(epochs=2, batch_size=5), seed=0)
    pg.fit(classifier(2, own), data, SVI(epochs=2, batch_size=7), seed=0)
    with pytest.raises(ValueError, match="one row has none: pass 2 rows or more"):
        pg.fit(classifier(2, own), {name: value[:1] for name, value in data.items()}, SVI(steps=2), seed=0)


def test_single_images_at_the_last_scale_of_a_flow_are_refused() -> None:
    x = torch.randn(9, 1, 4, 4)
    for size in (1, 2):
        with pytest.raises(ValueError, match=rf"batch_size: batch norm .* \(9 rows in batches of {size}\)"):
            pg.fit(real_nvp(channels=3, blocks=1), x, SVI(epochs=1, batch_size=size), seed=0)
    # With one scale a single image of 16 pixels has a spread.
    pg.fit(real_nvp(channels=3, blocks=1, scales=1), x, SVI(epochs=1, batch_size=2), seed=0)


# ---------------------------------------------------------------------------------------------------------- copies
class Keeping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm], ids=["spectral", "weight"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_older_norms_of_torch_can_be_copied(norm: Any, called: bool) -> None:
    """They keep the weight of their last call: a fit ended in an error after all of its steps."""
    x = torch.randn(20, 2)
    critic = nn.Sequential(norm(nn.Linear(2, 4)), nn.ReLU(), norm(nn.Linear(4, 1)))
    net = nn.Sequential(norm(nn.Linear(2, 4)), nn.ReLU(), norm(nn.Linear(4, 2)))
    if called:
        critic(x), net(x)

    def program(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.1).to_event(1), obs=x)

    for objective in (Adversarial(critic=critic), ELBO()):
        fit = pg.fit(program, x, SVI(objective, steps=2), seed=0)
        own = fit.module("net")
        assert torch.equal(own(x), fit.module("net")(x)) and deconvnet(own, x).shape == x.shape
    fit = pg.fit(program, x, SVI(Adversarial(critic=critic), steps=2), seed=0)
    assert torch.equal(fit.module("critic")(x), fit.module("critic")(x))


def test_networks_that_cannot_be_copied_are_refused_by_name() -> None:
    x = torch.randn(20, 3)
    two, one = Keeping(3, 2), Keeping(3, 1)
    two(x), one(x)
    for name, ask in {
        "network": lambda: pg.check(classifier(2, two), {"x": x, "y": torch.arange(20) % 2}),
        "network: this": lambda: pg.check(energy_model(one), x),
        "critic": lambda: pg.fit(gan(latent=2, hidden=(4,)), x, SVI(Adversarial(critic=one), steps=1)),
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*cannot be copied"):
            ask()
