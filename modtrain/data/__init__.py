"""Corpus to token shards, and a deterministic stream of samples from them.

``config``      what can be configured, and what can be wrong with it
``prepare``     corpus → tokenizer, token shards and ``index.json``, parallel and resumable
``index``       what a prepared directory holds; reads and checks ``index.json``
``tokens``      sample number → tokens
``order``       position in the stream → sample number, in constant memory
``batches``     which rank reads which positions at which step
``datamodule``  all of it for Lightning

Nothing is imported here, so that ``config`` and ``index`` stay free of torch and numpy.
"""
