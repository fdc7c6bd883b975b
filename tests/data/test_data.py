"""Data sets: the published numbers, rows that behave as data, and errors that say what to do."""

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppl_gen.data import Rows, decoded, encoded, load_data, text_rows
from ppl_gen.data import images as image_files
from ppl_gen.data.crabs import COUNTS, crab_edges
from ppl_gen.data.text import ALPHABET, alice_text


def test_crabs_have_the_published_counts() -> None:
    assert len(COUNTS) == 29 and sum(COUNTS) == 1000
    # Pearson prints the centroid 16.799 in class units; sum(k * count) is a whole number, so this is exact.
    assert sum(k * count for k, count in enumerate(COUNTS, start=1)) == 16_799


def test_crabs_are_the_midpoints_of_their_classes() -> None:
    ratios, edges = load_data("crabs"), crab_edges()
    assert ratios.shape == (1000,) and ratios.dtype == torch.float64
    assert edges[0] == 0.5795 and edges[-1] == 0.6955 and edges.dtype == torch.float64
    # Both sides are correctly rounded decimals: a half class differs by at most two roundings of 1e-16.
    torch.testing.assert_close(
        ratios.unique(), ((edges[:-1] + edges[1:]) / 2)[torch.tensor(COUNTS) > 0], rtol=0, atol=3e-16
    )
    counted = torch.histogram(ratios, edges).hist
    assert counted.tolist() == list(COUNTS)


def test_crabs_are_a_fresh_tensor_on_every_call() -> None:
    load_data("crabs").zero_()
    assert load_data("crabs")[0] == 0.5815


def test_digits() -> None:
    digits = load_data("digits")
    x, y = digits["x"], digits["y"]
    assert x.shape == (1797, 64) and x.dtype == torch.float32
    assert y.shape == (1797,) and y.dtype == torch.int64
    assert x.min() == 0.0 and x.max() == 1.0 and (x * 16 == (x * 16).round()).all()
    assert y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as published with the data
    pictures = load_data("digits", images=True)["x"]
    assert pictures.shape == (1797, 1, 8, 8)
    assert torch.equal(pictures.flatten(1), x)


def test_fixed_binarisation_is_one_draw() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    grey, fixed = load_data("digits")["x"], load_data("digits", binarize="fixed")
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    torch.manual_seed(2)
    assert torch.equal(fixed["x"], load_data("digits", binarize="fixed")["x"])
    assert fixed.on_batch is None
    assert set(fixed["x"].unique().tolist()) == {0.0, 1.0}
    _assert_drawn_from(grey, fixed["x"])


def test_dynamic_binarisation_draws_every_batch_from_the_global_generator() -> None:
    rows = load_data("digits", binarize="dynamic")
    grey = load_data("digits")["x"]
    assert torch.equal(rows["x"], grey), "reading an entry never draws"
    assert rows.on_batch is not None
    batch = {"x": rows["x"], "y": rows["y"]}
    torch.manual_seed(3)
    first, second = rows.on_batch(batch), rows.on_batch(batch)
    torch.manual_seed(3)
    again = rows.on_batch(batch)
    assert torch.equal(first["x"], again["x"]) and not torch.equal(first["x"], second["x"])
    assert first["y"] is rows["y"], "labels pass unchanged"
    assert torch.equal(batch["x"], grey), "the resident rows are not drawn over"
    _assert_drawn_from(grey, first["x"])
    assert rows.on_batch({"y": rows["y"]})["y"] is rows["y"], "a program may ask for the labels only"


def _assert_drawn_from(grey: torch.Tensor, drawn: torch.Tensor) -> None:
    # The sum of independent Bernoulli draws has variance sum p (1 - p); 5 sd give a false alarm in 1.7e6 runs.
    sd = float((grey.double() * (1 - grey.double())).sum().sqrt())
    assert abs(float(drawn.double().sum() - grey.double().sum())) < 5 * sd
    assert torch.equal(drawn[(grey == 0) | (grey == 1)], grey[(grey == 0) | (grey == 1)])


