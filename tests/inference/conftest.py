"""What the tests of inference share."""

import pytest
from tokenizers import Tokenizer

from modtrain.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level; what is not in its few words is spelt in bytes."""
    return Tokenizer.from_str(train_tokenizer(["the tree and the river"] * 4, 270).decode())
