"""Sweeps: a run for each of several values."""
