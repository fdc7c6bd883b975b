"""What a fit must not change: seeds, the parameter store, the user's modules, and what functions remember."""
