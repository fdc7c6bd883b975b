"""A folder of numbered records, tensors in safetensors and the rest JSON: the newest, and the one before it.

A record is complete when its JSON file is there, which is put in place last and in one step, and which holds the hash
of the file of tensors. The two newest are kept, so that a kill at any moment, or a damaged file, leaves one to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppl_gen.runtime.atomic import replace_file
from ppl_gen.runtime.locks import locked
from ppl_gen.runtime.trees import decode, encode

__all__ = ["Numbered", "Record"]

FORMAT = 1
_NAME = re.compile(r"(\d{6,})\.(json|safetensors)")
_TEMPORARY = re.compile(r"\.\d{6,}\.(json|safetensors)-[0-9a-f]{12}\.tmp")
_LARGEST = 2**28  # bytes of JSON; more is no record of ours


@dataclass(frozen=True)
class Record:
    """A record: facts in plain JSON, a tree (see `ppl_gen.runtime.trees`), and why newer ones were not read."""

    number: int
    facts: dict[str, Any]
    tree: Any
    damaged: str = ""


@dataclass
class Numbered:
    """The records in ``path``; ``argument`` and ``kind`` are what messages call the folder and a record.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as place:
    ...     records = Numbered(Path(place) / "run")
    ...     for step in range(4):
    ...         records.write({"step": step}, {"mean": torch.full((2,), float(step))})
    ...     found = Numbered(Path(place) / "run").read()
    ...     sorted(file.name for file in (Path(place) / "run").iterdir()), found.facts, found.tree["mean"].tolist()
    (['000003.json', '000003.safetensors', '000004.json', '000004.safetensors'], {'step': 3}, [3.0, 3.0])
    """

    path: Path
    argument: str = "path"
    kind: str = "checkpoint"
    others: re.Pattern[str] | None = None  # names of folders that stand here with the records
    _lock: int | None = field(default=None, init=False)

    def check_place(self) -> None:
        """Raise ValueError where the folder cannot be made, or holds other things than records."""
        for folder in (self.path, *self.path.parents):
            if folder.exists():
                if not folder.is_dir():
                    where = "" if folder == self.path else f", so {self.path} cannot be made"
                    raise ValueError(f"{self.argument}: {folder} is a file{where}; choose another folder")
                break
        # Hidden files are the system's: of a file browser, or of a network disk on which a file is still open.
        strange = [f.name for f in self._entries() if not self._is_ours(f) and not f.name.startswith(".")]
        if strange:
            raise ValueError(
                f"{self.argument}: {self.path} holds {strange[0]!r}, which is no {self.kind}; choose a new folder"
            )

    def _entries(self) -> list[Path]:
        return sorted(self.path.iterdir()) if self.path.is_dir() else []

    def _is_ours(self, file: Path) -> bool:
        names = [_NAME, _TEMPORARY, *([self.others] if self.others is not None else [])]
        return any(pattern.fullmatch(file.name) for pattern in names)

    def claim(self, patience: float = 0.0) -> None:
        """Make the folder and keep other processes from writing here until `release`, or the end of this process.

        ``patience``: seconds to wait for another, which may be about to end.

        Raises:
            ValueError: where another writes here.
        """
        self.check_place()
        self.path.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + patience
        while True:
            try:
                self._lock = locked(self.path)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    raise ValueError(
                        f"{self.argument}: another run writes its {self.kind}s in {self.path} at this moment; wait for "
                        "it, or choose another folder"
                    ) from error
            time.sleep(0.05)
        for file in self._entries():
            if _TEMPORARY.fullmatch(file.name):
                file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def claimed(self, patience: float = 0.0) -> Iterator[None]:
        """`claim` on entering, `release` on leaving."""
        self.claim(patience)
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Let others write here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _numbers(self, suffix: str) -> list[int]:
        matches = (_NAME.fullmatch(file.name) for file in self._entries())
        return sorted((int(m[1]) for m in matches if m is not None and m[2] == suffix), reverse=True)

    def _file(self, number: int, suffix: str) -> Path:
        return self.path / f"{number:06d}.{suffix}"

    def read(self) -> Record | None:
        """The newest record that is whole; None where there is none at all.

        Raises:
            ValueError: where all that there are are damaged; the first reason is given.
        """
        reasons: list[str] = []
        for number in self._numbers("json"):
            try:
                facts, tree = self._read(number)
                return Record(number, facts, tree, "; ".join(reasons))
            except (ValueError, OSError) as error:
                reasons.append(str(error))
        if reasons:
            raise ValueError(
                f"{self.argument}: no {self.kind} in {self.path} can be read: {reasons[0]}. Remove the folder to begin "
                "anew"
            )
        return None

    def _read(self, number: int) -> tuple[dict[str, Any], Any]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        file, data = self._file(number, "json"), self._file(number, "safetensors")
        try:
            outer = _plain_json(file)
            content = outer["content"]
            whole = outer["format"] == FORMAT and _digest(json.dumps(content).encode()) == outer["digest"]
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} is damaged") from error
        if not whole:
            found = repr(outer.get("format"))[:40]
            other = f" has format {found}, and this version reads {FORMAT}"
            raise ValueError(f"{file}{' is damaged' if outer['format'] == FORMAT else other}")
        raw = _bytes(data, content["digest"])
        try:
            tree = decode(content["tree"], load(raw))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{data} is no file of a {self.kind}: {error}") from error
        if not isinstance(content["facts"], dict):
            raise ValueError(f"{file} is no file of a {self.kind}")
        return content["facts"], tree

    def write(self, facts: Mapping[str, Any], tree: Any) -> None:
        """Add a record, on the disk when this returns, and remove all but the one before it."""
        from safetensors.torch import save

        self.path.mkdir(parents=True, exist_ok=True)
        known = self._numbers("json")
        number = max([0, *known, *self._numbers("safetensors")]) + 1
        value, tensors = encode(tree)
        raw = save(tensors)
        content = json.dumps({"facts": dict(facts), "tree": value, "digest": _digest(raw)}, allow_nan=False)
        replace_file(self._file(number, "safetensors"), raw)
        outer = f'{{"format": {FORMAT}, "digest": "{_digest(content.encode())}",\n"content": {content}}}\n'
        replace_file(self._file(number, "json"), outer)
        for old in {*known[1:], *self._numbers("safetensors")} - {number, *known[:1]}:
            for suffix in ("json", "safetensors"):  # in this order: a JSON file speaks of tensors that are there
                self._file(old, suffix).unlink(missing_ok=True)


def _plain_json(file: Path) -> dict[str, Any]:
    if file.is_symlink() or file.stat().st_size > _LARGEST:
        raise ValueError(f"{file} is a link or larger than any file of its kind")
    try:
        outer = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged") from error
    if not isinstance(outer, dict):
        raise ValueError(f"{file} is damaged")
    return outer


def _bytes(file: Path, digest: Any) -> bytes:
    if file.is_symlink() or not file.is_file():
        raise ValueError(f"{file} is missing or a link")
    raw = file.read_bytes()
    if _digest(raw) != digest:
        raise ValueError(f"{file} is damaged")
    return raw


def _digest(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()
