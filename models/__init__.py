"""Text to rows with a Hugging Face model: find and load it, read and replace its activations, its losses."""
