"""Sinks: where metrics of a run are written."""
