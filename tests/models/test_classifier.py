"""Classifiers: cross-entropy, logistic regression beside scikit-learn, images, networks of one's own."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import classifier


def _three_groups(count: int = 150) -> dict[str, torch.Tensor]:
    """Groups that overlap, so that the best scores are finite."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    centres = torch.tensor([[0.0, 0.0], [1.5, 0.0], [0.0, 1.5]], dtype=torch.float64)
    return {"x": centres[y] + torch.randn(count, 2, generator=generator, dtype=torch.float64), "y": y}


def _images(count: int = 60) -> dict[str, torch.Tensor]:
    """A bright vertical or horizontal bar somewhere in noise: no single pixel tells which."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(count) % 2
    x = 0.2 * torch.rand(count, 1, 9, 9, generator=generator)
    for row, place in enumerate(torch.randint(9, (count,), generator=generator)):
        if y[row]:
            x[row, 0, :, place] += 0.8
        else:
            x[row, 0, place] += 0.8
    return {"x": x, "y": y}


def test_the_loss_is_the_cross_entropy_and_evidence_is_minus_that() -> None:
    data = _three_groups()
    fit = pg.fit(classifier(hidden=(5,)), data, SVI(steps=3), seed=0, dtype=torch.float64)
    scores = fit.module("network")(data["x"]).detach()
    rows = nn.functional.cross_entropy(scores, data["y"], reduction="none")
    evidence = fit.evidence()
    # The same sums in float64: rounding alone.
    assert torch.allclose(evidence.values, -rows, atol=1e-12) and evidence.mc_stderr in (0.0, None)
    start = pg.fit(classifier(hidden=(5,)), data, SVI(steps=1, lr=1e-12), seed=0, dtype=torch.float64)
    first = nn.functional.cross_entropy(start.module("network")(data["x"]), data["y"])
    assert float(start.history["program_loss"][0]) == pytest.approx(float(first.detach()), abs=1e-9)


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    data = _three_groups()
    peer = LogisticRegression(C=1e10, max_iter=1000, tol=1e-8).fit(data["x"].numpy(), data["y"].numpy())
    wanted = torch.from_numpy(peer.predict_proba(data["x"].numpy()))
    found = {}
    for steps in (1, 500):
        fit = pg.fit(classifier(hidden=()), data, SVI(steps=steps, lr=0.1), seed=0, dtype=torch.float64)
        found[steps] = (fit.module("network")(data["x"]).softmax(-1) - wanted).abs().max()
    # The loss is convex with curvature of about 0.1 in the scores; Adam at 0.1 ends within 1e-3 of the optimum.
    assert found[500] < 5e-3 < 0.1 < found[1]


def test_a_convolutional_network_tells_images_apart_that_no_pixel_does() -> None:
    data, later = _images(), _images(80)
    before, after = (pg.fit(classifier(hidden=(4, 8)), data, SVI(steps=steps, lr=0.01), seed=0) for steps in (1, 120))
    right = [(fit.module("network")(later["x"]).argmax(-1) == later["y"]).double().mean() for fit in (before, after)]
    # 80 fair coins give 60 heads or more with probability 5e-6.
    assert right[0] < 0.75 < right[1]
    names = [type(layer).__name__ for layer in after.module("network").modules()]
    assert "Conv2d" in names and "MaxPool2d" in names and "ReLU" in names


def test_labels_are_drawn_for_rows_without_them() -> None:
    data = _three_groups()
    fit = pg.fit(classifier(), data, SVI(steps=200, lr=0.02), seed=0)
    drawn = fit.predict({"x": data["x"][:4]}, draws=4000)["y"].double()
    wanted = fit.module("network")(data["x"][:4]).softmax(-1)
    share = torch.stack([(drawn == k).double().mean(0) for k in range(3)], -1)
    # Standard error below 0.5 / sqrt(4000) = 0.008; five of them, 12 numbers.
    assert (share - wanted).abs().max() < 0.04
    assert fit.sample(9)["y"].shape == (9,)
    assert fit.sample(5, given={"x": data["x"][:5]})["y"].shape == (5,)


def test_a_network_of_ones_own_starts_at_its_weights_and_stays_as_it_is() -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    kept = {name: value.clone() for name, value in own.state_dict().items()}
    data = _three_groups()
    still, moved = (pg.fit(classifier(3, own), data, SVI(steps=5, lr=lr), seed=0) for lr in (1e-12, 0.1))
    assert all(torch.equal(kept[name], value) for name, value in own.state_dict().items())
    x, own = data["x"], own.double()
    assert torch.allclose(still.module("network")(x), own(x), atol=1e-6)
    assert not torch.allclose(moved.module("network")(x), own(x), atol=1e-2)


def test_a_network_with_a_softmax_of_its_own_is_refused() -> None:
    data = _three_groups()
    for last in (nn.Softmax(-1), nn.LogSoftmax(-1)):
        own = nn.Sequential(nn.Linear(2, 3), last)
        if isinstance(last, nn.Softmax):
            with pytest.raises(ValueError, match="network: expected scores before the softmax, got chances"):
                pg.fit(classifier(3, own), data, SVI(steps=1), seed=0)
        else:  # the softmax of these is what they are logarithms of
            still = pg.fit(classifier(3, own), data, SVI(steps=1, lr=1e-12), seed=0)
            wanted = own.double()(data["x"]).gather(1, data["y"][:, None])[:, 0]
            assert torch.allclose(still.evidence().values, wanted, atol=1e-5)


def test_the_number_of_classes_is_that_of_the_labels_unless_it_is_given() -> None:
    data = _three_groups()
    for classes, scores in ((None, 3), (5, 5)):
        fit = pg.fit(classifier(classes, hidden=()), data, SVI(steps=1), seed=0)
        assert fit.module("network")(data["x"]).shape == (150, scores)


def test_rows_of_another_shape_are_refused_by_the_fit_and_by_the_network() -> None:
    data = _three_groups()
    fit = pg.fit(classifier(), data, SVI(steps=1), seed=0)
    with pytest.raises(ValueError, match=r"rows of shape \(2,\)"):
        fit.module("network")(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="expected labels|at site 'y'"):
        fit.evidence({"x": data["x"], "y": data["y"] + 5})
