"""Write a cache: shards, the commit record, resuming."""
