"""What counts as corpus, how it is split in units, and how damage in it is handled."""

import gzip
import json
import sys
import tracemalloc
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from modtrain.common.errors import DataError
from modtrain.data.prepare.flaws import Flaw
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.readers import UnitReader
from modtrain.data.prepare.sources import expand_sources
from modtrain.data.prepare.units import plan_units
from tests.data.data_cases import make_documents, tiny_config, write_jsonl


def read(
    *sources: Path | str, column: str = "text", max_bytes: int = 1 << 20
) -> tuple[list[str], list[Flaw]]:
    """All documents and all flaws of some sources."""
    units = plan_units(expand_sources([str(source) for source in sources]), column)
    items = [item for unit in units for item in UnitReader(unit, column, max_bytes)]
    flaws = [item for item in items if isinstance(item, Flaw)]
    return [item for item in items if isinstance(item, str)], flaws


def lines_of(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def many_lines() -> tuple[list[str], bytes]:
    """Documents that do not compress to nothing, in more bytes than are read at once."""
    documents = [f"{number} " + str(number**50) * 20 for number in range(2, 400)]
    return documents, lines_of(documents)


# Which files ----------------------------------------------------------------------------------


def test_files_come_in_the_order_of_the_sources_sorted_and_once(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "[x].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    sources = [tmp_path / "b.txt", tmp_path / "**" / "*.txt", tmp_path / "[x].txt"]
    names = [Path(f.path).name for f in expand_sources([str(source) for source in sources])]
    assert names == ["b.txt", "[x].txt", "a.txt", "c.txt"]


def test_all_invalid_sources_are_reported(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        expand_sources([str(tmp_path / "*.none"), str(tmp_path / "a.pdf"), str(tmp_path)])
    text = str(caught.value)
    assert "*.none: matches no file" in text
    assert "a.pdf: its suffix is not known" in text
    assert f"write {tmp_path}/**/*.txt" in text


def test_files_inside_a_package_are_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "tiny_corpus"
    (package / "data" / "more").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "a.txt").write_text("A")
    (package / "data" / "more" / "b.txt").write_text("B")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read("package:tiny_corpus/data/**/*.txt")[0] == ["A", "B"]
    assert "tiny_corpus" not in sys.modules


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("package:no_such_corpus/*.txt", "pip install no_such_corpus"),
        ("package:json", "write package:NAME/glob"),
        ("package:json.decoder/x.txt", "write package:NAME/glob"),
        ("package:json/*.txt", "matches no file"),
    ],
)
def test_a_package_source_that_cannot_work(source, words):
    with pytest.raises(DataError, match=words.replace("*", r"\*")):
        expand_sources([source])


# Formats --------------------------------------------------------------------------------------


def test_text_files_are_documents_free_of_their_systems_marks(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b.txt").write_bytes("é\n".encode())
    assert read(tmp_path / "*.txt") == (["one\ntwo\n", "é\n"], [])


@pytest.mark.parametrize("unit_bytes", [1, 7, 30, 64, 1000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_each_line_belongs_to_one_unit(tmp_path, small_units, unit_bytes, newline):
    small_units(unit_bytes)
    documents = ["a", "b" * 50, "c", "é漢", "d" * 100, "e"]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in documents]
    # A mark at the start, a blank line, and no newline at the end.
    content = b"\xef\xbb\xbf" + newline.join([*lines[:3], b"", *lines[3:]])
    (tmp_path / "a.jsonl").write_bytes(content)
    assert read(tmp_path / "a.jsonl") == (documents, [])


def test_compressed_lines(tmp_path):
    documents, content = many_lines()
    half = content.index(b"\n", len(content) // 2) - 5
    parts = content[:half], content[half:]
    # Several members in a file, as parallel compressors write them, and padding after them.
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)) + bytes(600_000))
    zst = b"".join(zstandard.compress(part) for part in parts)
    (tmp_path / "b.jsonl.zst").write_bytes(zst)
    assert read(tmp_path / "a.jsonl.gz") == (documents, [])
    assert read(tmp_path / "b.jsonl.zst") == (documents, [])


def test_parquet_with_a_named_column(tmp_path, small_units):
    documents = make_documents(50)
    kinds = {"s": pa.string(), "l": pa.large_string(), "d": pa.dictionary(pa.int32(), pa.string())}
    for name, kind in kinds.items():
        table = pa.table({"id": range(50), "body": pa.array(documents).cast(kind)})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
        small_units(100)
        files = expand_sources([str(tmp_path / f"{name}.parquet")])
        assert len(plan_units(files, "body")) == 8
        assert read(tmp_path / f"{name}.parquet", column="body") == (documents, [])
    with pytest.raises(DataError, match="no column 'text', only id, body"):
        read(tmp_path / "s.parquet")


