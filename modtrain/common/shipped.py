"""Folders that ship with modtrain: inside the package when installed, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """Return the shipped ``conf/``."""
    return _shipped("conf")


def slurm_dir() -> Path:
    """Return the shipped ``slurm/``."""
    return _shipped("slurm")


def _shipped(name: str) -> Path:
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
