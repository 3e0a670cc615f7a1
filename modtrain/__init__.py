"""modtrain: train Mixture-of-Depths language models on one machine or many."""

__version__ = "0.1.0"
