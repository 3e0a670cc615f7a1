"""Which samples a step read, without training it again."""

import json

import numpy as np
import pytest

from modtrain.cli.compose import compose
from modtrain.cli.main import main
from modtrain.common.errors import CheckpointError, ConfigError, DataError
from modtrain.inference.data_view.step_samples import samples_of
from modtrain.training.plan import resolve
from modtrain.training.run_directory import RunDirectory


@pytest.fixture
def run(tiny, tmp_path, prepared):
    """A run of 12 steps of 4 sequences that has started."""
    lines = [*tiny, "name=run", f"runs_dir={tmp_path}", "data.seq_len=64"]
    config, _ = resolve(compose("train", lines))
    directory = RunDirectory.of(config)
    fingerprint = json.loads((prepared / "index.json").read_text())["fingerprint"]
    directory.start(config, fingerprint, "cpu")
    return directory


def test_the_listed_bytes_are_the_tokens(run, prepared):
    index = json.loads((prepared / "index.json").read_text())
    seen = set()
    for step in range(1, 13):
        for sample in samples_of(run, step):
            content = sample.shard.read_bytes()[sample.byte :]
            tokens = np.frombuffer(content, index["dtype"], count=65)
            assert tokens.tolist() == sample.tokens
            seen.add(sample.position)
    assert seen == set(range(48))


def test_samples_that_were_left_out_are_not_listed(run):
    before = [sample.number for step in (1, 2, 3) for sample in samples_of(run, step)]
    (run.path / "left_out.json").write_text('{"left_out": [[4, 8]], "rollbacks": 1}')
    after = [sample.number for step in (1, 2) for sample in samples_of(run, step)]
    assert after == before[:4] + before[8:]


def test_the_command_prints_a_table_or_lines_of_json(run, capsys):
    command = ["data", f"runs_dir={run.path.parent}", "run=run", "step=2"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert main([*command, "format=jsonl"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["position"] for line in lines] == [4, 5, 6, 7]
    for line in lines:
        assert len(line["tokens"]) == 65
        assert str(line["number"]) in table
    assert main([*command, "format=text"]) == 0
    text = capsys.readouterr().out
    for line in lines:
        for document in line["documents"]:
            origin = f"{document['file']}:{document['line']}"
            assert origin in table
            assert origin in text
            assert document["text"].strip() in text


def test_the_documents_of_a_step_are_those_of_its_files(run, prepared):
    """The text that a step read stands in the file that it names."""
    corpus = prepared.parent / "corpus"
    num_read = 0
    for step in (1, 12):
        for sample in samples_of(run, step):
            num_read += sum(len(document.tokens) for document in sample.documents)
            for document in sample.documents:
                assert document.line == 1
                # A token at either end may be a part of a word, but of no letter here.
                assert document.text in (corpus / str(document.file)).read_text()
    assert num_read == 2 * 4 * 65


def test_what_cannot_be_listed_names_the_remedy(run, capsys):
    with pytest.raises(ConfigError, match=r"step=13: is behind the run's last step, 12"):
        list(samples_of(run, 13))
    manifest = json.loads(run.manifest.read_text())
    run.manifest.write_text(json.dumps({**manifest, "data_fingerprint": "another"}))
    with pytest.raises(DataError, match="other data now"):
        list(samples_of(run, 1))
    run.manifest.write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest.json(.|\n)*remedy"):
        list(samples_of(run, 1))
    assert main(["data", "step=1"]) == 2
    assert "path=null: names nothing to look at" in capsys.readouterr().err
