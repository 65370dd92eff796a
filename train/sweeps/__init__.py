"""Training many SAEs from one stream of batches: grid, plan, groups, results."""
