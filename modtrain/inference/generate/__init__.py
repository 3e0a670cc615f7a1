"""`modtrain generate`: decoding with a cache."""
