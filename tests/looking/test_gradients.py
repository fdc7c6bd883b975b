"""Saliency, deconvnets, guided backpropagation, occlusion and best pictures, beside computations by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.looking import activation_maximisation, deconvnet, guided_backprop, occlusion, saliency
from ppl_gen.models import autoencoder, m2, vae


def _tiny(seed: int = 0) -> nn.Sequential:
    """Two convolutions with rectifiers and a pool: small enough for a backward pass by hand."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 5),
    ).double()


def _images(rows: int = 3) -> Tensor:
    return torch.randn(rows, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _by_hand(net: nn.Sequential, x: Tensor, target: Tensor, rule: str) -> Tensor:
    """The signal on its way back through `_tiny`, each layer written out; ``rule`` says what a rectifier does."""
    first, second, last = net[0], net[3], net[6]
    a = functional.conv2d(x, first.weight, first.bias, padding=1)
    pooled, switches = functional.max_pool2d(a.clamp(min=0), 2, return_indices=True)
    b = functional.conv2d(pooled, second.weight, second.bias)

    def rectified(signal: Tensor, forward: Tensor) -> Tensor:
        if rule != "deconvnet":
            signal = signal * (forward > 0)
        return signal if rule == "gradient" else signal.clamp(min=0)

    signal = last.weight[target].reshape(b.shape)
    signal = functional.conv_transpose2d(rectified(signal, b), second.weight)
    signal = functional.max_unpool2d(signal, switches, 2)  # each where its maximum was
    return functional.conv_transpose2d(rectified(signal, a), first.weight, padding=1)


TARGET = torch.tensor([0, 3, 4])


def test_saliency_of_a_linear_score_is_the_size_of_its_weights() -> None:
    line = nn.Linear(6, 3).double()
    found = saliency(line, torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1]))
    assert torch.equal(found, line.weight[[0, 1, 2, 1]].abs())


def test_each_rule_is_that_of_a_backward_pass_by_hand() -> None:
    net, x = _tiny(), _images()
    found = {
        "gradient": saliency(net, x, TARGET),
        "deconvnet": deconvnet(net, x, TARGET),
        "guided": guided_backprop(net, x, TARGET),
    }
    wanted = {rule: _by_hand(net, x, TARGET, rule) for rule in found}
    wanted["gradient"] = wanted["gradient"].abs().amax(1)  # the largest over the channels
    for rule, value in found.items():
        # Sums of at most 100 products in float64: rounding alone.
        assert torch.allclose(value, wanted[rule], atol=1e-12), rule
    assert not torch.allclose(wanted["deconvnet"], wanted["guided"], atol=1e-3), "the rules differ on these rows"


def test_the_target_is_the_largest_score_unless_it_is_named() -> None:
    net, x = _tiny(), _images()
    assert torch.equal(saliency(net, x), saliency(net, x, net(x).argmax(1)))
    assert torch.equal(saliency(net, x, 2), saliency(net, x, [2, 2, 2]))


def test_a_channel_of_a_layer_is_sent_back_from_its_strongest_place() -> None:
    net, x = _tiny(), _images()
    found = deconvnet(net, x, 1, layer="3")
    first, second = net[0], net[3]
    a = functional.conv2d(x, first.weight, first.bias, padding=1)
    pooled, switches = functional.max_pool2d(a.clamp(min=0), 2, return_indices=True)
    b = functional.conv2d(pooled, second.weight, second.bias)
    signal = torch.zeros_like(b)
    for row in range(len(x)):
        place = b[row, 1].argmax()
        signal[row, 1].view(-1)[place] = 1.0
    signal = functional.max_unpool2d(functional.conv_transpose2d(signal, second.weight), switches, 2)
    wanted = functional.conv_transpose2d(signal.clamp(min=0), first.weight, padding=1)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert torch.count_nonzero(found[0].abs().sum(0)) <= 64  # 3 x 3 pooled places of 2 x 2, with a border of one pixel
    most = deconvnet(net, x, layer="3")
    assert torch.equal(most, deconvnet(net, x, b.flatten(2).amax(-1).argmax(1), layer="3"))


def test_pooling_puts_the_signal_where_the_maximum_was() -> None:
    net = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 1, 0], x[0, 0, 2, 3] = 1.0, 2.0
    assert deconvnet(net, x, 0).nonzero().tolist() == [[0, 0, 1, 0]]
    assert deconvnet(net, x, 3).nonzero().tolist() == [[0, 0, 2, 3]]


def test_rectifiers_in_place_and_used_twice() -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.one, self.two, self.act = nn.Linear(4, 6), nn.Linear(6, 6), act
            self.out = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.act(self.two(self.act(self.one(x)))))

    net, x = Twice(nn.ReLU()).double(), torch.randn(5, 4, dtype=torch.float64)
    inplace = Twice(nn.ReLU(inplace=True)).double()
    inplace.load_state_dict(net.state_dict())
    signal = net.out.weight[1].expand(5, 6).clamp(min=0)
    wanted = ((signal @ net.two.weight).clamp(min=0)) @ net.one.weight
    assert torch.allclose(deconvnet(net, x, 1), wanted, atol=1e-12)
    assert torch.allclose(deconvnet(inplace, x, 1), wanted, atol=1e-12) and inplace.act.inplace


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.out = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.act(self.one(x)) - 0.1))


def test_rectifiers_that_no_rule_can_reach_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of its 2 rectifiers are functions"):
        deconvnet(Functional(), torch.randn(3, 4))
    with pytest.raises(ValueError, match="no rectifier"):
        guided_backprop(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(3, 4))
    saliency(Functional(), torch.randn(3, 4))


