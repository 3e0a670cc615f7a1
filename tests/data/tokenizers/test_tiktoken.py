import base64
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from modtrain.common.errors import DataError
from modtrain.data.config import TokenizerConfig
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.tokenizer import END_OF_DOCUMENT, DocumentEncoder
from modtrain.data.tokenizers import tiktoken_ranks
from modtrain.data.tokenizers.encodings import KNOWN, encoding_of, oniguruma_pattern
from modtrain.data.tokenizers.source import read_tokenizer
from tests.data.data_cases import make_documents, tiny_config, write_jsonl

tiktoken = pytest.importorskip("tiktoken")
TEXTS = [*make_documents(60), *["naïve 123456 aaaaaa haha I'LL we've \n\n  x"] * 20]
PARTS = st.sampled_from(
    [
        *(" ", "  ", "\n", "\r\n", "\t", "a", "aa", "123", "4", "I'll", "'S", "é", "e\u0301", "漢"),
        *("😀", END_OF_DOCUMENT, "$", "/", "!\n", "\x85", "\u3000", "\u017f", "K", "the", "x"),
    ]
)


def ranks_of(texts: list[str] = TEXTS, size: int = 400) -> dict[bytes, int]:
    """Ranks as a trainer of byte-level BPE makes them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    byte_of = {c: n for n, c in enumerate(tiktoken_ranks._characters_of_bytes())}
    vocabulary = tokenizer.get_vocab()
    return {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items()}


def written(ranks: dict[bytes, int]) -> bytes:
    """The content of a file of ranks."""
    lines = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in lines)


@pytest.mark.parametrize(
    "name",
    [
        "cl100k_base",
        pytest.param("r50k_base", marks=pytest.mark.slow),
        pytest.param("o200k_base", marks=pytest.mark.slow),
    ],
)
def test_converted_ranks_give_the_numbers_of_tiktoken(name):
    # As published ones, with a gap before a special token.
    ranks, special = ranks_of(), {END_OF_DOCUMENT: 410, "<|fim_prefix|>": 405}
    encoding = replace(KNOWN[name], special_tokens=special, num_ranks=None)
    original = tiktoken.Encoding(
        name, pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens=special
    )
    converted = tiktoken_ranks.convert(written(ranks), encoding, "t")
    encoder, tokenizer = DocumentEncoder(converted, "t"), Tokenizer.from_str(converted.decode())
    assert {token: tokenizer.token_to_id(token) for token in special} == special
    assert len(original.encode_ordinary("".join(TEXTS))) < 0.6 * len("".join(TEXTS))

    @settings(max_examples=80, deadline=None, database=None)
    @given(st.one_of(st.lists(PARTS, max_size=25).map("".join), st.text(max_size=30)))
    def equal(text: str) -> None:
        (numbers,) = encoder.encode([text])
        assert numbers == original.encode_ordinary(text)
        assert tokenizer.decode(numbers) == text

    equal()
    corpus = "\n".join(TEXTS)
    assert encoder.encode([corpus]) == [original.encode_ordinary(corpus)]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_each_character_is_cut_as_tiktoken_does(name):
    ranks, encoding = (
        ranks_of(),
        replace(KNOWN[name], special_tokens={"<|x|>": 400}, num_ranks=None),
    )
    original = tiktoken.Encoding(
        name, pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens={}
    )
    encoder = DocumentEncoder(tiktoken_ranks.convert(written(ranks), encoding, "t"), "t")
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = [f"a{chr(code)}b1{chr(code)}!" for code in codes]
    for start in range(0, len(texts), 10_000):
        part = texts[start : start + 10_000]
        assert encoder.encode(part) == [original.encode_ordinary(text) for text in part]


def test_the_known_encodings_are_those_of_tiktoken(monkeypatch):
    from tiktoken_ext import openai_public

    # Nothing is fetched.
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    for name, encoding in KNOWN.items():
        there = openai_public.ENCODING_CONSTRUCTORS[name]()
        assert encoding.pattern == there["pat_str"]
        assert encoding.special_tokens == there["special_tokens"]
        if "explicit_n_vocab" in there:
            assert encoding.num_ranks == there["explicit_n_vocab"] - 1


def test_a_corpus_is_prepared_with_a_file_of_ranks(tmp_path):
    ranks, texts = ranks_of(), make_documents(60)
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(written(ranks))
    encoding = tmp_path / "mine.json"
    pattern = r"\w+|[^\w\s]+|\s+$|\s"
    special = {"<|fin|>": 400, "<|other|>": 401}
    encoding.write_text(json.dumps({"pat_str": pattern, "special_tokens": special}))
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    chosen = TokenizerConfig(path=str(path), encoding=str(encoding), end_token="<|fin|>")
    config = tiny_config([corpus], tmp_path / "out", tokenizer=chosen)
    report = prepare(config, progress=False)
    assert (report.summary.eos_id, report.summary.vocab_size) == (400, 402)
    original = tiktoken.Encoding(
        "mine", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )
    num_tokens = sum(split.num_tokens for split in report.summary.splits.values())
    assert num_tokens == sum(len(original.encode_ordinary(text)) + 1 for text in texts)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.encoding=.*is for a file of tiktoken's ranks"):
        read_tokenizer(str(tmp_path / "tokenizer.json"), str(encoding))
    # Llama 3 has its ranks in such a file.
    (tmp_path / "tokenizer.model").write_bytes(written(ranks))
    with pytest.raises(DataError, match=r"tokenizer\.encoding: r50k_base"):
        read_tokenizer(str(tmp_path / "tokenizer.model"))


@pytest.mark.parametrize(
    ("pattern", "same"),
    [
        (r"\p{N}{1,3}+|\s++$", r"(?>\p{N}{1,3})|\s++\z"),
        (r"[$^]x\$|[^\r\n]", r"[$^]x\$|[^\r\n]"),
        (r"[a\]]{2}+", r"(?>[a\]]{2})"),
    ],
)
def test_a_pattern_means_the_same_in_the_other_dialect(pattern, same):
    assert oniguruma_pattern(pattern, "t") == same


def test_hostile_ranks_are_errors(tmp_path):
    ranks = ranks_of(size=270)
    encoding = replace(KNOWN["cl100k_base"], special_tokens={"<|x|>": 300}, num_ranks=None)
    good = written(ranks)
    hostile = {
        "line 271 is not a token": good + b"!!! 5\n",
        "line 271 has a token that stands there twice": good + b"IQ== 999\n",
        "more than 256 bytes": good + base64.b64encode(b"x" * 1000) + b" 999\n",
        "no rank for the byte 33": good.replace(b"IQ== 0\n", b""),
        "the same number": good + base64.b64encode(b"xyzzy") + b" 300\n",
        "numbers go to 999,999,999": good + base64.b64encode(b"xyzzy") + b" 999999999\n",
    }
    for words, content in hostile.items():
        with pytest.raises(DataError, match=f"t: .*{words}"):
            tiktoken_ranks.convert(content, encoding, "t")
    with pytest.raises(DataError, match=r"has 270 ranks, and its encoding 100,256"):
        tiktoken_ranks.convert(good, KNOWN["cl100k_base"], "t")
    for pattern, words in (
        ("(", "pattern"),
        ("^a", "has ^"),
        ("(?m)a.b", "a flag but"),
        ("(?is:a.b)", "a flag but"),
        ("(?:ab){1,2}+", "a plus behind"),
    ):
        with pytest.raises(DataError, match=words.replace("^", r"\^")):
            tiktoken_ranks.convert(good, replace(encoding, pattern=pattern), "t")
    # A special token whose text the pattern leaves whole would be found in a text.
    with pytest.raises(DataError, match="would get other numbers"):
        tiktoken_ranks.convert(good, replace(encoding, pattern=r"\S+|\s+"), "t")
    path = tmp_path / "e.json"
    for content in ("[]", "{}", '{"pat_str": "a", "special_tokens": {"b": -1}}', "{"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"e\.json"):
            encoding_of(str(path), tmp_path / "t.tiktoken")
    with pytest.raises(DataError, match="neither a file nor one of"):
        encoding_of("no", tmp_path / "t.tiktoken")
