"""One pass over rows against densities, responsibilities and moments taken one component at a time.

Float64: log densities of order 10 round to 1e-14, sums of 2000 of them to 1e-11. Float32: whitened rows of order one err
by 1e-6, log densities by 1e-5; sums of rows are in float64.
"""

from __future__ import annotations

import pytest
import torch

from ppl_gen.nn import quadratic as module
from ppl_gen.nn.moments import moments, pooled
from ppl_gen.nn.quadratic import Quadratic, swept

FLOAT = torch.float64
K, D = 4, 3


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_ELEMENTS", 256 * K * D)


def case(full, dtype=FLOAT, narrow=1.0):
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": FLOAT}
    centre = 3 * torch.randn(K, D, **draw)
    root = torch.randn(K, D, D, **draw).tril(-1) * 0.3 + torch.eye(D, dtype=FLOAT) * (0.5 + torch.rand(K, 1, 1, **draw))
    root = root * torch.tensor([1.0, 1.0, 1.0, narrow], dtype=FLOAT)[:, None, None]
    which = torch.randint(K, (2000,), generator=generator)
    rows = centre[which] + (root[which] @ torch.randn(2000, D, 1, **draw)).squeeze(-1)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=FLOAT)
    root = root if full else root.diagonal(dim1=-2, dim2=-1)
    forms = Quadratic.normal(centre.to(dtype), root.to(dtype)).plus(weights.log().to(dtype))
    return rows.to(dtype), forms, weights


def directly(rows, forms, weights):
    rows, root = rows.double(), forms.root.double()
    tril = root if forms.full else root.diag_embed()
    components = torch.distributions.MultivariateNormal(forms.centre.double(), scale_tril=tril)
    log_joint = components.log_prob(rows[:, None]) + weights.log()
    return log_joint.logsumexp(-1).sum(), moments(rows, log_joint.softmax(-1), full=forms.full)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("full", [True, False])
def test_one_pass_is_the_sum_over_components(full, dtype, error):
    rows, forms, weights = case(full, dtype)
    total, found = swept(rows, lambda y: y, forms)
    expected, groups = directly(rows, forms, weights)
    assert float(total) == pytest.approx(float(expected), rel=error)
    torch.testing.assert_close(found.counts, groups.counts, rtol=error, atol=0)
    torch.testing.assert_close(found.means, groups.means, rtol=error, atol=error)
    torch.testing.assert_close(found.scatter, groups.scatter, rtol=error, atol=error * 2000)
    alone, nothing = swept(rows, lambda y: y, forms, statistics=False)
    assert nothing is None and torch.equal(alone, total)


def test_in_float32_a_narrow_component_far_away_keeps_its_width():
    """Squares of 3 less squares of 3 would leave nothing of a variance of 1e-8 in float32; whitened rows do."""
    rows, forms, weights = case(True, torch.float32, narrow=1e-4)
    _, found = swept(rows, lambda y: y, forms)
    _, groups = directly(rows, forms, weights)
    ours, theirs = (torch.linalg.eigvalsh(g.scatter[3] / g.counts[3]) for g in (found, groups))
    assert float(theirs.max()) < 1e-6
    # A row of order 3 in float32 is a thousandth of that width off: that share of the width, and its square.
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_far_from_all_components_belong_to_the_nearest(dtype):
    forms = Quadratic.normal(torch.tensor([[0.0], [1e4]], dtype=dtype), torch.ones(2, 1, dtype=dtype))
    total, found = swept(torch.tensor([[-1e3], [2e4]], dtype=dtype), lambda y: y, forms)
    assert torch.isfinite(total) and found.counts.round().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("full", [True, False])
def test_moments_of_two_halves_are_those_of_all(full):
    rows, forms, weights = case(full)
    _, whole = swept(rows, lambda y: y, forms)
    halves = [swept(part, lambda y: y, forms)[1] for part in (rows[:500], rows[500:])]
    together = pooled(*halves, (1.0, 1.0))
    for name in ("counts", "means", "scatter"):
        torch.testing.assert_close(getattr(together, name), getattr(whole, name), rtol=1e-10, atol=1e-9)
