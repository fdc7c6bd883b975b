"""Variational autoencoders, with and without labels."""
