"""What a checkpoint holds comes back bit for bit, and what is no checkpoint is refused in words."""

from __future__ import annotations

import collections
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppl_gen.runtime.numbered import Numbered
from ppl_gen.runtime.trees import decode, encode

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.uint16,
]


def returned(tree: Any) -> Any:
    value, tensors = encode(tree)
    return decode(json.loads(json.dumps(value, allow_nan=False)), tensors)


def bits(tensor: torch.Tensor) -> bytes:
    """Of the numbers in the order of the axes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_and_shape(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2, (2, 3, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    numbers = raw.view(torch.uint8).to(dtype) if dtype is torch.bool else raw.view(dtype)
    for tensor in (
        numbers,
        numbers[0, 0, 0],
        numbers[:, :0],
        numbers.permute(2, 0, 1),
        numbers[:, 1],
        numbers[..., ::2],
    ):
        made = returned(tensor)
        assert made.dtype is dtype and made.shape == tensor.shape and bits(made) == bits(tensor)
    assert returned(numbers.permute(2, 0, 1)).stride() == numbers.permute(2, 0, 1).stride()


def test_payloads_of_nan_and_signs_of_zero() -> None:
    odd = torch.tensor([0x7FC00001, 0xFFC12345 - 2**32, -(2**31), 1], dtype=torch.int32).view(torch.float32)
    assert bits(returned(odd)) == bits(odd)
    for number in (float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 0.1, 1e308):
        assert repr(returned(number)) == repr(number)


def test_everything_else() -> None:
    tree = {
        1: [None, True, 2**70, "word", ""],
        "deep": ((), [], {}, ({None: (1.5,)},)),
        True and (1, "b"): -1,
        "numpy": (np.arange(6).reshape(2, 3)[:, ::2], np.float32(0.1), np.zeros((0, 2)), np.array(3)),
        "counter": collections.Counter({5: 2, 9: 1}),
    }
    made = returned(tree)
    assert list(made) == list(tree) and made[1] == tree[1] and made["deep"] == tree["deep"]
    assert type(made["deep"][0]) is tuple and type(made["counter"]) is collections.Counter
    for one, other in zip(made["numpy"], tree["numpy"], strict=True):
        assert type(one) is type(other) and one.dtype == other.dtype and np.array_equal(one, other)
    for state in (random.getstate(), np.random.get_state()):
        assert str(returned(state)) == str(state)


def test_optimisers_and_schedules() -> None:
    """What torch keeps: whole numbers as keys, tuples, and a Counter."""
    leaf = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.Adam([leaf], lr=0.1)
    schedules = [
        torch.optim.lr_scheduler.MultiStepLR(optimiser, [2, 4]),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser),
        torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=9),
    ]
    leaf.grad = torch.ones(3)
    optimiser.step()
    made = returned(optimiser.state_dict())
    assert str(made) == str(optimiser.state_dict()) and list(made["state"]) == [0]
    for schedule in schedules:
        assert str(returned(schedule.state_dict())) == str(schedule.state_dict())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [1, object()]}, r"state\['a'\]\[1\]: a builtins\.object, which a checkpoint cannot hold"),
        ({"a": {1, 2}}, r"state\['a'\]: a builtins\.set"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (np.array(["a"]), "dtype <U1"),
        ({"f": len}, "builtin_function_or_method"),
    ],
)
def test_what_cannot_be_held_is_refused_with_its_place(value: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        encode(value)


@pytest.mark.parametrize(
    "value",
    [
        {"what": 1},
        {"tensor": "none", "dtype": "float32", "shape": [2]},
        {"tensor": "x", "dtype": "float64", "shape": [2]},
        {"tensor": "x", "dtype": "float32", "shape": [3]},
        {"tensor": "x", "dtype": "nn", "shape": [2]},
        {"tensor": "x", "dtype": "float32", "shape": [2], "stride": [10**9]},
        {"tensor": "x", "dtype": "float32", "shape": [2], "stride": [0]},
        {"tensor": "x", "dtype": "complex64", "shape": [2**40]},
        {"tensor": "x", "dtype": "float32", "shape": [2], "device": "nowhere"},
        {"array": "x", "dtype": "O", "shape": [2]},
        {"array": "x", "dtype": "<f4", "shape": [2]},
        {"float": "1.0"},
        {"map": [[1]]},
        {"map": [[[1], 2]]},
        {"map": 3},
        {"tuple": 3},
    ],
    ids=str,
)
def test_crafted_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError):
        decode(value, {"x": torch.zeros(2)})


def test_endless_nesting_is_refused() -> None:
    value: Any = 1
    for _ in range(300):
        value = [value]
    with pytest.raises(ValueError, match="nested deeper"):
        decode(value, {})
    with pytest.raises(TypeError, match="nested deeper"):
        encode(value)


def _records(path: Path, count: int = 3) -> Numbered:
    records = Numbered(path / "run")
    for step in range(count):
        records.write({"step": step}, {"x": torch.full((5,), float(step))})
    return records


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "gone", "link"])
def test_a_damaged_record_gives_the_one_before(tmp_path: Path, suffix: str, damage: str) -> None:
    records = _records(tmp_path)
    file = tmp_path / "run" / f"000003.{suffix}"
    raw = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        at = len(raw) - 9
        flipped = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        file.write_bytes({"cut": raw[: len(raw) // 2], "empty": b"", "flipped": flipped}[damage])
    found = records.read()
    assert found is not None and found.facts == {"step": 1} and torch.equal(found.tree["x"], torch.ones(5))
    if (suffix, damage) != ("json", "gone"):  # which is what a kill before its last step leaves
        assert str(file) in found.damaged
    records.write({"step": 9}, {})
    assert records.read().facts == {"step": 9}


def test_only_damaged_records_are_an_error_in_words(tmp_path: Path) -> None:
    records = _records(tmp_path)
    for file in (tmp_path / "run").glob("*.safetensors"):
        file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: .*000003\.safetensors is damaged"):
        records.read()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", "[" * 100_000, '{"format": 1}', '{"format": 7, "digest": "", "content": {}}', "\xff"],
    ids=lambda text: text[:20],
)
def test_crafted_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "000001.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"path: no checkpoint in .* can be read"):
        Numbered(tmp_path).read()


def test_folders_of_other_things_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex', which is no checkpoint"):
        Numbered(tmp_path).claim()
    with pytest.raises(ValueError, match=r"thesis.tex is a file, so .* cannot be made"):
        Numbered(tmp_path / "thesis.tex" / "run").claim()


def test_hidden_files_of_the_system_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_text("x")
    records = _records(tmp_path)
    (tmp_path / "run" / ".nfs0001").write_text("x")
    with records.claimed():
        assert records.read().facts == {"step": 2}
    assert (tmp_path / "run" / ".nfs0001").exists()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    first, second = Numbered(tmp_path / "run"), Numbered(tmp_path / "run")
    first.claim()
    with pytest.raises(ValueError, match="another run writes its checkpoints"):
        second.claim()
    first.release()
    second.claim()
    second.release()
