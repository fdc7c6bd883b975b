"""Folders whose hashes are right and whose contents are not: each is a ValueError that names its file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import conjugate
from safetensors.torch import load_file, save_file

import ppl_gen as pg
from ppl_gen.inference import NUTS

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

X = torch.linspace(-1.0, 2.0, 12)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fit = pg.fit(conjugate, X, NUTS(draws=10, warmup=5, chains=2, processes=1), seed=2)
    fit.diagnose()
    return fit.save(tmp_path_factory.mktemp("kept") / "fit")


def crafted(kept: Path, folder: Path, change: Callable[[Path, dict[str, Any]], Any]) -> Path:
    """A copy that ``change`` has been at, with the hashes that belong to it."""
    copy = folder / "fit"
    shutil.copytree(kept, copy, symlinks=True)
    meta = json.loads(json.loads((copy / "fit.json").read_text())["fit"])
    (contents,) = copy.glob("contents-*")
    changed = change(contents, meta)
    for name in list(meta["files"]) if isinstance(meta.get("files"), dict) else ():
        if (copy / name).is_file():
            meta["files"][name] = hashlib.sha256((copy / name).read_bytes()).hexdigest()
    text = changed if isinstance(changed, str) else json.dumps(meta)
    (copy / "fit.json").write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "fit": text}))
    return copy


def field(name: str, value: Any) -> Callable[[Path, dict[str, Any]], Any]:
    def change(contents: Path, meta: dict[str, Any]) -> None:
        meta[name] = value

    return change


def lacking(name: str) -> Callable[[Path, dict[str, Any]], Any]:
    return lambda contents, meta: meta.pop(name) and None


def tensors(**new: torch.Tensor | None) -> Callable[[Path, dict[str, Any]], Any]:
    def change(contents: Path, meta: dict[str, Any]) -> None:
        held = {**load_file(contents / "tensors.safetensors"), **{k.replace("__", "/"): v for k, v in new.items()}}
        save_file({k: v for k, v in held.items() if v is not None}, contents / "tensors.safetensors")

    return change


def file(name: str, content: bytes | Callable[[bytes], bytes]) -> Callable[[Path, dict[str, Any]], Any]:
    def change(contents: Path, meta: dict[str, Any]) -> None:
        old = (contents / name).read_bytes()
        (contents / name).write_bytes(content if isinstance(content, bytes) else content(old))

    return change


def linked(contents: Path, meta: dict[str, Any]) -> None:
    (contents / "draws.nc").rename(contents.parent.parent / "elsewhere.nc")
    (contents / "draws.nc").symlink_to(contents.parent.parent / "elsewhere.nc")


def named(name: str) -> Callable[[Path, dict[str, Any]], Any]:
    def change(contents: Path, meta: dict[str, Any]) -> None:
        meta["files"][name] = "0" * 64

    return change


def other_draws(contents: Path, meta: dict[str, Any]) -> None:
    from ppl_gen.bridge import to_tree, write_tree

    write_tree(to_tree({"posterior": {"other": torch.zeros(2, 10).numpy()}}), contents / "draws.nc")


def diagnosis(**new: Any) -> Callable[[Path, dict[str, Any]], Any]:
    return file("diagnosis.json", lambda old: json.dumps({**json.loads(old), **new}).encode())


FIELDS = [
    "algorithm",
    "checks",
    "constants",
    "cost",
    "data",
    "dtype",
    "files",
    "fingerprint",
    "format",
    "guide",
    "kind",
]
FIELDS += ["message", "notes", "plate", "positional", "program", "records", "seed", "settings", "sites", "status"]
FIELDS += ["version"]

CASES: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    **{f"without {name}": lacking(name) for name in FIELDS},
    **{f"{name} a list of numbers": field(name, [1.5]) for name in FIELDS},
    "negative seed": field("seed", -1),
    "huge seed": field("seed", 10**400),
    "seed true": field("seed", True),
    "unknown status": field("status", "splendid"),
    "unknown dtype": field("dtype", "load"),
    "integer dtype": field("dtype", "int64"),
    "unknown kind": field("kind", "magic"),
    "kind of no chains": field("kind", "point"),
    "format of tomorrow": field("format", 3),
    "format of yesterday": field("format", 1),
    "records of words": field("records", {"loss": ["one"]}),
    "records of several lengths": field("records", {"loss": ["1.0"], "kl": ["1.0", "2.0"]}),
    "records that are numbers": field("records", {"loss": 3}),
    "checks without steps": field("checks", {"evidence": ["1.0"]}),
    "cost of text": field("cost", {"seconds": "long"}),
    "negative cost": field("cost", {"seconds": -1.0}),
    "notes of numbers": field("notes", {"a": 1}),
    "sites of numbers": field("sites", {"theta": 3}),
    "sites of other sites": field("sites", {"phi": ["latent", "Normal", [], []]}),
    "another argument": field("positional", "y"),
    "fingerprint of nothing": field("fingerprint", {"python": "x", "entries": {"model": []}}),
    "NaN in JSON": lambda contents, meta: json.dumps(meta).replace('"seed": 2', '"seed": NaN'),
    "endless nesting": lambda contents, meta: "[" * 100_000,
    "no JSON": lambda contents, meta: "fit",
    "a list": lambda contents, meta: "[]",
    "file above": named("../x"),
    "absolute file": named("/etc/hostname"),
    "file of another name": named("contents-000000000000/draws.nc"),
    "link": linked,
    "tensors truncated": file("tensors.safetensors", lambda old: old[:-9]),
    "tensors of nothing": file("tensors.safetensors", b""),
    "tensors of text": file("tensors.safetensors", b"{}"),
    "huge header": file("tensors.safetensors", b"\xff" * 16),
    "no draws": tensors(draws__theta=None),
    "draws of another site": tensors(draws__phi=torch.zeros(2, 10)),
    "draws of another length": tensors(draws__theta=torch.zeros(7)),
    "draws of another event": tensors(draws__theta=torch.zeros(2)),
    "NaN draws": tensors(draws__theta=torch.full((2, 10), float("nan"))),
    "a tensor without a place": tensors(theta=torch.zeros(3)),
    "a tensor of another place": tensors(weights__theta=torch.zeros(3)),
    "another parameter": tensors(param__extra=torch.zeros(3)),
    "a whole parameter": tensors(param__extra=torch.zeros(3, dtype=torch.long)),
    "no data": tensors(data__x=None),
    "data of NaN": tensors(data__x=torch.full((12,), float("nan"))),
    "draws.nc truncated": file("draws.nc", lambda old: old[: len(old) // 2]),
    "draws.nc of nothing": file("draws.nc", b""),
    "draws.nc of text": file("draws.nc", b"no netCDF"),
    "draws.nc of other sites": other_draws,
    "diagnosis of nothing": file("diagnosis.json", b""),
    "diagnosis of bytes": file("diagnosis.json", b"\xff\xfe"),
    "diagnosis a list": file("diagnosis.json", b"[]"),
    "diagnosis without frame": diagnosis(frame=None),
    "diagnosis without verdict": diagnosis(attrs={}),
    "diagnosis of another size": diagnosis(frame={"columns": ["mean"], "index": ["theta"], "data": [[1.0, 2.0]]}),
    "diagnosis of objects": diagnosis(frame={"columns": ["mean"], "index": ["theta"], "data": [[{}]]}),
}


@pytest.mark.filterwarnings("ignore:the fit in .* is of another program")
@pytest.mark.parametrize("case", CASES)
def test_wrong_contents_are_refused_by_name(case: str, kept: Path, tmp_path: Path) -> None:
    path = crafted(kept, tmp_path, CASES[case])
    refused = []
    for program in (None, conjugate):
        try:
            pg.load(path, program=program)
        except ValueError as error:
            refused.append(str(error))
    assert refused, "loaded"
    assert any(
        word in refused[0] for word in ("fit.json", "safetensors", "draws.nc", "diagnosis.json", "program:", "data")
    )


@pytest.mark.parametrize("whole", [{}, {"fit": 3, "sha256": "x"}, {"fit": "{}", "sha256": 3}, {"fit": "{}"}, []])
def test_wrong_envelopes_are_damage(whole: Any, kept: Path, tmp_path: Path) -> None:
    path = crafted(kept, tmp_path, lambda contents, meta: None)
    pg.load(path, program=conjugate)
    (path / "fit.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="fit.json is damaged"):
        pg.load(path)
