"""What ``tokenizer.path`` names: a ``tokenizer.json``, or a Hugging Face folder with one."""

from __future__ import annotations

from pathlib import Path

from modtrain.common.errors import DataError

FILE_NAME = "tokenizer.json"
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
