"""Training with Lightning: budget, schedules, checkpoints, callbacks."""
