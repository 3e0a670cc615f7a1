"""Mixture-of-Depths: routers, selection of tokens, and the layer around a module."""
