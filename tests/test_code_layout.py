"""The code layout: what is installed, what an import costs, and that nothing is seen twice."""

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import ppl_gen

TOP = Path(__file__).parents[1]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())
LOCK = (TOP / "requirements.lock").read_text()
SOURCES = sorted((TOP / "ppl_gen").rglob("*.py"))


def _name(requirement: str) -> str:
    """The normalised name of the package that a requirement asks for."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement).group()).lower()


def _declared() -> dict[str, list[str]]:
    """Requirements by where they are declared: plain, each extra, the development group."""
    project = PROJECT["project"]
    return {"": project["dependencies"], **project["optional-dependencies"], "dev": PROJECT["dependency-groups"]["dev"]}


def _run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["models", "inference"])
def test_the_top_level_shows_the_two_folders_by_relative_links(name: str) -> None:
    link = TOP / name
    assert link.is_symlink() and os.readlink(link) == f"ppl_gen/{name}"
    assert link.resolve() == TOP / "ppl_gen" / name and (link / "__init__.py").is_file()


def test_lint_sees_every_file_once() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files", "."],
        capture_output=True,
        text=True,
        cwd=TOP,
        check=True,
    )
    python = [Path(line).relative_to(TOP).as_posix() for line in shown.stdout.splitlines() if line.endswith(".py")]
    assert not [path for path in python if path.startswith(("models/", "inference/"))]
    assert {path.relative_to(TOP).as_posix() for path in SOURCES} <= set(python), "ppl_gen/models is not left out"


def test_archives_hold_every_file_once(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)], capture_output=True, cwd=TOP, check=True
    )
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    inside = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = {path.relative_to(TOP).as_posix() for path in SOURCES} | {"ppl_gen/py.typed"}
    assert {name for name in inside if name.endswith((".py", ".typed"))} == expected
    assert all(name.startswith("ppl_gen/") for name in inside), "the wheel installs one package"
    names = [member.name.split("/", 1)[1] for member in tarfile.open(source).getmembers()]
    assert expected <= set(names) and {"LICENSE", "README.md", "pyproject.toml"} <= set(names)
    assert not [name for name in names if name.split("/")[0] in ("models", "inference")]
    tracked = _tracked("ppl_gen", "tests", "examples", "docs", "benchmarks")
    assert {"docs/index.md", "docs/images/vae.png", "benchmarks/README.md"} | tracked <= set(names)
    built = ("docs/_build/", "docs/api/", "docs/gallery/", "docs/results/")
    assert not [name for name in names if name.startswith(built)], "what `make docs` writes is not part of the source"


def _tracked(*folders: str) -> set[str]:
    """The files that git knows of; none in an unpacked archive."""
    listed = subprocess.run(["git", "ls-files", *folders], capture_output=True, text=True, cwd=TOP)
    return set(listed.stdout.splitlines())


CLUSTERS = {"dask", "distributed", "ray"}  # of extras that no set-up here installs: ray alone is 75 MB


def test_nothing_imports_a_top_level_models_or_inference() -> None:
    for path in [*SOURCES, *(TOP / "tests").rglob("*.py"), *(TOP / "examples").rglob("*.py")]:
        assert not {"models", "inference"} & _imported(path), path


def _imported(path: Path) -> set[str]:
    """Top-level names that a file imports absolutely, wherever and however in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return names


KINDS = TOP / "ppl_gen" / "fitting" / "posteriors"


