"""Codes on disk: of a cache, of texts, pooled per document, in other formats."""
