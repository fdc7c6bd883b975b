"""What is said where batch norm meets a batch of one row, as one left over at the end of an epoch."""

from __future__ import annotations

from ppl_gen.fitting.run import Run

__all__ = ["is_lone_row", "lone_row"]

#: What torch's batch norm says of a single number in a channel, and that of flows.
_SAID = "Expected more than 1 value per channel when training"


def is_lone_row(error: BaseException) -> bool:
    """Whether an error is batch norm's on one row."""
    return _SAID in str(error)


def lone_row(run: Run, size: int | None) -> ValueError:
    """The error that names the size of the batches."""
    rows = f" ({run.data.rows} rows in batches of {size})" if size is not None else ""
    return ValueError(
        f"batch_size: batch norm takes the spread of a batch, and a batch of 1 row has none{rows}; take batches of 2 "
        "rows or more, the last one of an epoch too, or a norm that works on each row"
    )
