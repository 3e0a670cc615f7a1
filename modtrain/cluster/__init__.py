"""Slurm: jobs rendered, checked, submitted, followed and cancelled."""
