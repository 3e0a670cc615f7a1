"""Optimizers by name: what builds each one, and what a run has to know of it."""
