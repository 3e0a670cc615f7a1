"""The check of every node before the first step: `check_nodes`; by choice `check_all_reduce`."""
