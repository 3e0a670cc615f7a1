"""Batches from behind a URL are those of the directory on disk; what goes wrong is named."""

import json
import logging
import os
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from modtrain.common.errors import ConfigError, DataError, raise_if_any
from modtrain.data.config import DataConfig
from modtrain.data.mixture.config import SourceConfig
from modtrain.data.remote import fetched, files, fill
from modtrain.data.remote.cache import ShardCache
from modtrain.data.remote.fill import Upcoming, open_filler
from modtrain.data.remote.read_ahead import MOST_THREADS, ReadAhead
from modtrain.data.remote.shards import RemoteShards, evict_others, kept_checksums
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.index_json import read_summary
from tests.data.data_cases import prepare_packed
from tests.data.remote.servers import FaultyServer


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch):
    monkeypatch.setattr(files, "_FIRST_WAIT", 0.01)


@pytest.fixture
def server(prepared):
    with FaultyServer(prepared).serving() as server:
        yield server


def module(path, cache, world_size=1, rank=0, num_steps=6, **changes):
    """Batches of 12 samples a step, of all ranks."""
    sources = {} if isinstance(path, str | os.PathLike) else path
    own = {"path": "" if sources else str(path), "sources": sources, "cache_dir": str(cache)}
    data = TokenDataModule(
        DataConfig(**{**own, **changes}),
        micro_batch_size=3,
        accumulate=4 // world_size,
        num_steps=num_steps,
        eval_batch_size=4,
    )
    share = {"num_replicas": world_size, "rank": rank}
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=share, num_nodes=1)  # type: ignore
    return data


def tokens(data):
    return [torch.cat([b.inputs_BS, b.targets_BS[:, -1:]], 1) for b in data.train_dataloader()]


def step_rows(path, cache, world_size, **changes):
    """All batches of all ranks in the order of the stream."""
    ranks = [tokens(module(path, cache, world_size, r, **changes)) for r in range(world_size)]
    return torch.cat([torch.cat(batches) for batches in zip(*ranks, strict=True)])


@pytest.mark.parametrize(
    ("world_size", "cache_bytes"),
    [
        (1, 0),
        pytest.param(2, 100_000, marks=pytest.mark.slow),
        pytest.param(4, None, marks=pytest.mark.slow),
    ],
)
def test_the_order_is_that_of_the_directory(prepared, server, tmp_path, world_size, cache_bytes):
    expected = step_rows(prepared, tmp_path, 1)
    rows = step_rows(server.url, tmp_path, world_size, cache_bytes=cache_bytes)
    assert rows.equal(expected)


def test_seeds_positions_and_fingerprints_are_those_of_the_directory(prepared, server, tmp_path):
    local, remote = module(prepared, tmp_path), module(server.url, tmp_path)
    assert remote.fingerprint == local.fingerprint
    assert remote.sample_numbers(3) == local.sample_numbers(3)
    for data in (local, remote):
        data.start_step, data.skipped_samples = 2, [(30, 40)]
    expected = tokens(local)
    assert [rows.tolist() for rows in tokens(remote)] == [rows.tolist() for rows in expected]
    held_out = [torch.cat([b.inputs_BS for b in d.val_dataloader()]) for d in (local, remote)]
    assert held_out[0].equal(held_out[1])
    number = local.sample_numbers(2)[0]
    (shard, byte), (url, remote_byte) = (d.train_data.locate(number) for d in (local, remote))
    assert (url, remote_byte) == (f"{server.url}/train/{shard.name}", byte)


@pytest.mark.slow
def test_workers_read_what_the_training_process_does(prepared, server, tmp_path):
    expected = step_rows(prepared, tmp_path, 1)
    assert step_rows(server.url, tmp_path, 1, num_workers=2).equal(expected)


