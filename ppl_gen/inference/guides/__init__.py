"""The guide of a run: how it is made, and what it must satisfy."""
