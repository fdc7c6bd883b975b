"""Data sets that come with the package or lie on disk, and the rows they are made of."""

from ppl_gen.data.datasets import load_data
from ppl_gen.data.rows import Rows
from ppl_gen.data.text import decoded, encoded, text_rows

__all__ = ["Rows", "decoded", "encoded", "load_data", "text_rows"]
