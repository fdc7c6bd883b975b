"""Batches: every row once per epoch, one order for one seed, and the same batches from every kind of source."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from programs import X8, conjugate
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

import ppl_gen as pg
from ppl_gen.data import Rows
from ppl_gen.data.batches import Batches
from ppl_gen.data.batching import Batch, as_dataset
from ppl_gen.data.sources import collected
from ppl_gen.inference import SVI


def takes(x: Tensor, y: Any = None, w: Any = None) -> None:
    """A signature is all that batching looks at."""


def drawn(data: Any, size: int | None, count: int, seed: int = 0, **options: Any) -> list[Batch]:
    source = Batches(as_dataset(data, takes), size, seed, **options)
    return [source.next() for _ in range(count)]


def order(batches: list[Batch]) -> list[int]:
    return torch.cat([batch.index for batch in batches]).tolist()


# ------------------------------------------------------------------------------------------------- the order
@pytest.mark.parametrize(("rows", "size"), [(10, 3), (12, 4), (7, 1), (5, 5)])
@pytest.mark.parametrize("stratify", [None, "y"])
def test_an_epoch_holds_every_row_once_and_its_last_batch_may_be_shorter(rows: int, size: int, stratify: str) -> None:
    data = {"x": torch.arange(float(rows)), "y": torch.arange(rows) % 3}
    source = Batches(as_dataset(data, takes), size, 0, stratify)
    for _ in range(3):
        epoch = [source.next() for _ in range(source.per_epoch)]
        assert [batch.rows for batch in epoch] == [size] * (rows // size) + [rows % size] * (rows % size > 0)
        assert sorted(order(epoch)) == list(range(rows))
        for batch in epoch:
            assert batch.total == rows and batch.rescale == rows / batch.rows
            assert torch.equal(batch.kwargs["x"], data["x"][batch.index]), "rows and their index belong together"
            assert torch.equal(batch.kwargs["y"], data["y"][batch.index])


@pytest.mark.parametrize("stratify", [None, "y"])
def test_the_order_depends_on_the_seed_alone(stratify: str | None) -> None:
    data = {"x": torch.arange(50.0), "y": torch.arange(50) % 2}
    expected = order(drawn(data, 8, 14, seed=3, stratify=stratify))
    torch.rand(5)  # the global generator has moved
    torch.set_default_dtype(torch.float64)
    again = order(drawn(data, 8, 14, seed=3, stratify=stratify))
    torch.set_default_dtype(torch.float32)
    assert again == expected
    with torch.device("meta"):  # a fit on another device
        source = Batches(as_dataset(data, takes, device=torch.device("cpu")), 8, 3, stratify)
        assert order([source.next() for _ in range(14)]) == expected
    assert order(drawn(data, 8, 14, seed=4, stratify=stratify)) != expected
    assert order(drawn(data, 8, 7, seed=3)) != list(range(50)) and expected[:50] != expected[50:], "shuffled again"


def test_drawing_batches_leaves_the_global_generator() -> None:
    before = torch.get_rng_state()
    drawn({"x": torch.arange(20.0), "y": torch.arange(20) % 2}, 4, 12, stratify="y")
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_larger_than_the_data_is_the_data() -> None:
    x = torch.arange(6.0)
    (batch,) = drawn(x, 100, 1)
    assert batch.rows == batch.total == 6 and batch.rescale == 1.0
    assert torch.equal(batch.args[0].sort().values, x)
    (whole,) = drawn(x, None, 1)
    assert torch.equal(whole.args[0], x) and whole.index is None and whole.rescale == 1.0


def test_stratified_batches_of_partly_labelled_rows_hold_their_share_of_each_label() -> None:
    labels = torch.tensor([-1] * 80 + [0] * 10 + [1] * 10)[torch.randperm(100)]
    batches = drawn({"x": torch.arange(100.0), "y": labels}, 20, 15, stratify="y")
    for batch in batches:
        # Places are evenly spaced within a label, so the count of a label in a run of rows is off its share (16, 2, 2)
        # by less than 1 for the label itself and as much for each of the two others that move the run's ends.
        counts = [int((batch.kwargs["y"] == value).sum()) for value in (-1, 0, 1)]
        assert sum(counts) == 20
        assert all(abs(count - share) <= 3 for count, share in zip(counts, (16, 2, 2), strict=True)), counts
        assert min(counts[1:]) >= 1
    for start in (0, 5, 10):
        assert sorted(order(batches[start : start + 5])) == list(range(100))
    plain = drawn({"x": torch.arange(100.0), "y": labels}, 20, 100)
    assert any(not (batch.kwargs["y"] == 0).any() for batch in plain), "chance alone leaves a label out"


@pytest.mark.parametrize(
    ("size", "options", "said"),
    [
        (0, {}, "batch_size: expected at least 1, got 0"),
        (2, {"stratify": "label"}, "stratify: no entry 'label' in the data; there is x, y"),
        (2, {"stratify": "x"}, r"stratify: expected one label per row in 'x', got shape \(4, 2\)"),
    ],
)
def test_batches_that_cannot_be_drawn(size: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        drawn({"x": torch.zeros(4, 2), "y": torch.zeros(4, dtype=torch.long)}, size, 1, **options)
    with pytest.raises(ValueError, match="minibatches need rows, and this data has none"):
        drawn({"x": pg.constant(torch.zeros(3))}, 2, 1)


# ------------------------------------------------------------------------------------------------- the sources
class Items(torch.utils.data.Dataset):
    """Map-style items from a function of the index."""

    def __init__(self, item: Any, rows: int) -> None:
        self.item, self.rows = item, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> Any:
        return self.item(i)


X = torch.arange(33.0).reshape(11, 3) / 7


def _file(path: Any, mode: str) -> np.memmap:
    file = np.memmap(path / "x.bin", dtype=np.float32, mode="w+", shape=(11, 3))
    file[:] = X.numpy()
    file.flush()
    return np.memmap(path / "x.bin", dtype=np.float32, mode=mode, shape=(11, 3))


def _frozen() -> np.ndarray:
    array = X.numpy().copy()
    array.setflags(write=False)
    return array


SOURCES = {
    "array": lambda path: X.numpy(),
    "read-only array": lambda path: _frozen(),
    "big-endian array": lambda path: X.numpy().astype(">f4"),
    "reversed array": lambda path: X.flip(0).numpy()[::-1],
    "memmap": lambda path: _file(path, "r+"),
    "read-only memmap": lambda path: _file(path, "r"),
    "lists of numbers": lambda path: X.tolist(),
    "list of tensors": lambda path: list(X),
    "list of tensors with gradients": lambda path: [row.clone().requires_grad_() for row in X],
    "mapping": lambda path: {"x": X},
    "TensorDataset": lambda path: TensorDataset(X, torch.arange(11)),
    "items": lambda path: Items(lambda i: X[i], 11),
    "labelled items": lambda path: Items(lambda i: (X[i], i), 11),
    "named items": lambda path: Items(lambda i: {"x": X[i], "label": i}, 11),
    "array items": lambda path: Items(lambda i: X[i].numpy(), 11),
    "DataLoader": lambda path: DataLoader(TensorDataset(X), batch_size=4, shuffle=True, drop_last=True),
    "DataLoader of items": lambda path: DataLoader(Items(lambda i: (X[i], i), 11), batch_size=2),
    "DataLoader without batches": lambda path: DataLoader(Items(lambda i: X[i], 11), batch_size=None),
    "Subset": lambda path: Subset(TensorDataset(torch.cat([torch.zeros(2, 3), X])), range(2, 13)),
    "strided": lambda path: torch.stack([X, -X], -1)[..., 0],
    "transposed": lambda path: X.T.contiguous().T,
    "with gradients": lambda path: X.clone().requires_grad_(),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_batches_of_the_tensor(kind: str, tmp_path: Any) -> None:
    source = SOURCES[kind](tmp_path)
    dataset = as_dataset(source, takes, dtype=torch.float32)
    assert dataset.rows == 11
    for size in (4, None):
        expected, batches = drawn(X, size, 7), Batches(dataset, size, 0)
        for wanted in expected:
            batch = batches.next()
            value = batch.args[0] if batch.args else batch.kwargs["x"]  # labels fill the second argument
            assert torch.equal(value, wanted.args[0]) and value.dtype == torch.float32
            assert not value.requires_grad and batch.rows == wanted.rows and batch.total == 11


def test_a_loaders_own_collate_function_makes_the_rows() -> None:
    def double(items: list[Any]) -> dict[str, Tensor]:
        return {"x": 2 * torch.stack([item[0] for item in items])}

    loader = DataLoader(TensorDataset(X, torch.arange(11)), batch_size=3, collate_fn=double)
    assert torch.equal(as_dataset(loader, takes).batch().kwargs["x"], 2 * X)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sampler": torch.utils.data.SubsetRandomSampler([0, 1])}, "SubsetRandomSampler"),
        ({"sampler": torch.utils.data.WeightedRandomSampler([0.1] * 11, 5)}, "WeightedRandomSampler"),
        ({"batch_sampler": [[0, 1], [2]]}, "list"),
    ],
)
def test_a_sampler_that_leaves_rows_out_is_not_passed_over(options: dict[str, Any], name: str) -> None:
    with pytest.raises(TypeError, match=f"the loader's {name} chooses or weighs rows.*Subset"):
        collected(DataLoader(TensorDataset(X), **options))


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter([1.0])


class Unsized(torch.utils.data.Dataset):
    def __getitem__(self, i: int) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        (Endless(), TypeError, "IterableDataset has no known number of rows; pass pg.stream"),
        (DataLoader(Endless()), TypeError, "no known number of rows; pass pg.stream"),
        (Unsized(), TypeError, "no known number of rows; pass pg.stream"),
        (Items(lambda i: "a", 2), TypeError, "items of the dataset collate to list; expected tensors or a mapping"),
        (Items(lambda i: X[i], 0), ValueError, "the dataset holds no items; expected at least one row"),
        (TensorDataset(X[:0]), ValueError, "the dataset holds no items"),
    ],
)
def test_sources_without_rows_say_so(source: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        pg.check(conjugate, source)


# ------------------------------------------------------------------------------- what is passed, and as what
def test_constants_and_scalars_are_passed_whole_and_unnamed_entries_left_out() -> None:
    table = torch.arange(4.0)
    data = {"x": torch.arange(10.0), "y": pg.constant(table), "w": 3, "label": ["a"] * 10, "extra": torch.zeros(2)}
    for batch in drawn(data, 4, 3):
        assert batch.kwargs.keys() == {"x", "y", "w"}
        assert torch.equal(batch.kwargs["y"], table) and batch.kwargs["w"] == 3
    for scalar in (torch.tensor(2.0), np.array(2.0), np.float32(2.0), 2.0, True, "rate"):
        (batch,) = drawn({"x": torch.arange(10.0), "w": scalar}, 4, 1)
        assert batch.rows == 4 and batch.kwargs["w"] == scalar
    (batch,) = drawn({"x": torch.arange(10.0), "y": None, "w": pg.constant(["a", "b"])}, 4, 1)
    assert "y" not in batch.kwargs and batch.kwargs["w"] == ["a", "b"]
    open_ended = as_dataset({"x": torch.zeros(2), "more": torch.ones(2)}, lambda **rows: None)
    assert open_ended.batch().kwargs.keys() == {"x", "more"}, "a model of **rows names every entry"


def test_a_scalar_that_requires_gradients_is_let_go() -> None:
    (batch,) = drawn({"x": torch.zeros(3), "w": torch.tensor(1.0, requires_grad=True)}, 2, 1)
    assert not batch.kwargs["w"].requires_grad


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(3), torch.float32),
        (torch.zeros(3, dtype=torch.float64), torch.float64),
        (torch.zeros(3, dtype=torch.float16), torch.float32),
        (np.zeros(3), torch.float64),
        (np.zeros(3, dtype=np.float32), torch.float32),
        ([0, 1, 2], torch.float32),
    ],
)
def test_floats_are_cast_to_one_dtype_and_whole_numbers_are_not(value: Any, expected: torch.dtype) -> None:
    dataset = as_dataset({"x": value, "y": torch.arange(3), "w": torch.ones(3)}, takes)
    batch = dataset.batch()
    assert dataset.dtype == expected and batch.kwargs["w"].dtype == expected
    assert batch.kwargs["y"].dtype == torch.int64
    assert batch.kwargs["x"].dtype in (expected, torch.int64)
    asked = as_dataset({"x": value, "y": pg.constant(np.ones(2))}, takes, dtype=torch.float32).batch()
    assert asked.kwargs["y"].dtype == torch.float32 and asked.kwargs["x"].dtype in (torch.float32, torch.int64)


def test_rows_are_redrawn_for_every_batch_and_in_every_subset() -> None:
    seen: list[int] = []

    def noisy(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(len(batch["x"]))
        return {**batch, "x": batch["x"] + torch.rand_like(batch["x"])}

    rows = Rows({"x": torch.arange(10.0), "label": torch.arange(10)}, noisy)
    for size in (4, None):
        seen.clear()
        source = Batches(as_dataset(rows, takes), size, 0)
        batches = [source.next() for _ in range(3)]
        assert seen == ([4, 4, 2] if size else [10] * 3), "on every batch, on the whole data too"
        for batch in batches:
            index = torch.arange(10) if batch.index is None else batch.index
            assert batch.kwargs.keys() == {"x"}
            assert torch.equal(batch.kwargs["x"].floor(), index.float())
        fractions = torch.cat([batch.kwargs["x"] % 1 for batch in batches])
        assert len(fractions.unique()) > 0.9 * len(fractions), "other draws for every batch"
    part = as_dataset(rows, takes).subset(torch.tensor([7, 2]))
    first, second = part.batch().kwargs["x"], part.batch().kwargs["x"]
    assert part.rows == 2 and first.floor().tolist() == [7, 2] and not torch.equal(first, second)
    assert isinstance(part.original, Rows) and part.original.on_batch is noisy
    assert part.original["x"].tolist() == [7, 2], "kept as they are, not as they were drawn"
    assert part.original["label"].tolist() == [7, 2], "labels that only a recipe reads are kept"


def test_a_subset_is_what_the_user_would_have_passed_for_these_rows() -> None:
    index = torch.tensor([3, 0])
    plain = as_dataset(X, takes).subset(index)
    assert torch.equal(plain.original, X[index]) and torch.equal(plain.batch().args[0], X[index])
    data = {"x": X.numpy(), "label": np.arange(11), "y": pg.constant(torch.arange(4.0)), "w": 2.0}
    part = as_dataset(data, takes).subset(index)
    assert part.rows == 2 and part.original["label"].tolist() == [3, 0]
    again = as_dataset(part.original, takes).batch()
    assert torch.equal(again.kwargs["x"], X[index]) and len(again.kwargs["y"]) == 4 and again.kwargs["w"] == 2.0


def test_heads_templates_and_chunks() -> None:
    dataset = as_dataset(torch.arange(5.0), takes)
    assert dataset.head(3).args[0].tolist() == [0, 1, 2] and dataset.head(3).rescale == 1.0
    assert dataset.head(9).rows == 5
    assert dataset.template(7).args[0].tolist() == [0, 1, 2, 3, 4, 0, 1]
    chunks = list(dataset.chunks(2))
    assert [chunk.args[0].tolist() for chunk in chunks] == [[0, 1], [2, 3], [4]]
    assert all(chunk.rescale == 1.0 for chunk in chunks), "each counts as the whole"


@pytest.mark.parametrize("kind", ["strided", "with gradients", "array"])
def test_input_of_any_layout_gives_equal_fits_and_stays_as_it_was(kind: str) -> None:
    made: dict[str, Any] = {
        "strided": torch.stack([X8, -X8], -1)[:, 0],
        "with gradients": X8.clone().requires_grad_(),
        "array": X8.numpy()[::-1].copy()[::-1],
    }
    given = made[kind]
    if kind == "with gradients":
        given.grad = torch.ones(8, dtype=torch.float64)
    before = torch.as_tensor(np.ascontiguousarray(given)) if kind == "array" else given.detach().clone()
    svi = SVI(steps=3, batch_size=3, lr=0.1)
    fit, expected = (pg.fit(conjugate, x, svi, seed=1) for x in (given, X8))
    assert fit.params.keys() == expected.params.keys()
    assert all(torch.equal(fit.params[name], value) for name, value in expected.params.items())
    now = torch.as_tensor(np.ascontiguousarray(given)) if kind == "array" else given.detach()
    assert torch.equal(now, before)
    if kind == "with gradients":
        assert given.requires_grad and torch.equal(given.grad, torch.ones(8, dtype=torch.float64))
