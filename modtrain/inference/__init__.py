"""Evaluation, generation and inspection with trained models."""
