"""Corpus to token shards, and a deterministic stream of samples from them.

``config``   what can be configured, and what can be wrong with it
``documents``  where each document came from, and where it lies
``prepare``  corpus → tokenizer, token shards and ``index.json``, parallel and resumable
``stream``   prepared directory → batches, in one global order for any number of ranks

Nothing is imported here, so that ``config`` and ``stream.index`` stay free of torch and numpy.
"""
