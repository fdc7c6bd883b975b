"""The potential in C, in the form in which nutpie calls it from its threads: without Python, and so beside each other.

nutpie calls two functions by their addresses: one gives the log density and its gradient, the other is told of every
draw. What they need and count lies in a `Session`, one for each chain.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppl_gen.capture.c_library import CFunction, Place
from ppl_gen.capture.c_source import CSource, c_source
from ppl_gen.capture.tape import RecordingRefused, Tape

__all__ = ["FLAT", "CPotential", "Session", "c_potential"]

#: nutpie scales by gradients, and takes none that is zero. The force may be anything for the draws to be exact, as
#: trajectories stay reversible and their points are weighed by the density.
FLAT = 1e-3

_CALLED = """
struct session {
  double *rows;
  int64_t length, warmup, thin, draws, done, gradients;
  char *workspace;
  const char *const *constants;
};

int64_t ppl_log_density(uint64_t size, const double *x, double *slope, double *log_density, void *given) {
  struct session *session = given;
  double potential;
  double *results[2] = {&potential, slope};
  int64_t bad = 0;
  session->gradients++;
  evaluate(x, results, session->workspace, session->constants);
  for (uint64_t i = 0; i < size; i++) {
    bad |= !isfinite(slope[i]);
    slope[i] = slope[i] == 0.0 ? FLAT : -slope[i];
  }
  *log_density = -potential;
  return bad ? 3 : isfinite(potential) ? 0 : 4;
}

int64_t ppl_drawn(uint64_t size, uint64_t kept, const double *x, double *out, void *given) {
  struct session *session = given;
  const int64_t after = ++session->done - session->warmup, draw = after / session->thin;
  if (after > 0 && after % session->thin == 0 && draw <= session->draws) {
    memcpy(session->rows + draw * session->length, x, size * sizeof(double));
    session->rows[0] = draw;
  }
  session->rows[1] = session->done;
  session->rows[2] = session->gradients;
  for (uint64_t i = 0; i < kept; i++) out[i] = 0.0;
  return 0;
}
""".replace("FLAT", repr(FLAT))


class Session(ctypes.Structure):
    """A chain as the C functions see it; ``done`` iterations and ``gradients`` are theirs to count."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("length", ctypes.c_int64),
        ("warmup", ctypes.c_int64),
        ("thin", ctypes.c_int64),
        ("draws", ctypes.c_int64),
        ("done", ctypes.c_int64),
        ("gradients", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        ("constants", ctypes.c_void_p),
    ]

    def __init__(self, potential: CPotential, rows: np.ndarray, warmup: int, thin: int, draws: int) -> None:
        self._place, self._rows = Place(potential.function.source), rows  # kept, as C knows only their addresses
        super().__init__(
            rows.ctypes.data, rows.shape[1], warmup, thin, draws, 0, 0, self._place.workspace, self._place.constants
        )


@dataclass(frozen=True)
class CPotential:
    """U and dU/du in C: called with a tensor, as other potentials are, or by nutpie at ``addresses``."""

    function: CFunction

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = self.function(u.detach().numpy())
        return torch.from_numpy(value), torch.from_numpy(gradient)

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the log density, and of what is told of draws."""
        found = [self.function.symbol(name) for name in ("ppl_log_density", "ppl_drawn")]
        density, drawn = (int(ctypes.cast(symbol, ctypes.c_void_p).value or 0) for symbol in found)
        return density, drawn


def c_potential(tape: Tape, u: Tensor) -> CPotential:
    """The potential of a tape that gives a number and a vector of the length of ``u``.

    Raises:
        RecordingRefused: where it cannot be written in C, or not be compiled.
    """
    source: CSource = c_source(tape, u)
    if source.results != ((), tuple(u.shape)):
        raise RecordingRefused("C: the tape gives something else than a number and its gradient")
    return CPotential(CFunction(source, _CALLED))
