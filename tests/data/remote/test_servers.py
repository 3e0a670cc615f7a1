"""An S3 API and nginx on loopback, and what befalls their answers."""

import gzip
import importlib.util
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from modtrain.common.errors import DataError
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.remote import files
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.index_json import read_summary
from tests.data.data_cases import make_documents, tiny_config, write_jsonl
from tests.data.remote.servers import FaultyProxy, find_nginx, nginx_server, s3_server
from tests.data.remote.test_stream import module, shards_of, step_rows, tokens

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

BUCKET = "bucket"


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory):
    for package in ("s3fs", "moto"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install modtrain[dev]")
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as port:
        yield port


@pytest.fixture
def environment(monkeypatch):
    """Neither keys nor profiles of this machine."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(files, "_FIRST_WAIT", 0.05)
    return monkeypatch


def keys(environment):
    environment.setenv("AWS_ACCESS_KEY_ID", "key")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.fixture
def bucket(prepared, s3_port, environment):
    """A proxy before an S3 API that holds the prepared directory, for who has keys."""
    import s3fs

    keys(environment)
    endpoint = f"http://127.0.0.1:{s3_port}"
    system = s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True)
    system.call_s3("create_bucket", Bucket=BUCKET)
    system.put(str(prepared), f"{BUCKET}/data", recursive=True)
    with FaultyProxy(s3_port).serving() as proxy:
        environment.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.system = system
        yield proxy
    system.rm(BUCKET, recursive=True)


URL = f"s3://{BUCKET}/data"


@pytest.mark.parametrize(
    ("kind", "cache_bytes"),
    [("", 0), ("", None), ("throttle", 0), ("drop", None), ("slow", None)],
)
def test_a_bucket_is_read_as_the_directory_is(prepared, bucket, tmp_path, kind, cache_bytes):
    expected = step_rows(prepared, tmp_path, 1)
    bucket.kind, bucket.every = kind, 5
    rows = step_rows(URL, tmp_path / "cache", 2, cache_bytes=cache_bytes)
    assert rows.equal(expected)
    assert (bucket.num_faults > 1) == bool(kind)


def test_a_bucket_of_which_all_is_fetched_first(prepared, bucket, tmp_path):
    data = module(URL, tmp_path, verify="sha256")
    bucket.kind, bucket.every = "throttle", 4
    expected = torch.cat(tokens(module(prepared, tmp_path)))
    assert torch.cat(tokens(data)).equal(expected)
    assert data.fingerprint == module(prepared, tmp_path).fingerprint


def test_without_keys_a_bucket_is_refused_with_the_reason(bucket, environment, tmp_path):
    assert read_summary(URL).seq_len == 16
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match=r"s3://bucket/data/.*[Cc]redentials"):
        shards_of(f"{URL}/../data", tmp_path)


def test_a_public_bucket_needs_no_keys(prepared, bucket, environment, tmp_path):
    """As fsspec's own configuration says; no key of it is modtrain's."""
    from fsspec.config import conf

    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    environment.setitem(conf, "s3", {"anon": True})
    for path in bucket.system.find(f"{BUCKET}/data"):
        name = path.removeprefix(f"{BUCKET}/")
        bucket.system.call_s3("put_object_acl", Bucket=BUCKET, Key=name, ACL="public-read")
    expected = step_rows(prepared, tmp_path, 1)
    assert step_rows(URL, tmp_path / "cache", 1).equal(expected)


def test_an_object_that_changes_is_named(prepared, bucket, tmp_path):
    shards = shards_of(URL, tmp_path)
    assert shards.read([(0, 600, 700)])
    first = next((prepared / "train").glob("shard-000000.tar"))
    bucket.system.pipe_file(f"{BUCKET}/data/train/{first.name}", first.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"s3://.*shard-000000.tar: was changed on the server"):
        shards.read([(0, 600, 700)])
    with pytest.raises(DataError, match=r"s3://.*shard-000000.tar: has not the checksum"):
        shards.fetch(0)
    bucket.system.rm_file(f"{BUCKET}/data/train/{first.name}")
    with pytest.raises(DataError, match=r"s3://.*shard-000000.tar: there is no such file"):
        shards_of(URL, tmp_path).read([(0, 600, 700)])


def test_a_request_that_stalls_is_made_again(prepared, bucket, tmp_path):
    expected = torch.cat(tokens(module(prepared, tmp_path)))
    data = module(URL, tmp_path, fetch_timeout=1.0, cache_bytes=0)
    len(data.train_data)
    bucket.kind, bucket.every, bucket.left, bucket.stall_seconds = "stall", 25, 4, 20
    assert torch.cat(tokens(data)).equal(expected)
    assert bucket.num_faults == 4


def test_nginx_is_read_as_the_directory_is(prepared, tmp_path, environment):
    nginx = find_nginx()
    if nginx is None:
        pytest.skip("nginx is not installed: apt install nginx-light")
    root = tmp_path / "root"
    shutil.copytree(prepared, root / "data")
    (tmp_path / "nginx").mkdir()
    with nginx_server(nginx, root, tmp_path / "nginx") as url:
        expected = step_rows(prepared, tmp_path, 1)
        for cache_bytes in (0, None):
            rows = step_rows(f"{url}/data", tmp_path / "cache", 4, cache_bytes=cache_bytes)
            assert rows.equal(expected)
        shards = shards_of(f"{url}/data", tmp_path / "other")
        assert shards.read([(0, 600, 700)])
        shard = Path(root, "data/train", ShardIndex.load(root / "data").shards["train"][0].name)
        content = shard.read_bytes()
        # nginx tells versions apart by time and size.
        shard.write_bytes(content[:-1] + b"x")
        os.utime(shard, (1, 1))
        with pytest.raises(DataError, match="was changed on the server"):
            shards.read([(0, 600, 700)])


def test_a_server_without_ranges_is_named(prepared, tmp_path, environment, caplog):
    """Python's own server answers a range with all of the file."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    environment.setattr(files, "_LONGEST_WAIT", 0.05)
    caplog.set_level(logging.ERROR)
    handler = partial(SimpleHTTPRequestHandler, directory=str(prepared))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        shards = shards_of(f"http://127.0.0.1:{server.server_port}", tmp_path)
        with pytest.raises(DataError, match="the server has no HTTP ranges"):
            shards.read([(0, 600, 700)])
        server.shutdown()


def test_a_corpus_in_a_bucket_is_prepared(bucket, environment, tmp_path):
    import s3fs
    from fsspec.config import conf

    texts = make_documents(60)
    corpus = write_jsonl(tmp_path / "a.jsonl", texts[:40])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(write_jsonl(tmp_path / "b.jsonl", texts[40:]).read_bytes()))
    for path in (corpus, packed):
        bucket.system.put(str(path), f"{BUCKET}/corpus/{path.name}")
    local = prepare(tiny_config([str(corpus), str(packed)], tmp_path / "local"), progress=False)
    sources = [f"s3://{BUCKET}/corpus/*"]
    there = prepare(tiny_config(sources, tmp_path / "there"), progress=False)
    assert there.summary.fingerprint == local.summary.fingerprint
    assert prepare(tiny_config(sources, tmp_path / "there"), progress=False).was_complete
    # Who has no keys is told so, and a public bucket needs none.
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        environment.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"s3://bucket/corpus/.*[Cc]redentials"):
        prepare(tiny_config(sources, tmp_path / "none"), progress=False)
    environment.setitem(conf, "s3", {"anon": True})
    s3fs.S3FileSystem.clear_instance_cache()
    bucket.system.call_s3("put_bucket_acl", Bucket=BUCKET, ACL="public-read")
    for path in (corpus, packed):
        name = f"corpus/{path.name}"
        bucket.system.call_s3("put_object_acl", Bucket=BUCKET, Key=name, ACL="public-read")
    public = prepare(tiny_config(sources, tmp_path / "public"), progress=False)
    assert public.summary.fingerprint == local.summary.fingerprint