def test_rows_are_a_frozen_mapping_that_other_processes_can_be_given() -> None:
    rows = load_data("digits", binarize="dynamic")
    assert list(rows) == ["x", "y"] and len(rows) == 2 and dict(rows).keys() == {"x", "y"}
    with pytest.raises(AttributeError):
        rows.on_batch = None  # type: ignore[misc]
    with pytest.raises(TypeError):
        rows.entries["x"] = rows["y"]  # type: ignore[index]
    copy = pickle.loads(pickle.dumps(rows))
    torch.manual_seed(4)
    expected = rows.on_batch(dict(rows))["x"]
    torch.manual_seed(4)
    assert torch.equal(copy.on_batch(dict(copy))["x"], expected)


def test_alice_is_the_whole_text() -> None:
    text = alice_text()
    # The Canterbury corpus's alice29.txt, with plain line breaks, from the title on, without the edition's line.
    assert hashlib.sha256(text.encode()).hexdigest().startswith("e7be146ff27d6e3b")
    assert len(text) == 148_425 and text.count("CHAPTER ") == 12 and "EDITION" not in text
    assert text.split("\n")[0].strip() == "ALICE'S ADVENTURES IN WONDERLAND" and text.split()[-2:] == ["THE", "END"]
    assert "".join(sorted(set(text))) == ALPHABET and len(ALPHABET) == 70
    assert alice_text("train") + alice_text("test") == text
    assert alice_text("train").endswith(".)\n\n") and 0.9 <= len(alice_text("train")) / len(text) < 0.91
    with pytest.raises(ValueError, match="split: expected one of 'train', 'test' or None, got 'valid'"):
        alice_text("valid")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("length", [7, 128])
def test_rows_of_a_text_joined_are_the_text(split: str, length: int) -> None:
    rows = load_data("alice", split=split, length=length)
    x, lengths = rows["x"], rows["lengths"]
    assert x.shape == (len(lengths), length) and x.dtype == lengths.dtype == torch.int64
    assert "".join(decoded(x, lengths)) == alice_text(split)
    assert lengths.min() >= 1 and lengths.max() == length and len(lengths.unique()) > 1
    assert (x[torch.arange(length) >= lengths[:, None]] == 0).all()
    if length == 128:
        assert all(row[-1] in " \n" for row in decoded(x, lengths)), "no word is cut"
        assert torch.equal(load_data("alice", split=split)["x"], x)


def test_codes_are_places_in_an_alphabet() -> None:
    assert decoded(encoded("Curiouser!")[None]) == ["Curiouser!"]
    with pytest.raises(ValueError, match="'é€' are not in the alphabet"):
        encoded("é Alice €")
    with pytest.raises(ValueError, match="alphabet: expected different characters"):
        encoded("ab", "aba")
    with pytest.raises(ValueError, match="codes: expected 0 to 1.* got .3."):
        decoded(torch.tensor([[0, 3]]), alphabet="ab")
    assert decoded(torch.tensor([[0, 3]]), torch.tensor([1]), "ab") == ["a"]
    with pytest.raises(ValueError, match="codes: expected whole numbers, rows x time"):
        decoded(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="text: expected at least one character"):
        text_rows("")


