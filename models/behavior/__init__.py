"""What a loaded model does with its input, and what a pass leaves behind in it."""
