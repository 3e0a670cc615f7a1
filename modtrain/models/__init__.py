"""The model in plain PyTorch: layers, routing, depth, and what they cost."""
