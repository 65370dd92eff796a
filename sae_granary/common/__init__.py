"""What every stage uses, each thing once: files, locks, signals, counts, devices, threads, the command line apps."""
