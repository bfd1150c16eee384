"""Pruning: a Lightning loop whose epochs end with one step of a method."""
