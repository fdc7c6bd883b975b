"""Data sets by name."""

from __future__ import annotations

import os
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from ppl_gen.arguments import require_choice
from ppl_gen.data.crabs import crab_ratios
from ppl_gen.data.images import image_rows
from ppl_gen.data.rows import Rows
from ppl_gen.data.text import alice_text, text_rows
from ppl_gen.errors import MissingExtraError, require_flag, require_path

__all__ = ["load_data"]

#: The data sets, and whether torchvision's folder layout holds them (and splits them) or the package or scikit-learn.
_NAMES = {"crabs": False, "digits": False, "mnist": True, "fashion-mnist": True, "alice": False}
_WITH_SPLIT = ("mnist", "fashion-mnist", "alice")
_BINARIZE = ("dynamic", "fixed")
_SPLITS = ("train", "test")
_FIXED_SEED = 0  # any number would do; changing it changes every result on fixed binary images


@overload
def load_data(name: Literal["crabs"]) -> Tensor: ...


@overload
def load_data(
    name: Literal["digits", "mnist", "fashion-mnist"],
    *,
    split: str | None = None,
    binarize: str | None = None,
    images: bool = False,
    root: str | os.PathLike[str] | None = None,
) -> Rows: ...


@overload
def load_data(name: Literal["alice"], *, split: str | None = None, length: int | None = None) -> Rows: ...


def load_data(
    name: str,
    *,
    split: str | None = None,
    binarize: str | None = None,
    images: bool = False,
    root: str | os.PathLike[str] | None = None,
    length: int | None = None,
) -> Tensor | Rows:
    """Load a data set by its name; nothing is ever downloaded.

    * ``"crabs"``: 1000 ratios of forehead breadth to body length, (1000,) in float64 (Weldon 1893; Pearson 1894).
    * ``"digits"``: 1797 handwritten digits of 8 x 8 pixels from scikit-learn (Alpaydin and Kaynak 1998).
    * ``"mnist"``, ``"fashion-mnist"``: 28 x 28 pixels, 60000 to train and 10000 to test (LeCun, Cortes and Burges
      1998; Xiao, Rasul and Vollgraf 2017), read by torchvision from its own folder layout on disk.
    * ``"alice"``: Alice's Adventures in Wonderland (Carroll 1865), the first nine tenths of its paragraphs to train and
      the last to test: ``x``, (rows, length) codes in int64, and ``lengths``, (rows,); see `ppl_gen.data.text`.

    Images are `Rows` with ``x``, (rows, pixels) in float32 in [0, 1], and the labels ``y``, (rows,) in int64.

    Args:
        name: one of the names above.
        split: "train" (also where None is given) or "test", for data sets that have a split.
        binarize: grey values read as probabilities. "dynamic" redraws the pixels for every batch that a fit
            gathers, from the fit's seed; "fixed" draws them once, always the same; None keeps the grey values.
        images: give ``x`` as (rows, 1, height, width) instead of flat rows.
        length: the most characters in a sequence of a text, 128 unless given.
        root: the folder that holds ``MNIST/raw`` or ``FashionMNIST/raw``; else the variable PPL_GEN_DATA names it,
            else it is ``ppl_gen`` in the user's cache.

    Raises:
        ValueError: for an unknown name, or an option that the data set does not have.
        FileNotFoundError: for image files that are absent; says where it looked and what to do.
        ImportError: without scikit-learn for "digits"; without a torchvision that fits torch for the MNISTs.

    Example:
        >>> load_data("crabs").shape
        torch.Size([1000])
        >>> load_data("digits")
        Rows(x: (1797, 64) float32, y: (1797,) int64)
        >>> load_data("digits", images=True, binarize="dynamic")
        Rows(x: (1797, 1, 8, 8) float32, y: (1797,) int64, redrawn for every batch)
    """
    _check(name, split, binarize, images, root)
    if length is not None and name != "alice":
        raise ValueError(f"length: {name!r} is not a text that could be cut into sequences; leave length out")
    if name == "crabs":
        return crab_ratios()
    if name == "alice":
        return text_rows(alice_text("test" if split == "test" else "train"), length=128 if length is None else length)
    if name == "digits":
        x, y = _digits()
    else:
        pixels, y = image_rows(name, split or "train", root)
        x = pixels.to(torch.float32) / 255
    x = x.unsqueeze(1) if images else x.flatten(1)
    if binarize == "fixed":
        x = torch.bernoulli(x, generator=torch.Generator().manual_seed(_FIXED_SEED))
    return Rows({"x": x, "y": y}, on_batch=partial(_drawn, name="x") if binarize == "dynamic" else None)


def _check(
    name: str, split: str | None, binarize: str | None, images: bool, root: str | os.PathLike[str] | None
) -> None:
    require_choice("name", name, _NAMES)
    require_flag("images", images)
    if split is not None and name not in _WITH_SPLIT:
        raise ValueError(
            f"split: {name!r} is published whole, so expected None, got {split!r}; split its rows yourself"
        )
    require_choice("split", split, _SPLITS, optional=True)
    require_choice("binarize", binarize, _BINARIZE, optional=True)
    if root is not None:
        require_path("root", root)
    if name in ("crabs", "alice") and (binarize is not None or images):
        raise ValueError(f"binarize, images: {name!r} holds no images; leave both out")
    if root is not None and not _NAMES[name]:
        raise ValueError(f"root: {name!r} comes with a package and is read from no folder: expected None, got {root!r}")


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            'load_data("digits") reads the copy that scikit-learn ships: `pip install "ppl_gen[sklearn]"`'
        ) from error
    bunch = load_digits()
    # 17 grey levels, 0..16.
    return torch.as_tensor(bunch.images, dtype=torch.float32) / 16, torch.as_tensor(bunch.target, dtype=torch.int64)


def _drawn(batch: dict[str, Tensor], *, name: str) -> dict[str, Tensor]:
    """Draw the pixels of a batch from the global generator; a program that does not ask for them gets none."""
    return {key: torch.bernoulli(value) if key == name else value for key, value in batch.items()}