def _asks_for_a_kind(node: ast.AST) -> bool:
    """``isinstance(x, ChainPosterior)``, ``type(x) is PointPosterior``, ``fit.learned.kind == "chains"``, and the like."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
        return bool(re.search(r"\w+Posterior\b", ast.unparse(node.args[-1])))
    if isinstance(node, ast.Compare):
        sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
        typed = any(side.startswith("type(") for side in sides) and any(re.search(r"\w+Posterior\b", s) for s in sides)
        return typed or any(re.search(r"(learned|posterior)\.kind$", side) for side in sides)
    return isinstance(node, ast.MatchClass) and ast.unparse(node.cls).endswith("Posterior")


@pytest.mark.parametrize(
    ("code", "asks"),
    [
        ("isinstance(fit.learned, ChainPosterior)", True),
        ("isinstance(fit.learned, (points.PointPosterior, GuidePosterior))", True),
        ("type(fit.learned) in (PointPosterior, ChainPosterior)", True),
        ("fit.learned.kind != 'point'", True),
        ("match x:\n case ChainPosterior(): pass", True),
        ("isinstance(learned, Posterior)", False),
        ("fit.judged_by == 'chains'", False),
        ("site.kind == 'latent'", False),
    ],
)
def test_questions_for_a_kind_are_told_apart(code: str, asks: bool) -> None:
    assert any(map(_asks_for_a_kind, ast.walk(ast.parse(code)))) is asks


def test_no_kind_of_posterior_is_known_outside_the_files_of_the_kinds() -> None:
    """A new kind answers by methods: where a branch asks for a class or its name, it would be answered wrongly there."""
    asked = [
        f"{path.relative_to(TOP)}:{node.lineno}"
        for path in SOURCES
        if KINDS not in path.parents
        for node in ast.walk(ast.parse(path.read_text()))
        if _asks_for_a_kind(node)
    ]
    assert not asked, "ask the posterior (`judged_by`, `point`, `by_chain`, `proposal`) instead"


def test_what_the_package_imports_is_declared_and_what_is_declared_is_imported() -> None:
    distributions = metadata.packages_distributions()
    imported = {name for path in SOURCES for name in _imported(path)} - set(sys.stdlib_module_names) - {"ppl_gen"}
    unknown = imported - set(distributions)
    assert not unknown - {"arviz_base", "arviz_stats", "arviz_plots"}, unknown  # ArviZ 1 is in parts
    used = {_name(owner) for name in imported & set(distributions) for owner in distributions[name]}
    declared = {_name(r) for extra, rows in _declared().items() if extra != "dev" for r in rows}
    declared -= {"ppl-gen"}  # the extra "all" is made of the others
    assert not used - declared - {"arviz-base", "arviz-stats", "arviz-plots"}
    # xarray loads the first two by itself when it writes a file; a Fabric is made by the user; joblib loads clusters;
    # nutpie is loaded by name, where it is installed.
    assert not declared - used - {"h5netcdf", "h5py", "lightning-fabric", "nutpie"} - CLUSTERS


def test_errors_name_extras_that_exist() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    named = {name for path in SOURCES for name in re.findall(r"ppl_gen\[([a-z,]+)\]", path.read_text())}
    assert named and named <= extras


def test_the_lock_pins_every_dependency_and_holds_no_address() -> None:
    lines = [line for line in LOCK.splitlines() if line and not line.lstrip().startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[^\s;@]+( ; .+)?", line) for line in lines), "pins and nothing else"
    assert not re.search(r"://|--\S*(index|find-links|host)|file:|\B/[a-z]", LOCK)
    pinned = {_name(line) for line in lines}
    declared = {_name(r) for rows in _declared().values() for r in rows} - {"ppl-gen"}
    assert declared - CLUSTERS <= pinned


def test_the_lock_serves_every_python_from_3_11() -> None:
    arviz = re.findall(r"^arviz==(\d+)\.\S+ ; (.+)$", LOCK, flags=re.MULTILINE)
    assert arviz == [("0", "python_full_version < '3.12'"), ("1", "python_full_version >= '3.12'")]
    assert PROJECT["project"]["requires-python"] == ">=3.11"


def test_no_requirement_is_capped() -> None:
    ranges = [r.split(";")[0] for extra, rows in _declared().items() if extra != "dev" for r in rows]
    capped = [r for r in ranges if re.search(r"<|==|~=", r)]
    assert not capped, "an upper bound makes tomorrow's releases uninstallable beside this package"


def test_import_loads_nothing_that_is_needed_later() -> None:
    later = ["arviz", "arviz_base", "arviz_stats", "matplotlib", "torchvision", "sklearn", "pandas", "xarray"]
    later += ["joblib", "jinja2", "rich", "typer", "torch._dynamo", "torch._inductor"]
    code = "import json, sys; import pyro; before = set(sys.modules); import ppl_gen; "
    code += f"print(json.dumps([name for name in {later} if name in sys.modules and name not in before]))"
    assert json.loads(_run(code)) == []


@pytest.mark.slow
def test_a_table_is_fitted_where_torchvision_cannot_be_imported() -> None:
    code = """
import sys
sys.modules["torchvision"] = None  # an import of it raises ImportError
import pandas, torch
import ppl_gen as pg
from ppl_gen.inference import EM, SVI
from ppl_gen.models import ppca, vae
rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).double()
fits = [pg.fit(ppca(latent=1), {"x": pandas.DataFrame(rows.numpy())}, EM(), seed=0)]
fits.append(pg.fit(vae(latent=1, hidden=(4,)), rows, SVI(steps=3), seed=0, progress=False))
for fit in fits:
    fit.evidence(), fit.sample(3), fit.diagnose(), fit.to_arviz()
print("fitted", len(fits))
"""
    assert "fitted 2" in _run(code)


@pytest.mark.slow
def test_import_costs_little_beyond_pyro() -> None:
    code = "import time, pyro; start = time.process_time(); import ppl_gen; print(time.process_time() - start)"
    # The least processor time of several runs, since other processes only ever add to it; bytecode of the first run is cached in
    # ordinary use, and the environment may have switched that off.
    spent = [float(_run(code, PYTHONDONTWRITEBYTECODE="")) for _ in range(4)]
    assert min(spent) < 0.3, spent


def test_versions_agree() -> None:
    version = PROJECT["project"]["version"]
    assert ppl_gen.__version__ == metadata.version("ppl_gen") == version
    assert re.search(rf"^## {re.escape(version)}\b", (TOP / "CHANGELOG.md").read_text(), re.M)
