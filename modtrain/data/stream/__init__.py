"""From shards to batches, in one global order.

``prepared``    names of a prepared directory's files, and what its index says of them
``index_json``  ``index.json``, read with its types checked, and written
``index``       a prepared directory, its files checked against its index
``dataset``     the samples of a split
``order``       position in the stream → sample, which ``samplers`` share out over steps and ranks
``batch``       samples → inputs, targets, document numbers, padding
``loader``      batches by workers or threads
``datamodule``  all of it for Lightning

Nothing is imported here.
"""
