"""What checkpoints hold, read whole in one process."""

from pathlib import Path
from typing import Any

import torch

from modtrain.checkpoint.layout import verify
from modtrain.checkpoint.parts import digest_of, parts_of
from modtrain.checkpoint.reading import TensorReader, read_extra_state
from modtrain.checkpoint.recovery import latest
from modtrain.checkpoint.state import MODEL
from modtrain.checkpoint.writing import write
from modtrain.distributed.process_group import ONE_PROCESS


def save_whole(path: Path, tensors: dict[str, torch.Tensor], step: int, rest: Any = None) -> None:
    """Write the checkpoint ``path`` in one process, without a model."""
    parts = parts_of(tensors, 0, 1)
    write(path, lambda: parts, rest or {}, step, ONE_PROCESS, digest_of(tensors))


def load_whole(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Read the tensors of a checkpoint, and the rest, after checking it against its manifest."""
    verify(path)
    return dict(TensorReader(path)), read_extra_state(path)


def flip_bit(file: Path, at: int | None = None) -> None:
    """Change a bit of a file, in its middle or in the byte ``at``."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    file.write_bytes(content)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, optimizer state, and each rank's own."""
    reader = TensorReader(path)
    return {key: reader.read(key) for key in reader}


def newest_tensors(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Those of a run's newest checkpoint, which has to be of ``step`` where that is given."""
    newest = latest(run / "checkpoints")
    assert newest is not None and step in (None, newest[0])
    tensors = tensors_of(newest[1])
    assert any(key.startswith(MODEL) for key in tensors)
    assert any(key.endswith(".exp_avg") for key in tensors)
    return tensors


def newest_weights(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """The weights alone, by the bare model's names."""
    tensors = newest_tensors(run, step)
    return {k.removeprefix(MODEL): v for k, v in tensors.items() if k.startswith(MODEL)}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [key for key in one if not torch.equal(one[key], other[key])]
    assert not differing, differing
