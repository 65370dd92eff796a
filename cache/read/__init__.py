"""Read a cache: rows, documents, contexts, listings, verification."""