def test_prepare_reads_every_format(tmp_path):
    documents = make_documents(100)
    (tmp_path / "a.txt").write_text(documents[0])
    write_jsonl(tmp_path / "b.jsonl", documents[1:30])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines_of(documents[30:60])))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(lines_of(documents[60:90])))
    parquet.write_table(pa.table({"text": documents[90:]}), tmp_path / "e.parquet")
    mixed = prepare(tiny_config([tmp_path / "?.*"], tmp_path / "mixed"), progress=False)
    plain = write_jsonl(tmp_path / "plain.jsonl", documents)
    as_lines = prepare(tiny_config([plain], tmp_path / "plain"), progress=False)
    assert mixed.summary.fingerprint == as_lines.summary.fingerprint


# Damage ---------------------------------------------------------------------------------------

BAD_LINES = {
    "bad_json": [b'{"text": "cut', b"[" * 100_000, b"plain words"],
    "no_text": [b'{"other": "x"}', b'{"text": 5}', b'["text"]', b'{"text": null}'],
    "empty": [b'{"text": ""}', b'{"text": " \\n "}'],
    "invalid_utf8": [b'{"text": "\xff"}', b'{"text": "\\ud800"}'],
}
BAD = [(kind, line) for kind, lines in BAD_LINES.items() for line in lines]


@pytest.mark.parametrize(("kind", "line"), BAD)
@pytest.mark.parametrize("unit_bytes", [1000, 10**6])
def test_a_bad_line_is_counted_by_its_place(tmp_path, small_units, kind, line, unit_bytes):
    small_units(unit_bytes)
    good = lines_of(make_documents(60)).splitlines()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*good[:40], line, *good[40:]]) + b"\n")
    report = prepare(tiny_config([path], tmp_path / "out"), progress=False)
    assert report.summary.flaws == {kind: 1}
    assert sum(report.summary.flaws.values()) == 1
    assert [str(flaw).startswith(f"{path}:41: ") for flaw in report.examples] == [True]
    assert sum(split.num_documents for split in report.summary.splits.values()) == 60
    with pytest.raises(DataError, match=r"a\.jsonl:41: "):
        prepare(tiny_config([path], tmp_path / "strict", on_error="stop"), progress=False)
    assert not (tmp_path / "strict" / "index.json").exists()


def test_stop_stops_in_a_worker_process(tmp_path, small_units):
    small_units(1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(make_documents(20)) + b"bad\n" + lines_of(make_documents(20, 1)))
    with pytest.raises(DataError, match=r"a\.jsonl:21: not JSON"):
        prepare(
            tiny_config([path], tmp_path / "out", on_error="stop", num_workers=2), progress=False
        )


def test_flaws_of_many_units_are_added_up_and_a_few_shown(tmp_path, small_units):
    small_units(500)
    path = tmp_path / "a.jsonl"
    good = lines_of(make_documents(60)).splitlines()
    path.write_bytes(
        b"\n".join(line for pair in zip(good, [b"{"] * 60, strict=True) for line in pair)
    )
    report = prepare(tiny_config([path], tmp_path / "out"), progress=False)
    assert report.summary.flaws == {"bad_json": 60}
    assert [flaw.line for flaw in report.examples] == [2, 4, 6]


