"""Ours beside SAELens, dictionary_learning and sparsify, in the interop environment: see `__main__`."""