@pytest.mark.slow
def test_a_mixture_may_have_both(prepared, server, tmp_path):
    def mixture(web):
        return {"web": SourceConfig(str(web), 3.0), "code": SourceConfig(str(prepared), 1.0)}

    expected = step_rows(mixture(prepared), tmp_path, 1)
    assert step_rows(mixture(server.url), tmp_path, 2).equal(expected)


@pytest.mark.slow
def test_a_shard_that_comes_whole_is_read_from_the_disk(prepared, server, tmp_path):
    data = module(server.url, tmp_path, verify="sha256")
    expected = tokens(module(prepared, tmp_path))
    whole = sum(s.num_bytes for part in data.indexes[""].shards.values() for s in part)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) == whole
    before = server.num_requests
    assert [rows.tolist() for rows in tokens(data)] == [rows.tolist() for rows in expected]
    assert server.num_requests == before
    # Another run finds them there.
    tokens(module(server.url, tmp_path, verify="sha256"))
    assert server.num_requests - before < 10
    with pytest.raises(DataError, match=r"data\.verify=sha256 needs all .* raise data.cache_bytes"):
        tokens(module(server.url, tmp_path, verify="sha256", cache_bytes=1000))


def shards_of(url, cache, split="train", cache_bytes=None, timeout=5.0):
    index = ShardIndex.load(url, "none")
    return RemoteShards(index, split, ShardCache(cache, cache_bytes), timeout)


