"""Errors of torch and Pyro inside a program, told by the site that it had reached."""

from __future__ import annotations

from traceback import extract_tb
from types import TracebackType

import torch

from ppl_gen.data.batching import Batch
from ppl_gen.data.calls import is_number
from ppl_gen.handlers.last_site import LastSite
from ppl_gen.program.mixed import MixedDtypesError, of_another_dtype, speaks_of_dtypes
from ppl_gen.program.program import Program

__all__ = ["explained"]


class explained:
    """Context that rewords Pyro's shape errors: the site, what was found, and the edit that fixes it."""

    def __init__(self, program: Program, batch: Batch, what: str) -> None:
        self.program, self.batch, self.what, self.last = program, batch, what, LastSite()

    def __enter__(self) -> None:
        self.last.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.last.__exit__(kind, error, traceback)
        if error is None or not isinstance(
            error, ValueError | RuntimeError | TypeError | IndexError | AttributeError | AssertionError
        ):
            return
        text, where = str(error), self.last.said(error)
        head = f"the {self.what} of {self.program.name!r} failed on a dry run{where and f' ({where})'}: "
        if len(self.batch.args) == 1 and not self.batch.kwargs and is_number(self.batch.args[0]):
            raise ValueError(
                f"data {''.join(self.batch.order)!r}: expected rows along the first dimension, got a single number; "
                f"with it as a constant, {head}{text}"
            ) from error
        if isinstance(error, AssertionError):
            claim = text.partition("\n")[0] or extract_tb(error.__traceback__)[-1].line
            raise ValueError(f"{head}its own assertion does not hold: {claim}") from error
        if isinstance(error, NotImplementedError) and "does not support observe statements" in text:
            raise NotImplementedError(
                head + text.splitlines()[0] + "; for observed sites StableReparam (or, without skew, "
                "SymmetricStableReparam) does, or leave the site out of the reparameterisation"
            ) from error
        if isinstance(error, TypeError | AttributeError) and "NoneType" in text:
            raise TypeError(head + text + "; it needs what the data give as None") from error
        if any(words in text for words in ("on the same device", "device type", "expected device")):
            raise ValueError(
                head + "a tensor in its closure lives on another device than the data. Make it inside the model "
                f"(programs run under torch.device), or pass it as data with pg.constant(...).\n  torch says: {text}"
            ) from error
        if speaks_of_dtypes(error):
            raise MixedDtypesError(head + text.splitlines()[0] + self._casts()) from error
        if isinstance(error, IndexError) and "used as indices" in text:
            raise TypeError(head + text + "; an index is an integer: i.long(), or a discrete draw") from error
        if isinstance(error, IndexError):
            raise ValueError(
                head + text + "; an index goes beyond the rows it is given here, as with a plate whose size is "
                f"written out: use pyro.plate({self.program.data_plate!r}, len(x))"
            ) from error
        if "more than 1 value per channel" in text:
            raise ValueError(
                head + text.splitlines()[0] + "; batch norm takes the spread of a batch, and one row has none: pass 2 "
                "rows or more, or take a norm that works on each row"
            ) from error
        if "Multiple sample sites named" in text:
            raise ValueError(
                head + text.splitlines()[0] + "; every site needs a name of its own, and a plate that is opened twice "
                "is made once: `rows = pyro.plate(...)`, then `with rows:`"
            ) from error
        if "invalid log_prob shape: expected [] (its plates)" in text:
            raise ValueError(head + text.strip() + "\n" + self._advice_outside()) from error
        if "invalid log_prob shape" in text or "shape mismatch" in text.lower() or "broadcast" in text:
            raise ValueError(head + text.strip() + "\n" + self._advice(text)) from error
        if isinstance(error, TypeError) and "argument" in text and "missing" in text:
            raise TypeError(head + text + "; the data must hold that entry, or give the argument a default") from error
        if isinstance(error, ValueError) and "support" in text and "observed" in text.lower():
            raise ValueError(head + text) from error
        if hasattr(error, "add_note"):  # the program's own error stays what it is, and says on what it was run
            error.add_note(head + self._given())

    def _given(self) -> str:
        entries = {f"argument {i}": value for i, value in enumerate(self.batch.args)} | self.batch.kwargs
        tensors = ((n, v) for n, v in entries.items() if isinstance(v, torch.Tensor))
        return "it was given " + ", ".join(f"{n} of shape {tuple(v.shape)} ({v.dtype})" for n, v in tensors)

    def _casts(self) -> str:
        entries = {f"argument {i}": value for i, value in enumerate(self.batch.args)} | self.batch.kwargs
        tensors = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}
        listed = ", ".join(f"{n} ({v.dtype})" for n, v in tensors.items() if not v.is_floating_point())
        if listed:
            return f"; the data hold {listed}: compute with .float() of them"
        held = of_another_dtype(self.program.guide if self.what == "guide" else self.program.model)
        listed, mine = ", ".join(f"{n} ({dtype})" for n, dtype in held.items()), torch.get_default_dtype()
        outside = f"; made outside of the {self.what}: {listed}, and the fit computes in {mine}" if listed else ""
        other = torch.float32 if mine is torch.float64 else torch.float64
        return f"{outside}; cast with .to(x.dtype), or ask for dtype={other}"

    def _advice_outside(self) -> str:
        plate, rows = self.program.data_plate, self.batch.rows
        return (
            "  the site stands outside of every plate. Usual fixes:\n"
            "  - one draw of a vector: dist.Normal(zeros, scale).to_event(1) (NUTS and EM read it so by themselves)\n"
            f"  - a draw for each of the rows ({rows}): put it under `with pyro.plate({plate!r}, len(x)):`\n"
            "  - a draw for each of other things: a plate of their own, `with pyro.plate('groups', 8):`"
        )

    def _advice(self, text: str) -> str:
        plate, rows = self.program.data_plate, self.batch.rows
        return (
            f"  the rows ({rows}) are the last batch dimension inside pyro.plate({plate!r}, len(x)). Usual fixes:\n"
            f"  - a statement over rows outside every plate: put it under `with pyro.plate({plate!r}, len(x)):`\n"
            "  - dimensions to the right of the rows belong to the event: dist.Normal(loc, scale).to_event(1)\n"
            "  - a column (N, 1) against a vector (N,): use .squeeze(-1) or .to_event(1) on both sides\n"
            f"  - a plate whose size is written out: use pyro.plate({plate!r}, len(x))"
        )
