"""Labelled draws: one face for ArviZ 0.23 (Python 3.11, `InferenceData`) and ArviZ 1.x (3.12 on, `xarray.DataTree`).

The xarray datasets are built here and ArviZ's container is put around them last, so both versions hold the same
variables, dimensions and coordinates, and a file written under one is read under the other.
"""

from ppl_gen.bridge.files import read_tree, write_tree
from ppl_gen.bridge.trees import GROUPS, to_tree
from ppl_gen.bridge.versions import az_psis, az_summary, group, group_names

__all__ = ["GROUPS", "az_psis", "az_summary", "group", "group_names", "read_tree", "to_tree", "write_tree"]
