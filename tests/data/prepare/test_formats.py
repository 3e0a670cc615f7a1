"""The ways in beside text files and JSON lines, written by the libraries that others use."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
import webdataset
import zstandard
from pyarrow import parquet

from modtrain.common.errors import ConfigError, DataError
from modtrain.data.prepare.flaws import Flaw
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.readers import UnitReader
from modtrain.data.prepare.sources import expand_sources
from modtrain.data.prepare.text_field import NoTextError, TextField
from modtrain.data.prepare.units import plan_units
from tests.data.data_cases import make_documents, tiny_config, trained_on, tree

COMPRESS = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "bz2": lambda content: bz2.compress(content, 1),
    "xz": lzma.compress,
}
DOCUMENTS = ["one\ntwo", 'a "quoted", comma', "é 漢字", "x" * 5000]


def read(
    *sources: Path | str,
    column: str = "text",
    template: str | None = None,
    max_bytes: int = 1 << 20,
    separator: str | None = None,
) -> tuple[list[str], list[Flaw]]:
    """All documents and all flaws of some sources."""
    files = expand_sources([str(source) for source in sources])
    units = plan_units(files, column, template)
    readers = [UnitReader(unit, column, max_bytes, separator, template) for unit in units]
    items = [item for reader in readers for item in reader]
    flaws = [item for item in items if isinstance(item, Flaw)]
    return [item for item in items if isinstance(item, str)], flaws


def csv_of(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def tar_of(members: dict[str, bytes]) -> bytes:
    """An archive as webdataset writes it."""
    content = io.BytesIO()
    with webdataset.TarWriter(content, encoder=False) as tar:
        for name, data in members.items():
            key, _, extension = name.partition(".")
            tar.write({"__key__": key, extension: data})
    return content.getvalue()


# Where the text is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "record", "text"),
    [
        ("messages.0.content", {"messages": [{"content": "a"}]}, "a"),
        ("meta.title", {"meta.title": "whole", "meta": {"title": "path"}}, "whole"),
        ("a.b", {"a": {"b": "x"}}, "x"),
    ],
)
def test_a_path_leads_to_the_text(column, record, text):
    assert TextField(column).of(record) == text


@pytest.mark.parametrize("column", ["messages.1.content", "messages.x", "text.upper", "__class__"])
def test_a_path_to_nothing_names_the_keys(column):
    with pytest.raises(NoTextError, match="its keys: messages, text"):
        TextField(column).of({"messages": [{"content": "a"}], "text": "t"})


def test_a_template_joins_fields_and_evaluates_nothing():
    field = TextField("text", r"{{{title}}}\n{meta.year}: {body.0}")
    record = {"title": "{x}", "meta": {"year": 1999}, "body": ["b"]}
    assert field.of(record) == "{{x}}\n1999: b"
    with pytest.raises(NoTextError):
        TextField("text", "{title.__class__}").of(record)
    with pytest.raises(NoTextError, match="is no text"):
        TextField("text", "{body}").of(record)


@pytest.mark.parametrize("template", ["no field", "{open", "close}", "{}"])
def test_a_template_that_cannot_work_is_a_problem(tmp_path, template):
    config = tiny_config(["a.jsonl"], tmp_path / "out", text_template=template, text_column="body")
    with pytest.raises(ConfigError) as caught:
        prepare(config, progress=False)
    assert [problem.key for problem in caught.value.problems] == ["text_template", "text_column"]


def test_templates_work_in_every_format_with_fields(tmp_path):
    rows = [{"title": f"t{n}", "body": text} for n, text in enumerate(DOCUMENTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.csv").write_bytes(csv_of(rows))
    (tmp_path / "c.tsv").write_bytes(csv_of(rows, "\t"))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "e.tar").write_bytes(
        tar_of({f"{n}.json": json.dumps(row).encode() for n, row in enumerate(rows)})
    )
    expected = [f"t{n}\n{text}" for n, text in enumerate(DOCUMENTS)]
    for path in sorted(tmp_path.iterdir()):
        assert read(path, template=r"{title}\n{body}") == (expected, []), path.name


# Compressed files -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COMPRESS)
def test_every_stream_may_be_compressed_in_several_members(tmp_path, kind):
    compress = COMPRESS[kind]
    rows = [{"id": str(n), "text": text} for n, text in enumerate(DOCUMENTS)]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    contents = {
        "a.jsonl": lines,
        "b.csv": [csv_of(rows)[:100], csv_of(rows)[100:]],
        "c.tar": [tar_of({f"{n}.txt": row["text"].encode() for n, row in enumerate(rows)})],
        "d.txt": ["\n--\n".join(DOCUMENTS).encode()],
    }
    for name, parts in contents.items():
        path = tmp_path / f"{name}.{kind}"
        path.write_bytes(b"".join(compress(part) for part in parts))
        assert read(path, separator="\n--\n") == (DOCUMENTS, []), name


@pytest.mark.parametrize("kind", COMPRESS)
def test_what_comes_before_the_damage_is_kept(tmp_path, kind):
    documents = [f"{n} {n**60}" for n in range(2, 2000)]
    rows = [{"text": text} for text in documents]
    contents = {
        "a.csv": csv_of(rows),
        "b.tar": tar_of({f"{n}.txt": text.encode() for n, text in enumerate(documents)}),
    }
    for name, content in contents.items():
        whole = COMPRESS[kind](content)
        path = tmp_path / f"{name}.{kind}"
        path.write_bytes(whole[: len(whole) * 9 // 10])
        documents_read, flaws = read(path)
        assert documents_read == documents[: len(documents_read)]
        assert len(documents_read) > 300
        assert [flaw.kind for flaw in flaws] == ["damaged"]


# CSV ------------------------------------------------------------------------------------------


def test_csv_rows_are_those_of_the_library(tmp_path):
    rows = [{"id": str(n), "text": text} for n, text in enumerate([*DOCUMENTS, "last\r\nline"])]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + csv_of(rows))
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8-sig") as file:
        expected = [row["text"] for row in csv.DictReader(file)]
    assert read(tmp_path / "a.csv") == (expected, [])


def test_bad_rows_of_csv_are_flaws_with_their_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'id,text\n1,"two\nlines"\n2,a,b\n3,"x"y\n4,\n5,\xff\n6,fine\n\n7,"cut\nshort\n'
    )
    documents_read, flaws = read(path)
    assert documents_read == ["two\nlines", "fine"]
    expected = [("bad_csv", 4), ("bad_csv", 5), ("empty", 6), ("invalid_utf8", 7), ("damaged", 10)]
    assert [(flaw.kind, flaw.line) for flaw in flaws] == expected


def test_a_csv_file_without_the_column_names_those_that_it_has(tmp_path):
    (tmp_path / "a.csv").write_bytes(csv_of([{"id": "1", "body": "x"}]))
    with pytest.raises(DataError, match="names no column 'text', only id, body"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.arrow"])
def test_two_columns_of_the_name_that_is_asked_for_are_an_error(tmp_path, name):
    table = pa.Table.from_arrays([pa.array(["one"])] * 3, names=["text", "text", "body"])
    if name == "a.csv":
        (tmp_path / name).write_text("text,text,body\none,one,one\n")
    elif name == "a.arrow":
        write_arrow(tmp_path / name, table, None, False)
    else:
        parquet.write_table(table, tmp_path / name)
    with pytest.raises(DataError, match="the column 'text' twice"):
        read(tmp_path / name)
    assert read(tmp_path / name, column="body") == (["one"], [])


# WebDataset -----------------------------------------------------------------------------------


def test_samples_are_those_of_webdataset(tmp_path):
    samples = [
        {"__key__": "a/1", "txt": DOCUMENTS[0], "json": {"text": "metadata"}, "jpg": b"\xff"},
        {"__key__": "a/2", "json": {"text": DOCUMENTS[1]}},
        {"__key__": "b.1", "page.txt": DOCUMENTS[2]},
    ]
    path = str(tmp_path / "shard.tar")
    with webdataset.TarWriter(path) as tar:
        for sample in samples[:2]:
            tar.write({k: v for k, v in sample.items() if k != "jpg"})
        tar.write({"__key__": "b", "1.page.txt": DOCUMENTS[2]})
    documents_read = [*webdataset.WebDataset(path, shardshuffle=False).decode()]
    assert [s.get("txt") or s.get("json", s)["text"] for s in documents_read[:2]] == DOCUMENTS[:2]
    assert read(path) == (DOCUMENTS[:3], [])


@pytest.mark.parametrize(
    ("members", "documents", "num_flaws"),
    [
        (["wiki.001.txt", "wiki.002.txt", "wiki.003.txt", "b.txt"], ["3"], 1),
        (["a.txt", "a.txt", "b.txt"], ["2"], 1),
        (["a.x.txt", "a.y.txt", "a.txt", "a.z.txt"], ["2"], 0),
        (["a.json", "a.x.json", "a.x.txt"], ["2"], 0),
        (["a.x.json", "a.y.json"], [], 1),
        ([".txt", "d/._a.txt", "d/a.txt"], ["2"], 0),
    ],
)
def test_no_text_of_a_sample_is_lost_unseen(tmp_path, members, documents, num_flaws):
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for number, name in enumerate(members):
            content = b'{"text": "j"}' if name.endswith("json") else str(number).encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "a.tar").write_bytes(written.getvalue())
    documents_read, flaws = read(tmp_path / "a.tar")
    assert documents_read == documents
    assert [flaw.kind for flaw in flaws] == ["several_texts"] * num_flaws


def test_a_byte_order_mark_is_no_text_of_a_member(tmp_path):
    mark = "\ufeff".encode()
    members = {"a.txt": mark + b"one\r\ntwo", "b.json": mark + b'{"text": "three"}'}
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    assert read(tmp_path / "a.tar") == (["one\ntwo", "three"], [])
    (tmp_path / "b.tar").write_bytes(tar_of({"a.txt": members["a.txt"]}))
    assert read(tmp_path / "b.tar", template="<{txt}>") == (["<one\ntwo>"], [])


def test_names_from_files_are_short_and_harmless_in_messages(tmp_path):
    key = "\x1b[2J\n" + "x" * 1000
    (tmp_path / "a.jsonl").write_text(json.dumps({key: "text"}))
    (flaw,) = read(tmp_path / "a.jsonl")[1]
    assert str(flaw).isprintable()
    assert len(flaw.detail) < 400


def test_a_record_of_many_values_is_too_large_and_a_text_of_many_commas_is_not(tmp_path):
    """Python's lists would take twenty times the bytes of the line."""
    count = 2_200_000
    hostile = b'{"text": "x", "more": [' + b"[]," * count + b"0]}\n"
    harmless = b'{"text": "' + b'\\",[{' * count + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(hostile + harmless)
    documents_read, flaws = read(tmp_path / "a.jsonl", max_bytes=1 << 25)
    assert [len(text) for text in documents_read] == [4 * count]
    assert [(flaw.kind, flaw.line) for flaw in flaws] == [("too_large", 1)]


