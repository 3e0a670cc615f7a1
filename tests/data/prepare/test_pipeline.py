"""The whole of prepare: what it writes, and that nothing but the corpus shows in it."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from rich.console import Console
from tokenizers import Tokenizer

from modtrain.common.errors import ConfigError, DataError
from modtrain.data.config import PrepareConfig, TokenizerConfig
from modtrain.data.prepare import encode, pack, stored_tokenizer
from modtrain.data.prepare import pipeline as prepare_module
from modtrain.data.prepare.pipeline import finish, prepare
from modtrain.data.prepare.tokenizer import END_OF_DOCUMENT, SplitChooser
from modtrain.data.prepare.work_directory import work_directory
from modtrain.data.stream.index import ShardIndex
from tests.data.data_cases import make_documents, tiny_config, tree, write_jsonl


def stored_tokens(output: Path, split: str) -> list[int]:
    """The stream of a split, joined from its shards as webdataset reads them."""
    stream: list[int] = []
    for shard in sorted((output / split).glob("*.tar")):
        samples = webdataset.WebDataset(str(shard), shardshuffle=False).decode()
        for sample in samples:
            for row in sample["tokens.npy"]:
                assert not stream or stream[-1] == row[0]
                stream += row.tolist()[1 if stream else 0 :]
    return stream


def corpus_of_all_kinds(folder: Path) -> list[Path]:
    """Text files and lines, in more units than one with small_units."""
    folder.mkdir()
    for number, text in enumerate(make_documents(20, seed=1)):
        (folder / f"{number:02d}.txt").write_text(text)
    write_jsonl(folder / "lines.jsonl", make_documents(100, seed=2))
    return [folder / "*.txt", folder / "*.jsonl"]


def test_decoded_shards_are_the_documents(tmp_path, small_units):
    small_units(2000)
    documents = make_documents(60)
    # The end token spelled out in a text is text; so is white space at its ends.
    documents[3] = f"  one {END_OF_DOCUMENT} two \r\n é 漢字 \x00 \n\n"
    corpus = write_jsonl(tmp_path / "corpus.jsonl", documents)
    report = prepare(tiny_config([corpus], tmp_path / "out"), progress=False)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    eos_id = report.summary.eos_id
    assert tokenizer.token_to_id(END_OF_DOCUMENT) == eos_id
    chooser = SplitChooser(0, 0.2)
    for split, is_valid in (("train", False), ("valid", True)):
        expected = [text for text in documents if chooser.is_valid(text.encode()) is is_valid]
        counts = report.summary.splits[split]
        stream = stored_tokens(tmp_path / "out", split)
        assert len(stream) == counts.num_sequences * 16 + 1
        assert len(stream) == counts.num_tokens - counts.dropped_tokens
        assert counts.dropped_tokens < 16
        assert counts.num_documents == len(expected)
        assert len(expected) == stream.count(eos_id) + (counts.dropped_tokens > 0)
        assert counts.num_bytes == sum(len(text.encode()) for text in expected)
        whole = "".join(text + END_OF_DOCUMENT for text in expected)
        decoded = tokenizer.decode(stream, skip_special_tokens=False)
        # The last token may hold but a part of a character.
        assert whole.startswith(decoded.rstrip("\ufffd"))
        assert len(whole) - len(decoded) < 16 * 20


@pytest.mark.slow
def test_the_output_is_the_same_for_any_workers_and_units(tmp_path, small_units):
    sources = corpus_of_all_kinds(tmp_path / "corpus")
    prepare(tiny_config(sources, tmp_path / "whole"), progress=False)
    small_units(1500)
    prepare(tiny_config(sources, tmp_path / "one"), progress=False)
    prepare(tiny_config(sources, tmp_path / "two", num_workers=2), progress=False)
    one = tree(tmp_path / "one")
    assert one == tree(tmp_path / "two") == tree(tmp_path / "whole")
    assert len([name for name in one if name.endswith(".tar")]) > 3
    assert str(tmp_path).encode() not in b"".join(one.values())


class _StoppedError(Exception):
    """Stands for a power cut at some step."""


class _Writes:
    """Counts whatever prepare writes, and stops it at one of the writes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stop_at = -1
        self.done: list[str] = []
        for module in (encode, pack, prepare_module, stored_tokenizer):
            for name in ("write_json", "write_bytes"):
                if hasattr(module, name):
                    patch.setattr(module, name, self._counted(module, name))

    def _counted(self, module: Any, name: str) -> Callable[..., None]:
        real = getattr(module, name)

        def write(*arguments: Any) -> None:
            if len(self.done) == self.stop_at:
                raise _StoppedError
            self.done.append(f"{module.__name__.rpartition('.')[2]}.{name}")
            real(*arguments)

        return write

    def of_run(self, config: PrepareConfig, stop_at: int = -1) -> list[str]:
        self.stop_at, self.done = stop_at, []
        if stop_at < 0:
            assert not prepare(config, progress=False).was_complete
        else:
            with pytest.raises(_StoppedError):
                prepare(config, progress=False)
        return self.done


