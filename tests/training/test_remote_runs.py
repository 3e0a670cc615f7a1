"""A run whose data move between a disk and a URL."""

import json

import pytest

from modtrain.cli.main import main
from modtrain.inference.data_view.step_samples import samples_of
from modtrain.training.run_directory import RunDirectory
from tests.data.remote.servers import FaultyServer
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
