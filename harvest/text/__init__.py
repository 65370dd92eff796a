"""Documents from files, hub data sets and standard input."""
