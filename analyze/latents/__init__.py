"""Statistics, examples and neighbors of every latent, and how they are printed."""
