"""Importance weights of particles and of draws, and their quality."""
