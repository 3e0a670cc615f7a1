"""`modtrain compare`: several models on one budget."""
