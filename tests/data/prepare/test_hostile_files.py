"""Small files that would take all memory: read in a process that is not given it."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

MB = 1 << 20
SIZE = 256 * MB
# What reading may take on top of what the libraries take.
SPARE = 200 * MB
# Other allocators reserve addresses that they do not use, which the limit counts.
ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "PYTHONPATH": str(Path.cwd())}
READ = """
import json, resource, sys
import pyarrow, pyarrow.parquet, webdataset.tariterators
from modtrain.data.prepare.flaws import Flaw
from modtrain.data.prepare.readers import UnitReader
from modtrain.data.prepare.sources import expand_sources
from modtrain.data.prepare.units import plan_units
pyarrow.set_cpu_count(1); pyarrow.set_io_thread_count(1)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[2:]:
    units = plan_units(expand_sources([path]), "text")
    items = [item for unit in units for item in UnitReader(unit, "text", 1 << 20)]
    print(json.dumps([item.kind if isinstance(item, Flaw) else len(item) for item in items]))
"""


COMPRESS = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def compressed(kind: str, head: bytes = b"", tail: bytes = b"") -> bytes:
    """SIZE zeros between two texts, in members one after the other."""
    compress = COMPRESS[kind]
    return compress(head) + compress(bytes(16 * MB)) * (SIZE // (16 * MB)) + compress(tail)


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def hostile_files(folder: Path) -> dict[Path, list[object]]:
    """Each file with what reading it gives."""
    files: dict[Path, list[object]] = {}

    def add(name: str, content: bytes, expected: list[object]) -> None:
        (folder / name).write_bytes(content)
        files[folder / name] = expected

    for kind in ("gz", "zst", "bz2", "xz"):
        add(f"lines.jsonl.{kind}", compressed(kind), ["too_large"])
    add("text.txt.xz", compressed("xz"), ["too_large"])
    add("open.csv.gz", compressed("gz", b'text\nfine\n"'), [4, "too_large"])
    many = ('text\n"' + "a\n" * MB).encode()
    add("lines.csv.gz", gzip.compress(many, 1), ["too_large"])
    small = tar_header("a.txt", 4) + b"text".ljust(512, b"\0")
    big = compressed("gz", small + tar_header("b.txt", SIZE), small.replace(b"a.t", b"c.t"))
    add("member.tar.gz", big, [4, "too_large", "damaged"])
    for name, kind in (("pax", tarfile.XHDTYPE), ("long", tarfile.GNUTYPE_LONGNAME)):
        content = compressed("gz", small + tar_header("x", SIZE, kind))
        add(f"{name}.tar.gz", content, [4, "damaged"])
    table = pa.table({"text": pa.array([b"fine", bytes(SIZE)], pa.binary())})
    parquet.write_table(
        table, folder / "page.parquet", compression="zstd", use_dictionary=False, row_group_size=1
    )
    files[folder / "page.parquet"] = [4, "too_large"]
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(str(folder / "batch.arrow"), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=1)
    files[folder / "batch.arrow"] = [4, "too_large"]
    del table
    # One value that many rows stand for.
    value = pa.array([bytes(8 * MB)] * 40, pa.binary())
    parquet.write_table(
        pa.table({"text": value}),
        folder / "dictionary.parquet",
        compression="zstd",
        dictionary_pagesize_limit=16 * MB,
    )
    files[folder / "dictionary.parquet"] = ["too_large"] * 40
    # Items of lists that take next to nothing: each is the same value, or none.
    items = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), [bytes(MB).decode()])
    many = pa.ListArray.from_arrays(pa.array([0, 400], pa.int32()), items)
    parquet.write_table(pa.table({"text": many}), folder / "items.parquet", compression="zstd")
    files[folder / "items.parquet"] = ["no_text"]
    many = pa.ListArray.from_arrays(pa.array([0, 40 * MB], pa.int32()), pa.nulls(40 * MB))
    parquet.write_table(pa.table({"text": many}), folder / "nulls.parquet")
    files[folder / "nulls.parquet"] = ["too_large"]
    many = pa.ListArray.from_arrays(pa.array([0, SIZE], pa.int32()), pa.nulls(SIZE))
    table = pa.table({"text": many})
    with pa.ipc.new_stream(str(folder / "nulls.arrow"), table.schema) as writer:
        writer.write_table(table)
    files[folder / "nulls.arrow"] = ["no_text"]
    return files


@pytest.mark.nightly
def test_memory_is_bounded_whatever_a_small_file_would_become(tmp_path):
    files = hostile_files(tmp_path)
    assert max(path.stat().st_size for path in files) < SIZE / 100
    done = subprocess.run(  # noqa: PLW1510
        [sys.executable, "-c", READ, str(SPARE), *map(str, files)],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    names = [path.name for path in files]
    assert dict(zip(names, results, strict=False)) == dict(
        zip(names, files.values(), strict=True)
    ), done.stderr[-2000:]