def test_members_that_are_no_files_are_flaws_and_nothing_is_written(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, kind, link in [
            ("1.txt", tarfile.LNKTYPE, "/etc/passwd"),
            ("2.txt", tarfile.SYMTYPE, "/etc/passwd"),
            ("3.txt", tarfile.CHRTYPE, ""),
            ("../../4.txt", tarfile.REGTYPE, ""),
            ("/5.txt", tarfile.REGTYPE, ""),
            ("6.jpg", tarfile.REGTYPE, ""),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            member.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"text"))
    before = tree(tmp_path)
    documents_read, flaws = read(folder / "a.tar")
    assert documents_read == ["text"] * 2
    kinds = [("not_a_file", n) for n in (1, 2, 3)] + [("no_text", 6)]
    assert [(flaw.kind, flaw.line) for flaw in flaws] == kinds
    assert tree(tmp_path) == before


@pytest.mark.parametrize("how", ["header", "cut", "no end", "no tar"])
def test_damage_in_an_archive_is_no_end_of_it(tmp_path, how):
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(5):
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = 600
            tar.addfile(member, io.BytesIO(b"x" * 600))
    content = bytearray(written.getvalue())
    if how == "header":
        content[2 * 1536 + 10] ^= 0xFF
    content = {"cut": content[:4000], "no end": content[: 5 * 1536]}.get(how, content)
    (tmp_path / "a.tar").write_bytes(b"no archive" * 100 if how == "no tar" else bytes(content))
    documents_read, flaws = read(tmp_path / "a.tar")
    assert len(documents_read) == {"header": 2, "cut": 2, "no end": 5, "no tar": 0}[how]
    assert [flaw.kind for flaw in flaws] == ["damaged"]


