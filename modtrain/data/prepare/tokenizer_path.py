"""What ``tokenizer.path`` names: a ``tokenizer.json``, or a Hugging Face folder with one."""

from __future__ import annotations

from pathlib import Path

from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, read_json

FILE_NAME = "tokenizer.json"
_CONFIG_NAME = "tokenizer_config.json"
_CONVERT = (
    "Convert it, and compare a text: transformers'"
    " AutoTokenizer.from_pretrained(...).save_pretrained('tokenizer'), and tokenizer.path=tokenizer"
)
# Other libraries' files, by their endings.
_OTHERS = {".model": "a SentencePiece model", ".tiktoken": "a file of tiktoken's"}


def tokenizer_file(path: str) -> Path:
    """Return the ``tokenizer.json`` that ``path`` is, or has in it.

    Raises DataError for a folder without one, and for files of other libraries.
    """
    given = Path(path)
    if given.is_dir():
        if (given / FILE_NAME).is_file():
            return given / FILE_NAME
        others = [name for name in given.iterdir() if name.suffix in _OTHERS]
        what = f", only {others[0].name}, {_OTHERS[others[0].suffix]}" if others else ""
        raise DataError(f"{path}: has no {FILE_NAME}{what}. {_CONVERT}")
    if given.suffix in _OTHERS:
        raise DataError(f"{path}: is {_OTHERS[given.suffix]}, not a {FILE_NAME}. {_CONVERT}")
    return given


def end_token(path: str) -> str | None:
    """Return the end token that the folder of a tokenizer declares; None where none does.

    Raises DataError for a ``tokenizer_config.json`` that cannot be read.
    """
    config = Path(path) / _CONFIG_NAME
    if not config.is_file():
        return None
    try:
        token = read_json(config).get("eos_token")
    except UnreadableError as error:
        raise DataError(f"{path}: {error}") from None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
