"""Networks that tell two kinds of rows apart: a default one, what it must give, and what keeps it Lipschitz."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["Standardise", "check_output", "default_critic", "gradient_penalty"]


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """E (|grad T(x)| - 1)^2, a scalar, at random points x between ``real`` and ``fake`` rows (Gulrajani et al. 2017).

    Both are rows x event.

    Example:
        >>> flat = nn.Linear(2, 1)
        >>> _ = nn.init.constant_(flat.weight, 3.0)
        >>> gradient_penalty(flat, torch.zeros(4, 2), torch.ones(4, 2)).item()  # (3 sqrt 2 - 1)^2
        10.5147...
    """
    share = torch.rand((len(real), *[1] * (real.dim() - 1)), dtype=real.dtype, device=real.device)
    between = torch.lerp(fake, real, share).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (torch.linalg.vector_norm(slope.flatten(1), dim=1) - 1.0).square().mean()


class Standardise(nn.Module):
    """Rows flattened (rows x numbers), minus the mean and over the standard deviation of the rows it was made from."""

    loc: Tensor
    scale: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        flat = rows.flatten(1)
        scale = flat.std(0, correction=0)
        self.register_buffer("loc", flat.mean(0))
        self.register_buffer("scale", torch.where(scale > 0, scale, torch.ones_like(scale)))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - self.loc) / self.scale


def default_critic(real: Tensor) -> nn.Module:
    """A perceptron from rows (rows x event) to one number each: rows x 1."""
    width = 128
    layers = [nn.Linear(real[0].numel(), width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(Standardise(real), *layers, nn.Linear(width, 1))


def check_output(critic: nn.Module, real: Tensor) -> None:
    """Call the critic once in evaluation mode, where it changes nothing of its own."""
    if any(nn.parameter.is_lazy(p) for p in (*critic.parameters(), *critic.buffers())):
        raise ValueError("critic: it has lazy layers without shapes; call it once on some rows before the fit")
    modes = {module: module.training for module in critic.modules()}
    critic.eval()
    try:
        with without_side_effects():
            shape = tuple(critic(real).shape)
    except (RuntimeError, ValueError) as error:  # both come from layers that refuse a shape
        raise ValueError(
            f"critic: it cannot take the observed rows, a tensor of shape {tuple(real.shape)}: {error}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if shape not in ((len(real),), (len(real), 1)):
        raise ValueError(f"critic: expected one number for each of {len(real)} rows, got a tensor of shape {shape}")