def test_joined_archives_are_no_single_one(tmp_path):
    both = [tar_of({name: b"text"}) for name in ("1.txt", "2.txt")]
    (tmp_path / "a.tar").write_bytes(b"".join(both))
    documents_read, flaws = read(tmp_path / "a.tar")
    assert documents_read == ["text"]
    assert [flaw.kind for flaw in flaws] == ["damaged"]
    assert "joined by cat" in flaws[0].detail


def test_a_chain_of_long_names_is_damage(tmp_path):
    link = tarfile.TarInfo("././@LongLink")
    link.type, link.size = tarfile.GNUTYPE_LONGNAME, 4
    header = link.tobuf(tarfile.GNU_FORMAT) + b"name".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(header * 600)
    assert [flaw.kind for flaw in read(tmp_path / "a.tar")[1]] == ["damaged"]


def test_a_command_prints_an_archive(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"1.txt": b"one", "2.txt": b"two"}))
    assert read(f"pipe:cat {tmp_path}/a.tar") == (["one", "two"], [])
    with pytest.raises(DataError, match="the command failed, with status 3"):
        read(f"pipe:cat {tmp_path}/a.tar; exit 3")


# Arrow ----------------------------------------------------------------------------------------

TABLE = pa.table(
    {
        "text": pa.array([*DOCUMENTS, None], pa.large_string()),
        "kind": pa.array(["a", "b", "a", "b", "a"]).dictionary_encode(),
        "messages": [[{"role": "u", "content": text}] for text in [*DOCUMENTS, ""]],
    }
)