def test_occlusion_of_a_sum_is_what_the_square_covered() -> None:
    # captum adds up in single precision: 1e-7 of sums up to 50.
    torch.manual_seed(0)
    weights = torch.randn(2, 6, 6, dtype=torch.float64)
    line = nn.Sequential(nn.Flatten(), nn.Linear(72, 1).double())
    line[1].weight.data = weights.reshape(1, -1)
    x = torch.rand(3, 2, 6, 6, dtype=torch.float64)
    lost = (weights * (x - 0.5)).sum(1)  # of each pixel, through both channels
    squares = functional.avg_pool2d(lost.unsqueeze(1), 2, divisor_override=1)
    whole = functional.interpolate(squares, scale_factor=2, mode="nearest")[:, 0]
    assert torch.allclose(occlusion(line, x, size=2, stride=2, grey=0.5), whole, atol=1e-5)
    # Squares that overlap: each pixel shows the mean over the squares on it.
    every = functional.avg_pool2d(lost.unsqueeze(1), 2, stride=1, divisor_override=1)
    spread = functional.conv_transpose2d(every, torch.ones(1, 1, 2, 2, dtype=torch.float64))
    counts = functional.conv_transpose2d(torch.ones_like(every), torch.ones(1, 1, 2, 2, dtype=torch.float64))
    assert torch.allclose(occlusion(line, x, size=2, stride=1, grey=0.5), (spread / counts)[:, 0], atol=1e-5)
    grey = x.mean((0, 2, 3), keepdim=True)
    lost = (weights * (x - grey)).sum(1)
    assert torch.allclose(occlusion(line, x, size=6), lost.sum((1, 2), keepdim=True).expand(3, 6, 6), atol=1e-5)


def test_the_best_picture_of_a_linear_score_is_its_weights_over_twice_the_penalty() -> None:
    line = nn.Linear(5, 3).double()
    found = activation_maximisation(line, (5,), [0, 2], penalty=0.25)
    # L-BFGS-B ends at a slope of 1e-5 in each coordinate; the curvature is 0.5.
    assert torch.allclose(found, line.weight[[0, 2]] / 0.5, atol=1e-4)
    edges = activation_maximisation(line, (5,), 1, penalty=0.0, low=0.0, high=1.0)
    assert torch.equal(edges, (line.weight[1] > 0).double())


def test_the_best_picture_of_a_network_beats_pictures_of_its_size() -> None:
    net = _tiny()
    best = activation_maximisation(net, (2, 8, 8), 3, penalty=0.05)
    others = torch.randn(500, 2, 8, 8, dtype=torch.float64)
    others *= best.norm() / others.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    gains = net(torch.cat([best[None], others]))[:, 3] - net(torch.zeros_like(best[None]))[0, 3]
    assert gains[0] > 2 * gains[1:].max() > 0


@pytest.mark.parametrize("view", [saliency, deconvnet, guided_backprop, occlusion])
def test_nothing_about_the_network_or_the_rows_changes(view) -> None:
    net, x = _tiny(), _images()
    net[1].train(), net[2].eval()
    modes = [part.training for part in net.modules()]
    kept, rows = {k: v.clone() for k, v in net.state_dict().items()}, x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = view(net, x)
    assert [part.training for part in net.modules()] == modes
    assert all(torch.equal(kept[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(x, rows) and not x.requires_grad and not found.requires_grad
    assert not any(part._forward_hooks or part._backward_hooks for part in net.modules())
    with torch.no_grad():
        assert torch.equal(view(net, x), found)


def test_many_rows_are_looked_at_in_pieces() -> None:
    net, x = _tiny(), _images(600)
    for view in (saliency, deconvnet):
        assert torch.allclose(view(net, x, 1)[[0, 300, 599]], view(net, x[[0, 300, 599]], 1), atol=1e-12)


def test_networks_of_fits_that_give_distributions() -> None:
    x = (torch.rand(12, 1, 8, 8) < 0.5).float()
    fit = pg.fit(vae(latent=2, hidden=(8,), network="convolutional"), x, SVI(steps=2), seed=0)
    found = saliency(fit.module("encoder"), x, 1)  # of the mean of the second number of the code
    assert found.shape == (12, 8, 8) and bool((found > 0).any())
    assert deconvnet(fit.module("encoder"), x[:2], 0).shape == (2, 1, 8, 8)
    coded = pg.fit(autoencoder(kind="convolutional"), x, SVI(steps=2), seed=0)
    assert guided_backprop(coded.module("encoder"), x[:2], 0).shape == (2, 1, 8, 8)
    flat = {"x": x.flatten(1), "y": torch.arange(12) % 2}
    classes = pg.fit(m2(classes=2, latent=2, hidden=(8,)), flat, SVI(steps=2), seed=0).module("classifier")
    logits = classes.logits(flat["x"].requires_grad_())
    (slope,) = torch.autograd.grad(logits[:, 1].sum(), flat["x"])
    assert torch.allclose(saliency(classes, flat["x"].detach(), 1), slope.abs(), atol=1e-6)


def test_scores_behind_a_softmax_are_refused() -> None:
    class Normalised(nn.Linear):
        def forward(self, x: Tensor) -> torch.distributions.Categorical:
            return torch.distributions.Categorical(logits=super().forward(x))

    with pytest.raises(TypeError, match="no longer has the scores before the softmax"):
        saliency(Normalised(3, 2), torch.rand(4, 3))
