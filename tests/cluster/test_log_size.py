"""The outputs of a run's jobs stay small, whatever a run prints over months."""

import os
import subprocess

from modtrain.cluster.logs import Tail
from modtrain.common.shipped import slurm_dir


def bash(commands: str, **settings: str) -> str:
    lines = [f"{name}={value}" for name, value in settings.items()]
    script = "\n".join(["set -euo pipefail", f"source {slurm_dir()}/files.sh", *lines, commands])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_large_log_is_continued_in_an_empty_file(tmp_path):
    """What has it open to append goes on, as Slurm has it."""
    log = tmp_path / "slurm-7.out"
    shown = bash(
        "exec 3>>$log_file\n"
        "for part in 1 2 3 4 5 6; do\n"
        "  head -c 1048576 /dev/zero >&3; echo part $part >&3; rotate_log; done\n"
        "echo more >&3; rotate_log\n"
        "for part in '' .1 .2 .3; do tail -n 1 $log_file$part | tr -d '\\0'; done",
        **{"log_file": str(log), "log_size": "1"},
    )
    assert shown.splitlines() == ["more", "part 6", "part 5", "part 4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("slurm-7.out", "slurm-7.out.1", "slurm-7.out.2", "slurm-7.out.3")
    ]
    assert log.stat().st_size == 5


def test_the_oldest_outputs_are_removed_and_never_the_jobs_own(tmp_path):
    logs = tmp_path / "a run/logs"
    logs.mkdir(parents=True)
    for number in range(9):
        for end in ("", ".1"):
            path = logs / f"slurm-{number}.out{end}"
            path.touch()
            os.utime(path, (number, number))
    (logs / "other.txt").touch()
    bash(
        "remove_old_logs",
        run_directory=f"'{tmp_path}/a run'",
        num_logs="3",
        log_file=f"'{logs}/slurm-0.out'",
    )
    kept = sorted(path.name for path in logs.iterdir())
    assert kept == [
        "other.txt",
        *(f"slurm-{number}.out{end}" for number in (0, 6, 7, 8) for end in ("", ".1")),
    ]


def test_the_watch_over_the_size_ends_with_the_step(tmp_path):
    log = tmp_path / "log"
    log.write_text("x" * 1_100_000)
    shown = bash(
        "bound_logs & pid=$!\nuntil [[ -e $log_file.1 ]]; do sleep .01; done\n"
        "kill $pid; wait $pid; echo ended $?",
        **{"log_file": str(log), "log_size": "1", "num_logs": "1", "run_directory": "''"},
    )
    assert shown == "ended 0\n"


def test_who_follows_sees_each_line_of_a_rotated_log_once(tmp_path):
    log, shown = tmp_path / "slurm-1.out", []
    tail = Tail(log, shown.append, is_rotated=True)
    log.write_text("a\nb\n")
    tail.show_new()
    # Two lines come, the log is rotated, and one more comes.
    (tmp_path / "slurm-1.out.1").write_text("a\nb\nc\nd\n")
    log.write_text("e\n")
    tail.show_new()
    log.write_text("e\nf\n")
    tail.show_new()
    assert "".join(shown) == "a\nb\nc\nd\ne\nf\n"
