"""Corpora behind addresses: any driver of fsspec, and web servers that behave badly."""

import gzip
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from modtrain.common.errors import DataError
from modtrain.data.documents.record import names_of
from modtrain.data.prepare import storage
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.sources import expand_sources
from modtrain.data.prepare.storage import shown_name
from tests.data.data_cases import make_documents, tiny_config, tree, write_jsonl
from tests.data.prepare.test_formats import read, write_arrow

DOCUMENTS = make_documents(60)


def fill(folder: Path) -> Path:
    """Some documents in files of several kinds."""
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:20])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[20:30])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pa.table({"text": DOCUMENTS[30:50]})
    parquet.write_table(table, folder / "c.parquet", row_group_size=5)
    write_arrow(folder / "d.arrow", pa.table({"text": DOCUMENTS[50:]}), None, False)
    return folder


@pytest.fixture
def in_memory(tmp_path) -> Iterator[str]:
    """The documents behind an address of this process."""
    files = fsspec.filesystem("memory")
    for path in fill(tmp_path / "local").iterdir():
        files.pipe_file(f"/bucket/deep/{path.name}", path.read_bytes())
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


class Server:
    """A web server of a folder. broken: answers that are cut short before one is whole."""

    def __init__(self, folder: Path) -> None:
        self.broken = 0
        self.asked: list[str] = []
        self.folder = folder
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments, directory=str(folder))

            def log_message(self, *_: Any) -> None:
                pass

            def copyfile(self, source: Any, outputfile: Any) -> None:
                outer.asked.append(self.path)
                content = source.read()
                if outer.broken > 0 and len(content) > 1000:
                    outer.broken -= 1
                    outputfile.write(content[: len(content) // 2])
                    self.close_connection = True
                    return
                outputfile.write(content)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(storage, "_WAIT_SECONDS", 0.0)
    server = Server(fill(tmp_path / "local"))
    yield server
    server.close()


def test_addresses_give_what_local_files_give(tmp_path, in_memory, small_units):
    small_units(1500)
    local = tmp_path / "local"
    assert read(f"{in_memory}/**/*.*") == read(f"{local}/*.*") == (DOCUMENTS, [])
    prepare(tiny_config([f"{in_memory}/**/*.*"], tmp_path / "a"), progress=False)
    prepare(tiny_config([f"{local}/*.*"], tmp_path / "b"), progress=False)
    trees = [tree(tmp_path / name) for name in "ab"]
    indexes = [json.loads(files.pop("index.json")) for files in trees]
    assert indexes[0]["fingerprint"] == indexes[1]["fingerprint"]
    for files in trees:
        # Names of the files as they were given.
        del files[".prepared.json"], files["source_files.json"]
    assert trees[0] == trees[1]


def test_a_folder_that_datasets_saved_is_read_behind_an_address(in_memory):
    """By the order of its state.json, and only what stands there."""
    names = ["b.arrow", "a.arrow"]
    files = fsspec.filesystem("memory")
    for name, text in zip(names, ["one", "two"], strict=True):
        table, written = pa.table({"text": [text]}), pa.BufferOutputStream()
        with pa.ipc.new_stream(written, table.schema) as writer:
            writer.write_table(table)
        files.pipe_file(f"/bucket/saved/train/{name}", written.getvalue().to_pybytes())
    state = {"_data_files": [{"filename": name} for name in names]}
    files.pipe_file("/bucket/saved/train/state.json", json.dumps(state).encode())
    files.pipe_file("/bucket/saved/dataset_dict.json", b'{"splits": ["train"]}')
    assert read(f"{in_memory}/saved/train/") == (["one", "two"], [])
    with pytest.raises(DataError, match=r"name one: memory://bucket/saved/train"):
        read(f"{in_memory}/saved")
    files.pipe_file("/bucket/saved/train/state.json", b'{"_data_files": [{"filename": "../x"}]}')
    with pytest.raises(DataError, match="outside of its folder"):
        read(f"{in_memory}/saved/train")
    with pytest.raises(DataError, match="its suffix is not known"):
        read(f"{in_memory}/nothing")


def test_an_address_that_is_not_there_and_one_without_a_driver(in_memory):
    with pytest.raises(DataError, match="is not there"):
        expand_sources([f"{in_memory}/none.jsonl"])
    with pytest.raises(DataError, match="matches no file"):
        expand_sources([f"{in_memory}/none-*.jsonl"])
    with pytest.raises(DataError, match="protocol nosuch, which fsspec does not know"):
        expand_sources(["nosuch://x/a.jsonl"])


def test_a_missing_driver_is_named_with_what_to_install(monkeypatch):
    def missing(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    # The package has a table of the module's name.
    monkeypatch.setattr(sys.modules["fsspec.registry"], "get_filesystem_class", missing)
    with pytest.raises(DataError, match=r"pip install 'modtrain\[s3\]'"):
        expand_sources(["s3://bucket/a.jsonl"])


def test_a_file_that_changes_while_it_is_read_is_noticed(in_memory, tmp_path, monkeypatch):
    (file,) = expand_sources([f"{in_memory}/deep/a.jsonl"])
    content = fsspec.filesystem("memory").cat_file("/bucket/deep/a.jsonl")
    assert file == expand_sources([file.path])[0]
    fsspec.filesystem("memory").pipe_file("/bucket/deep/a.jsonl", content)
    assert file != expand_sources([file.path])[0]


def test_a_web_server_without_ranges(server):
    names = "{a.jsonl,b.jsonl.gz,c.parquet,d.arrow}"
    assert read(f"{server.url}/{names}") == (DOCUMENTS, [])
    assert read(f"{server.url}/a.jsonl?token=x")[0] == DOCUMENTS[:20]
    assert read(f"{server.url}/*.parquet")[0] == DOCUMENTS[30:50]


def test_a_connection_that_breaks_is_no_end_of_a_file(server):
    server.broken = 2
    assert read(f"{server.url}/a.jsonl") == (DOCUMENTS[:20], [])
    server.broken = 100
    with pytest.raises(DataError, match=r"a\.jsonl: .*prepare continues"):
        read(f"{server.url}/a.jsonl")


def test_a_renewed_signature_does_no_work_again_and_none_is_kept(server, tmp_path, monkeypatch):
    with (server.folder / "a.jsonl").open("a") as file:
        file.write("damaged\n")

    def config(signature: str) -> Any:
        names = ("a.jsonl", "b.jsonl.gz")
        sources = [f"{server.url}/{name}?X-Amz-Signature={signature}" for name in names]
        return tiny_config(sources, tmp_path / "out")

    def written() -> bytes:
        paths = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
        return b"".join(path.read_bytes() for path in paths)

    with monkeypatch.context() as patch:
        patch.setattr("modtrain.data.prepare.pipeline.write_shards", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config("secret1"), progress=False)
    assert b"a.jsonl" in written()
    assert b"secret" not in written()
    server.asked.clear()
    report = prepare(config("secret2"), progress=False)
    # Neither for the tokenizer nor for the tokens; their sizes and versions are asked for.
    assert not server.asked
    assert "a.jsonl:21" in str(report)
    assert b"secret" not in written() + str(report).encode()


def test_addresses_that_differ_in_their_queries_are_different_files(server, tmp_path):
    first, second = expand_sources([f"{server.url}/a.jsonl?part={n}" for n in (1, 2)])
    assert first.shown == second.shown
    assert first.identity != second.identity
    assert first.identity == expand_sources([f"{server.url}/a.jsonl?part=3"])[0].identity


def test_no_message_has_a_signature(server):
    for name in ("none.jsonl", "a.unknown", "a.npy"):
        with pytest.raises(DataError) as caught:
            expand_sources(
                [f"{server.url}/{name}?X-Amz-Signature=secret".replace("//", "//u:secret@")]
            )
        assert "secret" not in str(caught.value)
        assert name in str(caught.value)
    server.broken = 100
    with pytest.raises(DataError, match="prepare continues") as caught:
        read(f"{server.url}/a.jsonl?X-Amz-Signature=secret")
    assert "secret" not in str(caught.value)


def test_a_name_has_no_signature_and_no_password():
    address = "https://user:secret@host/a/b.jsonl?X-Amz-Signature=secret#part"
    assert shown_name(address) == "https://host/a/b.jsonl"
    assert shown_name("https://user:se@cr@host/a.jsonl") == "https://host/a.jsonl"
    assert shown_name("hf://org/repo@rev/a.jsonl") == "hf://org/repo@rev/a.jsonl"
    assert shown_name("s3://bucket/a?b.jsonl") == "s3://bucket/a?b.jsonl"
    assert shown_name("a/b.jsonl") == "a/b.jsonl"
    assert names_of(["https://host/a", "s3://bucket/b"]) == ["https://host/a", "s3://bucket/b"]
