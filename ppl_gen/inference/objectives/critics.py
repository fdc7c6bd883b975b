"""Networks that tell two kinds of rows apart: a default one, what it must give, and what keeps it Lipschitz."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.nn.images import ConvolutionalCritic, is_image
from ppl_gen.workspace.isolation import without_side_effects

__all__ = [
    "Standardise",
    "check_critic",
    "check_output",
    "check_penalised",
    "data_penalty",
    "default_critic",
    "described_critic",
    "gradient_penalty",
    "largest_singular_value",
    "starting_vectors",
    "ties_rows",
    "weight_matrices",
]

_BLOCK = 4  # vectors of a power iteration


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
    (slope,) = torch.autograd.grad(critic(between.clone()).sum(), between, create_graph=True)
    return (torch.linalg.vector_norm(slope.flatten(1), dim=1) - 1.0).square().mean()


def data_penalty(critic: nn.Module, real: Tensor, scale: Tensor) -> Tensor:
    """E |scale grad T(x)|^2 / 2, a scalar, at ``real`` rows (rows x event): R1 of Mescheder et al. (2018).

    ``scale`` has the shape of a row; with the standard deviations of its columns, units of the data do not matter.

    Example:
        >>> flat = nn.Linear(2, 1)
        >>> _ = nn.init.constant_(flat.weight, 3.0)
        >>> data_penalty(flat, torch.zeros(4, 2), torch.tensor([1.0, 2.0])).item()  # (9 + 36) / 2
        22.5
    """
    at = real.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(critic(at.clone()).sum(), at, create_graph=True)  # its first layer may write
    return (slope * scale).flatten(1).square().sum(1).mean() / 2


def weight_matrices(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network that it may train as matrices from inputs to outputs, by name.

    Convolutions are reshaped to output channels x (input channels x kernel). The convolution can stretch its input by
    more than that matrix does, at most by the square root of the number of the kernel's places.

    Example:
        >>> {name: tuple(w.shape) for name, w in weight_matrices(nn.Conv2d(3, 8, 5)).items()}
        {'weight': (8, 75)}
    """
    found = {}
    for prefix, module in network.named_modules():
        transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        for name, weight in module.named_parameters(prefix, recurse=False):
            if weight.dim() >= 2 and weight.requires_grad:
                matrix = weight.detach()
                found[name] = (matrix.transpose(0, 1) if transposed else matrix).flatten(1)
    return found


def starting_vectors(matrix: Tensor) -> Tensor:
    """Where `largest_singular_value` begins, inputs x 4: the same for every matrix of that width."""
    numbers = torch.Generator().manual_seed(0)
    columns = min(_BLOCK, matrix.shape[1])
    return torch.randn(matrix.shape[1], columns, generator=numbers, dtype=torch.float64).to(matrix)


def largest_singular_value(matrix: Tensor, vectors: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """The largest singular value of M V, with V after some steps V <- orth(M'M V) of a block power iteration; and V.

    It is at most that of M, and rises to it. A block of four vectors, because the largest singular values of a network
    at its first weights lie close together: one vector alone is a thousandth off after thirty steps, and more.

    Example:
        >>> matrix = torch.diag(torch.tensor([3.0, 2.9, 1.0]))
        >>> largest_singular_value(matrix, starting_vectors(matrix), steps=30)[0]
        tensor(3.0000)
    """
    for _ in range(steps):
        vectors = torch.linalg.qr(matrix.mT @ (matrix @ vectors))[0]
    image = matrix @ torch.linalg.qr(vectors)[0] if steps == 0 else matrix @ vectors
    return torch.linalg.eigvalsh(image.mT @ image)[-1].clamp_min(0.0).sqrt(), vectors


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


class StandardisePixels(nn.Module):
    """Images as they are, minus the mean and over the standard deviation of all pixels of those it was made from."""

    loc: Tensor
    scale: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        scale = rows.std(correction=0)
        self.register_buffer("loc", rows.mean())
        self.register_buffer("scale", torch.where(scale > 0, scale, torch.ones_like(scale)))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.loc) / self.scale


def check_critic(name: str, critic: Any) -> None:
    """Raise TypeError, naming the argument, unless ``critic`` is a network or None."""
    if critic is not None and not isinstance(critic, nn.Module):
        hint = f"{critic.__name__}(...) (an instance)" if isinstance(critic, type) else "a torch network"
        raise TypeError(f"{name}: expected {hint} or None, got {critic!r}")


def default_critic(real: Tensor, *, rowwise: bool = False) -> nn.Module:
    """A network from rows (rows x event) to one number each, rows x 1: convolutional for images, else a perceptron.

    ``rowwise``: what it says of a row must not depend on the others, as under a gradient penalty: no batch norm.
    """
    if is_image(real.shape[1:]):
        return nn.Sequential(
            StandardisePixels(real), ConvolutionalCritic(real.shape[1:], norm="none" if rowwise else "batch")
        )
    width = 128
    layers = [nn.Linear(real[0].numel(), width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(Standardise(real), *layers, nn.Linear(width, 1))


def described_critic(real: Tensor, *, rowwise: bool = False) -> str:
    """The default critic of these rows in words, for `Fit.notes`."""
    if is_image(real.shape[1:]):
        size = " x ".join(map(str, real.shape[1:]))
        return f"convolutional network on {size} pixels, {'no' if rowwise else 'with'} batch norm (default)"
    return f"perceptron on {real[0].numel()} standardised column(s) (default)"


def check_output(critic: nn.Module, real: Tensor, name: str = "critic", outputs: int = 1) -> None:
    """Call the critic once in evaluation mode, where it changes nothing of its own."""
    if any(nn.parameter.is_lazy(p) for p in (*critic.parameters(), *critic.buffers())):
        raise ValueError(f"{name}: it has lazy layers without shapes; call it once on some rows before the fit")
    modes = {module: module.training for module in critic.modules()}
    critic.eval()
    try:
        with without_side_effects():
            shape = tuple(critic(real).shape)
    except (RuntimeError, ValueError) as error:  # both come from layers that refuse a shape
        raise ValueError(
            f"{name}: it cannot take the observed rows, a tensor of shape {tuple(real.shape)}: {error}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if shape not in (((len(real),), (len(real), 1)) if outputs == 1 else ((len(real), outputs),)):
        many = "one number" if outputs == 1 else f"{outputs} numbers"
        raise ValueError(f"{name}: expected {many} for each of {len(real)} rows, got a tensor of shape {shape}")


def ties_rows(critic: nn.Module) -> str | None:
    """The kind of its first layer that makes what it says of a row depend on the others (batch norm); None without.

    >>> ties_rows(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    'BatchNorm1d'
    """
    layers = (type(part).__name__ for part in critic.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    return next(layers, None)


def check_penalised(
    critic: nn.Module, real: Tensor, constraint: str, *, by_slope: bool = True, name: str = "critic"
) -> None:
    """Raise ValueError for a critic that cannot be bounded row by row, by its slope at rows or by its weights."""
    if normed := ties_rows(critic):
        raise ValueError(
            f"{name}: {normed} ties the rows of a batch together, so {constraint} does not bound what "
            "it says of each row; leave it out, or take LayerNorm or GroupNorm (of ConvolutionalCritic: norm='none')"
        )
    if not by_slope:
        return
    with without_side_effects(), torch.enable_grad():
        at = real.detach().clone().requires_grad_()
        score = critic(at.clone()).sum()
        (slope,) = torch.autograd.grad(score, at, allow_unused=True) if score.requires_grad else (None,)
    if slope is None:
        raise ValueError(f"{name}: {constraint} needs its slope, and no gradient of it reaches the rows")
