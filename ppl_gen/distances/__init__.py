"""Distances between two sets of rows, for rows and features of any model."""

from ppl_gen.distances.frechet import frechet_distance
from ppl_gen.distances.mmd import mmd

__all__ = ["frechet_distance", "mmd"]
