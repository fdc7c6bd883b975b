"""What the steps of a run recorded, one value per step and name; read from the device when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_gen.fitting.run import Info

__all__ = ["Records"]


class Records:
    """The history of a run that grows step by step; ``values`` holds what the steps gave, tensors as tensors.

    >>> records = Records()
    >>> records.append({"loss": torch.tensor(2.0)})
    >>> records.append({"loss": torch.tensor(1.0), "norm": 0.5})
    >>> other = Records()
    >>> other.load_state_dict(records.state_dict())
    >>> other.floats(), other.values["loss"][0]
    ({'loss': [2.0, 1.0], 'norm': [nan, 0.5]}, tensor(2.))
    """

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {}
        self.steps = 0
        self._packed: dict[str, Tensor] = {}  # the first of them as float64, so that each is read once

    def append(self, info: Info) -> None:
        """One row; what this step did not record is missing (NaN)."""
        for name in info:
            self.values.setdefault(name, [float("nan")] * self.steps)
        for name, values in self.values.items():
            values.append(info.get(name, float("nan")))
        self.steps += 1

    def cut(self, steps: int) -> None:
        """Keep the first so many rows."""
        self.steps = min(self.steps, steps)
        for name, values in self.values.items():
            del values[self.steps :]
            if name in self._packed:
                self._packed[name] = self._packed[name][: self.steps]

    def floats(self) -> dict[str, list[float]]:
        """All values as numbers of Python."""
        return {name: self._numbers(name).tolist() for name in self.values}

    def _numbers(self, name: str) -> Tensor:
        known = self._packed.get(name, torch.empty(0, dtype=torch.float64, device="cpu"))
        self._packed[name] = torch.cat([known, _as_float64(self.values[name][len(known) :])])
        return self._packed[name]

    def state_dict(self) -> dict[str, Any]:
        """All values, and of which dtype each was (None: a number of Python), as counts of neighbours."""
        return {
            "steps": self.steps,
            "values": {name: self._numbers(name) for name in self.values},
            "kinds": {name: _kinds(values) for name, values in self.values.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any], device: torch.device | None = None) -> None:
        """The values as they were: rules that look at them compute the same of them, to the last bit."""
        self.steps, self.values, self._packed = int(saved["steps"]), {}, dict(saved["values"])
        for name, numbers in saved["values"].items():
            values: list[Any] = []
            for count, word in saved["kinds"][name]:
                part = numbers[len(values) : len(values) + count]
                values += part.tolist() if word is None else part.to(device, getattr(torch, word)).unbind()
            self.values[name] = values


def _as_float64(values: Sequence[Any]) -> Tensor:
    """One synchronisation where all are tensors."""
    if values and all(isinstance(value, Tensor) for value in values):
        return torch.stack([value.detach().double().reshape(()) for value in values]).cpu()
    return torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")


def _kinds(values: Sequence[Any]) -> list[list[Any]]:
    found: list[list[Any]] = []
    for value in values:
        word = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else None
        if found and found[-1][1] == word:
            found[-1][0] += 1
        else:
            found.append([1, word])
    return found
