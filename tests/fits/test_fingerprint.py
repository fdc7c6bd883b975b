"""A loaded fit notices that it is given another program, and only then."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_contract import ALGORITHMS, FITS

import ppl_gen as pg
from ppl_gen.fits.fingerprint import differences, fingerprint
from ppl_gen.inference import SVI, ContrastiveDivergence
from ppl_gen.models import energy_model, vae
from ppl_gen.models.catalogue import CATALOGUE

PROGRAM = """
import pyro, torch
import pyro.distributions as dist
from torch import nn

SIGMA = 0.3
TABLE = torch.arange(40.0)
START = torch.randn(())  # another in every process

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.power = 2
    def forward(self, x):
        return self.layer(x) ** self.power

net = Net()

def centre(x, shift=0.0):
    return x.mean() + shift

def unrelated(x):
    return x

def make(width=1.0, table=TABLE):
    prior = dist.Normal(0.0, 1.0)
    def model(x):
        pyro.module("net", net)
        start = pyro.param("start", START)
        loc = pyro.sample("loc", prior)
        with pyro.plate("data", len(x)):
            mean = loc + width + start + table.sum() + centre(x) + net(x[:, None])[:, 0]
            pyro.sample("x", dist.Normal(mean, SIGMA), obs=x)
    return model

model = make()
"""

X = torch.linspace(0.0, 1.0, 6)


def model_of(text: str, folder: Path, name: str = "program") -> Any:
    """The model of a file with this text, of which the source can be read."""
    file = folder / f"{name}.py"
    file.write_text(text)
    module = ModuleType(name)
    module.__file__ = str(file)
    exec(compile(text, str(file), "exec"), vars(module))
    return module.model


def entries(text: str, folder: Path, name: str = "program") -> dict[str, Any]:
    return fingerprint(pg.fit(model_of(text, folder, name), X, SVI(steps=1)))


CHANGES = {
    "a global": ("SIGMA = 0.3", "SIGMA = 0.5", "model.SIGMA was 0.3, is 0.5"),
    "a tensor": ("torch.arange(40.0)", "torch.arange(1.0, 41.0)", r"model.*table changed \(a tensor of shape \[40\]\)"),
    "a closure": ("width=1.0", "width=2.0", "model.width was 1.0, is 2.0"),
    "a prior": ("dist.Normal(0.0, 1.0)", "dist.Normal(0.0, 2.0)", "model.prior.scale was 1.0, is 2.0"),
    "the body": ("loc + width", "loc - width", "the source of model changed"),
    "a literal": ("** self.power", "** self.power + 1.0", "the source of model.net.forward changed"),
    "a helper": ("x.mean() + shift", "x.sum() + shift", "the source of model.centre changed"),
    "a default": ("shift=0.0", "shift=1.0", r"model.centre\(shift\) was 0.0, is 1.0"),
    "an attribute of a network": ("self.power = 2", "self.power = 3", "model.net.power was 2, is 3"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named(change: str, tmp_path: Path) -> None:
    old, new, words = CHANGES[change]
    assert PROGRAM.count(old) == 1
    found = differences(entries(PROGRAM, tmp_path), entries(PROGRAM.replace(old, new), tmp_path, "other"))
    assert any(re.search(words, sentence) for sentence in found), found


SAME = {
    "nothing": lambda text: text,
    "comments and blanks": lambda text: text.replace("        loc =", "        # a comment\n\n        loc ="),
    "docstrings": lambda text: text.replace("    def model(x):", '    def model(x):\n        """A model."""'),
    "names of locals": lambda text: text.replace("start =", "begin =").replace("+ start +", "+ begin +"),
    "unrelated code": lambda text: text.replace("    return x\n", "    return 3 * x\n") + "\nOTHER = 4\n",
    "another place": lambda text: "\n" * 50 + text,
}


@pytest.mark.parametrize("change", SAME)
def test_what_changes_nothing_is_not_noticed(change: str, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    other = entries(SAME[change](PROGRAM), tmp_path / "else", "other")
    kept = entries(PROGRAM, tmp_path)
    assert differences(kept, other) == []
    if change != "names of locals":
        assert differences({**kept, "python": "another"}, other) == [], "where bytecode cannot tell, the sources do"


def test_another_python_compares_sources(tmp_path: Path) -> None:
    kept, changed = entries(PROGRAM, tmp_path), entries(PROGRAM.replace("loc + width", "loc - width"), tmp_path, "b")
    assert differences({**kept, "python": "another"}, changed) == ["the source of model changed"]


@pytest.mark.slow
def test_other_processes_make_the_same_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    code = f"""
    import json, sys; sys.path.insert(0, {str(tmp_path)!r})
    import torch, program, ppl_gen as pg
    from ppl_gen.fits.fingerprint import fingerprint
    from ppl_gen.inference import SVI
    print(json.dumps(fingerprint(pg.fit(program.model, torch.linspace(0.0, 1.0, 6), SVI(steps=1)))))
    """
    kept = [
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert kept[0] == kept[1] and differences(*map(json.loads, kept)) == []
    assert differences(json.loads(kept[0]), entries(PROGRAM, tmp_path / "", "here")) == []


@pytest.mark.parametrize("program", CATALOGUE)
def test_equal_recipes_are_alike(program: str) -> None:
    entry, algorithm = CATALOGUE[program], ALGORITHMS[sorted(FITS[program])[-1]]()
    one, two = (fingerprint(pg.fit(entry.recipe(), entry.data(), algorithm, seed=3)) for _ in range(2))
    assert len(one["entries"]) > 2 and differences(one, two) == []
    assert json.loads(json.dumps(one)) == one, "JSON, as it stands"


def test_arguments_of_a_recipe_that_fit_the_same_weights(tmp_path: Path) -> None:
    data = torch.rand(20, 3)

    def recipe(**settings: Any) -> pg.Recipe:
        return vae(3, latent=2, hidden=(4,), likelihood="normal", **settings)

    pg.fit(recipe(), data, SVI(steps=2)).save(tmp_path / "fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pg.load(tmp_path / "fit", program=recipe())
    with pytest.warns(UserWarning, match=r"model.decoder.network.* was .*Tanh, is .*ReLU") as caught:
        back = pg.load(tmp_path / "fit", program=recipe(activation="relu"))
    assert caught[0].filename == __file__, "the warning points at the call"
    assert "Tanh" in back.notes["program"]


def test_the_first_weights_of_a_network_whose_copy_is_trained_do_not_matter(tmp_path: Path) -> None:
    def network(units: int = 4) -> torch.nn.Module:  # with other weights at each call
        return torch.nn.Sequential(torch.nn.Linear(2, units), torch.nn.SiLU(), torch.nn.Linear(units, 1))

    torch.manual_seed(0)
    chains = SVI(ContrastiveDivergence(steps=2), steps=3)
    fit = pg.fit(energy_model(network(), sweeps=5), torch.randn(40, 2), chains, seed=0)
    fit.save(tmp_path / "fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = pg.load(tmp_path / "fit", program=energy_model(network(), sweeps=5))
    assert torch.equal(again.sample(5, seed=1)["x"], fit.sample(5, seed=1)["x"])
    with pytest.warns(UserWarning, match="sweeps"):
        pg.load(tmp_path / "fit", program=energy_model(network(), sweeps=6))
    with pytest.raises(ValueError):
        pg.load(tmp_path / "fit", program=energy_model(network(5), sweeps=5))
