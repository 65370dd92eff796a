"""The cache as a run sees it: what it reads of it, in which order, and its passes over it."""
