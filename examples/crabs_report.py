"""Pearson's crabs, 1894: which algorithm, did it work, and how do we know? The answer is a page, crabs_report.html."""

import os

import ppl_gen as pg
from ppl_gen.inference import CAVI, EM, NUTS, SVI
from ppl_gen.models import gaussian_mixture

quick = bool(os.environ.get("PPL_GEN_QUICK"))
comparison = pg.compare(
    gaussian_mixture(components=2),
    pg.load_data("crabs"),  # 1000 ratios of forehead breadth to body length
    {
        "EM": EM(),
        "CAVI": CAVI(),
        "SVI": SVI(steps=200 if quick else 2000, lr=0.01),
        "NUTS": NUTS(draws=100 if quick else 1000, chains=2 if quick else 4, target_accept=0.95),
    },
    seeds=[0],
)
print(comparison)
comparison.plot().savefig("crabs_report.png", dpi=120)
page = comparison.report("crabs_report.html")
print("the page:", page)
table = comparison.table().set_index("algorithm")
assert table["difference"].notna().all(), "every algorithm is compared"
assert all(name in page.read_text() for name in table.index), "and stands on the page"
assert quick or table["difference"].abs().max() < 0.02, "all predict alike"
assert quick or table["verdict"]["NUTS"].startswith("trust"), "the chains can be trusted"
