"""A fit made again of what a folder holds: the program runs once, its algorithm takes no step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.fits.schema import site_table
from ppl_gen.fitting.posteriors.kinds import kind_named
from ppl_gen.workspace.closures import same_again

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit
    from ppl_gen.fitting.algorithm import Algorithm

__all__ = ["compare_draws", "restored"]


def restored(meta: dict[str, Any], tensors: dict[str, Tensor], program: Any, data: Any, given: Algorithm | None) -> Fit:
    from ppl_gen.fits.driver import fit as run_fit
    from ppl_gen.inference.restore import Restored
    from ppl_gen.program.program import Recipe

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    _compare_algorithm(meta, given, networks=bool(part("module/")))
    if data is None and meta["data"] is not None:
        raise ValueError(
            f"data: the training data {meta['data']}; pass them as data=... (a recipe "
            f"{'needs' if isinstance(program, Recipe) else 'may need'} them to build its program)"
        )
    if data is None:
        data = _saved_data(meta, part("data/"), part("constant/"))
    values, modules = (part("param/"), part("buffer/")), part("module/")
    kind = kind_named(meta["kind"])
    rebuilt = kind and partial(kind.rebuilt, {name: part(f"{name}/") for name in kind.parts})
    algorithm = Restored(meta["algorithm"], meta["guide"], *values, given, modules, rebuilt)
    with same_again(program):
        dtype = getattr(torch, meta["dtype"])
        built = run_fit(program, data, algorithm, seed=meta["seed"], dtype=dtype, progress=False)
    if site_table(built.info) != meta["sites"]:
        raise ValueError(
            f"program: {built.program.name!r} is not the program of this fit: its sites are {site_table(built.info)}, "
            f"those of the fit {meta['sites']}"
        )
    if built.guide_source != meta["guide"]:
        raise ValueError(
            f"algorithm: program and algorithm make a guide of the kind {built.guide_source!r}, the fit has one of the "
            f"kind {meta['guide']!r}; a fit that continued from another's guide (start=) cannot be loaded"
        )
    from ppl_gen.fits.result import Status

    return replace(
        built,
        algorithm=meta["algorithm"],
        settings=meta["settings"],
        records={name: [float(v) for v in values] for name, values in meta["records"].items()},
        checks={name: [float(v) for v in values] for name, values in meta["checks"].items()},
        status=Status(meta["status"]),
        message=meta["message"],
        criterion=meta.get("criterion", False),
        cost=meta["cost"],
        notes={**meta["notes"], **_not_loaded(modules, given)},
    )


def _compare_algorithm(meta: Mapping[str, Any], algorithm: Algorithm | None, *, networks: bool) -> None:
    """Refuse an algorithm that did not make the fit, and none where it takes one."""
    from ppl_gen.fitting.algorithm import Algorithm

    if algorithm is not None:
        given, kept = (
            (a, _without_addresses(s))
            for a, s in ((algorithm.label, repr(algorithm)), (meta["algorithm"], meta["settings"]))
        )
        if given != kept:
            raise ValueError(f"algorithm: this fit was made by {kept[0]}: {kept[1]}; got {given[0]}: {given[1]}")
    without = algorithm is not None and type(algorithm).outline is Algorithm.outline
    if meta["guide"] == "lost" or (without and (meta["guide"] == "own" or networks)):
        raise ValueError(
            f"algorithm: guide, posterior or networks of this fit cannot be made again, for {meta['algorithm']} does "
            "not implement outline(run); pg.load(path) without program= reads its draws and history"
        )
    if meta["guide"] == "own" and algorithm is None:
        raise ValueError(
            f"algorithm: {meta['algorithm']} made the guide or the posterior of this fit itself; pass it again, as "
            f"algorithm={meta['settings']}"
        )


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def compare_draws(fit: Fit, meta: Mapping[str, Any], contents: Path) -> None:
    """What an algorithm makes again may have learned something that is not in parameters: then its draws differ."""
    kind = kind_named(meta["kind"])
    if meta["guide"] != "own" or (kind is not None and kind.parts):
        return
    from ppl_gen.bridge import group, read_tree
    from ppl_gen.diagnostics.excerpt import excerpt
    from ppl_gen.fits.schema import check_tree

    kept = group(check_tree(contents / "draws.nc", meta, read_tree), "posterior")
    made = group(excerpt(fit), "posterior")
    if kept is None or made is None:
        raise ValueError(
            f"algorithm: no draws were saved that show whether {meta['algorithm']} makes the same posterior again"
        )
    for name in kept.data_vars:
        close = name in made and made[name].shape == kept[name].shape
        # One thousandth: other machines round otherwise; draws that follow other numbers differ by far more.
        if not close or not np.allclose(made[name].values, kept[name].values, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise ValueError(
                f"algorithm: the posterior that {meta['algorithm']} makes again draws other values of {name!r} than "
                "were saved: it holds what it learned outside Pyro's parameters, which is not saved"
            )


def _not_loaded(modules: Mapping[str, Tensor], algorithm: Algorithm | None) -> dict[str, str]:
    names = sorted({name.partition("/")[0] for name in modules})
    if not names or algorithm is not None:
        return {}
    return {"not loaded": f"network {', '.join(map(repr, names))} of a player; pass algorithm=... to pg.load"}


def _saved_data(meta: dict[str, Any], entries: dict[str, Tensor], constants: dict[str, Tensor]) -> Any:
    from ppl_gen.data.batching import constant
    from ppl_gen.fits.schema import positional

    whole = {name: constant(value) for name, value in constants.items()}
    every = {**entries, **whole, **meta["constants"]}
    if not (named := positional(meta)):
        return every
    return every[named[0]] if len(named) == 1 else tuple(every[name] for name in named)
