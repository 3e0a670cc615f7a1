"""Rotary positions (arXiv 2104.09864), and their scalings for longer texts."""
