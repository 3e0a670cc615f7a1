"""Numbers of documents, and the token that ends them."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.data.config import DataConfig
from modtrain.data.stream.batch import document_numbers
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.index import ShardIndex

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


def numbers_by_loop(tokens: list[list[int]], eos_id: int) -> list[list[int]]:
    rows = []
    for row in tokens:
        number, numbers = 0, []
        for token in row:
            numbers.append(number)
            if token == eos_id:
                number += 1
        rows.append(numbers)
    return rows


@QUICK
@given(st.data(), st.integers(1, 4), st.integers(1, 40), st.integers(0, 3))
def test_numbers_equal_those_of_a_loop(data, batch, length, eos_id):
    row = st.lists(st.integers(0, 3), min_size=length, max_size=length)
    tokens = data.draw(st.lists(row, min_size=batch, max_size=batch))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    actual = document_numbers(torch.tensor(tokens, dtype=dtype), eos_id)
    assert actual.dtype == torch.int64
    assert actual.tolist() == numbers_by_loop(tokens, eos_id)


def test_it_compiles_into_one_graph():
    # Without generated code: what is asked is whether the whole is one graph.
    compiled = torch.compile(document_numbers, fullgraph=True, dynamic=False, backend="eager")
    tokens = torch.randint(4, (3, 17), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(compiled(tokens, 2), document_numbers(tokens, 2))


def test_documents_of_real_shards_are_found(prepared):
    index = ShardIndex.load(prepared)
    data = TokenDataset(index, "train", None)
    tokens = data.__getitems__(list(range(len(data))))
    numbers = document_numbers(tokens[:, :-1], index.summary.eos_id)
    ends = int((tokens[:, :-1] == index.summary.eos_id).sum())
    assert ends > 0
    # Each end but a sequence's last token begins another number within the sequence.
    last = int((tokens[:, -2] == index.summary.eos_id).sum())
    assert int(numbers[:, -1].sum()) == ends - last


def test_the_end_token_of_other_shards_is_refused(prepared):
    eos_id = json.loads((prepared / "index.json").read_text())["eos_id"]
    right = DataConfig(str(prepared), document_mask=True, eos_id=eos_id)
    assert right.problems("data") == right.shard_problems("data") == []
    (problem,) = replace(right, eos_id=eos_id + 1).shard_problems("data")
    assert (problem.key, problem.value) == ("data.eos_id", eos_id + 1)
    assert f"set it to {eos_id}" in problem.remedy


@pytest.mark.parametrize(
    "config",
    [DataConfig("x", eos_id=3), DataConfig("x", document_mask=True, eos_id=-1)],
    ids=["no mask", "negative"],
)
def test_an_end_token_without_a_use_or_below_0_is_refused(config):
    assert [problem.key for problem in config.problems("data")] == ["data.eos_id"]
