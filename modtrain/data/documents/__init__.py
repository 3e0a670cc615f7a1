"""Where each document of a prepared directory came from, and where it lies in the shards.

``record``   what is stored of a document, and how a split's records are written
``table``    the records of a split, mapped from disk: documents by place, documents seen twice

`modtrain prepare` writes them beside the shards; directories of earlier versions have none.
Nothing is imported here.
"""
