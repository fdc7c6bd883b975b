"""The fused kernel called directly makes torch's own steps, to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ppl_gen.inference.fused_adam import FusedAdam


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"betas": (0.5, 0.9), "eps": 1e-3}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torch(kind: Any, settings: dict[str, Any], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(5, generator=generator, dtype=dtype), torch.randn(2, 3, generator=generator, dtype=dtype)]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in own] for _ in range(2))
    one, other = (kind(params, lr=0.1, fused=True, **settings) for params in (ours, theirs))
    assert not FusedAdam.serves(one), "its moments do not exist yet"
    fused = None
    for _ in range(10):
        grads = [torch.randn(value.shape, generator=generator, dtype=dtype) for value in own]
        for optimiser, params in ((one, ours), (other, theirs)):
            if optimiser is one and fused is not None:
                fused.step(grads)
                continue
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimiser.step()
        if fused is None:
            assert FusedAdam.serves(one)
            fused = FusedAdam(one)
        for optimiser in (one, other):
            optimiser.param_groups[0]["lr"] *= 0.9  # as a schedule does
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not any(torch.equal(a.detach(), b) for a, b in zip(ours, own, strict=True))
    saved, expected = one.state_dict()["state"], other.state_dict()["state"]
    assert all(torch.equal(saved[i][name], expected[i][name]) for i in expected for name in expected[i])


def test_other_optimisers_are_left_to_torch() -> None:
    def begun(make: Any) -> torch.optim.Optimizer:
        param = torch.nn.Parameter(torch.ones(2))
        optimiser: torch.optim.Optimizer = make([param])
        param.grad = torch.ones(2)
        optimiser.step()
        return optimiser

    for make in (
        lambda p: torch.optim.Adam(p, fused=True, amsgrad=True),
        lambda p: torch.optim.Adam(p, fused=True, maximize=True),
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.SGD(p, fused=True),
        lambda p: torch.optim.Adam([{"params": p}, {"params": [torch.nn.Parameter(torch.ones(1))]}], fused=True),
    ):
        assert not FusedAdam.serves(begun(make))
    hooked = begun(lambda p: torch.optim.Adam(p, fused=True))
    assert FusedAdam.serves(hooked)
    hooked.register_step_post_hook(lambda *_: None)
    assert not FusedAdam.serves(hooked)
