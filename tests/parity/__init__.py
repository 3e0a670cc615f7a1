"""Holds what the program computes to recorded values; see `tests.parity.__main__`."""
