"""`modtrain eval`."""
