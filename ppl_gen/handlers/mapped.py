"""Maps from all real numbers into supports: one more than torch knows, and a word on supports that have none."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import Transform, biject_to, transform_to
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint

from ppl_gen.errors import IncompatibleError

__all__ = ["mapped"]


@biject_to.register(MixtureSameFamilyConstraint)
@transform_to.register(MixtureSameFamilyConstraint)
def _of_a_mixture(support: Any) -> Transform:
    """That of its components, where it is the same for all of them."""
    if _varies(support.base_constraint):
        raise NotImplementedError(f"{support}: its components have supports of their own")
    return biject_to(support.base_constraint)


def _varies(support: Constraint) -> bool:
    parts = vars(support).values()
    return any(_varies(p) if isinstance(p, Constraint) else isinstance(p, Tensor) and p.numel() > 1 for p in parts)


def mapped(name: str, support: Any) -> Transform:
    """The map from all real numbers into the support of a latent site.

    Raises:
        IncompatibleError: naming the site, where there is none.
    """
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise IncompatibleError(
            f"the latent site {name!r}: there is no map from all real numbers into its support, {support}, in which "
            "chains and automatic guides could move. Derive it from sites over all numbers (pyro.infer.reparam has "
            "ProjectedNormalReparam for directions), write a mixture with its label as a Categorical site of its own, "
            "or give SVI a guide of your own that draws it"
        ) from error
