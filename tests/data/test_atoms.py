"""Values that many rows share exactly: no density is bounded there, and whoever fits one is told."""

from __future__ import annotations

import pytest
import torch
from sklearn import datasets

import ppl_gen as pg
from ppl_gen.data.atoms import atoms
from ppl_gen.inference import EM, SVI
from ppl_gen.models import affine_flow, gaussian_mixture, glow, maf, naf, nice, real_nvp, scalar_flow, spline_flow

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # runs are short on purpose

UNBOUNDED = {
    "maf": maf(),
    "naf": naf(),
    "real_nvp": real_nvp(),
    "spline_flow": spline_flow(),
    "glow": glow(),
}


def rows(share, count=400):
    """Normal numbers, two columns; of the second, a ``share`` is exactly zero."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 2, generator=generator) + 3.0
    x[torch.randperm(count, generator=generator)[: round(share * count)], 1] = 0.0
    return x


@pytest.mark.parametrize("share", [0.025, 0.2, 0.5, 0.95])
def test_an_atom_is_found_with_its_share(share):
    (found,) = atoms(rows(share))
    assert found.column == 1 and found.value == 0.0 and found.share == pytest.approx(share)


@pytest.mark.parametrize("digits", [0, 1, 2, 6])
def test_rounded_numbers_hold_none(digits):
    x = rows(0.0, 3000)
    assert atoms(x) == [] and atoms((x * 10**digits).round() / 10**digits if digits else (3 * x).round()) == []
    assert atoms(x[:, 0]) == [] and atoms(x.reshape(-1, 1, 3, 2)) == [] and atoms(x[:5]) == []


@pytest.mark.parametrize(
    ("name", "columns"), [("iris", []), ("wine", []), ("breast_cancer", [6, 7, 16, 26]), ("diabetes", [1])]
)
def test_measured_data_hold_those_that_they_are_known_for(name, columns):
    """Concavities of none are exactly zero in 13 tumours of 569; one column of the last is the sex."""
    x = torch.as_tensor(getattr(datasets, f"load_{name}")().data)
    assert [atom.column for atom in atoms(x)] == columns


@pytest.mark.parametrize("name", UNBOUNDED)
def test_flows_refuse_what_would_let_them_grow_without_bound(name):
    with pytest.raises(ValueError, match=r"data: column 1 is exactly 0 in 30% of the rows: no density .* is bounded"):
        pg.fit(UNBOUNDED[name], rows(0.3), SVI(steps=2))
    assert "repeated values" not in pg.fit(UNBOUNDED[name], rows(0.0), SVI(steps=2)).notes


def test_one_number_and_images_are_looked_at_too():
    with pytest.raises(ValueError, match=r"column 0 is exactly 0 in 30%"):
        pg.fit(scalar_flow(), rows(0.3)[:, 1], SVI(steps=2))
    images = torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[images < 0.5] = 0.0
    flow = real_nvp(channels=4, blocks=1)
    with pytest.raises(ValueError, match=r"the pixel at channel, line and column .* is exactly 0 in .*levels="):
        pg.fit(flow, images, SVI(steps=2))
    shades = (images * 255).round() / 255
    assert pg.fit(real_nvp(channels=4, blocks=1, levels=256), shades, SVI(steps=2)).cost["steps"] == 2
    assert pg.fit(flow, shades + torch.rand(shades.shape) / 256, SVI(steps=2)).cost["steps"] == 2, "dequantised"


def test_densities_that_stay_bounded_take_atoms():
    for recipe in (affine_flow(), nice()):
        fit = pg.fit(recipe, rows(0.3), SVI(steps=2))
        assert fit.cost["steps"] == 2 and "repeated values" not in fit.notes


def test_a_few_equal_rows_are_a_doubt_of_the_verdict(tmp_path):
    fit = pg.fit(maf(), rows(0.03), SVI(steps=2))
    assert "column 1 is exactly 0 in 3% of the rows" in fit.notes["repeated values"]
    verdict = fit.verdict
    assert not verdict.trusted and "column 1 is exactly 0 in 3%" in str(verdict)


def test_a_component_on_an_atom_is_told_and_not_trusted():
    clean, held = (pg.fit(gaussian_mixture(2), rows(share).double(), EM(), seed=0) for share in (0.0, 0.3))
    least = held.point["scale_tril_standard"].diagonal(dim1=-2, dim2=-1).min()
    assert float(least) == pytest.approx(1e-3, rel=1e-6), "the root of the floor: its evidence is the floor's doing"
    assert not held.verdict.trusted and "column 1 is exactly 0 in 30%" in str(held.verdict)
    assert clean.verdict.trusted and "repeated values" not in clean.notes
