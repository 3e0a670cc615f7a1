"""A run whose data move between a disk and a URL."""

import itertools
import json
import os
import time

import pytest

from modtrain.cli.main import main
from modtrain.common.errors import DataError
from modtrain.data.remote.dataset import RemoteTokenDataset
from modtrain.data.remote.files import Range
from modtrain.inference.data_view.step_samples import samples_of
from modtrain.training.run_directory import RunDirectory
from tests.data.remote.servers import FaultyServer
from tests.helpers.ranks import outcomes_on_ranks
from tests.helpers.runs import assert_same_records, run, run_lines, stopping

pytestmark = [pytest.mark.usefixtures("no_stop_request"), pytest.mark.slow]


def test_a_run_goes_on_from_a_url_and_is_evaluated_there(prepared, tmp_path, capsys):
    with FaultyServer(prepared).serving() as server:

        def lines(name, path):
            return run_lines(path, tmp_path, name, f"data.cache_dir={tmp_path}/cache")

        with stopping(1):
            assert run(lines("one", prepared)) == "stopped"
        assert run(lines("one", server.url)) == "complete"
        assert run(lines("two", prepared)) == "complete"
        assert_same_records(tmp_path, "one", "two", atol=0)
        runs = [RunDirectory(tmp_path / name) for name in ("one", "two")]
        remote, local = ([sample.tokens for sample in samples_of(run, 3)] for run in runs)
        assert remote == local
        # Of a run that began on a disk which is gone, the place is the one of the last start.
        words = [f"runs_dir={tmp_path}", "run=one", "sequences=8", f"data_path={server.url}"]
        capsys.readouterr()
        assert main(["eval", *words]) == 0
        remote = capsys.readouterr().out
        assert main(["eval", *words[:-1], f"data_path={prepared}"]) == 0
        numbers = [line.split() for line in remote.splitlines() if "loss" in line]
        assert numbers == [
            line.split() for line in capsys.readouterr().out.splitlines() if "loss" in line
        ]
        before = server.num_requests
        assert main(["plan", "model=tiny", "budget.steps=4", f"data.path={server.url}/"]) == 0
        # Size and content of the index alone.
        assert server.num_requests - before <= 2
        manifest = json.loads((tmp_path / "one/manifest.json").read_text())
        assert manifest["starts"][-1]["data_path"] == server.url


class PartlySilentServer(FaultyServer):
    """Never answers for what lies below ``/silent``."""

    def fault(self, handler):
        if "/silent" in handler.path:
            time.sleep(60)
        return "/silent" in handler.path


def fails_on_rank_1(lines):
    """Train; on rank 1 a shard is gone in mid-run, while later requests get no answer."""
    if os.environ["RANK"] == "1":
        rows, numbers = RemoteTokenDataset._rows, itertools.count()

        def failing_rows(data, wanted):
            number = next(numbers) if data.shards.split == "train" else 0
            if number >= 14:
                data.shards.files.read_ranges([Range("silent", 0, 1)])
            if number >= 10:
                raise DataError(f"{data.shards.files.url}/shard: there is no such file")
            return rows(data, wanted)

        RemoteTokenDataset._rows = failing_rows
    return run(lines)


def test_a_shard_that_fails_on_one_rank_ends_all_of_them(prepared, tmp_path):
    with PartlySilentServer(prepared).serving() as server:
        # A rank that waited for its requests, of 60 seconds each, would be ended as stuck.
        more = ("strategy=ddp", "strategy.timeout=40", "data.cache_bytes=0", "budget.steps=60")
        lines = run_lines(server.url, tmp_path, "run", "batch.tokens=256", *more)
        outcomes = outcomes_on_ranks(fails_on_rank_1, 2, lines, joins=False, timeout=120)
        other, own = outcomes
        assert (own.kind, own.message) == (
            "DataError",
            f"{server.url}/shard: there is no such file",
        )
        assert other.kind == "RankError"
        assert other.message.startswith("rank 1 on ")
        assert other.message.endswith("/shard: there is no such file")
