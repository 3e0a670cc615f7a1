"""What a file of ranks does not have: the pattern that cuts a text, and the special tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, read_json

_END = "<|endoftext|>"
_FILL_IN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_MAX_BYTES = 1 << 24
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A number of times and a plus: at most so often, and never fewer for what follows.
_POSSESSIVE = re.compile(r"(\\p\{\w+\}|\\\w|\[(?:\\.|[^\]\\])*\])(\{\d+(?:,\d*)?\})\+")
_ESCAPED_OR_CLASS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]", re.DOTALL)
_DOLLAR = re.compile(rf"{_ESCAPED_OR_CLASS.pattern}|\$", re.DOTALL)
_OTHER_MEANING = re.compile(r"\^|\{\d+(?:,\d*)?\}\+|\(\?(?!i[:)])-?[a-zA-Z]")


@dataclass(frozen=True)
class Encoding:
    """pattern: as of tiktoken's ``pat_str``. special_tokens: their numbers.

    num_ranks: of the file that belongs to it; None: of any.
    """

    pattern: str
    special_tokens: dict[str, int]
    num_ranks: int | None = None


# Those that tiktoken itself has, by its names.
KNOWN = {
    "r50k_base": Encoding(_R50K, {_END: 50256}, 50256),
    "p50k_base": Encoding(_R50K, {_END: 50256}, 50280),
    "p50k_edit": Encoding(
        _R50K, {_END: 50256, **dict(zip(_FILL_IN, range(50281, 50284), strict=True))}, 50280
    ),
    "cl100k_base": Encoding(
        _CL100K,
        {
            _END: 100257,
            **dict(zip(_FILL_IN, range(100258, 100261), strict=True)),
            "<|endofprompt|>": 100276,
        },
        100256,
    ),
    "o200k_base": Encoding(_O200K, {_END: 199999, "<|endofprompt|>": 200018}, 199998),
}


def encoding_of(encoding: str | None, path: Path) -> Encoding:
    """Return the encoding of the ranks in ``path``.

    encoding: a known name, or a JSON file with ``pat_str`` and ``special_tokens``; None: the known
    one that the file is named like.

    Raises DataError where there is none.
    """
    name = encoding or path.name.removesuffix(".tiktoken")
    if name in KNOWN:
        return KNOWN[name]
    if encoding is None:
        raise DataError(
            f"{path}: has neither the pattern nor the special tokens of its encoding. Name them"
            f" with tokenizer.encoding: {', '.join(KNOWN)}, or a JSON file with pat_str and"
            " special_tokens, as tiktoken.Encoding takes them."
        )
    if not Path(encoding).is_file():
        raise DataError(
            f"tokenizer.encoding={encoding}: is neither a file nor one of {', '.join(KNOWN)}"
        )
    try:
        return _checked(read_json(Path(encoding), _MAX_BYTES), encoding)
    except UnreadableError as error:
        raise DataError(f"tokenizer.encoding={encoding}: {error}") from None


def _checked(content: dict[str, Any], name: str) -> Encoding:
    pattern, special = content.get("pat_str"), content.get("special_tokens")
    if not isinstance(pattern, str) or not isinstance(special, dict):
        raise DataError(
            f"{name}: has no text pat_str, or no special_tokens with their numbers, such as"
            f' {{"pat_str": "...", "special_tokens": {{"{_END}": 100257}}}}'
        )
    wrong = [token for token, n in special.items() if not (token and type(n) is int and n >= 0)]
    if wrong or len({*special.values()}) < len(special):
        raise DataError(f"{name}: special_tokens have no numbers, each its own: {wrong or special}")
    return Encoding(pattern, special)


def oniguruma_pattern(pattern: str, name: str) -> str:
    """Return a pattern of tiktoken's as the regular expressions of ``tokenizers`` say it.

    Raises DataError for one that would mean something else there.
    """
    translated = _POSSESSIVE.sub(r"(?>\1\2)", pattern)
    plain = _ESCAPED_OR_CLASS.sub("C", translated)
    if _OTHER_MEANING.search(plain):
        raise DataError(
            f"{name}: its pattern has ^, a flag but (?i), or a plus behind a number of times,"
            " which mean something else in a tokenizer.json. Write an atomic group: (?>x{1,3})"
        )
    # A dollar sign ends a text, and in the other dialect each of its lines.
    return _DOLLAR.sub(lambda match: r"\z" if match[0] == "$" else match[0], translated)
