"""A lock on a folder that ends with the process that holds it, however it ends."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["locked"]


def locked(folder: Path) -> int | None:
    """A lock, as a handle to be closed by `os.close`; None where the system has none.

    Raises:
        BlockingIOError: where another holds it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     handle = locked(Path(folder))
    ...     try:
    ...         locked(Path(folder))
    ...     except BlockingIOError:
    ...         print("held")
    held
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle
