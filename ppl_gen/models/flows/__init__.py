"""Normalising flows: an invertible network between rows and codes, with the exact density of the rows."""

from ppl_gen.models.flows.affine import affine_flow
from ppl_gen.models.flows.autoregressive import iaf, maf
from ppl_gen.models.flows.bits import bits_per_dimension
from ppl_gen.models.flows.continuous import ffjord
from ppl_gen.models.flows.coupling import real_nvp
from ppl_gen.models.flows.glow import glow
from ppl_gen.models.flows.neural import naf
from ppl_gen.models.flows.nice import nice
from ppl_gen.models.flows.scalar import scalar_flow
from ppl_gen.models.flows.splines import spline_flow

__all__ = [
    "affine_flow",
    "bits_per_dimension",
    "ffjord",
    "glow",
    "iaf",
    "maf",
    "naf",
    "nice",
    "real_nvp",
    "scalar_flow",
    "spline_flow",
]
