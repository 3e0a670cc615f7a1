"""What `modtrain data` shows of prepared data: counts against the text, a page, bad requests."""

import json
import re

import numpy as np
import pytest

from modtrain.cli.main import main
from modtrain.common.errors import ConfigError
from modtrain.data.config import DataConfig
from modtrain.data.mixture.config import SourceConfig
from modtrain.data.mixture.stream import load_indexes, open_split
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.prepared import SPLITS
from modtrain.inference.data_view import statistics
from modtrain.inference.data_view.config import DataViewConfig
from modtrain.inference.data_view.page import length_histogram
from modtrain.inference.data_view.view import view_data
from modtrain.inference.inspect import figures as inspect_figures
from tests.data.data_cases import make_documents, tiny_config, write_jsonl
from tests.inference.inspect.inspect_cases import Parsed


@pytest.fixture(scope="module")
def with_repeats(tmp_path_factory):
    """A prepared directory with texts that stand in it two and three times."""
    folder = tmp_path_factory.mktemp("data")
    documents = make_documents(60)
    documents += [documents[7], documents[9], "<script>alert(1)</script> \x1b[31m", documents[7]]
    corpus = write_jsonl(folder / "corpus.jsonl", documents)
    prepare(tiny_config([corpus], folder / "out"), progress=False)
    return folder / "out", documents


def lines_of(capsys, *words):
    assert main(["data", *map(str, words)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_counts_are_those_of_the_documents(with_repeats, capsys, monkeypatch):
    monkeypatch.setattr(statistics, "_READ", 7)
    output, documents = with_repeats
    lines = lines_of(capsys, f"path={output}", "format=jsonl")
    assert [line["split"] for line in lines] == ["train", "valid"]
    assert sum(line["num_documents"] for line in lines) == len(documents)
    assert sum(line["num_repeats"] for line in lines) == 3
    index = load_indexes(DataConfig(path=str(output)))
    for line in lines:
        data = open_split(DataConfig(path=str(output)), index, line["split"])
        tokens = {int(token) for number in range(len(data)) for token in data[number]}
        assert line["unused_tokens"] == [n for n in range(300) if n not in tokens]
        assert line["num_read"] == line["num_sequences"] * 16
        lengths = line["length_quantiles"]
        assert sorted(lengths.values()) == list(lengths.values())


def test_lengths_without_records_are_counted_between_end_tokens(with_repeats, capsys, tmp_path):
    output, _ = with_repeats
    known = lines_of(capsys, f"path={output}", "format=jsonl")
    copied = tmp_path / "old"
    copied.mkdir()
    for path in output.iterdir():
        (copied / path.name).symlink_to(path)
    content = json.loads((output / "index.json").read_text())
    del content["side_files"]
    (copied / "index.json").unlink()
    (copied / "index.json").write_text(json.dumps(content))
    old = lines_of(capsys, f"path={copied}", "format=jsonl")
    for before, now in zip(old, known, strict=True):
        assert before.pop("num_repeats") is None
        assert now.pop("num_repeats") is not None
        # The last document may be cut.
        assert before["length_quantiles"]["0.5"] == pytest.approx(
            now["length_quantiles"]["0.5"], abs=3
        )
        del before["length_quantiles"], now["length_quantiles"]
        assert before == now
    assert main(["data", f"path={copied}"]) == 0
    printed = capsys.readouterr().out
    assert "unknown" in printed
    assert "origin unknown" in printed


def test_the_report_names_repeats_and_marks_documents(with_repeats, capsys):
    output, _ = with_repeats
    assert main(["data", f"path={output}", "samples=100"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"3 documents have the text of corpus\.jsonl:61\n", printed)
    assert re.search(r"2 documents have the text of corpus\.jsonl:62\n", printed)
    assert re.search(r"─── corpus\.jsonl:\d+, tokens 1 to \d+ of \d+\nDocument 0-", printed)
    # Nothing in a text reaches the terminal as a command.
    assert "\x1b[31m" not in printed


def test_repeats_are_found_across_the_sources_of_a_mixture(with_repeats):
    output, documents = with_repeats
    config = DataConfig(
        sources={name: SourceConfig(path=str(output)) for name in ("again", "first")}
    )
    indexes = load_indexes(config)
    data = {
        name: {split: TokenDataset(index, split) for split in SPLITS}
        for name, index in indexes.items()
    }
    splits = statistics.statistics_of(indexes, data, 10**9).splits
    repeats = dict.fromkeys(config.sources, 0)
    for split in splits:
        repeats[split.source] += split.num_repeats
    assert repeats == {"again": 3, "first": len(documents)}


def test_few_tokens_are_read_where_few_are_asked_for(with_repeats, capsys):
    output, _ = with_repeats
    train, _ = lines_of(capsys, f"path={output}", "format=jsonl", "max_tokens=160")
    assert train["num_read"] == 160
    assert main(["data", f"path={output}", "max_tokens=160"]) == 0
    assert "tokens never occur in the 320 tokens that were read" in capsys.readouterr().out


def test_the_page_is_well_formed_and_needs_nothing_from_outside(
    with_repeats, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(inspect_figures, "_svg", lambda *_: "<svg/>")
    output, _ = with_repeats
    file = tmp_path / "data.html"
    assert main(["data", f"path={output}", "samples=100", f"output={file}"]) == 0
    source = file.read_text()
    page = Parsed(source)
    assert page.sections == ["splits", "lengths", "tokens", "repeats", "samples"]
    assert "<script" not in source
    assert not re.search(r"https?:|url\(|@import", source)
    assert not page.all("link")
    assert len(page.all("img")) == 2
    assert "3 documents have the text of corpus.jsonl:61" in page.text


def test_shares_of_a_histogram_add_up():
    draw = np.random.default_rng(0)
    for most in (1, 5, 10_000):
        values = np.unique(draw.integers(1, most + 1, 500))
        counts = draw.integers(1, 9, len(values))
        edges, documents, tokens = length_histogram(values, counts)
        assert len(edges) == len(documents) + 1
        assert (np.diff(edges) > 0).all()
        assert documents.sum() == pytest.approx(1)
        assert tokens.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "path=null: names nothing to look at"),
        ({"path": "a", "run": "b"}, "are two things"),
        ({"path": "a", "step": 3}, "step=3: is of a run"),
        ({"path": "a", "format": "text"}, "is for the samples of a step"),
        ({"run": "a", "step": 1, "output": "page.html"}, "leave one of them out"),
        ({"path": "a", "max_tokens": 0}, "max_tokens=0: is not above 0"),
    ],
)
def test_requests_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        view_data(DataViewConfig(**changes))
