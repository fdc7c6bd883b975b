"""The contract between the driver and an algorithm: runs, outcomes, posteriors, and the one loop."""
