"""Prepared data whose documents are packed by best fit: whole, complete, the same to the byte."""

import resource
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from modtrain.common.errors import ConfigError
from modtrain.data.config import TokenizerConfig
from modtrain.data.documents.table import DocumentTable
from modtrain.data.prepare import packed_rows, pipeline
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.shared import prepare_task
from modtrain.data.prepare.stored_tokenizer import smallest_dtype
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.prepared import SPLITS
from tests.data.data_cases import make_documents, tiny_config, tree, write_jsonl

best_fit = partial(tiny_config, seq_len=40, packing="best_fit")


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", make_documents(40))


def rows_of(output, split):
    """The pieces of each row as (document's number, first token, tokens)."""
    index = ShardIndex.load(output, "sha256")
    samples, table = TokenDataset(index, split), DocumentTable.open(index, split)
    starts = table.records["start"].astype(np.int64)
    for number in range(len(samples)):
        tokens, place, row = samples[number].tolist(), 0, []
        for start, count in samples.document_pieces(number):
            document = int(np.searchsorted(starts, start, side="right")) - 1
            row.append((document, start - int(starts[document]), tokens[place : place + count]))
            place += count
        assert all(token == -1 for token in tokens[place:])
        assert all(token >= 0 for token in tokens[:place])
        yield row


@pytest.mark.parametrize("max_documents", [None, 9])
def test_every_document_is_there_and_whole_unless_it_is_longer(
    corpus, tmp_path, monkeypatch, max_documents
):
    if max_documents:
        windows = partial(packed_rows.plan_windows, max_documents=max_documents)
        monkeypatch.setattr(packed_rows, "plan_windows", windows)
    report = prepare(best_fit([corpus], tmp_path / "packed"), progress=False)
    prepare(best_fit([corpus], tmp_path / "plain", packing="concatenate"), progress=False)
    plain = ShardIndex.load(tmp_path / "plain")
    num_cut = 0
    for split in SPLITS:
        documents = {}
        for row in rows_of(tmp_path / "packed", split):
            for document, first, tokens in row:
                documents.setdefault(document, []).append((first, tokens))
        pieces = [sorted(documents[number]) for number in range(len(documents))]
        texts = [[token for _, own in parts for token in own] for parts in pieces]
        for parts, text in zip(pieces, texts, strict=True):
            assert len(parts) == -(-len(text) // 41)
            assert text.count(0) == 1
            assert text[-1] == 0
        # The same tokens as those that are laid end to end.
        samples = TokenDataset(plain, split)
        stream = [
            token for number in range(len(samples)) for token in samples[number][:-1].tolist()
        ]
        assert list(chain.from_iterable(texts))[: len(stream)] == stream
        assert report.summary.packing[split].num_cut == sum(len(parts) > 1 for parts in pieces)
        num_cut += report.summary.packing[split].num_cut
        num_places = report.summary.splits[split].num_sequences * 41
        padding = num_places - sum(map(len, texts))
        assert report.summary.packing[split].num_padding == padding
        assert report.summary.splits[split].dropped_tokens == 0
    assert 0 < num_cut < 40
    assert f"{report.summary.packing['train'].num_cut} of" in str(report)


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_units_tasks_or_interruptions(
    corpus, tmp_path, small_units, monkeypatch
):
    prepare(best_fit([corpus], tmp_path / "one"), progress=False)
    expected = tree(tmp_path / "one")
    small_units(2_000)
    reports = [
        prepare_task(best_fit([corpus], tmp_path / "tasks", task=f"{task}/2"), progress=False)
        for task in (0, 1)
    ]
    assert "is complete" in str(reports[1])
    done = []

    def pack_once(job):
        if done:
            raise KeyboardInterrupt
        done.append(packed_rows.pack_window(job))
        return done[0]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = packed_rows.run_unfinished
        patch.setattr(
            packed_rows,
            "run_unfinished",
            lambda label, _function, *others: real(label, pack_once, *others),
        )
        prepare(best_fit([corpus], tmp_path / "cut"), progress=False)
    prepare(best_fit([corpus], tmp_path / "cut"), progress=False)
    for name in ("tasks", "cut"):
        assert tree(tmp_path / name) == expected


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_number_of_workers(corpus, tmp_path):
    prepare(best_fit([corpus], tmp_path / "one"), progress=False)
    prepare(best_fit([corpus], tmp_path / "two", num_workers=2), progress=False)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_a_shard_of_many_files_needs_few_open_ones(tmp_path):
    documents = make_documents(300)
    files = [
        write_jsonl(tmp_path / f"{number}.jsonl", documents[3 * number : 3 * number + 3])
        for number in range(100)
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 40, hard))
    try:
        prepare(best_fit(files, tmp_path / "packed", num_workers=0), progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(1 for _ in rows_of(tmp_path / "packed", "train"))


def test_a_vocabulary_that_fills_its_type_has_padding_beside_it():
    assert smallest_dtype(1 << 16) == "uint16"
    assert smallest_dtype((1 << 16) + 1) == "uint32"


def test_options_that_do_not_fit_are_refused(corpus, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="packing=first_fit"):
        prepare(best_fit([corpus], tmp_path / "a", packing="first_fit"), progress=False)
    # Blocks of tokens of which it is not known where their documents end.
    prepare(tiny_config([corpus], tmp_path / "plain"), progress=False)
    np.full(4000, 280, np.uint16).tofile(tmp_path / "tokens.bin")
    config = best_fit(
        [tmp_path / "tokens.bin"],
        tmp_path / "b",
        tokenizer=TokenizerConfig(path=str(tmp_path / "plain/tokenizer.json")),
    )
    with pytest.raises(ConfigError, match="do not tell where some of them end"):
        prepare(config, progress=False)
    assert not (tmp_path / "b/index.json").exists()
    # Other data than those laid end to end.
    with pytest.raises(pipeline.DataError, match="packing differ"):
        prepare(tiny_config([corpus], tmp_path / "plain", packing="best_fit"), progress=False)
