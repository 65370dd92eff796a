"""What the commands of `sae-train` do with their flags; `train.cli` holds the commands."""
