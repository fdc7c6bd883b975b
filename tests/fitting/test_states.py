"""The state of a run is a value: equal states make equal steps, and a run goes on elsewhere bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.infer
import pytest
import torch
from programs import X8, both, both_guide, switch, switch_guide
from resumable_runs import BITS, DOMAINS, IMAGES, ROWS, RUNS, in_domains, numbers, same

import ppl_gen as pg
from ppl_gen.data.batches import Batches
from ppl_gen.data.batching import as_dataset
from ppl_gen.fitting.loop import iterate
from ppl_gen.inference import (
    EBGAN,
    ELBO,
    EM,
    IWAE,
    SVI,
    WAE,
    Adversarial,
    AdversarialTraining,
    ConditionalAdversarial,
    ContrastiveDivergence,
    DomainAdversarial,
    SimpleDiffusion,
    WakeSleep,
    Walkback,
)
from ppl_gen.inference.gradients import gradients
from ppl_gen.inference.updates import CHECK
from ppl_gen.models import dbm, dbn, dcgan, denoising_diffusion, energy_model, gan, gsn, helmholtz, lapgan, rbm, vae
from ppl_gen.models.small_data import small_network
from ppl_gen.workspace.isolation import generators, set_generators


def _own(model: Any, guide: Any, x: torch.Tensor) -> torch.Tensor:
    return pyro.infer.Trace_ELBO().differentiable_loss(model, guide, x)


#: Every objective on a program that it fits: model, guide, objective, data.
GAMES: dict[str, tuple[Any, Any, Any, Any]] = {
    "ELBO": (both, both_guide, ELBO(particles=2), X8),
    "ELBO, score function with baselines": (switch, switch_guide, ELBO(enumerate=False, particles=2), X8),
    "ELBO, summed in the guide": (switch, switch_guide, ELBO(), X8),
    "IWAE": (both, both_guide, IWAE(particles=3), X8),
    "IWAE in chunks": (both, both_guide, IWAE(particles=4, chunk=2), X8),
    "Pyro's Trace_ELBO": (both, both_guide, pyro.infer.Trace_ELBO(), X8),
    "a function": (both, both_guide, _own, X8),
    "Adversarial": (gan(latent=2, hidden=(4,)), None, Adversarial("non-saturating"), ROWS),
    "Adversarial with gradient penalty": (
        gan(latent=2, hidden=(4,)),
        None,
        Adversarial("wasserstein", penalty="gradient"),
        ROWS,
    ),
    "Adversarial, a divergence": (gan(latent=2, hidden=(4,)), None, Adversarial("hellinger"), ROWS),
    "Adversarial, players at once": (
        gan(latent=2, hidden=(4,)),
        None,
        Adversarial("least-squares", schedule="simultaneous", averaging=0.9),
        ROWS,
    ),
    "Adversarial with batch norm": (dcgan(latent=2, filters=2), None, Adversarial(), IMAGES),
    "ConditionalAdversarial": (
        lapgan(levels=1, latent=2, filters=2, hidden=(3,)),
        None,
        ConditionalAdversarial(),
        IMAGES,
    ),
    "EBGAN": (gan(latent=2, hidden=(4,)), None, EBGAN(damping=0.1), ROWS),
    **{f"WAE-{kind}": (vae(latent=2, hidden=(4,)), None, WAE(kind), ROWS) for kind in ("mmd", "gan", "energy")},
    "AdversarialTraining": (in_domains, None, AdversarialTraining(steps=2, clean=0.5), DOMAINS),
    "DomainAdversarial": (in_domains, None, DomainAdversarial(), DOMAINS),
    "ContrastiveDivergence": (rbm(hidden=3), None, ContrastiveDivergence(steps=2), BITS),
    "persistent chains": (rbm(hidden=3), None, ContrastiveDivergence(persistent=True, chains=7), BITS),
    "simple diffusion": (denoising_diffusion(steps=4, hidden=8), None, SimpleDiffusion(), ROWS),
    "tempered chains": (
        rbm(hidden=3),
        None,
        ContrastiveDivergence(persistent=True, chains=7, temperatures=3, restart=0.2),
        BITS,
    ),
    "deep chains": (dbm(hidden=(3, 2)), None, ContrastiveDivergence(persistent=True), BITS),
    "Langevin chains": (energy_model(small_network()), None, ContrastiveDivergence(steps=2, persistent=True), ROWS),
    "wake-sleep": (helmholtz(hidden=(3, 2)), None, WakeSleep(), BITS),
    "reweighted wake-sleep": (helmholtz(hidden=(3, 2)), None, WakeSleep(particles=3, guide="both"), BITS),
    "up-down": (dbn(hidden=(3, 2)), None, WakeSleep(steps=2), BITS),
    "walkback": (gsn(hidden=(4,)), None, Walkback(steps=2), BITS),
    "diffusion": (denoising_diffusion(steps=4, hidden=8), None, ELBO(), ROWS),
}


def _played_twice(name: str, run: Any, algorithm: SVI) -> None:
    """Every player's step twice from the state of a run that has begun."""
    at, batch = algorithm.init(run), algorithm.source(run).next()
    state = at.game_state
    kept, numbers = copy.deepcopy(dict(state)), generators()
    for player in at.game.players:
        leaves = list(at.leaves[player.name].values())
        held = [leaf.detach().clone() for leaf in leaves]
        found = []
        for _ in range(2):
            set_generators(numbers)
            found.append(gradients(at.game, player.name, leaves, batch, state))
        first, again = found
        assert same(first.value, again.value) and same(dict(first.parts), dict(again.parts))
        assert same(first.gradients, again.gradients) and same(dict(first.state), dict(again.state))
        assert any(bool((grad != 0).any()) for grad in first.gradients), "zeros would be equal whatever they hide"
        assert same(kept, dict(state)), "the state that was passed stays as it was"
        assert same(held, [leaf.detach() for leaf in leaves])
        assert not any(value.requires_grad for value in first.state.values())
    assert bool(state) == (name == "ELBO, score function with baselines" or name.endswith(" chains"))
    assert not state or not same(dict(first.state), dict(state)), "a state that never moves would show nothing"


