"""Token numbers in files, as memory maps: nothing is unpickled, and sizes are checked first.

Each function yields arrays with whether a document ends with one: True, False, or None where the
format does not tell.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from modtrain.data.prepare.decompress import chunks
from modtrain.data.prepare.tokenized.kinds import entry_of

Part = tuple[NDArray[Any], bool | None]

_NPY_MAGIC = b"\x93NUMPY"
# Files for llm.c and its kin have a header of 256 numbers of 32 bits. The first one says the type:
# 16 bits a token, or 32; the third one how many tokens follow.
_HEADER_NUMBERS = 256
_LLMC_HEAD = struct.Struct("<3i")
_LLMC_TYPES = {20240520: "<u2", 20240801: "<u4"}
_MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
# LitData's numbers for the types of torch, and for those of NumPy.
_LITDATA_TYPES = {
    "no_header_tensor": {
        11: "<u1",
        **dict.fromkeys((13, 14), "<i2"),
        **dict.fromkeys((15, 16), "<i4"),
        **dict.fromkeys((17, 18), "<i8"),
        20: "<u2",
    },
    "no_header_numpy": dict(enumerate(("<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4", "<u8"))),
}
_MDS_COMPRESSIONS = {"zstd": "zst", "zst": "zst", "gz": "gz", "bz2": "bz2"}
_MDS_LARGEST = 1 << 32
_LOOKED_AT = 1 << 20


def flat_parts(path: Path, default_dtype: str, dtype: str | None) -> Iterator[Part]:
    """Yield the tokens of a file of nothing else: nanoGPT, OLMo, llm.c, or NumPy's own.

    dtype: of a file without a header; None: ``default_dtype``, unless every second number is 0.
    Raises ValueError for what is no such file.
    """
    with path.open("rb") as file:
        head = file.read(_LLMC_HEAD.size)
        if head.startswith(_NPY_MAGIC):
            file.seek(0)
            shape, item_type, offset = _npy_header(file)
            size = int(np.prod(shape))
        else:
            whole = len(head) == _LLMC_HEAD.size
            first, _, count = _LLMC_HEAD.unpack(head) if whole else (0, 0, 0)
            item_type = _LLMC_TYPES.get(first, dtype or f"<u{np.dtype(default_dtype).itemsize}")
            has_header = first in _LLMC_TYPES
            offset, size = (4 * _HEADER_NUMBERS, count) if has_header else (0, -1)
    tokens = _mapped(path, item_type, offset, size)
    if offset == 0 and dtype is None and tokens.dtype.itemsize == 2:
        odd = tokens[1:_LOOKED_AT:2]
        if len(odd) > 8 and not odd.any():
            raise ValueError("every second number is 0: write token_dtype=uint32, or uint16")
    yield tokens, None


def _npy_header(file: Any) -> tuple[tuple[int, ...], str, int]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.kind not in "iu" or len(shape) != 1:
        raise ValueError(f"an array of shape {shape} and type {dtype}, and no list of numbers")
    return shape, dtype.str, file.tell()


def _mapped(path: Path, dtype: str, offset: int = 0, count: int = -1) -> NDArray[Any]:
    size = path.stat().st_size - offset
    item = np.dtype(dtype).itemsize
    has_count = count >= 0
    count = count if has_count else size // item
    if size < 0 or count * item != size:
        what = f"{count:,}" if has_count else "a whole number of"
        raise ValueError(f"{size:,} bytes are not {what} {np.dtype(dtype).name}")
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", offset, (count,))


def megatron_parts(path: Path) -> Iterator[Part]:
    """Yield the documents of a ``.bin`` file, by its ``.idx``.

    Raises ValueError where the two do not fit each other.
    """
    index = path.with_suffix(".idx")
    with index.open("rb") as file:
        head = file.read(_MEGATRON_HEADER.size)
    if len(head) < _MEGATRON_HEADER.size or not head.startswith(_MEGATRON_MAGIC):
        raise ValueError(f"{index.name} is no index of Megatron")
    _, version, code, num_sequences, num_ends = _MEGATRON_HEADER.unpack(head)
    if version != 1 or code not in _MEGATRON_TYPES:
        raise ValueError(f"{index.name} has version {version} and type {code}")
    start = _MEGATRON_HEADER.size
    if start + 12 * num_sequences + 8 * num_ends > index.stat().st_size:
        raise ValueError(f"{index.name} is cut short")

    def column(dtype: str, count: int) -> NDArray[Any]:
        nonlocal start
        start += count * np.dtype(dtype).itemsize
        at = start - count * np.dtype(dtype).itemsize
        return np.memmap(index, dtype, "r", at, (count,)) if count else np.empty(0, dtype)

    lengths, pointers = column("<i4", num_sequences), column("<i8", num_sequences)
    ends = column("<i8", num_ends)
    tokens = _mapped(path, _MEGATRON_TYPES[code])
    size = tokens.dtype.itemsize
    # Compared so that no sum can overflow.
    is_inside = (lengths >= 0) & (pointers >= 0) & (pointers % size == 0)
    is_inside &= pointers // size <= len(tokens) - lengths.astype(np.int64)
    in_order = (
        num_ends and ends[0] == 0 and ends[-1] == num_sequences and (np.diff(ends) >= 0).all()
    )
    if not is_inside.all() or not in_order:
        raise ValueError(f"{index.name} does not fit it")
    for first, last in pairwise(ends):
        for number in range(first, last):
            begin = int(pointers[number]) // size
            yield tokens[begin : begin + int(lengths[number])], number == last - 1


def _items(path: Path) -> Iterator[memoryview]:
    """Yield the items of a file that begins with their number and their offsets, of 32 bits."""
    size = path.stat().st_size
    content = np.memmap(path, np.uint8, "r") if size >= 8 else np.empty(0, np.uint8)
    count = int(content[:4].view("<u4")[0]) if size >= 8 else 0
    if size < 8 or 8 + 4 * count > size:
        raise ValueError("it is cut short")
    offsets = content[4 : 8 + 4 * count].view("<u4").astype(np.int64)
    if offsets[0] < 8 + 4 * count or (np.diff(offsets) < 0).any() or offsets[-1] > size:
        raise ValueError("its offsets lie outside of it")
    for begin, end in pairwise(offsets):
        yield content[begin:end].data


def litdata_parts(path: Path) -> Iterator[Part]:
    """Yield the items of a chunk of LitData, as ``TokensLoader`` reads them.

    Raises ValueError for other items than token numbers.
    """
    index, _ = entry_of(path)
    config = index.get("config") or {}
    name, _, code = (config.get("data_format") or [""])[0].partition(":")
    dtype = _LITDATA_TYPES.get(name, {}).get(int(code)) if code.isdecimal() else None
    if dtype is None or config.get("compression"):
        raise ValueError(
            f"its items are {name}:{code}, compression {config.get('compression')}; read are"
            " uncompressed arrays of whole numbers, as with TokensLoader"
        )
    for item in _items(path):
        yield _numbers(item, dtype), None


def mds_parts(path: Path, column: str, dtype: str | None) -> Iterator[Part]:
    """Yield the items of a shard of MosaicML's, from the column of the tokens.

    dtype: of a column of plain bytes; None: 64 bits, as LLM Foundry writes it.
    Raises ValueError for a shard without such a column.
    """
    _, entry = entry_of(path)
    names, encodings = entry["column_names"], entry["column_encodings"]
    if column not in names:
        raise ValueError(f"has no column {column!r}, only {', '.join(names)}. Set token_column")
    at = names.index(column)
    sizes = entry["column_sizes"]
    with _decompressed(path, entry) as raw:
        for item in _items(raw):
            yield _numbers_of(_field(item, sizes, at), encodings[at], dtype), None


def _field(item: memoryview, sizes: list[int | None], at: int) -> memoryview:
    """Return a column of a sample: before all of them stand the sizes of those that vary."""
    num_varying = sum(size is None for size in sizes)
    if len(item) < 4 * num_varying:
        raise ValueError("a sample is cut short")
    varying = iter(np.frombuffer(item[: 4 * num_varying], "<u4").tolist())
    whole = [next(varying) if size is None else int(size) for size in sizes]
    begin = 4 * num_varying + sum(whole[:at])
    if min(whole) < 0 or 4 * num_varying + sum(whole) != len(item):
        raise ValueError("a sample has other sizes than it says")
    return item[begin : begin + whole[at]]


def _numbers_of(field: memoryview, encoding: str, dtype: str | None) -> NDArray[Any]:
    """Return the numbers of a column by its encoding, as ``ndarray:uint16`` or ``bytes``."""
    kind, *arguments = encoding.split(":")
    if kind == "bytes":
        return _numbers(field, dtype or "<i8")
    if kind != "ndarray":
        raise ValueError(f"its tokens are encoded as {encoding}, and not as ndarray or bytes")
    if arguments:
        item_type = np.dtype(arguments[0])
    else:
        code, field = field[0], field[1:]
        # Eight times the bytes, and one more for signed.
        item_type = np.dtype(f"<{'i' if code % 8 == 1 else 'u'}{code // 8}")
    if item_type.kind not in "iu":
        raise ValueError(f"its tokens are {item_type}")
    if len(arguments) < 2:
        # The number of dimensions, and in the lowest bits the type of their sizes.
        num_dims, width = field[0] >> 2, 1 << (field[0] & 3)
        field = field[1 + num_dims * width :]
    return _numbers(field, item_type.newbyteorder("<").str)


def _numbers(data: memoryview, dtype: str) -> NDArray[Any]:
    if len(data) % np.dtype(dtype).itemsize:
        raise ValueError(f"an item of {len(data):,} bytes is no whole number of {dtype}")
    return np.frombuffer(data, dtype)


@contextmanager
def _decompressed(path: Path, entry: dict[str, Any]) -> Iterator[Path]:
    """Yield a file with the content of a shard, of the size that its index tells."""
    if not entry.get("compression") or path.suffix == ".mds":
        yield path
        return
    name = str(entry["compression"]).partition(":")[0]
    if name not in _MDS_COMPRESSIONS:
        raise ValueError(f"is compressed with {name}; read are {', '.join(_MDS_COMPRESSIONS)}")
    left = int(entry["raw_data"]["bytes"])
    if left > _MDS_LARGEST:
        raise ValueError(f"its index says {left:,} bytes, and the offsets in a shard have 32 bits")
    with tempfile.TemporaryDirectory(prefix="modtrain-") as folder:
        copy = Path(folder) / "shard.mds"
        with path.open("rb") as source, copy.open("wb") as file:
            for piece in chunks(source, _MDS_COMPRESSIONS[name]):
                left -= len(piece)
                if left < 0:
                    raise ValueError("it is larger than its index says")
                file.write(piece)
        yield copy
