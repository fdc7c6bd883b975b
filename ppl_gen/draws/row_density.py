r"""The latent sites of each row as one flat vector without constraints, and the log density of the rows in it.

.. math:: \ell_i(u_i) = \log p(x_i, z_i \mid \theta) + \log \left| \det \partial z_i / \partial u_i \right|,
          \quad z_i = T(u_i),

at given values of the globals, finite latents summed out. Rows are independent given the globals, so one run of the
program gives the density of every row at once; many draws of the globals go through it together (`torch.vmap`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import identity_transform

from ppl_gen.data.batching import Batch
from ppl_gen.enumeration.marginals import enumerated_trace, row_log_density
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.handlers.hidden import Hidden
from ppl_gen.handlers.placed_rows import Place, RowsInverted, RowsPlaced, Somewhere, Values
from ppl_gen.handlers.substitute import Substitute
from ppl_gen.program.info import ProgramInfo

__all__ = ["MAX_ELEMENTS", "RowDensity"]

MAX_ELEMENTS = 4_000_000  # numbers held at once for each input of the program


def _fixed(support: Any) -> bool:
    """Whether a support is the same whatever other sites are: no tensor is part of it."""
    parts = vars(support).values() if hasattr(support, "__dict__") else ()
    return not any(isinstance(p, Tensor) or (hasattr(p, "is_discrete") and not _fixed(p)) for p in parts)


class RowDensity:
    """Continuous latent sites of the rows of one batch, given draws of everything else.

    Args:
        model: the program's model.
        batch: the rows.
        info: the site table; it names the data plate and says how plates nest.
        draws: values of the sites that are known, one mapping for each draw.
        moved: the continuous sites inside the data plate whose density is wanted.
        sums: the finite ones, summed out.
        hidden: latent sites that no density depends on; they integrate to one.

    Raises:
        IncompatibleError: if the rows are not independent given the known sites; the site is named.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        batch: Batch,
        info: ProgramInfo,
        draws: Sequence[Values],
        *,
        moved: Collection[str],
        sums: Collection[str] = (),
        hidden: Collection[str] = (),
    ) -> None:
        self.model, self.batch, self.info = Hidden(hidden)(model), batch, info
        self.draws, self.sums = draws, tuple(sums)
        self.known = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        with Substitute(draws[0]):
            trace = poutine.trace(self.model).get_trace(*batch.args, **batch.kwargs)
        self.places = {n: self._place(node) for n, node in trace.nodes.items() if n in moved}
        self.fixed = all(place.fixed for place in self.places.values())
        inputs = [v.numel() for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]
        self.cells = max(sum(inputs), (batch.rows or 1) * self.width)
        first = self.flat({n: trace.nodes[n]["value"] for n in self.places}, 0)
        self._refuse_coupled(first)
        self.why = ""  # they do not go together
        self.together = self._goes_together(first)

    @property
    def width(self) -> int:
        """How many numbers each row has."""
        return sum(place.width for place in self.places.values())

    def _place(self, node: Any) -> Place:
        fn, discrete = node["fn"], bool(getattr(node["fn"].support, "is_discrete", False))
        transform = identity_transform if discrete else biject_to(fn.support)
        frame = next(f for f in node["cond_indep_stack"] if f.name == self.info.data_plate)
        shape = transform.inv(node["value"]).shape
        fixed = discrete or _fixed(fn.support)
        return Place(shape, len(fn.batch_shape) + frame.dim, frame.dim, fn.batch_shape, transform, fixed, discrete)

    def flat(self, values: Values, draw: int) -> Tensor:
        """T^-1 of values of the sites: rows x numbers; the edge of a support is moved inside."""
        if self.fixed:
            parts = {name: place.transform.inv(values[name]) for name, place in self.places.items()}
        else:
            lifted = RowsInverted(values, self.places)
            with lifted, Substitute({**self.draws[draw], **values}):
                self.model(*self.batch.args, **self.batch.kwargs)
            parts = lifted.parts
        whole = torch.cat([place.flat(parts[name]) for name, place in self.places.items()], -1)
        return whole.nan_to_num(0.0, 30.0, -30.0)

    def prior_point(self, draw: int) -> Tensor:
        """A draw of the sites from their prior: rows x numbers; somewhere in the support where a prior is flat."""
        with Substitute(self.draws[draw]), Somewhere():
            trace = poutine.trace(self.model).get_trace(*self.batch.args, **self.batch.kwargs)
        return self.flat({name: trace.nodes[name]["value"] for name in self.places}, draw)

    def _split(self, u: Tensor) -> dict[str, Tensor]:
        """Of ``u`` (rows x numbers) the part of each site, in the shape that it has without constraints."""
        pieces = u.split([place.width for place in self.places.values()], -1)
        return {n: place.whole(piece) for (n, place), piece in zip(self.places.items(), pieces, strict=True)}

    def _placed(self, known: Values, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The sites at ``u`` (rows x numbers) in their own shapes, and log |det| of the way there by row."""
        parts = self._split(u)
        if self.fixed:
            found = {name: self.places[name].at(part) for name, part in parts.items()}
            return {n: value for n, (value, _) in found.items()}, torch.stack([d for _, d in found.values()]).sum(0)
        placed = RowsPlaced(parts, self.places, known)
        with placed:
            self.model(*self.batch.args, **self.batch.kwargs)
        return placed.values, torch.as_tensor(placed.log_det)

    def values(self, u: Tensor) -> list[dict[str, Tensor]]:
        """The sites at ``u`` (draws x rows x numbers), one mapping for each of the first draws."""
        return [self._placed(draw, one)[0] for draw, one in zip(self.draws, u, strict=False)]

    def _one(self, known: Values, u: Tensor, *, prior: bool = False) -> Tensor:
        """Log densities of the rows in nats, shape (rows,), at one draw and one point (rows x numbers)."""
        values, log_det = self._placed(known, u)
        trace = enumerated_trace(
            self.model,
            self.batch.args,
            self.batch.kwargs,
            discrete=self.sums,
            values={**known, **values},
            plate_nesting=self.info.plate_nesting,
            varying=True,
        )
        seen = [name for name, node in trace.nodes.items() if node["type"] == "sample" and node["is_observed"]]
        return row_log_density(trace, self.info.data_plate, without=seen if prior else ()) + log_det

    def log_density(self, u: Tensor, draws: Tensor, *, prior: bool = False) -> Tensor:
        """Points x rows, in nats: of ``u`` (points x rows x numbers) at the known sites' draws of numbers ``draws``.

        Differentiable with respect to ``u``. ``prior`` leaves out what is observed.
        """
        one = partial(self._one, prior=prior)
        if not self.together:
            pairs = zip(draws.tolist(), u, strict=True)
            return torch.stack([one({n: v[s] for n, v in self.known.items()}, point) for s, point in pairs])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an operation without a batching rule costs time, no more
            known = {name: value[draws] for name, value in self.known.items()}
            found: Tensor = torch.vmap(one, chunk_size=max(1, MAX_ELEMENTS // self.cells))(known, u)
        return found

    def _goes_together(self, u: Tensor) -> bool:
        """Python that looks at drawn values takes one draw at a time; ``u`` is rows x numbers."""
        two, last = torch.stack([u, u + self._shift]), torch.tensor([0, len(self.draws) - 1])
        self.together = True
        try:
            together = self.log_density(two, last)
        except PROGRAM_ERRORS as error:
            self.why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return False
        alone = self._one(self.draws[-1], two[-1])
        self.why = "many draws at once give other densities than one at a time"
        return bool(torch.allclose(together[-1], alone, rtol=1e-3, atol=1e-3, equal_nan=True))

    @property
    def _shift(self) -> Tensor:
        """Elsewhere: by a tenth, counts by one."""
        return torch.cat([torch.full((p.width,), 1.0 if p.discrete else 0.1) for p in self.places.values()])

    def _refuse_coupled(self, u: Tensor) -> None:
        """The density of one row must not change with the latents of another; ``u`` is rows x numbers."""
        rows = len(u)
        if rows < 2:
            return
        half = (torch.arange(rows) % 2 == 0).unsqueeze(-1)
        before, after = self._one(self.draws[0], u), self._one(self.draws[0], torch.where(half, u, u + self._shift))
        even = half.squeeze(-1)
        if not torch.allclose(before[even], after[even], rtol=1e-4, atol=1e-4, equal_nan=True):
            raise IncompatibleError(
                f"the latent site(s) {', '.join(self.places)} of {self.info.name!r} couple its rows: the density of "
                "one row changes with the latents of another, so rows that were not fitted have no posterior of "
                "their own. Fit all rows together"
            )
