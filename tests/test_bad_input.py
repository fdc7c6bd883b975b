"""Every mistake of the table gets its own answer, before anything has changed."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_input_cases import CASES, Case, fitted, labels, names, rows
from conftest import generators, store
from torch import Tensor

import ppl_gen as pg
from ppl_gen import inference, models
from ppl_gen.models.catalogue import CATALOGUE

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose


def _files(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and "-" not in file.parent.name)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _looks(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.clone().detach(), tensor._version, tensor.requires_grad, tensor.grad


@contextlib.contextmanager
def unchanged(*tensors: Tensor, folder: Path | None = None) -> Iterator[None]:
    """Fails if generators, Pyro's parameters, these tensors or the files of a folder are not as they were."""
    kept, written = [_looks(tensor) for tensor in tensors], {} if folder is None else _files(folder)
    random, params = generators(), store()
    yield
    assert generators() == random, "a generator moved"
    assert store() == params, "Pyro's parameter store changed"
    for tensor, (value, version, asked, gradient) in zip(tensors, kept, strict=True):
        assert torch.equal(tensor.detach(), value) and tensor._version == version, "the data were written to"
        assert tensor.requires_grad is asked and tensor.grad is gradient, "the data gained a gradient"
    assert folder is None or _files(folder) == written, "a file changed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.mark.filterwarnings("ignore:.*effective.*:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_is_answered_before_anything_changes(case: Case, folder: Path) -> None:
    known = names(folder)
    learned = [value.clone() for value in fitted().state.unconstrained.values()]
    with unchanged(rows(), labels(), folder=folder), pytest.raises(case.error) as caught:
        eval(case.code, known)
    assert type(caught.value) is case.error, "not a subclass that happens to fit"
    first = str(caught.value).splitlines()[0]
    assert first.startswith(case.words), first
    assert all(map(torch.equal, learned, fitted().state.unconstrained.values())), "the fit changed"


def test_the_table_covers_every_public_name() -> None:
    """A model, an objective or an algorithm that is added without a row is noticed here."""
    made = {"Iterative", "Algorithm", "Game", "Loss", "Objective", "Player", "PrincipalComponents"}
    text = "\n".join(case.code for case in CASES)
    missing = [name for module in (models, inference) for name in module.__all__ if f"{name}(" not in text]
    assert set(missing) <= made | {"affine_flow", "iaf"}, "these share their checks with maf and real_nvp"
    asked = ("evidence", "posterior", "predict", "sample", "to_arviz", "diagnose", "save", "module")
    assert all(f".{name}(" in text for name in (*asked, "marginal_likelihood", "prior_predictive", "load_data"))


def test_what_is_right_passes() -> None:
    """The table would be worthless if everything were refused."""
    assert pg.check(models.ppca(4, 2), rows()).rows == 40
    assert pg.check(models.m2(4, classes=2), {"x": rows(), "y": labels() - 1}).rows == 40, "-1 is a missing label"
    fit = fitted()
    assert fit.sample(3, given={"z": torch.zeros(3, 2)}, seed=0)["x"].shape == (3, 4)
    assert fit.evidence(rows()[:1]).rows == 1 and fit.predict(rows()[:2], draws=1)["x"].shape == (1, 2, 4)
    assert set(CATALOGUE) >= {"ppca", "gan", "char_rnn"}


def test_the_site_shows_every_part_of_the_table() -> None:
    """Each is generated from this list when the site is built."""
    page = (Path(__file__).parents[1] / "docs" / "bad_input.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```\{bad-input-table\} (.*)$", page, re.M)
    assert shown == list(dict.fromkeys(case.part for case in CASES))


@pytest.mark.slow
def test_numbers_of_numpy_serve_where_pythons_do(folder: Path) -> None:
    two, half = np.int64(2), np.float32(0.5)
    for build in (
        lambda: inference.EM(steps=two, tolerance=half, restarts=two),
        lambda: inference.NUTS(draws=two, chains=two, target_accept=half, jitter=half, max_tree_depth=two),
        lambda: inference.SVI(steps=two, lr=half, clip_norm=half, objective=inference.ELBO(particles=two, beta=half)),
        lambda: models.char_rnn(two),
        lambda: models.vae(two, latent=two, hidden=two),
    ):
        build()
    compared = pg.compare(
        models.ppca(4, 2), rows(), {"a": inference.SVI(steps=two)}, holdout=half, seeds=[two], n_jobs=np.int64(1)
    )
    assert compared["a"].seed == 2
    assert pg.fit(models.ppca(4, 2), rows(), inference.SVI(steps=1), validate_every=two).sample(two)["x"].shape[0] == 2


@pytest.mark.parametrize("place", ["folder", "under a file"])
def test_a_report_goes_to_a_file_that_can_be_made(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path if place == "folder" else tmp_path / "file" / "report.html"
    with pytest.raises(ValueError, match="^path: "):
        pg.Comparison((), "nothing").report(path)
