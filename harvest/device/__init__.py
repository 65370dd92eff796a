"""What runs between the model and the writer: casts, sums and copies to the host."""
