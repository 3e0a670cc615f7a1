import itertools
import math
import time
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models

from modtrain.data.prepare.tokenizer import train_tokenizer
from modtrain.inference.generate.text_stream import (
    TextStream,
    color_by_depth,
    depth_legend,
    mark_depth,
)
from tests.helpers.model_cases import quick

CORPUS = [
    "the old river walks under the stone, the old tree sings",
    "Übermut tut selten gut; la forêt déjà vue; 川は石の下を歩く",
    "smile 😀😃 and 👩‍👩‍👧 wave\n\n\tindented   spaces\r\n",
] * 3


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer.from_str(train_tokenizer(CORPUS, 330).decode())
    # One in characters that are all bytes in disguise, one with a character that is none.
    tokenizer.add_tokens(
        [AddedToken("é", normalized=False), AddedToken("<a 川>", normalized=False)]
    )
    return tokenizer


@cache
def falling_back() -> Tokenizer:
    """As Llama 2 has it: what is no token is spelled in bytes, a space at the start is dropped."""
    tokens = ["<unk>", "</s>", "▁", "▁the", "the", "▁a", "b", "é", "▁▁", "ab", "\n"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


@cache
def other(name: str) -> Tokenizer:
    tokens = ["<s>", "▁ab", "##b", "a", "▁", "b</w>", "a</w>", ".", "n't", "é", "▁a▁b", "<0xE2>"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, "<s>"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizers = {
        "metaspace": decoders.Metaspace(),
        "wordpiece": decoders.WordPiece(),
        "suffix": decoders.BPEDecoder(),
        "none": None,
    }
    if tokenizers[name] is not None:
        tokenizer.decoder = tokenizers[name]
    return tokenizer


TOKENIZERS = {
    "byte level": byte_level,
    "byte fallback": falling_back,
    **{
        name: lambda name=name: other(name) for name in ("metaspace", "wordpiece", "suffix", "none")
    },
}


def text_before_stop(text: str, stops: list[str]) -> str:
    """The text before the first stop string, the slow way."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def collect(stream: TextStream, ids: list[int]) -> list[tuple[str, int | None]]:
    """All the pieces, each marked by the place of its token."""
    pieces = [piece for place, token in enumerate(ids) for piece in stream.push(token, place)]
    return pieces + stream.finish()


@st.composite
def stops(draw: st.DrawFn, text: str) -> list[str]:
    """Some of what is in the text, some of what nearly is."""
    texts = draw(st.lists(st.text("ab the\n�", min_size=1, max_size=4), max_size=2))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(text)))
        part = text[start : start + draw(st.integers(1, 9))]
        texts += [part + ending for ending in [draw(st.sampled_from(["", "", "x"]))] if part]
    return texts


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.data())
@quick(80)
def test_the_pieces_are_the_whole_text_up_to_the_first_stop_string(name, data):
    tokenizer = TOKENIZERS[name]()
    size = tokenizer.get_vocab_size()
    # Special tokens and numbers without a token among them.
    low = st.integers(0, min(size + 3, 14))
    ids = data.draw(st.lists(st.integers(0, size + 3) | low, max_size=40))
    whole = tokenizer.decode(ids)
    chosen = data.draw(stops(whole))
    stream = TextStream(tokenizer, chosen)
    pieces = collect(stream, ids)
    expected = text_before_stop(whole, chosen)
    assert "".join(text for text, _ in pieces) == expected
    assert stream.text == expected
    assert stream.stopped == any(stop in whole for stop in chosen)
    assert all(text for text, _ in pieces)
    places = [place for _, place in pieces]
    assert places == sorted(places)
    if stream.stopped:
        assert stream.push(ids[0], 0) == stream.finish() == []
        assert stream.text == expected


@given(st.text(max_size=60) | st.text("the old川😀ü\n", max_size=60), st.data())
@example("naïve 川川 👩‍👩‍👧 ü\n", None)
@quick(120)
def test_pending_text_is_a_character_or_a_stop_string_begun(text, data):
    tokenizer = byte_level()
    # The library takes the added token é for a byte, which by itself is no UTF-8.
    text = text.replace("\ufffd", "").replace("é", "")
    chosen = data.draw(stops(text)) if data else ["川x"]
    chosen = [stop for stop in chosen if stop not in text]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    stream = TextStream(tokenizer, chosen)
    owners: list[int] = []
    pieces = []
    for place, token in enumerate(ids):
        pieces += stream.push(token, place)
        whole_characters = tokenizer.decode(ids[: place + 1]).rstrip("\ufffd")
        owners += [place] * (len(whole_characters) - len(owners))
        pending = [
            length
            for stop in chosen
            for length in range(1, len(stop))
            if whole_characters.endswith(stop[:length])
        ]
        assert stream.text == whole_characters[: len(whole_characters) - max(pending, default=0)]
    pieces += stream.finish()
    assert stream.text == text
    assert [place for part, place in pieces for _ in part] == owners


def ids_of(text: str) -> list[int]:
    return [byte_level().token_to_id(character) for character in text]


def test_nothing_comes_after_a_stop_string_not_even_a_character_begun():
    tokenizer = Tokenizer(models.WordLevel({"abð": 0}, "abð"))
    tokenizer.decoder = decoders.ByteLevel()
    stream = TextStream(tokenizer, ["b"])
    assert collect(stream, [0]) == [("a", 0)]


@given(st.lists(st.integers(0, 10), max_size=8), st.lists(st.integers(0, 10), max_size=8))
@example([3], [3])
@example([], [3])
@example([1, 1], [5])
@quick(60)
def test_a_continued_text_keeps_its_first_space(before, ids):
    tokenizer = falling_back()
    stream = TextStream(tokenizer, ["the the the"], before=before)
    collect(stream, ids)
    expected = tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]
    assert stream.text == text_before_stop(expected, ["the the the"])


@pytest.mark.parametrize("tokenizer", [byte_level, falling_back])
def test_the_prompt_gives_no_text_and_no_stop(tokenizer):
    tokenizer = tokenizer()
    # The last byte of the prompt is one of two, and cannot be mended any more.
    names = ("a", "Ã", "b") if tokenizer is byte_level() else ("ab", "<0xC3>", "b")
    first, half, last = (tokenizer.token_to_id(name) for name in names)
    stream = TextStream(tokenizer, ["a", "\ufffd"], before=[first, half])
    assert stream.text == ""
    assert not stream.stopped
    assert collect(stream, [last]) == [("b", 0)]


def test_added_tokens_give_their_text():
    tokenizer = byte_level()
    ids = [tokenizer.token_to_id("<a 川>"), *ids_of("b")]
    assert collect(TextStream(tokenizer), ids) == [("<a 川>", 0), ("b", 1)]


def test_spelled_bytes_wait_for_the_next_token_and_keep_their_mark():
    tokenizer = falling_back()
    newline, the = tokenizer.token_to_id("<0x0A>"), tokenizer.token_to_id("the")
    stream = TextStream(tokenizer)
    assert stream.push(newline, 0) == []
    assert stream.push(the, 1) == [("\n", 0), ("the", 1)]
    # Where nothing is spelled in bytes, the same token is text like any other.
    plain = other("metaspace")
    assert TextStream(plain).push(plain.token_to_id("<0xE2>"), 0) == [("<0xE2>", 0)]


def test_bytes_that_are_no_character_at_the_end_have_the_last_mark():
    # Three of the four bytes of a character.
    stream = TextStream(byte_level())
    assert collect(stream, ids_of("ðŁĺ")) == [("\ufffd", 2)]


def test_an_empty_stop_string_raises():
    with pytest.raises(ValueError, match="empty"):
        TextStream(byte_level(), ["a", ""])


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
def test_the_cost_of_a_token_does_not_grow(name):
    """Where all pending text is decoded again, these take minutes."""
    tokenizer = TOKENIZERS[name]()
    token = tokenizer.token_to_id("ÿ" if name == "byte level" else "<0xFF>")
    stream = TextStream(tokenizer, ["\ufffdx", "y" * 50])
    start = time.process_time()
    letter = tokenizer.token_to_id("b")
    collect(stream, [token] * 20000 + [letter] * 20000)
    assert time.process_time() - start < 5
    assert stream.text == "\ufffd" * 20000 + "b" * 20000


def luminance(colour) -> float:
    """Relative luminance of sRGB (WCAG 2.2)."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (value / 255 for value in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("most", [1, 2, 4, 7, 30])
def test_each_depth_has_a_colour_that_can_be_read_on_black_and_on_white(most):
    text = color_by_depth([(f"{depth},", depth) for depth in range(most + 1)], most)
    assert text.plain == "".join(f"{depth}," for depth in range(most + 1))
    colours = [span.style.color.triplet for span in text.spans]
    assert len(set(colours)) == most + 1
    for colour in colours:
        assert (luminance(colour) + 0.05) / 0.05 > 3
        assert 1.05 / (luminance(colour) + 0.05) > 3
    # A model with few routers has colours that nobody takes for each other.
    distances = [math.dist(a, b) for a, b in itertools.combinations(colours, 2)]
    assert most > 4 or min(distances) > 80


def test_the_legend_has_the_colours_of_the_text():
    for most in (1, 4, 30):
        legend = depth_legend(most)
        shown = {legend.plain[span.start : span.end]: span.style.color for span in legend.spans}
        assert {"0", str(most)} <= shown.keys()
        for depth, colour in shown.items():
            assert color_by_depth([("a", int(depth))], most).spans[0].style.color == colour


def test_pieces_without_a_mark_are_not_styled_and_markup_is_text():
    text = color_by_depth([("[bold]prompt", None), (" on", 1), ("[/]", 2)], 2)
    assert text.plain == "[bold]prompt on[/]"
    assert [(span.start, span.end) for span in text.spans] == [(12, 15), (15, 18)]
    console = Console(force_terminal=True, color_system="truecolor", width=80)
    with console.capture() as capture:
        console.print(text)
    assert capture.get().startswith("[bold]prompt\x1b[38;2;")


def test_a_model_without_routing_has_one_colour_and_other_depths_raise():
    assert len(color_by_depth([("a", 0), ("b", 0)], 0).spans) == 2
    for depth in (-1, 4):
        with pytest.raises(ValueError, match=f"depth {depth} "):
            color_by_depth([("a", depth)], 3)


def test_control_characters_do_not_reach_the_terminal():
    text = color_by_depth([("a\x1b[2J\x07\r\n\t\x7f\x9bm", 0), ("\x1b]0;x", None)], 1)
    assert text.plain == "a␛[2J␇␍\n\t␡\ufffdm␛]0;x"


def test_without_colours_each_piece_is_followed_by_its_depth():
    pieces = [("Once ", None), ("upon", 3), (" a", 0), ("\n", 12), ("é", 4567890)]
    assert mark_depth(pieces) == "Once upon₃ a₀\n₁₂é₄₅₆₇₈₉₀"
    assert mark_depth([]) == ""
