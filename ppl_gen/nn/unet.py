"""A small U-Net: from images, and numbers that tell the time, to images of the same shape."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

__all__ = ["UNet"]


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of at least four channels, where they can be had: statistics of rows, whatever the batch."""
    groups = next(n for n in (8, 4, 2, 1) if channels % n == 0 and channels // n >= min(4, channels))
    return nn.GroupNorm(groups, channels)


class _Block(nn.Module):
    """Two convolutions with the time between them, beside a short cut: the residual block of Ho et al. (2020)."""

    def __init__(self, before: int, after: int, clock: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.time = nn.Linear(clock, after)
        self.second = nn.Sequential(_norm(after), nn.SiLU(), nn.Conv2d(after, after, 3, padding=1))
        self.short = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, clock: Tensor) -> Tensor:
        return self.short(x) + self.second(self.first(x) + self.time(clock)[..., None, None])


class UNet(nn.Module):
    """Blocks at falling resolution and back up, each level joined to its own on the way down (Ronneberger 2015).

    Every level halves height and width (odd sizes lose their last line on the way down and get it back), and has twice
    the channels of the first. The last convolution starts at zero.

    Args:
        shape: (channels, height, width) of an image.
        width: channels of the first level.
        levels: how many resolutions.
        clock: numbers that tell the time.

    Example:
        >>> network = UNet((1, 7, 7), 8, 2, clock=4)
        >>> network(torch.randn(5, 1, 7, 7), torch.zeros(5, 4)).shape
        torch.Size([5, 1, 7, 7])
    """

    def __init__(self, shape: Sequence[int], width: int, levels: int, clock: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        told = 4 * width
        self.time = nn.Sequential(nn.Linear(clock, told), nn.SiLU(), nn.Linear(told, told), nn.SiLU())
        sizes = [width] + [2 * width] * (levels - 1)
        self.first = nn.Conv2d(shape[0], width, 3, padding=1)
        self.down = nn.ModuleList([_Block(a, b, told) for a, b in pairwise([width, *sizes])])
        self.middle = _Block(sizes[-1], sizes[-1], told)
        self.up = nn.ModuleList([_Block(a + b, b, told) for a, b in pairwise([sizes[-1], *sizes[::-1]])])
        last = nn.Conv2d(width, shape[0], 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.last = nn.Sequential(_norm(width), nn.SiLU(), last)

    def forward(self, x: Tensor, clock: Tensor) -> Tensor:
        """... x shape, and ... x clock (or clock alone: one time for all) -> ... x shape."""
        lead = x.shape[:-3]
        told = self.time(clock.expand(*lead, -1).reshape(-1, clock.shape[-1]) if clock.dim() > 1 else clock[None])
        state, kept = self.first(x.reshape(-1, *self.shape)), list[Tensor]()
        for i, block in enumerate(self.down):
            state = block(avg_pool2d(state, 2) if i else state, told)
            kept.append(state)
        state = self.middle(state, told)
        for block, beside in zip(self.up, reversed(kept), strict=True):
            if state.shape[-2:] != beside.shape[-2:]:
                state = interpolate(state, beside.shape[-2:], mode="nearest")
            state = block(torch.cat([state, beside], 1), told)
        return self.last(state).reshape(*lead, *self.shape)
