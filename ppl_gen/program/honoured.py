"""Whether a program does anything with the masks that it takes."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.data.masks import looks_like_mask
from ppl_gen.errors import IncompatibleError
from ppl_gen.program.program import Program
from ppl_gen.program.unlearned import responds
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["refuse_idle_masks"]


def refuse_idle_masks(program: Program, batch: Batch) -> None:
    """Turn each mask in the arguments over; a program that comes to the same densities does not read it.

    Raises:
        IncompatibleError: naming the argument: what it hides would be taken for data, without a word.
    """
    model = program.model.forward if isinstance(program.model, torch.nn.Module) else program.model
    arguments = dict(zip(inspect.signature(model).parameters, batch.args, strict=False)) | batch.kwargs
    entries = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    for name, value in entries.items():
        if not looks_like_mask(name, value, entries):
            continue
        other = {**arguments, name: _turned(value)}
        order = list(arguments)[: len(batch.args)]
        rest = {key: argument for key, argument in other.items() if key not in order}
        turned = replace(batch, args=tuple(other[key] for key in order), kwargs=rest)
        with without_side_effects():
            idle = not responds(program.model, batch, turned)
        if idle:
            raise IncompatibleError(
                f"data: {name!r} looks like a mask, and the program {program.name!r} accepts it but does not use it: "
                "no density of the model changes with it, so that its answers would be those of whole rows. Apply it "
                f"in the model, `with poutine.mask(mask={name}):` or `pyro.sample(..., obs=x, obs_mask={name})`, or "
                "leave it out"
            )


def _turned(value: Tensor) -> Any:
    return ~value if value.dtype is torch.bool else 1 - value
