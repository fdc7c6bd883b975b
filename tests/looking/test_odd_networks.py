"""Networks that work in place, cut the gradient, or pool in other ways; nothing about them or the rows may change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.looking import (
    activation_maps,
    activation_maximisation,
    adversarial_example,
    deconvnet,
    embed_layers,
    filters,
    guided_backprop,
    nearest_images,
    occlusion,
    saliency,
    top_patches,
)
from ppl_gen.looking.fields import field_boxes
from ppl_gen.models import vae

VIEWS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "saliency": lambda net, x: saliency(net, x, 1),
    "deconvnet": lambda net, x: deconvnet(net, x, 1),
    "guided": lambda net, x: guided_backprop(net, x, 1),
    "guided, of a channel": lambda net, x: guided_backprop(net, x, 1, layer="1"),
    "occlusion": lambda net, x: occlusion(net, x, 1),
    "maps": lambda net, x: activation_maps(net, x, "1"),
    "output": lambda net, x: activation_maps(net, x, ""),
    "patches": lambda net, x: top_patches(net, x, 1, "1", count=3).activations,
    "neighbours": lambda net, x: nearest_images(net, x, x.flip(0), 2).layer_distances,
    "adversarial": lambda net, x: adversarial_example(net, x, 1, steps=5, c=0.1, low=None, high=None).x,
    "embedding": lambda net, x: embed_layers(net, x, "mds", layers=["1", ""])["1"].scores["stress"],
    "best": lambda net, x: activation_maximisation(net, (1, 5, 7), 1),
}


def _in_place(*, inplace: bool) -> nn.Sequential:
    """The very first layer changes the rows, and what follows a convolution changes its maps."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.LeakyReLU(0.3, inplace=inplace),
        nn.Conv2d(1, 3, 3),
        nn.LeakyReLU(0.1, inplace=inplace),
        nn.ReLU(inplace=inplace),
        nn.Dropout(0.5, inplace=inplace),
        nn.Flatten(),
        nn.Linear(45, 4),
        nn.ReLU(inplace=inplace),
        nn.Linear(4, 3),
    )
    return net.double()


@pytest.mark.parametrize("name", VIEWS)
def test_layers_that_work_in_place_change_no_answer_and_no_row(name: str) -> None:
    x = torch.randn(6, 1, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept, plain, hasty = x.clone(), _in_place(inplace=False), _in_place(inplace=True)
    assert hasty.training
    found, wanted = VIEWS[name](hasty, x), VIEWS[name](plain, x)
    assert torch.equal(x, kept) and hasty.training
    assert all(part.grad is None for part in hasty.parameters())
    # captum's and L-BFGS's sums are the same ones in both networks.
    assert torch.allclose(torch.as_tensor(found), torch.as_tensor(wanted), atol=1e-12)


class Cut(nn.Module):
    """Scores that do not follow the rows by a gradient."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.act, self.line = how, nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.line(self.act(x))
        if self.how == "detached":
            return self.line(self.act(x.detach()))
        return self.line(self.act(torch.zeros_like(x)))


@pytest.mark.parametrize("how", ["no_grad", "detached", "constant"])
@pytest.mark.parametrize("name", ["saliency", "deconvnet", "guided", "adversarial", "best", "of a layer"])
def test_a_gradient_that_the_network_cuts_off_is_told(name: str, how: str) -> None:
    views = {
        **VIEWS,
        "adversarial": lambda net, x: adversarial_example(net, x, (net(x).argmax(1) + 1) % 3),
        "best": lambda net, x: activation_maximisation(net, (4,)),
        "of a layer": lambda net, x: deconvnet(net, x, layer="line"),
    }
    with pytest.raises(ValueError, match="does not follow x by a gradient"):
        views[name](Cut(how), torch.rand(3, 4))


@pytest.mark.parametrize("name", ["saliency", "output", "neighbours", "adversarial"])
def test_an_encoder_without_a_mean_is_refused_by_name(name: str) -> None:
    x = torch.rand(12, 6)
    recipe = vae(latent=2, hidden=(8,), posterior="planar", posterior_layers=1)
    encoder = pg.fit(recipe, x, SVI(steps=1), seed=0).module("encoder")
    views = {**VIEWS, "neighbours": lambda net, x: nearest_images(net, x, x, 2, layer="")}
    with pytest.raises(TypeError, match="TransformedDistribution, whose mean is not known in closed form"):
        views[name](encoder, x)


class Clamped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)


def test_a_clamp_at_zero_is_a_rectifier_that_no_rule_can_reach() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), Clamped(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="1 of its 2 rectifiers are functions"):
        deconvnet(net, torch.rand(3, 4))


class Gain(nn.Module):
    """A way around, whose gain starts at zero, and a maximum by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.gain = nn.Conv2d(1, 1, 5, padding=2), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, x + self.gain * self.wide(x)).clamp(max=0.1)


@pytest.mark.parametrize(
    ("net", "box"),
    [
        # The largest of 4 x 4 places of 3 x 3 pixels each, cut at the border.
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveMaxPool2d(2)), (0, 5, 0, 5)),
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(2)), (0, 5, 0, 5)),
        (nn.Sequential(nn.Identity(), Gain()), (0, 3, 0, 3)),
    ],
)
def test_fields_of_other_pools_and_of_gains_that_start_at_zero(net: nn.Module, box: tuple[int, ...]) -> None:
    kept = copy.deepcopy(net.state_dict())
    assert field_boxes(net, "1", (1, 8, 8), [(0, 0)]) == [box]
    assert all(torch.equal(kept[name], value) for name, value in net.state_dict().items())


class Among(nn.Module):
    """A score of each row that hangs on the others, or on chance, in evaluation mode too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        norm = nn.BatchNorm2d(3, track_running_stats=False) if kind == "norm" else nn.ReLU()
        self.kind, self.layers = (
            kind,
            nn.Sequential(nn.Conv2d(1, 3, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            x = x - x.mean(0)
        if self.kind == "dropout":
            x = nn.functional.dropout(x, 0.5)
        return self.layers(x)


ALONE = sorted(set(VIEWS) - {"best"})


@pytest.mark.parametrize(
    ("kind", "said"),
    [("norm", "changes with the rows beside"), ("mean", "changes with the rows beside"), ("dropout", "random numbers")],
)
@pytest.mark.parametrize("name", ALONE)
def test_a_network_whose_answer_about_a_row_is_not_of_that_row_is_refused(name: str, kind: str, said: str) -> None:
    """Of the first two a gradient is that of all rows, of the last a patch changes less than the next call."""
    x = torch.rand(6, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    net = Among(kind)
    with pytest.raises(ValueError, match=f"network: .*{said}"):
        VIEWS[name](net, x)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"network: .*{said}"):
        saliency(net, x, 1)
    assert torch.equal(state, torch.get_rng_state()) and net.training


def test_running_statistics_leave_each_row_alone() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(45, 3)
    )
    x = torch.rand(6, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    net(x)
    torch.testing.assert_close(saliency(net, x, 1)[:1], saliency(net, x[:1], 1))


class _Own(nn.Module):
    """Two rectifiers, the first of them a function."""

    def __init__(self, cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.cut, self.relu = cut, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.third(self.relu(self.second(self.cut(self.first(x)))))
        return found


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layer(x).mean(1))
        return found


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU6": nn.ReLU6(),
    "maximum": lambda h: torch.maximum(h, torch.zeros(())),
    "product": lambda h: h * (h > 0),
    "where": lambda h: torch.where(h > 0, h, 0.0),
    "fill": lambda h: h.masked_fill(h < 0, 0.0),
    "leaky without a leak": nn.LeakyReLU(0.0),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("view", [deconvnet, guided_backprop])
def test_rectifiers_by_other_names_are_refused(view: Callable[..., Tensor], cut: str) -> None:
    """Their rule would stay that of the gradient, without a word, beside one that is changed."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="1 of its 2 rectifiers are functions, or of another kind"):
        view(_Own(CUTS[cut]), x, 0)
    assert view(_Own(nn.Tanh()), x, 0).shape == x.shape, "others are sent back as they are"


def test_the_rectifier_inside_a_transformer_is_seen() -> None:
    """Without a gradient its layer runs as one operation, which hides it."""
    with pytest.raises(ValueError, match="1 of its 2 rectifiers are functions"):
        deconvnet(_Attention(), torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)), 0)


def test_filters_of_a_normed_convolution_in_training_leave_it_as_it_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(spectral_norm(nn.Conv2d(1, 4, 3))).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    shown = filters(net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items()) and net[0].training
    net.eval()
    assert torch.equal(shown, net[0].weight.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_single_and_not_optimised(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).to(dtype), torch.rand(5, 1, 4, 4)
    found = nearest_images(net, x, x, 1, layer="")
    assert found.by_layer[:, 0].tolist() == found.by_pixels[:, 0].tolist() == list(range(5))
    for asked in (lambda: adversarial_example(net, x, 1), lambda: activation_maximisation(net, (1, 4, 4), 1)):
        with pytest.raises(ValueError, match=f"network: expected one in single or double precision.*got {dtype}"):
            asked()
