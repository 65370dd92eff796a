"""Shared by every stage: files, locks, signals, counts, devices, threads, command line apps."""
