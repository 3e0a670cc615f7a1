"""Prepared directories behind a URL: only where the bytes come from differs, not their order.

``urls``     which paths are URLs, and what can be wrong with one
``files``    read files below a URL by fsspec: in parallel, with time limits, and again
``fetched``  small files of a URL, such as its index, as files of this process
``cache``    whole shards on the node's disk, shared by its processes
``shards``   the shards of one index, from the cache or by ranges
``dataset``  the samples of a split from there
``fill``     which shards the node fetches ahead, by the order of the samples

Nothing but ``shards``, ``dataset`` and ``fill`` imports torch or numpy. Nothing is imported here.
"""
