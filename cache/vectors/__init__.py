"""Vectors from anywhere (embeddings of a service, a vision model, proteins) as a cache: one row per vector."""
