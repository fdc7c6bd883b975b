"""Ctrl-C and SIGTERM while a fit runs: noted at once, acted on where nothing is half done.

Python raises KeyboardInterrupt between any two instructions: in the middle of an optimiser's update, or of putting back
what a fit had changed. While `listening`, a first signal is only noted, and the loops ask for it between two steps;
where stopping anywhere does no harm (a recipe, a dry run, a k-means), the code is marked `allowed` and is left at once.
A second signal is never held back.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

__all__ = ["Heard", "allowed", "check", "hold", "listening", "notice", "taken", "telling"]


@dataclass(eq=False)
class Heard:
    """The last signal that came while someone listened; 0: none. A shell adds 128 to it for an exit code."""

    signal: int = 0


@dataclass
class _State:
    """Of the main thread, which is the only one that Python hands signals to."""

    holding: bool = False
    pending: bool = False
    listeners: list[Heard] = field(default_factory=list)
    told: list[Callable[[], object]] = field(default_factory=list)
    outermost: FrameType | None = None  # of the code that may be left


_AGAIN = 0.005  # seconds after which a signal comes again that found something half done
_STATE = _State()
_DEFAULTS: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def notice(number: int, frame: FrameType | None = None) -> None:
    """The handler: notes a signal where the first one is held back, raises KeyboardInterrupt otherwise."""
    for heard in _STATE.listeners:
        heard.signal = number
    for tell in _STATE.told:
        tell()
    if _STATE.holding and not _STATE.pending:
        _STATE.pending = True
    elif not _STATE.holding and _entering_or_leaving(frame):
        threading.Timer(_AGAIN, signal.raise_signal, [number]).start()
    else:
        _STATE.pending = False
        raise KeyboardInterrupt


def _entering_or_leaving(frame: FrameType | None) -> bool:
    """Whether a context manager is at work in the code that may be left: it would not put back what it changed."""
    while frame is not None and frame is not _STATE.outermost:
        if frame.f_code.co_name in ("__enter__", "__exit__"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def listening() -> Iterator[Heard]:
    """Hear Ctrl-C and SIGTERM inside, and hold back the first; handlers that are not the defaults are the user's.

    Without effect in other threads than the main one.

    >>> before = signal.getsignal(signal.SIGTERM)
    >>> with listening() as heard:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     taken(), heard.signal == signal.SIGTERM
    (True, True)
    >>> signal.getsignal(signal.SIGTERM) == before
    True
    """
    heard = Heard()
    if not _in_main_thread():
        yield heard
        return
    outer, _STATE.holding = _STATE.holding, True
    _STATE.listeners.append(heard)
    replaced = []
    try:
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) is default:
                replaced.append(number)
                signal.signal(number, notice)
        yield heard
    finally:
        _STATE.holding = True  # whatever was allowed inside, this is to be done to the end
        for number in replaced:
            signal.signal(number, _DEFAULTS[number])
        _STATE.listeners.remove(heard)
        _STATE.holding = outer
        if not _STATE.listeners:
            _STATE.pending = False


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """Code that may be left anywhere: a signal, also one noted before, raises KeyboardInterrupt in it."""
    if not _in_main_thread():
        yield
        return
    outer = _STATE.holding, _STATE.outermost
    check()
    try:
        _STATE.outermost, _STATE.holding = sys._getframe(2), False
        yield
    finally:
        _STATE.holding, _STATE.outermost = outer


def hold() -> None:
    """From here to the end of the surrounding `allowed`, a first signal is only noted: ask for it with `check`."""
    if _in_main_thread() and _STATE.listeners:
        _STATE.holding = True


def check() -> None:
    """Raise KeyboardInterrupt if a signal was noted."""
    if taken():
        raise KeyboardInterrupt


def taken() -> bool:
    """Whether a signal was noted; it is not any more."""
    if not _in_main_thread():
        return False
    was, _STATE.pending = _STATE.pending, False
    return was


@contextlib.contextmanager
def telling(tell: Callable[[], object]) -> Iterator[None]:
    """Call ``tell()`` as soon as a signal comes: other processes may have to hear of it."""
    _STATE.told.append(tell)
    try:
        yield
    finally:
        _STATE.told.remove(tell)
