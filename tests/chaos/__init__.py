"""Runs that are killed, damaged and started otherwise, at random: see `tests.chaos.__main__`."""
