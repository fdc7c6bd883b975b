"""Expectation-maximisation: what the densities of a program look like, and the M-steps that follow."""