@pytest.mark.slow
def test_an_interrupted_prepare_resumes_where_it_stopped(tmp_path, small_units, monkeypatch):
    small_units(4000)
    sources = corpus_of_all_kinds(tmp_path / "corpus")
    writes = _Writes(monkeypatch)
    all_writes = writes.of_run(tiny_config(sources, tmp_path / "whole"))
    expected = tree(tmp_path / "whole")
    assert len(all_writes) > 15
    for stop_at in range(len(all_writes)):
        config = tiny_config(sources, tmp_path / f"cut-{stop_at}")
        before = writes.of_run(config, stop_at)
        with pytest.raises(DataError, match="holds no finished data"):
            ShardIndex.load(config.output)
        after = writes.of_run(config)
        assert tree(Path(config.output)) == expected
        # What was finished is not done again: units, shards, the training of the tokenizer.
        kept = len([name for name in before if name.startswith(("encode", "pack"))])
        assert len(after) == len(all_writes) - kept - (stop_at > 0)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(50))
    read = encode._encode

    def change_and_read(*arguments: Any) -> encode.UnitRecord:
        write_jsonl(corpus, make_documents(51))
        return read(*arguments)

    monkeypatch.setattr(encode, "_encode", change_and_read)
    with pytest.raises(DataError, match=r"corpus\.jsonl: changed while it was read"):
        prepare(tiny_config([corpus], tmp_path / "out"), progress=False)


def test_a_changed_option_after_an_interruption_leaves_no_trace(tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(200))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "finish", lambda *_: (_ for _ in ()).throw(_StoppedError()))
        with pytest.raises(_StoppedError):
            prepare(tiny_config([corpus], tmp_path / "cut", samples_per_shard=2), progress=False)
    prepare(tiny_config([corpus], tmp_path / "cut", seed=1), progress=False)
    prepare(tiny_config([corpus], tmp_path / "whole", seed=1), progress=False)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"splits": {"a": {}}}'])
def test_damaged_records_of_an_interrupted_prepare_are_made_again(tmp_path, monkeypatch, content):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(200))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "finish", lambda *_: (_ for _ in ()).throw(_StoppedError()))
        with pytest.raises(_StoppedError):
            prepare(tiny_config([corpus], tmp_path / "cut"), progress=False)
    records = [
        p for p in (tmp_path / "cut").rglob("*.json") if p.parent.name in ("units", "shards")
    ]
    assert len(records) > 2
    for record in records:
        record.write_bytes(content)
    prepare(tiny_config([corpus], tmp_path / "cut"), progress=False)
    prepare(tiny_config([corpus], tmp_path / "whole"), progress=False)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_a_second_prepare_does_nothing_and_another_is_refused(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(100))
    output = tmp_path / "out"
    first = prepare(tiny_config([corpus], output), progress=False)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = prepare(tiny_config([corpus], output, num_workers=2), progress=False)
    assert again.was_complete
    assert again.summary == first.summary
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(DataError, match=r"out has data .* seq_len differ .*remove"):
        prepare(tiny_config([corpus], output, seq_len=8), progress=False)
    os.utime(corpus, ns=(1, 1))
    # Copied or installed anew, a corpus is the same.
    assert prepare(tiny_config([corpus], output), progress=False).was_complete
    write_jsonl(corpus, make_documents(101))
    with pytest.raises(DataError, match=r"contents.* differ"):
        prepare(tiny_config([corpus], output), progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_a_prepare_killed_before_it_tidied_up_is_complete(tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(100))
    config = tiny_config([corpus], tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "finish", _finish_and_stop)
        with pytest.raises(_StoppedError):
            prepare(config, progress=False)
    assert (tmp_path / "out" / ".work").exists()
    assert prepare(config, progress=False).was_complete
    assert not (tmp_path / "out" / ".work").exists()


def _finish_and_stop(*arguments: Any) -> None:
    finish(*arguments)
    raise _StoppedError


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(100))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("precious")
    with pytest.raises(DataError, match="is not empty"):
        prepare(tiny_config([corpus], tmp_path / "out"), progress=False)
    assert tree(tmp_path / "out") == {"tokenizer.json": b"precious"}


