"""The names of the held-out metrics that other packages read. Imports nothing."""

CAUSAL_LOSS = "held_out/causal_loss"
TOP_K_LOSS = "held_out/top_k_loss (not causal)"
CAUSAL_FLOPS = "held_out/causal_flops_per_token"
