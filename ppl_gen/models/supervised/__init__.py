"""Programs of labels given rows: p(y | x)."""
