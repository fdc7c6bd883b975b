"""Normalising flows: an invertible network between rows and codes, with the exact density of the rows."""

from ppl_gen.models.flows.affine import affine_flow
from ppl_gen.models.flows.autoregressive import iaf, maf
from ppl_gen.models.flows.coupling import real_nvp
from ppl_gen.models.flows.scalar import scalar_flow
from ppl_gen.models.flows.splines import spline_flow

__all__ = ["affine_flow", "iaf", "maf", "real_nvp", "scalar_flow", "spline_flow"]
