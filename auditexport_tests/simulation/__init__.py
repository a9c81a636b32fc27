"""Simulated stores and a scheduler under the real core, every step chosen by a seed. Not complete: the runs are not on it yet."""
