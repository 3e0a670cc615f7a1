"""Whole checkpoints of any nest of dicts and lists with tensors in it, without a model."""

from pathlib import Path
from typing import Any

from torch import Tensor

from modtrain.checkpoint.layout import verify
from modtrain.checkpoint.parts import digest_of, parts_of
from modtrain.checkpoint.reading import TensorReader, read_extra_state
from modtrain.checkpoint.writing import write
from modtrain.distributed.process_group import ONE_PROCESS

_TENSOR = "__tensor__"


def save(path: Path, state: dict[str, Any], step: int) -> None:
    """Write ``state``, a nest of dicts and lists with tensors in it, as the checkpoint ``path``.

    Raises:
        CheckpointError: ``path`` exists already, for checkpoints are never overwritten; or the
            disk does not take it.
    """
    tensors: dict[str, Tensor] = {}
    extra_state = _split(state, "", tensors)
    parts = parts_of(tensors, 0, 1)
    write(path, lambda: parts, extra_state, step, ONE_PROCESS, digest_of(tensors))


def load(path: Path) -> dict[str, Any]:
    """Read the checkpoint ``path`` whole, after checking it against its manifest.

    What a `Checkpointer` wrote by key comes back in a dictionary for each first part of the keys:
    ``{"state_dict": {"embedding.weight": …}, …}``.

    Raises:
        CheckpointError: it is damaged or incomplete, or holds what is not plain data.
    """
    verify(path)
    extra_state = read_extra_state(path)
    reader = TensorReader(path)
    tensors = {key: reader.empty(key) for key in reader}
    reader.into(tensors)
    joined: dict[str, Any] = _join(extra_state, tensors)
    # What is left has no place in the nest.
    for key, tensor in tensors.items():
        first, _, name = key.partition(".")
        joined.setdefault(first, {})[name] = tensor
    return joined


def _split(node: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Copy ``node`` with each tensor moved to ``tensors`` and its key left in its place."""
    if isinstance(node, Tensor):
        if key in tensors:
            raise ValueError(f"two tensors of the state are both named {key}")
        tensors[key] = node.detach()
        return {_TENSOR: key}
    if isinstance(node, dict):
        return {k: _split(v, f"{key}.{k}" if key else str(k), tensors) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_split(v, f"{key}.{i}", tensors) for i, v in enumerate(node))
    return node


def _join(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, dict):
        if set(node) == {_TENSOR}:
            return tensors.pop(node[_TENSOR])
        return {k: _join(v, tensors) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_join(v, tensors) for v in node)
    return node
