"""Plates whose size is at odds with the question: subsampled where all rows are asked for, or written out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger

from ppl_gen.errors import IncompatibleError
from ppl_gen.handlers.sites import is_subsample

__all__ = ["OnePlateEach", "RowsOf", "whole_plates"]


@contextlib.contextmanager
def whole_plates() -> Iterator[None]:
    """Inside, ``pyro.plate(name, size, subsample_size=...)`` takes all of its rows, in order.

    A subsample is a matter of training: its loss is unbiased, whereas an evidence or a posterior of some random rows is
    that of other data. Whatever kind of plate is opened, and however it was imported, its size is settled in one
    static method of Pyro's, which is stood in for; no handler can do it, since Pyro compares what handlers give with
    the ``subsample_size`` that was asked for.

    Raises:
        IncompatibleError: inside, for a plate that is handed some of its rows, ``subsample=...``: others are not there.
    """
    outer = SubsampleMessenger.__dict__["_subsample"]

    def all_rows(
        name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *rest: Any, **more: Any
    ) -> Any:
        if subsample is not None and size is not None and len(subsample) != size:
            raise _HandedError(
                f"pyro.plate({name!r}, {size}, subsample=...) is handed {len(subsample)} of its {size} rows, and the "
                "question is about all of them; leave subsample out, and give SVI(batch_size=...) for minibatches"
            )
        return outer.__func__(name, size, None if subsample is None else subsample_size, subsample, *rest, **more)

    SubsampleMessenger._subsample = staticmethod(all_rows)
    try:
        yield
    except _HandedError as error:
        raise IncompatibleError(str(error)) from None
    finally:
        SubsampleMessenger._subsample = outer


class _HandedError(Exception):
    """Not a ValueError on its way: Pyro's tracer would append a table of shapes to that."""


class RowsOf(Messenger):
    """Raises ValueError on leaving unless the plate has as many rows as the data that the program was run on.

    A plate of another size, written out or taken from a closure, broadcasts what does not depend on the data and
    trips over what does: its size is looked at as it is opened, and named in either case. ``advice``: why so.
    """

    def __init__(self, plate: str | None, rows: int | None, what: str = "the data", advice: str = "") -> None:
        super().__init__()
        self.plate, self.rows, self.what, self.advice = plate, rows, what, advice
        self.size: int | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.plate and is_subsample(msg):
            self.size = int(msg["fn"].size)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if self.fits or not (error is None or isinstance(error, Exception)):
            return
        if self.advice:
            said = f" and {self.what} has {self.rows}: {self.advice}"
        else:
            said = (
                ", written out in the program or taken from the rows it was fitted to, and "
                f"{self.what} has {self.rows}; write pyro.plate({self.plate!r}, len(x)), so that other numbers of "
                "rows fit too"
            )
        raise ValueError(f"pyro.plate({self.plate!r}) has {self.size} rows{said}") from error

    @property
    def fits(self) -> bool:
        return self.size is None or self.rows is None or self.size == self.rows


class OnePlateEach(Messenger):
    """Shows the first opening of each plate alone to what is outside; all later ones take the rows that it took."""

    def __enter__(self) -> Any:
        self.rows: dict[str, Any] = {}
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg) and msg["name"] in self.rows:
            msg["stop"] = True
            if msg["value"] is None:
                msg["value"], msg["done"] = self.rows[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            self.rows.setdefault(msg["name"], msg["value"])
