"""A run of a program at one draw, in which its code sees the finite sites as it does where they are enumerated.

Each finite site is drawn as any other, and the statements below it are handed all of its values, on a dim of their own,
as enumeration hands them over. What they make of these has that dim too; each later site is read at the slot that was
drawn. So code that asserts on the shape of an enumerated value, or squeezes an axis off it, runs. Where handlers
outside enumerate some sites and give others a value, the latter alone are handed over so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.handlers.picked import Pick, Picked
from ppl_gen.handlers.private import HANDLERS

__all__ = ["Branches", "PlateNesting"]


class Branches(EnumMessenger):
    """Around the model, inside all other handlers; sites that these enumerate it leaves to them.

    Args:
        names: of the finite sites.
        nesting: how many dims the plates of the program take.
        program: what messages call it.

    Pyro's own bookkeeping decides on which dims values come, and which of them are in scope at a later site.

    >>> import pyro
    >>> locs = torch.tensor([-5.0, 5.0])
    >>> def model():
    ...     with pyro.plate("data", 3):
    ...         z = pyro.sample("z", dist.Categorical(torch.ones(2)))
    ...         assert z.shape == (2, 1)
    ...         pyro.sample("x", dist.Normal(locs[z.squeeze(-1)].unsqueeze(-1), 1.0))
    >>> nodes = pyro.poutine.trace(Branches(["z"], 1)(model)).get_trace().nodes
    >>> nodes["z"]["value"].shape, bool((nodes["x"]["fn"].mean == locs[nodes["z"]["value"]]).all())
    (torch.Size([3]), True)
    """

    def __init__(self, names: Collection[str], nesting: int, program: str = "program") -> None:
        super().__init__(first_available_dim=-1 - nesting)
        self.names, self.nesting, self.program = frozenset(names), nesting, program

    def __enter__(self) -> Any:
        self.enumerated = any(_summed_outside(name) for name in self.names)
        self._before: dict[str, dict[str, Any]] = {}  # what the program said at a site, until it is left
        self._drawn: dict[int, tuple[Tensor, frozenset[str]]] = {}  # by Pyro's id of a dim: slots, and their plates
        self._given: dict[int, int] = {}  # dims of sites with a value where others are enumerated, and their ids
        # Where others enumerate, dims go on from theirs.
        self.first_available_dim = None if self.enumerated else -1 - self.nesting
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], TorchDistributionMixin):
            return
        said = self._before[msg["name"]] = {**msg, "infer": dict(msg["infer"])}
        if not self.enumerated:
            self._enumerate(said, msg["name"] in self.names and not msg["is_observed"] and not msg["done"])
        pick = self._pick(msg)
        if msg["infer"].get("_deterministic"):
            said["noted"] = self._pick_deterministic(msg, pick)
            return
        for part in ("mask", "scale"):
            if isinstance(msg[part], Tensor) and pick.reaches(msg[part].dim()):
                msg[part] = pick(msg[part])
        if pick.reaches(len(msg["fn"].batch_shape)):
            msg["fn"] = _picked(msg["fn"], pick)
            if isinstance(msg["fn"], dist.Unit):
                said["noted"], msg["value"] = True, msg["value"].new_empty(msg["fn"].shape())

    def _pyro_post_sample(self, msg: Any) -> None:
        said, name = self._before.pop(msg["name"], None), msg["name"]
        if said is None:
            return
        free = name in self.names and not (msg["is_observed"] or said["done"])
        if self.enumerated and free and "_enumerate_dim" not in msg["infer"]:
            if "_markov_scope" in said["infer"]:
                self._refuse(name, "has a value of its own, in pyro.markov, while others are enumerated")
            self._enumerate(said, True)
            dim = said["infer"]["_enumerate_dim"]
            self._given[dim] = said["infer"]["_dim_to_id"][dim]
        if "_enumerate_dim" in said["infer"]:
            value = self._handed(name, said, msg["value"])
        elif said.get("noted"):  # at the slots drawn, and only for others
            value = said["value"]
        else:
            value = msg["value"]
            left = value.shape[: max(0, value.dim() - msg["fn"].event_dim - self.nesting)]
            if not self.enumerated and any(size > 1 for size in left):
                self._refuse(name, "has several draws at once, on dims that belong to enumeration,")
        self._remember(name, said, value)
        msg["value"] = value

    def _enumerate(self, said: dict[str, Any], drawn: bool) -> None:
        said["infer"].update(enumerate="parallel" if drawn else None, expand=False, num_samples=None)
        super()._pyro_sample(said)

    def _pick(self, msg: Any) -> Pick:
        """The slots that were drawn at the sites whose dims are in scope here."""
        frames = {f.name: f for f in msg["cond_indep_stack"] if f.vectorized}
        slots = {}
        for dim, number in (self._given if self.enumerated else self._param_dims.get(msg["name"], {})).items():
            if number in self._drawn:
                slot, plates = self._drawn[number]
                if slot.numel() > 1 and not plates <= frames.keys():
                    if self.enumerated:
                        self._refuse(msg["name"], "may read all members of a plate that it does not stand in")
                    continue  # a pick then refuses it, if it is read here
                slots[dim] = slot
        if self.enumerated and not slots:
            return Pick({}, 1000, 1000)  # nothing is to be picked
        return Pick(slots, self.nesting, max((-f.dim for f in frames.values()), default=0), others=self.enumerated)

    def _handed(self, name: str, said: Any, value: Tensor) -> Tensor:
        """Notes which slot was drawn, and gives what the program sees: all values; or, where all agree, that one.

        ``value``: batch shape x event; what is given has the dim of all values left of those of the plates.
        """
        fn, infer, table = said["fn"], said["infer"], said["value"]
        event = value.dim() - fn.event_dim
        flat = table.reshape(-1, *fn.event_shape)
        same = value.unsqueeze(event) == flat.reshape(-1, *fn.event_shape)
        hit = same.flatten(event + 1).all(-1) if fn.event_dim else same
        slot = hit.to(torch.uint8).argmax(-1)
        if torch._C._functorch.maybe_current_level() is None and not bool(hit.any(-1).all()):
            self._refuse(name, "has a value outside of its support")
        if any(size > 1 for size in slot.shape[: max(0, slot.dim() - self.nesting)]):
            self._refuse(name, "has several draws at once, on dims that belong to enumeration,")
        plates = frozenset(f.name for f in said["cond_indep_stack"] if f.vectorized and f.size > 1)
        self._drawn[infer["_dim_to_id"][infer["_enumerate_dim"]]] = slot, plates
        first = slot.reshape(-1)[0]
        agreed = (slot == first).all()
        return torch.where(agreed, flat[first].expand(table.shape), table)

    def _pick_deterministic(self, msg: Any, pick: Pick) -> bool:
        """Its value is noted at the slots drawn; which dims are an event the program need not say."""
        value, fn = msg["value"], msg["fn"]
        frames = {f.dim: f.size for f in msg["cond_indep_stack"] if f.vectorized}
        readings = [fn.event_dim] if fn.event_dim < value.dim() else range(value.dim())
        reaching = [event for event in readings if pick.reaches(value.dim() - event)]
        fits = [event for event in reaching if _fits(value.shape[: value.dim() - event], pick, frames)]
        if len(fits) > 1:
            self._refuse(msg["name"], f"is a value of shape {tuple(value.shape)} that can be read in several ways")
        for event in fits:
            msg["value"] = pick(value, event)
            msg["fn"] = dist.Delta(msg["value"], event_dim=event).mask(False)
        return bool(fits)

    def _remember(self, name: str, said: Any, value: Any) -> None:
        """As Pyro's own, without ``.data``, which torch.vmap refuses."""
        if name not in self._param_dims or not isinstance(value, Tensor):
            return
        batch = value.shape[: value.dim() - said["fn"].event_dim]
        ids = {**said["infer"].get("_dim_to_id", {}), **self._param_dims[name]}
        self._value_dims[name] = {dim: i for dim, i in ids.items() if len(batch) >= -dim and batch[dim] > 1}

    def _refuse(self, name: str, why: str) -> None:
        raise IncompatibleError(
            f"{self.program!r} runs with its finite sites enumerated, and not with them drawn. Here {name!r} {why}, "
            "which it cannot take. Write it for both: probs[z] or Vindex(probs)[..., z] broadcast over any shape of z"
        )