def test_two_prepares_of_one_output_do_not_mix(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(100))
    config = tiny_config([corpus], tmp_path / "out")
    with work_directory(tmp_path / "out") as work:
        (work / "staging" / "half").write_text("being written")
        with pytest.raises(DataError, match="another prepare"):
            prepare(config, progress=False)
        assert (work / "staging" / "half").exists()
    prepare(config, progress=False)


@pytest.mark.parametrize(
    ("changes", "split"), [({"valid_fraction": 1e-9}, "valid"), ({"seq_len": 100_000}, "train")]
)
def test_a_split_without_a_sequence_is_refused(tmp_path, changes, split):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(50))
    with pytest.raises(DataError, match=f"the split {split} would hold no sequence: its .*tokens"):
        prepare(tiny_config([corpus], tmp_path / "out", **changes), progress=False)
    assert not (tmp_path / "out" / "index.json").exists()
    # What the message proposes works in the same folder.
    prepare(tiny_config([corpus], tmp_path / "out"), progress=False)


def test_a_config_with_problems_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="seq_len=0"):
        prepare(tiny_config(["a.txt"], tmp_path / "out", seq_len=0))


def test_a_large_vocabulary_takes_32_bits(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(100))
    prepare(tiny_config([corpus], tmp_path / "small"), progress=False)
    content = json.loads((tmp_path / "small" / "tokenizer.json").read_bytes())
    added = content["added_tokens"][0]
    content["added_tokens"].append({**added, "id": 70_000, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 70_000
    path = tmp_path / "large.json"
    path.write_text(json.dumps(content))
    config = tiny_config([corpus], tmp_path / "large", tokenizer=TokenizerConfig(path=str(path)))
    summary = prepare(config, progress=False).summary
    assert (summary.dtype, summary.vocab_size) == ("uint32", 70_001)
    for split in ("train", "valid"):
        small = stored_tokens(tmp_path / "small", split)
        assert stored_tokens(tmp_path / "large", split) == small
    assert (tmp_path / "large" / "tokenizer.json").read_bytes() == path.read_bytes()


def test_shards_hold_plain_arrays_of_the_smallest_type(prepared):
    index = ShardIndex.load(prepared, "sha256")
    for split, shards in index.shards.items():
        for shard in shards:
            content = index.shard_path(split, shard).read_bytes()
            for offset, count in shard.members:
                with (index.shard_path(split, shard)).open("rb") as file:
                    file.seek(offset)
                    array = np.load(file, allow_pickle=False)
                assert array.dtype == np.dtype("<u2")
                assert array.shape == (count, 17)
            assert b"modtrain" in content[:512]


def test_the_report_reads_well(tmp_path, caplog):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(100))
    corpus.write_text(corpus.read_text() + "not json\n")
    with caplog.at_level("INFO"):
        report = prepare(tiny_config([corpus], tmp_path / "out"))
    text = str(report)
    assert f"{corpus}:101: not JSON" in text
    assert "left out: 1 lines that are not JSON" in text
    assert f"{report.summary.splits['train'].num_tokens:,}" in text
    assert "encoding: 100%" in caplog.text


def test_a_terminal_shows_a_bar(tmp_path, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("modtrain.data.prepare.worker_pool.plain_console", lambda stderr: terminal)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(100))
    prepare(tiny_config([corpus], tmp_path / "out"))
    assert "encoding" in screen.getvalue()
    assert "writing shards" in screen.getvalue()
