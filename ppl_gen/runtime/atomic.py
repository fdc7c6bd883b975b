"""Replacing files and folders in one step: whoever reads, and whenever a process dies, there is the old or the new one.

A folder cannot be renamed over a full one, so it is not renamed at all. It holds its contents in a folder of their own,
under a name used once, and one small file that names them, the *pointer*. New contents are written beside the old ones;
the pointer is then replaced by `os.replace`, which is one step on every system; only then are the old ones removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from ppl_gen.errors import require_spelt

__all__ = ["as_path", "atomically", "is_contents", "replace_file"]

_OWNER = ".writing.json"  # in contents that are being written: by whom
_CONTENTS = re.compile(r"contents-[0-9a-f]{12}")
_CLAIM = 60.0  # seconds after which a claim (a folder and a note of some bytes) was not finished because of a kill
_UNKNOWN = 3600.0  # the same where the note cannot be read
_ELSEWHERE = 7 * 24 * 3600.0  # the same where another machine is said to write them: its processes cannot be seen
_mine: set[str] = set()  # contents that this process is writing now


def as_path(path: object, name: str = "path") -> Path:
    """A path from text or a `Path`; raises TypeError for anything else, ValueError for one that cannot be."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name}: expected text or a Path, got {type(path).__name__}")
    require_spelt(name, path)
    return Path(path).expanduser()


def is_contents(name: str) -> bool:
    """Whether ``name`` is one that `atomically` gives to contents."""
    return _CONTENTS.fullmatch(name) is not None


def atomically(path: Path, pointer: str, kind: str, write: Callable[[Path], str]) -> Path:
    """Make ``path`` a folder of new contents, in one step: its old ones are there until then, and afterwards gone.

    Args:
        path: the folder; its parents are made where they lack.
        pointer: the name of the file in it that names the contents.
        kind: what such a folder is called in messages.
        write: fills the new contents, ``path / contents-...``, and gives the text of the pointer.

    Returns:
        The absolute path.

    Raises:
        ValueError: if ``path`` is a file, lies below one, or is a folder of other things.

    Whatever ``write`` raises passes on, and leaves the folder as it was. What processes that have died left half
    written is removed. Two processes that write at once do not mix: the last one stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = atomically(Path(folder) / "a", "at", "note", lambda new: (new / "b").write_text("c") and new.name)
    ...     (made / (made / "at").read_text() / "b").read_text()
    'c'
    """
    path = path.absolute()
    _check_place(path, pointer, kind)
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    _sweep(path, pointer)
    new = path / f"contents-{uuid.uuid4().hex[:12]}"
    _mine.add(new.name)
    try:
        _claim(new)
        text = write(new)
        _sync_below(new)
        before = _pointed(path / pointer)
        replace_file(path / pointer, text, beside=new)
        _sync(path.parent)
        (new / _OWNER).unlink(missing_ok=True)
    except BaseException:
        if new.name not in _pointed(path / pointer):  # an interrupt may come when it is already done
            shutil.rmtree(new, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    finally:
        _mine.discard(new.name)
    for old in path.iterdir():
        if is_contents(old.name) and old.name in before and old.name not in _pointed(path / pointer):
            shutil.rmtree(old, ignore_errors=True)
    return path


def replace_file(path: Path, content: str | bytes, *, beside: Path | None = None) -> None:
    """Write a file in one step, on the disk before the old one is gone; ``beside`` is where it is made."""
    new = (beside or path.parent) / f".{path.name}-{uuid.uuid4().hex[:12]}.tmp"
    try:
        with open(new, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _check_place(path: Path, pointer: str, kind: str) -> None:
    if files := [folder for folder in (path, *path.parents) if folder.exists() and not folder.is_dir()]:
        where = "" if files[0] == path else f", so {path} cannot be made"
        raise ValueError(f"path: {files[0]} is a file{where}; choose another folder")
    if path.exists() and not (path / pointer).exists():
        if any(not is_contents(file.name.removeprefix(".")) for file in path.iterdir()):
            raise ValueError(f"path: {path} exists and is not a saved {kind}; choose a new folder")


def _claim(new: Path) -> None:
    """Make the folder with a note of who writes it; without the note it is nobody's, so it has it from the first."""
    begun = new.with_name(f".{new.name}")
    begun.mkdir()
    try:
        owner = {"host": socket.gethostname(), "process": os.getpid(), "time": time.time()}
        (begun / _OWNER).write_text(json.dumps(owner))
        os.rename(begun, new)
    except BaseException:
        shutil.rmtree(begun, ignore_errors=True)
        raise


def _pointed(pointer: Path) -> str:
    """The text of the pointer: names that stand in it are in use."""
    try:
        return pointer.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _sweep(path: Path, pointer: str) -> None:
    """Remove what nothing points at, where it is sure that nobody is writing it."""
    for file in path.iterdir():
        if is_contents(file.name[1:]) and file.name[0] == "." and _age(file) > _CLAIM:
            shutil.rmtree(file, ignore_errors=True)
        elif is_contents(file.name) and not file.is_symlink() and file.name not in _mine and _left_over(file):
            if file.name not in _pointed(path / pointer):  # read last: who is dead by now points no more
                shutil.rmtree(file, ignore_errors=True)


def _left_over(contents: Path) -> bool:
    """Whether these are complete, or their writer is dead: then they are of use only if they are pointed at."""
    try:
        owner = json.loads((contents / _OWNER).read_text())
        host, process, began = str(owner["host"]), int(owner["process"]), float(owner["time"])
    except FileNotFoundError:
        return True
    except (ValueError, KeyError, TypeError, OSError):
        return _age(contents) > _UNKNOWN
    if host != socket.gethostname():
        return time.time() - began > _ELSEWHERE
    return process == os.getpid() or not _alive(process)


def _alive(process: int) -> bool:
    if process <= 0:
        return False
    if os.name == "nt":  # there, signal 0 ends a process: ask for what it says of itself instead
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _sync_below(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place) / name)
        _sync(Path(place))


def _sync(path: Path) -> None:
    """On the disk, not only on its way there; systems that cannot sync a folder do without."""
    if os.name == "nt" and path.is_dir():
        return
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
