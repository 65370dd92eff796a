"""Many SAEs from one stream of batches: the grid, the plan, the groups, the results."""
