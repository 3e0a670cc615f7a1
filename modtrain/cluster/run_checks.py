"""What of a run can be checked before its job is submitted."""

from __future__ import annotations

from pathlib import Path

from modtrain.cluster.config import SubmitConfig
from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.data.remote.urls import is_url
from modtrain.data.stream.prepared import INDEX_NAME
from modtrain.training.config import TrainConfig
from modtrain.training.plan import TrainingPlan, resolve
from modtrain.training.plan_report import device_bytes, gibibytes
from modtrain.training.run_directory import check_resumable

# What comes with prepared data, where the configuration does not say it.
_OF_DATA = ("model.vocab_size", "data.seq_len", "data.eos_id", "budget.epochs")


def _mount_problems(run: TrainConfig, config: SubmitConfig) -> list[Problem]:
    """Find data that a container would not see, of each source."""
    site = config.cluster
    if site.container == "none":
        return []
    seen = [
        Path.cwd(),
        *(Path(mount.split(":")[1 if ":" in mount else 0]) for mount in site.mounts),
    ]
    if site.container == "apptainer":
        # It mounts these by itself.
        seen += [Path.home(), Path("/tmp")]  # noqa: S108
    reason = f"is outside of all that the container sees: {', '.join(map(str, seen))}"
    problems = []
    for name, text in run.data.paths.items():
        path = Path(text).absolute()
        if not is_url(text) and not any(path.is_relative_to(folder) for folder in seen):
            key = f"data.sources.{name}.path" if name else "data.path"
            problems.append(Problem(key, str(path), reason, f"add {path} to cluster.mounts"))
    return problems


def run_problems(run: TrainConfig, config: SubmitConfig) -> list[Problem]:
    """Compare a run's plan with the nodes requested for it.

    Raises:
        ConfigError: everything wrong with the run itself.
        CheckpointError: its directory has another run.
    """
    if problems := _mount_problems(run, config):
        return problems
    result = _resolve(run, config)
    if result is None:
        return []
    resolved, plan = result
    check_resumable(run, resolved)
    if resolved.strategy.accelerator == "cuda" and config.gpus == 0:
        remedy = "request GPUs, or set strategy.accelerator=cpu"
        return [Problem("gpus_per_node", 0, "and strategy.accelerator=cuda", remedy)]
    memory = config.cluster.gpu_memory
    needed = device_bytes(resolved, plan.dims)
    if memory is None or config.gpus == 0 or needed < memory * 2**30:
        return []
    reason = (
        f"is less than the {gibibytes(needed)} of weights, gradients and moments that each GPU"
        f" needs under strategy={resolved.strategy.name}, without activations"
    )
    remedy = "use strategy=fsdp or hsdp, or more GPUs; modtrain plan shows what takes how much"
    return [Problem("cluster.gpu_memory", f"{memory:g}", reason, remedy)]


def _resolve(run: TrainConfig, config: SubmitConfig) -> tuple[TrainConfig, TrainingPlan] | None:
    """Return the run with its plan; None where that needs data that another job is to prepare.

    Raises:
        ConfigError: everything wrong with the run that can be seen without them.
    """
    if not awaits_data(run, config):
        return resolve(run, launch=config.launch)
    try:
        return resolve(run, needs_data=False, launch=config.launch)
    except ConfigError as error:
        raise_if_any([problem for problem in error.problems if problem.key not in _OF_DATA])
        return None


def awaits_data(run: TrainConfig, config: SubmitConfig) -> bool:
    """Whether data of the run are not there yet, and the job waits for another one."""
    if config.after is None:
        return False
    paths = [path for path in run.data.paths.values() if not is_url(path)]
    return any(not (Path(path) / INDEX_NAME).exists() for path in paths)
