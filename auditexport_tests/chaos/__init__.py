"""Randomised histories against real servers: `make chaos`."""
