"""Names of Pyro that are not public, imported in one place; `tests/handlers/test_canaries.py` watches each."""

from pyro.infer.traceenum_elbo import _compute_dice_elbo as dice_elbo
from pyro.infer.util import require_backward, shared_intermediates
from pyro.poutine.messenger import _bound_partial as BoundHandler
from pyro.poutine.runtime import _PYRO_STACK as HANDLERS

__all__ = ["HANDLERS", "BoundHandler", "dice_elbo", "require_backward", "shared_intermediates"]
