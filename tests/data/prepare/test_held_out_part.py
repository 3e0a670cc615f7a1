"""One file as a corpus: the end of a document is held out, or a separator ends documents."""

import io
import json
import shlex

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from modtrain.cli.compose import compose
from modtrain.common.errors import ConfigError, DataError
from modtrain.data.config import PrepareConfig, TokenizerConfig
from modtrain.data.prepare import decompress
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.readers import UnitReader
from modtrain.data.prepare.request import REQUEST_NAME
from modtrain.data.prepare.sources import expand_sources
from modtrain.data.prepare.tokenizer import SplitChooser
from modtrain.data.prepare.units import plan_units
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.prepared import TOKENIZER_NAME
from tests.data.data_cases import make_documents, tiny_config, write_jsonl
from tests.helpers.problems import problems_of

TEXT = "".join(f"line {i} of a play, and what is said in it\n" for i in range(400))


def split_texts(output):
    """What the shards of each split hold, with the end tokens."""
    tokenizer = Tokenizer.from_str((output / TOKENIZER_NAME).read_text())
    index, texts = ShardIndex.load(output), {}
    for split in ("train", "valid"):
        tokens = []
        for shard in index.shards[split]:
            content = (output / split / shard.name).read_bytes()
            for offset, _ in shard.members:
                rows = np.load(io.BytesIO(content[offset:]))
                tokens += [int(t) for row in rows for t in row[:-1]]
        texts[split] = tokenizer.decode(tokens, skip_special_tokens=False)
    return texts


@given(
    st.text("ab \n", max_size=60),
    st.floats(0.01, 0.99),
)
def test_a_document_is_cut_in_two_without_a_loss(text, fraction):
    chooser = SplitChooser(0, fraction, "line")
    parts = chooser.parts(text)
    assert "".join(parts.get(split, "") for split in ("train", "valid")) == text
    if len(parts) == 2:
        assert parts["train"][-1] in "\n "
        assert all(part.strip() for part in parts.values())
    elif text.strip():
        assert not set(text.strip()) & {"\n", " "}
    assert SplitChooser(0, fraction).parts(text).keys() <= {"train", "valid"}


def test_the_end_of_one_file_is_held_out_from_a_line_on(tmp_path):
    (tmp_path / "input.txt").write_text(TEXT)
    with pytest.raises(DataError, match="split_at=line"):
        prepare(tiny_config([tmp_path / "input.txt"], tmp_path / "out"), progress=False)
    config = tiny_config([tmp_path / "input.txt"], tmp_path / "out", split_at="line")
    report = prepare(config, progress=False)
    assert prepare(config, progress=False).was_complete
    splits = report.summary.splits
    assert sum(split.num_bytes for split in splits.values()) == len(TEXT)
    assert splits["valid"].num_bytes == pytest.approx(0.2 * len(TEXT), abs=60)
    texts = split_texts(tmp_path / "out")
    assert TEXT.startswith(texts["train"])
    assert texts["valid"].startswith("line 32")
    assert texts["valid"] in TEXT


def test_a_separator_ends_documents_inside_a_file(tmp_path):
    documents = make_documents(80)
    (tmp_path / "input.txt").write_text("<|endoftext|>\n".join([*documents, "  \n"]))
    config = tiny_config([tmp_path / "input.txt"], tmp_path / "out", separator="<|endoftext|>\\n")
    splits = prepare(config, progress=False).summary.splits
    assert sum(split.num_documents for split in splits.values()) == len(documents)
    assert splits["valid"].num_documents > 4
    jsonl = write_jsonl(tmp_path / "same.jsonl", documents)
    prepare(tiny_config([jsonl], tmp_path / "same"), progress=False)
    assert split_texts(tmp_path / "out") == split_texts(tmp_path / "same")


@given(
    st.lists(st.sampled_from(["a", "\n", "\r\n", "--", "---", " ", "\ufeff"]), max_size=30),
    st.integers(1, 5),
    st.integers(3, 12),
)
def test_documents_between_separators_are_read_piece_by_piece(tmp_path_factory, parts, size, limit):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes("".join(parts).encode())
    (unit,) = plan_units(expand_sources([str(path)]), "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompress, "CHUNK_BYTES", size)
        read = list(UnitReader(unit, "text", limit, "--\n"))
    text = path.read_bytes().removeprefix("\ufeff".encode()).replace(b"\r\n", b"\n").decode()
    parts = text.split("--\n")
    # Blank ones are no documents, whatever their size.
    assume(all(part.strip() or len(part) <= limit for part in parts))
    expected, line = [], 1
    for part in parts:
        if len(part.encode()) > limit:
            expected.append(("too_large", line))
        elif part.strip():
            expected.append(part)
        line += part.count("\n") + 1
    # Where a document is too large, the flaw's line is near its end or its beginning.
    kinds = [d if isinstance(d, str) else d.kind for d in read]
    assert kinds == [d if isinstance(d, str) else d[0] for d in expected]


def test_a_separator_that_nothing_would_use_is_refused(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", make_documents(9))
    with pytest.raises(ConfigError, match="sources have none"):
        prepare(tiny_config([jsonl], tmp_path / "out", separator="x"), progress=False)
    units = plan_units(expand_sources([str(jsonl)]), "text")
    assert len([*UnitReader(units[0], "text", 1 << 20, "x")]) == 9


def test_data_that_were_prepared_before_there_was_the_choice_are_those_of_the_default(tmp_path):
    documents = write_jsonl(tmp_path / "a.jsonl", make_documents(300))
    config = tiny_config([documents], tmp_path / "out")
    prepare(config, progress=False)
    request = json.loads((tmp_path / "out" / REQUEST_NAME).read_text())
    assert not {"separator", "split_at"} & request.keys()
    with pytest.raises(DataError, match="split_at differ"):
        prepare(tiny_config([documents], tmp_path / "out", split_at="line"), progress=False)


@pytest.mark.parametrize("written", [r'separator="\n\n"', r'separator="99\n"'])
def test_a_line_end_is_written_with_a_backslash(written):
    config = compose("prepare", shlex.split(shlex.quote(written)))
    assert config.separator_text == written.split('"')[1].replace("\\n", "\n")


@pytest.mark.parametrize("address", ["https://x.org/a/input.txt", "s3://bucket/x", "hf://a/b"])
def test_an_address_is_a_source_and_no_file(address):
    config = PrepareConfig(sources=[address], output=address)
    config.tokenizer.path = address
    problems = {problem.key: problem for problem in config.problems()}
    assert set(problems) == {"output", "tokenizer.path"}
    assert "and copy it there" in problems["output"].remedy


def test_a_size_of_a_vocabulary_beside_a_tokenizer_is_refused():
    words = ["corpus=sotu", "tokenizer.path=a.json"]
    assert compose("prepare", words).tokenizer == TokenizerConfig("a.json", 2048)
    for key in ("tokenizer.vocab_size", "tokenizer.train_bytes"):
        assert (
            "tokenizer.path" in problems_of(compose, "prepare", [*words, f"{key}=999"])[key].reason
        )
