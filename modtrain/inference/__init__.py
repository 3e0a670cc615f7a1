"""Held-out evaluation of trained models."""
