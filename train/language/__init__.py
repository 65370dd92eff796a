"""The language model that an SAE stands in: found, checked, spliced, and asked what it lost."""
