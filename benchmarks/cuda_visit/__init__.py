"""What to run on a machine with a CUDA GPU: checks against the CPU, and times against the roofline."""