def _picked(fn: Any, pick: Pick) -> Any:
    if isinstance(fn, dist.Unit):
        return dist.Unit(pick(fn.log_factor.expand(fn.batch_shape)))
    if isinstance(fn, dist.MaskedDistribution):
        mask = fn._mask
        if isinstance(mask, Tensor):
            mask = pick(mask.expand(fn.batch_shape))
        inner = fn.base_dist
        return (_picked(inner, pick) if pick.reaches(len(inner.batch_shape)) else inner).mask(mask)
    return Picked(fn, pick)


def _fits(shape: Any, pick: Pick, plates: Any) -> bool:
    """Whether the dims of a shape are those of the plates and finite sites in scope."""
    for dim in range(-len(shape), 0):
        size = shape[dim]
        if size > 1 and (size != plates.get(dim) if dim >= -pick.nesting else dim not in pick.slots):
            return False
    return True


def _summed_outside(name: str) -> bool:
    """Whether a handler around the program enumerates sites, and hears of this one."""
    asked = {"type": "sample", "name": name, "is_observed": False, "infer": {}, "fn": None, "value": None}
    for handler in reversed(HANDLERS):
        if isinstance(handler, BlockMessenger):
            with contextlib.suppress(*PROGRAM_ERRORS):  # a function of the user's own may ask for more
                if handler.hide_fn(asked):
                    return False
        if isinstance(handler, EnumMessenger):
            return True
    return False


class PlateNesting(Messenger):
    """How many plates stand inside of each other, as far as a run comes."""

    nesting = 0

    def _pyro_sample(self, msg: Any) -> None:
        dims = [-frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized]
        self.nesting = max([self.nesting, *dims])
