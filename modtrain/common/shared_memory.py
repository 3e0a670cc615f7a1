"""The memory that processes of one machine share."""

from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
"""On Linux: batches that workers of a DataLoader have read, and the locks between workers."""
