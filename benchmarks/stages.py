"""Long runs in stages: every finished stage lies on disk, and the same command goes on where it was stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ppl_gen as pg
from ppl_gen.inference import SVI

__all__ = ["WORK", "recorded", "trained"]

#: partial results; PPL_GEN_WORK names another folder
WORK = Path(os.environ.get("PPL_GEN_WORK") or Path(__file__).parent / ".work")


def recorded(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` gave, from disk where it was made before."""
    if file.exists():
        return json.loads(file.read_text())
    began = time.perf_counter()
    result = {**make(), "seconds": time.perf_counter() - began}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(file)
    return result


def trained(folder: Path, program: Any, data: Any, stages: Sequence[SVI]) -> tuple[list[pg.Fit], float]:
    """One fit after every stage, each continuing from the last; and the seconds that all of them took."""
    fits: list[pg.Fit] = []
    for number, stage in enumerate(stages, 1):
        place = folder / f"stage-{number}"
        if (place / "fit.json").exists():
            fits.append(pg.load(place, program=program, data=data))
            continue
        start = fits[-1] if fits else None
        fit = pg.fit(program, data, stage, seed=number, start=start, progress=False)
        fit.save(place)
        print(f"{place.parent.name} {number}/{len(stages)}: {fit}", flush=True)
        fits.append(fit)
    return fits, sum(float(fit.cost["seconds"]) for fit in fits)
