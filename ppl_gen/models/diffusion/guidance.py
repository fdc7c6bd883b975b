r"""Rows of a diffusion model times any density: each step back is moved along the gradient of its logarithm."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ppl_gen.errors import require_callable, require_flag, require_whole
from ppl_gen.fits.result import Fit
from ppl_gen.models.diffusion.chain import Diffusion
from ppl_gen.models.diffusion.fitted import chain_of
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["guided_sample"]

_ROUNDING = 1e-3  # relative: what another batch may change
_FAR = 5.0  # times as far from the mean as any row of the data
_FEW = 0.02  # of the chains that carry the weight at some step: fewer, and the rows are copies of each other


def guided_sample(
    fit: Fit,
    log_density: Callable[..., Tensor],
    n: int,
    *,
    noisy: bool = False,
    correct: bool = True,
    seed: int | None = None,
) -> Tensor:
    r"""Draws of :math:`p(x) r(x) / Z`, the product of a fit of `denoising_diffusion` with a density r of one's own.

    .. math:: x_{t-1} \sim \mathrm{Normal}(\mu(x_t, t) + \sigma_t^2 \nabla \log h_t(x_t), \sigma_t^2), \quad
              h_t(x_t) = r(\hat x_0(x_t))

    r may be a classifier, ``lambda x: network(x).log_softmax(-1)[:, 3]``, a likelihood of measurements, or anything
    else that tells rows apart; it need not be normalised. Rows at a noisy step are judged by the x_0 that the predicted
    noise leaves, or, with ``noisy``, by a function that knows the time.

    The steps alone are a heuristic: right for small steps and an h_t that is E[r(x_0) | x_t], which r at one guess of
    x_0 is not (where r is narrow, or there is much noise, rows are pulled too hard). So the n chains are weighed for
    what the steps get wrong, and those of little weight give way (the twisted particle filter of Wu et al. 2023): for
    any h_t this is right as n grows, at any number of steps. The rows then are not independent.

    Args:
        fit: of `denoising_diffusion`.
        log_density: ``log_density(x)``: log r of rows in the user's units: rows. With ``noisy``, ``log_density(x, t)``:
            log h_t of noisy rows, middle + spread * x_t, at step t; t = 0 asks for log r of the rows themselves. Of a
            row it has to be a function of that row alone; networks in it are asked in evaluation mode.
        n: how many rows, and chains.
        noisy: whether ``log_density`` takes a time step.
        correct: whether the chains are weighed; without it the rows are independent and only near the product.
        seed: of the draws; the fit's own when None.

    Returns:
        n x shape of a row.

    Raises:
        TypeError: for a log density that is no function.
        ValueError: for one that does not give a finite number for each row, whose number for a row changes with other
            rows, with their order (``correct`` draws chains by weight) or from call to call, or that, without
            ``correct``, has no gradient.
        IncompatibleError: for a fit of another program.

    Warns:
        UserWarning: where at some step fewer than 2 % of the chains carried the weight, or, without
            ``correct``, where rows end far from all data.

    References:
        Deep unsupervised learning using nonequilibrium thermodynamics (Sohl-Dickstein et al., 2015), section 2.5.
        Diffusion models beat GANs on image synthesis (Dhariwal and Nichol, 2021).
        Practical and asymptotically exact conditional sampling in diffusion models (Wu et al., 2023).

    Example:
        >>> import ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import denoising_diffusion
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> fit = pg.fit(denoising_diffusion(steps=20, hidden=16), x, SVI(steps=5), seed=0)
        >>> rows = guided_sample(fit, lambda x: -0.5 * (x[:, 0] - 2.0) ** 2 / 0.5, 200)
        >>> bool(rows[:, 0].mean() > 1.0), bool(rows[:, 1].mean().abs() < 0.5)
        (True, True)
    """
    chain: Diffusion = chain_of(fit, Diffusion, "guided_sample", "denoising_diffusion")
    require_callable("log_density", log_density, "a function from rows to one number for each")
    require_whole("n", n)
    require_flag("noisy", noisy)
    require_flag("correct", correct)

    def height(state: Tensor, t: int) -> Tensor:
        if noisy:
            return _checked(log_density(chain.rows(state), t), n)
        return _checked(log_density(chain.rows(chain.start_in(state, t) if t else state)), n)

    with fit.bound(seed):
        state = torch.randn(n, *chain.middle.shape, device=fit.data.device)
        _refuse_company(lambda rows: height(rows, chain.steps).double(), state, ordered=not correct)
        log_weight, least = height(state, chain.steps).double(), float(n)
        for t in range(chain.steps, 0, -1):
            before, slope = _with_slope(height, state, t)
            if slope is None and not correct and float(before.max() - before.min()) > 0:
                raise ValueError(
                    "log_density: no gradient reaches the rows (.detach(), torch.no_grad(), NumPy or a comparison is "
                    "in the way), and without correct=True the gradient is all that moves them"
                )
            slope = torch.zeros_like(state) if slope is None else slope
            mean, scale = chain.reverse(state, t)
            moved = mean + scale**2 * slope
            after = moved + scale * torch.randn_like(state)
            if correct:
                wrong = ((after - moved) ** 2 - (after - mean) ** 2) / (2 * scale**2)
                log_weight = log_weight + wrong.flatten(1).sum(1) + height(after, t - 1) - before
                log_weight, after, size = _resampled(log_weight, after, last=t == 1)
                least = min(least, size)
            state = after
        rows = chain.rows(state)
        batch = fit.data.glimpse()
        known = chain.standard(batch.args[0] if batch.args else batch.kwargs["x"])
    far = float(state.abs().max())
    if not correct and not far <= _FAR * max(1.0, float(known.abs().max())):
        warnings.warn(
            f"guided_sample: some rows lie {far:.3g} standard deviations from the mean of the data: log_density is so "
            "steep that each step overshoots. Take correct=True, a wider log_density, or a fit with more steps",
            UserWarning,
            stacklevel=2,
        )
    if least < _FEW * n:
        warnings.warn(
            f"guided_sample: at some step {least:.1f} of {n} chains carried the weight, so that many rows are copies: "
            "take more rows, a wider log_density, or a fit with more steps",
            UserWarning,
            stacklevel=2,
        )
    return rows


def _refuse_company(height: Callable[[Tensor], Tensor], state: Tensor, *, ordered: bool) -> None:
    """Raise ValueError unless a row's number is that of the row alone; ``ordered``: each row may have its own r."""
    with without_side_effects():
        other = torch.randn_like(state)
        half, turned = len(state) - len(state) // 2, state.flip(0)
        first, again = height(state), height(state)
        beside = height(torch.cat([state[:half], other[half:]]))
        backwards = first if ordered else height(turned).flip(0)
    least = _ROUNDING * (1 + float(first.abs().max()))
    for found, wanted, why in (
        (again, first, "it gives other numbers when it is asked again"),
        (beside[:half], first[:half], "other rows change it (a mean over rows)"),
        (backwards, first, "the place of a row changes it, and chains are drawn by weight: take correct=False"),
    ):
        if float((found - wanted).abs().max()) > least:
            raise ValueError(f"log_density: expected log r of each row by itself, and {why}")


