"""Comparisons and sweeps made of several runs."""
