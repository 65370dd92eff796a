"""What a run needs of memory and disk."""