def write_arrow(path: Path, table: pa.Table, compression: str | None, is_file: bool) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    new = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_arrow_streams_and_files(tmp_path, is_file, compression):
    path = tmp_path / "a.arrow"
    write_arrow(path, TABLE, compression, is_file)
    documents_read, flaws = read(path)
    assert documents_read == DOCUMENTS
    assert [(flaw.kind, flaw.line) for flaw in flaws] == [("no_text", 5)]
    assert read(path, column="messages.0.content")[0] == DOCUMENTS
    documents_read, flaws = read(path, template="{kind} {messages.0.content}")
    assert (documents_read[:2], flaws) == (["a one\ntwo", 'b a "quoted", comma'], [])


@pytest.mark.parametrize("column", ["text", "messages.0.content"])
def test_parquet_columns_of_every_type_of_text(tmp_path, column):
    table = TABLE.append_column("d", TABLE["text"].cast(pa.string()).dictionary_encode())
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet", column=column)[0] == DOCUMENTS
    assert read(tmp_path / "a.parquet", column="d")[0] == DOCUMENTS


NESTED = pa.table(
    {
        "list": [["a", "b"], None, [], ["c", None]],
        "large": pa.array([["a"], ["b"]] * 2, pa.large_list(pa.large_string())),
        "fixed": pa.array([["a", "b"], None] * 2, pa.list_(pa.string(), 2)),
        "deep": [[{"x": [{"y": "é"}]}], [{"x": None}], [], [{"x": [{"y": "z"}, {"y": None}]}]],
        "of.dots": [{"a": "b"}, {"a": None}, None, {"a": ""}],
        "number": [{"a": 1}, {"a": 2}, None, {"a": None}],
    }
)


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
@pytest.mark.parametrize(
    "column", ["list.1", "large.0", "fixed.1", "deep.0.x.0.y", "deep.0.z", "deep.0", "number.a"]
)
def test_paths_through_tables_are_those_through_their_python_objects(tmp_path, name, column):
    if name == "a.arrow":
        write_arrow(tmp_path / name, NESTED, None, False)
    else:
        parquet.write_table(NESTED, tmp_path / name, row_group_size=3)
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in NESTED.to_pylist()))
    for options in ({"column": column}, {"template": f"<{{{column}}}>"}):
        texts, flaws = read(tmp_path / name, **options)
        expected, expected_flaws = read(tmp_path / "rows.jsonl", **options)
        assert texts == expected
        assert [(f.kind, f.line, f.detail.partition(";")[0]) for f in flaws] == [
            (f.kind, f.line, f.detail.partition(";")[0]) for f in expected_flaws
        ]


def test_a_list_of_many_items_becomes_no_python_list(tmp_path):
    """Of an Arrow file of some hundred bytes; a Python list of them would take 64 MB."""
    items = pa.ListArray.from_arrays(pa.array([0, 1 << 23], pa.int32()), pa.nulls(1 << 23))
    write_arrow(tmp_path / "a.arrow", pa.table({"text": items}), None, False)
    tracemalloc.start()
    for column in ("text", "text.5"):
        assert [flaw.kind for flaw in read(tmp_path / "a.arrow", column=column)[1]] == ["no_text"]
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_lists_of_more_items_than_memory_may_have_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("modtrain.data.prepare.rows._MIN_LIMIT_BYTES", 1 << 12)
    table = pa.table({"text": pa.array([["a"] * 2, ["b"] * 600, ["c"]])})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    documents_read, flaws = read(tmp_path / "a.parquet", column="text.0", max_bytes=1 << 12)
    assert documents_read == ["a", "c"]
    assert [(flaw.kind, flaw.line) for flaw in flaws] == [("too_large", 2)]
    assert "600 items" in flaws[0].detail


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_a_table_without_the_column_names_those_that_it_has(tmp_path, name):
    if name == "a.arrow":
        write_arrow(tmp_path / name, TABLE, None, False)
    else:
        parquet.write_table(TABLE, tmp_path / name)
    with pytest.raises(DataError, match=r"no column 'body\.text', only text, kind, messages"):
        read(tmp_path / name, column="body.text")


