"""Everything that changes weights: optimizers, schedules, averages, resampling."""
