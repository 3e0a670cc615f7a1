"""The tokenizer of a prepared directory: trained on the corpus, or loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from threading import Event, Thread

from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from modtrain.common.errors import DataError
from modtrain.data.config import TokenizerConfig
from modtrain.data.prepare.decompress import COMPRESSIONS
from modtrain.data.prepare.flaws import Flaw
from modtrain.data.prepare.lost_text import LostText, encoding_with
from modtrain.data.prepare.readers import UnitReader
from modtrain.data.prepare.units import Unit

END_OF_DOCUMENT = "<|endoftext|>"
# What published tokenizers call the end of a document, the first one found counts.
KNOWN_END_TOKENS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")
# Text that a byte of a compressed or columnar file stands for, roughly.
_EXPANSION = {**dict.fromkeys(COMPRESSIONS, 4), "parquet": 4}
# An encoding takes some hundred bytes a token: a longer document is encoded in pieces.
PIECE_CHARS = 4_000_000
# A newline before a character that is no white space ends a pre-token of a byte-level BPE, so
# that pieces cut there give the tokens of the whole.
_CUT = re.compile(r"\n(?=\S)")
# Training on a word takes the square of its length: a longer one is cut.
_WORD_CHARS = 1000
_WORD = re.compile(rf"\S{{{_WORD_CHARS}}}|\s{{{_WORD_CHARS}}}")
# Seconds between two looks for an interrupt.
_POLL_SECONDS = 0.1
# Special tokens that a message names.
_SHOWN = 12
# Seconds that an interrupted training may take to notice.
_STOP_SECONDS = 10.0


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2) on ``texts``.

    Equal texts give equal bytes. An interrupt (Ctrl-C) ends it at once. Words of more than 1,000
    characters are cut. Returns the content of a ``tokenizer.json``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in _without_long_words(text))
    _train_interruptibly(tokenizer, pieces, trainer)
    return tokenizer.to_str().encode()


def _without_long_words(text: str) -> Iterator[str]:
    start = 0
    for match in _WORD.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def _train_interruptibly(
    tokenizer: Tokenizer, texts: Iterator[str], trainer: trainers.Trainer
) -> None:
    """Train in a thread, so that no signal is held up: Python handles one only between two steps.

    At an interrupt the thread ends with its next text. A process that ends while the library calls
    Python is aborted, whatever its exit code was to be.
    """
    errors: list[BaseException] = []
    is_stopped, has_ended = Event(), Event()

    def until_stopped() -> Iterator[str]:
        for text in texts:
            if is_stopped.is_set():
                raise InterruptedError
            yield text

    def run() -> None:
        try:
            tokenizer.train_from_iterator(until_stopped(), trainer)
        except BaseException as error:
            errors.append(error)
        finally:
            has_ended.set()

    try:
        Thread(target=run, daemon=True).start()
        # An interrupt in `Thread.join` makes Python 3.11 take the thread for one that has ended.
        while not has_ended.wait(_POLL_SECONDS):
            pass
    except BaseException:
        is_stopped.set()
        has_ended.wait(_STOP_SECONDS)
        raise
    if errors:
        raise errors[0]


def training_texts(
    units: Sequence[Unit],
    config: TokenizerConfig,
    chooser: SplitChooser,
    *,
    text_column: str,
    max_document_bytes: int,
    separator: str | None = None,
    text_template: str | None = None,
) -> Iterator[str]:
    """Up to ``train_bytes`` of the training documents, each unit giving its share."""
    estimates = [_text_bytes(unit, config.train_bytes) for unit in units]
    total = sum(estimates)
    left = config.train_bytes
    for unit, estimate in zip(units, estimates, strict=True):
        # Shares keep one source from being all that the tokenizer sees of a mixed corpus.
        share = left if total <= config.train_bytes else -(-config.train_bytes * estimate // total)
        share = min(share, left)
        reader = UnitReader(unit, text_column, max_document_bytes, separator, text_template)
        for document in reader:
            if share <= 0:
                break
            text = None if isinstance(document, Flaw) else chooser.parts(document).get("train")
            if text is not None:
                content = text.encode()[:share]
                share -= len(content)
                left -= len(content)
                yield content.decode(errors="ignore")


def _text_bytes(unit: Unit, unknown: int) -> int:
    """Return about how much text a unit has. unknown: what to take for that of a command."""
    if not unit.num_bytes and unit.kind == "tar":
        return unknown
    return unit.num_bytes * _EXPANSION.get(unit.kind.rpartition(".")[2], 1)


def check_tokenizer(content: bytes, name: str, end_id: int | None = None) -> tuple[int, int]:
    """Parse a ``tokenizer.json``. Returns (vocabulary size, end token's number).

    end_id: the end token, where it is known; None finds it by its name.

    A special token comes before one that is not: ``</s>`` may be a tag of HTML.

    Raises DataError where it is none or has no end-of-document token.
    """
    return vocabulary_of(parse_tokenizer(content, name), name, end_id)


def vocabulary_of(tokenizer: Tokenizer, name: str, end_id: int | None = None) -> tuple[int, int]:
    """The same of a tokenizer that is parsed already."""
    known = known_end_ids(tokenizer)
    if known or end_id is not None:
        # Numbers may have gaps: what counts for an embedding is the largest.
        vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        return vocab_size, known[0] if end_id is None else end_id
    raise DataError(
        f"{name}: has no end-of-document token: none of {', '.join(KNOWN_END_TOKENS)}, and no file "
        f"beside it declares one. Name it with tokenizer.end_token: its special tokens are "
        f"{special_tokens(tokenizer)}. Or train a tokenizer with tokenizer.path=null."
    )


def end_id_of(content: bytes, name: str, end_token: str | None) -> int | None:
    """Return the number of ``end_token`` in a ``tokenizer.json``; None without one.

    Raises DataError where the file is none, or has no such token.
    """
    if end_token is None:
        return None
    number: int | None = parse_tokenizer(content, name).token_to_id(end_token)
    if number is None:
        raise DataError(f"{name}: has no token {end_token!r}, which is to end a document.")
    return number


def known_end_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the numbers of the tokens with a usual name for the end, special ones first."""
    numbers = [tokenizer.token_to_id(token) for token in KNOWN_END_TOKENS]
    known = [number for number in numbers if number is not None]
    added = tokenizer.get_added_tokens_decoder()
    special = [number for number in known if number in added and added[number].special]
    return special + [number for number in known if number not in special]


def special_tokens(tokenizer: Tokenizer) -> str:
    """Return the first special tokens, for a message."""
    added = tokenizer.get_added_tokens_decoder()
    texts = [token.content for _, token in sorted(added.items()) if token.special]
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return (", ".join(texts[:_SHOWN]) or "none") + more


def parse_tokenizer(content: bytes, name: str) -> Tokenizer:
    """Parse a ``tokenizer.json``. It encodes whole texts, whatever truncation the file has.

    Raises DataError, with ``name``, where it is none.
    """
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{name}: is not a tokenizer.json ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class SplitChooser:
    """Which text is held out: whole documents, or the end of each one.

    Documents are chosen by a hash of seed and text, the same wherever they stand.
    """

    def __init__(self, seed: int, valid_fraction: float, split_at: str = "document") -> None:
        self._key = str(seed).encode()
        self._threshold = int(valid_fraction * 2**64)
        self._train_share = 1 - valid_fraction
        self._at_line = split_at == "line"

    def is_valid(self, content: bytes) -> bool:
        """Whether the document of these UTF-8 bytes belongs to the ``valid`` split."""
        hashed = hashlib.blake2b(content, digest_size=8, key=self._key).digest()
        return int.from_bytes(hashed, "big") < self._threshold

    def parts(self, text: str) -> dict[str, str]:
        """Return the text of a document by split: one of them, or its beginning and its end.

        A document without a line end or a space between two texts is in one split.
        """
        cut = self._cut(text) if self._at_line else 0
        if cut:
            return {"train": text[:cut], "valid": text[cut:]}
        return {"valid" if self.is_valid(text.encode()) else "train": text}

    def _cut(self, text: str) -> int:
        """Return where the held-out end begins: behind a line end, or a space where there is none.

        0 for a document without either between two texts.
        """
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        wanted = min(max(start, round(len(text) * self._train_share) - 1), end)
        for character in "\n ":
            cut = text.find(character, wanted, end) + 1 or text.rfind(character, start, wanted) + 1
            if cut:
                return cut
        return 0


class DocumentEncoder:
    """Text → token numbers, without the end token."""

    def __init__(self, content: bytes, name: str) -> None:
        self._tokenizer, self._name = parse_tokenizer(content, name), name
        # A document that spells out a special token must not end there.
        self._tokenizer.encode_special_tokens = True
        self.lost_text = LostText(self._tokenizer, name)

    @classmethod
    @lru_cache(maxsize=1)
    def of_file(cls, path: str, sha256: str) -> DocumentEncoder:
        """The encoder of a file whose checksum is known; kept for the next unit."""
        content = Path(path).read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{path}: changed while the corpus was encoded. Run prepare again.")
        return cls(content, path)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token numbers of each text.

        Raises DataError where the tokenizer has no token for a text, and none for what is unknown.
        """
        pieces = [split_text(text) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        with encoding_with(self._name):
            encoded = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        # Nearly all texts are one piece, whose list needs no copy.
        return [
            next(encoded).ids if len(parts) == 1 else list(_joined(encoded, len(parts)))
            for parts in pieces
        ]

    def encode_documents(self, documents: Sequence[Sequence[str]]) -> list[list[list[int]] | str]:
        """The token numbers of each part of each document, or which of its text they would lose.

        Raises DataError as `encode` does.
        """
        if not self.lost_text.is_possible:
            numbers = iter(self.encode([text for parts in documents for text in parts]))
            return [[next(numbers) for _ in parts] for parts in documents]
        pieces = [[split_text(text) for text in parts] for parts in documents]
        flat = [piece for parts in pieces for part in parts for piece in part]
        with encoding_with(self._name):
            # Slower than without offsets, and faster than twice.
            encodings = iter(self._tokenizer.encode_batch(flat, add_special_tokens=False))
        results: list[list[list[int]] | str] = []
        for parts in pieces:
            encoded = [[(piece, next(encodings)) for piece in part] for part in parts]
            lost = self.lost_text.of_pieces([pair for part in encoded for pair in part])
            results.append(
                lost or [[n for _, encoding in part for n in encoding.ids] for part in encoded]
            )
        return results

    def encode_whole(self, text: str, name: str) -> list[int]:
        """The token numbers of a text that must not lose anything. name: what it is, for errors.

        Raises DataError where the tokenizer cannot spell it.
        """
        if lost := self.lost_text.of(text):
            raise DataError(f"{name}: {lost}. Leave that out, or use a run with another tokenizer.")
        return self.encode([text])[0]


def _joined(encoded: Iterator[Encoding], count: int) -> Iterator[int]:
    """The numbers of the next ``count`` pieces."""
    for encoding in islice(encoded, count):
        yield from encoding.ids


def split_text(text: str) -> list[str]:
    """Cut a text longer than PIECE_CHARS at line ends; a text without line ends stays whole."""
    pieces = []
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = _CUT.search(text, start + PIECE_CHARS - 1)
        if cut is None:
            break
        pieces.append(text[start : cut.end()])
        start = cut.end()
    return [*pieces, text[start:]]
