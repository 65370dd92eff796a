"""How a model runs on its devices: placed by accelerate, with fewer bits, compiled."""
