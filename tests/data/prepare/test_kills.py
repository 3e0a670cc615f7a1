"""A prepare that is killed, and workers whose parent is."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modtrain.common.errors import DataError
from modtrain.data.prepare import worker_pool
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.worker_pool import run_jobs
from modtrain.data.stream.index import ShardIndex
from tests.data.data_cases import make_documents, tiny_config, tree, write_jsonl

_PROGRAM = """
from tests.data.data_cases import tiny_config
from modtrain.data.prepare import units
from modtrain.data.prepare import worker_pool
from modtrain.data.prepare.pipeline import prepare

units.LINES_UNIT_BYTES = 10_000
if __name__ == "__main__":
    prepare(tiny_config([{source!r}], {output!r}, num_workers=2))
"""


@pytest.mark.slow
def test_a_killed_prepare_resumes_where_it_stopped(tmp_path, small_units):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(3000))
    config = tiny_config([corpus], tmp_path / "killed")
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM.format(source=str(corpus), output=config.output))
    units = tmp_path / "killed" / ".work" / "units"
    process = subprocess.Popen(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        start_new_session=True,
    )
    while process.poll() is None and len(list(units.glob("*.json"))) < 5:
        time.sleep(0.01)
    assert process.poll() is None, "ended before it could be killed"
    # The parent alone: its workers must see that and end.
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in units.glob("*.json")}
    assert len(finished) >= 5
    with pytest.raises(DataError, match="holds no finished data"):
        ShardIndex.load(tmp_path / "killed")
    _wait_for_end_of_group(process.pid)

    small_units(10_000)
    prepare(tiny_config([corpus], tmp_path / "whole"), progress=False)
    prepare(config, progress=False)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def _wait_for_end_of_group(group: int) -> None:
    deadline = time.monotonic() + 20
    while _living(group):
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
            pytest.fail("workers of a killed parent live on")
        time.sleep(0.05)


def _living(group: int) -> bool:
    """Whether a process group has a process that is more than a zombie."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group, *_ = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            return True
    return False


def test_a_worker_that_dies_is_reported():
    with pytest.raises(DataError, match="a worker process died"):
        list(run_jobs(os._exit, [3, 3], 2))


_IDLE = """
import time
from modtrain.data.prepare.worker_pool import run_jobs

if __name__ == "__main__":
    for _ in run_jobs(abs, [1, 2, 3], 2):
        print("one is done", flush=True)
        time.sleep(60)
"""


def test_idle_workers_end_with_their_parent(tmp_path):
    (tmp_path / "program.py").write_text(_IDLE)
    command = [sys.executable, str(tmp_path / "program.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"one is done\n"
        # By now the other two jobs, which take no time, are done as well.
        time.sleep(0.5)
        process.kill()
        process.wait()
        _wait_for_end_of_group(process.pid)


_BUSY = """
import sys, time
from pathlib import Path
from modtrain.cli import main as cli
from modtrain.data.prepare.worker_pool import run_jobs

def work(path):
    Path(path).touch()
    time.sleep(120)

if __name__ == "__main__":
    jobs = sys.argv[1:]
    cli._VERBS["prepare"] = (lambda words, config_dir: list(run_jobs(work, jobs, 2)), "")
    sys.argv[1:] = ["prepare"]
    sys.exit(cli.main())
"""


@pytest.mark.slow
def test_ctrl_c_ends_busy_workers_at_once_and_a_second_one_prints_nothing(tmp_path):
    (tmp_path / "program.py").write_text(_BUSY)
    marks = [tmp_path / "one", tmp_path / "two"]
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), *map(str, marks)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    ) as process:
        while not all(mark.exists() for mark in marks):
            assert process.poll() is None
            time.sleep(0.05)
        begin = time.monotonic()
        while process.poll() is None:
            # As someone who loses patience: also while the process ends.
            os.killpg(process.pid, signal.SIGINT)
            assert time.monotonic() - begin < 60, "the workers finish what they do"
            time.sleep(0.3)
        assert process.stderr is not None
        assert process.stderr.read() == "\ninterrupted: the same command resumes\n"
        assert process.returncode == 130
        _wait_for_end_of_group(process.pid)


def test_a_full_shared_memory_is_named(monkeypatch):
    def no_locks(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(worker_pool, "ProcessPoolExecutor", no_locks)
    with pytest.raises(DataError, match=r"/dev/shm: No space left.*\n.*num_workers=1"):
        list(run_jobs(abs, [1, 2], 2))
    assert list(run_jobs(abs, [1, 2], 1)) == [(0, 1), (1, 2)]