@pytest.mark.parametrize(
    "entries, error, said",
    [
        ({}, ValueError, "at least one"),
        ({"x": torch.zeros(3), "y": torch.zeros(4)}, ValueError, "x: 3, y: 4"),
        ({"x": torch.tensor(1.0)}, ValueError, "'x'.*single number"),
        ({"x": [1.0]}, TypeError, "'x'.*list"),
    ],
)
def test_rows_say_what_is_wrong_with_their_entries(entries: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Rows(entries)


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("crab", {}, "name: expected one of 'crabs', 'digits', 'mnist', 'fashion-mnist', 'alice', got 'crab'"),
        ("digits", {"split": "test"}, "split: 'digits' is published whole"),
        ("mnist", {"split": "valid"}, "split: expected one of 'train', 'test' or None, got 'valid'"),
        ("mnist", {"binarize": "static"}, "binarize: expected one of 'dynamic', 'fixed' or None, got 'static'"),
        ("crabs", {"binarize": "fixed"}, "'crabs' holds no images"),
        ("crabs", {"images": True}, "'crabs' holds no images"),
        ("digits", {"root": "somewhere"}, "root: 'digits' comes with a package"),
        ("alice", {"split": "valid"}, "split: expected one of 'train', 'test' or None, got 'valid'"),
        ("alice", {"binarize": "fixed"}, "'alice' holds no images"),
        ("alice", {"images": True}, "'alice' holds no images"),
        ("alice", {"root": "somewhere"}, "root: 'alice' comes with a package"),
        ("alice", {"length": 0}, "length: expected a whole number of at least 1, got 0"),
        ("digits", {"length": 8}, "length: 'digits' is not a text"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_data(name, **options)


def test_absent_images_say_where_they_were_looked_for_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_data("fashion-mnist", split="test", root=tmp_path)
    text = str(caught.value)
    assert str(tmp_path / "FashionMNIST" / "raw") in text
    assert "t10k-images-idx3-ubyte" in text and "PPL_GEN_DATA" in text and "root=" in text and "download=True" in text
    assert not list(tmp_path.iterdir()), "nothing is fetched and nothing is created"


def test_images_are_looked_for_in_root_then_the_variable_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPL_GEN_DATA", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert image_files.image_root(tmp_path / "argument") == tmp_path / "argument"
    assert image_files.image_root() == tmp_path / "variable"
    monkeypatch.delenv("PPL_GEN_DATA")
    assert image_files.image_root() == tmp_path / "cache" / "ppl_gen"
    with pytest.raises(FileNotFoundError, match="cache"):
        load_data("mnist")


def _write_images(folder: Path) -> dict[str, torch.Tensor]:
    """Three training and two test images in the idx format of the MNISTs (big-endian header, then bytes)."""
    folder.mkdir(parents=True)
    written = {}
    for prefix, rows in (("train", 3), ("t10k", 2)):
        pixels = torch.randint(0, 256, (rows, 28, 28), dtype=torch.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (2051, rows, 28, 28))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.numpy().tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (2049, rows))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + bytes(range(rows)))
        written[prefix] = pixels
    return written


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_images_are_read_from_torchvisions_layout(name: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    written = _write_images(tmp_path / kind / "raw")
    train, test = load_data(name, root=tmp_path), load_data(name, split="test", root=tmp_path, images=True)
    assert torch.equal(train["x"], written["train"].flatten(1).float() / 255)
    assert torch.equal(test["x"], written["t10k"][:, None].float() / 255)
    assert train["y"].tolist() == [0, 1, 2] and test["y"].dtype == torch.int64


def test_a_torchvision_built_for_another_torch_says_how_to_mend_the_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_images(tmp_path / "MNIST" / "raw")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="as a\\s+pair.*both together.*--force-reinstall torch torchvision") as caught:
        load_data("mnist", root=tmp_path)
    assert "torchvision::nms" in str(caught.value) and torch.__version__.split("+")[0] in str(caught.value)
    assert load_data("digits")["x"].shape == (1797, 64), "what needs no torchvision works without it"


@pytest.mark.parametrize(
    "module, call, said",
    [
        ("sklearn", 'load_data("digits")', 'pip install "ppl_gen[sklearn]"'),
        ("torchvision", 'load_data("mnist", root=ROOT)', "pip install torchvision"),
    ],
)
def test_an_absent_package_is_named(module: str, call: str, said: str, tmp_path: Path) -> None:
    _write_images(tmp_path / "MNIST" / "raw")
    code = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
ROOT = {str(tmp_path)!r}
from ppl_gen.data import load_data
try:
    {call}
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


@pytest.mark.skipif(
    not (Path(os.environ.get("PPL_GEN_DATA", "")) / "MNIST" / "raw").is_dir(), reason="PPL_GEN_DATA holds no MNIST"
)
def test_mnist_itself() -> None:
    test = load_data("mnist", split="test", binarize="fixed")
    assert test["x"].shape == (10_000, 784) and test["x"][:3].shape == (3, 784)
    assert set(test["x"].unique().tolist()) == {0.0, 1.0}
    # The label counts of the test set, as published with it.
    assert test["y"].bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert load_data("mnist", split="train", binarize="dynamic")["x"].shape == (60_000, 784)
