"""The target that no loss counts, the same for data and models."""

IGNORED = -100
"""In the place of a token that is not predicted: the ``ignore_index`` of ``F.cross_entropy``."""
