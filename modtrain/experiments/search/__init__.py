"""`modtrain search`: the best of many trials."""
