"""Hydra's side of a sweep: its sweeper and launchers, with a directory for each job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modtrain.common.errors import Problem
from modtrain.common.overrides import opened, search_path
from modtrain.common.shipped import conf_dir
from modtrain.common.spelling import quoted
from modtrain.common.terminal import print_line
from modtrain.experiments.sweep.job_process import (
    EXIT_RESUMABLE,
    JOB_LOG,
    failure_text,
    run_in_process,
    state_of,
)
from modtrain.experiments.sweep.jobs import SweepJob, overrides_of
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory
from modtrain.training.stop_signal import STOP, STOP_SIGNALS

_LAUNCHERS = ("basic", "joblib", "slurm")
_HOW_TO = "docs/how-to/sweep-and-search.md"
_JOB_LOCK = threading.Lock()
_QUIET = ("hydra/hydra_logging=none", "hydra/job_logging=none")


class Multirun:
    """Hydra's multirun under ``overrides``, those of ``hydra`` itself.

    user_dir: of the user's own YAML. is_on_slurm: whether the jobs run on Slurm.
    """

    def __init__(self, overrides: Sequence[Override], user_dir: str | None) -> None:
        self.is_on_slurm = any(
            o.key_or_group == "hydra/launcher" and o.value() == "slurm" for o in overrides
        )
        lines = [str(o.input_line) for o in overrides]
        self.overrides = [*_QUIET, *lines, *search_path(user_dir)]

    def problems(self) -> list[Problem]:
        """Everything that Hydra finds wrong with the overrides."""
        with self._hydra() as hydra:
            try:
                config = self._compose(hydra, [])
                OmegaConf.to_container(config.hydra.launcher, resolve=True)
                chosen = str(config.hydra.runtime.choices["hydra/launcher"])
                if chosen not in _LAUNCHERS:
                    raise HydraException(f"hydra/launcher={chosen} is not supported by modtrain")
            except (HydraException, OmegaConfBaseException) as error:
                reason = " ".join(str(error).split())
                remedy = "use the keys of modtrain submit: cluster.partition=gpu, nodes=2"
                if not self.is_on_slurm:
                    remedy = f"hydra/launcher is basic, joblib or slurm; see {_HOW_TO}"
                return [Problem(" ".join(self.overrides[len(_QUIET) :]), "", reason, remedy)]
        return []

    def launch(self, jobs: Sequence[tuple[SweepJob, TrainConfig]], directory: Path) -> None:
        """Start ``jobs`` and wait for them. The outcome of each is in its directory."""
        job_overrides = [
            [*map(opened, overrides_of(job, config)), f"hydra.sweep.subdir={quoted(job.name)}"]
            for job, config in jobs
        ]
        task = TrainTask(os.getpid(), {str(config.name): job for job, config in jobs})
        with self._hydra() as hydra, _signals_forwarded_to_workers():
            config = self._compose(hydra, [f"hydra.sweep.dir={quoted(str(directory.resolve()))}"])
            context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
            # A sweeper would make the jobs of axes; these are a list already.
            launcher: Any = Plugins.instance().instantiate_launcher(
                hydra_context=context, task_function=task, config=config
            )
            OmegaConf.save(config, directory / "multirun.yaml")
            try:
                for result in launcher.launch(job_overrides, initial_job_idx=0):
                    # Raises the error of a job that has failed.
                    _ = result.return_value
            except Exception as error:
                # Most often a worker that was killed by the signal that stops the sweep.
                print_line(f"the launcher failed: {type(error).__name__}: {error}")

    @contextmanager
    def _hydra(self) -> Iterator[Hydra]:
        version.setbase("1.3")
        GlobalHydra.instance().clear()
        search_path = create_config_search_path(str(conf_dir()))
        try:
            yield Hydra.create_main_hydra2("modtrain", search_path)
        finally:
            GlobalHydra.instance().clear()

    def _compose(self, hydra: Hydra, overrides: list[str]) -> DictConfig:
        return hydra.compose_config(
            config_name="train", overrides=[*self.overrides, *overrides], run_mode=RunMode.MULTIRUN
        )


class TrainTask:
    """The task function that a launcher calls for each job, in this process or a worker.

    It is pickled. main_pid: the sweep's process. jobs: by the name of the run.
    """

    def __init__(self, main_pid: int, jobs: dict[str, SweepJob]) -> None:
        self.main_pid, self.jobs = main_pid, jobs

    def __call__(self, config: DictConfig) -> int:
        """Train one job in a process of its own and return its exit code; it never raises."""
        typed = OmegaConf.to_object(config)
        if not isinstance(typed, TrainConfig):
            raise TypeError("a job is a training run")
        job, run = self.jobs[str(typed.name)], RunDirectory.of(typed)
        work = partial(train_job, typed)
        # A worker has no handlers yet, and between two jobs Lightning has none installed.
        if os.getpid() != self.main_pid:
            STOP.install()
            _exit_with_main_process(self.main_pid)
        with _JOB_LOCK:
            if STOP.requested:
                return STOP.exit_code
            print_line(f"{job.name}: starts; its output: {run.logs / JOB_LOG}")
            code = run_in_process(run, work, self.main_pid)
            print_line(f"{job.name}: {state_of(run)} {failure_text(run)}".rstrip())
            return code


@cache
def _exit_with_main_process(main_pid: int) -> None:
    """Exit this worker once the sweep's process has died and the worker's job has ended.

    A joblib worker would wait for ever for its next job.
    """

    def watch() -> None:
        while os.getppid() == main_pid:
            time.sleep(1)
        with _JOB_LOCK:
            os._exit(EXIT_RESUMABLE)

    threading.Thread(target=watch, daemon=True).start()


def train_job(config: TrainConfig) -> int:
    """Train the run and return its exit code."""
    # Not in the process that forks.
    from modtrain.training.run import train  # noqa: PLC0415

    return train(config).exit_code


@contextmanager
def _signals_forwarded_to_workers() -> Iterator[None]:
    """Forward a stop signal of this process to the launcher's workers."""

    def handle(signum: int, frame: FrameType | None) -> None:
        STOP._handle(signum, frame)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                # Not as SIGINT: a terminal sends Ctrl-C to every process itself.
                os.kill(child.pid, signal.SIGTERM)

    before = {signum: signal.signal(signum, handle) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
