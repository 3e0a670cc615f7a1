"""Several prepared directories read as one stream, by weights that may change over the run.

``config``    sources and stages as they are configured
``shares``    weights → how many samples of a block each source has, and which slot is whose
``schedule``  stages → segments of the stream, with the epochs that each source may be read
``summary``   the sources' indexes as one
``stream``    the door: order and data set of one prepared directory, or of a mixture of them

A position of the stream leads to (source, index in the source) by a formula, so that the position
stays one integer. Each source is the stream of one directory. Nothing is imported here; ``stream``
alone needs torch and numpy.
"""
