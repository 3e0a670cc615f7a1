"""Documents seen before are left out: the same as those of a corpus without them."""

import json
from pathlib import Path

import numpy as np
import pytest

from modtrain.common.errors import DataError
from modtrain.data.config import TokenizerConfig
from modtrain.data.prepare import deduplicate
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.stream.index_json import read_summary
from modtrain.data.stream.prepared import SPLITS
from tests.data.data_cases import make_documents, tiny_config, tree, write_jsonl


def corpora(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files of which many documents stand in an earlier one, and the files without those."""
    folder.mkdir(parents=True)
    documents = make_documents(40)
    draw = np.random.default_rng(0)
    files: tuple[list[Path], list[Path]] = ([], [])
    seen: set[str] = set()
    for number in range(3):
        texts = [documents[i] for i in draw.integers(0, 40, 60)]
        distinct = [t for i, t in enumerate(texts) if t not in seen and t not in texts[:i]]
        seen |= set(texts)
        for kind, content in enumerate((texts, distinct)):
            place = folder / ("all", "distinct")[kind]
            place.mkdir(exist_ok=True)
            files[kind].append(write_jsonl(place / f"{number}.jsonl", content))
    return files


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    """Trained on all texts once: it would see the repeats."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = write_jsonl(folder / "corpus.jsonl", make_documents(40))
    prepare(tiny_config([corpus], folder / "out"), progress=False)
    return TokenizerConfig(path=str(folder / "out" / "tokenizer.json"))


@pytest.mark.on_commit("line")
@pytest.mark.parametrize("split_at", ["document", "line"])
def test_what_is_left_is_the_corpus_without_repeats(tmp_path, small_units, tokenizer, split_at):
    small_units(2000)
    every, distinct = corpora(tmp_path / "corpus")
    changes = {"tokenizer": tokenizer, "split_at": split_at}
    config = tiny_config(every, tmp_path / "dropped", deduplicate=True, **changes)
    report = prepare(config, progress=False)
    prepare(tiny_config(distinct, tmp_path / "distinct", **changes), progress=False)
    summary, expected = (read_summary(tmp_path / name) for name in ("dropped", "distinct"))
    assert summary.splits == expected.splits
    assert summary.fingerprint == expected.fingerprint
    num_left = sum(len(path.read_text().splitlines()) for path in distinct)
    assert summary.flaws == {"repeated": 180 - num_left}
    assert f"left out: {180 - num_left} documents whose text stands in an earlier one" in str(
        report
    )
    # The first of each stays, at its own line.
    lines = [path.read_text().splitlines() for path in every]
    places = set()
    for split in SPLITS:
        for record in np.load(tmp_path / "dropped" / split / "documents.npy"):
            places.add((int(record["file"]), int(record["line"])))
    texts: list[str] = [json.loads(lines[file][line - 1])["text"] for file, line in sorted(places)]
    assert len(set(texts)) == len(texts) == num_left
    whole = [
        (json.loads(row)["text"], (f, n))
        for f, rows in enumerate(lines)
        for n, row in enumerate(rows, 1)
    ]
    first = dict(reversed(whole))
    assert places == set(first.values())


@pytest.mark.slow
def test_an_interrupted_one_resumes_where_it_stopped(tmp_path, small_units, tokenizer, monkeypatch):
    every, _ = corpora(tmp_path / "corpus")
    changes = {"tokenizer": tokenizer, "deduplicate": True}
    prepare(tiny_config(every, tmp_path / "whole", **changes), progress=False)
    small_units(4000)
    done: list[object] = []
    real = deduplicate.write_json

    def stop_at_the_third(*arguments):
        done.append(arguments[0])
        if len(done) == 3:
            raise InterruptedError
        real(*arguments)

    config = tiny_config(every, tmp_path / "cut", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(deduplicate, "write_json", stop_at_the_third)
        with pytest.raises(DataError):
            prepare(config, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(deduplicate, "write_json", lambda *a: (done.append(a[0]), real(*a)))
        prepare(config, progress=False)
    assert len(done) == len(set(done)) + 1
    assert tree(tmp_path / "whole") == tree(tmp_path / "cut")


@pytest.mark.nightly
def test_the_output_is_the_same_for_any_workers(tmp_path, small_units, tokenizer):
    every, _ = corpora(tmp_path / "corpus")
    changes = {"tokenizer": tokenizer, "deduplicate": True}
    prepare(tiny_config(every, tmp_path / "whole", **changes), progress=False)
    small_units(1500)
    prepare(tiny_config(every, tmp_path / "two", num_workers=2, **changes), progress=False)
    assert tree(tmp_path / "whole") == tree(tmp_path / "two")


def test_data_of_before_the_option_are_those_of_its_default(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(60))
    prepare(tiny_config([corpus], tmp_path / "out"), progress=False)
    request = json.loads((tmp_path / "out" / ".prepared.json").read_text())
    assert "deduplicate" not in request


def test_repeats_are_no_damage(tmp_path, tokenizer):
    texts = make_documents(40)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts * 2)
    config = tiny_config(
        [corpus], tmp_path / "out", tokenizer=tokenizer, on_error="limit", max_flaws=0
    )
    config.deduplicate = True
    assert prepare(config, progress=False).summary.flaws == {"repeated": 40}
