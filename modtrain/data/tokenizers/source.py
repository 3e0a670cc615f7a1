"""What ``tokenizer.path`` names, as the content of a ``tokenizer.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, read_bytes, read_json

FILE_NAME = "tokenizer.json"
# Of other libraries, by their endings.
_SUFFIXES = (".model", ".tiktoken")
_MAX_BYTES = 1 << 28
# Of a file that is converted: the largest that are published have 5 MB.
_MAX_CONVERTED_BYTES = 1 << 25
# Hugging Face's files that number tokens beside a model, and the keys of those numbers.
_ADDED = (("added_tokens.json", None), ("tokenizer_config.json", "added_tokens_decoder"))


@dataclass(frozen=True)
class TokenizerSource:
    """path: the file. content: of a ``tokenizer.json``.

    end_token: the token that the file itself says ends a text; None: it says nothing.
    """

    path: Path
    content: bytes
    end_token: str | None = None


def read_tokenizer(path: str, encoding: str | None = None) -> TokenizerSource:
    """Read a tokenizer: a ``tokenizer.json``, a SentencePiece model, a file of ranks, or a folder.

    A folder is one of Hugging Face's, with one of these in it. encoding: for a file of ranks, as of
    `encodings.encoding_of`.

    Raises DataError for what is none of them, or cannot be converted.
    """
    file = _file(Path(path))
    is_other = file.suffix in _SUFFIXES
    try:
        content = read_bytes(file, _MAX_CONVERTED_BYTES if is_other else _MAX_BYTES)
    except UnreadableError as error:
        # It begins with the name alone.
        reason = str(error).removeprefix(f"{file.name} ")
        raise DataError(f"{file}: {reason}") from None
    if not is_other:
        _refuse_encoding(file, encoding)
        return TokenizerSource(file, content)
    source = _converted(file, content, encoding)
    if file != Path(path):
        _refuse_other_tokens(source)
    return source


def _file(given: Path) -> Path:
    if not given.is_dir():
        return given
    if (given / FILE_NAME).is_file():
        return given / FILE_NAME
    others = sorted(name for name in given.iterdir() if name.suffix in _SUFFIXES)
    if len(others) > 1:
        names = ", ".join(name.name for name in others)
        raise DataError(f"{given}: has several tokenizers, {names}. Name one of these files.")
    if not others:
        raise DataError(
            f"{given}: has no {FILE_NAME}, and no file that ends in .model or .tiktoken"
        )
    return others[0]


def _converted(file: Path, content: bytes, encoding: str | None) -> TokenizerSource:
    # Each has libraries of its own, which are for those who convert.
    from modtrain.data.tokenizers import sentencepiece_model, tiktoken_ranks  # noqa: PLC0415
    from modtrain.data.tokenizers.encodings import encoding_of  # noqa: PLC0415

    name = str(file)
    # Llama 3 has ranks in a tokenizer.model.
    if file.suffix == ".tiktoken" or tiktoken_ranks.is_ranks(content):
        known = encoding_of(encoding, file)
        return TokenizerSource(file, tiktoken_ranks.convert(content, known, name))
    _refuse_encoding(file, encoding)
    return TokenizerSource(file, *sentencepiece_model.convert(content, name))


def _refuse_encoding(file: Path, encoding: str | None) -> None:
    if encoding is not None:
        raise DataError(
            f"tokenizer.encoding={encoding}: is for a file of tiktoken's ranks, and {file} is none."
            " Leave it out"
        )


def _refuse_other_tokens(source: TokenizerSource) -> None:
    """Raise DataError where a folder numbers tokens in another way than the file in it."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    tokenizer = Tokenizer.from_str(source.content.decode())
    for name, key in _ADDED:
        path = source.path.with_name(name)
        if not path.is_file():
            continue
        try:
            content = read_json(path, _MAX_BYTES)
        except UnreadableError as error:
            raise DataError(f"{path.parent}/{error}") from None
        numbers = content if key is None else _by_text(content.get(key))
        wrong = [text for text, number in numbers.items() if tokenizer.token_to_id(text) != number]
        if wrong:
            raise DataError(
                f"{path}: has the token {wrong[0]!r} with the number {numbers[wrong[0]]}, which"
                f" {source.path.name} has not. Convert the whole folder: transformers'"
                " AutoTokenizer.from_pretrained(...).save_pretrained('tokenizer')"
            )


def _by_text(added: Any) -> dict[str, int]:
    """Return the numbers of tokens by their texts; what is no such table is left to others."""
    entries = added.items() if isinstance(added, dict) else ()
    return {
        str(entry.get("content")): int(number)
        for number, entry in entries
        if isinstance(entry, dict) and number.isdecimal()
    }
