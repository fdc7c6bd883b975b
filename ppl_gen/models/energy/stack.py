"""Boltzmann machines trained one upon the other: where deep networks of zeros and ones begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from ppl_gen.data.inputs import entries, row_width
from ppl_gen.errors import require_flag, require_seed
from ppl_gen.models.energy.helmholtz import checked_layers
from ppl_gen.models.energy.rbm import BoltzmannMachine, binary_rows, rbm
from ppl_gen.nn.chain_rows import ChainRows
from ppl_gen.nn.likelihoods import log_odds
from ppl_gen.program.extensions import Energy
from ppl_gen.program.program import Program, Recipe

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit
    from ppl_gen.fitting.algorithm import Algorithm

__all__ = ["check_widths", "machines_of", "rbm_stack"]


def rbm_stack(
    x: Any,
    hidden: Sequence[int] = (64, 32),
    algorithm: Algorithm | None = None,
    *,
    undirected: bool = False,
    seed: int = 0,
) -> tuple[Fit, ...]:
    r"""Boltzmann machines trained greedily: the first on the rows, each of the others on hidden units of the one below.

    A unit between two layers of a deep Boltzmann machine hears both, and here only one. So, ``undirected``, the first
    machine has its visible units twice and the last one its hidden units, with the same weights,

    .. math:: p(h_j = 1 | v) = \sigma(2 v^\top W + b)_j, \quad p(v_i = 1 | h) = \sigma(W h + a)_i

    for the first one, and for the last one the other way round; those between them learn twice the weights.

    Args:
        x: rows of zeros and ones, N x visible.
        hidden: hidden units of the machines, from the lowest to the top.
        algorithm: trains each of them; None: contrastive divergence, 2000 steps on batches of 100 at a rate of 0.01.
        undirected: whether the machines are to be layers of `dbm`; otherwise of `dbn`.
        seed: of everything random.

    Returns:
        Their fits, for ``layers=`` of `dbn` or `dbm`. Where units are there twice, so they are in the fit's rows.

    Raises:
        ValueError: for rows that are no zeros and ones, or an argument out of its range.
        TypeError: for an ``algorithm`` that is none.

    References:
        A fast learning algorithm for deep belief nets (Hinton, Osindero and Teh, 2006).
        Deep Boltzmann machines (Salakhutdinov and Hinton, 2009), section 3.1.

    Example:
        >>> import torch
        >>> from ppl_gen.inference import SVI, ContrastiveDivergence
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> [fit.module("machine").weight.shape for fit in rbm_stack(x, (4, 2), SVI(ContrastiveDivergence(), steps=5))]
        [torch.Size([3, 4]), torch.Size([4, 2])]
    """
    from ppl_gen.fits.driver import fit
    from ppl_gen.fitting.algorithm import Algorithm
    from ppl_gen.inference import SVI, ContrastiveDivergence

    require_flag("undirected", undirected)
    if algorithm is not None and not isinstance(algorithm, Algorithm):
        raise TypeError(
            f"algorithm: expected an algorithm such as SVI(ContrastiveDivergence()) or None, got {algorithm!r}"
        )
    sizes = checked_layers(hidden, 2 if undirected else 1)
    seed = require_seed(seed)
    (given,) = entries(x, "rbm_stack", "x")
    assert given is not None  # the first entry
    dtype = given.dtype if given.dtype in (torch.float32, torch.float64) else torch.get_default_dtype()
    rows = binary_rows(x, row_width(None, x, "rbm_stack"), "rbm_stack").to(dtype)
    chosen = algorithm
    if chosen is None:
        chosen = SVI(ContrastiveDivergence(), steps=2000, batch_size=min(100, len(rows)), lr=0.01)
    generator, fits = torch.Generator().manual_seed(seed), []
    for units, copies in zip(sizes, _copies(len(sizes), undirected), strict=True):
        fits.append(fit(_layer(units, copies), rows, chosen, seed=seed, progress=False))
        machine = fits[-1].module("machine")
        assert isinstance(machine, BoltzmannMachine)
        with torch.no_grad():
            chance = (copies[0] * rows @ machine.weight.to(rows) + machine.hidden_bias.to(rows)).sigmoid().cpu()
        rows = (torch.rand(chance.shape, generator=generator, dtype=chance.dtype) < chance).to(chance)
    return tuple(fits)


def _copies(count: int, undirected: bool) -> list[tuple[int, int]]:
    """How often visible and hidden units of each machine are there."""
    if not undirected:
        return [(1, 1)] * count
    return [(2, 1), *[(1, 1)] * (count - 2), (1, 2)]


def _layer(units: int, copies: tuple[int, int]) -> Recipe:
    if copies == (1, 1):
        return rbm(hidden=units)

    def build(data: Any) -> Program:
        rows = binary_rows(data, row_width(None, data, "rbm"), "rbm")
        machine = BoltzmannMachine(log_odds(rows), units, 0.01, copies)

        def model(x: Tensor) -> None:
            pyro.module("machine", machine)
            with pyro.plate("data", len(x)):
                pyro.sample("x", ChainRows(machine, 1000), obs=x.to(machine.weight).repeat(1, copies[0]))

        # No evidence and no way to coins: log p would be that of rows beside their copies.
        return Program(model, name="rbm", energy=Energy(machine.free_energy, machine.gibbs))

    return Recipe(build, name="rbm", arguments={"hidden": units, "copies": copies})


def machines_of(layers: Sequence[Fit], *, undirected: bool = False) -> list[BoltzmannMachine]:
    """The machines of a stack.

    Raises:
        TypeError: for what is no fit of `rbm`.
        ValueError: for machines that were trained for the other kind of network.
    """
    from ppl_gen.fits.result import Fit

    given: Any = layers  # whatever was passed
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(f, Fit) for f in given):
        raise TypeError(f"layers: expected fits of rbm, as rbm_stack gives them, got {layers!r}")
    found = []
    for fit in given:
        machine = fit.module("machine") if "machine" in fit.module_names else None
        if not isinstance(machine, BoltzmannMachine):
            raise TypeError(f"layers: expected fits of rbm, got a fit of {fit.program.name!r}")
        found.append(machine)
    copies = [machine.copies for machine in found]
    if copies != _copies(len(found), undirected):
        call = f"rbm_stack(x, hidden{', undirected=True' if undirected else ''})"
        raise ValueError(
            f"layers: expected the machines of {call}, got units that are there {copies} times (visible, hidden)"
        )
    return found


def check_widths(machines: Sequence[BoltzmannMachine], widths: Sequence[int]) -> None:
    """Raise ValueError unless the machines stand between layers of these widths."""
    shapes = [tuple(machine.weight.shape) for machine in machines]
    if shapes != list(zip(widths[:-1], widths[1:], strict=True)):
        raise ValueError(f"layers: expected machines between layers of {widths} units, got weights of shapes {shapes}")
