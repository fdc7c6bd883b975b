"""What a result file says of where its numbers come from, and the file itself."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["table", "write"]

_RESULTS = Path(__file__).parent / "results"


#: What `bench.py` compares with, where it is installed.
_PEERS = ("numpyro", "jax", "pymc", "nutpie", "pomegranate", "zuko", "nflows", "normflows")


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(name: str, title: str, body: str, seconds: float) -> None:
    """``results/<name>.md``: title, command, date, versions, cores, body; printed too."""
    packages = ("torch", "pyro-ppl", "arviz", "scikit-learn", "ppl_gen", *(_PEERS if name == "bench" else ()))
    versions = ", ".join(f"{package} {version(package)}" for package in packages if _installed(package))
    text = (
        f"# {title}\n\n"
        f"Written by `python benchmarks/{name}.py` on {datetime.date.today()} in {seconds:.0f} s: "
        f"Python {platform.python_version()}, {versions}; {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s) in torch.\n\n{body.strip()}\n"
    )
    _RESULTS.mkdir(exist_ok=True)
    (_RESULTS / f"{name}.md").write_text(text)
    print(text)
