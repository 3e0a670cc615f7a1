"""Tokenizers of other libraries, made a ``tokenizer.json`` that gives the same numbers.

``source``               what ``tokenizer.path`` names, as the content of a ``tokenizer.json``
``sentencepiece_model``  a SentencePiece model, unigram or BPE
``tiktoken_ranks``       a file of ranks for tiktoken
``encodings``            what such a file does not have: the pattern and the special tokens

What cannot be converted without another number for some text is refused by name. Each conversion
is compared with the library itself on hard texts before it is used. Nothing is imported here.
"""
