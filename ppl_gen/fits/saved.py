"""What is left of a saved fit without its program."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ppl_gen.errors import IncompatibleError
from ppl_gen.fits.schema import check_diagnosis, check_tree, judged_by, read_json

__all__ = ["SavedFit"]


class SavedFit:
    """What is left of a fit without its program: draws, history, and the diagnosis where one was made."""

    def __init__(self, folder: Path, meta: dict[str, Any], contents: Path) -> None:
        self._folder, self._meta = folder, meta
        from ppl_gen.bridge import read_tree

        self._tree = check_tree(contents / "draws.nc", meta, read_tree)
        diagnosis = contents / "diagnosis.json"
        kept = f"{contents.name}/diagnosis.json" in meta["files"]
        text = diagnosis.read_text(encoding="utf-8", errors="replace") if kept else ""
        self._diagnosis = check_diagnosis(diagnosis, read_json(diagnosis, text)) if kept else None
        self.status, self.message, self.seed = meta["status"], meta["message"], meta["seed"]
        self.cost, self.notes, self.algorithm = meta["cost"], meta["notes"], meta["algorithm"]

    def __repr__(self) -> str:
        return (
            f"SavedFit({self._meta['program']}, {self.algorithm}, seed={self.seed}: {self.status}; without its program)"
        )

    def to_arviz(self) -> Any:
        """The draws as they were saved: all of a chain's, some of a guide's, of the first rows where there are many."""
        return self._tree

    def diagnose(self) -> Any:
        """The diagnosis as it was saved; of chains, where none was saved, made from their draws.

        Raises:
            IncompatibleError: if there is none, and the draws alone cannot tell: a guide is judged against its program.
        """
        if self._diagnosis is not None:
            import pandas

            frame = pandas.read_json(io.StringIO(json.dumps(self._diagnosis["frame"])), orient="split")
            frame.attrs.update({k: float("nan") if v is None else v for k, v in self._diagnosis["attrs"].items()})
            return frame
        if judged_by(self._meta) == "chains":
            return self._diagnosed_chains()
        raise IncompatibleError(
            f"this fit was not diagnosed before it was saved, and its draws alone cannot tell: load it as "
            f"pg.load({str(self._folder)!r}, program={self._meta['program']}), or call fit.diagnose() before fit.save()"
        )

    def _diagnosed_chains(self) -> Any:
        import torch

        from ppl_gen.bridge import group
        from ppl_gen.diagnostics.diagnosis import chain_table, judged_chains

        def arrays(name: str) -> dict[str, Any]:
            found = group(self._tree, name)
            return {} if found is None else {str(key): value for key, value in found.data_vars.items()}

        plate = self._meta["plate"]
        posterior = {name: value for name, value in arrays("posterior").items() if value.sizes.get(plate, 0) <= 50}
        chains, length = next(iter(posterior.values())).shape[:2]
        stats = {name: torch.as_tensor(value.values) for name, value in arrays("sample_stats").items()}
        frame = chain_table({name: value.values for name, value in posterior.items()}, stats)
        close = "starts" in self._meta["notes"]
        frame.attrs["verdict"] = str(judged_chains(frame, stats, chains, length, close=close))
        return frame

    @property
    def history(self) -> Any:
        """What every step recorded."""
        import xarray

        return xarray.Dataset({k: ("step", [float(v) for v in vs]) for k, vs in self._meta["records"].items()})

    def __getattr__(self, name: str) -> Any:
        if name in ("posterior", "predict", "sample", "evidence", "module", "params", "marginal_likelihood"):
            raise AttributeError(
                f"{name} needs the program, which is code and is not saved; load it as "
                f"pg.load({str(self._folder)!r}, program={self._meta['program']})"
            )
        raise AttributeError(name)
