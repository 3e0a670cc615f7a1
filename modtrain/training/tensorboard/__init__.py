"""TensorBoard: one event directory a run, its tags, charts, pictures and hyperparameters."""
