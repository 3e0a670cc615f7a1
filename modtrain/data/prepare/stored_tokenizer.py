"""The tokenizer of an output: the given one, an earlier run's, or one that is trained now."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modtrain.common.atomic_io import digest, write_bytes
from modtrain.data.config import PrepareConfig
from modtrain.data.prepare.given_tokenizer import GivenTokenizer
from modtrain.data.prepare.request import later_options, tokenizer_options
from modtrain.data.prepare.tokenizer import (
    SplitChooser,
    check_tokenizer,
    train_tokenizer,
    training_texts,
)
from modtrain.data.prepare.units import Unit
from modtrain.data.stream.prepared import TOKENIZER_NAME

# Tokens of 16 bits number this many.
_LARGEST_UINT16_VOCAB = 1 << 16


@dataclass(frozen=True)
class StoredTokenizer:
    """The tokenizer of the output."""

    path: Path
    sha256: str
    vocab_size: int
    eos_id: int

    @property
    def dtype(self) -> str:
        """The smallest type of numbers that holds its tokens."""
        return smallest_dtype(self.vocab_size)


def smallest_dtype(count: int) -> str:
    """The smallest type that tells so many numbers apart."""
    return "uint16" if count <= _LARGEST_UINT16_VOCAB else "uint32"


def ensure_tokenizer(
    config: PrepareConfig,
    units: Sequence[Unit],
    output: Path,
    work: Path,
    staging: Path,
    given: GivenTokenizer | None,
) -> StoredTokenizer:
    """Train the tokenizer, or take the given or an earlier run's one, and store it.

    Raises DataError where a trained one is damaged.
    """
    path = output / TOKENIZER_NAME
    if given is not None:
        write_bytes(path, given.content, staging)
        return StoredTokenizer(path, given.sha256, given.vocab_size, given.eos_id)
    content = _trained_tokenizer(config, units, work, staging)
    vocab_size, eos_id = check_tokenizer(content, str(path))
    write_bytes(path, content, staging)
    return StoredTokenizer(path, hashlib.sha256(content).hexdigest(), vocab_size, eos_id)


def _trained_tokenizer(
    config: PrepareConfig, units: Sequence[Unit], work: Path, staging: Path
) -> bytes:
    key_parts = [tokenizer_options(config), config.text_column, config.valid_fraction, config.seed]
    later = later_options(config)
    key_parts += [later] if later else []
    key = digest([key_parts, [unit.identity for unit in units]])
    trained = work / f"tokenizer-{key}.json"
    if not trained.exists():
        chooser = SplitChooser(config.seed, config.valid_fraction, config.split_at)
        texts = training_texts(
            units,
            config.tokenizer,
            chooser,
            text_column=config.text_column,
            max_document_bytes=config.max_document_bytes,
            separator=config.separator_text,
            text_template=config.text_template,
        )
        content = train_tokenizer(texts, config.tokenizer.vocab_size)
        write_bytes(trained, content, staging)
    return trained.read_bytes()
