"""Harvest the rows of a cache again: to extend it, to add hook points to it, to repair it."""
