"""Corpora and tokenizers that look usable, and are not or only in part."""

import io
import json
import lzma
import shlex
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from modtrain.cli.compose import compose
from modtrain.common.errors import DataError
from modtrain.data.config import TokenizerConfig
from modtrain.data.prepare import tokenizer as tokenizer_module
from modtrain.data.prepare.decompress import chunks
from modtrain.data.prepare.flaws import DamagedError
from modtrain.data.prepare.lost_text import LostText
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.sources import expand_sources
from modtrain.data.prepare.tokenizer import (
    DocumentEncoder,
    check_tokenizer,
    train_tokenizer,
)
from modtrain.data.stream.index import read_summary
from modtrain.inference.token_text import Vocabulary
from tests.data.data_cases import make_documents, tiny_config, write_jsonl

TAG = "</s>"


def byte_level(*special: str, plain: tuple[str, ...] = ()) -> Tokenizer:
    """A byte-level tokenizer with special tokens, and added ones that are not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(make_documents(20), trainer)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in plain])
    return tokenizer


def of_letters(*special: str, unknown: str | None = None) -> Tokenizer:
    """A tokenizer of the characters of some English text, without bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=list(special), show_progress=False)
    tokenizer.train_from_iterator(make_documents(50), trainer)
    return tokenizer


def prepared(tmp_path: Path, tokenizer: Tokenizer, documents: list[str]):
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    corpus = write_jsonl(tmp_path / "corpus.jsonl", documents)
    config = tiny_config([corpus], tmp_path / "out", tokenizer=TokenizerConfig(path=str(path)))
    return prepare(config, progress=False)


def content_of(tokenizer: Tokenizer) -> bytes:
    return tokenizer.to_str().encode()


# End tokens -----------------------------------------------------------------------------------


def test_a_special_end_token_comes_before_a_tag_of_html(tmp_path):
    tokenizer = byte_level("<pad>", "<eos>", plain=(TAG,))
    documents = [f"{text} <s>struck{TAG} and on" for text in make_documents(60)]
    report = prepared(tmp_path, tokenizer, documents)
    assert report.summary.eos_id == tokenizer.token_to_id("<eos>")
    assert Vocabulary(content_of(tokenizer), "t").end_id == report.summary.eos_id


def test_an_end_token_that_stands_in_the_text_is_refused(tmp_path):
    tokenizer = byte_level("<pad>", plain=(TAG,))
    end = tokenizer.token_to_id(TAG)
    assert check_tokenizer(content_of(tokenizer), "t")[1] == end
    assert prepared(tmp_path / "a", tokenizer, make_documents(60)).summary.eos_id == end
    documents = [*make_documents(60), f"a {TAG} b"]
    with pytest.raises(DataError, match=rf"corpus\.jsonl: has the end token {end} .* special"):
        prepared(tmp_path / "b", tokenizer, documents)


def test_data_say_which_token_ended_their_documents():
    tokenizer = byte_level("<eos>", plain=(TAG,))
    assert Vocabulary(content_of(tokenizer), "t", end_id=7).end_id == 7


# Tokenizers that cannot spell a text ----------------------------------------------------------


def test_documents_that_a_tokenizer_cannot_spell_are_flaws_with_their_place(tmp_path):
    tokenizer = of_letters(TAG)
    english, greek = make_documents(60), ["άλφα βήτα γάμμα", "日本語の文章"]
    report = prepared(tmp_path, tokenizer, [*english[:30], *greek, *english[30:]])
    assert report.summary.flaws == {"lost_text": 2}
    splits = report.summary.splits.values()
    assert sum(split.num_documents for split in splits) == len(english)
    assert [flaw.line for flaw in report.examples] == [31, 32]
    assert "no token for 'ά', 'λ'" in str(report)


@pytest.mark.parametrize("piece_chars", [1 << 20, 30])
def test_what_is_lost_is_found_while_encoding(monkeypatch, piece_chars):
    """Against each text encoded twice: alone to be checked, and again."""
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", piece_chars)
    tokenizers = [
        of_letters(TAG),
        of_letters(TAG, "<unk>", unknown="<unk>"),
        byte_level(TAG),
        Tokenizer(models.Unigram([("<unk>", 0.0), ("e", -1.0), (" ", -1.0)], unk_id=0)),
    ]
    documents = [["the of\nand " * 9], ["άλφα"], ["the", " é" + " the" * 20], ["the\n", "ééé"]]
    for tokenizer in tokenizers:
        encoder = DocumentEncoder(content_of(tokenizer), "t")
        results = encoder.encode_documents(documents)
        for parts, result in zip(documents, results, strict=True):
            pieces = [encoder.lost_text.of(part) for part in parts]
            if isinstance(result, str):
                assert any(pieces)
                assert len(parts) > 1 or result == pieces[0]
            else:
                assert result == encoder.encode(parts)
                assert len(parts) > 1 or not pieces[0]


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [("the of and", False), ("the of and é" + " the" * 20, False), ("ééé the", True)],
)
def test_an_unknown_token_may_stand_for_few_characters(text, is_lost):
    tokenizer = of_letters(TAG, "<unk>", unknown="<unk>")
    assert bool(LostText(tokenizer, "t").of(text)) == is_lost


