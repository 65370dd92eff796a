"""A run's view of its cache: which rows it reads, in which order, and its passes over them."""
