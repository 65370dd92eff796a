"""SAE and cache -> sparse codes, and what is read from them."""
