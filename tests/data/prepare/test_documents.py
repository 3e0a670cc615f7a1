"""The records of the documents: whose text stands where in the shards."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer

from modtrain.common.errors import DataError
from modtrain.data.documents import table as document_table
from modtrain.data.documents.record import RECORD, names_of
from modtrain.data.documents.table import DocumentTable, find_repeats
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.prepared import SPLITS
from tests.data.data_cases import make_documents, tiny_config, write_jsonl


def corpus_of_many_kinds(folder: Path) -> tuple[list[Path], dict[tuple[str, int], str]]:
    """Files of several kinds, and the text of each document by file and line."""
    folder.mkdir()
    (folder / "deep").mkdir()
    sets = [make_documents(30, seed) for seed in range(4)]
    places: dict[tuple[str, int], str] = {}
    lines = [json.dumps({"text": text}) for text in sets[0]]
    lines.insert(3, "no json")
    lines.insert(9, "")
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    places |= {
        ("a.jsonl", number): json.loads(line)["text"]
        for number, line in enumerate(lines, 1)
        if line.startswith("{")
    }
    zipped = "".join(json.dumps({"text": text}) + "\n" for text in sets[1])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(zipped.encode()))
    places |= {("b.jsonl.gz", number): text for number, text in enumerate(sets[1], 1)}
    parquet.write_table(pa.table({"text": sets[2]}), folder / "c.parquet", row_group_size=7)
    places |= {("c.parquet", number): text for number, text in enumerate(sets[2], 1)}
    for number, text in enumerate(sets[3][:5]):
        (folder / "deep" / f"{number}.txt").write_text(text)
        places["deep/" + f"{number}.txt", 1] = text
    return sorted(path for path in folder.rglob("*") if path.is_file()), places


def documents_in_samples(output: Path, split: str, seq_len: int) -> Iterator[tuple[str, int, str]]:
    """What the samples have of each document, put together, by file and line."""
    index = ShardIndex.load(output, "sha256")
    table = DocumentTable.open(index, split)
    assert table is not None
    data = TokenDataset(index, split, seq_len)
    tokens: dict[tuple[str, int], list[int]] = {}
    sizes: dict[tuple[str, int], int] = {}
    for number in range(len(data)):
        sample = data[number].tolist()[:-1]
        covered = 0
        for part in table.between(number * seq_len, (number + 1) * seq_len):
            assert part.place == covered
            covered += part.stop - part.first
            own = tokens.setdefault((part.file, part.line), [])
            assert len(own) == part.first
            own += sample[part.place : covered]
            sizes[part.file, part.line] = part.num_tokens
        assert covered == seq_len
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    for (file, line), own in tokens.items():
        if len(own) == sizes[file, line]:
            assert own[-1] == index.summary.eos_id
            yield file, line, tokenizer.decode(own[:-1], skip_special_tokens=False)


def test_records_name_the_document_of_each_token(tmp_path, small_units):
    small_units(1500)
    sources, places = corpus_of_many_kinds(tmp_path / "corpus")
    prepare(tiny_config(sources, tmp_path / "out"), progress=False)
    for seq_len in (16, 8):
        seen = {
            (file, line): text
            for split in SPLITS
            for file, line, text in documents_in_samples(tmp_path / "out", split, seq_len)
        }
        # Of each split the last documents may be cut.
        assert len(seen) >= len(places) - 4
        assert seen == {place: places[place] for place in seen}


def test_lengths_are_those_of_all_documents(prepared, monkeypatch):
    monkeypatch.setattr(document_table, "_CHUNK", 7)
    index = ShardIndex.load(prepared)
    for split in SPLITS:
        table = DocumentTable.open(index, split)
        lengths = np.concatenate(list(table.lengths()))
        summary = index.summary.splits[split]
        assert len(lengths) == summary.num_documents
        assert lengths.sum() == summary.num_tokens
        assert lengths.min() > 1


def test_directories_without_records_are_read(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(50))
    output = tmp_path / "out"
    prepare(tiny_config([corpus], output), progress=False)
    content = json.loads((output / "index.json").read_text())
    del content["side_files"]
    (output / "index.json").write_text(json.dumps(content))
    index = ShardIndex.load(output, "sha256")
    assert DocumentTable.open(index, "train") is None
    assert prepare(tiny_config([corpus], output), progress=False).was_complete


def test_damaged_records_are_named(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(50))
    output = tmp_path / "out"
    prepare(tiny_config([corpus], output), progress=False)
    path = output / "train" / "documents.npy"
    content = path.read_bytes()
    index = ShardIndex.load(output)
    for damage in (content[:-1], b"\x80\x05" + content[2:], content[:-36] + b"\xff" * 36):
        path.write_bytes(damage)
        with pytest.raises(DataError, match=r"documents\.npy.* Copy the prepared directory again"):
            table = DocumentTable.open(index, "train")
            list(table.between(0, 10**9))
        with pytest.raises(DataError, match=r"documents\.npy: is not that of the index"):
            ShardIndex.load(output, "sha256")
    path.write_bytes(content)
    (output / "source_files.json").write_text('{"files":["/etc/passwd"]}')
    with pytest.raises(DataError, match=r"source_files\.json"):
        DocumentTable.open(index, "train")
    # Training reads none of them.
    assert ShardIndex.load(output).side_files


@pytest.mark.parametrize("sorted_at_once", [4, 1 << 24])
def test_repeats_are_all_but_the_first_of_a_text(monkeypatch, sorted_at_once):
    monkeypatch.setattr(document_table, "_SORTED", sorted_at_once)
    monkeypatch.setattr(document_table, "_CHUNK", 5)
    draw = np.random.default_rng(0)
    # Few values of each half, so that halves are equal where the whole is not.
    halves = draw.integers(0, 2**64, 6, dtype=np.uint64)
    tables = []
    for size in (0, 17, 3, 40):
        records = np.zeros(size, RECORD)
        records["hash"] = halves[draw.integers(0, 6, (size, 2))]
        tables.append(records)
    seen: set[tuple[int, int]] = set()
    expected = []
    for records in tables:
        own = []
        for pair in map(tuple, records["hash"].tolist()):
            own.append(pair in seen)
            seen.add(pair)
        expected.append(own)
    marks = find_repeats(list(map(len, tables)), [table["hash"] for table in tables].__getitem__)
    assert [list(own) for own in marks] == expected
    assert find_repeats([], [].__getitem__) == []


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/data/a.txt"], ["a.txt"]),
        (["/data/web/a.txt", "/data/code/a.txt"], ["web/a.txt", "code/a.txt"]),
        (["/data/a.txt", "/data/deep/b.txt"], ["a.txt", "deep/b.txt"]),
        (["a.txt", "b/c.txt"], ["a.txt", "b/c.txt"]),
    ],
)
def test_names_leave_out_the_shared_folder(paths, names):
    assert names_of(paths) == names
