"""The one place where torchvision is imported: image data sets that lie on disk."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from types import ModuleType

from torch import Tensor

__all__ = ["image_root", "image_rows", "torchvision_module"]

#: torchvision's class (also the name of its folder) of each data set.
_CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_PREFIXES = {"train": "train", "test": "t10k"}


def torchvision_module() -> ModuleType:
    """Import torchvision, or say how to fix the installation.

    torchvision's compiled operators fit exactly one torch release and build: a CPU-only torch beside a torchvision
    built for CUDA fails at import ("operator torchvision::nms does not exist").

    Raises:
        ImportError: where torchvision is absent, or was not built for the torch that is installed.
    """
    try:
        import torchvision
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError("image data needs torchvision, which is not installed: `pip install torchvision`") from error
    except (ImportError, RuntimeError, OSError) as error:
        found = " and ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision"))
        raise ImportError(
            f"torchvision cannot be loaded with this torch ({error}). Installed are {found}: the two must come as a "
            "pair, of matching releases and from the same source (a CPU-only torch needs a CPU-only torchvision). "
            "Fix it by installing both together: `pip install --force-reinstall torch torchvision`, with the same "
            "index options for both. What needs no images works without it."
        ) from error
    return torchvision


def image_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds image data: ``root``, else the variable PPL_GEN_DATA, else the user's cache.

    Example:
        >>> image_root("my/data").as_posix()
        'my/data'
    """
    if root is not None:
        return Path(root)
    if os.environ.get("PPL_GEN_DATA"):
        return Path(os.environ["PPL_GEN_DATA"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppl_gen"


def image_rows(name: str, split: str, root: str | os.PathLike[str] | None = None) -> tuple[Tensor, Tensor]:
    """Images as bytes (rows, 28, 28) and their labels (rows,), read through torchvision; nothing is downloaded.

    Raises:
        FileNotFoundError: where the files are absent; the message names them and says how to get them.
        ImportError: where torchvision is absent or does not fit the torch that is installed.
    """
    folder, kind = image_root(root), _CLASSES[name]
    raw, prefix = folder / kind / "raw", _PREFIXES[split]
    # torchvision looks for both splits, whichever is asked for.
    files = [f"{p}-{part}-ubyte" for p in _PREFIXES.values() for part in ("images-idx3", "labels-idx1")]
    absent = [file for file in files if not (raw / file).is_file()]
    if absent:
        raise FileNotFoundError(
            f"load_data({name!r}): no {', '.join(absent)} in {raw}. Nothing is downloaded by itself. Name the folder "
            f"that holds {kind}/raw/{prefix}-images-idx3-ubyte by root= or the variable PPL_GEN_DATA, or fetch the "
            f'files once: `python -c "from torchvision.datasets import {kind}; {kind}({str(folder)!r}, download=True)"`'
        )
    dataset = getattr(torchvision_module().datasets, kind)(str(folder), train=split == "train", download=False)
    return dataset.data, dataset.targets
