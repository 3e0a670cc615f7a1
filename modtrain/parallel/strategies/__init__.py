"""Lightning's strategies as modtrain uses them."""
