"""The commands of `sae-cache`, one per file, and what they share."""
