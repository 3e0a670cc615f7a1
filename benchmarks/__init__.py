"""Side-by-side measurements, each a command whose last line is JSON."""
