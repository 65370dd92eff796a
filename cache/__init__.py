"""The on-disk activation cache; `FORMAT.md` beside this file is the byte-level promise.

format/   what is promised: layout, manifest, records, storage types, documents
write/    CacheWriter and its shards
read/     open_cache and what can be asked of a cache
load/     shuffled batches on a device, whole contexts in harvest order
"""
