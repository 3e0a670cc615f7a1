"""The names of metrics, and of lines of progress, that other packages read. Imports nothing."""

CAUSAL_LOSS = "held_out/causal_loss"
TOP_K_LOSS = "held_out/top_k_loss (not causal)"
CAUSAL_FLOPS = "held_out/causal_flops_per_token"
PROGRESS_MARK = ": step "
"""What each line of progress of a run has after the run's name."""
