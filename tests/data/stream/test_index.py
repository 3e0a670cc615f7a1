"""The index of a prepared directory, and its files checked against it."""

import json
from typing import Any

import pytest

from modtrain.common.errors import DataError
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.index_json import read_summary
from tests.helpers.saved import flip_bit


def test_the_summary_is_that_of_the_index(prepared):
    summary = read_summary(prepared)
    index = ShardIndex.load(prepared, "sha256")
    assert index.summary == summary
    assert summary.seq_len == 16
    for split, shards in index.shards.items():
        assert len(shards) > 1
        assert sum(s.num_sequences for s in shards) == summary.splits[split].num_sequences


def test_the_fingerprint_differs_for_other_tokens(copy):
    content = json.loads((copy / "index.json").read_bytes())
    content["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (copy / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="fingerprint"):
        ShardIndex.load(copy, "none")


def change(content: Any, path: str, value: Any) -> None:
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    for key in parents:
        content = content[key]
    content[last] = value


SHARD = "splits/train/shards/0"


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (f"{SHARD}/name", "../x.tar", "name is '../x.tar'"),
        *((f"{SHARD}/name", name, "name is") for name in ("/etc/x", "a/x.tar", "..", "x.tar\n")),
        (f"{SHARD}/name", 5, "name is 5"),
        (f"{SHARD}/name", "shard-000001.tar", "names a shard twice"),
        (f"{SHARD}/bytes", -1, "bytes is -1"),
        (f"{SHARD}/bytes", True, "bytes is True"),
        (f"{SHARD}/bytes", 1001, "no tar file"),
        (f"{SHARD}/bytes", 1024, "outside its shard"),
        (f"{SHARD}/sha256", "abc", "sha256 is"),
        (f"{SHARD}/members", None, "members is not"),
        *((f"{SHARD}/members/0", value, "members is not") for value in ([512], [512, 0])),
        (f"{SHARD}/members/0", [512, 10**12], "outside its shard"),
        (f"{SHARD}/members/1", [512, 4], "outside its shard"),
        (f"{SHARD}/members/0", [512, 3], "not"),
        ("splits/train/shards", {}, "is not a list"),
        ("splits/train", [], "is not an object"),
        ("splits/train/num_sequences", 7, "not 7"),
        ("seq_len", 0, "seq_len is 0"),
        ("seq_len", "16", "seq_len is '16'"),
        ("dtype", "object", "dtype is 'object'"),
        ("tokenizer_sha256", None, "tokenizer_sha256 is None"),
        ("version", 3, "version 3"),
        ("report/flaws", {"bad_json": "x"}, "bad_json is 'x'"),
    ],
)
def test_a_hostile_or_damaged_index_is_refused(copy, where, value, words):
    content = json.loads((copy / "index.json").read_bytes())
    change(content, where, value)
    (copy / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"index\.json") as caught:
        ShardIndex.load(copy, "none")
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\x00", '"index"'])
def test_what_is_no_index_is_refused(copy, text):
    (copy / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index\.json"):
        ShardIndex.load(copy)


def test_a_directory_without_index_names_the_remedy(tmp_path):
    with pytest.raises(DataError, match="Run modtrain prepare"):
        read_summary(tmp_path / "nowhere")


def test_damaged_shards_are_found(copy):
    shard = copy / "train" / "shard-000001.tar"
    flip_bit(shard, 700)
    ShardIndex.load(copy, "size")
    with pytest.raises(DataError, match=r"shard-000001\.tar: its SHA-256"):
        ShardIndex.load(copy, "sha256")
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard-000001\.tar: has \d+ bytes, not"):
        ShardIndex.load(copy, "size")
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: cannot be read"):
        ShardIndex.load(copy, "size")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("vocab_size", 256, "vocab_size is 256; its tokenizer has 300"),
        ("eos_id", 3, "eos_id is 3; its tokenizer has 0"),
        ("vocab_size", 10**12, "vocab_size is 1000000000000, more than uint16 can tell apart"),
        ("eos_id", 10**6, "eos_id is 1000000, outside a vocabulary of 300"),
    ],
)
def test_what_the_index_has_of_the_tokenizer_is_checked(copy, key, value, words):
    """The fingerprint covers the tokenizer itself, so that both of these pass it."""
    file = copy / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), key: value}))
    with pytest.raises(DataError, match=words):
        ShardIndex.load(copy)


def test_another_tokenizer_is_found(copy):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: is not the tokenizer"):
        ShardIndex.load(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):
        ShardIndex.load(copy)
