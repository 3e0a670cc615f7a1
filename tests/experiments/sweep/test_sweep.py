"""Sweeps: real runs in forked processes, their directories, their ends, and what kills leave."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import metadata

# Loaded here, so that each forked job has it and need not load it.
import modtrain.training.run  # noqa: F401
from modtrain.cli import main as cli
from modtrain.common.errors import CheckpointError
from modtrain.experiments.sweep import hydra_multirun as sweep_hydra
from modtrain.experiments.sweep import job_process as sweep_process
from modtrain.experiments.sweep.job_process import ProgressLines, is_in_use, state_of
from modtrain.experiments.sweep.jobs import expand, job_name
from modtrain.experiments.sweep.sweep_status import sweep_table
from modtrain.training.metrics_log import read_metrics
from modtrain.training.run_directory import RunDirectory
from tests.conftest import fork_modtrain, run_modtrain
from tests.helpers.saved import assert_same_bits, newest_tensors
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_stop_request")

STEPS = 24
CAPACITIES = "model.capacity=0.25,0.5"
ON_SLURM = ("hydra/launcher=slurm", "cluster=cpu")


@pytest.fixture
def arguments(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep = [o for o in tiny if not o.startswith("budget")]

    def of(*more, steps=4, name="s"):
        return ["train", "-m", *keep, f"budget.steps={steps}", f"name={name}", *more]

    return of


def parsed(*overrides):
    return [OverridesParser.create().parse_override(text) for text in overrides]


def jobs_of(path="runs/s"):
    return {d.name: RunDirectory(d) for d in Path(path).iterdir() if (d / ".hydra").is_dir()}


def test_a_jobs_name_has_its_overrides_and_is_unique():
    assert job_name({"b": "x", "a": "0.5"}) == job_name({"a": "0.5", "b": "x"}) == "a=0.5,b=x"
    hard = [{"a": v} for v in ("x/y", "x y", "x_y", "[1,2]", "é", "$(x)", "\n", "v" * 400)]
    hard += [{"a": "v" * 399}, {"a/b": "c"}, {"a": "b,c=d"}, {"a": "b", "c": "d,"}, {"model": "."}]
    names = [job_name(swept) for swept in hard]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) < 200
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyzABC0123456789._=,+-")


def test_jobs_are_those_that_hydra_makes():
    jobs, problems = expand(parsed("name=s", "a=1,2", "b=choice(x,[1,2])", "c=5"))
    assert problems == []
    assert len(jobs) == 4
    assert jobs[0].swept == {"a": "1", "b": "x"}
    assert jobs[0].overrides == ["name=s", "a=1", "b=x", "c=5"]
    assert [len(expand(parsed(*o))[1]) for o in (["a=1"], ["a=1,1"], ["a=interval(0,1)"])] == [
        1
    ] * 3
    assert expand(parsed("name=a,b"))[1][0].key == "name"


def test_the_progress_of_a_job_is_shown_from_now_on_and_in_whole_lines(tmp_path, capsys):
    log = tmp_path / "job.log"
    log.write_text("[a]: step 1/9  of an earlier start\n")
    progress = ProgressLines(log)
    shown = []
    for added in ("[a]: st", "ep 2/9  loss 1.0\nno MFU\n", ":fire:: step 3/9\n"):
        with log.open("a") as file:
            file.write(added)
        progress.forward()
        shown.append(capsys.readouterr().out)
    assert shown == ["", "[a]: step 2/9  loss 1.0\n", ":fire:: step 3/9\n"]
    ProgressLines(tmp_path / "none").forward()


@pytest.mark.slow
def test_the_mistakes_of_all_jobs_are_reported_before_the_first_starts(arguments, capsys):
    axes = ("model.capacity=0.5,7", "model.pattern=every,zigzag", "optimizer.lr=-1")
    assert cli.main(arguments(*axes)) == 2
    error = capsys.readouterr().err
    assert "4 problems" not in error
    assert "model.capacity=7,model.pattern=every: model.capacity=7" in error
    assert "model.capacity=0.5,model.pattern=zigzag: model.pattern=zigzag" in error
    assert error.count("optimizer.lr=-1") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.capacity=0.5"], "sweeps nothing"),
        ([CAPACITIES, "sweep.retries=true"], "is not an option of a sweep"),
        ([CAPACITIES, "sweep.retry=often"], "does not fit"),
        ([CAPACITIES, "hydra/launcher=cluster"], "cluster"),
        ([CAPACITIES, "hydra.launcher.n_jobz=2"], "n_jobz"),
        ([CAPACITIES, "hydra/sweeper=basic"], "modtrain search"),
        ([CAPACITIES, "name=2026_11_23"], "would be read as 20261123"),
        ([CAPACITIES, "cluster=cpu", "nodes=2"], "add hydra/launcher=slurm"),
        ([CAPACITIES, *ON_SLURM, "hydra.launcher.partition=gpu"], "cluster.partition=gpu"),
        ([CAPACITIES, *ON_SLURM, "nodes=1,2"], "has several values"),
        ([CAPACITIES, *ON_SLURM, "chain=3"], "is requeued by itself"),
        # Quotes may be there; the job is not trained here for them.
        ([CAPACITIES, "hydra/launcher='slurm'", "chain=3"], "is requeued by itself"),
        ([CAPACITIES, *ON_SLURM, "at_once=0"], "at_once=0"),
        ([CAPACITIES, *ON_SLURM, "cluster.shape=round"], "shape"),
        ([CAPACITIES, *ON_SLURM, "processes_per_node=2"], "strategy"),
        (
            [CAPACITIES, ON_SLURM[0], "gpus_per_node=1", "cluster.gpu_memory=1e-4"],
            "cluster.gpu_memory",
        ),
        ([CAPACITIES, "hydra.sweep.dir=x"], "leave it out"),
        ([CAPACITIES, "x=["], "is not understood"),
        ([CAPACITIES, "strategy=ddp", "strategy.world_size=2"], "number of the run's processes"),
    ],
)
def test_what_a_sweep_cannot_do_is_reported(arguments, capsys, more, message):
    assert cli.main(arguments(*more)) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_only_train_sweeps_and_not_under_torchrun(arguments, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        cli.main(["plan", "-m", CAPACITIES])
    alone = [o for o in arguments("hydra/launcher=joblib", "sweep.retry=true") if o != "-m"]
    assert cli.main(alone) == 2
    assert capsys.readouterr().err.count("is for a sweep") == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(arguments(CAPACITIES)) == 2
    assert "2 processes were started" in capsys.readouterr().err


def session_rows(logdir):
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir)).Reload()
    columns, rows = [], []
    for run, tags in multiplexer.PluginRunToTagToContent(metadata.PLUGIN_NAME).items():
        if metadata.EXPERIMENT_TAG in tags:
            # TensorBoard takes any one.
            assert not columns
            declared = metadata.parse_experiment_plugin_data(tags[metadata.EXPERIMENT_TAG])
            columns = [info.name for info in declared.hparam_infos]
            shown = {info.name.tag for info in declared.metric_infos}
        if metadata.SESSION_START_INFO_TAG in tags:
            start = metadata.parse_session_start_info_plugin_data(
                tags[metadata.SESSION_START_INFO_TAG]
            )
            figures = {
                tag: multiplexer.Scalars(run, tag)[-1].value
                for tag in shown & set(multiplexer.Runs()[run]["scalars"])
            }
            assert metadata.SESSION_END_INFO_TAG in tags
            rows.append((start.group_name, start.hparams, figures))
    return columns, sorted(rows, key=lambda row: row[0])


@pytest.mark.slow
def test_a_sweep_is_trained_once_and_grows(arguments, capsys, tmp_path):
    assert cli.main(arguments(CAPACITIES)) == 0
    jobs = jobs_of()
    assert set(jobs) == {"model.capacity=0.25", "model.capacity=0.5"}
    assert all(run.is_complete for run in jobs.values())
    for run in jobs.values():
        assert run.read_config().model.capacity == float(run.path.name.split("=")[1])
        assert run.read_config().name == f"s/{run.path.name}"
        assert "is complete" in (run.logs / "job.log").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}
    assert {p.name for p in Path("runs").iterdir()} == {"s"}
    assert json.loads(Path("runs/s/sweep.json").read_text())["jobs"]["model.capacity=0.5"] == {
        "overrides": {"model.capacity": "0.5"}
    }
    before = {p: p.stat().st_mtime_ns for run in jobs.values() for p in run.path.rglob("*")}
    shown = capsys.readouterr().out
    for capacity in (0.25, 0.5):
        assert f"s/model.capacity={capacity}: step 4/4  loss" in shown
    assert cli.main(arguments("model.capacity=0.25,0.5,1.0")) == 0
    assert "3 jobs, 1 to train" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for run in jobs.values() for p in run.path.rglob("*")}
    assert len(json.loads(Path("runs/s/sweep.json").read_text())["jobs"]) == 3

    columns, rows = session_rows("runs/s")
    assert columns[0] == "model.capacity"
    assert {"model.pattern", "optimizer.lr", "training TFLOPs"} < set(columns)
    assert [row[0] for row in rows] == [f"s/model.capacity={c}" for c in (0.25, 0.5, 1.0)]
    assert [row[1]["model.capacity"].number_value for row in rows] == [0.25, 0.5, 1.0]
    result = json.loads(jobs["model.capacity=0.25"].result.read_text())
    _, hparams, figures = rows[0]
    assert figures["main/causal_loss"] == pytest.approx(result["held_out/causal_loss"])
    assert hparams["training TFLOPs"].number_value == pytest.approx(result["flops"] / 1e12)
    forward = [row[1]["forward FLOPs a token"].number_value for row in rows]
    assert 0 < forward[0] < forward[2]

    # What a run cannot change is reported of all jobs at once; the rest may change.
    assert cli.main(arguments(CAPACITIES, "optimizer.lr=0.5")) == 2
    assert capsys.readouterr().err.count("optimizer.lr: 0.001 in the run, 0.5 now") == 2
    assert cli.main(arguments(CAPACITIES, "log.every=1")) == 0


@pytest.mark.slow
def test_a_failed_job_ends_no_other_and_is_started_again_on_request(arguments, capsys):
    lrs = "optimizer.lr=1e30,1e-3"
    assert cli.main(arguments(lrs)) == 1
    output = capsys.readouterr().out
    assert "1 complete, 1 failed" in output
    assert "optimizer.lr=1e+30 failed: DivergedError: the loss" in output
    bad = jobs_of()["optimizer.lr=1e+30"]
    failure = json.loads((bad.path / "failure.json").read_text())
    assert failure.keys() == {"kind", "text", "time"}
    starts = len(json.loads(bad.manifest.read_text())["starts"])
    assert cli.main(arguments(lrs)) == 1
    assert len(json.loads(bad.manifest.read_text())["starts"]) == starts
    assert cli.main(arguments(lrs, "sweep.retry=true")) == 1
    assert len(json.loads(bad.manifest.read_text())["starts"]) == starts + 1

    table = sweep_table(Path("runs/s"))
    console = Console(width=250)
    with console.capture() as shown:
        console.print(table)
    rows = [line for line in shown.get().splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in rows[0].split("│")[1:4]] == ["1e+30", "failed", "0/4"]
    assert "DivergedError" in rows[0]
    done = [cell.strip() for cell in next(r for r in rows if "0.001" in r).split("│")[1:-2]]
    result = json.loads(jobs_of()["optimizer.lr=0.001"].result.read_text())
    assert done[:3] == ["0.001", "complete", "4/4"]
    assert done[3] == f"{result['loss']:.4f}"
    assert done[4] == f"{result['held_out/causal_loss']:.4f}"
    assert done[5] == f"{result['flops']:.3e}"


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed"),
        pytest.param(lambda: os._exit(7), "ended", marks=pytest.mark.slow),
        pytest.param(lambda: {}["nothing"], "KeyError", marks=pytest.mark.slow),
    ],
)
def test_a_crash_is_the_jobs_alone(arguments, monkeypatch, end, kind):
    train_job = sweep_hydra.train_job

    def crash(config):
        return end() if config.model.capacity == 0.25 else train_job(config)

    monkeypatch.setattr(sweep_hydra, "train_job", crash)
    assert cli.main(arguments(CAPACITIES)) == 1
    jobs = jobs_of()
    assert [state_of(jobs[f"model.capacity={c}"]) for c in (0.25, 0.5)] == ["failed", "complete"]
    failure = json.loads((jobs["model.capacity=0.25"].path / "failure.json").read_text())
    assert failure["kind"] == kind
    monkeypatch.setattr(sweep_hydra, "train_job", train_job)
    assert cli.main(arguments(CAPACITIES, "sweep.retry=true")) == 0
    assert not (jobs["model.capacity=0.25"].path / "failure.json").exists()


def await_checkpoint(run, seconds=30):
    wait_until(lambda: list(run.checkpoints.glob("step-*")), seconds)


@pytest.fixture
def whole(arguments):
    """The run of capacity 0.5 without interruption."""
    alone = [o for o in arguments(steps=STEPS, name="whole") if o != "-m"]
    assert cli.main([*alone, "model.capacity=0.5"]) == 0
    return newest_tensors(Path("runs/whole"), STEPS)


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),
    ],
)
def test_what_stops_a_sweep_costs_nothing_that_is_saved(arguments, whole, signum, code):
    sweep = arguments("model.capacity=0.5,0.25", steps=STEPS)
    first, second = (RunDirectory(Path(f"runs/s/model.capacity={c}")) for c in ("0.5", "0.25"))
    process = fork_modtrain(sweep)
    await_checkpoint(first)
    os.kill(process.pid, signum)
    process.join(30)
    assert process.exitcode == code
    # What the kill has left behind saves, and ends by itself.
    wait_until(lambda: not is_in_use(first), 10)
    assert [state_of(run) for run in (first, second)] == ["stopped", "not started"]
    again = fork_modtrain(sweep)
    again.join(60)
    assert again.exitcode == 0
    starts = [json.loads(run.manifest.read_text())["starts"] for run in (first, second)]
    assert [len(s) for s in starts] == [2, 1]
    assert "resumes from step" in (first.logs / "job.log").read_text()
    assert_same_bits(whole, newest_tensors(first.path, STEPS))
    steps = [r["step"] for r in read_metrics(first.metrics) if "loss" in r]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_run_in_use_is_left_alone_and_a_sweep_in_use_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sweep_process, "LOCK_TIMEOUT", 0.2)
    run = RunDirectory(Path("runs/s/model.capacity=0.25"))
    with run.locked():
        assert cli.main(arguments(CAPACITIES)) == 75
        assert "1 complete, 1 running" in capsys.readouterr().out
    with (Path("runs/s") / ".sweep.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.main(arguments(CAPACITIES)) == 1
    assert "being swept by another process" in capsys.readouterr().err


def test_a_file_system_without_locks_is_named(arguments, no_locks, capsys):
    assert cli.main(arguments(CAPACITIES)) == 1
    error = capsys.readouterr().err
    assert "a file system with flock" in error
    assert "another process" not in error


def test_there_is_no_table_without_a_sweep(tmp_path):
    with pytest.raises(CheckpointError, match=r"sweep\.json is missing"):
        sweep_table(tmp_path)


def is_running(process: str) -> bool:
    """Whether there is such a process, and not only its exit code, which is not collected here."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.on_commit(1)
@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_joblib_trains_two_at_a_time(arguments, tmp_path, killed):
    more = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    sweep = arguments("model.capacity=0.25,0.5,1.0", *more, steps=200)
    if killed:
        command = [sys.executable, "-m", "modtrain", *sweep]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
            for capacity in ("0.25", "0.5"):
                await_checkpoint(RunDirectory(Path(f"runs/s/model.capacity={capacity}")), 120)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.kill()
        wait_until(lambda: not any(is_in_use(run) for run in jobs_of().values()), 30)
        # No process is left to give them another job.
        assert len(workers) >= 2
        wait_until(lambda: not any(map(is_running, workers)), 30)
        assert [state_of(run) for run in jobs_of().values()] == ["stopped"] * 2
    done = run_modtrain(*sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [run.is_complete for run in jobs_of().values()] == [True] * 3
    starts = [len(json.loads(run.manifest.read_text())["starts"]) for run in jobs_of().values()]
    assert sum(starts) == (5 if killed else 3)
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}
