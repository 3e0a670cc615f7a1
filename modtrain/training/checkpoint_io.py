"""The seam through which Lightning saves and loads in our format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH

from modtrain.errors import CheckpointError
from modtrain.training import checkpoint


class ShardedCheckpointIO(CheckpointIO):
    """Reads and writes `modtrain.training.checkpoint` directories."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` aside, flush it, rename it to ``path``."""
        del storage_options
        save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint; it is always plain data, on the CPU, whatever is asked for."""
        del map_location, weights_only
        return checkpoint.load(Path(path))

    def remove_checkpoint(self, path: _PATH) -> None:
        """Refuse: pruning is the checkpoint callback's, which knows what is durable."""
        raise CheckpointError(f"{path} is pruned by the checkpoint callback alone")


def save(state: dict[str, Any], path: Path) -> None:
    """Save Lightning's dictionary under its own step."""
    checkpoint.save(path, state, int(state["global_step"]))
