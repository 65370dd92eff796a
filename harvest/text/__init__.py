"""Documents from files, hub datasets and standard input."""
