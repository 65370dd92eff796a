"""Evaluation of SAEs on held-out rows and through their language model."""
