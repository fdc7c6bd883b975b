"""The site, as far as it can be checked without building it: names, links, labels, code cells, and the matrix."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_contract import ALGORITHMS, FITS

TOP = Path(__file__).parents[1]
DOCS = TOP / "docs"
PAGES = sorted(DOCS.glob("*.md"))
GENERATED = ("api", "gallery", "results")  # folders that the build fills


def _extension(name: str) -> ModuleType:
    """A module of docs/ext, which is on no path."""
    spec = importlib.util.spec_from_file_location(f"docs_ext_{name}", DOCS / "ext" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


facts = _extension("facts")


def _read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _cells(page: Path) -> list[str]:
    return re.findall(r"^```\{code-cell\}\n(.*?)^```", _read(page), re.M | re.S)


def _prose(page: Path) -> str:
    """The page without its code."""
    return re.sub(r"^```.*?^```", "", _read(page), flags=re.M | re.S)


def test_the_matrix_says_what_the_contract_test_expects() -> None:
    assert set(facts.algorithms()) == set(ALGORITHMS), "every algorithm and objective has a column"
    found = {program: {label for label, fits in row.items() if fits} for program, row in facts.matrix().items()}
    assert found == FITS


def test_what_is_missing_is_named() -> None:
    assert facts.missing("gan", "NUTS") == ["density", "no free parameters"]
    assert facts.missing("gaussian_mixture", "EM") == []
    assert "does not fit the program 'gan'" in facts.refusal("gan", "EM")


def test_every_public_name_has_an_entry_and_something_to_say() -> None:
    for module, names in facts.public_names().items():
        exported = importlib.import_module(module)
        assert names == sorted(exported.__all__) and names
        silent = [name for name in names if not (inspect.getdoc(getattr(exported, name)) or "").strip()]
        assert not silent, f"{module}: no docstring: {silent}"
    listed = {name for names in facts.public_names().values() for name in names}
    assert {"Fit", "compare", "SVI", "Plateau", "gaussian_mixture"} <= listed
    assert all(f"api/{module}" in _read(DOCS / "api.md") for module in facts.MODULES)


def test_every_page_is_in_a_table_of_contents() -> None:
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", _read(DOCS / "index.md"), re.M | re.S)
    listed = {line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")}
    assert listed == {page.stem for page in PAGES} - {"index"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        assert "://" not in target, f"{target}: the site names no host"
        path, _, label = target.partition("#")
        if path.split("/")[0] in GENERATED:
            assert path.split("/")[0] != "api" or path.removeprefix("api/").removesuffix(".md") in facts.MODULES
            continue
        found = DOCS / path if path else page
        assert found.is_file(), f"{target}: there is no {path}"
        if label:
            assert label in _anchors(found), f"{target}: no such heading"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_references_name_what_is_public(page: Path) -> None:
    listed = {name for names in facts.public_names().values() for name in names}
    named = {target.lstrip("~.").rsplit(".", 1)[-1] for target in re.findall(r"\{py:obj\}`([^`]+)`", _read(page))}
    assert named <= listed, f"not public: {sorted(named - listed)}"


@pytest.mark.parametrize("page", [page for page in PAGES if _cells(page)], ids=lambda page: page.stem)
def test_code_cells_are_python_and_import_what_is_there(page: Path) -> None:
    """They run when the site is built; here it is checked that they can be parsed, and that their imports exist."""
    assert _read(page).startswith("---\nfile_format: mystnb\n"), "without this line nothing on the page is run"
    for cell in _cells(page):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ppl_gen"):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {missing}"


def test_rows_of_lists_as_tables_are_complete() -> None:
    """A row of a list-table with a cell too few fails the build; this says so sooner."""
    for row in re.split(r"^\* - ", _read(DOCS / "formulas.md"), flags=re.M)[1:]:
        cells = 1 + len(re.findall(r"^  - ", row, re.M))
        assert cells == 4, row


def test_every_example_has_a_title() -> None:
    scripts = facts.examples()
    assert scripts and all(script.is_file() for script in scripts)
    for script in scripts:
        text = ast.get_docstring(ast.parse(_read(script)))
        assert text and 3 <= len(re.split(r"[:.?!]", text)[0]) <= 90, f"{script.name}: the first words are its title"


def test_nothing_names_a_machine() -> None:
    for path in [*PAGES, *DOCS.glob("ext/*.py"), DOCS / "conf.py"]:
        assert not re.search(r"/(home|root|work|tmp|usr)/", _read(path)), path
