"""`python -m sae_granary.analyze`: the command sae-analyze."""

from sae_granary.analyze.cli import main

if __name__ == "__main__":
    main()
