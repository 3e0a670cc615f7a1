"""Values in Arrow tables, of which no more than what is asked for becomes a Python object.

A list of a few bytes on disk may have billions of items.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

_LISTS = (pa.ListScalar, pa.LargeListScalar, pa.FixedSizeListScalar)
_MISSING = object()


def record_of(batch: Any, number: int, names: list[str]) -> dict[str, Any]:
    """Return what a row has under some names, or along paths such as ``messages.0.content``.

    Strings are their bytes, and lists and structures stand for themselves without their content.
    Each column is a key too, for messages.
    """
    columns = batch.schema.names
    record: dict[str, Any] = dict.fromkeys(columns)
    for name in names:
        root, *steps = [name] if name in columns else name.split(".")
        scalar = batch.column(root)[number]
        for step in steps:
            scalar = _inner(_plain(scalar), step)
        if scalar is not _MISSING:
            record[name] = value_of(scalar)
    return record


def value_of(scalar: Any) -> Any:
    """Return one value, strings as their bytes; of a list or a structure an empty one."""
    scalar = _plain(scalar)
    if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar):
        buffer = scalar.as_buffer()
        return None if buffer is None else buffer.to_pybytes()
    kind = scalar.type
    if pa.types.is_run_end_encoded(kind):
        kind = kind.value_type
    if scalar.is_valid and pa.types.is_nested(kind):
        return {} if pa.types.is_struct(kind) else []
    return scalar.as_py()


def _plain(scalar: Any) -> Any:
    """Return the value that a dictionary, a union or an extension of a type stands for."""
    while isinstance(scalar, pa.DictionaryScalar | pa.UnionScalar | pa.ExtensionScalar):
        scalar = scalar.value
    return scalar


def _inner(scalar: Any, step: str) -> Any:
    """Return the item of a list or the field of a structure; _MISSING where there is none."""
    if isinstance(scalar, pa.StructScalar) and scalar.is_valid:
        # Of two fields with one name neither is meant.
        return scalar[step] if scalar.type.get_field_index(step) >= 0 else _MISSING
    # A map is a list of structures, with a key and a value.
    is_number = step.isdecimal() and len(step) < 10
    if isinstance(scalar, _LISTS) and scalar.is_valid and is_number:
        items = scalar.values
        return items[int(step)] if int(step) < len(items) else _MISSING
    return _MISSING