def test_one_process_fetches_and_the_others_wait(server, tmp_path):
    shards = [shards_of(server.url, tmp_path / "cache") for _ in range(4)]
    server.kind, server.every = "slow", 1
    before, results = server.num_requests, []
    threads = [threading.Thread(target=lambda s=s: results.append(s.fetch(0))) for s in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
    # Its size, and its content.
    assert server.num_requests - before == 2


class CountingServer(FaultyServer):
    """Counts requests by the name of the file."""

    def fault(self, handler):
        name = handler.path.rpartition("/")[2]
        self.requests[name] = self.requests.get(name, 0) + (handler.command == "GET")
        return False


def test_lengths_of_packed_rows_are_fetched_once_a_node(tmp_path, monkeypatch):
    root = prepare_packed(tmp_path, 60, 128)
    expected = [batch.inputs_BS.tolist() for batch in module(root, tmp_path).train_dataloader()]
    with CountingServer(root).serving() as server:
        server.requests = {}
        for folder, cache_bytes, fetches in ("cache", None, 1), ("cache", None, 1), ("no", 0, 2):
            # As in another process.
            monkeypatch.setattr(fetched, "_files", {})
            data = module(server.url, tmp_path / folder, cache_bytes=cache_bytes)
            assert [b.inputs_BS.tolist() for b in data.train_dataloader()] == expected
            assert server.requests["rows.npy"] == fetches
        (path,) = [
            path
            for path in (tmp_path / "cache").glob("*.tar")
            if path.stem == data.indexes[""].side_files["train/rows.npy"].sha256
        ]
        # They stay where shards go; what is damaged is fetched again.
        cache = data.train_data.shards.cache
        assert not evict_others(cache, kept_checksums(data.indexes.values()), 1)
        path.write_bytes(path.read_bytes()[:-1])
        data = module(server.url, tmp_path / "cache")
        assert [b.inputs_BS.tolist() for b in data.train_dataloader()] == expected
        assert server.requests["rows.npy"] == 3


def test_a_damaged_file_of_the_cache_is_fetched_again(server, tmp_path):
    shards = shards_of(server.url, tmp_path)
    assert shards.fetch(0)
    (path,) = tmp_path.glob("*.tar")
    content = path.read_bytes()
    path.write_bytes(content[:-512])
    assert shards.read([(0, 100, 200)]) == [content[100:200]]
    assert not path.exists()
    assert shards.fetch(0)
    assert path.read_bytes() == content


@pytest.mark.skipif(os.getuid() != 0, reason="gives a file to another user")
def test_a_file_of_somebody_else_is_not_read(server, tmp_path):
    shards = shards_of(server.url, tmp_path)
    assert shards.fetch(0)
    (path,) = tmp_path.glob("*.tar")
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    os.chown(path, 12345, 12345)
    assert shards.read([(0, 100, 200)]) == [content[100:200]]


def test_a_cache_that_is_too_small_anyway_keeps_what_others_have(server, tmp_path):
    cache = ShardCache(tmp_path, None)
    shards = shards_of(server.url, tmp_path)
    assert shards.fetch(0)
    assert not evict_others(cache, frozenset(), 1 << 40)
    assert len(list(tmp_path.glob("*.tar"))) == 1


@pytest.mark.slow
def test_a_cache_that_is_full_or_missing_loses_nothing_and_warns_once(
    prepared, server, tmp_path, monkeypatch, caplog
):
    expected = torch.cat(tokens(module(prepared, tmp_path)))
    monkeypatch.setattr(ShardCache, "_free_bytes", lambda self: 10)
    data = module(server.url, tmp_path / "full", cache_bytes=1e9)
    assert torch.cat(tokens(data)).equal(expected)
    assert len(list(data.val_dataloader())) > 1
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    without_cache = module(server.url, tmp_path / "file/cache", cache_bytes=1e9)
    assert len(list(without_cache.val_dataloader())) > 1
    assert torch.cat(tokens(without_cache)).equal(expected)
    warnings = [r.message for r in caplog.records if "data.cache_dir" in r.getMessage()]
    assert len(warnings) <= 4
    assert any("a disk that is full" in text for text in map(str, caplog.messages))


@pytest.mark.slow
def test_a_shard_that_is_not_what_the_index_has_is_named(copy_server, tmp_path):
    root, server = copy_server
    shard = root / "train/shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")
    shards = shards_of(server.url, tmp_path)
    with pytest.raises(DataError, match=r"http://.*train/shard-000001.tar: has not the checksum"):
        shards.fetch(1)
    assert not list(tmp_path.glob("*.tar")) + list(tmp_path.glob(".*"))
    shard.write_bytes(content[:-512])
    with pytest.raises(DataError, match=r"shard-000001.tar: has .* bytes on the server, not"):
        shards.read([(1, 600, 700)])
    shard.write_bytes(b"x" * len(content))
    with pytest.raises(DataError, match=r"shard-000001.tar: no tokens where the index has them"):
        shards.read([(1, 600, 700)])
    # It may be changed once it was looked at.
    assert shards.read([(0, 600, 700)])
    first = root / "train/shard-000000.tar"
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"shard-000000.tar: was changed on the server"):
        shards.read([(0, 600, 700)])
    first.unlink()
    with pytest.raises(DataError, match=r"shard-000000.tar: there is no such file"):
        shards_of(server.url, tmp_path).read([(0, 600, 700)])


@pytest.fixture
def copy_server(prepared, tmp_path_factory):
    root = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(prepared, root)
    with FaultyServer(root).serving() as server:
        yield root, server


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["throttle", "drop", "slow"])
def test_what_fails_now_and_then_is_asked_for_again(prepared, server, tmp_path, kind):
    expected = torch.cat(tokens(module(prepared, tmp_path)))
    server.kind, server.every = kind, 7
    assert torch.cat(tokens(module(server.url, tmp_path, cache_bytes=0))).equal(expected)
    assert server.num_faults > 1


@pytest.mark.slow
def test_what_always_fails_is_named(server, tmp_path, monkeypatch):
    shards = shards_of(server.url, tmp_path, timeout=0.2)
    monkeypatch.setattr(files, "_LONGEST_WAIT", 0.01)
    server.every, server.stall_seconds = 1, 1.0
    for kind, words in (
        ("forbid", "403"),
        ("throttle", "503"),
        ("stall", r"gave no answer in 0.2 s, 7 times.*fetch_timeout"),
    ):
        server.kind = kind
        with pytest.raises(DataError, match=rf"train/shard-000000.tar: .*{words}"):
            shards.read([(0, 600, 700)])


