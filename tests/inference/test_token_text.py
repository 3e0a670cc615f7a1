"""Tokens as text on a page."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from modtrain.data.prepare.tokenizer import train_tokenizer
from modtrain.inference.token_text import Piece, TokenTexts, byte_alphabet, visible
from tests.helpers.model_cases import quick


def test_the_byte_alphabet_is_the_librarys():
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    for character, byte in alphabet.items():
        if byte < 128:
            assert decoders.ByteLevel().decode([character]) == chr(byte)


@given(st.text(max_size=30))
@quick(60)
def test_the_bytes_of_the_tokens_are_the_texts(content):
    tokenizer = Tokenizer.from_str(train_tokenizer(["the tree"], 260).decode())
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode(content).ids
    assert b"".join(map(texts.bytes_of, ids)) == content.encode()
    assert len(texts.pieces(ids)) == len(ids)


def test_parts_of_a_character_are_shown_as_bytes_and_name_it(tokenizer):
    pieces = TokenTexts(tokenizer).pieces(tokenizer.encode("a€é").ids)
    parts = [("⟨e2⟩", "€"), ("⟨82⟩", "€"), ("⟨ac €⟩", "€"), ("⟨c3⟩", "é"), ("⟨a9 é⟩", "é")]
    assert pieces == [Piece("a"), *(Piece(*part) for part in parts)]
    # Cut in the middle, and bytes that are no text at all.
    ids = tokenizer.encode("€").ids
    assert [piece.shown for piece in TokenTexts(tokenizer).pieces(ids[1:] + ids[:1])] == [
        "⟨82⟩",
        "⟨ac⟩",
        "⟨e2⟩",
    ]


def test_a_token_may_end_one_character_and_begin_the_next(tokenizer):
    vocabulary = {
        "".join(characters(part)): n for n, part in enumerate([b"\xe2\x82", b"\xac\xc3", b"\xa9!"])
    }
    odd = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    odd.decoder = decoders.ByteLevel()
    assert TokenTexts(odd).pieces([0, 1, 2, 99]) == [
        Piece("⟨e2⟩⟨82⟩", "€"),
        Piece("⟨ac €⟩⟨c3⟩", "€é"),
        Piece("⟨a9 é⟩!", "é"),
        Piece("⟨token 99⟩"),
    ]


def characters(content: bytes) -> list[str]:
    letters = {byte: character for character, byte in byte_alphabet().items()}
    return [letters[byte] for byte in content]


def test_tokenizers_with_byte_fallback_are_read_too():
    vocabulary = {"▁the": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "<unk>": 4}
    fallback = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    shown = [piece.shown for piece in TokenTexts(fallback).pieces([0, 1, 2, 3, 4])]
    assert shown == [" the", "⟨e2⟩", "⟨82⟩", "⟨ac €⟩", "<unk>"]


@given(st.text(st.characters(), max_size=20))
@quick(100)
def test_nothing_invisible_is_left_but_line_ends_and_single_spaces(content):
    shown = visible(content)
    assert all(c in "\n " or unicodedata.category(c)[0] not in "CZ" for c in shown)
    assert "  " not in shown
    assert shown.strip(" ") or not shown
    assert not shown or not unicodedata.category(shown[0]).startswith("M")


def test_what_would_not_be_seen_has_a_mark():
    assert visible("\r\n\ta  b \u200b") == "␍↵\n⇥a··b ⟨U+200B⟩"
    assert visible(" ") == "·"
    # A mark without its letter would sit on the token before.
    assert visible("\u0301") == "◌\u0301"
