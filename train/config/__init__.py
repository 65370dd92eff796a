"""From flags, YAML and recommendations to the one resolved config of a run."""
