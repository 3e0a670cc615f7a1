import io
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from modtrain.common.errors import DataError
from modtrain.data.config import TokenizerConfig
from modtrain.data.prepare.given_tokenizer import given_tokenizer
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.tokenizer import DocumentEncoder
from modtrain.data.tokenizers import sentencepiece_model, source
from modtrain.data.tokenizers.source import read_tokenizer
from tests.data.data_cases import make_documents, tiny_config, write_jsonl

sentencepiece = pytest.importorskip("sentencepiece")
TEXTS = [
    *make_documents(60),
    *["naïve 漢字かな  two  spaces\tx", "def f(x):\n    return </x>"] * 20,
]
PARTS = st.sampled_from(
    [
        *(" ", "  ", "\n", "\r\n", "\t", "a", "ha", "é", "e\u0301", "漢", "😀", "\u2581", "</s>"),
        *("<s>", "<unk>", "<0x41>", "\x00", "the", "of", "-", "\u200b", "ß", "<sep>", "x"),
    ]
)
MODELS = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False},
    "bpe": {"model_type": "bpe"},
    "gemma": {
        "model_type": "bpe",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<sep>", "\u2581\u2581"],
        "eos_piece": "<eos>",
    },
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "unigram with unknown characters": {"model_type": "unigram"},
}


def trained(texts: list[str] = TEXTS, **options) -> bytes:
    """A model of SentencePiece's own trainer."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        **{
            "vocab_size": 600,
            "hard_vocab_limit": False,
            "normalization_rule_name": "identity",
            "minloglevel": 2,
            "num_threads": 1,
            **options,
        },
    )
    return written.getvalue()


def changed(content: bytes, change) -> bytes:
    """The model after ``change(model)``."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    change(model)
    return model.SerializeToString()


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "unigram",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in MODELS
            if name not in ("llama", "unigram")
        ),
    ],
)
def test_a_converted_model_gives_the_numbers_of_its_own_library(name):
    content = trained(**MODELS[name])
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    converted, end = sentencepiece_model.convert(content, "m")
    encoder = DocumentEncoder(converted, "m")
    tokenizer = Tokenizer.from_str(converted.decode())
    assert tokenizer.token_to_id(end) == original.eos_id()
    is_unigram = MODELS[name]["model_type"] == "unigram"

    def likelihood(numbers: list[int]) -> float:
        return sum(original.get_score(number) for number in numbers)

    @settings(max_examples=80, deadline=None, database=None)
    @given(st.one_of(st.lists(PARTS, max_size=25).map("".join), st.text(max_size=30)))
    def equal(text: str) -> None:
        (numbers,) = encoder.encode([text])
        expected = original.encode(text)
        if numbers != expected:
            # In a row of equal signs several cuts are equally likely.
            assert is_unigram
            assert likelihood(numbers) == pytest.approx(likelihood(expected), rel=1e-6)
            assert original.decode(numbers) == original.decode(expected)
        elif original.unk_id() not in numbers:
            there = tokenizer.decode(numbers, skip_special_tokens=False)
            assert there.lstrip() == original.decode(expected).lstrip()

    equal()
    corpus = "\n".join(TEXTS)
    assert encoder.encode([corpus]) == [original.encode(corpus)]


def test_a_corpus_is_prepared_with_a_model_and_with_a_folder_that_has_one(tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    content = trained(**MODELS["llama"])
    (folder / "tokenizer.model").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"2": {"content": "</s>"}}, "eos_token": "</s>"})
    )
    texts = make_documents(60)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    fingerprints = set()
    for number, path in enumerate((folder, folder / "tokenizer.model")):
        config = tiny_config(
            [corpus], tmp_path / f"out{number}", tokenizer=TokenizerConfig(path=str(path))
        )
        report = prepare(config, progress=False)
        assert report.summary.eos_id == original.eos_id()
        num_tokens = sum(split.num_tokens for split in report.summary.splits.values())
        assert num_tokens == sum(len(original.encode(text)) + 1 for text in texts)
        fingerprints.add(report.summary.fingerprint)
        assert prepare(config, progress=False).was_complete
    assert len(fingerprints) == 1
    # What a folder adds has no numbers in the model.
    (folder / "added_tokens.json").write_text('{"<|im_end|>": 32000}')
    with pytest.raises(DataError, match=r"added_tokens\.json.*<\|im_end\|>.*32000"):
        read_tokenizer(str(folder))


def test_an_end_token_of_another_name_is_found(tmp_path):
    (tmp_path / "m.model").write_bytes(trained(model_type="bpe", eos_piece="[FIN]"))
    given_one = given_tokenizer(TokenizerConfig(path=str(tmp_path / "m.model")))
    assert (given_one.end_token, given_one.eos_id) == ("[FIN]", 2)
    without = changed(
        trained(model_type="bpe", eos_id=-1),
        lambda model: setattr(model.trainer_spec, "eos_id", -1),
    )
    (tmp_path / "m.model").write_bytes(without)
    with pytest.raises(DataError, match="has no end-of-document token"):
        given_tokenizer(TokenizerConfig(path=str(tmp_path / "m.model")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "rules nmt_nfkc"),
        ({"model_type": "char"}, "type is char"),
        ({"treat_whitespace_as_suffix": True}, "spaces in another way"),
        ({"user_defined_symbols": ["<sep>"]}, "symbols of the user's"),
        ({"model_type": "unigram", "user_defined_symbols": ["<sep>"]}, "symbols of the user's"),
    ],
)
def test_what_cannot_be_converted_exactly_is_named(options, words):
    content = trained(**{"model_type": "bpe", **options})
    with pytest.raises(DataError, match=f"m: .*cannot be converted exactly.*{words}"):
        sentencepiece_model.convert(content, "m")


def test_hostile_models_are_errors(tmp_path, monkeypatch):
    content = trained(model_type="bpe")

    def equal_scores(model):
        for piece in model.pieces:
            piece.score = 1

    def twice(model):
        model.pieces.add().CopyFrom(model.pieces[10])

    def long_piece(model):
        model.pieces.add(piece="x" * 10_000, score=-5000, type=1)

    def unused(model):
        model.pieces[300].type = 5

    def no_number(model):
        model.pieces[300].score = float("nan")

    hostile = {
        "is no number": changed(content, no_number),
        "same score": changed(content, equal_scores),
        "there 2 times": changed(content, twice),
        "of 1 to 256 characters": changed(content, long_piece),
        "unused": changed(content, unused),
        "no SentencePiece model": content[: len(content) // 2],
        "no pieces": b"",
    }
    for words, model in hostile.items():
        with pytest.raises(DataError, match=f"m: .*{re.escape(words)}"):
            sentencepiece_model.convert(model, "m")
    path = tmp_path / "m.model"
    path.write_bytes(content)
    monkeypatch.setattr(source, "_MAX_CONVERTED_BYTES", 1000)
    with pytest.raises(DataError, match="larger than 1,000 bytes"):
        read_tokenizer(str(path))


def test_numbers_that_differ_are_refused(monkeypatch):
    content = trained(model_type="bpe")
    build = sentencepiece_model._bpe
    monkeypatch.setattr(sentencepiece_model, "_bpe", lambda model: build(_reversed(model)))
    with pytest.raises(DataError, match="would get other numbers"):
        sentencepiece_model.convert(content, "m")


def _reversed(model):
    """The model with the scores of its merges the other way round."""
    copy = type(model).FromString(model.SerializeToString())
    for piece in copy.pieces:
        piece.score = -piece.score
    return copy
