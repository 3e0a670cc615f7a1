"""`modtrain isoflop`: grids of models at equal training FLOPs."""
