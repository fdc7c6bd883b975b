"""Codes in two dimensions, and whether their scores say what they claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from torch import nn

from ppl_gen.looking import embed_layers, mds, som, tsne


def _groups(rows: int = 60, numbers: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = 15 * torch.eye(3, numbers, dtype=torch.float64)
    return centres[torch.arange(rows) % 3] + torch.randn(rows, numbers, generator=generator, dtype=torch.float64)


def _affinities(rows: np.ndarray, perplexity: float) -> np.ndarray:
    """Symmetric neighbour probabilities at a perplexity, by bisection of each row's width: the definition."""
    far = squareform(pdist(rows, "sqeuclidean"))
    found = np.zeros_like(far)
    for i in range(len(rows)):
        low, high = 1e-10, 1e10
        others = np.arange(len(rows)) != i
        for _ in range(200):
            rate = np.sqrt(low * high)
            p = np.exp(-rate * (far[i, others] - far[i, others].min()))
            p /= p.sum()
            entropy = -(p * np.log(p + 1e-300)).sum()
            low, high = (rate, high) if entropy > np.log(perplexity) else (low, rate)
        found[i, others] = p
    return (found + found.T) / (2 * len(rows))


def test_the_objective_of_tsne_is_that_of_the_definition() -> None:
    rows = _groups(40)
    found = tsne(rows, perplexity=8.0)
    p = _affinities(rows.numpy(), 8.0)
    near = 1 / (1 + squareform(pdist(found.points.numpy(), "sqeuclidean")))
    np.fill_diagonal(near, 0.0)
    q = near / near.sum()  # over all pairs of k and l
    kept = p > 0
    kl = float((p[kept] * np.log(p[kept] / q[kept].clip(1e-300))).sum())
    # scikit-learn keeps 3 * perplexity neighbours and single precision: what it leaves out is below 1 %.
    assert found.scores["kl"] == pytest.approx(kl, rel=0.05, abs=0.01)


def test_trustworthiness_tells_a_faithful_picture_from_points_at_random() -> None:
    faithful = tsne(_groups())
    assert faithful.points.shape == (60, 2) and faithful.scores["trustworthiness"] > 0.85
    again = tsne(_groups())
    assert torch.equal(faithful.points, again.points)
    noise = tsne(torch.randn(60, 40, generator=torch.Generator().manual_seed(3)))
    assert noise.scores["trustworthiness"] < faithful.scores["trustworthiness"]


def test_distances_of_a_plane_in_space_are_kept() -> None:
    torch.manual_seed(0)
    plane = torch.randn(30, 2, dtype=torch.float64) @ torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q[:2]
    found = mds(plane)
    # SMACOF begins at the answer: the principal components.
    assert found.scores["stress"] < 1e-6 and found.scores["trustworthiness"] == 1.0
    assert np.allclose(pdist(found.points.numpy()), pdist(plane.numpy()), atol=1e-5)


def test_stress_is_the_formula_and_no_worse_than_that_of_the_principal_components() -> None:
    rows = _groups().numpy()
    found = mds(rows)
    far = pdist(rows)

    def stress(points: np.ndarray) -> float:
        return float(np.sqrt(((far - pdist(points)) ** 2).sum() / (far**2).sum()))

    assert found.scores["stress"] == pytest.approx(stress(found.points.numpy()), abs=1e-9)
    centred = rows - rows.mean(0)
    components = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    assert found.scores["stress"] < stress(components)


def test_four_equidistant_points_have_the_stress_of_a_square() -> None:
    # Of a square with side a among points at distance 1, four sides and two diagonals: the best a gives 0.1691.
    side = (4 + 2 * np.sqrt(2)) / 8
    square = np.sqrt((4 * (1 - side) ** 2 + 2 * (1 - np.sqrt(2) * side) ** 2) / 6)
    found = mds(np.eye(4) / np.sqrt(2), seed=1)
    assert found.scores["stress"] >= square - 1e-6, "no picture of four points is better"


def test_a_map_lies_on_the_rows_and_says_how_near() -> None:
    rows = _groups(90)
    found = som(rows, grid=(5, 6))
    far = torch.cdist(rows, found.units.reshape(-1, 6))
    assert found.scores["quantisation"] == pytest.approx(float(far.min(1).values.mean()), abs=1e-6)
    nearest = far.argmin(1)
    assert torch.equal(found.points, torch.stack([nearest // 6, nearest % 6], 1).double())
    assert found.scores["explained"] > 0.9, "three groups take most of the spread"
    again = som(rows, grid=(5, 6))
    assert torch.equal(again.points, found.points) and again.scores == found.scores
    groups = [set(map(tuple, found.points[torch.arange(90) % 3 == k].tolist())) for k in range(3)]
    assert not groups[0] & groups[1] and not groups[1] & groups[2], "no unit is shared"


def test_a_map_of_a_square_is_not_folded() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.rand(400, 2, generator=generator)
    found = som(flat, grid=(6, 6))
    assert found.scores["topographic"] < 0.15 and found.scores["explained"] > 0.9
    order = torch.randperm(36, generator=generator)
    shuffled = found.units.reshape(36, 2)[order].double()  # the same units, with other neighbours
    two = torch.cdist(flat.double(), shuffled).topk(2, largest=False).indices
    apart = torch.stack([(two // 6).diff().abs(), (two % 6).diff().abs()]).amax(0)
    assert float((apart > 1).double().mean()) > 0.5, "the score would notice"


def test_layers_are_shown_in_their_order_and_learned_groups_come_apart() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))
    x = torch.randn(30, 1, 4, 4)
    found = embed_layers(net, x, "mds")
    assert list(found) == ["x", "1", "2", "4"]
    assert torch.equal(found["1"].points, mds(net[:2](x).detach()).points)
    assert found["4"].scores["stress"] < 1e-3, "two numbers fit into two dimensions"
    assert list(embed_layers(net, x, "som", layers=["", "2"])) == ["x", "", "2"]
    assert net.training
