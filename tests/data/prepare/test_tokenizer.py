import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from modtrain.common.errors import DataError
from modtrain.data.config import TokenizerConfig
from modtrain.data.mixture.summary import combined_summary
from modtrain.data.prepare import tokenizer as tokenizer_module
from modtrain.data.prepare.given_tokenizer import given_tokenizer
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.sources import expand_sources
from modtrain.data.prepare.tokenizer import (
    END_OF_DOCUMENT,
    DocumentEncoder,
    SplitChooser,
    check_tokenizer,
    split_text,
    train_tokenizer,
    training_texts,
)
from modtrain.data.prepare.units import plan_units
from modtrain.data.stream.index import ShardIndex
from modtrain.data.tokenizers.source import read_tokenizer
from tests.data.data_cases import make_documents, tiny_config, write_jsonl
from tests.helpers.problems import problems_of

NO_ONE = SplitChooser(0, 0.0)
READING = {"text_column": "text", "max_document_bytes": 1 << 20}


def test_training_is_deterministic_and_reaches_its_size():
    documents = make_documents(300)
    content = train_tokenizer(documents, 300)
    assert content == train_tokenizer(documents, 300)
    assert check_tokenizer(content, "t") == (300, 0)
    assert content != train_tokenizer(documents[:50], 300)


def test_any_text_comes_back_and_no_text_ends_a_document():
    content = train_tokenizer(make_documents(50), 300)
    text = f"  x\r\n\t{END_OF_DOCUMENT}é漢字\U0001f600\x00 "
    (numbers,) = DocumentEncoder(content, "t").encode([text])
    assert 0 not in numbers
    assert Tokenizer.from_str(content.decode()).decode(numbers) == text


@pytest.mark.parametrize("name", tokenizer_module.KNOWN_END_TOKENS)
def test_end_tokens_of_published_tokenizers_are_known(name):
    content = train_tokenizer(make_documents(5), 300).replace(
        END_OF_DOCUMENT.encode(), name.encode()
    )
    assert check_tokenizer(content, "t")[1] == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "is not a tokenizer.json"),
        (b"\xff", "is not a tokenizer.json"),
        (
            train_tokenizer(["a"], 300).replace(END_OF_DOCUMENT.encode(), b"<other>"),
            "has no end-of-document token",
        ),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(tmp_path, content, words):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(10))
    config = tiny_config([corpus], tmp_path / "out", tokenizer=TokenizerConfig(path=str(path)))
    with pytest.raises(DataError, match=f"t.json: {words}"):
        prepare(config, progress=False)


def test_a_missing_tokenizer_is_named(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(10))
    tokenizer = TokenizerConfig(path=str(tmp_path / "none.json"))
    with pytest.raises(DataError, match=r"none\.json: is missing"):
        prepare(tiny_config([corpus], tmp_path / "out", tokenizer=tokenizer), progress=False)


def test_truncation_padding_and_added_tokens_of_a_loaded_tokenizer_are_off():
    tokenizer = Tokenizer.from_str(train_tokenizer(make_documents(50), 300).decode())
    text = "the of and to in a is that"
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=100)
    assert DocumentEncoder(tokenizer.to_str().encode(), "t").encode([text, "a"])[0] == expected


def test_long_texts_give_the_same_tokens_in_pieces(monkeypatch):
    content = train_tokenizer(make_documents(50), 300)
    text = "\n\n".join(make_documents(30)) + "\n  indented\n\n\n x\n"
    encoder = DocumentEncoder(content, "t")
    whole = encoder.encode([text, "a"])
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 100)
    assert len(split_text(text)) > 20
    assert "".join(split_text(text)) == text
    assert encoder.encode([text, "a"]) == whole
    assert split_text("x" * 1000) == ["x" * 1000]


def test_every_source_gives_its_share_of_the_training_text(tmp_path):
    for name, letter in (("a", "A"), ("b", "B")):
        write_jsonl(tmp_path / f"{name}.jsonl", [letter * 100] * 1000)
    units = plan_units(expand_sources([str(tmp_path / "*.jsonl")]), "text")
    config = TokenizerConfig(train_bytes=5000)
    text = "".join(training_texts(units, config, NO_ONE, **READING))
    assert len(text) == 5000
    assert text.count("A") == text.count("B") == 2500
    whole = "".join(training_texts(units, TokenizerConfig(), NO_ONE, **READING))
    assert len(whole) == 200_000


def test_held_out_documents_train_no_tokenizer(tmp_path):
    documents = make_documents(100)
    write_jsonl(tmp_path / "a.jsonl", documents)
    units = plan_units(expand_sources([str(tmp_path / "*.jsonl")]), "text")
    chooser = SplitChooser(0, 0.3)
    texts = list(training_texts(units, TokenizerConfig(), chooser, **READING))
    assert texts == [text for text in documents if not chooser.is_valid(text.encode())]
    assert 50 < len(texts) < 90


def test_the_choice_depends_on_the_seed_and_the_text_alone():
    contents = [str(number).encode() for number in range(2000)]
    chosen = [SplitChooser(0, 0.1).is_valid(content) for content in contents]
    assert 140 < sum(chosen) < 260
    assert chosen == [SplitChooser(0, 0.1).is_valid(content) for content in contents]
    other = [SplitChooser(1, 0.1).is_valid(content) for content in contents]
    assert chosen != other
    # A larger share contains the held-out documents of a smaller one.
    more = [SplitChooser(0, 0.2).is_valid(content) for content in contents]
    assert all(later for earlier, later in zip(chosen, more, strict=True) if earlier)


