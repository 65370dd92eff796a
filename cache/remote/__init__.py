"""Caches on remote storage: push, pull and read through fsspec. Every byte that arrives is checked by its checksum."""
