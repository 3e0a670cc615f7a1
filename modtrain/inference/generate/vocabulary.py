"""The tokenizer of a run, for prompts and generated text."""

from __future__ import annotations

from tokenizers import Tokenizer

from modtrain.data.prepare.tokenizer import DocumentEncoder, check_tokenizer


class Vocabulary:
    """A tokenizer for encoding prompts and decoding text; ``end_id`` ends a document."""

    def __init__(self, content: bytes, name: str) -> None:
        """Parse the ``content`` of a tokenizer.json; ``name`` is for errors.

        Raises:
            DataError: it is not one, or has no end-of-document token.
        """
        self.tokenizer = Tokenizer.from_str(content.decode())
        self.end_id = check_tokenizer(content, name)[1]
        self._encoder = DocumentEncoder(content, name)

    def encode(self, text: str) -> list[int]:
        """Return a prompt's tokens; for an empty prompt the token before a new document."""
        return self._encoder.encode([text])[0] or [self.end_id]
