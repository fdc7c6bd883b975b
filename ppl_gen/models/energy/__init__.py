"""Programs with an energy in place of a density."""