def _with_slope(height: Callable[[Tensor, int], Tensor], state: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
    """The log density of rows and its gradient in them, None where it has none."""
    with torch.enable_grad():
        leaf = state.detach().requires_grad_()
        value = height(leaf, t)
        if not value.requires_grad:  # it does not depend on the rows
            return value, None
        (slope,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    return value.detach(), slope


def _resampled(log_weight: Tensor, state: Tensor, *, last: bool) -> tuple[Tensor, Tensor, float]:
    """Weights, chains, and how many of these count; drawn by weight at the end, and where half of them have little."""
    weight = log_weight.softmax(0)
    size = float(1 / weight.square().sum())
    if not last and size > 0.5 * len(weight):
        return log_weight, state, size
    even = (torch.arange(len(weight), device=weight.device) + torch.rand((), device=weight.device)) / len(weight)
    chosen = torch.searchsorted(weight.cumsum(0), even.to(weight)).clamp(max=len(weight) - 1)
    return torch.zeros_like(log_weight), state[chosen[torch.randperm(len(weight))]], size


def _checked(value: Tensor, rows: int) -> Tensor:
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    if not isinstance(value, Tensor) or value.shape != (rows,):
        raise ValueError(f"log_density: expected one number for each of {rows} rows, got {got}")
    if not bool(value.isfinite().all()):
        raise ValueError("log_density: expected finite numbers, got NaN or infinity for some rows")
    return value
