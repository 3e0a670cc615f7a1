"""Scaling laws: loss over parameters, tokens and training FLOPs. Imports no torch."""
