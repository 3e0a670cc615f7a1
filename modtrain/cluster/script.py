"""A job's script: a template of ``slurm/`` with directives and settings filled in.

A template is a script that sbatch accepts as it is. For a job the directives and the settings are
replaced, and the rest is copied. Every value is quoted: for the shell in the settings, for sbatch's
own parser in the directives.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modtrain.cluster.config import SubmitConfig
from modtrain.cluster.site import SITE_OPTIONS, ClusterConfig
from modtrain.common.errors import ModtrainError
from modtrain.common.shipped import slurm_dir
from modtrain.training.config import TrainConfig

_SETTINGS = "# --- settings"
_END = "# --- end of settings ---"
SERIAL = ("prepare", "eval", "search", "search-patterns", "compare", "isoflop")
"""The verbs that run in one process on one node."""


class ScriptError(ModtrainError):
    """A script that cannot be submitted to Slurm."""


@dataclass(frozen=True)
class ScriptTask:
    """What modtrain runs in a job, or in one task of an array.

    verb, overrides: of modtrain's command line. directory: of the logs and of what the task does.
    config: the run's, where the verb trains one; else None.
    """

    verb: str
    overrides: Sequence[str]
    directory: Path
    config: TrainConfig | None = None


@dataclass(frozen=True)
class JobScript:
    """Everything that a job's script contains.

    name: as squeue shows it. script: path of the script. output: pattern of the job's log.
    directory: the working directory. code: the frozen copy. python: the interpreter. tasks: one,
    or one for each task of an array. config_dir: of the user's own YAML, or None.
    """

    name: str
    script: Path
    output: Path
    directory: Path
    code: Path
    python: str
    config: SubmitConfig
    tasks: Sequence[ScriptTask]
    config_dir: Path | None = None


def template_of(verb: str, config: SubmitConfig) -> str:
    """Return the name of the template for ``verb``."""
    if verb == "train":
        if config.array:
            return "array.sbatch"
        return "train.sbatch" if config.nodes == 1 else "train_nodes.sbatch"
    return f"{verb if verb in ('prepare', 'eval', 'debug') else 'sweep_worker'}.sbatch"


def render(job: JobScript) -> str:
    """Return the script of ``job``.

    Raises:
        ScriptError: a value that a directive cannot contain.
    """
    verb = job.tasks[0].verb
    name = template_of(verb, job.config)
    template = (slurm_dir() / name).read_text()
    head, rest = template.split(_SETTINGS, 1)
    body = rest.split(_END, 1)[1]
    comments = [line for line in head.splitlines()[1:] if line.startswith("# ")]
    lines = [
        "#!/usr/bin/env bash",
        f"# Written by modtrain submit from slurm/{name}; sbatch takes it again.",
        *comments[1:],
        *(f"#SBATCH {option}" for option in _options(job)),
        "set -euo pipefail",
        "",
        f"{_SETTINGS} ---",
        *_settings(job),
        _END,
    ]
    return "\n".join(lines) + body


def _options(job: JobScript) -> list[str]:
    config, site, verb = job.config, job.config.cluster, job.tasks[0].verb
    serial = verb in SERIAL
    gpus = gpus_of(config, verb)
    memory = site.memory_per_node
    if memory == "0" and gpus < site.gpus_per_node:
        # All of a node's memory would block its other GPUs for other jobs.
        memory = None
    per_node = 1 if serial or site.launcher == "torchrun" else config.processes
    processes_per_task = config.processes if site.launcher == "torchrun" and not serial else 1
    num_tasks = config.workers or len(job.tasks)
    limit = "" if config.at_once is None else f"%{config.at_once}"
    named: dict[str, str | int | None] = {
        "job-name": job.name,
        **{name: getattr(site, name) for name in SITE_OPTIONS},
        "nodes": 1 if serial else config.nodes,
        "ntasks-per-node": per_node,
        **_gpu_options(site, gpus, per_node),
        "cpus-per-task": site.cpus_per_process * processes_per_task,
        "mem": memory,
        "time": config.time or site.time,
        "signal": f"B:USR1@{site.lead}",
        "array": f"0-{num_tasks - 1}{limit}" if config.array or config.workers else None,
        "begin": config.begin,
        "exclude": ",".join(site.exclude) or None,
        "mail-user": site.mail,
        "mail-type": ",".join(site.mail_on) if site.mail and site.mail_on else None,
        "dependency": f"afterok:{config.after}" if config.after else None,
        # Else it would stay in the queue for ever where that job fails.
        "kill-on-invalid-dep": "yes" if config.after else None,
        "chdir": str(job.directory),
        "output": str(job.output),
        "open-mode": "append",
    }
    options = [f"--{key}={_quoted(str(v))}" for key, v in named.items() if v is not None]
    # A debug session is interactive: requeueing it is of no use.
    is_requeued = site.restart == "requeue" and verb != "debug"
    options.append("--requeue" if is_requeued else "--no-requeue")
    return options + [_quoted_option(option) for option in site.options]


def gpus_of(config: SubmitConfig, verb: str) -> int:
    """Return the GPUs per node of ``verb``: a single process uses one or none."""
    if verb not in SERIAL or config.gpus_per_node is not None:
        return config.gpus
    return 0 if verb == "prepare" else min(config.gpus, 1)


def _gpu_options(site: ClusterConfig, gpus: int, num_tasks: int) -> dict[str, str]:
    """Return the option for ``gpus`` of a node, which ``num_tasks`` tasks have."""
    if gpus == 0:
        return {}
    kind = "" if site.gpu_type is None else f"{site.gpu_type}:"
    if site.gpu_request == "per_task":
        return {"gpus-per-task": f"{kind}{gpus // num_tasks}"}
    if site.gres is None:
        return {"gpus-per-node": f"{kind}{gpus}"}
    return {"gres": f"{site.gres}:{kind}{gpus}"}


def _settings(job: JobScript) -> list[str]:
    config, site = job.config, job.config.cluster
    environment = dict(site.environment)
    for library, own in (("NCCL", site.nccl_interface), ("GLOO", site.gloo_interface)):
        interface = own or site.network_interface
        if interface is not None:
            environment.setdefault(f"{library}_SOCKET_IFNAME", interface)
    lines = _assignments(
        code=str(job.code),
        python=job.python,
        script=str(job.script),
        launcher=site.launcher,
        processes=str(config.processes),
        container=site.container,
        image=site.image or "",
        scratch=site.scratch or "",
        gpus=str(gpus_of(config, job.tasks[0].verb)),
        srun_options=[*_binding(site), *site.srun_options],
        on_given_up=site.on_given_up,
        log_size=str(site.log_size),
        num_logs=str(site.num_logs),
        again=_restart_mode(config),
        retry_delay=str(site.retry_delay),
        lead=str(site.lead),
        grace=str(site.grace),
        verb=job.tasks[0].verb,
        mounts=[*_required_mounts(job), *site.mounts] if site.container != "none" else [],
        site_files=site.source,
        modules=site.modules,
        variables=[f"{name}={value}" for name, value in environment.items()],
    )
    # After two dashes nothing is parsed as an option.
    options = ["--"] if job.config_dir is None else ["--config-dir", str(job.config_dir), "--"]
    task_lines = [
        _assignments(run_directory=str(task.directory), overrides=[*options, *task.overrides])
        for task in job.tasks
    ]
    if not config.array:
        return lines + task_lines[0]
    lines.append('case "$SLURM_ARRAY_TASK_ID" in')
    for number, assignments in enumerate(task_lines):
        lines += [f"{number})", *(f"  {line}" for line in assignments), "  ;;"]
    return [*lines, "esac"]


def _binding(site: ClusterConfig) -> list[str]:
    """Return srun's option by which each process sees all GPUs of its node, as NCCL wants it."""
    if site.gpu_request != "per_task" or any("--gpu-bind" in text for text in site.srun_options):
        return []
    return ["--gpu-bind=none"]


