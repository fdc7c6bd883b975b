"""What one density of a fitted program costs, counted in numbers and not in seconds: no machine moves a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.weights.densities import joint_densities
from ppl_gen.weights.sizes import is_view
from ppl_gen.workspace.isolation import without_side_effects

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["Work", "alone", "density_work"]

ROWS = 1000  # of which the work is counted, where rows can be separated
OPERATIONS = 20  # numbers made for each number of the data, as simple densities do
FLOPS = 200  # of products and convolutions that take as long as one number of the data
STEPS = 500_000  # operations that a judgement may cost where draws are taken one at a time
_known: WeakKeyDictionary[Any, Work] = WeakKeyDictionary()  # a fit does not change


@dataclass(frozen=True)
class Work:
    """``numbers`` of data on which a simple density costs as much as the program's on all of its data, and how many
    ``operations`` it takes to draw all latents and to compute it, which is what counts for small data."""

    numbers: int
    operations: int


def alone(fit: Fit, most: int) -> int:
    """How many draws can be judged one at a time: ``most``, fewer of a long program, and 100 at least."""
    return min(most, max(100, STEPS // max(1, density_work(fit).operations)))


def density_work(fit: Fit) -> Work:
    """What one draw of the latents and its density on all data cost; zeros where that is unknown.

    Counted at one draw of what was learned: what the operations of model and guide put out, and the arithmetic of
    products and convolutions. A network over the rows costs more than its data show, and so do data held in a closure.
    """
    if fit not in _known:
        _known[fit] = _counted(fit)
    return _known[fit]


def _counted(fit: Fit) -> Work:
    rows = fit.data.rows
    if fit.info.data_plate is not None and rows is not None and (rows > ROWS or fit.data.beyond_memory):
        head = fit.data.head(ROWS)
        few = _once(fit, head)
        if few is not None:
            return Work(few.numbers * rows // (head.rows or ROWS), few.operations)
    # A guide that holds parameters of every row is asked for all of them: once, as each judged draw does.
    return _once(fit, fit.data.most()) or Work(0, 0)  # who asks for the density itself hears why it has none


def _once(fit: Fit, batch: Batch) -> Work | None:
    """Of these rows; None where they have no density, or cannot be taken out of all rows."""
    counted = _Counted()
    names = {site.name for site in fit.info.select()}
    try:
        with fit.bound(), without_side_effects(), counted:
            draw = {n: torch.as_tensor(v) for n, v in fit.learned.draw(1, batch)[0].items() if n in names}
            joint_densities(fit, batch, [draw])
    except PROGRAM_ERRORS:
        return None
    return Work(counted.numbers // OPERATIONS + counted.flops // FLOPS, counted.operations)


class _Counted(TorchDispatchMode):
    """Sums what operations put out, views apart, and the arithmetic that torch's own counter knows."""

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # loads Triton where it is installed

        self.numbers = self.flops = self.operations = 0
        self._arithmetic = flop_registry

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import the compiler to switch it off

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.operations += 1
        if not is_view(func):
            self.numbers += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if func.overloadpacket in self._arithmetic:
            self.flops += int(self._arithmetic[func.overloadpacket](*args, **kwargs, out_val=result))
        return result
