"""`modtrain search-patterns`: a search over the capacities of the layers."""