def _restart_mode(config: SubmitConfig) -> str:
    if config.is_resubmitted:
        return "resubmit"
    return "nothing" if config.chain is not None else config.cluster.restart


def _required_mounts(job: JobScript) -> list[str]:
    """Return the mounts that any container needs: the working directory, the code and the runs.

    An array's runs are below its script: one mount covers all of them.
    """
    required = [job.directory, job.code, job.script.parent]
    paths: list[Path] = []
    for path in (*required, *(task.directory for task in job.tasks)):
        if any(path.is_relative_to(other) for other in paths):
            continue
        if re.search("[,:]", str(path)):
            container = job.config.cluster.container
            raise ScriptError(
                f"{path} contains a comma or a colon, at which {container} splits a mount."
                " remedy: give another name= or runs_dir=, or one below the working directory"
            )
        paths.append(path)
    return list(map(str, paths))


def _assignments(**values: str | list[str]) -> list[str]:
    """Return bash's assignments of texts and arrays."""
    return [
        f"{name}={shlex.quote(value) if isinstance(value, str) else f'({shlex.join(value)})'}"
        for name, value in values.items()
    ]


def _quoted(value: str) -> str:
    """Quote a value for sbatch's parser of directives."""
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise ScriptError(
            f"{value!r} has a control character in it, which a directive cannot contain"
        )
    if re.fullmatch(r"[A-Za-z0-9_./:=@%,+-]*", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _quoted_option(option: str) -> str:
    """Quote the value of an option of sbatch, unless it is quoted already."""
    name, equals, value = option.partition("=")
    if not equals or not name.startswith("--") or re.search(r"[\"'\\]", value):
        return option
    return f"{name}={_quoted(value)}"


def check(text: str, name: str) -> None:
    """Find what sbatch does not report: shell errors, and directives after the first command.

    Raises:
        ScriptError: what is wrong with the script.
    """
    command = ["bash", "-n", "/dev/stdin"]
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)  # noqa: S603
    if done.returncode:
        raise ScriptError(f"{name} is not a valid shell script: {done.stderr.strip()}")
    began = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#SBATCH") and began:
            raise ScriptError(
                f"{name}, line {number}: {line}: sbatch reads no directive after the first command"
            )
        began = began or bool(line.strip() and not line.startswith("#"))
