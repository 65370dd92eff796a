"""`python -m sae_granary.harvest`, as torchrun starts it."""

from sae_granary.harvest.cli import main

if __name__ == "__main__":
    main()
