"""A language model with an SAE in it: found, checked, spliced, and asked what it lost."""
