"""What a job's script makes of how its processes ended, and of what srun printed."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from modtrain.cluster.script import slurm_dir

# As srun prints them where an interpreter is missing on one node, and ends the others.
MISSING = """\
slurmstepd: error: execve(): /x/python: No such file or directory
srun: error: node2: task 1: Exited with exit code 2
srun: Terminating StepId=61.0
0: slurmstepd: error: *** STEP 61.0 ON node1 CANCELLED AT 2026-01-01T00:00:00 ***
srun: error: node1: task 0: Terminated
"""
NO_MODULE = """\
1: Traceback (most recent call last):
1: ModuleNotFoundError: No module named 'modtrain'
srun: error: node2: task 1: Exited with exit code 1
srun: error: node1: task 0: Killed
"""
KILLED = "srun: error: node2: task 1: Killed\nsrun: error: node1: task 0: Terminated\n"


def outcome(tmp_path: Path, status: int, printed: str, **files: str) -> list[str]:
    """What the script decides: status, cause and bad node.

    files: of the ranks, by names as ``rank_0``; lines are parted by slashes.
    """
    folder, log = tmp_path / "outcome", tmp_path / "log"
    folder.mkdir()
    log.write_text("srun: error: node9: task 7: Killed\n" + printed)
    for name, text in files.items():
        (folder / name.replace("_", "-")).write_text(text.replace("/", "\n") + "\n")
    script = f"""set -euo pipefail
    source {slurm_dir()}/outcome.sh
    log_file={log} log_start=35 status={status}
    read_outcome {folder}
    printf '%s\\n' "$status" "$cause" "$bad_node"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:3]


@pytest.mark.parametrize(
    ("status", "printed", "files", "expected"),
    [
        (0, "", {"rank_0": "0/node1/"}, ("0", "", "")),
        # torchrun ends with 1 whatever it was.
        (1, "", {"rank_0": "75/node1/"}, ("75", "exit code 75", "")),
        (1, "", {"rank_0": "2/node1/ConfigError: a"}, ("2", "ConfigError: a", "")),
        (0, "", {"rank_0": "1/node1/x"}, ("1", "x", "")),
        # Rank 0 knows of the others' errors.
        (
            1,
            "",
            {"rank_0": "1/n1/rank 1 on n2: no", "rank_1": "2/n2/no"},
            ("1", "rank 1 on n2: no", ""),
        ),
        # Where it has no end of its own, another has.
        (137, KILLED, {"rank_0": "running/node1/", "rank_1": "1/node2/no"}, ("1", "no", "")),
        (
            *(1, "", {"rank_0": "1/n1/lost 1", "rank_1": "69/n2/ImportError: x"}),
            ("69", "rank 1 on n2: ImportError: x", "n2"),
        ),
        # Several nodes at once, and the check that all ranks report alike.
        (
            *(1, "", {"rank_0": "69/n1/no", "rank_1": "69/n2/no", "rank_2": "1/n3/lost 1"}),
            ("69", "rank 0 on n1: no", "n1,n2"),
        ),
        (
            *(1, "", {"rank_0": "69/n2,n5/StartCheckError: it failed", "rank_1": "69/n2,n5/x"}),
            ("69", "StartCheckError: it failed", "n2,n5"),
        ),
        # 2 is the configuration only where a process says so.
        (
            *(2, MISSING, {"rank_0": "running/node1/"}),
            (
                "1",
                "rank 1 on node2: Exited with exit code 2 before modtrain started:"
                " slurmstepd: error: execve(): /x/python: No such file or directory",
                "node2",
            ),
        ),
        (
            *(1, NO_MODULE, {}),
            (
                "1",
                "rank 1 on node2: Exited with exit code 1 before modtrain started: Traceback (most"
                " recent call last): ModuleNotFoundError: No module named 'modtrain'",
                "node2",
            ),
        ),
        # What was killed was at work.
        (
            *(137, KILLED, {"rank_0": "running/node1/", "rank_1": "running/node2/"}),
            ("137", "rank 1 on node2: Killed", ""),
        ),
        (137, "", {"rank_0": "half a file"}, ("137", "exit code 137", "")),
        (2, "", {}, ("1", "exit code 2", "")),
    ],
)
def test_the_script_decides_by_what_the_processes_say(tmp_path, status, printed, files, expected):
    assert outcome(tmp_path, status, printed, **files) == list(expected)


