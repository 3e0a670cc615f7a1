"""A Hugging Face folder, read as data: configuration, tokenizer, and weights tensor by tensor.

No code of a folder is run, no pickle is opened, and sizes are known before memory is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from modtrain.checkpoint.layout import is_plain_name
from modtrain.common.atomic_io import file_sha256
from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, open_regular, read_bytes, read_json
from modtrain.data.prepare.tokenizer import parse_tokenizer
from modtrain.data.stream.prepared import TOKENIZER_NAME
from modtrain.interop.original_files import (
    CHAT_TEMPLATE,
    CONFIG_NAME,
    GENERATION,
    TOKENIZER_CONFIG,
    named_templates,
    read_tables,
    read_template,
    token_ids,
)
from modtrain.interop.prompt_format import PromptFormat, checked_template

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_CONFIG_BYTES, _MAX_INDEX_BYTES, _MAX_TOKENIZER_BYTES = 2**20, 2**26, 2**28
_DTYPES = ("F32", "F16", "BF16", "F64")
_REMEDY = (
    "remedy: where you trust it, load it in transformers and save it with save_pretrained, which"
    " writes safetensors"
)


@dataclass(frozen=True)
class Source:
    """A model to import.

    config: content of its ``config.json``. tokenizer: of its ``tokenizer.json``; None: there is
    none. prompt_format: as its files describe it. shapes: of each tensor, by Hugging Face name.
    read: returns a tensor by that name. files: SHA-256 by file name.
    """

    config: dict[str, Any]
    tokenizer: bytes | None
    prompt_format: Callable[[bytes], PromptFormat]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    files: dict[str, str] = field(default_factory=dict)


def open_folder(folder: Path, stack: ExitStack) -> Source:
    """Open the folder; ``stack`` closes its files.

    Raises:
        DataError: a file is missing, damaged, or of a kind that is not read.
    """
    try:
        config = read_json(folder / CONFIG_NAME, _MAX_CONFIG_BYTES)
        tokenizer = None
        if (folder / TOKENIZER_NAME).exists():
            tokenizer = read_bytes(folder / TOKENIZER_NAME, _MAX_TOKENIZER_BYTES)
        shards = _shards(folder)
        opened = {name: _open_shard(folder / name, stack) for name in shards}
    except UnreadableError as error:
        raise DataError(f"{folder}/{error}") from None
    places: dict[str, Any] = {}
    for name, shard in opened.items():
        for key in shard.keys():  # noqa: SIM118  (it is no mapping)
            if key in places:
                raise DataError(f"{folder / name}: has the tensor {key} of another file, too")
            places[key] = shard
    slices = {key: shard.get_slice(key) for key, shard in places.items()}
    for key, part in slices.items():
        if part.get_dtype() not in _DTYPES:
            kinds = ", ".join(_DTYPES)
            raise DataError(f"{folder}: {key} is of type {part.get_dtype()}, none of {kinds}")
    return Source(
        config,
        tokenizer,
        lambda content: _prompt_format(folder, config, content),
        {key: tuple(part.get_shape()) for key, part in slices.items()},
        lambda key: places[key].get_tensor(key),
        {name: file_sha256(folder / name) for name in (CONFIG_NAME, *shards)},
    )


def _shards(folder: Path) -> list[str]:
    """Return the names of the folder's safetensors files."""
    if (folder / _INDEX).exists():
        weights = read_json(folder / _INDEX, _MAX_INDEX_BYTES).get("weight_map")
        names = [*weights.values()] if isinstance(weights, dict) else []
        if not names or not all(isinstance(n, str) and is_plain_name(n) for n in names):
            raise UnreadableError(f"{_INDEX} does not name files of the folder")
        return sorted(set(names))
    if (folder / _SINGLE).exists():
        return [_SINGLE]
    pickles = sorted(
        path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")
    )
    if pickles:
        reason = f"{pickles[0]} is a pickle, which could run code, and is not read"
        raise DataError(f"{folder}: {reason}\n{_REMEDY}")
    raise DataError(f"{folder}: has no {_SINGLE} and no {_INDEX}\n{_REMEDY}")


def _open_shard(path: Path, stack: ExitStack) -> Any:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  (of the extra)

    with open_regular(path):
        pass
    try:
        # It bounds the header, and checks that the tensors fill the file.
        return stack.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        raise UnreadableError(f"{path.name} is not a safetensors file: {error}") from None


def _prompt_format(folder: Path, config: dict[str, Any], tokenizer: bytes) -> PromptFormat:
    parsed = parse_tokenizer(tokenizer, str(folder))
    files: dict[str, Any] = read_tables(folder)
    own, generation = files.get(TOKENIZER_CONFIG, {}), files.get(GENERATION, {})
    special = {key: _text(own.get(key)) for key in ("bos_token", "eos_token", "unk_token")}
    for key, number in (("bos_token", "bos_token_id"), ("eos_token", "eos_token_id")):
        first = token_ids(config.get(number))
        if not special[key] and first:
            special[key] = parsed.id_to_token(first[0])
    with_added, plain = (
        parsed.encode("a", add_special_tokens=added).ids for added in (True, False)
    )
    template = _template(folder, own)
    if named := named_templates(folder):
        # transformers reads these as one list, too, which needs no further files.
        named |= {"default": template} if template is not None else {}
        listed = [{"name": name, "template": text} for name, text in named.items()]
        files[TOKENIZER_CONFIG] = {**own, "chat_template": listed}
    elif template is not None and (folder / CHAT_TEMPLATE).exists():
        files[CHAT_TEMPLATE] = template
    return PromptFormat(
        tuple(with_added[: max(0, _find(plain, with_added))]),
        token_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
        template,
        {key: text for key, text in special.items() if text},
        files,
    )


def _find(part: list[int], whole: list[int]) -> int:
    places = range(len(whole) - len(part) + 1)
    return next((at for at in places if whole[at : at + len(part)] == part), 0)


def _template(folder: Path, own: Mapping[str, Any]) -> str | None:
    if (template := read_template(folder)) is not None:
        return checked_template(template, str(folder / CHAT_TEMPLATE))
    template = own.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return checked_template(template, f"{folder / TOKENIZER_CONFIG}: chat_template")


def _text(value: object) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
