"""Directories of runs made by hand, and Slurm's commands played, for what looks at runs."""

import datetime
import fcntl
import io
import json
import os
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from modtrain.cli.compose import compose
from modtrain.cluster.config import StatusConfig
from modtrain.cluster.runs import read_run
from modtrain.cluster.slurm import SlurmJob
from modtrain.cluster.status import show_status, state_of

NOW = time.time()


def iso(ago: float) -> str:
    moment = datetime.datetime.fromtimestamp(NOW - ago, datetime.UTC)
    return moment.isoformat(timespec="seconds")


@cache
def composed(*overrides: str):
    own = ["name=x", "model=tiny", "model.vocab_size=300", "data.seq_len=64", "batch.tokens=256"]
    config = compose("train", [*own, *overrides])
    return config, OmegaConf.to_yaml(OmegaConf.structured(config))


class FakeRun:
    """A run's directory, made by hand."""

    def __init__(self, path: Path, *overrides: str) -> None:
        self.path = path
        path.mkdir(parents=True)
        self.config, text = composed(*(overrides or ["budget.steps=100"]))
        (path / "config.yaml").write_text(text)

    def starts(self, *ago: float) -> "FakeRun":
        content = {"starts": [{"time": iso(a)} for a in ago]}
        (self.path / "manifest.json").write_text(json.dumps(content))
        return self

    def records(self, *records: dict) -> "FakeRun":
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.path / "metrics.jsonl").write_text(lines)
        return self

    def saved(self, *steps: int) -> "FakeRun":
        for step in steps:
            folder = self.path / f"checkpoints/step-{step:09d}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps({"step": step}))
        return self

    def failed(self, ago: float, cause: str, step: int = 0) -> "FakeRun":
        with (self.path / "failures.tsv").open("a") as file:
            file.write(f"{iso(ago)}\t12\t{step}\t{cause}\n")
        return self

    def ended(self) -> "FakeRun":
        (self.path / "result.json").write_text('{"steps": 24}')
        (self.path / "COMPLETED").touch()
        return self

    def jobs(self, *ids: str) -> "FakeRun":
        with (self.path / "jobs.jsonl").open("a") as file:
            for name in ids:
                script = str(self.path / "submit.sbatch")
                file.write(json.dumps({"job": name, "script": script}) + "\n")
        return self

    def read(self):
        return read_run(self.path, self.path.name)

    def state(self, *jobs: SlurmJob) -> tuple[str, str]:
        current = state_of(self.read(), {job.id: job for job in jobs})
        return current.name, current.reason


class Group:
    """A directory of jobs, with runs below it or without, made by hand."""

    def __init__(self, path: Path, script: str = "submit-0123abcd.sbatch") -> None:
        self.path, self.script = path, script
        (path / "logs").mkdir(parents=True)
        self.submitted("7", 900)

    def submitted(self, name: str, ago: float) -> None:
        entry = {"job": name, "time": iso(ago), "script": str(self.path / self.script)}
        with (self.path / "jobs.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def failed(self, verb: str, ago: float, times: int = 3) -> None:
        lines = f"{iso(ago)}\t7\t0\tthe study is damaged\n" * times
        (self.path / f"failures-{verb}.tsv").write_text(lines)

    def printed(self, ago: float) -> None:
        (self.path / "logs/slurm-7.out").touch()
        os.utime(self.path / "logs/slurm-7.out", (NOW - ago, NOW - ago))

    def state(self, *jobs: SlurmJob) -> tuple[str, str]:
        current = state_of(read_run(self.path, "g"), {job.id: job for job in jobs})
        return current.name, current.reason


def shown(config: StatusConfig) -> str:
    stream = io.StringIO()
    show_status(config, Console(file=stream, width=300))
    return stream.getvalue()


@contextmanager
def locked(path: Path):
    with (path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def play(monkeypatch, tmp_path, output: str = "", code: int = 0, error: str = "") -> Path:
    """Put an squeue and an scancel on the PATH; they write down how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "output").write_text(output)
    (folder / "error").write_text(error)
    for name in ("squeue", "scancel"):
        script = folder / name
        script.write_text(
            f'#!/bin/sh\necho {name} "$@" >>{folder}/calls\n'
            f"cat {folder}/output\ncat {folder}/error >&2\nexit {code}\n"
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def line(name, state, reason="None", start="N/A", restarts="0", command="/r/submit.sbatch") -> str:
    fields = [name, state, reason, "node[1-2]", "1:00:00", restarts, start, command]
    return "".join(f"{field:12}|" for field in fields) + "\n"
