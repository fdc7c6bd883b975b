"""What one density of a fitted program costs, counted in numbers and not in seconds: no machine moves a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ppl_gen.diagnostics.densities import joint_densities
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.isolation import looking

if TYPE_CHECKING:
    from ppl_gen.result import Fit

__all__ = ["density_work"]

ROWS = 1000  # of which the work is counted, where rows can be separated
OPERATIONS = 20  # numbers made for each number of the data, as simple densities do
FLOPS = 200  # of products and convolutions that take as long as one number of the data
_known: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # a fit does not change


def density_work(fit: Fit) -> int:
    """Numbers of data on which a simple density costs as much as the program's on all of its data; 0 if unknown.

    Counted at one draw of what was learned: what the operations of model and guide put out, and the arithmetic of
    products and convolutions. A network over the rows costs more than its data show, and so do data held in a closure.
    """
    if fit not in _known:
        _known[fit] = _counted(fit)
    return _known[fit]


def _counted(fit: Fit) -> int:
    rows = fit.data.rows
    separable = fit.info.data_plate is not None and rows is not None and rows > ROWS
    batch = fit.data.head(ROWS) if separable else fit.data.batch()
    counted = _Counted()
    names = {site.name for site in fit.info.select()}
    try:
        with fit.bound(), looking(), counted:
            draw = {n: torch.as_tensor(v) for n, v in fit.learned.draw(1, batch)[0].items() if n in names}
            joint_densities(fit, batch, [draw])
    except PROGRAM_ERRORS:
        return 0  # who asks for the density itself hears why it has none
    work = counted.numbers // OPERATIONS + counted.flops // FLOPS
    return work * rows // ROWS if separable and rows is not None else work


class _Counted(TorchDispatchMode):
    """Sums what operations put out, views apart, and the arithmetic that torch's own counter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        views = (r.alias_info for r in func._schema.returns)
        if not any(alias is not None and not alias.is_write for alias in views):
            self.numbers += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if func.overloadpacket in flop_registry:
            self.flops += int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=result))
        return result
