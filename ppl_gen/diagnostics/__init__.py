"""What a fit is worth: ArviZ, k-hat, verdicts, and which units of a code are used."""

from ppl_gen.diagnostics.units import ActiveUnits, active_units, code_means

__all__ = ["ActiveUnits", "active_units", "code_means"]