def test_a_damaged_arrow_file_gives_what_comes_before_the_damage(tmp_path):
    path = tmp_path / "a.arrow"
    write_arrow(path, TABLE, None, False)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        documents_read, flaws = read(path)
        assert documents_read == DOCUMENTS[: len(documents_read)]
        assert [flaw.kind for flaw in flaws] in (["damaged"], ["no_text", "damaged"])


def test_offsets_outside_of_the_data_are_found(tmp_path):
    path = tmp_path / "a.arrow"
    table = pa.table({"text": ["abcdefgh" * 4, "ijklmnop" * 4]})
    write_arrow(path, table, None, False)
    content = bytearray(path.read_bytes())
    at = content.index(bytes([0, 0, 0, 0, 32, 0, 0, 0, 64, 0, 0, 0]))
    content[at + 4 : at + 8] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    documents_read, flaws = read(path)
    assert (documents_read, [flaw.kind for flaw in flaws]) == ([], ["damaged"])


def save_to_disk(folder: Path, table: pa.Table, num_files: int, **state: object) -> None:
    """What ``datasets`` 3 writes: numbered streams, and a list of them."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{num_files:05d}.arrow" for n in range(num_files)]
    rows = -(-table.num_rows // num_files)
    for n, name in enumerate(names):
        write_arrow(folder / name, table.slice(n * rows, rows), None, False)
    content = {"_data_files": [{"filename": name} for name in names], "_split": "train", **state}
    (folder / "state.json").write_text(json.dumps(content))
    (folder / "dataset_info.json").write_text("{}")


def test_folders_that_datasets_saved(tmp_path):
    table = pa.table({"text": make_documents(60)})
    save_to_disk(tmp_path / "one", table, 3)
    assert read(tmp_path / "one") == (make_documents(60), [])
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several splits; name one: \S+/dict/train, "):
        read(tmp_path / "dict")
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": 3}')
    with pytest.raises(DataError, match="does not list its splits"):
        read(tmp_path / "dict")
    save_to_disk(tmp_path / "chosen", table, 1, _indices_files=[{"filename": "x"}])
    with pytest.raises(DataError, match="flatten_indices"):
        read(tmp_path / "chosen")
    (tmp_path / "one/data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"00001-of-00003\.arrow, which is missing"):
        read(tmp_path / "one")
    (tmp_path / "one/state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(DataError, match="outside of its folder"):
        read(tmp_path / "one")


# All of it ------------------------------------------------------------------------------------


def test_prepare_gives_the_same_for_every_format(tmp_path):
    documents = make_documents(60)
    rows = [{"text": text} for text in documents]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv.xz").write_bytes(lzma.compress(csv_of(rows)))
    (folder / "b.tar.bz2").write_bytes(
        bz2.compress(tar_of({f"{n}.txt": text.encode() for n, text in enumerate(documents)}))
    )
    write_arrow(folder / "c.arrow", pa.table({"text": documents}), "zstd", True)
    trees = []
    for path in sorted(folder.iterdir()):
        output = tmp_path / path.name
        prepare(tiny_config([path], output), progress=False)
        trees.append(trained_on(output))
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.parametrize(("max_flaws", "fails"), [(2, False), (1, True)])
def test_a_limit_of_flaws_counts_over_all_files(tmp_path, max_flaws, fails):
    for name in ("a.jsonl", "b.jsonl"):
        lines = [json.dumps({"text": text}) for text in make_documents(40, ord(name[0]))]
        (tmp_path / name).write_text("\n".join([*lines, "no JSON"]) + "\n")
    config = tiny_config(
        [tmp_path / "*.jsonl"], tmp_path / "out", on_error="limit", max_flaws=max_flaws
    )
    if fails:
        with pytest.raises(DataError, match=r"max_flaws=1 documents .*b\.jsonl:41: not JSON"):
            prepare(config, progress=False)
    else:
        assert prepare(config, progress=False).summary.flaws == {"bad_json": 2}
