"""What the summary of a prepared directory says of itself."""

from dataclasses import replace

from modtrain.data.packing.summary import SplitPacking
from modtrain.data.stream.index_json import read_summary


def test_packing_is_described_split_by_split(prepared):
    summary = read_summary(prepared)
    assert summary.packing_lines() == summary.packing_lines("books") == []
    places = {name: split.num_sequences * 16 for name, split in summary.splits.items()}
    packing = {name: SplitPacking(count // 4, 3, 5) for name, count in places.items()}
    lines = replace(summary, packing=packing).packing_lines()
    assert [line.partition(":")[0] for line in lines] == ["train", "valid"]
    documents = summary.splits["train"].num_documents
    assert lines[0].startswith("train: 25.00% of the places")
    assert f"3 of {documents:,} documents are cut" in lines[0] and lines[0].endswith(" 5")
    named = replace(summary, packing=packing).packing_lines("books")
    assert named == [f"books, {line}" for line in lines]
