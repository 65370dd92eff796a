"""What changes weights: optimizers, schedules, averages, resampling."""