def other_tokenizer(folder: Path) -> Path:
    """A tokenizer whose end token has no usual name, in ``folder``."""
    content = train_tokenizer(make_documents(5), 270)
    parsed = Tokenizer.from_str(content.replace(END_OF_DOCUMENT.encode(), b"<|start|>").decode())
    parsed.add_special_tokens(["<|stop|>"])
    path = folder / "tokenizer.json"
    path.write_text(parsed.to_str())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<|stop|>"}),
        ("special_tokens_map.json", {"eos_token": {"content": "<|stop|>"}}),
        ("generation_config.json", {"eos_token_id": [10**30, -1, 270, 0]}),
        ("config.json", {"eos_token_id": 270}),
        ("index.json", {"eos_id": 270}),
    ],
)
def test_the_end_token_is_the_one_that_a_file_beside_the_tokenizer_declares(
    name, content, tmp_path
):
    path = other_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert given_tokenizer(TokenizerConfig(path=str(path))).end_token == "<|stop|>"
    named = TokenizerConfig(path=str(path), end_token="<|start|>")
    assert given_tokenizer(named).end_token == "<|start|>"
    (tmp_path / name).write_text("{")
    with pytest.raises(DataError, match=name):
        given_tokenizer(TokenizerConfig(path=str(path)))


def test_a_usual_name_comes_before_what_files_declare(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train_tokenizer(make_documents(5), 300))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    assert given_tokenizer(TokenizerConfig(path=str(path))).end_token is None
    named = TokenizerConfig(path=str(path), end_token="<|nothing|>")
    problem = problems_of(given_tokenizer, named)["tokenizer.end_token"]
    assert END_OF_DOCUMENT in problem.remedy
    assert [p.key for p in TokenizerConfig(end_token="a").problems("tokenizer")] == [
        "tokenizer.end_token"
    ]


def test_a_mixture_needs_one_end_token(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(60))
    summaries = {}
    for token in ("<|start|>", "<|stop|>"):
        tokenizer = TokenizerConfig(path=str(other_tokenizer(tmp_path)), end_token=token)
        config = tiny_config([corpus], tmp_path / token, tokenizer=tokenizer)
        summaries[token] = prepare(config, progress=False).summary
    with pytest.raises(DataError, match=r"need one end-of-document token: .*tokenizer\.end_token"):
        combined_summary(summaries)
    same = combined_summary({"a": summaries["<|stop|>"], "b": summaries["<|stop|>"]})
    assert same.end_token == "<|stop|>"


def test_data_with_a_declared_end_token(tmp_path):
    path = other_tokenizer(tmp_path)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(60))
    config = tiny_config([corpus], tmp_path / "out", tokenizer=TokenizerConfig(path=str(path)))
    with pytest.raises(DataError, match=r"special tokens are <\|start\|>, <\|stop\|>"):
        prepare(config, progress=False)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert prepare(config, progress=False).summary.eos_id == 270
    assert prepare(config, progress=False).was_complete
    index = tmp_path / "out" / "index.json"
    assert ShardIndex.load(tmp_path / "out").summary.end_token == "<|stop|>"
    other = replace(config, tokenizer=replace(config.tokenizer, end_token="<|start|>"))
    with pytest.raises(DataError, match="other options: tokenizer differ"):
        prepare(other, progress=False)
    index.write_text(json.dumps(json.loads(index.read_text()) | {"eos_id": 269}))
    with pytest.raises(DataError, match="eos_id is 269; its tokenizer has 270"):
        ShardIndex.load(tmp_path / "out")


def test_a_folder_has_a_tokenizer_and_another_end_token_is_reported(tmp_path, caplog):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(train_tokenizer(make_documents(20), 300))
    corpus = write_jsonl(tmp_path / "a.jsonl", make_documents(60))
    config = tiny_config([corpus], tmp_path / "out", tokenizer=TokenizerConfig(path=str(folder)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_DOCUMENT}))
    assert prepare(config, progress=False).summary.eos_id == 0
    assert "declares" not in caplog.text
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "a"}}))
    config.output = str(tmp_path / "out2")
    assert prepare(config, progress=False).summary.eos_id == 0
    assert "declares the end token a; documents end with <|endoftext|>" in caplog.text


def test_a_folder_without_one_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"has no tokenizer\.json, and no file that ends in"):
        read_tokenizer(str(tmp_path))
    for name in ("a.model", "b.tiktoken"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"several tokenizers, a\.model, b\.tiktoken"):
        read_tokenizer(str(tmp_path))
    (tmp_path / "a.model").unlink()
    with pytest.raises(DataError, match=r"b\.tiktoken: has neither the pattern.*cl100k_base"):
        read_tokenizer(str(tmp_path))


def test_a_given_tokenizer_is_parsed_once(tmp_path, monkeypatch):
    path = other_tokenizer(tmp_path)
    parsed = []
    parse = tokenizer_module.parse_tokenizer

    def counted(content, name):
        parsed.append(name)
        return parse(content, name)

    for module in ("given_tokenizer", "tokenizer"):
        monkeypatch.setattr(f"modtrain.data.prepare.{module}.parse_tokenizer", counted)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(60))
    chosen = TokenizerConfig(path=str(path), end_token="<|stop|>")
    prepare(tiny_config([corpus], tmp_path / "out", tokenizer=chosen), progress=False)
    assert parsed.count(str(path)) == 1
