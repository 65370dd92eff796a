"""Reading and writing SAEs: our own format, and one adapter per foreign format."""
