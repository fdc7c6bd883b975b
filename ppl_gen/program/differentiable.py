"""Whether gradients flow through the draws of a program: tried once, as the types of its sites do not tell."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.handlers.followed import Leaves
from ppl_gen.handlers.unobserved import unobserved

__all__ = ["leaves_below", "why_not_differentiable"]


def why_not_differentiable(
    model: Callable[..., Any], batch: Batch, observed: Collection[str], latent: Collection[str]
) -> str:
    """Why no gradient reaches the parameters (without any, the latent sites) from draws of the ``observed`` sites.

    Empty where some does, where nothing asks for one, and where the program cannot be run so. Call it inside
    `isolation.looking`. Sites without reparameterised draws count by their means, as the losses that compare draws
    take them.
    """
    from ppl_gen.handlers.carried import carried_values

    leaves = Leaves(latent)
    try:
        with torch.enable_grad(), leaves:
            trace, values = carried_values(unobserved(model), batch, observed)
            reached = leaves_below(values)
            kept = {id(leaf) for leaf in leaves.made}
            params = (node["value"] for node in trace.nodes.values() if node["type"] == "param")
            own = any(value.requires_grad for value in params)
            asked = [leaf for leaf in reached if id(leaf) not in kept] if own else reached
            slopes = _slopes(values, asked)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if "requires grad" in str(error) and "numpy()" in str(
            error
        ):  # torch's words where a value leaves it on the way
            return "values leave torch for numpy on the way to the observed sites, and with them the gradient"
        return ""
    if not (own or leaves.made) or any(bool((slope != 0).any()) for slope in slopes):
        return ""
    target, listed = "the parameters" if own else "the latent sites", ", ".join(sorted(observed))
    if not asked:
        return (
            f"no gradient connects draws of {listed} with {target}, as behind numpy, .item(), .detach() or a comparison"
        )
    return f"the gradient from draws of {listed} to {target} is zero, as behind torch.round, sign or floor"


def leaves_below(values: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that need a gradient from any of ``values``, registered with Pyro or not."""
    found, seen = dict[int, Tensor](), set[Any]()
    open_ends: list[Any] = []
    for value in values:
        if value.grad_fn is not None:
            open_ends.append(value.grad_fn)
        elif value.requires_grad:
            found[id(value)] = value
    while open_ends:
        node = open_ends.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        open_ends += [before for before, _ in node.next_functions if before is not None]
    return list(found.values())


def _slopes(values: Iterable[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a sum with random weights, in which terms do not cancel (probabilities add up to one)."""
    if not leaves:
        return []
    parts = [(value * torch.rand_like(value)).sum().double() for value in values if value.requires_grad]
    slopes = torch.autograd.grad(torch.stack(parts).sum(), leaves, allow_unused=True)
    return [slope for slope in slopes if slope is not None]
