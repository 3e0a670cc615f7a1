"""Names of runs that were started without one: ``mod-1.2m-3``. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from modtrain.common.errors import ConfigError, Problem
from modtrain.models.flops import parameters
from modtrain.training.config import TrainConfig

_UNITS = ((10**9, "b"), (10**6, "m"), (10**3, "k"))


def claim_name(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> str:
    """Return a name for a run without one, and make its directory, so that no other run gets it.

    It says what the model is, and a number that is free below ``runs_dir``. In a job of Slurm that
    is the job's, with the step's: a job that is requeued so finds its run again.

    config: resolved.

    Raises:
        ConfigError: torchrun may restart the processes, which would then not find the run.
    """
    root, kind = Path(config.runs_dir), model_kind(config)
    job, step = environment.get("SLURM_JOB_ID"), environment.get("SLURM_STEP_ID")
    if job is not None:
        name = f"{kind}-job-{job}" if step is None else f"{kind}-job-{job}.{step}"
        is_restarted = environment.get("SLURM_RESTART_COUNT", "0") != "0"
        if step is not None or is_restarted or not (root / name / "config.yaml").exists():
            (root / name).mkdir(parents=True, exist_ok=True)
            return name
        # One of several runs in an allocation.
        kind = name
    if environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        reason = "is needed under torchrun --max-restarts: a restart resumes by the run's name"
        raise ConfigError([Problem("name", "null", reason, "add name=my_run")])
    root.mkdir(parents=True, exist_ok=True)
    numbered = re.compile(re.escape(kind) + r"-(\d+)")
    taken = [int(match[1]) for path in root.iterdir() if (match := numbered.fullmatch(path.name))]
    number = max(taken, default=0) + 1
    while True:
        try:
            (root / f"{kind}-{number}").mkdir()
        except FileExistsError:
            # Another run that starts just now.
            number += 1
        else:
            return f"{kind}-{number}"


def model_kind(config: TrainConfig) -> str:
    """Return what the model is in a word: its family, and how many parameters it has."""
    model = config.model
    has_experts = model.experts.count is not None
    family = ("mode" if has_experts else "mod") if model.is_routed else "dense"
    if has_experts and not model.is_routed:
        family = "mode" if model.experts.noop else "moe"
    if model.vocab_size is None:
        # Of a job that waits for one that prepares its data.
        return family
    count = parameters(model).total
    size, unit = next(((s, u) for s, u in _UNITS if count >= s), (1, ""))
    digits = 1 if count < 10 * size and unit != "k" else 0
    return f"{family}-{count / size:.{digits}f}{unit}"
