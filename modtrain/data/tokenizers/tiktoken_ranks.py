"""A file of ranks for tiktoken as a ``tokenizer.json``: a byte-level BPE."""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from modtrain.common.errors import DataError
from modtrain.data.tokenizers.comparison import refuse_other_numbers
from modtrain.data.tokenizers.encodings import Encoding, oniguruma_pattern

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})\r?")
# All ways to cut a token in two are tried.
_LONGEST_TOKEN = 256
_NUM_BYTES = 256


def is_ranks(content: bytes) -> bool:
    """Whether a file begins as one of ranks does."""
    return _LINE.fullmatch(content[:1024].partition(b"\n")[0]) is not None


def convert(content: bytes, encoding: Encoding, name: str) -> bytes:
    """Return the ``tokenizer.json`` of a file of ranks.

    Raises DataError where it is none, does not belong to the encoding, or would give other numbers.
    """
    ranks = _parsed(content, name)
    _check(ranks, encoding, name)
    characters = _characters_of_bytes()
    spelled = {token: "".join(characters[byte] for byte in token) for token in ranks}
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    if both := vocabulary.keys() & encoding.special_tokens.keys():
        raise DataError(f"{name}: {min(both)} is one of its ranks, and a special token")
    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], spelled[left], spelled[right]))
    merges.sort()
    model = models.BPE(
        {**vocabulary, **encoding.special_tokens},
        [merge[2:] for merge in merges],
        ignore_merges=True,
    )
    tokenizer = Tokenizer(model)
    try:
        pattern = Regex(oniguruma_pattern(encoding.pattern, name))
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{name}: its pattern cannot be used: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in encoding.special_tokens]
    )
    _compare(tokenizer, ranks, encoding, name)
    return tokenizer.to_str().encode()


def _parsed(content: bytes, name: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        try:
            if match is None:
                raise ValueError("is not a token in base64 and a number")
            token = base64.b64decode(match[1], validate=True)
            if not 0 < len(token) <= _LONGEST_TOKEN or token in ranks:
                raise ValueError(
                    f"has a token that stands there twice, or of more than {_LONGEST_TOKEN} bytes"
                )
        except (ValueError, binascii.Error) as error:
            raise DataError(f"{name}: line {number} {error}") from None
        ranks[token] = int(match[2])
    return ranks


def _check(ranks: dict[bytes, int], encoding: Encoding, name: str) -> None:
    wanted = encoding.num_ranks
    if wanted is not None and len(ranks) != wanted:
        raise DataError(
            f"{name}: has {len(ranks):,} ranks, and its encoding {wanted:,}. Name another"
            " tokenizer.encoding"
        )
    missing = [byte for byte in range(_NUM_BYTES) if bytes([byte]) not in ranks]
    numbers = [*ranks.values(), *encoding.special_tokens.values()]
    if missing:
        raise DataError(f"{name}: has no rank for the byte {missing[0]}")
    if len({*numbers}) < len(numbers):
        raise DataError(f"{name}: two of its tokens, or a special one, have the same number")
    if max(numbers) >= 2 * len(numbers) + 1024:
        raise DataError(f"{name}: numbers go to {max(numbers):,}, for {len(numbers):,} tokens")


def _characters_of_bytes() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, as in GPT-2."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(_NUM_BYTES)]


def _compare(tokenizer: Tokenizer, ranks: dict[bytes, int], encoding: Encoding, name: str) -> None:
    try:
        import tiktoken  # noqa: PLC0415
    except ImportError:
        raise DataError(
            f"{name}: is a file of ranks, and tiktoken is not installed: pip install"
            " 'modtrain[tokenizers]'"
        ) from None
    added: Any = json.loads(tokenizer.to_str())["added_tokens"]
    if {token["content"]: token["id"] for token in added} != encoding.special_tokens:
        raise DataError(f"{name}: its special tokens cannot have their numbers")
    try:
        original = tiktoken.Encoding(
            name,
            pat_str=encoding.pattern,
            mergeable_ranks=ranks,
            special_tokens=encoding.special_tokens,
        )
    except ValueError as error:
        raise DataError(f"{name}: tiktoken does not take its pattern: {error}") from None
    pieces = [token.decode(errors="replace") for token in ranks]
    # A text that spells a special token is cut like any other.
    pieces = [*encoding.special_tokens, *pieces]
    refuse_other_numbers(tokenizer, original.encode_ordinary, pieces, name)
