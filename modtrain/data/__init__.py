"""Corpus to token shards, and a deterministic stream of samples from them."""
