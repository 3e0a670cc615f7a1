"""What checkpoints hold, read whole in one process."""

from pathlib import Path

import torch

from modtrain.checkpoint.reading import TensorReader
from modtrain.checkpoint.recovery import latest
from modtrain.checkpoint.state import MODEL


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, optimizer state, and each rank's own."""
    reader = TensorReader(path)
    return {key: reader.read(key) for key in reader}


def newest_tensors(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Those of a run's newest checkpoint, which has to be of ``step`` where that is given."""
    found = latest(run / "checkpoints")
    assert found is not None and step in (None, found[0])
    tensors = tensors_of(found[1])
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
