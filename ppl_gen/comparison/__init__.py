"""Algorithms on one program, judged on the same held-out rows."""
