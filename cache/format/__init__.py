"""What is promised: the layout of a cache on disk, its manifest and records, storage types, documents."""