def test_an_unknown_token_is_known_by_its_id():
    """Unigram's has the text that it stands for."""
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -1.0)]
    lost = LostText(Tokenizer(models.Unigram(pieces, unk_id=0)), "t")
    assert lost.of("abab") == ""
    assert "unknown to the tokenizer: '日', '本'" in lost.of("日本日本")


@pytest.mark.parametrize("text", ["\n", "a \n\n\n"])
def test_white_space_may_be_unknown(text):
    words = models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("a", "isolated")
    assert LostText(tokenizer, "t").of(text) == ""


def test_a_vocabulary_with_all_bytes_spells_everything():
    assert LostText(byte_level("<eos>"), "t").of("日本語 \x00") == ""
    fallback = Tokenizer(
        models.BPE({f"<0x{n:02X}>": n for n in range(256)}, [], byte_fallback=True)
    )
    assert not LostText(fallback, "t").is_possible
    part = Tokenizer(models.BPE({f"<0x{n:02X}>": n for n in range(128)}, [], byte_fallback=True))
    assert LostText(part, "t").is_possible


def test_a_prompt_that_would_lose_text_is_refused():
    vocabulary = Vocabulary(content_of(of_letters(TAG)), "t")
    assert vocabulary.encode("the of")
    with pytest.raises(DataError, match="the prompt: the tokenizer has no token for 'é'"):
        vocabulary.encode("the é")


def test_a_word_level_tokenizer_without_its_unknown_token_is_refused(tmp_path):
    words = {"the": 0, "of": 1, TAG: 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([TAG])
    with pytest.raises(DataError, match=r"cannot encode the text: .*UNK.* tokenizer\.path=null"):
        prepared(tmp_path, tokenizer, make_documents(60))
    with pytest.raises(DataError, match="t: cannot encode the text"):
        Vocabulary(content_of(tokenizer), "t").encode("unheard")


# Training a tokenizer -------------------------------------------------------------------------


def test_training_takes_time_in_proportion_to_a_words_length():
    # Without a limit the second takes sixteen times as long.
    draws = np.random.default_rng(0).choice(list("abcdefgh"), 120_000)
    seconds = []
    for length in (30_000, 120_000):
        start = time.process_time()
        train_tokenizer(["".join(draws[:length])], 280)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 1


def test_only_long_words_are_cut():
    documents = make_documents(30)
    pieces = [*tokenizer_module._without_long_words(" ".join(documents))]
    assert pieces == [" ".join(documents)]
    long = "b c " + "a" * 2500 + " " * 1500 + "d"
    pieces = [*tokenizer_module._without_long_words(long)]
    assert "".join(pieces) == long
    assert max(len(word) for piece in pieces for word in piece.split()) == 1000
    (numbers,) = DocumentEncoder(train_tokenizer([long], 300), "t").encode(["a" * 5000])
    assert len(numbers) < 5000


def test_an_interrupt_ends_the_training_of_a_tokenizer():
    def texts():
        raise KeyboardInterrupt
        yield ""

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(texts(), 300)


# Columns and lines ----------------------------------------------------------------------------


def test_a_text_under_another_key_is_named_with_what_to_write(tmp_path):
    path = tmp_path / "corpus.jsonl"
    records = [{"id": str(n), "content": text} for n, text in enumerate(make_documents(20))]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError) as caught:
        prepare(tiny_config([path], tmp_path / "out"), progress=False)
    text = str(caught.value)
    assert f"{path}:1: no text in 'text'; its keys: id, content. Write text_column=content" in text
    assert "20 lines or rows" in text
    assert "seq_len" not in text
    assert "valid_fraction" not in text
    config = tiny_config([path], tmp_path / "out2", text_column="content")
    assert prepare(config, progress=False).summary.flaws == {}


def test_json_over_several_lines_is_named_with_file_and_line(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}, indent=1) + "\n" for t in make_documents(20)))
    with pytest.raises(DataError, match=rf"{path}:1: not JSON.*each line holds one whole JSON"):
        prepare(tiny_config([path], tmp_path / "out"), progress=False)


# Files ----------------------------------------------------------------------------------------


