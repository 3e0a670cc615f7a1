"""The tokenizer that ``tokenizer.path`` names, read and parsed once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from modtrain.data.config import TokenizerConfig
from modtrain.data.prepare.end_token import chosen_end_token
from modtrain.data.prepare.tokenizer import parse_tokenizer, vocabulary_of
from modtrain.data.tokenizers.source import read_tokenizer


@dataclass(frozen=True)
class GivenTokenizer:
    """A tokenizer that is not trained here.

    content: of a ``tokenizer.json``. end_token: what ends a document, where no usual name tells.
    vocab_size, eos_id: of it.
    """

    content: bytes
    end_token: str | None
    vocab_size: int
    eos_id: int

    @property
    def sha256(self) -> str:
        """Of the content."""
        return hashlib.sha256(self.content).hexdigest()


def given_tokenizer(config: TokenizerConfig) -> GivenTokenizer | None:
    """Read the tokenizer of ``config``; None where it is to be trained.

    Raises:
        ConfigError: the tokenizer has no such end token.
        DataError: it cannot be read or converted, or has no token that ends a document.
    """
    if config.path is None:
        return None
    source = read_tokenizer(config.path, config.encoding)
    name = str(source.path)
    tokenizer = parse_tokenizer(source.content, name)
    end_token = chosen_end_token(config, tokenizer, source)
    end_id = None if end_token is None else tokenizer.token_to_id(end_token)
    vocab_size, eos_id = vocabulary_of(tokenizer, name, end_id)
    return GivenTokenizer(source.content, end_token, vocab_size, eos_id)
