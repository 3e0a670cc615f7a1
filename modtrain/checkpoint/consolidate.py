"""Convert a checkpoint of any number of ranks to one safetensors file of the model's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from modtrain.checkpoint.reading import TensorReader
from modtrain.checkpoint.state import MODEL
from modtrain.common.atomic_io import atomic_writer

# Names of the format: https://github.com/huggingface/safetensors#format
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def consolidate(
    path: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
) -> int:
    """Write the weights of the checkpoint ``path`` to ``output``; return the file's size in bytes.

    In one process, without a process group; one tensor is in memory at a time. The file is written
    whole or not at all.

    dtype: of floating-point tensors; None keeps the saved one. metadata: texts to store. tied: tied
    names to leave out, each with the name that is stored; the metadata has them as ``tied``.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    reader, tied = TensorReader(path), dict(tied or {})
    kinds = {
        key: dtype if dtype is not None and saved.is_floating_point else saved
        for key, saved in reader.dtypes.items()
        if key.startswith(MODEL) and key.removeprefix(MODEL) not in tied
    }
    # The widest dtype first, so that each tensor is aligned to its element size.
    kinds = dict(sorted(kinds.items(), key=lambda item: (-item[1].itemsize, item[0])))
    header = _header(reader, kinds, {**(metadata or {}), "tied": json.dumps(tied)})
    with atomic_writer(output, output.parent) as file:
        file.write(header)
        for key, kind in kinds.items():
            file.write(reader.read(key, kind).reshape(-1).view(torch.uint8).numpy().data)
        return file.tell()


def _header(
    reader: TensorReader, kinds: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for key, kind in kinds.items():
        size = reader.sizes[key]
        end = start + prod(size) * kind.itemsize
        entries[key.removeprefix(MODEL)] = {
            "dtype": _DTYPES[kind],
            "shape": list(size),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