def test_a_url_that_cannot_be_read_is_a_problem_of_the_configuration():
    def message(url):
        with pytest.raises(ConfigError) as caught:
            raise_if_any(DataConfig(path=url).problems("data"))
        return str(caught.value)

    assert "data.path=nothing://x: has the protocol nothing" in message("nothing://x")
    assert "remedy: pip install 'modtrain[gcs]'" in message("gs://bucket/data")
    query = message("https://example.org/data?signature=secret")
    assert "has a query" in query
    password = message("https://user:secret@example.org/data")
    assert "has a user or a password" in password
    assert "secret" not in query + password
    source = SourceConfig("nothing://x")
    with pytest.raises(ConfigError, match=r"data.sources.web.path=nothing://x"):
        raise_if_any(DataConfig(sources={"web": source}).problems("data"))


def test_an_index_that_is_not_there_names_the_url(server):
    problems = DataConfig(path=f"{server.url}/nowhere").shard_problems("data")
    assert "/nowhere/index.json: there is no such file" in str(problems[0])


def filler_of(data, num_nodes=1, num_samples=10**6, lookup=None):
    data.trainer.num_nodes = num_nodes
    order = data.order
    upcoming = Upcoming(
        num_samples,
        lookup or (lambda first, count: order.lookup(torch.arange(first, first + count).numpy())),
        num_nodes,
        read_ahead=0,
    )
    return open_filler([(0, data.train_data)], data.indexes.values(), upcoming)


def test_without_shuffling_the_next_shards_come_first_and_the_last_needed_go(server, tmp_path):
    plain = module(server.url, tmp_path, shuffle=False)
    shards = plain.train_data.shards.shards
    size, valid = shards[0].num_bytes, plain.indexes[""].shards["valid"]
    max_bytes = 3 * size + sum(shard.num_bytes for shard in valid) + 512
    data = module(server.url, tmp_path, shuffle=False, cache_bytes=float(max_bytes))
    names = {shard.sha256: number for number, shard in enumerate(shards)}
    epoch = len(data.train_data)
    filler = filler_of(data, num_samples=epoch)
    for first in range(len(shards) - 3):
        filler.position = data.train_data.first_numbers[first]
        filler.fill()
        there = sorted(names[path.stem] for path in tmp_path.glob("*.tar"))
        assert there == [first, first + 1, first + 2]


@pytest.mark.slow
def test_a_shuffled_run_takes_whole_shards_where_it_reads_them_all(server, tmp_path):
    one_epoch = len(module(server.url, tmp_path).train_data)
    for num_nodes, epochs, comes in ((1, 1, True), (2, 1, False), (2, 2, True)):
        data = module(server.url, tmp_path / f"{num_nodes}-{epochs}")
        # A window of a part of the epoch, as of a corpus that is large.
        order = data.order
        part = lambda first, count, o=order: o.lookup(torch.arange(first, first + 64).numpy())  # noqa: E731
        filler = filler_of(data, num_nodes, epochs * one_epoch, part)
        filler.fill()
        results = len(list((tmp_path / f"{num_nodes}-{epochs}").glob("*.tar")))
        assert (results > 1) == comes


def test_the_index_is_read_once_by_a_process(server, tmp_path):
    config = DataConfig(path=server.url, cache_dir=str(tmp_path))
    read_summary(server.url)
    before = server.num_requests
    config.summary()
    assert config.shard_problems("data") == []
    assert server.num_requests == before
    assert config.tokenizer_path.read_bytes().startswith(b"{")


def test_an_index_of_many_like_shards_is_small(copy_server):
    root, _ = copy_server
    index = ShardIndex.load(root, "none")
    members = {id(shard.members) for shard in index.shards["train"][:-1]}
    content = json.loads((root / "index.json").read_text())
    assert len(members) == len(
        {json.dumps(shard["members"]) for shard in content["splits"]["train"]["shards"][:-1]}
    )


