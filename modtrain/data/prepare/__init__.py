"""From text files to a tokenizer and shards."""
