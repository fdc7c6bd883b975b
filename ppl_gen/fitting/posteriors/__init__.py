"""What an algorithm learned about the latent sites: one kind a file, and what each answers in `base`."""
