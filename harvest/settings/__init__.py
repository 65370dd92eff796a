"""From flags, YAML and Python keywords to the one config of a harvest, and back to YAML."""
