"""State of one rank alone, such as random states: nested plain values as one tensor of bytes."""

from __future__ import annotations

import io
from typing import Any

import torch

from modtrain.checkpoint.parts import Part, unsharded_part
from modtrain.checkpoint.reading import TensorReader, translate_load_errors


def _key(rank: int) -> str:
    return f"ranks.{rank}.state"


def rank_part(state: Any, rank: int) -> Part:
    """Return ``state``, CPU tensors and plain values, as ``rank``'s part of a checkpoint."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return unsharded_part(_key(rank), torch.frombuffer(stream.getbuffer(), dtype=torch.uint8))


def read_rank_state(reader: TensorReader, rank: int) -> Any:
    """Return the state that ``rank`` saved, None if it saved none.

    Raises:
        CheckpointError: it is more than plain data.
    """
    if _key(rank) not in reader:
        return None
    content = reader.read(_key(rank))
    with translate_load_errors(reader.path):
        stream = io.BytesIO(content.numpy().tobytes())
        return torch.load(stream, weights_only=True, map_location="cpu")
