"""A converted tokenizer against the library that its file is for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from tokenizers import Tokenizer

from modtrain.common.errors import DataError

# Of a vocabulary, in texts of so many pieces each.
_MOST_PIECES, _PIECES_A_TEXT = 50_000, 50
_TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    " \n\t \r\n\x0b\x0c\x85\u2028\u3000\xa0 ",
    "Hello, world! It's 12345678 o'clock; WE'LL see, they'Re here.",
    "  two  spaces   three\n\n\n    indented\n\tdef f(x):  return x\r\n\r\n",
    "aaaaaaaaaaaaaaa aaaa -------- ======= ........ hahahahaha \u2581 \u2581\u2581x\u2581",
    "naïve café Ünïcödé e\u0301\u0323 a\u0308 Straße \u017f K ﬁ ½ ² № Ⅷ",
    "漢字かな交じり文。 한국어 \u1112\u1161\u11ab ไทย العربيّة עברית हिन्दी",
    "\U0001f600\U0001f469\u200d\U0001f52c\ufe0f\U0001f1e9\U0001f1ea \U00010348",
    "\u200b\u00ad\ufeff\ufffd",
    "\x00\x01\x7f <s> </s> <unk> <0x41> <|endoftext|> [PAD]",
)


def refuse_other_numbers(
    tokenizer: Tokenizer,
    original: Callable[[str], Sequence[int]],
    pieces: Iterable[str],
    name: str,
    is_tie: Callable[[Sequence[int], Sequence[int]], bool] = lambda *_: False,
) -> None:
    """Compare the numbers of texts. pieces: of the vocabulary; the texts are made of them as well.

    is_tie: whether two ways to cut a text are equally good, so that either may be taken.

    Raises DataError where a text has other numbers.
    """
    tokenizer.encode_special_tokens = True
    for text in _texts(pieces):
        there, wanted = tokenizer.encode(text, add_special_tokens=False).ids, list(original(text))
        if there != wanted and not is_tie(there, wanted):
            raise DataError(
                f"{name}: cannot be converted: the text {text[:80]!r} would get other numbers than"
                " in its own library. Name a tokenizer.json instead."
            )


def _texts(pieces: Iterable[str]) -> Iterator[str]:
    yield from _TEXTS
    chosen = list(pieces)
    # Every so many: those at the end are of other kinds than those at the beginning.
    chosen = chosen[:: max(1, len(chosen) // _MOST_PIECES)]
    for start in range(0, len(chosen), _PIECES_A_TEXT):
        part = chosen[start : start + _PIECES_A_TEXT]
        yield "".join(part)
        yield " ".join(part)
