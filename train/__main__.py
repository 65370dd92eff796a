"""`python -m sae_granary.train`, as `torchrun -m sae_granary.train run ...` starts it: the command sae-train."""

from sae_granary.train.cli import main

if __name__ == "__main__":
    main()
