"""`python -m sae_granary.cache`: the command sae-cache."""

from sae_granary.cache.cli import main

if __name__ == "__main__":
    main()