def test_a_long_line_is_not_cut_inside_a_character(tmp_path):
    """The cause becomes JSON, which is read strictly."""
    printed = f"1: x{'é' * 300}\nsrun: error: node2: task 1: Exited with exit code 1\n"
    assert outcome(tmp_path, 1, printed)[1].endswith(f"before modtrain started: x{'é' * 199}")


@pytest.mark.parametrize("is_full", [False, True])
def test_a_node_is_not_bad_where_no_process_could_report(tmp_path, is_full):
    """The directory could not be made, or its disk is full."""
    folder, log = tmp_path / "outcome", tmp_path / "log"
    if is_full:
        folder.mkdir()
        (folder / ".test").symlink_to("/dev/full")
        (folder / "rank-0").touch()
    log.write_text(NO_MODULE)
    script = f"""set -euo pipefail
    source {slurm_dir()}/outcome.sh
    log_file={log} log_start=0 status=1
    read_outcome {folder}
    echo "$status/$bad_node/$cause"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1//rank 1 on node2: Exited with exit code 1: Traceback")


def ending(tmp_path: Path, commands: str, **settings: str) -> str:
    """What the functions of ending.sh print in a run's directory."""
    (tmp_path / "logs").mkdir(exist_ok=True)
    lines = [f"{name}={value}" for name, value in settings.items()]
    script = "\n".join(
        [
            *(
                "set -euo pipefail",
                f"source {slurm_dir()}/outcome.sh",
                f"source {slurm_dir()}/files.sh",
                f"source {slurm_dir()}/ending.sh",
                f"run_directory={tmp_path} on_given_up=() scratch=''",
            ),
            *("verb=train max_equal_failures=3 again=requeue bad_nodes=()", "job_id() { echo 7; }"),
            *('say() { echo "$*"; }', *lines, commands),
        ]
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_failures_are_equal_up_to_numbers_and_the_node(tmp_path):
    failures = [("rank 3 on gpu-a: no", "gpu-a"), ("rank 11 on gpu-b: no", "gpu-b")]
    for count, (cause, node) in enumerate(failures, 1):
        shown = ending(
            tmp_path, f'record_failure "{cause}" {node}; echo $num_equal ${{bad_nodes[*]}}'
        )
        assert shown.split() == [str(count), *(node for _, node in failures[:count])]
    # A rank that died early has not told the others where it was.
    for cause in ("rank 0 has died", "rank 0 on gpu-a, process 7 has died"):
        shown = ending(tmp_path, f'record_failure "{cause}"; echo $num_equal')
    assert shown == "2\n"
    (tmp_path / "failures.tsv").write_text(
        "".join((tmp_path / "failures.tsv").read_text().splitlines(keepends=True)[:2])
    )
    # One failure may be of several nodes.
    shown = ending(
        tmp_path, 'record_failure "rank 1 on gpu-a: no" gpu-a,gpu-c || echo ${bad_nodes[*]}'
    )
    assert shown == "gpu-a gpu-b gpu-c\n"
    lines = (tmp_path / "failures.tsv").read_text().splitlines()[:-1]
    (tmp_path / "failures.tsv").write_text("\n".join(lines) + "\n")
    # A third is the last one, and another text begins anew; so does a new checkpoint.
    shown = ending(tmp_path, 'record_failure "rank 1 on c: no" || echo last')
    assert shown == "last\n"
    assert ending(tmp_path, 'record_failure other; echo "$num_equal"') == "1\n"
    (tmp_path / "checkpoints/step-000000004").mkdir(parents=True)
    shown = ending(tmp_path, 'record_failure other; echo "$num_equal ${bad_nodes[*]}"')
    assert shown == "1 \n"


def test_progress_is_seen_beside_a_copy_of_a_checkpoint(tmp_path):
    """Otherwise failures with progress between them would count as equal, and end the run."""
    for name in ("step-000000004", "step-000000008.old", "step-best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert ending(tmp_path, "record_failure no; newest_step") == "4\n"
    assert (tmp_path / "failures.tsv").read_text().split("\t")[2] == "4"


@pytest.mark.parametrize(("nodes", "is_enough"), [("2", True), ("3", False)])
def test_a_node_is_left_out_where_enough_are_left(tmp_path, nodes, is_enough):
    sinfo = "sinfo() { printf 'a idle\\nb alloc\\nc mix\\nd drain\\ne down*\\n'; }"
    shown = ending(
        tmp_path,
        f'{sinfo}\nscontrol() {{ echo "$*"; }}\ndelay_start 8',
        **{
            "bad_nodes": "(c)",
            "delay": "0",
            "SLURM_JOB_PARTITION": "p",
            "SLURM_JOB_NUM_NODES": nodes,
        },
    )
    assert ("update JobId=8 ExcNodeList=c" in shown) == is_enough
    assert ("too few nodes" in shown) == (not is_enough)


@pytest.mark.parametrize(
    ("constraint", "num_nodes"),
    [
        # Of a, b, d and e, without c.
        ("(null)", 4),
        ("fast", 2),
        ("fast&gpu", 1),
        ("fast,gpu", 1),
        ("gpu|fast", 3),
        ("gpu&(slow|fast)", 2),
        # Unknown, part of a name, and what is left to Slurm.
        *(("f", 0), ("fast*2", 0), ("[fast|gpu]", 0), ("gpu|fast&slow", 0), ("fast&(", 0)),
    ],
)
def test_nodes_with_the_features_of_the_job_are_counted(tmp_path, constraint, num_nodes):
    nodes = "a idle fast\\nb idle fast,gpu\\nc idle fast,gpu\\nd idle slow,gpu\\ne idle (null)\\n"
    shown = ending(
        tmp_path,
        f"sinfo() {{ [[ $* = *%f* ]] && printf '{nodes}'; }}\n"
        f"describe_job() {{ echo 'JobId=8 Features={constraint} DelayBoot=00:00:00'; }}\n"
        "for SLURM_JOB_NUM_NODES in 1 2 3 4 5; do ! has_enough_nodes 8 || echo enough; done",
        **{"bad_nodes": "(c)", "SLURM_JOB_PARTITION": "p"},
    )
    assert shown.split() == ["enough"] * num_nodes


@pytest.mark.parametrize(
    ("code", "again", "squeue", "ends", "num_failures", "shown"),
    [
        # Another job is at work in the directory: not this one's failure.
        (73, "requeue", "8", 73, 0, "not restarted"),
        # What is left of a lost node ends by itself.
        (73, "requeue", "", 75, 1, "requeued"),
        (1, "requeue", "", 75, 1, "requeued"),
        # With nothing that restarts it, it ends with what it failed by.
        (65, "nothing", "", 65, 1, "the same command"),
        (2, "requeue", "", 2, 1, "correct the configuration"),
        (0, "requeue", "", 0, 0, ""),
    ],
)
def test_a_job_ends_by_its_outcome(tmp_path, code, again, squeue, ends, num_failures, shown):
    (tmp_path / "jobs.jsonl").write_text('{"job": "7"}\n{"job": "8"}\n')
    (tmp_path / "outcome").mkdir()
    (tmp_path / "outcome/rank-0").write_text(f"{code}\nnode1\nit is so\n")
    done = ending(
        tmp_path,
        f"squeue() {{ echo {squeue}; }}; scontrol() {{ :; }}\n"
        "{ (finish) && c=0 || c=$?; echo end $c; }",
        **{"again": again, "status": "1", "MODTRAIN_OUTCOME": f"{tmp_path}/outcome"},
        **{"received_signal": "''", "next_job": "''", "delay": "0", "stop_status": "75"},
        **{"retry_delay": "0", "log_file": "''", "SLURM_JOB_ID": "7"},
    )
    assert done.endswith(f"end {ends}\n"), done
    assert shown in done
    log = tmp_path / "failures.tsv"
    assert len(log.read_text().splitlines() if log.exists() else []) == num_failures


@pytest.mark.parametrize(("verb", "is_at_work"), [("train", True), ("eval", False)])
def test_an_evaluation_is_no_other_job_at_work(tmp_path, verb, is_at_work):
    jobs = [{"job": "7", "verb": "train"}, {"job": "8", "verb": verb}]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    shown = ending(
        tmp_path,
        "squeue() { [[ $* != *--jobs=*8* ]] || echo 8; }\n"
        "if is_other_job_at_work; then echo at work; else echo none; fi",
        next_job="''",
    )
    assert shown == ("at work\n" if is_at_work else "none\n")


def test_a_loss_that_is_not_finite_is_tried_once_more(tmp_path):
    for tries, ends in ((1, 75), (2, 65)):
        (tmp_path / "outcome").mkdir()
        (tmp_path / "outcome/rank-0").write_text("65\nnode1\nDivergedError: step 3 is NaN\n")
        done = ending(
            tmp_path,
            "{ scontrol() { :; }; (finish) && c=0 || c=$?; echo end $c; }",
            **{"status": "1", "MODTRAIN_OUTCOME": f"{tmp_path}/outcome", "received_signal": "''"},
            **{"next_job": "''", "delay": "0", "stop_status": "75", "retry_delay": "0"},
            **{"log_file": "''", "SLURM_JOB_ID": "7"},
        )
        assert done.endswith(f"end {ends}\n"), (tries, done)


@pytest.mark.parametrize(("code", "is_called"), [(2, True), (1, False)])
def test_a_program_is_called_when_the_run_is_given_up(tmp_path, code, is_called):
    """It gets what it was given, not interpreted, and what has happened in its environment."""
    program = tmp_path / "tell me"
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" "$MODTRAIN_RUN" "$MODTRAIN_JOB" "$MODTRAIN_CAUSE" '
        f">'{tmp_path}/called'\nexit 3\n"
    )
    program.chmod(0o755)
    (tmp_path / "outcome").mkdir()
    (tmp_path / "outcome/rank-0").write_text(f"{code}\nnode1\n$(touch pwned) `x` 'it'\n")
    shown = ending(
        tmp_path,
        "{ scontrol() { :; }; (finish) && c=0 || c=$?; echo end $c; }",
        **{"on_given_up": f"('{program}' '$(touch pwned)')", "received_signal": "''"},
        **{"status": "1", "MODTRAIN_OUTCOME": f"{tmp_path}/outcome", "next_job": "''"},
        **{"delay": "0", "stop_status": "75", "retry_delay": "0", "log_file": "''"},
        **{"SLURM_JOB_ID": "7"},
    )
    assert (tmp_path / "called").exists() == is_called
    # Whether it works or not, the job ends as it would.
    assert shown.endswith(f"end {2 if is_called else 75}\n")
    if is_called:
        lines = (tmp_path / "called").read_text().splitlines()
        assert lines == ["$(touch pwned)", str(tmp_path), "7", "$(touch pwned) `x` 'it'"]
        assert f"{program} failed" in shown


def test_each_equal_failure_waits_twice_as_long(tmp_path):
    """Slurm's own delay after a requeue is kept where it is longer."""
    for _ in range(2):
        shown = ending(
            tmp_path,
            'scontrol() { [[ $1 != update ]] || echo "$*"; }\n'
            "describe_job() { echo JobId=7 EligibleTime=2001-01-01T00:00:00 ; }\n"
            "(fail 1 'it is so') || echo end $?; date +%s",
            **{"received_signal": "''", "next_job": "''", "delay": "0", "retry_delay": "60"},
            **{"SLURM_JOB_ID": "7"},
        )
        update, end, now = shown.splitlines()[-3:]
        assert end == "end 75"
        (tmp_path / "updates").open("a").write(f"{update} {now}\n")
    waits = []
    for text in (tmp_path / "updates").read_text().splitlines():
        *_, begin, now = text.replace("StartTime=", "").split()
        waits.append(time.mktime(time.strptime(begin, "%Y-%m-%dT%H:%M:%S")) - int(now))
    assert waits == pytest.approx([60, 120], abs=10)


@pytest.mark.parametrize(("state", "is_kept"), [("PENDING", True), ("CANCELLED", False)])
def test_one_job_waits_to_take_the_place_of_this_one(tmp_path, state, is_kept):
    """Slurm may have requeued it: the next one waits since its earlier start."""
    (tmp_path / "jobs.jsonl").write_text('{"job": "8", "chained_after": "7", "verb": "train"}\n')
    shown = ending(
        tmp_path,
        f"describe_job() {{ echo JobId=8 JobState={state} ; }}\n"
        "submit_next() { next_job=9; }\nqueue_next; echo $next_job",
    )
    assert shown == ("8\n" if is_kept else "9\n")
