"""Data sets that come with the package or lie on disk, and the rows they are made of."""

from ppl_gen.data.datasets import load_data
from ppl_gen.data.rows import Rows

__all__ = ["Rows", "load_data"]
