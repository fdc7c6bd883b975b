"""Compiling a text of C into a library of this process, by the compiler of the machine."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppl_gen.capture.c_source import CSource
from ppl_gen.capture.tape import RecordingRefused

__all__ = ["CFunction", "Place", "compiler"]

#: Loops become vector instructions; numbers stay as in the text, NaN and infinity included.
_FLAGS = ("-O2", "-ftree-vectorize", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing")
_NATIVE = ("-march=native", "-mprefer-vector-width=256")
_SECONDS = 120.0
_ALIGNED = 64

_ENTRY = """
void ppl_evaluate(const double *x, double *const *r, char *w, const char *const *k) { evaluate(x, r, w, k); }
"""


def compiler() -> list[str] | None:
    """The command of a C compiler: that of the environment variable CC, else cc, gcc or clang; None without one."""
    if sys.platform == "win32":
        return None
    if named := os.environ.get("CC"):
        command = shlex.split(named)
        return command if shutil.which(command[0]) else None
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return None if found is None else [found]


class Place:
    """What one thread needs to evaluate a function: workspace, constants and results, by their addresses."""

    def __init__(self, source: CSource) -> None:
        self._room = np.zeros(source.workspace + _ALIGNED, np.uint8)
        start = self._room.ctypes.data
        self.workspace = start + -start % _ALIGNED
        self._constants = source.constants
        addresses = [constant.ctypes.data for constant in source.constants]
        self._pointers = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        self.constants = ctypes.addressof(self._pointers)


@dataclass(frozen=True)
class CFunction:
    """A tape as compiled C. ``also`` is text of other functions that call its ``evaluate``.

    Called with an array of doubles, it gives the results as new arrays.

    >>> import torch
    >>> from ppl_gen.capture.c_source import c_source
    >>> from ppl_gen.capture.recorder import record
    >>> u = torch.tensor([1.0, 3.0], dtype=torch.float64)
    >>> source = c_source(record(lambda: ((u * u).sum(), 2.0 * u), [u]), u)
    >>> if compiler():
    ...     value, gradient = CFunction(source)(np.array([3.0, 4.0]))
    ...     assert (float(value), list(gradient)) == (25.0, [6.0, 8.0])

    Raises:
        RecordingRefused: without a compiler, or where it fails; the message holds what it says first.
    """

    source: CSource
    also: str = ""

    def __post_init__(self) -> None:
        self.symbol("ppl_evaluate")

    def symbol(self, name: str) -> Any:
        """A function of the library."""
        return getattr(_library(self.source.text + _ENTRY + self.also), name)

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        x = np.ascontiguousarray(x, np.float64)
        results = tuple(np.empty(shape) for shape in self.source.results)
        place = Place(self.source)
        to = (ctypes.c_void_p * max(1, len(results)))(*[result.ctypes.data for result in results])
        addresses = [x.ctypes.data, ctypes.addressof(to), place.workspace, place.constants]
        self.symbol("ppl_evaluate")(*map(ctypes.c_void_p, addresses))
        return results


@functools.lru_cache(64)
def _library(text: str) -> ctypes.CDLL:
    """The library of a text; one that was compiled in this process is taken again."""
    command = compiler()
    if command is None:
        raise RecordingRefused("C: there is no compiler (cc, gcc or clang; CC names another)")
    with tempfile.TemporaryDirectory(prefix="ppl_gen-c-") as folder:
        source, made = Path(folder) / "tape.c", Path(folder) / "tape.so"
        source.write_text(text)
        rest = ["-std=gnu11", "-w", "-shared", "-fPIC", "-o", str(made), str(source), "-lm"]
        said = ""
        for flags in ((*_FLAGS, *_NATIVE), _FLAGS):
            try:
                done = subprocess.run(
                    [*command, *flags, *rest], capture_output=True, text=True, timeout=_SECONDS, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise RecordingRefused(f"C: the compiler did not run: {type(error).__name__}") from error
            if done.returncode == 0:
                try:
                    return ctypes.CDLL(str(made))
                except OSError as error:
                    raise RecordingRefused(f"C: the compiled library cannot be loaded: {error}") from error
            said = next(iter(done.stderr.splitlines()), f"status {done.returncode}")
        raise RecordingRefused(f"C: the compiler failed: {said}")
