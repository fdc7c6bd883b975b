"""Filters, maps, patches and their receptive fields, neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ppl_gen.looking import activation_maps, filters, nearest_images, top_patches
from ppl_gen.looking.fields import field_boxes


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 36, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


X = torch.rand(40, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def test_filters_and_maps_are_those_of_the_layer() -> None:
    net = _net()
    assert torch.equal(filters(net), net[0].weight) and filters(net, "3").shape == (6, 4, 3, 3)
    assert torch.equal(filters(net, "6"), net[6].weight)
    filters(net).zero_()
    assert bool(net[0].weight.any()), "a copy"
    assert torch.allclose(
        activation_maps(net, X), functional.conv2d(X, net[0].weight, net[0].bias, padding=1), atol=1e-6
    )
    assert torch.allclose(activation_maps(net, X, "2"), net[:3](X), atol=1e-6)


def _depends(net: nn.Module, layer: nn.Module, place: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    """By trial: change one pixel after the other of several images, and see whether the place notices."""
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, output: kept.append(output[:, :, place[0], place[1]]))
    noticed = torch.zeros(size, size, dtype=torch.bool)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(1, 1, size, size, generator=generator)
            changed = x.expand(size * size, 1, size, size).clone()
            # Far above all else, so that it is the maximum of its pool.
            changed.view(size * size, -1)[range(size * size), range(size * size)] += 20 * (-1) ** len(kept)
            net(torch.cat([x, changed]))
            moved = (kept[-1][1:] != kept[-1][:1]).any(1)
            noticed |= moved.reshape(size, size)
    hook.remove()
    lines, columns = noticed.nonzero(as_tuple=True)
    return int(lines.min()), int(lines.max()) + 1, int(columns.min()), int(columns.max()) + 1


class Skip(nn.Module):
    """Two ways of different width to the same place, a stride, a dilation, functions in place of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(2, 2, 3, padding=2, dilation=2)
        self.norm = nn.BatchNorm2d(2)
        self.join = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        h = self.join(h + self.norm(self.wide(h)))
        return functional.max_pool2d(h, 2, ceil_mode=True).flatten(1)


@pytest.mark.parametrize("place", [(0, 0), (2, 1), (3, 5), (5, 5)])
def test_receptive_fields_are_what_a_place_notices(place: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net, skip = _net().eval(), Skip().eval()
    assert field_boxes(net, "4", (1, 12, 12), [place]) == [_depends(net, net[4], place, 12)]
    assert field_boxes(skip, "join", (1, 12, 12), [place]) == [_depends(skip, skip.join, place, 12)]


def test_receptive_fields_by_the_formula() -> None:
    """Of a chain: field = 1 + sum (kernel - 1) * strides before; here 1 + 2 + 1 + 2 * 2 = 8 pixels."""
    boxes = field_boxes(_net(), "3", (1, 12, 12), [(2, 3), (0, 0)])
    assert boxes[0] == (2 * 2 - 3, 2 * 2 + 5, 2 * 3 - 3, 2 * 3 + 5), "from 2 u - 3 to 2 u + 4"
    assert boxes[1] == (0, 5, 0, 5), "cut at the border"


def test_top_patches_are_where_the_channel_is_strongest() -> None:
    net = _net()
    found = top_patches(net, X, channel=2, layer="3")
    maps = activation_maps(net, X, "3")[:, 2]
    strongest = maps.flatten(1).amax(1)
    assert torch.equal(found.rows, strongest.argsort(descending=True)[:9]) and len(set(found.rows.tolist())) == 9
    assert torch.equal(found.activations, strongest[found.rows]) and found.patches.shape == (9, 1, 8, 8)
    for k in range(9):
        top, bottom, left, right = found.boxes[k]
        line, column = found.places[k]
        assert maps[found.rows[k], line, column] == found.activations[k]
        inside = found.patches[k][~found.patches[k].isnan()]
        assert torch.equal(inside, X[found.rows[k], :, top:bottom, left:right].flatten())
        # The patch alone makes the response: the rest of the image may be anything.
        other = torch.full((1, 1, 12, 12), 7.0)
        other[0, :, top:bottom, left:right] = X[found.rows[k], :, top:bottom, left:right]
        again = activation_maps(net, other, "3")[0, 2, line, column]
        assert torch.isclose(again, found.activations[k], atol=1e-5)


def test_patches_at_a_border_stand_where_the_image_ends() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    conv.weight.data.fill_(1.0)
    x = torch.zeros(2, 1, 5, 5)
    x[0, 0, 0, 0], x[1, 0, 4, 4] = 3.0, 2.0
    found = top_patches(nn.Sequential(conv, nn.Flatten()), x, 0, count=5)
    assert found.patches.shape == (2, 1, 3, 3), "no more than there are images"
    first = found.patches[0, 0]
    assert found.places[0].tolist() == [0, 0] and bool(first[0].isnan().all() and first[:, 0].isnan().all())
    assert first[1, 1] == 3.0
    second = found.patches[1, 0]
    at = tuple(int(i) for i in (second == 2.0).nonzero()[0])
    assert at == (4 - int(found.places[1][0]) + 1, 4 - int(found.places[1][1]) + 1)


def test_neighbours_by_the_last_layer_and_by_pixels() -> None:
    net = _net()
    rows, training = X[:5], X
    found = nearest_images(net, rows, training)
    features = net[:8](training)
    far = torch.cdist(features[:5].double(), features.double())
    assert torch.equal(found.by_layer, far.topk(6, largest=False).indices)
    assert torch.allclose(found.layer_distances.double(), far.topk(6, largest=False).values, atol=1e-5)
    pixels = torch.cdist(rows.flatten(1).double(), training.flatten(1).double())
    assert torch.equal(found.by_pixels, pixels.topk(6, largest=False).indices)
    assert found.by_pixels[:, 0].tolist() == found.by_layer[:, 0].tolist() == list(range(5)), "itself first"
    named = nearest_images(net, rows, training, layer="7")
    assert torch.equal(named.by_layer, found.by_layer)
    output = nearest_images(net, rows, training, count=1, layer="")
    assert output.by_layer[:, 0].tolist() == list(range(5))