@pytest.mark.slow
def test_an_error_of_the_filler_reaches_the_run(copy_server, tmp_path, caplog):
    root, server = copy_server
    for shard in (root / "train").glob("*.tar"):
        # Behind the header and the tokens: what ranges do not see.
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    caplog.set_level(logging.ERROR)
    with pytest.raises(DataError, match="has not the checksum"):
        for _ in module(server.url, tmp_path, num_steps=60, shuffle=False).train_dataloader():
            time.sleep(0.2)


@pytest.mark.slow
def test_the_end_does_not_wait_for_a_server_that_is_silent(prepared, tmp_path):
    with FaultyServer(prepared).serving() as server:
        data = module(server.url, tmp_path, num_steps=1000, cache_bytes=0)
        loader = data.train_dataloader()
        batches = iter(loader)
        next(batches)
        while not all(future.done() for future in loader._ahead._coming):
            time.sleep(0.01)
        server.kind, server.every = "stall", 1
        for _ in range(8):
            next(batches)
        began = time.monotonic()
        batches.close()
        # Of 30 in which nothing comes, and 60 that a request has.
        assert time.monotonic() - began < 15
        server.kind = ""
        # What comes later is requested as ever.
        assert next(iter(data.train_dataloader())).inputs_BS.shape[0] == 3


def test_batches_lie_ready_beside_those_that_are_requested(prepared, server, tmp_path):
    data = module(server.url, tmp_path, num_steps=1000, cache_bytes=0)
    loader = data.train_dataloader()
    assert loader.num_ahead == 16 * 4 + MOST_THREADS
    let, started = threading.Event(), []

    def read(number):
        started.append(number)
        if number >= 24:
            let.wait(30)
        return number

    ahead = ReadAhead(read, iter(range(100)), 24 + MOST_THREADS, lambda _: let.set())
    results = iter(ahead)
    # With as many under way as ever there are, the others wait for no server.
    assert [next(results) for _ in range(24)] == list(range(24))
    assert len(started) <= 24 + MOST_THREADS
    assert ahead.is_behind
    let.set()
    assert list(results) == list(range(24, 100))
    assert not ahead.is_behind


@pytest.mark.parametrize("is_behind", [True, False])
def test_whole_shards_leave_a_slow_server_to_the_steps(server, tmp_path, monkeypatch, is_behind):
    filler = filler_of(module(server.url, tmp_path, shuffle=False))
    now = [100.0]

    def waited(seconds):
        now[0] += seconds
        return False

    monkeypatch.setattr(fill, "time", SimpleNamespace(monotonic=lambda: now[0]))
    filler._stop = SimpleNamespace(wait=waited, is_set=lambda: False)
    filler._is_behind = lambda: is_behind
    filler._chunk_began = now[0]
    busy = 0.0
    for _ in range(10):
        # A chunk for which a slow server takes 8 seconds.
        now[0] += 8
        busy += 8
        filler._give_way()
    share = busy / (now[0] - 100)
    assert share < 0.12 if is_behind else share == 1
    assert filler._num_at_once() == (1 if is_behind else 4)


@pytest.mark.parametrize("bytes_per_s", [20_000, 10**9])
def test_chunks_of_a_file_come_in_time_from_a_slow_server(monkeypatch, bytes_per_s):
    remote, now, took = files.RemoteFiles("http://127.0.0.1/data", 60), [0.0], []
    size = 1 << 26
    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(remote, "versions", lambda _: [(size, None)])

    def read_ranges(parts):
        took.append(sum(part.stop - part.start for part in parts) / bytes_per_s)
        now[0] += took[-1]
        return [bytes(part.stop - part.start) for part in parts]

    monkeypatch.setattr(remote, "read_ranges", read_ranges)
    assert sum(map(len, remote.chunks("a", size, lambda: 1))) == size
    assert max(took) < 30
    # A fast one is asked for much at a time.
    assert (len(took) < 25) == (bytes_per_s == 10**9)
