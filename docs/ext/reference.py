"""The reference: one page per public name, written from the `__all__` of the public modules, none forgotten."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from facts import MODULES, public_names
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging

LOG = logging.getLogger(__name__)

PAGE = """# {module}

```{{eval-rst}}
{about}

.. currentmodule:: {module}

.. autosummary::
   :toctree: names

{names}
```
"""


def pages() -> dict[str, str]:
    """Module -> the text of its page."""
    texts = {}
    for module, names in public_names().items():
        about = (importlib.import_module(module).__doc__ or "").strip()
        texts[module] = PAGE.format(module=module, about=about, names="\n".join(f"   {name}" for name in names))
    return texts


def write(app: Sphinx, config: Config) -> None:
    """Before the pages are counted, so that autosummary finds these and writes those that they list."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    for module, text in pages().items():
        (folder / f"{module}.md").write_text(text, encoding="utf-8")


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Element | None:
    """Docstrings say `Fit.evidence` or `pg.fit` wherever they stand; each is sought in all public modules."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains.python_domain
    target = node["reftarget"].removeprefix("pg.").removesuffix("()")
    for module in MODULES:
        if (full := f"{module}.{target}") in domain.objects:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", full, node, content)
    return None


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """A public name without an entry fails the build."""
    known = env.domains.python_domain.objects
    for module, names in public_names().items():
        for name in names:
            if f"{module}.{name}" not in known:
                LOG.warning("reference: no entry for %s.%s", module, name)


def alias(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """The name of a type is described by the comment above it in the module that makes it, not by the type."""
    if what != "data":
        return
    short = name.rpartition(".")[2]
    for module in [m for m in sys.modules if m.partition(".")[0] == "ppl_gen"]:
        if vars(sys.modules[module]).get(short) is value:
            said = ModuleAnalyzer.for_module(module).find_attr_docs().get(("", short))
            if said:
                lines[:] = said
                return


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("config-inited", write)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", alias)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
