"""Files of an SAE: our own, and one adapter per foreign format."""
