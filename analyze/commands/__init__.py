"""The commands of `sae-analyze`, one per file, and the options that they share."""
