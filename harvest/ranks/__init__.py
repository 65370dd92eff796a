"""Harvest one cache by several processes: blocks of documents, leases, and the join at the end."""
