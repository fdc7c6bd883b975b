"""Sequences: hidden Markov models and recurrent networks."""
