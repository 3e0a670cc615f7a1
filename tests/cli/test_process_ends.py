"""Commands that are one of several processes, are interrupted, or are not read to their end."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from modtrain.cli import doctor
from modtrain.cli import main as cli
from modtrain.cli.process_ends import launched_rank
from modtrain.common import terminal
from modtrain.common.atomic_io import atomic_writer
from modtrain.common.errors import DataError
from modtrain.common.terminal import plain_console
from modtrain.inference.evaluate import evaluate, reporting
from modtrain.inference.inspect import inspect

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, (0, 0)),
        ({"RANK": "1"}, (0, 0)),
        # A pod's: training has these ranks, and a verb without ranks is alone in its pod.
        (TORCHRUN, (1, 0)),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}, (1, 1)),
        ({**SRUN, "SLURM_STEP_NUM_NODES": "1"}, (1, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 0)),
        ({**TORCHRUN, "RANK": "x"}, (0, 0)),
    ],
)
def test_only_what_was_really_launched_together_has_ranks(environment, ranks):
    assert (launched_rank(True, environment), launched_rank(False, environment)) == ranks


@pytest.mark.parametrize(
    ("verb", "environment"),
    [
        ("plan", {"RANK": "1"}),
        ("plan", TORCHRUN),
        ("train", {"RANK": "1"}),
        ("prepare", {"SLURM_PROCID": "1"}),
    ],
)
def test_a_rank_in_the_environment_silences_no_error(verb, environment, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main([verb, "nosuch=1"]) == 2
    assert "nosuch" in capsys.readouterr().err


def test_a_verb_without_ranks_runs_once_under_a_launcher(monkeypatch, capsys):
    command = ["config", "train", "model=tiny"]
    for name, value in {**TORCHRUN, "TORCHELASTIC_RUN_ID": "none", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(command) == 0
    assert capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert cli.main(command) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("verb", "resumes"), [("train", True), ("prepare", True), ("plan", False)])
def test_ctrl_c_promises_only_what_holds(verb, resumes, monkeypatch, capsys):
    def interrupted(_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main([verb]) == 130
    assert ("resumes" in capsys.readouterr().err) == resumes


@pytest.mark.parametrize(
    ("verb", "number", "remedy"),
    [
        ("train", errno.EROFS, "mount it writable, or write elsewhere: runs_dir=PATH"),
        ("prepare", errno.EROFS, "mount it writable, or write elsewhere: output=PATH"),
        ("cancel", errno.EROFS, "mount it writable, or write elsewhere\n"),
        ("prepare", errno.ENOSPC, "free space, or write elsewhere; the same command continues"),
        ("export", errno.EDQUOT, "free space, or write elsewhere\n"),
    ],
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_what_cannot_be_written_is_answered_by_its_cause(
    verb, number, remedy, is_wrapped, monkeypatch, capsys
):
    def fail(_arguments):
        cause = OSError(number, "the cause", "ro/x")
        if is_wrapped:
            raise DataError("ro/x: the cause") from cause
        raise cause

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main([verb]) == 1
    shown = capsys.readouterr().err
    assert f"remedy: {remedy}" in shown
    assert shown.count("remedy") == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_output_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_writer(tmp_path / "out", tmp_path) as file:
        file.write(b"x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_console_leaves_a_closed_pipe_to_the_command():
    class Closed(io.StringIO):
        def write(self, _text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        plain_console(file=Closed()).print("x")


@pytest.mark.parametrize(
    ("verb", "exit_code"), [("status", 0), ("generate", 0), ("submit", 1), ("export", 1)]
)
def test_a_closed_pipe_is_no_failure_where_all_is_printed(verb, exit_code, monkeypatch, capsys):
    def into_nothing(_arguments):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_run", into_nothing)
    monkeypatch.setattr(cli, "stop_printing", lambda: None)
    assert cli.main([verb]) == exit_code
    assert ("has closed the pipe" in capsys.readouterr().err) == bool(exit_code)


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("eval", ["run=a"]),
        ("inspect", ["run=a", "text=hello"]),
        ("export", ["run=a", "output=b"]),
        ("prepare", ["sources=[a]", "output=b"]),
    ],
)
def test_what_is_done_is_no_failure_where_its_last_lines_are_not_read(verb, words, monkeypatch):
    def unread(*_arguments, **_options):
        raise BrokenPipeError

    monkeypatch.setattr(terminal, "stop_printing", lambda: None)
    monkeypatch.setattr(evaluate, "evaluate_run", lambda _config: {})
    monkeypatch.setattr(reporting, "show", unread)
    monkeypatch.setattr(inspect, "inspect_run", lambda _config: Path("page.html"))
    target = SimpleNamespace(resolve_name=lambda _target: lambda _config: "wrote it")
    if verb not in ("eval", "inspect"):
        monkeypatch.setattr(cli, "pkgutil", target)
    monkeypatch.setattr(cli, "print", unread, raising=False)
    assert cli.main([verb, *words]) == 0


def test_a_missing_need_is_in_doctors_exit_code_also_where_no_one_reads(monkeypatch):
    class Closed(io.StringIO):
        def write(self, _text):
            raise BrokenPipeError

    monkeypatch.setattr(terminal, "stop_printing", lambda: None)
    monkeypatch.setattr(doctor, "plain_console", lambda: plain_console(file=Closed()))
    finding = doctor.Finding("x", "none", "not there", "cuda")
    monkeypatch.setattr(doctor, "examine", lambda imported: [finding])
    assert doctor.show(["cuda"]) == 1


def piped(command: list[str], **environment: str) -> tuple[int, str, str]:
    """Run the command line with a reader that closes the pipe at once."""
    root = str(Path(cli.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-m", "modtrain", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, **environment},
    )
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    return process.returncode, "", errors


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["status", "config", "doctor"])
def test_a_pipe_that_is_closed_is_no_failure(verb, tmp_path):
    words = {"status": [f"runs_dir={tmp_path}"], "config": ["train"]}.get(verb, [])
    assert piped([verb, *words]) == (0, "", "")


@pytest.mark.slow
def test_a_name_in_another_encoding_is_printed_with_escapes(tmp_path):
    (tmp_path / "set").mkdir()
    for number in range(30):
        (tmp_path / "set" / f"{number}.txt").write_text(f"document {number} " * 20)
    Path(os.fsdecode(os.fsencode(tmp_path / "set") + b"/caf\xe9.txt")).write_bytes(b"flaw \xff")
    words = [f"sources=[{tmp_path}/set/*.txt]", f"output={tmp_path}/out", "seq_len=8"]
    done = subprocess.run(
        [sys.executable, "-m", "modtrain", "prepare", *words, "valid_fraction=0.2"],
        capture_output=True,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(cli.__file__).parents[2]),
            "PYTHONIOENCODING": "utf-8:strict",
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rb"caf\udce9.txt:1: not UTF-8" in done.stdout