def test_bad_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n")
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\xff\n")
    (tmp_path / "c.txt").write_bytes(b"")
    documents, flaws = read(tmp_path / "*.txt")
    assert documents == ["fine\n"]
    places = [(flaw.kind, Path(flaw.path).name, flaw.line) for flaw in flaws]
    assert places == [("invalid_utf8", "b.txt", 2), ("empty", "c.txt", 1)]


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("how", ["cut", "corrupt", "empty"])
def test_documents_before_the_damage_in_a_compressed_file_are_kept(tmp_path, kind, how):
    documents, content = many_lines()
    compress = gzip.compress if kind == "gz" else zstandard.compress
    whole = compress(content)
    damaged = {
        "cut": whole[: len(whole) * 3 // 4],
        "corrupt": compress(content[: len(content) // 2]) + b"garbage, no member or frame",
        "empty": b"",
    }[how]
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(damaged)
    readable, flaws = read(path)
    assert readable == documents[: len(readable)]
    assert (0 if how == "empty" else 100) <= len(readable) < len(documents)
    assert [(flaw.kind, flaw.line) for flaw in flaws] == [("damaged", len(readable) + 1)]


LIMIT = 200
# Around the limit, far beyond it, and at the end.
SIZES = [10, LIMIT - 1, LIMIT, LIMIT + 1, 30, 5 * LIMIT, 5 * LIMIT, 1, 3 * LIMIT]


@pytest.mark.parametrize("unit_bytes", [1, 60, 333, 10**6])
@pytest.mark.parametrize("last", ["", "\n"])
def test_a_line_that_is_too_large_is_left_out_in_every_unit(
    tmp_path, small_units, unit_bytes, last
):
    small_units(unit_bytes)
    bare = len(lines_of([""])) - 1
    documents = ["x" * max(1, size - bare) for size in SIZES]
    content = lines_of(documents).rstrip(b"\n") + last.encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(content))
    expected = [d for d in documents if len(d) + bare <= LIMIT]
    for path in sorted(tmp_path.iterdir()):
        kept, flaws = read(path, max_bytes=LIMIT)
        assert kept == expected
        assert {flaw.kind for flaw in flaws} == {"too_large"}
        assert len(flaws) == len(documents) - len(expected)


def test_other_documents_that_are_too_large_are_left_out(tmp_path):
    documents = ["x" * size for size in SIZES]
    for number, text in enumerate(documents):
        (tmp_path / f"{number}.txt").write_text(text)
    parquet.write_table(pa.table({"text": documents}), tmp_path / "a.parquet")
    expected = [text for text in documents if len(text) <= LIMIT]
    for source in ("*.txt", "a.parquet"):
        kept, flaws = read(tmp_path / source, max_bytes=LIMIT)
        assert kept == expected
        assert [flaw.kind for flaw in flaws] == ["too_large"] * (len(SIZES) - len(expected))


def test_a_text_that_is_too_large_is_never_cut(tmp_path):
    """Not where the bytes that are taken out of it would make room, either."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"x" * LIMIT)
    (tmp_path / "b.txt").write_bytes(b"x\r\n" * LIMIT)
    kept, flaws = read(tmp_path / "*.txt", max_bytes=LIMIT)
    assert (kept, [flaw.kind for flaw in flaws]) == ([], ["too_large"] * 2)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_memory_is_bounded_whatever_a_line_is_or_a_file_was_compressed_from(tmp_path, kind):
    size = 1 << 28
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        with path.open("wb") as file:
            file.truncate(size)
    else:
        compressor = zlib.compressobj(wbits=31) if kind.endswith("gz") else None
        compressor = compressor or zstandard.ZstdCompressor().compressobj()
        piece = bytes(1 << 20)
        parts = [compressor.compress(piece) for _ in range(size >> 20)]
        path.write_bytes(b"".join([*parts, compressor.flush()]))
        assert path.stat().st_size < size / 500
    tracemalloc.start()
    try:
        documents, flaws = read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (documents, [flaw.kind for flaw in flaws]) == ([], ["too_large"])
    assert peak < size / 3


def test_bad_parquet(tmp_path, small_units):
    values = pa.array([b"one", b"\xff", None, b"", b"two"], pa.binary())
    parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    documents, flaws = read(tmp_path / "a.parquet")
    assert documents == ["one", "two"]
    expected = [("invalid_utf8", 2), ("no_text", 3), ("empty", 4)]
    assert [(flaw.kind, flaw.line) for flaw in flaws] == expected

    small_units(1)
    parquet.write_table(pa.table({"text": ["x", "y", "", "z", ""]}), tmp_path / "a.parquet", 1)
    assert [flaw.line for flaw in read(tmp_path / "a.parquet")[1]] == [3, 5]

    parquet.write_table(pa.table({"text": make_documents(500)}), tmp_path / "b.parquet")
    content = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:-100])
    documents, flaws = read(tmp_path / "b.parquet")
    assert [(flaw.kind, flaw.line) for flaw in flaws] == [("damaged", 1)]


def test_damage_is_counted_by_prepare(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", make_documents(60))
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.parquet"):
        (tmp_path / name).write_bytes(b"PAR1 and no more")
    sources = [good, tmp_path / "?.*"]
    report = prepare(tiny_config(sources, tmp_path / "out"), progress=False)
    assert report.summary.flaws == {"damaged": 3}
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:1: "):
        prepare(tiny_config(sources, tmp_path / "strict", on_error="stop"), progress=False)
