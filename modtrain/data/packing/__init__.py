"""Sequences of whole documents: which documents go together, and what is stored of it.

``best_fit``  documents → sequences, in the order and the places that they are stored in
``rows``      the files beside the shards that say how long each sequence is, and what is in it
``summary``   what the index says of it

Nothing is imported here.
"""
