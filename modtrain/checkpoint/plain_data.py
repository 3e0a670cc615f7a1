"""Pickles looked at before they are loaded: what they may name, and what memory they may take.

torch's ``weights_only`` keeps code from running, but a file of some bytes can still take gigabytes:
by ``bytearray(n)``, by a place in the unpickler's memo, which is an array, or by compression.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

_TENSOR_GLOBALS = frozenset(
    {"collections OrderedDict", "torch Size", "torch device"}
    | {f"torch._utils _rebuild_{name}" for name in ("tensor_v2", "parameter")}
    | {
        f"torch {kind}Storage"
        for kind in (
            *("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long"),
            *("Bool", "ComplexFloat", "ComplexDouble", "Untyped"),
        )
    }
)
"""What `torch.save` names for tensors, numbers, strings and containers."""

_PUT = ("PUT", "BINPUT", "LONG_BINPUT")


def check_pickle(content: bytes, allowed: frozenset[str] | None = None) -> None:
    """Raise UnpicklingError for a pickle that takes more memory than its length accounts for.

    allowed: globals that it may name, as ``module name``; None: whoever loads it looks at them.
    """
    try:
        for code, argument, _ in pickletools.genops(content):
            if code.name in _PUT and int(argument or 0) > len(content):
                raise pickle.UnpicklingError("its memo is larger than the file")
            if allowed is None:
                continue
            if code.name in ("STACK_GLOBAL", "INST") or code.name.startswith("EXT"):
                raise pickle.UnpicklingError("it names classes in a way that torch.save does not")
            if code.name == "GLOBAL" and argument not in allowed:
                name = str(argument).replace(" ", ".")
                raise pickle.UnpicklingError(f"refused to load {name}")
    except ValueError as error:
        raise pickle.UnpicklingError(f"it is no pickle: {error}") from None


def check_torch_file(file: IO[bytes]) -> None:
    """Raise UnpicklingError unless ``file``, by `torch.save`, is as large as what is in it."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len({*names}) < len(names) or any(entry.compress_type for entry in entries):
                raise pickle.UnpicklingError("it has entries that torch.save does not write")
            if sum(entry.file_size for entry in entries) > file.seek(0, io.SEEK_END):
                raise pickle.UnpicklingError("its entries are larger than the file")
            pickles = [name for name in names if name.endswith("data.pkl")]
            for name in pickles:
                check_pickle(archive.read(name), _TENSOR_GLOBALS)
            if len(pickles) != 1:
                raise pickle.UnpicklingError("it has no data")
    except zipfile.BadZipFile as error:
        raise pickle.UnpicklingError(f"it is not a file of torch.save: {error}") from None
    file.seek(0)


class FileSlice(io.RawIOBase):
    """``length`` bytes of a file from ``offset`` on, as a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.IOBase.seek`."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError("a place before the beginning")
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase.readinto`."""
        size = min(len(buffer), max(0, self._length - self._place))
        self._file.seek(self._offset + self._place)
        content = self._file.read(size)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def load_plain(file: Path | IO[bytes]) -> Any:
    """Return tensors, on the CPU, and plain values that `torch.save` wrote.

    Raises:
        pickle.UnpicklingError: there is more in it.
    """
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return load_plain(stream)
    check_torch_file(file)
    return torch.load(file, weights_only=True, map_location="cpu")
