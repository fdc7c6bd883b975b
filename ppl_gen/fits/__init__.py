"""`fit()`, the `Fit` that it returns, and a fit on disk."""
