"""What is imported when."""