@pytest.mark.parametrize("name", GAMES)
def test_equal_states_and_inputs_give_equal_losses_gradients_and_next_states(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, guide, objective, data = GAMES[name]
    played = []

    def run(self: Any, run: Any) -> Any:
        played.append(_played_twice(name, run, self))
        return iterate(self, run)

    monkeypatch.setattr(SVI, "run", run)
    program = model if guide is None else pg.Program(model, guide)
    pg.fit(program, data, SVI(objective, steps=1), seed=0, progress=False)
    assert played


class _Moved:
    """An algorithm whose run is stopped after some steps, its state moved into fresh objects, and gone on with."""

    def __init__(self, after: int) -> None:
        self.after, self.saved = after, None

    def stop(self, algorithm: Any, run: Any) -> Any:
        state, source = algorithm.init(run), algorithm.source(run)
        for _ in range(self.after):
            state, _ = algorithm.step(state, source)
        self.saved = copy.deepcopy((algorithm.state_dict(state), source.state_dict(), generators()))
        for _ in range(3):  # what was saved stays as it was
            state, _ = algorithm.step(state, source)
        return algorithm.outcome(state, run)

    def go_on(self, algorithm: Any, run: Any) -> Any:
        state, source = algorithm.init(run), algorithm.source(run)
        torch.rand(5), np.random.rand(5)
        kept = copy.deepcopy(self.saved)
        state = algorithm.load_state_dict(state, kept[0])
        source.load_state_dict(kept[1])
        set_generators(kept[2])
        for _ in range(algorithm.limit(run) - self.after):
            state, _ = algorithm.step(state, source)
        return algorithm.outcome(state, run)


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_in_fresh_objects_bit_for_bit(name: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, algorithm, data = RUNS[name]

    torch.manual_seed(0)
    program = made()
    whole = numbers(pg.fit(program, data, algorithm, seed=3, progress=False))
    moved = _Moved(after)
    monkeypatch.setattr(type(algorithm), "run", lambda self, run: moved.stop(self, run))
    stopped = numbers(pg.fit(program, data, algorithm, seed=3, progress=False))
    monkeypatch.setattr(type(algorithm), "run", lambda self, run: moved.go_on(self, run))
    resumed = numbers(pg.fit(program, data, algorithm, seed=3, progress=False))
    assert whole and same(whole, resumed)
    assert not same(whole, stopped), "a run that had arrived would show nothing"


def test_an_algorithm_without_states_says_so() -> None:
    class Still(EM):
        state_dict = pg.inference.Iterative.state_dict

    with pytest.raises(NotImplementedError, match=r"Still does not implement state_dict\(state\)"):
        Still().state_dict(None)


def test_batches_go_on_within_an_epoch_whatever_the_source_was_seeded_with() -> None:
    labels = {"x": X8, "y": (X8 > 0).long()}
    for stratify in (None, "y"):
        dataset = as_dataset(labels, lambda x, y: None)
        first, other = (Batches(dataset, 3, seed, stratify) for seed in (0, 9))
        for _ in range(4):
            first.next()
        other.load_state_dict(copy.deepcopy(first.state_dict()))
        for _ in range(10):
            assert torch.equal(first.next().index, other.next().index)


def _watched(name: str, read: list[str]) -> Callable[..., Any]:
    own = getattr(torch.Tensor, name)

    def watched(tensor: Any, *args: Any) -> Any:
        read.append(name)
        return own(tensor, *args)

    return watched


def test_a_step_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two readings of the flag no tensor becomes a Python number; the reading itself is seen."""
    read: list[str] = []
    names = ("item", "__bool__", "__float__", "__int__", "tolist", "numpy")
    state: dict[str, Any] = {}
    original = SVI.step

    def step(self: Any, at: Any, source: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(torch.Tensor, name, _watched(name, read))
            read.clear()
            found = original(self, at, source)
        state[at.count] = list(read)
        return found

    monkeypatch.setattr(SVI, "step", step)
    pg.fit(pg.Program(both, both_guide), X8, SVI(steps=CHECK + 5, batch_size=4), seed=0, progress=False)
    assert [count for count in range(2, CHECK) if state[count]] == []
    assert state[CHECK], "the flag is read, and the test sees it"
