"""Processes: how they start, agree, exchange tensors and are watched."""