def test_each_real_file_is_read_once_whatever_leads_to_it(tmp_path):
    folder = tmp_path / "texts"
    (folder / "v1").mkdir(parents=True)
    for name in ("a", "z", "v1/b"):
        (folder / f"{name}.txt").write_text(name)
    (folder / "loop").symlink_to(folder)
    (folder / "current").symlink_to(folder / "v1")
    (folder / "a_link.txt").symlink_to(folder / "a.txt")
    (folder / "hard.txt").hardlink_to(folder / "z.txt")
    files = expand_sources([f"{folder}/**/*.txt", f"{folder}/loop/v1/*.txt"])
    names = [str(Path(file.path).relative_to(folder)) for file in files]
    assert len(names) == 3
    assert all(first < second for first, second in pairwise(names))
    assert names[0] == "a.txt"


def test_a_folder_of_parquet_is_answered_with_its_own_pattern(tmp_path):
    (tmp_path / "set").mkdir()
    table = pa.table({"text": make_documents(60)})
    parquet.write_table(table, tmp_path / "set" / "part-0.parquet")
    with pytest.raises(DataError, match=r"it is a folder; write (\S+)") as caught:
        expand_sources([str(tmp_path / "set")])
    pattern = str(caught.value).partition("write ")[2].rstrip(".")
    assert pattern.endswith("/**/*.parquet")
    assert len(expand_sources([pattern])) == 1


@pytest.mark.parametrize("source", ["[v1] set/*.jsonl", "[v1] set"])
def test_brackets_in_a_folders_name_are_answered_with_how_to_write_them(
    tmp_path, monkeypatch, source
):
    monkeypatch.chdir(tmp_path)
    Path("[v1] set").mkdir()
    write_jsonl(Path("[v1] set/a.jsonl"), make_documents(20))
    with pytest.raises(DataError) as caught:
        expand_sources([source])
    pattern, _, rest = str(caught.value).partition("write ")[2].partition(" (in a command: ")
    assert pattern.startswith("[[]v1] set/")
    assert len(expand_sources([pattern])) == 1
    (override,) = shlex.split(rest.rstrip(")."))
    assert compose("prepare", [override, "output=x"]).sources == [pattern]


def test_a_folder_is_answered_with_a_pattern_that_matches_or_none(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/a.txt").write_text("hidden")
    (tmp_path / "b.pdf").write_text("no text")
    with pytest.raises(
        DataError, match=r"a folder without a file of a known kind\. Known are \.txt"
    ):
        expand_sources([str(tmp_path)])
    (tmp_path / "C.TXT").write_text("text")
    with pytest.raises(DataError, match=r"it is a folder; write (\S+)") as caught:
        expand_sources([str(tmp_path)])
    pattern = str(caught.value).partition("write ")[2].rstrip(".")
    assert len(expand_sources([pattern])) == 1


def test_prepared_data_are_no_corpus(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / "p" / name).mkdir(parents=True)
        np.save(tmp_path / "p" / name / "documents.npy", np.zeros(3))
    (tmp_path / "p/index.json").write_text("{}")
    with pytest.raises(DataError, match=rf"train on it with data\.path={tmp_path}/p"):
        expand_sources([str(tmp_path / "p")])


def test_what_is_no_directory_of_prepared_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my text.txt").write_text("text")
    Path("p").mkdir()
    Path("p/index.json").write_text("{}")
    with pytest.raises(DataError, match="is a file, not a directory of prepared data") as caught:
        read_summary("my text.txt")
    command = shlex.split(str(caught.value).partition("Prepare it: modtrain prepare ")[2])
    assert compose("prepare", command).sources == ["my text.txt"]
    with pytest.raises(DataError, match=r"is a file; give its directory, p\."):
        read_summary("p/index.json")
    with pytest.raises(DataError, match="There is no such directory"):
        read_summary("nowhere")


def zstd_frame(window_log: int) -> bytes:
    """A frame that asks for a window of so many bits, and has five bytes."""
    return b"\x28\xb5\x2f\xfd\0" + bytes([(window_log - 10) << 3, 5 << 3 | 1, 0, 0]) + b"text\n"


def test_a_frame_that_asks_for_much_memory_is_refused():
    for window_log in (20, 27, 28):
        assert b"".join(chunks(io.BytesIO(zstd_frame(window_log)), "zst")) == b"text\n"
    for content in (zstd_frame(29), zstd_frame(31), zstd_frame(20) + zstd_frame(31)):
        with pytest.raises(DamagedError, match=r"memory.*max_document_bytes may be raised"):
            list(chunks(io.BytesIO(content), "zst"))
    assert list(chunks(io.BytesIO(zstd_frame(30)), "zst", 1 << 30)) == [b"text\n"]
    # Beyond what zstd itself reads.
    with pytest.raises(DamagedError):
        list(chunks(io.BytesIO(zstd_frame(41)), "zst", 1 << 60))
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16}]
    small = lzma.compress(b"text\n", filters=filters)
    assert list(chunks(io.BytesIO(small), "xz")) == [b"text\n"]
