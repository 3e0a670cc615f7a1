"""What `modtrain status` and `logs` do without a Slurm, or with a played one."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from modtrain.cli.compose import compose
from modtrain.cli.main import main
from modtrain.cluster import logs, slurm
from modtrain.cluster.config import StatusConfig
from modtrain.cluster.runs import RunNotFoundError, lines_from_end, read_job_ids, read_run
from modtrain.cluster.slurm import SlurmError, SlurmJob
from modtrain.cluster.status import live_jobs, state_of
from modtrain.common.spelling import spelled
from modtrain.training.run_listing import find_runs
from tests.cluster.fake_runs import FakeRun, Group, iso, line, locked, play, shown


def test_states_follow_from_the_files(tmp_path):
    run = FakeRun(tmp_path / "r")
    assert run.state() == ("never started", "")
    run.starts(100)
    assert run.state() == ("stopped", "")
    run.failed(200, "an old one")
    assert run.state() == ("stopped", "")
    run.failed(50, "CUDA is gone")
    assert run.state() == ("failed", "CUDA is gone")
    with locked(run.path):
        assert run.state()[0] == "running"
    run.starts(100, 20)
    assert run.state() == ("stopped", "")
    # What is left where a disk was full is no end.
    (run.path / "COMPLETED").touch()
    assert run.state() == ("stopped", "")
    run.ended()
    assert run.state() == ("complete", "")


@pytest.mark.parametrize(
    ("job", "state", "why"),
    [
        (SlurmJob("7", "RUNNING"), "running", ""),
        (SlurmJob("7", "COMPLETING"), "running", ""),
        (SlurmJob("7", "SUSPENDED"), "running", "suspended"),
        (SlurmJob("7", "PENDING", "Priority"), "pending", "Priority"),
        (SlurmJob("7", "CONFIGURING"), "pending", "configuring"),
        (SlurmJob("7", "TIMEOUT", "TimeLimit"), "stopped", "job 7: timeout (TimeLimit)"),
        (SlurmJob("7", "OUT_OF_MEMORY"), "failed", "job 7: out of memory"),
        (SlurmJob("7", "NODE_FAIL"), "failed", "job 7: node fail"),
        (SlurmJob("7", "FAILED", "NonZeroExitCode"), "stopped", "job 7: failed (NonZeroExitCode)"),
        (SlurmJob("7_3", "RUNNING"), "running", ""),
        (SlurmJob("8", "RUNNING"), "stopped", ""),
        (SlurmJob("71", "RUNNING"), "stopped", ""),
        (SlurmJob("7", "RUNNING", command="/elsewhere/other/submit.sbatch"), "stopped", ""),
        (SlurmJob("7", "RUNNING", command="/mnt/runs/r/submit.sbatch"), "running", ""),
    ],
)
def test_slurm_counts_as_well(tmp_path, job, state, why):
    assert FakeRun(tmp_path / "r").starts(9).jobs("7").state(job) == (state, why)


def test_a_job_that_died_before_the_start_failed(tmp_path):
    run = FakeRun(tmp_path / "r").jobs("7")
    failed = SlurmJob("7", "FAILED", "NonZeroExitCode")
    assert run.state(failed) == ("failed", "job 7: failed (NonZeroExitCode)")
    assert run.state(SlurmJob("7", "CANCELLED"))[0] == "never started"


def test_a_requeued_job_names_the_cause(tmp_path):
    run = FakeRun(tmp_path / "r").starts(60).jobs("7").failed(5, "rank 3 died")
    pending = SlurmJob("7", "PENDING", "BeginTime")
    assert run.state(pending)[1] == "BeginTime; failed before: rank 3 died"
    assert run.state(SlurmJob("7", "RUNNING"))[1] == ""


def test_a_cancelled_run_is_shown_as_cancelled(tmp_path):
    run = FakeRun(tmp_path / "r").starts(60).jobs("7")
    (run.path / "CANCELLED").write_text("7\n")
    assert run.state() == ("stopped", "cancelled")
    assert run.jobs("8").state() == ("stopped", "")


@pytest.mark.parametrize(
    "budget", [["budget.steps=70"], ["budget.tokens=20e3"], ["budget.flops=1e11"]]
)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_steps_are_those_of_the_plan(tmp_path, budget, schedule):
    from modtrain.training.plan import derive

    run = FakeRun(tmp_path / "r", *budget, f"capacity_schedule={schedule}")
    status = run.read()
    assert status.steps == derive(run.config).steps > 10
    assert status.notes == []


def test_losses_are_the_last_ones_whatever_is_between(tmp_path):
    filler = {f"router/{n}": 0.5 for n in range(50)}
    held_out = [{"step": 2, "loss": 9.0, "held_out/causal_loss": 4.25}]
    records = [{"step": n, "loss": n / 10, **filler} for n in range(3, 203)]
    run = FakeRun(tmp_path / "r").records(*held_out, *records)
    status = run.read()
    assert (status.step, status.loss, status.held_out) == (202, 20.2, 4.25)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 203, "loss": 1.0, "rou')
    assert run.read().step == 202
    assert run.saved(150, 204).read().step == 204
    assert run.read().saved[0] == 204


def test_a_copy_under_the_name_of_another_step_is_no_checkpoint_of_it(tmp_path):
    run = FakeRun(tmp_path / "r").saved(8, 12)
    for name in ("step-best", "step-000000016"):
        shutil.copytree(run.path / "checkpoints/step-000000008", run.path / "checkpoints" / name)
    assert run.read().saved[0] == 12


def test_a_directory_that_may_not_be_read_is_reported():
    """Its names may be listed, and nothing in it be looked at; root may do everything."""
    user = os.geteuid()
    # Not below pytest's own directory, which is its user's alone.
    with TemporaryDirectory() as folder:
        runs = Path(folder)
        run = FakeRun(runs / "r").saved(8)
        runs.chmod(0o755)
        run.path.chmod(0o444 if user == 0 else 0o400)
        if user == 0:
            os.seteuid(65534)
        try:
            text = shown(StatusConfig(runs_dir=folder))
            with pytest.raises(RunNotFoundError, match=r"/r cannot be read(.|\n)*remedy"):
                shown(StatusConfig(run="r", runs_dir=folder))
        finally:
            os.seteuid(user)
            run.path.chmod(0o755)
    assert f"{run.path} cannot be read: permission denied" in text


@pytest.mark.timeout(20)
def test_pipes_and_links_to_devices_are_noted_and_not_waited_for(tmp_path):
    run = FakeRun(tmp_path / "r").saved(8)
    for name in ("manifest.json", "metrics.jsonl", "failures.tsv"):
        (run.path / name).unlink(missing_ok=True)
        os.mkfifo(run.path / name)
    (run.path / "failure.json").symlink_to("/dev/zero")
    (run.path / "config.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\n")
    record = run.read()
    assert record.saved[0] == 8
    noted = ("manifest.json", "metrics.jsonl", "failures.tsv", "failure.json", "config.yaml")
    for name in noted:
        assert any(name in note for note in record.notes), name


def test_a_file_of_any_length_is_read_from_its_end(tmp_path):
    file = tmp_path / "f"
    texts = [b"a" * n for n in (0, 1, 70_000, 3, 0, 200_000, 5)]
    file.write_bytes(b"\n".join(texts))
    assert list(lines_from_end(file)) == texts[::-1]
    reader = lines_from_end(file, max_bytes=1)
    assert len(next(reader)) == 5
    file.write_bytes(b"")
    assert list(lines_from_end(file)) == []
    file.write_bytes(b"x" * 5_000_000)
    assert list(lines_from_end(file, max_bytes=2**20)) == []


def test_metrics_are_not_read_whole(tmp_path):
    run = FakeRun(tmp_path / "r")
    with (run.path / "metrics.jsonl").open("wb") as file:
        file.write(b'{"step": 1, "loss": 5.0, "held_out/causal_loss": 5.0}\n')
        file.truncate(2**33)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"step": 3, "loss": 2.0}\n')
    started = time.perf_counter()
    status = run.read()
    assert time.perf_counter() - started < 1
    assert (status.step, status.loss, status.held_out) == (3, 2.0, None)


def test_the_names_are_those_that_training_writes():
    from modtrain.checkpoint.layout import MANIFEST, checkpoint_path
    from modtrain.cluster.runs import HELD_OUT
    from modtrain.training.metric_names import CAUSAL_LOSS

    assert HELD_OUT == CAUSAL_LOSS
    assert checkpoint_path(Path(), 7).name == "step-000000007"
    assert MANIFEST == "manifest.json"


def test_a_damaged_run_hides_no_other(tmp_path):
    for name in ("a", "b", "c"):
        FakeRun(tmp_path / name).starts(60).records({"step": 5, "loss": 2.5})
    (tmp_path / "b/config.yaml").write_text("budget: [")
    (tmp_path / "b/manifest.json").write_bytes(b"\xff\x00{")
    (tmp_path / "b/jobs.jsonl").write_text('7\n{"job"\n{"job": "9"}\n')
    assert read_job_ids(tmp_path / "b") == ["9"]
    (tmp_path / "b/failures.tsv").write_text("half a li\n" + f"{iso(3)}\t9\t0\tthe disk is full\n")
    (tmp_path / "b/failure.json").write_text("{}")
    (tmp_path / "c/metrics.jsonl").write_bytes(os.urandom(5000))
    (tmp_path / "c/checkpoints").write_text("no directory")
    text = shown(StatusConfig(runs_dir=str(tmp_path)))
    rows = {row.split()[1]: row for row in text.splitlines() if row.startswith("│")}
    assert "2.5000" in rows["a"] and "5/100" in rows["a"] and "5%" in rows["a"]
    assert "2.5000" in rows["b"] and "5/?" in rows["b"] and "the disk is full" in rows["b"]
    assert "c" in rows
    for file in ("b/config.yaml", "b/manifest.json", "b/failure.json", "c/checkpoints"):
        assert f"{tmp_path / file} cannot be read" in text
    assert "3 runs: 1 failed, 2 stopped" in text


def test_runs_are_found_at_any_depth_and_only_once(tmp_path):
    for name in ("sweep/lr=1,a=2", "sweep", "one", "deep/er/still"):
        FakeRun(tmp_path / name) if name != "sweep" else (tmp_path / "sweep/jobs.jsonl").touch()
    FakeRun(tmp_path / "one/code/runs/frozen")
    FakeRun(tmp_path / ".hidden/x")
    (tmp_path / "sweep/again").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    paths = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert paths == ["deep/er/still", "one", "sweep", "sweep/lr=1,a=2"]
    assert find_runs(tmp_path / "none") == []


def test_a_run_before_its_end_is_not_shown_as_complete(tmp_path):
    FakeRun(tmp_path / "r", "budget.steps=10000").records({"step": 9999, "loss": 2.0})
    assert "99.9%" in shown(StatusConfig(runs_dir=str(tmp_path)))


def test_a_linked_directory_of_runs_is_looked_into(tmp_path):
    FakeRun(tmp_path / "scratch/far")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/big").symlink_to(tmp_path / "scratch")
    assert [path.name for path in find_runs(tmp_path / "runs")] == ["far"]


def test_slurm_is_asked_once_for_all_runs_and_not_for_complete_ones(tmp_path, monkeypatch):
    folder = play(monkeypatch, tmp_path, line("71", "PENDING", "Resources", command=""))
    root = tmp_path / "runs"
    FakeRun(root / "a").jobs("71", "72")
    FakeRun(root / "b").starts(9).jobs("81")
    FakeRun(root / "c").jobs("91").ended()
    text = shown(StatusConfig(runs_dir=str(root)))
    (call,) = (folder / "calls").read_text().splitlines()
    assert call.split()[-1] == "--jobs=71,72,81"
    row = next(row for row in text.splitlines() if row.startswith("│ a"))
    assert "pending" in row and "71" in row and "Resources" in row


def test_slurm_that_does_not_answer_is_reported_below_the_table(tmp_path, monkeypatch):
    play(monkeypatch, tmp_path, code=1, error="Unable to contact slurm controller")
    FakeRun(tmp_path / "runs/a").starts(9).jobs("71")
    text = shown(StatusConfig(runs_dir=str(tmp_path / "runs")))
    assert "stopped" in text and "Unable to contact slurm controller" in text
    assert "scontrol ping" in text


def test_one_run_in_detail(tmp_path, monkeypatch):
    start = "2031-01-02T03:04:05"
    play(monkeypatch, tmp_path, line("71", "PENDING", "Priority", start, "2", ""))
    root = tmp_path / "my runs"
    run = FakeRun(root / "s/lr=0.1,b=2").starts(600, 500, 60).jobs("70", "71").saved(40)
    run.records({"step": 40, "loss": 2.0, "held_out/causal_loss": 2.25})
    for number in range(7):
        run.failed(50 - number, f"cause {number} [red]of it", step=40)
    text = shown(StatusConfig(run="s/lr=0.1,b=2", runs_dir=str(root)))
    for expected in (
        *("pending: Priority", "40/100 40%", "2.0000", "2.2500", "step 40", "70: over"),
        *(f"expected to start at {start}", "requeued 2 times", "cause 6 [red]of it", "cause 2"),
    ):
        assert expected in text, expected
    assert "cause 1" not in text
    follow = next(row for row in text.splitlines() if row.startswith("to follow: "))
    words = shlex.split(follow.removeprefix("to follow: "))
    assert words[:2] == ["modtrain", "logs"]
    config = compose("logs", words[2:])
    assert (config.run, config.runs_dir, config.follow) == ("s/lr=0.1,b=2", str(root), True)


@pytest.mark.parametrize(
    "value",
    ["a/b-1.x", "123_4", "12", "007", "1e5", "null", "a=1,b='x \"y'", "a\\", "[1]", "$(x) `y`"],
)
def test_overrides_are_spelt_so_that_they_come_back(value):
    (word,) = shlex.split(spelled("run", value))
    assert compose("logs", [word]).run == value


def test_json_and_tables_of_squeue_are_read_whatever_a_path_holds():
    odd = "/runs/a b|c\nd\n/submit.sbatch"
    text = line("12", "RUNNING", restarts="3", command=odd) + line("13_4", "PENDING", "Dependency")
    first, second = slurm.parse_jobs(text)
    assert (first.id, first.state, first.reason, first.restarts) == ("12", "RUNNING", "", 3)
    assert (first.command, first.nodes, first.start) == (odd, "node[1-2]", None)
    assert (second.id, second.reason) == ("13_4", "Dependency")
    assert slurm.parse_jobs("") == []


def test_an_array_has_the_state_of_its_most_active_task(tmp_path, monkeypatch):
    states = {"0": "COMPLETED", "10": "RUNNING", "2": "PENDING", "1": "RUNNING"}
    tasks = "".join(line(f"5_{task}", state) for task, state in states.items())
    play(monkeypatch, tmp_path, tasks)
    jobs = slurm.jobs(["5"])
    assert jobs["5"].id in ("5_1", "5_10")
    assert jobs["5_2"].is_pending and jobs["5_0"].is_finished
    run = FakeRun(tmp_path / "submit").jobs("5").read()
    same = {name: SlurmJob(job.id, job.state) for name, job in jobs.items()}
    assert [job.id for job in live_jobs(run.submitted, same)] == ["5_1", "5_10", "5_2"]


def test_a_single_unknown_job_is_no_error(tmp_path, monkeypatch):
    play(monkeypatch, tmp_path, code=1, error="slurm_load_jobs error: Invalid job id specified")
    assert slurm.jobs(["5"]) == {}
    assert slurm.jobs([]) == {}


def test_errors_of_slurm_name_command_words_and_remedy(tmp_path, monkeypatch):
    play(monkeypatch, tmp_path, code=3, error="Access/permission denied")
    with pytest.raises(SlurmError, match=r"(?s)scancel 'a b' failed with 3: Acc.*remedy: .*user"):
        slurm.run(["scancel", "a b"])
    with pytest.raises(SlurmError, match=r"(?s)nothing_there is not on the PATH.*login node"):
        slurm.run(["nothing_there"])
    with pytest.raises(SlurmError, match=r"sleep 5 did not answer in 0.1 s"):
        slurm.run(["sleep", "5"], timeout=0.1)


@pytest.mark.parametrize(
    ("name", "is_passed"),
    [
        *[(name, False) for name in ("SQUEUE_STATES", "SLURM_TIME_FORMAT", "SBATCH_TIMELIMIT")],
        # What the job is in which somebody submits another, and what it has.
        *[("SLURM_" + name, False) for name in ("MEM_PER_CPU", "GPUS_PER_TASK", "EXPORT_ENV")],
        *[("SLURM_" + name, False) for name in ("JOB_ID", "ARRAY_TASK_ID", "CONF_OF_MINE")],
        ("SLURM_SPANK__SLURM_SPANK_OPTION_pyxis_container_image", False),
        ("_SLURM_SPANK_OPTION_pyxis_container_image", False),
        *[(name, True) for name in ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")],
        *[(name, True) for name in ("SBATCH_ACCOUNT", "OMP_NUM_THREADS")],
    ],
)
def test_slurm_sees_of_the_environment_what_is_for_it(name, is_passed, monkeypatch):
    monkeypatch.setenv(name, "mine")
    assert (f"{name}=mine" in slurm.run(["env"]).splitlines()) == is_passed


def test_logs_show_the_newest_job_that_has_begun(tmp_path, capsys):
    run = FakeRun(tmp_path / "r").jobs("7", "8", "9")
    (run.path / "logs").mkdir()
    for name in ("7", "8"):
        text = "".join(f"{name}: line {n}\n" for n in range(100))
        (run.path / f"logs/slurm-{name}.out").write_text(text)
    asked = ["logs", "run=r", f"runs_dir={tmp_path}"]
    assert main([*asked, "lines=2"]) == 0
    assert capsys.readouterr().out == "8: line 98\n8: line 99\n"
    assert main([*asked, "job=7", "lines=1"]) == 0
    assert capsys.readouterr().out == "7: line 99\n"
    assert main([*asked, "job=9"]) == 1
    assert "its jobs are job=9, job=8, job=7" in capsys.readouterr().err
    assert main([*asked, "job=x"]) == 2
    (run.path / "logs/slurm-9.out").write_text("")
    assert main([*asked, "job=9"]) == 0
    assert "slurm-9.out is empty" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["logs", "run=empty", f"runs_dir={tmp_path}"]) == 1
    assert "has printed nothing yet" in capsys.readouterr().err
    assert main(["logs", "run=none", f"runs_dir={tmp_path}"]) == 1
    assert "there is no run" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, 1, 50, 65_535, 65_536, 200_000])
@pytest.mark.parametrize("ended", [True, False])
def test_the_last_lines_are_found(tmp_path, size, ended):
    file = tmp_path / "f"
    content = b"first\n" + b"x" * size + b"\nmiddle\nlast" + b"\n" * ended
    file.write_bytes(content)
    for lines in range(6):
        expected = content.splitlines(keepends=True)[-lines:] if lines else []
        assert content[logs.offset_of_last(file, lines) :] == b"".join(expected)


def test_a_run_without_a_job_shows_its_records(tmp_path, capsys):
    run = FakeRun(tmp_path / "r").records(
        {"step": 10, "loss": 3.5, "flops": 2e9, "throughput/tokens_per_second": 1234.5},
        {"step": 10, "held_out/causal_loss": 3.75, "flops": 2e9},
    )
    assert main(["logs", "run=r", f"runs_dir={tmp_path}"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 10/100  loss 3.5000  tokens/s 1,234  FLOPs 2e+09"
    assert second == "step 10/100  held-out loss 3.7500  FLOPs 2e+09"
    # What is no record is left out.
    whole = (run.path / "metrics.jsonl").read_text()
    (run.path / "metrics.jsonl").write_text("null\n[1]\n" + "[" * 100_000 + "\n" + whole)
    assert main(["logs", "run=r", f"runs_dir={tmp_path}"]) == 0
    assert capsys.readouterr().out.splitlines() == [first, second]
    (run.path / "logs").mkdir()
    (run.path / "logs/job.log").write_text("said by a sweep's job\n")
    assert main(["logs", "run=r", f"runs_dir={tmp_path}"]) == 0
    assert capsys.readouterr().out == "said by a sweep's job\n"


def test_logs_follow_until_the_lock_is_released(tmp_path):
    run = FakeRun(tmp_path / "r").starts(9).records({"step": 1, "loss": 3.0})
    program = (
        "import sys\nfrom modtrain.cli.main import main\nfrom modtrain.cluster import logs\n"
        "logs._POLL_SECONDS = logs._SLURM_POLL_SECONDS = 0.05\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "logs", "run=r", f"runs_dir={tmp_path}"]
    with (
        locked(run.path),
        subprocess.Popen([*command, "follow=true"], stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            assert "step 1/100" in process.stdout.readline()
            run.records({"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5})
            assert "step 2/100  loss 2.5" in process.stdout.readline()
            assert process.poll() is None
            (run.path / ".lock").unlink()
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_logs_into_a_closed_pipe_end_quietly(tmp_path):
    run = FakeRun(tmp_path / "r").jobs("7")
    (run.path / "logs").mkdir()
    (run.path / "logs/slurm-7.out").write_text("x\n" * 500)
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "modtrain", "logs", "run=r", f"runs_dir={tmp_path}"]
    try:
        done = subprocess.run(
            command, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_group_is_shown_while_its_job_is_live_and_never_counted(tmp_path, monkeypatch):
    folder = play(monkeypatch, tmp_path, line("7_1", "PENDING", "Priority", command=""))
    root = tmp_path / "runs"
    Group(root / "sweep")
    for name in ("a", "b"):
        FakeRun(root / "sweep" / name).starts(60).ended()
    config = StatusConfig(runs_dir=str(root))
    text = shown(config)
    row = next(row for row in text.splitlines() if "│ sweep " in row)
    assert "pending" in row and "7_1" in row and "Priority" in row
    assert "\n2 runs: 2 complete" in text
    (folder / "output").write_text("")
    text = shown(config)
    assert "│ sweep " not in text and "never started" not in text
    assert "\n2 runs: 2 complete" in text
    text = shown(StatusConfig(run="sweep", runs_dir=str(root)))
    assert "over" in text and "7: over" in text and "2 runs: 2 complete" in text
    assert "never started" not in text


def test_a_group_without_a_script_is_known_by_its_runs(tmp_path):
    root = tmp_path / "sw"
    FakeRun(root / "a").starts(60).ended()
    (root / "jobs.jsonl").write_text('{"job": "7"}\n')
    assert "\n1 run: 1 complete" in shown(StatusConfig(runs_dir=str(tmp_path)))


@pytest.mark.parametrize("own", ["config.yaml", "submitted.yaml", "submit.sbatch"])
def test_a_run_above_others_is_one_of_its_own(tmp_path, own):
    FakeRun(tmp_path / "r/below").starts(9)
    (tmp_path / "r" / own).write_text("{}")
    (tmp_path / "r/jobs.jsonl").write_text('{"job": "7"}\n')
    assert not read_run(tmp_path / "r", "r").is_group
    assert "2 runs: 1 stopped, 1 never started" in shown(StatusConfig(runs_dir=str(tmp_path)))


@pytest.mark.parametrize("verb", ["search", "compare", "prepare"])
def test_a_failed_group_names_its_cause(tmp_path, verb):
    group = Group(tmp_path / "g", f"{verb}.sbatch")
    assert group.state() == ("over", "")
    assert group.state(SlurmJob("7", "PENDING", "Resources")) == ("pending", "Resources")
    assert group.state(SlurmJob("7", "OUT_OF_MEMORY")) == ("failed", "job 7: out of memory")
    group.failed(verb, 500)
    group.printed(498)
    assert group.state() == ("failed", "the study is damaged")
    assert "the study is damaged" in shown(StatusConfig(run="g", runs_dir=str(tmp_path)))
    assert group.state(SlurmJob("7", "RUNNING")) == ("running", "")
    # It came back, and ended without another word of failure.
    group.printed(100)
    assert group.state() == ("over", "")
    group.printed(498)
    group.submitted("8", 400)
    assert group.state() == ("over", "")


def test_the_end_of_an_arrays_task_is_that_of_its_run(tmp_path):
    group = Group(tmp_path / "g")
    # Slurm's answer under the array's number is that of one of its tasks.
    state = state_of(read_run(group.path, "g"), {"7": SlurmJob("7_3", "OUT_OF_MEMORY")})
    assert state.name == "over"


def test_a_group_that_stopped_has_not_failed(tmp_path):
    group = Group(tmp_path / "g", "search.sbatch")
    ended = SlurmJob("7", "FAILED", "NonZeroExitCode")
    assert group.state(ended)[0] == "failed"
    FakeRun(group.path / "trial").starts(9)
    assert group.state(ended) == ("over", "")


def test_status_is_quick_and_loads_no_torch(tmp_path):
    FakeRun(tmp_path / "runs/r").starts(9)
    code = (
        "import sys\nfrom modtrain.cli.main import main\n"
        "for verb in (['status'], ['status', 'run=r'], ['logs', 'run=r', 'lines=1'],"
        " ['cancel', 'run=r']): main(verb)\n"
        "print([name for name in ('torch', 'lightning', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_mistakes_are_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0
    assert "there are no runs in runs" in capsys.readouterr().out
    assert main(["status", "run=a", "sweep=b"]) == 2
    assert main(["status", "run=a"]) == 1
    assert main(["status", "sweep=a"]) == 1
    assert main(["logs", "run=a", "lines=-1"]) == 2


def test_a_real_run_is_shown(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *tiny, "name=group/a"]) == 0
    capsys.readouterr()
    assert main(["status", "run=group"]) == 0
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "runs/group/a/result.json").read_text())
    for expected in ("group/a", "complete", "12/12", "100%", "12, ", f"{result['loss']:.4f}"):
        assert expected in text, expected
    (tmp_path / "runs/group/a/COMPLETED").unlink()
    status = read_run(tmp_path / "runs/group/a", "a")
    assert (status.step, status.steps, status.saved[0]) == (12, 12, 12)
    assert status.loss == pytest.approx(result["loss"])
    assert status.held_out == pytest.approx(result["held_out/causal_loss"])
    assert (len(status.starts), status.notes) == (1, [])


def test_a_job_by_hand_is_known_by_its_script(tmp_path):
    """Slurm's command of it has the script's arguments as well."""
    run = FakeRun(tmp_path / "x").starts(60)
    entry = {"job": "61", "script": "/w/slurm/train.sbatch"}
    (tmp_path / "x/jobs.jsonl").write_text(json.dumps(entry) + "\n")
    job = SlurmJob("61", "RUNNING", command="/w/slurm/train.sbatch name=x model=tiny")
    assert run.state(job) == ("running", "")
    assert run.state(replace(job, command="/w/slurm/train.sbatch2 name=x"))[0] != "running"


def test_evaluations_are_listed_and_are_not_the_runs_state(tmp_path, monkeypatch):
    run = FakeRun(tmp_path / "x").starts(60).records({"step": 100, "loss": 1.0}).ended()
    for entry in ({"job": "61"}, {"job": "62", "verb": "eval"}):
        with (run.path / "jobs.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
    play(monkeypatch, tmp_path, line("62", "PENDING", "DependencyNeverSatisfied"))
    text = shown(StatusConfig(run="x", runs_dir=str(tmp_path)))
    assert "62: pending (DependencyNeverSatisfied)" in text
    assert run.read().job_ids == ["61"]
    assert run.state()[0] == "complete"


def test_a_job_that_still_runs_is_not_over(tmp_path, monkeypatch):
    FakeRun(tmp_path / "x").starts(60).ended().jobs("61")
    play(monkeypatch, tmp_path, line("61", "RUNNING", command=""))
    assert "61: running" in shown(StatusConfig(run="x", runs_dir=str(tmp_path)))


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(RunNotFoundError, match="is no directory"):
        shown(StatusConfig(runs_dir=str(tmp_path / "nope")))


def test_a_bad_node_is_named(tmp_path):
    (FakeRun(tmp_path / "x").path / "failures.tsv").write_text(
        f"{iso(9)}\t7\t0\tno hydra\tnode2\n{iso(5)}\t7\t4\tolder\n"
    )
    failures = read_run(tmp_path / "x", "x").failures
    assert [(f.cause, f.node) for f in failures] == [("no hydra", "node2"), ("older", "")]
